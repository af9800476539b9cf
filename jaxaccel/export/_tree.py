"""A pytree as plain data and a flat ``{name: array}``: what JSON and safetensors can hold.

A node of the description is None, ``{"array": name}``, ``{"array": name, "key": implementation}``
for random keys, ``{"dict": [[key, node], ...]}``, ``{"list": [...]}``, ``{"tuple": [...]}`` or
``{"qtensor": {...}}``. Names are the paths of the leaves.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxaccel._graph import aval_of

Description: TypeAlias = Any  # what json.loads returns


class Described(NamedTuple):
    """A tree's description, and the name of each of its leaves in JAX's order."""

    description: Description
    names: list[str]


def describe(tree: Any, root: str, *, custom: bool) -> Described:
    """The description of a tree whose leaves are arrays or shapes.

    Args:
        tree: dicts, lists, tuples, None, `QTensor`; where `custom`, other nodes become dicts.
        root: the first part of every name.
        custom: whether other kinds of nodes are taken.

    Raises:
        TypeError: a leaf that is no array, another kind of node, or a key of a dict that is
            neither a string nor a number.
        ValueError: two leaves have the same path.
    """
    leaves, structure = jax.tree.flatten(tree)
    names: list[str] = [""] * len(leaves)
    places = jax.tree.unflatten(structure, range(len(leaves)))

    def leaf(place: int, path: str) -> Description:
        path = path or "params"
        if path in names:
            raise ValueError(f"{path}: the path of two leaves; rename a key that has a slash")
        names[place] = path
        aval_of(path, leaves[place])
        key = _implementation(leaves[place])
        return {"array": path} if key is None else {"array": path, "key": key}

    return Described(_described(places, root, leaf, custom), names)


def _described(node: Any, path: str, leaf: Callable[[int, str], Any], custom: bool) -> Description:
    below = lambda key, child: _described(
        child, f"{path}/{key}" if path else str(key), leaf, custom
    )
    if node is None:
        return None
    if type(node) is int:
        return leaf(node, path)
    if isinstance(node, Mapping):
        return {"dict": [[_checked(key, path), below(key, child)] for key, child in node.items()]}
    if type(node) in (list, tuple):
        return {type(node).__name__: [below(k, child) for k, child in enumerate(node)]}
    if _is_qtensor(node):
        arrays = {name: leaf(getattr(node, name), f"{path}/{name}")["array"]
                  for name in ("values", "scale")}  # fmt: skip
        packing = None if node.packing is None else dict(node.packing._asdict())
        return {"qtensor": {**arrays, "dtype": node.dtype, "packing": packing}}
    if _is_variable(node):
        (value,) = jax.tree.leaves(node)
        return leaf(value, path)
    if not custom:
        raise TypeError(
            f"{path}: a {type(node).__name__}; what goes in and comes out may be dicts, lists, "
            "tuples and arrays: wrap fn so that it takes and returns these"
        )
    return {"dict": [[name, below(name, child)] for name, child in _children(node)]}


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    inside = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
    for path, child in inside:
        yield jax.tree_util.keystr(path, simple=True), child


def _checked(key: Any, path: str) -> str | int:
    if type(key) in (str, int):
        return key
    raise TypeError(
        f"{path or 'params'}: the key {key!r} is neither a string nor a whole number; rename it"
    )


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # where it is not imported there are none
    return nnx is not None and isinstance(node, nnx.Variable)


def _is_qtensor(node: Any) -> bool:
    module = sys.modules.get("jaxaccel.quantize")
    return module is not None and isinstance(node, module.QTensor)


def _implementation(leaf: Any) -> str | None:
    """The name of a random key's implementation; None for an array of numbers."""
    if not jnp.issubdtype(
        getattr(leaf, "dtype", None) or jnp.result_type(leaf), jax.dtypes.prng_key
    ):
        return None
    found: list[str] = []
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), leaf)
    return found[0]


def raw(leaf: Any) -> Any:
    """A random key's numbers; any other array itself."""
    return leaf if _implementation(leaf) is None else jax.random.key_data(leaf)


def typed(leaf: Any, implementation: str | None) -> Any:
    """The reverse of `raw`."""
    if implementation is None:
        return leaf
    return jax.random.wrap_key_data(leaf, impl=implementation)


def check(description: Description) -> None:
    """Raises a ValueError where something is no node of a description."""
    nodes: list[Any] = []
    match description:
        case None | {"array": str(), "key": str()}:
            pass
        case {"array": str()} if "key" not in description:
            pass
        case {"qtensor": {"values": str(), "scale": str(), "dtype": str(), "packing": packing}}:
            _check_packing(packing)
        case {"dict": list(pairs)} if all(_is_pair(pair) for pair in pairs):
            nodes = [node for _, node in pairs]
        case {"list": list(found)} | {"tuple": list(found)}:
            nodes = found
        case _:
            raise ValueError(f"{str(description)[:200]!r} is no node of a tree")
    for node in nodes:
        check(node)


def _is_pair(pair: Any) -> bool:
    return type(pair) is list and len(pair) == 2 and type(pair[0]) in (str, int)


def _check_packing(packing: Any) -> None:
    match packing:
        case None:
            return
        case {"shape": list(shape), "axes": list(axes), "group": int()}:
            if all(type(n) is int for n in (*shape, *axes)):
                return
    raise ValueError(f"{str(packing)[:200]!r} is no packing")


def implementations(description: Description) -> dict[str, str | None]:
    """Of each array's name, in the description's order: that of its random keys, if it is one."""
    if description is None:
        return {}
    if "array" in description:
        return {description["array"]: description.get("key")}
    if "qtensor" in description:
        return dict.fromkeys((description["qtensor"][name] for name in ("values", "scale")), None)
    nodes = [child for _, child in description["dict"]] if "dict" in description else (
        description.get("list", description.get("tuple")))  # fmt: skip
    found: dict[str, str | None] = {}
    for node in nodes:
        found |= implementations(node)
    return found


def build(description: Description, arrays: Mapping[str, Any]) -> Any:
    """The tree, from raw arrays by their names."""
    if description is None:
        return None
    ((kind, content), *_) = description.items()
    if kind == "array":
        return typed(arrays[content], description.get("key"))
    if kind == "qtensor":
        return _qtensor(content, arrays)
    if kind == "dict":
        return {key: build(child, arrays) for key, child in content}
    return (list if kind == "list" else tuple)(build(child, arrays) for child in content)


def _qtensor(content: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    from jaxaccel.quantize import QTensor
    from jaxaccel.quantize._packed import Packing

    packing = content["packing"]
    if packing is not None:
        packing = Packing(tuple(packing["shape"]), tuple(packing["axes"]), packing["group"])
    values, scale = arrays[content["values"]], arrays[content["scale"]]
    return QTensor(values, scale, content["dtype"], packing)


def flatten(description: Description, tree: Any, root: str) -> Iterator[tuple[str, Any]]:
    """The names and the raw arrays of a tree that should be as described.

    Raises:
        TypeError, ValueError: it is not; the message names the path.
    """
    if description is None:
        if tree is not None:
            raise ValueError(f"{root or 'params'}: expected None, got {type(tree).__name__}")
        return
    ((kind, content), *_) = description.items()
    if kind == "array":
        aval_of(content, tree)
        found, expected = _implementation(tree), description.get("key")
        if found != expected:
            kinds = [f"a random key of {kind}" if kind else "numbers" for kind in (found, expected)]
            raise ValueError(f"{content}: {kinds[0]}, expected {kinds[1]}")
        yield content, raw(tree)
    elif kind == "qtensor":
        if not _is_qtensor(tree):
            raise ValueError(f"{root or 'params'}: expected a QTensor, got {type(tree).__name__}")
        yield from ((content[name], getattr(tree, name)) for name in ("values", "scale"))
    else:
        yield from _below(kind, content, tree, root)


def _below(kind: str, content: Sequence[Any], tree: Any, root: str) -> Iterator[tuple[str, Any]]:
    where = root or "params"
    if kind == "dict":
        if not isinstance(tree, Mapping):
            raise ValueError(f"{where}: expected a dict, got {type(tree).__name__}")
        nodes = dict(map(tuple, content))
        for key in nodes.keys() ^ tree.keys():
            raise ValueError(f"{where}: {key!r} is {'missing' if key in nodes else 'not expected'}")
        pairs = [(key, node, tree[key]) for key, node in nodes.items()]
    else:
        if not isinstance(tree, list | tuple) or len(tree) != len(content):
            got = len(tree) if isinstance(tree, list | tuple) else type(tree).__name__
            raise ValueError(f"{where}: expected a {kind} of {len(content)}, got {got}")
        pairs = list(zip(range(len(content)), content, tree, strict=True))
    for key, node, child in pairs:
        yield from flatten(node, child, f"{root}/{key}" if root else str(key))
