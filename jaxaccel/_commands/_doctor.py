"""``python -m jaxaccel doctor``: what is here, how fast it is, and what to mend."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from jaxaccel._commands._caches import Compiled, Tuned
from jaxaccel._commands._facts import Facts, facts
from jaxaccel._commands._findings import Finding, findings
from jaxaccel._commands._layout import (
    aligned,
    counted,
    section,
    show,
    show_json,
    size,
    wrapped,
)
from jaxaccel._commands._machine import Cores, Machine
from jaxaccel._commands._packages import Extra, Package
from jaxaccel._commands._rates import Rate
from jaxaccel._commands._runtime import Devices, Runtime

Pairs = Iterator[tuple[str, str]]


def doctor(*, as_json: bool, measure: bool) -> int:
    """Prints it; returns 1 if something is broken, else 0."""
    found = facts(measure, show=True)
    advice = findings(found)
    if as_json:
        show_json(content(found, advice))
    else:
        show(page(found, advice))
    return int(any(one.fault for one in advice))


def content(found: Facts, advice: Sequence[Finding]) -> dict[str, Any]:
    """For JSON."""
    broken = any(one.fault for one in advice)
    return asdict(found) | {"findings": [asdict(one) for one in advice], "broken": broken}


def page(found: Facts, advice: Sequence[Finding]) -> str:
    """For a terminal."""
    sections = [
        section("Machine", aligned(list(_machine(found.machine)))),
        section("Packages", *_packages(found)),
        section("Devices", aligned(list(_devices(found.runtime)))),
        section("Settings", aligned(list(_settings(found)))),
        section("Kept on disk", aligned(list(_kept(found)))),
        section("Reached by the default device", _reached(found)),
        section("What to mend", _advice(advice)),
    ]
    return "\n\n".join([f"jaxaccel {found.packages.version}", *sections])


def _machine(machine: Machine) -> Pairs:
    libc = f", {machine.libc}" if machine.libc else ""
    yield "Python", f"{machine.python}, {machine.executable}"
    yield "system", f"{machine.system}{libc}"
    yield "processor", f"{machine.processor} ({machine.architecture})"
    yield "cores", _cores(machine.cores)
    yield "extensions", _extensions(machine)
    yield "memory", _memory(machine.memory, machine.free)
    yield "huge pages", machine.huge_pages or "not known"
    yield "NVIDIA GPU", _nvidia(machine)


def _cores(cores: Cores) -> str:
    quota = f", {cores.quota:g} at a time" if cores.quota is not None else ""
    return f"{cores.allowed} of {cores.machine} for this process{quota}"


def _extensions(machine: Machine) -> str:
    if machine.extensions is None:
        return "not known: the system has no /proc/cpuinfo"
    lacking = f"; without {', '.join(machine.lacking)}" if machine.lacking else ""
    return f"{', '.join(machine.extensions) or 'none'}{lacking}"


def _memory(whole: int | None, free: int | None) -> str:
    if whole is None:
        return "not known"
    return size(whole) + (f", {size(free)} free" if free is not None else "")


def _nvidia(machine: Machine) -> str:
    gpu = machine.nvidia
    if gpu is None:
        return "none found"
    driver = f", driver {gpu.driver}" if gpu.driver else ""
    return f"{', '.join(gpu.names)}{driver} (by {gpu.seen})"


def _packages(found: Facts) -> Iterator[str]:
    packages = found.packages
    source = f"run from {packages.folder}" if packages.folder else ""
    rows = [("jaxaccel", packages.version, source)]
    yield aligned([*rows, *map(_package, (*packages.required, *packages.parts))])
    yield aligned([(one.name, _extra(one)) for one in packages.extras])


def _package(package: Package) -> tuple[str, str, str]:
    within = "within" if package.fits else "NOT within"
    note = f"{within} {package.wanted}" if package.wanted else ""
    return package.name, package.installed or "missing", note


def _extra(extra: Extra) -> str:
    there = [f"{p.name} {p.installed}" for p in extra.packages if p.installed]
    absent = [p.name for p in extra.packages if not p.installed]
    off = [f"{p.name} {p.wanted}" for p in extra.packages if p.installed and not p.fits]
    parts = [", ".join(there)] if there else []
    parts += [f"absent: {', '.join(absent)} ({extra.install})"] if absent else []
    parts += [f"tested with {', '.join(off)}"] if off else []
    return "; ".join(parts)


def _devices(runtime: Runtime) -> Pairs:
    if runtime.platform is None:
        yield "JAX", "does not start: see below"
    for one in runtime.devices:
        yield one.platform, _device(one)
    if runtime.platform is not None:
        yield "processes", f"{runtime.processes}, this is number {runtime.process}"
    for message in runtime.messages:
        yield "JAX says", message


def _device(one: Devices) -> str:
    memory = "the machine's memory" if one.platform == "cpu" else "memory not told"
    if one.memory is not None:
        used = f", {size(one.used)} used" if one.used is not None else ""
        memory = f"memory for JAX {size(one.memory)}{used}"
    return f"{one.count} x {one.kind}, {memory}"


def _settings(found: Facts) -> Pairs:
    yield from (found.runtime.settings or {}).items()
    named = dict.fromkeys(("XLA_FLAGS", "GLIBC_TUNABLES"), "not set")
    yield from (named | found.environment).items()
    yield "GPU memory", _gpu_memory(found)


def _gpu_memory(found: Facts) -> str:
    """What JAX takes, by its variables."""
    if found.runtime.platform != "gpu":
        return "no GPU: does not apply"
    given = found.environment.get
    allocator = (given("XLA_PYTHON_CLIENT_ALLOCATOR") or "default").lower()
    if allocator == "platform":
        return "each array is allocated and freed by itself: slow, and nothing is held back"
    share = given("XLA_CLIENT_MEM_FRACTION") or given("XLA_PYTHON_CLIENT_MEM_FRACTION") or ".75"
    if given("XLA_PYTHON_CLIENT_PREALLOCATE") in ("false", "False", "0"):
        return (
            f"taken as it is needed, up to {share} of each GPU, and not given back before the "
            "process ends; it may come to lie in pieces"
        )
    return (
        f"{share} of each GPU is taken when JAX starts, and is then not free for other processes; "
        "XLA_PYTHON_CLIENT_PREALLOCATE=false takes it as it is needed, "
        "XLA_CLIENT_MEM_FRACTION=.5 takes half"
    )


def _kept(found: Facts) -> Pairs:
    if found.compiled is not None:
        yield "compiled programs", _compiled(found.compiled)
    if found.tuned is not None:
        yield "times of jx.autotune", _tuned(found.tuned)
    if found.compiled is None and found.tuned is None:
        yield "JAX", "does not start: see below"


def _compiled(cache: Compiled) -> str:
    if not cache.on:
        return "off: each process compiles anew"
    kept = f"programs of at least {cache.least_seconds:g} s to compile"
    if cache.remote:
        return f"on: {cache.folder} (not looked into), {kept}"
    if cache.entries is None or cache.bytes is None:
        return f"on: {cache.folder} cannot be read, {kept}"
    can = "" if cache.writable else ", CANNOT BE WRITTEN"
    held = f"{counted(cache.entries, 'entry')}, {size(cache.bytes)}"
    return f"on: {cache.folder}{can}, {held}, {kept}"


def _tuned(cache: Tuned) -> str:
    others = f"; {counted(cache.others, 'file')} for other machines, versions or settings, " + size(
        cache.other_bytes
    )
    can = "" if cache.writable else " (CANNOT BE WRITTEN)"
    if cache.path is None:
        return f"not known: {cache.error}"
    if cache.rows is None:
        state = "damaged" if cache.error else "not there yet"
    else:
        state = f"{counted(cache.rows, 'row')}, {size(cache.bytes or 0)}"
    return f"{cache.path}{can}: {state}" + (others if cache.others > 0 else "")


def _reached(found: Facts) -> str:
    if found.rates is None:
        return "not measured"
    note = "Median of {} rounds, with quartiles; through XLA, random numbers."
    if found.runtime.platform == "gpu":
        note += " float32 products by TF32, unless jax_default_matmul_precision says otherwise."
    rounds = max((rate.rounds for rate in found.rates), default=0)
    return "\n".join([aligned(list(map(_rate, found.rates))), *wrapped(note.format(rounds), 2)])


def _rate(rate: Rate) -> tuple[str, str, str]:
    if rate.median is None or rate.low is None or rate.high is None:
        return rate.what, "failed", f"{rate.operands}: {rate.error}"
    return (
        rate.what,
        f"{_figures(rate.median)} {rate.unit}",
        f"{_figures(rate.low)} to {_figures(rate.high)}, {rate.operands}",
    )


def _figures(value: float) -> str:
    """Three of them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _advice(advice: Sequence[Finding]) -> str:
    if not advice:
        return "nothing to mend"
    faults = sum(one.fault for one in advice)
    counts = [
        counted(count, noun)
        for count, noun in ((faults, "fault"), (len(advice) - faults, "hint"))
        if count
    ]
    return "\n\n".join([", ".join(counts), *map(_finding, advice)])


def _finding(one: Finding) -> str:
    kind = "FAULT" if one.fault else "hint"
    rows = aligned([(kind, one.what), ("", one.why)])
    return f"{rows}\n{'':<{len(kind)}}  -> {one.mend}"
