"""What the machine is, read from its files. Needs no JAX."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# By the names of the kernel: what XLA's and other engines' kernels are written for.
_X86 = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni",
        "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")  # fmt: skip
_ARM = ("neon", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme")
_DRIVER = re.compile(r"\b(\d{3}\.\d+(?:\.\d+)?)\b")
_PATIENCE = 10  # seconds for nvidia-smi, which waits for a driver that hangs


@dataclass(frozen=True)
class Cores:
    """Processor cores as the system counts them.

    Attributes:
        machine: those that are on.
        allowed: those that this process may run on.
        quota: how many of them at a time, where a cgroup limits it.
    """

    machine: int
    allowed: int
    quota: float | None


@dataclass(frozen=True)
class Nvidia:
    """GPUs that the machine has, whether JAX sees them or not.

    Attributes:
        names: one for each GPU, as far as they are known.
        driver: its version.
        seen: where they were found.
    """

    names: tuple[str, ...]
    driver: str | None
    seen: str


@dataclass(frozen=True)
class Machine:
    """The computer and its Python.

    Attributes:
        extensions: vector extensions that matter here, by the kernel's names; None where the
            system does not tell.
        lacking: the others of this architecture.
        memory, free: bytes.
        huge_pages: the kernel's setting: "always", "madvise" or "never".
    """

    python: str
    executable: str
    system: str
    architecture: str
    libc: str | None
    processor: str
    cores: Cores
    extensions: tuple[str, ...] | None
    lacking: tuple[str, ...]
    memory: int | None
    free: int | None
    huge_pages: str | None
    nvidia: Nvidia | None


def text(path: Path) -> str:
    """The content of a file; nothing where it cannot be read."""
    with suppress(OSError, ValueError):
        return path.read_text(errors="replace")
    return ""


def machine(root: Path = Path("/")) -> Machine:
    """The one that this runs on; `root` is where its files are."""
    info = text(root / "proc/cpuinfo")
    has, lacks = _extensions(info)
    memory = _memory(text(root / "proc/meminfo"))
    return Machine(
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        libc=" ".join(platform.libc_ver()).strip() or None,
        processor=_field(info, "model name") or platform.processor() or platform.machine(),
        cores=cores(root),
        extensions=has,
        lacking=lacks,
        memory=memory.get("MemTotal"),
        free=memory.get("MemAvailable"),
        huge_pages=_bracketed(text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        nvidia=nvidia(root),
    )


def _field(info: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else None


def _bracketed(setting: str) -> str | None:
    found = re.search(r"\[(\w+)\]", setting)
    return found[1] if found else None


def _extensions(info: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Those of the processor, and those it has not."""
    for field, names in (("flags", _X86), ("Features", _ARM)):
        flags = (_field(info, field) or "").split()
        if flags:
            has = tuple(name for name in names if name in flags)
            return has, tuple(name for name in names if name not in flags)
    return None, ()


def _memory(info: str) -> dict[str, int]:
    """Bytes, by the kernel's names."""
    return {name: 1024 * int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", info, re.M)}


def cores(root: Path = Path("/")) -> Cores:
    """The machine's, this process's, and its cgroup's."""
    whole = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else whole
    return Cores(whole, allowed, min(_quotas(root), default=None))


def _quotas(root: Path) -> Iterator[float]:
    """Of this process's cgroup and those above it, in either version of cgroups."""
    for line in text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        named = controllers.split(",")
        mounts = ["", "unified"] if not controllers else [controllers, *named]
        if controllers and "cpu" not in named:
            continue
        for mount in mounts:
            yield from _along(root / "sys/fs/cgroup" / mount, path)


def _along(mount: Path, path: str) -> Iterator[float]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts) + 1):
        folder = mount.joinpath(*parts[:depth])
        limit = text(folder / "cpu.max") or (
            text(folder / "cpu.cfs_quota_us") + " " + text(folder / "cpu.cfs_period_us")
        )
        with suppress(ValueError, ZeroDivisionError):
            quota, period = map(int, limit.split())
            if quota > 0:
                yield quota / period


def nvidia(root: Path = Path("/")) -> Nvidia | None:
    """NVIDIA's GPUs by its own program, else by what its driver leaves in files."""
    rows = [[cell.strip() for cell in line.split(",")] for line in _asked().splitlines()]
    if rows := [row for row in rows if len(row) == 2]:
        return Nvidia(tuple(name for name, _ in rows), rows[0][1], "nvidia-smi")
    folders = sorted(_below(root / "proc/driver/nvidia/gpus"))
    names = [_field(text(folder / "information"), "Model") for folder in folders]
    driver = _DRIVER.search(text(root / "proc/driver/nvidia/version"))
    version = driver[1] if driver else None
    if folders:
        return Nvidia(tuple(n or "unknown" for n in names), version, "/proc/driver/nvidia")
    devices = [path for path in _below(root / "dev") if re.fullmatch(r"nvidia\d+", path.name)]
    if devices:
        return Nvidia(("unknown",) * len(devices), version, f"/dev/{min(devices).name}")
    return None


def _below(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _asked() -> str:
    """What nvidia-smi says; nothing where there is none, or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            command, capture_output=True, timeout=_PATIENCE, check=False, stdin=subprocess.DEVNULL
        )
        return found.stdout.decode(errors="replace") if found.returncode == 0 else ""
    return ""
