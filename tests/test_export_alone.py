"""Artefacts of every network and every transform, in a process without any framework."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from tests.models import ZOO, Case
from tests.networks import frameworks, sequence, vision

ALONE = Path(__file__).with_name("load_alone.py")
FULL_TIER = pytest.mark.full
Made = tuple[Callable, Any]
Transform = Callable[[Callable, Any, jax.Array], Made]
NAMES = {case.name: case for case in ZOO}


def autotuned(fn: Callable, params: Any, x: jax.Array) -> Made:
    return jx.autotune(fn, mode="rules"), params


def faked(fn: Callable, params: Any, x: jax.Array) -> Made:
    qat = jx.quantize.fake(fn, params, [x])
    return qat, qat.params


def in_4_bits(fn: Callable, params: Any, x: jax.Array) -> Made:
    return lambda q, x: fn(jx.quantize.dequantize(q), x), jx.quantize.weights(params, bits=4)


def int8(**options: Any) -> Transform:
    return lambda fn, params, x: jx.quantize.int8(fn, params, [x], progress=False, **options)


def mixed(fn: Callable, params: Any, x: jax.Array) -> Made:
    whole, _ = jx.quantize.int8(fn, params, [x], progress=False)
    chosen = {row.where for row in whole.report.rows[::2]}
    where = lambda path, leaf: path in chosen
    return jx.quantize.int8(fn, params, [x], where=where, progress=False)


def everything(fn: Callable, params: Any, x: jax.Array) -> Made:
    fn, params = jx.fold.batchnorm(fn, params, x)
    fn, params = jx.prune.channels(fn, params, x, ratio=0.3)
    fn, params = jx.quantize.int8(fn, params, [x], progress=False)
    return autotuned(fn, params, x)


TRANSFORMS: dict[str, Transform] = {
    "fold": lambda fn, params, x: jx.fold.batchnorm(fn, params, x),
    "prune": lambda fn, params, x: jx.prune.channels(fn, params, x, ratio=0.5),
    "autotune": autotuned,
    "int8": int8(),
    "int8 power of two": int8(scales="power_of_two"),
    "int8 dynamic": int8(activations="dynamic"),
    "int8 weights": int8(activations="float"),
    "mixed": mixed,
    "fake": faked,
    "4 bits": in_4_bits,
    "everything": everything,
}


def stored(folder: Path, fn: Callable, params: Any, x: jax.Array, name: str = "saved") -> None:
    """An artefact, and what it should compute at two batch sizes that it was not saved at.

    Not at 1: there the rules choose some forms otherwise than for a batch of any size.
    """
    jx.export.save(folder / name, fn, params, x)
    expected = {}
    for size in (3, len(x) + 3):
        batch = jnp.concatenate([x, x[::-1], x])[:size]
        expected[f"{size} x"] = np.asarray(batch)
        results = jax.tree.leaves(jax.jit(fn)(params, batch))
        expected |= {f"{size} result {k}": np.asarray(y) for k, y in enumerate(results)}
    np.savez(folder / "expected.npz", **expected)


def check_alone(folder: Path) -> None:
    command = [sys.executable, str(ALONE), str(folder)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-2000:]
    found = json.loads(out.stdout)
    assert not any(found["different"].values()), found
    assert len(found["different"]) == len(list(folder.iterdir()))
    assert not found["loaded"]


@pytest.mark.parametrize(
    "cases", [[c for c in ZOO if c.name != "mobilenet"], *(pytest.param(cases, marks=FULL_TIER)
              for cases in (vision.CASES, sequence.CASES, frameworks.CASES, [NAMES["mobilenet"]]))],
    ids=["zoo", "vision", "sequence", "frameworks", "mobilenet"],
)  # fmt: skip
def test_networks(cases: Sequence[Case], tmp_path: Path):
    for case in cases:
        (tmp_path / case.name).mkdir()
        stored(tmp_path / case.name, *case.build(), case.images())
    check_alone(tmp_path)


SHORT = {"linen": ["prune", "int8 dynamic", "4 bits"], "convnet": ["int8", "everything"]}
FULL = {case.name: [*TRANSFORMS] for case in ZOO}


@pytest.mark.filterwarnings("ignore:jx.fold.batchnorm. nothing to fold")
@pytest.mark.parametrize(
    ("model", "transforms"),
    [*SHORT.items(), *(pytest.param(*item, marks=FULL_TIER) for item in FULL.items())],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_transforms(model: str, transforms: Sequence[str], tmp_path: Path):
    case = NAMES[model]
    fn, params = case.build()
    for name, transform in ((name, TRANSFORMS[name]) for name in transforms):
        (tmp_path / name).mkdir()
        stored(tmp_path / name, *transform(fn, params, case.images()), case.images(), "saved.zip")
    check_alone(tmp_path)
