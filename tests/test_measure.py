"""Costs against hand counts, timing on a fake clock, tables and intervals."""

import gc
import io
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as Struct
from rich.console import Console
from scipy import stats

from jaxaccel import _progress, measure
from jaxaccel.measure import _compare, _cost

LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(kernel, x, groups=1, padding="VALID"):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def conv_macs(side: int, size: int, channels: int, filters: int, groups: int, padding: str) -> int:
    """Products with real pixels, counted one window position at a time."""
    before = (size - 1) // 2 if padding == "SAME" else 0
    positions = range(side if padding == "SAME" else side - size + 1)
    taps = sum(0 <= at - before + tap < side for at in positions for tap in range(size))
    return taps**2 * channels // groups * filters


# --- costs


@given(
    side=st.integers(4, 7),
    size=st.integers(1, 4),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    padding=st.sampled_from(["VALID", "SAME"]),
)
def test_macs_of_convolutions(side, size, per_group, groups, padding):
    channels, filters = per_group[0] * groups, per_group[1] * groups
    kernel = Struct((size, size, per_group[0], filters), jnp.float32)
    x = Struct((2, side, side, channels), jnp.float32)
    found = measure.macs(lambda k, x: conv(k, x, groups, padding), kernel, x)
    assert found == 2 * conv_macs(side, size, channels, filters, groups, padding)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_macs_of_a_dense_layer(dtype):
    kernel, x = Struct((64, 32), dtype), Struct((16, 64), dtype)
    assert measure.macs(lambda k, x: x @ k, kernel, x) == 16 * 64 * 32


def test_shifted_multiply_adds_count_like_the_depthwise_convolution():
    def shifted(kernel, x):
        pad = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [(i, j) for i in range(3) for j in range(3)]
        return sum(pad[:, i : i + 14, j : j + 14] * kernel[i, j, 0] for i, j in taps)

    kernel, x = jnp.ones((3, 3, 1, 16)), jnp.ones((4, 14, 14, 16))
    np.testing.assert_allclose(shifted(kernel, x), conv(kernel, x, 16, "SAME"))
    pixels = 4 * 14 * 14 * 16
    assert measure.macs(shifted, kernel, x) == (9 + 8) * pixels // 2
    assert measure.macs(lambda k, x: conv(k, x, 16, "SAME"), kernel, x) == 4 * 16 * 40**2


def test_a_loop_is_noted_and_not_counted_silently():
    def steps(unroll):
        return lambda p, x: jax.lax.scan(lambda c, _: (c @ p, None), x, length=10, unroll=unroll)[0]

    args = (jnp.ones((8, 8)), jnp.ones((4, 8)))
    found = measure.cost(steps(False), *args)
    assert found.loops == 1
    assert "1 loop(s): FLOPs and bytes count a loop's body once." in str(found)
    with pytest.raises(ValueError, match=r"macs: fn has 1 loop\(s\), .*unroll=True"):
        measure.macs(steps(False), *args)
    assert measure.macs(steps(True), *args) == 10 * 4 * 8 * 8
    assert "loop" not in str(measure.cost(steps(True), *args))


def test_cost_of_a_dense_layer():
    def dense(params, x):
        return x @ params["kernel"] + params["bias"]

    params = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
    found = measure.cost(dense, params, Struct((16, 64), jnp.float32))
    held = 4 * (64 * 32 + 32 + 16 * 64 + 16 * 32)
    assert found.flops == 2 * 16 * 64 * 32 + 16 * 32
    assert (found.parameters, found.parameter_bytes) == (64 * 32 + 32, 4 * (64 * 32 + 32))
    assert found.bytes_accessed is not None
    assert found.bytes_accessed >= held
    assert found.peak_memory is not None
    assert found.peak_memory >= held


def test_peak_memory_holds_temporary_buffers():
    def sorts(p, x):  # a sort is never fused, so its result is a buffer of its own
        return jnp.sum(jnp.sort(x) * p)

    found = measure.cost(sorts, jnp.float32(2), Struct((1000,), jnp.float32))
    assert found.peak_memory is not None
    assert found.peak_memory >= 4 * (1000 + 1000 + 1 + 1)


def test_parameter_bytes_are_those_of_the_leaves():
    params = {"w": jnp.ones(10, jnp.int8), "scale": jnp.ones(2), "zero": np.ones(3, np.float16)}
    found = measure.cost(lambda p, x: x + p["scale"].sum() + p["w"].sum(), params, 1.0)
    assert (found.parameters, found.parameter_bytes) == (15, 10 + 8 + 6)
    assert measure.cost(lambda: jnp.ones(3)).parameters == 0


def test_no_arithmetic_is_zero_and_no_figure_is_not_measured():
    assert measure.cost(lambda p, x: x, 1.0, 2.0).flops == 0
    silent = SimpleNamespace(cost_analysis=lambda: None)
    assert _cost._flops(silent, None) is None  # pyright: ignore[reportArgumentType]
    assert _cost._figure({"flops": -1.0}, "flops") is None
    assert _cost._peak_memory(None) is None
    lines = str(measure.Cost(None, 7, 1000, 4000, None)).splitlines()
    assert lines[2].split() == ["FLOPs", "not", "measured"]
    assert lines[4].split() == ["parameters", "1,000"]


def test_macs_of_a_silent_backend(monkeypatch):
    monkeypatch.setattr(_cost, "_flops", lambda *_: None)
    with pytest.raises(ValueError, match="macs: the cpu backend gives no FLOPs"):
        measure.macs(lambda p: p, 1.0)


# --- times


class Clock:
    """A clock that only a call moves: each name takes its own time, slower as rounds go by."""

    def __init__(self, durations: dict[str, float], drift: float = 1.0):
        self.now, self.drift, self.log, self.collecting = 0.0, drift, [], []
        self.calls = {name: lambda n=name, d=d: self._call(n, d) for name, d in durations.items()}

    def __call__(self) -> float:
        return self.now

    def _call(self, name: str, duration: float) -> None:
        self.log.append(name)
        self.collecting.append(gc.isenabled())
        self.now += duration * self.drift ** (len(self.log) // len(self.calls))


def interleave(clock: Clock, rounds: int, min_time: float, **kwargs):
    return _compare._interleave(clock.calls, rounds, min_time, clock=clock, **kwargs)


def test_each_round_holds_each_candidate_and_the_next_mirrors_it():
    clock = Clock(dict.fromkeys("abcd", 1.0))
    interleave(clock, 20, 0.5)
    rounds = ["".join(clock.log[at : at + 4]) for at in range(4, len(clock.log), 4)]
    assert len(rounds) == 20
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert all(rounds[at + 1] == rounds[at][::-1] for at in range(0, 20, 2))
    assert len(set(rounds[::2])) > 3


def test_samples_fill_the_least_time():
    clock, ticks = Clock({"slow": 3.0, "fast": 0.001}), []
    seconds = interleave(clock, 3, 0.02, tick=lambda: ticks.append(clock.now))
    assert len(ticks) == 3
    np.testing.assert_allclose(seconds["slow"], 3.0)
    np.testing.assert_allclose(seconds["fast"], 0.001)
    runs = re.findall("s|f+", "".join(name[0] for name in clock.log))
    assert all(20 <= len(run) < 100 for run in runs[-5:] if run[0] == "f")
    assert clock.log.count("slow") == 1 + 3


def test_ratios_are_taken_within_a_round():
    # Every round is 10 times slower: only ratios within rounds can be exact.
    seconds = {"base": [1.0, 10.0, 100.0, 1000.0], "half": [0.5, 5.0, 50.0, 510.0]}
    row = _compare._row("half", seconds, "base", jnp.ones(3))
    assert (row.ratio, row.ratio_low) == (0.5, 0.5)
    assert row.ratio_high == pytest.approx(0.5025)
    assert (row.low_ms, row.median_ms) == pytest.approx((3875.0, 27500.0))
    assert (row.parameters, row.parameter_bytes) == (3, 12)


def test_drift_cancels_in_the_median_ratio():
    clock = Clock({"a": 1.0, "b": 2.0}, drift=1.01)
    seconds = interleave(clock, 30, 0.5)
    assert _compare._row("b", seconds, "a", 0).ratio == pytest.approx(2.0, rel=0.01)
    assert seconds["a"][-1] / seconds["a"][0] > 1.3


def test_garbage_collection_is_off_only_meanwhile():
    clock = Clock({"a": 1.0})
    assert gc.isenabled()
    interleave(clock, 2, 0.5)
    assert not any(clock.collecting)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        _compare._interleave({"a": lambda: 1 / 0}, 2, 0.5)
    assert gc.isenabled()


def pair(size: int):
    return lambda kernel, x: x @ kernel, jnp.ones((8, size))


def quick(**kwargs) -> measure.Comparison:
    options = {"rounds": 2, "min_time": 1e-4, "show": False} | kwargs
    return measure.compare({"one": pair(4), "two": pair(8)}, jnp.ones((2, 8)), **options)


def test_compare_reports_every_candidate():
    found = quick()
    first, second = found.rows
    assert first[:1] + first[4:9] == ("one", 1.0, 1.0, 1.0, 32, 128)
    assert min(first.rounds_ms) <= first.median_ms <= max(first.rounds_ms)
    assert (second.name, second.parameters) == ("two", 64)
    assert 0 < second.low_ms <= second.median_ms <= second.high_ms
    assert 0 < second.ratio_low <= second.ratio <= second.ratio_high
    assert found.jax_version == jax.__version__
    assert found.device.startswith("1 x ")
    assert [row.ratio for row in quick(baseline="two").rows][1] == 1.0


def test_compare_prints_only_when_asked(capsys):
    quick()
    assert capsys.readouterr().out == ""
    found = quick(show=True)
    assert capsys.readouterr().out == f"{found}\n"
    for text in ("candidate", "one", "two", found.device, "'one' in the same round"):
        assert text in str(found)


def test_compare_counts_the_devices_of_the_result():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.ones((8, 4)), spec)
    fns = {"a": (lambda p, x: x * p, 2.0)}
    found = measure.compare(fns, x, rounds=2, min_time=1e-4, show=False)
    assert found.device.startswith("8 x cpu")


def test_comparison_as_json_and_markdown():
    found = quick()
    again = json.loads(json.dumps(found.to_dict()))
    row = found.rows[1]
    assert again["rows"][1] == row._asdict() | {"rounds_ms": list(row.rounds_ms)}
    assert {"baseline", "rounds", "device", "jax_version", "date"} <= set(again)
    lines = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert lines[1] == "| --- |" + " ---: |" * 8
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("candidates", "options", "error", "message"),
    [
        ({}, {}, ValueError, "candidates: empty; give at least one name"),
        ({3: pair(4)}, {}, TypeError, "the name 3 is not a string; name it '3'"),
        ({"a": pair(4)[0]}, {}, TypeError, r"candidates\['a'\]: function; give the pair"),
        ({"a": pair(4)}, {"baseline": "b"}, ValueError, "'b' is not a candidate; take one of 'a'"),
        ({"a": pair(4)}, {"rounds": 1}, ValueError, "rounds: 1; give a whole number of at least 2"),
        ({"a": pair(4)}, {"min_time": 0}, ValueError, "min_time: 0; give seconds above 0"),
        (
            {"a": (pair(4)[0], Struct((8, 4), jnp.float32))},
            {},
            TypeError,
            r"candidates\['a'\]: a ShapeDtypeStruct cannot be run; give arrays",
        ),
    ],
)
def test_compare_refuses(candidates, options, error, message):
    with pytest.raises(error, match=message):
        measure.compare(candidates, jnp.ones((2, 8)), **options)


@pytest.mark.parametrize(("show", "seconds"), [(True, 3), (True, 1), (False, 3)])
def test_the_bar_shows_only_in_a_long_measurement(monkeypatch, show, seconds):
    screen, times = io.StringIO(), iter([0, seconds, seconds])
    terminal = lambda stderr: Console(file=screen, force_terminal=stderr)
    monkeypatch.setattr("rich.console.Console", terminal)
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with _progress.bar(show, "measuring", 2) as tick:
        tick()
        tick()
    assert ("measuring" in screen.getvalue()) == (show and seconds > 1)


def fake(*ratios: float, name: str = "candidate") -> measure.Comparison:
    rows = [
        measure.Row(f"{name} {i}", r, r, r, r, 0.9 * r, 1.2 * r, 1, 4, (r,))
        for i, r in enumerate(ratios)
    ]
    return measure.Comparison(tuple(rows), f"{name} 0", 9, "1 x cpu", "0.0", "2026-01-01")


@pytest.mark.parametrize("ratios", [(1.0, 0.95), (1.0, 6.0), (1.0, 0.001, 12.0)])
@pytest.mark.parametrize("name", ["short", "a $very$ long name_of a candidate " * 4])
def test_plot_cuts_nothing(tmp_path, ratios, name):
    from matplotlib.image import imread

    fake(*ratios, name=name).plot(tmp_path / "ratios.png")
    image = imread(tmp_path / "ratios.png")[..., :3]
    edges = [image[0], image[-1], image[:, 0], image[:, -1]]
    assert all((edge == 1).all() for edge in edges)
    assert (image < 0.5).any()


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxaccel\[experiments\]'"):
        fake(1.0).plot("never.png")


# --- tables and intervals

CELLS = st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8))


@given(st.lists(st.tuples(CELLS, CELLS), max_size=4))
def test_text_table_lines_up(rows):
    lines = measure.table(("first", "second"), rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert set(lines[1]) == {"-"}
    assert all(len(line) <= len(lines[1]) for line in lines)


def test_alignment_and_formats():
    rows = [("a", 12345, 0.123456, "98.5 ± 0.2", True), ("bb", np.int64(7), 1234.5, None, False)]
    text = measure.table(("name", "n", "x", "accuracy", "flag"), rows)
    assert text.split("\n") == [
        "name       n       x      accuracy  flag",
        "-----------------------------------------",
        "a     12,345  0.1235    98.5 ± 0.2  True",
        "bb         7   1,234  not measured  False",
    ]
    assert measure.table(("x",), [(jnp.float32(0.5),)]).endswith("0.5")
    assert measure.table(("x", "y"), []) == "x  y\n----"


@given(st.lists(st.tuples(CELLS, CELLS), max_size=4), st.text(max_size=8))
def test_markdown_is_a_valid_table(rows, heading):
    lines = measure.table((heading, "second"), rows, style="markdown").split("\n")
    assert len(lines) == 2 + len(rows)
    for line in lines:  # GitHub's rule: a bar ends a cell unless a backslash escapes it
        cells = re.findall(r"((?:\\.|[^|\\])*)\|", line)
        assert len(cells) == 3
        assert cells[0] == ""
    assert re.fullmatch(r"\| ---:? \| ---:? \|", lines[1])


def test_markdown_escapes():
    text = measure.table(("a",), [("x|y\nz\\",)], style="markdown")
    assert text == "| a |\n| --- |\n| x\\|y z\\\\ |"


def test_table_refuses():
    with pytest.raises(ValueError, match="style: 'html'; give 'text' or 'markdown'"):
        measure.table(("a",), [], style="html")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"rows\[1\]: 2 cells for 1 columns"):
        measure.table(("a",), [(1,), (1, 2)])


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9).filter(lambda v: np.std(v) > 1e-6),
    st.floats(0.5, 0.99),
)
def test_interval_is_students(values, confidence):
    mean, half = measure.interval(values, confidence)
    expected = stats.t.interval(confidence, len(values) - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose((mean - half, mean + half), expected, rtol=1e-6, atol=1e-6)


def test_paired_is_the_interval_of_differences():
    found = measure.paired(jnp.asarray([3.0, 5.0, 9.0]), [1.0, 2.0, 4.0])
    assert found == measure.interval([2.0, 3.0, 5.0])
    assert str(found) == "3.333 ± 3.8"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure.interval([1.0]), "values: 1; an interval needs at least 2"),
        (lambda: measure.interval([1.0, np.nan]), r"values: \[1.0, nan\]; a run that diverged"),
        (lambda: measure.interval([1.0, 2.0], 95), "confidence: 95; give a number between 0 and 1"),
        (lambda: measure.paired([1.0], [1.0, 2.0]), "paired: 1 and 2 values; give one of each"),
        (lambda: measure.paired([1.0], [1.0]), "values: 1; an interval needs at least 2"),
    ],
)
def test_intervals_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
