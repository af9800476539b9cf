"""`jx.compress`: what it returns is what its report says, and its recipe makes it again."""

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import jaxaccel as jx
from jaxaccel import export
from jaxaccel._compress import _search
from jaxaccel._compress._ladder import Ladder
from tests.models import filled, normal


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast."""
    monkeypatch.setattr(_search, "_ROUNDS", 2)


def net(params: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    hidden = jax.nn.relu(hidden @ params["b"]["kernel"])
    return hidden @ params["c"]["kernel"]


def parameters(dead: int = 0, seed: int = 0) -> Any:
    """Of which so many hidden channels of the first layer do nothing."""
    made = {
        "a": {"kernel": normal(seed, 12, 24), "bias": normal(seed + 1, 24) * 0.1},
        "b": {"kernel": normal(seed + 2, 24, 16) / 5},
        "c": {"kernel": normal(seed + 3, 16, 4) / 4},
    }
    live = jnp.arange(24) >= dead
    made["a"] = {"kernel": made["a"]["kernel"] * live, "bias": made["a"]["bias"] * live}
    made["b"]["kernel"] = made["b"]["kernel"] * live[:, None]
    return made


X = normal(9, 32, 12)


DEAD = parameters(dead=6)


def closeness(params: Any, fn: Callable = net, x: jax.Array = X) -> Callable[..., float]:
    """Minus the largest difference from the original, over the largest number."""
    wanted = np.asarray(fn(params, x))

    def evaluate(fn: Callable, params: Any) -> float:
        return -float(np.abs(np.asarray(jax.jit(fn)(params, x)) - wanted).max() / wanted.max())

    return evaluate


def compressed(params: Any, evaluate: Any = None, **options: Any) -> Any:
    options = {"max_drop": 0.05, "progress": False} | options
    return jx.compress(net, params, [X], evaluate or closeness(params), **options)


@cache
def shared(target: Any) -> Any:
    """One search for each target, of a network with dead channels; for tests that only read."""
    return compressed(DEAD, target=target, round_to=1)


def test_dead_channels_go_and_nothing_else_changes():
    params = parameters(dead=9)
    fn, small, report = compressed(params, target="flops", max_drop=1e-5)
    assert small["a"]["kernel"].shape == (12, 15)
    assert_allclose(fn(small, X), net(params, X), rtol=1e-4, atol=1e-5)
    assert report.chosen.macs < report.candidates[0].macs == 32 * (12 * 24 + 24 * 16 + 16 * 4)


@pytest.mark.parametrize("target", ["latency", "bytes", "flops"])
def test_what_is_returned_is_what_the_report_says(target: Any):
    fn, small, report = shared(target)
    assert closeness(DEAD)(fn, small) == pytest.approx(report.chosen.score, abs=1e-6)
    assert report.chosen.drop == report.original - report.chosen.score <= 0.05
    fits = [one for one in report.candidates if one.drop <= 0.05]
    assert report.chosen.cost(target) == min(one.cost(target) for one in fits)
    assert report.chosen.cost(target) < report.candidates[0].cost(target) or target == "latency"
    stored = sum(
        leaf.nbytes for leaf in jax.tree.leaves(small, is_leaf=lambda x: hasattr(x, "nbytes"))
    )
    assert report.chosen.bytes == stored
    assert all(one.ms and one.low <= one.ratio <= one.high for one in report.candidates)


def test_each_target_has_its_arithmetic():
    names = lambda target: {
        one.name.rpartition(", ")[2] for one in shared(target).report.candidates
    }
    assert names("flops") == {"as given", "float", "forms timed"}
    assert {"as given", "float", "int8"} <= names("latency")
    assert {"float", "int8", "int8 weights", "int4 weights"} <= names("bytes")


def test_the_pareto_front_is_of_those_that_nothing_beats():
    report = shared("bytes").report
    key = lambda one: (one.bytes, -one.score)
    for one in report.candidates:
        beaten = any(
            other.bytes <= one.bytes and other.score >= one.score and key(other) != key(one)
            for other in report.candidates
        )
        assert any(key(one) == key(other) for other in report.pareto) == (not beaten)
    assert [one.bytes for one in report.pareto] == sorted({one.bytes for one in report.pareto})[
        ::-1
    ]


@pytest.mark.parametrize("target", ["latency", "bytes", "flops"])
def test_a_recipe_makes_the_same_again(target: Any, tmp_path: Any):
    fn, small, report = shared(target)
    report.recipe.save(tmp_path / "recipe.json")
    again = jx.Recipe.load(tmp_path / "recipe.json")
    other, new = again.apply(net, DEAD, [X])
    assert jax.tree.structure(new) == jax.tree.structure(small)
    jax.tree.map(assert_array_equal, new, small)
    assert_array_equal(jax.jit(other)(new, X), jax.jit(fn)(small, X))
    assert again.engine == report.engine == "xla"
    assert str(again) == str(report.recipe)


def trained(calls: list[Any]) -> Callable:
    def finetune(fn: Callable, params: Any, teacher: Any) -> Any:
        calls.append(teacher)
        wanted = teacher[0](teacher[1], X)
        loss = lambda params: ((fn(params, X) - wanted) ** 2).mean()
        step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.02 * g, p, jax.grad(loss)(p)))
        for _ in range(20):
            params = step(params)
        return params

    return finetune


def test_training_stands_between_the_rounds_and_in_the_recipe():
    params, calls = parameters(), []
    options = {"target": "flops", "max_drop": 0.6, "keep": 0.6, "finetune": trained(calls)}
    fn, small, report = compressed(params, **options)
    assert calls
    assert all(one[0] is net and one[1] is params for one in calls)
    rounds = [step["transform"] for step in report.recipe.steps]
    count = rounds.count("finetune")
    assert rounds[: 2 * count] == ["prune", "finetune"] * count
    assert count >= 1
    assert report.chosen.macs <= 0.6 * report.candidates[0].macs
    calls.clear()
    other, new = report.recipe.apply(net, params, [X], trained(calls))
    assert len(calls) == count
    assert_array_equal(other(new, X), fn(small, X))
    with pytest.raises(ValueError, match=r"finetune: the recipe trains between its steps; pass"):
        report.recipe.apply(net, params, [X])


def test_after_a_miss_it_goes_half_as_far_and_not_the_same_way_again():
    """A network that may lose a fifth of its MACs and no more, whatever is trained."""
    params, tried = parameters(), []

    def evaluate(fn: Callable, params: Any) -> float:
        tried.append(tuple(leaf.shape for leaf in jax.tree.leaves(params)))
        return 0.0 if sum(map(np.prod, tried[-1])) > 0.8 * 760 else -1.0

    options = {"target": "flops", "keep": 0.7, "finetune": lambda fn, params, teacher: params}
    report = compressed(params, evaluate, max_drop=0.5, **options).report
    (over,) = report.left_out
    assert over.endswith("fine-tuned: over the budget, a drop of 1")
    names = {one.name.partition(",")[0] for one in report.candidates}
    assert len(names) == 2
    assert len({*tried}) == 3


def test_training_keeps_the_mode_and_the_statistics_of_a_flax_model():
    model = jx.nn.ConvNet(
        input_shape=(12, 12, 1),
        kernel_size=3,
        widths=(8, 8),
        dense=(),
        dropout=0.0,
        rngs=nnx.Rngs(0),
    )
    fn, params = jx.functional(model)
    x, seen = normal(3, 8, 12, 12, 1), []

    def finetune(fn: Any, params: Any, teacher: Any) -> Any:
        seen.append(fn.train(params, jax.random.key(0), x)[0].shape)
        return params

    jx.compress(fn, params, [x], lambda fn, params: 0.0, max_drop=1, finetune=finetune,
                target="flops", progress=False, keep=0.5)  # fmt: skip
    assert seen == [(8, 10)] * len(seen) != []


def test_what_training_must_return():
    with pytest.raises(ValueError, match=r"finetune: returned \{.*expected \{.*return the trained"):
        compressed(parameters(), target="flops", finetune=lambda fn, params, teacher: teacher[1])


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_interrupted_it_gives_the_best_so_far(calls: int):
    params = parameters(dead=8)
    score, left = closeness(params), iter([True] * calls)

    def evaluate(fn: Callable, params: Any) -> float:
        if not next(left, False):
            raise KeyboardInterrupt
        return score(fn, params)

    if calls == 0:  # before anything was measured
        with pytest.raises(KeyboardInterrupt):
            compressed(params, evaluate)
        return
    fn, small, report = compressed(params, evaluate)
    assert report.interrupted
    assert "Interrupted: the best so far." in str(report)
    assert score(fn, small) == pytest.approx(report.chosen.score, abs=1e-6)


def test_engines_are_candidates_and_scored_by_what_they_give():
    report = compressed(parameters(), engines=("xla", "onnxruntime")).report
    assert {one.engine for one in report.candidates} == {"xla", "onnxruntime"}
    assert not [one for one in report.left_out if "onnxruntime" in one]
    own = {one.name: one for one in report.candidates if one.engine == "onnxruntime"}
    assert own["original, float"].score == pytest.approx(0, abs=1e-5)
    assert own["original, int8"].recipe.engine == "onnxruntime"


def test_an_engine_that_gives_other_numbers_is_not_chosen(monkeypatch: pytest.MonkeyPatch):
    compiled = export.compile

    def wrong(fn: Any, params: Any, *example: Any, engine: Any) -> Any:
        bind = compiled(fn, params, *example, engine=engine).bind
        return export.Compiled(engine, params, lambda *args: lambda: 2 * bind(*args)())

    monkeypatch.setattr(export, "compile", wrong)
    report = compressed(parameters(), engines=("xla", "onnxruntime")).report
    assert all(one.drop > 0.1 for one in report.candidates if one.engine == "onnxruntime")
    assert report.engine == "xla"


def test_what_an_engine_cannot_do_is_said():
    params, x = {"kernel": normal(0, 6, 6)}, normal(1, 4, 6)
    fn = lambda params, x: jnp.fft.fft(x @ params["kernel"]).real
    report = jx.compress(fn, params, [x], lambda fn, params: 0.0, max_drop=0, progress=False,
                         engines=("xla", "onnxruntime")).report  # fmt: skip
    assert any("original, float, on onnxruntime: " in one for one in report.left_out)
    assert "left out: removing channels: no group of them can go" in str(report)


def spoilt(params: Any) -> Any:
    """With outliers in what the last layer reads: min and max of 8 bits are far apart."""
    params["b"]["kernel"] = params["b"]["kernel"].at[:, 0].multiply(300.0)
    params["c"]["kernel"] = params["c"]["kernel"].at[0].multiply(1 / 300.0)
    return params


def test_layers_that_8_bits_spoil_stay_in_floating_point():
    params = spoilt(parameters())
    report = compressed(params, max_drop=0.03).report
    by_name = {one.name: one for one in report.candidates}
    assert by_name["original, int8"].drop > 0.03
    (found,) = (
        one
        for name, one in by_name.items()
        if "but for some layers" in name and "timed" not in name
    )
    assert found.drop <= 0.03
    (step,) = (s for s in found.recipe.steps if s["transform"] == "quantize.int8")
    assert "a/kernel" in step["kernels"]
    assert len(step["kernels"]) < 3


def test_an_error_of_evaluate_is_raised_where_layers_are_tried_too():
    params, score = spoilt(parameters()), closeness(spoilt(parameters()))

    def evaluate(fn: Any, params: Any) -> float:
        kernels = [row.where for row in fn.report.rows] if hasattr(fn, "report") else []
        if kernels == ["b/kernel"]:
            raise ValueError("of my own")
        return score(fn, params)

    with pytest.raises(ValueError, match="of my own"):
        compressed(params, evaluate, max_drop=0.03)


def test_where_everything_costs_the_function_is_as_given():
    params = parameters()
    worse = lambda fn, p: 0.0 if fn is net else -1.0
    fn, same, report = compressed(params, worse, max_drop=0.5)
    assert fn is net
    assert same is params
    assert report.chosen.name == "original, as given"
    assert not report.recipe.steps
    assert report.recipe.apply(net, params, [X]) == (net, params)
    assert all(one.drop == 1 for one in report.candidates[1:])


def ladder(params: Any, round_to: int = 1) -> Ladder:
    return Ladder(net, params, (X,), (X,), "macs", round_to)


def test_the_ladder_goes_down_step_by_step_and_costs_are_those_of_the_plans():
    params = parameters()
    found = ladder(params)
    assert found.costs == sorted(set(found.costs), reverse=True)
    for depth in range(0, len(found.costs), 3):
        plan = found.plan(depth)
        assert plan.macs.after == found.costs[depth]
        small = plan.rewrite(net)(plan.shrink(params), X)
        assert_allclose(
            small, net(jx.prune.apply(params, plan.masks(params)), X), rtol=2e-4, atol=1e-4
        )


def test_sensitivity_is_what_masking_a_group_does():
    params = parameters()
    wanted = np.asarray(net(params, X), np.float64)
    rows = [one for one in ladder(params).sensitivity if "a/kernel" in one.group]
    for one in rows:
        plan = jx.prune.plan(net, params, X, ratio=one.ratio, where="a/kernel axis 1")
        found = np.asarray(net(jx.prune.apply(params, plan.masks(params)), X), np.float64)
        distortion = ((found - wanted) ** 2).mean() / wanted.var()
        assert one.distortion == pytest.approx(distortion, rel=1e-4)
        assert one.saved == pytest.approx(1 - plan.macs.after / plan.macs.before)
    assert [one.ratio for one in rows] == [
        3 / 24,
        6 / 24,
        9 / 24,
        12 / 24,
        15 / 24,
        18 / 24,
        21 / 24,
    ]


def test_channels_stay_in_multiples():
    for depth in range(len(ladder(parameters(), 8).costs)):
        plan = ladder(parameters(), 8).plan(depth)
        assert all(row.kept % 8 == 0 for row in plan.rows)


def test_the_dead_go_first():
    found = ladder(parameters(dead=9))
    first = found.plan(1)
    gone = set(range(24)) - {*first.kept["a/kernel"][1].tolist()}
    assert gone
    assert gone <= set(range(9))


def sizes() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 12), min_size=2, max_size=4)


@settings(max_examples=4, deadline=None)
@given(sizes(), st.floats(0, 0.5), st.sampled_from(["bytes", "flops"]), st.integers(0, 99))
def test_any_chain_stays_within_its_budget(widths: list[int], drop: float, target: Any, seed: int):
    shapes = {f"l{i}": jax.ShapeDtypeStruct(pair, jnp.float32)
              for i, pair in enumerate(pairwise(widths))}  # fmt: skip
    params, x = filled(shapes, seed), normal(seed, 16, widths[0])

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for i in range(len(widths) - 1):
            x = jnp.tanh(x @ params[f"l{i}"])
        return x

    evaluate = lambda f, p: -float(jnp.abs(f(p, x) - fn(params, x)).mean())
    made = jx.compress(fn, params, [x], evaluate, target=target, max_drop=drop, progress=False)
    assert made.fn(made.params, x).shape == (16, widths[-1])
    assert evaluate(made.fn, made.params) >= -drop - 1e-5
    assert made.report.chosen.cost(target) <= made.report.candidates[0].cost(target)


def test_a_report_is_a_table_a_picture_and_data(tmp_path: Any):
    report = shared("bytes").report
    assert str(report).count("chosen") == 1
    lines = report.markdown().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(report.candidates) + 2
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(json.dumps(report.to_dict()))
    chosen = data["candidates"][data["chosen"]]
    assert chosen["bytes"] == report.chosen.bytes
    assert chosen["recipe"] == str(report.recipe)
    assert data["pareto"] == [report.candidates.index(one) for one in report.pareto]
    assert {one["group"] for one in data["sensitivity"]} == {
        one.group for one in report.sensitivity
    }
