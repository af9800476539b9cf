"""Loaded functions have no graph: transforms refuse them by name."""

import jax
import pytest

import jaxaccel as jx
from tests.artefacts import FORMS, W, X, identical, net, saved
from tests.models import normal

REFUSAL = (
    "^fn: 'net' was loaded by jx.export.load: it is compiled from StableHLO and cannot be "
    "differentiated or transformed; transform the function that it was saved from, and save "
    "the result$"
)
TRANSFORMS = {
    "fold": lambda fn, p: jx.fold.batchnorm(fn, p, X),
    "plan": lambda fn, p: jx.prune.plan(fn, p, X, ratio=0.5),
    "channels": lambda fn, p: jx.prune.channels(fn, p, X, ratio=0.5),
    "int8": lambda fn, p: jx.quantize.int8(fn, p, [X], progress=False),
    "fake": lambda fn, p: jx.quantize.fake(fn, p, [X]),
    "equalize": lambda fn, p: jx.quantize.equalize(fn, p, [X]),
    "autotune": lambda fn, p: jx.autotune(fn, mode="rules")(p, X),
    "save": lambda fn, p: jx.export.save("never", fn, p, X),
    "onnx": lambda fn, p: jx.export.onnx("never", fn, p, X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_loaded_functions_are_opaque(name, tmp_path):
    fn, params = saved(tmp_path / "net")
    for one in (fn, jax.jit(fn)):
        with pytest.raises(TypeError, match=REFUSAL):
            TRANSFORMS[name](one, params)
    if name in ("save", "onnx", "autotune"):
        return
    line = r"\(tests/test_export_opaque.py:\d+ .*\)"
    with pytest.raises(TypeError, match=rf"^fn passes parameters to a function of jx.export.load "
                       rf"{line}, which cannot be transformed; call the function that it was saved "
                       r"from$"):  # fmt: skip
        TRANSFORMS[name](lambda p, x: fn(p, x) + 1, params)


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_function_beside_others(form, tmp_path):
    """As a teacher, or jitted; its gradient is refused by JAX."""
    teacher, held = saved(tmp_path / form)
    identical(jax.jit(teacher)(held, X), teacher(held, X))

    def fn(params, x):
        return net(params, x) - teacher(held, x)

    small, _ = jx.prune.channels(
        lambda p, x: net({"w": p["a"]}, x) @ p["b"] + teacher(held, x),
        {"a": normal(0, 3, 8), "b": normal(1, 8, 2)}, X, ratio=0.5,
    )  # fmt: skip
    assert jax.grad(lambda p: fn(p, X).sum())({"w": W})["w"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"gradient|VJP|derivative|differentiat"):
        jax.grad(lambda p: teacher(p, X).sum())(held)
    assert callable(small)
