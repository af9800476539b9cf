"""Under a symbolic batch size, what was a slice in jax.numpy is one in the graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxaccel._graph import graph_of
from jaxaccel._slices import sliced
from tests.artefacts import identical, saved
from tests.models import normal

CUTS = {
    "x[:, 0]": lambda x: x[:, 0],
    "x[:, -1]": lambda x: x[:, -1],
    "x[:, ::2]": lambda x: x[:, ::2],
    "x[:, 1:3]": lambda x: x[:, 1:3],
    "x[:, 1:4:2, ::3]": lambda x: x[:, 1:4:2, ::3],
    "x[:, 2, 1:3]": lambda x: x[:, 2, 1:3],
    "x[..., 0]": lambda x: x[..., 0],
    "x[:, 1, 2]": lambda x: x[:, 1, 2],
    "x[:, jnp.arange(0, 4, 2)]": lambda x: x[:, jnp.arange(0, 4, 2)],
    "in a call": lambda x: jax.jit(lambda x: x[:, ::2])(x),
}
KEPT = {
    "x[:, ::-1]": lambda x: x[:, ::-1],
    "uneven": lambda x: x[:, jnp.array([0, 1, 3])],
    "of two axes": lambda x: x[:, jnp.array([[0, 1], [1, 2]])],
    "of two axes at once": lambda x: x[:, np.array([[0, 1], [1, 2]]), np.array([[0, 1], [0, 1]])],
    "backwards, unsigned": lambda x: lax.gather(
        x,
        np.array([[2], [0]], "uint8"),
        lax.GatherDimensionNumbers((0, 2), (1,), (1,)),
        (x.shape[0], 1, 6),
    ),
    "backwards": lambda x: x[:, jnp.array([3, 2, 1])],
    "of the batch": lambda x: x[jnp.array([0, 0])],
    "traced": lambda x: x[:, x[0, 0, 0].astype(int)],
}


@pytest.mark.parametrize("name", [*CUTS, *KEPT])
def test_slices_stay_slices(name, tmp_path):
    cut = CUTS.get(name) or KEPT[name]
    (n,) = jax.export.symbolic_shape("n")
    graph, _ = graph_of(cut, jax.ShapeDtypeStruct((n, 4, 6), "float32"))
    left = sliced(graph).graph
    nodes = [
        node.name for one in left.nodes for node in (one, *(n for b in one.bodies for n in b.nodes))
    ]
    if name in CUTS:
        assert "gather" not in nodes
    fn, params = saved(
        tmp_path / "cut", lambda p, x: cut(x) * p, jnp.float32(1), jnp.ones((4, 4, 6))
    )
    for size in (1, 3):
        x = jnp.abs(normal(size, size, 4, 6))
        identical(fn(params, x), cut(x))
