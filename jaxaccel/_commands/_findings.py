"""What should be mended on a machine, why, and how: one rule for each."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxaccel._commands._facts import Facts
from jaxaccel._commands._layout import counted
from jaxaccel._commands._packages import Package
from jaxaccel._commands._runtime import DEBUG

_HUGE_PAGES = "glibc.malloc.hugetlb"
# What NVIDIA's runtime of CUDA asks of the driver.
_DRIVERS = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}
_PATHS = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


@dataclass(frozen=True)
class Finding:
    """Something to mend.

    Attributes:
        fault: it is broken; else it could be better.
        what: in a few words.
        why: what comes of it.
        mend: the command or the setting.
    """

    fault: bool
    what: str
    why: str
    mend: str


Rule = Callable[[Facts], Iterator[Finding]]


def findings(facts: Facts) -> tuple[Finding, ...]:
    """All that the rules find, faults first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return tuple(sorted(found, key=lambda one: not one.fault))


def _fault(what: str, why: str, mend: str) -> Finding:
    return Finding(True, what, why, mend)


def _hint(what: str, why: str, mend: str) -> Finding:
    return Finding(False, what, why, mend)


def _installed(facts: Facts) -> Iterator[Finding]:
    packages = facts.packages
    if packages.installed is None:
        yield _fault(
            "jaxaccel is not installed",
            "its folder is on Python's path, but without its metadata jx.autotune and jx.export "
            "cannot tell their version",
            packages.install(),
        )
    elif packages.outdated:
        yield _hint(
            "the installed metadata are older than pyproject.toml",
            "pip checks the requirements, and installs the extras, of the time of the installation",
            packages.install(),
        )


def _required(facts: Facts) -> Iterator[Finding]:
    for package in facts.packages.required:
        if package.installed is None:
            yield _fault(
                f"{package.name} is not installed",
                "jaxaccel cannot do without it",
                _exactly(package),
            )
        elif not package.fits:
            yield _fault(
                f"{package.name} {package.installed} is outside of the tested versions",
                f"jaxaccel {facts.packages.version} is tested with {package.name} {package.wanted}",
                _exactly(package),
            )


def _exactly(package: Package) -> str:
    return f"pip install '{package.name}{package.wanted.replace(' ', '')}'"


def _parts(facts: Facts) -> Iterator[Finding]:
    jax = next((p.installed for p in facts.packages.required if p.name == "jax"), None)
    for package in facts.packages.parts:
        if not package.fits:
            found = package.installed or "none"
            yield _fault(
                f"{package.name} {found} is not that of jax {jax}",
                f"jax {jax} asks for {package.name} {package.wanted}",
                _exactly(package),
            )


def _starts(facts: Facts) -> Iterator[Finding]:
    runtime, asked = facts.runtime, _platforms(facts)
    if runtime.error is None:
        return
    if not runtime.imported:
        mend = _variable(facts) or _anew(facts)
        yield _fault("JAX does not start", runtime.error, mend)
    elif {"cuda", "gpu"} & set(asked.split(",")) and not facts.packages.plugins:
        mend = "unset JAX_PLATFORMS" if facts.machine.nvidia is None else _extra(facts, "cuda")
        why = f"JAX_PLATFORMS={asked}, but JAX's plugin for CUDA is not installed"
        yield _fault("JAX finds no GPU", why, mend)
    else:
        mend = _variable(facts) or ("unset JAX_PLATFORMS" if asked else _anew(facts))
        yield _fault("JAX does not start", runtime.error, mend)


def _variable(facts: Facts) -> str | None:
    """The one that the error names, or whose value it repeats."""
    error = facts.runtime.error or ""
    for name, value in facts.environment.items():
        if name in error or any(len(word) > 4 and word in error for word in value.split()):
            return f"unset {name}"
    return None


def _anew(facts: Facts) -> str:
    jax = next((p for p in facts.packages.required if p.name == "jax"), None)
    return facts.packages.install() if jax is None else f"{_exactly(jax)} --force-reinstall"


def _platforms(facts: Facts) -> str:
    value = (facts.runtime.settings or {}).get("jax_platforms", "not set")
    return "" if value == "not set" else value


def _extra(facts: Facts, name: str) -> str:
    return next(extra.install for extra in facts.packages.extras if extra.name == name)


def _unused_gpu(facts: Facts) -> Iterator[Finding]:
    gpu, runtime = facts.machine.nvidia, facts.runtime
    if gpu is None or runtime.platform in (None, "gpu", "tpu"):
        return
    kept = _kept_off(facts)
    names = ", ".join(dict.fromkeys(gpu.names))
    what = f"an NVIDIA GPU ({names}) is there, but JAX runs on the {runtime.platform}"
    if kept is not None:
        yield _hint(what, f"{kept} keeps JAX off it", f"unset {kept.partition('=')[0]}")
    elif not facts.packages.plugins:
        yield _fault(what, "JAX's plugin for CUDA is not installed", _extra(facts, "cuda"))
    else:
        yield from _old_driver(facts, what) or [_no_start(facts, what)]


def _kept_off(facts: Facts) -> str | None:
    """The variable that asks for it."""
    asked, visible = _platforms(facts), facts.environment.get("CUDA_VISIBLE_DEVICES")
    if asked and not {"cuda", "gpu"} & set(asked.split(",")[:1]):
        return f"JAX_PLATFORMS={asked}"
    return f"CUDA_VISIBLE_DEVICES={visible}" if visible in ("", "-1", "NoDevFiles") else None


def _old_driver(facts: Facts, what: str) -> list[Finding]:
    driver = facts.machine.nvidia.driver if facts.machine.nvidia else None
    least = max((_DRIVERS.get(name, 0) for name in facts.packages.plugins), default=0)
    if driver is None or int(driver.partition(".")[0]) >= least:
        return []
    why = f"its driver is {driver}, and the plugin's CUDA needs {least} or newer"
    older = _DRIVERS["jax-cuda12-plugin"] <= int(driver.partition(".")[0])
    return [_fault(what, why, "pip install 'jax[cuda12]'" if older else "install a newer driver")]


def _no_start(facts: Facts, what: str) -> Finding:
    said = "; ".join(facts.runtime.messages) or "and it does not say why"
    return _fault(
        what,
        f"{', '.join(facts.packages.plugins)} is installed, but does not start: {said}",
        "JAX_PLATFORMS=cuda TF_CPP_MIN_LOG_LEVEL=0 python -c 'import jax; jax.devices()' says why",
    )


def _compile_cache(facts: Facts) -> Iterator[Finding]:
    cache = facts.compiled
    if cache is None:
        return
    if not cache.enabled:
        yield _hint(
            "JAX's compilation cache is turned off",
            "every process compiles everything anew",
            "unset JAX_ENABLE_COMPILATION_CACHE",
        )
    elif cache.folder is None:
        yield _hint(
            "JAX's compilation cache is off",
            "every process compiles everything anew; with a folder, what takes a second or more "
            "to compile is kept for the next one",
            'export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/jax"',
        )
    elif cache.writable is False:
        yield _fault(
            "JAX's compilation cache cannot be written",
            f"{cache.folder}: nothing is kept, and every process compiles everything anew",
            'export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/jax"',
        )


def _autotune_cache(facts: Facts) -> Iterator[Finding]:
    cache = facts.tuned
    if cache is None:
        return
    if cache.path is None:
        yield _fault("jx.autotune does not start", cache.error or "", facts.packages.install())
    elif cache.error is not None:
        yield _hint(
            "what jx.autotune kept is damaged",
            f"{cache.path}: {cache.error}; it is timed anew",
            f"rm '{cache.path}'",
        )
    if cache.path is not None and not cache.writable:
        yield _fault(
            "what jx.autotune times cannot be kept",
            f"{os.path.dirname(cache.path)} cannot be written: each process times everything anew",
            "export JAXACCEL_CACHE=FOLDER, of one that can be written",
        )


def _fewer_cores(facts: Facts) -> Iterator[Finding]:
    cores = facts.machine.cores
    if cores.allowed < cores.machine:
        yield _hint(
            f"this process may use {cores.allowed} of the machine's {cores.machine} cores",
            "its affinity leaves the others out: by taskset, numactl, a container's cpuset or a "
            "batch system",
            f"taskset -cp 0-{cores.machine - 1} $$, or ask the batch system for more",
        )
    if cores.quota is not None and cores.quota < cores.allowed:
        threads = max(1, int(cores.quota))
        yield _hint(
            f"a cgroup limits this process to {cores.quota:g} of {cores.allowed} cores at a time",
            f"XLA starts a thread for each of the {cores.allowed}, which are then stopped in turn",
            f"raise the limit (docker run --cpus={cores.allowed}), or "
            f"export PJRT_NPROC={threads} for as many threads",
        )


def _threads(facts: Facts) -> Iterator[Finding]:
    cores = facts.machine.cores
    for name in ("PJRT_NPROC", "NPROC"):
        given = facts.environment.get(name, "")
        if facts.runtime.platform == "cpu" and given.isdecimal():
            free = min(cores.allowed, int(cores.quota or cores.allowed))
            if 0 < int(given) < free:
                yield _hint(
                    f"XLA is told to use {counted(int(given), 'thread')}",
                    f"{name}={given}, where {free} cores are there for it",
                    f"unset {name}",
                )


def _several_cpu_devices(facts: Facts) -> Iterator[Finding]:
    count = sum(one.count for one in facts.runtime.devices)
    if facts.runtime.platform == "cpu" and facts.runtime.processes == 1 and count > 1:
        forced = _PATHS.search(facts.environment.get("XLA_FLAGS", ""))
        yield _hint(
            f"one processor is shown as {count} devices",
            "they share its cores, and jx.autotune chooses by rules instead of by time",
            f"take {forced[0]} out of XLA_FLAGS" if forced else "unset JAX_NUM_CPU_DEVICES",
        )


def _huge_pages(facts: Facts) -> Iterator[Finding]:
    machine, tunables = facts.machine, facts.environment.get("GLIBC_TUNABLES", "")
    glibc = re.match(r"glibc 2\.(\d+)", machine.libc or "")
    if facts.runtime.platform != "cpu" or glibc is None or int(glibc[1]) < 35:
        return  # the setting is of glibc 2.35
    if machine.huge_pages == "madvise" and _HUGE_PAGES not in tunables:
        whole = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
        yield _hint(
            "XLA's buffers lie in pages of 4 KiB",
            "each is zeroed at its first touch; with pages of 2 MiB large buffers are written in "
            "less time",
            f"export GLIBC_TUNABLES={whole}  # read when Python starts",
        )


def _x64(facts: Facts) -> Iterator[Finding]:
    if (facts.runtime.settings or {}).get("jax_enable_x64") == "True":
        gpu = facts.runtime.platform == "gpu"
        yield _hint(
            "64-bit numbers are on",
            "what has no dtype of its own becomes float64: twice the bytes"
            + (", and on most GPUs a 32nd or a 64th of the speed" if gpu else ""),
            "unset JAX_ENABLE_X64",
        )


def _debugging(facts: Facts) -> Iterator[Finding]:
    for name in DEBUG:
        if (facts.runtime.settings or {}).get(name) not in (None, "False"):
            slow = "nothing is compiled" if name == "jax_disable_jit" else "calls are slower"
            yield _hint(f"{name} is on", f"it is for finding mistakes; {slow}", _unset(name))


def _unset(setting: str) -> str:
    return f"unset {setting.upper()}"


def _precision(facts: Facts) -> Iterator[Finding]:
    value = (facts.runtime.settings or {}).get("jax_default_matmul_precision")
    if facts.runtime.platform == "gpu" and value in ("highest", "float32"):
        yield _hint(
            f"jax_default_matmul_precision is {value}",
            "float32 products do without the GPU's units for TF32, which are several times as fast",
            "unset JAX_DEFAULT_MATMUL_PRECISION",
        )


def _allocator(facts: Facts) -> Iterator[Finding]:
    given = facts.environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower()
    if facts.runtime.platform == "gpu" and given == "platform":
        yield _hint(
            "each array of the GPU is allocated by itself",
            "XLA_PYTHON_CLIENT_ALLOCATOR=platform is for finding out what memory is needed; "
            "it is slow",
            "unset XLA_PYTHON_CLIENT_ALLOCATOR",
        )


def _not_measured(facts: Facts) -> Iterator[Finding]:
    for rate in facts.rates or ():
        if rate.error is not None:
            yield _fault(
                f"{rate.what}: fails on the {facts.runtime.platform}",
                rate.error,
                "end what else uses its memory, or mend the other findings",
            )


RULES: tuple[Rule, ...] = (
    _installed,
    _required,
    _parts,
    _starts,
    _unused_gpu,
    _not_measured,
    _compile_cache,
    _autotune_cache,
    _fewer_cores,
    _threads,
    _several_cpu_devices,
    _huge_pages,
    _x64,
    _debugging,
    _precision,
    _allocator,
)
