"""The benchmark's logic on made-up figures: no peer is needed, and nothing is timed."""

import json
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
from flax import nnx

import jaxaccel as jx
from experiments import benchmark, benchmark_report, common
from experiments.benchmark import Candidate, Runs, measured, readied
from experiments.benchmark_networks import (
    CASES,
    NETWORKS,
    Case,
    layer_values,
    problem,
    torch_layout,
    torch_model,
)
from experiments.benchmark_timing import Engine, fastest, interleaved, repeated

WORK = {"flops": 10**9, "bytes": 10**7}
LIMITS = {"gflops": {"float32": [100.0, "numpy"]}, "gigabytes": [10.0, "numpy"]}


def row(candidate, family, seconds, precision="float32", **changes):
    base = {"candidate": candidate, "family": family, "precision": precision, "mode": "m"}
    base |= {"status": "ok", "difference": 1e-6, "agreement": 1.0, "seconds": seconds}
    return base | {"first_s": 1.0, "compile_s": None} | changes


def record(*rows, **changes):
    base = {"case": "c", "train": False, "batch": 10, "targets": {"plain": 6, "peer": 1.0}}
    return base | WORK | {"rows": list(rows)} | changes


ROWS = (
    row("plain Flax", "plain", [0.8, 0.9, 0.7]),
    row("jaxaccel", "jaxaccel", [0.1, 0.1, 0.1]),
    row("jaxaccel, rules", "jaxaccel", [0.01, 0.01, 0.01]),
    row("torch", "peer", [0.3, 0.3, 0.3]),
    row("openvino", "peer", [0.05, 0.04, 0.06]),
    row("openvino, int8", "peer", [0.02, 0.02, 0.02], "int8"),
)
LOST = {"candidate": "cheat", "family": "peer", "precision": "float32", "mode": ""}


@pytest.mark.full
def test_plain_flax_has_the_batch_norm_of_flax():
    given = problem(Case("resnet18", False, 32, 2), 0)
    of = lambda fn: {type(m) for _, m in nnx.iter_modules(fn.module(given.params))}
    assert jx.nn.BatchNorm in of(given.fn)
    assert jx.nn.BatchNorm not in of(given.plain)
    assert nnx.BatchNorm in of(given.plain)


def test_headline_takes_the_best_peer_of_the_same_precision():
    found = benchmark_report.verdict(record(*ROWS))
    assert found["own"]["candidate"] == "jaxaccel"  # not the faster rules
    assert found["peer"] == "openvino"  # neither torch nor the int8 engine
    assert found["plain_times"][1] == pytest.approx(8)
    assert found["peer_times"][1] == pytest.approx(0.5)
    assert found["int8_times"][1] == pytest.approx(0.2)
    assert found["met"] == {"plain": True, "peer": False}


def test_targets_are_said_met_or_missed():
    (line,) = benchmark_report.headline([record(*ROWS)])
    assert line[-1] == "no: peer"
    assert line[-2] == "plain 6, peer 1"
    assert benchmark_report.headline([record(*ROWS, targets={"plain": 6})])[0][-1] == "yes"
    assert benchmark_report.headline([record(*ROWS, targets={})])[0][-2:] == ("-", "-")
    alone = record(*ROWS[:2])
    assert benchmark_report.verdict(alone)["met"] == {"plain": True, "peer": False}


def test_ratios_are_paired_within_rounds():
    own, other = row("a", "peer", [1.0, 2.0, 4.0]), row("b", "peer", [2.0, 4.0, 8.0])
    assert benchmark_report.times(own, other) == [2.0, 2.0, 2.0]


def test_what_was_not_timed_takes_no_part():
    wrong = LOST | {"status": "wrong", "difference": 0.2, "agreement": 0.5}
    failed = LOST | {"status": "failed", "error": "no such operation"}
    found = record(*ROWS[:4], wrong, failed)
    assert benchmark_report.verdict(found)["peer"] == "torch"
    lines = benchmark_report.details([found], LIMITS)
    assert lines[-2][3] == "wrong: differs by 2e-01, same class 50%"
    assert lines[-1][3] == "failed: no such operation"
    assert set(lines[-1][4:]) == {None}
    page = benchmark_report.page([found], LIMITS, "head", "note", "text")
    assert "not measured" in page
    assert "copies 10.0 GB/s" in page


def test_a_lost_jaxaccel_is_in_the_headline():
    lost = LOST | {"candidate": "jaxaccel", "family": "jaxaccel", "status": "wrong"}
    lost |= {"difference": 1.0, "agreement": None}
    (line,) = benchmark_report.headline([record(ROWS[0], lost, ROWS[3])])
    assert line[2:6] == (None, None, None, None)
    assert line[-1] == "no: plain, peer"


def test_share_of_the_limit_is_of_copies_or_products():
    found = benchmark_report.details([record(ROWS[0])], LIMITS)[0]
    assert found[-4:-2] == ("1.2", "1.2%")  # 1.25 GFLOP/s of 100
    sparse = record(ROWS[0], bytes=10**9)  # 1 FLOP per byte: 10 GFLOP/s
    assert benchmark_report.details([sparse], LIMITS)[0][-3] == "12.5%"


def test_both_plots_are_drawn(tmp_path):
    found = [record(*ROWS, train=train) for train in (True, False)]
    benchmark_report.plots(found, LIMITS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "benchmark-peers.png",
        "benchmark-roofline.png",
    }


def engine(outputs, calls=None):
    run = lambda count: None if calls is None else calls.append(count)
    return Engine(run, lambda: None, np.asarray(outputs, float), 0.1)


def test_a_wrong_candidate_is_reported_and_not_timed(monkeypatch):
    def broken():
        raise RuntimeError("no kernel\nsecond line")

    given: list[str] = []

    def only(engines, rounds, tick):
        given.extend(engines)
        return {name: [1.0] * rounds for name in engines}

    monkeypatch.setattr(benchmark, "interleaved", only)
    part = [
        Candidate("plain Flax", "plain", "float32", lambda: engine([[1.0, 2.0]])),
        Candidate("near", "peer", "float32", lambda: engine([[1.0, 2.001]])),
        Candidate("far", "peer", "float32", lambda: engine([[1.0, 2.1]])),
        Candidate("nan", "peer", "float32", lambda: engine([[1.0, float("nan")]])),
        Candidate("int8", "peer", "int8", lambda: engine([[2.1, 2.0]])),
        Candidate("broken", "peer", "float32", broken),
    ]
    found = measured(CASES["infer-convnet-batch128"], part, WORK, 3, False, lambda *_: None)
    assert given == ["plain Flax", "near", "int8"]
    by_name = {row["candidate"]: row for row in found["rows"]}
    assert [by_name[name]["status"] for name in ("near", "far", "nan")] == ["ok", "wrong", "wrong"]
    assert "seconds" not in by_name["far"]
    assert by_name["int8"]["agreement"] == 0
    assert by_name["broken"]["error"] == "no kernel"
    assert json.loads(json.dumps(found["targets"])) == {}


def test_a_wrong_reference_ends_the_run():
    part = [Candidate("plain Flax", "plain", "float32", lambda: engine([[float("nan")]]))]
    with pytest.raises(SystemExit, match="plain Flax: not finite"):
        measured(CASES["infer-convnet-batch128"], part, WORK, 3, False, lambda *_: None)


def test_losses_have_no_class_and_wider_limits_after_each_step():
    candidate = Candidate("torch", "peer", "float32", lambda: engine([1.0, 0.5, 0.2]))
    for third, status in ((0.21, "wrong"), (0.202, "ok"), (float("nan"), "wrong")):
        row, found = readied(candidate, engine([1.0, 0.5, third]), gpu=False)
        assert row["agreement"] is None
        assert row["status"] == status
        assert (found is None) == (status == "wrong")
    row, _ = readied(candidate, engine([1.002, 0.5, 0.2]), gpu=False)
    assert row["status"] == "wrong"  # the first loss has seen no step


def test_runs_are_kept_by_versions(tmp_path, monkeypatch):
    path, made = tmp_path / "runs.json", []

    def of(version):
        monkeypatch.setattr(benchmark, "versions", lambda: {"torch": version})
        return benchmark.key("case", rounds=3, seed=0)

    make = lambda: made.append(None) or {"rows": [len(made)]}
    assert Runs(path, fresh=False).kept(of("1"), make) == {"rows": [1]}
    assert Runs(path, fresh=False).kept(of("1"), make) == {"rows": [1]}
    assert Runs(path, fresh=False).kept(of("2"), make) == {"rows": [2]}
    assert Runs(path, fresh=True).kept(of("2"), make) == {"rows": [3]}
    assert benchmark.key("case", rounds=4, seed=0) != of("2")


def test_fresh_measures_again_only_what_is_asked_for(tmp_path):
    path = tmp_path / "runs.json"
    Runs(path, fresh=False).kept("other", lambda: 1)
    Runs(path, fresh=True).kept("this", lambda: 2)
    assert Runs(path, fresh=False).kept("other", lambda: 3) == 1


def test_every_round_has_every_engine_and_restarts_it():
    log: list[str] = []
    engines = {
        name: Engine(
            lambda count, name=name: log.append(name),
            lambda name=name: log.append(f"restart {name}"),
            np.zeros(1),
            0.0,
        )
        for name in "ab"
    }
    ticks: list[None] = []
    seconds = interleaved(engines, 4, lambda: ticks.append(None), pause=0)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 4, "b": 4}
    assert len(ticks) == 4
    assert log.count("restart a") == log.count("a") / 2 == 6  # two to find the count


def test_the_fastest_mode_is_kept_and_a_broken_one_said(monkeypatch):
    def broken():
        raise RuntimeError("no")

    slow = lambda engines, *_, **__: {name: [float(len(name))] for name in engines}
    monkeypatch.setattr("experiments.benchmark_timing.interleaved", slow)
    makers = {"slow one": lambda: engine([1]), "fast": lambda: engine([2]), "b": broken}
    assert fastest(makers).mode == "fast (1 of 3 modes failed)"
    with pytest.raises(RuntimeError, match="no"):
        fastest({"b": broken})


def test_each_call_or_the_last_is_waited_for():
    for each, wanted in ((True, [1, 1, 1, 1]), (False, [1])):
        waited: list[int] = []
        repeated(lambda: 1, waited.append, each)(3)
        assert waited == wanted


def test_case_names_are_their_work():
    assert CASES["train-convnet-batch128"].shape == (128, 28, 28, 1)
    assert CASES["infer-mobilenet-224px-batch1"].plain == 6
    assert len(CASES) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "train-vgg"), "argument --cases: invalid choice: 'train-vgg'"),
        (("--rounds", "0"), "argument --rounds: 0 is below 1"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main([*arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_without_the_peers_it_says_not_measured(capsys, tmp_path):
    if all(map(find_spec, ("torch", "onnxruntime", "openvino"))):
        pytest.skip("the peers are installed")
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--out", str(tmp_path / "none")])
    assert exit_.value.code == 3
    assert "is not installed; in the folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_kernels_get_their_outputs_first():
    kernel = np.arange(24.0).reshape(1, 2, 3, 4)
    given = torch_layout({"kernel": kernel, "var": np.ones(4), "bias": np.zeros(4)})
    assert given["weight"].shape == (4, 3, 1, 2)
    assert given["weight"][3, 1, 0, 1] == kernel[0, 1, 1, 3]
    dense = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(torch_layout({"kernel": dense})["weight"], dense.T)
    assert set(given) == {"weight", "running_var", "bias"}


class Nested(nnx.Module):
    """Layers named so that neither the alphabet nor the depth gives their order."""

    def __init__(self, rngs):
        self.stem = jx.nn.ConvReLU(3, 4, batch_norm=True, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(n, n + 1, (1, 1), rngs=rngs) for n in (4, 5)])
        self.classifier = nnx.Linear(6, 3, rngs=rngs)


def test_layers_stand_in_the_order_they_run(monkeypatch):
    monkeypatch.setitem(NETWORKS, "nested", Nested)
    found = layer_values(problem(Case("nested", False, 8, 1), 0))
    shapes = [values["weight"].shape for values in found]
    assert shapes == [(4, 3, 3, 3), (4,), (5, 4, 1, 1), (6, 5, 1, 1), (3, 6)]
    assert set(found[1]) == {"weight", "bias", "running_mean", "running_var"}
    assert np.ptp(found[1]["running_var"]) > 0.02  # a batch norm that does something


@pytest.mark.parametrize("network", ["convnet", pytest.param("resnet18", marks=pytest.mark.full)])
def test_both_frameworks_compute_the_same(network):
    if not find_spec("torch") or not find_spec("torchvision"):
        pytest.skip("PyTorch is not installed")
    given = problem(Case(network, False, 28 if network == "convnet" else 32, 2), 0)
    peers = import_module("experiments.benchmark_peers")
    kit = peers.torch_kit(common.parser("test", None, "test"), "cpu")
    model = torch_model(given, kit.torch, kit.models)
    with kit.torch.no_grad():
        found = model(kit.images(given, "channels last")).numpy()
    wanted = np.asarray(given.fn(given.params, given.images))
    assert benchmark.differences(found, wanted) < 1e-4


def test_work_is_that_of_the_plain_function(monkeypatch):
    module = lambda rngs: jx.nn.MLP(12, 4, 0, 5, rngs=rngs)
    monkeypatch.setitem(NETWORKS, "linear", module)
    given = problem(Case("linear", False, 2, 8), 0)
    found = import_module("experiments.benchmark_jax").work(given)
    parameters, images, logits = 12 * 5 + 5, 8 * 12, 8 * 5
    assert found["bytes"] == 4 * (parameters + images + logits)
    assert found["flops"] == 2 * 8 * 12 * 5 + logits
