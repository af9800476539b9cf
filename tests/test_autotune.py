"""`jx.autotune`: what is chosen, what is kept, and when nothing is timed."""

import json
import re
import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

import jaxaccel as jx
from jaxaccel import _autotune, _choices
from jaxaccel._choices import Choices
from jaxaccel._forms import FORMS, XLA, Form
from jaxaccel._graph import graph_of
from jaxaccel._timing import Timed
from jaxaccel._tuned import by_rules, op_of

LAYOUT = ("NHWC", "HWIO", "NHWC")
KERNEL, IMAGES = (
    jax.random.normal(jax.random.key(seed), shape)
    for seed, shape in enumerate([(3, 3, 1, 4), (2, 6, 6, 4)])
)


def net(kernel, x):
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=4
    )
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


class Clock:
    """In place of `timed`: the seconds of each form, and what was asked for."""

    def __init__(self, seconds=None, whole=(2.0, 1.0)):
        self.seconds, self.whole, self.asked = seconds or {}, whole, []

    def __call__(self, fns, operands, rounds=7, terms=1):
        self.asked.append(list(fns))
        if "plain" in fns:
            return Timed(dict(zip(("plain", "tuned"), self.whole, strict=True)), {})
        return Timed({name: self.seconds.get(name, 1.0) for name in fns}, {})


@pytest.fixture
def clock(monkeypatch):
    """Times every form at one second but for those that a test sets."""
    found = Clock()
    monkeypatch.setattr(_autotune, "timed", found)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return found


@pytest.fixture
def tune(tmp_path):
    """`autotune` with a cache of the test's own."""
    return partial(jx.autotune, cache=tmp_path)


def forms(report) -> dict[str, str]:
    return {row.op.name: row.form for row in report.rows}


def primitives(fn, *args) -> str:
    return str(jax.make_jaxpr(fn)(*args))


def test_the_fastest_form_is_taken(tune, clock):
    clock.seconds = {"shifted": 0.5, "maxima": 0.99}
    fast = tune(net)
    np.testing.assert_allclose(jax.jit(fast)(KERNEL, IMAGES), net(KERNEL, IMAGES), rtol=1e-6)
    # One percent is less than two timings of the same code differ.
    assert forms(fast.report) == {"conv_general_dilated": "shifted", "reduce_window_max": XLA}
    assert "tuned_conv_general_dilated" in primitives(fast, KERNEL, IMAGES)


def test_a_function_that_is_not_faster_comes_back(tune, clock):
    clock.seconds, clock.whole = {"shifted": 0.5}, (1.0, 1.0)
    fast = tune(net)
    assert compiled_text(fast) == compiled_text(net)
    assert "it is left as it is" in str(fast.report)


def compiled_text(fn) -> str:
    """The program without the names of its functions."""
    return re.sub(r"@\w+", "", jax.jit(fn).lower(KERNEL, IMAGES).as_text())


def test_its_derivatives_are_chosen_all_the_same(tune, clock):
    clock.seconds, clock.whole = {"shifted": 0.5, "summed": 0.5}, (1.0, 1.0)
    fast = jax.jit(tune(net))
    text = jax.jit(jax.grad(lambda k: fast(k, IMAGES).sum())).lower(KERNEL).as_text()
    assert text.count("stablehlo.convolution") == 1  # forward alone


def test_what_was_timed_is_kept_on_disk(tune, clock, tmp_path):
    clock.seconds = {"shifted": 0.5}
    jax.jit(tune(net))(KERNEL, IMAGES)
    asked = len(clock.asked)
    assert asked == 3  # two ops and the whole
    again = tune(net)
    jax.jit(again)(KERNEL, IMAGES)
    assert len(clock.asked) == asked
    assert forms(again.report)["conv_general_dilated"] == "shifted"
    (file,) = tmp_path.iterdir()
    assert set(json.loads(file.read_text())) == {"environment", "rows"}


def test_other_shapes_are_timed_by_themselves(tune, clock):
    fast = jax.jit(tune(net))
    fast(KERNEL, IMAGES)
    asked = len(clock.asked)
    fast(KERNEL, jnp.ones((1, 8, 6, 4)))
    assert len(clock.asked) == asked + 2  # XLA's own is the fastest: the whole is not timed


def test_another_environment_is_timed_anew(tune, clock, monkeypatch):
    jax.jit(tune(net))(KERNEL, IMAGES)
    asked = len(clock.asked)
    monkeypatch.setattr(_choices, "environment", lambda: {"jax": "another"})
    jax.jit(tune(net))(KERNEL, IMAGES)
    assert len(clock.asked) == 2 * asked


@pytest.mark.parametrize("other", ["gone", "product"])  # a form of other calls
def test_other_forms_than_apply_are_timed_anew(tune, clock, tmp_path, other):
    clock.seconds = {"shifted": 0.5}
    jax.jit(tune(net))(KERNEL, IMAGES)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"shifted"', f'"{other}"'))
    fast = tune(net)
    jax.jit(fast)(KERNEL, IMAGES)
    assert forms(fast.report)["conv_general_dilated"] == "shifted"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"environment": 1', "\x00\xff", '{"rows": 3}'])
def test_a_damaged_cache_is_timed_anew(tune, clock, tmp_path, text):
    jax.jit(tune(net))(KERNEL, IMAGES)
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read .* it is timed anew"):
        jax.jit(tune(net))(KERNEL, IMAGES)
    assert json.loads(file.read_text())["rows"].keys() == whole["rows"].keys()


def test_a_damaged_row_is_timed_anew(tune, clock, tmp_path):
    jax.jit(tune(net))(KERNEL, IMAGES)
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    for key in found["rows"]:
        found["rows"][key] = {"form": 3}
    file.write_text(json.dumps(found))
    asked = len(clock.asked)
    jax.jit(tune(net))(KERNEL, IMAGES)
    assert len(clock.asked) == 2 * asked


def test_a_cache_that_cannot_be_written_is_said(clock, tmp_path):
    (tmp_path / "file").write_text("")
    fast = jx.autotune(net, cache=tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot be written .* Set JAXACCEL_CACHE"):
        assert jax.jit(fast)(KERNEL, IMAGES).shape == (2, 3, 3, 4)


def test_what_others_wrote_meanwhile_stays(tmp_path):
    first, second = Choices(tmp_path), Choices(tmp_path)
    first.set("a", {"form": XLA})
    second.set("b", {"form": XLA})
    first.save()
    second.save()
    third = Choices(tmp_path)
    assert third.get("a")
    assert third.get("b")


def test_a_form_that_differs_is_never_taken(tune, monkeypatch):
    forms_ = dict(FORMS["conv_general_dilated"])
    wrong = lambda *args, **p: forms_["shifted"].run(*args, **p) * (1 + 2e-5)
    monkeypatch.setitem(FORMS, "conv_general_dilated", {"wrong": Form(wrong, lambda op: True)})
    fast = tune(net)
    jax.jit(fast)(KERNEL, IMAGES)
    assert forms(fast.report)["conv_general_dilated"] == XLA
    assert "wrong: not taken, differs by 2" in str(fast.report)


def test_real_timings_choose_among_right_forms(tune):
    fast = tune(net)
    x, kernel = IMAGES, KERNEL
    loss = lambda f: lambda k: (f(k, x) ** 2).sum()
    found, grad = jax.jit(jax.value_and_grad(loss(fast)))(kernel)
    expected, wanted = jax.value_and_grad(loss(net))(kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, wanted, rtol=1e-4)
    # Differentiated outside: every derivative chose when it was lowered.
    names = {row.op.name for row in fast.report.rows}
    assert {"conv_general_dilated", "reduce_window_max", "select_and_scatter_add"} <= names
    assert all(row.seconds for row in fast.report.rows if row.form != XLA)
    assert fast.report.whole is None


def test_a_training_step_is_timed_as_a_whole(tune, clock):
    clock.seconds = {"shifted": 0.5, "scattered": 0.5}

    def step(kernel, x):
        return kernel - jax.grad(lambda k: (net(k, x) ** 2).sum())(kernel)

    fast = tune(step)
    np.testing.assert_allclose(
        jax.jit(fast)(KERNEL, IMAGES), step(KERNEL, IMAGES), rtol=1e-5, atol=1e-6
    )
    assert ["plain", "tuned"] in clock.asked
    assert fast.report.whole.taken
    assert "2.00 times as fast" in str(fast.report)
    assert fast.report.to_dict()["whole"]["tuned"] == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda f: jax.jit(jax.vmap(f, (None, 0)))(KERNEL, IMAGES[None]),
        lambda f: jax.jit(jax.grad(lambda k: f(k, IMAGES).sum()))(KERNEL),
        lambda f: jax.jit(lambda k: jax.jit(lambda x: f(k, x))(IMAGES))(KERNEL),
        lambda f: lax.scan(lambda c, x: (c, f(KERNEL, x)), 0, IMAGES[None]),
    ],
    ids=["vmap", "grad", "closure", "scan"],
)
def test_it_may_be_called_within_any_trace(tune, clock, call):
    clock.seconds = {"shifted": 0.5}
    fast = tune(net)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), call(fast), call(net))
    assert "shifted" in {row.form for row in fast.report.rows}


def test_loops_and_effects_are_not_run_on_random_numbers(tune, clock):
    clock.seconds = {"shifted": 0.5}

    def until(kernel, x):
        return lax.while_loop(lambda y: y.sum() > 1, lambda y: y / 2, net(kernel, x))

    def said(kernel, x):
        jax.debug.callback(lambda: None)
        return net(kernel, x)

    for fn in (until, said):
        clock.asked.clear()
        jax.jit(tune(fn))(KERNEL, IMAGES)
        assert ["plain", "tuned"] not in clock.asked


def test_rules_time_nothing(clock, tmp_path):
    fast = jx.autotune(net, mode="rules", cache=tmp_path)
    jax.jit(fast)(KERNEL, IMAGES)
    assert clock.asked == []
    assert forms(fast.report) == {"conv_general_dilated": "shifted", "reduce_window_max": "maxima"}
    assert list(tmp_path.iterdir()) == []


def test_several_devices_are_not_timed(tune, clock, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(IMAGES, NamedSharding(mesh, jax.P("data")))
    jax.jit(tune(net))(KERNEL, x)
    tune(net)(KERNEL, x)
    assert clock.asked == []


def test_several_processes_are_not_timed(tune, clock, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    jax.jit(tune(net))(KERNEL, IMAGES)
    assert clock.asked == []


def test_a_symbolic_batch_is_not_timed(tune, clock):
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 6, 6, 4), jnp.float32)
    for of in (lambda f: f, lambda f: jax.grad(lambda k, x: f(k, x).sum())):
        exported = jax.export.export(jax.jit(of(tune(net))))(KERNEL, images)
        found, expected = exported.call(KERNEL, IMAGES), of(net)(KERNEL, IMAGES)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert clock.asked == []


def test_another_platform_is_not_timed(tmp_path, clock):
    node = graph_of(net, *map(jax.typeof, (KERNEL, IMAGES)))[0].nodes[0]
    tuner = _autotune.Measured(Choices(tmp_path), True)
    assert tuner.choose(op_of(node), "cuda", 1) == XLA
    assert clock.asked == []
    tuner.choose(op_of(node), "cpu", 1)
    assert clock.asked != []


def test_rules_choose_for_each_platform(tune, clock):
    exported = jax.export.export(jax.jit(tune(net, mode="rules")), platforms=["cpu", "cuda"])
    text = str(exported(KERNEL, IMAGES).mlir_module())
    assert "stablehlo.convolution" in text  # for CUDA
    assert clock.asked == []


def test_nothing_is_timed_on_another_device_than_the_default_kind(tune, clock, monkeypatch):
    fast, (cpu, *_) = tune(net), jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(cpu):
        jax.jit(fast)(np.asarray(KERNEL), np.asarray(IMAGES))
    assert clock.asked == []


def test_the_settings_of_all_threads_do_not_reach_the_forms(tune):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        fast = tune(net)
        jax.jit(fast)(KERNEL, IMAGES)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "allow")
    assert "shifted" in fast.report.rows[0].seconds


def test_the_whole_is_known_by_what_it_was_before(tune, clock):
    clock.seconds = {"shifted": 0.5, "maxima": 0.5}
    for fn in (by_rules(net), net):
        jax.jit(tune(fn))(KERNEL, IMAGES)
    assert [fns for fns in clock.asked if "plain" in fns] == 2 * [["plain", "tuned"]]


def test_float64_and_half_precision(tune):
    for dtype in (jnp.float64, jnp.bfloat16):
        with jax.enable_x64(True):
            kernel, x = KERNEL.astype(dtype), IMAGES.astype(dtype)
            fast = tune(net)
            found = jax.jit(fast)(kernel, x)
            assert found.dtype == dtype
            assert any("shifted" in row.seconds for row in fast.report.rows)
            tol = 1e-10 if dtype == jnp.float64 else 2e-2
            expected = jax.jit(net)(kernel, x).astype(float)
            np.testing.assert_allclose(found.astype(float), expected, rtol=tol)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jx.autotune(net, mode="fast"), ValueError, "mode: 'fast' is neither"),  # pyright: ignore
        (lambda: jx.autotune(3), TypeError, "fn: 3 cannot be called; give a function"),  # pyright: ignore
        (
            lambda: jx.autotune(net, mode="rules")("a", 1),
            TypeError,
            "args/0: expected an array, got str",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_signature_and_the_name_stay(tune):
    fast = tune(net)
    assert fast.__name__ == "net"
    assert repr(fast) == "<jx.autotune of net>"
    assert fast(KERNEL, x=IMAGES).shape == (2, 3, 3, 4)


def test_it_draws_no_bar_where_nobody_looks(tune, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(net)(KERNEL, IMAGES)
    assert capsys.readouterr().err == ""


def test_equal_graphs_are_described_alike():
    described = lambda x: _autotune._described(graph_of(net, jax.typeof(KERNEL), jax.typeof(x))[0])
    assert described(IMAGES) == described(IMAGES + 1)
    assert described(IMAGES) != described(IMAGES[:1])
