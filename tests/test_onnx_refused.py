"""What cannot be written for ONNX: refused by name, with the line or the path, and a way out."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccel as jx
from jaxaccel.export._onnx import model
from tests.onnx_operations import conv
from tests.test_onnx import PARAMS, X, plain, random

Pair = namedtuple("Pair", "a b")
FIX = "leave it out of fn, or write it in terms of other operations"
REFUSED = {
    "of the batch": (rf"random_bits \(tests/test_onnx.py:\d+ \(random\)\): cannot be written for "
                     f"ONNX; {FIX}", random, PARAMS, X),
    "of jax2onnx": (r"sort \(tests.*\): jax2onnx cannot write it: TypeError: lax.sort currently "
                    f"requires static axis length; {FIX}",
                    lambda params, x: lax.sort(x @ params["w"], dimension=0), PARAMS, X),
    "too new": (rf"cumprod \(.*\): cannot be written for ONNX; {FIX}",
                lambda params, x: lax.cumprod(x @ params["w"]), PARAMS, X),
    "in a loop": (rf"cumprod \(.*\): cannot be written for ONNX; {FIX}",
                  lambda w, x: lax.fori_loop(0, 3, lambda i, x: lax.cumprod(x @ w), x), X.T @ X, X),
    "bfloat16": (r"convert_element_type \(.*\): is of bfloat16, which engines do not compute in "
                 "by ONNX; cast parameters and arguments to float32 or float16",
                 lambda w, x: (x.astype(jnp.bfloat16) @ w).astype(jnp.float32),
                 jnp.ones((3, 3), jnp.bfloat16), X),
    "gaps": (r"reduce_window_sum \(.*\): ONNX has no pooling with gaps between the elements, of "
             "sums in dilated windows, or over more than three axes; write it in terms of other "
             "operations", lambda w, x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "VALID",
                                                          window_dilation=(1, 2)), PARAMS, X),
    "pooled integers": (r"reduce_window_max \(.*\): ONNX has no pooling of int32; cast to float32",
                        lambda w, x: lax.reduce_window(x, np.int32(-(2**31)), lax.max, (1, 2),
                                                       (1, 1), "SAME"), PARAMS, X.astype(int)),
    "combined by xor": (rf"reduce_xor \(.*\): jax2onnx cannot write it: .*; {FIX}",
                        lambda w, x: lax.reduce(x, np.int32(0), lax.bitwise_xor, (1,)), PARAMS,
                        X.astype(jnp.int32)),
    "applied": (r"scatter \(.*\): applies a function, of which ONNX has no form; read the "
                "elements, apply it, and set them",
                lambda w, x: x.at[:, x[0, :2].astype(int)].apply(jnp.sin), PARAMS, X),
    "two of the batch": (r"scatter \(.*\): reads by index along two axes of sizes that are not "
                         "known; pass batch_axes=None to export it for the sizes of the example "
                         "alone", lambda w, i: (i @ i.T).at[i[:, 0], i[:, 1]].set(1), PARAMS,
                         X.astype(int)),
    "one hot": (r"gather \(.*\): mode=.* has no form in ONNX; pass mode='clip'",
                lambda w, x: x.at[:, x[0].astype(int)].get(mode="one_hot"), PARAMS, X),
    "integers": (r"conv_general_dilated \(.*\): convolves integers; pass the function of "
                 r"jx.quantize.int8 itself", lambda k, x: conv(x, k, (1, 1), "SAME"),
                 jnp.ones((1, 1, 3, 3), jnp.int8), jnp.ones((1, 4, 4, 3), jnp.int8)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written(name, tmp_path):
    message, fn, params, x = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"^{message}(\n|$)"):
        jx.export.onnx(tmp_path / "a.onnx", fn, params, x)
    assert not list(tmp_path.iterdir())


BAD = {
    "opset": (ValueError, "opset=16: must be one of 17 to 23", lambda: model(plain, PARAMS, (X,),
              opset=16)),
    "kind of opset": (ValueError, "opset=18.0: must be one of 17 to 23",
                      lambda: model(plain, PARAMS, (X,), opset=18.0)),  # pyright: ignore
    "bfloat16 passed": (TypeError, "args/0: is of bfloat16, which engines neither take nor return; "
                        "cast it", lambda: model(plain, PARAMS, (X.astype(jnp.bfloat16),))),
    "complex result": (TypeError, "result: is of complex64, which engines neither take nor return; "
                       "cast it", lambda: model(lambda w, x: x * 1j, PARAMS, (X,))),
    "no result": (ValueError, "fn returns no arrays, but None",
                  lambda: model(lambda w, x: None, PARAMS, (X,))),
    "steps over the batch": (ValueError, "fn works for the example but not for every batch size: "
                             "Inconclusive.*; pass batch_axes=None to export it for the sizes of "
                             "the example alone",
                             lambda: model(lambda p, x: lax.map(lambda row: row @ p["w"], x),
                                           PARAMS, (X,))),
    "folder": (IsADirectoryError, ".*: is a folder; name a file", lambda: jx.export.onnx(
        "tests", plain, PARAMS, X)),
    "batch": (ValueError, "fn works for the example but not for every batch size: reshape "
            r"\(tests.*\) makes \(batch, 3\) \(2, 3\); pass "
              "batch_axes=None to export it for the sizes of the example alone",
              lambda: model(lambda params, x: x.reshape(2, 3) @ params["w"], PARAMS, (X,))),
    "axis": (ValueError, r"args/0: of shape \(2, 3\), has no axis 2 for the batch; pass .*",
             lambda: model(plain, PARAMS, (X,), batch_axes=2)),
    "key": (TypeError, "args/1: is a random key, which ONNX has not; let fn hold a fixed one, or "
            "draw the numbers before and pass these",
            lambda: model(lambda p, x, key: x + jax.random.normal(key, (3,))[None], PARAMS,
                          (X, jax.random.key(0)), batch_axes=(0, None))),
    "no numbers": (TypeError, "w: has no numbers yet; export outside of jax.jit, arrays",
                   lambda: model(plain, {"w": jax.ShapeDtypeStruct((3, 3), "float32")}, (X,))),
    "no array": (TypeError, "w: expected an array, got str; fn takes pytrees of arrays .*",
                 lambda: model(plain, {"w": "text"}, (X,))),
    "no parameters": (TypeError, "params: .* has no arrays; fn takes its parameters first",
                      lambda: model(lambda params, x: x, {}, (X,))),
    "own mistake": (TypeError, "dot_general requires contracting dimensions .*",
                    lambda: model(plain, PARAMS, (jnp.ones((2, 4)),))),
    "nodes": (TypeError, "result: a Pair; what goes in and comes out may be dicts, lists, "
              "tuples and arrays: .*",
              lambda: model(lambda params, x: Pair(x, x), PARAMS, (X,))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=f"^{message}(\n|$)"):
        call()
