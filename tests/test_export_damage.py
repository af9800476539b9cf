"""Artefacts that are damaged: refused by name."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxaccel as jx
from tests.artefacts import DENSE, IMAGES, dense, part, refused

PARTS = ("manifest.json", "function", "parameters")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for name in ("net", "net.zip"):
        jx.export.save(folder / name, dense, DENSE, IMAGES)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good / "net", tmp_path / "net"))


@pytest.fixture
def archive(good, tmp_path):
    return Path(shutil.copy(good / "net.zip", tmp_path / "net.zip"))


def test_the_good_one(good):
    for name in ("net", "net.zip"):
        fn, params = jx.export.load(good / name)
        np.testing.assert_array_equal(fn(params, IMAGES)["y"], jax.jit(dense)(DENSE, IMAGES)["y"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PARTS), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_byte_in_each_file(folder, name, place, flip):
    file = part(folder, name)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= flip
    file.write_bytes(damaged)
    message = refused(folder, "damaged|not a manifest|version .* of the format")
    assert str(file) in message
    file.write_bytes(whole)
    jx.export.load(folder)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_byte_in_the_zip(archive, place, flip):
    whole = archive.read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= flip
    archive.write_bytes(damaged)
    refused(archive, "damaged|not an artefact")
    archive.write_bytes(whole)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_truncated(folder, name, left):
    file = part(folder, name)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    message = refused(folder, "bytes, expected|not a manifest|damaged")
    assert str(file) in message


@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_truncated_zip(archive, left):
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    refused(archive, "not an artefact|damaged")


@pytest.mark.parametrize("name", PARTS)
def test_longer(folder, name):
    with part(folder, name).open("ab") as file:
        file.write(b" ")
    assert str(part(folder, name)) in refused(folder, "bytes, expected|not a manifest|damaged")


@pytest.mark.parametrize("name", PARTS)
def test_missing(folder, name):
    file = part(folder, name)
    file.unlink()
    refused(folder, f"{file.name}: missing; copy or save it anew$")


def test_nothing_there(tmp_path):
    for read in (jx.export.load, jx.export.params, jx.export.manifest):
        with pytest.raises(FileNotFoundError, match=r"none: no such file or folder$"):
            read(tmp_path / "none")
    refused(tmp_path, r"manifest.json: missing; copy or save it anew$")
    (tmp_path / "text").write_text("no zip")
    refused(tmp_path / "text", "not an artefact: neither a folder nor a zip$")


def test_what_the_damage_does_not_touch(folder):
    """Parameters and the manifest are read alone."""
    part(folder, "function").write_bytes(b"")
    np.testing.assert_array_equal(jx.export.params(folder)["a"]["bias"], DENSE["a"]["bias"])
    assert jx.export.manifest(folder).function == "dense"
    part(folder, "parameters").write_bytes(b"")
    with pytest.raises(ValueError, match="expected"):
        jx.export.params(folder)
    assert jx.export.manifest(folder).function == "dense"


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_files_of_another_kind(folder, name, kind, tmp_path):
    file = part(folder, name)
    moved = file.rename(tmp_path / "elsewhere")
    {"link": lambda: file.symlink_to(moved), "folder": file.mkdir,
     "pipe": lambda: os.mkfifo(file)}[kind]()  # fmt: skip
    refused(folder, f"{file.name}: is no regular file; copy or save it anew$")


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not an artefact")
