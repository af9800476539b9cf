"""Artefacts that earlier versions saved, which are kept as they are, can still be read."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from tests.artefacts import identical
from tests.saved.nodes import every_node

VERSIONS = sorted(Path(__file__).with_name("saved").glob("v*"))


def test_there_is_one_of_every_version():
    from jaxaccel.export._manifest import VERSION

    assert [folder.name for folder in VERSIONS] == [f"v{k + 1}" for k in range(VERSION)]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("form", ["net", "net.zip"])
def test_a_network_of_integers(folder, form):
    fn, params = jx.export.load(folder / form)
    expected = np.load(folder / "expected.npz")
    for name in ("a", "b"):
        result = np.asarray(fn(params, expected[name]))
        np.testing.assert_allclose(result, expected[f"of_{name}"], rtol=1e-6, atol=1e-6)
    assert params["params"]["conv1"]["kernel"].values.dtype == jnp.int8
    steps = ["prune", "fold.batchnorm", "quantize.int8", "autotune"]
    assert [step["transform"] for step in fn.recipe] == steps


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_every_node(folder):
    fn, params = jx.export.load(folder / "nodes.zip")
    expected = every_node()
    identical(params, expected)
    identical(jx.export.params(folder / "nodes.zip", like=expected), expected)
    identical(fn(params, jnp.ones((3, 1))), {"nodes": expected, "sum": jnp.float32(4)})
