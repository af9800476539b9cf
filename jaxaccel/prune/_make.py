"""Plans made: for a ratio, or for a budget."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from jaxaccel import _groups
from jaxaccel._graph import leaf_paths
from jaxaccel.prune._choose import Removed, Scope, Where, lowest, scored, shares
from jaxaccel.prune._count import Counter
from jaxaccel.prune._criteria import Criterion, finite, l1
from jaxaccel.prune._paths import Kept, Shapes
from jaxaccel.prune._plan import Change, Plan, Row

Resource = Literal["parameters", "flops", "latency"]
_TRIES = {"parameters": 16, "flops": 16, "latency": 5}


def plan(
    fn: Callable,
    params: PyTree,
    *example: Any,
    ratio: float | None = None,
    budget: Mapping[Resource, float] | None = None,
    criterion: Criterion = l1,
    scope: Scope = "local",
    where: Where | None = None,
    round_to: int | None = None,
) -> Plan:
    """Chooses channels whose removal equals setting their slices to zero.

    Args:
        fn: ``fn(params, *args)``, any JAX function. Give the inference; if parts of the model
            are read in training alone, both: ``lambda p, x: (fn(p, x), fn.train(p, key, x)[0])``.
        params: its parameters: arrays.
        *example: other arguments of `fn`, arrays or `jax.ShapeDtypeStruct`s. Any batch size works
            afterwards; multiply-accumulates are counted at these sizes.
        ratio: the share of channels to remove, in [0, 1).
        budget: instead of a ratio what may be left, as a share in (0, 1) of what there is:
            ``{"parameters": 0.5}``, ``{"flops": 0.5}`` (multiply-accumulates), or
            ``{"latency": 0.5}``, measured on this device by `jaxaccel.measure.compare`. The
            smallest ratio that meets it is taken, found by bisection: to 1/65,536, for latency,
            where each of its steps is measured, to 1/32.
        criterion: ``(groups, params) -> scores of each group's channels``; the lowest go.
        scope: ``"local"`` removes `ratio` of each group; ``"global"`` ranks the channels of all
            groups together, each score relative to the mean of its group, and leaves at least a
            tenth of every group.
        where: which groups, of those that `jaxaccel.groups` shows: a glob over the paths that a
            group would cut (``"*/conv1/*"``; ``"*/conv1/kernel axis 3"`` for its outputs alone),
            a mapping from globs to True, False or a ratio of their own, of which the first match
            wins (what no glob matches is left out), or ``group -> True, False or a ratio``.
        round_to: what stays of a group is a multiple of this, as far as there are that many.

    Returns:
        A `Plan`; ``print`` shows it. At least one channel of every group stays.

    Raises:
        TypeError: `fn` takes or returns what is no array, or is being transformed; a criterion
            gives no numbers.
        ValueError: an argument is out of range, a value or a score is not finite, no channel can
            go, or the budget cannot be met.

    >>> import jax.numpy as jnp
    >>> params = {"w1": jnp.arange(24.0).reshape(3, 8), "w2": jnp.ones((8, 2))}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    >>> found = plan(fn, params, jnp.ones((5, 3)), ratio=0.5)
    >>> print(found)
    kept  parameters saved  MACs saved  slices
    --------------------------------------------------------
     4/8                20         100  w1 axis 1, w2 axis 0
    <BLANKLINE>
    parameters 40 -> 20 (2.00x fewer)
    MACs       200 -> 100 (2.00x fewer)
    >>> jax.tree.map(jnp.shape, found.shrink(params))
    {'w1': (3, 4), 'w2': (4, 2)}
    """
    resource, most = _asked(ratio, budget)
    _check(ratio, scope, round_to)
    _check_values(params)
    maker = Maker(fn, params, example)
    chosen = shares(maker.groups, where)
    scores = scored(maker.groups, params, criterion)
    choose = lambda ratio: lowest(scores, chosen, ratio, scope, round_to or 1)
    if resource is None:
        return maker.plan(choose(ratio))
    return _within(maker, choose, resource, most)


def channels(fn: Callable, params: PyTree, *example: Any, **how: Any) -> tuple[Callable, PyTree]:
    """`plan`, `Plan.rewrite` and `Plan.shrink` in one: the smaller function and its parameters.

    Takes what `plan` takes.
    """
    made = plan(fn, params, *example, **how)
    return made.rewrite(fn), made.shrink(params)


def schedule(ratio: float, rounds: int) -> list[float]:
    """Ratios for pruning in rounds with training between: steep at first, at the end `ratio`.

    Each is a share of the whole network's channels: plan anew on the original function with the
    masked parameters, whose zeros score lowest, and shrink after the last round::

        for ratio in jx.prune.schedule(0.5, rounds=3):
            plan = jx.prune.plan(fn, params, x, ratio=ratio)
            masks = plan.masks(params)
            params = train(jx.prune.apply(params, masks), jx.prune.keep(masks))
        fn, params = plan.rewrite(fn), plan.shrink(params)

    Raises:
        ValueError: `ratio` is outside [0, 1) or `rounds` below 1.

    Source: Zhu and Gupta 2017 (https://arxiv.org/abs/1710.01878).

    >>> [round(r, 3) for r in schedule(0.5, rounds=3)]
    [0.352, 0.481, 0.5]
    """
    _check_ratio(ratio)
    _check_count("rounds", rounds)
    return [ratio * (1 - (1 - turn / rounds) ** 3) for turn in range(1, rounds + 1)]


def _check_ratio(ratio: Any) -> None:
    if not isinstance(ratio, int | float | np.number) or not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio!r} must be a number in [0, 1)")


def _asked(ratio: float | None, budget: Mapping[Resource, float] | None) -> tuple[Any, float]:
    """The resource of the budget and its share, or None."""
    if (ratio is None) == (budget is None):
        raise ValueError(f"ratio={ratio!r}, budget={budget!r}: give one of the two")
    if budget is None:
        return None, 0.0
    if not isinstance(budget, Mapping) or len(budget) != 1 or not budget.keys() <= _TRIES.keys():
        raise ValueError(f"budget={budget!r} must have one key of {', '.join(_TRIES)}")
    ((resource, most),) = budget.items()
    if not isinstance(most, int | float | np.number) or not 0 < most < 1:
        raise ValueError(f"budget={budget!r}: a share must be a number in (0, 1)")
    return resource, most


def _check(ratio: float | None, scope: str, round_to: int | None) -> None:
    if ratio is not None:
        _check_ratio(ratio)
    if scope not in ("local", "global"):
        raise ValueError(f'scope={scope!r} must be "local" or "global"')
    if round_to is not None:
        _check_count("round_to", round_to)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number from 1 on")


def _check_values(params: PyTree) -> None:
    for path, leaf in leaf_paths(params).items():
        if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                f"{path}: a {type(leaf).__name__} has no values to choose channels by; make the "
                "plan outside of jit and other transformations, from arrays"
            )
        if not finite(leaf):
            raise ValueError(f"{path}: has NaN or infinite values; a plan needs finite ones")


class Maker:
    """The labels of a function, from which plans are made."""

    def __init__(self, fn: Callable, params: PyTree, example: tuple[Any, ...]) -> None:
        self.fn, self.params, self.example = fn, params, example
        self.traced, self.groups, self.labelling, inputs = _groups.read(fn, params, *example)
        paths = self.traced.paths[: self.traced.num_params]
        self.inputs = dict(zip(paths, inputs[: len(paths)], strict=True))
        self.counter = Counter(self.labelling, self.inputs.values(), self.traced.graph)

    def counts(self, removed: Iterable[tuple[_groups.Group, np.ndarray]]) -> tuple[int, int]:
        """Parameters and multiply-accumulates without some channels."""
        labels = [np.zeros(0, int)]
        for group, channels in removed:
            part = group.slices[0]
            axis: Any = self.inputs[part.path][part.axis]
            labels.append(axis.ids[part.index[channels].ravel()])
        return self.counter.after(np.concatenate(labels))

    def plan(self, removed: Removed) -> Plan:
        gone = list(zip(self.groups, removed, strict=True))
        shapes = {path: axes.shape for path, axes in self.inputs.items()}
        return Plan(
            shapes,
            _kept(gone, shapes),
            self.groups.unmasked,
            tuple(self._row(group, channels) for group, channels in gone),
            *(Change(*pair) for pair in zip(self.counter.before, self.counts(gone), strict=True)),
        )

    def _row(self, group: _groups.Group, removed: np.ndarray) -> Row:
        after = self.counts([(group, removed)]) if len(removed) else self.counter.before
        parameters, count = (b - a for b, a in zip(self.counter.before, after, strict=True))
        kernels_first = sorted(group.slices, key=lambda part: -len(self.inputs[part.path]))
        named = _groups.Group(group.size, tuple(kernels_first))
        return Row(group.size - len(removed), group.size, parameters, count, str(named))


def _kept(gone: Iterable[tuple[_groups.Group, np.ndarray]], shapes: Shapes) -> Kept:
    stays: dict[str, dict[int, np.ndarray]] = {}
    for group, removed in gone:
        for part in group.slices if len(removed) else ():
            axes = stays.setdefault(part.path, {})
            mask = axes.setdefault(part.axis, np.ones(shapes[part.path][part.axis], bool))
            mask[part.index[removed].ravel()] = False
    return {
        path: {axis: np.flatnonzero(mask) for axis, mask in axes.items()}
        for path, axes in stays.items()
    }


def _within(
    maker: Maker, choose: Callable[[float], Removed], resource: Resource, most: float
) -> Plan:
    """The plan of the smallest ratio that leaves at most a share of the resource."""
    low, high, best, least = 0.0, 1.0, None, 1.0
    for _ in range(_TRIES[resource]):
        middle = (low + high) / 2
        removed = choose(middle)
        left = _left(maker, removed, resource)
        least = min(least, left)
        if left <= most:
            high, best = middle, removed
        else:
            low = middle
    if best is None:
        raise ValueError(
            f"budget: the groups that may be pruned leave {least:.3f} of the {resource} at least, "
            f"more than {most}; ask for more, or let where= prune more"
        )
    return maker.plan(best)


def _left(maker: Maker, removed: Removed, resource: Resource) -> float:
    """The share of the resource that is left."""
    if resource == "latency":
        return _measured(maker, maker.plan(removed))
    place = ("parameters", "flops").index(resource)
    after = maker.counts(zip(maker.groups, removed, strict=True))
    return after[place] / max(maker.counter.before[place], 1)


def _measured(maker: Maker, made: Plan) -> float:
    from jaxaccel.measure import compare

    candidates = {
        "before": (maker.fn, maker.params),
        "after": (made.rewrite(maker.fn), made.shrink(maker.params)),
    }
    example = jax.tree.map(_filled, maker.example)
    return compare(candidates, *example, rounds=15, show=False).rows[1].ratio


def _filled(value: Any) -> Any:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    if not all(isinstance(size, int) for size in value.shape):
        raise ValueError(f"budget: no latency of shape {value.shape}; give the example its sizes")
    return jnp.ones(value.shape, value.dtype)
