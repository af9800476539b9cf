"""The recipe of an artefact in words. It comes from a file: no part of it need be as expected."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxaccel._commands._layout import counted

_LISTED, _LONGEST = 3, 200
_RANGES = {
    "static": "ranges from calibration",
    "dynamic": "ranges taken from each batch",
    "float": "kernels alone, arithmetic in floating point",
}


@dataclass(frozen=True)
class Step:
    """A transform, what it did in words, and the numbers that the words tell."""

    transform: str
    words: str
    numbers: dict[str, Any] = field(default_factory=dict)


def steps(recipe: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """In their order."""
    return tuple(map(_step, recipe))


def _step(raw: Mapping[str, Any]) -> Step:
    name = str(raw.get("transform", "unnamed"))
    try:
        found = _KNOWN.get(name, _other)(raw)
    except (ValueError, ArithmeticError):  # numbers beyond all measure
        found = None
    return Step(name, *(("details not understood", {}) if found is None else found))


Told = tuple[str, dict[str, Any]] | None


def _prune(raw: Mapping[str, Any]) -> Told:
    match raw:
        case {"plan": {"parameters": [int(), int()] as parameters, "macs": [int(), int()] as macs,
                       "rows": list(rows)}}:  # fmt: skip
            groups = [row[:2] for row in rows if _is_group(row)]
        case _:
            return None
    kept, whole = (sum(group[k] for group in groups) for k in (0, 1))
    cut = sum(kept < channels for kept, channels in groups)
    words = (
        f"{kept:,} of {counted(whole, 'channel')} kept ({_share(kept, whole)}), in {cut} of "
        f"{counted(len(groups), 'group')}; parameters {_change(parameters)}; "
        f"multiply-accumulates of the example {_change(macs)}"
    )
    numbers = {"channels": [whole, kept], "parameters": parameters, "macs": macs}
    return words, numbers


def _is_group(row: Any) -> bool:
    return isinstance(row, list) and len(row) > 1 and all(type(n) is int for n in row[:2])


def _change(pair: Sequence[int]) -> str:
    before, after = pair
    return f"{before:,} -> {after:,} ({_share(after, before)} left)"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "all"


def _fold(raw: Mapping[str, Any]) -> Told:
    match raw:
        case {"folded": list(folded), "merged": list(merged)}:
            numbers = {"folded": len(folded), "merged": len(merged)}
            chains = counted(len(folded), "chain")
            return (
                f"{chains} (batch norm and the like) folded into kernels, {len(merged)} merged",
                numbers,
            )
    return None


def _int8(raw: Mapping[str, Any]) -> Told:
    match raw:
        case {"layers": list(layers), "left": list(left)}:
            activations = str(raw.get("activations"))
        case _:
            return None
    words = (
        f"{counted(len(layers), 'layer')} on integers, {len(left)} left in floating point"
        f"{''.join(_left(left))}; activations {activations}: {_RANGES.get(activations, 'unknown')}"
    )
    return words, {"layers": len(layers), "left": len(left), "activations": activations}


def _left(left: Sequence[Any]) -> Iterator[str]:
    listed = [f"{one['where']}: {one['reason']}"[:_LONGEST] for one in left
              if isinstance(one, dict) and {"where", "reason"} <= one.keys()]  # fmt: skip
    if listed:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        yield f" ({'; '.join(listed[:_LISTED])}{more})"


def _fake(_: Mapping[str, Any]) -> Told:
    return "rounds to 8 bits in training, and computes in floating point", {}


def _autotune(_: Mapping[str, Any]) -> Told:
    return "operations in the form that the rules choose for each platform", {}


def _other(raw: Mapping[str, Any]) -> Told:
    """A transform that is not known here: its settings that are short."""
    plain = {
        key: value
        for key, value in raw.items()
        if key != "transform" and isinstance(value, str | int | float | bool)
    }
    return ", ".join(f"{key} {str(value)[:_LONGEST]}" for key, value in plain.items()), plain


_KNOWN: dict[str, Callable[[Mapping[str, Any]], Told]] = {
    "prune": _prune,
    "fold.batchnorm": _fold,
    "quantize.int8": _int8,
    "quantize.fake": _fake,
    "autotune": _autotune,
}


def forms(rows: Sequence[Any]) -> dict[str, int]:
    """How many operations have each form, on one platform."""
    found: Counter[str] = Counter()
    for row in rows:
        match row:
            case {"form": str(form), "count": int(count)} if 0 <= count < 1 << 53:
                found[form] += count
    return dict(found.most_common())
