"""Writes the artefacts that `test_export_kept.py` reads; once for every version of the format."""

from pathlib import Path

import jax
import numpy as np

import jaxaccel as jx
from jaxaccel.export._manifest import VERSION
from tests.models import LINEN
from tests.saved.nodes import every_node, with_nodes

if __name__ == "__main__":
    folder = Path(__file__).with_name(f"v{VERSION}")
    x = LINEN.images()
    fn, params = jx.prune.channels(*LINEN.build(), x, ratio=0.25)
    fn, params = jx.quantize.int8(fn, params, [x], progress=False)
    fn = jx.autotune(fn, mode="rules")
    jx.export.save(folder / "net", fn, params, x)
    jx.export.save(folder / "net.zip", fn, params, x)
    jx.export.save(folder / "nodes.zip", with_nodes, every_node(), x[:, 0, 0])
    batches = [np.asarray(LINEN.images(seed)[:size]) for seed, size in ((1, 2), (2, 1))]
    results = [np.asarray(jax.jit(fn)(params, batch)) for batch in batches]
    np.savez(folder / "expected.npz", a=batches[0], b=batches[1], of_a=results[0], of_b=results[1])
