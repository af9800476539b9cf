"""`experiments.profile`: own times from a trace, and the lines made of them."""

import json
from types import SimpleNamespace

import pytest

from experiments import profile
from jaxaccel.measure._fusions import Fusions, Kernel


def event(start, end, name=None):
    stats = [("hlo_op", name), ("run_id", 1)] if name else [("run_id", 1)]
    return SimpleNamespace(start_ns=start, duration_ns=end - start, stats=stats)


def trace(*threads):
    lines = [SimpleNamespace(events=events) for events in threads]
    return SimpleNamespace(planes=[SimpleNamespace(lines=lines)])


def test_a_call_does_not_count_what_it_calls():
    found = profile.own_times(
        trace(
            [event(0, 100), event(10, 60, "call"), event(20, 30, "a"), event(30, 50, "b")],
            [event(60, 90, "a"), event(10, 60, "c")],
        )
    )
    assert found == {"call": 20, "a": 40, "b": 20, "c": 50}


def test_what_begins_together_is_nested():
    found = profile.own_times(trace([event(0, 10, "inner"), event(0, 30, "outer")]))
    assert found == {"outer": 20, "inner": 10}


KERNELS = (
    Kernel("add.1", "loop", ("add", "add"), 3_000_000, 1_000_000),
    Kernel("add.2", "loop", ("add", "add"), 3_000_000, 1_000_000),
    Kernel("conv", "op", ("convolution",), 1_000_000, 1_000_000),
    Kernel("copy", "op", ("copy",), 500_000, 500_000),
)


def test_kernels_that_hold_the_same_are_one_line():
    times = {"add.1": 1.0, "add.2": 1.0, "conv": 5.0, "unknown": 2.0}
    every = profile.rows(Fusions(KERNELS, 9, 0, "cpu"), times)
    assert [row["ops"] for row in every] == ["convolution", "2 add", "copy"]
    assert list(profile.lines(every, 10.0, top=1)) == [
        ("1", "convolution", "2.00", "5.00", "50.0%", "0.4"),
        ("3", "2 others", "9.00", "2.00", "20.0%", "4.5"),
        ("4", "all kernels", "11.00", "7.00", "70.0%", "1.6"),
    ]
    assert list(profile.lines(every, 10.0, top=3))[2] == ("1", "copy", "1.00", "0.00", "0.0%", "-")


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")
def test_a_real_trace(tmp_path):
    profile.main(["--case", "train-convnet-batch128", "--candidate", "rules", "--calls", "2",
                  "--device", "cpu", "--out", str(tmp_path)])  # fmt: skip
    stem = "profile-train-convnet-batch128-rules"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.{s}" for s in ("md", "json", "png")
    }
    found = json.loads((tmp_path / f"{stem}.json").read_text())["results"]
    slow = [row["ms"] for row in found["kernels"] if row["bytes"] > 1e6]
    assert slow
    assert all(ms > 0 for ms in slow)
    assert abs(found["elsewhere_ms"]) < 0.1 * sum(row["ms"] for row in found["kernels"])
