"""Groups: what is coupled is as worked out by hand, and removed equals set to zero."""

from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxaccel as jx
from tests import shrinking
from tests.models import ZOO, Case, filled, tiers
from tests.networks import frameworks, sequence, vision
from tests.networks.drawn import networks
from tests.networks.expected import EXPECTED

CASES = [*ZOO, *vision.CASES, *sequence.CASES, *frameworks.CASES]
X = jnp.linspace(-1, 1, 15).reshape(5, 3)


def shapes(**sizes: tuple[int, ...]):
    return filled({name: jax.ShapeDtypeStruct(s, "float32") for name, s in sizes.items()})


@pytest.mark.parametrize("case", tiers(CASES))
def test_the_zoo(case: Case):
    fn, params = case.build()
    groups = shrinking.check(fn, params, case.images())
    expected = EXPECTED[case.name]
    assert sorted(group.size for group in groups) == expected.sizes
    assert Fraction(groups.num_prunable, groups.num_parameters) == expected.share


def test_every_case_has_an_expectation():
    assert list(EXPECTED) == [case.name for case in CASES]


def check_network(network: Any, seed: int) -> tuple[int, int]:
    """How many of the channels that its layers make can be pruned, and how many there are."""
    fn, params, shape = network
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    groups = shrinking.check(fn, params, x, seed, rtol=1e-5)
    *layers, _ = [path for path, leaf in params.items() if leaf.ndim > 1]  # the last is the output
    made = {path: params[path].shape[-1] for path in layers}
    parts = [part for group in groups for part in group.slices]
    prunable = [p.index.size for p in parts if p.path in made and p.axis == params[p.path].ndim - 1]
    return sum(prunable), sum(made.values())


def test_random_networks():
    random_networks(count=40, steps=6, prunable=0.45)  # 0.55 to 0.71 in four runs of 300


@pytest.mark.full
@pytest.mark.parametrize("half", range(2))
def test_5000_random_networks(half):
    random_networks(count=2500, steps=10, prunable=0.6)


def random_networks(count: int, steps: int, prunable: float) -> None:
    found = np.zeros(2, int)

    @settings(max_examples=count, derandomize=False)  # where CI is set, too
    @given(network=networks(max_steps=steps), seed=st.integers(0, 9))
    def each(network, seed):
        nonlocal found
        found += check_network(network, seed)

    each()
    assert found[0] >= prunable * found[1]


def test_the_slices_of_a_channel():
    fn, params = ZOO[3].build()
    (group,) = [g for g in jx.groups(fn, params, ZOO[3].images()) if g.size == 20]
    found = {f"{part.path}/{part.axis}": part.index for part in group.slices}
    assert found["params/conv2/kernel/3"].tolist() == [[c] for c in range(20)]
    flat = found["params/dense1/kernel/0"]
    assert flat.shape == (20, 16)
    assert flat[3].tolist() == list(range(3, 320, 20))


def test_the_batch_and_the_image_size_do_not_matter():
    fn, params = vision.CASES[0].build()
    few, many = (jx.groups(fn, params, jnp.ones((n, 8, 8, 3))) for n in (1, 7))
    abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), params)
    large = jx.groups(fn, abstract, jax.ShapeDtypeStruct((3, 32, 16, 3), "float32"))
    assert str(few) == str(many) == str(large)


def test_the_table():
    params = shapes(w=(3, 4), v=(4, 2))
    groups = jx.groups(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, X)
    lines = str(groups).splitlines()
    assert lines[2] == "    0         4  v axis 0, w axis 1"
    assert "20 of 20 parameters (100.00%) lie in a group" in lines
    assert lines[lines.index("pinned: reaches the output") + 1] == "  v axis 1"
    assert "no groups" in str(jx.groups(lambda p, x: x @ p["w"], params, X))
    assert groups.share == 1.0


PINNED = {
    "fn does not read it": (lambda p, x: x @ p["w"].sum(1), "u", 1),
    "reaches the output": (lambda p, x: x @ p["w"], "w", 1),
    "meets an axis of the input": (lambda p, x: x @ p["w"], "w", 0),
    "'cumsum' along it": (lambda p, x: jnp.cumsum(x @ p["w"], 1) @ p["u"], "w", 1),
    "sorted along it": (lambda p, x: jnp.sort(x @ p["w"], 1) @ p["u"], "w", 1),
    "'reduce_max' over it": (lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["u"], "w", 1),
    "'argmax' over it": (lambda p, x: jnp.argmax(x @ p["w"], 1), "w", 1),
    "sums over values that masking leaves": (lambda p, x: jnp.exp(x @ p["w"]).sum(1), "w", 1),
    "'cholesky' has no rule": (lambda p, x: jnp.linalg.cholesky(p["u"] @ p["u"].T), "u", 0),
    "picks indices of it": (lambda p, x: p["w"][:, x[:2, 0].astype(int)].sum(), "w", 1),
    "a single index of it": (lambda p, x: (x @ p["w"])[:, 0], "w", 1),
}


@pytest.mark.parametrize("reason", PINNED)
def test_why_it_is_pinned(reason):
    fn, path, axis = PINNED[reason]
    groups = jx.groups(fn, shapes(w=(3, 4), u=(4, 4)), X)
    pins = [pin for pin in groups.pinned if (pin.path, pin.axis) == (path, axis)]
    assert any(reason in pin.reason for pin in pins), groups
    assert reason in groups.why(path)


def test_a_reason_names_the_line():
    groups = jx.groups(lambda p, x: jnp.sort(x @ p["w"], 1), shapes(w=(3, 4)), X)
    assert "at tests/test_groups.py:" in groups.why("w")


def test_a_divisor_keeps_its_values_where_masked():
    def fn(p, x):
        return ((x @ p["w"]) * p["scale"] / p["deviation"]) @ p["u"]

    params = shapes(w=(3, 4), u=(4, 2), scale=(1, 4), deviation=(1, 4))
    groups = shrinking.check(fn, params, X)
    assert groups.unmasked == ("deviation",)
    assert "a mask leaves alone, for they divide: deviation" in str(groups)
    assert [group.size for group in groups] == [4]


def test_weight_norm():
    def fn(p, x):
        kernel = p["scale"] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)
        return jax.nn.relu(x @ kernel) @ p["u"]

    groups = shrinking.check(fn, shapes(w=(3, 4), scale=(1, 4), u=(4, 2)), X)
    assert [group.size for group in groups] == [4]
    assert groups.unmasked == ("w",)


def test_dropout_and_a_loss():
    def loss(p, x, key):
        h = jax.nn.relu(x @ p["w"])
        kept = jax.random.bernoulli(key, 0.7, h.shape)
        return cross_entropy(jnp.where(kept, h / 0.7, 0) @ p["u"])

    def cross_entropy(logits):
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    shrinking.check(lambda p, x: loss(p, x, jax.random.key(3)), shapes(w=(3, 8), u=(8, 4)), X)


def test_a_custom_vjp_at_smaller_sizes():
    @jax.custom_vjp
    def clipped(x, w):
        return jnp.tanh(x * w)

    clipped.defvjp(
        lambda x, w: (clipped(x, w), (x, w)),
        lambda saved, g: (jnp.clip(g, -0.1, 0.1) * saved[1], (g * saved[0]).sum(0, keepdims=True)),
    )

    def fn(p, x):
        return clipped(x @ p["w"], p["s"]) @ p["u"]

    groups = shrinking.check(fn, shapes(w=(3, 6), s=(1, 6), u=(6, 2)), X)
    assert [group.size for group in groups] == [6]


def test_a_cotangent_that_is_not_zero_reaches_a_broadcast():
    @jax.custom_vjp
    def straight(a, w):
        return a * w

    straight.defvjp(lambda a, w: (a * w, None), lambda _, g: (g, g))

    def fn(p, x):
        return straight(jnp.broadcast_to(p["a"], (5, 6)), x @ p["w"]).sum(-1)

    groups = shrinking.check(fn, shapes(w=(3, 6), a=(1, 1)), X)
    assert "'custom_vjp_call' sums over values" in groups.why("w")


def half_split(q, cos, sin):
    a, b = jnp.split(q, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def interleaved_by_reshape(q, cos, sin):
    a, b = jnp.moveaxis(q.reshape(*q.shape[:-1], -1, 2), -1, 0)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(q.shape)


def interleaved_by_steps(q, cos, sin):
    a, b = q[..., ::2], q[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(q.shape)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rotate", [half_split, interleaved_by_reshape, interleaved_by_steps])
def test_rotary_embeddings_go_by_pairs(rotate, heads):
    angles = jnp.outer(jnp.arange(5.0), jnp.array([1.0, 0.3, 0.1]))[:, None]

    def fn(p, x):
        q, k = ((x @ p[name]).reshape(5, heads, 6) for name in "qk")
        q, k = (rotate(h, jnp.cos(angles), jnp.sin(angles)) for h in (q, k))
        return jnp.einsum("shd,thd->hst", q, k)

    groups = shrinking.check(fn, shapes(q=(3, heads * 6), k=(3, heads * 6)), X)
    assert [(group.size, str(group)) for group in groups] == [
        (3, f"k axis 1 ({2 * heads} each), q axis 1 ({2 * heads} each)")
    ]


def test_a_shuffle_by_index_and_a_haar_step():
    def fn(p, x):
        h = jax.nn.relu(x @ p["w"])[:, jnp.array([3, 1, 0, 2, 5, 4])]
        return (h[:, ::2] - h[:, 1::2]) @ p["u"]

    groups = shrinking.check(fn, shapes(w=(3, 6), u=(3, 2)), X)
    assert [group.size for group in groups] == [3]
    assert groups[0].slices[1].index.tolist() == [[1, 3], [0, 2], [4, 5]]


def test_channels_of_unlike_slices_are_groups_of_their_own():
    def fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.concatenate([h, h[:, :2]], 1) @ p["u"]

    groups = shrinking.check(fn, shapes(w=(3, 4), u=(6, 2)), X)
    assert [(group.size, str(group)) for group in groups] == [
        (2, "u axis 0 (2 each), w axis 1"),
        (2, "u axis 0, w axis 1"),
    ]
    assert groups[0].slices[0].index.tolist() == [[0, 4], [1, 5]]


def test_the_derivative_of_relu_at_zero_survives():
    params = shapes(w=(3, 4), u=(4, 2)) | {"w": jnp.zeros((3, 4))}
    fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["u"]
    small = shrinking.shrunk(fn, params, {"w": {1: [0]}, "u": {0: [0]}})
    loss = lambda p: small(p, X).sum()
    cut = shrinking.cut(params, {"w": {1: [0]}, "u": {0: [0]}})
    assert not np.any(jax.grad(loss)(cut)["w"])  # jnp.maximum would give one half
    hessian = jax.hessian(loss)(cut)
    assert not np.any(hessian["w"]["u"])


def test_transformations_of_a_shrunk_function():
    params = shapes(w=(3, 6), u=(6, 2))
    fn = lambda p, x: jax.nn.silu(x @ p["w"]) @ p["u"]
    dropped = {"w": {1: [0, 4]}, "u": {0: [0, 4]}}
    small, cut, zero = (
        shrinking.shrunk(fn, params, dropped),
        shrinking.cut(params, dropped),
        shrinking.masked(params, dropped),
    )
    for wrap in (
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (x,)),
        lambda f: lambda p, x: jax.jacrev(lambda x: f(p, x).sum())(x),
        lambda f: lambda p, x: jax.hessian(lambda s: f(p, s * x).sum())(1.0),
    ):
        shrinking.close(wrap(small)(cut, X[:, None]), wrap(fn)(zero, X[:, None]), 1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_shrunk_function_on_a_mesh(kind):
    params = shapes(w=(3, 6), s=(1, 6), u=(6, 2))
    key = jax.random.key(0)

    def fn(p, x):
        h = jax.nn.relu(x @ p["w"]) * p["s"]
        return (h * jax.random.uniform(key, (1, 6))) @ p["u"]

    dropped = {"w": {1: [0, 4]}, "s": {1: [0, 4]}, "u": {0: [0, 4]}}
    small, cut = shrinking.shrunk(fn, params, dropped), shrinking.cut(params, dropped)
    wanted = fn(shrinking.masked(params, dropped), jnp.tile(X[:1], (8, 1)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("data"))
        x = jax.device_put(jnp.tile(X[:1], (8, 1)), split)
        shrinking.close(jax.jit(small)(cut, x), wanted, 1e-6)
        mapped = partial(
            jax.shard_map, in_specs=(PartitionSpec(), split.spec), out_specs=split.spec
        )
        shrinking.close(jax.jit(mapped(small))(cut, x), wanted, 1e-6)


def test_symbolic_batch():
    (batch,) = jax.export.symbolic_shape("batch")
    params = shapes(w=(6, 4), u=(8, 2))
    fn = lambda p, x: jax.nn.relu(x @ p["w"]).reshape(x.shape[0], -1) @ p["u"]
    groups = jx.groups(fn, params, jax.ShapeDtypeStruct((batch, 2, 6), "float32"))
    assert [(group.size, str(group)) for group in groups] == [(4, "u axis 0 (2 each), w axis 1")]


def test_what_is_dropped_may_not_be_pinned():
    params = shapes(w=(3, 4))
    small = shrinking.shrunk(lambda p, x: jnp.sort(x @ p["w"], 1), params, {"w": {1: [0]}})
    with pytest.raises(ValueError, match=r"w axis 1: in this .* index 0 cannot .* sorted along it"):
        small({"w": params["w"][:, 1:]}, X)


def test_bad_arguments():
    with pytest.raises(TypeError, match="w: expected an array, got str"):
        jx.groups(lambda p, x: x, {"w": "kernel"}, X)
    with pytest.raises(TypeError, match="fn returns a str at 1; it may only return"):
        jx.groups(lambda p, x: (x, "logits"), {"w": X}, X)
    with pytest.raises(TypeError, match="w: expected an array, got ndarray of dtype object"):
        jx.groups(lambda p, x: x, {"w": np.array([None])}, X)
    with pytest.raises(TypeError, match=r"params: \{\} has no arrays"):
        jx.groups(lambda p, x: x, {}, X)
    with pytest.raises(TypeError, match="fn returns no arrays, but None"):
        jx.groups(lambda p, x: None, {"w": X}, X)
    with pytest.raises(KeyError, match="dense/kernl: no such parameter; the nearest are dense/k"):
        jx.groups(lambda p, x: p["dense"]["kernel"], {"dense": {"kernel": X}}, X).why("dense/kernl")
    with pytest.raises(TypeError, match="fn closes over a traced value"):
        jax.jit(lambda s: jx.groups(lambda p, x: p["w"] * s, {"w": X}, X).share)(1.0)


def test_no_labels_per_pixel():
    from jaxaccel._labels import label
    from jaxaccel._trace import trace

    def labels(side: int) -> int:
        fn, params = vision.CASES[0].build()
        traced = trace(fn, params, jax.ShapeDtypeStruct((64, side, side, 3), "float32"))
        return len(label(traced, range(traced.num_params))[0])

    assert labels(8) == labels(256)


def test_a_prunable_axis_that_only_noise_meets():
    """Random numbers are drawn at the original size, then cut: others would be other numbers."""

    def fn(p, x):
        noise = jax.random.normal(jax.random.key(1), (5, 6))
        return (jnp.tanh(x @ p["w"]) * (1 + noise) * lax.iota("float32", 6)[None]) @ p["u"]

    groups = shrinking.check(fn, shapes(w=(3, 6), u=(6, 2)), X)
    assert [group.size for group in groups] == [6]


PIECES = {
    "concatenated": lambda: jnp.concatenate([jnp.full(3, 2.0), jnp.full(3, 5.0)]),
    "cumulated": lambda: jnp.cumsum(jnp.ones(6)),
    "scattered": lambda: jnp.zeros(6).at[4].set(3.0),
    "updated": lambda: lax.dynamic_update_slice(jnp.ones(6), jnp.full(2, 9.0), (3,)),
    "padded": lambda: lax.pad(jnp.ones(4), 7.0, [(1, 1, 0)]),
    "transformed": lambda: jnp.abs(jnp.fft.fft(jnp.ones(6))) + 1,
    "top": lambda: lax.top_k(jnp.ones(6), 6)[1] + 1.0,
}


@pytest.mark.parametrize("name", PIECES)
def test_constants_of_several_pieces(name):
    """What they are made of is alike everywhere, they are not: they are cut at the right places."""

    def fn(p, x):
        return (jnp.tanh(x @ p["w"]) * PIECES[name]()[None]) @ p["u"]

    groups = shrinking.check(fn, shapes(w=(3, 6), u=(6, 2)), X, seed=1)
    assert [group.size for group in groups] == [6]
