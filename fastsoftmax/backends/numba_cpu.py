"""The Numba backend on the CPU: for machines where the compiled extension cannot be built.

The arithmetic is that of `fastsoftmax._state`, whose functions are compiled here; this module only adds the traversal.

The unit of work is a *chunk*: at most `CHUNK` elements of one row (or of each of a strip of adjacent rows). Its
maximum is found first and fixes the reference, so that the loop over exponentials has neither branches nor rescaling
in it. The chunk is then in the nearest cache, and finding the maximum takes a sixth of the time of the exponentials.
Chunks end at fixed places and merge in order: threads only ever divide whole rows among them, and results do not
depend on their number.

Exponentials are biased by ``2**bias`` until they are divided by their sum, which rounds subnormal results only once.
The sum of a chunk is that of the terms' leading bits and that of the rest, apart. With the leading bits on a grid on
which no sum of a chunk needs rounding, their additions are exact in any order. A strip has a sum for each row and no
freedom in the order, and keeps the error of each addition instead.

LLVM vectorises these loops given three things. Indices are unsigned, or Numba's wrapping of negative ones would be in
the way. Maxima of a row are taken over the integer images of floats, as LLVM does not reorder a float maximum. And only
the additions of a sum may be reordered (``reassoc``): it would simplify the rounding steps away.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

try:
    from numba import njit, types
    from numba.extending import overload, register_jitable
except ImportError as error:
    raise ImportError(f"the numba backend needs the numba package: {error}") from error

from fastsoftmax import _state
from fastsoftmax._dispatch import CROSS_ENTROPIES, VJPS, CrossEntropy, Factors, Function, Plan
from fastsoftmax._executor import run_blocks
from fastsoftmax._layout import Array, Dimension, Layout
from fastsoftmax._schedule import (
    BLOCKS_PER_THREAD,
    Exponentials,
    Schedule,
    Traversal,
    cache_sizes,
    max_threads,
)
from fastsoftmax._state import FLOAT32, FLOAT32_WIDE, FLOAT64, Precision

# Each thread gets at least this many elements: handing a block to a thread of Python's pool costs 20-50 us, in which
# one core finishes about 200,000 float32 elements.
MIN_ELEMENTS_PER_THREAD = 131_072

# Elements of a row to a chunk, 16 or 32 KiB: the second reading is from the level-1 cache.
CHUNK = 4096

# The widest strip, in bytes of each row of the array. Of 256, 512 and 1024, over (4096, 2048) on axis 0, 512 was
# fastest: 3.0 ns an element in float32 against 3.8 and 3.3, 4.5 in float64 against 6.7 and 6.7.
STRIP_BYTES = 512
MAX_STRIP = STRIP_BYTES // 4

# Terms wait in a scratch of up to this share of the last cache level. Computing them again takes 0.34 ns an element
# more in float32 and 0.9 more in float64, for rows of 0.4 MiB to 8 MiB alike where that level has 32; it is shared by
# threads.
STORED_SHARE = 8

# Elements of each row of a strip to a chunk: 256 KiB, for the level-2 cache; shorter ones would mean more merges.
STRIP_CHUNK = 512

# The second pass of a strip goes in pieces that stay in the level-1 cache between terms and scaling.
STRIP_PIECE = 16

# Narrower strips leave most of a vector empty, and gathering their rows one by one is faster: at a width of 8 it takes
# 1.1 ns an element against 2.3, at 16 1.6 against 0.9.
MIN_STRIP = 16


class _Arithmetic(NamedTuple):
    """How a dtype is computed in: scalars of that dtype, except for the precision of the states and the bias."""

    precision: Precision
    state: Precision  # of the states, which are kept in float64
    bias: int  # terms are multiplied by 2**bias
    unbias: Any  # 2**-bias
    power_bias: Any  # bias + exponent bias of the dtype
    half_ulp: float  # of the numbers below 1
    span: Any  # a term further below the maximum is 0 beside it, also in subnormal results
    grid: Any  # adding and subtracting it leaves of a term what sums over a chunk without rounding,
    fine_grid: Any  # and this one, of the rest


_FLOAT32 = _Arithmetic(
    precision=FLOAT32,
    state=FLOAT32_WIDE,
    bias=64,
    unbias=np.float32(2.0**-64),
    power_bias=np.float32(64 + 127),
    half_ulp=2.0**-25,
    span=np.float32(130),
    grid=np.float32(1.5 * 2.0**76),
    fine_grid=np.float32(1.5 * 2.0**64),
)
_FLOAT64 = _Arithmetic(
    precision=FLOAT64,
    state=FLOAT64,
    bias=512,
    unbias=2.0**-512,
    power_bias=512.0 + 1023.0,
    half_ulp=2.0**-54,
    span=1000.0,
    grid=1.5 * 2.0**524,
    fine_grid=1.5 * 2.0**484,
)

READS: frozenset[str] = frozenset()

_FUNCTIONS = {"softmax": 0, "log_softmax": 1, "logsumexp": 2}
_SOFTMAX, _LOG_SOFTMAX, _LOGSUMEXP = _FUNCTIONS.values()

# Running sums of a weighted row.
_LANES = 16

# Columns of the tables of dimensions.
_SIZE, _X, _Y = range(3)

# Where a strip keeps what it knows of each of its rows. One array, as LLVM gives up on telling many apart.
_N_FIELDS = 10
_FIELDS = range(0, _N_FIELDS * MAX_STRIP, MAX_STRIP)
_MAXIMUM, _OFFSET, _FLOOR, _SHIFT, _LEADING, _TRAILING, _TIES, _HIGH, _LOW, _LIMIT = _FIELDS
_LOG_TOTAL = _HIGH

_U = np.uintp
_Decorator = Callable[[Callable[..., Any]], Any]
_CONTRACT: Any = {"contract"}
_jit: _Decorator = njit(nogil=True, fastmath=_CONTRACT)
_jit_sum: _Decorator = njit(nogil=True, fastmath={"contract", "reassoc", "nsz"})
_jit_exact: _Decorator = njit(nogil=True, fastmath=False)  # for rounding errors, which contraction would falsify
_inline: _Decorator = register_jitable(fastmath=_CONTRACT)


def _jit_entry(function: Callable[..., Any]) -> Any:
    """Compile a kernel that is called from Python, once for all processes where Numba finds a place to keep it."""
    try:
        return njit(nogil=True, fastmath=_CONTRACT, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written to
        return _jit(function)


def _by_dtype(function: Callable[..., Any]) -> _Decorator:
    """Register a function of Numba types that returns what `function` is for them."""
    decorator: _Decorator = overload(function, jit_options={"fastmath": _CONTRACT})
    return decorator


_polynomial32 = _inline(_state.polynomial32)
_polynomial64 = _inline(_state.polynomial64)
_inline(_state.split)
for _function in (
    _state.reference,
    _state.term,
    _state.identity,
    _state.single,
    _state.fold,
    _state.merge,
    _state._rebase,
    _state.two_sum,
    _state.product_error,
    _state.total,
    _state.normalize,
    _state.log_total,
    _state.logsumexp,
    _state.weighted_identity,
    _state.exp_difference,
    _state.kept_term,
    _state.merge_weighted,
    _state.weighted_logsumexp,
):
    # Contraction would falsify rounding errors, and what is not said is inherited from the caller.
    register_jitable(fastmath=False)(_function)


@_by_dtype(_state.polynomial)
def _select_polynomial(r: Any) -> Any:
    return _polynomial32 if r == types.float32 else _polynomial64


def _arithmetic(x: Any) -> Any:
    """The arithmetic of the dtype of array x."""


@_by_dtype(_arithmetic)
def _select_arithmetic(x: Any) -> Any:
    def arithmetic32(x: Any) -> Any:
        return _FLOAT32

    def arithmetic64(x: Any) -> Any:
        return _FLOAT64

    return arithmetic32 if x.dtype == types.float32 else arithmetic64


def _power_of_two(shifted: Any) -> Any:
    """2**n, where the lowest bits of ``shifted`` are n plus the exponent bias."""


@_by_dtype(_power_of_two)
def _select_power_of_two(shifted: Any) -> Any:
    def power32(shifted: Any) -> Any:
        return np.int32(np.float32(shifted).view(np.int32) << np.int32(23)).view(np.float32)

    def power64(shifted: Any) -> Any:
        return np.int64(np.float64(shifted).view(np.int64) << np.int64(52)).view(np.float64)

    return power32 if shifted == types.float32 else power64


def _image(value: Any) -> Any:
    """An integer for a float, in the order of floats: its bits, all but the sign flipped if it is negative."""


@_by_dtype(_image)
def _select_image(value: Any) -> Any:
    def image32(value: Any) -> Any:
        return _flip32(np.float32(value).view(np.int32))

    def image64(value: Any) -> Any:
        return _flip64(np.float64(value).view(np.int64))

    return image32 if value == types.float32 else image64


def _from_image(image: Any) -> Any:
    """The inverse of `_image`."""


@_by_dtype(_from_image)
def _select_from_image(image: Any) -> Any:
    def float32(image: Any) -> Any:
        return np.int32(_flip32(image)).view(np.float32)

    def float64(image: Any) -> Any:
        return np.int64(_flip64(image)).view(np.float64)

    return float32 if image == types.int32 else float64


@_inline
def _flip32(bits: Any) -> Any:
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_inline
def _flip64(bits: Any) -> Any:
    return bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))


@_inline
def _biased_term(x: Any, offset: Any, floor: Any, shift: Any, arithmetic: Any) -> Any:
    t = max(x - offset, floor)  # in this order a NaN stays
    p, low, shifted_k = _state.split(t, arithmetic.precision)
    power = _power_of_two(shifted_k + shift)
    return p * power, low * power


def _three_parts(term: Any, grid: Any, fine_grid: Any) -> Any:
    """A term as three addends: the first two sum up without rounding, the third is small."""


@_by_dtype(_three_parts)
def _select_three_parts(term: Any, grid: Any, fine_grid: Any) -> Any:
    def parts32(term: Any, grid: Any, fine_grid: Any) -> Any:
        leading = (term + grid) - grid
        rest = term - leading
        middle = (rest + fine_grid) - fine_grid
        return leading, middle, rest - middle

    def parts64(term: Any, grid: Any, fine_grid: Any) -> Any:
        leading = (term + grid) - grid
        return leading, 0.0, term - leading  # the last sums to 2**-90 of the maximum's term as it is

    return parts32 if term == types.float32 else parts64


@_jit_exact
def _combined(leading_sum: Any, middle_sum: Any, trailing_sum: Any) -> Any:
    """The sum of the sums of the three parts, in two."""
    return _state.two_sum(np.float64(leading_sum), np.float64(middle_sum) + np.float64(trailing_sum))


@_jit
def _maximum(x: Any, at: Any, n: Any) -> Any:
    """The maximum of n elements; NaN if one is a positive NaN (a negative one turns up in the sum)."""
    largest = _image(x[_U(at)])
    for j in range(n):
        largest = max(largest, _image(x[_U(at + j)]))
    return _from_image(largest)


@_jit
def _has_nan(x: Any, at: Any, step: Any, n: Any) -> Any:
    for j in range(n):
        if math.isnan(x[_U(at + j * step)]):
            return True
    return False


@_jit
def _against(x: Any, maximum: Any) -> Any:
    """The offset, floor and shift that `_biased_term` needs for a finite maximum, in the dtype of x."""
    arithmetic = _arithmetic(x)
    offset, exponent = _state.reference(np.float64(maximum), arithmetic.state)
    floor = (np.float64(maximum) - offset) - np.float64(arithmetic.span)
    shift = np.float64(arithmetic.power_bias) - exponent
    return x.dtype.type(offset), x.dtype.type(floor), x.dtype.type(shift)


@_jit_sum
def _store_terms(x: Any, x_at: Any, y: Any, y_at: Any, n: Any, maximum: Any) -> Any:
    """Write the biased terms of a chunk; return their sum in two parts."""
    arithmetic = _arithmetic(x)
    offset, floor, shift = _against(x, maximum)
    leading_sum = middle_sum = trailing_sum = x.dtype.type(0)
    for j in range(n):
        term, low = _biased_term(x[_U(x_at + j)], offset, floor, shift, arithmetic)
        leading, middle, trailing = _three_parts(term, arithmetic.grid, arithmetic.fine_grid)
        leading_sum += leading
        middle_sum += middle
        trailing_sum += trailing + low
        y[_U(y_at + j)] = term
    return _combined(leading_sum, middle_sum, trailing_sum)


@_jit_sum
def _sum_others(x: Any, at: Any, n: Any, maximum: Any, scale: Any) -> Any:
    """Return the sum, biased and in two parts, of the terms below the maximum, and how many equal it.

    The sum is exact enough if it is not far below scale, a power of two, and no term is above it.
    """
    arithmetic = _arithmetic(x)
    offset, floor, shift = _against(x, maximum)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    grid, fine_grid = x.dtype.type(arithmetic.grid * scale), x.dtype.type(arithmetic.fine_grid * scale)
    leading_sum = middle_sum = trailing_sum = n_ties = zero
    for j in range(n):
        value = x[_U(at + j)]
        term, low = _biased_term(value, offset, floor, shift, arithmetic)
        is_tie = value == maximum
        term, low = (zero, zero) if is_tie else (term, low)
        n_ties += one if is_tie else zero
        leading, middle, trailing = _three_parts(term, grid, fine_grid)
        leading_sum += leading
        middle_sum += middle
        trailing_sum += trailing + low
    total, rest = _combined(leading_sum, middle_sum, trailing_sum)
    return total, rest, np.float64(n_ties)


@_jit_exact
def _state_of(leading_sum: Any, trailing_sum: Any, n_ties: Any, maximum: Any, arithmetic: Any) -> Any:
    """The state with this finite maximum, given the biased sum of the terms below it."""
    offset, exponent = _state.reference(np.float64(maximum), arithmetic.state)
    top, top_low = _state.term(np.float64(maximum), offset, exponent, arithmetic.state)
    unbias = np.float64(arithmetic.unbias)
    ties = (n_ties - 1.0) * top
    sum, error = _state.two_sum(leading_sum * unbias, ties)
    residue = _state.product_error(n_ties - 1.0, top, ties) + (n_ties - 1.0) * top_low + trailing_sum * unbias
    return _state.State(np.float64(maximum), sum, error + residue)


@_jit
def _state_of_infinite(maximum: Any, has_nan: Any) -> Any:
    return _state.State(np.float64(maximum), math.nan if has_nan else 0.0, 0.0)


@_jit
def _fold_chunk(x: Any, at: Any, n: Any) -> Any:
    """The state of a chunk."""
    maximum = _maximum(x, at, n)
    if math.isnan(maximum):
        return _state.single(math.nan)
    if math.isinf(maximum):
        return _state_of_infinite(maximum, _has_nan(x, at, 1, n))
    arithmetic = _arithmetic(x)
    total, rest, n_ties = _sum_others(x, at, n, maximum, 1.0)
    size = math.ldexp(total, -arithmetic.bias)
    if size < 2.0**-10:
        # All are so far below the maximum that they fell through the grid: once more, on one of their own size.
        total, rest, n_ties = _sum_others(x, at, n, maximum, math.ldexp(1.0, math.frexp(size)[1]))
    return _state_of(total, rest, n_ties, maximum, arithmetic)


@_jit
def _top(x: Any, maximum: Any) -> Any:
    """The biased term of a finite maximum, and what its rounding dropped."""
    offset, floor, shift = _against(x, maximum)
    return _biased_term(maximum, offset, floor, shift, _arithmetic(x))


@_jit_exact
def _scaling(x: Any, maximum: Any, total: Any, rest: Any) -> Any:
    """What makes probabilities of terms, given their biased sum total + rest: the factor in two parts, and a limit.

    The factor is 2**bias / (total + rest); NaN if the maximum is not finite. Probabilities from the limit on are 1.
    """
    if not math.isfinite(maximum):
        return x.dtype.type(math.nan), x.dtype.type(math.nan), x.dtype.type(1)
    arithmetic = _arithmetic(x)
    top, top_low = _top(x, x.dtype.type(maximum))
    is_alone = (total - np.float64(top)) + (rest - np.float64(top_low)) < arithmetic.half_ulp * total
    total, rest = _state.two_sum(total * arithmetic.unbias, rest * arithmetic.unbias)
    inverse = 1.0 / total
    product = inverse * total
    error = ((1.0 - product) - _state.product_error(inverse, total, product)) - inverse * rest
    high = x.dtype.type(inverse)
    low = x.dtype.type((inverse - np.float64(high)) + inverse * error)
    # The sum has the low part of the maximum's term and the term itself has not, which can make it one step too small
    # or too large.
    return high, low, x.dtype.type(1.0 - 8.0 * arithmetic.half_ulp if is_alone else 1.0)


@_jit
def _scaling_of(x: Any, state: Any) -> Any:
    """`_scaling` of a row of this state."""
    arithmetic = _arithmetic(x)
    bias = 2.0**arithmetic.bias
    total, residue = _state.total(state, arithmetic.state)
    return _scaling(x, state.maximum, total * bias, residue * bias)


@_jit
def _scale(terms: Any, y: Any, at: Any, n: Any, high: Any, low: Any, limit: Any) -> None:
    unbias, one = _arithmetic(y).unbias, y.dtype.type(1)
    for j in range(n):
        term = terms[_U(j)]
        # Unbiased last, or term * low would be rounded where the result is hardly normal.
        probability = (term * high + term * low) * unbias
        y[_U(at + j)] = one if probability >= limit else probability


@_jit
def _subtract(x: Any, x_at: Any, y: Any, y_at: Any, n: Any, maximum: Any, log_total: Any) -> None:
    for j in range(n):
        y[_U(y_at + j)] = (x[_U(x_at + j)] - maximum) - log_total


@_jit
def _copy(x: Any, y: Any, at: Any, n: Any) -> None:
    for j in range(n):
        y[_U(at + j)] = x[_U(j)]


@_jit
def _stored_softmax(x: Any, x_at: Any, y: Any, y_at: Any, n: Any, terms: Any) -> None:
    """Softmax of a row whose terms wait for their sum in the scratch."""
    maximum = _maximum(x, x_at, n)
    total = rest = 0.0
    if math.isfinite(maximum):
        for first in range(0, n, CHUNK):
            size = min(CHUNK, n - first)
            chunk_sum, chunk_rest = _store_terms(x, x_at + first, terms, first, size, maximum)
            total, error = _state.two_sum(total, chunk_sum)
            rest += error + chunk_rest
    high, low, limit = _scaling(x, maximum, total, rest)
    _scale(terms, y, y_at, n, high, low, limit)


@_jit
def _offset_of(index: Any, dimensions: Any, column: Any) -> Any:
    """Where, in elements, the index-th of the positions that the dimensions enumerate lies."""
    offset = 0
    for d in range(len(dimensions) - 1, -1, -1):
        outer = index // dimensions[d, _SIZE]
        offset += (index - outer * dimensions[d, _SIZE]) * dimensions[d, column]
        index = outer
    return offset


@_jit
def _collect(x: Any, at: Any, reduced: Any, first: Any, n: Any, chunk: Any) -> None:
    """Copy n elements of a row of any strides into the scratch."""
    inner, step = reduced[-1, _SIZE], reduced[-1, _X]
    done = 0
    while done < n:
        run = min(inner - (first + done) % inner, n - done)
        start = at + _offset_of(first + done, reduced, _X)
        for j in range(run):
            chunk[_U(done + j)] = x[_U(start + j * step)]
        done += run


@_jit
def _distribute(chunk: Any, y: Any, at: Any, reduced: Any, first: Any, n: Any) -> None:
    """Copy the scratch to n elements of a row of any strides."""
    inner, step = reduced[-1, _SIZE], reduced[-1, _Y]
    done = 0
    while done < n:
        run = min(inner - (first + done) % inner, n - done)
        start = at + _offset_of(first + done, reduced, _Y)
        for j in range(run):
            y[_U(start + j * step)] = chunk[_U(done + j)]
        done += run


@_jit_entry
def run_rows(
    function: Any,
    x: Any,
    y: Any,
    kept: Any,
    reduced: Any,
    n_cols: Any,
    first_row: Any,
    end_row: Any,
    gathered: Any,
    stored: Any,
) -> None:
    """Run rows one after the other.

    Gathered rows go through a scratch, a chunk at a time, or whole if the terms are stored. So does the output where
    it is the input: LLVM's vector loops are for arrays that do not overlap.
    """
    arithmetic = _arithmetic(x)
    step = n_cols if stored else min(n_cols, CHUNK)
    terms = np.empty(step, x.dtype)
    collected = np.empty(step if gathered else 0, x.dtype)
    same_memory = x.ctypes.data == y.ctypes.data
    for row in range(first_row, end_row):
        x_at, y_at = _offset_of(row, kept, _X), _offset_of(row, kept, _Y)
        state = _state.identity()
        if not stored:
            for first in range(0, n_cols, step):
                size = min(step, n_cols - first)
                source, source_at = x, x_at + first
                if gathered:
                    _collect(x, x_at, reduced, first, size, collected)
                    source, source_at = collected, 0
                state = _state.merge(state, _fold_chunk(source, source_at, size), arithmetic.state)
            if function == _LOGSUMEXP:
                y[_U(y_at)] = _state.logsumexp(state, arithmetic.state)
                continue
        maximum = x.dtype.type(state.maximum)
        log_high, log_low = _state.log_total(state, arithmetic.state)
        log_total = x.dtype.type(log_high + log_low)
        high, low, limit = _scaling_of(x, state)
        for first in range(0, n_cols, step):
            size = min(step, n_cols - first)
            source, source_at, target, target_at = x, x_at + first, y, y_at + first
            if gathered:
                _collect(x, x_at, reduced, first, size, collected)
                source, source_at, target, target_at = collected, 0, collected, 0
            if function == _LOG_SOFTMAX:
                if same_memory or gathered:
                    _subtract(source, source_at, terms, 0, size, maximum, log_total)
                    _copy(terms, target, target_at, size)
                else:
                    _subtract(source, source_at, target, target_at, size, maximum, log_total)
            elif stored:
                _stored_softmax(source, source_at, target, target_at, size, terms)
            else:
                _store_terms(source, source_at, terms, 0, size, maximum)
                _scale(terms, target, target_at, size, high, low, limit)
            if gathered:
                _distribute(collected, y, y_at, reduced, first, size)


@_jit
def _strip_maxima(x: Any, at: Any, step: Any, n: Any, width: Any, lanes: Any) -> None:
    for j in range(width):
        lanes[_MAXIMUM + j] = -math.inf
    for i in range(n):
        for j in range(width):
            # In this order a NaN is passed over; it turns up in the sum.
            lanes[_MAXIMUM + j] = max(lanes[_MAXIMUM + j], x[_U(at + i * step + j)])


@_jit
def _strip_against(x: Any, width: Any, lanes: Any) -> None:
    """Set each row's reference to that of its maximum and its sums to 0."""
    for j in range(width):
        maximum = lanes[_MAXIMUM + j]
        offset, floor, shift = _against(x, maximum if math.isfinite(maximum) else 0.0)
        lanes[_OFFSET + j], lanes[_FLOOR + j], lanes[_SHIFT + j] = offset, floor, shift
        lanes[_LEADING + j] = lanes[_TRAILING + j] = lanes[_TIES + j] = 0.0


@_jit
def _strip_store_terms(x: Any, at: Any, step: Any, terms: Any, n: Any, width: Any, lanes: Any) -> None:
    arithmetic = _arithmetic(x)
    for i in range(n):
        for j in range(width):
            value = x[_U(at + i * step + j)]
            term, low = _biased_term(value, lanes[_OFFSET + j], lanes[_FLOOR + j], lanes[_SHIFT + j], arithmetic)
            lanes[_LEADING + j], error = _state.two_sum(lanes[_LEADING + j], term)
            lanes[_TRAILING + j] += error + low
            terms[_U(i * width + j)] = term


@_jit
def _strip_sum_others(x: Any, at: Any, step: Any, n: Any, width: Any, lanes: Any) -> None:
    arithmetic = _arithmetic(x)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for i in range(n):
        for j in range(width):
            value = x[_U(at + i * step + j)]
            term, low = _biased_term(value, lanes[_OFFSET + j], lanes[_FLOOR + j], lanes[_SHIFT + j], arithmetic)
            is_tie = value == lanes[_MAXIMUM + j]
            term, low = (zero, zero) if is_tie else (term, low)
            lanes[_TIES + j] += one if is_tie else zero
            lanes[_LEADING + j], error = _state.two_sum(lanes[_LEADING + j], term)
            lanes[_TRAILING + j] += error + low


@_jit
def _strip_fold(x: Any, at: Any, step: Any, n: Any, width: Any, lanes: Any, states: Any) -> None:
    """Merge a chunk of each row of the strip into its state."""
    arithmetic = _arithmetic(x)
    _strip_maxima(x, at, step, n, width, lanes)
    _strip_against(x, width, lanes)
    _strip_sum_others(x, at, step, n, width, lanes)
    for j in range(width):
        maximum = lanes[_MAXIMUM + j]
        if math.isinf(maximum):
            chunk = _state_of_infinite(maximum, _has_nan(x, at + j, step, n))
        else:
            leading_sum, trailing_sum = np.float64(lanes[_LEADING + j]), np.float64(lanes[_TRAILING + j])
            chunk = _state_of(leading_sum, trailing_sum, np.float64(lanes[_TIES + j]), maximum, arithmetic)
        state = _state.merge(_state.State(states[j, 0], states[j, 1], states[j, 2]), chunk, arithmetic.state)
        states[j, 0], states[j, 1], states[j, 2] = state


@_jit
def _strip_scale(terms: Any, y: Any, at: Any, step: Any, n: Any, width: Any, lanes: Any) -> None:
    unbias, one = _arithmetic(y).unbias, y.dtype.type(1)
    for i in range(n):
        for j in range(width):
            term = terms[_U(i * width + j)]
            probability = (term * lanes[_HIGH + j] + term * lanes[_LOW + j]) * unbias
            y[_U(at + i * step + j)] = one if probability >= lanes[_LIMIT + j] else probability


@_jit
def _strip_subtract(
    x: Any, x_at: Any, x_step: Any, y: Any, y_at: Any, y_step: Any, n: Any, width: Any, lanes: Any
) -> None:
    for i in range(n):
        for j in range(width):
            difference = x[_U(x_at + i * x_step + j)] - lanes[_MAXIMUM + j]
            y[_U(y_at + i * y_step + j)] = difference - lanes[_LOG_TOTAL + j]


@_jit_entry
def run_strips(
    function: Any,
    x: Any,
    y: Any,
    kept: Any,
    reduced: Any,
    n_cols: Any,
    first_strip: Any,
    end_strip: Any,
    strip_width: Any,
    stored: Any,
) -> None:
    """Run strips of adjacent rows; each lane of a strip is a row."""
    inner, y_lane_step = kept[-1, _SIZE], kept[-1, _Y]
    x_step, y_step = reduced[0, _X], reduced[0, _Y]
    strips_per_inner = (inner + strip_width - 1) // strip_width
    lanes = np.empty(_N_FIELDS * MAX_STRIP, x.dtype)
    states = np.empty((MAX_STRIP, 3), np.float64)
    terms = np.empty((n_cols if stored else min(n_cols, STRIP_PIECE)) * strip_width, x.dtype)
    for strip in range(first_strip, end_strip):
        outer = strip // strips_per_inner
        lane = (strip - outer * strips_per_inner) * strip_width
        width = min(strip_width, inner - lane)
        x_at = _offset_of(outer * inner + lane, kept, _X)
        y_at = _offset_of(outer * inner + lane, kept, _Y)
        if stored:
            _strip_maxima(x, x_at, x_step, n_cols, width, lanes)
            _strip_against(x, width, lanes)
            _strip_store_terms(x, x_at, x_step, terms, n_cols, width, lanes)
            for j in range(width):
                total, rest = np.float64(lanes[_LEADING + j]), np.float64(lanes[_TRAILING + j])
                lanes[_HIGH + j], lanes[_LOW + j], lanes[_LIMIT + j] = _scaling(x, lanes[_MAXIMUM + j], total, rest)
            _strip_scale(terms, y, y_at, y_step, n_cols, width, lanes)
            continue
        for j in range(width):
            states[j, 0], states[j, 1], states[j, 2] = _state.identity()
        for first in range(0, n_cols, STRIP_CHUNK):
            size = min(STRIP_CHUNK, n_cols - first)
            _strip_fold(x, x_at + first * x_step, x_step, size, width, lanes, states)
        for j in range(width):
            state = _state.State(states[j, 0], states[j, 1], states[j, 2])
            lanes[_MAXIMUM + j] = state.maximum
            if function == _SOFTMAX:
                lanes[_HIGH + j], lanes[_LOW + j], lanes[_LIMIT + j] = _scaling_of(x, state)
            elif function == _LOG_SOFTMAX:
                log_high, log_low = _state.log_total(state, _arithmetic(x).state)
                lanes[_LOG_TOTAL + j] = log_high + log_low
            else:
                y[_U(y_at + j * y_lane_step)] = _state.logsumexp(state, _arithmetic(x).state)
        if function == _LOG_SOFTMAX:
            _strip_subtract(x, x_at, x_step, y, y_at, y_step, n_cols, width, lanes)
        elif function == _SOFTMAX:
            _strip_against(x, width, lanes)
            for first in range(0, n_cols, STRIP_PIECE):
                size = min(STRIP_PIECE, n_cols - first)
                piece_at = y_at + first * y_step
                _strip_store_terms(x, x_at + first * x_step, x_step, terms, size, width, lanes)
                _strip_scale(terms, y, piece_at, y_step, size, width, lanes)


@_inline
def _split_factor(b: Any) -> Any:
    """b = significand * 2**exponent, with 1 <= |significand| < 2, for b other than 0."""
    is_normal = abs(b) >= 2.0**-1022
    normal, bias = (b, 1023.0) if is_normal else (b * 2.0**512, 1023.0 + 512.0)
    bits = np.float64(normal).view(np.int64)
    exponent = np.float64((bits >> np.int64(52)) & np.int64(0x7FF)) - bias
    significand = (bits & ~np.int64(0x7FF << 52)) | np.int64(1023 << 52)
    return np.int64(significand).view(np.float64), exponent


@_jit
def _find_top(a: Any, b: Any, n: Any) -> Any:
    """The index of one of the largest terms, -1 if all are 0; whether none is infinite or NaN.

    Where b is 0, `a` becomes -inf.
    """
    highest, probe = -math.inf, 0.0
    for j in range(n):
        value = -math.inf if b[_U(j)] == 0.0 else a[_U(j)]
        a[_U(j)] = value
        highest = max(highest, value)
        probe += (0.0 if value == -math.inf else value - value) + (b[_U(j)] - b[_U(j)])
    top, largest = -1, -math.inf
    for j in range(n):
        _, exponent = _split_factor(b[_U(j)])
        # Beside a large `a` the logarithm of the factor would not be seen.
        size = (a[_U(j)] - highest) + exponent * math.log(2.0)
        if size > largest:
            top, largest = j, size
    return top, probe == 0.0


@_jit
def _sum_of_irregular(a: Any, b: Any, n: Any) -> Any:
    """The sum of those terms that are infinite or NaN."""
    total = 0.0
    for j in range(n):
        if b[_U(j)] != 0.0:
            value = a[_U(j)]
            term = b[_U(j)] * (1.0 if math.isfinite(value) else math.exp(value))
            total += 0.0 if math.isfinite(term) else term
    return total


@_jit_exact
def _store_products(a: Any, b: Any, n: Any, offset: Any, exponent: Any) -> None:
    """Replace a and b by the terms b * exp(a - offset) / 2**exponent and what rounding took from them."""
    for j in range(n):
        significand, b_exponent = _split_factor(b[_U(j)])
        floor = (exponent - b_exponent - 1000.0) * math.log(2.0)
        difference, error = _state.two_sum(a[_U(j)], -offset)
        t = max(difference, floor)
        p, low, shifted_k = _state.split(t, FLOAT64)
        power = _power_of_two(shifted_k + (b_exponent + (1023.0 - exponent)))
        p, low = p * power, low * power
        term = p * significand
        residue = _state.product_error(p, significand, term) + (low + p * error) * significand
        is_zero = a[_U(j)] == -math.inf
        a[_U(j)], b[_U(j)] = 0.0 if is_zero else term, 0.0 if is_zero else residue


@_jit_exact
def _sum_in_lanes(terms: Any, residues: Any, n: Any) -> Any:
    """The sum of terms and residues in two parts: over every `_LANES`-th first, which LLVM does side by side."""
    sums, rests = np.zeros(_LANES), np.zeros(_LANES)
    for first in range(0, n, _LANES):
        for j in range(min(_LANES, n - first)):
            sums[_U(j)], error = _state.two_sum(sums[_U(j)], terms[_U(first + j)])
            rests[_U(j)] += error + residues[_U(first + j)]
    total = rest = 0.0
    for j in range(_LANES):
        total, error = _state.two_sum(total, sums[_U(j)])
        rest += error + rests[_U(j)]
    return total, rest


@_jit
def _fold_weighted_chunk(a: Any, b: Any, n: Any, row_offset: Any) -> Any:
    """The state of a chunk of terms, which are overwritten."""
    top, is_regular = _find_top(a, b, n)
    if not is_regular:
        return _state.WeightedState(-math.inf, 1.0, -math.inf, 0.0, _sum_of_irregular(a, b, n), 0.0)
    if top < 0:
        return _state.weighted_identity()
    a_top, b_top = a[_U(top)], b[_U(top)]
    a[_U(top)] = -math.inf
    offset = row_offset if abs(a_top - row_offset) <= _state.WEIGHTED_REACH else a_top
    _, b_exponent = _split_factor(b_top)
    exponent = np.rint((a_top - offset) * FLOAT64.log2e) + b_exponent - _state.WEIGHTED_TOP
    _store_products(a, b, n, offset, exponent)
    total, rest = _sum_in_lanes(a, b, n)
    return _state.WeightedState(a_top, b_top, offset, exponent, total, rest)


@_jit_entry
def run_weighted(
    a: Any,
    b: Any,
    y: Any,
    signs: Any,
    a_kept: Any,
    a_reduced: Any,
    b_kept: Any,
    b_reduced: Any,
    n_cols: Any,
    first_row: Any,
    end_row: Any,
    has_signs: Any,
) -> None:
    """Run rows of a weighted logsumexp, gathered a chunk at a time and computed in float64."""
    terms, factors = np.empty(min(n_cols, CHUNK), np.float64), np.empty(min(n_cols, CHUNK), np.float64)
    for row in range(first_row, end_row):
        state = _state.weighted_identity()
        for first in range(0, n_cols, CHUNK):
            size = min(CHUNK, n_cols - first)
            _collect(a, _offset_of(row, a_kept, _X), a_reduced, first, size, terms)
            _collect(b, _offset_of(row, b_kept, _X), b_reduced, first, size, factors)
            state = _state.merge_weighted(state, _fold_weighted_chunk(terms, factors, size, state.offset))
        log_sum, sign = _state.weighted_logsumexp(state)
        y_at = _offset_of(row, a_kept, _Y)
        y[_U(y_at)] = log_sum if has_signs or sign >= 0.0 else math.nan
        if has_signs:
            signs[_U(y_at)] = sign


def plan(function: Function, layout: Layout, in_place: bool) -> Plan:
    return Plan(function, "numba", None, _schedule(function, layout))


def _schedule(function: Function, layout: Layout) -> Schedule:
    n_threads = layout.size // MIN_ELEMENTS_PER_THREAD
    n_threads = min(n_threads, max_threads()) if n_threads > 1 else 1
    traversal: Traversal = "gather"
    n_units, unit_bytes = layout.n_rows, layout.n_cols * layout.itemsize
    if function == "weighted_logsumexp" or function in CROSS_ENTROPIES:
        pass
    elif layout.has_contiguous_rows:
        traversal = "rows"
    elif function in VJPS and layout.has_adjacent_rows and layout.kept[-1].b_stride != layout.itemsize:
        pass
    elif layout.has_adjacent_rows and layout.kept[-1].size >= MIN_STRIP:
        traversal = "strips"
        width = _strip_width(layout)
        n_units = layout.n_rows // layout.kept[-1].size * -(-layout.kept[-1].size // width)
        unit_bytes *= width
    exponentials: Exponentials = "none"
    if function == "softmax":
        exponentials = "scratch" if unit_bytes <= cache_sizes().last_level // STORED_SHARE else "recompute"
    n_blocks = 1 if n_threads == 1 else min(n_units, n_threads * BLOCKS_PER_THREAD)
    return Schedule(traversal, exponentials, False, min(n_threads, n_blocks), n_blocks)


def _strip_width(layout: Layout) -> int:
    return min(STRIP_BYTES // layout.itemsize, layout.kept[-1].size)


def run(plan: Plan, layout: Layout, x: Array, out: Array, factors: Factors | None) -> None:
    if factors is not None and plan.function in VJPS:
        from fastsoftmax.backends import numba_derivatives  # not above: it imports this module

        return numba_derivatives.run(plan, layout, x, factors.b, out)
    schedule, n_blocks, n_cols = plan.schedule, plan.schedule.n_blocks, layout.n_cols
    kept, reduced = _table(layout.kept, layout.itemsize), _table(layout.reduced, layout.itemsize)
    source, target = _elements(x), _elements(out)
    n_units = layout.n_rows
    run_units: Callable[[int, int], None]
    if factors is not None:
        b, signs = _elements(factors.b), target if factors.sign is None else _elements(factors.sign)
        b_kept, b_reduced = (_table(_of_factors(part), layout.itemsize) for part in (layout.kept, layout.reduced))
        has_signs = factors.sign is not None

        def run_units(first: int, end: int) -> None:
            run_weighted(source, b, target, signs, kept, reduced, b_kept, b_reduced, n_cols, first, end, has_signs)

    else:
        function, is_stored = _FUNCTIONS[plan.function], schedule.exponentials == "scratch"
        if schedule.traversal == "strips":
            kernel, how = run_strips, _strip_width(layout)
            inner = layout.kept[-1].size
            n_units = layout.n_rows // inner * -(-inner // how)
        else:
            kernel, how = run_rows, schedule.traversal == "gather"

        def run_units(first: int, end: int) -> None:
            kernel(function, source, target, kept, reduced, n_cols, first, end, how, is_stored)

    # The views of `_elements` keep no memory alive.
    def run_block(block: int, alive: tuple[Any, ...] = (x, out, factors)) -> None:
        run_units(n_units * block // n_blocks, n_units * (block + 1) // n_blocks)

    run_blocks(run_block, n_blocks, schedule.n_threads)


def run_cross_entropy(
    plan: Plan, layout: Layout, x: Array, gradient: Array | None, losses: Array, terms: CrossEntropy
) -> None:
    from fastsoftmax.backends import numba_cross_entropy  # not above: it imports this module

    numba_cross_entropy.run(plan, layout, x, gradient, losses, terms)


def _of_factors(dimensions: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    """The dimensions with the strides of the factors for those of the input."""
    return tuple(dimension._replace(x_stride=dimension.b_stride) for dimension in dimensions)


def _table(dimensions: tuple[Dimension, ...], itemsize: int) -> Array:
    """Sizes and strides in elements, as the kernels read them."""
    rows = [(d.size, d.x_stride // itemsize, d.y_stride // itemsize) for d in dimensions]
    return np.array(rows, np.int64).reshape(-1, 3)


def _elements(array: Array) -> Array:
    """The memory from the array's first element on, which kernels index with offsets of either sign.

    It goes through the address as Numba compiles a kernel anew for read-only arrays and for each number of dimensions.
    """
    kind: Any = ctypes.c_float if array.dtype == np.float32 else ctypes.c_double
    elements: Array = np.frombuffer(kind.from_address(array.ctypes.data), array.dtype)
    return elements
