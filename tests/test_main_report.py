"""``python -m jaxaccel report``: what it reads of an artefact, and that it runs nothing of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxaccel as jx
from jaxaccel.__main__ import main
from jaxaccel._commands import _report
from tests.artefacts import DENSE, IMAGES, dense, part, resealed
from tests.models import normal

X = normal(0, 4, 6)


def net(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


WEIGHTS = {"a": {"kernel": normal(1, 6, 8)}, "b": {"kernel": normal(2, 8, 3)}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network pruned and on integers, its plan and parameters, saved as folder and zip."""
    folder = tmp_path_factory.mktemp("made")
    plan = jx.prune.plan(net, WEIGHTS, X, ratio=0.25)
    fn, params = jx.quantize.int8(plan.rewrite(net), plan.shrink(WEIGHTS), [(X,)])
    for name in ("net", "net.zip"):
        jx.export.save(folder / name, jx.autotune(fn), params, X)
    return folder, plan, params


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made[0] / "net", tmp_path / "net"))


def told(capsys, *arguments) -> tuple[int, Any, str]:
    """The status, what was printed as JSON, and the errors."""
    status = main(["report", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def printed(capsys, *arguments):
    status = main(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("name", ["net", "net.zip"])
def test_what_it_tells(name, made, capsys):
    where, plan, params = made
    status, found, err = told(capsys, where / name)
    assert (status, err) == (0, "")
    assert found["whole"] is True
    assert found["kind"] == {"net": "folder", "net.zip": "zip"}[name]
    assert found["format"] == "jaxaccel.export"
    assert found["made_with"]["jax"] == jax.__version__
    assert found["arguments"] == {"args/0": {"dtype": "float32", "shape": ["batch", 6]}}
    assert found["results"] == {"result": {"dtype": "float32", "shape": ["batch", 3]}}
    assert found["batch"] == ["batch"]
    leaves = jax.tree.leaves(params)
    assert found["parameters"]["numbers"] == sum(x.size for x in leaves)
    assert found["parameters"]["bytes"] == sum(x.nbytes for x in leaves)
    integers = [x for x in leaves if x.dtype == jnp.int8]
    assert found["parameters"]["dtypes"]["int8"] == {
        "numbers": sum(x.size for x in integers), "bytes": sum(x.nbytes for x in integers),
    }  # fmt: skip
    assert len(found["parameters"]["arrays"]) == len(leaves)
    prune, int8, autotune = found["recipe"]
    assert prune["numbers"] == {
        "channels": [8, 6], "parameters": list(plan.parameters), "macs": list(plan.macs),
    }  # fmt: skip
    assert int8["numbers"] == {"layers": 2, "left": 0, "activations": "static"}
    assert autotune["transform"] == "autotune"
    if name == "net":
        sizes = {file.name: file.stat().st_size for file in (where / name).iterdir()}
        assert {one["name"]: one["bytes"] for one in found["files"]} == sizes
        assert found["bytes"] == sum(sizes.values())
    else:
        assert found["bytes"] == (where / name).stat().st_size
        assert found["files"][0]["bytes"] == (where / "net" / "manifest.json").stat().st_size


def test_the_page(made, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    where, plan, _ = made
    status, out, err = printed(capsys, where / "net")
    assert (status, err) == (0, "")
    assert f"  path       {where / 'net'} (folder, " in out
    assert "  argument  args/0  float32[batch,6]\n" in out
    assert "  for every size of batch\n" in out
    words = " ".join(out.split())
    assert "1. prune 6 of 8 channels kept (75.0%), in 1 of 1 group; parameters 72 -> 54" in words
    assert "(75.0% left); multiply-accumulates of the example" in words
    assert "2. quantize.int8 2 layers on integers, 0 left in floating point; activations" in words
    assert "3. autotune operations in the form that the rules choose for each platform" in words
    rows = [line.split() for line in out.splitlines()]
    assert ["a/kernel/values", "int8", "6x6", "36", "36"] in [row[:5] for row in rows]
    assert ["int8", "54", "54"] in [row[:3] for row in rows]
    assert "net: all hashes hold; they tell of damage, not of who wrote it\n" in out
    assert "Latency" not in out
    assert not plan.unmasked


def test_nothing_of_it_is_run(made, capsys, monkeypatch):
    def run(*_, **__):
        raise AssertionError

    for module, name in ((jax.export, "deserialize"), (_report, "load"), (_report, "compare")):
        monkeypatch.setattr(module, name, run)
    assert printed(capsys, made[0] / "net", "--all")[0] == 0
    status, _, err = printed(capsys, made[0] / "net", "--time")
    assert status == 1
    assert err.endswith("cannot be timed: AssertionError\n")


@pytest.mark.parametrize("name", ["function", "parameters"])
@pytest.mark.parametrize("kind", ["flipped", "shorter", "missing", "link"])
def test_a_damaged_file(name, kind, folder, tmp_path, capsys):
    file = part(folder, name)
    content = file.read_bytes()
    file.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif kind != "missing":
        file.write_bytes(content[:-1] + (b"" if kind == "shorter" else bytes([content[-1] ^ 1])))
    status, out, err = printed(capsys, folder)
    assert status == 1
    assert err.startswith(f"python -m jaxaccel report: {file}: ")
    assert err.count("\n") == 1
    assert out.count("DAMAGED") == 1
    assert "all hashes hold" not in out
    assert "\n  1.  prune " in out
    status, found, again = told(capsys, folder, "--time")
    assert (status, found["whole"], found["latencies"]) == (1, False, [])
    assert again == err
    assert [one["error"] is None for one in found["files"]].count(False) == 1


def refused(capsys, path, status, message):
    for more in ([], ["--json"], ["--time"]):
        assert main(["report", str(path), *more]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("python -m jaxaccel report: ")
        assert message in err
        assert err.count("\n") == 1


def test_what_is_no_artefact(made, folder, tmp_path, capsys, monkeypatch):
    refused(capsys, tmp_path / "none", 2, "none: no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(capsys, tmp_path / "empty", 1, "manifest.json: missing")
    (tmp_path / "text").write_text("text")
    refused(capsys, tmp_path / "text", 1, "text: not an artefact: neither a folder nor a zip")
    whole = (made[0] / "net.zip").read_bytes()
    (tmp_path / "net.zip").write_bytes(whole[:100] + b"?" + whole[101:])
    refused(capsys, tmp_path / "net.zip", 1, "net.zip: damaged")
    (folder / "manifest.json").write_text("{}")
    refused(capsys, folder, 1, "not a manifest: it has no format")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_report, "opened", forbidden)
    refused(capsys, folder, 2, f"{folder}: Permission denied")


@pytest.fixture
def quickly(monkeypatch):
    """Two rounds, and the shapes that were asked for."""
    compare, shapes = _report.compare, []

    def two(candidates, *args, show):
        shapes.append([(x.dtype.name, x.shape) for x in jax.tree.leaves(args)])
        return compare(candidates, *args, show=show, rounds=2, min_time=1e-5)

    monkeypatch.setattr(_report, "compare", two)
    return shapes


def test_time(made, quickly, capsys):
    status, found, err = told(capsys, made[0] / "net.zip", "--time", "--batch", "3")
    assert (status, err) == (0, "")
    assert [one["batch"] for one in found["latencies"]] == [1, 3]
    for one in found["latencies"]:
        assert 0 < one["low_ms"] <= one["median_ms"] <= one["high_ms"]
        assert "cpu" in one["device"]


def test_time_of_a_single_size(tmp_path, quickly, capsys):
    jx.export.save(tmp_path / "net", dense, DENSE, IMAGES, batch_axes=None)
    status, out, _ = printed(capsys, tmp_path / "net", "--time", "--batch", "9")
    assert status == 0
    assert "  for these sizes alone\n" in out
    assert "\n  as saved  " in out
    assert quickly == [[("float32", IMAGES.shape)]]


def test_time_of_other_arguments(tmp_path, quickly, capsys):
    """Integers, random keys and trees get what they ask for."""

    def noisy(params, key, batch):
        noise = jax.random.normal(key, batch["x"].shape)
        return params["w"][batch["index"]] * (batch["x"] + noise)

    example = {"x": jnp.ones((4, 2)), "index": jnp.zeros((4,), jnp.int32)}
    axes = (None, {"x": 0, "index": 0})
    params = {"w": jnp.ones((5, 1))}
    jx.export.save(tmp_path / "net", noisy, params, jax.random.key(0), example, batch_axes=axes)
    status, _, err = printed(capsys, tmp_path / "net", "--time", "--batch", "7")
    assert (status, err) == (0, "")
    sizes = [{shape for name, shape in one if name == "float32"} for one in quickly]
    assert sizes == [{(1, 2)}, {(7, 2)}]


def test_what_cannot_be_timed(tmp_path, quickly, capsys):
    rows, columns = jax.export.symbolic_shape("rows, columns")
    x = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    jx.export.save(tmp_path / "net", lambda p, x: p["w"] * x, {"w": jnp.float32(2)}, x)
    status, out, err = printed(capsys, tmp_path / "net", "--time")
    assert status == 1
    assert "for every size of columns, rows\n" in out
    assert err.endswith("the sizes columns, rows are open, not a batch alone\n")
    assert err.count("\n") == 1
    assert quickly == []


def test_what_is_for_another_platform(tmp_path, quickly, capsys):
    jx.export.save(tmp_path / "net", dense, DENSE, IMAGES, platforms="tpu")
    status, out, err = printed(capsys, tmp_path / "net", "--time")
    assert status == 1
    assert "  runs on    tpu\n" in out
    assert "cannot be timed: ValueError: " in err
    assert err.count("\n") == 1


def test_64_bits(tmp_path, quickly, capsys):
    with jax.enable_x64(True):
        x = jnp.ones((2, 3), jnp.float64)
        jx.export.save(tmp_path / "net", lambda p, x: x @ p["w"], {"w": jnp.ones((3, 1))}, x)
    assert printed(capsys, tmp_path / "net")[0] == 0
    status, _, err = printed(capsys, tmp_path / "net", "--time")
    assert status == 1
    assert "set jax_enable_x64 before it is loaded" in err
    with jax.enable_x64(True):
        jx.export.save(tmp_path / "argument", lambda p, x: x * p, jnp.float32(2), x)
    status, _, err = printed(capsys, tmp_path / "argument", "--time")
    assert "it takes float64: set JAX_ENABLE_X64=1" in err


def test_many_parameters(tmp_path, capsys):
    params = {f"block{k}": {"kernel": jnp.ones((2, k + 1)), "bias": jnp.ones(3)} for k in range(30)}
    jx.export.save(tmp_path / "net", lambda p, x: x, params, jnp.ones((1, 2)))
    out = printed(capsys, tmp_path / "net")[1]
    rows = {tuple(line.split()) for line in out.splitlines()}
    assert ("30", "block*/bias", "float32", "3", "90", "360", "8.8%") in rows
    assert ("30", "block*/kernel", "float32", "several", "930", "3,720", "91.2%") in rows
    assert "  60 arrays; --all prints each\n" in out
    every = printed(capsys, tmp_path / "net", "--all")[1]
    assert all(f"  block{k}/kernel " in every for k in range(30))
    assert "--all" not in every


def test_packed_numbers_are_told_as_what_they_are(tmp_path, capsys):
    params = jx.quantize.weights({"k": normal(0, 128, 64)}, bits=4)
    fn = lambda p, x: x @ jx.quantize.dequantize(p)["k"]
    jx.export.save(tmp_path / "net", fn, params, jnp.ones((2, 128)))
    arrays = {one["path"]: one for one in told(capsys, tmp_path / "net")[1]["parameters"]["arrays"]}
    assert arrays["k/values"]["dtype"] == "int4"
    assert (arrays["k/values"]["shape"], arrays["k/values"]["numbers"]) == ("128x64", 8192)
    assert arrays["k/values"]["bytes"] == 4096
    resealed(tmp_path / "net", lambda m: m["params"]["dict"][0][1]["qtensor"]["packing"].update(
        shape=[10**3000, 10**3000]))  # fmt: skip
    arrays = told(capsys, tmp_path / "net")[1]["parameters"]["arrays"]
    assert [one["dtype"] for one in arrays] == ["uint8", "bfloat16"]


def test_a_fold_of_ours(tmp_path, capsys):
    fn = lambda p, x: (x @ p["kernel"] - p["mean"]) * p["scale"]
    params = {"kernel": normal(0, 3, 2), "mean": normal(1, 2), "scale": normal(2, 2)}
    with jax.numpy_rank_promotion("allow"):
        fn, params = jx.fold.batchnorm(fn, params, jnp.ones((4, 3)))
        jx.export.save(tmp_path / "net", fn, params, jnp.ones((4, 3)))
    (step,) = told(capsys, tmp_path / "net")[1]["recipe"]
    assert step["numbers"] == {"folded": len(fn.report.folded), "merged": len(fn.report.merged)}
    assert step["numbers"]["folded"] + step["numbers"]["merged"] > 0


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.text(max_size=5)
ANYTHING = st.recursive(
    PLAIN,
    lambda child: (
        st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("plan", "parameters", "macs", "rows", "folded", "merged", "layers", "left", "activations")
KNOWN = st.sampled_from(["prune", "fold.batchnorm", "quantize.int8", "autotune", "new"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(KNOWN, st.dictionaries(st.sampled_from(KEYS), ANYTHING | st.lists(ANYTHING)), ANYTHING)
def test_a_recipe_of_anything(folder, capsys, transform, step, form):
    plan = {"parameters": [1, 2], "macs": [3, 4], "rows": [form, [1, form], [1, 2]]} | step
    recipe = [{"transform": transform, **step}, {"transform": "prune", "plan": plan}]
    change = {"recipe": recipe, "forms": {"cpu": [form, {"form": "a", "count": form}]}}
    resealed(folder, lambda manifest: manifest.update(change))
    status, out, err = printed(capsys, folder)
    assert (status, err) == (0, "")
    assert f"\n  1.  {transform}" in out
    assert told(capsys, folder)[0] == 0


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    def fn(params, x):
        return x * params["\x1b[2Jw"]

    fn.__name__ = "\x1b[31mred\u202e"
    jx.export.save(tmp_path / "net", fn, {"\x1b[2Jw": np.float32(1)}, jnp.ones(3))
    status, out, _ = printed(capsys, tmp_path / "net")
    assert status == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "  function   \\x1b[31mred\\u202e\n" in out
    assert told(capsys, tmp_path / "net")[1]["function"] == "\x1b[31mred\u202e"
