"""A plan: which channels stay. It makes masks, shrinks trees and rewrites functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxaccel._recipe import with_step
from jaxaccel._table import table
from jaxaccel.prune import _saved
from jaxaccel.prune._module import smaller
from jaxaccel.prune._paths import Kept, Shapes, check, located, taken
from jaxaccel.prune._rewrite import call

if TYPE_CHECKING:
    from flax import nnx


class Change(NamedTuple):
    """A count before and after."""

    before: int
    after: int

    def __str__(self) -> str:
        times = f" ({self.before / self.after:.2f}x fewer)" if self.after else ""
        return f"{self.before:,} -> {self.after:,}{times}"


class Row(NamedTuple):
    """A group of the plan: `parameters` and `macs` would go if it alone were pruned."""

    kept: int
    channels: int
    parameters: int
    macs: int
    slices: str


@dataclass(frozen=True, eq=False)
class Plan:
    """Which indices of which axes of the parameters stay; `print` shows it by group.

    Attributes:
        shapes: of every parameter, before.
        kept: path -> axis -> the indices that stay, ascending; what is not named stays whole.
        unmasked: parameters that divide something: a mask leaves them alone.
        rows: one `Row` per group.
        parameters: elements of all parameters, running statistics among them, before and after.
        macs: multiply-accumulates of one call at the sizes of the example, before and after:
            those of convolutions and dots, and one per element-wise multiplication.
    """

    shapes: Shapes
    kept: Kept
    unmasked: tuple[str, ...]
    rows: tuple[Row, ...]
    parameters: Change
    macs: Change

    def __str__(self) -> str:
        cells = [(f"{r.kept}/{r.channels}", r.parameters, r.macs, r.slices) for r in self.rows]
        return (
            table(("kept", "parameters saved", "MACs saved", "slices"), cells)
            + f"\n\nparameters {self.parameters}\nMACs       {self.macs}"
        )

    def __repr__(self) -> str:
        cut = sum(row.kept < row.channels for row in self.rows)
        return f"<Plan: {cut} of {len(self.rows)} groups pruned, parameters {self.parameters}>"

    def masks(self, params: PyTree) -> PyTree[Bool[Array, "..."]]:
        """True where a weight stays: a tree for `jaxaccel.prune.apply` and `keep`.

        Args:
            params: the parameters before pruning, or one of their collections.

        Returns:
            A tree like `params`: boolean arrays for the leaves that are pruned, a scalar True for
            the others. ``fn(apply(params, masks), x)`` equals ``rewrite(fn)(shrink(params), x)``.

        Raises:
            ValueError: `params` are not those of the plan.
        """
        paths = self._located(params, "pass the parameters before pruning")
        return jax.tree.unflatten(jax.tree.structure(params), map(self._mask, paths))

    def _mask(self, path: str | None) -> Array:
        if path is None or path in self.unmasked or path not in self.kept:
            return jnp.array(True)
        mask = np.ones(self.shapes[path], bool)
        for axis, kept in self.kept[path].items():
            np.moveaxis(mask, axis, 0)[np.delete(np.arange(mask.shape[axis]), kept)] = False
        return jnp.asarray(mask)

    def shrink(self, tree: PyTree) -> PyTree:
        """The tree without the pruned channels.

        Args:
            tree: the parameters, one of their collections, or what holds trees shaped like them:
                gradients, optimizer state, averages. Scalars of other names stay.

        Raises:
            ValueError: the path of a leaf ends with that of no parameter, or its shape is another.
        """
        paths = self._located(tree, _ONCE)
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, map(self._cut, paths, leaves))

    def _located(self, tree: PyTree, hint: str) -> list[str | None]:
        """Of each leaf the parameter that it is, checked to have the shape before pruning."""
        paths = located(tree, self.shapes)
        for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True):
            if path is not None:
                check(path, leaf, self.shapes[path], hint)
        return paths

    def _cut(self, path: str | None, leaf: Any) -> Any:
        axes = {} if path is None else self.kept.get(path, {})
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = [len(axes.get(k, range(size))) for k, size in enumerate(leaf.shape)]
            return leaf.update(shape=tuple(shape))
        for axis, kept in axes.items():
            leaf = taken(leaf, kept, axis)
        return leaf

    def rewrite(self, fn: Callable, argnums: int | Sequence[int] = 0) -> Callable:
        """`fn` for the smaller parameters, whatever it computes from them.

        Args:
            fn: any JAX function of the parameters, not only the one that the plan was made with:
                its training mode, a loss, a whole step with gradients and optimizer. It is traced
                anew at each call, with the call's arguments: wrap the result in `jax.jit`. Keyword
                arguments are static.
            argnums: which arguments hold the parameters, or what is shaped like them.

        Returns:
            A function with the same arguments, where those at `argnums` are shrunk. What it returns
            of the pruned axes (gradients, updated statistics, features) comes without the pruned
            channels. Where `fn` has a training mode `fn.train`, as from `jaxaccel.functional`, so
            has the result.

        Raises:
            ValueError: when called: the parameters are not the shrunk ones, or in `fn` a removed
                channel would not be the same as one set to zero, as where it looks for the largest
                of all gradients or flattens all parameters into one vector: do such things outside.
        """
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

        @wraps(fn, updated=())
        def rewritten(*args: Any, **static: Any) -> Any:
            return call(partial(fn, **static), self.shapes, self.kept, numbers, args)

        steps = with_step(fn, "prune", plan=self.to_dict())
        setattr(rewritten, "recipe", steps)  # noqa: B010
        train = getattr(fn, "train", None)
        if train is not None:
            setattr(rewritten, "train", self.rewrite(train, argnums))  # noqa: B010
        return rewritten

    def module(self, model: "nnx.Module") -> "nnx.Module":
        """A smaller module, to train and call as the original.

        Args:
            model: an NNX module whose `jaxaccel.functional` parameters the plan was made for.
                It is copied, never changed.

        Returns:
            A module of a subclass of the model's class. Its parameters have the smaller shapes
            at the same paths; calling it, in training mode too, is the original's call
            rewritten, and so are its other public methods where an argument is an array. Private
            methods, and its submodules called alone, are for the original shapes. Every call
            traces the original anew: call it in `nnx.jit`. It cannot be pickled: keep the plan
            and the `nnx.state`.

        Raises:
            TypeError: `model` is no NNX module. When called: a method takes an `nnx.Optimizer`.
            ValueError: its parameters are not those of the plan.
        """
        return smaller(self, model)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all; `load` reads it."""
        _saved.write(Path(path), self._fields())

    def _fields(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__dataclass_fields__}

    @staticmethod
    def load(path: str | PathLike[str]) -> "Plan":
        """The plan that `save` wrote.

        Raises:
            ValueError: the file is no plan, of another version, or damaged.
        """
        return Plan._of(_saved.read(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes, as plain dicts, lists, strings and numbers."""
        return _saved.content(self._fields())

    @staticmethod
    def from_dict(content: Any, where: str = "plan") -> "Plan":
        """The plan that `to_dict` gave; errors are as of `load`, and say `where` it stood."""
        return Plan._of(_saved.checked(content, where))

    @staticmethod
    def _of(fields: dict[str, Any]) -> "Plan":
        return Plan(
            fields["shapes"],
            fields["kept"],
            fields["unmasked"],
            tuple(Row(*row) for row in fields["rows"]),
            Change(*fields["parameters"]),
            Change(*fields["macs"]),
        )


_ONCE = (
    "shrink a tree once, before it has the smaller shapes; a state of other shapes is made anew: "
    "optimizer.init(plan.shrink(params))"
)
