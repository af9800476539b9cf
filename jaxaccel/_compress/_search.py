"""The search: networks with fewer channels, each in floating point and in 8 bits, on engines."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxaccel import export, prune
from jaxaccel._compress._ladder import Ladder, Moved, Resource
from jaxaccel._compress._recipe import Finetune, Pair, Recipe, Setting, Step, done
from jaxaccel._compress._report import Candidate, Report, Target
from jaxaccel.measure import Comparison, compare
from jaxaccel.quantize import mixed
from jaxaccel.quantize._calibrate import arguments
from jaxaccel.quantize._mixed import Evaluate, OverBudgetError, score_of
from jaxaccel.quantize._qtensor import is_qtensor

FOLD: Step = {"transform": "fold.batchnorm"}
RULES: Step = {"transform": "autotune", "mode": "rules"}
MEASURED: Step = {"transform": "autotune", "mode": "measure"}
FINETUNE: Step = {"transform": "finetune"}
INT8: Step = {"transform": "quantize.int8"}

_ROUNDS = 11
_LEAST = 0.05  # of the resource
# What a network may be finished with, by target.
_FINISHES: dict[Target, dict[str, Step]] = {
    "latency": {"float": FOLD, "int8": INT8},
    "bytes": {
        "float": FOLD,
        "int8": INT8,
        "int8 weights": {"transform": "quantize.weights", "bits": 8},
        "int4 weights": {"transform": "quantize.weights", "bits": 4},
    },
    "flops": {"float": FOLD},
}
# What an engine, and the way to it, raises where it cannot do something.
_REFUSED = (NotImplementedError, TypeError, ValueError, RuntimeError)


class Asked(NamedTuple):
    """What `jaxaccel.compress` was asked for."""

    fn: Callable
    params: Any
    batches: Iterable[Any]
    evaluate: Evaluate
    target: Target
    max_drop: float
    engines: Sequence[str]
    finetune: Finetune | None
    example: tuple[Any, ...]
    keep: float
    round_to: int


class Network(NamedTuple):
    """The original with some channels removed.

    Attributes:
        left: the share of the resource that is left.
    """

    name: str
    steps: tuple[Step, ...]
    pair: Pair
    score: float
    left: float
    macs: int
    parameters: int


class Search:
    """All that was found so far."""

    def __init__(self, asked: Asked, tick: Callable[[str], None]) -> None:
        self._asked, self._tick, self._start = asked, tick, time.monotonic()
        self._setting = Setting(asked.batches, asked.finetune, (asked.fn, asked.params))
        self._resource: Resource = "parameters" if asked.target == "bytes" else "macs"
        self.candidates: list[Candidate] = []
        self._made: list[Network] = []  # of the candidates
        self._networks: list[Network] = []
        self._left_out: list[str] = []
        self._sensitivity: tuple[Moved, ...] = ()
        self._timed: Comparison | None = None

    def run(self) -> None:
        """Tries everything, the cheap and certain first."""
        self._tick("compress: the original")
        for network in self._each():
            self._networks.append(network)
            if not self.candidates:  # within any budget
                self._add(network, "as given", "xla", (), network.pair, network.pair, network.score)
            for name, step in _FINISHES[self._asked.target].items():
                self._finish(network, name, step)
        self._mix()
        self._polish()

    def best(self) -> Candidate:
        """Of those within the budget the one that costs least; equal ones by score, then time."""
        fits = [one for one in self.candidates if self._fits(one.score)]
        target = self._asked.target
        return min(fits, key=lambda one: (one.cost(target), -one.score, one.cost("latency")))

    def report(self, interrupted: bool) -> Report:
        """Of the candidates so far."""
        return Report(
            self._asked.target,
            self._asked.max_drop,
            self._original.score,
            tuple(self.candidates),
            self.best(),
            self._sensitivity,
            tuple(self._left_out),
            self._timed.device if self._timed else str(jax.devices()[0].device_kind),
            jax.__version__,
            date.today().isoformat(),
            time.monotonic() - self._start,
            interrupted,
        )

    @cached_property
    def _base(self) -> Pair:
        """The original in its fastest form, which all are timed beside; compiled once."""
        fn, params = done(self._original.pair, (FOLD, MEASURED), self._setting)
        return jax.jit(fn), params

    @property
    def _original(self) -> Network:
        return self._networks[0]

    def _fits(self, score: float) -> bool:
        return self._original.score - score <= self._asked.max_drop + 1e-12

    def _each(self) -> Iterator[Network]:
        """Networks whose channels went within the budget, the whole one first."""
        asked = self._asked
        score = score_of(asked.evaluate, asked.fn, asked.params)
        ladder = self._ladder((asked.fn, asked.params))
        parameters, macs = ladder.counts
        whole = Network("original", (), (asked.fn, asked.params), score, 1.0, macs, parameters)
        yield whole
        self._tick("compress: sensitivity of each group of channels")
        self._sensitivity = ladder.sensitivity
        if not self._sensitivity:
            self._left_out.append("removing channels: no group of them can go (jx.groups says why)")
            return
        yield from self._trained(whole, ladder) if asked.finetune else self._masked(whole, ladder)

    def _ladder(self, pair: Pair) -> Ladder:
        asked = self._asked
        batch = arguments(next(iter(asked.batches)))
        return Ladder(*pair, asked.example, batch, self._resource, asked.round_to)

    def _trained(self, network: Network, ladder: Ladder) -> Iterator[Network]:
        """Round after round of removing and fine-tuning; after a miss, once half as far."""
        share, missed = self._asked.keep, 0
        while depth := self._depth(ladder, network.left * share, missed):
            found = self._smaller(network, ladder, depth)
            if self._fits(found.score):
                yield found
                network, ladder = found, self._ladder(found.pair)
            if missed:
                return
            if not self._fits(found.score):
                self._over(found.name, found.score)
                share, missed = share**0.5, depth

    def _depth(self, ladder: Ladder, left: float, missed: int) -> int:
        """The first step down to this share, of those before one that missed; 0: there is none."""
        most = left * self._whole()
        found = next((k for k, cost in enumerate(ladder.costs) if cost <= most), 0)
        return 0 if left < _LEAST else min(found, missed - 1) if missed else found

    def _over(self, name: str, score: float) -> None:
        drop = self._original.score - score
        self._left_out.append(f"{name}: over the budget, a drop of {drop:.4g}")

    def _smaller(self, network: Network, ladder: Ladder, depth: int) -> Network:
        """After so many steps down, fine-tuned."""
        plan = ladder.plan(depth)
        step = {"transform": "prune", "plan": plan.to_dict()}
        name = f"{self._name(plan)}, fine-tuned"
        self._tick(f"compress: {name}{self._so_far()}")
        pair = done(network.pair, (step, FINETUNE), self._setting)
        return self._network(name, (*network.steps, step, FINETUNE), pair, plan)

    def _masked(self, network: Network, ladder: Ladder) -> Iterator[Network]:
        """By bisection; channels that are set to zero score as if they were removed."""
        fn, params = network.pair
        low, high = 0, len(ladder.costs)  # of the first nothing is removed
        while high - low > 1:
            middle = (low + high) // 2
            plan = ladder.plan(middle)
            self._tick(f"compress: {self._name(plan)}{self._so_far()}")
            masked = prune.apply(params, plan.masks(params))
            score = score_of(self._asked.evaluate, fn, masked)
            if not self._fits(score):
                self._over(self._name(plan), score)
                high = middle
                continue
            low, step = middle, {"transform": "prune", "plan": plan.to_dict()}
            pair = done(network.pair, (step,), self._setting)
            yield self._network(self._name(plan), (step,), pair, plan)

    def _network(self, name: str, steps: tuple[Step, ...], pair: Pair, plan: prune.Plan) -> Network:
        score = score_of(self._asked.evaluate, *pair)
        after = plan.parameters.after, plan.macs.after
        left = after[0 if self._resource == "parameters" else 1] / self._whole()
        return Network(name, steps, pair, score, left, after[1], after[0])

    def _whole(self) -> int:
        """The resource of the original."""
        return getattr(self._original, self._resource)

    def _name(self, plan: prune.Plan) -> str:
        share = getattr(plan, self._resource).after / self._whole()
        return f"{share:.0%} of the {self._resource.replace('macs', 'MACs')}"

    def _so_far(self) -> str:
        one, target = self.best(), self._asked.target
        return f" (so far: {one.name}, {one.cost(target):.4g} {target}, drop {one.drop:.4g})"

    def _finish(self, network: Network, name: str, step: Step) -> None:
        """A network in one arithmetic, on every engine."""
        steps = (step,)
        try:
            self._tick(f"compress: {network.name}, {name}{self._so_far()}")
            pair = done(network.pair, steps, self._setting)
        except ValueError as error:  # nothing to quantize, or a collision of names
            self._left_out.append(f"{network.name}, {name}: {_line(error)}")
            return
        if name == "int8":
            kernels = list(dict.fromkeys(row.where for row in pair[0].report.rows))  # pyright: ignore[reportFunctionMemberAccess]
            steps = ({**INT8, "kernels": kernels},)
        self._on_engines(network, name, steps, pair)

    def _on_engines(self, network: Network, name: str, steps: tuple[Step, ...], pair: Pair) -> None:
        for engine in self._asked.engines:
            if engine == "xla":
                forms = done(pair, (RULES,), self._setting)
                self._add(network, name, engine, (*steps, RULES), forms, forms)
                continue
            try:
                held = export.compile(*pair, *self._asked.example, engine=engine)  # pyright: ignore[reportArgumentType]
            except _REFUSED as error:
                self._left_out.append(f"{network.name}, {name}, on {engine}: {_line(error)}")
                continue
            self._add(network, name, engine, steps, pair, held)

    def _add(
        self,
        network: Network,
        name: str,
        engine: str,
        steps: tuple[Step, ...],
        pair: Pair,
        runs: Any,
        score: float | None = None,
    ) -> None:
        """Scores and times a candidate, which `runs` as a pair or on an engine."""
        if score is None:
            called = pair if engine == "xla" else (_calling(pair[0], runs), pair[1])
            score = score_of(self._asked.evaluate, *called)
        candidates = {"original": self._base, "candidate": runs}
        found = compare(candidates, *self._asked.example, rounds=_ROUNDS, show=False)
        self._timed, row = found, found.rows[1]
        self.candidates.append(
            Candidate(
                f"{network.name}, {name}",
                engine,
                score,
                self._original.score - score,
                network.macs,
                network.parameters,
                _bytes(pair[1]),
                row.median_ms,
                row.ratio,
                row.ratio_low,
                row.ratio_high,
                Recipe((*network.steps, *steps), engine),
                *pair,
            )
        )
        self._made.append(network)

    def _mix(self) -> None:
        """In the smallest network that 8 bits put over the budget, some layers as they were."""
        if self._asked.target != "latency":
            return
        for network in reversed(self._networks):
            scores = self._int8(network)
            if any(map(self._fits, scores)):
                return
            if not scores:
                continue  # refused
            room = network.score - (self._original.score - self._asked.max_drop)
            try:
                pair = mixed(
                    *network.pair,
                    self._asked.batches,
                    self._telling(f"{network.name}, int8 but for some layers"),
                    max_drop=max(room, 0.0),
                    progress=False,
                )
            except OverBudgetError as error:
                self._left_out.append(f"{network.name}, int8 but for some layers: {_line(error)}")
                continue
            kernels = list(dict.fromkeys(row.where for row in pair[0].report.rows))
            steps = ({**INT8, "kernels": kernels},)
            self._on_engines(network, "int8 but for some layers", steps, pair)
            return

    def _int8(self, network: Network) -> list[float]:
        """The scores of a network in 8 bits, by engine."""
        made = zip(self.candidates, self._made, strict=True)
        return [one.score for one, of in made if of is network and one.name.endswith(", int8")]

    def _telling(self, what: str) -> Evaluate:
        """`evaluate`, which says so each time."""
        times = count(1)

        def evaluate(fn: Callable, params: Any) -> float:
            self._tick(f"compress: {what}, try {next(times)}{self._so_far()}")
            return self._asked.evaluate(fn, params)

        return evaluate

    def _polish(self) -> None:
        """The best one on XLA with its forms timed, not taken by rules."""
        one = self.best()
        if one.recipe.steps[-1:] != (RULES,):
            return
        network = self._made[self.candidates.index(one)]
        self._tick(f"compress: timing the forms of {one.name}{self._so_far()}")
        own = one.recipe.steps[len(network.steps) : -1]
        tuned = done(network.pair, (*own, MEASURED), self._setting)
        name = one.name.removeprefix(f"{network.name}, ")
        self._add(network, f"{name}, forms timed", "xla", (*own, MEASURED), tuned, tuned, one.score)


def _calling(fn: Callable, held: Callable) -> Callable:
    """What runs on another engine, as a function that `jax.jit` takes.

    XLA's threads come and go, and its buffers with them: the engine is called by one thread of its
    own, on copies.
    """
    thread = ThreadPoolExecutor(1)

    def host(*args: Any) -> Any:
        return thread.submit(held, *jax.tree.map(np.array, args)).result()

    def called(params: Any, *args: Any) -> Any:
        return jax.pure_callback(host, jax.eval_shape(fn, params, *args), *args)

    return called


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params, is_leaf=is_qtensor))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
