"""The report of `experiments.int8_speed`, and the images of its chains."""

import numpy as np
import pytest

from experiments import int8_report
from experiments.int8_chain import CHAINS, Chain


def row(candidate, *milliseconds, **more):
    return {"candidate": candidate, "seconds": [x / 1e3 for x in milliseconds], "mode": "", **more}


CASE = {
    "name": "infer-net",
    "batch": 4,
    "target": 1.5,
    "rows": [
        row("float32", 4, 5, 6, agreement=1.0),
        row("int8", 2, 2, 2, agreement=0.75),
        row("int8, fastest", 2, 5, 6, agreement=1.0),
        row("openvino, int8", 1, 1, 2, agreement=1.0),
        {"candidate": "Qwix", "error": "no such layer"},
    ],
}
CHAIN = {
    "name": "net",
    "batch": 4,
    "side": 28,
    "target": 3,
    "rows": [row("plain", 4, 5, 6, accuracy=90.0), row("pruned, int8", 2, 2, 2, accuracy=89.5)],
}


def test_ratios_are_of_each_round():
    assert int8_report.best(CASE) == "int8"
    found = int8_report.times(CASE, "int8", "float32")
    assert found is not None
    np.testing.assert_allclose(found, [2.25, 2.5, 2.75])
    assert int8_report.times(CASE, "Qwix", "float32") is None


def test_the_text_says_what_is_met_and_what_failed():
    text = int8_report.page([CASE, CHAIN], "head", "markdown")
    assert "| infer-net | int8 | 2.00 | 2.00-2.00 | 2.50 (2.25-2.75) | 75% |  |" in text
    assert "failed: no such layer" in text
    assert "int8: 2.50 times as fast as float32, target 1.5: met; times as fast as the" in text
    assert "0.50 (0.50-0.75) of openvino, int8" in text
    assert "| net | pruned, int8 | 2.00 | 2.00-2.00 | 2.50 (2.25-2.75) | 89.50 |  |" in text
    assert "pruned, int8: 2.50 times as fast as plain, target 3: missed" in text


def test_the_plot_is_written(tmp_path):
    int8_report.plot(tmp_path / "int8.png", [CASE, CHAIN])
    assert (tmp_path / "int8.png").stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.parametrize(("name", "side"), [("convnet", 28), ("mobilenet", 28), ("resnet18", 56)])
def test_chains_are_timed_on_the_images_they_are_trained_on(name, side, tmp_path):
    chain = Chain(name, 0, 64, tmp_path)
    channels = 1 if name == "convnet" else 3
    assert chain.splits.train.image.shape == (64, side, side, channels)
    timed = chain.timed_images()
    assert timed.shape == (CHAINS[name].batch, CHAINS[name].side, CHAINS[name].side, channels)
    times = CHAINS[name].side // side
    np.testing.assert_array_equal(timed[:, ::times, ::times], timed[:, times - 1 :: times, ::times])
    assert len(chain.batches) == 8
