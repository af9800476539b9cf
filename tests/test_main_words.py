"""How ``report`` puts recipes into words, and many parameters into few rows."""

import json

import pytest

from jaxaccel._commands import _leaves, _steps

STEPS = {
    "fold": ({"transform": "fold.batchnorm", "folded": [{}, {}], "merged": [{}]},
             "2 chains (batch norm and the like) folded into kernels, 1 merged"),
    "dynamic": ({"transform": "quantize.int8", "activations": "dynamic", "layers": [{}], "left": [
        {"where": "a/kernel", "reason": "slower"}]},
        "1 layer on integers, 1 left in floating point (a/kernel: slower); activations dynamic: "
        "ranges taken from each batch"),
    "many left": ({"transform": "quantize.int8", "activations": "float", "layers": [], "left": [
        {"where": str(k), "reason": "r"} for k in range(5)]},
        "0 layers on integers, 5 left in floating point (0: r; 1: r; 2: r and 2 more); "
        "activations float: kernels alone, arithmetic in floating point"),
    "fake": ({"transform": "quantize.fake"},
             "rounds to 8 bits in training, and computes in floating point"),
    "unknown": ({"transform": "compress", "target": "latency", "ratio": 0.5, "more": {"a": 1}},
                "target latency, ratio 0.5"),
    "nameless": ({}, ""),
    "prune, another": ({"transform": "prune", "plan": {"rows": 3}}, "details not understood"),
    "fold, another": ({"transform": "fold.batchnorm", "folded": 3}, "details not understood"),
    "int8, another": ({"transform": "quantize.int8", "layers": {}}, "details not understood"),
    "prune": ({"transform": "prune", "plan": {
        "parameters": [1000, 250], "macs": [0, 0], "rows": [[4, 8, 1, 1, "a"], [3, 3], "row"]}},
        "7 of 11 channels kept (63.6%), in 1 of 2 groups; parameters 1,000 -> 250 (25.0% left); "
        "multiply-accumulates of the example 0 -> 0 (all left)"),
    "beyond measure": ({"transform": "prune", "plan": {
        "parameters": [1, 10**4000], "macs": [1, 1], "rows": []}}, "details not understood"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "words"), STEPS.values(), ids=STEPS)
def test_a_step_in_words(raw, words):
    (found,) = _steps.steps([raw])
    assert found.words == words
    assert found.transform == raw.get("transform", "unnamed")
    json.dumps(found.numbers, allow_nan=False)


def test_forms_are_counted():
    rows = [{"form": name, "count": count} for name, count in (
        ("a", 1), ("b", 2), ("b", 3), ("b", -1), ("c", 10**30), ("d", None), (5, 5))]  # fmt: skip
    assert _steps.forms([*rows, None, "a"]) == {"b": 5, "a": 1}


def leaf(name, size, dtype="float32"):
    return _leaves.Leaf(name, dtype, "1", size, 4 * size)


@pytest.mark.parametrize("count", [1, 40, 41, 120])
def test_what_is_short_adds_up(count):
    sizes = [(7919 * k) % 1009 for k in range(1, count + 1)]
    found = [leaf(f"name{'x' * k}", size) for k, size in enumerate(sizes)]
    short = _leaves.shortened(found)
    assert len(short) == min(len(sizes), _leaves.MOST)
    assert sum(one.bytes for one in short) == 4 * sum(sizes)
    assert sum(one.arrays for one in short) == len(sizes)
    if len(sizes) > _leaves.MOST:
        assert short[-1].path == "others"
        assert [one.numbers for one in short[:-1]] == [
            size for size in sizes if size >= sorted(sizes)[-39]
        ]
