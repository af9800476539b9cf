"""What ``doctor`` says of what it found: each rule, its wording, and the page."""

import json
from dataclasses import replace

import pytest

from jaxaccel._commands._caches import Compiled, Tuned
from jaxaccel._commands._doctor import content, doctor, page
from jaxaccel._commands._facts import Facts, facts
from jaxaccel._commands._findings import RULES, findings
from jaxaccel._commands._machine import Cores, Machine, Nvidia
from jaxaccel._commands._packages import Extra, Package, Packages
from jaxaccel._commands._rates import Rate, Sizes
from jaxaccel._commands._runtime import Devices, Runtime

MACHINE = Machine(
    python="3.12.1 (CPython)",
    executable="/bin/python",
    system="Linux 6.1",
    architecture="x86_64",
    libc="glibc 2.36",
    processor="Fast One",
    cores=Cores(8, 8, None),
    extensions=("avx2",),
    lacking=("amx_int8",),
    memory=8 << 30,
    free=4 << 30,
    huge_pages="always",
    nvidia=None,
)
JAX = Package("jax", "0.11.2", ">=0.10, <0.12", True)
JAXLIB = Package("jaxlib", "0.11.2", ">=0.11.2, <=0.11.2", True)
PLUGIN = Package("jax-cuda13-plugin", "0.11.2", ">=0.11.2, <=0.11.2", True)
CUDA = Extra("cuda", (replace(PLUGIN, installed=None, fits=False),), "pip install 'jaxaccel[cuda]'")
PACKAGES = Packages("0.1.0", "0.1.0", None, False, (JAX,), (CUDA,), (JAXLIB,))
SETTINGS = {"jax_enable_x64": "False", "jax_default_matmul_precision": "not set",
            "jax_platforms": "not set"}  # fmt: skip
RUNTIME = Runtime(
    settings=SETTINGS, platform="cpu", devices=(Devices("cpu", "cpu", 1, None, None),)
)
RATE = Rate("float32 product", "GFLOP/s", "1,024 x 1,024", 9, 123.4, 99.5, 1200.0)
WELL = Facts(
    machine=MACHINE,
    packages=PACKAGES,
    environment={},
    runtime=RUNTIME,
    compiled=Compiled(True, "/cache", False, True, 3, 2048, 1.0),
    tuned=Tuned("/cache/autotune-1.json", 12, 1024, 2, 4096, True, None),
    rates=(RATE,),
)
GPU = replace(
    RUNTIME, platform="gpu", devices=(Devices("gpu", "NVIDIA H200", 2, 100 << 30, 1 << 30),)
)
NVIDIA = replace(MACHINE, nvidia=Nvidia(("NVIDIA H200",), "580.65.06", "nvidia-smi"))
WITH_PLUGIN = replace(PACKAGES, parts=(JAXLIB, PLUGIN))
UNUSED = "an NVIDIA GPU (NVIDIA H200) is there, but JAX runs on the cpu"
STOPPED = Runtime("RuntimeError: no backend", settings=SETTINGS)


def settings(runtime=RUNTIME, **changed):
    return replace(runtime, settings=SETTINGS | changed)


def old(driver):
    return replace(MACHINE, nvidia=Nvidia(("NVIDIA H200",), driver, "nvidia-smi"))


# Changes to a machine that is well; whether it is broken then; what, why and how to mend it.
CASES = {
    "not installed": (
        {"packages": replace(PACKAGES, installed=None, folder="/src")},
        True, "jaxaccel is not installed", "without its metadata", "pip install -e '/src'"),
    "older metadata": (
        {"packages": replace(PACKAGES, outdated=True, folder="/src")},
        False, "metadata are older than pyproject.toml", "pip checks", "pip install -e '/src'"),
    "missing package": (
        {"packages": replace(PACKAGES, required=(JAX, Package("rich", None, ">=14, <16", False)))},
        True, "rich is not installed", "cannot do without it", "pip install 'rich>=14,<16'"),
    "another version": (
        {"packages": replace(PACKAGES, required=(replace(JAX, installed="0.13.0", fits=False),))},
        True, "jax 0.13.0 is outside of the tested versions",
        "jaxaccel 0.1.0 is tested with jax >=0.10, <0.12", "pip install 'jax>=0.10,<0.12'"),
    "another jaxlib": (
        {"packages": replace(PACKAGES, parts=(replace(JAXLIB, installed="0.10.2", fits=False),))},
        True, "jaxlib 0.10.2 is not that of jax 0.11.2", "asks for jaxlib >=0.11.2, <=0.11.2",
        "pip install 'jaxlib>=0.11.2,<=0.11.2'"),
    "JAX is not imported": (
        {"runtime": Runtime("RuntimeError: broken", imported=False), "compiled": None,
         "tuned": None, "rates": None},
        True, "JAX does not start", "RuntimeError: broken",
        "pip install 'jax>=0.10,<0.12' --force-reinstall"),
    "a setting that JAX does not take": (
        {"runtime": Runtime("ValueError: invalid 'yep' for JAX_ENABLE_X64", imported=False),
         "environment": {"JAX_DEBUG_NANS": "0", "JAX_ENABLE_X64": "yep"}},
        True, "JAX does not start", "invalid 'yep'", "unset JAX_ENABLE_X64"),
    "a flag that XLA does not take": (
        {"runtime": Runtime("Unknown flag: --xla_bad=1", imported=False),
         "environment": {"JAX_DEBUG_NANS": "0", "XLA_FLAGS": "--xla_good=2 --xla_bad=1"}},
        True, "JAX does not start", "Unknown flag", "unset XLA_FLAGS"),
    "no such platform": (
        {"runtime": settings(STOPPED, jax_platforms="npu"),
         "environment": {"JAX_PLATFORMS": "npu"}},
        True, "JAX does not start", "no backend", "unset JAX_PLATFORMS"),
    "no device": (
        {"runtime": STOPPED}, True, "JAX does not start", "no backend", "--force-reinstall"),
    "no plugin, but asked for": (
        {"runtime": settings(STOPPED, jax_platforms="cuda"), "machine": NVIDIA},
        True, "JAX finds no GPU", "JAX_PLATFORMS=cuda, but JAX's plugin for CUDA is not installed",
        "pip install 'jaxaccel[cuda]'"),
    "no GPU, but asked for": (
        {"runtime": settings(STOPPED, jax_platforms="cuda")},
        True, "JAX finds no GPU", "JAX_PLATFORMS=cuda", "unset JAX_PLATFORMS"),
    "a GPU without its plugin": (
        {"machine": NVIDIA},
        True, UNUSED, "JAX's plugin for CUDA is not installed", "pip install 'jaxaccel[cuda]'"),
    "a GPU that is not wanted": (
        {"machine": NVIDIA, "runtime": settings(jax_platforms="cpu")},
        False, UNUSED, "JAX_PLATFORMS=cpu keeps JAX off it", "unset JAX_PLATFORMS"),
    "a GPU that is hidden": (
        {"machine": NVIDIA, "environment": {"CUDA_VISIBLE_DEVICES": "-1"}},
        False, UNUSED, "CUDA_VISIBLE_DEVICES=-1 keeps JAX off it", "unset CUDA_VISIBLE_DEVICES"),
    "a GPU whose driver is old": (
        {"machine": old("550.1"), "packages": WITH_PLUGIN},
        True, UNUSED, "its driver is 550.1, and the plugin's CUDA needs 580 or newer",
        "pip install 'jax[cuda12]'"),
    "a GPU whose driver is too old": (
        {"machine": old("470.1"), "packages": WITH_PLUGIN},
        True, UNUSED, "its driver is 470.1", "install a newer driver"),
    "a GPU that does not start": (
        {"machine": NVIDIA, "packages": WITH_PLUGIN,
         "runtime": replace(RUNTIME, messages=("no!",))},
        True, UNUSED, "jax-cuda13-plugin is installed, but does not start: no!",
        "JAX_PLATFORMS=cuda TF_CPP_MIN_LOG_LEVEL=0 python -c"),
    "a product that fails": (
        {"rates": (RATE, Rate("copy", "GB/s", "1 MiB", 9, error="JaxRuntimeError: full"))},
        True, "copy: fails on the cpu", "JaxRuntimeError: full", "end what else uses its memory"),
    "no compilation cache": (
        {"compiled": Compiled(True, None, False, None, None, None, 1.0)},
        False, "compilation cache is off", "every process compiles everything anew",
        'export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/jax"'),
    "a compilation cache turned off": (
        {"compiled": Compiled(False, "/cache", False, True, 0, 0, 1.0)},
        False, "compilation cache is turned off", "anew", "unset JAX_ENABLE_COMPILATION_CACHE"),
    "a compilation cache that cannot be written": (
        {"compiled": Compiled(True, "/cache", False, False, 0, 0, 1.0)},
        True, "compilation cache cannot be written", "/cache: nothing is kept",
        'export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/jax"'),
    "times that are damaged": (
        {"tuned": Tuned("/c/a.json", None, 3, 0, 0, True, "ValueError: bad")},
        False, "what jx.autotune kept is damaged", "/c/a.json: ValueError: bad", "rm '/c/a.json'"),
    "times that cannot be kept": (
        {"tuned": Tuned("/c/a.json", None, None, 0, 0, False, None)},
        True, "what jx.autotune times cannot be kept", "/c cannot be written",
        "export JAXACCEL_CACHE=FOLDER"),
    "no autotune": (
        {"tuned": Tuned(None, None, None, 0, 0, False, "PackageNotFoundError: jaxaccel")},
        True, "jx.autotune does not start", "PackageNotFoundError", "pip install 'jaxaccel'"),
    "fewer cores": (
        {"machine": replace(MACHINE, cores=Cores(8, 2, None))},
        False, "this process may use 2 of the machine's 8 cores", "affinity", "taskset -cp 0-7 $$"),
    "a quota": (
        {"machine": replace(MACHINE, cores=Cores(8, 8, 2.5))},
        False, "a cgroup limits this process to 2.5 of 8 cores at a time",
        "a thread for each of the 8", "docker run --cpus=8), or export PJRT_NPROC=2 "),
    "fewer threads": (
        {"environment": {"PJRT_NPROC": "3"}},
        False, "XLA is told to use 3 threads", "PJRT_NPROC=3, where 8 cores", "unset PJRT_NPROC"),
    "several CPU devices": (
        {"runtime": replace(RUNTIME, devices=(Devices("cpu", "cpu", 4, None, None),)),
         "environment": {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=4"}},
        False, "one processor is shown as 4 devices", "jx.autotune chooses by rules",
        "take --xla_force_host_platform_device_count=4 out of XLA_FLAGS"),
    "small pages": (
        {"machine": replace(MACHINE, huge_pages="madvise"),
         "environment": {"GLIBC_TUNABLES": "glibc.malloc.check=0"}},
        False, "XLA's buffers lie in pages of 4 KiB", "zeroed at its first touch",
        "export GLIBC_TUNABLES=glibc.malloc.check=0:glibc.malloc.hugetlb=1 "),
    "64 bits": (
        {"runtime": settings(jax_enable_x64="True")},
        False, "64-bit numbers are on", "twice the bytes", "unset JAX_ENABLE_X64"),
    "64 bits on a GPU": (
        {"runtime": settings(GPU, jax_enable_x64="True")},
        False, "64-bit numbers are on", "on most GPUs a 32nd or a 64th", "unset JAX_ENABLE_X64"),
    "nothing compiled": (
        {"runtime": settings(jax_disable_jit="True")},
        False, "jax_disable_jit is on", "nothing is compiled", "unset JAX_DISABLE_JIT"),
    "looking for NaN": (
        {"runtime": settings(jax_debug_nans="True")},
        False, "jax_debug_nans is on", "calls are slower", "unset JAX_DEBUG_NANS"),
    "exact products": (
        {"runtime": settings(GPU, jax_default_matmul_precision="highest")},
        False, "jax_default_matmul_precision is highest", "TF32",
        "unset JAX_DEFAULT_MATMUL_PRECISION"),
    "an allocator": (
        {"runtime": GPU, "environment": {"XLA_PYTHON_CLIENT_ALLOCATOR": "Platform"}},
        False, "each array of the GPU is allocated by itself", "slow",
        "unset XLA_PYTHON_CLIENT_ALLOCATOR"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_finding(case):
    changed, fault, what, why, mend = case
    (found,) = findings(replace(WELL, **changed))
    assert found.fault is fault
    assert what in found.what
    assert why in found.why
    assert mend in found.mend
    assert "\n" not in found.mend


def test_every_rule_has_a_case():
    found = {rule for changed, *_ in CASES.values() for rule in RULES
             if list(rule(replace(WELL, **changed)))}  # fmt: skip
    assert found == set(RULES)


WELL_TOO = {
    "as it is": {},
    "on a GPU": {"runtime": GPU, "machine": NVIDIA},
    "not measured": {"rates": None},
    "a folder far away": {"compiled": Compiled(True, "gs://a", True, None, None, None, 1.0)},
    "a quota of all cores": {"machine": replace(MACHINE, cores=Cores(8, 8, 8.0))},
    "pages that are large": {
        "machine": replace(MACHINE, huge_pages="madvise"),
        "environment": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}},
    "pages of another libc": {"machine": replace(MACHINE, huge_pages="madvise", libc=None)},
    "pages of an older libc": {
        "machine": replace(MACHINE, huge_pages="madvise", libc="glibc 2.31")},
    "pages of a GPU's host": {"machine": replace(MACHINE, huge_pages="madvise"), "runtime": GPU},
    "as many threads as a quota": {
        "environment": {"NPROC": "2"}, "machine": replace(MACHINE, cores=Cores(2, 2, None))},
    "a CPU device for each process": {
        "runtime": replace(RUNTIME, processes=2, devices=(Devices("cpu", "cpu", 2, None, None),))},
    "exact products on a CPU": {"runtime": settings(jax_default_matmul_precision="highest")},
}  # fmt: skip


@pytest.mark.parametrize("changed", WELL_TOO.values(), ids=WELL_TOO)
def test_nothing_to_mend(changed):
    found = replace(WELL, **changed)
    assert findings(found) == ()
    assert page(found, ()).endswith("What to mend\n  nothing to mend")


def test_faults_come_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = replace(
        WELL,
        packages=replace(PACKAGES, outdated=True, folder="/src"),
        rates=(Rate("copy", "GB/s", "1 MiB", 9, error="full"),),
    )
    advice = findings(found)
    assert [one.fault for one in advice] == [True, False]
    end = page(found, advice).partition("What to mend\n")[2]
    assert end == (
        "  1 fault, 1 hint\n\n"
        "  FAULT  copy: fails on the cpu\n"
        "         full\n"
        "         -> end what else uses its memory, or mend the other findings\n\n"
        "  hint  the installed metadata are older than pyproject.toml\n"
        "        pip checks the requirements, and installs the extras, of the time of the "
        "installation\n"
        "        -> pip install -e '/src'"
    )
    assert "  copy  failed  1 MiB: full\n" in page(found, advice)
    assert content(found, advice)["broken"] is True
    assert content(found, advice[1:])["broken"] is False


PAGE = """\
jaxaccel 0.1.0

Machine
  Python      3.12.1 (CPython), /bin/python
  system      Linux 6.1, glibc 2.36
  processor   Fast One (x86_64)
  cores       8 of 8 for this process
  extensions  avx2; without amx_int8
  memory      8.0 GiB, 4.0 GiB free
  huge pages  always
  NVIDIA GPU  none found

Packages
  jaxaccel  0.1.0
  jax       0.11.2  within >=0.10, <0.12
  jaxlib    0.11.2  within >=0.11.2, <=0.11.2

  cuda  absent: jax-cuda13-plugin (pip install 'jaxaccel[cuda]')

Devices
  cpu        1 x cpu, the machine's memory
  processes  1, this is number 0

Settings
  jax_enable_x64                False
  jax_default_matmul_precision  not set
  jax_platforms                 not set
  XLA_FLAGS                     not set
  GLIBC_TUNABLES                not set
  GPU memory                    no GPU: does not apply

Kept on disk
  compiled programs     on: /cache, 3 entries, 2.0 KiB, programs of at least 1 s to compile
  times of jx.autotune  /cache/autotune-1.json: 12 rows, 1.0 KiB; 2 files for other machines,
                        versions or settings, 4.0 KiB

Reached by the default device
  float32 product  123 GFLOP/s  99.5 to 1,200, 1,024 x 1,024
  Median of 9 rounds, with quartiles; through XLA, random numbers.

What to mend
  nothing to mend"""


def test_the_page(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert page(WELL, ()) == PAGE


MEMORY = {
    "": ".75 of each GPU is taken when JAX starts",
    "XLA_PYTHON_CLIENT_MEM_FRACTION=.4": ".4 of each GPU is taken when JAX starts",
    "XLA_CLIENT_MEM_FRACTION=.3": ".3 of each GPU is taken when JAX starts",
    "XLA_PYTHON_CLIENT_PREALLOCATE=false": "taken as it is needed, up to .75 of each GPU",
    "XLA_PYTHON_CLIENT_ALLOCATOR=platform": "each array is allocated and freed by itself",
}


@pytest.mark.parametrize(("variable", "expected"), MEMORY.items())
def test_the_memory_of_a_gpu(variable, expected):
    name, _, value = variable.partition("=")
    found = replace(WELL, runtime=GPU, environment={name: value} if name else {})
    text = " ".join(page(found, ()).split())
    assert f"GPU memory {expected}" in text
    assert "gpu 2 x NVIDIA H200, memory for JAX 100.0 GiB, 1.0 GiB used" in text
    assert "float32 products by TF32" in text


def test_the_page_of_what_does_not_start():
    found = replace(WELL, runtime=Runtime("ImportError: x", imported=False), compiled=None,
                    tuned=None, rates=None)  # fmt: skip
    text = page(found, findings(found))
    assert "Devices\n  JAX  does not start: see below\n" in text
    assert "Kept on disk\n  JAX  does not start: see below\n" in text
    assert "FAULT  JAX does not start\n         ImportError: x\n" in text


def test_this_machine(monkeypatch, capsys):
    """All of it, but what is measured."""
    monkeypatch.setattr("jaxaccel._commands._runtime._may_abort", lambda: False)
    asked = []
    monkeypatch.setattr(
        "jaxaccel._commands._rates.rates", lambda *given: asked.append(given) or (RATE,)
    )
    found = facts(sizes=Sizes((8,), 1 << 12, 0.1, 2, 1e-5))
    assert asked == [(Sizes((8,), 1 << 12, 0.1, 2, 1e-5), False)]
    monkeypatch.setattr("jaxaccel._commands._doctor.facts", lambda *_, **__: found)
    status = doctor(as_json=True, measure=True)
    told = json.loads(capsys.readouterr().out)
    assert told["rates"] == [vars(RATE)]
    assert told["broken"] is bool(status)
    assert told["findings"] == [vars(one) for one in findings(found)]
    assert doctor(as_json=False, measure=True) == status
    text = capsys.readouterr().out
    for title in ("Machine", "Packages", "Devices", "Settings", "Kept on disk", "What to mend"):
        assert f"\n{title}\n" in text
