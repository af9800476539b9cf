"""What `jx.compress` and `jx.Recipe` refuse, and in which words."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxaccel as jx
from tests.models import normal
from tests.test_compress import X, net, parameters


def one_shot() -> Iterator[jax.Array]:
    yield X


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target": "speed"},
            ValueError,
            "target='speed' must be one of 'latency', 'bytes', 'flops'",
        ),
        ({"max_drop": -0.1}, ValueError, r"max_drop=-0.1 must be >= 0, in units of the score"),
        ({"max_drop": float("nan")}, ValueError, r"max_drop=nan must be >= 0"),
        (
            {"engines": "xla"},
            ValueError,
            "engines='xla' must be a sequence of some of 'xla', 'onnx",
        ),
        ({"engines": ()}, ValueError, r"engines=\(\) must be a sequence"),
        ({"engines": ("tpu",)}, ValueError, r"engines=\('tpu',\) must be a sequence of some of"),
        ({"keep": 1}, ValueError, r"keep=1 must be a share in \(0, 1\)"),
        ({"round_to": 0}, ValueError, "round_to=0 must be a whole number from 1 on"),
        ({"evaluate": lambda fn, params: float("nan")}, ValueError, "evaluate: gave NaN"),
        ({"batches": []}, ValueError, "batches: is empty"),
        ({"batches": one_shot()}, TypeError, "gives its batches once only"),
        ({"batches": X}, TypeError, "is no iterable of batches; pass a list"),
        ({"params": {"a": jnp.array([jnp.nan])}}, ValueError, "a: holds NaN or infinity"),
    ],
)
def test_bad_input(options: Any, error: type[Exception], message: str):
    given: Any = {"params": parameters(), "batches": [X], "evaluate": lambda fn, params: 0.0}
    given |= {"max_drop": 0.0, "progress": False} | options
    first = (given.pop(name) for name in ("params", "batches", "evaluate"))
    with pytest.raises(error, match=message):
        jx.compress(net, *first, **given)


def test_an_engine_that_is_not_installed_is_named_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    calls = []
    with pytest.raises(ImportError, match="engine='openvino' is not installed: pip install openv"):
        jx.compress(net, parameters(), [X], lambda fn, p: calls.append(fn) or 0.0, max_drop=0,
                    engines=("openvino",))  # fmt: skip
    assert not calls


def written(tmp_path: Any, change: Callable[[Any], Any]) -> Any:
    plan = jx.prune.plan(net, parameters(), X, ratio=0.5)
    content = jx.Recipe(({"transform": "prune", "plan": plan.to_dict()},)).to_dict()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(change(content)))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], "not a saved recipe: it has no format 'jaxaccel.Recipe'"),
        (lambda c: c | {"version": 2}, "version 2 of the format; this jaxaccel reads version 1"),
        (lambda c: c | {"steps": {}}, "damaged: steps must be a list, engine a string"),
        (lambda c: c | {"engine": 1}, "damaged: steps must be a list, engine a string"),
        (
            lambda c: c | {"steps": [{"transform": "exec"}]},
            r"steps\[0\]: 'exec' is none of 'prune'",
        ),
        (lambda c: c | {"steps": [3]}, r"steps\[0\]: None is none of"),
        (lambda c: c | {"steps": [{"transform": "prune"}]}, r"steps\[0\]: plan: not a saved plan"),
        (
            lambda c: c | {"steps": [{"transform": "quantize.int8", "kernels": "a"}]},
            "kernels: must",
        ),
        (
            lambda c: c | {"steps": [{"transform": "quantize.weights", "bits": 3}]},
            "bits: 3 must be 4",
        ),
        (lambda c: c | {"steps": [{"transform": "autotune", "mode": 1}]}, "mode: 1 must be 'meas"),
    ],
)
def test_a_damaged_recipe_is_refused(change: Any, message: str, tmp_path: Any):
    path = written(tmp_path, change)
    with pytest.raises(
        ValueError, match=rf"recipe\.json: {message}|recipe\.json: steps.*{message}"
    ):
        jx.Recipe.load(path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Any):
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match=r"r\.json: not a saved recipe: Expecting"):
        jx.Recipe.load(tmp_path / "r.json")


def test_a_recipe_for_other_shapes_is_refused():
    plan = jx.prune.plan(net, parameters(), X, ratio=0.5)
    recipe = jx.Recipe(({"transform": "prune", "plan": plan.to_dict()},))
    other = parameters()
    other["a"] = {"kernel": normal(0, 12, 30), "bias": normal(1, 30)}
    other["b"] = {"kernel": normal(2, 30, 16)}
    with pytest.raises(ValueError, match=r"a/\w+: .*24"):
        recipe.apply(net, other, [X])
