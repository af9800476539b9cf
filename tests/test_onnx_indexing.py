"""What is read and written by index: by two engines, against XLA, within the ends and beyond."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jaxaccel.export._onnx import model
from tests.models import normal
from tests.onnx_engines import ENGINES, same_by

W = normal(0, 6, 6)
SIZES = (4, 1, 7)
start = lambda n: np.int32(7 * n - 20)


def some(n, end, *shape):
    """Indices, of which some lie beyond the ends."""
    return np.random.default_rng(n).integers(-end, end, shape).astype(np.int32)


READ = {
    "rows": (lambda w, i: w[i], lambda n: (some(n, 9, n),)),
    "taken": (lambda w, i: jnp.take(w, i, axis=0), lambda n: (some(n, 9, n),)),
    "filled": (lambda w, i: jnp.take(w, i, axis=1, fill_value=3.0), lambda n: (some(n, 9, n, 2),)),
    "clipped": (lambda w, i: jnp.take(w, i, axis=1, mode="clip"), lambda n: (some(n, 9, n, 2),)),
    "wrapped": (lambda w, i: jnp.take(w, i, axis=1, mode="wrap"), lambda n: (some(n, 9, n, 2),)),
    "fixed": (
        lambda w, x: (x[:, jnp.array([2, 0])], x[:, -1], x[:, jnp.array([-1, -9])], x[0, 0],
                      x[jnp.array([0, 0])], x[:, jnp.array([[0, 1], [2, 3]])], w[1] + x[:1]),
        lambda n: (normal(n, n, 6),),
    ),
    "of each": (
        lambda w, x, i: (x[jnp.arange(x.shape[0]), i], x.T[i, jnp.arange(x.shape[0])]),
        lambda n: (normal(n, n, 6), some(n, 9, n)),
    ),
    "last of a sequence": (
        lambda w, x, k: jax.vmap(lambda s, k: s[k - 1])(x, k),
        lambda n: (normal(n, n, 5, 3), np.arange(n, dtype=np.int32) % 5 + 1),
    ),
    "mapped": (lambda w, i: jax.vmap(lambda k: w[k])(i), lambda n: (some(n, 9, n),)),
    "mapped windows": (
        lambda w, x, i: jax.vmap(lambda row, k: lax.dynamic_slice(row, (k, 1, 0), (2, 2, 5)))(x, i),
        lambda n: (normal(n, n, 4, 3, 5), some(n, 9, n)),
    ),
    "along an axis": (
        lambda w, x, i: (jnp.take_along_axis(x, i, 1), jnp.take_along_axis(x[:, :2], i, 2)),
        lambda n: (normal(n, n, 6, 4), some(n, 5, n, 2, 4)),
    ),
    "pairs": (lambda w, i, j: w[i, j], lambda n: (some(n, 9, n), some(n + 1, 9, n))),
    "pairs apart": (
        lambda w, x, i, j: x[:, i, :, j],
        lambda n: (normal(n, n, 3, 4, 5), some(n, 3, n), some(n + 1, 9, n)),
    ),
    "windows": (
        lambda w, i: (lax.dynamic_slice_in_dim(w, i[0], 4, 1), lax.dynamic_slice_in_dim(w, 5, 3, 1),
                      lax.dynamic_index_in_dim(w, i[0], 0),
                      lax.dynamic_slice(w, (i[0], i[-1]), (1, 3))),
        lambda n: (some(n, 9, n),),
    ),
    "of the batch": (lambda w, x: lax.dynamic_slice(x, (x[0, 0].astype(int), 5), (1, 3)),
                     lambda n: (9 * normal(n, n, 6),)),
    "booleans": (lambda w, x, i: (x > 0)[:, i[:1]], lambda n: (normal(n, n, 6), some(n, 9, n))),
    "small indices": (lambda w, i: w[i.astype(jnp.uint8)], lambda n: (abs(some(n, 9, n)),)),
    "tokens": (lambda w, t: w[t] @ w.T, lambda n: (abs(some(n, 6, n, 3)),)),
    "axis of one": (
        lambda w, x, i: x.reshape(-1, 1, 6)[:, i[:1]], lambda n: (normal(n, n, 6), some(n, 2, n))
    ),
}  # fmt: skip
WRITE = {
    "fixed": (
        lambda w, x: (x.at[:, 2].set(5.0), x.at[0].multiply(2.0), x.at[:, ::2].set(0),
                      x.at[:, jnp.array([1, 1, 9])].add(2.0), x.at[:, 1:].add(1.0)),
        lambda n: (normal(n, n, 6),),
    ),
    "rows": (
        lambda w, x, i: (w.at[i].add(x), w.at[i].subtract(x), w.at[i].multiply(x),
                         w.at[:, i].add(x.T), w.at[i].add(x, mode="clip")),
        lambda n: (normal(n, n, 6), some(n, 9, n)),
    ),
    "limits": (
        lambda w, x, i: (w.at[i].max(x), w.at[i].min(x)),
        lambda n: (normal(n, n, 6), some(n, 9, n)),
    ),
    "numbers": (
        lambda w, i: jnp.zeros(6).at[i].set(2.0, mode="drop"), lambda n: (some(n, 9, n),)
    ),
    "of each": (
        lambda w, x, i: (x.at[jnp.arange(x.shape[0]), i].set(2.0),
                         jnp.zeros((x.shape[0], 6)).at[jnp.arange(x.shape[0]), i].add(x[:, 0])),
        lambda n: (normal(n, n, 6), some(n, 9, n)),
    ),
    "mapped windows": (
        lambda w, x, i: jax.vmap(
            lambda row, k: lax.dynamic_update_slice(row, row[:2, :2], (k, k)))(x, i),
        lambda n: (normal(n, n, 6, 4), some(n, 9, n)),
    ),
    "windows": (
        lambda w, x, i: lax.dynamic_update_slice(x, x[:1, :3] * 0 + 7, (0, i[0])),
        lambda n: (normal(n, n, 8), some(n, 30, n)),
    ),
    "integers": (lambda w, x: (x.at[:, 1].set(3), x.at[:, x[0, :2]].add(1)),
                 lambda n: (some(n, 5, n, 6),)),
    "sums of segments": (
        lambda w, x, i: jax.ops.segment_sum(x, i, 5), lambda n: (normal(n, n, 6), some(n, 9, n))
    ),
    "pairs": (lambda w, x, i: w.at[i, i].add(x[:, 0]),
              lambda n: (normal(n, n, 6), some(n, 9, n))),
    "beyond": (lambda w, x: (jnp.zeros(6).at[jnp.arange(6) - 20].add(x[0, 0]),
                             x.at[:, jnp.array([7, -9])].set(1.0)), lambda n: (normal(n, n, 6),)),
    "in a loop": (
        lambda w, x: lax.fori_loop(0, 4, lambda k, c: c.at[:, k].add(c[:, k + 1])
                                   + lax.dynamic_index_in_dim(w, k, 0), x),
        lambda n: (normal(n, n, 6),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*itertools.product(["READ"], READ),
                                  *itertools.product(["WRITE"], WRITE)], ids=" ".join)  # fmt: skip
def test_at_three_batch_sizes(name):
    fn, arguments = {"READ": READ, "WRITE": WRITE}[name[0]][name[1]]
    batches = [arguments(n) for n in SIZES]
    opset = 18 if name[1] == "limits" else 17
    same_by(ENGINES, model(fn, W, batches[0], opset=opset), fn, W, batches)


@st.composite
def windows(draw):
    """An operand, indices and the numbers by which `lax.gather` and `lax.scatter` read them."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    kinds = [draw(st.sampled_from(["indexed", "indexed", "whole", "shared"])) for _ in shape]
    shared = {}
    for axis, kind in enumerate(kinds):
        free = [k for k in range(len(batch)) if k not in shared.values()]
        if kind == "shared" and free:
            shared[axis] = place = draw(st.sampled_from(free))
            shape[axis] = batch[place]
    indexed = [axis for axis, kind in enumerate(kinds) if kind == "indexed"]
    indexed = draw(st.permutations(indexed))
    window = [
        size if kinds[axis] == "whole" else 1 if axis in shared else draw(st.integers(1, size))
        for axis, size in enumerate(shape)
    ]
    gone = [
        axis for axis, size in enumerate(window)
        if axis not in shared and size == 1 and draw(st.booleans())
    ]  # fmt: skip
    rest = len(shape) - len(gone) - len(shared)
    places = sorted(draw(st.permutations(range(len(batch) + rest)))[:rest])
    indices = some(draw(st.integers(0, 99)), 6, *batch, len(indexed))
    return {
        "x": normal(1, *shape), "indices": indices, "window": window, "gone": gone,
        "indexed": indexed, "shared": shared, "places": places,
        "mode": draw(st.sampled_from(["clip", "fill", "promise_in_bounds"])),
    }  # fmt: skip


@given(windows(), st.booleans())
def test_any_windows(drawn, fixed):
    d, of_operand = drawn, tuple(drawn["shared"])
    of_indices = tuple(drawn["shared"].values())
    numbers = lax.GatherDimensionNumbers(
        tuple(d["places"]), tuple(d["gone"]), tuple(d["indexed"]), of_operand, of_indices
    )
    read = lambda w, x, i: lax.gather(
        x, d["indices"] if fixed else i, numbers, tuple(d["window"]), mode=d["mode"]
    )
    args = (d["x"], d["indices"])
    same_by(ENGINES, model(read, W, args, batch_axes=None), read, W, [args])
    written = lax.ScatterDimensionNumbers(
        tuple(d["places"]), tuple(d["gone"]), tuple(d["indexed"]), of_operand, of_indices
    )
    updates = normal(2, *jax.eval_shape(read, W, *args).shape)
    write = lambda w, x, i, updates: lax.scatter_add(
        x, d["indices"] if fixed else i, updates, written, mode=d["mode"]
    )
    args = (*args, updates)
    same_by(ENGINES, model(write, W, args, batch_axes=None), write, W, [args])
