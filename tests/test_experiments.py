"""The experiments as their users run them: short runs, bad arguments, honest verdicts."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from experiments import (
    accuracy,
    common,
    dispatch,
    dispatch_processes,
    forms,
    mnist,
    networks,
    report,
    xla_cpu,
)


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"experiments.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_main_job_writes_its_report(tmp_path):
    out = tmp_path / "report"
    mnist.main(["--epochs", "1", "--out", str(out), "--device", "cpu"])
    names = {path.name for path in out.iterdir()}
    assert names == {
        "predictions.png",
        "report.html",
        "report.md",
        "results.json",
        "tradeoff.png",
        "training.png",
    }
    written = json.loads((out / "results.json").read_text())
    results = written["results"]
    rows = {row["name"]: row for row in results["networks"]}
    assert list(rows) == ["teacher", "student", "distilled", "pruned", "int8"]
    assert rows["teacher"]["macs"] >= 3 * rows["distilled"]["macs"]
    assert rows["pruned"]["macs"] < 0.55 * rows["distilled"]["macs"]
    assert rows["pruned"]["bytes"] < 0.5 * rows["distilled"]["bytes"]
    assert ["params/conv1/kernel", "5x5x1x8", "5x5x1x4"] in results["shapes"]
    assert rows["int8"]["bytes"] < 0.3 * rows["pruned"]["bytes"]
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing lies outside the file
    assert written["machine"]["jax"] in html


@pytest.mark.parametrize("side", [28, pytest.param(56, marks=pytest.mark.full)])
def test_the_student_is_smaller_and_its_few_kernels_stay_whole(side):
    part = jx.data.arrays(np.zeros((10, side, side, 1), np.uint8), np.arange(10))
    splits = jx.data.Splits(part, part, part)
    teacher, student = accuracy.costs(splits)
    assert teacher >= 3 * student
    _, params = jx.functional(networks.build(splits, 0, separable=True))
    masks = jx.prune.masks(params, accuracy.SPARSITY, where=accuracy.PRUNED)["params"]
    assert all(mask.shape == () for mask in jax.tree.leaves(masks["conv1"]))
    assert masks["conv2"]["depthwise"]["kernel"].shape == ()
    kept = masks["conv2"]["pointwise"]["kernel"]
    assert kept.shape == params["params"]["conv2"]["pointwise"]["kernel"].shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "mnst"), "--dataset 'mnst' is not one of digits, cluttered, mnist,"),
        (("--dataset", "mnist"), "--dataset mnist needs --data-dir"),
        (("--dataset", "mnist", "--data-dir", "nowhere"), "nowhere"),
        (("--epochs", "0"), "argument --epochs: 0 is below 1"),
        (("--epochs", "many"), "argument --epochs: 'many' is not a whole number"),
        (("--seed", "-1"), "argument --seed: -1 is below 0"),
        (("--bogus",), "unrecognized arguments: --bogus"),
        (("--out", "README.md"), "--out README.md: "),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        mnist.main([*arguments, "--device", "cpu"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_without_a_gpu_it_says_not_measured():
    found = run("mnist", "--device", "gpu")
    if found.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert found.returncode == 3
    assert "not measured: no gpu was found" in found.stderr


@pytest.mark.parametrize("module", ["pruning", "pruning_peer"])
def test_without_the_peer_they_say_not_measured(module, tmp_path):
    if find_spec("torch_pruning"):
        pytest.skip("the peer is installed")
    found = run(module, "--device", "cpu", "--out", str(tmp_path))
    assert found.returncode == 3
    assert "not measured: torch is not installed; in the folder" in found.stderr
    assert found.stderr.count("\n") == 1


def row(name: str, **changes) -> dict:
    base = {"name": name, "method": "m", "accuracy": 0.9, "macs": 100, "bytes": 1000}
    base |= {"compressed_bytes": 900}
    base |= {"rounds_ms_1": [0.97, 1.0, 1.03], "rounds_ms_128": [0.97, 1.0, 1.03]}
    return base | changes


def test_verdicts_say_what_was_not_bought():
    rows = [
        row("teacher"),
        row("pruned", compressed_bytes=300, accuracy=0.89),
        row("fast", rounds_ms_128=[0.48, 0.5, 0.53], macs=200),
        row("slow", rounds_ms_1=[1.9, 2.0, 2.1], bytes=250),
    ]
    _, pruned, fast, slow = report.verdicts(rows)
    assert "accuracy -1.00 points; MACs unchanged; bytes unchanged; 3.0x fewer zlib" in pruned
    assert "no faster at batch 1 (1.00 of the time)" in pruned
    assert "2.0x faster at batch 128" in fast
    assert "2.0x more MACs" in fast
    assert "2.0x slower at batch 1" in slow
    assert "4.0x fewer bytes" in slow


def test_a_single_epoch_is_drawn():
    figure = report._training([row("teacher", validation_curve=[0.5])])
    assert figure.axes[0].lines[0].get_marker() != "None"


def test_any_data_set_names_a_file():
    assert accuracy.slug("tfds:a/b:1.0.0") == "tfds-a-b-1.0.0"


def test_claims_are_made_only_beyond_the_interval():
    accuracies = {
        "teacher": [95.0, 95.1, 95.2],
        "student": [90.0, 90.2, 90.1],
        "distilled": [92.0, 92.1, 92.3],
        "pruned": [91.0, 94.0, 92.0],
        "random masks": [92.0, 92.0, 93.0],
        "int8": [91.0, 94.0, 92.1],
    }
    said = {c["claim"]: c["said"] for c in accuracy.claims(accuracies)}
    assert said["the teacher's help"] == "better"
    assert said["student for teacher"] == "worse"
    assert said["magnitude over random masks"] == "no difference shown"
    tables = accuracy.tables(accuracies, accuracy.claims(accuracies), range(7, 10), "markdown")
    assert "| seed 7 | seed 8 | seed 9 |" in tables
    assert "| no difference shown" in tables


COMPILED = """
import jax
from experiments import common
common.use_device("cpu", common.parser("some", None, "some"))
jax.jit(lambda x: 2 * x)(1.0)
print(jax.config.jax_compilation_cache_dir)
"""


def compiled_into(**settings) -> tuple[str, str]:
    """The folder that JAX keeps compiled code in, and what was said on stderr."""
    known = {"JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "JAXACCEL_CACHE"}
    env = {name: value for name, value in os.environ.items() if name not in known}
    command = [sys.executable, "-c", COMPILED]
    found = subprocess.run(command, env=env | settings, capture_output=True, text=True, check=True)
    return found.stdout.strip(), found.stderr


def test_compiled_code_is_kept_in_our_folder(tmp_path):
    said = compiled_into(JAXACCEL_CACHE=str(tmp_path / "ours"))[0]
    (folder,) = (tmp_path / "ours").iterdir()
    assert re.fullmatch("xla-[0-9a-f]{12}", folder.name)
    assert said == str(folder)
    assert any(path.name.startswith("jit__lambda") for path in folder.iterdir())


def test_the_users_own_folder_for_compiled_code_wins(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    settings = {"JAXACCEL_CACHE": str(ours), "JAX_COMPILATION_CACHE_DIR": str(theirs)}
    assert compiled_into(**settings)[0] == str(theirs)
    assert not ours.exists()


def test_without_a_folder_for_compiled_code_they_go_on(tmp_path):
    (tmp_path / "file").touch()
    folder, error = compiled_into(JAXACCEL_CACHE=str(tmp_path / "file"))
    assert folder == "None"
    assert "Not a directory; compiled code is not kept" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("case", xla_cpu.cases(batch=1), ids=lambda case: case.name)
def test_reproducers_compare_equal_things(case):
    assert min(xla_cpu.measured(case, rounds=1)) > 0  # raises where the two forms differ


def test_reproducers_notice_a_difference():
    case = xla_cpu.Case("wrong", lambda x: x, lambda x: 1.001 * x, ((3,),))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        xla_cpu.measured(case, rounds=1)


def test_steps_in_one_program_equal_steps_in_turn():
    step = lambda state, batch: (state[0] + 1, state[1] * batch["x"] + state[0])
    batches = {"x": jnp.arange(1.0, 1 + dispatch.K)}
    in_turn = (jnp.int32(0), jnp.float32(1))
    for x in batches["x"]:
        in_turn = step(in_turn, {"x": x})
    for name, form in dispatch.several(step).items():
        found = jax.jit(form)((jnp.int32(0), jnp.float32(1)), batches)
        assert found == in_turn, name


def test_options_that_xla_does_not_know_are_said_to_be_unknown():
    ways = dispatch.with_options(jnp.sin, (jnp.ones(3),), {"xla_nonsense": 1}, None)
    assert ways == (None, None, {"difference": "unknown to this jaxlib"})


def test_dispatch_writes_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "stack_arguments", lambda seed: tiny_stack())
    dispatch.main(
        ["--parts", "layouts", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"dispatch.md", "dispatch.json", "dispatch.png"}
    rows = json.loads((tmp_path / "dispatch.json").read_text())["results"]["rows"]
    settings = ["NHWC", "NHWC, arguments as XLA asks", "NCHW", "NCHW, arguments as XLA asks"]
    assert [row["setting"] for row in rows] == 2 * settings
    assert all(row["ms"] > 0 for row in rows)


def test_settings_of_a_process_are_compared_with_the_first(monkeypatch):
    seconds = {"": 2.0, common.HUGE_PAGES: 1.0}

    def made(call, folder, environment):
        assert call == "later_step(5)"
        assert callable(dispatch_processes.later_step)
        return {"seconds": seconds.get(environment["GLIBC_TUNABLES"], 4.0), "compile_s": 1.0,
                "checksum": 3.0}  # fmt: skip

    monkeypatch.setattr(dispatch_processes, "elsewhere", made)
    found = dispatch_processes.memory(seed=5, rounds=10)
    assert [row["setting"] for row in found] == list(dispatch_processes.MALLOC)
    assert [row["ratio"] for row in found] == [1, 0.5, 2, 2]
    assert [row["ms"] for row in found] == [2000, 1000, 4000, 4000]


def test_huge_pages_start_the_program_again_once(monkeypatch):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    for _ in range(2):
        common.with_huge_pages()
    assert started == [(sys.executable, sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == common.HUGE_PAGES


def test_the_survey_of_forms_compares_equal_things(tmp_path, monkeypatch):
    calls = (
        forms.conv("strided", (2, 7, 7, 2), (3, 3, 2, 4), 2, 1),
        forms.pool("average", (2, 7, 7, 3), 3, 2, 1, average=True),
    )
    monkeypatch.setattr(forms, "CALLS", calls)
    forms.main(["--device", "cpu", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"forms.md", "forms.json", "forms.png"}
    rows = json.loads((tmp_path / "forms.json").read_text())["results"]["rows"]
    assert len(rows) == 5  # a convolution and its two gradients, the pooling and its own
    assert not any(row["dropped"] for row in rows)
    assert set(rows[0]["refused"]) == {"NCHW", "space to depth", "padded before"}
    assert all(row["seconds"][row["rule"]] > 0 for row in rows)


def tiny_stack():
    return [jnp.ones((3, 3, 2, 2))] * 2, jnp.ones((1, 8, 8, 2))
