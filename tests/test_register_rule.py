"""Rules of one's own: what is refused, and that `check_rule` catches wrong ones."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxaccel as jx
from jaxaccel._rules import _table
from tests.rules import check, shape

A = shape(4, 3)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(_table, "_RULES", dict(_table._RULES))


def keep(t, node, x):
    return [list(x)]


def replace(name, tie, resize=None):
    jx.register_rule(name, tie, resize, replace=True)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((lax.sin, keep), TypeError, "primitive: .*sin.* is neither a Primitive nor the name of"),
        ((7, keep), TypeError, "primitive: 7 is neither a Primitive"),
        (("cholesky", None), TypeError, "tie: None cannot be called; see jx.register_rule"),
        (("cholesky", keep, 3), TypeError, "resize: 3 cannot be called; see jx.register_rule"),
        (("sin", keep), ValueError, "'sin' has a rule already; pass replace=True to replace it"),
        ((lax.sin_p, keep), ValueError, "'sin' has a rule already"),
    ],
)
def test_bad_arguments_are_refused(args, error, message):
    before = dict(_table._RULES)
    with pytest.raises(error, match=message):
        jx.register_rule(*args)
    assert before == _table._RULES


def test_a_new_rule_is_used():
    def triangular(t, node, x):
        for axis in x:
            t.pin(axis, "it is factored")
        return [[t.whole, t.whole]]

    jx.register_rule("cholesky", triangular)
    check(jnp.linalg.cholesky, [jnp.eye(3)], ["it is factored"])


def test_a_rule_can_be_replaced():
    def never_zero(t, node, x):
        return [[t.same(axis, zero=False) for axis in x]]

    replace("sin", never_zero)
    check(lambda x: jnp.sin(x).sum(1), [A], [("free", "sums over")])


def reversed_tie(t, node, x, y):
    """As if the second operand were turned around."""
    return [[t.same(x[k], y[k][::-1] if k == 1 else y[k]) for k in range(len(x))]]


def untied(t, node, x, y):
    return [list(x)]


def test_a_wrong_tie_is_caught():
    replace("add", reversed_tie)
    with pytest.raises(ValueError, match=r"add.* result 0 is not the one with zeros"):
        jx.check_rule(lax.add, A, A)


def test_a_missing_tie_is_caught():
    replace("add", untied)
    with pytest.raises(ValueError, match=r"add.* it does not run: "):
        jx.check_rule(lax.add, A, A)


def test_a_missing_pin_is_caught():
    replace("cumsum", keep)
    with pytest.raises(ValueError, match=r"cumsum.* result 0 is not zero where masked, on axis 1"):
        jx.check_rule(lambda x: lax.cumsum(x, 1), A)


def test_a_wrong_zero_is_caught():
    replace("cos", keep)
    with pytest.raises(ValueError, match="result 0 is not zero where masked, on axis 0"):
        jx.check_rule(lax.cos, A)
    with pytest.raises(ValueError, match=r"cos, reduce_sum.* is not the one with zeros"):
        jx.check_rule(lambda x: jnp.cos(x).sum(), A)


def test_a_wrong_size_is_caught():
    tie = _table.rule_of("broadcast_in_dim").tie
    replace("broadcast_in_dim", tie)
    fn = lambda x: lax.broadcast_in_dim(x, (4, 3, 2), (0, 1))
    with pytest.raises(ValueError, match="broadcast_in_dim"):
        jx.check_rule(fn, A)


def test_a_resize_that_does_not_cut_is_caught():
    replace("sin", keep, lambda node, operands, cut: [jnp.zeros((4, 3))])
    with pytest.raises(ValueError, match=r"sin at .* made shapes .* its rule is wrong"):
        jx.check_rule(lax.sin, A)


def test_a_resize_that_computes_something_else_is_caught():
    replace("sin", keep, lambda node, operands, cut: [2 * x for x in node.run(operands)])
    with pytest.raises(ValueError, match=r"sin.* result 0 is not the one with zeros"):
        jx.check_rule(lax.sin, A)


@pytest.mark.parametrize("axes", [[], [[]], [[0]], [[0, 0], [0, 0]]])
def test_a_rule_with_too_few_or_too_many_axes_is_named(axes):
    replace("sin", lambda t, node, x: [[x[k] for k in result] for result in axes])
    lengths = [len(result) for result in axes]
    message = (
        rf"the rule of 'sin' gives \{str(lengths)[:-1]}\] axes for results of shapes \[\(4, 3\)\]"
    )
    with pytest.raises(ValueError, match=message):
        jx.check_rule(lax.sin, A)


def test_an_error_inside_a_rule_names_the_primitive():
    replace("sin", lambda t, node: [])
    with pytest.raises(TypeError) as caught:
        jx.check_rule(lax.sin, A)
    assert any("in the rule of 'sin' for [(4, 3)]" in note for note in caught.value.__notes__)


def test_an_error_inside_a_resize_names_the_line():
    replace("sin", keep, lambda node: [])
    with pytest.raises(ValueError, match="it does not run") as caught:
        jx.check_rule(lambda x: lax.sin(x), A)
    (note,) = caught.value.__cause__.__notes__  # pyright: ignore[reportOptionalMemberAccess]
    assert note.startswith("in the rule of 'sin', at tests/test_register_rule.py:")


def test_a_report_is_printed_by_operand_and_axis():
    report = jx.check_rule(lambda x, i: x.max(0) * i, A, jnp.arange(3))
    lines = str(report).splitlines()
    assert lines[0].startswith("operand 0: axis 0 pinned: 'reduce_max' over it at ")
    assert ", axis 1 pinned: meets an axis of the input" in lines[0]
    assert lines[1:] == ["operand 1: axis 0 whole"]


def test_a_seed_gives_the_same_cuts_again():
    replace("add", reversed_tie)
    messages = []
    for seed in (0, 0, 1):
        with pytest.raises(ValueError, match="is wrong") as caught:
            jx.check_rule(lax.add, A, A, seed=seed)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] != messages[2]


def test_a_rule_may_not_be_trusted_because_it_pins_all():
    """No result differs then: the report is what shows it."""

    def pin_all(t, node, x):
        for axis in x:
            t.pin(axis, "to be sure")
        return [[t.whole] * len(x)]

    replace("sin", pin_all)
    assert jx.check_rule(lax.sin, A).axes[0][0].startswith("pinned: to be sure")


def test_keys_and_integers_are_no_parameters():
    report = jx.check_rule(
        lambda x, k, i: x + jax.random.normal(k, x.shape) + i.sum(),
        A,
        jax.random.key(0),
        jnp.ones(2, int),
    )
    assert report.axes == (("free", "free"), (), ("whole",))
