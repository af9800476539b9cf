"""Tuned ops under every transformation of JAX, and under ours."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding

import jaxaccel as jx
from jaxaccel import _tuned
from jaxaccel._forms import candidates
from jaxaccel._graph import Graph, graph_of
from jaxaccel._tuned import by_rules, has_forms, op_of, untuned
from tests.models import ZOO, tiers

LAYOUT = ("NHWC", "HWIO", "NHWC")


class First:
    """Chooses the first form there is: not XLA's, wherever there is another."""

    def choose(self, op, platform, devices):
        return next(iter(candidates(op)), "xla")


class Last:
    def choose(self, op, platform, devices):
        return [*candidates(op), "xla"][-2 if candidates(op) else -1]


def tuned(fn, tuner):
    def run(*args):
        leaves, tree = jax.tree.flatten(args)
        graph, out = graph_of(lambda *x: fn(*tree.unflatten(x)), *map(jax.typeof, leaves))
        return out.unflatten(_tuned.tuned(graph, leaves, tuner))

    return run


def depthwise(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (2, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=3
    )


def dense(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 2), "SAME", dimension_numbers=LAYOUT)


def pooled(x, kernel):
    y = lax.reduce_window(
        x * kernel.sum((0, 1, 2)), -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), "SAME"
    )
    return y**2


def product_of_sums(x, kernel):
    y = lax.reduce_window(x, 0.0, lax.add, (1, 3, 2, 1), (1, 2, 2, 1), "SAME")
    return y @ kernel.sum((0, 1))


FUNCTIONS = {"depthwise": (depthwise, 1, 6), "dense": (dense, 3, 2), "pooled": (pooled, 1, 3)}
FUNCTIONS["product of sums"] = (product_of_sums, 3, 2)


def operands(inputs, outputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 5, 3)), rng.normal(size=(3, 2, inputs, outputs))
    return jnp.asarray(x), jnp.asarray(kernel)


def loss(fn, x, kernel):
    return jnp.sin(fn(x, kernel)).sum()


TRANSFORMATIONS = {
    "value": lambda f, x, k: f(x, k),
    "grad": lambda f, x, k: jax.grad(partial(loss, f), (0, 1))(x, k),
    "jvp": lambda f, x, k: jax.jvp(f, (x, k), (k.sum() * x + 1, k)),
    "jvp of one operand": lambda f, x, k: jax.jvp(lambda k: f(x, k), (k,), (k,)),
    "linearize": lambda f, x, k: jax.linearize(f, x, k)[1](x, k),
    "linear transpose": lambda f, x, k: jax.grad(lambda k: f(lax.stop_gradient(x), k).sum())(k),
    "forward over reverse": lambda f, x, k: jax.jvp(
        jax.grad(partial(loss, f), (0, 1)), (x, k), (x, k)
    ),
    "reverse over reverse": lambda f, x, k: jax.grad(
        lambda x, k: sum((g**2).sum() for g in jax.grad(partial(loss, f), (0, 1))(x, k)), (0, 1)
    )(x, k),
    "vmap of grad": lambda f, x, k: jax.vmap(jax.grad(partial(loss, f), (0, 1)), (0, None))(
        jnp.stack([x, 2 * x]), k
    ),
    "vmap of both": lambda f, x, k: jax.vmap(f, (1, 3), 2)(
        jnp.stack([x, 2 * x], 1), jnp.stack([k, k + 1], 3)
    ),
    "checkpoint": lambda f, x, k: jax.grad(jax.checkpoint(partial(loss, f)))(x, k),
    "scan": lambda f, x, k: lax.scan(lambda c, x: (c + f(x, k).sum(), f(x, k)), 0.0, x[None]),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize(
    "tuner",
    [
        pytest.param(First(), id="first form"),
        pytest.param(Last(), id="last form", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_equals_the_original_under(name, tuner, transformation):
    fn, *sizes = FUNCTIONS[name]
    transform = TRANSFORMATIONS[transformation]
    with jax.enable_x64(True):
        args = operands(*sizes)
        options = {"xla_backend_optimization_level": 0}
        both = lambda *args: (transform(fn, *args), transform(tuned(fn, tuner), *args))
        expected, found = jax.jit(both, compiler_options=options)(*args)
        close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
        jax.tree.map(close, found, expected)


def names(graph: Graph) -> list[tuple[str, bool]]:
    """Each op that has forms, wherever it stands, and whether it is tuned."""
    found = []
    for node in graph.nodes:
        found += [(node.name, node.tuner is not None)] * has_forms(node)
        for body in node.bodies:
            found += names(body)
    return found


def traced(fn, *args):
    leaves, tree = jax.tree.flatten(args)
    return graph_of(lambda *x: fn(*tree.unflatten(x)), *map(jax.typeof, leaves))[0]


def test_derivatives_of_every_order_are_tuned():
    def twice(x, kernel):
        grad = jax.grad(lambda k: (by_rules(depthwise)(x, k) ** 2).sum())
        return jax.grad(lambda k: (jax.vmap(grad)(k[None]) ** 2).sum())(kernel)

    found = names(traced(twice, *operands(1, 6)))
    assert len(found) >= 4
    assert all(is_tuned for _, is_tuned in found)
    pool = names(
        traced(jax.grad(lambda x: by_rules(pooled)(x, x[:, :1]).sum()), jnp.ones((1, 6, 6, 3)))
    )
    assert ("select_and_scatter_add", True) in pool


def test_untuned_is_the_original():
    args = operands(1, 6)
    assert names(traced(untuned(by_rules(depthwise)), *args)) == [("conv_general_dilated", False)]


def test_calls_loops_and_custom_rules_are_entered():
    @jax.custom_jvp
    def halved(x, k):
        return depthwise(x, k) / 2

    halved.defjvp(lambda p, t: (halved(*p), 3 * depthwise(*p)))

    @jax.custom_vjp
    def doubled(x, k):
        return 2 * depthwise(x, k)

    doubled.defvjp(lambda x, k: (doubled(x, k), (x, k)), lambda r, g: (5 * r[0], 7 * r[1]))

    def fn(x, k):
        y = halved(x, k).sum() + doubled(x, k).sum() + jax.jit(depthwise)(x, k).sum()
        y += lax.cond(y > 0, lambda: depthwise(x, k).sum(), lambda: 0.0)
        turn = lambda i, c: c + depthwise(x, k).sum()
        return lax.fori_loop(0, 2, turn, y) + lax.while_loop(lambda c: c < 0, lambda c: -c, y)

    args = tuple(a.astype(jnp.float32) for a in operands(1, 6))
    found = names(traced(by_rules(fn), *args))
    assert len(found) == 5
    assert all(is_tuned for _, is_tuned in found)
    for of in (lambda f: f, lambda f: jax.grad(f, (0, 1))):
        wanted = of(lambda x, k: fn_without_loops(halved, doubled, x, k))
        own = by_rules(lambda x, k: fn_without_loops(halved, doubled, x, k))
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            jax.jit(of(own))(*args),
            jax.jit(wanted)(*args),
        )


def fn_without_loops(halved, doubled, x, k):
    return halved(x, k).sum() + doubled(x, k).sum()


def test_explicit_meshes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    fn, params = jx.functional(
        jx.nn.ConvNet(
            input_shape=(12, 12, 1), widths=(4, 4), kernel_size=3, separable=True, rngs=nnx.Rngs(0)
        )
    )
    x = jax.random.normal(jax.random.key(0), (8, 12, 12, 1))
    step = lambda params, x: jax.value_and_grad(lambda p: (fn(p, x) ** 2).mean())(params)
    expected = jax.jit(step)(params, x)
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        found = jax.jit(step)(put(params, jax.P()), put(x, jax.P("data")))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)


def test_several_devices_get_no_gather():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = jnp.ones((8, 12, 12, 8)), jnp.ones((3, 3, 1, 8))

    def step(kernel, x):
        conv = partial(_tuned.conv_general_dilated, dimension_numbers=LAYOUT, feature_group_count=8)
        return jax.grad(lambda k: (_tuned.max_pool(conv(x, k, (1, 1), "SAME"), 2) ** 2).sum())(
            kernel
        )

    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    lowered = jax.jit(step).lower(put(kernel, jax.P()), put(x, jax.P("data")))
    text = lowered.compile().as_text() or ""
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


@pytest.mark.parametrize("case", tiers(ZOO))
def test_to_the_other_transforms_it_is_the_op(case):
    fn, params = case.build()
    plain, tuned_ = (graph_of_fn(f, params, case.images()) for f in (untuned(fn), by_rules(fn)))
    assert [n for n, _ in names(plain)] == [n for n, _ in names(tuned_)]
    assert all(not is_tuned for _, is_tuned in names(plain))
    ops = lambda graph: [op_of(node).key for node in graph.nodes if has_forms(node)]
    assert ops(plain) == ops(tuned_)
    groups = [jx.groups(f, params, case.images()) for f in (untuned(fn), by_rules(fn))]
    assert str(groups[0]).split("pinned")[0] == str(groups[1]).split("pinned")[0]


def graph_of_fn(fn, params, x):
    return traced(fn, params, x)


def test_the_source_of_an_op_is_the_line_that_called_it():
    graph = traced(by_rules(depthwise), *operands(1, 6))
    (node,) = (node for node in graph.nodes if has_forms(node))
    assert "test_tuned.py" in node.source
    assert "(depthwise)" in node.source


def test_called_outside_of_jit_it_compiles_once(caplog):
    x, kernel = operands(1, 6)
    with jax.log_compiles(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_rules(depthwise)(x, kernel)
        assert "Compiling" in caplog.text
        caplog.clear()
        by_rules(depthwise)(x, kernel)
        assert "Compiling" not in caplog.text


def test_without_jit():
    x, kernel = operands(1, 6)
    with jax.disable_jit():
        found = by_rules(depthwise)(x, kernel)
    np.testing.assert_allclose(found, depthwise(x, kernel), rtol=1e-4, atol=1e-5)


def test_settings_of_the_caller_do_not_reach_the_forms():
    x, kernel = (a.astype(jnp.bfloat16) for a in operands(1, 6))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert jax.jit(by_rules(depthwise))(x, kernel).dtype == jnp.bfloat16
    if hasattr(jnp, "float8_e4m3fn"):
        x, kernel = (a.astype(jnp.float8_e4m3fn) for a in (x, kernel))
        assert jax.jit(by_rules(depthwise))(x, kernel).dtype == jnp.float8_e4m3fn


def test_symbolic_sizes_are_left_to_xla():
    (many,) = jax.export.symbolic_shape("many")
    avals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 3), (3, many))]
    exported = jax.export.export(jax.jit(by_rules(jnp.dot)))(*avals)
    assert "stablehlo.dot_general" in exported.mlir_module()
    np.testing.assert_allclose(exported.call(jnp.ones((64, 3)), jnp.ones((3, 5))), 3.0)


@pytest.mark.parametrize("shapes", [((5, 0), (0, 3)), ((0, 3), (3, 4)), ((0, 3), (3, 0))])
def test_empty_products(shapes):
    a, b = map(jnp.ones, shapes)
    loss = lambda f: jax.value_and_grad(lambda a, b: f(a, b).sum(), (0, 1))
    found, wanted = loss(by_rules(jnp.dot))(a, b), loss(jnp.dot)(a, b)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("prevent_cse", [True, (True, False), (False, True), (False, False)])
def test_checkpoint_keeps_its_barriers(prevent_cse):
    def step(fn, x, kernel):
        inner = jax.checkpoint(lambda x, k: jnp.sin(fn(x, k)).sum(), prevent_cse=prevent_cse)
        return jax.grad(inner, 1)(x, kernel)

    def barred(fn):
        text = jax.jit(fn).lower(*operands(1, 6)).as_text()
        return [line.partition(" : ")[2] for line in text.splitlines() if "_barrier" in line]

    plain = barred(partial(step, depthwise))
    assert plain
    assert barred(by_rules(partial(step, depthwise))) == plain


def test_inside_of_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = operands(1, 6)

    def summed(x, k):
        grad = jax.grad(lambda k: (by_rules(depthwise)(x, k) ** 2).sum())
        return lax.psum(grad(lax.pcast(k, "data", to="varying")), "data")

    specs = {"in_specs": (jax.P("data"), jax.P()), "out_specs": jax.P()}
    found = jax.jit(jax.shard_map(summed, mesh=mesh, **specs))(x, kernel)
    expected = jax.grad(lambda k: (depthwise(x, k) ** 2).sum())(kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_max_pool_needs_a_window():
    with pytest.raises(ValueError, match=r"window: 0 is below 1; give the side of the square"):
        _tuned.max_pool(jnp.ones((1, 2, 2, 1)), 0)


def test_max_pool_keeps_nan_and_dtype():
    x = jnp.ones((1, 4, 4, 1), jnp.bfloat16).at[0, 0, 1, 0].set(jnp.nan).at[0, 3, 3, 0].set(2)
    out = _tuned.max_pool(x, 2)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(out, np.float32)[0, :, :, 0], [[np.nan, 1.0], [1.0, 2.0]]
    )


def test_wrong_shapes_are_refused_as_by_xla():
    x, kernel = jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 1, 4))
    options = {"dimension_numbers": LAYOUT, "feature_group_count": 3}
    with pytest.raises(ValueError, match="feature_group_count") as expected:
        lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)
    with pytest.raises(ValueError, match="feature_group_count") as met:
        _tuned.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)
    assert str(met.value) == str(expected.value)
