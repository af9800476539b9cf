"""The parameters of an artefact: one row for each, or for each kind where there are many."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from jaxaccel._table import table
from jaxaccel.export._manifest import Aval, Manifest, size_of
from jaxaccel.export._tree import Description

MOST = 40  # rows of a table that is still read


@dataclass(frozen=True)
class Leaf:
    """An array; or all those whose paths differ in numbers alone, with stars in their place."""

    path: str
    dtype: str
    shape: str
    numbers: int
    bytes: int
    arrays: int = 1


def leaves(manifest: Manifest) -> tuple[Leaf, ...]:
    """In the order of the artefact; packed numbers as what they stand for."""
    packed = dict(_packed(manifest.params))
    return tuple(_leaf(path, aval, packed.get(path)) for path, aval in manifest.arrays.items())


def _leaf(path: str, aval: Aval, packed: Sequence[int] | None) -> Leaf:
    dtype, shape, stored = aval.dtype, aval.shape, size_of(aval)
    if packed is not None and 0 <= prod(packed) <= 2 * stored:  # else the file tells nonsense
        dtype, shape = "int4", tuple(packed)
    written = "x".join(map(str, shape)) or "scalar"
    return Leaf(path, dtype, written, prod(map(int, shape)), stored)


def _packed(root: Description) -> Iterator[tuple[str, Sequence[int]]]:
    """The arrays of which each byte holds two numbers, with the shapes that they stand for."""
    nodes = [root]
    while nodes:
        match nodes.pop():
            case {"qtensor": {"values": str(path), "packing": {"shape": shape}}}:
                yield path, shape
            case {"dict": pairs}:
                nodes += [child for _, child in pairs]
            case {"list": found} | {"tuple": found}:
                nodes += found


def dtypes(found: Iterable[Leaf]) -> dict[str, tuple[int, int]]:
    """Numbers and bytes of each, the most bytes first."""
    sums: dict[str, tuple[int, int]] = {}
    for leaf in found:
        numbers, size = sums.get(leaf.dtype, (0, 0))
        sums[leaf.dtype] = numbers + leaf.numbers, size + leaf.bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def parameters_table(found: Sequence[Leaf], every: bool) -> str:
    """For a terminal; no more than `MOST` rows but where `every` one is wanted."""
    whole = sum(leaf.bytes for leaf in found) or 1
    if every or len(found) <= MOST:
        rows = [(one.path, one.dtype, one.shape, *_sizes(one, whole)) for one in found]
        return table(("path", "dtype", "shape", "numbers", "bytes", "share"), rows)
    shown = shortened(alike(found))
    rows = [(one.arrays, one.path, one.dtype, one.shape, *_sizes(one, whole)) for one in shown]
    columns = ("arrays", "path", "dtype", "shape", "numbers", "bytes", "share")
    return table(columns, rows) + f"\n{len(found):,} arrays; --all prints each"


def _sizes(leaf: Leaf, whole: int) -> tuple[int, int, str]:
    return leaf.numbers, leaf.bytes, f"{leaf.bytes / whole:.1%}"


def alike(found: Sequence[Leaf]) -> list[Leaf]:
    """Those of a dtype whose paths differ in numbers alone, as one."""
    groups: dict[tuple[str, str], list[Leaf]] = {}
    for leaf in found:
        groups.setdefault((re.sub(r"\d+", "*", leaf.path), leaf.dtype), []).append(leaf)
    return [
        of[0] if len(of) == 1 else _sum(path, dtype, of) for (path, dtype), of in groups.items()
    ]


def shortened(found: Sequence[Leaf]) -> list[Leaf]:
    """The largest, in their order, and all others as one."""
    if len(found) <= MOST:
        return list(found)
    kept = {id(leaf) for leaf in sorted(found, key=lambda one: -one.bytes)[: MOST - 1]}
    others = [leaf for leaf in found if id(leaf) not in kept]
    return [*(leaf for leaf in found if id(leaf) in kept), _sum("others", "", others)]


def _sum(path: str, dtype: str, of: Sequence[Leaf]) -> Leaf:
    shapes = {leaf.shape for leaf in of}
    dtypes = {leaf.dtype for leaf in of}
    return Leaf(
        path,
        dtype or (dtypes.pop() if len(dtypes) == 1 else "several"),
        shapes.pop() if len(shapes) == 1 else "several",
        sum(leaf.numbers for leaf in of),
        sum(leaf.bytes for leaf in of),
        sum(leaf.arrays for leaf in of),
    )
