"""The kernel for logsumexp with factors: sums of b * exp(a), gathered a chunk at a time and computed in float64.

These are loops over scalars, which LLVM vectorises.
"""

from __future__ import annotations

import math

import numpy as np

from fastsoftmax import _state
from fastsoftmax._state import FLOAT64

from .jit import inline, jit, jit_entry
from .registers import address_of, pointer_to
from .rows import COLUMNS, X, Y, offset_of
from .scalars import power_of_two
from .stored import collect_any, hide_strip, write_one

CHUNK = 4096

# Running sums of a row.
_LANES = 16
BYTES_OF_WEIGHTED = (2 * CHUNK + 2 * _LANES) * 8


@inline
def _split_factor(b):
    """b = significand * 2**exponent, with 1 <= |significand| < 2, for b other than 0."""
    is_normal = abs(b) >= 2.0**-1022
    scaled = b * 2.0**512
    normal = b if is_normal else scaled
    bias = 1023.0 if is_normal else 1023.0 + 512.0
    bits = np.float64(normal).view(np.int64)
    exponent = np.float64((bits >> np.int64(52)) & np.int64(0x7FF)) - bias
    significand = (bits & ~np.int64(0x7FF << 52)) | np.int64(1023 << 52)
    return np.int64(significand).view(np.float64), exponent


@jit
def _find_top(a, b, n):
    """The index of one of the largest terms, -1 if all are 0; whether none is infinite or NaN.

    Where b is 0, `a` becomes -inf.
    """
    highest, probe = -math.inf, 0.0
    for j in range(n):
        value, factor = a[j], b[j]
        value = -math.inf if factor == 0.0 else value
        a[j] = value
        highest = max(highest, value)
        difference = value - value
        probe += (0.0 if value == -math.inf else difference) + (factor - factor)
    top, largest = -1, -math.inf
    for j in range(n):
        _, exponent = _split_factor(b[j])
        # Beside a large `a` the logarithm of the factor would not be seen.
        size = (a[j] - highest) + exponent * math.log(2.0)
        if size > largest:
            top, largest = j, size
    return top, probe == 0.0


@jit
def _sum_of_irregular(a, b, n):
    """The sum of those terms that are infinite or NaN."""
    total = 0.0
    for j in range(n):
        if b[j] != 0.0:
            value = a[j]
            term = b[j] * (1.0 if math.isfinite(value) else math.exp(value))
            total += 0.0 if math.isfinite(term) else term
    return total


@jit
def _store_products(a, b, n, offset, exponent):
    """Replace a and b by the terms b * exp(a - offset) / 2**exponent and what rounding took from them."""
    for j in range(n):
        significand, b_exponent = _split_factor(b[j])
        difference, error = _state.two_sum(a[j], -offset)
        # Terms that are not seen beside the top are not computed, for those that underflow take a hundred cycles.
        is_zero = difference <= (exponent - b_exponent - 1000.0) * math.log(2.0)
        p, low, shifted_k = _state.split(0.0 if is_zero else difference, FLOAT64)
        power = 0.0 if is_zero else power_of_two(shifted_k + (b_exponent + (1023.0 - exponent)))
        p, low = p * power, low * power
        term = p * significand
        residue = _state.product_error(p, significand, term) + (low + p * error) * significand
        a[j], b[j] = 0.0 if is_zero else term, 0.0 if is_zero else residue


@jit
def _sum_in_lanes(terms, residues, n, sums):
    """The sum of terms and residues in two parts: over every `_LANES`-th first, which LLVM does side by side."""
    rests = pointer_to(address_of(sums, _LANES), sums)
    for j in range(_LANES):
        sums[j], rests[j] = 0.0, 0.0
    for first in range(0, n, _LANES):
        for j in range(min(_LANES, n - first)):
            sums[j], error = _state.two_sum(sums[j], terms[first + j])
            rests[j] += error + residues[first + j]
    total = rest = 0.0
    for j in range(_LANES):
        total, error = _state.two_sum(total, sums[j])
        rest += error + rests[j]
    return total, rest


@jit
def _fold_weighted_chunk(a, b, n, row_offset, sums):
    """The state of a chunk of terms, which are overwritten."""
    top, is_regular = _find_top(a, b, n)
    if not is_regular:
        return _state.WeightedState(-math.inf, 1.0, -math.inf, 0.0, _sum_of_irregular(a, b, n), 0.0)
    if top < 0:
        return _state.weighted_identity()
    a_top, b_top = a[top], b[top]
    a[top] = -math.inf
    offset = row_offset if abs(a_top - row_offset) <= _state.WEIGHTED_REACH else a_top
    _, b_exponent = _split_factor(b_top)
    exponent = np.rint((a_top - offset) * FLOAT64.log2e) + b_exponent - _state.WEIGHTED_TOP
    _store_products(a, b, n, offset, exponent)
    total, rest = _sum_in_lanes(a, b, n, sums)
    return _state.WeightedState(a_top, b_top, offset, exponent, total, rest)


@jit_entry
def run_weighted(
    like, storages, addresses, mask_address, temperature, tables, n_kept, n_reduced, n, first_row, end_row, scratch
):  # fmt: skip
    """Run rows; there are signs, and a mask, where they have an address.

    Storages are those of the terms, the factors and the output; addresses have that of the signs besides. The tables of
    the factors and those of the mask follow those of the terms.
    """
    mask = pointer_to(mask_address, np.uint8(0))
    terms, factors = pointer_to(scratch, 0.0), pointer_to(scratch + CHUNK * 8, 0.0)
    sums = pointer_to(scratch + 2 * CHUNK * 8, 0.0)
    row_bytes = COLUMNS * 8
    a_kept, a_reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * row_bytes, 0)
    tables += (n_kept + n_reduced) * row_bytes
    b_kept, b_reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * row_bytes, 0)
    tables += (n_kept + n_reduced) * row_bytes
    mask_kept, mask_reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * row_bytes, 0)
    for row in range(first_row, end_row):
        state = _state.weighted_identity()
        a_at, b_at = offset_of(row, a_kept, n_kept, X), offset_of(row, b_kept, n_kept, X)
        for first in range(0, n, CHUNK):
            size = min(CHUNK, n - first)
            collect_any(storages[0], addresses[0], a_at, a_reduced, n_reduced, first, size, like, terms, 0)
            collect_any(storages[1], addresses[1], b_at, b_reduced, n_reduced, first, size, like, factors, 0)
            if mask_address:  # a factor of 0 drops its term, whatever that is
                mask_at = offset_of(row, mask_kept, n_kept, X)
                hide_strip(factors, mask, mask_at, mask_reduced, n_reduced, 1, 0, first, size, 0.0)
            if temperature != 1.0:
                for j in range(size):
                    terms[j] /= temperature
            state = _state.merge_weighted(state, _fold_weighted_chunk(terms, factors, size, state.offset, sums))
        log_sum, sign = _state.weighted_logsumexp(state)
        y_at = offset_of(row, a_kept, n_kept, Y)
        terms[0] = log_sum if addresses[3] or sign >= 0.0 else math.nan
        write_one(terms, like, storages[2], addresses[2], y_at)
        if addresses[3]:
            terms[0] = sign
            write_one(terms, like, storages[2], addresses[3], y_at)
