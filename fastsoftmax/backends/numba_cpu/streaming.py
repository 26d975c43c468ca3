"""Kernels for states that outlive a call, and for softmax-one: a row at a time, by the means of long rows.

Rows of 16 bits are converted a chunk at a time.
"""

from __future__ import annotations

import math

import numpy as np

from fastsoftmax import _state

from .converted import fold_floats
from .jit import inline, jit_entry
from .registers import lane, lanes_in, pointer_to, register_of, stack_memory
from .rows import (
    BATCH_BYTES,
    BYTES_OF_WORK,
    CHUNK_BYTES,
    COLUMNS,
    LOGSUMEXP,
    SOFTMAX,
    X,
    Y,
    bytes_of_states,
    chunk_of,
    count_chunks,
    fold_chunks,
    lane_extremes,
    make_work,
    merge_states,
    needs_mending,
    offset_of,
    write_chunks,
)
from .stored import BFLOAT16, FLOAT16, collect_floats, distribute_stored
from .terms import constants

FOLD_STATES, NORMALIZE, SOFTMAX_ONE = range(3)


def bytes_of_streaming(n, itemsize):
    """Scratch memory for rows of n elements."""
    return bytes_of_states(-(-n * itemsize // CHUNK_BYTES)) + BATCH_BYTES


@inline
def load_packed(states, row, x):
    at = 5 * row
    return _state.unpack(states[at], states[at + 1], states[at + 2], states[at + 3], states[at + 4], constants(x).state)


@inline
def store_packed(states, row, state, x):
    at = 5 * row
    states[at], states[at + 1], states[at + 2], states[at + 3], states[at + 4] = _state.pack(state, constants(x).state)


@inline
def extremes_of(x, at, n):
    """The largest of n elements, and the smallest of each lane."""
    largest = -math.inf
    tops, bottoms = lane_extremes(x, at, n)
    for i in range(lanes_in(tops)):
        largest = max(largest, np.float64(lane(tops, i)))
    return largest, bottoms


@jit_entry
def run_streaming(
    like, function, storage, x_address, y_address, states_address, tables, n_kept, n_reduced, n, first_row, end_row,
    scratch,
):  # fmt: skip
    """Run rows; those that are gathered, or stored in 16 bits, have `n_reduced` dimensions, others 0."""
    x, y, kept = pointer_to(x_address, like), pointer_to(y_address, like), pointer_to(tables, 0)
    reduced, row_states = pointer_to(tables + n_kept * COLUMNS * 8, 0), pointer_to(states_address, 0.0)
    n_chunks = count_chunks(x, n)
    states, room = pointer_to(scratch, 0.0), pointer_to(scratch + bytes_of_states(n_chunks), like)
    work = make_work(stack_memory(BYTES_OF_WORK), like)
    nothing, no_states, length = pointer_to(0, 0), pointer_to(0, 0.0), chunk_of(x)
    is_converted = storage in (FLOAT16, BFLOAT16)
    for row in range(first_row, end_row):
        at, y_at = offset_of(row, kept, n_kept, X), offset_of(row, kept, n_kept, Y)
        total = _state.State(0.0, 0.0, 0.0)  # of the one zero
        if function != SOFTMAX_ONE:
            total = load_packed(row_states, row, x)
        if function != NORMALIZE:
            folding = LOGSUMEXP if function == FOLD_STATES else SOFTMAX
            if is_converted:
                of_row = fold_floats(folding, storage, x_address, at, reduced, n_reduced, n, room, states, work)
            else:
                fold_chunks(folding, x, at, n, reduced, n_reduced, 0, n_chunks, False, x, states, room, work)
                of_row = merge_states(states, n_chunks, x)
            total = _state.merge(total, of_row, constants(x).state)
        if function == FOLD_STATES:
            store_packed(row_states, row, total, x)
            continue
        log_high, log_low = _state.log_total(total, constants(x).state)
        for first in range(0, n, length):
            size = min(length, n - first)
            source, source_at, target, target_at = x, at + first, y, y_at + first
            if n_reduced:
                collect_floats(storage, x_address, at, reduced, n_reduced, first, size, room, room, 0)
                source, source_at, target, target_at = room, 0, room, 0
            largest, smallest = extremes_of(source, source_at, size)
            if function == NORMALIZE and math.isfinite(total.maximum) and largest > total.maximum:
                # Larger than all that the state has seen: terms may overflow.
                for j in range(size):
                    difference = np.float64(source[source_at + j]) - total.maximum
                    target[target_at + j] = math.exp((difference - log_high) - log_low)
            else:
                top = register_of(x, total.maximum)
                mends = needs_mending(source, source_at, size, smallest, top, math.exp(log_high))
                write_chunks(
                    SOFTMAX, source, source_at, target, target_at, size, nothing, 0, 0, 1, False, source, no_states,
                    total, mends, False, source,
                )  # fmt: skip
            if n_reduced:
                distribute_stored(room, 0, room, storage, y_address, y_at, reduced, n_reduced, first, size)


@jit_entry
def merge_rows(like, states_address, others_address, n_rows):
    states, others = pointer_to(states_address, 0.0), pointer_to(others_address, 0.0)
    x = pointer_to(0, like)
    for row in range(n_rows):
        merged = _state.merge(load_packed(states, row, x), load_packed(others, row, x), constants(x).state)
        store_packed(states, row, merged, x)


@jit_entry
def logsumexp_of_rows(like, states_address, result_address, n_rows):
    states, result, x = pointer_to(states_address, 0.0), pointer_to(result_address, 0.0), pointer_to(0, like)
    for row in range(n_rows):
        result[row] = _state.logsumexp(load_packed(states, row, x), constants(x).state)
