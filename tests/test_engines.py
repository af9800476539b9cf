"""`jx.export.compile`: three engines, called alike; their places in comparisons."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from tests.artefacts import W, X, net
from tests.models import ZOO, normal
from tests.onnx_engines import close

ENGINES = ("xla", "onnxruntime", "openvino")
NAMED = {case.name: case for case in ZOO}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["convnet", "linen", "resnet20"])
def test_networks_at_three_batch_sizes(engine, name):
    fn, params = NAMED[name].build()
    call = jx.export.compile(fn, params, NAMED[name].images(), engine=engine)
    assert call.engine == engine
    assert call.params is params
    for size in (1, 2, 5):
        x = normal(size, size, *NAMED[name].shape[1:])
        found = call(x)
        close([found], [jax.jit(fn)(params, x)])
        assert isinstance(found, jax.Array if engine == "xla" else np.ndarray)


@pytest.mark.parametrize("engine", ENGINES)
def test_trees_of_arguments_and_results(engine):
    def fn(params, first, second):
        y = first["a"] @ params["w"] + second[1]
        return {"y": y, "both": [first["a"] * 2, None, (y.sum(1),)]}

    first, second = {"a": X}, (None, jnp.float32(3))
    call = jx.export.compile(
        fn, {"w": W}, first, second, engine=engine, batch_axes=({"a": 0}, None)
    )
    for size in (1, 3):
        given = {"a": np.asarray(normal(size, size, 3))}
        expected = fn({"w": W}, given, second)
        for number in (3.0, second[1]):
            found = call(given, (None, number))
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            close(jax.tree.leaves(found), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_read(engine, place):
    fn = lambda p, *args: args[place] * p
    given = jnp.ones((4, 3)), jnp.ones((4, 2)) * 2
    call = jx.export.compile(fn, jnp.float32(2), *given, engine=engine)
    np.testing.assert_array_equal(call(*given), given[place] * 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_from_several_threads(engine):
    call = jx.export.compile(net, {"w": W}, X, engine=engine)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, [X + k for k in range(40)]))
    for k, one in enumerate(found):
        np.testing.assert_allclose(one, (X + k) @ W, rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_results_are_not_overwritten(engine):
    call = jx.export.compile(net, {"w": W}, X, engine=engine)
    once = call(X)
    kept = np.array(once)
    call(X + 1)
    np.testing.assert_array_equal(once, kept)
    given = np.asarray(X).T.copy().T  # in another order
    bound = call.bind(given)
    np.testing.assert_array_equal(bound(), kept)


def test_a_comparison_holds_them_all():
    fn, params = NAMED["convnet"].build()
    x = NAMED["convnet"].images()
    compiled = {name: jx.export.compile(fn, params, x, engine=name) for name in ENGINES}
    found = jx.measure.compare({"jit": (fn, params), **compiled}, x, rounds=2, min_time=1e-3,
                               show=False)  # fmt: skip
    assert [row.name for row in found.rows] == ["jit", *ENGINES]
    assert {(row.parameters, row.parameter_bytes) for row in found.rows} == {(21840, 87360)}
    assert all(row.median_ms > 0 for row in found.rows)
    called = []
    spy = jx.export.Compiled("spy", params, lambda *args: lambda: called.append(args))
    jx.measure.compare({"spy": spy}, x, rounds=2, min_time=1e-6, show=False)
    assert len(called) > 2
    assert all(given is called[0][0] for (given,) in called)
    with pytest.raises(TypeError, match=r"^candidates\['none'\]: function; give the pair"):
        jx.measure.compare({"none": net}, x)  # pyright: ignore


def test_what_was_loaded_runs_on_xla(tmp_path):
    jx.export.save(tmp_path / "net", net, {"w": W}, X)
    fn, params = jx.export.load(tmp_path / "net")
    np.testing.assert_array_equal(jx.export.compile(fn, params, X)(X), X @ W)
    with pytest.raises(TypeError, match=r"was loaded by jx\.export\.load: "):
        jx.export.compile(fn, params, X, engine="onnxruntime")


@pytest.mark.parametrize("engine", ENGINES)
def test_other_arguments(engine):
    call = jx.export.compile(net, {"w": W}, X, engine=engine)
    for message, args in {
        r"args/0: float32\[4,2\], expected float32\[batch,3\]": (jnp.ones((4, 2)),),
        r"args/0: int32\[4,3\], expected float32\[batch,3\]": (jnp.ones((4, 3), "int32"),),
        r"args: PyTreeDef.*, expected PyTreeDef\(\(\*,\)\)": (X, X),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(*args)
    fixed = jx.export.compile(net, {"w": W}, X, engine=engine, batch_axes=None)
    with pytest.raises(ValueError, match=r"^args/0: float32\[5,3\], expected float32\[4,3\]$"):
        fixed(jnp.ones((5, 3)))


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match=r"^engine='tensorrt' must be one of 'xla', 'onnxruntime', "
                       "'openvino'$"):  # fmt: skip
        jx.export.compile(net, {"w": W}, X, engine="tensorrt")  # pyright: ignore
    with pytest.raises(NotImplementedError, match="sort"):
        jx.export.compile(lambda p, x: jnp.sort(x @ p["w"], 0), {"w": W}, X, engine="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match="engine='openvino' is not installed: pip install "
                       "openvino"):  # fmt: skip
        jx.export.compile(net, {"w": W}, X, engine="openvino")


@pytest.mark.parametrize("engine", ENGINES)
def test_examples_that_do_not_fit(engine):
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        jx.export.compile(net, {"w": W}, jnp.ones((4, 2)), engine=engine)
    with pytest.raises(ValueError, match=r"^args/0: of shape \(.*\), has no axis 5 for the batch"):
        jx.export.compile(net, {"w": W}, X, engine=engine, batch_axes=5)


def test_faults_of_engines(monkeypatch):
    empty = lambda params, x: (jnp.zeros((0, 3)), x)
    call = jx.export.compile(empty, {"w": W}, X, engine="openvino")
    with pytest.raises(RuntimeError, match=r"^openvino gives float32\[\] for result 0, which is "
                       r"float32\[0,3\]: it has a fault in what this function needs; use another "
                       "engine$"):  # fmt: skip
        call(X)
    from jaxaccel.export import _engines

    def started(engine, content):
        raise OSError("no such operation")

    monkeypatch.setattr(_engines, "started", started)
    with pytest.raises(RuntimeError, match=r"^engine='onnxruntime' does not take what was written: "
                       "no such operation$"):  # fmt: skip
        jx.export.compile(net, {"w": W}, X, engine="onnxruntime")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_newer_operations_and_keys(engine):
    fn = lambda params, x, key: (x & params["w"], x)
    x = jnp.arange(4)
    call = jx.export.compile(
        fn, {"w": jnp.int32(3)}, x, jax.random.key(0), engine=engine, batch_axes=(0, None), opset=18
    )
    np.testing.assert_array_equal(call(x, jax.random.key(1))[0], x & 3)


def test_all_cores_of_the_process(monkeypatch):
    from jaxaccel.export import _engines

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    assert _engines._threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert _engines._threads() == 1
