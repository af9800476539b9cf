"""The Accelerator against a plain loop, over devices, precisions and ragged batches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxaccel as jx
from jaxaccel._select import flatten
from tests.models import hand_written, linen_net


def batches(count: int = 4, size: int = 16, side: int = 8, last: int | None = None) -> list[dict]:
    """Images whose brightness tells the class, as uint8."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        n = last if last and i == count - 1 else size
        label = rng.integers(0, 10, n).astype(np.int32)
        noise = rng.integers(0, 20, (n, side, side, 1))
        image = noise + 23 * label[:, None, None, None]
        out.append({"image": image.astype(np.uint8), "label": label})
    return out


def reference_loop(fn, params, tx, data, epochs):
    """Training as one would write it by hand, step by step."""
    state = tx.init(params)
    for _ in range(epochs):
        for batch in data:
            x, y = jnp.asarray(batch["image"], jnp.float32) / 255, batch["label"]
            loss = lambda p, x=x, y=y: optax.softmax_cross_entropy_with_integer_labels(
                fn(p, x), y
            ).mean()
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
    return params


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    for path, leaf in flatten(a).items():
        np.testing.assert_allclose(leaf, flatten(b)[path], rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_equals_a_loop_by_hand(steps_per_call):
    fn, params = hand_written()
    data = batches(5, last=9)
    acc = jx.Accelerator((fn, params), optax.adam(1e-2), steps_per_call=steps_per_call)
    acc.fit(data, epochs=2, progress=False)
    assert acc.step == 10
    assert_close(acc.params, reference_loop(fn, params, optax.adam(1e-2), data, 2), rtol=1e-4)


def test_learns_and_reports_what_it_did():
    acc = jx.Accelerator(hand_written(), optax.adam(3e-2))
    data = batches(8)
    history = acc.fit(data, epochs=12, validation=data, progress=False)
    assert [e.epoch for e in history] == list(range(1, 13))
    assert history[-1].train.loss < history[0].train.loss
    assert history[-1].train.samples == 128
    assert history[-1].validation == acc.evaluate(data)
    logits = np.concatenate([acc.predict(b["image"]) for b in data])
    labels = np.concatenate([b["label"] for b in data])
    metrics = acc.evaluate(data)
    assert metrics.accuracy == (logits.argmax(-1) == labels).mean() > 0.3
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels)
    assert metrics.loss == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.contrib.prodigy(),  # keeps the parameters in its state
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),  # wants the loss
        optax.polyak_sgd(),
        optax.lbfgs(),  # searches along a line, calling the loss
        optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(0.1)),
    ],
    ids=["prodigy", "plateau", "polyak", "lbfgs", "noise"],
)
def test_any_optimizer(optimizer):
    acc = jx.Accelerator(hand_written(), optimizer)
    history = acc.fit(batches(4), epochs=2, progress=False)
    assert acc.step == 8
    assert np.isfinite(history[-1].train.loss)


def test_a_teacher_keeps_its_statistics_in_float32():
    seen = []
    fn, params = linen_net()

    def followed(params, x):
        seen.append([leaf.dtype for leaf in jax.tree.leaves(params["batch_stats"])])
        return fn(params, x)

    acc = jx.Accelerator(
        hand_written(),
        optax.sgd(0.1),
        precision="bfloat16",
        teacher=(followed, params),
        loss=lambda s, t, y: jx.distill.loss(s, t, y, reduction="none"),
    )
    acc.fit(batches(1), progress=False)
    assert set(seen[0]) == {jnp.dtype("float32")}


def test_batch_norm_and_dropout_train_and_go_back_into_the_module():
    model = jx.nn.ConvNet(rngs=nnx.Rngs(0), input_shape=(28, 28, 1), widths=(4, 8), dense=(16,))
    acc = jx.Accelerator(model, optax.adam(1e-2))
    data = batches(3, side=28)
    acc.fit(data, epochs=2, progress=False)
    module = acc.module()
    module.eval()
    x = jnp.asarray(data[0]["image"], jnp.float32) / 255
    np.testing.assert_allclose(module(x), acc.predict(data[0]["image"]), rtol=1e-4, atol=1e-5)
    acc = jx.Accelerator(linen_net(), optax.adam(1e-2))
    before = acc.params
    acc.fit(batches(), progress=False)
    for name in ("params", "batch_stats"):
        for old, new in zip(*map(jax.tree.leaves, (before[name], acc.params[name])), strict=True):
            assert not np.array_equal(old, new)


def test_one_compilation_for_ragged_ends_and_further_epochs():
    traces = []

    def fn(params, x):
        traces.append(x.shape)
        return hand_written()[0](params, x)

    acc = jx.Accelerator((fn, hand_written()[1]), optax.sgd(0.1))
    data = batches(3, last=5)
    acc.fit(data, progress=False)
    acc.evaluate(data)
    seen = len(traces)
    acc.fit(data, epochs=3, progress=False)
    acc.evaluate(data)
    assert len(traces) == seen == 2
    assert set(traces) == {(16, 8, 8, 1)}


HALF = "batch/image is uint8[8,8,8,1], was uint8[16,8,8,1]; batch/label is int32[8], was int32[16]"
ANEW = "Every set of shapes and types compiles anew: keep to one batch size and one type of images"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda batch: {name: x[:8] for name, x in batch.items()},
            f"{HALF}; batch/mask is bool[8], was bool[16]",
        ),
        (
            lambda batch: batch | {"image": batch["image"].astype(np.float32)},
            "batch/image is float32[16,8,8,1], was uint8[16,8,8,1]",
        ),
        (
            lambda batch: {name: x[:8] for name, x in batch.items()} | {"weight": np.float32(1)},
            f"{HALF}; batch/mask is bool[8], was bool[16]; and 1 more",
        ),
    ],
)
def test_a_second_trace_names_its_cause(change, said):
    acc = jx.Accelerator(hand_written(), optax.sgd(0.1))
    data = batches(2)
    acc.fit(data, progress=False)
    message = f"training step: traced and compiled again: {said}. {ANEW}"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        acc.fit([change(batch) for batch in data], progress=False)
    acc.fit(data, progress=False)  # both are compiled now; a warning would be an error


def test_evaluation_leaves_padding_out():
    acc = jx.Accelerator(hand_written(), optax.sgd(0.1))
    whole, ragged = batches(1, size=16), batches(1, size=16)
    pieces = [{k: v[i : i + 6] for k, v in ragged[0].items()} for i in (0, 6, 12)]
    a, b = acc.evaluate(whole), acc.evaluate(pieces)
    assert (a.samples, a.accuracy) == (b.samples, b.accuracy)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)


def train_twenty_steps(devices: int):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    model = jx.nn.ConvNet(
        rngs=nnx.Rngs(0), input_shape=(20, 20, 1), widths=(3, 4), dense=(8,), dropout=0.25
    )
    fn, params = jx.functional(model)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    # Not a rotation: where it rounds to uint8, two compilations may differ by one grey level.
    augment = jx.augment.chain(
        jx.augment.random_horizontal_flip(), jx.augment.random_vertical_flip()
    )
    acc = jx.Accelerator(
        (fn, params), optax.adam(1e-2), mesh=mesh, precision="float64", augment=augment
    )
    acc.fit(batches(20, side=20), progress=False)
    return acc.params


def test_eight_devices_train_as_one():
    with jax.enable_x64(True):
        assert_close(train_twenty_steps(1), train_twenty_steps(8), rtol=1e-9, atol=1e-12)


def test_gradients_are_summed_by_xla():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    acc = jx.Accelerator(hand_written(), optax.sgd(0.1), mesh=mesh)
    acc.fit(batches(1), progress=False)
    batch = jax.device_put(batches(1)[0] | {"mask": np.ones(16, bool)}, acc._sharding("batch"))
    text = acc._train.lower(acc._state, None, batch).compile().as_text()
    assert text is not None
    assert "all-reduce" in text
    assert jax.tree.leaves(acc.params)[0].sharding.is_fully_replicated


def test_bfloat16_computes_in_bf16_and_keeps_float32():
    seen = []

    def fn(params, x):
        seen.append((x.dtype, params["out"]["kernel"].dtype))
        return hand_written()[0](params, x)

    acc = jx.Accelerator((fn, hand_written()[1]), optax.adam(1e-2), precision="bfloat16")
    acc.fit(batches(), progress=False)
    assert set(seen) == {(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))}
    assert {leaf.dtype for leaf in jax.tree.leaves(acc.params)} == {jnp.dtype("float32")}
    exact = jx.Accelerator(hand_written(), optax.adam(1e-2))
    exact.fit(batches(), progress=False)
    assert_close(acc.params, exact.params, rtol=0.2, atol=0.02)
    assert acc.predict(batches()[0]["image"]).dtype == jnp.float32


def test_batch_statistics_keep_their_type_in_bfloat16():
    acc = jx.Accelerator(linen_net(), optax.sgd(0.1), precision="bfloat16")
    acc.fit(batches(2), progress=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(acc.params)} == {jnp.dtype("float32")}


def test_augment_sees_raw_images_in_training_only():
    seen = []

    def augment(key, batch):
        seen.append(batch["image"].dtype)
        return {**batch, "image": jnp.zeros_like(batch["image"])}

    acc = jx.Accelerator(hand_written(), optax.sgd(0.5), augment=augment)
    acc.fit(batches(), progress=False)
    acc.evaluate(batches())
    assert seen == [jnp.uint8]
    # Black images leave the first kernel without a gradient.
    np.testing.assert_array_equal(
        acc.params["hidden"]["kernel"], hand_written()[1]["hidden"]["kernel"]
    )


def test_transform_wraps_both_forwards():
    names = []

    def transform(fn):
        def wrapped(*args):
            names.append(len(args))
            return fn(*args)

        return wrapped

    acc = jx.Accelerator(linen_net(), optax.sgd(0.1), transform=transform)
    acc.fit(batches(1), progress=False)
    acc.evaluate(batches(1))
    assert names == [3, 2]


def test_a_teacher_is_followed():
    student, teacher = hand_written(), hand_written()
    teacher = (teacher[0], jax.tree.map(lambda p: 2 * p, teacher[1]))

    def loss(logits, followed, labels):
        return jx.distill.loss(logits, followed, labels, alpha=1.0, reduction="none")

    acc = jx.Accelerator(student, optax.adam(1e-2), loss=loss, teacher=teacher)
    before = acc.evaluate(batches()).loss
    acc.fit(batches(), epochs=5, progress=False)
    assert acc.evaluate(batches()).loss < 0.5 * before


def test_params_survive_the_next_step():
    fn, params = hand_written()
    acc = jx.Accelerator((fn, params), optax.sgd(0.1))
    kept = acc.params
    acc.fit(batches(1), progress=False)
    assert_close(kept, params)  # neither was donated


def test_streaming_and_pairs_give_the_same_training():
    data = jx.data.arrays(*(np.concatenate([b[k] for b in batches()]) for k in ("image", "label")))
    device = jx.data.device_loader(data, 24, seed=3)
    stream = jx.data.stream_loader(data, 24, seed=3)
    pairs = [(b["image"][b["mask"]], b["label"][b["mask"]]) for b in stream]
    stream.epoch = 0
    trained = []
    for loader in (device, stream, pairs):
        acc = jx.Accelerator(hand_written(), optax.sgd(0.1))
        acc.fit(loader, progress=False)
        trained.append(acc.params)
    assert_close(trained[0], trained[1])
    assert_close(trained[0], trained[2])


def test_fit_reads_each_epoch_once():
    digits = jx.data.digits()
    loader = jx.data.device_loader(digits.validation, 64)
    acc = jx.Accelerator(jx.functional(jx.nn.MLP(784, 4, 1, 10, rngs=nnx.Rngs(0))), optax.sgd(0.1))
    acc.fit(loader, epochs=3, progress=False)
    assert loader.epoch == 3


def test_nan_stops_with_the_step():
    data = [{**b, "image": b["image"].astype(np.float32)} for b in batches(4)]
    data[2]["image"][5] = np.nan
    acc = jx.Accelerator(hand_written(), optax.sgd(1e-3))
    with pytest.raises(FloatingPointError, match="step 2: the loss is not finite; try a lower"):
        acc.fit(data, progress=False)


def test_progress_bar_shows_the_figures(capsys):
    acc = jx.Accelerator(hand_written(), optax.sgd(0.1))
    acc.fit(batches(3), epochs=2)
    shown = capsys.readouterr().out
    assert "epoch 2/2" in shown
    assert "images/s" in shown
    assert "6 steps" in shown


def fit(data, **options):
    return jx.Accelerator(hand_written(), optax.sgd(0.1), **options).fit(data, progress=False)


BATCH = batches(1)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit([]), ValueError, "no batches: the iterable is empty"),
        (lambda: fit([BATCH["image"]]), ValueError, "a batch must be a dict with .* got ndarray"),
        (lambda: fit([{"image": BATCH["image"]}]), ValueError, 'a batch has no "label"; its entr'),
        (
            lambda: fit([{"image": BATCH["image"][:3], "label": BATCH["label"]}]),
            ValueError,
            "a batch has 3 images but 16 labels",
        ),
        (
            lambda: fit([batches(1, size=4)[0], BATCH]),
            ValueError,
            "a batch of 16 samples follows a first one of 4",
        ),
        (lambda: fit([BATCH], precision="float64"), ValueError, 'precision="float64" needs'),
        (lambda: fit([BATCH], precision="fp8"), ValueError, "precision='fp8' must be one of"),
        (lambda: fit([BATCH], steps_per_call=0), ValueError, "steps_per_call=0 must be an integer"),
        (
            lambda: fit([BATCH], loss=lambda a, b: jnp.mean(a)),
            ValueError,
            r"loss must return one value per sample, shape \(16,\), got shape \(\)",
        ),
        (
            lambda: jx.Accelerator(hand_written(), optax.sgd(0.1)).fit([BATCH], epochs=0),
            ValueError,
            "epochs=0 must be >= 1",
        ),
        (
            lambda: jx.Accelerator(hand_written(), optax.sgd(0.1)).fit(iter([BATCH]), epochs=2),
            ValueError,
            "train is a one-shot iterator but epochs=2",
        ),
        (
            lambda: jx.Accelerator(
                (hand_written()[0], jx.quantize.weights(hand_written()[1])), optax.sgd(0.1)
            ),
            TypeError,
            "hidden/kernel/values: cannot train a leaf of type int8, only .*dequantize",
        ),
        (
            lambda: jx.Accelerator(hand_written(), optax.sgd(0.1)).module(),
            TypeError,
            "needs a Flax model",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
