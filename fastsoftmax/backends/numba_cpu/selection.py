"""The kernel for the largest elements of rows, which are looked through a chunk at a time.

The k largest so far are in a heap, the worst of them on top.
"""

from __future__ import annotations

import math

from .jit import inline, jit, jit_entry
from .registers import pointer_to
from .rows import COLUMNS, X, offset_of
from .scalars import largest_in
from .stored import Row, read_part, write_block

CHUNK = 4096


def bytes_of_selection(k):
    """Scratch memory for the k largest elements of rows."""
    return 8 * CHUNK + 16 * k


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
def offer(row, first, n, k, count, values, indices):
    """Offer n elements, of which the first has this index, to the heap of the `count` largest; how many it has then.

    A NaN is none of them.
    """
    for j in range(n):
        if count == k:
            if row[j] > values[0]:
                values[0], indices[0] = row[j], first + j
                sink(values, indices, k, 0)
        elif not math.isnan(row[j]):
            values[count], indices[count] = row[j], first + j
            count += 1
            if count == k:
                for place in range(k // 2 - 1, -1, -1):
                    sink(values, indices, k, place)
    return count


@jit
def sort_best(k, count, values, indices):
    """Put the elements of a heap in order, the best first; one of less than k is no heap yet."""
    if count < k:
        for place in range(count // 2 - 1, -1, -1):
            sink(values, indices, count, place)
    for end in range(count - 1, 0, -1):
        value, index = values[0], indices[0]
        values[0], indices[0] = values[end], indices[end]
        values[end], indices[end] = value, index
        sink(values, indices, end, 0)


@jit
def put_nan_first(source, k, row, selected, indices):
    """The indices of a row with NaN, which count as the largest."""
    count = 0
    for first in range(0, source.n, CHUNK):
        size = min(CHUNK, source.n - first)
        read_part(source, first, size, row)
        for j in range(size):
            if math.isnan(row[j]) and count < k:
                indices[count] = first + j
                count += 1
    for j in range(k - count):
        indices[count + j] = selected[j]


@jit_entry
def run_selection(storages, x, results, indices_address, k, tables, n_kept, n_reduced, n, first_row, end_row, scratch):
    """Write the k largest elements of rows, the best first, and their indices; of a row with NaN only the latter.

    Storages are those of the input and of the results.
    """
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    row, values = pointer_to(scratch, 0.0), pointer_to(scratch + 8 * CHUNK, 0.0)
    selected = pointer_to(scratch + 8 * (CHUNK + k), 0)
    for index in range(first_row, end_row):
        source = Row(storages[0], x, offset_of(index, kept, n_kept, X), reduced, n_reduced, n)
        indices = pointer_to(indices_address + 8 * index * k, 0)
        count, has_nan = 0, False
        for first in range(0, n, CHUNK):
            size = min(CHUNK, n - first)
            read_part(source, first, size, row)
            count = offer(row, first, size, k, count, values, selected)
            has_nan = has_nan or math.isnan(largest_in(row, size))
        sort_best(k, count, values, selected)
        write_block(values, 0, values, storages[1], results, index * k, 0, 1, 1, count)
        for j in range(count):
            indices[j] = selected[j]
        if has_nan:
            put_nan_first(source, k, row, selected, indices)
