"""logsumexp with factors: log|sum(b * exp(a))|, and the sign of the sum.

The states are those of the CPU's Numba backend, `fastsoftmax._state.WeightedState`, in float64 whatever the format: the
power of two of a factor joins the exponent of its term, so that no product overflows, and terms with the same ``a`` add
up as their factors do. That is a hundred operations or more for an element, where the other kernels take ten, and not
the memory is what lanes wait for: they read one element at a time.
"""

from __future__ import annotations

import math
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from fastsoftmax import _state as cpu
from fastsoftmax._state import FLOAT64, WEIGHTED_REACH, WEIGHTED_TOP, WeightedState
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._plan import WEIGHTED_THREADS
from fastsoftmax.cuda._vectors import Format, elements, places

# The numbers of a state.
N_NUMBERS = len(WeightedState._fields)

_FUNCTIONS = (
    cpu.polynomial64, cpu.split, cpu.two_sum, cpu.product_error, cpu.weighted_identity, cpu.exp_difference,
    cpu.kept_term, cpu.merge_weighted, cpu.weighted_logsumexp,
)  # fmt: skip


@cache
def _states() -> SimpleNamespace:
    """Return the functions of `fastsoftmax._state` as device functions, and ``fold``, which takes in one term."""
    namespace = dict(vars(cpu))
    for function in _FUNCTIONS:
        namespace[function.__name__] = device(FunctionType(function.__code__, namespace, function.__name__))
    namespace["polynomial"] = namespace["polynomial64"]
    merge, infinity = namespace["merge_weighted"], math.inf

    @device
    def fold(state: Any, a: Any, b: Any) -> Any:
        if b == 0.0 or (a == -infinity and abs(b) < infinity):
            return state
        if not (abs(a) < infinity and abs(b) < infinity):
            term = b * (1.0 if abs(a) < infinity else 0.0 if a == -infinity else a)
            return merge(state, WeightedState(-infinity, 1.0, -infinity, 0.0, term, 0.0))
        offset = state.offset if abs(a - state.offset) <= WEIGHTED_REACH else a
        _, b_exponent = math.frexp(b)
        k = ((a - offset) * FLOAT64.log2e + FLOAT64.rounder) - FLOAT64.rounder
        return merge(state, WeightedState(a, b, offset, k + b_exponent - WEIGHTED_TOP, 0.0, 0.0))

    return SimpleNamespace(
        identity=namespace["weighted_identity"], fold=fold, merge=merge, logsumexp=namespace["weighted_logsumexp"]
    )


@cache
def weighted_kernel(format: Format, is_first: bool, is_last: bool) -> Any:
    """Make a kernel for rows with factors: a block has ``n_side`` rows, and of each as many lanes as are left.

    The first kernel takes in elements, a later one the states of chunks; the last one writes results, an earlier one
    leaves a state for each chunk. Lanes of a row, and rows, are so many threads apart.
    """
    state_of, value, pack = _states(), elements(format).value, elements(format).pack
    identity, fold, merge, logsumexp = state_of.identity, state_of.fold, state_of.merge, state_of.logsumexp
    word, element, real, zero = format.word, format.element, format.real, format.real(0)
    n_shared, n_numbers, threads, nan = N_NUMBERS * WEIGHTED_THREADS, N_NUMBERS, WEIGHTED_THREADS, math.nan

    @device
    def write(y: Any, address: Any, number: Any) -> Any:
        y[address] = element(pack(real(number), zero))

    @device
    def save(memory: Any, place: Any, step: Any, state: Any) -> Any:
        memory[place] = state.a
        memory[place + step] = state.b
        memory[place + 2 * step] = state.offset
        memory[place + 3 * step] = state.exponent
        memory[place + 4 * step] = state.sum
        memory[place + 5 * step] = state.residue

    @device
    def saved(memory: Any, place: Any, step: Any) -> Any:
        return WeightedState(
            memory[place], memory[place + step], memory[place + 2 * step],
            memory[place + 3 * step], memory[place + 4 * step], memory[place + 5 * step],
        )  # fmt: skip

    def weighted(
        x: Any, y: Any, g: Any, signs: Any, states: Any, n_rows: Any, n_cols: Any, n_chunks: Any, chunk: Any,
        n_side: Any, n_lanes: Any, side_step: Any, lane_step: Any, has_signs: Any, kept: Any, reduced: Any,
    ) -> None:  # fmt: skip
        block = np.int64(cuda.blockIdx.x)
        thread = np.int64(cuda.threadIdx.y) * cuda.blockDim.x + cuda.threadIdx.x
        side, lane = thread // side_step % n_side, thread // lane_step % n_lanes
        row, c = (block // n_chunks * n_side + side, block % n_chunks) if is_first else (block * n_side + side, block)
        x_row, y_row, g_row = places(row, kept)

        state = identity()
        if is_first:
            for i in range(c * chunk + lane, min((c + 1) * chunk, n_cols) if row < n_rows else np.int64(0), n_lanes):
                x_place, _, g_place = places(i, reduced)
                a, b = value(word(x[x_row + x_place]), 0), value(word(g[g_row + g_place]), 0)
                state = fold(state, np.float64(a), np.float64(b))
        else:
            for i in range(lane, n_chunks if row < n_rows else np.int64(0), n_lanes):
                state = merge(state, saved(states, (row * n_chunks + i) * n_numbers, 1))

        # Lanes meet two by two, in the same order each time.
        meeting = cuda.shared.array(n_shared, np.float64)
        save(meeting, thread, threads, state)
        cuda.syncthreads()
        half = n_lanes // 2
        while half > 0:
            if lane < half:
                state = merge(state, saved(meeting, thread + half * lane_step, threads))
                save(meeting, thread, threads, state)
            cuda.syncthreads()
            half //= 2

        if lane == 0 and row < n_rows:
            if is_last:
                log_sum, sign = logsumexp(state)
                write(y, y_row, log_sum if has_signs or not sign < 0.0 else nan)
                if has_signs:
                    write(signs, y_row, sign)
            else:
                save(states, (row * n_chunks + c) * n_numbers, 1, state)

    return weighted
