"""Artefacts that are made to harm: refused by name, nothing run, little read."""

import json
import os
import pickle
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxaccel as jx
from jaxaccel.export._files import _hash_but_last
from tests.artefacts import DENSE, IMAGES, dense, part, peak, refused, replaced, resealed

PARTS = ("manifest.json", "function", "parameters")


@pytest.fixture
def folder(tmp_path):
    jx.export.save(tmp_path / "net", dense, DENSE, IMAGES)
    return tmp_path / "net"


SECRET = b"nothing that an artefact may read"
TRAVERSAL = ["../secret", "/etc/passwd", "..", "a/b", "\x00" * 64, "g" * 64, "A" * 64, "0" * 63]


@pytest.mark.parametrize("digest", [*TRAVERSAL, "../" + "0" * 61, None, 7, ["0" * 64]])
def test_path_traversal(folder, digest):
    (folder.parent / "secret").write_bytes(SECRET)
    (folder.parent / "secret.safetensors").write_bytes(SECRET)
    resealed(folder, lambda m: m["files"]["parameters"].update(sha256=digest))
    message = refused(folder, "manifest.json: damaged: ValueError: .* is not a (SHA-256|text)$")
    assert "may read" not in message


@pytest.mark.parametrize("key", ["name", "path", "file"])
def test_files_have_no_names_of_their_own(folder, key):
    resealed(folder, lambda m: m["files"]["parameters"].update({key: "../../secret"}))
    refused(folder, "manifest.json: damaged: TypeError")


HUGE = [2**31, 2**40, 2**62, 2**200]


@pytest.mark.parametrize("size", HUGE)
def test_a_huge_shape_in_the_manifest(folder, size):
    resealed(folder, lambda m: m["arrays"]["a/kernel"].update(shape=[size, 5]))
    most = peak(lambda: refused(folder, "manifest.json: damaged: ValueError: arrays of "))
    assert most < 2e6


@pytest.mark.parametrize("size", HUGE)
def test_a_huge_length_in_the_manifest(folder, size):
    resealed(folder, lambda m: m["files"]["parameters"].update(bytes=size))
    assert peak(lambda: refused(folder, "bytes, expected")) < 2e6


def tensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


SAFETENSORS = {
    "huge shape": (tensors({"a/kernel": {"dtype": "F32", "shape": [2**40, 5],
                                         "data_offsets": [0, 80]}}, bytes(80)), "no safetensors"),
    "huge header": (struct.pack("<Q", 2**62) + bytes(80), "no safetensors"),
    "huge offsets": (tensors({"a/kernel": {"dtype": "F32", "shape": [3, 5],
                                           "data_offsets": [0, 2**60]}}, bytes(80)),
                     "no safetensors"),
    "not JSON": (tensors(b"{" * 60, bytes(80)), "no safetensors"),
    "other names": (tensors({"b": {"dtype": "F32", "shape": [20], "data_offsets": [0, 80]}},
                            bytes(80)), "in the manifest"),
    "another shape": (tensors({"a/kernel": {"dtype": "F32", "shape": [5, 3],
                                            "data_offsets": [0, 60]},
                               "a/bias": {"dtype": "F32", "shape": [5],
                                          "data_offsets": [60, 80]}}, bytes(80)),
                      r"a/kernel: F32\[5, 3\], not float32\[3,5\]"),
    "another dtype": (tensors({"a/kernel": {"dtype": "F64", "shape": [3, 5],
                                            "data_offsets": [0, 120]},
                               "a/bias": {"dtype": "F32", "shape": [5],
                                          "data_offsets": [120, 140]}}, bytes(140)),
                      r"a/kernel: F64\[3, 5\], not float32\[3,5\]"),
    "empty": (bytes(80), "no safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_parameters_that_are_none(folder, name):
    content, message = SAFETENSORS[name]
    replaced(folder, "parameters", content)
    assert peak(lambda: refused(folder, f"safetensors: .*{message}")) < 2e6


class Trap:
    """Writes a file if it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "executed")


@pytest.mark.parametrize("name", PARTS)
def test_a_pickle_in_the_place_of_each_file(folder, name, tmp_path):
    trap = tmp_path / "executed"
    content = pickle.dumps([Trap(trap), bytes(200)])
    if name == "manifest.json":
        (folder / name).write_bytes(content)
    else:
        replaced(folder, name, content)
    refused(folder, "not a manifest|no safetensors|cannot be read by jax")
    assert not trap.exists()
    pickle.loads(content)
    assert trap.exists()


def test_a_pickle_in_the_place_of_it_all(tmp_path):
    trap = tmp_path / "executed"
    (tmp_path / "net.zip").write_bytes(pickle.dumps([Trap(trap)]))
    refused(tmp_path / "net.zip", "not an artefact")
    assert not trap.exists()


def exported(fn, **options):
    return jax.export.export(jax.jit(fn), platforms=("cpu", "cuda"), **options)


def flat(arrays, arguments):
    a, (x,) = arrays, arguments
    return [jnp.tanh(x @ a["a/kernel"] + a["a/bias"][None])]


(BATCH,) = jax.export.symbolic_shape("batch")
AVALS = (
    {name: jax.ShapeDtypeStruct(shape, "float32")
     for name, shape in {"a/kernel": (3, 5), "a/bias": (5,)}.items()},
    [jax.ShapeDtypeStruct((BATCH, 3), "float32")],
)  # fmt: skip


def test_programs_of_others(folder):
    """With the same signature one is taken; with another it is refused."""
    replaced(folder, "function", bytes(exported(flat)(*AVALS).serialize()))
    fn, params = jx.export.load(folder)
    np.testing.assert_allclose(fn(params, IMAGES)["y"], dense(DENSE, IMAGES)["y"], rtol=1e-6)
    other = exported(lambda arrays, arguments: [arguments[0]])(*AVALS)
    replaced(folder, "function", bytes(other.serialize()))
    refused(folder, "its inputs and outputs are not those of the manifest$")


def test_a_gradient_beside_the_program(folder):
    """Which could call anything."""
    content = bytes(exported(flat)(*AVALS).serialize(vjp_order=1))
    replaced(folder, "function", content)
    refused(folder, "has more than a function in it: a gradient, or side effects$")


@pytest.mark.parametrize(
    "name", ["Xla_Evil", "xla_ffi_python_cpu_callback", "lapack_", "Sharding2"]
)
def test_a_program_that_calls_what_is_not_known(folder, name):
    def evil(arrays, arguments):
        (y,) = flat(arrays, arguments)
        return [jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(y.shape, y.dtype))(y)]

    allowed = [jax.export.DisabledSafetyCheck.custom_call(name)]
    made = jax.export.export(jax.jit(evil), platforms=("cpu", "cuda"), disabled_checks=allowed)
    replaced(folder, "function", bytes(made(*AVALS).serialize()))
    refused(folder, f"calls '{name}', which is none of JAX's stable operations$")


def test_versions(folder):
    def newer(m):
        m["version"] = 2
        m["made_with"]["jaxaccel"] = "9.0"

    whole = (folder / "manifest.json").read_text()
    resealed(folder, newer)
    refused(folder, "manifest.json: version 2 of the format, made with jaxaccel 9.0; this one "
            "reads version 1: install that version$")  # fmt: skip
    (folder / "manifest.json").write_text(whole)
    resealed(folder, lambda m: m.update(calling_convention=99))
    refused(
        folder,
        rf"made with jax {jax.__version__}, of calling convention 99; jax "
        rf"{jax.__version__} reads \d+ to \d+: install another jax or save it anew$",
    )
    (folder / "manifest.json").write_text(whole)
    resealed(folder, lambda m: m.update(format="something else"))
    refused(folder, "manifest.json: not a manifest: it has no format 'jaxaccel.export'$")


TEXTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "1",
    "deep": "[" * 100_000,
    "deep in a manifest": '{"format": "jaxaccel.export", "version": 1, "x": ' + "[" * 100_000,
    "NaN": '{"format": "jaxaccel.export", "version": 1, "x": NaN}',
    "huge number": '{"format": "jaxaccel.export", "version": 1' + "0" * 10_000 + "}",
    "twice": '{"format": "jaxaccel.export", "version": 1, "version": 1}',
    "not UTF-8": b"\xff\xfe{}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_manifests_that_are_none(folder, name):
    text = TEXTS[name]
    (folder / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, "manifest.json: (not a manifest|damaged|version)")


def test_a_manifest_without_end(folder):
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    most = peak(lambda: refused(folder, "1,099,511,627,776 bytes; a manifest has at most"))
    assert most < 2e6


NODES = st.sampled_from(
    [None, True, -1, 2**70, 0.5, "", "a/bias", "float32", [], {}, [[]], [[[], None]],
     {"array": "a/bias"}, {"array": 3}, {"dict": [["a", None]]}, {"dict": {"a": None}},
     {"list": 3}, {"tuple": [None]}, {"array": "a/bias", "key": "nothing"},
     {"array": "a/kernel", "key": "rbg"}, {"other": []},
     {"qtensor": {"values": "a/kernel", "scale": "a/bias", "dtype": "float32", "packing": None}},
     {"qtensor": {"values": "a/kernel", "scale": "a/bias", "dtype": 7, "packing": [1]}},
     {"qtensor": {}}]
)  # fmt: skip


@pytest.mark.parametrize(
    "node",
    [3, [], {}, {"other": []}, {"array": 3}, {"array": "a/bias", "key": 3}, {"list": 3},
     {"dict": [["a"]]}, {"dict": [[None, None]]}, {"dict": [[1.5, None]]}, {"tuple": [[]]},
     {"qtensor": {}}, {"qtensor": {"values": "a/kernel", "scale": "a/bias", "dtype": "float32",
                                   "packing": {"shape": [1], "axes": ["0"], "group": 1}}}],
    ids=str,
)  # fmt: skip
def test_what_is_no_tree(folder, node):
    resealed(folder, lambda m: m.update(params=node))
    refused(folder, "manifest.json: damaged: ValueError: .* is no (node of a tree|packing)$")


def places(node, path=()):
    """Of every value in a nest of JSON."""
    yield path
    pairs = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, child in pairs:
        yield from places(child, (*path, key))


def loaded_or_named(folder):
    try:
        return jx.export.load(folder)[0]
    except ValueError as error:
        if str(folder) not in str(error):
            raise AssertionError("no file is named") from error
        raise


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_manifests_that_lie(folder, data):
    """Whatever they say, with the right hash: an error that names the file, or the function."""
    whole = (folder / "manifest.json").read_text()
    content = json.loads(whole)
    del content["sha256"]
    path = data.draw(st.sampled_from([p for p in places(content) if p]))

    def change(m):
        for key in path[:-1]:
            m = m[key]
        m[path[-1]] = data.draw(NODES)

    resealed(folder, change)
    with suppress(ValueError):
        assert callable(loaded_or_named(folder))
    (folder / "manifest.json").write_text(whole)


def zipped(path, folder, **options):
    """A zip with a seal that fits."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
        archive.comment = bytes(64)
    sealed(path)


def sealed(path):
    with path.open("r+b") as file:
        seal = _hash_but_last(file)
        file.seek(-64, os.SEEK_END)
        file.write(seal.encode())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.integers(1, 255))
def test_a_zip_that_lies(folder, tmp_path, place, flip):
    """In its directory, which is at its end; the seal fits."""
    path = tmp_path / "lies.zip"
    zipped(path, folder)
    content = bytearray(path.read_bytes())
    content[-65 - place] ^= flip
    path.write_bytes(content)
    sealed(path)
    with suppress(ValueError):
        assert callable(loaded_or_named(path))


def test_a_compressed_zip(folder, tmp_path):
    replaced(folder, "parameters", bytes(10**7))  # a thousandth of it when compressed
    zipped(tmp_path / "bomb.zip", folder, compression=zipfile.ZIP_DEFLATED)
    most = peak(lambda: refused(tmp_path / "bomb.zip", "compressed, which artefacts are not"))
    assert most < 2e6


def test_a_zip_of_a_folder(folder, tmp_path):
    """As it is, it is an artefact; with one file more it is one too, and that is not read."""
    (folder / "more").write_text("more")
    zipped(tmp_path / "net.zip", folder)
    fn, params = jx.export.load(tmp_path / "net.zip")
    assert fn(params, IMAGES)["y"].shape == (4, 5)
    part(folder, "parameters").unlink()
    zipped(tmp_path / "less.zip", folder)
    refused(tmp_path / "less.zip", r"less.zip: parameters-\w+.safetensors: missing; ")
