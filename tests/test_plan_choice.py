"""Which channels a plan takes: criteria, ratio, scope, where, budgets, and what it refuses."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxaccel as jx
from tests.models import ZOO, filled

X = jnp.linspace(-1, 1, 15).reshape(5, 3)


def dense(*widths: int, seed: int = 0) -> dict[str, jax.Array]:
    """Kernels w0, w1, ... of dense layers."""
    sizes = pairwise(widths)
    shapes = {f"w{k}": jax.ShapeDtypeStruct(s, jnp.float32) for k, s in enumerate(sizes)}
    return filled(shapes, seed)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    *hidden, last = params.values()
    for kernel in hidden:
        x = jnp.tanh(x @ kernel)
    return x @ last


def plan(params: Any, x: Any = X, fn: Any = mlp, **how: Any) -> jx.prune.Plan:
    return jx.prune.plan(fn, params, x, **how)


def kept(made: jx.prune.Plan) -> list[int]:
    return [row.kept for row in made.rows]


def test_l1_and_l2_by_hand():
    w0 = np.array([[2.0, -4.0, 0.0], [2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    w1 = np.array([[1.0, 1.0], [1.0, -1.0], [10.0, 10.0]])
    params = {"w0": jnp.asarray(w0), "w1": jnp.asarray(w1)}
    groups = jx.groups(mlp, params, X)
    both = lambda f: (f(w0).sum(0) + f(w1).sum(1)) / 2
    np.testing.assert_allclose(jx.prune.l1(groups, params)[0], both(np.abs))
    np.testing.assert_allclose(jx.prune.l2(groups, params)[0], both(np.square))
    assert plan(params, ratio=1 / 3).kept["w0"][1].tolist() == [0, 2]  # 4, 3.5, 10.5
    assert plan(params, ratio=1 / 3, criterion=jx.prune.l2).kept["w0"][1].tolist() == [1, 2]


def test_the_kernels_of_a_group_count_alike_and_biases_do_not():
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["u"]

    params = {"w": jnp.ones((3, 4)), "b": 100 * jnp.arange(4.0), "u": jnp.ones((4, 2))}
    (scores,) = jx.prune.l1(jx.groups(fn, params, X), params)
    assert scores.tolist() == [2.5] * 4


def test_batchnorm_scale():
    case = ZOO[1]
    fn, params = case.build()
    params["params"]["norm1"]["scale"] = jnp.array([0.3, -0.9, 0.1, 0.2])
    made = jx.prune.plan(fn, params, case.images(), ratio=0.5, criterion=jx.prune.batchnorm_scale)
    assert made.kept["params/norm1/scale"][0].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"no norm scales the group of w0 axis 1.*where="):
        plan(dense(3, 4, 2), ratio=0.5, criterion=jx.prune.batchnorm_scale)


def test_taylor_is_what_the_loss_loses():
    """Of a loss that is linear in the weights, first order is all there is."""
    slopes = {"w0": jnp.ones((3, 4)), "w1": jnp.array([[0.5, 1.0]] * 4)}
    params = dense(3, 4, 2)
    loss = lambda p: (p["w0"] * slopes["w0"]).sum() + (p["w1"] * slopes["w1"]).sum()
    groups = jx.groups(mlp, params, X)
    (scores,) = jx.prune.taylor(loss)(groups, params)
    for channel in range(4):
        without = {
            "w0": params["w0"].at[:, channel].set(0),
            "w1": params["w1"].at[channel].set(0),
        }
        lost = abs(float(loss(params) - loss(without)))
        np.testing.assert_allclose(scores[channel], lost, rtol=1e-4)


def test_random_is_keyed_by_the_paths():
    wide, narrow = dense(3, 8, 6, 2), dense(3, 8, 2)
    criterion = jx.prune.random(jax.random.key(3))
    one = criterion(jx.groups(mlp, wide, X), wide)
    other = criterion(jx.groups(mlp, narrow, X), narrow)
    np.testing.assert_array_equal(one[0], other[0])
    assert not np.array_equal(one[0][:6], one[1])
    again = jx.prune.random(jax.random.key(4))(jx.groups(mlp, wide, X), wide)
    assert not np.array_equal(one[0], again[0])


@given(
    widths=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    ratio=st.floats(0, 1, exclude_max=True),
    round_to=st.integers(1, 5),
    scope=st.sampled_from(["local", "global"]),
    seed=st.integers(0, 99),
)
def test_how_many_stay(widths, ratio, round_to, scope, seed):
    params = dense(3, *widths, 2, seed=seed)
    made = plan(params, ratio=ratio, scope=scope, round_to=round_to)
    assert [row.channels for row in made.rows] == widths
    for row in made.rows:
        assert 1 <= row.kept <= row.channels
        assert row.kept % round_to == 0 or row.kept == row.channels
        if scope == "local":
            least = max(row.channels - int(ratio * row.channels + 1e-9), 1)
            assert least <= row.kept < least + round_to
        else:
            assert row.kept >= 0.1 * row.channels
    scores = jx.prune.l1(jx.groups(mlp, params, X), params)
    for k, values in enumerate(scores):
        stays = made.kept.get(f"w{k}", {}).get(1, np.arange(widths[k]))
        goes = np.setdiff1d(np.arange(widths[k]), stays)
        assert not len(goes) or values[goes].max() <= values[stays].min()
    assert made.parameters.after == sum(v.size for v in made.shrink(params).values())
    assert made.macs.after == 5 * made.parameters.after  # five rows, and dots only


def test_global_ranks_all_channels_relative_to_their_group():
    small = dense(3, 10, 10, 2)
    params = {"w0": small["w0"] * 1e-6, "w1": small["w1"] * 1e-6, "w2": small["w2"]}
    local, over_all = (kept(plan(params, ratio=0.5, scope=s)) for s in ("local", "global"))
    assert local == [5, 5]
    assert sum(over_all) == 10
    assert min(over_all) >= 3  # a ranking of bare scores would empty the first
    wide = dense(3, 20, 20, 2)
    one_sided = {"w0": wide["w0"].at[:, 1:].multiply(1e-9), "w1": wide["w1"].at[1:].multiply(1e-9)}
    found = kept(plan({**one_sided, "w2": wide["w2"]}, ratio=19 / 40, scope="global"))
    assert found == [2, 19]  # a tenth stays


def test_where():
    params = dense(3, 8, 6, 4, 2)
    assert kept(plan(params, ratio=0.5, where="w1 axis 1")) == [8, 3, 4]
    assert kept(plan(params, ratio=0.5, where="w1*")) == [4, 3, 4]  # it reads the first group
    rules = {"w0*": 0.25, "w1 axis 1": False, "*": True}
    assert kept(plan(params, ratio=0.5, where=rules)) == [6, 6, 2]
    assert kept(plan(params, ratio=0.5, where=lambda group: group.size > 5)) == [4, 3, 4]
    only_one = {"w0 axis 1": 0.75, "*": False}
    assert kept(plan(params, ratio=0.5, scope="global", where=only_one)) == [2, 6, 4]


def test_ties_go_in_order():
    params = {"w0": jnp.ones((3, 4)), "w1": jnp.ones((4, 2))}
    assert plan(params, ratio=0.5).kept["w0"][1].tolist() == [2, 3]


def test_a_users_criterion():
    from_the_end = lambda groups, params: [-np.arange(group.size) for group in groups]
    made = plan(dense(3, 6, 2), ratio=0.5, criterion=from_the_end)
    assert made.kept["w0"][1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("resource", ["parameters", "flops"])
@pytest.mark.parametrize("most", [0.2, 0.5, 0.9])
def test_budgets(resource, most):
    params = dense(3, 40, 30, 20, 2)
    made = plan(params, budget={resource: most})
    change = made.parameters if resource == "parameters" else made.macs
    assert 0.8 * most < change.after / change.before <= most
    assert change.before == sum(v.size for v in params.values()) * (1, 5)[resource == "flops"]


def test_a_latency_budget(monkeypatch):
    """Time is what the measurement says: here the parameters of what it is given."""

    def compare(candidates, *example, **options):
        before, after = (
            sum(leaf.size for leaf in jax.tree.leaves(params)) for _, params in candidates.values()
        )
        for fn, params in candidates.values():
            fn(params, *example)
        return SimpleNamespace(rows=[None, SimpleNamespace(ratio=after / before)])

    monkeypatch.setattr("jaxaccel.measure.compare", compare)
    example = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    made = plan(dense(3, 60, 60, 2), example, budget={"latency": 0.6})
    assert 0.5 < made.parameters.after / made.parameters.before <= 0.6


def test_latency_is_measured():
    params = dense(3, 8, 2)
    with pytest.raises(ValueError, match=r"leave .* of the latency at least, more than 0.001"):
        plan(params, budget={"latency": 0.001})


def test_a_schedule_ends_at_the_ratio():
    params, ratios = dense(3, 9, 2), jx.prune.schedule(0.5, rounds=4)
    assert ratios == sorted(ratios)
    assert ratios[-1] == 0.5
    found = []
    for ratio in ratios:
        made = plan(params, ratio=ratio)
        found.append(set(made.kept["w0"][1].tolist()))
        params = jx.prune.apply(params, made.masks(params))
    assert [len(stays) for stays in found] == [7, 6, 5, 5]
    assert all(later <= earlier for earlier, later in pairwise(found))
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"ratio=.* must be a number in \[0, 1\)"):
            jx.prune.schedule(bad, rounds=2)
    with pytest.raises(ValueError, match="rounds=0 must be a whole number from 1"):
        jx.prune.schedule(0.5, rounds=0)


def test_equal_scores_take_of_all_groups_alike():
    alike = lambda groups, params: [np.ones(group.size) for group in groups]
    made = plan(dense(3, 20, 20, 10, 2), ratio=0.5, scope="global", criterion=alike)
    assert kept(made) == [10, 10, 5]


def test_the_table():
    made = plan(dense(3, 8, 4, 2), ratio=0.5)
    assert str(made).splitlines() == [
        "kept  parameters saved  MACs saved  slices",
        "--------------------------------------------------------",
        " 4/8                28         140  w0 axis 1, w1 axis 0",
        " 2/4                20         100  w1 axis 1, w2 axis 0",
        "",
        "parameters 64 -> 24 (2.67x fewer)",
        "MACs       320 -> 120 (2.67x fewer)",
    ]
    assert repr(made) == "<Plan: 2 of 2 groups pruned, parameters 64 -> 24 (2.67x fewer)>"


def test_macs_of_loops_and_convolutions():
    def fn(p, x):
        step = lambda h, _: (jnp.tanh(h @ p["w"]), None)
        h, _ = jax.lax.scan(step, x @ p["v"], length=7)
        return h @ p["u"]

    params = {"v": jnp.ones((3, 4)), "w": jnp.ones((4, 4)), "u": jnp.ones((4, 2))}
    made = plan(params, fn=fn, ratio=0.5)
    assert made.macs == (5 * (12 + 7 * 16 + 8), 5 * (6 + 7 * 4 + 4))
    case = ZOO[3]
    fn, params = case.build()
    image = case.images()[:1]
    made = jx.prune.plan(fn, params, image, ratio=0.5)
    by_layer = lambda a, b, c: 24**2 * 25 * a + 8**2 * 25 * a * b + 16 * b * c + c * 10
    assert made.macs == (by_layer(10, 20, 50), by_layer(5, 10, 25))


BAD = {
    r"ratio=1.0 must be a number in \[0, 1\)": {"ratio": 1.0},
    r"ratio=-0.1 must be a number in \[0, 1\)": {"ratio": -0.1},
    r"ratio=nan must be a number in \[0, 1\)": {"ratio": float("nan")},
    r"ratio='0.5' must be a number": {"ratio": "0.5"},
    "ratio=None, budget=None: give one of the two": {},
    "ratio=0.5, budget=.*: give one of the two": {"ratio": 0.5, "budget": {"flops": 0.5}},
    "must have one key of parameters, flops, latency": {"budget": {"bytes": 0.5}},
    "budget=0.5 must have one key of": {"budget": 0.5},
    r"a share must be a number in \(0, 1\)": {"budget": {"flops": 2}},
    r"flops': 'a'}: a share must be a number": {"budget": {"flops": "a"}},
    "leave .* of the flops at least, more than 0.01; ask for more": {"budget": {"flops": 0.01}},
    'scope=\'all\' must be "local" or "global"': {"ratio": 0.5, "scope": "all"},
    "round_to=0 must be a whole number": {"ratio": 0.5, "round_to": 0},
    "round_to=2.5 must be a whole number": {"ratio": 0.5, "round_to": 2.5},
    "where='' matches no slice of a group; they are: w0 axis 1": {"ratio": 0.5, "where": ""},
    r"where=\{\} leaves every group out": {"ratio": 0.5, "where": {}},
    "where='w9' matches no slice": {"ratio": 0.5, "where": {"w9": False, "*": True}},
    r"where: 1.5 for w0 axis 1.*; it must be True, False or a ratio": {
        "ratio": 0.5,
        "where": {"*": 1.5},
    },
    "where: None for w0 axis 1": {"ratio": 0.5, "where": {"*": None}},
    r"where=\['w0'\] must be a glob, a mapping": {"ratio": 0.5, "where": ["w0"]},
    r"where=\{3: True\}: its keys must be globs": {"ratio": 0.5, "where": {3: True}},
    "criterion='l1' must be a function like jx.prune.l1": {"ratio": 0.5, "criterion": "l1"},
    r"scores of shapes \[\(1,\)\] for groups of \[4\] channels": {
        "ratio": 0.5,
        "criterion": lambda groups, params: [[1.0]],
    },
    "scores that are not finite for the group of w0 axis 1, w1 axis 0": {
        "ratio": 0.5,
        "criterion": lambda groups, params: [[np.nan] * 4],
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        plan(dense(3, 4, 2), **BAD[message])


@pytest.mark.parametrize(
    "criterion", [jx.prune.random, jx.prune.magnitude, lambda *_: None, lambda *_: [[1, [2]]]]
)
def test_criteria_that_give_no_scores(criterion):
    with pytest.raises(TypeError, match=r"criterion: .*; it must give one number per channel of"):
        plan(dense(3, 4, 2), ratio=0.5, criterion=criterion)


def test_scores_of_few_bits():
    coarse = lambda groups, params: [jnp.arange(group.size, dtype=jnp.bfloat16) for group in groups]
    made = plan(dense(3, 4, 2), ratio=0.5, criterion=coarse, scope="global")
    assert made.kept["w0"][1].tolist() == [2, 3]


@pytest.mark.parametrize("criterion", [jx.prune.l1, jx.prune.random(jax.random.key(0))])
def test_weights_that_are_not_finite(criterion):
    params = dense(3, 4, 2)
    params["w1"] = params["w1"].at[2, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="w1: has NaN or infinite values; a plan needs finite"):
        plan(params, ratio=0.5, criterion=criterion)


def test_no_channel_can_go():
    with pytest.raises(ValueError, match=r"can go: w axis 0: .*; w axis 1: reaches the output"):
        plan({"w": jnp.ones((3, 4))}, fn=lambda p, x: x @ p["w"], ratio=0.5)


def test_a_plan_needs_values():
    params = dense(3, 4, 2)
    abstract = {**params, "w1": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    with pytest.raises(TypeError, match="w1: a ShapeDtypeStruct has no values to choose"):
        plan(abstract, ratio=0.5)

    @jax.jit
    def traced(params):
        return plan(params, ratio=0.5).parameters.after

    with pytest.raises(TypeError, match=r"w0: a \w+ has no values .* outside of jit"):
        traced(params)
