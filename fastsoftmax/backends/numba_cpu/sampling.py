"""The kernel for random draws from rows, which are converted to float64 a chunk at a time.

A draw is the first element whose cumulative sum is above a share of the whole. Of a row of several chunks the sums at
the ends of chunks are kept, and those within a chunk computed again for the draws that fall there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .jit import inline, jit, jit_entry
from .registers import pointer_to
from .rows import COLUMNS, X, offset_of
from .scalars import exp, largest_in
from .selection import CHUNK, is_worse, offer, sort_best
from .stored import Row, read_part

# Of the largest elements, so many are looked at first for those that make up `top_p`, and then so many times as many.
FIRST_BEST, MORE_BEST = 64, 8


def bytes_of_sampling(n, n_selected):
    """Scratch memory for rows of n elements, of which so many may be sorted."""
    return 8 * (2 * CHUNK + -(-n // CHUNK)) + 24 * n_selected


class Logits(NamedTuple):
    """A row, and its temperature."""

    row: Row
    temperature: float


@jit
def read(logits, first, n, x):
    read_part(logits.row, first, n, x)
    if logits.temperature != 1.0:
        for j in range(n):
            x[j] /= logits.temperature


@jit
def find_largest(logits, x):
    """The largest element, NaN if one is; a row of one chunk stays in x."""
    largest, is_nan = -math.inf, False
    for first in range(0, logits.row.n, CHUNK):
        n = min(CHUNK, logits.row.n - first)
        read(logits, first, n, x)
        of_chunk = largest_in(x, n)
        is_nan = is_nan or math.isnan(of_chunk)
        largest = max(largest, of_chunk)
    return math.nan if is_nan else largest


@inline
def put_terms(x, n, largest, terms):
    """exp(x - largest), 0 where that is no number to speak of."""
    for j in range(n):
        difference = x[j] - largest
        terms[j] = 0.0 if math.isnan(difference) else exp(difference, 0.0)


@jit
def cumulate(terms, n, total):
    """Replace terms by their cumulative sums, which go on from a total; the new total."""
    for j in range(n):
        total += terms[j]
        terms[j] = total
    return total


@jit
def cumulate_chunk(first, n, largest, worst, worst_index, total, x, sums):
    """The cumulative sums of the terms of a chunk that is in x, less those of elements that are worse than one."""
    put_terms(x, n, largest, sums)
    if worst > -math.inf:
        for j in range(n):
            sums[j] = 0.0 if is_worse(x[j], first + j, worst, worst_index) else sums[j]
    return cumulate(sums, n, total)


@jit
def cumulate_row(logits, largest, worst, worst_index, ends, x, sums):
    """The sum of all terms, and the sums at the ends of chunks."""
    total = 0.0
    for first in range(0, logits.row.n, CHUNK):
        n = min(CHUNK, logits.row.n - first)
        if logits.row.n > CHUNK:
            read(logits, first, n, x)
        total = cumulate_chunk(first, n, largest, worst, worst_index, total, x, sums)
        ends[first // CHUNK] = total
    return total


@jit
def count_kept(sums, n, limit):
    """How many of the largest terms make up a limit."""
    for j in range(n):
        if sums[j] >= limit:
            return j + 1
    return n


@jit
def find_worst(logits, largest, top_k, top_p, whole, x, values, sums, indices):
    """The least probable element that may be drawn, and its index; `whole` is the sum of all terms."""
    k = top_k if top_k else min(logits.row.n, FIRST_BEST)
    while True:
        count = 0
        for first in range(0, logits.row.n, CHUNK):
            n = min(CHUNK, logits.row.n - first)
            if logits.row.n > CHUNK:
                read(logits, first, n, x)
            count = offer(x, first, n, k, count, values, indices)
        sort_best(k, count, values, indices)
        put_terms(values, count, largest, sums)
        share = cumulate(sums, count, 0.0)
        limit = top_p * (share if top_k else whole)
        if top_k or share >= limit or k == logits.row.n:
            break
        k = min(MORE_BEST * k, logits.row.n)
    kept = count_kept(sums, count, limit) if top_p < 1.0 else count
    return values[kept - 1], indices[kept - 1]


@inline
def target_of(share, total):
    target = share * total
    return target if target < total else total * (1.0 - 2.0**-53)  # it was rounded up


@inline
def first_above(sums, n, target):
    """The first of n cumulative sums that is above a target."""
    low, high = 0, n - 1
    while low < high:
        middle = (low + high) // 2
        if sums[middle] > target:
            high = middle
        else:
            low = middle + 1
    return low


@jit
def draw(logits, largest, worst, worst_index, ends, x, sums, uniforms, draws, at, n_draws):
    """Make draws from a row whose sums are those of its last chunk."""
    n_chunks = (logits.row.n + CHUNK - 1) // CHUNK
    total = ends[n_chunks - 1]
    if n_chunks == 1:
        for j in range(at, at + n_draws):
            draws[j] = first_above(sums, logits.row.n, target_of(uniforms[j], total))
        return
    for j in range(at, at + n_draws):  # a chunk is below all indices
        draws[j] = -1 - first_above(ends, n_chunks, target_of(uniforms[j], total))
    for j in range(at, at + n_draws):
        if draws[j] >= 0:
            continue
        chunk = -1 - draws[j]
        first = chunk * CHUNK
        n = min(CHUNK, logits.row.n - first)
        read(logits, first, n, x)
        before = ends[chunk - 1] if chunk else 0.0
        cumulate_chunk(first, n, largest, worst, worst_index, before, x, sums)
        for i in range(j, at + n_draws):
            if draws[i] == -1 - chunk:
                draws[i] = first + first_above(sums, n, target_of(uniforms[i], total))


@jit_entry
def run_sampling(
    storage, x_address, uniforms_address, draws_address, n_draws, temperature, top_k, top_p, n_selected, tables, n_kept,
    n_reduced, n, first_row, end_row, scratch,
):  # fmt: skip
    """Run rows; `n_draws` for each, -1 where there is nothing to draw from. A `top_k` of 0 is none."""
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    uniforms, draws = pointer_to(uniforms_address, 0.0), pointer_to(draws_address, 0)
    x, sums, ends = (
        pointer_to(scratch, 0.0),
        pointer_to(scratch + 8 * CHUNK, 0.0),
        pointer_to(scratch + 16 * CHUNK, 0.0),
    )
    of_best = scratch + 8 * (2 * CHUNK + (n + CHUNK - 1) // CHUNK)
    values, sums_of_best = pointer_to(of_best, 0.0), pointer_to(of_best + 8 * n_selected, 0.0)
    indices = pointer_to(of_best + 16 * n_selected, 0)
    for index in range(first_row, end_row):
        row = Row(storage, x_address, offset_of(index, kept, n_kept, X), reduced, n_reduced, n)
        logits = Logits(row, temperature)
        largest, at = find_largest(logits, x), index * n_draws
        if not math.isfinite(largest):
            for j in range(at, at + n_draws):
                draws[j] = -1
            continue
        worst, worst_index, whole = -math.inf, n, 0.0
        if top_k or top_p < 1.0:
            if not top_k:
                whole = cumulate_row(logits, largest, worst, worst_index, ends, x, sums)
            worst, worst_index = find_worst(logits, largest, top_k, top_p, whole, x, values, sums_of_best, indices)
        cumulate_row(logits, largest, worst, worst_index, ends, x, sums)
        draw(logits, largest, worst, worst_index, ends, x, sums, uniforms, draws, at, n_draws)
