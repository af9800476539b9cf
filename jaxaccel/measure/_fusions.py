"""What XLA fused: the kernels of the compiled program, and the bytes they no longer move."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

from jaxaccel._table import table
from jaxaccel.measure._hlo import Computation, Instruction, Module, parse

# Instructions that compute nothing and move nothing.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "add-dependency", "domain", "async-update"),
}
# The same value under another name. A reshape that moves data stands in a kernel of its own.
_ALIASES = {"bitcast", "reshape", "get-tuple-element", "opt-barrier", "add-dependency", "domain"}
# What runs is in the computations that these call.
_CONTROL = {"call", "while", "conditional", "async"}
# What no library would store: an operation that uses it makes it while it reads.
_UNSTORED = {"broadcast", "iota"}
_SLICES = {"slice", "dynamic-slice", "gather"}
# Custom calls that only carry a layout over devices.
_ANNOTATIONS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled program.

    Attributes:
        name: its name in the compiled program's text.
        kind: ``"loop"``, ``"input"``, ``"output"`` or ``"custom"`` for a fusion, or the compiler
            that a custom one goes to (``"__ynn_fusion"``); ``"library"`` for a library's call;
            ``"op"`` for an instruction that stands alone.
        ops: the operations that it holds, in order; of a library's call the name only.
        bytes_read: operands, each once; where only slices of one are read, these.
        bytes_written: results; of an update in place, what is updated.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Fusions:
    """What `fusions` found; ``print`` shows it as a table.

    Attributes:
        kernels: those of the compiled program, in the order of its text.
        ops_before: operations of the program before any optimisation.
        bytes_saved: of the intermediate results inside of kernels: written once, and read once
            by each operation that uses them, had every operation been a kernel of its own.
        backend: the platform compiled for.
        loops: how many loops are left; all counts take a loop's body once.
    """

    kernels: tuple[Kernel, ...]
    ops_before: int
    bytes_saved: int
    backend: str
    loops: int = 0

    @property
    def bytes_moved(self) -> int:
        """What the kernels read and write."""
        return sum(kernel.bytes_read + kernel.bytes_written for kernel in self.kernels)

    def __str__(self) -> str:
        shown = Counter(
            (kernel.kind, _summary(kernel.ops), kernel.bytes_read, kernel.bytes_written)
            for kernel in self.kernels
        )
        columns = ("kernels", "kind", "operations of each", "bytes read", "bytes written")
        lines = [table(columns, [(count, *row) for row, count in shown.items()]), *self._totals()]
        return "\n".join(lines)

    def _totals(self) -> Iterator[str]:
        yield (
            f"\n{self.backend}: {self.ops_before:,} operation(s) before, {len(self.kernels):,} "
            f"kernel(s) left; {self.bytes_moved:,} bytes moved, {self.bytes_saved:,} no longer."
        )
        if any(kernel.kind == "library" for kernel in self.kernels):
            yield "What a library's call fuses inside is not in these bytes."
        if self.loops:
            yield f"{self.loops} loop(s): operations, kernels and bytes count a loop's body once."

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and numbers, for ``json.dump``."""
        kernels = [asdict(kernel) | {"ops": list(kernel.ops)} for kernel in self.kernels]
        return asdict(self) | {"kernels": kernels, "bytes_moved": self.bytes_moved}


def fusions(
    fn: Callable[..., Any], *args: Any, compiler_options: Mapping[str, Any] | None = None
) -> Fusions:
    """Compiles ``fn`` for these arguments and tells which operations XLA put into one kernel.

    A kernel is a fusion, a library's call, or an instruction that stands alone; of all branches
    of a conditional, and of a loop's body once. Parameters, constants, tuples and bitcasts are
    none. The bytes saved compare a kernel with its own operations run one by one, broadcasts
    aside, which nobody would store; an operation that XLA repeats in several kernels, to store
    less, counts in each of them. A slice reads what it returns.

    What to expect of a convolution with bias and relu:

    - XLA:CPU leaves the convolution a kernel of its own (``convolution``, or a ``__ynn_fusion``
      of it alone) and fuses bias, relu and a max pool of slices into one loop behind it: two
      kernels. With a pool of ``reduce_window`` that loop may be another ``__ynn_fusion``.
    - XLA:GPU gives convolution, bias and relu to cuDNN as one call,
      ``__cudnn$convBiasActivationForward``, or as a fusion of kind ``__cudnn$fusion``, where
      dtype and shape allow; the pool is a kernel behind it. Of the call only the name is known,
      so the bytes that cuDNN saves inside are not counted.

    Args:
        fn: a JAX function.
        *args: its arguments, as arrays or ``jax.ShapeDtypeStruct``s; nothing is run.
        compiler_options: XLA's, as ``jax.jit`` takes them: ``{"xla_disable_hlo_passes":
            "fusion"}`` shows the program without fusion.

    Returns:
        A `Fusions`; ``print`` shows it as a table.

    Raises:
        TypeError: where ``fn`` is not callable or an argument is no array.
        ValueError: where the compiler's text cannot be read; it names the line.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    >>> found = fusions(lambda x: jnp.sin(jnp.exp(jnp.tanh(x))), x)
    >>> found.ops_before, [kernel.ops for kernel in found.kernels]
    (3, [('tanh', 'exponential', 'sine')])
    >>> found.bytes_saved == 2 * (4 * 256 * 256) * 2  # two results, each written and read once
    True
    """
    _check(fn, args)
    lowered = jax.jit(fn).lower(*args)
    compiled = lowered.compile(dict(compiler_options) if compiler_options else None)
    after = compiled.as_text()
    if after is None:
        raise ValueError(f"fusions: the {jax.default_backend()} backend prints no program")
    return read(lowered.as_text(dialect="hlo"), after, _platform(compiled))


def read(before: str, after: str, backend: str) -> Fusions:
    """The same from the texts of a program before and after optimisation."""
    old, new = parse(before), parse(after)
    found = list(_walk(new, new.entry))
    kernels = [(within, one) for within, one in found if _is_kernel(one)]
    written = [one for _, one in _walk(old, old.entry) if _base(one) not in _CONTROL]
    return Fusions(
        kernels=tuple(_kernel(new, within, one) for within, one in kernels),
        ops_before=sum(map(_is_op, written)),
        bytes_saved=sum(_saved(_body(new, one)) for _, one in kernels if _base(one) == "fusion"),
        backend=backend,
        loops=sum(one.opcode == "while" for _, one in found),
    )


def _check(fn: Any, args: tuple[Any, ...]) -> None:
    if not callable(fn):
        raise TypeError(f"fusions: fn is of type {type(fn).__name__}; give a JAX function")
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        try:
            jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                f"fusions: args{jax.tree_util.keystr(path)}: expected an array, got "
                f"{type(leaf).__name__}; fn takes pytrees of arrays (close over anything else)"
            ) from None


def _platform(compiled: jax.stages.Compiled) -> str:
    shardings = jax.tree.leaves((compiled.output_shardings, compiled.input_shardings))
    devices = [device for sharding in shardings[:1] for device in sharding.device_set]
    return devices[0].platform if devices else jax.default_backend()


def _walk(module: Module, name: str) -> Iterator[tuple[Computation, Instruction]]:
    """What runs: the instructions of a computation and of those it calls, each call anew."""
    computation = module.computations[name]
    for one in computation.instructions.values():
        yield computation, one
        if _base(one) in _CONTROL:
            for callee in one.callees:
                yield from _walk(module, callee)


def _base(one: Instruction) -> str:
    return one.opcode.removesuffix("-start")


def _is_op(one: Instruction) -> bool:
    """Whether it computes or moves something in a kernel, or in the program as written."""
    free = one.opcode in _FREE or one.opcode.endswith("-done") or one.opcode == "reshape"
    return not (free or _target(one) in _ANNOTATIONS or _target(one).startswith("xla.sdy."))


def _is_kernel(one: Instruction) -> bool:
    return one.opcode == "reshape" or (_is_op(one) and _base(one) not in _CONTROL)


def _target(one: Instruction) -> str:
    return one.attribute(r'custom_call_target="([^"]*)"')


def _body(module: Module, fusion: Instruction) -> Computation:
    return module.computations[fusion.callees[0]]


def _kernel(module: Module, within: Computation, one: Instruction) -> Kernel:
    if _base(one) != "fusion":
        read = sum(_operand_bytes(within, one, name) for name in set(one.operands))
        kind = "library" if _target(one) else "op"
        return Kernel(
            one.name, kind, (_target(one) or _base(one),), read, _written(within, one, False)
        )
    body = _body(module, one)
    uses = _uses(body)
    parameters = [p for p in body.instructions.values() if p.opcode == "parameter"]
    return Kernel(
        name=one.name,
        kind=_kind(one),
        ops=tuple(_ops(module, body)),
        bytes_read=sum(min(p.bytes, _read(body, uses, p.name)) for p in parameters),
        bytes_written=sum(_written(body, body.instructions[n], True) for n in _outputs(body)),
    )


def _kind(fusion: Instruction) -> str:
    kind = fusion.attribute(r"\bkind=k(\w+)").lower()
    return fusion.attribute(r'"kind":"(__[^"]+)"') or kind if kind == "custom" else kind


def _ops(module: Module, body: Computation) -> Iterator[str]:
    for one in body.instructions.values():
        if one.opcode == "fusion":
            yield from _ops(module, _body(module, one))
        elif _is_op(one):
            yield _target(one) or one.opcode


Uses = dict[str, list[Instruction]]


def _uses(body: Computation) -> Uses:
    found: Uses = {name: [] for name in body.instructions}
    for one in body.instructions.values():
        for name in set(one.operands):
            found[name].append(one)
    return found


def _read(body: Computation, uses: Uses, name: str) -> int:
    """What all uses of a value in a computation read."""
    return sum(
        _read(body, uses, user.name)
        if user.opcode in _ALIASES
        else _operand_bytes(body, user, name)
        for user in uses[name]
    )


def _operand_bytes(body: Computation, user: Instruction, name: str) -> int:
    """What an instruction reads of one operand, once if it stands there twice."""
    if user.opcode == "tuple":
        return 0
    if name == user.operands[0] and name not in user.operands[1:]:
        if user.opcode in _SLICES:
            return user.bytes
        if user.opcode == "dynamic-update-slice":
            return 0  # in place
    return body.instructions[name].bytes


def _written(body: Computation, one: Instruction, fused: bool) -> int:
    """What an instruction writes to memory as a result of its kernel."""
    done = [user for user in body.instructions.values() if user.operands == (one.name,)]
    if one.opcode.endswith("-start") and done:
        return done[0].bytes  # its own type repeats the operands
    if one.opcode == "dynamic-update-slice":
        updated = body.instructions[_behind(body, one.operands[0])]
        if not fused or updated.opcode == "parameter":  # else there is no place to update
            return body.instructions[one.operands[1]].bytes
    return one.bytes


def _behind(body: Computation, name: str) -> str:
    one = body.instructions[name]
    return _behind(body, one.operands[0]) if one.opcode in _ALIASES else name


def _outputs(body: Computation) -> set[str]:
    root = body.instructions[body.root]
    names: Iterable[str] = root.operands if root.opcode == "tuple" else (body.root,)
    return {_behind(body, name) for name in names}


def _saved(body: Computation) -> int:
    uses, outputs = _uses(body), _outputs(body)
    return sum(
        (0 if one.name in outputs else one.bytes) + _read(body, uses, one.name)
        for one in body.instructions.values()
        if _is_op(one) and one.opcode not in _UNSTORED
    )


def _summary(ops: tuple[str, ...]) -> str:
    """Operations in the order of their first, equal ones together: "2 slice, maximum"."""
    counts = Counter(ops)
    names = [name if count == 1 else f"{count} {name}" for name, count in counts.items()]
    return ", ".join(names[:8]) + (f", {len(names) - 8} more" if len(names) > 8 else "")
