"""The state of a row, from which its softmax, log-softmax and logsumexp all follow.

A state is the largest element seen, and the sum of the exponentials of *all the others*. States of parts of a row
merge into the state of the row, in any grouping, so that lanes, chunks, threads and blocks of a GPU can each fold their
part: this is the online softmax of Milakov and Gimelshein (arXiv 1805.02867). Keeping the maximum's own term out of the
sum lets ``log1p`` see the others however small they are. The sum carries what its additions round off as a residue, so
that the error does not grow with the number of merges.

**Relative to what.** Written relative to ``exp(maximum)``, a sum would be multiplied by a rounded ``exp(a - b)`` at
each new maximum, and ``x - maximum`` is rounded too, which costs the usual softmax 65 ULP in float32 and 512 in
float64.
Here the reference is a function of the maximum with exact arithmetic instead (the extended exponent of Dukhan and
Ablavatski, arXiv 2001.04438)::

    others = (sum + residue) * 2**exponent * exp(offset),    offset, exponent = reference(maximum)
    exp(x - offset) = (p + low) * 2**k,                      p, low, k = split(x - offset)

- A new maximum with the same offset multiplies the sum by a power of two.
- The offset is 0 while the maximum is moderate, so that no ``x - offset`` is rounded. Beyond ``limit`` it is the
  maximum cut to a multiple of ``quantum``. An x that is within reach of underflow of such a maximum has at least
  half its size, hence its spacing, and ``x - offset`` is at most a few quanta: the difference has fewer bits than the
  dtype and is exact. Offsets differ by a quantum or more, over which older terms fade away, so that the roundings
  of their rescaling do not add up.

**Special values.** A NaN is no maximum and makes the sum NaN. Beside a maximum of +inf the finite elements count
nothing and neither do further infinities: the sum is 0 (or NaN). An element of -inf leaves the state as it is;
``identity`` is the state of no element and of nothing but -inf.

These are plain functions: Python calls them as they are, `fastsoftmax.backends.numba_cpu` compiles them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Precision(NamedTuple):
    """Constants of the arithmetic in one dtype, each a scalar of that dtype.

    Parameters
    ----------
    limit : float
        Maxima of at most this size have offset 0. An argument below ``-2 * limit`` has no exponential to speak of.
    quantum : float
        Larger maxima have an offset that is a multiple of this.
    log2e, ln2_high, ln2_low : float
        1/ln 2, and ln 2 in two parts (Cody and Waite): ``k * ln2_high`` is exact for every k in range.
    rounder : float
        1.5 * 2**(digits - 1): adding and subtracting it rounds to an integer.
    one : float
        1.
    """

    limit: Any
    quantum: Any
    log2e: Any
    ln2_high: Any
    ln2_low: Any
    rounder: Any
    one: Any


FLOAT64 = Precision(
    limit=8192.0,
    quantum=1024.0,
    log2e=1.4426950408889634,
    ln2_high=float.fromhex("0x1.62e42fefap-1"),  # 36 bits, for a k of up to 16
    ln2_low=float.fromhex("0x1.cf79abc9e3b3ap-40"),
    rounder=1.5 * 2.0**52,
    one=1.0,
)
FLOAT32 = Precision(
    limit=np.float32(512.0),
    quantum=np.float32(64.0),
    log2e=np.float32(1.4426950408889634),
    ln2_high=np.float32(float.fromhex("0x1.62ep-1")),  # 12 bits, for a k of up to 11
    ln2_low=np.float32(float.fromhex("0x1.0bfbe8p-15")),
    rounder=np.float32(1.5 * 2.0**23),
    one=np.float32(1.0),
)
# The states of float32 rows, kept and merged in float64.
FLOAT32_WIDE = FLOAT64._replace(limit=512.0, quantum=64.0)


class State(NamedTuple):
    """What is known of the elements seen: see the module's description."""

    maximum: float
    sum: float
    residue: float


# (exp(r) - 1 - r) / r**2 for |r| <= ln(2) / 2, the highest power first: minimax (Remez), for errors of exp(r) of 4.0e-9
# in float32 and 1.3e-17 in float64.
POLYNOMIAL32 = (
    np.float32(0.0013814684934914112),
    np.float32(0.008368682116270065),
    np.float32(0.04166838526725769),
    np.float32(0.1666652113199234),
    np.float32(0.4999999403953552),
)
POLYNOMIAL64 = (
    2.5000114251100206e-08,
    2.7630176070465437e-07,
    2.7557585839528644e-06,
    2.4801493285261913e-05,
    0.0001984126950757967,
    0.0013888888943468132,
    0.008333333333493821,
    0.0416666666665307,
    0.16666666666666413,
    0.5000000000000011,
)


def polynomial32(r: Any) -> Any:
    """(exp(r) - 1 - r) / r**2 in float32."""
    c = POLYNOMIAL32
    q = c[0] * r + c[1]
    q = q * r + c[2]
    q = q * r + c[3]
    return q * r + c[4]


def polynomial64(r: Any) -> Any:
    """(exp(r) - 1 - r) / r**2 in float64."""
    c = POLYNOMIAL64  # written out: on a GPU a loop would put it into memory
    q = c[0] * r + c[1]
    q = q * r + c[2]
    q = q * r + c[3]
    q = q * r + c[4]
    q = q * r + c[5]
    q = q * r + c[6]
    q = q * r + c[7]
    q = q * r + c[8]
    return q * r + c[9]


def polynomial(r: Any) -> Any:
    """(exp(r) - 1 - r) / r**2 for |r| <= ln(2)/2, in the dtype of r."""
    return polynomial32(r) if isinstance(r, np.float32) else polynomial64(r)


def split(t: Any, precision: Precision) -> tuple[Any, Any, Any]:
    """Split exp(t) = (p + low) * 2**k; return p, low and ``k + rounder``, whose lowest bits are the integer k."""
    shifted_k = t * precision.log2e + precision.rounder
    k = shifted_k - precision.rounder
    high = t - k * precision.ln2_high
    r = high - k * precision.ln2_low
    r_low = (high - r) - k * precision.ln2_low
    # exp(r) = 1 + (r + (r**2 * polynomial(r) + r_low)): largest first, each addition with what it rounds off.
    first = precision.one + r
    tail = (r - (first - precision.one)) + (r * polynomial(r) * r + r_low)
    p = first + tail
    return p, tail - (p - first), shifted_k


def reference(maximum: float, precision: Precision) -> tuple[float, float]:
    """Return the offset and the exponent that sums beside this maximum are relative to; 0 and 0 if it is infinite."""
    if math.isinf(maximum):
        return 0.0, 0.0
    offset = 0.0 if abs(maximum) <= precision.limit else maximum - maximum % precision.quantum
    exponent = ((maximum - offset) * precision.log2e + precision.rounder) - precision.rounder
    return offset, exponent


def term(x: float, offset: float, exponent: float, precision: Precision) -> tuple[float, float]:
    """exp(x - offset) / 2**exponent in two parts, for finite x and -inf; 0 where x is far too small to matter."""
    t = x - offset
    if t < -2 * precision.limit:
        return 0.0, 0.0
    p, low, shifted_k = split(t, precision)
    k = int(shifted_k - precision.rounder - exponent)
    return math.ldexp(p, k), math.ldexp(low, k)


def identity() -> State:
    """The state of no element."""
    return State(-math.inf, 0.0, 0.0)


def identities(count: int) -> NDArray[np.float64]:
    """States of no element, as `pack` makes them: an array with a row for each."""
    return np.repeat(np.array([pack(identity(), FLOAT64)]), count, axis=0)  # twice as fast as an assignment


def single(x: float) -> State:
    """The state of one element."""
    return State(-math.inf, x, 0.0) if math.isnan(x) else State(x, 0.0, 0.0)


def fold(state: State, x: float, precision: Precision) -> State:
    """The state with one more element."""
    return merge(state, single(x), precision)


def merge(a: State, b: State, precision: Precision) -> State:
    """The state of the elements of two states."""
    if a.maximum < b.maximum:
        a, b = b, a
    if b.maximum == -math.inf:
        return State(a.maximum, a.sum + b.sum, a.residue + b.residue)
    if a.maximum == math.inf:
        return State(a.maximum, 0.0 * a.sum + 0.0 * b.sum, 0.0)
    offset, exponent = reference(a.maximum, precision)
    b_sum, b_residue = _rebase(b, offset, exponent, precision)
    top, top_low = term(b.maximum, offset, exponent, precision)
    sum, error = two_sum(a.sum, b_sum)
    sum, top_error = two_sum(sum, top)
    return State(a.maximum, sum, (a.residue + b_residue) + (error + (top_error + top_low)))


def _rebase(state: State, offset: float, exponent: float, precision: Precision) -> tuple[float, float]:
    """The sum and the residue of a state relative to a larger reference."""
    old_offset, old_exponent = reference(state.maximum, precision)
    if old_offset == offset:
        shift = int(old_exponent - exponent)
        return math.ldexp(state.sum, shift), math.ldexp(state.residue, shift)
    factor, _ = term(old_offset, offset, exponent - old_exponent, precision)
    return state.sum * factor, state.residue * factor


def two_sum(a: float, b: float) -> tuple[float, float]:
    """a + b and its rounding error (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def product_error(a: float, b: float, product: float) -> float:
    """a * b - product, exactly (Dekker, with Veltkamp's split), where product is the rounded one."""
    a_big = a * 134217729.0
    a_high = a_big - (a_big - a)
    b_big = b * 134217729.0
    b_high = b_big - (b_big - b)
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def total(state: State, precision: Precision) -> tuple[float, float]:
    """The sum with the maximum's own term, in two parts; NaN if the maximum is infinite."""
    if math.isinf(state.maximum):
        return math.nan, math.nan
    offset, exponent = reference(state.maximum, precision)
    top, top_low = term(state.maximum, offset, exponent, precision)
    sum, error = two_sum(state.sum, top)
    return sum, state.residue + (error + top_low)


def normalize(x: float, state: State, precision: Precision) -> float:
    """The probability of x in a row of this state."""
    sum, residue = total(state, precision)
    if math.isnan(sum):
        return math.nan
    offset, exponent = reference(state.maximum, precision)
    t = x - offset
    if t < -2 * precision.limit:
        return 0.0
    p, low, shifted_k = split(t, precision)
    return math.ldexp((p + low) / (sum + residue), int(shifted_k - precision.rounder - exponent))


def log_total(state: State, precision: Precision) -> tuple[float, float]:
    """log(d) in two parts, where d >= 1 is the sum of exp(x - maximum); 0 (or NaN) if the maximum is infinite."""
    if math.isinf(state.maximum):
        return 0.0 * state.sum, 0.0
    offset, exponent = reference(state.maximum, precision)
    top, top_low = term(state.maximum, offset, exponent, precision)
    scale = 2.0**500 if state.sum < 2.0**-500 else 1.0  # the rounding errors of smaller products would underflow
    sum, residue = two_sum(state.sum * scale, state.residue * scale)
    ratio = sum / top
    product = ratio * top
    error = (((sum - product) - product_error(ratio, top, product)) + (residue - ratio * top_low)) / top
    if scale > 1.0:
        return (ratio + error) / scale, 0.0  # log1p(ratio) is ratio
    return math.log1p(ratio), error / (1.0 + ratio)


def logsumexp(state: State, precision: Precision) -> float:
    """The logarithm of the sum of the exponentials of a row of this state."""
    high, low = log_total(state, precision)
    if math.isinf(state.maximum):
        return state.maximum + high
    sum, error = two_sum(state.maximum, high)
    return sum + (error + low)


def pack(state: State, precision: Precision) -> tuple[float, float, float, float, float]:
    """The state as arrays of states hold it: the maximum, offset, exponent, sum and residue."""
    offset, exponent = reference(state.maximum, precision)
    if math.isinf(state.maximum):
        offset = state.maximum  # as the compiled kernels have it
    return state.maximum, offset, exponent, state.sum, state.residue


def unpack(maximum: float, offset: float, exponent: float, sum: float, residue: float, precision: Precision) -> State:
    """The state from what `pack` made of it, or from a sum with another offset: the compiled kernels choose theirs."""
    if math.isinf(maximum):
        return State(maximum, sum, residue)
    new_offset, new_exponent = reference(maximum, precision)
    if offset == new_offset:
        shift = int(exponent - new_exponent)
        return State(maximum, math.ldexp(sum, shift), math.ldexp(residue, shift))
    p, low, k = exp_difference(offset, new_offset)
    product = sum * p
    shift = int(k + exponent - new_exponent)
    rest = product_error(sum, p, product) + sum * low + residue * p
    return State(maximum, math.ldexp(product, shift), math.ldexp(rest, shift))


class WeightedState(NamedTuple):
    """What is known of the terms b * exp(a) seen, in float64.

    One of the largest is kept out of the sum, as ``a`` and ``b``; b is 0 where there is none. The others sum up to
    ``(sum + residue) * 2**exponent * exp(offset)``. The offset is the ``a`` of some term, so that terms with the same
    ``a`` add up as their factors do: b = [1, 2, -3] leaves exactly nothing. Beside terms that are infinite or NaN no
    other counts: they are the sum, and b is 1.
    """

    a: float
    b: float
    offset: float
    exponent: float
    sum: float
    residue: float


# The offset of an earlier part of a row is taken over by a part whose largest term is this near; their sums then merge
# exactly. Beyond, the older sum fades away, so that the roundings of changed offsets do not add up.
WEIGHTED_REACH = 16.0

# The term that is kept is about this power of two in its own exponent: the smallest of the others is then as far below
# it as the smallest subnormal number is below 1.
WEIGHTED_TOP = 100.0


def weighted_identity() -> WeightedState:
    """The state of no term."""
    return WeightedState(-math.inf, 0.0, -math.inf, 0.0, 0.0, 0.0)


def exp_difference(x: float, offset: float) -> tuple[float, float, float]:
    """exp(x - offset) = (p + low) * 2**k, without the rounding of the difference; p, low and k."""
    t, error = two_sum(x, -offset)
    if t < -2 * FLOAT64.limit:
        return 0.0, 0.0, 0.0
    p, low, shifted_k = split(t, FLOAT64)
    return p, low + p * error, shifted_k - FLOAT64.rounder


def kept_term(state: WeightedState, exponent: float) -> tuple[float, float]:
    """The term that is kept out of the sum, in two parts, relative to an exponent."""
    p, low, k = exp_difference(state.a, state.offset)
    factor, b_exponent = math.frexp(state.b)
    shift = int(k + b_exponent - exponent)
    product = p * factor
    return math.ldexp(product, shift), math.ldexp(product_error(p, factor, product) + low * factor, shift)


def merge_weighted(x: WeightedState, y: WeightedState) -> WeightedState:
    """The state of the terms of two states."""
    if y.b == 0:
        return x
    if x.b == 0:
        return y
    if not math.isfinite(x.sum) and not math.isfinite(y.sum):
        return WeightedState(x.a, x.b, x.offset, x.exponent, x.sum + y.sum, 0.0)
    if not math.isfinite(x.sum):
        return x
    if not math.isfinite(y.sum):
        return y
    if (y.a - x.a) + (math.log(abs(y.b)) - math.log(abs(x.b))) > 0:
        x, y = y, x
    if y.offset != x.offset:
        p, low, k = exp_difference(y.offset, x.offset)
        product = y.sum * p
        residue = y.residue * p + y.sum * low + product_error(y.sum, p, product)
        y = WeightedState(y.a, y.b, x.offset, y.exponent + k, product, residue)
    exponent = max(x.exponent, y.exponent)
    x_shift, y_shift = int(x.exponent - exponent), int(y.exponent - exponent)
    kept, kept_low = kept_term(y, exponent)
    sum, error = two_sum(math.ldexp(x.sum, x_shift), math.ldexp(y.sum, y_shift))
    sum, kept_error = two_sum(sum, kept)
    residue = math.ldexp(x.residue, x_shift) + math.ldexp(y.residue, y_shift)
    return WeightedState(x.a, x.b, x.offset, exponent, sum, residue + (error + (kept_error + kept_low)))


def weighted_logsumexp(state: WeightedState) -> tuple[float, float]:
    """The logarithm of the absolute value of the sum of all terms, and the sign of the sum."""
    if state.b == 0:
        return -math.inf, 0.0
    if not math.isfinite(state.sum):
        return abs(state.sum), state.sum if math.isnan(state.sum) else math.copysign(1.0, state.sum)
    kept, kept_low = kept_term(state, state.exponent)
    total, error = two_sum(kept, state.sum)
    total += error + (state.residue + kept_low)
    if total == 0:
        return -math.inf, 0.0
    ratio = state.sum / kept
    if ratio > -0.5:
        product = ratio * kept
        error = ((state.sum - product) - product_error(ratio, kept, product)) + (state.residue - ratio * kept_low)
        log_ratio = math.log1p(ratio) + error / kept / (1.0 + ratio)
    else:
        log_ratio = math.log(abs(total / kept))
    result, error = two_sum(state.a, math.log(abs(state.b)))
    result, last_error = two_sum(result, log_ratio)
    return result + (error + last_error), math.copysign(1.0, total)


def scaled_temperature(temperature: float) -> tuple[float, float, float]:
    """Return t, shrink and grow with ``x / temperature = ((x * shrink) * grow) / t``; the latter are powers of two.

    A temperature of 1 and more has a ``shrink`` of at most 1/2, so that the difference of two numbers times it does not
    overflow; that of others overflows only if its quotient does.
    """
    t, exponent = math.frexp(temperature)
    shift = min(max(-exponent, -1000), 1000)
    return math.ldexp(t, exponent + shift), math.ldexp(1.0, min(shift, 0)), math.ldexp(1.0, max(shift, 0))


def inverse_in_parts(t: float) -> tuple[float, float]:
    """1 / t in two parts."""
    inverse = 1.0 / t
    product = inverse * t
    return inverse, ((1.0 - product) - product_error(inverse, t, product)) / t
