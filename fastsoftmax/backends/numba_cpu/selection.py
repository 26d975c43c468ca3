"""Kernels for the largest elements of rows, and for random draws: a row at a time, gathered as float64.

The k largest so far are in a heap, the worst of them on top.
"""

from __future__ import annotations

import math

from .jit import inline, jit, jit_entry
from .registers import pointer_to
from .rows import COLUMNS, X, collect, offset_of
from .scalars import exp


def bytes_of_selection(n, k):
    """Scratch memory for rows of n elements."""
    return 8 * n + 16 * k


def bytes_of_sampling(n):
    """Scratch memory for rows of n elements."""
    return 5 * 8 * n


@inline
def is_worse(value, index, other, other_index):
    """Of equal elements the later one is worse."""
    return value < other or (value == other and index > other_index)


@jit
def sink(values, indices, count, place):
    """Let a candidate sink until those below it are better."""
    value, index, below = values[place], indices[place], 2 * place + 1
    while below < count:
        if below + 1 < count and is_worse(values[below + 1], indices[below + 1], values[below], indices[below]):
            below += 1
        if not is_worse(values[below], indices[below], value, index):
            break
        values[place], indices[place] = values[below], indices[below]
        place, below = below, 2 * below + 1
    values[place], indices[place] = value, index


@jit
def select_best(row, n, k, values, indices):
    """The k largest elements, the best first, but for NaN; how many these are."""
    count = 0
    for j in range(n):
        if count == k:
            if row[j] > values[0]:
                values[0], indices[0] = row[j], j
                sink(values, indices, k, 0)
        elif not math.isnan(row[j]):
            values[count], indices[count] = row[j], j
            count += 1
            if count == k:
                for place in range(k // 2 - 1, -1, -1):
                    sink(values, indices, k, place)
    if count < k:
        for place in range(count // 2 - 1, -1, -1):
            sink(values, indices, count, place)
    for end in range(count - 1, 0, -1):
        value, index = values[0], indices[0]
        values[0], indices[0] = values[end], indices[end]
        values[end], indices[end] = value, index
        sink(values, indices, end, 0)
    return count


@jit
def put_nan_first(row, n, k, selected, indices):
    """The indices of a row with NaN, which count as the largest."""
    count = 0
    for j in range(n):
        if math.isnan(row[j]) and count < k:
            indices[count] = j
            count += 1
    for j in range(k - count):
        indices[count + j] = selected[j]


@jit_entry
def run_selection(
    like, x_address, values_address, indices_address, k, tables, n_kept, n_reduced, n, first_row, end_row, scratch
):
    """Write the k largest elements of rows, the best first, and their indices; of a row with NaN only the latter."""
    x, results, kept = pointer_to(x_address, like), pointer_to(values_address, like), pointer_to(tables, 0)
    reduced, places = pointer_to(tables + n_kept * COLUMNS * 8, 0), pointer_to(indices_address, 0)
    row, values = pointer_to(scratch, 0.0), pointer_to(scratch + 8 * n, 0.0)
    selected = pointer_to(scratch + 8 * (n + k), 0)
    for index in range(first_row, end_row):
        collect(x, offset_of(index, kept, n_kept, X), reduced, n_reduced, 0, n, row, 0)
        count = select_best(row, n, k, values, selected)
        for j in range(count):
            results[index * k + j], places[index * k + j] = values[j], selected[j]
        if math.isnan(largest_in(row, n)):
            put_nan_first(row, n, k, selected, pointer_to(indices_address + 8 * index * k, 0))


@inline
def pick(sums, n, share):
    """The first of n cumulative sums that is above a share of the last one."""
    target = share * sums[n - 1]
    if target >= sums[n - 1]:  # rounded up
        target = sums[n - 1] * (1.0 - 2.0**-53)
    low, high = 0, n - 1
    while low < high:
        middle = (low + high) // 2
        if sums[middle] > target:
            high = middle
        else:
            low = middle + 1
    return low


@inline
def largest_in(row, n):
    """The largest of n elements, NaN if one is."""
    largest, probe = -math.inf, 0.0
    for j in range(n):
        largest = max(largest, row[j])
        probe += 1.0 if row[j] != row[j] else 0.0
    return math.nan if probe > 0.0 else largest


@inline
def put_terms(row, n, largest, terms):
    """exp(row - largest), 0 where that is no number to speak of."""
    for j in range(n):
        difference = row[j] - largest
        terms[j] = exp(difference, 0.0) if difference > -746.0 else 0.0


@jit
def cumulate(terms, n, sums):
    total = 0.0
    for j in range(n):
        total += terms[j]
        sums[j] = total
    return total


@jit
def count_kept(sums, n, limit):
    """How many of the largest terms make up a limit."""
    for j in range(n):
        if sums[j] >= limit:
            return j + 1
    return n


@jit
def drop_improbable(row, n, largest, top_k, top_p, terms, sums, values, indices):
    """Make the terms 0 of all but the most probable elements."""
    whole = cumulate(terms, n, sums)
    k = top_k if top_k else min(n, 64)
    while True:
        count = select_best(row, n, k, values, indices)
        put_terms(values, count, largest, values)
        share = cumulate(values, count, sums)
        limit = top_p * (share if top_k else whole)
        if top_k or share >= limit or k == n:
            break
        k = min(8 * k, n)
    kept = count_kept(sums, count, limit) if top_p < 1.0 else count
    worst, worst_index = row[indices[kept - 1]], indices[kept - 1]
    for j in range(n):
        if is_worse(row[j], j, worst, worst_index):
            terms[j] = 0.0


@jit_entry
def run_sampling(
    like, x_address, uniforms_address, draws_address, n_draws, temperature, top_k, top_p, tables, n_kept, n_reduced, n,
    first_row, end_row, scratch,
):  # fmt: skip
    """Run rows; `n_draws` for each, -1 where there is nothing to draw from. A `top_k` of 0 is none."""
    x, kept = pointer_to(x_address, like), pointer_to(tables, 0)
    reduced = pointer_to(tables + n_kept * COLUMNS * 8, 0)
    uniforms, draws = pointer_to(uniforms_address, 0.0), pointer_to(draws_address, 0)
    row, terms, sums = pointer_to(scratch, 0.0), pointer_to(scratch + 8 * n, 0.0), pointer_to(scratch + 16 * n, 0.0)
    values, indices = pointer_to(scratch + 24 * n, 0.0), pointer_to(scratch + 32 * n, 0)
    for index in range(first_row, end_row):
        collect(x, offset_of(index, kept, n_kept, X), reduced, n_reduced, 0, n, row, 0)
        if temperature != 1.0:
            for j in range(n):
                row[j] /= temperature
        largest, first = largest_in(row, n), index * n_draws
        if not math.isfinite(largest):
            for j in range(n_draws):
                draws[first + j] = -1
            continue
        put_terms(row, n, largest, terms)
        if top_k or top_p < 1.0:
            drop_improbable(row, n, largest, top_k, top_p, terms, sums, values, indices)
        cumulate(terms, n, sums)
        for j in range(n_draws):
            draws[first + j] = pick(sums, n, uniforms[first + j])
