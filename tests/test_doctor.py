"""What ``doctor`` reads of machines and packages: made-up ones, and these."""

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from jaxaccel._commands import _machine, _packages

X86 = "processor\t: 0\nmodel name\t: Fast One\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.fixture(autouse=True)
def no_program(monkeypatch):
    """No nvidia-smi of the machine's own."""
    monkeypatch.setenv("PATH", "/nowhere")


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_machine(tmp_path):
    put(tmp_path, "proc/cpuinfo", X86 * 2)
    put(tmp_path, "proc/meminfo", "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:  1024 kB\n")
    put(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    found = _machine.machine(tmp_path)
    assert found.processor == "Fast One"
    assert found.extensions == ("avx2", "avx512f", "avx512_vnni")
    assert "amx_int8" in found.lacking
    assert not {"avx2", "avx512f", "avx512_vnni"} & set(found.lacking)
    assert (found.memory, found.free) == (2 << 20, 1 << 20)
    assert found.huge_pages == "madvise"
    assert found.nvidia is None
    assert found.executable == sys.executable


def test_another_architecture(tmp_path):
    put(tmp_path, "proc/cpuinfo", ARM)
    found = _machine.machine(tmp_path)
    assert found.extensions == ("asimd", "asimddp", "i8mm")
    assert "sve" in found.lacking
    assert "avx2" not in found.lacking


@pytest.mark.parametrize("kind", ["nothing", "folders", "nonsense", "unreadable"])
def test_files_that_cannot_be_read(kind, tmp_path, monkeypatch):
    files = ("proc/cpuinfo", "proc/meminfo", "proc/self/cgroup", "proc/driver/nvidia/version",
             "sys/kernel/mm/transparent_hugepage/enabled", "sys/fs/cgroup/cpu.max")  # fmt: skip
    for path in files if kind != "nothing" else ():
        put(tmp_path, path, "")
        if kind == "folders":
            (tmp_path / path).unlink()
            (tmp_path / path).mkdir()
        elif kind == "nonsense":
            (tmp_path / path).write_bytes(b"\xff\x00: \n:::\n0::/\xff\nmax x y z")
    if kind == "unreadable":

        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_text", refused)
        monkeypatch.setattr(Path, "iterdir", refused)
    found = _machine.machine(tmp_path)
    assert (found.extensions, found.lacking, found.memory, found.huge_pages) == (
        None,
        (),
        None,
        None,
    )
    assert found.cores.quota is None
    assert found.nvidia is None
    assert found.processor


QUOTAS = {
    "none": ({}, None),
    "no limit": ({"cpu.max": "max 100000\n"}, None),
    "of its root": ({"cpu.max": "150000 100000\n"}, 1.5),
    "of its own": ({"a/b/cpu.max": "50000 100000\n", "cpu.max": "max 100000\n"}, 0.5),
    "of the one above": ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0),
    "the least": ({"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
    "damaged": ({"a/b/cpu.max": "3 0\n", "a/cpu.max": "x\n", "cpu.max": "1 2 3"}, None),
    "first version": (
        {"cpu/a/b/cpu.cfs_quota_us": "250000\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, 2.5,
    ),
    "first version, no limit": (
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, None,
    ),
    "first version, two in one": (
        {"cpu,cpuacct/cpu.cfs_quota_us": "1000\n", "cpu,cpuacct/cpu.cfs_period_us": "4000\n"}, 0.25,
    ),
    "of memory": (
        {"memory/a/b/cpu.cfs_quota_us": "1\n", "memory/a/b/cpu.cfs_period_us": "1\n"}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_quotas_of_cgroups(files, expected, tmp_path):
    put(tmp_path, "proc/self/cgroup", "9:memory:/a/b\n5:cpu,cpuacct:/a/b\n0::/a/b\n")
    for path, text in files.items():
        put(tmp_path, f"sys/fs/cgroup/{path}", text)
    assert _machine.cores(tmp_path).quota == expected


def test_cores_of_this_process():
    found = _machine.cores()
    assert 1 <= found.allowed <= found.machine == os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        assert found.allowed == len(os.sched_getaffinity(0))


VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"


def test_an_nvidia_gpu_by_its_files(tmp_path):
    put(tmp_path, "dev/nvidiactl", "")
    assert _machine.nvidia(tmp_path) is None
    put(tmp_path, "dev/nvidia1", "")
    put(tmp_path, "dev/nvidia0", "")
    found = _machine.nvidia(tmp_path)
    assert found == _machine.Nvidia(("unknown", "unknown"), None, "/dev/nvidia0")
    put(tmp_path, "proc/driver/nvidia/version", VERSION)
    put(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA H200\n")
    found = _machine.nvidia(tmp_path)
    assert found == _machine.Nvidia(("NVIDIA H200",), "580.65.06", "/proc/driver/nvidia")


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        ("echo 'NVIDIA H200, 580.65.06'; echo 'NVIDIA L4, 580.65.06'", "nvidia-smi"),
        ("echo 'it has failed, mend it'; exit 9", "/dev/nvidia0"),
        ("echo 'No devices were found'", "/dev/nvidia0"),
        ("exec sleep 60", "/dev/nvidia0"),
    ],
)
def test_an_nvidia_gpu_by_its_program(script, seen, tmp_path, monkeypatch):
    put(tmp_path, "bin/nvidia-smi", f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    put(tmp_path, "dev/nvidia0", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(_machine, "_PATIENCE", 0.3)
    found = _machine.nvidia(tmp_path)
    assert found is not None
    assert found.seen == seen
    if seen == "nvidia-smi":
        assert (found.names, found.driver) == (("NVIDIA H200", "NVIDIA L4"), "580.65.06")


NUMBERS = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda n: ".".join(map(str, n)))
SIGNS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])


@given(NUMBERS, st.lists(st.tuples(SIGNS, NUMBERS), max_size=3))
def test_versions_against_packaging(found, bounds):
    expected = found in SpecifierSet(",".join(map("".join, bounds)))
    assert _packages.fits(found, bounds) == expected


@given(NUMBERS, NUMBERS.filter(lambda n: "." in n), st.sampled_from(["~={}", "=={}.*", "!={}.*"]))
def test_families_of_versions_against_packaging(found, bound, form):
    text = form.format(bound)
    assert _packages.fits(found, [(text[:2], text[2:])]) == (found in SpecifierSet(text))


def test_requirements():
    parse, one = _packages.parse, _packages.Requirement
    assert parse("jax[cuda13]>=0.10,<0.12") == one("jax", ((">=", "0.10"), ("<", "0.12")))
    assert parse("Torch_Pruning (>=1.6)") == one("torch-pruning", ((">=", "1.6"),))
    assert parse("onnx; extra == 'export'") == one("onnx", (), "export")
    assert parse('a~=1.2 ; extra == "b"') == one("a", (("~=", "1.2"),), "b")
    assert parse("a==1.*") == one("a", (("==", "1.*"),))
    assert parse("tomli>=2; python_version < '3.11'") is None
    assert parse("a @ https://example.org/a.whl") is None
    assert not _packages.fits("0.12.0rc1", [("<", "0.12")])
    assert _packages.fits("1.9", [("~=", "1.2")])
    assert _packages.fits("1", [("==", "1.0.0"), ("<=", "1.0")])


def test_packages_of_this_environment():
    found = _packages.packages()
    required = {one.name: one for one in found.required}
    assert {"jax", "flax", "optax", "numpy", "safetensors"} <= required.keys()
    assert required["jax"].installed == metadata.version("jax")
    assert required["jax"].wanted.startswith(">=0.10")
    assert all(one.fits for one in (*found.required, *found.parts))
    assert [one.name for one in found.extras] == ["cuda", "experiments", "export", "engines"]
    assert "jaxlib" in {one.name for one in found.parts}
    engines = found.extras[-1]
    assert [one.name for one in engines.packages] == ["onnxruntime", "openvino"]
    assert all(one.wanted for one in engines.packages)
    assert found.folder == str(Path(__file__).resolve().parents[1])
    assert found.install("cuda") == f"pip install -e '{found.folder}[cuda]'"


def test_packages_of_a_wheel(monkeypatch):
    """By the metadata alone, as where there is no checkout."""
    told = {
        "jaxaccel": ["jax>=9", "absent-one>=3", "jax[cuda13]; extra == 'cuda'"],
        "jax": ["jaxlib==0.0.1", "jax-cuda13-plugin==1; extra == 'cuda13'"],
    }
    monkeypatch.setattr(_packages, "_checkout", lambda: None)
    monkeypatch.setattr(metadata, "requires", told.__getitem__)
    found = _packages.packages()
    assert [(one.name, one.fits) for one in found.required] == [
        ("jax", False),
        ("absent-one", False),
    ]
    assert found.required[1].installed is None
    assert [(one.name, one.fits) for one in found.parts] == [("jaxlib", False)]
    assert [one.name for one in found.extras[0].packages] == ["jax-cuda13-plugin"]
    assert found.extras[0].install == "pip install 'jaxaccel[cuda]'"
    assert found.folder is None
    assert not found.outdated


def test_without_metadata(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(metadata, "requires", missing)
    found = _packages.packages()
    assert found.installed is None
    assert not found.outdated
    assert found.required
    assert not any(one.installed for one in found.required)


def test_metadata_older_than_the_checkout(monkeypatch):
    ours = ["jax>=0.10,<0.12"]
    monkeypatch.setattr(metadata, "requires", lambda name: ours if name == "jaxaccel" else [])
    assert _packages.packages().outdated
