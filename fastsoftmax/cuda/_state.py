"""The state of a row on the GPU, in the arithmetic that a GPU is fast in.

It is the state of `fastsoftmax._state`: the largest element seen, and the sum of the exponentials of all the others,
relative to a reference that is a function of the maximum alone::

    sum = 2**BIAS * (sum of exp(x - offset) * 2**-shift),       offset, shift = reference(maximum)

There is no residue: lanes add few terms each and their sums meet in a tree. The exponential is the hardware's ``ex2``,
whose error is 2 ULP at most over the whole range. What the functions around it do is to hand it an argument that is
right to the last bit: ``x * log2(e)`` rounded as a whole would be off by 2**-18 at -80, which is 40 ULP in float32.

- **half** serves float16 and bfloat16, whose results have 11 digits or fewer: ``ex2(t * log2(e))`` as it stands.
- **single** splits ``t = k * ln(2) + r`` (Cody and Waite) and hands over r alone; 2**k is put together from its bits.
- **double** has no instruction and takes the polynomial of `fastsoftmax._state`.

Terms are biased by 2**BIAS so that a subnormal result is rounded once, when the bias goes. An element too small to
matter, -inf included, is raised to where its term is 2**(1 - 2 * BIAS) or so of the maximum's and vanishes in any sum.

NaN and infinities need no care inside loops: `larger` hands a NaN on to the maximum, and `inverse_total` and
`log_total` look at it, whatever the terms beside it were. ``(-inf, 0)`` is the state of no element.

These are plain functions on NumPy scalars, and `plain` binds those of one precision. `on_device` compiles the same for
the GPU, with instructions of its own in place of `ex2`, `larger` and `log1p`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, Literal

import numpy as np

from fastsoftmax import _state as cpu
from fastsoftmax.cuda import _instructions

_F32 = np.float32
LOG2E = cpu.FLOAT32.log2e
LN2, LN2_64 = _F32(math.log(2.0)), np.float64(math.log(2.0))
LN2_HIGH = cpu.FLOAT32.ln2_high
LN2_LOW = cpu.FLOAT32.ln2_low
ROUNDER = cpu.FLOAT32.rounder

# Beyond it the offset is the maximum itself: an x that matters beside it has at least half its size, so that x - offset
# is exact (Sterbenz). Below it the offset is 0, and nothing is subtracted.
LIMIT32, LIMIT64 = _F32(512.0), 8192.0
ZERO32 = _F32(0.0)

# Terms are at least 2**(LOWEST + BIAS), normal numbers; the bias makes room for all of them in a sum of 2**62.
BIAS32, BIAS64 = _F32(64.0), 512.0
UNBIAS32, UNBIAS64 = _F32(2.0**-64), 2.0**-512
LOWEST32, LOWEST64 = _F32(-189.0), -1533.0
FLOOR_HALF = LOWEST32 * LN2
EXPONENT_BIAS32, EXPONENT_BIAS64 = _F32(127.0), 1023.0


def ex2(x: Any) -> Any:
    """2**x in float32."""
    return np.exp2(x)


def larger(a: Any, b: Any) -> Any:
    """The larger of two numbers; NaN if either is."""
    return np.maximum(a, b)


def log1p(x: Any) -> Any:
    """log(1 + x)."""
    return np.log1p(x)


def reference_half(maximum: Any) -> Any:
    """Offset and shift of the sums beside a maximum."""
    return maximum, ZERO32


def power_half(t: Any, shift: Any) -> Any:
    """exp(t) * 2**(BIAS - shift) for a t of at most 0."""
    return ex2(max(FLOOR_HALF, t) * LOG2E + (BIAS32 - shift))


def reference_single(maximum: Any) -> Any:
    """Offset and shift of the sums beside a maximum."""
    if abs(maximum) <= LIMIT32:
        return ZERO32, (maximum * LOG2E + ROUNDER) - ROUNDER
    return maximum, ZERO32


def power_single(t: Any, shift: Any) -> Any:
    """exp(t) * 2**(BIAS - shift), where that is at most about 2**BIAS."""
    t = max((LOWEST32 + shift) * LN2, t)
    shifted_k = t * LOG2E + ROUNDER
    k = shifted_k - ROUNDER
    r = (t - k * LN2_HIGH) - k * LN2_LOW
    exponent = shifted_k + ((BIAS32 + EXPONENT_BIAS32) - shift)
    return ex2(r * LOG2E) * np.int32(exponent.view(np.int32) << np.int32(23)).view(np.float32)


def reference_double(maximum: Any) -> Any:
    """Offset and shift of the sums beside a maximum."""
    if abs(maximum) <= LIMIT64:
        return 0.0, (maximum * cpu.FLOAT64.log2e + cpu.FLOAT64.rounder) - cpu.FLOAT64.rounder
    return maximum, 0.0


def power_double(t: Any, shift: Any) -> Any:
    """exp(t) * 2**(BIAS - shift), where that is at most about 2**BIAS."""
    p, _, shifted_k = split(max((LOWEST64 + shift) * LN2_64, t), FLOAT64)
    exponent = shifted_k + ((BIAS64 + EXPONENT_BIAS64) - shift)
    return p * np.int64(exponent.view(np.int64) << np.int64(52)).view(np.float64)


# What the functions below see as theirs: here single precision's, in `_bind` each one's own.
reference, power, split, polynomial, FLOAT64 = reference_single, power_single, cpu.split, cpu.polynomial64, cpu.FLOAT64
ZERO, ONE, UNBIAS, NAN, INFINITY = ZERO32, _F32(1.0), UNBIAS32, _F32(math.nan), _F32(math.inf)


def term(x: Any, maximum: Any) -> Any:
    """exp(x), relative to the reference of a maximum."""
    offset, shift = reference(maximum)
    return power(x - offset, shift)


def rebase(maximum: Any, new_maximum: Any) -> Any:
    """What a sum beside one maximum is multiplied by to stand beside a larger one."""
    offset, shift = reference(maximum)
    new_offset, new_shift = reference(new_maximum)
    return power(offset - new_offset, new_shift - shift) * UNBIAS


def exponential(x: Any) -> Any:
    """exp(x) for an x of at most 0."""
    return power(x, ZERO) * UNBIAS


def merge(a_maximum: Any, a_sum: Any, b_maximum: Any, b_sum: Any) -> Any:
    """The state of the elements of two states."""
    maximum = larger(a_maximum, b_maximum)
    total = a_sum * rebase(a_maximum, maximum) + b_sum * rebase(b_maximum, maximum)
    return maximum, total + term(min(a_maximum, b_maximum), maximum)


def fold(maximum: Any, sum: Any, x: Any) -> Any:
    """The state with one more element."""
    return merge(maximum, sum, x, ZERO)


def inverse_total(maximum: Any, sum: Any) -> Any:
    """1 / (the sum of all terms) in two parts: what `scaled` takes. NaN beside an infinite maximum."""
    if abs(maximum) < INFINITY:
        total = sum + term(maximum, maximum)
        inverse = ONE / total
        return inverse, (ONE - total * inverse) * inverse  # one fused operation: the rounding error of the division
    return NAN, NAN


def scaled(term: Any, inverse: Any, inverse_low: Any) -> Any:
    """A term as a probability, rounded once."""
    return term * inverse + term * inverse_low


def log_total(maximum: Any, sum: Any) -> Any:
    """log(sum of exp(x - maximum)), right to the last digits also where the sum is next to 1."""
    return log1p(sum / term(maximum, maximum))


def probability(x: Any, maximum: Any, sum: Any) -> Any:
    """exp(x) / (sum of the exponentials of a row)."""
    inverse, inverse_low = inverse_total(maximum, sum)
    return scaled(term(x, maximum), inverse, inverse_low)


def logsumexp(maximum: Any, sum: Any) -> Any:
    """The logarithm of the sum of the exponentials of a row."""
    return maximum + log_total(maximum, sum)


Precision = Literal["half", "single", "double"]

_REFERENCES = {"half": reference_half, "single": reference_single, "double": reference_double}
_POWERS = {"half": power_half, "single": power_single, "double": power_double}
_GENERIC = (term, rebase, exponential, merge, fold, inverse_total, scaled, log_total, probability, logsumexp)


def _bind(precision: Precision, decorate: Callable[[Any], Any], **instructions: Any) -> SimpleNamespace:
    """Return copies of the functions that see the constants of one precision, and each other as decorated."""
    real = np.float64 if precision == "double" else np.float32
    namespace = dict(globals()) | instructions
    namespace |= {"ZERO": real(0), "ONE": real(1), "NAN": real(math.nan), "INFINITY": real(math.inf)}
    namespace |= {"UNBIAS": UNBIAS64 if precision == "double" else UNBIAS32}
    own = {"reference": _REFERENCES[precision], "power": _POWERS[precision]}
    if precision == "double":
        namespace["POLYNOMIAL64"] = cpu.POLYNOMIAL64
        own = {"polynomial": cpu.polynomial64, "split": cpu.split} | own
    bound = {
        name: decorate(FunctionType(function.__code__, namespace, name))
        for name, function in (own | {function.__name__: function for function in _GENERIC}).items()
    }
    namespace |= bound
    return SimpleNamespace(**bound, larger=namespace["larger"])


@cache
def plain(precision: Precision) -> SimpleNamespace:
    """Return the functions of one precision, to be called from Python."""
    return _bind(precision, lambda function: function)


@cache
def on_device(precision: Precision) -> SimpleNamespace:
    """Return the functions of one precision, to be called from kernels."""
    larger = _instructions.larger64 if precision == "double" else _instructions.larger32
    return _bind(precision, _instructions.device, ex2=_instructions.ex2, larger=larger, log1p=_instructions.log1p)
