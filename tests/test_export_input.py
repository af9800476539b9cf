"""What cannot be saved, or not there: refused by name, and nothing is written."""

import os
import zipfile
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from tests.artefacts import FORMS, W, X, identical, net, saved


@pytest.fixture(params=FORMS)
def path(tmp_path, request):
    return tmp_path / request.param


def sharded(params, x):
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None))
    return jax.lax.with_sharding_constraint(net(params, x), spread)


def calls_back(params, x):
    return jax.pure_callback(np.negative, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


Pair = namedtuple("Pair", "a b")
BAD = {
    "no array": (TypeError, "w: expected an array, got str; .*", lambda path: saved(
        path, net, {"w": "text"})),
    "metadata": (ValueError, "__metadata__: is what safetensors calls something else; rename it",
                 lambda path: saved(path, lambda p, x: x, {"__metadata__": W})),
    "no numbers": (TypeError, "w: has no numbers yet; save outside of jax.jit, arrays",
                   lambda path: saved(path, net, {"w": jax.ShapeDtypeStruct((3, 2), "float32")})),
    "int4": (TypeError, "w: safetensors has no int4; cast it, int4 to int8 for example",
             lambda path: saved(path, lambda p, x: x, {"w": jnp.ones(2, "int4")})),
    "slash": (ValueError, "a/b: the path of two leaves; rename a key that has a slash",
              lambda path: saved(path, net, {"a/b": W, "a": {"b": W}})),
    "key": (TypeError, r"params: the key \(1, 2\) is neither a string nor a whole number; rename "
            "it", lambda path: saved(path, net, {(1, 2): W})),
    "argument": (TypeError, "args/0: a Pair; what goes in and comes out may be dicts, lists, "
                 "tuples and arrays: wrap fn so that it takes and returns these",
                 lambda path: saved(path, lambda p, x: x.a, None, Pair(X, X))),
    "result": (TypeError, "result: a Pair; .*", lambda path: saved(path, lambda p, x: Pair(x, x))),
    "axis": (ValueError, r"args/0: of shape \(4, 3\), has no axis 2 for the batch; pass batch_axes "
             "with None for it, as in_axes of jax.vmap", lambda path: saved(path, batch_axes=2)),
    "axes": (ValueError, r"batch_axes=\(0, 1\) does not fit the arguments: .*",
             lambda path: saved(path, batch_axes=(0, 1))),
    "sizes": (ValueError, r"batch_axes=0: the arguments differ in their batch size \(args/0 4, "
              r"args/1 5\); pass None for those without a batch, as in_axes of jax.vmap",
              lambda path: saved(path, lambda p, x, y: x, None, X, jnp.ones(5))),
    "batch": (ValueError, "fn works for the example but not for every batch size: .*; pass "
              "batch_axes=None to save it for the sizes of the example alone",
              lambda path: saved(path, lambda p, x: x.reshape(2, 6))),
    "axis's kind": (TypeError, "batch_axes='0': '0' is no axis of args/0",
                    lambda path: saved(path, batch_axes="0")),
    "for no size": (NotImplementedError, "multi-platform lowering for python_callback",
                    lambda path: saved(path, calls_back)),
    "own mistake": (TypeError, "dot_general requires .*", lambda path: saved(
        path, net, None, jnp.ones((4, 2)))),
    "devices": (ValueError, "fn: is laid out over 8 devices; an artefact is for one: save the "
                "function without its shardings", lambda path: saved(path, sharded)),
    "platform": (ValueError, r"platforms=\('gpu',\): 'gpu' must be one of \('cpu', 'cuda', "
                 r"'rocm', 'tpu'\)", lambda path: saved(path, platforms=("gpu",))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(path, name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=f"^{message}(\n|$)"):
        call(path)
    assert not list(path.parent.iterdir())


def test_inside_of_jit(path):
    with pytest.raises(TypeError, match="has no numbers yet"):
        jax.jit(lambda w: jx.export.save(path, net, {"w": w}, X))(W)


def test_what_stands_there_already(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.zip").mkdir()
    for name in ("full/notes.txt", "other/manifest.json", "empty/.DS_Store"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo", "mine")
    (tmp_path / "text.zip").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, what in {
        "file": "is a file; name a folder, or a file that ends in .zip",
        "folder.zip": "is a folder; name a file, or a folder without .zip",
        "full": "holds other files; name an empty or a new folder",
        "other": "holds other files; name an empty or a new folder",
        "photos.zip": "is no artefact; remove it, or name another file",
        "text.zip": "is no artefact; remove it, or name another file",
    }.items():
        with pytest.raises(FileExistsError, match=f"{name}: {what}$"):
            saved(tmp_path / name)
    for name in ("empty", "NET.ZIP"):
        saved(tmp_path / name)
        saved(tmp_path / name)
    assert (tmp_path / "NET.ZIP").is_file()
    assert {path: path.read_bytes() for path in before} == before


def test_links_and_rights(tmp_path):
    for form in FORMS:
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        saved(tmp_path / "elsewhere" / form)
        (tmp_path / form).symlink_to(tmp_path / "elsewhere" / form)
        saved(tmp_path / form, net, {"w": W + 1}, platforms="cpu")
        assert (tmp_path / form).is_symlink()
        identical(jx.export.params(tmp_path / "elsewhere" / form), {"w": W + 1})
    (tmp_path / "text").write_text("with the rights of any file")
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_it_failed_before_the_manifest(tmp_path, monkeypatch):
    """Whatever it is: what was there stays."""
    path = tmp_path / "net"
    saved(path)
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}
    replace = os.replace

    def full(source, target):
        if Path(target).name == "manifest.json":
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        saved(path, net, {"w": W + 1})
    fn, params = jx.export.load(path)
    identical(fn(params, X), X @ W)
    assert {name: (path / name).read_bytes() for name in before} == before
    assert os.listdir(tmp_path) == ["net"]
