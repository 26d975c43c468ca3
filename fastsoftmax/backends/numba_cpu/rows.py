"""Kernels for rows of adjacent elements.

The unit of work is a *segment*: a row of up to a chunk, or a chunk of a longer row. Each is looked at twice, for its
maximum, which fixes the reference, and for its terms. Element j belongs to lane j % lanes; each lane adds up its
elements in order, in a high and a low part, and the lanes are added as a tree. What comes between the passes is a chain
of some two hundred operations that wait for each other; it is done for a batch of segments at once, a segment in each
lane.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastsoftmax import _state

from .jit import inline, jit, jit_entry
from .registers import (
    GROUP,
    REGISTER_BYTES,
    address_of,
    any_of,
    filled,
    first_lanes,
    fma,
    group_of,
    itemsize_of,
    lane,
    lanes_in,
    load,
    load_first,
    parts,
    pointer_to,
    prefetch_far,
    register_of,
    repeat,
    stack_memory,
    store,
    store_first,
    store_number,
    stream,
    turn,
    where,
    with_lane,
)
from .scalars import log1p
from .terms import (
    Ending,
    Reference,
    constants,
    exp_and_mend,
    exp_and_scale,
    exp_parts,
    exponent_of,
    is_below_mended,
    maximum,
    minimum,
    normalize,
    reference_at,
    rest_over_top,
    scale,
    size_of,
    subtract,
    sum_base,
    term_at,
    two_sum,
    vanishing_below,
)

# By number, as kernels know them.
SOFTMAX, LOG_SOFTMAX, LOGSUMEXP = range(3)
IN_OUTPUT, IN_SCRATCH, RECOMPUTE = range(3)

# Columns of the tables of dimensions.
SIZE, X, Y, COLUMNS = range(4)

CHUNK_BYTES = 32768
BATCH_BYTES = 65536
PREFETCHED_BYTES = 65536
# Up to this size of a row it is faster to finish log-probabilities in a scratch and stream those of many rows together
# than row by row: (100000, 128) float32 take 40 % less time, rows of 1000 the same, rows of 2000 8 % more.
SHARED_BYTES = 4096
MAX_LANES = 16
_SQUARE = GROUP * REGISTER_BYTES * MAX_LANES
BYTES_OF_WORK = 3 * _SQUARE + 4 * 8 * MAX_LANES + REGISTER_BYTES * MAX_LANES
FIELDS_OF_STATE = 4  # a state, and the smallest of its logits that counts
BYTES_OF_STATE = 8 * FIELDS_OF_STATE


class Work(NamedTuple):
    """Scratch memory of a batch: a group of registers for each lane of a row, and where its segments lie."""

    tops: Any
    highs: Any
    lows: Any
    places: Any
    sizes: Any
    terms: Any  # places, as the next
    results: Any
    smallest: Any  # registers of the smallest logits that count, one for each segment


class Folded(NamedTuple):
    """What is known of the segments of a batch, a segment in each lane; the sums are high + low."""

    largest: Any
    high: Any
    low: Any
    reference: Reference


def bytes_of_rows(n, itemsize, waiting, gathered):
    """Scratch memory of `run_rows`."""
    if n * itemsize > CHUNK_BYTES:
        states = bytes_of_states(-(-n * itemsize // CHUNK_BYTES))
        return states + (n * itemsize if waiting and not gathered else BATCH_BYTES)
    return max(BATCH_BYTES, n * itemsize) if waiting or gathered else 0


@inline
def make_work(memory, like):
    """Lay out scratch memory of BYTES_OF_WORK."""
    numbers = memory + 3 * _SQUARE
    return Work(
        pointer_to(memory, like),
        pointer_to(memory + _SQUARE, like),
        pointer_to(memory + 2 * _SQUARE, like),
        pointer_to(numbers, 0),
        pointer_to(numbers + 8 * MAX_LANES, 0),
        pointer_to(numbers + 16 * MAX_LANES, 0),
        pointer_to(numbers + 24 * MAX_LANES, 0),
        pointer_to(numbers + 32 * MAX_LANES, like),
    )


@inline
def to_boundary(x, at):
    """The number of elements up to the next multiple of a register's size in memory."""
    size = lanes_in(register_of(x, 0.0)) * itemsize_of(x)
    return (-address_of(x, at) & (size - 1)) // itemsize_of(x)


@inline
def reference_in(reference, index, x):
    """The reference in one lane, in all lanes."""
    return Reference(
        register_of(x, lane(reference.offset, index)),
        register_of(x, lane(reference.floor, index)),
        register_of(x, lane(reference.magic, index)),
    )


@inline
def ending_in(end, index, x):
    """The ending in one lane, in all lanes."""
    return Ending(
        reference_in(end.reference, index, x),
        register_of(x, lane(end.factor, index)),
        register_of(x, lane(end.factor_low, index)),
        register_of(x, lane(end.limit, index)),
        register_of(x, lane(end.share, index)),
    )


@inline
def differences(largest, log_sum, reference):
    """The ending of log-probabilities."""
    return Ending(reference, largest, log_sum, log_sum, log_sum)


@inline
def no_ending(x):
    """The ending of elements that are copied."""
    zero = register_of(x, 0.0)
    return differences(zero, zero, Reference(zero, zero, zero))


@inline
def of_group(reference):
    # Kernels hand registers to each other and make groups of them where they are used: then LLVM knows that the parts
    # are the same, and keeps one.
    return Reference(repeat(reference.offset), repeat(reference.floor), repeat(reference.magic))


@inline
def ending_of_group(end):
    return Ending(
        of_group(end.reference), repeat(end.factor), repeat(end.factor_low), repeat(end.limit), repeat(end.share)
    )


@inline
def load_within(x, at, n, fill):
    """The first n elements at a place, or as many as there are lanes."""
    return load(x, at, fill) if n >= lanes_in(fill) else load_first(x, at, n, fill)


@inline
def store_within(y, at, n, v):
    if n >= lanes_in(v):
        store(y, at, v)
    else:
        store_first(y, at, v, n)


@jit
def lane_extremes(x, at, n):
    """The maximum and the minimum of lanes over all elements that are not NaN; elements may be in any lane."""
    nothing, everything = group_of(x, -math.inf), group_of(x, math.inf)
    tops, bottoms, done = nothing, everything, 0
    # In this order of operands a NaN is passed over.
    if n >= 2 * lanes_in(nothing):  # elements may be looked at twice, so the first group ends wherever
        v = load(x, at, nothing)
        tops, bottoms, done = maximum(v, nothing), minimum(v, everything), to_boundary(x, at)
    while done + lanes_in(nothing) <= n:
        v = load(x, at + done, nothing)
        tops, bottoms = maximum(v, tops), minimum(v, bottoms)
        done += lanes_in(nothing)
    if done < n:
        tops = maximum(load_first(x, at + done, n - done, nothing), tops)
        bottoms = minimum(load_first(x, at + done, n - done, everything), bottoms)
    top, bottom = register_of(x, -math.inf), register_of(x, math.inf)
    for part in parts(tops):
        top = maximum(part, top)
    for part in parts(bottoms):
        bottom = minimum(part, bottom)
    return top, bottom


@inline
def counted_smallest(x, at, n, smallest, largest):
    """The smallest logits, but for those so far below the largest that their probability is 0, as masked ones are."""
    bound = vanishing_below(largest)
    return smallest_above(x, at, n, bound) if any_of(smallest < bound) else smallest


@jit
def smallest_above(x, at, n, bound):
    """The minimum of lanes over all elements above a bound, in a row or the rows of a tile."""
    least, done = filled(bound, math.inf), 0
    while done < n:
        v = load_within(x, at + done, n - done, filled(bound, -math.inf))
        least = where((v > bound) & (v < least), v, least)
        done += lanes_in(bound)
    return least


@inline
def needs_mending(x, at, n, smallest, largest, n_of_row):
    """Whether any of n logits may have a probability that is to be mended."""
    return is_below_mended(counted_smallest(x, at, n, smallest, largest), largest, n_of_row)


@inline
def fold_logits(logits, high, low, reference):
    """Terms, and the sums of the lanes with them.

    Sums begin at `sum_base` and stay above every term, so that what an addition loses is known after two subtractions
    (Dekker).
    """
    head, factor, rest = exp_parts(logits, reference)
    term = fma(factor, rest, head)
    heads, factors, rests, terms = parts(head), parts(factor), parts(rest), parts(term)
    for j in range(len(terms)):
        total = high + terms[j]
        low = low + fma(factors[j], rests[j], heads[j] - (total - high))  # of the unrounded term
        high = total
    return term, high, low


@inline
def sum_segment(x, at, n, smallest, reference, keep, terms, terms_at):
    """The sums of the lanes; with `keep`, the terms too. `smallest` are minima of the elements."""
    if any_of(smallest < reference.floor) or any_of(size_of(reference.offset) > 0.0):
        return sum_terms(x, at, n, group_of(x, -math.inf), of_group(reference), keep, terms, terms_at)
    # Two operations less: (1024, 1024) float32 take 8 % less.
    moderate = Reference(None, None, repeat(reference.magic))
    return sum_terms(x, at, n, repeat(reference.floor), moderate, keep, terms, terms_at)


@jit
def sum_terms(x, at, n, fill, wide, keep, terms, terms_at):
    """The sums of the lanes, where `fill` stands behind the end."""
    base = sum_base(fill, n)
    high, low = register_of(x, base), register_of(x, 0.0)
    done = 0
    while done < n:
        logits = load_within(x, at + done, n - done, fill)
        prefetch_far(x, at + done + PREFETCHED_BYTES // itemsize_of(x), fill)
        term, high, low = fold_logits(logits, high, low, wide)
        if keep:
            store_within(terms, terms_at + done, n - done, term)
        done += lanes_in(fill)
    return high - base, low


@jit
def sum_others(x, at, n, largest, reference):
    """The sums of the lanes without the one element that is the maximum. They may be far smaller than its term."""
    fill = register_of(x, -math.inf)
    high = low = register_of(x, 0.0)
    for done in range(0, n, lanes_in(fill)):
        logits = load_first(x, at + done, n - done, fill)
        term, term_low = term_at(logits, reference)
        high, error = two_sum(high, where(logits == largest, 0.0, term))
        low = low + (error + where(logits == largest, 0.0, term_low))
    return high, low


@jit
def add_lanes(x, work):
    """Turn the squares of sums and add up the lanes of each segment."""
    like = register_of(x, 0.0)
    width = lanes_in(like)
    turn(work.highs, 0, width, width, width, work.highs, 0, width, width, width)
    turn(work.lows, 0, width, width, width, work.lows, 0, width, width, width)
    return add_registers(like, width, work)


@jit
def add_registers(like, count, work):
    """The sum of the first registers, as a tree; the others, of as many as a row has lanes, are taken for 0."""
    width = lanes_in(like)
    distance = lanes_in(register_of(work.highs, 0.0)) // 2
    while distance:
        for i in range(min(distance, count - distance)):
            at, other = i * width, (i + distance) * width
            high, error = two_sum(load(work.highs, at, like), load(work.highs, other, like))
            low = load(work.lows, at, like) + (error + load(work.lows, other, like))
            store(work.highs, at, high)
            store(work.lows, at, low)
        count = min(count, distance)
        distance //= 2
    return load(work.highs, 0, like), load(work.lows, 0, like)


@jit
def find_maxima(x, count, work):
    """The maxima of segments, a segment in each lane; the minima of each go to where low sums will be."""
    like = register_of(x, 0.0)
    width = lanes_in(like)
    for s in range(width):
        top = bottom = like
        if s < count:
            top, bottom = lane_extremes(x, work.places[s], work.sizes[s])
        store(work.tops, s * width, top)
        store(work.lows, s * width, bottom)
    turn(work.tops, 0, width, width, width, work.tops, 0, width, width, width)
    largest = load(work.tops, 0, like)
    for i in range(1, width):
        largest = maximum(largest, load(work.tops, i * width, like))
    return largest


@jit
def fold_segments(x, count, of_softmax, keep, are_rows, terms, work):
    """Fold segments whole; with `keep`, their terms are stored, but for rows whose probabilities are to be mended."""
    largest = find_maxima(x, count, work)
    reference = reference_at(largest)
    like = register_of(x, 0.0)
    width = lanes_in(like)
    for s in range(width):
        high = low = like
        if s < count:
            smallest, top = load(work.lows, s * width, like), register_of(x, lane(largest, s))
            at, size, kept = work.places[s], work.sizes[s], keep
            if of_softmax:
                store(work.smallest, s * width, counted_smallest(x, at, size, smallest, top))
                kept = keep and not (are_rows and is_mended(x, s, largest, size, work))
            high, low = sum_segment(x, at, size, smallest, reference_in(reference, s, x), kept, terms, work.terms[s])
        store(work.highs, s * width, high)
        store(work.lows, s * width, low)
    high, low = add_lanes(x, work)
    if any_of(size_of(largest) > constants(x).largest):
        for s in range(count):
            if math.isinf(lane(largest, s)):
                high = with_lane(high, s, math.nan if has_nan(x, work.places[s], work.sizes[s]) else 0.0)
                low = with_lane(low, s, 0.0)
    return Folded(largest, high, low, reference)


@inline
def is_mended(x, s, largest, n, work):
    """Whether a segment that is a row of n has probabilities that are to be mended."""
    width = lanes_in(largest)
    return is_below_mended(load(work.smallest, s * width, largest), register_of(x, lane(largest, s)), n)


@inline
def without_top(folded):
    """Take the maximum's term out of sums."""
    largest, high, low, reference = folded
    top, top_low = term_at(largest, reference)
    others, error = two_sum(high, 0.0 - top)
    is_finite = size_of(largest) <= constants(high).largest
    return Folded(largest, where(is_finite, others, high), where(is_finite, (low - top_low) + error, low), reference)


@inline
def lacking(folded, count):
    """Which of the first `count` sums without a maximum are too small a difference for log1p."""
    top, _ = term_at(folded.largest, folded.reference)
    c = constants(top)
    return (folded.high < top * c.enough) & (size_of(folded.largest) <= c.largest) & first_lanes(count, top)


@inline
def replaced(folded, lacks, sums):
    """The same with other sums for some."""
    high, low = where(lacks, sums[0], folded.high), where(lacks, sums[1], folded.low)
    return Folded(folded.largest, high, low, folded.reference)


@jit
def fold_others(x, count, work):
    """Fold segments without their maxima."""
    folded = without_top(fold_segments(x, count, False, False, False, x, work))
    lacks = lacking(folded, count)
    if not any_of(lacks):
        return folded
    width = lanes_in(folded.high)
    for s in range(width):
        high = low = register_of(x, 0.0)
        if s < count:
            largest = register_of(x, lane(folded.largest, s))
            high, low = sum_others(x, work.places[s], work.sizes[s], largest, reference_at(largest))
        store(work.highs, s * width, high)
        store(work.lows, s * width, low)
    return replaced(folded, lacks, add_lanes(x, work))


@jit
def has_nan(x, at, n):
    seen, done = register_of(x, 0.0), 0
    while done < n:
        v = load_within(x, at + done, n - done, register_of(x, 0.0))
        seen = where(v == v, seen, 1.0)
        done += lanes_in(seen)
    return any_of(seen > 0.0)


@inline
def log_sum_of(largest, high, ratio, ratio_low):
    """log(sum(exp(x - maximum))) in two parts, 0 where the maximum is infinite, so that it alone decides."""
    # The low part may be a thousandth of the ratio, whose square would be seen.
    total, error = _state.two_sum(np.float64(ratio), np.float64(ratio_low))
    log_sum, low = log1p(total, error)
    is_finite = not math.isinf(largest)
    log_sum, low = log_sum if is_finite else 0.0, low if is_finite else 0.0
    return math.nan if math.isnan(high) else log_sum, low


@inline
def add_log_sums(largest, log_sum, low):
    """The maximum plus the logarithm of the sum."""
    total, error = _state.two_sum(np.float64(largest), log_sum)
    precise = total + (error + low)
    return precise if abs(total) < math.inf else total


@inline
def put_log_sums(folded, work):
    """Give log(sum(exp(x - maximum))) of each segment, rounded, and log(sum(exp(x))), one after the other.

    They are found in a loop over lanes, which LLVM vectorises: 100,000 rows of 10 elements take a third of the time.
    """
    width = lanes_in(folded.high)
    largest, high, ratio, ratio_low = work.highs, work.lows, work.highs, work.lows
    ratios, ratios_low = rest_over_top(folded.largest, folded.high, folded.low, folded.reference)
    store(largest, 0, folded.largest)
    store(high, 0, folded.high)
    store(ratio, width, ratios)
    store(ratio_low, width, ratios_low)
    for s in range(width):
        log_sum, low = log_sum_of(largest[s], high[s], ratio[width + s], ratio_low[width + s])
        work.tops[s], work.tops[width + s] = log_sum + low, add_log_sums(largest[s], log_sum, low)
    return work.tops, pointer_to(address_of(work.tops, width), work.tops)


@inline
def leave(v, end):
    return v


def _writer(operation):
    """A function that writes n elements of the output, past the caches if `streaming`."""

    @jit
    def write(source, at, y, y_at, n, end, streaming):
        one, many, wide = register_of(y, 0.0), group_of(y, 0.0), ending_of_group(end)
        # Up to the first whole register of the output, or every store would cross a cache line.
        count = min(n, to_boundary(y, y_at))
        if count and (streaming or n >= 2 * lanes_in(many)):
            store_first(y, y_at, operation(load_first(source, at, count, one), end), count)
            at, y_at, n = at + count, y_at + count, n - count
        done = 0
        while done + lanes_in(many) <= n:
            v = operation(load(source, at + done, many), wide)
            if streaming:
                stream(y, y_at + done, v)
            else:
                store(y, y_at + done, v)
            done += lanes_in(many)
        while done < n:
            v = operation(load_within(source, at + done, n - done, one), end)
            if streaming and done + lanes_in(one) <= n:
                stream(y, y_at + done, v)
            else:
                store_within(y, y_at + done, n - done, v)
            done += lanes_in(one)

    return write


write_scaled, write_recomputed, write_mended, write_differences, write_copies = map(
    _writer, (scale, exp_and_scale, exp_and_mend, subtract, leave)
)


@jit
def run_batch(function, x, y, count, n, terms, streaming, work):
    """Run rows of one segment each; exponentials wait in `terms`, and results that are streamed together."""
    # Where rows follow each other, a cache line that two of them share would be written in parts.
    together = streaming and work.results[count - 1] - work.results[0] == (count - 1) * n
    if function == SOFTMAX:
        folded = fold_segments(x, count, True, True, True, terms, work)
        end = normalize(folded.largest, folded.high, folded.low, folded.reference)
        for s in range(count):
            of_row, mends = ending_in(end, s, x), is_mended(x, s, folded.largest, n, work)
            if mends and together:
                write_mended(x, work.places[s], terms, work.terms[s], n, of_row, False)
            elif mends:
                write_mended(x, work.places[s], y, work.results[s], n, of_row, streaming)
            elif together:
                write_scaled(terms, work.terms[s], terms, work.terms[s], n, of_row, False)
            else:
                write_scaled(terms, work.terms[s], y, work.results[s], n, of_row, streaming)
        if together:
            write_copies(terms, work.terms[0], y, work.results[0], count * n, no_ending(x), True)
        return
    folded = fold_others(x, count, work)
    of_others, log_sums = put_log_sums(folded, work)
    together = together and n * itemsize_of(x) <= SHARED_BYTES
    for s in range(count):
        end = differences(register_of(x, lane(folded.largest, s)), register_of(x, of_others[s]), folded.reference)
        if function == LOGSUMEXP:
            store_number(y, work.results[s], log_sums[s])
        elif together:
            write_differences(x, work.places[s], terms, work.terms[s], n, end, False)
        else:
            write_differences(x, work.places[s], y, work.results[s], n, end, streaming)
    if function == LOG_SOFTMAX and together:
        write_copies(terms, work.terms[0], y, work.results[0], count * n, no_ending(x), True)


@inline
def offset_of(index, dimensions, count, column):
    """Where, in elements, the index-th of the positions that the dimensions enumerate lies."""
    offset = 0
    for d in range(count - 1, 0, -1):
        outer = index // dimensions[d * COLUMNS + SIZE]
        offset += (index - outer * dimensions[d * COLUMNS + SIZE]) * dimensions[d * COLUMNS + column]
        index = outer
    return offset + index * dimensions[column] if count else offset


@inline
def chunk_of(x):
    """Elements to a chunk."""
    return CHUNK_BYTES // itemsize_of(x)


@inline
def count_chunks(x, n):
    return (n + chunk_of(x) - 1) // chunk_of(x)


@inline
def bytes_of_states(n_chunks):
    return (n_chunks * BYTES_OF_STATE + 63) // 64 * 64


@inline
def rows_together(x, n, n_bytes=BATCH_BYTES):
    """Rows to a batch of so many bytes."""
    return max(1, min(n_bytes // (n * itemsize_of(x)), lanes_in(register_of(x, 0.0))))


@inline
def stretch_of(dimensions, count, first, n, column):
    """How the next of n elements of a row lie, from the first on: where, how far apart, and how many of them so."""
    inner, step = dimensions[(count - 1) * COLUMNS + SIZE], dimensions[(count - 1) * COLUMNS + column]
    return offset_of(first, dimensions, count, column), step, min(inner - first % inner, n)


@jit
def collect(x, at, reduced, n_reduced, first, n, y, y_at):
    """Copy n elements of a row of any strides to adjacent ones."""
    done = 0
    while done < n:
        start, step, size = stretch_of(reduced, n_reduced, first + done, n - done, X)
        for j in range(size):
            y[y_at + done + j] = x[at + start + j * step]
        done += size


@jit
def distribute(x, at, y, y_at, reduced, n_reduced, first, n):
    """Copy adjacent elements to a row of any strides."""
    done = 0
    while done < n:
        start, step, size = stretch_of(reduced, n_reduced, first + done, n - done, Y)
        for j in range(size):
            y[y_at + start + j * step] = x[at + done + j]
        done += size


# Long rows: their chunks are folded as the segments of batches, and their states merged in order.


@inline
def state_in(folded, index):
    """The state of a segment folded without its maximum."""
    c = constants(folded.high)
    largest, high, low = lane(folded.largest, index), lane(folded.high, index), lane(folded.low, index)
    if math.isinf(largest):
        return _state.State(np.float64(largest), np.float64(high), 0.0)
    _, exponent = _state.reference(np.float64(largest), c.state)
    power = 2.0 ** (np.float64(lane(exponent_of(folded.reference), index)) - exponent)
    return _state.State(np.float64(largest), np.float64(high) * power, np.float64(low) * power)


@inline
def load_state(states, index):
    at = FIELDS_OF_STATE * index
    return _state.State(states[at], states[at + 1], states[at + 2])


@inline
def store_state(states, index, state, smallest):
    at = FIELDS_OF_STATE * index
    states[at], states[at + 1], states[at + 2] = state
    states[at + 3] = smallest


@inline
def load_smallest(states, index):
    return states[FIELDS_OF_STATE * index + 3]


@inline
def smallest_of(states, count):
    """The smallest logit that counts in any of the first states."""
    smallest = math.inf
    for i in range(count):
        smallest = min(smallest, load_smallest(states, i))
    return smallest


@inline
def folded_of(state, x):
    """What `fold_others` would give for the row of a state."""
    largest = register_of(x, state.maximum)
    reference = reference_at(largest)
    power = 1.0
    if math.isfinite(state.maximum):
        _, exponent = _state.reference(state.maximum, constants(x).state)
        power = 2.0 ** (exponent - np.float64(lane(exponent_of(reference), 0)))
    high = register_of(x, state.sum * power)
    rest = state.sum * power - np.float64(lane(high, 0)) if math.isfinite(state.sum) else 0.0
    return Folded(largest, high, register_of(x, rest + state.residue * power), reference)


@inline
def log_sums_of_row(state, folded):
    """log(sum(exp(x - maximum))), rounded, and log(sum(exp(x))) of one row."""
    ratio, ratio_low = rest_over_top(folded.largest, folded.high, folded.low, folded.reference)
    log_sum, low = log_sum_of(state.maximum, state.sum, lane(ratio, 0), lane(ratio_low, 0))
    return log_sum + low, add_log_sums(state.maximum, log_sum, low)


@inline
def with_top(folded):
    """Add the maximum's term to sums; that of an infinite one is nothing."""
    top, top_low = term_at(folded.largest, folded.reference)
    high, error = two_sum(folded.high, top)
    is_finite = size_of(folded.largest) <= constants(high).largest
    low = where(is_finite, folded.low + (error + top_low), folded.low)
    return Folded(folded.largest, where(is_finite, high, folded.high), low, folded.reference)


@jit
def fold_chunks(function, x, at, n, reduced, n_reduced, chunk, end, keep, terms, states, collected, work):
    """Write the states of some chunks of a row; with `keep`, their terms too. Gathered rows have reduced dimensions."""
    length = chunk_of(x)
    together = min(BATCH_BYTES // CHUNK_BYTES, lanes_in(register_of(x, 0.0)))
    while chunk < end:
        count = min(together, end - chunk)
        for s in range(count):
            first = (chunk + s) * length
            size = min(length, n - first)
            work.places[s], work.terms[s], work.sizes[s] = at + first, first, size
            if n_reduced:
                work.places[s] = s * length
                collect(x, at, reduced, n_reduced, first, size, collected, s * length)
        source = collected if n_reduced else x
        if function == SOFTMAX:
            folded = without_top(fold_segments(source, count, True, keep, False, terms, work))
        else:
            folded = fold_others(source, count, work)
        for s in range(count):
            smallest = math.inf
            for i in range(lanes_in(folded.high) if function == SOFTMAX else 0):
                smallest = min(smallest, np.float64(work.smallest[s * lanes_in(folded.high) + i]))
            store_state(states, chunk + s, state_in(folded, s), smallest)
        chunk += count


@jit
def merge_states(states, count, x):
    total = load_state(states, 0)
    for i in range(1, count):
        total = _state.merge(total, load_state(states, i), constants(x).state)
    return total


@jit
def write_chunks(
    function, x, at, y, y_at, n, reduced, n_reduced, chunk, end, stored, terms, states, total, mends, streaming,
    collected,
):  # fmt: skip
    """Write some chunks of a row of state `total`, where `mends` tells whether probabilities are to be mended."""
    length = chunk_of(x)
    folded = folded_of(total, x)
    whole = with_top(folded)
    ending = normalize(whole.largest, whole.high, whole.low, whole.reference)
    log_sum, _ = log_sums_of_row(total, folded)
    while chunk < end:
        first = chunk * length
        size = min(length, n - first)
        source, source_at, target, target_at = x, at + first, y, y_at + first
        if n_reduced:
            collect(x, at, reduced, n_reduced, first, size, collected, 0)
            source, source_at, target, target_at = collected, 0, collected, 0
        if function == LOG_SOFTMAX:
            one = differences(folded.largest, register_of(x, log_sum), folded.reference)
            write_differences(source, source_at, target, target_at, size, one, streaming)
        else:
            power = power_between(states[FIELDS_OF_STATE * chunk], ending) if stored and not mends else 0.0
            if mends:
                write_mended(source, source_at, target, target_at, size, ending, streaming)
            elif power > 0.0:
                one = Ending(
                    ending.reference, ending.factor * power, ending.factor_low * power, ending.limit, ending.share
                )
                write_scaled(terms, first, target, target_at, size, one, streaming)
            else:
                write_recomputed(source, source_at, target, target_at, size, ending, streaming)
        if n_reduced:
            distribute(collected, 0, y, y_at, reduced, n_reduced, first, size)
        chunk += 1


@jit
def power_between(maximum, end):
    """What turns terms of a chunk with this maximum into those of the row; 0 where it would cost them digits."""
    reference = reference_at(0.0 * end.factor_low + maximum)
    if lane(reference.offset, 0) != lane(end.reference.offset, 0):
        return 0.0
    power = 2.0 ** np.float64(lane(exponent_of(reference) - exponent_of(end.reference), 0))
    tiniest = constants(end.factor).tiniest
    factor, low = lane(end.factor, 0), abs(lane(end.factor_low, 0))
    return power if factor * power >= tiniest and (low * power >= tiniest or low == 0.0) else 0.0


@inline
def is_row_mended(x, states, count, total, n):
    """Whether a row of n, whose chunks have these states, has probabilities that are to be mended."""
    smallest, largest = register_of(x, smallest_of(states, count)), register_of(x, total.maximum)
    return is_below_mended(smallest, largest, n)


@jit
def run_long_row(function, how, streaming, x, at, y, y_at, reduced, n_reduced, n, room, work):
    n_chunks = count_chunks(x, n)
    states, waiting = pointer_to(room, 0.0), pointer_to(room + bytes_of_states(n_chunks), x)
    terms = pointer_to(address_of(y, y_at), y) if how == IN_OUTPUT else waiting
    stored = how != RECOMPUTE and function == SOFTMAX
    fold_chunks(function, x, at, n, reduced, n_reduced, 0, n_chunks, stored, terms, states, waiting, work)
    total = merge_states(states, n_chunks, x)
    if function == LOGSUMEXP:
        _, y[y_at] = log_sums_of_row(total, folded_of(total, x))
        return
    mends = is_row_mended(x, states, n_chunks, total, n)
    write_chunks(
        *(function, x, at, y, y_at, n, reduced, n_reduced, 0, n_chunks, stored, terms, states, total, mends),
        *(streaming, waiting),
    )


@jit_entry
def run_rows(like, function, how, streaming, x_address, y_address, tables, n_kept, n_reduced, n, first, end, scratch):
    """Run rows; gathered ones have `n_reduced` dimensions, others 0."""
    x, y, kept = pointer_to(x_address, like), pointer_to(y_address, like), pointer_to(tables, 0)
    reduced = pointer_to(tables + n_kept * COLUMNS * 8, 0)
    work = make_work(stack_memory(BYTES_OF_WORK), like)
    if n > chunk_of(x):
        for row in range(first, end):
            at, y_at = offset_of(row, kept, n_kept, X), offset_of(row, kept, n_kept, Y)
            run_long_row(function, how, streaming, x, at, y, y_at, reduced, n_reduced, n, scratch, work)
        return
    room = pointer_to(scratch, like)
    together = rows_together(x, n)
    for row in range(first, end, together):
        count = min(together, end - row)
        for s in range(count):
            work.places[s], work.results[s], work.terms[s] = s * n, s * n, s * n
            work.sizes[s] = n
            if n_reduced:
                collect(x, offset_of(row + s, kept, n_kept, X), reduced, n_reduced, 0, n, room, s * n)
            else:
                work.places[s] = offset_of(row + s, kept, n_kept, X)
            if function == LOGSUMEXP or not n_reduced:
                work.results[s] = offset_of(row + s, kept, n_kept, Y)
            if how == IN_OUTPUT:
                work.terms[s] = work.results[s]
        source = room if n_reduced else x
        target = room if n_reduced and function != LOGSUMEXP else y
        run_batch(function, source, target, count, n, y if how == IN_OUTPUT else room, streaming, work)
        if n_reduced and function != LOGSUMEXP:
            for s in range(count):
                distribute(room, s * n, y, offset_of(row + s, kept, n_kept, Y), reduced, n_reduced, 0, n)


@jit_entry
def fold_split(like, function, stored, x_address, terms_address, n, first, end, states):
    """Fold some chunks of one row."""
    x, terms = pointer_to(x_address, like), pointer_to(terms_address, like)
    nothing = pointer_to(0, 0)
    fold_chunks(
        function,
        x,
        0,
        n,
        nothing,
        0,
        first,
        end,
        stored,
        terms,
        pointer_to(states, 0.0),
        x,
        make_work(stack_memory(BYTES_OF_WORK), like),
    )


@jit_entry
def merge_split(like, function, y_address, n_chunks, states_address):
    """Put the state of one row behind those of its chunks; write its logsumexp, which is all there is."""
    y, states = pointer_to(y_address, like), pointer_to(states_address, 0.0)
    total = merge_states(states, n_chunks, y)
    store_state(states, n_chunks, total, smallest_of(states, n_chunks))
    if function == LOGSUMEXP:
        _, y[0] = log_sums_of_row(total, folded_of(total, y))


@jit_entry
def write_split(like, function, stored, streaming, x_address, y_address, terms_address, n, first, end, states_address):
    """Write some chunks of one row."""
    x, y, terms = pointer_to(x_address, like), pointer_to(y_address, like), pointer_to(terms_address, like)
    states = pointer_to(states_address, 0.0)
    total = load_state(states, count_chunks(x, n))
    nothing = pointer_to(0, 0)
    mends = is_row_mended(x, states, count_chunks(x, n), total, n)
    write_chunks(function, x, 0, y, 0, n, nothing, 0, first, end, stored, terms, states, total, mends, streaming, x)
