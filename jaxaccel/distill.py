"""Knowledge distillation: losses that make a small network follow a larger one."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Reduction = Literal["mean", "none"]


def loss(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    reduction: Reduction = "mean",
) -> Float[Array, "..."]:
    """Hinton's distillation loss: ``alpha T² KL(teacher_T || student_T) + (1 - alpha) CE``.

    The factor T² keeps the size of the soft gradients when the temperature changes. No gradient
    flows into the teacher (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

    Args:
        student_logits: unnormalised log-probabilities of the trained network.
        teacher_logits: the same of the network to follow.
        labels: class indices in [0, classes).
        temperature: both softmaxes divide their logits by it; > 0.
        alpha: share of the teacher's term, in [0, 1].
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar, or ``[batch]`` for ``reduction="none"``.

    Raises:
        ValueError: shapes differ, or `temperature`, `alpha` or `reduction` is out of range.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> float(loss(logits, logits, jnp.array([0, 1]), alpha=1.0))
    0.0
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {student_logits.shape} and teacher logits {teacher_logits.shape} "
            "must have the same shape: [batch, classes]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be > 0")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must lie in [0, 1]")
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    soft = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    log_probabilities = jax.nn.log_softmax(student_logits)
    hard = -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    return _reduce(alpha * temperature**2 * soft + (1 - alpha) * hard, reduction)


def attention_transfer(
    student: Float[Array, "batch height width channel"],
    teacher: Float[Array, "batch height width teacher_channel"],
    *,
    reduction: Reduction = "mean",
) -> Float[Array, "..."]:
    """Distance between the attention maps of two feature maps of the same height and width.

    An attention map is the sum over channels of squared activations, scaled to unit length; the
    loss is the squared distance of the two maps. Numbers of channels may differ, and nothing has
    to be learned to compare them (Zagoruyko, Komodakis 2017, arXiv:1612.03928).

    Args:
        student: features of the trained network.
        teacher: features of the network to follow; no gradient flows into it.
        reduction: ``"mean"`` over the batch, or ``"none"`` for one value per sample.

    Returns:
        A scalar in [0, 2], or ``[batch]`` for ``reduction="none"``.

    Raises:
        ValueError: batch, height or width differ.

    >>> import jax
    >>> features = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    >>> float(attention_transfer(features, 3 * features)) < 1e-6
    True
    """
    if student.ndim != 4 or student.shape[:3] != teacher.shape[:3]:
        raise ValueError(
            f"student features {student.shape} and teacher features {teacher.shape} must be "
            "[batch, height, width, channel] and agree in all but the channels"
        )
    difference = _attention(student) - _attention(jax.lax.stop_gradient(teacher))
    return _reduce(jnp.sum(difference**2, axis=-1), reduction)


def _attention(features: Array) -> Float[Array, "batch position"]:
    energy = jnp.sum(features**2, axis=-1).reshape(features.shape[0], -1)
    # The square root is taken of a positive number, so that its gradient is finite at zero.
    return energy * jax.lax.rsqrt(jnp.sum(energy**2, axis=-1, keepdims=True) + 1e-12)


def _reduce(values: Float[Array, " batch"], reduction: Reduction) -> Float[Array, "..."]:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction={reduction!r} must be "mean" or "none"')
    return jnp.mean(values) if reduction == "mean" else values
