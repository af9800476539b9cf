"""The networks against NumPy, published parameter counts and their own promises."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxaccel as jx
from jaxaccel import _tuned, nn
from jaxaccel._forms import rule
from jaxaccel._select import flatten
from jaxaccel._trace import trace
from jaxaccel.nn import _residual
from tests.nn_reference import (
    numpy_conv,
    numpy_convnet,
    numpy_dense,
    numpy_norm,
    numpy_pool,
    relu,
)


def build(cls, *args, **kwargs) -> Any:
    return cls(*args, **kwargs, rngs=nnx.Rngs(0))


def abstract(cls, *args, **kwargs) -> Any:
    return nnx.eval_shape(lambda: build(cls, *args, **kwargs))


def paths(model) -> dict:
    return flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def count(model) -> int:
    return sum(leaf.size for leaf in paths(model).values())


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def output_shape(model, *shape):
    return nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def program(model, *shape) -> str:
    """The jaxpr of a forward pass of an abstract model."""
    graphdef, state = nnx.split(model)
    run = lambda state, x: nnx.merge(graphdef, state, copy=True)(x)
    return str(jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct(shape, jnp.float32)))


def randomise(model: Any, seed=0) -> Any:
    """Every parameter and statistic random: no bias, scale or mean can be left out unseen."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.Param, nnx.BatchStat)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(-1, 1, x.shape), x.dtype), nnx.to_pure_dict(state[0])
    )
    nnx.update(model, drawn)
    stats = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype), nnx.to_pure_dict(state[1])
    )
    nnx.update(model, stats)
    model.eval()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"widths": (2, 3), "dense": (5,)},
        {"widths": (2, 3), "dense": (), "separable": True},
        {"widths": (3,), "dense": (5, 4)},
    ],
    ids=["classic", "separable", "one convolution"],
)
def test_convnet_equals_numpy(options):
    model = randomise(build(nn.ConvNet, 4, input_shape=(13, 12, 2), kernel_size=3, **options))
    x = images(3, 13, 12, 2)
    np.testing.assert_allclose(
        nnx.jit(model)(x), numpy_convnet(np.asarray(x, np.float64), model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("batch_norm", [False, True])
def test_depthwise_separable_equals_numpy(batch_norm):
    model = randomise(
        build(nn.DepthwiseSeparable, 3, 4, strides=2, padding=1, batch_norm=batch_norm, pool=2)
    )
    x = images(2, 9, 10, 3)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = numpy_conv(padded, model.depthwise, groups=3)[:, ::2, ::2]
    y = relu(numpy_norm(y, model.depthwise_norm) if batch_norm else y)
    y = numpy_conv(y, model.pointwise)
    y = numpy_pool(relu(numpy_norm(y, model.pointwise_norm) if batch_norm else y))
    np.testing.assert_allclose(nnx.jit(model)(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_conv_relu_equals_numpy(batch_norm):
    model = randomise(build(nn.ConvReLU, 2, 3, 3, padding="VALID", pool=3, batch_norm=batch_norm))
    x = images(2, 9, 10, 2)
    y = numpy_conv(np.asarray(x, np.float64), model.conv)
    y = numpy_pool(relu(numpy_norm(y, model.norm) if batch_norm else y), 3)
    np.testing.assert_allclose(nnx.jit(model)(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "units"), [(0, ()), (2, (6, 6))])
def test_mlp_equals_numpy(depth, units):
    model = randomise(build(nn.MLP, 12, 6, depth, 3))
    x = images(4, 2, 3, 2)
    y = np.asarray(x, np.float64).reshape(4, 12)
    for i in range(1, depth + 1):
        y = relu(numpy_dense(y, getattr(model, f"dense{i}")))
        assert y.shape[1] == units[i - 1]
    np.testing.assert_allclose(model(x), numpy_dense(y, model.classifier), rtol=1e-5, atol=1e-5)


def cifar_resnet_parameters(depth: int) -> int:
    """He et al. 2016, section 4.2: 2n 3x3 convolutions of each width, batch norm on all."""
    convs = [(3, 16)] + [
        (before if layer == 0 else width, width)
        for before, width in ((16, 16), (16, 32), (32, 64))
        for layer in range((depth - 2) // 3)
    ]
    return sum(9 * i * o + 2 * o for i, o in convs) + 64 * 10 + 10


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (partial(abstract, nn.ConvNet), 21_840),
        (partial(abstract, nn.ResNet, 18, 1000), 11_689_512),
        (partial(abstract, nn.ResNet, 34, 1000), 21_797_672),
        (partial(abstract, nn.ResNet, 50, 1000), 25_557_032),
        (partial(abstract, nn.MobileNet), 3_504_872),
        (partial(abstract, nn.MobileNet, width=0.5), 1_968_680),
        (partial(abstract, nn.ResNet, 20), cifar_resnet_parameters(20)),
        (partial(abstract, nn.ResNet, 56), cifar_resnet_parameters(56)),
    ],
)
def test_parameter_counts_are_the_published_ones(model, expected):
    assert count(model()) == expected


def test_the_derived_cifar_counts_are_those_of_the_paper():
    rounded = {d: round(cifar_resnet_parameters(d) / 1e6, 2) for d in (20, 32, 44, 56)}
    assert rounded == {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85}


def test_paths_read_well():
    assert list(paths(abstract(nn.ConvNet))) == [
        f"{layer}/{leaf}"
        for layer in ("classifier", "conv1", "conv2", "dense1")
        for leaf in ("bias", "kernel")
    ]
    assert "blocks/0/conv1/kernel" in paths(abstract(nn.ResNet, 20))
    assert "blocks/3/shortcut/kernel" in paths(abstract(nn.ResNet, 50))
    assert "blocks/1/depthwise/kernel" in paths(abstract(nn.MobileNet))
    separable = paths(abstract(nn.ConvNet, separable=True))
    assert separable["conv1/kernel"].shape == (5, 5, 1, 10)
    assert separable["conv2/depthwise/kernel"].shape == (5, 5, 1, 10)
    assert separable["conv2/pointwise/kernel"].shape == (1, 1, 10, 20)


def test_shapes_of_the_deep_networks():
    assert output_shape(abstract(nn.ResNet, 50, 7), 2, 64, 64, 3) == (2, 7)
    assert output_shape(abstract(nn.ResNet, 18, width=8, in_features=1), 2, 64, 64, 1) == (2, 10)
    assert output_shape(abstract(nn.ResNet, 20, width=8), 2, 32, 32, 3) == (2, 10)
    assert output_shape(abstract(nn.MobileNet, 7, in_features=1), 2, 64, 64, 1) == (2, 7)


def test_strides_reduce_images_as_published():
    def sizes(model, side):
        x = jax.ShapeDtypeStruct((1, side, side, model.conv1.kernel_shape[3]), jnp.float32)
        for block in model.blocks:
            x = nnx.eval_shape(lambda b, x: b(x), block, x)
        return x.shape[1:]

    assert sizes(abstract(nn.ResNet, 20), 32) == (8, 8, 64)
    assert sizes(abstract(nn.ResNet, 50), 56) == (7, 7, 2048)
    assert sizes(abstract(nn.MobileNet), 112) == (7, 7, 320)


def test_the_stem_of_resnet_halves_twice():
    text = program(abstract(nn.ResNet, 18), 1, 64, 64, 3)
    assert "f32[1,32,32,64]" in text
    assert "f32[1,16,16,64]" in text
    assert "f32[1,8,8,64]" not in text


def test_overlapping_pooling_pads_by_one_pixel():
    x = images(1, 6, 7, 2)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = windows[:, ::2, ::2].max((4, 5))
    np.testing.assert_array_equal(_tuned.max_pool(x, 3, strides=2, pad=1), expected)


def test_the_parameter_free_shortcut_subsamples_and_appends_zero_channels():
    block = build(_residual._Residual, 3, 6, 2, bottleneck=False, project=False)
    block.norm2.scale[...] = jnp.zeros(6)
    block.eval()
    x = images(2, 7, 8, 3)
    expected = np.zeros((2, 4, 4, 6))
    expected[..., :3] = relu(np.asarray(x))[:, ::2, ::2]
    np.testing.assert_allclose(nnx.jit(block)(x), expected, atol=1e-6)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_projected_block_equals_numpy(bottleneck):
    block = randomise(
        _residual._Residual(3, 8, 2, bottleneck=bottleneck, project=True, rngs=nnx.Rngs(0))
    )
    x = np.asarray(images(2, 7, 8, 3), np.float64)
    around = lambda x: np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    if bottleneck:
        y = relu(numpy_norm(numpy_conv(x, block.conv1), block.norm1))
        y = relu(numpy_norm(numpy_conv(around(y), block.conv2)[:, ::2, ::2], block.norm2))
        y = numpy_norm(numpy_conv(y, block.conv3), block.norm3)
    else:
        y = relu(numpy_norm(numpy_conv(around(x), block.conv1)[:, ::2, ::2], block.norm1))
        y = numpy_norm(numpy_conv(around(y), block.conv2), block.norm2)
    skip = numpy_norm(numpy_conv(x, block.shortcut)[:, ::2, ::2], block.shortcut_norm)
    actual = nnx.jit(block)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, relu(y + skip), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("features", "expansion"), [(3, 6), (4, 6), (3, 1)])
def test_an_inverted_residual_equals_numpy(features, expansion):
    block = randomise(_residual._InvertedResidual(3, features, expansion, 1, nnx.Rngs(0)))
    x = np.asarray(images(2, 5, 6, 3), np.float64)
    relu6 = lambda x: np.clip(x, 0, 6)
    y = x
    if expansion > 1:
        y = relu6(numpy_norm(numpy_conv(y, block.expand), block.expand_norm))
    around = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = numpy_conv(around, block.depthwise, groups=y.shape[3])
    y = numpy_conv(relu6(numpy_norm(y, block.depthwise_norm)), block.project)
    y = numpy_norm(y, block.project_norm)
    actual = nnx.jit(block)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, x + y if features == 3 else y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("width", "stem", "first", "last"),
    [(0.25, 8, 8, 1280), (0.35, 16, 8, 1280), (0.75, 24, 16, 1280), (1.4, 48, 24, 1792)],
)
def test_mobilenet_widths_are_those_of_the_reference(width, stem, first, last):
    kernels = paths(abstract(nn.MobileNet, width=width))
    assert kernels["conv1/kernel"].shape[3] == stem
    assert kernels["blocks/0/project/kernel"].shape[3] == first
    assert kernels["conv2/kernel"].shape[3] == last


def test_channel_dropout_takes_whole_channels_of_the_last_convolution():
    model = build(nn.ConvNet, 36, input_shape=(10, 10, 1), widths=(4,), dense=(), dropout=0.5)
    model.classifier = nnx.Linear(36, 36, rngs=nnx.Rngs(0))
    model.classifier.kernel[...] = jnp.eye(36)
    model.conv1.bias[...] = jnp.ones(4) * 9  # every feature is positive
    x = images(8, 10, 10, 1)
    model.eval()
    kept = model(x).reshape(8, 9, 4)
    model.train()
    dropped = np.asarray(model(x).reshape(8, 9, 4) / kept)
    assert np.all(dropped == dropped[:, :1])
    assert set(np.unique(dropped.round(4))) == {0.0, 2.0}


@pytest.mark.parametrize(
    "model",
    [
        partial(
            build, nn.ConvNet, input_shape=(16, 16, 1), widths=(2, 3), dense=(4,), kernel_size=3
        ),
        partial(build, nn.MLP, 256, 8, 1, 10, dropout=0.5),
    ],
    ids=["ConvNet", "MLP"],
)
def test_dropout_acts_in_training_only(model):
    model, x = model(), images(4, 16, 16, 1)
    model.train()
    assert not np.allclose(model(x), model(x))
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))


def test_mobilenet_drops_features_before_the_classifier():
    model = abstract(nn.MobileNet, dropout=0.3)
    assert model.dropout.rate == 0.3
    model.train()
    assert program(model, 2, 32, 32, 3).count("bool[2,1280]") > 0
    model.eval()
    assert program(model, 2, 32, 32, 3).count("bool[2,1280]") == 0


def test_statistics_move_by_a_tenth_and_only_in_training():
    model = build(nn.ConvReLU, 1, 2, batch_norm=True)
    x = images(4, 6, 6, 1)
    features = np.asarray(model.conv(x), np.float64)
    model.eval()
    model(x)
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(2))
    model.train()
    model(x)
    np.testing.assert_allclose(
        model.norm.mean[...], 0.1 * features.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(model.norm.var[...], 0.9 + 0.1 * features.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (partial(build, nn.ConvReLU, 3, 4, pool=2, batch_norm=True), (2, 8, 8, 3)),
        (partial(build, nn.DepthwiseSeparable, 3, 4, batch_norm=True), (2, 8, 8, 3)),
        (partial(build, nn.MLP, 192, 5, 1, 10, dropout=0.5), (2, 8, 8, 3)),
        (partial(build, nn.ConvNet, widths=(2, 3), dense=(4,)), (2, 28, 28, 1)),
        (
            partial(build, _residual._Residual, 3, 4, 2, bottleneck=False, project=True),
            (2, 8, 8, 3),
        ),
        (partial(build, _residual._InvertedResidual, 3, 3, 2, 1), (2, 8, 8, 3)),
    ],
    ids=["ConvReLU", "DepthwiseSeparable", "MLP", "ConvNet", "residual", "inverted residual"],
)
def test_training_under_plain_jit_after_a_split(model, shape):
    model = model()
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss_and_grad(params, rest, x):
        def loss(params):
            merged = nnx.merge(graphdef, params, rest, copy=True)
            return (merged(x) ** 2).sum(), nnx.split(merged, nnx.Param, ...)[2]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, rest), grads = loss_and_grad(params, rest, images(*shape))
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_depthwise_stages_take_the_form_of_the_backend():
    fn, params = jx.functional(abstract(nn.MobileNet, 10))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    nodes = trace(fn, jax.eval_shape(lambda: params), image).graph.nodes
    ops = [_tuned.op_of(node) for node in nodes if node.tuner == _tuned.RULES]
    # 17 of the 52 convolutions are depthwise: multiply-adds on CPU.
    assert len(ops) == 52
    assert sum(rule(op, "cpu") == "shifted" for op in ops) == 17
    assert {rule(op, "cuda") for op in ops} == {"xla"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            partial(build, nn.ConvNet, input_shape=(12, 28, 1)),
            r"conv2: nothing is left of 4x12 pixels after a 5x5 convolution and 2x2 pooling; "
            r"give larger images than input_shape=\(12, 28, 1\), fewer widths or a smaller",
        ),
        (partial(build, nn.ConvNet, input_shape=(5, 5, 1)), r"conv1: nothing is left of 5x5"),
        (partial(build, nn.ConvNet, widths=()), r"widths: empty; give the channels of at least"),
        (partial(build, nn.ConvNet, dropout=1.0), r"dropout: 1.0 is not in \[0, 1\)"),
        (partial(build, nn.MLP, 4, 4, 1, 2, dropout=-0.1), r"dropout: -0.1 is not in \[0, 1\)"),
        (partial(build, nn.MLP, 4, 4, -1, 2), r"depth: -1 is negative; give the number of hidden"),
        (
            partial(build, nn.ResNet, 21),
            r"depth: no ResNet of depth 21; take one of 20, 32, 44, 56, 110, 18, 34, 50, 101, 152",
        ),
        (partial(build, nn.MobileNet, width=0.0), r"width: 0.0 is not positive; 1.0 is the"),
        (partial(build, nn.MobileNet, dropout=2), r"dropout: 2 is not in \[0, 1\)"),
    ],
)
def test_errors_name_the_argument_and_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_smallest_images_that_fit_are_accepted():
    model = abstract(nn.ConvNet, input_shape=(16, 16, 1))
    assert paths(model)["dense1/kernel"].shape == (20, 50)
    assert output_shape(model, 3, 16, 16, 1) == (3, 10)
