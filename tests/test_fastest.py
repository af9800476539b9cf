"""int8's mode="fastest": what it times, and what it makes of the times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel._timing import Timed
from jaxaccel.quantize import _fastest
from jaxaccel.quantize._fastest import ALL, CHOSEN, FLOAT
from tests.models import normal
from tests.test_int8 import CONV, DENSE, IMAGES, X, dense_average, ran, residual, snr


@pytest.fixture
def clock(monkeypatch):
    """Runs what is timed; gives the times that it is told, and keeps what ran."""

    class Clock:
        times: list
        ran: list

        def __call__(self, functions, operands, rounds, terms):
            found = {name: jax.jit(fn)(*operands) for name, fn in functions.items()}
            self.ran.append(found)
            times = self.times[len(self.ran) - 1]
            if isinstance(times, Timed):
                return times
            return Timed({name: times[name] for name in functions}, {})

    clock = Clock()
    clock.times, clock.ran = [], []
    monkeypatch.setattr(_fastest, "timed", clock)
    return clock


def paths(report):
    return [row.where for row in report.rows]


def fastest(fn, params, x, **options):
    return jx.quantize.int8(fn, params, [x], calibration="minmax", mode="fastest", **options)


@pytest.mark.parametrize("scales", ["float", "power_of_two"])
def test_slower_layers_stay_in_floating_point(clock, scales):
    gains, loses = {FLOAT: 2.0, ALL: 1.0}, {FLOAT: 1e-3, ALL: 2e-3}
    whole = {FLOAT: 3.0, ALL: 2.0, CHOSEN: 1.0}
    clock.times = [loses, gains, whole]  # two layers are equal
    small, new = fastest(residual, CONV, IMAGES, scales=scales)
    left = small.report.left[0]
    assert left.reason == "faster so on this device: 1 ms for 2"
    assert "1e+03 ms as chosen" in str(small.report)
    others = lambda path, leaf: path != left.where
    same, params = jx.quantize.int8(
        residual, CONV, [IMAGES], calibration="minmax", where=others, scales=scales
    )
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_array_equal(ran(small, new, IMAGES), ran(same, params, IMAGES))


def test_what_is_timed_is_the_layer(clock):
    clock.times = [{FLOAT: 2.0, ALL: 1.0}] * 2 + [{FLOAT: 2.0, ALL: 1.0}]
    small, _ = fastest(dense_average, DENSE, X)
    assert paths(small.report) == ["a/kernel", "b/kernel"]
    first, second, whole = clock.ran
    assert first[FLOAT].dtype == jnp.float32
    assert first[ALL].dtype == jnp.int8  # which the next one reads
    assert first[FLOAT].shape == first[ALL].shape == (*X.shape[:-1], DENSE["a"]["kernel"].shape[1])
    assert (first[FLOAT] >= 0).all()  # with its relu
    assert second[ALL].dtype == jnp.float32
    assert snr(whole[FLOAT], dense_average(DENSE, X)) > 100
    assert not jnp.isnan(whole[ALL]).any()


def test_equal_layers_are_timed_once(clock):
    params = {name: {"kernel": normal(seed, 8, 8)} for seed, name in enumerate("abc")}

    def net(params, x):
        for name in "abc":
            x = jax.nn.relu(x @ params[name]["kernel"])
        return x

    clock.times = [{FLOAT: 2.0, ALL: 1.0}] * 4
    fastest(net, params, normal(9, 4, 8))
    # The first reads real numbers, the last gives some, on integers.
    assert len(clock.ran) == 3


def test_all_of_it_in_floating_point(clock):
    clock.times = [{FLOAT: 1.0, ALL: 1.0}] * 2 + [{FLOAT: 1.0, ALL: 2.0}]
    small, new = fastest(dense_average, DENSE, X)
    assert not small.report.rows
    assert {one.reason for one in small.report.left} == {
        "the whole call is faster so on this device"
    }
    assert jax.tree.structure(new) == jax.tree.structure(DENSE)
    np.testing.assert_allclose(ran(small, new, X), ran(dense_average, DENSE, X), rtol=1e-6)


def test_a_layer_that_does_not_compile_stays_in_floating_point(clock):
    fails = Timed({FLOAT: 1.0}, {ALL: "no such convolution"})
    clock.times = [fails, {FLOAT: 2.0, ALL: 1.0}, {FLOAT: 2.0, ALL: 3.0, CHOSEN: 1.0}]
    small, _ = fastest(dense_average, DENSE, X)
    (left,) = small.report.left
    assert left.reason == "not on integers on this device: no such convolution"


@pytest.mark.parametrize("activations", ["dynamic", "float"])
def test_other_activations(clock, activations):
    clock.times = [{FLOAT: 1.0, ALL: 2.0}, {FLOAT: 2.0, ALL: 1.0}, {CHOSEN: 1.0, FLOAT: 2, ALL: 2}]
    small, new = fastest(dense_average, DENSE, X, activations=activations)
    assert paths(small.report) == ["b/kernel"]
    assert snr(ran(small, new, X), ran(dense_average, DENSE, X)) > 30


def test_with_a_real_clock():
    small, new = fastest(residual, CONV, IMAGES)
    assert {FLOAT, ALL} <= small.report.seconds.keys() <= {FLOAT, ALL, CHOSEN}
    assert all(0 < seconds < 1 for seconds in small.report.seconds.values())
    assert len(small.report.rows) + len(small.report.left) == 3
    assert snr(ran(small, new, IMAGES), ran(residual, CONV, IMAGES)) > 30


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="mode='fast' must be one of 'all', 'fastest'"):
        jx.quantize.int8(dense_average, DENSE, [X], mode="fast")  # pyright: ignore
