"""`experiments.quantization` on a tiny network, without its peers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxaccel as jx
from experiments import quantization, quantization_layers, quantization_peers, quantization_report
from experiments import quantization_rows as rows
from tests.test_int8 import snr

IMAGES = jax.random.uniform(jax.random.key(1), (32, 12, 12, 1))


class Tiny(nnx.Module):
    """Its attributes are not in the order of their calls once Flax has merged it."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(4, rngs=rngs)
        self.classifier = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        return self.classifier(jax.nn.relu(self.norm2(self.conv2(x))).mean((1, 2)))


def dense(rngs):
    return jx.nn.MLP(12 * 12, width=8, depth=1, num_classes=10, rngs=rngs)


def part(count):
    random = np.random.default_rng(count)
    images = random.integers(0, 256, (count, 12, 12, 1), np.uint8)
    return jx.data.arrays(images, random.integers(10, size=count))


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    splits = jx.data.Splits(part(512), part(64), part(200))
    with pytest.MonkeyPatch.context() as patch:
        for name, build in {"tiny": Tiny, "dense": dense}.items():
            patch.setitem(rows.NETWORKS, name, build)
            patch.setitem(rows.PEAKS, name, 1e-2)
        yield rows.Trial("tiny", 0, splits, 1, tmp_path_factory.mktemp("kept"))


@pytest.mark.full
def test_a_training_is_kept_and_its_rows_are_not_made_twice(trial, tmp_path, monkeypatch):
    peers = quantization_peers
    for table in (rows.LATER, peers.QWIX, peers.ONNXRUNTIME, peers.ONNXRUNTIME_LATER):
        for name in list(table):
            monkeypatch.delitem(table, name)
    for name in {*rows.ROWS} - {"float32", "int8", "trained on", "QAT"}:
        monkeypatch.delitem(rows.ROWS, name)
    monkeypatch.setattr(peers, "PACKAGES", ())
    monkeypatch.setattr(quantization_layers, "FACTS", {})
    monkeypatch.setattr(quantization_layers, "LATER", {})
    monkeypatch.setattr(quantization.pruning, "load", lambda train: trial.splits)
    options = ["--networks", "dense", "--seeds", "1", "--epochs", "1", "--device", "cpu"]
    options += ["--out", str(tmp_path), "--keep", str(tmp_path / "kept")]
    quantization.main(options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 3  # float32, its longer training and QAT
    written = json.loads((tmp_path / "quantization.json").read_text())
    found = written["results"]["runs"]["dense"]
    assert all(run["rows"]["int8"]["decibels"] > 20 for run in found)
    monkeypatch.setattr(quantization, "logits", None)  # nothing is computed again
    quantization.main(options)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert "| QAT - trained on |" in (tmp_path / "quantization.md").read_text()


@pytest.mark.full
def test_the_hard_case_is_the_same_function(trial):
    fn, params = trial.folded
    same, hard = rows.hard(trial)
    np.testing.assert_allclose(same(hard, IMAGES), fn(params, IMAGES), rtol=1e-3, atol=1e-4)
    real = fn(params, IMAGES)
    assert snr(rows.compiled(rows.hard_int8(trial))(IMAGES), real) < 25
    assert snr(rows.compiled(rows.hard_equalized(trial))(IMAGES), real) > 30


@pytest.mark.full
def test_results_of_layers_are_those_of_the_float_network_but_for_noise(trial):
    real = quantization_layers.outputs(quantization_peers.plain_module(trial), IMAGES)
    pair = rows.ROWS["int8"](trial)
    found = quantization_layers.own(pair, IMAGES)
    assert list(found) == list(real)
    assert all(quantization_layers.decibels(found[path], real[path]) > 25 for path in real)
    np.testing.assert_allclose(
        found["params/classifier/kernel"], rows.compiled(pair)(IMAGES), rtol=1e-4, atol=1e-4
    )


def test_convolutions_and_products_are_counted_by_type(trial):
    pair = rows.ROWS["int8"](trial)
    found = quantization_layers.counted(pair, trial.batches[0])
    assert found["StableHLO"] == {"convolution i8 i8": 2, "dot i8 i8": 1}
    assert sum(found["compiled"].values()) == 3
    assert found["left"] == []
    plain = quantization_layers.counted(trial.folded, trial.batches[0])
    assert all(name.endswith(" f32 f32") for name in plain["StableHLO"])
    assert sum(plain["StableHLO"].values()) == 3


def test_small_steps_change_little():
    tree = {"params": jnp.float32(3), "scales": [jnp.float32(1e-3)]}
    relative = rows.relative_steps()
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = relative.update(ones, relative.init(tree), tree)
    assert updates == {"params": 1, "scales": [jnp.float32(1e-3)]}


def test_targets_and_claims_say_what_was_found():
    def run(seed, **accuracies):
        made = {n: {"accuracy": x, "agreement": 99.0, "decibels": 30.0} for n, x in
                accuracies.items()}  # fmt: skip
        return {"network": "ConvNet", "seed": seed, "settings": {"epochs": 1}, "rows": made}

    runs = [
        run(0, float32=90.0, int8=89.9, QAT=89.5, **{"int4 weights": 89.7}),
        run(1, float32=91.0, int8=90.9, QAT=90.7, **{"int4 weights": 90.8}),
        run(2, float32=92.0),
    ]
    said = {t["row"]: t["said"] for t in quantization_report.targets("ConvNet", runs)}
    by_mean = "met by the mean, not by the whole interval"
    assert said == {"int8": "met", "int4 weights": by_mean, "QAT": "missed"}
    (claim,) = quantization_report.claims(runs)
    assert (claim["pair"], claim["said"]) == ("QAT - int8", "no difference shown")
    assert round(claim["points"], 6) == -0.3
    table = quantization_report.accuracy_table(runs, "markdown")
    assert "| int8 | 90.40 ± 6.35 | -0.10 ± 0.00 | 99.00 | 30.0 | 2 |" in table
