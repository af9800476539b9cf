"""Forms of int8 products summed in int32: equal to the last bit, and what the rules choose."""

import re
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

import jaxaccel as jx
from jaxaccel import _forms, _timing
from jaxaccel._forms import FORMS, XLA, Op, candidates, plain, rule
from jaxaccel._graph import graph_of
from jaxaccel._tuned import by_rules, formed, has_forms, op_of
from tests.test_forms import LAYOUTS, conv, sizes, small

NHWC = LAYOUTS["NHWC"]
INT8 = {"dtype": jnp.int8, "preferred_element_type": jnp.int32}
conv8 = partial(conv, **INT8)


def dot8(left, right, axes) -> tuple[Callable, tuple[Any, ...]]:
    contract = lambda a, b: lax.dot_general(
        a, b, (axes, ((), ())), preferred_element_type=jnp.int32
    )
    return contract, (jnp.zeros(left, jnp.int8), jnp.zeros(right, jnp.int8))


def pool8(size, window, strides, pads, dtype: Any = np.int8) -> tuple[Callable, tuple[Any, ...]]:
    sides = (1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0))
    lowest = dtype(np.iinfo(dtype).min)
    return lambda x: lax.reduce_window(x, lowest, lax.max, *sides), (jnp.zeros(size, dtype),)


CASES = {
    "few channels": conv8((9, 12), (2, 5), 3, 10),
    "one channel": conv8((12, 14), (3, 2), 1, 4, padding="VALID"),
    "stem": conv8((14, 13), (3, 4), 3, 20, strides=(2, 2)),
    "strided, wide steps": conv8((9, 11), (4, 7), 2, 5, strides=(1, 3), padding=((1, 0), (2, 4))),
    "patches": conv8((9, 8), (4, 2), 3, 20, strides=(4, 3)),
    "odd channels": conv8((7, 6), (3, 3), 21, 18),
    "in the library": conv8((8, 7), (3, 3), 20, 8, strides=(1, 2)),
    "more places than pixels": conv8((5, 6), (1, 3), 20, 8, padding=((2, 1), (0, 3))),
    "negative edges": conv8((9, 9), (3, 3), 20, 3, padding=((-1, 0), (1, -2)), strides=(2, 1)),
    "dilated": conv8((10, 11), (3, 2), 20, 4, rhs_dilation=(2, 3)),
    "dilated, few channels": conv8((10, 11), (3, 2), 2, 3, rhs_dilation=(2, 3), strides=(1, 2)),
    "spread": conv8((4, 5), (3, 2), 20, 3, lhs_dilation=(2, 1), padding=((2, 1), (0, 2))),
    "spread and strided": conv8(
        (4, 5), (3, 3), 2, 3, lhs_dilation=(2, 2), strides=(3, 1), padding=((1, 1), (0, 1))
    ),
    "1x1": conv8((5, 4), (1, 1), 9, 6, strides=(2, 1)),
    "1x1, one row": conv8((1, 1), (1, 1), 9, 6, batch=1),
    "1x1, one column": conv8((4, 3), (1, 1), 9, 1),
    "grouped": conv8((6, 5), (2, 2), 12, 24, groups=3),
    "grouped and spread": conv8(
        (3, 4), (2, 3), 4, 6, groups=2, lhs_dilation=(2, 1), padding=((1, 0), (0, 1))
    ),
    "many groups": conv8((5, 5), (3, 3), 40, 20, groups=20),
    "depthwise": conv8((9, 8), (3, 2), 3, 3, groups=3, strides=(2, 1)),
    "depthwise, spread": conv8(
        (4, 5), (3, 3), 3, 6, groups=3, lhs_dilation=(2, 2), padding=((2, 1), (1, 1))
    ),
    "NCHW": conv8((6, 5), (3, 2), 20, 3, layout=LAYOUTS["NCHW"]),
    "NCHW, 1x1": conv8((6, 5), (1, 1), 20, 3, layout=LAYOUTS["NCHW"]),
    "CWNH": conv8((6, 5), (3, 2), 4, 4, layout=LAYOUTS["CWNH"], groups=2),
    "one axis": conv8((19,), (3,), 20, 4, layout=("NWC", "WIO", "NWC"), strides=(2,)),
    "one axis, few channels": conv8((19,), (5,), 1, 4, layout=("NWC", "WIO", "NWC"), strides=(1,)),
    "more than float32 holds": conv8((4, 4), (3, 3), 130, 2),
    "one row": dot8((1, 40), (40, 30), ((1,), (0,))),
    "one column": dot8((5, 9), (9, 1), ((1,), (0,))),
    "one column, transposed": dot8((5, 9), (1, 9), ((1,), (1,))),
    "a vector": dot8((9,), (9, 4), ((0,), (0,))),
    "summed first": dot8((9, 5), (9, 4), ((0,), (0,))),
    "summed over more axes": dot8((2, 5, 3), (4, 3, 2), ((2, 0), (1, 2))),
    "max pool": pool8((2, 9, 8, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
}


def ends(shape, seed=0) -> Any:
    """Mostly the largest and smallest int8."""
    values = np.array([-128, -128, 127, 127, -127, 1, 0], np.int8)
    return jnp.asarray(np.random.default_rng(seed).choice(values, shape))


def op_in(fn, args) -> Op:
    (node,) = graph_of(fn, *map(jax.typeof, args))[0].nodes
    assert has_forms(node)
    return op_of(node)


def everywhere(op: Op) -> dict[str, Any]:
    return candidates(op, "cpu") | candidates(op, "cuda")


def unequal(op: Op, *operands: Any, options: Any = None) -> list[str]:
    """The forms that differ from what the op finds in int32."""
    operands = operands or tuple(map(ends, op.shapes))
    run = lambda name, *operands: formed(op.name, name, *operands, **op.params)
    exact = run(XLA, *(x.astype(jnp.int32) for x in operands))
    dtype = op.params.get("preferred_element_type", jnp.int8)
    every = lambda *operands: {n: run(n, *operands) for n in (XLA, *everywhere(op))}
    every = jax.jit(every, compiler_options=QUICKLY if options is None else options)
    same = lambda y: y.dtype == dtype and np.array_equal(y, exact)
    return [name for name, y in every(*operands).items() if not same(y)]


QUICKLY = {"xla_backend_optimization_level": 0}  # half of the time to compile
SLOW = ("CWNH", "stem", "one axis, few channels", "one channel", "dilated, few channels", "grouped")
SLOW += ("spread and strided", "grouped and spread", "negative edges", "NCHW, 1x1", "many groups")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n in SLOW else ()) for n in CASES]
)
def test_forms_equal_the_op_to_the_last_bit(name):
    op = op_in(*CASES[name])
    assert everywhere(op)
    assert unequal(op) == []


def test_every_form_has_a_case():
    found = set().union(*(everywhere(op_in(*case)) for case in CASES.values()))
    assert found == {*_forms._int8.CONVS, "by rows", "maxima"}


@settings(max_examples=4)
@given(
    size=sizes,
    kernel=small,
    strides=small,
    dilations=st.sampled_from([((1, 1), (1, 1))] * 2 + [((1, 2), (1, 1)), ((1, 1), (2, 1))]),
    padding=st.sampled_from([((0, 0), (0, 0)), ((1, 1), (2, 0)), ((-1, 2), (0, 3))]),
    split=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 9, 20])),
    layout=st.sampled_from(list(LAYOUTS.values())),
    batch=st.integers(1, 2),
)
def test_any_convolution(size, kernel, strides, dilations, padding, split, layout, batch):
    groups, multiplier, inner = split
    options = {"lhs_dilation": dilations[0], "rhs_dilation": dilations[1], "padding": padding}
    options |= {"groups": groups, "layout": layout, "batch": batch, "strides": strides}
    try:
        fn, args = conv8(size, kernel, groups * inner, groups * multiplier, **options)
        out = jax.eval_shape(fn, *args)
    except ValueError:  # nothing is left of the images
        return
    if out.size:
        assert unequal(op_in(fn, args)) == []


@settings(max_examples=4)
@given(
    summed=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    free=st.tuples(*[st.lists(st.integers(1, 5), max_size=2)] * 2),
    data=st.data(),
)
def test_any_product(summed, free, data):
    shapes, axes = [], []
    for own in free:
        order = data.draw(st.permutations(range(len(own) + len(summed))))
        shapes.append(tuple((own + summed)[i] for i in order))
        axes.append(tuple(order.index(len(own) + i) for i in range(len(summed))))
    assert unequal(op_in(*dot8(*shapes, axes=tuple(axes)))) == []


@settings(max_examples=4)
@given(
    size=sizes,
    window=small,
    strides=small,
    pads=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
)
def test_any_max_pooling(size, window, strides, pads):
    fn, args = pool8((2, *size, 2), window, strides, pads)
    if everywhere(op_in(fn, args)):  # of edges alone the largest is the lowest of each dtype
        assert unequal(op_in(fn, args)) == []


def test_sums_beyond_float32_are_split():
    """1,169 times 2^14 and 127: more than 2^24, and odd."""
    fn, (x, kernel) = conv8((3, 3), (3, 3), 130, 1, batch=1, padding="VALID")
    x, kernel = jnp.full_like(x, -128), jnp.full_like(kernel, -128)
    x, kernel = x.at[0, 0, 0, 0].set(127), kernel.at[0, 0, 0].set(1)
    assert int(fn(x, kernel)[0, 0, 0, 0]) % 2 == 1
    assert unequal(op_in(fn, (x, kernel)), x, kernel) == []


@pytest.mark.parametrize("name", ["more places than pixels", "spread"])
def test_edges_inside_of_a_form(name):
    """Compiled as in use: XLA would fold them into the convolution, which is then wrong."""
    assert unequal(op_in(*CASES[name]), options={}) == []


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        conv(dtype=jnp.int8),
        conv(dtype=jnp.int16, preferred_element_type=jnp.int32),
        conv(dtype=jnp.uint8, preferred_element_type=jnp.int32),
        conv(dtype=jnp.int8, preferred_element_type=jnp.float32),
        conv8((4, 4, 4), (2, 2, 2), layout=("NDHWC", "DHWIO", "NDHWC"), strides=(1, 1, 1)),
        conv8(batch=0, padding="VALID"),
        dot8((5, 9), (9, 4), ((1,), (0,))),
        dot8((5, 9), (4, 9), ((1,), (1,))),
        dot8((5, 0), (0, 1), ((1,), (0,))),
        dot8((5,), (4,), ((), ())),
        pool8((1, 4, 4, 1), (2, 2), (2, 2), ((0, 0), (0, 0)), np.uint8),
        pool8((1, 4, 4, 1), (2, 2), (2, 2), ((2, 0), (0, 0))),
    ],
)
def test_other_calls_are_xlas(fn, args):
    for node in graph_of(fn, *map(jax.typeof, args))[0].nodes:
        assert not has_forms(node) or everywhere(op_of(node)) == {}


def shaped(x, kernel, stride=1, padding: Any = "SAME", groups=1, layout=NHWC, **options):
    fn = lambda x, kernel: lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=layout,
        feature_group_count=groups,
        preferred_element_type=jnp.int32,
        **options,
    )
    return fn, [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in (x, kernel)]


FOUND = {  # on a CPU, on CUDA
    "ConvNet, conv 1": ("banded 8", "float32 results"),
    "ConvNet, conv 2": ("banded 4", "float32 results"),
    "ResNet-18, stem": ("columns 4", "float32 results"),
    "ResNet-18, 3x3": (XLA, "float32 results"),
    "ResNet-18, 1x1": ("product", "product"),
    "ResNet-18, 1x1, one image": (XLA, "product"),
    "MobileNet, stem": ("library", "float32 results"),
    "ViT, patches": ("banded 1", "float32 results"),
    "MobileNet, depthwise": ("shifted", "shifted"),
    "ResNeXt": ("block diagonal", "block diagonal, float32 results"),
    "pruned": ("library", "float32 results"),
    "NCHW": ("library", "float32 results"),
    "dilated": (XLA, "im2col"),
    "transposed": ("phases, library", "phases, float32 results"),
    "max pool": ("maxima", XLA),
    "dense": (XLA, XLA),
    "dense, one row": ("by rows", XLA),
    "dense, few products": (XLA, XLA),
}
RULED = {
    "ConvNet, conv 1": shaped((128, 28, 28, 1), (5, 5, 1, 10), padding="VALID"),
    "ConvNet, conv 2": shaped((128, 12, 12, 10), (5, 5, 10, 20), padding="VALID"),
    "ResNet-18, stem": shaped((1, 224, 224, 3), (7, 7, 3, 64), 2, [(3, 3), (3, 3)]),
    "ResNet-18, 3x3": shaped((1, 56, 56, 64), (3, 3, 64, 64)),
    "ResNet-18, 1x1": shaped((16, 56, 56, 64), (1, 1, 64, 128), 2),
    "ResNet-18, 1x1, one image": shaped((1, 56, 56, 64), (1, 1, 64, 128), 2),
    "MobileNet, stem": shaped((1, 224, 224, 3), (3, 3, 3, 32), 2),
    "ViT, patches": shaped((1, 224, 224, 3), (16, 16, 3, 192), 16, "VALID"),
    "MobileNet, depthwise": shaped((1, 56, 56, 144), (3, 3, 1, 144), groups=144),
    "ResNeXt": shaped((1, 56, 56, 128), (3, 3, 4, 128), groups=32),
    "pruned": shaped((1, 28, 28, 37), (3, 3, 37, 45)),
    "NCHW": shaped((1, 64, 56, 56), (64, 64, 3, 3), layout=LAYOUTS["NCHW"]),
    "dilated": shaped((1, 28, 28, 256), (3, 3, 256, 256), rhs_dilation=(2, 2)),
    "transposed": shaped((1, 8, 8, 64), (4, 4, 64, 32), 1, [(2, 2)] * 2, lhs_dilation=(2, 2)),
    "max pool": pool8((1, 112, 112, 64), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "dense": dot8((16, 512), (512, 1000), ((1,), (0,))),
    "dense, one row": dot8((1, 512), (512, 1000), ((1,), (0,))),
    "dense, few products": dot8((1, 50), (50, 10), ((1,), (0,))),
}


def test_rules():
    ruled = lambda op: (rule(op, "cpu"), rule(op, "cuda"))
    assert {name: ruled(op_in(*call)) for name, call in RULED.items()} == FOUND
    assert {rule(op_in(*call), "tpu") for call in RULED.values()} == {XLA}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a library of XLA:CPU")
@pytest.mark.parametrize("name", ["space to depth", "columns 4", "library"])
def test_the_library_takes_what_is_made_for_it(name):
    fn, args = RULED["ResNet-18, stem"]
    run = jax.jit(partial(formed, op_in(fn, args).name, name, **op_in(fn, args).params))
    assert "__ynn_fusion" in (run.lower(*args).compile().as_text() or "")


def convolutions(fn, args, platform) -> list[str]:
    traced: Any = jax.jit(by_rules(fn)).trace(*args)
    lowered = traced.lower(lowering_platforms=(platform,))
    return re.findall(".*stablehlo.convolution.*", lowered.as_text())


@pytest.mark.parametrize("calls", [CASES, RULED])
def test_on_cuda_no_convolution_has_an_int32_result(calls):
    int32 = re.compile(r"-> tensor<[\dx]*xi32>")
    lines = [line for fn, args in calls.values() for line in convolutions(fn, args, "cuda")]
    assert len(lines) >= 5
    assert not any(map(int32.search, lines))
    assert any(map(int32.search, convolutions(*CASES["in the library"], platform="cpu")))


def test_a_kernel_that_float32_cannot_hold_is_left():
    large = op_in(*conv8((40, 40), (33, 33), 1, 1, batch=1))
    assert "float32 results" not in candidates(large, "cuda")


def test_what_xla_lacks_is_never_left_to_it(monkeypatch):
    slow, fast = (op_in(*RULED[name]) for name in ("NCHW", "ResNet-18, 3x3"))
    assert (plain(slow, "cpu"), plain(fast, "cpu")) == (XLA, XLA)
    assert {plain(slow, "cuda"), plain(fast, "cuda")} == {"float32 results"}
    monkeypatch.setattr(_forms._int8, "_MANY_PRODUCTS", 0)
    assert (plain(slow, "cpu"), plain(fast, "cpu")) == ("library", XLA)
    assert plain(op_in(*RULED["dense"]), "cuda") == XLA


KERNEL = ends((3, 3, 3, 8))
IMAGES = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype(np.float32)


def quantized(scale, x, kernel=KERNEL):
    """A layer as quantization makes it: only its ends have derivatives."""
    x = jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8)
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, preferred_element_type=jnp.int32
    )
    return y.astype(jnp.float32) * scale


TRANSFORMATIONS: dict[str, Callable] = {
    "value": lambda f: f(0.02, IMAGES),
    "gradients": lambda f: jax.grad(lambda s, x: jnp.sin(f(s, x)).sum(), (0, 1))(0.02, IMAGES),
    "jvp": lambda f: jax.jvp(f, (0.02, IMAGES), (1.0, IMAGES)),
    "linearize": lambda f: jax.linearize(f, 0.02, IMAGES)[1](1.0, IMAGES),
    "second order": lambda f: jax.hessian(lambda s: (f(s, IMAGES) ** 2).mean())(0.02),
    "vmap": lambda f: jax.vmap(f, (None, 1), 2)(0.02, IMAGES[:, None].repeat(2, 1)),
    "vmap of both": lambda f: jax.vmap(f, (0, None, 3))(
        jnp.array([0.02, 0.03]), IMAGES, jnp.stack([KERNEL, -KERNEL // 2], 3)
    ),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda s: f(s, IMAGES).sum()))(0.02),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_tuned_it_equals_the_original_under(name):
    transform = TRANSFORMATIONS[name]
    both = lambda: (transform(quantized), transform(by_rules(quantized)))
    expected, found = jax.jit(both, compiler_options=QUICKLY)()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


def test_it_is_tuned_inside_of_gradients():
    graph, _ = graph_of(jax.grad(lambda s: by_rules(quantized)(s, IMAGES).sum()), jax.typeof(0.02))
    assert [node.tuner is not None for node in graph.nodes if has_forms(node)] == [True]


def test_its_own_tangents_are_none():
    fn, args = CASES["few channels"]
    none = tuple(np.zeros(x.shape, jax.dtypes.float0) for x in args)
    tangent = jax.jvp(by_rules(fn), args, none)[1]
    assert tangent.dtype == jax.dtypes.float0
    assert jax.vjp(by_rules(fn), *args)[0].dtype == jnp.int32


def test_symbolic_batches():
    (many,) = jax.export.symbolic_shape("many")
    for name, form in {"few channels": "banded 8", "depthwise": "shifted"}.items():
        fn, args = CASES[name]
        x, kernel = (ends(a.shape) for a in args)
        aval = partial(jax.ShapeDtypeStruct, dtype=jnp.int8)
        avals = aval((many, *x.shape[1:])), aval(kernel.shape)
        assert rule(op_in(fn, avals), "cpu") == form
        exported = jax.export.export(jax.jit(by_rules(fn)))(*avals)
        np.testing.assert_array_equal(exported.call(x, kernel), fn(x, kernel))


def test_autotune_times_and_compares_integers(tmp_path, monkeypatch):
    monkeypatch.setattr(_forms._int8, "_MANY_PRODUCTS", 0)
    fn, args = CASES["odd channels"]
    fast = jx.autotune(fn, cache=tmp_path, progress=False)
    x, kernel = (ends(a.shape) for a in args)
    np.testing.assert_array_equal(fast(x, kernel), fn(x, kernel))
    (row,) = fast.report.rows
    assert row.seconds
    assert not row.dropped
    assert XLA not in row.seconds
    assert row.form in FORMS["conv_general_dilated"]
    assert row.form in str(fast.report)


def test_a_form_with_a_wrong_integer_is_not_taken():
    right = lambda x: x.astype(jnp.int32)
    wrong = lambda x: right(x).at[1].add(1)
    (x,) = _timing.synthetic([jax.ShapeDtypeStruct((1000,), jnp.int8)])
    assert {int(x.min()), int(x.max())} == {-128, 127}
    found = _timing.timed({XLA: right, "wrong": wrong}, [x])
    assert found.dropped == {"wrong": "differs in 1 of 1000 integers"}
