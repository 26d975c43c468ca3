"""Elements as they are stored: of any real type, any distance apart, converted on their way to a scratch and back.

Types are numbers at run time, since compiling the kernels anew for each of them would take seconds.

A strip is of adjacent rows: of each element of a row, so many columns lie side by side. One of a single column is a row
of any strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from .jit import by_dtype, inline, jit
from .registers import HAS_HALF, group_of, itemsize_of, lanes_in, load, pointer_to, store
from .rows import COLUMNS, SIZE, X, Y, offset_of, stretch_of

# By number, as kernels know them.
STORAGES = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)
(FLOAT16, BFLOAT16, FLOAT32, FLOAT64, BOOL, INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64) = range(13)


class Row(NamedTuple):
    """Where a row of any strides lies."""

    storage: int
    address: int
    at: int
    reduced: Any
    n_reduced: int
    n: int


def _rounded(like, value):
    """A number in the type that is computed in, which is that of an array."""


@by_dtype(_rounded)
def _select_rounded(like, value):
    if like.dtype == types.float32:
        return lambda like, value: np.float32(value)
    return lambda like, value: np.float64(value)


@inline
def _number(value):
    return value


@inline
def _truth(image):
    return 1.0 if image else 0.0


# Conversions of 16 bits have no branch but the choice of a value, so that LLVM does many at once.


@inline
def _half(image):
    size = np.uint32(image & 0x7FFF) << np.uint32(13)
    # The multiplication mends the exponent, of subnormal numbers too.
    bits = np.float32(np.uint32(size).view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    bits = bits if size < 0x7C00 << 13 else size | np.uint32(0x7F800000)
    return np.uint32(bits | np.uint32(image & 0x8000) << np.uint32(16)).view(np.float32)


@inline
def _brain(image):
    return np.uint32(np.uint32(image) << np.uint32(16)).view(np.float32)


@inline
def _image16(value, digits, bias):
    """The 16 bits of the nearest number with so many digits behind the point, the even one of two as near."""
    bits = np.float64(value).view(np.int64)
    size, shift, infinite = bits & 0x7FFFFFFFFFFFFFFF, 52 - digits, (2 * bias + 1) << digits
    normal = ((size + (1 << (shift - 1)) - 1 + ((size >> shift) & 1)) >> shift) - ((1023 - bias) << digits)
    # Of numbers below the normal ones, an addition leaves no other digits than those that are kept.
    subnormal = np.float64(abs(value) * 2.0 ** (bias - 1 + digits) + 2.0**52).view(np.int64) & ((1 << 52) - 1)
    result = min(normal, infinite) if abs(value) >= 2.0 ** (1 - bias) else subnormal
    result = result if value == value else infinite | (1 << (digits - 1))
    return np.uint16(((bits >> 48) & 0x8000) | result)


# Of float32 the same in integers of 32 bits, of which a register holds twice as many: softmax of (1000, 1000) float16
# takes 0.46 ms instead of 0.58.


def _half_image_of_single(value):
    bits = np.float32(value).view(np.uint32)
    size = np.uint32(bits & 0x7FFFFFFF)
    odd = np.uint32(np.uint32(size >> np.uint32(13)) & 1)
    normal = np.uint32(np.uint32(size + odd + np.uint32(0x0FFF + (1 << 32) - (112 << 23))) >> np.uint32(13))
    subnormal = np.uint32(np.float32(abs(value) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    result = normal if size >= 113 << 23 else subnormal
    result = result if size < 143 << 23 else np.uint32(0x7C00)
    result = result if size <= 0x7F800000 else np.uint32(0x7E00)
    return np.uint16(np.uint32(bits >> np.uint32(16)) & 0x8000 | result)


def _brain_image_of_single(value):
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & 1)
    rounded = np.uint32(np.uint32(bits + odd + np.uint32(0x7FFF)) >> np.uint32(16))
    nan = np.uint32(np.uint32(bits >> np.uint32(16)) & 0x8000 | 0x7FC0)
    return np.uint16(rounded if np.uint32(bits & 0x7FFFFFFF) <= 0x7F800000 else nan)


def _half_image(value):
    """The 16 bits of the nearest float16."""


def _brain_image(value):
    """The 16 bits of the nearest bfloat16."""


@by_dtype(_half_image)
def _select_half_image(value):
    return _half_image_of_single if value == types.float32 else lambda value: _image16(value, 10, 15)


@by_dtype(_brain_image)
def _select_brain_image(value):
    return _brain_image_of_single if value == types.float32 else lambda value: _image16(value, 7, 127)


@inline
def _copy_groups(x, at, n, y, y_at, group):
    """Copy as many of n adjacent elements as fill groups of registers, converted by loads and stores; tell how many."""
    done = 0
    while done + lanes_in(group) <= n:
        store(y, y_at + done, load(x, at + done, group))
        done += lanes_in(group)
    return done


@inline
def _read_registers(x, at, n, y, y_at):
    return _copy_groups(x, at, n, y, y_at, group_of(y, 0.0))


def _write_registers(x, at, n, y, y_at):
    """The same for numbers; of float64 none, which no instruction rounds to 16 bits at once."""


@by_dtype(_write_registers)
def _select_write_registers(x, at, n, y, y_at):
    if x.dtype == types.float32:
        return lambda x, at, n, y, y_at: _copy_groups(x, at, n, y, y_at, group_of(x, 0.0))
    return lambda x, at, n, y, y_at: 0


@inline
def _no_registers(x, at, n, y, y_at):
    return 0


def _reader(decode, read_registers=_no_registers):
    """A function that copies rows of elements, both of them evenly apart, to adjacent numbers."""

    @jit
    def read(x, start, row_step, n_rows, step, n, like, y, y_at):
        for i in range(n_rows):
            row, at = start + i * row_step, y_at + i * n
            if step == 1:  # LLVM loads registers here, where no function does
                for j in range(read_registers(x, row, n, y, at), n):
                    y[at + j] = _rounded(like, decode(x[row + j]))
            else:
                for j in range(n):
                    y[at + j] = _rounded(like, decode(x[row + j * step]))

    return read


def _writer(encode, write_registers=_no_registers):
    """A function that copies adjacent numbers, rounded to the type that is computed in, to rows of elements."""

    @jit
    def write(x, x_at, like, y, start, row_step, n_rows, step, n):
        for i in range(n_rows):
            row, at = start + i * row_step, x_at + i * n
            if step == 1:
                for j in range(write_registers(x, at, n, y, row), n):
                    y[row + j] = encode(_rounded(like, x[at + j]))
            else:
                for j in range(n):
                    y[row + j * step] = encode(_rounded(like, x[at + j]))

    return write


_of_halves = (_read_registers, _write_registers) if HAS_HALF else (_no_registers, _no_registers)
_read_numbers, _read_truths = _reader(_number), _reader(_truth)
_read_halves, _read_brains = _reader(_half, _of_halves[0]), _reader(_brain, _read_registers)
_write_numbers = _writer(_number)
_write_halves, _write_brains = _writer(_half_image, _of_halves[1]), _writer(_brain_image, _write_registers)


@jit
def _read_floats(storage, address, start, row_step, n_rows, step, n, like, y, y_at):
    """Copy rows of n floating-point numbers, so many elements apart, in the type that is computed in."""
    rows, copy = (start, row_step, n_rows, step, n), (like, y, y_at)
    if storage == FLOAT32:
        _read_numbers(pointer_to(address, np.float32(0)), *rows, *copy)
    elif storage == FLOAT64:
        _read_numbers(pointer_to(address, 0.0), *rows, *copy)
    elif storage == FLOAT16:
        _read_halves(pointer_to(address, np.uint16(0)), *rows, *copy)
    else:
        _read_brains(pointer_to(address, np.int16(0)), *rows, *copy)


@jit
def read_any(storage, address, start, row_step, n_rows, step, n, like, y, y_at):
    """The same for any storage."""
    rows, copy = (start, row_step, n_rows, step, n), (like, y, y_at)
    if storage <= FLOAT64:
        _read_floats(storage, address, *rows, *copy)
    elif storage == BOOL:
        _read_truths(pointer_to(address, np.uint8(0)), *rows, *copy)
    elif storage == INT8:
        _read_numbers(pointer_to(address, np.int8(0)), *rows, *copy)
    elif storage == UINT8:
        _read_numbers(pointer_to(address, np.uint8(0)), *rows, *copy)
    elif storage == INT16:
        _read_numbers(pointer_to(address, np.int16(0)), *rows, *copy)
    elif storage == UINT16:
        _read_numbers(pointer_to(address, np.uint16(0)), *rows, *copy)
    elif storage == INT32:
        _read_numbers(pointer_to(address, np.int32(0)), *rows, *copy)
    elif storage == UINT32:
        _read_numbers(pointer_to(address, np.uint32(0)), *rows, *copy)
    elif storage == INT64:
        _read_numbers(pointer_to(address, np.int64(0)), *rows, *copy)
    else:
        _read_numbers(pointer_to(address, np.uint64(0)), *rows, *copy)


@jit
def write_block(x, x_at, like, storage, address, start, row_step, n_rows, step, n):
    """Copy adjacent numbers, rounded to the type that is computed in, to rows of n floating-point elements."""
    rows = start, row_step, n_rows, step, n
    if storage == FLOAT32:
        _write_numbers(x, x_at, like, pointer_to(address, np.float32(0)), *rows)
    elif storage == FLOAT64:
        _write_numbers(x, x_at, like, pointer_to(address, 0.0), *rows)
    elif storage == FLOAT16:
        _write_halves(x, x_at, like, pointer_to(address, np.uint16(0)), *rows)
    else:
        _write_brains(x, x_at, like, pointer_to(address, np.int16(0)), *rows)


@inline
def read_rows(storage, address, at, step, n_rows, n, like, y):
    """Copy rows of n adjacent elements, a step apart, one after the other."""
    if step == n:  # LLVM loads registers across their ends
        read_any(storage, address, at, 0, 1, 1, n_rows * n, like, y, 0)
    else:
        read_any(storage, address, at, step, n_rows, 1, n, like, y, 0)


@inline
def write_rows(x, like, storage, address, at, step, n_rows, n):
    """Copy elements to rows of n adjacent ones, a step apart."""
    if step == n:
        write_block(x, 0, like, storage, address, at, 0, 1, 1, n_rows * n)
    else:
        write_block(x, 0, like, storage, address, at, step, n_rows, 1, n)


@jit
def read_float(storage, address, at, like, y):
    _read_floats(storage, address, at, 0, 1, 1, 1, like, y, 0)


@jit
def write_one(x, like, storage, address, at):
    write_block(x, 0, like, storage, address, at, 0, 1, 1, 1)


def _collectors(read):
    """Functions that copy n elements of a row to adjacent ones, and of each row of a strip."""

    @jit
    def collect_row(storage, address, at, reduced, n_reduced, first, n, like, y, y_at):
        done = 0
        while done < n:
            start, step, size = stretch_of(reduced, n_reduced, first + done, n - done, X)
            read(storage, address, at + start, 0, 1, step, size, like, y, y_at + done)
            done += size

    @jit
    def collect_strip(storage, address, at, reduced, n_reduced, columns, width, first, n, like, y):
        if columns == 1:
            collect_row(storage, address, at, reduced, n_reduced, first, n, like, y, 0)
        else:
            read(storage, address, at + first * reduced[X], reduced[X], n, 1, width, like, y, 0)

    return collect_row, collect_strip


# Where integers do not come, half of the code need not be compiled.
collect_any, collect_strip_of_any = _collectors(read_any)
collect_floats, collect_strip_of_floats = _collectors(_read_floats)


@jit
def read_part(row, first, n, x):
    """Copy n elements of a row of floating-point numbers."""
    collect_floats(row.storage, row.address, row.at, row.reduced, row.n_reduced, first, n, x, x, 0)


@jit
def write_part(x, row, y, y_at, first, n):
    """Copy n numbers to their place in a row of an output, of the same storage and dimensions."""
    distribute_stored(x, 0, x, row.storage, y, y_at, row.reduced, row.n_reduced, first, n)


@jit
def distribute_stored(x, x_at, like, storage, address, at, reduced, n_reduced, first, n):
    """Copy adjacent elements to a row of any strides."""
    done = 0
    while done < n:
        start, step, size = stretch_of(reduced, n_reduced, first + done, n - done, Y)
        write_block(x, x_at + done, like, storage, address, at + start, 0, 1, step, size)
        done += size


@jit
def hide_strip(values, mask, at, reduced, n_reduced, width, column_step, first, n, fill):
    """Fill the masked ones of n elements of each of `width` rows."""
    inner, step = reduced[(n_reduced - 1) * COLUMNS + SIZE], reduced[(n_reduced - 1) * COLUMNS + X]
    done = 0
    while done < n:
        run = min(inner - (first + done) % inner, n - done)
        start = at + offset_of(first + done, reduced, n_reduced, X)
        # Values are loaded either way, so that LLVM makes no branches, which random masks mislead.
        if width == 1:
            for i in range(run):
                value = values[done + i]
                values[done + i] = value if mask[start + i * step] else fill
        else:
            for i in range(run):
                for j in range(width):
                    value = values[(done + i) * width + j]
                    values[(done + i) * width + j] = value if mask[start + i * step + j * column_step] else fill
        done += run


@inline
def storage_of(like):
    """That of elements of the type that is computed in."""
    return FLOAT32 if itemsize_of(like) == 4 else FLOAT64


@inline
def place_of_strip(strip, columns, kept, n_kept):
    """The run of adjacent rows that a strip is in, its first column there, its width, and the dimensions of runs."""
    if columns == 1:
        return strip, 0, 1, n_kept
    inner = kept[(n_kept - 1) * COLUMNS + SIZE]
    per_run = (inner + columns - 1) // columns
    column = strip % per_run * columns
    return strip // per_run, column, min(columns, inner - column), n_kept - 1


@jit
def distribute_strip(x, like, storage, address, at, reduced, n_reduced, columns, width, first, n):
    """Copy n elements to each row of a strip."""
    if columns == 1:
        distribute_stored(x, 0, like, storage, address, at, reduced, n_reduced, first, n)
        return
    write_block(x, 0, like, storage, address, at + first * reduced[Y], reduced[Y], n, 1, width)
