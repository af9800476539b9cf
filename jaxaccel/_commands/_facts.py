"""All that `doctor` finds out, in one piece."""

from dataclasses import dataclass, replace
from pathlib import Path

from jaxaccel._commands import _caches, _machine, _packages, _rates, _runtime


@dataclass(frozen=True)
class Facts:
    """What there is, without any judgement.

    Attributes:
        compiled, tuned: None where JAX does not start.
        rates: None where nothing was measured.
    """

    machine: _machine.Machine
    packages: _packages.Packages
    environment: dict[str, str]
    runtime: _runtime.Runtime
    compiled: _caches.Compiled | None
    tuned: _caches.Tuned | None
    rates: tuple[_rates.Rate, ...] | None


def facts(
    measure: bool = True,
    show: bool = False,
    sizes: _rates.Sizes | None = None,
    root: Path = Path("/"),
) -> Facts:
    """What this process finds.

    Args:
        measure: matrix products and copies too.
        show: a progress bar meanwhile.
        sizes: of what is measured, instead of those of the platform.
        root: where the system's files are.
    """
    environment = _runtime.environment()  # before JAX adds to it
    machine, runtime = _machine.machine(root), _runtime.runtime()
    starts = runtime.platform is not None
    found = Facts(
        machine=machine,
        packages=_packages.packages(),
        environment=environment,
        runtime=runtime,
        compiled=_caches.compiled() if runtime.imported else None,
        tuned=_caches.tuned() if starts else None,
        rates=None,
    )
    if not (measure and starts):
        return found
    sizes = sizes or _rates.sizes_for(runtime.platform or "cpu", _free(machine, runtime))
    return replace(found, rates=_rates.rates(sizes, show))


def _free(machine: _machine.Machine, runtime: _runtime.Runtime) -> int | None:
    """Bytes on the default device."""
    first = runtime.devices[0]
    if first.memory is not None:
        return first.memory - (first.used or 0)
    return machine.free if first.platform == "cpu" else None
