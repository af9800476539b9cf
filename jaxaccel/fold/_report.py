"""What was folded, and what was not and why."""

from typing import Any, NamedTuple

from jaxaccel._table import table


class Folded(NamedTuple):
    """A chain that went into a kernel and, where it adds something, into a bias."""

    kernel: str
    leaves: tuple[str, ...]  # the other parameters that went in
    bias: str | None


class Merged(NamedTuple):
    """A chain without a kernel that became one multiplication and one addition."""

    scale: str | None
    bias: str | None
    leaves: tuple[str, ...]


class Refused(NamedTuple):
    """A chain that stays as it was."""

    where: str  # the kernel's path, or the primitive
    source: str  # the line that made it
    reason: str


class Report(NamedTuple):
    """What `batchnorm` did; printed, a table with one row per chain."""

    folded: tuple[Folded, ...] = ()
    merged: tuple[Merged, ...] = ()
    refused: tuple[Refused, ...] = ()

    def __str__(self) -> str:
        """A table, and the numbers below it."""
        rows = [("folded", f.kernel, _into(f.leaves, f.bias)) for f in self.folded]
        rows += [
            ("merged", m.scale or m.bias or "", _into(m.leaves, m.bias if m.scale else None))
            for m in self.merged
        ]
        rows += [("refused", r.where, f"{r.reason} ({r.source})") for r in self.refused]
        sums = f"{len(self.folded)} folded, {len(self.merged)} merged, {len(self.refused)} refused"
        return f"{table(('', 'into', 'what'), rows)}\n{sums}" if rows else sums

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was folded and merged, by paths."""
        chosen = {"folded": self.folded, "merged": self.merged}
        return {name: [one._asdict() for one in chains] for name, chains in chosen.items()}


def _into(leaves: tuple[str, ...], bias: str | None) -> str:
    """The paths, those below one parent together: "norm/{mean, var} -> conv/bias"."""
    names: dict[str, list[str]] = {}
    for path in leaves:
        parent, slash, name = path.rpartition("/")
        names.setdefault(parent + slash, []).append(name)
    text = ", ".join(
        parent + (f"{{{', '.join(found)}}}" if len(found) > 1 else found[0])
        for parent, found in names.items()
    )
    return text + (f" -> {bias}" if bias is not None else "")
