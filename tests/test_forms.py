"""Each form against the op it stands for, over shapes, and for every derivative."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from experiments import forms as survey
from jaxaccel import _forms
from jaxaccel._forms import FORMS, XLA, Op, candidates
from jaxaccel._graph import graph_of
from jaxaccel._tuned import has_forms, op_of, original

LAYOUTS = {
    "NHWC": ("NHWC", "HWIO", "NHWC"),
    "NCHW": ("NCHW", "OIHW", "NCHW"),
    "CWNH": ("CWNH", "IHOW", "HNCW"),
}


def conv(
    size=(6, 5),
    kernel=(3, 2),
    channels=2,
    out=3,
    *,
    batch=2,
    groups=1,
    layout=LAYOUTS["NHWC"],
    strides=(1, 1),
    padding: Any = "SAME",
    dtype: Any = None,
    seed=0,
    **options,
) -> tuple[Callable, tuple[Any, ...]]:
    """A convolution, and its operands, drawn in NHWC and HWIO."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, *size, channels))
    weights = rng.normal(size=(*kernel, channels // groups, out))
    spec = lax.conv_dimension_numbers((1,) * images.ndim, (1,) * images.ndim, layout)
    (n, c, *pixels), (o, i, *taps) = spec.lhs_spec, spec.rhs_spec
    images = images.transpose(np.argsort([n, *pixels, c]))
    weights = weights.transpose(np.argsort([*taps, i, o]))

    def fn(x, w):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=layout, feature_group_count=groups, **options
        )

    return fn, (jnp.asarray(images, dtype), jnp.asarray(weights, dtype))


def pool(shape, window, strides, pads, sums=False) -> tuple[Callable, tuple[Any, ...]]:
    """Pooling of few values, so that nearly every window has a tie."""
    x = np.random.default_rng(0).choice([0.0, 0.0, 1.0, -1.0], shape)
    start, reduce = (0.0, lax.add) if sums else (-jnp.inf, lax.max)
    fn = lambda x: lax.reduce_window(
        x, start, reduce, (1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0))
    )
    return fn, (jnp.asarray(x),)


def dot(left, right, axes) -> tuple[Callable, tuple[Any, ...]]:
    """A matrix product over these axes."""
    rng = np.random.default_rng(0)
    fn = lambda a, b: jnp.tensordot(a, b, axes)
    return fn, (jnp.asarray(rng.normal(size=left)), jnp.asarray(rng.normal(size=right)))


CASES = {
    "same": conv((9, 7), (3, 3)),
    "valid 5x5": conv((11, 12), (5, 5), padding="VALID"),
    "stride 2": conv((9, 8), (3, 3), strides=(2, 2)),
    "stride 3 1": conv((10, 6), (2, 3), strides=(3, 1), padding="VALID"),
    "stride over kernel": conv((11, 9), (2, 1), strides=(4, 3), padding="VALID"),
    "dilated": conv((10, 11), (3, 2), rhs_dilation=(2, 3)),
    "dilated and strided": conv((12, 11), (3, 3), rhs_dilation=(2, 1), strides=(2, 3)),
    "spread": conv((4, 5), (3, 3), lhs_dilation=(2, 3), padding=((2, 1), (0, 2))),
    "explicit": conv((6, 6), (3, 3), padding=((0, 3), (2, 1))),
    "negative": conv((9, 9), (3, 3), padding=((-1, 0), (1, -2)), strides=(2, 1)),
    "more padding than kernel": conv((3, 3), (2, 2), padding=((4, 5), (3, 2))),
    "1x1": conv((5, 4), (1, 1), 4, 6),
    "1x1 stride 2": conv((6, 7), (1, 1), 4, 6, strides=(2, 2)),
    "grouped": conv((6, 5), (3, 3), 6, 4, groups=2),
    "depthwise": conv((21, 4), (3, 3), 3, 3, groups=3),
    "depthwise stride 2": conv((8, 9), (3, 3), 3, 3, groups=3, strides=(2, 2)),
    "multiplier": conv((7, 7), (3, 2), 2, 6, groups=2),
    "NCHW": conv((6, 5), (3, 2), 2, 3, layout=LAYOUTS["NCHW"]),
    "CWNH": conv((6, 5), (3, 2), 4, 4, layout=LAYOUTS["CWNH"], groups=4),
    "one axis": conv((9,), (3,), 2, 4, layout=("NWC", "WIO", "NWC"), strides=(2,)),
    "2x2 pool": pool((2, 6, 5, 3), (2, 2), (2, 2), ((0, 0), (0, 0))),
    "3x3 pool": pool((2, 9, 8, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "uneven pool": pool((1, 9, 8, 2), (2, 3), (1, 4), ((0, 1), (2, 0))),
    "average": pool((2, 6, 5, 3), (2, 2), (2, 2), ((0, 0), (0, 0)), sums=True),
    "uneven average": pool((1, 9, 8, 2), (2, 3), (1, 4), ((0, 1), (2, 0)), sums=True),
    "dot": dot((6, 3), (3, 5), ((1,), (0,))),
    "dot of more axes": dot((4, 3, 2), (5, 2, 6), ((2,), (1,))),
}


def calls(fn, args) -> list[Op]:
    """The op of a function, and those of its derivatives."""

    def everything(*args):
        out, pullback = jax.vjp(fn, *args)
        grads = pullback(out)
        return out, grads, jax.jvp(fn, args, grads)[1]

    graph, _ = graph_of(everything, *map(jax.typeof, args))
    return list({op_of(n).key: op_of(n) for n in graph.nodes if has_forms(n)}.values())


def drawn(op: Op) -> list[Any]:
    """Operands; those of a pooling are few values, so that nearly every window has a tie."""
    rng = np.random.default_rng(0)
    if op.name in ("conv_general_dilated", "dot_general", "reduce_window_sum"):
        return [
            jnp.asarray(rng.normal(size=s), d) for s, d in zip(op.shapes, op.dtypes, strict=True)
        ]
    few = [0.0, 0.0, 1.0, -1.0]
    return [jnp.asarray(rng.choice(few, s), d) for s, d in zip(op.shapes, op.dtypes, strict=True)]


def differences(op: Op) -> dict[str, float]:
    """Of each form from the op, as a share of the op's largest number."""
    fns = {name: form.run for name, form in candidates(op).items()}
    fns = {XLA: partial(original, op.name), **fns}

    def run(*operands):
        found = {name: fn(*operands, **op.params) for name, fn in fns.items()}
        exact = found.pop(XLA)
        assert {(y.shape, y.dtype) for y in found.values()} <= {(exact.shape, exact.dtype)}
        exact, wide = exact.astype(float), {k: y.astype(float) for k, y in found.items()}
        largest = jnp.abs(exact).max(initial=1e-30)
        return {name: jnp.abs(y - exact).max() / largest for name, y in wide.items()}

    # Half of the time to compile; the sums are the same.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return {name: float(value) for name, value in run(*drawn(op)).items()}


def wrong(ops: list[Op], tolerance: float) -> list[str]:
    return [
        f"{name}, {value:.1e}: {op.key}"
        for op in ops
        for name, value in (differences(op) if candidates(op) else {}).items()
        if not value <= tolerance
    ]


@pytest.mark.parametrize("name", CASES)
def test_forms_of_values_and_derivatives_equal_the_op(name):
    with jax.enable_x64(True):
        fn, args = CASES[name]
        ops = calls(fn, tuple(np.asarray(x, np.float64) for x in args))
        assert all(candidates(op) for op in ops if FORMS[op.name] and op.name != "dot_general")
        assert candidates(ops[0])
        assert wrong(ops, 1e-11) == []


def test_every_form_has_a_case():
    found: set[str] = set()
    for fn, args in CASES.values():
        single = tuple(x.astype(jnp.float32) for x in args)
        for op in calls(fn, single):
            found |= candidates(op).keys()
    of_int8 = {"by rows", *_forms._int8.CONVS} - {*_forms._CONVS}
    assert found == {name for forms in FORMS.values() for name in forms} - of_int8


QUICK = ("same", "stride 2", "grouped", "dilated and strided", "CWNH")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in CASES]
)
def test_forms_for_float32_equal_the_op(name):
    fn, args = CASES[name]
    ops = calls(fn, tuple(x.astype(jnp.float32) for x in args))
    if name in QUICK:
        assert all(any("spread" in form for form in candidates(op)) for op in ops)
    assert wrong(ops, 1e-5) == []


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
small = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=6)
@given(
    size=sizes,
    kernel=small,
    strides=small,
    rhs_dilation=small,
    lhs_dilation=small,
    padding=st.sampled_from([((0, 0), (0, 0)), ((1, 1), (2, 0)), ((-1, 2), (0, 3))]),
    split=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    layout=st.sampled_from(list(LAYOUTS.values())),
    batch=st.integers(0, 2),
    dtype=st.sampled_from(["float64", "float32"]),
)
def test_any_convolution(
    size, kernel, strides, rhs_dilation, lhs_dilation, padding, split, layout, batch, dtype
):
    groups, multiplier, inner = split
    options = {"rhs_dilation": rhs_dilation, "lhs_dilation": lhs_dilation, "padding": padding}
    options |= {"groups": groups, "layout": layout, "batch": batch, "strides": strides}
    with jax.enable_x64(True):
        channels = groups * inner
        fn, args = conv(size, kernel, channels, groups * multiplier, dtype=dtype, **options)
        try:
            out = jax.eval_shape(fn, *args)
        except ValueError:  # nothing is left of the images
            return
        if out.size:
            assert all(candidates(op) for op in calls(fn, args)[:1])
            assert wrong(calls(fn, args), 1e-10 if dtype == "float64" else 1e-5) == []


@settings(max_examples=6)
@given(
    size=sizes,
    window=small,
    strides=small,
    pads=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
    sums=st.booleans(),
)
def test_any_pooling_also_on_ties(size, window, strides, pads, sums):
    with jax.enable_x64(True):
        fn, args = pool((2, *size, 2), window, strides, pads, sums)
        if jax.eval_shape(fn, *args).size:
            assert wrong(calls(fn, tuple(np.asarray(x, np.float64) for x in args)), 1e-11) == []


@settings(max_examples=6)
@given(
    summed=st.integers(2, 8),
    left=st.lists(st.integers(1, 5), max_size=3),
    right=st.lists(st.integers(1, 5), max_size=3),
    data=st.data(),
)
def test_any_matrix_product_over_few_numbers(summed, left, right, data):
    axes = [data.draw(st.integers(0, len(sizes))) for sizes in (left, right)]
    shapes = [(*s[:a], summed, *s[a:]) for s, a in zip((left, right), axes, strict=True)]
    with jax.enable_x64(True):
        ops = calls(*dot(*shapes, axes=tuple((axis,) for axis in axes)))
        assert candidates(ops[0])
        assert wrong(ops, 1e-11) == []


LONG = {  # sums of many numbers
    "dense": conv((6, 6), (3, 3), 8, 5),
    "depthwise": conv((7, 7), (5, 5), 3, 3, groups=3),
    "average": pool((2, 7, 7, 3), (5, 5), (1, 1), ((2, 2), (2, 2)), sums=True),
    "dot": dot((6, 8), (8, 5), ((1,), (0,))),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n == "dense" else ()) for n in LONG]
)
def test_half_precision_accumulates_in_float32(name, dtype):
    """The result is the exact sum but for one rounding, which is at most half an eps."""
    fn, args = LONG[name]
    for op in calls(fn, tuple(x.astype(dtype) for x in args)):
        operands = drawn(op)
        with jax.enable_x64(True):
            wide = [x.astype(float) for x in operands]
            kept = {"preferred_element_type"} & op.params.keys()
            params = {**op.params, **dict.fromkeys(kept, np.dtype(float))}
            exact = original(op.name, *wide, **params)
            for form, made in candidates(op).items():
                found = jax.jit(partial(made.run, **op.params))(*operands).astype(float)
                most = 0.55 * float(jnp.finfo(dtype).eps) * jnp.abs(exact)
                assert jnp.all(jnp.abs(found - exact) <= most + 1e-4), (form, op.key)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "preferred", "tolerance"),
    [(jnp.bfloat16, jnp.float32, 1e-5), (jnp.float32, jnp.float64, 1e-11)],
)
def test_the_result_is_summed_in_the_preferred_dtype(groups, dtype, preferred, tolerance):
    with jax.enable_x64(True):
        fn, args = conv(
            channels=4, out=4, groups=groups, dtype=dtype, preferred_element_type=preferred
        )
        op, *_ = calls(fn, args)
        double = {**op.params, "preferred_element_type": np.dtype(float)}
        exact = original(op.name, *(x.astype(float) for x in args), **double)
        assert candidates(op)
        for name, form in candidates(op).items():
            found = form.run(*args, **op.params)
            assert found.dtype == preferred, name
            largest = float(abs(exact).max())
            np.testing.assert_allclose(found, exact, atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        conv(dtype=jnp.int32),
        conv((4, 4, 4), (2, 2, 2), layout=("NDHWC", "DHWIO", "NDHWC"), strides=(1, 1, 1)),
        conv(batch=0, padding="VALID"),
        dot((9, 9), (9, 9), ((1,), (0,))),
        dot((3, 9), (9, 3), ((1,), (0,))),
        dot((5, 2, 3), (2, 3, 4), ((1, 2), (0, 1))),
        (jax.vmap(jnp.dot), (jnp.ones((2, 5, 3)), jnp.ones((2, 3, 4)))),
        (jnp.dot, (jnp.ones((5, 3), int), jnp.ones((3, 4), int))),
        (lambda x: lax.reduce_window(x, 0, lax.max, (2,), (1,), "VALID"), (jnp.arange(4),)),
        pool((1, 6, 6, 1), (2, 2), (1, 1), ((2, 0), (0, 0))),
        pool((1, 20, 20, 1), (8, 8), (8, 8), ((0, 0), (0, 0))),
    ],
)
def test_other_calls_are_xlas(fn, args):
    graph, _ = graph_of(fn, *map(jax.typeof, args))
    for node in graph.nodes:
        assert not has_forms(node) or candidates(op_of(node)) == {}
        assert not has_forms(node) or _forms.rule(op_of(node), "cpu") == XLA


def test_rules_choose_what_applies_and_nothing_off_the_cpu():
    for fn, args in CASES.values():
        for op in calls(fn, args):
            assert _forms.rule(op, "cuda") == XLA
    ruled = lambda call: [_forms.rule(op, "cpu") for op in survey.ops_of(call)]
    assert {call.name: ruled(call) for call in survey.CALLS} == {  # forward, then gradients
        "ConvNet, conv 1": ["shifted", "spread", "scattered dots"],
        "ConvNet, conv 2": ["spread", "spread", XLA],
        "ConvNet, max pool": ["maxima", "scattered"],
        "ResNet-18, stem": [XLA, "spread", "scattered dots"],
        "ResNet-18, max pool": ["maxima", "scattered"],
        "ResNet-18, 3x3": ["spread", "spread", "spread"],
        "ResNet-18, 3x3, stride 2": ["spread", "spread", "phases, spread"],
        "ResNet-18, 1x1, stride 2": ["product", "window product", "phases, spread"],
        "MobileNet, stem": ["banded 2", "spread", "scattered dots"],
        "MobileNet, expansion": ["product", "window product", "product"],
        "MobileNet, depthwise": ["shifted", "summed", "shifted"],
        "MobileNet, depthwise, stride 2": ["shifted", "summed", "phases, shifted"],
        "ResNeXt, grouped": ["split", "split", "split"],
        "DenseNet, average pool": ["sums", "sums"],
        "Inception, average pool": ["sums", "sums"],
        "coordinates, dense": ["outer products", XLA, XLA],
    }


def test_other_calls_have_other_keys():
    changes: list[dict[str, Any]] = [
        {},
        {"size": (6, 6)},
        {"kernel": (2, 2)},
        {"batch": 3},
        {"strides": (2, 1)},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (2, 1), "padding": ((0, 0), (0, 0))},
        {"padding": ((0, 0), (0, 0))},
        {"dtype": jnp.float16},
        {"preferred_element_type": jnp.float32, "dtype": jnp.float16},
        {"precision": lax.Precision.HIGHEST},
        {"groups": 2, "channels": 4, "out": 4},
        {"groups": 4, "channels": 4, "out": 4},
    ]
    made = [graph_of(fn, *map(jax.typeof, args))[0] for fn, args in (conv(**c) for c in changes)]
    keys = [op_of(graph.nodes[0]).key for graph in made]
    assert len(set(keys)) == len(keys)


def test_the_forms_do_not_import_flax():
    code = "import jaxaccel._forms, jaxaccel._tuned, sys; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
