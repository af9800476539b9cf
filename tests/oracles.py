"""Slow, obvious references, written without the code they check."""

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def distillation(student, teacher, labels, temperature, alpha) -> np.ndarray:
    """Hinton's loss per sample, in float64, sample by sample."""
    out = []
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    for s, t, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        kl = sum(pi * (np.log(pi) - np.log(qi)) for pi, qi in zip(p, q, strict=True) if pi > 0)
        out.append(alpha * temperature**2 * kl + (1 - alpha) * -np.log(softmax(s)[y]))
    return np.array(out)


def quantize_channel(column: np.ndarray) -> tuple[list[int], float]:
    """One output channel in Python numbers."""
    largest = max(abs(float(v)) for v in column)
    scale = np.float32(largest) / np.float32(127) if largest > 0 else np.float32(1)
    return [round(float(np.float32(v) / scale)) for v in column], float(scale)


def n_of_m(column: list[float], n: int, m: int) -> list[bool]:
    """Which of every m consecutive scores are among the n highest, later ones winning ties."""
    kept = []
    for start in range(0, len(column), m):
        group = column[start : start + m]
        order = sorted(range(m), key=lambda i: (group[i], i))
        kept += [i in order[m - n :] for i in range(m)]
    return kept
