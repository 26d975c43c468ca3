"""Rows of other types than are computed in, whose elements are converted on their way to a scratch and back.

Types are numbers at run time, since compiling the kernels anew for each pair of them would take seconds. Between
reading and writing come the kernels of `rows`, so that the bits are those of an array that was converted first.
"""

from __future__ import annotations

import numpy as np
from numba import types

from .jit import by_dtype, inline, jit, jit_entry
from .registers import pointer_to, stack_memory
from .rows import (
    BATCH_BYTES,
    BYTES_OF_WORK,
    CHUNK_BYTES,
    COLUMNS,
    LOGSUMEXP,
    X,
    Y,
    bytes_of_states,
    chunk_of,
    count_chunks,
    fold_chunks,
    folded_of,
    log_sum_of_row,
    make_work,
    merge_states,
    offset_of,
    rows_together,
    run_batch,
    stretch_of,
    write_chunks,
)

# By number, as kernels know them.
STORAGES = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)
(FLOAT16, BFLOAT16, FLOAT32, FLOAT64, BOOL, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64) = range(13)

_HALF, _BRAIN = (10, 15), (7, 127)  # digits behind the point, and what is added to exponents


def bytes_of_converted(n, itemsize):
    return BATCH_BYTES + bytes_of_states(-(-n * itemsize // CHUNK_BYTES))


def _rounded(like, value):
    """A number in the type that is computed in, which is that of an array."""


@by_dtype(_rounded)
def _select_rounded(like, value):
    if like.dtype == types.float32:
        return lambda like, value: np.float32(value)
    return lambda like, value: np.float64(value)


@inline
def _float_of_half(bits):
    image = np.uint32(bits & 0x7FFF) << np.uint32(13)
    # The multiplication mends the exponent, of subnormal numbers too.
    value = np.uint32(image).view(np.float32) * np.float32(2.0**112)
    if bits & 0x7C00 == 0x7C00:
        value = np.uint32(image | 0x7F800000).view(np.float32)
    return -value if bits & 0x8000 else value


@inline
def _float_of_brain(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inline
def _bits16_of(value, form):
    """The 16 bits of the nearest number of a form, the even one of two as near."""
    digits, bias = form
    bits, size = np.float64(value).view(np.int64), abs(np.float64(value))
    infinite = (2 * bias + 1) << digits
    if size != size:
        result = infinite | (1 << (digits - 1))
    elif size < 2.0 ** (1 - bias):
        result = np.int64((size * 2.0 ** (bias - 1 + digits) + 1.5 * 2.0**52) - 1.5 * 2.0**52)
    else:
        shift = 52 - digits
        image = bits & 0x7FFFFFFFFFFFFFFF
        result = ((image + (1 << (shift - 1)) - 1 + ((image >> shift) & 1)) >> shift) - ((1023 - bias) << digits)
        result = min(result, infinite)
    return np.uint16(((bits >> 48) & 0x8000) | result)


@jit
def _read_numbers(x, start, step, n, like, y, y_at):
    for j in range(n):
        y[y_at + j] = _rounded(like, x[start + j * step])


@jit
def read_run(storage, address, start, step, n, like, y, y_at):
    """Copy n elements of a storage, `step` apart, in the type that is computed in."""
    if storage == FLOAT32:
        _read_numbers(pointer_to(address, np.float32(0)), start, step, n, like, y, y_at)
    elif storage == FLOAT64:
        _read_numbers(pointer_to(address, 0.0), start, step, n, like, y, y_at)
    elif storage in (FLOAT16, BFLOAT16):
        images = pointer_to(address, np.uint16(0))
        for j in range(n):
            image = images[start + j * step]
            y[y_at + j] = _float_of_half(image) if storage == FLOAT16 else _float_of_brain(image)
    elif storage == BOOL:
        truths = pointer_to(address, np.uint8(0))
        for j in range(n):
            y[y_at + j] = 1.0 if truths[start + j * step] else 0.0
    elif storage == INT8:
        _read_numbers(pointer_to(address, np.int8(0)), start, step, n, like, y, y_at)
    elif storage == UINT8:
        _read_numbers(pointer_to(address, np.uint8(0)), start, step, n, like, y, y_at)
    elif storage == INT16:
        _read_numbers(pointer_to(address, np.int16(0)), start, step, n, like, y, y_at)
    elif storage == UINT16:
        _read_numbers(pointer_to(address, np.uint16(0)), start, step, n, like, y, y_at)
    elif storage == INT32:
        _read_numbers(pointer_to(address, np.int32(0)), start, step, n, like, y, y_at)
    elif storage == UINT32:
        _read_numbers(pointer_to(address, np.uint32(0)), start, step, n, like, y, y_at)
    elif storage == INT64:
        _read_numbers(pointer_to(address, np.int64(0)), start, step, n, like, y, y_at)
    else:
        _read_numbers(pointer_to(address, np.uint64(0)), start, step, n, like, y, y_at)


@jit
def _write_numbers(x, x_at, n, like, y, start, step):
    for j in range(n):
        y[start + j * step] = _rounded(like, x[x_at + j])


@jit
def write_run(x, x_at, n, like, storage, address, start, step):
    """Copy n adjacent numbers, rounded to the type that is computed in, to elements of a storage, `step` apart."""
    if storage == FLOAT32:
        _write_numbers(x, x_at, n, like, pointer_to(address, np.float32(0)), start, step)
    elif storage == FLOAT64:
        _write_numbers(x, x_at, n, like, pointer_to(address, 0.0), start, step)
    else:
        images = pointer_to(address, np.uint16(0))
        for j in range(n):
            value = _rounded(like, x[x_at + j])
            images[start + j * step] = _bits16_of(value, _HALF if storage == FLOAT16 else _BRAIN)


@jit
def collect_stored(storage, address, at, reduced, n_reduced, first, n, like, y, y_at):
    """Copy n elements of a row of any strides to adjacent ones."""
    done = 0
    while done < n:
        start, step, size = stretch_of(reduced, n_reduced, first + done, n - done, X)
        read_run(storage, address, at + start, step, size, like, y, y_at + done)
        done += size


@jit
def distribute_stored(x, x_at, like, storage, address, at, reduced, n_reduced, first, n):
    """Copy adjacent elements to a row of any strides."""
    done = 0
    while done < n:
        start, step, size = stretch_of(reduced, n_reduced, first + done, n - done, Y)
        write_run(x, x_at + done, size, like, storage, address, at + start, step)
        done += size


@jit
def _run_long_row(like, function, storages, addresses, x_at, y_at, reduced, n_reduced, n, scratch, work):
    """Run a row of more than one chunk: each is converted once for the states and once to be written."""
    room, states = pointer_to(scratch, like), pointer_to(scratch + BATCH_BYTES, 0.0)
    nothing = pointer_to(0, 0)
    length, n_chunks = chunk_of(room), count_chunks(room, n)
    for chunk in range(n_chunks):
        size = min(length, n - chunk * length)
        collect_stored(storages[0], addresses[0], x_at, reduced, n_reduced, chunk * length, size, like, room, 0)
        of_chunk = pointer_to(scratch + BATCH_BYTES + 24 * chunk, 0.0)
        fold_chunks(function, room, 0, size, nothing, 0, 0, 1, False, room, of_chunk, room, work)
    total = merge_states(states, n_chunks, room)
    if function == LOGSUMEXP:
        room[0] = total.maximum + log_sum_of_row(total, folded_of(total, room))
        write_run(room, 0, 1, like, storages[1], addresses[1], y_at, 0)
        return
    for chunk in range(n_chunks):
        size = min(length, n - chunk * length)
        collect_stored(storages[0], addresses[0], x_at, reduced, n_reduced, chunk * length, size, like, room, 0)
        write_chunks(function, room, 0, room, 0, size, nothing, 0, 0, 1, False, room, states, total, False, room)
        distribute_stored(room, 0, like, storages[1], addresses[1], y_at, reduced, n_reduced, chunk * length, size)


@jit_entry
def run_converted(like, function, storages, addresses, tables, n_kept, n_reduced, n, first, end, scratch):
    """Run rows of any strides; storages and addresses are those of the input and of the output."""
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    room = pointer_to(scratch, like)
    work = make_work(stack_memory(BYTES_OF_WORK), like)
    if n > chunk_of(room):
        for row in range(first, end):
            x_at, y_at = offset_of(row, kept, n_kept, X), offset_of(row, kept, n_kept, Y)
            _run_long_row(like, function, storages, addresses, x_at, y_at, reduced, n_reduced, n, scratch, work)
        return
    together = rows_together(room, n)
    for row in range(first, end, together):
        count = min(together, end - row)
        for s in range(count):
            work.places[s], work.results[s], work.terms[s] = s * n, s * n, s * n
            work.sizes[s] = n
            x_at = offset_of(row + s, kept, n_kept, X)
            collect_stored(storages[0], addresses[0], x_at, reduced, n_reduced, 0, n, like, room, s * n)
        run_batch(function, room, room, count, n, room, False, work)
        for s in range(count):
            y_at, size = offset_of(row + s, kept, n_kept, Y), 1 if function == LOGSUMEXP else n
            distribute_stored(room, s * n, like, storages[1], addresses[1], y_at, reduced, n_reduced, 0, size)
