"""Small artefacts, and what tests do to them."""

import hashlib
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel.export._manifest import _digest, _lines
from tests.models import normal

FORMS = ("folder", "file.zip")
W = jnp.arange(6.0).reshape(3, 2)
X = jnp.arange(12.0).reshape(4, 3)


def net(params, x):
    return x @ params["w"]


def saved(path, fn=net, params=None, *example, **options):
    jx.export.save(path, fn, {"w": W} if params is None else params, *(example or (X,)), **options)
    return jx.export.load(path)


def identical(found, expected):
    """The same nodes, and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        assert np.shape(a) == np.shape(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


IMAGES = normal(0, 4, 3)


def dense(params, x):
    return {"y": jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])}


DENSE = {"a": {"kernel": normal(1, 3, 5), "bias": normal(2, 5)}}


def part(folder, name):
    (found,) = [file for file in folder.iterdir() if file.name.startswith(name)]
    return found


def refused(path, message):
    """By all that read, or by `load` if it is the function that is damaged."""
    with pytest.raises(ValueError, match=message) as caught:
        jx.export.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def resealed(path, change):
    """A manifest that says of itself that it is whole."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    file.write_text(_lines(content | {"sha256": _digest(content)}))


def replaced(path, name, content):
    """A file with another content, and a manifest that tells its length and hash."""
    part(path, name).unlink()
    digest = hashlib.sha256(content).hexdigest()
    end = {"function": "stablehlo", "parameters": "safetensors"}[name]
    (path / f"{name}-{digest[:16]}.{end}").write_bytes(content)
    resealed(path, lambda m: m["files"].update(
        {name: {"bytes": len(content), "sha256": digest}}))  # fmt: skip


def peak(call):
    """The most bytes of Python and NumPy while it runs."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
