"""What JAX found when it started, and how it is set."""

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from jaxaccel._commands._layout import first_line

SHOWN = ("jax_enable_x64", "jax_default_matmul_precision", "jax_platforms")
# On, they are for finding mistakes; each makes calls slower, some by far.
DEBUG = (
    "jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_debug_key_reuse",
    "jax_enable_checks", "jax_check_tracer_leaks", "jax_disable_most_optimizations",
)  # fmt: skip
_PREFIXES = ("JAX_", "JAXACCEL_", "XLA_", "LIBTPU_", "PJRT_", "NCCL_", "CUDA_VISIBLE_")
_ALIVE = "Python goes on"
_PROBE = f"""
try:
    import jax
    jax.devices()
except Exception:
    pass
print({_ALIVE!r})
"""
_PATIENCE = 120  # seconds; a first start on a GPU takes some
_NAMES = ("GLIBC_TUNABLES", "NPROC", "NVIDIA_TF32_OVERRIDE")


@dataclass(frozen=True)
class Devices:
    """Devices of one kind; bytes of one of them, where it tells."""

    platform: str
    kind: str
    count: int
    memory: int | None
    used: int | None


@dataclass(frozen=True)
class Runtime:
    """JAX as it is.

    Attributes:
        error: why it does not start, if it does not.
        messages: what it logged while it did.
        settings: those of `SHOWN`, and of `DEBUG` what is on.
        devices: of all processes, by their kind.
        platform: of the default device.
        process, processes: this one's number, and how many there are.
    """

    error: str | None = None
    messages: tuple[str, ...] = ()
    imported: bool = True
    settings: dict[str, str] | None = None
    platform: str | None = None
    devices: tuple[Devices, ...] = ()
    process: int = 0
    processes: int = 1


def environment() -> dict[str, str]:
    """The variables that JAX, XLA and their libraries read."""
    found = {k: v for k, v in os.environ.items() if k.startswith(_PREFIXES) or k in _NAMES}
    return dict(sorted(found.items()))


def runtime(probe: bool | None = None) -> Runtime:
    """Imports JAX and starts its default backend, whatever comes of it.

    Args:
        probe: whether another process tries first, since native code may end it; by default,
            where there are flags or a plugin for it.
    """
    if _may_abort() if probe is None else probe:
        error = aborted()
        if error is not None:
            return Runtime(error, imported=False)
    try:
        import jax
    except Exception as error:  # its versions, or what is set for it
        return Runtime(first_line(error), imported=False)
    return _started(jax)


def _may_abort() -> bool:
    """XLA ends the process for a flag that it does not know, and a driver may."""
    flags = any(os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    return flags or any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")))


def aborted(code: str = _PROBE, patience: float = _PATIENCE) -> str | None:
    """How a process of its own ended that starts JAX; None if Python outlived it."""
    command, nothing = [sys.executable, "-c", code], subprocess.DEVNULL
    try:
        found = subprocess.run(
            command, stdin=nothing, capture_output=True, timeout=patience, check=False
        )
    except subprocess.TimeoutExpired:
        return f"starting it takes longer than {patience:g} seconds"
    except OSError:
        return None  # there is nobody to ask
    if _ALIVE.encode() in found.stdout:
        return None
    lines = found.stderr.decode(errors="replace").strip().splitlines()
    said = f": {lines[-1][:300]}" if lines else ""
    return f"starting it ends the process, with status {found.returncode}{said}"


def _started(jax: Any) -> Runtime:
    settings = _settings(jax.config)
    with _messages() as messages:
        try:
            found = jax.devices()
        except Exception as error:  # a RuntimeError, or an AssertionError without a plugin
            return Runtime(first_line(error), tuple(messages), settings=settings)
    return Runtime(
        messages=tuple(messages),
        settings=settings,
        platform=found[0].platform,
        devices=tuple(_kinds(found)),
        process=jax.process_index(),
        processes=jax.process_count(),
    )


def _settings(config: Any) -> dict[str, str]:
    on = [name for name in DEBUG if getattr(config, name, False)]
    return {name: _value(getattr(config, name, None)) for name in (*SHOWN, *on)}


def _value(value: Any) -> str:
    return "not set" if value in (None, "") else str(value)


def _kinds(devices: list[Any]) -> Iterator[Devices]:
    kinds = Counter((device.platform, device.device_kind) for device in devices)
    for (platform, kind), count in kinds.items():
        first = next(d for d in devices if (d.platform, d.device_kind) == (platform, kind))
        stats = _stats(first)
        yield Devices(platform, kind, count, stats.get("bytes_limit"), stats.get("bytes_in_use"))


def _stats(device: Any) -> dict[str, int]:
    try:
        return device.memory_stats() or {}
    except Exception:  # another process's device, or a plugin that does not count
        return {}


class _Kept(logging.Handler):
    """Warnings as lines of text."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps it."""
        self.lines.append(" ".join(record.getMessage().split()))


@contextmanager
def _messages() -> Iterator[list[str]]:
    """What JAX would log to the terminal, which the commands say in their own place."""
    logger, kept = logging.getLogger("jax"), _Kept()
    handlers = logger.handlers
    logger.handlers = [kept]
    try:
        yield kept.lines
    finally:
        logger.handlers = handlers
