"""Exponentials and sums on scalars of float64, for loops that LLVM vectorises."""

from __future__ import annotations

import math

import numpy as np

from fastsoftmax import _state
from fastsoftmax._state import FLOAT64

from .jit import inline, jit


@inline
def power_of_two(shifted):
    """2**n, where the lowest bits of ``shifted`` are n plus the exponent bias."""
    return np.int64(np.float64(shifted).view(np.int64) << np.int64(52)).view(np.float64)


# Up to here exponentials are 0. They are not computed, as a result that underflows takes a hundred cycles: rows a third
# of which is masked would take three times as long as others.
LEAST_EXPONENT = -746.0


@inline
def exp(t, error):
    """exp(t + error), where the error is what rounding took from t, for t below 640; 0 for -inf, whatever the error."""
    is_zero = t <= LEAST_EXPONENT
    p, low, shifted_k = _state.split(0.0 if is_zero else t, FLOAT64)
    # By way of a larger power of two, so that only the last step rounds what is subnormal.
    result = (p + (low + p * error)) * power_of_two(shifted_k + (1023.0 + 100.0)) * 2.0**-100
    return 0.0 if is_zero else result


@inline
def log1p(x, error):
    """log(1 + x + error) in two parts, for x of at least 0 and an error that is small beside it.

    1 + x = m * 2**k with m between sqrt(1/2) and sqrt(2), and f = m - 1 is exact. With s = f / (2 + f),
    log(1 + f) = log((1 + s) / (1 - s)) = 2 s + s * tail(s**2), where 2 s = f - s * f = f - (f**2 / 2 - s * f**2 / 2).
    """
    one_plus, lost = _state.two_sum(1.0, x)
    bits = np.float64(one_plus).view(np.int64)
    m = np.int64((bits & np.int64((1 << 52) - 1)) | np.int64(1023 << 52)).view(np.float64)
    is_upper = m > 1.4142135623730951
    k = np.float64(bits >> np.int64(52)) - (1022.0 if is_upper else 1023.0)
    f = (0.5 * m if is_upper else m) - 1.0
    s, square = f / (2.0 + f), 0.5 * f * f
    z = s * s
    tail = z * 0.1479595352520824 + 0.15314050162244672  # minimax (Remez) for |s| < 0.172
    tail = tail * z + 0.18183564342221895
    tail = tail * z + 0.22222198572840465
    tail = tail * z + 0.28571428742391597
    tail = tail * z + 0.39999999999414654
    tail = tail * z + 0.6666666666666734
    tail = s * (z * tail + square) - square
    high, low = _state.two_sum(k * 6.93147180369123816490e-01, f)  # ln(2) in two parts, the first times k exact
    return high, low + (tail + (k * 1.90821492927058770002e-10 + (lost + error) / one_plus))


@jit
def add_products(a, b, n, lanes, sums, rests):
    """Add n products to running sums, every ``lanes``-th to the same one; those with an `a` of 0 are 0, whatever b."""
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            value = 0.0 if a[first + j] == 0.0 else b[first + j]
            product = a[first + j] * value
            sums[j], error = _state.two_sum(sums[j], product)
            rests[j] += error + _state.product_error(a[first + j], value, product)


@jit
def add_numbers(a, n, lanes, sums, rests):
    """Add n numbers to running sums, every ``lanes``-th to the same one."""
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            sums[j], error = _state.two_sum(sums[j], a[first + j])
            rests[j] += error


@jit
def total_of(sums, rests, lanes):
    """The sum of running sums, in two parts."""
    total = rest = 0.0
    for j in range(lanes):
        total, error = _state.two_sum(total, sums[j])
        rest += error + rests[j]
    return total, rest


@jit
def largest_in(row, n):
    """The largest of n elements, NaN if one is."""
    largest, probe = -math.inf, 0.0
    for j in range(n):
        largest = max(largest, row[j])
        probe += 1.0 if row[j] != row[j] else 0.0
    return math.nan if probe > 0.0 else largest
