"""Which packages are installed, and whether they are those that are asked for. Imports none."""

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jaxaccel

ENGINES = ("onnxruntime", "openvino")
_EXTRAS = ("cuda", "experiments", "export")
_PLUGIN = re.compile(r"jax-(cuda\d+|rocm\d+)-plugin")
_FORM = re.compile(
    r"\s*(?P<name>[\w.-]+)\s*(\[(?P<extras>[^\]]*)\])?\s*\(?(?P<bounds>[^;()]*)\)?\s*"
    r"(;(?P<marker>.*))?"
)
_EXTRA = re.compile(r"""\s*extra\s*==\s*['"]([^'"]+)['"]\s*""")


class Requirement(NamedTuple):
    """A package with bounds of its version, for an extra or for all."""

    name: str
    bounds: tuple[tuple[str, str], ...]
    extra: str | None = None


@dataclass(frozen=True)
class Package:
    """What is installed of a package, None where it is not, and what is asked for."""

    name: str
    installed: str | None
    wanted: str
    fits: bool


@dataclass(frozen=True)
class Extra:
    """Optional packages, and the command that installs them all."""

    name: str
    packages: tuple[Package, ...]
    install: str


@dataclass(frozen=True)
class Packages:
    """What is installed.

    Attributes:
        version: of jaxaccel, by its code.
        installed: by its metadata; None where it is not installed but only found.
        folder: of the checkout that it is run from, if it is one.
        outdated: the metadata are not those of the checkout.
        required: what jaxaccel cannot do without.
        extras: what some of it needs.
        parts: jaxlib and plugins for GPUs, with what this jax asks for.
    """

    version: str
    installed: str | None
    folder: str | None
    outdated: bool
    required: tuple[Package, ...]
    extras: tuple[Extra, ...]
    parts: tuple[Package, ...]

    @property
    def plugins(self) -> tuple[str, ...]:
        """The names of JAX's plugins for GPUs that are installed."""
        return tuple(p.name for p in self.parts if _PLUGIN.fullmatch(p.name))

    def install(self, extra: str = "") -> str:
        """The command that installs jaxaccel's packages."""
        named = f"[{extra}]" if extra else ""
        return f"pip install {_source(self.folder, named)}"


def _source(folder: str | None, named: str) -> str:
    return f"'jaxaccel{named}'" if folder is None else f"-e '{folder}{named}'"


def packages() -> Packages:
    """Those of this environment."""
    checkout = _checkout()
    told = _declared("jaxaccel")
    asked = told if checkout is None else _of_project(checkout[1])
    folder = None if checkout is None else str(checkout[0])
    command = lambda extra: f"pip install {_source(folder, f'[{extra}]')}"
    extras = [Extra(name, tuple(_extra(name, asked)), command(name)) for name in _EXTRAS]
    engines = [_package(Requirement(n, _bounds_of(n, asked))) for n in ENGINES]
    return Packages(
        version=jaxaccel.__version__,
        installed=version("jaxaccel"),
        folder=folder,
        outdated=bool(told) and _outline(told) != _outline(asked),
        required=tuple(_package(one) for one in asked if one.extra is None),
        extras=(*extras, Extra("engines", tuple(engines), f"pip install {' '.join(ENGINES)}")),
        parts=tuple(_parts()),
    )


def version(name: str) -> str | None:
    """By its metadata; None where there are none that can be read."""
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError, OSError, ValueError):
        return None


def _checkout() -> tuple[Path, dict[str, Any]] | None:
    """The folder that the package is run from, and its pyproject.toml."""
    folder = Path(jaxaccel.__file__).resolve().parents[1]
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        return (folder, project) if project["name"] == "jaxaccel" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_project(project: dict[str, Any]) -> list[Requirement]:
    found = [(None, line) for line in project.get("dependencies", [])]
    extras = project.get("optional-dependencies", {})
    found += [(extra, line) for extra, lines in extras.items() for line in lines]
    read = ((extra, parse(line)) for extra, line in found)
    return [one._replace(extra=extra) for extra, one in read if one is not None]


def _declared(name: str) -> list[Requirement]:
    try:
        lines = metadata.requires(name) or []
    except (metadata.PackageNotFoundError, KeyError, OSError, ValueError):
        return []
    return [one for one in map(parse, lines) if one is not None]


def parse(line: str) -> Requirement | None:
    """A requirement as packages declare it; None where it is not told by versions alone."""
    found = _FORM.fullmatch(line)
    if found is None:
        return None
    marker = _EXTRA.fullmatch(found["marker"] or "")
    if found["marker"] and marker is None:
        return None
    bounds = re.findall(r"(~=|[<>=!]=|[<>])\s*([\w.*]+)", found["bounds"])
    if found["bounds"].strip() and not bounds:
        return None  # an address instead
    return Requirement(canonical(found["name"]), tuple(bounds), marker[1] if marker else None)


def canonical(name: str) -> str:
    """One name for all ways to write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fits(found: str, bounds: Sequence[tuple[str, str]]) -> bool:
    """Whether a version is within all bounds; one before a release counts as that release."""
    return all(_fits(found, sign, bound) for sign, bound in bounds)


def _fits(found: str, sign: str, bound: str) -> bool:
    a, b = _release(found), _release(bound)
    if sign == "~=":
        return a >= b and a[: len(b) - 1] == b[:-1]
    if bound.endswith(".*"):
        return (a[: len(b)] == b) == (sign == "==")
    size = max(len(a), len(b))
    a, b = (one + (0,) * (size - len(one)) for one in (a, b))
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b, "!=": a != b}[sign]


def _release(text: str) -> tuple[int, ...]:
    """The numbers at its front."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def _package(one: Requirement) -> Package:
    found = version(one.name)
    wanted = ", ".join("".join(bound) for bound in sorted(one.bounds, reverse=True))
    return Package(one.name, found, wanted, found is not None and fits(found, one.bounds))


def _extra(extra: str, asked: Sequence[Requirement]) -> Iterator[Package]:
    """Its packages; for CUDA the plugin, for JAX itself is there in any case."""
    if extra == "cuda":
        plugins = dict.fromkeys(
            one.name for one in _declared("jax")
            if (one.extra or "").startswith("cuda") and _PLUGIN.fullmatch(one.name)
        )  # fmt: skip
        yield from (p for p in map(_of_jax, plugins) if p.installed or p.name == max(plugins))
        return
    yield from (_package(one) for one in asked if one.extra == extra)


def _of_jax(name: str) -> Package:
    return _package(Requirement(name, _bounds_of(name, _declared("jax"))))


def _bounds_of(name: str, asked: Sequence[Requirement]) -> tuple[tuple[str, str], ...]:
    """Those for all before those of an extra."""
    found = sorted((one for one in asked if one.name == name), key=lambda one: one.extra or "")
    return found[0].bounds if found else ()


def _parts() -> Iterator[Package]:
    names = dict.fromkeys(one.name for one in _declared("jax"))
    for name in names:
        if name == "jaxlib" or (_PLUGIN.fullmatch(name) and version(name)):
            yield _of_jax(name)


def _outline(told: Sequence[Requirement]) -> tuple[set[Any], set[str]]:
    """What is required, and for which extras there is anything."""
    base = {(one.name, frozenset(one.bounds)) for one in told if one.extra is None}
    return base, {one.extra for one in told if one.extra}
