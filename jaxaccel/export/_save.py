"""`jx.export.save`: a function as StableHLO, its parameters as safetensors."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.core
import jax.export
import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from jaxaccel._autotune import rules_alone
from jaxaccel._forms import Op, candidates, rule
from jaxaccel._forms_report import operands, operation
from jaxaccel._recipe import recipe
from jaxaccel._rewritten import with_slices
from jaxaccel._slices import is_symbolic
from jaxaccel._trace import check_transparent
from jaxaccel._tuned import retuned
from jaxaccel.export._batch import Axes, symbolic
from jaxaccel.export._files import check_target, commit, described, staged
from jaxaccel.export._load import function
from jaxaccel.export._manifest import FILES, Aval, Manifest
from jaxaccel.export._tree import Described, describe, implementations, raw, typed

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_STORED = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
    "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64",
}  # fmt: skip


def save(
    path: str | os.PathLike[str],
    fn: Callable,
    params: PyTree,
    *example: Any,
    batch_axes: Axes = 0,
    platforms: Sequence[str] = ("cpu", "cuda"),
) -> None:
    """Writes a function and its parameters; `load` needs neither its code nor its framework.

    The artefact holds the function as StableHLO, by `jax.export`, which is kept compatible for
    six months at least; the parameters as safetensors; and a manifest in JSON, with versions,
    shapes, the transforms that made the function, and the hash of every file. It is written
    whole or not at all: what stood there before stays until the new one is complete.

    Args:
        path: a folder, new or that of an artefact to replace; or a file that ends in ".zip", for
            all in one file.
        fn: ``fn(params, *args)``. Autotuned operations get the form that the rules choose for
            each platform.
        params: a pytree of arrays; nodes other than dicts, lists, tuples and `QTensor` are
            stored as dicts.
        *example: arguments of `fn`: pytrees (dicts, lists, tuples) of arrays, or of
            `jax.ShapeDtypeStruct`.
        batch_axes: which axis of each argument is the batch, as ``in_axes`` of `jax.vmap`. The
            function is saved for every size of it, 1 included; an `fn` that compares it with a
            number is told that they differ. None: for the sizes of the example alone.
        platforms: that it is to run on: "cpu", "cuda", "rocm", "tpu".

    Raises:
        FileExistsError: there is something else at `path`.
        TypeError: a leaf is no array, or has no numbers yet; an argument or a result has another
            kind of node.
        ValueError: the axes do not fit the arguments, `fn` does not work for every batch size or
            is laid out over several devices, or a platform is not known.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> def net(params, x):
        ...     return jnp.tanh(x @ params["dense"]["kernel"])
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, net, {"dense": {"kernel": jnp.ones((3, 2))}}, jnp.ones((4, 3)))
        >>> sorted(name.partition("-")[0] for name in os.listdir(folder))
        ['function', 'manifest.json', 'parameters']
    """
    target = Path(os.path.realpath(path) if Path(path).is_symlink() else path)
    check_target(target)
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    for name in platforms:
        if name not in PLATFORMS:
            raise ValueError(f"platforms={platforms!r}: {name!r} must be one of {PLATFORMS}")
    program = exported(fn, params, example, batch_axes, platforms)
    with staged(target) as stage:
        (stage / "function").write_bytes(program.function)
        safetensors.numpy.save_file(program.arrays, stage / "parameters")
        (stage / "parameters").chmod((stage / "function").stat().st_mode)  # not for its owner alone
        files = {part: described(stage / part) for part in FILES}
        manifest = Manifest(**program.about, files=files)
        function(program.function, manifest, "fn")  # what could not be loaded is not saved
        commit(stage, manifest, target)


class Program(NamedTuple):
    """What is to be written: bytes, arrays by their names, and the manifest's fields."""

    function: bytes
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]


def exported(
    fn: Callable,
    params: PyTree,
    example: Sequence[Any],
    batch_axes: Axes,
    platforms: Sequence[str],
) -> Program:
    """A function for every batch size, of flat arguments."""
    check_transparent(fn)
    held = describe(params, "", custom=True)
    arrays = _numbers(params, held)
    given = describe(tuple(example), "args", custom=False)
    inputs = symbolic(example, given, batch_axes)
    with rules_alone():
        results = jax.eval_shape(fn, params, *example)  # the caller's own mistakes, as they are
        made = describe(results, "result", custom=False)
        chosen = _Recorded()
        flat = _flat(fn, [*map(jax.tree.structure, (params, tuple(example)))], held, given)
        avals = dict(zip(held.names, map(_aval, jax.tree.leaves(params)), strict=True))
        with _without_paths():
            sizes = [jax.eval_shape(raw, leaf) for leaf in jax.tree.leaves(tuple(example))]
            found = _lowered(retuned(with_slices(flat), chosen), avals, (inputs, sizes), platforms)
    if found.nr_devices != 1:
        raise ValueError(
            f"fn: is laid out over {found.nr_devices} devices; an artefact is for one: save the "
            "function without its shardings"
        )
    about = {
        "function": _name(fn),
        "made_with": {name: version(name) for name in ("jaxaccel", "jax", "jaxlib")},
        "calling_convention": found.calling_convention_version,
        "platforms": tuple(found.platforms),
        "params": held.description,
        "inputs": given.description,
        "outputs": made.description,
        "arrays": {name: Aval.of(x) for name, x in arrays.items()},
        "arguments": dict(zip(given.names, map(Aval.of, inputs), strict=True)),
        "results": dict(zip(made.names, map(Aval.of, found.out_avals), strict=True)),
        "recipe": recipe(fn),
        "forms": chosen.rows(),
    }
    return Program(bytes(found.serialize()), arrays, about)


def _aval(leaf: Any) -> Any:
    """As it is traced: a number of Python's, or one from it, takes the dtype of others."""
    aval = jax.typeof(raw(leaf))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _flat(fn: Callable, trees: Sequence[Any], held: Described, given: Described) -> Callable:
    """Of ``{name: array}`` and a list of arrays; of a random key, its numbers."""
    params_tree, args_tree = trees
    keys = implementations(held.description) | implementations(given.description)

    def flat(arrays: Mapping[str, Any], arguments: Sequence[Any]) -> list[Any]:
        leaves = [typed(arrays[name], keys[name]) for name in held.names]
        passed = [typed(x, keys[name]) for name, x in zip(given.names, arguments, strict=True)]
        args = jax.tree.unflatten(args_tree, passed)
        return [raw(x) for x in jax.tree.leaves(fn(jax.tree.unflatten(params_tree, leaves), *args))]

    flat.__name__ = _name(fn)
    return flat


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _lowered(
    flat: Callable, arrays: Any, arguments: Sequence[Any], platforms: Sequence[str]
) -> jax.export.Exported:
    """For all batch sizes, where one of the arguments has one; the second are of the example."""
    export = jax.export.export(jax.jit(flat), platforms=platforms)
    symbolic, example = arguments
    try:
        return export(arrays, symbolic)
    except Exception as error:
        if not any(is_symbolic(aval.shape) for aval in symbolic):
            raise
        if not any(is_symbolic(aval.shape) for aval in example):
            export(arrays, example)  # what fails for every size says so itself
        raise ValueError(
            f"fn works for the example but not for every batch size: {_first_line(error)}; pass "
            "batch_axes=None to save it for the sizes of the example alone"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _numbers(params: PyTree, held: Described) -> dict[str, np.ndarray]:
    """The parameters by their names, contiguous."""
    found = {}
    for name, leaf in zip(held.names, jax.tree.leaves(params), strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
            raise TypeError(f"{name}: has no numbers yet; save outside of jax.jit, arrays")
        numbers = raw(leaf)
        if isinstance(numbers, jax.Array) and not numbers.is_fully_addressable:
            raise TypeError(f"{name}: is spread over several processes; gather it in one first")
        found[name] = np.asarray(numbers, jax.typeof(numbers).dtype, order="C")
        if name == "__metadata__":
            raise ValueError(f"{name}: is what safetensors calls something else; rename it")
        if found[name].dtype.name not in _STORED:
            raise TypeError(
                f"{name}: safetensors has no {found[name].dtype}; cast it, int4 to int8 for example"
            )
    return found


@contextmanager
def _without_paths() -> Iterator[None]:
    """No names of source files in what is lowered: they would tell of this machine."""
    config: Any = jax.config
    before = config.jax_traceback_in_locations_limit
    config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        config.update("jax_traceback_in_locations_limit", before)


class _Recorded:
    """Chooses by the rules, and remembers."""

    def __init__(self) -> None:
        self._chosen: dict[str, Counter[tuple[str, str, str]]] = {}

    def choose(self, op: Op, platform: str, devices: int) -> str:
        """As `Tuner` says."""
        form = rule(op, platform)
        if candidates(op, platform):
            self._chosen.setdefault(platform, Counter())[operation(op), operands(op), form] += 1
        return form

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """By platform, what had a choice."""
        names = ("operation", "operands", "form", "count")
        return {
            platform: [
                dict(zip(names, (*what, count), strict=True)) for what, count in found.items()
            ]
            for platform, found in self._chosen.items()
        }
