"""Exponentials in registers, relative to a power of two, and what makes results of their sums.

As `fastsoftmax._state` has it, a term is exp(x - offset) / 2**exponent, with an offset that is 0 while the maximum is
moderate. Here the exponent is so far below that of the maximum that the maximum's own term is about ``2**top``: even
what becomes a subnormal result has all its digits, and the sum is still in range.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastsoftmax import _state
from fastsoftmax._state import FLOAT32_WIDE, FLOAT64, Precision

from .jit import by_dtype, inline
from .registers import HAS_FMA, REGISTER_BYTES, any_of, call, filled, floor, fma, in_parts, joined, lanes_of, where


class Constants(NamedTuple):
    """Constants of the arithmetic on registers of one dtype, and the precision of the states, which are in float64."""

    state: Precision
    powers: int  # there is a table of 2**(j / powers)
    rounder: float  # rounds what is added to it to an integer, and has that in its lowest bits
    ln2_high: float
    ln2_low: float
    largest: float  # finite number
    reach: float  # terms have all their digits down to 2**-reach
    top: float
    enough: float  # a sum without the maximum's term has digits enough for log1p, if it is this share of the term
    half_ulp: float  # a little less than half of an ULP of the numbers below 1
    chance: float  # a sum is so near that of equal terms by no chance
    splitter: float  # cuts a number in halves (Veltkamp)
    tiniest: float  # factors keep their digits down to here
    near: float  # less than this below the maximum no probability is to be mended, with fewer than 10**11 elements
    mended: float  # so far below the maximum one may be that is not divided by anything
    vanishing: float  # and from here on they are 0
    edge: float  # twice the smallest normal number, lest a subnormal probability be rounded to a normal one
    spacing: float  # of numbers, at least, relative to their size


SHORT = 64  # elements of a short row: see `sum_base`

_LN2, _LOG2_E = math.log(2.0), 1.0 / math.log(2.0)

_F32_POWERS = {64: 16, 32: 8}.get(REGISTER_BYTES, 1)
_F64_POWERS = 8 if REGISTER_BYTES == 64 else 1

_FLOAT32 = Constants(
    state=FLOAT32_WIDE,
    powers=_F32_POWERS,
    rounder=1.5 * 2.0**23,
    ln2_high=0.693359375,
    ln2_low=-2.12194440e-4,
    largest=float(np.finfo(np.float32).max),
    reach=125.0,
    top=64.0,
    enough=2.0**-3,
    half_ulp=0.9 * 2.0**-25,
    chance=2.0**-32,
    splitter=2.0**12 + 1.0,
    tiniest=2.0**-120,
    near=60.0,
    mended=86.63,
    vanishing=104.0,
    edge=2.0**-125,
    spacing=2.0**-23,
)
_FLOAT64 = Constants(
    state=FLOAT64,
    powers=_F64_POWERS,
    rounder=1.5 * 2.0**52,
    ln2_high=float.fromhex("0x1.62e42feep-1"),
    ln2_low=float.fromhex("0x1.a39ef35793c76p-33"),
    largest=float(np.finfo(np.float64).max),
    reach=1021.0,
    top=100.0,
    enough=2.0**-25,
    half_ulp=0.9 * 2.0**-54,
    chance=2.0**-88,
    splitter=2.0**27 + 1.0,
    tiniest=2.0**-1000,
    near=660.0,
    mended=707.69,
    vanishing=745.2,
    edge=2.0**-1021,
    spacing=2.0**-52,
)

# (exp(r) - 1 - r) / r**2 for |r| <= ln(2) / (2 * powers), minimax (Remez), by bits of the dtype and powers.
_TAILS = {
    (32, 16): (0.166667178273201, 0.5000161528587341),
    (32, 8): (0.041660431772470474, 0.1666802614927292, 0.5),
    (32, 1): _state.POLYNOMIAL32,
    (64, 8): (
        0.00019840568660682776,
        0.0013889780684357437,
        0.008333333371042426,
        0.041666666570070315,
        0.1666666666666373,
        0.5000000000000296,
    ),
    (64, 1): _state.POLYNOMIAL64,
}


def constants(v):
    """The constants for a register or an array."""


@by_dtype(constants)
def _select_constants(v):
    def constants32(v):
        return _FLOAT32

    def constants64(v):
        return _FLOAT64

    return constants64 if v.dtype == types.float64 else constants32


def _powers(dtype):
    return _F32_POWERS if dtype == types.float32 else _F64_POWERS


def _roots_of_two(dtype):
    """2**(j / powers), rounded, and their relative errors.

    Adding k, shifted to the exponent of an element, adds j / powers to its significand along with it. The elements are
    less by that, which below 1 counts half.
    """
    with localcontext() as context:
        context.prec = 40
        exact = [Decimal(2) ** (Decimal(j) / _powers(dtype)) for j in range(_powers(dtype))]
        rounded = [float(np.dtype(str(dtype)).type(root)) for root in exact]
        lowered = [1.0 - (j / _powers(dtype) - (root - 1.0)) / 2.0 for j, root in enumerate(rounded)]
        return lowered, [float(root / Decimal(near) - 1) for root, near in zip(exact, rounded, strict=True)]


@intrinsic
def exp_tail(typing_context, r):
    """(exp(r) - 1 - r) / r**2."""
    first, *others = _TAILS[r.dtype.bitwidth, _powers(r.dtype)]

    def generate(context, builder, signature, operands):
        vector = operands[0].type
        q = ir.Constant(vector, [first] * r.lanes)
        for coefficient in others:
            q = multiply_add(builder, q, operands[0], ir.Constant(vector, [coefficient] * r.lanes))
        return q

    return r(r), generate


def multiply_add(builder, a, b, c):
    return call(builder, "llvm.fma", a.type, a, b, c) if HAS_FMA else builder.fadd(builder.fmul(a, b), c)


@intrinsic
def times_power(typing_context, v, magic):
    """v * 2**k, where the lowest bits of `magic` hold powers * k + j, and v is element j of the table."""
    bits, significand = (32, 23) if v.dtype == types.float32 else (64, 52)
    below = _powers(v.dtype).bit_length() - 1

    def generate(context, builder, signature, operands):
        integers = ir.VectorType(ir.IntType(bits), v.lanes)
        image, shifted = (builder.bitcast(operand, integers) for operand in operands)
        power = builder.shl(shifted, ir.Constant(integers, [significand - below] * v.lanes))
        return builder.bitcast(builder.add(image, power), operands[0].type)

    return v(v, magic), generate


@intrinsic
def root_of_two(typing_context, magic):
    """Element j of the table, and its relative error, where the lowest bits of `magic` hold j."""
    dtype, lanes = magic.dtype, lanes_of(magic.dtype)
    permute = {
        (32, 64): "llvm.x86.avx512.permvar.sf.512",
        (64, 64): "llvm.x86.avx512.permvar.df.512",
        (32, 32): "llvm.x86.avx2.permps",
    }[dtype.bitwidth, REGISTER_BYTES]

    def generate(context, builder, signature, operands):
        picked = []
        for table in _roots_of_two(dtype):
            register = ir.VectorType(context.get_data_type(dtype), lanes)
            numbers = ir.VectorType(ir.IntType(dtype.bitwidth), lanes)
            vector = ir.Constant(register, table)
            picked.append(
                joined(
                    builder,
                    [
                        call(builder, permute, register, vector, builder.bitcast(part, numbers))
                        for part in in_parts(builder, operands[0], lanes)
                    ],
                )
            )
        return context.make_tuple(builder, types.UniTuple(magic, 2), picked)

    return types.UniTuple(magic, 2)(magic), generate


@inline
def maximum(a, b):
    """The larger of each lane; `b` where either is NaN."""
    return where(a > b, a, b)


@inline
def size_of(v):
    return maximum(v, 0.0 - v)


@inline
def minimum(a, b):
    """The smaller of each lane; `b` where either is NaN."""
    return where(a < b, a, b)


class Reference(NamedTuple):
    """What terms are relative to, a value in each lane.

    Without an offset and a floor, for elements whose offset is 0 and which are above the floor.
    """

    offset: Any
    floor: Any  # what lies further below the offset is raised to here: it contributes less than any result can show
    magic: Any  # added to (x - offset) * log2(e) * powers, it rounds that and leaves it in its lowest bits


@inline
def make_reference(offset, exponent):
    c = constants(offset)
    return Reference(offset, (exponent - c.reach) * _LN2, c.rounder - exponent * float(c.powers))


@inline
def exponent_of(reference):
    c = constants(reference.magic)
    return (c.rounder - reference.magic) * (1.0 / c.powers)


@inline
def reference_at(largest):
    """The reference for this maximum, with the offset that `_state.reference` has.

    Exponents are even: (x - offset) * log2(e) may lie between two integers, and to which it is rounded must not depend
    on the reference.
    """
    c = constants(largest)
    size = size_of(largest)
    finite = where(size <= c.largest, largest, 0.0)
    offset = where(size <= c.state.limit, 0.0, floor(finite * (1.0 / c.state.quantum)) * c.state.quantum)
    exponent = fma(finite - offset, _LOG2_E, 2.0 * c.rounder) - 2.0 * c.rounder
    return make_reference(offset, exponent - c.top)


def difference(x, reference):
    """x - offset, raised to the floor."""


@by_dtype(difference)
def _select_difference(x, reference):
    def any_difference(x, reference):
        return maximum(reference.floor, x - reference.offset)

    def moderate_difference(x, reference):
        return x

    return moderate_difference if reference.types[0] is types.none else any_difference


def exp_parts(x, reference):
    """Terms as head + factor * rest, where the product is below a tenth of the head.

    x - offset = k * ln(2) / powers + r. With a table, the head is an element of it times a power of two, and r so small
    that its own rounding and that of the rest do not matter. Without, the head is 1 + r, and they are kept.
    """


def _exp_parts_by_table(x, reference):
    c = constants(x)
    z = difference(x, reference)
    magic = fma(z, c.powers * _LOG2_E, reference.magic)
    k = magic - reference.magic
    r = fma(k, -c.ln2_low / c.powers, fma(k, -c.ln2_high / c.powers, z))
    root, error = root_of_two(magic)
    head = times_power(root, magic)
    return head, head, fma(r * r, exp_tail(r), r + error)


def _exp_parts_by_polynomial(x, reference):
    c = constants(x)
    z = difference(x, reference)
    magic = fma(z, _LOG2_E, reference.magic)
    k = magic - reference.magic
    high = fma(k, -c.ln2_high, z)
    r = fma(k, -c.ln2_low, high)
    r_low = fma(k, -c.ln2_low, high - r)
    head = r + 1.0
    factor = times_power(0.0 * r + 1.0, magic)
    return head * factor, factor, fma(r * r, exp_tail(r), (r - (head - 1.0)) + r_low)


@by_dtype(exp_parts)
def _select_exp_parts(x, reference):
    return _exp_parts_by_table if _powers(x.dtype) > 1 else _exp_parts_by_polynomial


@inline
def term_at(x, reference):
    """A term, and what rounding took from it.

    Without that, the rounding error of a row's largest term would be that of its sum, and so of every probability.
    """
    head, factor, rest = exp_parts(x, reference)
    term = fma(factor, rest, head)
    return term, fma(factor, rest, head - term)


@inline
def two_sum(a, b):
    """a + b, and its rounding error (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


@inline
def sum_base(v, n):
    """A power of two above every term of a segment of n whose reference is that of the maximum.

    If there are at most SHORT, it is above their sum as well: then high parts are multiples of one power of two, and
    add up exactly in any order.
    """
    power = 2
    if n <= SHORT:
        power = 1
        while power < n:
            power *= 2
    return 2.0 * 2.0 ** constants(v).top * power


@inline
def product_error(a, b, product):
    """a * b - product, exactly (Dekker), where `product` is the rounded one."""
    splitter = constants(a).splitter
    a_high = a * splitter - (a * splitter - a)
    b_high = b * splitter - (b * splitter - b)
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@inline
def minus_product(c, a, b):
    """c - a * b, rounded once; where the product is near c, exactly."""
    if HAS_FMA:
        return fma(0.0 - a, b, c)
    product = a * b
    return (c - product) - product_error(a, b, product)


class Ending(NamedTuple):
    """What makes the result of an element, a value in each lane."""

    reference: Reference  # of its term
    factor: Any  # 1 / sum = factor + factor_low; for log-probabilities, the maximum and the logarithm of the sum
    factor_low: Any
    limit: Any  # probabilities from here on are `share`
    share: Any


@inline
def normalize(largest, high, low, reference):
    """What makes probabilities of terms whose sum is high + low; NaN where that is not positive and finite.

    Terms are rounded and their sum is not, so their quotient may be a neighbour of 1 / m in a row of m equal elements
    and others too small to matter. A row is such a one if its sum is that of m unrounded terms to far more digits than
    chance would have it. An element that is alone (m = 1) needs less: that the others are below a quarter of an ULP
    together.
    """
    c = constants(high)
    high = where(high <= c.largest, where(high <= 0.0, math.nan, high), math.nan)
    total = high + low
    rest = (high - total) + low
    factor = 1.0 / total
    factor_low = factor * (minus_product(0.0 * total + 1.0, factor, total) - factor * rest)
    top, top_low = term_at(largest, reference)
    ratio = high / top
    m = (ratio + c.rounder) - c.rounder
    limit, share = filled(high, math.inf), filled(high, 0.0)
    if any_of(size_of(ratio - m) <= ratio * 2.0**-12):  # few rows come into question, and two divisions are dear
        others = (high - top) + (low - top_low)
        distance = size_of(minus_product(high, m, top) + minus_product(low, m, top_low))
        m = where(others <= top * c.half_ulp, 1.0, where(distance <= high * c.chance, m, math.inf))
        # Beyond 4096 the digits of the sum no longer rule out chance.
        limit, share = where(m <= 4096.0, 0.75 / m, math.inf), 1.0 / m
    return Ending(reference, factor, factor_low, limit, share)


@inline
def rest_over_top(largest, high, low, reference):
    """The sum of all but the maximum over the maximum's term, in two parts."""
    top, top_low = term_at(largest, reference)
    ratio = high / top
    return ratio, (minus_product(high, ratio, top) + (low - ratio * top_low)) / top


# What is done to an element on its way to the output.


@inline
def scale_untied(term, end):
    """A term to a probability, rounded once, where no `limit` is finite."""
    if HAS_FMA:
        return fma(term, end.factor, term * end.factor_low)
    return raised_product(term, end.factor * 2.0**64, term * (end.factor_low * 2.0**64))


@inline
def scale(term, end):
    """A term to a probability, rounded once."""
    v = scale_untied(term, end)
    return where(end.limit <= v, end.share, v)


@inline
def raised_product(term, raised, low):
    """(term * raised + low) / 2**64: the detour keeps parts from underflowing where the result is very small."""
    if HAS_FMA:
        return fma(term, raised, low) * 2.0**-64
    product = term * raised
    return (product + (product_error(term, raised, product) + low)) * 2.0**-64


@inline
def exp_and_scale(logit, end):
    """A logit to a probability, by way of its term."""
    head, factor, rest = exp_parts(logit, end.reference)
    return scale(fma(factor, rest, head), end)


@inline
def exp_and_mend(logit, end):
    """The same, where some probabilities are so small that what is rounded on the way would be seen."""
    edge = constants(logit).edge
    head, factor, rest = exp_parts(logit, end.reference)
    term = fma(factor, rest, head)
    v, raised = scale(term, end), end.factor * 2.0**64
    low = fma(term, end.factor_low * 2.0**64, fma(factor, rest, head - term) * raised)
    mended = raised_product(term, raised, low)
    return where((v > 0.0) & (v < edge), where(mended < edge, mended, edge), v)


@inline
def is_below_mended(smallest, largest, n):
    """Whether rows of n with these maxima may have probabilities that are to be mended, if these are the smallest
    logits."""
    c = constants(largest)
    if not any_of(smallest < largest - c.near):  # most rows need no logarithm
        return False
    # No sum is more than n + 1 times the largest term, of rows with a zero beside them.
    return any_of(smallest < largest + (math.log(n + 1.0) - c.mended) + size_of(largest) * c.spacing)


@inline
def vanishing_below(largest):
    """Logits below have probabilities of 0; the lowest number where all are -inf."""
    c = constants(largest)
    return maximum((largest - c.vanishing) - size_of(largest) * c.spacing, -c.largest)


@inline
def subtract(logit, end):
    """A logit to a log-probability."""
    return (logit - end.factor) - end.factor_low
