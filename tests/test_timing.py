"""How candidates are compiled, and what they are timed on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccel import _timing


@pytest.mark.parametrize("failing", ["xla", "bad"])
def test_a_form_that_does_not_compile_is_left_out(failing, monkeypatch):
    compile_, names = jax.stages.Lowered.compile, []

    def compiled(lowered):
        name = "bad" if "sine" not in lowered.as_text() else "xla"
        names.append(name)
        if name == failing:
            raise jax.errors.JaxRuntimeError("out of memory\nmore")
        return compile_(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    fns = {"xla": jnp.sin, "bad": lambda x: x - x**3 / 6}
    found = _timing.timed(fns, [np.full(3, 1e-3, np.float32)])
    assert sorted(names) == ["bad", "xla"]
    assert found.dropped == {failing: "out of memory"}
    assert set(found.seconds) == ({"xla"} if failing == "bad" else set())


def test_synthetic_operands_have_the_dtypes():
    avals = [jax.ShapeDtypeStruct((2,), d) for d in (jnp.bfloat16, jnp.int32, jnp.bool_)]
    avals.append(jax.eval_shape(lambda: jax.random.key(0)))
    types = lambda values: [(x.shape, x.dtype) for x in values]
    assert types(_timing.synthetic(avals)) == types(avals)
