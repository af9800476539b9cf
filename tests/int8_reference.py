"""Integer arithmetic, slow and obvious: NumPy and Python numbers alone."""

import itertools

import numpy as np


def convolution(x, kernel, zero, params):
    """``sum((x - zero) * kernel)`` over the taps that lie on the image; any layout and rank."""
    numbers = params["dimension_numbers"]
    x = np.moveaxis(x.astype(np.int64) - zero, (numbers.lhs_spec[0], numbers.lhs_spec[1]), (0, -1))
    kernel = np.moveaxis(kernel.astype(np.int64), numbers.rhs_spec[:2], (-1, -2))
    groups, taps = params["feature_group_count"], kernel.shape[:-2]
    spread = [
        (n - 1) * gap + 1 for n, gap in zip(x.shape[1:-1], params["lhs_dilation"], strict=True)
    ]
    wide = np.zeros((x.shape[0], *spread, x.shape[-1]), np.int64)
    wide[(slice(None), *(slice(None, None, gap) for gap in params["lhs_dilation"]))] = x
    steps, gaps = params["window_strides"], params["rhs_dilation"]
    sizes = [
        (n + low + high - (k - 1) * gap - 1) // step + 1
        for n, k, (low, high), step, gap in zip(
            spread, taps, params["padding"], steps, gaps, strict=True
        )
    ]
    out = np.zeros((x.shape[0], *sizes, kernel.shape[-1]), np.int64)
    per_in, per_out = x.shape[-1] // groups, kernel.shape[-1] // groups
    for place in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, taps)):
            at = [
                p * step + t * gap - low
                for p, t, step, gap, (low, _) in zip(
                    place, tap, steps, gaps, params["padding"], strict=True
                )
            ]
            if all(0 <= a < n for a, n in zip(at, spread, strict=True)):
                seen = wide[(slice(None), *at)].reshape(-1, groups, per_in)
                weights = kernel[tap].reshape(per_in, groups, per_out)
                sums = np.einsum("bgi,igo->bgo", seen, weights)
                out[(slice(None), *place)] += sums.reshape(len(x), -1)
    return np.moveaxis(out, (0, -1), (numbers.out_spec[0], numbers.out_spec[1]))


def largest(x, params):
    """Max pooling."""
    x = np.pad(x, params["padding"], constant_values=np.iinfo(x.dtype).min)
    seen = np.lib.stride_tricks.sliding_window_view(x, params["window_dimensions"])
    seen = seen[tuple(slice(None, None, step) for step in params["window_strides"])]
    return seen.max(tuple(range(x.ndim, 2 * x.ndim)))


def dot(a, b, zeros, params):
    """The dot product of ``a - zeros[0]`` and ``b - zeros[1]``: batch, rest of a, rest of b."""
    (axes_a, axes_b), (batch_a, batch_b) = params["dimension_numbers"]
    rest = lambda x, *used: [i for i in range(x.ndim) if i not in sum(map(tuple, used), ())]
    a, b = a.astype(np.int64) - zeros[0], b.astype(np.int64) - zeros[1]
    free_a, free_b = rest(a, axes_a, batch_a), rest(b, axes_b, batch_b)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    name_a = {i: next(letters) for i in range(a.ndim)}
    name_b = {j: name_a[i] for i, j in zip((*axes_a, *batch_a), (*axes_b, *batch_b), strict=True)}
    name_b |= {j: next(letters) for j in free_b}
    word = lambda names, order: "".join(names[i] for i in order)
    out = word(name_a, (*batch_a, *free_a)) + word(name_b, free_b)
    left, right = word(name_a, range(a.ndim)), word(name_b, range(b.ndim))
    return np.einsum(f"{left},{right}->{out}", a, b)


def to_float(acc, bias, multiplier):
    """``(f32(acc) + bias) * multiplier``, rounded to float32 after each."""
    return (acc.astype(np.float32) + np.float32(bias)) * np.float32(multiplier)


def requantized(acc, bias, multiplier, zero, low=-128, high=127):
    steps = np.rint(to_float(acc, bias, multiplier))  # halves to even
    return np.clip(steps.astype(np.float64) + zero, low, high).astype(np.int64)


def shifted(acc, bias, bits, zero, low=-128, high=127):
    total = acc.astype(np.int64) + bias
    assert np.abs(total).max(initial=0) < 2**31
    half = np.where(bits > 0, 2 ** np.maximum(bits - 1, 0), 0)
    return np.clip(np.floor_divide(total + half, 2**bits) + zero, low, high)  # halves up


def rescaled(terms, zeros, scales, result, largest, limits=(-128, 127)):
    """A sum of integers of several scales, by integer factors; ``|term| <= largest``."""
    result_scale, result_zero = result
    ratios = [scale / result_scale for scale in scales]
    bits = 30
    if all(np.log2(ratio) == int(np.log2(ratio)) for ratio in ratios):
        bits = max(0, *(-int(np.log2(ratio)) for ratio in ratios))
    while bits and sum(largest * round(ratio * 2**bits) for ratio in ratios) >= 2**30:
        bits -= 1
    pairs = zip(terms, zeros, ratios, strict=True)
    total = sum((t.astype(np.int64) - z) * round(r * 2**bits) for t, z, r in pairs)
    assert np.abs(total).max(initial=0) < 2**30
    return shifted(total, 0, np.int64(bits), result_zero, *limits)


def bound(limit, scale, zero):
    """The integer of a limit in real numbers."""
    if np.isinf(limit):
        return -128 if limit < 0 else 127
    return int(np.clip(np.rint(limit / scale) + zero, -128, 127))
