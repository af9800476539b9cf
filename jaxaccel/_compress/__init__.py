"""`jx.compress`: the search over all transforms, against a target and an accuracy budget."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, get_args

from jaxtyping import PyTree

from jaxaccel._compress._recipe import Finetune
from jaxaccel._compress._recipe import Recipe as Recipe
from jaxaccel._compress._report import Candidate as Candidate
from jaxaccel._compress._report import Report as Report
from jaxaccel._compress._report import Target
from jaxaccel._compress._search import Asked, Search
from jaxaccel._progress import bar
from jaxaccel.export._engines import Engine, imported
from jaxaccel.quantize._calibrate import first
from jaxaccel.quantize._mixed import Evaluate
from jaxaccel.quantize._traced import check_params


class Compressed(NamedTuple):
    """``fn, params, report = jx.compress(...)``; printed, the report."""

    fn: Callable
    params: PyTree
    report: Report

    def __str__(self) -> str:
        """The report."""
        return str(self.report)


def compress(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    target: Target = "latency",
    max_drop: float,
    engines: Sequence[str] = ("xla",),
    finetune: Finetune | None = None,
    example: Sequence[Any] | None = None,
    keep: float = 0.7,
    round_to: int | None = None,
    progress: bool = True,
) -> Compressed:
    """The smallest or fastest form of a function that keeps its score.

    Channels are removed group by group, those first that move the outputs least for what they
    save; each network so found is tried in floating point with batch norm folded and in 8 bits, on
    each engine, and is scored and timed beside the autotuned original. With `finetune` channels go
    in rounds with training between. Where 8 bits cost too much, the most sensitive layers stay in
    floating point. The best of XLA's has its forms timed (`jaxaccel.autotune`). Interrupted
    (Control-C), it returns the best so far.

    Args:
        fn: ``fn(params, *args)``; inference. With `jaxaccel.functional`'s ``fn.train`` the smaller
            functions have one, for `finetune`.
        params: a pytree of arrays.
        batches: arguments of `fn` for calibration: an iterable, read several times, of tuples
            ``(x, ...)``, or of single arguments.
        evaluate: ``evaluate(fn, params) -> score``, higher is better, on validation data: it is
            called for each candidate, and the best is chosen by it, so that the test set is for
            afterwards, once. It may wrap `fn` in `jax.jit`.
        target: what is to be small: "latency" of a call with `example`; "bytes" of the parameters;
            "flops", multiply-accumulates of such a call.
        max_drop: by how much the score may fall, >= 0, in units of the score.
        engines: some of "xla", "onnxruntime", "openvino".
        finetune: ``finetune(fn, params, teacher) -> params``: trains a smaller function;
            `teacher` is the original ``(fn, params)``, for distillation. The result has the tree
            and the shapes of its argument.
        example: the arguments whose call is timed and counted; by default the first batch.
        keep: with `finetune`, the share of the multiply-accumulates (of the parameters, for
            "bytes") that a round leaves of those before it, in (0, 1).
        round_to: what stays of a group is a multiple of this, as far as there are that many; by
            default 8 for "latency", as vector units take them, else 1.
        progress: draw a line that says what is tried, and what is best so far.

    Returns:
        ``(fn, params, report)``: a JAX function that `jax.jit` takes, its parameters, and a
        `Report` of every candidate: the Pareto front, the engine that was fastest
        (``report.engine``, for `jaxaccel.export.compile`), the ``fn`` and ``params`` of each, and
        ``report.recipe``, whose ``save`` writes JSON that `Recipe` replays elsewhere. Where nothing
        is better, it is the function as given.

    Raises:
        ImportError: an engine is not installed.
        TypeError: `fn` takes or returns what is no array, or `batches` is no iterable, or can be
            read once only.
        ValueError: an argument is out of range; parameters are quantized already or not finite;
            `evaluate` gives NaN; `finetune` returns another tree.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> key = jax.random.key(0)
        >>> x, kernel = jax.random.normal(key, (64, 16)), jax.random.normal(key, (16, 32))
        >>> net = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> params = {"a": kernel, "b": kernel.T * (jnp.arange(32) < 8)[:, None]}
        >>> wanted = net(params, x)
        >>> close = lambda fn, params: -float(jnp.abs(fn(params, x) - wanted).mean())
        >>> small = compress(net, params, [x], close, target="flops", max_drop=1e-3)
        >>> jax.tree.map(jnp.shape, small.params)
        {'a': (16, 8), 'b': (8, 16)}
    """
    _check(target, max_drop, engines, keep, round_to)
    for engine in {*engines} - {"xla"}:
        imported(engine)  # before the work that needs it
    check_params(fn, params)
    shown = first(batches) if example is None else tuple(example)
    rounded = (8 if target == "latency" else 1) if round_to is None else round_to
    asked = Asked(
        *(fn, params, batches, evaluate, target, float(max_drop), tuple(engines)),
        *(finetune, shown, float(keep), rounded),
    )
    with bar(progress, "compress", None) as tick:
        search, interrupted = Search(asked, tick), False
        try:
            search.run()
        except KeyboardInterrupt:
            if not search.candidates:
                raise
            interrupted = True
    report = search.report(interrupted)
    return Compressed(report.chosen.fn, report.chosen.params, report)


def _check(
    target: str, max_drop: float, engines: Sequence[str], keep: float, round_to: int | None
) -> None:
    if target not in get_args(Target):
        raise ValueError(
            f"target={target!r} must be one of {', '.join(map(repr, get_args(Target)))}"
        )
    if not 0 <= max_drop < float("inf"):
        raise ValueError(f"max_drop={max_drop!r} must be >= 0, in units of the score")
    if isinstance(engines, str) or not engines or not {*engines} <= {*get_args(Engine)}:
        known = ", ".join(map(repr, get_args(Engine)))
        raise ValueError(f"engines={engines!r} must be a sequence of some of {known}")
    if not 0 < keep < 1:
        raise ValueError(f"keep={keep!r} must be a share in (0, 1)")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to={round_to!r} must be a whole number from 1 on")
