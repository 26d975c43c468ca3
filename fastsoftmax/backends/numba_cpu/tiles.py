"""Kernels for tiles: as many rows side by side as a register has lanes, so that register j holds element j of each.

Adjacent rows, as where the reduced axis is not the last, lie in memory like this; a *strip* of them, some tiles wide,
is copied to a scratch, for where rows of the array are a power of two apart they evict each other. Short rows are
turned on their side for it: one of ten elements would leave most lanes empty. There is a sum for each of the lanes that
the elements of a row alone would have, so that its bits are the same.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import register_jitable

from fastsoftmax import _state

from . import rows
from .jit import by_dtype, inline, jit, jit_entry
from .registers import (
    BLOCK_BYTES,
    GROUP,
    HAS_HALF,
    REGISTER_BYTES,
    address_of,
    any_of,
    filled,
    fma,
    group_of,
    itemsize_of,
    lane,
    lanes_in,
    lanes_of,
    load,
    parts,
    pointer_to,
    prefetch,
    prefetch_far,
    read_blocks,
    read_narrow_blocks,
    register_of,
    stack_memory,
    store,
    stream,
    turn,
    where,
    write_blocks,
)
from .rows import (
    BYTES_OF_STATE,
    BYTES_OF_WORK,
    COLUMNS,
    LOG_SOFTMAX,
    LOGSUMEXP,
    SIZE,
    SOFTMAX,
    Folded,
    X,
    Y,
    add_registers,
    chunk_of,
    counted_smallest,
    differences,
    folded_of,
    lacking,
    load_smallest,
    load_state,
    load_within,
    log_sums_of_row,
    make_work,
    needs_mending,
    no_ending,
    of_group,
    offset_of,
    put_log_sums,
    replaced,
    state_in,
    store_state,
    store_within,
    to_boundary,
    with_top,
    without_top,
    write_copies,
)
from .stored import BFLOAT16, FLOAT16, read_any, read_rows, storage_of, write_block, write_rows
from .terms import (
    Ending,
    Reference,
    constants,
    exp_and_mend,
    exp_and_scale,
    exp_parts,
    is_below_mended,
    maximum,
    minimum,
    normalize,
    reference_at,
    scale,
    scale_untied,
    size_of,
    subtract,
    sum_base,
    term_at,
    two_sum,
)

STRIP_BYTES = 512  # of each row of the array
FIELDS = 7  # registers of an ending
ENDINGS_BYTES, STATES_BYTES = FIELDS * STRIP_BYTES, BYTES_OF_STATE * STRIP_BYTES // 4
ROOMS_BYTES = 4 * STRIP_BYTES  # for a number of each row: logarithms of sums, an element on its way, extremes
PREFETCHED_LINES = 16  # how many rows of the array ahead a strip fetches what it writes
# The next strip is fetched while one is computed, if it would stay in a second-level cache.
STAYING_BYTES = 524288
PREFETCHED_ROWS = 8  # how many rows of the array ahead the next are fetched: strides are too long for the processor to


def bytes_of_tile(n):
    """Scratch memory of `run_turned`: a group of tiles, and its rows, whose last block may end behind them."""
    return 2 * max(n, BLOCK_BYTES // 4) * GROUP * REGISTER_BYTES + BLOCK_BYTES


@register_jitable
def count_strips(inner, itemsize, streaming):
    """The strips of so many adjacent rows; the last may be empty where the first may leave out some."""
    most_left_out = REGISTER_BYTES // itemsize - 1 if streaming else 0
    return -(-(inner + most_left_out) * itemsize // STRIP_BYTES)


def bytes_of_strip(n, itemsize):
    """Scratch memory of `run_strips`."""
    return ENDINGS_BYTES + ROOMS_BYTES + STATES_BYTES + STRIP_BYTES * (min(n, rows.CHUNK_BYTES // itemsize) + 1)


@jit
def extremes_of_tile(tile, n):
    top, bottom = register_of(tile, -math.inf), register_of(tile, math.inf)
    for element in range(n):
        v = load(tile, element * lanes_in(top), top)
        top, bottom = maximum(v, top), minimum(v, bottom)  # in this order a NaN is passed over
    return top, bottom


class Upcoming(NamedTuple):
    """What is probably read next, fetched while terms are computed: a register for each element, a step apart."""

    x: Any
    at: int
    step: int


@inline
def fold_elements(logits, high, low, reference):
    """Terms, and the sums with them, each register its own."""
    head, factor, rest = exp_parts(logits, reference)
    term = fma(factor, rest, head)
    total = high + term
    return term, total, low + fma(factor, rest, head - (total - high))


def sum_tile(tile, n, reference, keep, upcoming, work):
    """The sums of the rows; with `keep`, terms take the place of logits."""


@by_dtype(sum_tile)
def _select_sum_tile(tile, n, reference, keep, upcoming, work):
    return _sum_one_tile if reference.types[2].lanes == lanes_of(tile.dtype) else _sum_tiles


def _sum_tiles(tile, n, reference, keep, upcoming, work):
    """The same for a group of tiles of short rows, an element after the other.

    High parts add up exactly, so that there is one for all lanes.
    """
    zero = filled(reference.magic, 0.0)
    base, width, n_lanes = sum_base(zero, n), lanes_in(zero), lanes_in(register_of(tile, 0.0))
    used, high = min(n, n_lanes), zero + base
    for element in range(n):
        # All lines: with the first of each row alone, (300000, 37) float32 take a quarter longer.
        prefetch_far(upcoming.x, upcoming.at + element * upcoming.step, zero)
        low, place = zero, element % n_lanes * width
        if element >= n_lanes:
            low = load(work.lows, place, zero)
        term, high, low = fold_elements(load(tile, element * width, zero), high, low, reference)
        store(work.lows, place, low)
        if keep:
            store(tile, element * width, term)
    distance = n_lanes // 2
    while distance:  # as `add_registers`
        for i in range(min(distance, used - distance)):
            at, other = i * width, (i + distance) * width
            store(work.lows, at, load(work.lows, at, zero) + load(work.lows, other, zero))
        used = min(used, distance)
        distance //= 2
    return high - base, load(work.lows, 0, zero)


def _sum_one_tile(tile, n, reference, keep, upcoming, work):
    like, wide, references = register_of(tile, 0.0), group_of(tile, 0.0), of_group(reference)
    base = sum_base(like, n)
    width, used = lanes_in(like), min(n, lanes_in(like))
    for i in range(used):
        store(work.highs, i * width, like + base)
        store(work.lows, i * width, like)
    done = 0
    while done + lanes_in(wide) <= n * width:
        place = done % (width * width)
        high, low = load(work.highs, place, wide), load(work.lows, place, wide)
        term, high, low = fold_elements(load(tile, done, wide), high, low, references)
        store(work.highs, place, high)
        store(work.lows, place, low)
        if keep:
            store(tile, done, term)
        for element in range(done // width, (done + lanes_in(wide)) // width):
            prefetch_far(upcoming.x, upcoming.at + element * upcoming.step, like)
        done += lanes_in(wide)
    while done < n * width:
        place = done % (width * width)
        high, low = load(work.highs, place, like), load(work.lows, place, like)
        term, high, low = fold_elements(load(tile, done, like), high, low, reference)
        store(work.highs, place, high)
        store(work.lows, place, low)
        if keep:
            store(tile, done, term)
        done += width
    for i in range(used):
        store(work.highs, i * width, load(work.highs, i * width, like) - base)
    return add_registers(like, used, work)


@jit
def sum_others_of_tile(tile, n, largest, reference, work):
    """The sums of the rows without their maxima, which may be far smaller than the maxima's terms."""
    like = filled(largest, 0.0)
    width, n_lanes = lanes_in(like), lanes_in(register_of(tile, 0.0))
    used = min(n, n_lanes)
    for i in range(used):
        store(work.highs, i * width, like)
        store(work.lows, i * width, like)
    for element in range(n):
        place = element % n_lanes * width
        logits = load(tile, element * width, like)
        term, term_low = term_at(logits, reference)
        high, error = two_sum(load(work.highs, place, like), where(logits == largest, 0.0, term))
        store(work.highs, place, high)
        store(work.lows, place, load(work.lows, place, like) + (error + where(logits == largest, 0.0, term_low)))
    return add_registers(like, used, work)


@jit
def fold_tile(tile, largest, count, n, keep, upcoming, work):
    """Fold `count` rows with these maxima; with `keep`, terms take the place of logits."""
    reference = reference_at(largest)
    width = lanes_in(largest)
    infinite = any_of(size_of(largest) > constants(tile).largest)
    nans = filled(largest, 0.0)
    if infinite:
        for element in range(n):
            v = load(tile, element * width, nans)
            nans = where(v == v, nans, math.nan)
    high, low = sum_tile(tile, n, reference, keep, upcoming, work)
    if infinite:
        is_finite = size_of(largest) <= constants(tile).largest
        high, low = where(is_finite, high, nans), where(is_finite, low, 0.0)
    return Folded(largest, high, low, reference)


@jit
def fold_others_of_tile(tile, largest, count, n, upcoming, work):
    """Fold rows without their maxima."""
    folded = without_top(fold_tile(tile, largest, count, n, False, upcoming, work))
    lacks = lacking(folded, count)
    if not any_of(lacks):
        return folded
    return replaced(folded, lacks, sum_others_of_tile(tile, n, folded.largest, folded.reference, work))


@jit
def end_of_tile(function, tile, largest, count, n, keep, log_sums, upcoming, work):
    """Fold `count` rows, and give what ends their elements; for softmax, with `keep`, the tile then holds terms."""
    if function == SOFTMAX:
        folded = fold_tile(tile, largest, count, n, keep, upcoming, work)
        return normalize(folded.largest, folded.high, folded.low, folded.reference)
    folded = fold_others_of_tile(tile, largest, count, n, upcoming, work)
    of_others, of_rows = put_log_sums(folded, work)
    end = differences(folded.largest, load(of_others, 0, folded.largest), folded.reference)
    for row in range(count):
        log_sums[row] = of_rows[row]
    return end


def _finisher(operation):
    """A function that makes results of the n elements of a tile."""

    @jit
    def finish(tile, n, end):
        for element in range(n):
            at = element * lanes_in(end.factor)
            store(tile, at, operation(load(tile, at, end.factor), end))

    return finish


finish_with_scale, finish_untied, finish_with_mending, finish_with_subtract = map(
    _finisher, (scale, scale_untied, exp_and_mend, subtract)
)


@inline
def turn_to_tile(x, at, step, count, n, tile, first_row, together):
    """Turn rows to columns of a group of tiles; zeros where no row is left: what lies there may be slow."""
    width, length = lanes_in(register_of(tile, 0.0)), BLOCK_BYTES // itemsize_of(tile)
    if count < width:
        for column in range(0, n, width):
            size, place = min(width, n - column), column * together + first_row
            turn(x, at + column, step, count, size, tile, place, together, size, width)
    elif n < length:  # by squares, of which they fill little, 2 million rows of 3 take half as long again
        read_narrow_blocks(x, at, step, n, tile, first_row, together)
    else:
        for column in range(0, n, length):
            first = min(column, n - length)  # the last block may overlap the one before
            read_blocks(x, at + first, step, n, tile, first * together + first_row, together)


@inline
def turn_from_tile(tile, first_row, together, count, n, y, at, step, has_room):
    """The reverse; rows shorter than a block are written with what is behind, if that `has_room`."""
    width, length = lanes_in(register_of(tile, 0.0)), BLOCK_BYTES // itemsize_of(tile)
    if count < width or (n < length and not has_room):
        for column in range(0, n, width):
            size, place = min(width, n - column), column * together + first_row
            turn(tile, place, together, size, width, y, at + column, step, count, size)
    else:
        for column in range(0, n, length):
            first = max(min(column, n - length), 0)
            write_blocks(tile, first * together + first_row, together, y, at + first, step)


@jit_entry
def run_turned(
    like, function, streaming, storages, x_address, y_address, tables, n_kept, n_reduced, n, first, end, scratch
):
    """Run short rows, which lie a step apart. Others than those of the type that is computed in are converted.

    Tiles go in groups, side by side: what comes between the passes over one alone is a chain of some two hundred
    operations that wait for each other. (100000, 10) float32 take 30 % less time.
    """
    x, y, kept = pointer_to(x_address, like), pointer_to(y_address, like), pointer_to(tables, 0)
    x_step, y_step = kept[X], kept[Y]
    work, tile = make_work(stack_memory(BYTES_OF_WORK), like), pointer_to(scratch, like)
    width, nothing = lanes_in(register_of(x, 0.0)), group_of(x, -math.inf)
    together = lanes_in(nothing)
    room = max(n, BLOCK_BYTES // itemsize_of(tile)) * together
    converted = pointer_to(address_of(tile, room), like)
    is_read, is_written = storages[0] == storage_of(x), storages[1] == storage_of(x)
    for row in range(first, end, together):
        count = min(together, end - row)
        source, source_at, source_step = x, row * x_step, x_step
        if not is_read:
            source, source_at, source_step = converted, 0, n
            read_rows(storages[0], x_address, row * x_step, x_step, count, n, like, converted)
        for first_row in range(0, together, width):
            height, at = max(min(width, count - first_row), 0), source_at + first_row * source_step
            turn_to_tile(source, at, source_step, height, n, tile, first_row, together)
        largest, smallest = nothing, filled(nothing, math.inf)
        for element in range(n):
            v = load(tile, element * together, nothing)
            largest, smallest = maximum(v, largest), minimum(v, smallest)  # in this order a NaN is passed over
        mends = function == SOFTMAX and needs_mending(tile, 0, n * together, smallest, largest, n)
        upcoming = Upcoming(x, (row + together) * x_step, together) if is_read else Upcoming(tile, 0, 0)
        ending = end_of_tile(function, tile, largest, count, n, not mends, work.tops, upcoming, work)
        if function == LOGSUMEXP:
            write_block(work.tops, 0, like, storages[1], y_address, row * y_step, 0, 1, y_step, count)
            continue
        if function == LOG_SOFTMAX:
            finish_with_subtract(tile, n, ending)
        elif mends:
            finish_with_mending(tile, n, ending)
        elif any_of(ending.limit < math.inf):
            finish_with_scale(tile, n, ending)
        else:
            finish_untied(tile, n, ending)
        is_direct = is_written and not streaming
        target, target_at, target_step = (y, row * y_step, y_step) if is_direct else (converted, 0, n)
        for first_row in range(0, count, width):
            height, at = min(width, count - first_row), target_at + first_row * target_step
            has_room = not is_direct or (y_step == n and first_row + 2 * width <= count)
            turn_from_tile(tile, first_row, together, height, n, target, at, target_step, has_room)
        if streaming:  # (300000, 32) float32 take 30 % less
            write_copies(converted, 0, y, row * y_step, count * n, no_ending(y), True)
        elif not is_written:
            write_rows(converted, like, storages[1], y_address, row * y_step, y_step, count, n)


# Strips


@inline
def columns_of_strip(x):
    return STRIP_BYTES // itemsize_of(x)


class StripSource(NamedTuple):
    """Where adjacent rows lie, a step from one element to the next."""

    storage: int
    address: int
    at: int
    step: int
    like: Any
    row: Any  # room for an element of each
    maxima: Any  # of the rows, as they are copied
    minima: Any


@jit
def copy_strip(source, first, n_columns, n, tiles, tile_size):
    """Copy n elements of each row, from `first` on, to tiles, and find the extremes of those that are not NaN."""
    x, at = pointer_to(source.address, source.like), source.at + first * source.step
    nothing = register_of(x, -math.inf)
    width = lanes_in(nothing)
    if source.storage == storage_of(x):
        copy_columns(x, at, source, n_columns, n, tiles, tile_size)
        return
    if source.storage == FLOAT16 and HAS_HALF:
        copy_columns(pointer_to(source.address, np.uint16(0)), at, source, n_columns, n, tiles, tile_size)
        return
    if source.storage == BFLOAT16:
        copy_columns(pointer_to(source.address, np.int16(0)), at, source, n_columns, n, tiles, tile_size)
        return
    for element in range(n):
        at_element = at + element * source.step
        read_any(source.storage, source.address, at_element, 0, 1, 1, n_columns, source.like, source.row, 0)
        for t in range((n_columns + width - 1) // width):
            logits = load_within(source.row, t * width, n_columns - t * width, nothing)
            store(tiles, t * tile_size + element * width, logits)
    for t in range((n_columns + width - 1) // width):
        tile = pointer_to(address_of(tiles, t * tile_size), tiles)
        top, bottom = extremes_of_tile(tile, n)
        store(source.maxima, t * width, top)
        store(source.minima, t * width, bottom)


@inline
def copy_columns(x, at, source, n_columns, n, tiles, tile_size):
    """`copy_strip` for elements that loads convert, a group of tiles at a time."""
    nothing, wide = register_of(tiles, -math.inf), group_of(tiles, -math.inf)
    width, column = lanes_in(nothing), 0
    while column + lanes_in(wide) <= n_columns:
        copy_tiles(x, at + column, source, lanes_in(wide), n, tiles, column // width, tile_size, wide)
        column += lanes_in(wide)
    while column < n_columns:
        count = n_columns - column
        copy_tiles(x, at + column, source, count, n, tiles, column // width, tile_size, nothing)
        column += width


@jit
def copy_tiles(x, at, source, count, n, tiles, t, tile_size, nothing):
    """`copy_strip` for up to as many columns as `nothing` has lanes, which make tiles from the t-th on."""
    top, bottom, width, step = nothing, filled(nothing, math.inf), lanes_in(register_of(tiles, 0.0)), source.step
    for element in range(n):
        prefetch(x, at + (element + PREFETCHED_ROWS) * step, nothing)
        # Rows that are no multiple of a line apart end in one line more.
        prefetch(x, at + (element + PREFETCHED_ROWS) * step + lanes_in(nothing) - 1, register_of(x, 0.0))
        logits = load_within(x, at + element * step, count, nothing)
        top, bottom = maximum(logits, top), minimum(logits, bottom)  # in this order a NaN is passed over
        of_tiles = parts(logits)
        for j in range(len(of_tiles)):
            store(tiles, (t + j) * tile_size + element * width, of_tiles[j])
    store(source.maxima, t * width, top)
    store(source.minima, t * width, bottom)


@jit
def strip_needs_mending(source, n_columns, n, tiles, tile_size):
    """Whether any of the rows of a strip has probabilities that are to be mended."""
    like = register_of(tiles, 0.0)
    width = lanes_in(like)
    for t in range((n_columns + width - 1) // width):
        tile = pointer_to(address_of(tiles, t * tile_size), tiles)
        smallest, largest = load(source.minima, t * width, like), load(source.maxima, t * width, like)
        if needs_mending(tile, 0, n * width, smallest, largest, n):
            return True
    return False


@inline
def load_ending(endings, t):
    like = register_of(endings, 0.0)
    at = t * FIELDS * lanes_in(like)
    width = lanes_in(like)
    return Ending(
        Reference(load(endings, at, like), load(endings, at + width, like), load(endings, at + 2 * width, like)),
        load(endings, at + 3 * width, like),
        load(endings, at + 4 * width, like),
        load(endings, at + 5 * width, like),
        load(endings, at + 6 * width, like),
    )


@inline
def store_ending(endings, t, end):
    width = lanes_in(end.factor)
    at = t * FIELDS * width
    store(endings, at, end.reference.offset)
    store(endings, at + width, end.reference.floor)
    store(endings, at + 2 * width, end.reference.magic)
    store(endings, at + 3 * width, end.factor)
    store(endings, at + 4 * width, end.factor_low)
    store(endings, at + 5 * width, end.limit)
    store(endings, at + 6 * width, end.share)


@jit
def put_ending(endings, column, end):
    """Set the ending of one row to that in the first lane."""
    width = lanes_in(end.factor)
    at = column // width * FIELDS * width + column % width
    endings[at] = lane(end.reference.offset, 0)
    endings[at + width] = lane(end.reference.floor, 0)
    endings[at + 2 * width] = lane(end.reference.magic, 0)
    endings[at + 3 * width] = lane(end.factor, 0)
    endings[at + 4 * width] = lane(end.factor_low, 0)
    endings[at + 5 * width] = lane(end.limit, 0)
    endings[at + 6 * width] = lane(end.share, 0)


def _strip_writer(operation):
    """A function that writes n elements of adjacent rows from tiles."""

    @inline
    def put(tiles, tile_at, end, y, at, streams):
        v = operation(load(tiles, tile_at, register_of(tiles, 0.0)), end)
        if streams:
            stream(y, at, v)
        else:
            store(y, at, v)

    @jit
    def write(tiles, tile_size, n_columns, n, endings, y, at, step, streaming):
        width, t, n_whole = lanes_in(register_of(y, 0.0)), 0, n_columns // lanes_in(register_of(y, 0.0))
        streams = streaming and to_boundary(y, at) == 0 and step % width == 0
        while t + 4 <= n_whole:  # whose endings stay in registers
            a, b = load_ending(endings, t), load_ending(endings, t + 1)
            c, d = load_ending(endings, t + 2), load_ending(endings, t + 3)
            for element in range(n):
                tile_at, row = t * tile_size + element * width, at + element * step + t * width
                if not streams:
                    prefetch(y, row + PREFETCHED_LINES * step, group_of(y, 0.0))
                    prefetch(y, row + PREFETCHED_LINES * step + 4 * width - 1, register_of(y, 0.0))
                put(tiles, tile_at, a, y, row, streams)
                put(tiles, tile_at + tile_size, b, y, row + width, streams)
                put(tiles, tile_at + 2 * tile_size, c, y, row + 2 * width, streams)
                put(tiles, tile_at + 3 * tile_size, d, y, row + 3 * width, streams)
            t += 4
        while t * width < n_columns:
            end, count = load_ending(endings, t), n_columns - t * width
            for element in range(n):
                v = operation(load(tiles, t * tile_size + element * width, register_of(tiles, 0.0)), end)
                store_within(y, at + element * step + t * width, count, v)
            t += 1

    return write


write_scaled_strip, write_recomputed_strip, write_mended_strip, write_different_strip = map(
    _strip_writer, (scale, exp_and_scale, exp_and_mend, subtract)
)


@jit
def write_strip(function, is_long, mends, tiles, tile_size, n_columns, n, endings, y, at, step, streaming):
    """Write results of a strip whose tiles hold terms, or elements if it is of long rows or `mends` probabilities."""
    if function == LOG_SOFTMAX:
        write_different_strip(tiles, tile_size, n_columns, n, endings, y, at, step, streaming)
    elif mends:
        write_mended_strip(tiles, tile_size, n_columns, n, endings, y, at, step, streaming)
    elif is_long:
        write_recomputed_strip(tiles, tile_size, n_columns, n, endings, y, at, step, streaming)
    else:
        write_scaled_strip(tiles, tile_size, n_columns, n, endings, y, at, step, streaming)


def write_stored_strip(of_tiles, place):
    """`write_strip` for results that are converted."""


@jit
def _write_by_rows(of_tiles, place):
    """A row of the array at a time, for any storage."""
    function, is_long, mends, tiles, tile_size, n_columns, n, endings = of_tiles
    storage, address, at, step, like, row = place
    width = lanes_in(register_of(row, 0.0))
    for element in range(n):
        of_element = pointer_to(address_of(tiles, element * width), tiles)
        write_strip(function, is_long, mends, of_element, tile_size, n_columns, 1, endings, row, 0, 0, False)
        write_block(row, 0, like, storage, address, at + element * step, 0, 1, 1, n_columns)


def _write_any(of_tiles, place):
    _write_by_rows(of_tiles, place)


def _write_16_bits(of_tiles, place):
    storage, address, at, step, _, _ = place
    if storage == FLOAT16 and HAS_HALF:
        write_strip(*of_tiles, pointer_to(address, np.uint16(0)), at, step, False)
    elif storage == BFLOAT16:
        write_strip(*of_tiles, pointer_to(address, np.int16(0)), at, step, False)
    else:
        _write_by_rows(of_tiles, place)


@by_dtype(write_stored_strip)
def _select_write_stored_strip(of_tiles, place):
    return _write_16_bits if of_tiles[3].dtype == types.float32 else _write_any  # stores convert float32 alone


@jit
def fold_long_strip(function, source, n_columns, n, tiles, tile_size, states, work):
    """Write the states of adjacent rows of more than a chunk."""
    width = lanes_in(register_of(tiles, 0.0))
    for first in range(0, n, chunk_of(tiles)):
        size = min(chunk_of(tiles), n - first)
        copy_strip(source, first, n_columns, size, tiles, tile_size)
        for t in range((n_columns + width - 1) // width):
            tile = pointer_to(address_of(tiles, t * tile_size), tiles)
            largest = load(source.maxima, t * width, register_of(tiles, 0.0))
            count, smallest = min(width, n_columns - t * width), largest
            if function == SOFTMAX:
                smallest = load(source.minima, t * width, largest)
                smallest = counted_smallest(tile, 0, size * width, smallest, largest)
                folded = without_top(fold_tile(tile, largest, count, size, False, Upcoming(tile, 0, 0), work))
            else:
                folded = fold_others_of_tile(tile, largest, count, size, Upcoming(tile, 0, 0), work)
            for row in range(count):
                state, column, least = state_in(folded, row), t * width + row, np.float64(lane(smallest, row))
                if first:
                    state = _state.merge(load_state(states, column), state, constants(tiles).state)
                    least = min(least, load_smallest(states, column))
                store_state(states, column, state, least)


@jit
def end_long_strip(function, n_columns, n, states, endings, log_sums):
    """Make endings of states, and tell whether probabilities are to be mended."""
    mends = False
    for column in range(n_columns):
        state = load_state(states, column)
        folded = folded_of(state, endings)
        if function == SOFTMAX:
            whole = with_top(folded)
            put_ending(endings, column, normalize(whole.largest, whole.high, whole.low, whole.reference))
            smallest = register_of(endings, load_smallest(states, column))
            mends = mends or is_below_mended(smallest, folded.largest, n)
        else:
            log_sum, log_sums[column] = log_sums_of_row(state, folded)
            put_ending(endings, column, differences(folded.largest, register_of(endings, log_sum), folded.reference))
    return mends


@jit_entry
def run_strips(
    like, function, streaming, storages, x_address, y_address, tables, n_kept, n_reduced, n, first_strip, end_strip,
    scratch,
):  # fmt: skip
    """Run strips of adjacent rows. Others than those of the type that is computed in are converted."""
    y, kept = pointer_to(y_address, like), pointer_to(tables, 0)
    work = make_work(stack_memory(BYTES_OF_WORK), like)
    width, room = lanes_in(register_of(y, 0.0)), scratch
    columns = columns_of_strip(y)
    endings, log_sums = pointer_to(room, like), pointer_to(room + ENDINGS_BYTES, like)
    row = pointer_to(room + ENDINGS_BYTES + STRIP_BYTES, like)
    maxima = pointer_to(room + ENDINGS_BYTES + 2 * STRIP_BYTES, like)
    minima = pointer_to(room + ENDINGS_BYTES + 3 * STRIP_BYTES, like)
    states = pointer_to(room + ENDINGS_BYTES + ROOMS_BYTES, 0.0)
    tiles = pointer_to(room + ENDINGS_BYTES + ROOMS_BYTES + STATES_BYTES, like)
    inner, x_step, y_step = kept[(n_kept - 1) * COLUMNS + SIZE], kept[n_kept * COLUMNS + X], kept[n_kept * COLUMNS + Y]
    per_inner = count_strips(inner, itemsize_of(y), streaming)
    # The first strip leaves out some columns, for the others to begin at a cache line.
    left_out = (width - to_boundary(y, 0)) % width if streaming else 0
    length, is_long = chunk_of(y), n > chunk_of(y)
    x, is_read, is_written = pointer_to(x_address, like), storages[0] == storage_of(y), storages[1] == storage_of(y)
    # One more than a chunk, for another set of the cache.
    tile_size = (min(n, length) + 1) * width
    for strip in range(first_strip, end_strip):
        column = max(strip % per_inner * columns - left_out, 0)
        n_columns = min((strip % per_inner + 1) * columns - left_out, inner) - column
        if n_columns <= 0:
            continue
        at = offset_of(strip // per_inner, kept, n_kept - 1, X) + column
        y_at = offset_of(strip // per_inner, kept, n_kept - 1, Y) + column
        next_at, next_step = at, 0
        if strip + 1 < end_strip and is_read and n * STRIP_BYTES < STAYING_BYTES:
            next_at = offset_of((strip + 1) // per_inner, kept, n_kept - 1, X)
            next_at += max((strip + 1) % per_inner * columns - left_out, 0)
            next_step = x_step
        source = StripSource(storages[0], x_address, at, x_step, like, row, maxima, minima)
        if is_long:
            fold_long_strip(function, source, n_columns, n, tiles, tile_size, states, work)
            mends = end_long_strip(function, n_columns, n, states, endings, log_sums)
        else:
            copy_strip(source, 0, n_columns, n, tiles, tile_size)
            mends = function == SOFTMAX and strip_needs_mending(source, n_columns, n, tiles, tile_size)
            for t in range((n_columns + width - 1) // width):
                tile = pointer_to(address_of(tiles, t * tile_size), like)
                results = pointer_to(address_of(log_sums, t * width), like)
                count, largest = min(width, n_columns - t * width), load(maxima, t * width, register_of(y, 0.0))
                upcoming = Upcoming(x, next_at + t * width, next_step)
                end = end_of_tile(function, tile, largest, count, n, not mends, results, upcoming, work)
                store_ending(endings, t, end)
        if function == LOGSUMEXP:
            write_block(log_sums, 0, like, storages[1], y_address, y_at, 0, 1, 1, n_columns)
            continue
        for first in range(0, n, length):
            size = min(length, n - first)
            if is_long:
                copy_strip(source, first, n_columns, size, tiles, tile_size)
            of_tiles = (function, is_long, mends, tiles, tile_size, n_columns, size, endings)
            if is_written:
                write_strip(*of_tiles, y, y_at + first * y_step, y_step, streaming)
            else:
                write_stored_strip(of_tiles, (storages[1], y_address, y_at + first * y_step, y_step, like, row))
