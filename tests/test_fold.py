"""Folding: equal outputs over the zoo, exact counts, and what must not be folded."""

import re
import warnings
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccel as jx
from jaxaccel import _dataflow, _trace
from tests.models import ZOO, from_nnx, tiers
from tests.networks import frameworks, sequence, vision
from tests.networks.vision import normals

CASES = {c.name: c for c in [*ZOO, *vision.CASES, *sequence.CASES, *frameworks.CASES]}
# Chains folded and merged, and roots (rsqrt, sqrt) that are left: worked out by hand.
EXPECTED = {
    "linen": (1, 0, 0),
    "resnet20": (19, 0, 0),  # the stem and two in each of nine blocks
    "mobilenet": (52, 0, 0),  # conv1, 16 expand, 17 depthwise, 17 project, conv2
    "unet": (5, 0, 0),
    "densenet": (0, 5, 0),  # norms behind what is read twice, concatenations and a pooling
    "inception": (1, 0, 0),
    "shuffle_unit": (5, 0, 0),
    "shuffle_twice": (8, 0, 0),
    "squeeze_excite": (1, 0, 0),
    "grouped": (4, 0, 0),
    "multiplier": (1, 0, 0),
    "chain": (8, 0, 0),
    "nchw": (1, 0, 0),  # the layer scale
    "vit": (2, 0, 5),  # the biases of both norm2; layer norms keep their roots
    "fused_qkv": (1, 0, 1),
    "two_pass": (1, 0, 1),
    "linen_plain": (1, 0, 0),
    "linen_residual": (3, 0, 0),
    "haiku": (3, 0, 0),
    "haiku_state": (3, 0, 0),
    "equinox": (3, 0, 0),
    "keras": (2, 0, 0),
}


def primitives(fn, *args) -> list[str]:
    def names(graph):
        for node in graph.nodes:
            yield node.name
            for body in node.bodies:
                yield from names(body)

    return list(names(_dataflow.needed(_dataflow.flatten(_trace.trace(fn, *args).graph))))


def roots(fn, *args) -> int:
    names = primitives(fn, *args)
    return names.count("rsqrt") + names.count("sqrt")


def quietly(fn, params, *example):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jx.fold.batchnorm: nothing to fold")
        return jx.fold.batchnorm(fn, params, *example)


@cache
def built(name: str):
    fn, params = CASES[name].build()
    return fn, params, *quietly(fn, params, CASES[name].images())


def close(actual, expected, tolerance: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n == "mobilenet" else ()) for n in CASES]
)
def test_same_outputs_and_exact_counts_over_the_zoo(name):
    fn, params, folded, new = built(name)
    x = CASES[name].images()
    if name not in EXPECTED:
        assert folded is fn
        assert new is params
        return
    close(jax.jit(folded)(new, x), jax.jit(fn)(params, x), 1e-5)
    counts = (len(folded.report.folded), len(folded.report.merged), roots(folded, new, x))
    assert counts == EXPECTED[name]


DOUBLE = [CASES[name] for name in EXPECTED if name != "keras"]  # which computes in float32


@pytest.mark.parametrize("case", tiers(DOUBLE, ("mobilenet", "resnet20", "unet", "equinox")))
def test_float64_over_the_zoo(case):
    with jax.enable_x64(True):
        wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        fn, params = case.build()
        params, x = jax.tree.map(wide, params), wide(case.images(1))
        folded, new = jx.fold.batchnorm(fn, params, x)
        assert all(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(new))
        close(jax.jit(folded)(new, x), jax.jit(fn)(params, x), 1e-12)


@pytest.mark.parametrize(("model", "counts"), [("ResNet", (53, 0)), ("MobileNet", (52, 0))])
def test_no_root_is_left_of_a_network_for_imagenet(model, counts):
    network = getattr(jx.nn, model)
    args = (50,) if model == "ResNet" else ()
    fn, params = from_nnx(network, *args)()
    shapes = jax.eval_shape(lambda: params)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    folded, new = jx.fold.batchnorm(fn, shapes, x)
    assert (len(folded.report.folded), len(folded.report.merged)) == counts
    assert folded.report.refused == ()
    assert roots(fn, shapes, x) == sum(counts)
    assert roots(folded, new, x) == 0


def test_resnet50_computes_the_same():
    fn, params = from_nnx(jx.nn.ResNet, 50, width=8)()
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    folded, new = jx.fold.batchnorm(fn, params, x)
    close(jax.jit(folded)(new, x), jax.jit(fn)(params, x), 1e-5)
    assert set(new) == {"params"}
    assert set(new["params"]["blocks"]["0"]) == {"conv1", "conv2", "conv3", "shortcut"}


def test_parameters_keep_paths_and_dtypes_and_those_never_read():
    *_, new = built("haiku_state")
    assert set(new["params"]) == {"conv2_d", "conv2_d_1", "conv2_d_2", "linear"}
    assert set(new["params"]["conv2_d"]) == {"w", "bias"}
    state = new["state"]  # one key holds slashes; training alone reads hidden and counter
    assert set(state["batch_norm/~/mean_ema"]) == {"hidden", "counter"}
    assert state["batch_norm/~/mean_ema"]["counter"].dtype == jnp.int32
    *_, new = built("equinox")
    assert new["model"]["convs"]["0"]["bias"].shape == (6, 1, 1)
    *_, new = built("keras")
    assert "sequential/depthwise_conv2d/bias" in new["trainable"]


NHWC = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, padding: Any = "VALID", layout=NHWC, groups=1, **options):
    options |= {"dimension_numbers": layout, "feature_group_count": groups}
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, **options)


def norm_net(params, x):
    return jax.nn.relu(normalised(params["norm"], convolve(x, params["conv"]["kernel"], "SAME")))


def normalised(norm, y):
    return (y - norm["mean"]) * lax.rsqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]


def norm_params(size: int = 4):
    norm = normals({"mean": (size,), "var": (size,), "scale": (size,), "bias": (size,)})
    return {
        "conv": normals({"kernel": (3, 3, 2, size)}),
        "norm": norm | {"var": norm["var"] ** 2},
    }


X = jax.random.normal(jax.random.key(3), (2, 5, 5, 2))


def test_any_batch_size_vmap_jvp_and_second_order():
    params = norm_params()
    folded, new = jx.fold.batchnorm(norm_net, params, X)
    close(folded(new, X[:1]), norm_net(params, X[:1]), 1e-5)
    batches = jnp.stack([X, 2 * X, -X])
    ours, theirs = (lambda x: folded(new, x)), (lambda x: norm_net(params, x))
    close(jax.vmap(ours)(batches), jax.vmap(theirs)(batches), 1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), new)
    assert jax.vmap(folded, (0, None))(stacked, X).shape == (2, 2, 5, 5, 4)
    close(jax.jvp(ours, (X,), (X + 1,)), jax.jvp(theirs, (X,), (X + 1,)), 1e-5)
    cubes = lambda f: jax.hessian(lambda x: (f(x) ** 3).sum())(X[:1, :2, :2])
    close(jax.jit(cubes, static_argnums=0)(ours), jax.jit(cubes, static_argnums=0)(theirs), 1e-5)


def test_gradients_of_the_folded_parameters_and_of_relu_at_zero():
    folded, new = jx.fold.batchnorm(norm_net, norm_params(), X)
    grads = jax.grad(lambda p: folded(p, X).sum())(new)
    assert float(jnp.abs(grads["conv"]["kernel"]).min()) > 0
    zero = jax.tree.map(jnp.zeros_like, new)
    grads = jax.grad(lambda p: folded(p, X).sum())(zero)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_folded_function_can_be_folded_and_pulled_through_transformations():
    outer = lambda params, x: 3 * folded(params["inner"], x)
    folded, new = jx.fold.batchnorm(lambda p, x: p["c"] * (x @ p["w"]), scaled(), jnp.ones((2, 3)))
    again, newer = jx.fold.batchnorm(outer, {"inner": new}, jnp.ones((2, 3)))
    assert primitives(again, newer, jnp.ones((2, 3))) == ["dot_general"]
    close(again(newer, jnp.eye(3)), 3 * scaled()["c"] * scaled()["w"], 1e-6)


def scaled():
    return normals({"w": (3, 4), "c": (4,)})


def test_folding_under_jit():
    shapes = {}

    @jax.jit
    def result(params, x):
        folded, new = jx.fold.batchnorm(norm_net, params, x)
        shapes.update(jax.tree.map(jnp.shape, new))
        return folded(new, x)

    close(result(norm_params(), X), norm_net(norm_params(), X), 1e-5)
    assert shapes == {"conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}}


def test_a_chain_is_cut_at_a_value_with_another_reader():
    fn = lambda p, x: ((y := p["c"] * (x @ p["w"])) * 2, jnp.tanh(y))
    folded, new = jx.fold.batchnorm(fn, scaled(), jnp.ones((2, 3)))
    assert [f.kernel for f in folded.report.folded] == ["w"]
    (refused,) = folded.report.refused
    assert refused.where == "w"
    assert re.fullmatch(
        r"the result of mul at tests/test_fold.py:\d+ .* has another reader", refused.reason
    )
    close(folded(new, jnp.eye(3)), fn(scaled(), jnp.eye(3)), 1e-6)


def test_input_normalisation_goes_in_unless_there_is_padding():
    params = norm_params()["conv"]
    fn = lambda p, x, padding="VALID": convolve((x - 0.3) / 0.2, p["kernel"], padding)
    folded, new = jx.fold.batchnorm(fn, params, X)
    assert primitives(folded, new, X).count("conv_general_dilated") == 1
    assert {"sub", "div"}.isdisjoint(primitives(folded, new, X))
    close(folded(new, X), fn(params, X), 1e-5)
    with pytest.warns(UserWarning, match="nothing to fold.*1 refused; kernel: padding"):
        jx.fold.batchnorm(partial(fn, padding="SAME"), params, X)
    scale = lambda p, x: convolve(x / 0.2, p["kernel"], "SAME")
    folded, new = jx.fold.batchnorm(scale, params, X)
    assert primitives(folded, new, X) == ["conv_general_dilated"]
    close(folded(new, X), scale(params, X), 1e-5)


NOT_REACHED = {
    "relu": lambda p, x: convolve(padded(jax.nn.relu(x)), p["kernel"]),
    "one addition": lambda p, x: convolve(padded(x + 1), p["kernel"]),
    "padded channels": lambda p, x: convolve(
        lax.pad((x[..., :1] - 0.3) / 0.2, 0.0, [(0, 0, 0)] * 3 + [(0, 1, 0)]), p["kernel"]
    ),
    "another reader": lambda p, x: (convolve(y := padded((x - 0.3) / 0.2), p["kernel"]), y),
    "tied": lambda p, x: (convolve(padded((x - 0.3) / 0.2), p["kernel"]), p["kernel"]),
}


def padded(x, pad=jnp.pad):
    edges = ((0, 0), (1, 1), (1, 1)) + ((0, 0),) * (x.ndim - 3)
    return jnp.pad(x, edges) if pad is jnp.pad else lax.pad(x, 0.0, [(*edge, 0) for edge in edges])


def test_a_pad_that_keeps_a_chain_from_the_kernel_is_named():
    params = norm_params()["conv"]
    fn = lambda p, x: convolve(padded((x - 0.3) / 0.2, lax.pad), p["kernel"])
    place = r"the pad at tests/test_fold.py:\d+ \(padded\) separates it from the chain before"
    with pytest.warns(UserWarning, match=f"1 refused; kernel: padding: {place}"):
        jx.fold.batchnorm(fn, params, X)
    grey = lambda p, x: convolve(padded((x - 0.3) / 0.2)[..., None], p["kernel"])
    thin = {"kernel": params["kernel"][:, :, :1]}
    with pytest.warns(UserWarning, match="1 refused; kernel: padding: the pad separates it from"):
        jx.fold.batchnorm(grey, thin, X[..., 0])


@pytest.mark.parametrize("name", NOT_REACHED)
def test_a_pad_that_keeps_nothing_from_the_kernel_is_not(name):
    with pytest.warns(
        UserWarning, match="nothing to fold; fn and params are returned as they are$"
    ):
        jx.fold.batchnorm(NOT_REACHED[name], norm_params()["conv"], X)


def test_a_transposed_convolution_takes_what_follows_and_no_shift_before():
    params = norm_params()

    def fn(params, x):
        none = ((0, 0), (0, 0))
        x = convolve(x + 1, params["conv"]["kernel"], none, lhs_dilation=(2, 2))
        return normalised(params["norm"], x)

    folded, new = jx.fold.batchnorm(fn, params, X)
    assert [r.reason.split(":")[0] for r in folded.report.refused] == ["padding"]
    assert roots(folded, new, X) == 0
    close(folded(new, X), fn(params, X), 1e-5)


def test_a_mean_is_not_folded_for_its_divisor_depends_on_the_size():
    fn = lambda p, x: p["c"] * (x.mean(1) @ p["w"])
    folded, new = jx.fold.batchnorm(fn, scaled(), jnp.ones((2, 6, 3)))
    close(
        folded(new, X[:, :, 0, :1] + jnp.ones(3)), fn(scaled(), X[:, :, 0, :1] + jnp.ones(3)), 1e-5
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_any_batch_size_over_the_zoo(name):
    fn, params, folded, new = built(name)
    for size in (1, 3):
        x = CASES[name].images(size)
        assert jax.eval_shape(folded, new, x) == jax.eval_shape(fn, params, x)


def test_a_chain_ends_where_the_channels_are_split():
    fn = lambda p, x: 2 * ((x @ p["w"]) * p["c"]).reshape(2, 2, 2) + 1
    folded, new = jx.fold.batchnorm(fn, scaled(), jnp.ones((2, 3)))
    assert primitives(folded, new, jnp.ones((2, 3))) == ["dot_general", "reshape", "mul", "add"]
    close(folded(new, jnp.ones((2, 3))), fn(scaled(), jnp.ones((2, 3))), 1e-6)


def test_bfloat16_stays_bfloat16():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), norm_params())
    folded, new = jx.fold.batchnorm(norm_net, params, X.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    close(folded(new, X.astype(jnp.bfloat16)), norm_net(params, X.astype(jnp.bfloat16)), 0.03)


def test_the_bias_that_is_there_keeps_its_path():
    fn = lambda p, x: p["s"]["c"] * (x @ p["linear"]["w"] + p["linear"]["b"])
    params = {"linear": normals({"w": (3, 4), "b": (4,)}), "s": {"c": jnp.full(4, 2.0)}}
    _, new = jx.fold.batchnorm(fn, params, jnp.ones((2, 3)))
    close(new, {"linear": jax.tree.map(lambda leaf: 2 * leaf, params["linear"])}, 1e-6)


def test_a_bias_that_would_take_the_path_of_another_leaf():
    params = norm_params()
    params["conv"]["bias"] = jnp.ones(3)
    with pytest.raises(ValueError, match=r"conv/bias: a new bias needs this path, but conv/bias"):
        jx.fold.batchnorm(norm_net, params, X)
    fn = lambda p, x: jnp.tanh(2 * (x @ p["u"] + p["c"])) @ p["w"] * 2 + p["d"]
    flat = normals({"u": (3, 3), "w": (3, 4), "d": (4,), "c": (3,)})
    assert set(jx.fold.batchnorm(fn, flat, jnp.ones((2, 3)))[1]) == {"u", "w", "c", "d"}
    fn = lambda p, x: jnp.tanh(2 * (x @ p["u"] + 1)) @ p["w"] * 2 + 1
    with pytest.raises(ValueError, match="bias: two kernels need a new bias at this path"):
        jx.fold.batchnorm(fn, flat, jnp.ones((2, 3)))


@pytest.mark.parametrize(("leaf", "bad"), [("var", -1.0), ("var", np.nan), ("mean", np.inf)])
def test_statistics_that_are_not_finite(leaf, bad):
    params = norm_params()
    params["norm"][leaf] = params["norm"][leaf].at[:3].set(bad)
    what = "negative or not finite" if leaf == "var" else "not finite"
    message = f"norm/{leaf}: 3 of 4 values are {what}; it cannot be folded into conv/kernel"
    with pytest.raises(ValueError, match=message):
        jx.fold.batchnorm(norm_net, params, X)


def test_other_parameters_are_refused_and_the_report_can_be_read():
    params = norm_params()
    folded, new = jx.fold.batchnorm(norm_net, params, X)
    with pytest.raises(ValueError, match="norm/bias: not in the folded parameters; pass the tree"):
        folded(new | {"norm": {"bias": jnp.ones(4)}}, X)
    with pytest.raises(ValueError, match="conv/bias: missing from the folded parameters; pass"):
        folded({"conv": {"kernel": new["conv"]["kernel"]}}, X)
    with pytest.raises(
        ValueError, match=r"conv/bias: shape \(3,\), expected \(4,\); pass the tree"
    ):
        folded({"conv": new["conv"] | {"bias": jnp.ones(3)}}, X)
    assert repr(folded) == "<jx.fold.batchnorm of norm_net: 1 folded, 0 merged>"
    row = "folded  conv/kernel  norm/{bias, mean, scale, var} -> conv/bias"
    assert row in str(folded.report)
    assert str(folded.report).endswith("1 folded, 0 merged, 0 refused")
