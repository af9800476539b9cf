"""ONNX: the zoo, drawn networks and single operations, by two engines, against XLA."""

import logging
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from jax import lax

import jaxaccel as jx
from jaxaccel._graph import run
from jaxaccel.export._onnx import _model, model
from jaxaccel.export._onnx._lowered import lowered
from jaxaccel.export._onnx._ops import OPERATION
from jaxaccel.export._onnx._settled import settled
from tests.models import LINEN, ZOO, normal, tiers
from tests.networks import frameworks, sequence, vision
from tests.networks.drawn import networks
from tests.onnx_engines import ENGINES, close, operations, optimized, run_by, same_by
from tests.onnx_operations import IMAGES, LAYOUT, VECTORS, K, W, conv

CASES = [*ZOO, *vision.CASES, *sequence.CASES, *frameworks.CASES]
NAMED = {case.name: case for case in CASES}
LONG = (
    *("mobilenet", "unet", "vit", "shuffle_twice", "densenet", "keras", "flatten", "separable"),
    *("chain", "multiplier", "grouped", "haiku", "haiku_state", "lstm", "elman", "inception"),
)


def two(shape):
    """Batches of two sizes."""
    return [(normal(0, *shape),), (normal(5, 3 if shape[0] != 3 else 2, *shape[1:]),)]


@pytest.mark.parametrize("case", tiers(CASES, LONG))
def test_the_zoo_by_both_engines(case):
    fn, params = case.build()
    made = model(fn, params, (case.images(),))
    same_by(ENGINES, made, fn, params, two(case.shape))


@settings(max_examples=8)
@given(networks())
def test_drawn_networks_by_both_engines(network):
    fn, params, shape = network
    made = model(fn, params, (normal(0, *shape),))
    same_by(ENGINES, made, fn, params, two(shape), 2e-5)


@pytest.mark.parametrize("name", ["convnet", "chain", "shuffle_unit", "lstm", "equinox"])
def test_what_is_written_computes_the_same_in_jax(name):
    """Each operation says what it is in JAX: so a fault is ours, or the engine's."""
    fn, params = NAMED[name].build()
    x = NAMED[name].images()
    call = _model.checked(fn, params, (x,), None)
    traced, arrays = _model._traced(call)
    graph = settled(traced.graph, dict(zip(traced.graph.inputs, arrays.items(), strict=False)))
    made = lowered(graph, list(call.inputs.values())).graph
    assert sum(node.name == OPERATION for node in made.nodes) > len(made.nodes) / 3
    close(jax.jit(lambda x: run(made, [x]))(x), jax.jit(fn)(params, x))


EXACT = {  # by hand: batch norm, biases, relus and layouts cost nothing
    "convnet": {"Reshape": 2, "Conv": 2, "Relu": 3, "MaxPool": 2, "Transpose": 1, "Gemm": 2},
    "linen": {"Reshape": 2, "Conv": 1, "Relu": 1, "Transpose": 1, "Gemm": 1},
    "mlp": {"Reshape": 1, "Gemm": 3, "Relu": 2},
    "equinox": {"Conv": 3, "Relu": 3, "Add": 1, "ReduceSum": 1, "Div": 1, "Gemm": 1},
    "resnet20": {
        "Transpose": 1, "Conv": 19, "Relu": 19, "Add": 9, "Slice": 2, "Pad": 2, "ReduceSum": 1,
        "Div": 1, "Gemm": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact_operations(name):
    fn, params = NAMED[name].build()
    assert operations(model(fn, params, (NAMED[name].images(),))) == EXACT[name]


def test_relu6_is_fused_into_convolutions(tmp_path):
    def net(params, x):
        for kernel in params["kernels"]:
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
            x = jax.nn.relu6(x)
        return x

    params = {"kernels": [normal(0, 3, 3, 4, 4), normal(1, 3, 3, 4, 4)]}
    made = model(net, params, (normal(2, 2, 6, 6, 4),))
    assert operations(made) == {"Transpose": 2, "Conv": 2, "Relu": 2, "Clip": 2}
    left = optimized(made, tmp_path)
    assert not left & {"Relu": 1, "Clip": 1}.keys()
    assert sum(left[name] for name in ("Conv", "FusedConv")) == 2


def test_initializers_have_the_paths_of_parameters():
    fn, params = LINEN.build()
    made = model(fn, params, (LINEN.images(),))
    named = {t.name: tuple(t.dims) for t in made.graph.initializer if "/" in t.name}
    assert named == {
        "params/conv1/kernel": (4, 1, 3, 3),
        "params/conv1/bias": (4,),
        "params/dense1/kernel": (256, 10),
        "params/dense1/bias": (10,),
    }
    assert not made.graph.value_info
    assert (made.ir_version, made.opset_import[0].version) == (10, 17)


def test_a_tensor_that_is_named_twice_and_one_that_is_read_twice():
    def net(params, x):
        y = x @ params["w"] + params["b"][None]
        return y @ params["w"].T + params["b"][None]

    params = {"w": normal(0, 4, 4), "b": normal(1, 4)}
    made = model(net, params, (normal(2, 2, 4),))
    assert sorted(tensor.name for tensor in made.graph.initializer) == ["b/vector", "w", "w_1"]
    same_by(ENGINES, made, net, params, two((2, 4)))


def test_trees_in_and_out():
    def net(params, images, extra):
        y = images["left"] * params["w"] + images["right"]
        return {"sum": y, "again": y, "input": images["left"], "weight": params["w"],
                "size": (y.shape[0], jnp.zeros(2)), "none": None}  # fmt: skip

    params = {"w": normal(0, 3)[None]}
    images = {"left": normal(1, 4, 3), "right": normal(2, 4, 3)}
    extra = [jnp.arange(4)]
    made = model(net, params, (images, extra))
    assert [value.name for value in made.graph.input] == [
        "args/0/left", "args/0/right", "args/1/0",
    ]  # fmt: skip
    results = ["again", "input", "size/0", "size/1", "sum", "weight"]
    assert [value.name for value in made.graph.output] == [f"result/{name}" for name in results]
    sizes = [d.dim_param or d.dim_value for d in made.graph.output[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3]
    same_by(["onnxruntime"], made, net, params, [(images, extra)])


def test_the_axis_of_the_batch():
    net = lambda params, x, table: jnp.tanh(table @ x).sum(0) * params["w"]
    params, table = {"w": jnp.float32(2)}, normal(0, 5, 3)
    made = model(net, params, (normal(1, 3, 4), table), batch_axes=(1, None))
    same_by(ENGINES, made, net, params, [(normal(2, 3, n), table) for n in (1, 6)])
    fixed = model(net, params, (normal(1, 3, 4), table), batch_axes=None)
    assert fixed.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 4


def test_what_other_transforms_return():
    fn, params = NAMED["convnet"].build()
    x = NAMED["convnet"].images()
    tuned = jx.autotune(fn, mode="rules")
    for one in (tuned, jax.jit(fn), jax.jit(tuned)):
        made = model(one, params, (x,))
        assert operations(made) == EXACT["convnet"]
    small = jx.prune.channels(tuned, params, x, ratio=0.5)
    made = model(*small, (x,))
    assert operations(made) == EXACT["convnet"]
    same_by(ENGINES, made, *small, two(NAMED["convnet"].shape))


def test_weights_of_8_bits_that_fn_dequantizes():
    fn, params = LINEN.build()
    small = jx.quantize.weights(params, bits=8)
    whole = lambda params, x: fn(jx.quantize.dequantize(params), x)
    same_by(ENGINES, model(whole, small, (LINEN.images(),)), whole, small, two(LINEN.shape))


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_single_operations(name):
    fn, weights, shape = (
        (VECTORS[name], W, (4, 6)) if name in VECTORS else (IMAGES[name], K, (4, 8, 8, 3))
    )
    made = model(fn, weights, (normal(0, *shape),))
    same_by(ENGINES, made, fn, weights, two(shape))


def test_nothing_without_elements_is_written():
    fn = lambda w, x: (jnp.pad(x @ w, ((0, 0), (1, 2)), mode="edge"), x[:, :0].reshape(0, 6))
    made = model(fn, W, (normal(0, 4, 6),))
    same_by(["onnxruntime"], made, fn, W, two((4, 6)))
    padded = model(lambda w, x: fn(w, x)[0], W, (normal(0, 4, 6),))
    assert all(0 not in tensor.dims for tensor in padded.graph.initializer)


def test_negative_edges():
    """XLA:CPU reads past the image where one is negative, so it is cut before for it."""
    made = model(lambda k, x: conv(x, k, (1, 1), ((-1, 1), (0, -2))), K, (normal(0, 4, 8, 8, 3),))
    cut = lambda k, x: conv(x[:, 1:, :-2], k, (1, 1), ((0, 1), (0, 0)))
    same_by(ENGINES, made, cut, K, two((4, 8, 8, 3)))


@pytest.mark.full
@pytest.mark.parametrize("opset", [18, 20, 21, 23])
@pytest.mark.parametrize("name", ["convnet", "resnet20", "vit", "gru"])
def test_newer_opsets(name, opset):
    fn, params = NAMED[name].build()
    made = model(fn, params, (NAMED[name].images(),), opset=opset)
    assert made.opset_import[0].version == opset
    same_by(["onnxruntime"], made, fn, params, two(NAMED[name].shape))


def test_float16():
    fn, params = NAMED["convnet"].build()
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    x = normal(0, 2, 28, 28, 1).astype(jnp.float16)
    made = model(fn, half, (x,))
    found = run_by("onnxruntime", made, [{"args/0": np.asarray(x)}])[0]
    close(found, [jax.jit(fn)(half, x)], 5e-3)


PARAMS = {"w": jnp.ones((3, 3))}
X = jnp.ones((2, 3))
plain = lambda params, x: x @ params["w"]


def random(params, x):
    return x + jax.random.normal(jax.random.key(0), x.shape)


def test_loaded_functions_are_opaque(tmp_path):
    jx.export.save(tmp_path / "saved", plain, PARAMS, X)
    fn, params = jx.export.load(tmp_path / "saved")
    with pytest.raises(TypeError, match=r"^fn: .* was loaded by jx.export.load: "):
        model(fn, params, (X,))


def test_64_bits_are_refused_and_left_alone():
    with jax.enable_x64(True):
        wide, x = {"w": jnp.ones((3, 3), jnp.float64)}, jnp.ones((2, 3), jnp.float32)
        with pytest.raises(TypeError, match=r"^w: is of float64, and a file of ONNX computes in 32 "
                           r"bits; cast it, or export with jax.enable_x64\(False\)$"):  # fmt: skip
            model(plain, wide, (x,))
        with pytest.raises(TypeError, match=r"^result: is of int64, "):
            model(lambda params, x: jnp.argmax(x @ params["w"], 1), {"w": x[:, :3].T}, (x,))
        made = model(plain, {"w": jnp.ones((3, 3), jnp.float32)}, (x,))
        assert jnp.ones(1, jnp.float64).dtype == jnp.float64
    same_by(["onnxruntime"], made, plain, PARAMS, [(X,)])


def test_too_large_for_a_file(monkeypatch):
    monkeypatch.setattr("jaxaccel.export._onnx._assembled._LARGEST", 35)
    with pytest.raises(ValueError, match=r"^params: 36 bytes, and a file of ONNX holds at most 2 "
                       "GiB; make them smaller, by jx.prune or jx.quantize.int8$"):  # fmt: skip
        model(plain, PARAMS, (X,))


def test_what_onnx_does_not_accept(monkeypatch):
    def refuse(*args, **kwargs):
        raise onnx.checker.ValidationError("No Op registered for Thing\nContext: a node")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ValueError, match=r"^fn: onnx does not accept what jax2onnx made of it: "
                       "ValidationError: No Op registered for Thing; a newer opset than 17 may "
                       "have it$"):  # fmt: skip
        model(plain, PARAMS, (X,))


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "net.onnx"
    jx.export.onnx(path, plain, PARAMS, X)
    before = path.read_bytes()
    with pytest.raises(NotImplementedError):
        jx.export.onnx(path, random, PARAMS, X)
    monkeypatch.setattr("os.replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jx.export.onnx(path, lambda params, x: -plain(params, x), PARAMS, X)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == [path.parent]


@pytest.mark.parametrize("name", ["onnx", "jax2onnx"])
def test_missing_packages(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"^jx.export.onnx needs {name}: pip install 'jaxaccel"
                       r"\[export\]'$"):  # fmt: skip
        model(plain, PARAMS, (X,))


def test_nothing_else_is_changed():
    inner = jax.jit(lambda x: jnp.tanh(jnp.cumsum(x, 1)))
    net = lambda params, x: inner(x @ params["w"])
    before = str(jax.make_jaxpr(inner)(X))
    handlers, filters = list(logging.getLogger().handlers), list(warnings.filters)
    made = model(net, PARAMS, (X,))
    assert str(jax.make_jaxpr(inner)(X)) == before
    assert "jax2onnx" not in before
    assert logging.getLogger().handlers == handlers
    assert warnings.filters == filters
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(jnp.cumsum(X, 1), np.cumsum(X, 1))
    np.testing.assert_array_equal(jax.grad(lambda x: inner(x).sum())(X).shape, X.shape)
    same_by(["onnxruntime"], made, net, PARAMS, [(X,)])


def test_only_the_plugins_of_lax_are_imported():
    code = (
        "import sys, jax.numpy as jnp; from jaxaccel.export._onnx import model;"
        "before = jnp.cumsum;"
        "assert not {'onnx', 'jax2onnx'} & {*sys.modules};"
        "model(lambda w, x: x @ w, jnp.ones((3, 3)), (jnp.ones((2, 3)),));"
        "from jax2onnx.plugins import plugin_system;"
        "print(jnp.cumsum is before, 'equinox' in sys.modules, "
        "plugin_system._already_imported_plugins)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True False False"
