"""How much memory quantizing takes, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

# glibc gives back what is freed, so that what is held is seen.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LEAST = 4 * 100e6  # bytes
# Of the float model: 1.25 are both trees, 0.04 what the compiler takes here.
MOST = 1.32

CODE = """
import json, threading, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import jaxaccel as jx

NAMES = [f"dense{i}" for i in range(6)]

def net(params, x):
    for name in NAMES:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x

def made(width):
    random = np.random.default_rng(0)
    draw = lambda: jax.device_put(random.standard_normal((width, width), np.float32))
    return {name: {"kernel": draw(), "bias": jnp.zeros(width)} for name in NAMES}

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def peak(call):
    found, over = [resident()], threading.Event()
    def watch():
        while not over.wait(0.001):
            found.append(resident())
    thread = threading.Thread(target=watch)
    thread.start()
    result = jax.block_until_ready(call())
    over.set()
    thread.join()
    return max(found), result

ways = {
    "float": lambda params, x: jax.jit(net)(params, x),
    "int8": lambda params, x: jx.quantize.int8(net, params, [x], progress=False)[1],
    "weights": lambda params, x: jx.quantize.weights(params),
}
for way in ways.values():  # what is loaded and compiled once for all
    way(made(8), jnp.ones((4, 8)))
before, params, found = resident(), jax.block_until_ready(made(4096)), {}
x = jnp.ones((4, 4096))
time.sleep(0.5)  # until the copies that it was made of are gone
found["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
for name, way in ways.items():
    found[name] = peak(lambda: way(params, x))[0] - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantizing_a_large_network_holds_one_leaf_more_at_most():
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | GIVES_BACK,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["bytes"] > LEAST
    for way in ("int8", "weights"):
        assert found[way] < MOST * found["float"], found
        assert found[way] > 1.2 * found["float"], found  # both trees are there
