"""Saved and loaded: drawn trees, batch axes, recipes, opaque functions, errors."""

import json
import os
import subprocess
import sys
import zipfile
from itertools import repeat
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import FrozenDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxaccel as jx
from tests.artefacts import FORMS, W, X, identical, net, saved
from tests.models import LINEN, ZOO, normal

NAMED = {case.name: case for case in ZOO}
DTYPES = ("float32", "float16", "bfloat16", "int8", "int32", "uint8", "bool", "complex64")


@st.composite
def leaves(draw):
    kind = draw(st.sampled_from(["array"] * 6 + ["number", "key", "float8", "int8", "int4"]))
    if kind == "number":
        return draw(st.sampled_from([np.float32(0.5), jnp.int32(-3), np.bool_(True)]))
    if kind == "key":
        return jax.random.key(
            draw(st.integers(0, 9)), impl=draw(st.sampled_from(["rbg", "threefry2x32"]))
        )
    random = np.random.default_rng(draw(st.integers(0, 99)))
    if kind in ("int8", "int4"):
        kernel = jnp.asarray(random.normal(size=(5, 4)), "float32")
        return jx.quantize.weights({"kernel": kernel}, bits=8 if kind == "int8" else 4)["kernel"]
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    array = random.normal(size=shape) * 3
    if kind == "float8":
        return jnp.asarray(array.astype(ml_dtypes.float8_e4m3fn))
    return jnp.asarray(np.asarray(array).astype(draw(st.sampled_from(DTYPES))))


KEYS = st.sampled_from(["kernel", "bias", "a b", "Ä", "0", 0, 7, "x.y", ""])


def below(children):
    unlike = lambda keys: len({str(key) for key in keys}) == len(keys)
    keys = st.lists(KEYS, max_size=3).filter(unlike)
    one_kind = keys.filter(lambda keys: len({type(key) for key in keys}) < 2)
    return st.one_of(
        one_kind.flatmap(
            lambda keys: st.fixed_dictionaries(dict(zip(keys, repeat(children), strict=False)))
        ),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
    )


TREES = st.recursive(leaves() | st.none(), below, max_leaves=6)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES.filter(jax.tree.leaves), st.sampled_from(FORMS))
def test_drawn_trees(tmp_path, tree, form):
    """They come back as they were, as parameters, arguments and results."""

    def fn(params, images, aside):
        return images * 2, [params, aside], {"none": None}

    x = jnp.arange(6.0).reshape(3, 2)
    jx.export.save(tmp_path / form, fn, tree, x, tree, batch_axes=(0, None))
    loaded, params = jx.export.load(tmp_path / form)
    identical(params, tree)
    identical(jx.export.params(tmp_path / form), tree)
    for size in (1, 5):
        batch = normal(size, size, 2)
        identical(loaded(params, batch, tree), (batch * 2, [tree, tree], {"none": None}))
    manifest = jx.export.manifest(tmp_path / form)
    stored = [x for leaf in jax.tree.leaves(tree) for x in [leaf]
              if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)]  # fmt: skip
    assert manifest.parameter_bytes >= sum(np.asarray(leaf).nbytes for leaf in stored)


@pytest.fixture(params=FORMS)
def path(tmp_path, request):
    return tmp_path / request.param


def test_batch_axes(path):
    def two(params, images, table):
        return {"rows": images["a"].T @ params["w"], "table": table * 2}, images["b"].sum(0)

    images = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    fn, params = saved(path, two, None, images, jnp.ones(5), batch_axes=({"a": 1, "b": 0}, None))
    assert repr(fn) == (
        "<two, loaded: float32[3,batch], float32[batch,2], float32[5] -> float32[batch,2], "
        "float32[5], float32[2]>"
    )
    for size in (1, 2, 7):
        images = {"a": normal(size, 3, size), "b": normal(1, size, 2)}
        identical(fn(params, images, jnp.ones(5)), jax.jit(two)(params, images, jnp.ones(5)))
    with pytest.raises(ValueError, match="batch"):
        fn(params, {"a": jnp.ones((3, 4)), "b": jnp.ones((5, 2))}, jnp.ones(5))


def test_sizes_of_the_example_alone(path):
    fn, params = saved(path, lambda p, x: x.reshape(2, 6) @ jnp.tile(p["w"], (2, 1)),
                       batch_axes=None)  # fmt: skip
    assert fn(params, X).shape == (2, 2)
    with pytest.raises(ValueError, match=r"^args/0: float32\[5,3\], expected float32\[4,3\]$"):
        fn(params, jnp.ones((5, 3)))


def test_symbols_of_the_caller(path):
    n, m = jax.export.symbolic_shape("n, 2*m")
    example = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((n, m), (m,))]
    add = lambda params, x, y: x + y[None] + params["w"][0, 0]
    fn, params = saved(path, add, None, *example)
    for size in ((1, 2), (3, 6)):
        x, y = normal(0, *size), normal(1, size[1])
        identical(fn(params, x, y), add(params, x, y))


def test_integers_from_numpy_and_python(path):
    fn, params = saved(path, lambda p, x, k: x * k + p["w"].sum(), None, X, 2.0,
                       batch_axes=(0, None))  # fmt: skip
    assert fn(params, np.ones((2, 3), np.float32), 3.0).tolist() == [[18] * 3] * 2
    assert fn({"w": np.asarray(W)}, X, np.float32(3)).shape == (4, 3)


@pytest.mark.parametrize("w", [np.ones(3), 0.5, 3, np.array([1, 2, 3]), np.float64(2)])
def test_parameters_as_jax_takes_them(path, w):
    fn, params = saved(path, lambda params, x: x * params["w"], {"w": w})
    identical(params, {"w": jnp.asarray(w)})
    identical(fn(params, X), X * w)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_numbers_take_the_dtype_of_arrays(path, dtype):
    fn = lambda params, x, k: {"w": x * params["w"], "k": x * k}
    x = X.astype(dtype)
    loaded, params = saved(path, fn, {"w": jnp.asarray(2)}, x, 3, batch_axes=(0, None))
    identical(loaded(params, x, 3), fn({"w": 2}, x, 3))


def test_random_keys_are_not_numbers(path):
    key = jax.random.key(0, impl="rbg")
    fn, params = saved(path, lambda p, x, key: jax.random.normal(key, x.shape), None, X, key,
                       batch_axes=(0, None))  # fmt: skip
    for other, kind in ((jax.random.key(0, impl="unsafe_rbg"), "a random key of unsafe_rbg"),
                        (jax.random.key_data(key), "numbers")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^args/1: {kind}, expected a random key of rbg$"):
            fn(params, X, other)


@pytest.mark.parametrize("enabled", [True, False])
def test_float64(path, enabled):
    with jax.enable_x64(True):
        wide = {"w": jnp.arange(3.0, dtype="float64") / 3}
        x = jnp.ones((2, 3), "float64")
        fn, params = saved(path, lambda p, x: x * p["w"], wide, x)
        identical(fn(params, x), x * wide["w"])
    if not enabled:
        with pytest.raises(ValueError, match=r"parameters-\w+.safetensors: w: is float64; set "
                           "jax_enable_x64 before it is loaded$"):  # fmt: skip
            jx.export.load(path)


def test_the_same_bytes_each_time_and_nothing_of_this_machine(tmp_path):
    fn, params = LINEN.build()
    found = []
    for place in ("one", "two"):
        jx.export.save(tmp_path / place, fn, params, LINEN.images())
        jx.export.save(tmp_path / f"{place}.zip", fn, params, LINEN.images())
        files = sorted((tmp_path / place).iterdir())
        found.append({f.name: f.read_bytes() for f in [*files, tmp_path / f"{place}.zip"]})
    (one, two) = ([*content.values()] for content in found)
    assert one == two
    words = [str(Path.home()), os.getcwd(), "site-packages", str(tmp_path), "/tests/"]
    assert not [word for content in one for word in words if word.encode() in content]


def test_what_is_in_the_folder(tmp_path):
    saved(tmp_path / "net", *NAMED["convnet"].build(), NAMED["convnet"].images())
    manifest = jx.export.manifest(tmp_path / "net")
    names = sorted(os.listdir(tmp_path / "net"))
    assert names == sorted(["manifest.json", *map(manifest.name, ("function", "parameters"))])
    arrays = [array.size * 4 for array in jax.tree.leaves(NAMED["convnet"].build()[1])]
    assert manifest.parameter_bytes == sum(arrays)
    assert manifest.files["parameters"].bytes < sum(arrays) + 150 * len(arrays)
    content = json.loads((tmp_path / "net" / "manifest.json").read_text())
    assert content["made_with"]["jax"] == jax.__version__
    assert content["platforms"] == ["cpu", "cuda"]
    assert next(iter(manifest.arguments.values())).shape == ("batch", 28, 28, 1)
    saved(tmp_path / "net.zip", *NAMED["convnet"].build(), NAMED["convnet"].images())
    with zipfile.ZipFile(tmp_path / "net.zip") as archive:
        assert sorted(archive.namelist()) == names
        for name in names:
            assert archive.read(name) == (tmp_path / "net" / name).read_bytes()


def test_the_next_one_replaces_it(path):
    before, _ = saved(path)
    fn, params = saved(path, lambda params, x: -net(params, x), {"w": W + 1})
    identical(fn(params, X), -(X @ (W + 1)))
    if path.is_dir():
        assert len(os.listdir(path)) == 3
    assert os.listdir(path.parent) == [path.name]
    identical(before({"w": W}, X), X @ W)


def test_the_recipe_and_the_forms(tmp_path):
    path = tmp_path / "net.zip"
    fn, params = NAMED["linen"].build()
    x = NAMED["linen"].images()
    fn, params = jx.fold.batchnorm(fn, params, x)
    fn, params = jx.prune.channels(fn, params, x, ratio=0.3)
    fn, params = jx.quantize.int8(fn, params, [x], progress=False)
    loaded, _ = saved(path, jx.autotune(fn), params, x)
    steps = [step["transform"] for step in loaded.recipe]
    assert steps == ["fold.batchnorm", "prune", "quantize.int8", "autotune"]
    assert loaded.recipe == jx.export.manifest(path).recipe
    assert json.loads(json.dumps(loaded.recipe)) == loaded.recipe
    assert loaded.manifest.forms.keys() == {"cpu", "cuda"}
    counts = [sum(row["count"] for row in rows) for rows in loaded.manifest.forms.values()]
    assert min(counts) >= 1
    assert loaded.manifest.params["dict"]


class Modules:
    """The same two arrays in the nodes of four frameworks."""

    @staticmethod
    def nnx():
        return nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))

    @staticmethod
    def linen():
        return linen.Dense(2).init(jax.random.key(0), X)

    @staticmethod
    def frozen():
        return FrozenDict(linen.Dense(2).init(jax.random.key(0), X))

    @staticmethod
    def equinox():
        import equinox as eqx

        return eqx.filter(eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.is_array)


@pytest.mark.parametrize("framework", ["nnx", "linen", "frozen", "equinox"])
def test_parameters_to_train_on(path, framework):
    tree = getattr(Modules, framework)()
    total = lambda params, x: sum(leaf.sum() for leaf in jax.tree.leaves(params)) + x
    fn, params = saved(path, total, tree, X)
    identical(fn(params, X), jax.jit(total)(tree, X))
    again = jx.export.params(path, like=jax.tree.map(jnp.zeros_like, tree))
    identical(again, tree)
    shapes = jax.eval_shape(lambda: tree)
    identical(jx.export.params(path, like=shapes), tree)
    step = jax.tree.map(lambda p, g: p - g, again, jax.grad(lambda p: total(p, X).sum())(again))
    identical(jax.tree.map(jnp.shape, step), jax.tree.map(jnp.shape, tree))


LIKE = {
    "b: only in like": {"w": W, "b": W},
    "w: not in like": {"v": W, "w": None},
    r"w: float32\[3,2\], expected float32\[4,2\]": {"w": jnp.ones((4, 2))},
    r"w: float32\[3,2\], expected int32\[3,2\]": {"w": W.astype("int32")},
}


@pytest.mark.parametrize("message", LIKE)
def test_other_parameters_wanted(path, message):
    saved(path)
    with pytest.raises(ValueError, match=f"^({message}|v: only in like)$"):
        jx.export.params(path, like=LIKE[message])


OTHERS = {
    r"w: float32\[4,2\], expected float32\[3,2\]": ({"w": jnp.ones((4, 2))}, X),
    r"w: float16\[3,2\], expected float32\[3,2\]": ({"w": W.astype("float16")}, X),
    "params: 'w' is missing": ({}, X),
    "params: 'v' is not expected": ({"w": W, "v": W}, X),
    "params: expected a dict, got list": ([W], X),
    r"args/0: float32\[3\], expected float32\[batch,3\]": ({"w": W}, X[0]),
    "args: expected a tuple of 1, got 2": ({"w": W}, X, X),
    r"args/0: expected an array, got str; fn takes pytrees of arrays .*": ({"w": W}, "text"),
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_arguments(path, message):
    fn, _ = saved(path)
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        fn(*OTHERS[message])


def test_loading_imports_no_framework(tmp_path):
    saved(tmp_path / "net")
    code = (
        "import sys; from jaxaccel.export import load; fn, params = load(sys.argv[1]);"
        "import numpy as np; fn(params, np.ones((2, 3), 'float32'));"
        "print({'flax', 'optax', 'haiku', 'keras', 'equinox', 'onnx', 'rich'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
