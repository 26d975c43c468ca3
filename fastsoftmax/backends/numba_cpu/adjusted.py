"""The kernel for rows with a mask or a temperature: rows, or strips of adjacent ones, copied a chunk at a time.

These are loops over scalars, which LLVM vectorises. All is computed in float64, relative to the maximum of the row. The
quotient (x - maximum) / temperature has two parts, since rounding it to one would be magnified by the exponential; so
has the sum.
"""

from __future__ import annotations

import math

import numpy as np

from fastsoftmax import _state
from fastsoftmax._state import FLOAT64

from .jit import inline, jit, jit_entry
from .registers import pointer_to
from .rows import COLUMNS, LOGSUMEXP, SOFTMAX, X, Y, offset_of
from .scalars import LEAST_EXPONENT, exp, log1p, power_of_two, total_of
from .stored import collect_strip_of_any, distribute_strip, hide_strip, place_of_strip, write_one
from .tiles import STRIP_BYTES

CHUNK = 4096

# Running maxima and sums of a row that is alone; rows of a strip have one each.
_LANES = 32
_MAX_LANES = STRIP_BYTES // 4
BYTES_OF_ADJUSTED = (CHUNK + 5 * _MAX_LANES) * 8


@jit
def _find_maxima(values, n, lanes, maxima):
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            maxima[j] = max(maxima[j], values[first + j])  # in this order a NaN is passed over


@inline
def _quotient(x, maximum, divisor):
    """(x - maximum) / temperature in two parts, the second 0 where the first is infinite."""
    shrink, grow, inverse, inverse_low = divisor
    difference, error = _state.two_sum(x * shrink, -maximum * shrink)
    difference, error = difference * grow, error * grow
    quotient = difference * inverse
    # By way of a smaller power of two: what Dekker's product splits would overflow beside the largest numbers.
    low = _state.product_error(difference * 2.0**-32, inverse, quotient * 2.0**-32) * 2.0**32
    low += difference * inverse_low + error * inverse
    return quotient, low if abs(low) < math.inf else 0.0


@inline
def _term(x, maximum, divisor):
    quotient, low = _quotient(x, maximum, divisor)
    return exp(quotient, low)


@jit
def _add_terms(values, n, lanes, maxima, divisor, counts, sums, rests):
    """Count the elements that are the maximum of their row, and add up the terms of the others."""
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            x = values[first + j]
            counts[j] += 1.0 if x == maxima[j] else 0.0
            term = _term(x, maxima[j], divisor)
            sums[j], error = _state.two_sum(sums[j], 0.0 if x == maxima[j] else term)
            rests[j] += error


@jit
def _store_probabilities(values, n, lanes, maxima, divisor, sums, rests):
    """Multiply the terms by the reciprocals of the sums, which have two parts, so that only the result is rounded."""
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            quotient, low = _quotient(values[first + j], maxima[j], divisor)
            is_zero = quotient <= LEAST_EXPONENT
            p, p_low, shifted_k = _state.split(0.0 if is_zero else quotient, FLOAT64)
            p_low += 0.0 if is_zero else p * low
            product = p * sums[j]
            rest = _state.product_error(p, sums[j], product) + (p * rests[j] + p_low * sums[j])
            # By way of a larger power of two, so that only the last step rounds what is subnormal. A sum of NaN stays.
            power = 0.0 if is_zero else power_of_two(shifted_k + (1023.0 + 100.0))
            values[first + j] = (product + rest) * power * 2.0**-100


@jit
def _store_log_probabilities(values, n, lanes, maxima, divisor, sums, rests):
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            quotient, low = _quotient(values[first + j], maxima[j], divisor)
            values[first + j] = (quotient - sums[j]) + (low - rests[j])


@jit
def _finish(function, lanes, maxima, counts, sums, rests):
    """Make of the sums of all but the maxima what the second pass needs: reciprocals, or logarithms, in two parts."""
    for j in range(lanes):
        others, rest = _state.two_sum(sums[j], rests[j])
        others, error = _state.two_sum(counts[j] - 1.0, others)
        rest += error
        if function == SOFTMAX:
            total, error = _state.two_sum(1.0, math.nan if math.isinf(maxima[j]) else others)
            sums[j] = 1.0 / total
            product = sums[j] * total
            product_low = (1.0 - product) - _state.product_error(sums[j], total, product)
            rests[j] = sums[j] * (product_low - sums[j] * (error + rest))
        elif math.isinf(maxima[j]):
            sums[j], rests[j] = 0.0 * sums[j], 0.0
        else:
            sums[j], rests[j] = log1p(others, rest)


@jit_entry
def run_adjusted(
    like,
    function,
    columns,
    storages,
    addresses,
    mask_address,
    tables,
    n_kept,
    n_reduced,
    n,
    temperature,
    divisor,
    strip,
    end_strip,
    scratch,
):
    """Run strips of up to so many adjacent rows; if that is 1, rows of any strides.

    Storages and addresses are those of the input and of the output. Of the tables, the third are those of the mask.
    """
    mask = pointer_to(mask_address, np.uint8(0))
    values = pointer_to(scratch, 0.0)
    maxima = pointer_to(scratch + CHUNK * 8, 0.0)
    counts = pointer_to(scratch + (CHUNK + _MAX_LANES) * 8, 0.0)
    sums = pointer_to(scratch + (CHUNK + 2 * _MAX_LANES) * 8, 0.0)
    rests = pointer_to(scratch + (CHUNK + 3 * _MAX_LANES) * 8, 0.0)
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    mask_tables = tables + 2 * (n_kept + n_reduced) * COLUMNS * 8
    mask_kept, mask_reduced = pointer_to(mask_tables, 0), pointer_to(mask_tables + n_kept * COLUMNS * 8, 0)
    masked = 0.0 if function == SOFTMAX else -math.inf
    while strip < end_strip:
        run, column, width, n_outer = place_of_strip(strip, columns, kept, n_kept)
        x_at, y_at = offset_of(run, kept, n_outer, X) + column, offset_of(run, kept, n_outer, Y) + column
        column_step = mask_kept[(n_kept - 1) * COLUMNS + X] if columns > 1 else 0
        mask_at = offset_of(run, mask_kept, n_outer, X) + column * column_step
        lanes = min(n, _LANES) if columns == 1 else width
        for j in range(lanes):
            maxima[j], counts[j], sums[j], rests[j] = -math.inf, 0.0, 0.0, 0.0
        length = CHUNK // width
        for step in range(3):
            if step == 2 and function == LOGSUMEXP:
                break
            for first in range(0, n, length):
                size = min(length, n - first)
                if step == 0 or n > length:  # else they are still there
                    collect_strip_of_any(
                        *(storages[0], addresses[0], x_at),
                        *(reduced, n_reduced, columns, width, first, size, like, values),
                    )
                    if mask_address:
                        hide_strip(
                            values, mask, mask_at, mask_reduced, n_reduced, width, column_step, first, size, -math.inf
                        )
                if step == 0:
                    _find_maxima(values, size * width, lanes, maxima)
                elif step == 1:
                    _add_terms(values, size * width, lanes, maxima, divisor, counts, sums, rests)
                else:
                    if function == SOFTMAX:
                        _store_probabilities(values, size * width, lanes, maxima, divisor, sums, rests)
                    else:
                        _store_log_probabilities(values, size * width, lanes, maxima, divisor, sums, rests)
                    if mask_address:
                        hide_strip(
                            values, mask, mask_at, mask_reduced, n_reduced, width, column_step, first, size, masked
                        )
                    distribute_strip(
                        *(values, like, storages[1], addresses[1], y_at),
                        *(reduced, n_reduced, columns, width, first, size),
                    )
            if columns == 1 and step == 0:
                for j in range(1, lanes):
                    maxima[0] = max(maxima[0], maxima[j])
                for j in range(1, lanes):
                    maxima[j] = maxima[0]
            elif step == 1:
                if columns == 1:
                    total, rest = total_of(sums, rests, lanes)
                    for j in range(1, lanes):
                        counts[0] += counts[j]
                    for j in range(lanes):
                        counts[j], sums[j], rests[j] = counts[0], total, rest
                _finish(function, lanes, maxima, counts, sums, rests)
        if function == LOGSUMEXP:
            y_step = kept[(n_kept - 1) * COLUMNS + Y] if columns > 1 else 0
            for j in range(width):
                largest = maxima[j] / temperature
                whole, error = _state.two_sum(largest, sums[j])
                values[0] = whole + (error + rests[j]) if abs(whole) < math.inf else largest + sums[j]
                write_one(values, like, storages[1], addresses[1], y_at + j * y_step)
        strip += 1
