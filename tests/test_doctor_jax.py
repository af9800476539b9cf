"""What ``doctor`` finds out of JAX: its settings, its caches, and how fast it is."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxaccel import _choices
from jaxaccel._commands import _caches, _rates, _runtime

TINY = _rates.Sizes((8, 16, 32), 1 << 12, 0.1, 3, 1e-5)


def test_jax_as_it_is(monkeypatch):
    monkeypatch.setenv("JAX_MADE_UP", "1")
    monkeypatch.setenv("UNRELATED", "secret")
    assert _runtime.environment()["JAX_MADE_UP"] == "1"
    assert "UNRELATED" not in _runtime.environment()
    with jax.debug_nans(True):
        found = _runtime.runtime(probe=False)
    assert found.settings is not None
    assert found.settings["jax_debug_nans"] == "True"
    assert found.settings["jax_enable_x64"] == "False"
    assert "jax_debug_infs" not in found.settings
    assert found.platform == jax.default_backend()
    assert sum(one.count for one in found.devices) == jax.device_count()
    assert (found.process, found.processes, found.error) == (0, 1, None)


def test_what_jax_logs_is_kept_for_its_place(monkeypatch, capfd):
    def devices():
        jax_logger.warning("a GPU may\nbe there")
        raise AssertionError

    jax_logger = logging.getLogger("jax.some.module")
    handlers = list(logging.getLogger("jax").handlers)
    monkeypatch.setattr(jax, "devices", devices)
    found = _runtime.runtime(probe=False)
    assert found.messages == ("a GPU may be there",)
    assert (found.error, found.imported, found.platform) == ("AssertionError", True, None)
    assert logging.getLogger("jax").handlers == handlers
    assert capfd.readouterr() == ("", "")


def compile_cache(folder, **settings):
    values = {"jax_compilation_cache_dir": folder, "jax_enable_compilation_cache": True} | settings
    with pytest.MonkeyPatch.context() as patch:
        config = type("Config", (), {"jax_persistent_cache_min_compile_time_secs": 0.5, **values})
        patch.setattr(jax, "config", config)
        return _caches.compiled()


def test_a_compilation_cache(tmp_path):
    for name, size in (("jit_f-1-cache", 10), ("jit_f-1-atime", 8), ("jit_g-2-cache", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    found = compile_cache(str(tmp_path))
    assert found == _caches.Compiled(True, str(tmp_path), False, True, 2, 15, 0.5)
    assert found.on
    assert not compile_cache(str(tmp_path), jax_enable_compilation_cache=False).on
    for nothing in (None, ""):
        found = compile_cache(nothing)
        assert found == _caches.Compiled(True, None, False, None, None, None, 0.5)
        assert not found.on
    found = compile_cache("gs://bucket/folder")
    assert found == _caches.Compiled(True, "gs://bucket/folder", True, None, None, None, 0.5)


def test_a_compilation_cache_that_is_not_there(tmp_path):
    found = compile_cache(str(tmp_path / "new" / "folder"))
    assert (found.writable, found.entries, found.bytes) == (True, 0, 0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    found = compile_cache(str(tmp_path / "file"))
    assert (found.writable, found.entries) == (False, None)
    assert compile_cache(str(tmp_path / "file" / "below")).writable is False


def test_entries_are_named_as_jax_names_them(tmp_path):
    code = (
        "import jax; jax.jit(lambda x: x + 1)(1.0); from jaxaccel._commands import _caches; "
        "found = _caches.compiled(); print(found.entries, found.bytes, found.least_seconds)"
    )
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "kept"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    entries, size, least = found.stdout.split()
    assert (int(entries), float(least)) == (1, 0)
    assert int(size) > 100


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXACCEL_CACHE", str(tmp_path / "jaxaccel"))
    return tmp_path / "jaxaccel"


def test_what_autotune_kept(folder):
    found = _caches.tuned()
    assert (found.rows, found.bytes, found.others, found.writable) == (None, None, 0, True)
    assert not folder.exists()
    choices = _choices.Choices()
    choices.set("a", {"form": "xla"})
    choices.set("b", {"form": "sums"})
    choices.save()
    (folder / "autotune-0123.json").write_text("{}")
    (folder / "xla-0123").mkdir()
    found = _caches.tuned()
    assert found.path == str(choices.path)
    assert (found.rows, found.bytes) == (2, choices.path.stat().st_size)
    assert (found.others, found.other_bytes, found.error) == (1, 2, None)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}', '{"rows": [1]}', "[" * 100_000])
def test_what_autotune_kept_is_damaged(content, folder):
    path = _choices.Choices().path
    path.parent.mkdir(parents=True)
    path.write_text(content)
    found = _caches.tuned()
    assert found.rows is None
    assert found.bytes == len(content)
    assert found.error is not None


def test_what_autotune_kept_cannot_be_read_or_written(folder):
    path = _choices.Choices().path
    path.mkdir(parents=True)
    found = _caches.tuned()
    assert found.error is not None
    assert found.error.startswith("IsADirectoryError")
    path.rmdir()
    folder.rmdir()
    folder.write_text("")
    found = _caches.tuned()
    assert (found.writable, found.rows, found.error) == (False, None, None)


def test_a_folder_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    before = tmp_path.stat()
    assert _caches.writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    assert stat.S_IMODE(tmp_path.stat().st_mode) == stat.S_IMODE(before.st_mode)
    if Path("/proc/self").exists():  # where root may write, by its modes, and cannot
        assert not _caches.writable(Path("/proc/made_up"))


def test_rates_on_small_operands():
    with jax.transfer_guard("disallow"):  # a setting that does not hinder
        found = _rates.rates(TINY._replace(sides=(8,)), show=False)
    assert [(one.what, one.unit) for one in found] == [
        ("float32 product", "GFLOP/s"),
        ("bfloat16 product", "GFLOP/s"),
        ("int8 product, int32 sums", "GOP/s"),
        ("copy", "GB/s"),
    ]
    for one in found:
        assert one.error is None
        assert one.low is not None
        assert one.high is not None
        assert one.median is not None
        assert 0 < one.low <= one.median <= one.high
    assert found[-1].operands == "0 MiB"


def test_products_are_of_what_they_say():
    for dtype, result in (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int32")):
        operand = _rates._square(8, dtype)
        assert operand.dtype == dtype
        assert jnp.unique(operand).size > 8
        assert _rates._multiply(operand).dtype == result


def test_the_arithmetic_of_rates(monkeypatch):
    """16 is tried, for 8 took a tenth of what may be; 32 is not, for it would take too long."""
    asked = []

    def samples(call, operand, sizes):
        asked.append((operand.shape[0], sizes.rounds))
        return (0.01 if operand.shape[0] == 8 else 0.02, 0.04, 0.05)[: sizes.rounds]

    monkeypatch.setattr(_rates, "_samples", samples)
    found = _rates.product("float32", TINY)
    assert asked == [(8, 2), (16, 2), (16, 3)]
    assert found.operands == "16 x 16"
    assert found.median == pytest.approx(2 * 16**3 / 0.04 * 1e-9)
    assert found.low == pytest.approx(2 * 16**3 / 0.045 * 1e-9, rel=0.02)
    assert found.high == pytest.approx(2 * 16**3 / 0.03 * 1e-9, rel=0.2)
    monkeypatch.setattr(_rates, "_samples", lambda *_: (1.0, 0.5, 0.25))
    copied = _rates.copy(TINY)
    assert copied.median == pytest.approx(2 * 4096 / 0.5 * 1e-9)


def test_what_cannot_be_measured(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(_rates, "_samples", full)
    for one in _rates.rates(TINY, show=False):
        assert one.error == "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
        assert one.median is None


def test_sizes_fit_into_memory():
    assert _rates.sizes_for("cpu", None) == _rates.CPU
    assert _rates.sizes_for("gpu", 100 << 30) == _rates.GPU
    assert _rates.GPU.sides[0] > _rates.CPU.sides[0]
    small = _rates.sizes_for("cpu", 1 << 28)
    assert small.sides == (256, 512, 1024)
    assert small.copied == 1 << 25
    assert _rates.sizes_for("gpu", 1 << 20).sides == (256,)
