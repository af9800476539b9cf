"""Trees that hold the parameters of a plan, or what is shaped like them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import PyTree

from jaxaccel._graph import leaves_with_keys

# Which indices of which axes stay: path -> axis -> ascending indices.
Kept: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def located(tree: PyTree, shapes: Shapes) -> list[str | None]:
    """Of each leaf the parameter that it is, or is shaped like; None for other scalars.

    A part of the tree with the paths of all parameters, or of all in a collection like "params",
    is taken for these. A leaf elsewhere is what the end of its path names; of several, what most
    leaves have in common decides.

    Raises:
        ValueError: a leaf is neither, or could be one of several.
    """
    leaves = [(tuple(keys), leaf) for keys, leaf in leaves_with_keys(tree)]
    names = Names(shapes)
    found = _parts([keys for keys, _ in leaves], names.wholes)
    others = {k: names.meant(leaves[k][0]) for k in range(len(leaves)) if k not in found}
    votes = Counter(before for meant in others.values() for before in meant)
    for k, meant in others.items():
        most = max(map(votes.__getitem__, meant), default=0)
        best = {name for before, name in meant.items() if votes[before] == most}
        if len(best) == 1:
            found[k] = best.pop()
        elif jnp.shape(leaves[k][1]):
            raise ValueError(f"{'/'.join(leaves[k][0])}: {_unclear(sorted(best), shapes)}")
    scalar = lambda k, name: not jnp.shape(leaves[k][1]) and shapes[name]  # a count or a key
    return [None if k not in found or scalar(k, found[k]) else found[k] for k in range(len(leaves))]


def _unclear(names: Sequence[str], shapes: Shapes) -> str:
    if names:
        return f"could be {' or '.join(names)}; pass the tree from its root, all collections named"
    return (
        f"not a parameter of the plan ({few(shapes)}); was it made for another model? A state that "
        "is not shaped like the parameters is made anew: optimizer.init(plan.shrink(params))"
    )


Keys: TypeAlias = tuple[str, ...]


def _split(path: str) -> Keys:
    return tuple(filter(None, path.split("/")))


class Names:
    """What the paths of a tree may mean among the names of parameters.

    Attributes:
        wholes: all parameters, and those of each collection, by the keys below.
    """

    def __init__(self, names: Iterable[str]) -> None:
        split = {_split(name): name for name in names}
        tops = {keys[0] for keys in split if len(keys) > 1}
        collections = sorted(tops) if "params" in tops else []
        self.wholes = [split] + [
            {keys[1:]: name for keys, name in split.items() if keys[0] == top}
            for top in collections
        ]
        self._longer: dict[Keys, dict[Any, str]] = defaultdict(dict)
        for keys, name in split.items():
            for cut in range(2 if collections else 1, len(keys)):  # a collection alone is no more
                self._longer[keys[cut:]]["below", keys[:cut]] = name

    def meant(self, keys: Keys) -> dict[Any, str]:
        """The parameters, each by what the path has more or less before the common end."""
        ends = {
            (number, keys[:cut]): names[keys[cut:]]
            for number, names in enumerate(self.wholes)
            for cut in range(len(keys) + 1)
            if keys[cut:] in names
        }
        return ends | self._longer.get(keys, {})

    def only(self, path: str) -> str | None:
        """The one parameter that the path means, if it is one."""
        meant = set(self.meant(_split(path)).values())
        return meant.pop() if len(meant) == 1 else None


def _parts(leaves: Sequence[Keys], wholes: Sequence[dict[Keys, str]]) -> dict[int, str]:
    """The leaves of parts of a tree that have exactly the paths of one of `wholes`."""
    below: dict[Keys, dict[Keys, int]] = {}
    for k, keys in enumerate(leaves):
        for cut in range(len(keys) + 1):
            below.setdefault(keys[:cut], {})[keys[cut:]] = k
    found: dict[int, str] = {}
    for _, part in sorted(below.items(), key=lambda item: len(item[0])):
        same = [names for names in wholes if names.keys() == part.keys()]
        if len(same) == 1 and found.keys().isdisjoint(part.values()):
            found |= {k: same[0][keys] for keys, k in part.items()}
    return found


def check(path: str, leaf: Any, shape: tuple[int, ...], hint: str) -> None:
    """Raises ValueError unless the leaf has this shape."""
    if jnp.shape(leaf) != shape:
        raise ValueError(f"{path}: shape {jnp.shape(leaf)}, expected {shape}; {hint}")


def taken(leaf: Any, kept: np.ndarray, axis: int) -> Any:
    """What stays; on the host where possible, since the device compiles every new shape."""
    if isinstance(leaf, np.ndarray):
        return leaf.take(kept, axis)
    traced = isinstance(leaf, Tracer)
    if not traced and isinstance(leaf.sharding, SingleDeviceSharding):
        small = np.asarray(leaf).take(kept, axis)
        return jax.device_put(small, leaf.sharding) if leaf.committed else jnp.asarray(small)
    out = _sharding(jax.typeof(leaf).sharding if traced else leaf.sharding, leaf, len(kept), axis)
    explicit = out is not None and AxisType.Explicit in out.mesh.axis_types
    where = (*(slice(None),) * axis, kept)
    options = {"unique_indices": True, "indices_are_sorted": True}
    small = leaf.at[where].get(**options, out_sharding=out if explicit else None)
    return small if traced or explicit or out is None else jax.device_put(small, out)


def _sharding(sharding: Any, leaf: Any, size: int, axis: int) -> NamedSharding | None:
    """That of the leaf, where its mesh divides what stays; else whole along the axis."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    names = spec[axis] if isinstance(spec[axis], tuple) else filter(None, (spec[axis],))
    if size % prod(sharding.mesh.shape[name] for name in names):
        spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def small_shape(path: str, shapes: Shapes, kept: Kept) -> tuple[int, ...]:
    """The shape of a parameter without what the plan removes."""
    axes = kept.get(path, {})
    return tuple(len(axes.get(k, range(size))) for k, size in enumerate(shapes[path]))


def few(paths: Iterable[str], shown: int = 3) -> str:
    """The first of them, and how many more."""
    names = list(paths)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if names[shown:] else "")
