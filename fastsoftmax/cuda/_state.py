"""The state of a row on the GPU, in the arithmetic that a GPU is fast in.

It is the state of `fastsoftmax._state`: the largest element seen, and the sum of the exponentials of all the others,
with what its additions round off as a residue, relative to a reference that is a function of the maximum alone::

    sum + residue = 2**bias * (sum of exp(x - offset) * 2**-shift),       offset, shift = reference(maximum)

Numbers that have to be right to more than their digits come in two parts, the second of which is what the first one
rounds off: terms, the sums of them, factors, and what all results of a row share.

- **half** serves float16 and bfloat16, whose results have 11 digits or fewer. Its exponential is the hardware's
  ``ex2(t * log2(e))`` as it stands, in one part.
- **single** and **double** split ``t = k * ln(2) + r`` (Cody and Waite) and have exp(r) - 1 from a polynomial. ``ex2``
  is up to 2 ULP off by itself, and there is none for float64.

Terms are biased by 2**bias, which leaves room for all of them in a sum, and their lesser parts among normal numbers.
An element too small to matter, -inf included, is raised to where its term is 2**(1 - 2 * bias) or so of the maximum's
and vanishes in any sum.

NaN and infinities need no care inside loops: `larger` hands a NaN on to the maximum, and `inverse_total`,
`log_normalizer` and `logsumexp` look at it, whatever the terms beside it were. ``(-inf, 0, 0)`` is the state of no
element.

These are plain functions on NumPy scalars, and `plain` binds those of one precision. `on_device` compiles the same for
the GPU, with instructions of its own in place of `ex2`, `larger`, `fused` and `log1p`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np

from fastsoftmax import _state as cpu
from fastsoftmax._state import two_sum
from fastsoftmax.cuda import _instructions


class Arithmetic(NamedTuple):
    """Constants of a precision, each a scalar of its dtype.

    Parameters
    ----------
    zero, one, nan, infinity : float
        0, 1, NaN, +inf.
    limit, half_quantum, quantizer, far : float
        Maxima of at most the limit have offset 0, larger ones the multiple below them of the quantum of
        `fastsoftmax._state`, to which the quantizer rounds, and far ones themselves. An x that matters beside these has
        at least half their size, so that x - offset is exact (Sterbenz); and offsets are so far apart that the
        roundings of sums that are taken from one to the next fade away.
    log2e, ln2, ln2_high, ln2_low, rounder : float
        As in `fastsoftmax._state.Precision`.
    lowest : float
        Terms are at least ``2**(lowest + bias)``, normal numbers.
    exponent_bias : float
        What is added to an exponent for the biased power of two in the bits of a number.
    raised, lowered : float
        2**bias and 2**-bias.
    small : float
        What smaller results round off is subnormal.
    rounding : float
        The smallest normal number, biased: a smaller biased result that it is added to is rounded to a multiple of the
        smallest subnormal number.
    """

    zero: Any
    one: Any
    nan: Any
    infinity: Any
    limit: Any
    half_quantum: Any
    quantizer: Any
    far: Any
    log2e: Any
    ln2: Any
    ln2_high: Any
    ln2_low: Any
    rounder: Any
    lowest: Any
    exponent_bias: Any
    raised: Any
    lowered: Any
    small: Any
    rounding: Any


def _arithmetic(real: Any, precision: cpu.Precision, bias: int) -> Arithmetic:
    least_exponent, quantizer = int(np.finfo(real).minexp), precision.rounder * precision.quantum
    numbers = (
        0, 1, math.nan, math.inf, precision.limit, precision.quantum / 2, quantizer, quantizer / 8,
        precision.log2e, math.log(2.0), precision.ln2_high, precision.ln2_low, precision.rounder,
        least_exponent + 1 - bias, 1 - least_exponent + bias, 2.0**bias, 2.0**-bias,
        np.finfo(real).smallest_normal / np.finfo(real).eps, 2.0 ** (least_exponent + bias),
    )  # fmt: skip
    return Arithmetic(*map(real, numbers))


BIAS32, BIAS64 = 64, 512
SINGLE, DOUBLE = _arithmetic(np.float32, cpu.FLOAT32, BIAS32), _arithmetic(np.float64, cpu.FLOAT64, BIAS64)
EXPONENT_HALF, FLOOR_HALF = np.float32(BIAS32), SINGLE.lowest * SINGLE.ln2


def ex2(x: Any) -> Any:
    """2**x in float32."""
    return np.exp2(x)


def larger(a: Any, b: Any) -> Any:
    """The larger of two numbers; NaN if either is."""
    return np.maximum(a, b)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""
    if isinstance(a, np.float32):
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    product = a * b
    total, error = two_sum(product, c)
    return total + (error + cpu.product_error(a, b, product))


def log1p(x: Any) -> Any:
    """log(1 + x)."""
    return np.log1p(x)


def power_of_two_single(shifted: Any) -> Any:
    """The power of two whose biased exponent is in the lowest bits of a number."""
    return np.int32(shifted.view(np.int32) << np.int32(23)).view(np.float32)


def power_of_two_double(shifted: Any) -> Any:
    """The power of two whose biased exponent is in the lowest bits of a number."""
    return np.int64(shifted.view(np.int64) << np.int64(52)).view(np.float64)


def log1p_single(x: Any) -> Any:
    """log(1 + x) in two parts, from float64: it is needed once for a row, and in float32 up to 2 ULP off."""
    wide = log1p(np.float64(x))
    high = np.float32(wide)
    return high, np.float32(wide - np.float64(high))


# What the functions below see as theirs: here single precision's, in `_bind` each one's own.
OWN, power_of_two, polynomial = SINGLE, power_of_two_single, cpu.polynomial32


def reference_half(maximum: Any) -> Any:
    """Offset and shift of the sums beside a maximum."""
    return maximum, OWN.zero


def factors_half(t: Any, shift: Any) -> Any:
    """Scale and rest for a t of at most 0: all of exp(t) * 2**(bias - shift), and 0."""
    return ex2(max(FLOOR_HALF, t) * OWN.log2e + (EXPONENT_HALF - shift)), OWN.zero


def reference(maximum: Any) -> Any:
    """Offset and shift of the sums beside a maximum."""
    if abs(maximum) < OWN.far:
        multiple = ((maximum - OWN.half_quantum) + OWN.quantizer) - OWN.quantizer
        offset = OWN.zero if abs(maximum) <= OWN.limit else multiple
        return offset, ((maximum - offset) * OWN.log2e + OWN.rounder) - OWN.rounder
    return maximum, OWN.zero


def factors(t: Any, shift: Any) -> Any:
    """Scale and rest, where exp(t) * 2**(bias - shift) = scale * (1 + rest) is at most about 2**bias.

    The scale is a power of two, and the rest is between -0.3 and 0.42.
    """
    t = max((OWN.lowest + shift) * OWN.ln2, t)
    shifted_k = t * OWN.log2e + OWN.rounder
    k = shifted_k - OWN.rounder
    r = (t - k * OWN.ln2_high) - k * OWN.ln2_low
    return power_of_two(shifted_k + (OWN.exponent_bias - shift)), r * polynomial(r) * r + r


def power(t: Any, shift: Any) -> Any:
    """exp(t) * 2**(bias - shift), where that is at most about 2**bias, in two parts."""
    scale, rest = factors(t, shift)
    p = OWN.one + rest
    return p * scale, (rest - (p - OWN.one)) * scale


def plus(sum: Any, residue: Any, a: Any, a_low: Any) -> Any:
    """A sum and its residue with one more number of two parts."""
    total, error = two_sum(sum, a)
    return total, residue + (error + a_low)


def joined(sum: Any, residue: Any, a: Any, b: Any) -> Any:
    """A sum and its residue with a + b, of which b is smaller."""
    total = a + b
    return plus(sum, residue, total, b - (total - a))


def times(a: Any, a_low: Any, b: Any, b_low: Any) -> Any:
    """The product of two numbers of two parts, in two parts."""
    product = a * b
    return product, fused(a, b, -product) + (a * b_low + a_low * b)


def term(x: Any, maximum: Any) -> Any:
    """exp(x), relative to the reference of a maximum, in two parts."""
    offset, shift = reference(maximum)
    return power(x - offset, shift)


def rebased(maximum: Any, sum: Any, residue: Any, new_maximum: Any) -> Any:
    """A sum beside one maximum, and its residue, as they stand beside a larger one."""
    offset, shift = reference(maximum)
    new_offset, new_shift = reference(new_maximum)
    factor, low = power(offset - new_offset, new_shift - shift)
    return times(sum, residue, factor * OWN.lowered, low * OWN.lowered)


def with_ties(maximum: Any, sum: Any, residue: Any, ties: Any) -> Any:
    """A sum and its residue with the terms of so many elements that are the maximum."""
    top, top_low = term(maximum, maximum)
    product, low = times(ties, OWN.zero, top, top_low)
    return plus(sum, residue, product, low)


def exponential(x: Any) -> Any:
    """exp(x) for an x of at most 0."""
    p, low = power(x, OWN.zero)
    return (p + low) * OWN.lowered


def merge(a_maximum: Any, a_sum: Any, a_residue: Any, b_maximum: Any, b_sum: Any, b_residue: Any) -> Any:
    """The state of the elements of two states."""
    maximum = larger(a_maximum, b_maximum)
    a, a_low = rebased(a_maximum, a_sum, a_residue, maximum)
    b, b_low = rebased(b_maximum, b_sum, b_residue, maximum)
    sum, residue = plus(a, a_low, b, b_low)
    other, other_low = term(min(a_maximum, b_maximum), maximum)
    sum, residue = plus(sum, residue, other, other_low)
    return maximum, sum, residue


def fold(maximum: Any, sum: Any, residue: Any, x: Any) -> Any:
    """The state with one more element."""
    return merge(maximum, sum, residue, x, OWN.zero, OWN.zero)


def inverse_total(maximum: Any, sum: Any, residue: Any) -> Any:
    """1 / (the sum of all terms) in two parts: what `scaled` takes. NaN beside an infinite maximum."""
    if abs(maximum) < OWN.infinity:
        total, low = with_ties(maximum, sum, residue, OWN.one)
        inverse = OWN.one / total
        return inverse, (fused(-total, inverse, OWN.one) - low * inverse) * inverse
    return OWN.nan, OWN.nan


def scaled(term: Any, term_low: Any, inverse: Any, inverse_low: Any) -> Any:
    """A term as a probability, rounded once: 1 if it is the only one."""
    p = fused(term, inverse, term * inverse_low + term_low * inverse)
    return scaled_small(term, term_low, inverse, inverse_low) if p < OWN.small else p


def scaled_small(term: Any, term_low: Any, inverse: Any, inverse_low: Any) -> Any:
    """A term as a probability whose lesser part is subnormal, rounded once: biased, and to a multiple if need be."""
    high, low = times(term * OWN.raised, term_low * OWN.raised, inverse, inverse_low)
    if high < OWN.rounding:
        total = high + OWN.rounding
        total += (high - (total - OWN.rounding)) + low
        high, low = total - OWN.rounding, OWN.zero
    return (high + low) * OWN.lowered


def log1p_parts(x: Any) -> Any:
    """log(1 + x) in one part and 0."""
    return log1p(x), OWN.zero


def log_total(maximum: Any, sum: Any, residue: Any) -> Any:
    """log(sum of exp(x - maximum)), in two parts, right to the last digits also where the sum is next to 1."""
    top, top_low = term(maximum, maximum)
    ratio = sum / top
    error = (fused(-ratio, top, sum) + (residue - ratio * top_low)) / top
    high, low = log1p_parts(ratio)
    return high, low + error / (OWN.one + ratio)


def log_normalizer(maximum: Any, sum: Any, residue: Any) -> Any:
    """What is subtracted from x - offset for log_softmax, in two parts; 0 beside an infinite maximum."""
    if abs(maximum) < OWN.infinity:
        offset, _ = reference(maximum)
        high, low = log_total(maximum, sum, residue)
        total, error = two_sum(maximum - offset, high)
        return total, error + low
    return OWN.zero, OWN.zero


def probability(x: Any, maximum: Any, sum: Any, residue: Any) -> Any:
    """exp(x) / (sum of the exponentials of a row)."""
    p, low = term(x, maximum)
    inverse, inverse_low = inverse_total(maximum, sum, residue)
    return scaled(p, low, inverse, inverse_low)


def logsumexp(maximum: Any, sum: Any, residue: Any) -> Any:
    """The logarithm of the sum of the exponentials of a row."""
    if abs(maximum) < OWN.infinity:
        high, low = log_total(maximum, sum, residue)
        total, error = two_sum(maximum, high)
        return total + (error + low)
    return maximum


Precision = Literal["half", "single", "double"]

_ARITHMETICS = {"half": SINGLE, "single": SINGLE, "double": DOUBLE}
_GENERIC = (
    two_sum, reference, factors, power, plus, joined, times, term, rebased, with_ties, exponential, merge, fold,
    inverse_total, scaled_small, scaled, log1p_parts, log_total, log_normalizer, probability, logsumexp,
)  # fmt: skip
_OWN_FUNCTIONS: dict[Precision, dict[str, Any]] = {
    "half": {"reference": reference_half, "factors": factors_half},
    "single": {
        "power_of_two": power_of_two_single, "polynomial": cpu.polynomial32, "log1p_parts": log1p_single,
    },
    "double": {"power_of_two": power_of_two_double, "polynomial": cpu.polynomial64},
}  # fmt: skip


def _bind(precision: Precision, decorate: Callable[[Any], Any], **instructions: Any) -> SimpleNamespace:
    """Return copies of the functions that see the constants of one precision, and each other as decorated."""
    namespace = {**vars(cpu), **globals(), **instructions, "OWN": _ARITHMETICS[precision]}
    generic = {function.__name__: function for function in _GENERIC}
    bound = {
        name: decorate(FunctionType(function.__code__, namespace, name))
        for name, function in (generic | _OWN_FUNCTIONS[precision]).items()
    }
    namespace |= bound
    return SimpleNamespace(**bound, larger=namespace["larger"], fused=namespace["fused"])


@cache
def plain(precision: Precision) -> SimpleNamespace:
    """Return the functions of one precision, to be called from Python."""
    return _bind(precision, lambda function: function)


@cache
def on_device(precision: Precision) -> SimpleNamespace:
    """Return the functions of one precision, to be called from kernels."""
    larger = _instructions.larger64 if precision == "double" else _instructions.larger32
    return _bind(
        precision,
        _instructions.device,
        ex2=_instructions.ex2,
        larger=larger,
        fused=_instructions.fused,
        log1p=_instructions.log1p,
    )
