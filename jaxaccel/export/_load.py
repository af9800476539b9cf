"""`jx.export.load`: an artefact as a function and its parameters. Runs nothing that it reads."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.extend import source_info_util
from jaxtyping import PyTree

from jaxaccel._trace import Opaque
from jaxaccel.export._files import MANIFEST, Stored, opened
from jaxaccel.export._manifest import Aval, Manifest, size_of
from jaxaccel.export._tree import build, describe, flatten, implementations, raw, typed

# What StableHLO may call by name: JAX's own, of which none runs Python or a kernel from the file.
_CALLS = re.compile(
    r"shape_assertion|Sharding|SPMD\w+|annotate_device_placement|AllocateBuffer|ApproxTopK"
    r"|Eigh|LuDecomposition|ProductOfElementaryHouseholderReflectors|Qr"
    r"|stablehlo\.dynamic_\w+|(lapack|cu|cusolver|cublas|cusparse|cufft|hip|hipsolver|hipblas)_\w+"
)
# Who calls a loaded function is named in errors, not this file.
source_info_util.register_exclusion(__file__)
_CALL = re.compile(r'custom_call @("(?:[^"\\]|\\.)*"|[^\s(]+)|call_target_name = "([^"]*)"')


def load(path: str | os.PathLike[str]) -> "tuple[Loaded, PyTree]":
    """The function and the parameters that `save` wrote.

    Neither the code of the model nor its framework is needed, and nothing of the file is run
    before the function is called. Every file is checked against the length and the hash in the
    manifest, the manifest against its own. The hashes tell of damage, not of who wrote them, and
    XLA's reader of programs is not made against attackers: load what you trust.

    Args:
        path: the folder or the zip.

    Returns:
        ``(fn, params)``: a function of the same arguments, for `jax.jit`, and the parameters in
        nested dicts, lists and tuples. It is opaque: it can be called and compiled, but neither
        differentiated nor transformed.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a file is missing, damaged or of a format that is not known, or the program
            calls what is not JAX's; the message names the file.

    Example:
        >>> import tempfile
        >>> from jaxaccel.export import save
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, lambda params, x: x @ params["kernel"], {"kernel": jnp.eye(2)},
        ...      jnp.ones((4, 2)))
        >>> fn, params = load(folder)
        >>> fn(params, jnp.array([[1.0, 2.0]]))
        Array([[1., 2.]], dtype=float32)
        >>> fn
        <<lambda>, loaded: float32[batch,2] -> float32[batch,2]>
    """
    with opened(Path(path)) as stored:
        manifest = stored.manifest
        where = stored.where(manifest.name("function"))
        found = function(stored.read("function"), manifest, where)
        return Loaded(found, manifest), _built(stored, _arrays(stored))


def params(path: str | os.PathLike[str], *, like: PyTree = None) -> PyTree:
    """The parameters of an artefact alone, to train on.

    Args:
        path: the folder or the zip.
        like: a pytree of arrays or shapes that has leaves of the same paths, shapes and dtypes,
            of whatever nodes; the result is of these. By default, nested dicts, lists and tuples.

    Raises:
        FileNotFoundError, ValueError: as `load`; or `like` has other leaves.
    """
    with opened(Path(path)) as stored:
        arrays = _arrays(stored)
        return _built(stored, arrays) if like is None else _alike(arrays, like)


def manifest(path: str | os.PathLike[str]) -> Manifest:
    """What an artefact says of itself: shapes, versions, and the transforms that made it.

    Args:
        path: the folder or the zip.

    Raises:
        FileNotFoundError, ValueError: as `load`, of the manifest alone.
    """
    with opened(Path(path)) as stored:
        return stored.manifest


class Loaded(Opaque):
    """``fn(params, *args)`` from an artefact; `manifest` says what it is."""

    def __init__(self, exported: jax.export.Exported, manifest: Manifest) -> None:
        self.manifest, self.recipe = manifest, manifest.recipe
        self.__name__ = manifest.function
        self.refusal = (
            f"fn: {manifest.function!r} was loaded by jx.export.load: it is compiled from "
            "StableHLO and cannot be differentiated or transformed; transform the function that "
            "it was saved from, and save the result"
        )
        self._call = jax.jit(exported.call)

    def __repr__(self) -> str:
        """Its name and its types."""
        types = [", ".join(map(str, table.values())) for table in
                 (self.manifest.arguments, self.manifest.results)]  # fmt: skip
        return f"<{self.manifest.function}, loaded: {' -> '.join(types)}>"

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """The result of the saved function.

        Raises:
            TypeError, ValueError: the parameters or the arguments are not as they were saved; the
                message names the path.
        """
        m = self.manifest
        arrays = dict(flatten(m.params, params, ""))
        arguments = dict(flatten(m.inputs, args, "args"))
        for given, table in ((arrays, m.arrays), (arguments, m.arguments)):
            for name, x in given.items():
                table[name].check(name, x)
        results = self._call(arrays, [arguments[name] for name in m.arguments])
        return build(m.outputs, dict(zip(m.results, results, strict=True)))


def _built(stored: Stored, arrays: Mapping[str, jax.Array]) -> PyTree:
    """The tree that the manifest describes."""
    try:
        return build(stored.manifest.params, arrays)
    except (TypeError, ValueError) as error:  # of a random key that the array cannot be
        raise ValueError(f"{stored.where(MANIFEST)}: damaged: {error}") from None


def _alike(arrays: Mapping[str, jax.Array], like: PyTree) -> PyTree:
    """The arrays as the leaves of another tree."""
    held = describe(like, "", custom=True)
    keys = implementations(held.description)
    for name in arrays.keys() ^ keys.keys():
        raise ValueError(f"{name}: {'not in like' if name in arrays else 'only in like'}")
    for name, leaf in zip(held.names, jax.tree.leaves(like), strict=True):
        Aval.of(jax.eval_shape(raw, leaf)).check(name, arrays[name])
    leaves = [typed(arrays[name], keys[name]) for name in held.names]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def function(content: bytes, manifest: Manifest, where: str) -> jax.export.Exported:
    """The program, checked against the manifest.

    Raises:
        ValueError: it is not what `load` takes; the message begins with `where`.
    """
    least = jax.export.minimum_supported_calling_convention_version
    most = jax.export.maximum_supported_calling_convention_version
    maker = f"made with jax {manifest.made_with.get('jax')}"
    if not least <= manifest.calling_convention <= most:
        raise ValueError(
            f"{where}: {maker}, of calling convention {manifest.calling_convention}; jax "
            f"{jax.__version__} reads {least} to {most}: install another jax or save it anew"
        )
    try:
        found = jax.export.deserialize(bytearray(content))
        text, signature = found.mlir_module(), _signature(found)
    except Exception as error:  # of bytes that are no such program, any
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(
            f"{where}: {maker}, cannot be read by jax {jax.__version__}: {what}"
        ) from None
    for call in _CALL.finditer(text):
        name = (call[1] or call[2]).strip('"')
        if not _CALLS.fullmatch(name):
            raise ValueError(f"{where}: calls {name!r}, which is none of JAX's stable operations")
    if signature != _expected(manifest):
        raise ValueError(f"{where}: its inputs and outputs are not those of the manifest")
    if found.has_vjp() or found.ordered_effects or found.unordered_effects:
        raise ValueError(f"{where}: has more than a function in it: a gradient, or side effects")
    return found


def _signature(found: jax.export.Exported) -> Any:
    plain = lambda aval: (aval.dtype.name, tuple(map(str, aval.shape)))
    args, kwargs = jax.tree.unflatten(found.in_tree, list(map(plain, found.in_avals)))
    results = jax.tree.unflatten(found.out_tree, list(map(plain, found.out_avals)))
    what = (found.platforms, found.nr_devices, found.calling_convention_version)
    return [args, kwargs, results, what]


def _expected(m: Manifest) -> Any:
    plain = lambda aval: (aval.dtype, tuple(map(str, aval.shape)))
    arrays = {name: plain(aval) for name, aval in m.arrays.items()}
    arguments = [plain(aval) for aval in m.arguments.values()]
    results = [plain(aval) for aval in m.results.values()]
    return [(arrays, arguments), {}, results, (m.platforms, 1, m.calling_convention)]


def _arrays(stored: Stored) -> dict[str, jax.Array]:
    """The parameters by their names, on the default device."""
    where = stored.where(stored.manifest.name("parameters"))
    content = stored.read("parameters")
    try:
        tensors = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: no safetensors: {error}") from None
    expected = stored.manifest.arrays
    for name in tensors.keys() ^ expected.keys():
        raise ValueError(
            f"{where}: {name}: {'not in' if name in tensors else 'only in'} the manifest"
        )
    return {
        name: _array(f"{where}: {name}", tensors.pop(name), expected[name]) for name in expected
    }


def _array(where: str, tensor: Mapping[str, Any], expected: Aval) -> jax.Array:
    dtype, shape = np.dtype(expected.dtype), tuple(map(int, expected.shape))
    if tuple(tensor["shape"]) != shape or len(tensor["data"]) != size_of(expected):
        raise ValueError(f"{where}: {tensor['dtype']}{tensor['shape']}, not {expected}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{where}: is {dtype}; set jax_enable_x64 before it is loaded")
    return jnp.asarray(np.frombuffer(tensor["data"], dtype).reshape(shape))
