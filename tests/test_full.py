"""The long tier: whole runs, and the whole zoo over eight devices. `pytest -m full`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxaccel as jx
from experiments import mnist
from jaxaccel._select import flatten
from tests.models import ZOO

pytestmark = pytest.mark.full


def test_main_job_ends_where_the_readme_says(tmp_path):
    mnist.main(["--out", str(tmp_path), "--device", "cpu"])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    rows = {row["name"]: row for row in results["networks"]}
    assert rows["teacher"]["accuracy"] > 0.975
    assert rows["int8"]["accuracy"] > 0.96
    assert rows["teacher"]["macs"] > 10 * rows["int8"]["macs"]
    assert rows["teacher"]["compressed_bytes"] > 18 * rows["int8"]["compressed_bytes"]


def test_main_job_on_idx_files(tmp_path):
    def idx(name: str, array: np.ndarray) -> None:
        sizes = np.array(array.shape, ">u4").tobytes()
        (tmp_path / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())

    digits = jx.data.digits()
    for part, split, rows in (("train", digits.train, 6000), ("t10k", digits.test, 358)):
        index = np.arange(rows) % len(split.label)
        idx(f"{part}-images-idx3-ubyte", split.image[index, ..., 0])
        idx(f"{part}-labels-idx1-ubyte", split.label[index].astype(np.uint8))
    arguments = ["--dataset", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    mnist.main([*arguments, "--epochs", "1", "--device", "cpu"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert results["sizes"].startswith("1,000 train, 5,000 validation, 358 test")


def test_cluttered_is_hard_enough_for_claims():
    splits = jx.data.digits("cluttered")
    train = jx.data.device_loader(splits.train, 64)
    model = jx.nn.ConvNet(
        input_shape=(56, 56, 1), widths=(8, 16, 32), dropout=0.25, rngs=nnx.Rngs(0)
    )
    schedule = optax.cosine_onecycle_schedule(4 * len(train), 4e-3)
    acc = jx.Accelerator(
        model, optax.adam(schedule), augment=jx.augment.random_rotation(10, "bilinear")
    )
    acc.fit(train, epochs=4, progress=False)
    accuracy = acc.evaluate(jx.data.device_loader(splits.test, 64, shuffle=False)).accuracy
    assert 0.90 < accuracy < 0.96


@pytest.mark.parametrize("case", ZOO, ids=lambda c: c.name)
def test_eight_devices_train_the_zoo_as_one(case):
    def trained(devices: int) -> dict:
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        fn, params = case.build()
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        # Three steps of SGD: training MobileNet on 16 images makes rounding errors grow 15 times
        # a step, and Adam makes whole steps of the noise of gradients that are zero.
        acc = jx.Accelerator((fn, params), optax.sgd(1e-2), mesh=mesh, precision="float64")
        rng = np.random.default_rng(0)
        shape = (16, *case.shape[1:])
        data = [(rng.uniform(size=shape), rng.integers(0, 10, 16)) for _ in range(3)]
        acc.fit(data, progress=False)
        return flatten(acc.params)

    with jax.enable_x64(True):
        one, eight = trained(1), trained(8)
        for path, leaf in one.items():
            np.testing.assert_allclose(leaf, eight[path], rtol=1e-9, atol=1e-9, err_msg=path)
