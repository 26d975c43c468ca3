"""Rows of other types than are computed in, whose elements are converted on their way to a scratch and back.

Between reading and writing come the kernels of `rows`, so that the bits are those of an array that was converted first.
"""

from __future__ import annotations

from .jit import jit, jit_entry
from .registers import address_of, pointer_to, stack_memory
from .rows import (
    BATCH_BYTES,
    BYTES_OF_WORK,
    CHUNK_BYTES,
    COLUMNS,
    FIELDS_OF_STATE,
    LOGSUMEXP,
    X,
    Y,
    bytes_of_states,
    chunk_of,
    count_chunks,
    fold_chunks,
    folded_of,
    is_row_mended,
    log_sums_of_row,
    make_work,
    merge_states,
    offset_of,
    rows_together,
    run_batch,
    write_chunks,
)
from .stored import collect_any, collect_floats, distribute_stored, read_float, write_one


def bytes_of_converted(n, itemsize):
    return BATCH_BYTES + bytes_of_states(-(-n * itemsize // CHUNK_BYTES))


@jit
def _multiply(p, at, n, factor):
    """Multiply n probabilities; those that are 0 stay so, whatever by."""
    if factor == 1.0:
        return
    for j in range(n):
        p[at + j] = p[at + j] * factor if p[at + j] != 0.0 else p[at + j]


def _folder(collect):
    """A function that folds a row of several chunks, of which each is converted first."""

    @jit
    def fold(function, storage, address, at, reduced, n_reduced, n, room, states, work):
        """Write the states of the chunks, which come by way of `room`, and merge them."""
        length, n_chunks, nothing = chunk_of(room), count_chunks(room, n), pointer_to(0, 0)
        for chunk in range(n_chunks):
            size = min(length, n - chunk * length)
            collect(storage, address, at, reduced, n_reduced, chunk * length, size, room, room, 0)
            of_chunk = pointer_to(address_of(states, FIELDS_OF_STATE * chunk), 0.0)
            fold_chunks(function, room, 0, size, nothing, 0, 0, 1, False, room, of_chunk, room, work)
        return merge_states(states, n_chunks, room)

    return fold


fold_any, fold_floats = map(_folder, (collect_any, collect_floats))


@jit
def _run_long_row(like, function, storages, addresses, x_at, y_at, reduced, n_reduced, n, factor, scratch, work):
    """Run a row of more than one chunk: each is converted once for the states and once to be written."""
    room, states = pointer_to(scratch, like), pointer_to(scratch + BATCH_BYTES, 0.0)
    nothing, length = pointer_to(0, 0), chunk_of(room)
    total = fold_any(function, storages[0], addresses[0], x_at, reduced, n_reduced, n, room, states, work)
    if function == LOGSUMEXP:
        _, room[0] = log_sums_of_row(total, folded_of(total, room))
        write_one(room, like, storages[1], addresses[1], y_at)
        return
    mends = is_row_mended(room, states, count_chunks(room, n), total, n)
    for first in range(0, n, length):
        size = min(length, n - first)
        collect_any(storages[0], addresses[0], x_at, reduced, n_reduced, first, size, like, room, 0)
        write_chunks(function, room, 0, room, 0, size, nothing, 0, 0, 1, False, room, states, total, mends, False, room)
        _multiply(room, 0, size, factor)
        distribute_stored(room, 0, like, storages[1], addresses[1], y_at, reduced, n_reduced, first, size)


@jit_entry
def run_converted(like, function, storages, addresses, factors, tables, n_kept, n_reduced, n, first, end, scratch):
    """Run rows of any strides; storages and addresses are those of the input and of the output.

    If `factors` has an address, there is a factor for each row, of the input's storage, to multiply probabilities by;
    its tables follow those of the input.
    """
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    factor_kept = pointer_to(tables + (n_kept + n_reduced) * COLUMNS * 8, 0)
    room, factor = pointer_to(scratch, like), pointer_to(stack_memory(8), like)
    work = make_work(stack_memory(BYTES_OF_WORK), like)
    factor[0] = 1.0
    is_long = n > chunk_of(room)
    together = 1 if is_long else rows_together(room, n, CHUNK_BYTES)
    for row in range(first, end, together):
        count = min(together, end - row)
        if not is_long:
            for s in range(count):
                work.places[s], work.results[s], work.terms[s] = s * n, s * n, s * n
                work.sizes[s] = n
                x_at = offset_of(row + s, kept, n_kept, X)
                collect_any(storages[0], addresses[0], x_at, reduced, n_reduced, 0, n, like, room, s * n)
            run_batch(function, room, room, count, n, room, False, work)
        for s in range(count):
            x_at, y_at = offset_of(row + s, kept, n_kept, X), offset_of(row + s, kept, n_kept, Y)
            if factors:
                read_float(storages[0], factors, offset_of(row + s, factor_kept, n_kept, X), like, factor)
            if is_long:
                _run_long_row(
                    *(like, function, storages, addresses, x_at, y_at, reduced, n_reduced, n, factor[0], scratch, work)
                )
                continue
            size = 1 if function == LOGSUMEXP else n
            _multiply(room, s * n, size, factor[0])
            distribute_stored(room, s * n, like, storages[1], addresses[1], y_at, reduced, n_reduced, 0, size)


@jit_entry
def run_adjacent(
    like, image, function, streaming, x_address, y_address, tables, n_kept, n_reduced, n, first, end, scratch
):
    """Run rows of up to a chunk of adjacent elements of 16 bits, which loads and stores convert.

    `image` is an array of the integers that have their bits.
    """
    x, y = pointer_to(x_address, image), pointer_to(y_address, image)
    kept, room = pointer_to(tables, 0), pointer_to(scratch, like)
    work = make_work(stack_memory(BYTES_OF_WORK), like)
    together = rows_together(room, n, CHUNK_BYTES)
    for row in range(first, end, together):
        count = min(together, end - row)
        for s in range(count):
            work.places[s], work.results[s] = offset_of(row + s, kept, n_kept, X), offset_of(row + s, kept, n_kept, Y)
            work.terms[s], work.sizes[s] = s * n, n
        run_batch(function, x, y, count, n, room, streaming, work)
