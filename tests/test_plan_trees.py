"""What a plan does to trees, functions, modules and files, and what it refuses."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxaccel as jx
from tests import shrinking
from tests.models import LINEN, ZOO, normal


def test_shrink_takes_whatever_is_shaped_like_the_parameters(made):
    _, params, plan = made
    small = plan.shrink(params)
    trained = params["params"]
    state = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(trained)
    both = plan.shrink({"ema": params, "state": state, "step": 3, "key": jax.random.key(0)})
    shrinking.close(both["ema"], small, 0)
    assert both["step"] == 3
    again = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(small["params"])
    assert jax.tree.map(jnp.shape, both["state"]) == jax.tree.map(jnp.shape, again)
    shrinking.close(plan.shrink(params["batch_stats"]), small["batch_stats"], 0)
    abstract = plan.shrink(jax.eval_shape(lambda: params))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    jitted = jax.jit(plan.shrink)(params)
    shrinking.close(jitted, small, 0)


def test_shrink_of_a_flat_dict_with_a_count_beside_it():
    params = {"count": jnp.ones((3, 4)), "w1": jnp.ones((4, 2))}
    fn = lambda p, x: jnp.tanh(x @ p["count"]) @ p["w1"]
    plan = jx.prune.plan(fn, params, jnp.ones((5, 3)), ratio=0.5)
    state = plan.shrink(optax.adam(1e-3).init(params))
    assert jax.tree.map(jnp.shape, state[0].mu) == {"count": (3, 2), "w1": (2, 2)}
    assert state[0].count.shape == ()


def test_masks_are_a_tree_like_the_parameters(made):
    fn, params, plan = made
    masks = plan.masks(params)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert masks["params"]["dense1"]["bias"].shape == ()
    assert jx.prune.sparsity(masks)["params/conv1/kernel"] == 0.5
    shrinking.close(plan.masks(params["params"]), masks["params"], 0)
    x = LINEN.images()
    zeroed = fn(jx.prune.apply(params, masks), x)
    shrinking.close(plan.rewrite(fn)(plan.shrink(params), x), zeroed, 2e-6)


def test_a_divisor_is_not_masked():
    fn = lambda p, x: jnp.tanh(x @ p["w"] / p["s"][None]) @ p["u"]
    params = {"s": jnp.arange(1.0, 5), "u": jnp.ones((4, 2)), "w": jnp.ones((3, 4))}
    plan = jx.prune.plan(fn, params, jnp.ones((5, 3)), ratio=0.5)
    assert plan.unmasked == ("s",)
    assert plan.masks(params)["s"].shape == ()
    assert plan.shrink(params)["s"].shape == (2,)


FOREIGN = {
    "params/conv1/kernel: shape": lambda p: p["params"]["conv1"].update(kernel=jnp.ones((3, 3))),
    "params/extra: not a parameter of the plan": lambda p: p["params"].update(extra=jnp.ones(3)),
}


@pytest.mark.parametrize("message", FOREIGN)
@pytest.mark.parametrize("use", ["masks", "shrink", "rewrite"])
def test_trees_of_other_parameters(made, message, use):
    fn, params, plan = made
    other = jax.tree.map(lambda leaf: leaf, plan.shrink(params) if use == "rewrite" else params)
    FOREIGN[message](other)
    with pytest.raises(ValueError, match=message):
        plan.rewrite(fn)(other, LINEN.images()) if use == "rewrite" else getattr(plan, use)(other)


def test_a_plan_on_another_model(made):
    _, _, plan = made
    fn, params = ZOO[0].build()
    with pytest.raises(ValueError, match=r"hidden/bias: not a parameter of the plan.*batch_stats"):
        plan.shrink(params)
    with pytest.raises(ValueError, match="hidden/bias: not a parameter of the plan"):
        plan.rewrite(fn)(params, ZOO[0].images())
    with pytest.raises(ValueError, match="hidden/bias: not a parameter"):
        plan.masks(params)


def test_shrinking_twice_and_not_at_all(made):
    fn, params, plan = made
    with pytest.raises(ValueError, match=r"norm1/mean: shape \(2,\), expected \(4,\).*once"):
        plan.shrink(plan.shrink(params))
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(2,\); pass plan.shrink"):
        plan.rewrite(fn)(params, LINEN.images())
    with pytest.raises(ValueError, match=r"argnums=\(3,\) for a call with 2 positional"):
        plan.rewrite(fn, argnums=3)(plan.shrink(params), LINEN.images())


def test_parts_of_a_tree_are_told_apart_by_all_of_their_paths():
    """One name at several depths; lists of lists; trees beside each other."""
    params = {
        "w": normal(0, 6, 6),
        "block": {"w": normal(1, 6, 6)},
        "u": normal(2, 6, 6),
        "v": normal(3, 6, 2),
    }

    def fn(p, x):
        for kernel in (p["w"], p["block"]["w"], p["u"]):
            x = jnp.tanh(x @ kernel)
        return x @ p["v"]

    plan = jx.prune.plan(fn, params, jnp.ones((5, 6)), ratio=0.5)
    small = plan.shrink(params)
    for shape in ({"block": 0}, [0, 0], {"w": {"u": 0}, "u": [0]}):
        of = lambda tree, shape=shape: jax.tree.map(lambda _: tree, shape)
        shrinking.close(plan.shrink(of(params)), of(small), 0)
    with pytest.raises(ValueError, match="w: could be block/w or w; pass the tree from its root"):
        plan.shrink(params["block"])
    masked = optax.masked(
        optax.sgd(0.1, momentum=0.9), {"w": True, "block": True, "u": False, "v": True}
    )
    state = plan.shrink(masked.init(params))
    shrinking.close(state, masked.init(small), 0)


def test_lists_of_parameters():
    params = [normal(0, 6, 6), [normal(1, 6, 6), normal(2, 6, 2)]]
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1][0]) @ p[1][1]
    plan = jx.prune.plan(fn, params, jnp.ones((5, 6)), ratio=0.5)
    both = plan.shrink((params, params))
    shrinking.close(both, (plan.shrink(params), plan.shrink(params)), 0)
    x = jnp.ones((5, 6))
    zeroed = fn(jx.prune.apply(params, plan.masks(params)), x)
    shrinking.close(plan.rewrite(fn)(plan.shrink(params), x), zeroed, 1e-6)


def test_collections_of_the_same_paths_are_told_apart_by_name_alone():
    layer = {"norm": {"w": normal(0, 3, 4)}, "out": {"w": normal(1, 4, 2)}}
    params = {"params": layer, "ema": layer}
    fn = lambda p, x: jnp.tanh(x @ p["params"]["norm"]["w"]) @ p["params"]["out"]["w"]
    plan = jx.prune.plan(fn, params, jnp.ones((5, 3)), ratio=0.5)
    assert plan.shrink(params)["params"]["norm"]["w"].shape == (3, 2)
    with pytest.raises(ValueError, match="norm/w: could be ema/norm/w or params/norm/w; pass"):
        plan.shrink(params["params"])


def test_states_without_parameters_and_of_other_shapes(made):
    _, params, plan = made
    assert plan.shrink(optax.sgd(0.1).init(params["params"])) == optax.sgd(0.1).init(params)
    with pytest.raises(ValueError, match=r"shape .* expected .*optimizer.init\(plan.shrink"):
        plan.shrink(optax.adafactor(1e-3, min_dim_size_to_factor=2).init(params["params"]))


def test_a_function_that_cannot_do_without_a_channel():
    params = {"w": jnp.ones((3, 4)), "u": jnp.ones((4, 2)), "v": jnp.ones((4, 2))}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"] + x[:, :1] @ p["v"][:1]
    plan = jx.prune.plan(fn, params, jnp.ones((5, 3)), ratio=0.5)
    small, x = plan.shrink(params), jnp.ones((5, 3))
    with pytest.raises(ValueError, match=r"w axis 1: in this function index 0 .*sorted along it"):
        plan.rewrite(lambda p, x: jnp.sort(x @ p["w"]))(small, x)
    with pytest.raises(ValueError, match="v axis 0: this function couples it with channels that"):
        plan.rewrite(lambda p, x: (x @ p["w"]) @ (p["u"] + p["v"]))(small, x)
    features = plan.rewrite(lambda p, x: x @ p["w"])(small, x)
    assert features.shape == (5, 2)


def test_gradients_of_what_is_not_read_are_cut_too(made):
    """In training the running statistics are not read: their gradient is zeros of no parameter."""
    fn, params, plan = made

    def gradients(params, x):
        return jax.grad(lambda p: fn.train(p, jax.random.key(0), x)[0].sum())(params)

    small = plan.shrink(params)
    found = jax.jit(plan.rewrite(gradients))(small, LINEN.images())
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, small)
    assert not found["batch_stats"]["norm1"]["mean"].any()


def test_a_table_read_up_to_the_length_of_the_example():
    params = {"rows": normal(0, 64, 8), "w": normal(1, 8, 16), "u": normal(2, 16, 3)}

    def fn(p, x):
        return (jax.nn.relu((x + p["rows"][: x.shape[1]]) @ p["w"]) @ p["u"]).mean(1)

    plan = jx.prune.plan(fn, params, normal(3, 2, 5, 8), ratio=0.5)
    assert "rows" not in plan.kept
    longer, masked = normal(4, 2, 40, 8), jx.prune.apply(params, plan.masks(params))
    shrinking.close(plan.rewrite(fn)(plan.shrink(params), longer), fn(masked, longer), 2e-6)
    found = jx.groups(fn, params, normal(3, 2, 5, 8))
    assert "59 indices: fn does not read it" in found.why("rows")


def test_gradients_of_what_is_read_in_part():
    params = {"w": normal(0, 3, 8), "u": normal(1, 8, 2)}
    fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["u"]
    plan = jx.prune.plan(fn, params, jnp.ones((5, 3)), ratio=0.5)
    half = jax.grad(lambda p, x: (jnp.tanh(x @ p["w"])[:, :4] @ p["u"][:4]).sum())
    found = plan.rewrite(half)(plan.shrink(params), jnp.ones((5, 3)))
    masked = jx.prune.apply(params, plan.masks(params))
    shrinking.close(found, plan.shrink(half(masked, jnp.ones((5, 3)))), 1e-6)


def test_what_is_read_in_training_alone():
    params = {"w": normal(0, 3, 8), "u": normal(1, 8, 2), "aux": normal(2, 8, 2)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"]
    train = lambda p, x: (fn(p, x), jnp.tanh(x @ p["w"]) @ p["aux"])
    x = jnp.ones((5, 3))
    plan = jx.prune.plan(fn, params, x, ratio=0.5)
    with pytest.raises(ValueError, match=r"aux axis 0: .* a function that computes both"):
        plan.rewrite(train)(plan.shrink(params), x)
    both = jx.prune.plan(lambda p, x: (fn(p, x), train(p, x)), params, x, ratio=0.5)
    masked = jx.prune.apply(params, both.masks(params))
    shrinking.close(both.rewrite(train)(both.shrink(params), x), train(masked, x), 1e-6)


def test_sharded_parameters():
    params = {"w": normal(0, 3, 16), "u": normal(1, 16, 2)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"]
    plan = jx.prune.plan(fn, params, jnp.ones((8, 3)), ratio=0.5)
    small = plan.shrink(params)
    assert not small["w"].committed
    zeroed = fn(jx.prune.apply(params, plan.masks(params)), jnp.ones((8, 3)))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("x",), (kind,))
        split = lambda *axes, mesh=mesh: NamedSharding(mesh, PartitionSpec(*axes))
        images = jax.device_put(jnp.ones((8, 3)), split("x"))
        shrinking.close(jax.jit(plan.rewrite(fn))(small, images), zeroed, 1e-6)
        wide = {"w": jax.device_put(params["w"], split(None, "x")), "u": params["u"]}
        found = plan.shrink(wide)["w"]
        assert found.sharding.spec == PartitionSpec(None, "x")
        shrinking.close(found, small["w"], 0)
        shrinking.close(jax.jit(plan.shrink)(wide), small, 0)
        odd = jx.prune.plan(fn, params, jnp.ones((8, 3)), ratio=0.3)
        assert odd.shrink(wide)["w"].sharding.spec == PartitionSpec(None, None)


@pytest.mark.parametrize("empty", [(0,), (3, 0)])
def test_parameters_without_elements(empty):
    params = {"w": normal(0, 3, 8), "u": normal(1, 8, 2), "none": jnp.ones(empty)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"] + p["none"].sum()
    plan = jx.prune.plan(fn, params, jnp.ones((5, 3)), ratio=0.5)
    masked = jx.prune.apply(params, plan.masks(params))
    x = jnp.ones((5, 3))
    shrinking.close(plan.rewrite(fn)(plan.shrink(params), x), fn(masked, x), 1e-6)


def test_parameters_that_are_one_array():
    kernel, x = normal(0, 8, 8), jnp.ones((5, 8))
    fn = lambda w, x: (jnp.tanh(x[:, :1] * w[0]) * jnp.tanh(w[1])).sum(1)
    plan = jx.prune.plan(fn, kernel, x, ratio=0.5)
    assert plan.shrink(optax.adam(0.1).init(kernel))[0].mu.shape == plan.shrink(kernel).shape
    masked = jx.prune.apply(kernel, plan.masks(kernel))
    shrinking.close(plan.rewrite(fn)(plan.shrink(kernel), x), fn(masked, x), 1e-6)


def test_two_leaves_of_one_path_are_refused():
    params = {"a": {"b/c": jnp.ones(3)}, "a/b": {"c": jnp.ones(3)}}
    with pytest.raises(ValueError, match="a/b/c: the path of two leaves; rename"):
        jx.groups(lambda p, x: x, params, jnp.ones(3))


def test_rewritten_functions_keep_their_names_and_static_arguments(made):
    fn, params, plan = made

    def scores(params, x, *, scale=1):
        """Doubled."""
        return fn(params, x) * scale

    small, masked = plan.rewrite(scores), jx.prune.apply(params, plan.masks(params))
    assert (small.__name__, small.__doc__) == ("scores", "Doubled.")
    many = LINEN.images()[:1].repeat(7, 0)
    found = small(plan.shrink(params), many, scale=2)
    shrinking.close(found, fn(masked, many) * 2, 2e-6)


@jax.tree_util.register_dataclass
@dataclass
class Net:
    hidden: jax.Array
    value: jax.Array  # as the value of a Flax NNX variable is called


def test_parameters_of_other_containers():
    layers = [nnx.Linear(*sizes, rngs=nnx.Rngs(0)) for sizes in ((3, 8), (8, 2))]
    graph, state = nnx.split(nnx.Sequential(layers[0], jnp.tanh, layers[1]))
    nets: Any = (
        (lambda p, x: jnp.tanh(x @ p.hidden) @ p.value, Net(normal(0, 3, 8), normal(1, 8, 2))),
        (lambda state, x: nnx.merge(graph, state)(x), state),
    )
    x = normal(2, 5, 3)
    for fn, params in nets:
        plan = jx.prune.plan(fn, params, x, ratio=0.5)
        small, adam = plan.shrink(params), optax.adam(0.1)
        shrinking.close(plan.shrink(adam.init(params)), adam.init(small), 0)
        masked = jx.prune.apply(params, plan.masks(params))
        shrinking.close(plan.rewrite(fn)(small, x), fn(masked, x), 2e-6)
