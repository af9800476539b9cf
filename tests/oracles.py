"""Slow, obvious references, written without the code they check."""

import math

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


def nearest_codes(quotient: float) -> set[int]:
    """The whole numbers that are nearest; two where float32 may round either way."""
    return {round(quotient + error) for error in (-1e-4, 0.0, 1e-4)}


def groups_of(x: np.ndarray, axes: tuple[int, ...], size: int | None) -> list[list[tuple]]:
    """The indices that share a scale, group after group of each channel."""
    channels: dict[tuple, list[tuple]] = {}
    for index in np.ndindex(*x.shape):
        channels.setdefault(tuple(index[a] for a in axes), []).append(index)
    whole = size or x.size
    return [c[i : i + whole] for c in channels.values() for i in range(0, len(c), whole)]


def unpacked(packed, scale, shape, axes, group) -> np.ndarray:
    """A tensor of packed 4-bit codes, number by number: index -> row, channel -> byte, nibble."""
    out = np.zeros(shape, np.float32)
    for index in np.ndindex(*shape):
        row = channel = 0
        for axis, (i, size) in enumerate(zip(index, shape, strict=True)):
            if axis in axes:
                channel = channel * size + i
            else:
                row = row * size + i
        byte = int(packed[row // 2, channel])
        code = (byte // 16 if row % 2 else byte % 16) - 8
        out[index] = np.float32(code) * np.float32(scale[row // group, channel])
    return out


def significant(x: float, digits: int) -> float:
    """Rounded to so many binary digits, half to even."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(fraction * 2**digits), exponent - digits)


def least_squared_error(numbers: list[float], largest: int, digits: int) -> float:
    """Of 15 scales from max|x| / largest down to 0.3 times that, in steps of 0.05; in float64."""
    full = max(abs(v) for v in numbers) / largest
    errors = []
    for twentieths in range(20, 5, -1):
        scale = significant(full * twentieths / 20, digits)
        codes = [min(max(round(v / scale), -largest), largest) for v in numbers]
        errors.append(sum((v - c * scale) ** 2 for v, c in zip(numbers, codes, strict=True)))
    return min(errors)


def float8_numbers(exponent_bits: int, mantissa_bits: int, largest: float) -> list[float]:
    """All finite numbers of a format that are not negative, from its definition."""
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            part = mantissa / 2**mantissa_bits
            if exponent == 0:
                found.append(part * 2.0 ** (1 - bias))
            else:
                found.append((1 + part) * 2.0 ** (exponent - bias))
    return [number for number in found if number <= largest]
