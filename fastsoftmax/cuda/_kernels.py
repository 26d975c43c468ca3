"""The kernels: who visits which element, and where partial states meet.

Every kernel reads a row once into states, lets the states meet, and maps the row to its result. What differs is who
shares a row:

- `row_kernel`: the lanes of a part of a warp, a warp, or a block. What they read stays in their registers; of a longer
  row a part stays in the block's shared memory, and the rest, if any, is read again, from the L2 cache while few rows
  are under way at a time.
- `chunk_state_kernel` and `chunk_result_kernel`: many blocks, one per chunk of a row. The first leaves a state for
  each chunk, the second merges them all, in the same order in every block.
- `strip_kernel`: the lanes of a block side by side on adjacent rows, for a reduced axis that is not the last.
- `strip_state_kernel` and `strip_result_kernel`: many blocks, one per chunk of the rows of a strip.

A kernel is made from one of the functions, a `Format` and the numbers of a plan, and sees them as constants. Pointers
are to unsigned integers of the element's size; `fastsoftmax.cuda._vectors` reads and writes by them. A row need not
begin at a 16-byte boundary for 16-byte access: lanes count vectors from the boundary before it (`first`), and those at
either end go element by element.

Sizes and strides are 64-bit and count elements. ``kept`` and ``reduced`` are dimensions, outermost first, of four
numbers each: size, and the strides in x, in y and in the second input g.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda, types

from fastsoftmax.cuda import _state
from fastsoftmax.cuda._functions import PRODUCTS, Kernel, n_inputs, results, states, states_of
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._meetings import row_meeting
from fastsoftmax.cuda._plan import IN_FLIGHT, VECTOR_BYTES, tile_vectors
from fastsoftmax.cuda._tiles import across_rows, ranges, stored_part, tiles
from fastsoftmax.cuda._vectors import Format, access, elements, places, repeated


def signature(format: Format, kernel: Any, n_kept: int, n_reduced: int) -> Any:
    """Return the types of a kernel's arguments: see the functions themselves."""
    pointer, real = format.pointer, types.float64 if format.precision == "double" else types.float32
    known = {"x": pointer, "y": pointer, "g": pointer, "maxima": types.CPointer(real)}
    known |= {"sums": types.CPointer(real), "residues": types.CPointer(real)}
    known |= {"kept": types.UniTuple(types.int64, 4 * n_kept), "reduced": types.UniTuple(types.int64, 4 * n_reduced)}
    known |= {"inner": types.UniTuple(types.int64, 4), "signs": pointer, "states": types.CPointer(types.float64)}
    code = kernel.__code__
    return types.void(*(known.get(name, types.int64) for name in code.co_varnames[: code.co_argcount]))


@cache
def row_values(format: Format) -> SimpleNamespace:
    """Return device functions for what has one element per row: write the result of logsumexp, read the g of its."""
    value, pack = elements(format).value, elements(format).pack
    zero, word, element = format.real(0), format.word, format.element

    @device
    def write_logsumexp(y: Any, address: Any, result: Any) -> Any:
        y[address] = element(pack(result, zero))

    @device
    def read_g(g: Any, address: Any) -> Any:
        return value(word(g[address]), 0)

    return SimpleNamespace(write_logsumexp=write_logsumexp, read_g=read_g)


@cache
def row_kernel(kernel: Kernel, format: Format, vectorized: bool, lanes: int, held: int, is_long: bool) -> Any:
    """Make a kernel for rows that so many neighbouring lanes share, or the lanes of a block if that is 0.

    Each lane holds so many vectors in registers. Of a long row the next ``n_tiles`` times `tile_vectors` of each lane
    are kept in shared memory, and the rest is read twice.
    """
    vector, n_words, _ = access(format, vectorized)
    tile, meet = tiles(kernel, format, vectorized, held), row_meeting(states_of(kernel), format, lanes)
    part, store = ranges(kernel, format, vectorized), stored_part(kernel, format, vectorized)
    read, largest, add, write, n_held = tile.read, tile.largest, tile.add, tile.write, tile.n_words
    meet_largest, meet_sums, fold_range, write_range = meet.largest, meet.sums, part.fold_range, part.write_range
    begin_stored, fold_stored, write_stored = store.begin, store.fold, store.write
    compute, of_row = states(kernel, format), results(kernel, format).of_row
    advance, larger, close = compute.advance, compute.largest, compute.close
    write_logsumexp, read_g = row_values(format).write_logsumexp, row_values(format).read_g
    word, lowest, zero = format.word, compute.lowest, format.real(0)
    is_reduction, has_g, per_tile = kernel == "logsumexp", kernel == "logsumexp_vjp", tile_vectors(n_inputs(kernel))

    def rows(
        x: Any, y: Any, g: Any, n_rows: Any, n_cols: Any, n_tiles: Any, phase: Any, kept: Any, reduced: Any
    ) -> None:
        if lanes:
            width, lane = np.int64(lanes), np.int64(cuda.threadIdx.x % lanes)
            row = np.int64(cuda.blockIdx.x) * (cuda.blockDim.x // lanes) + cuda.threadIdx.x // lanes
        else:
            width, lane, row = np.int64(cuda.blockDim.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        n = n_cols if row < n_rows else np.int64(0)
        x_row, y_row, g_row = places(row, kept)
        first = lane * vector - ((phase + x_row) & (vector - 1))
        step = width * vector
        after_held = first + held * step
        rest = after_held + n_tiles * per_tile * step

        words = cuda.local.array(n_held, word)
        if is_long:
            stored = cuda.shared.array(0, word, alignment=VECTOR_BYTES)  # as much as the launch asks for
            place, layer = lane * n_words, width * n_words
            begin_stored(n_tiles, x, x_row, g, g_row, after_held, n, step, reduced, stored, place, layer)
        read(0, x, x_row, g, g_row, first, step, n, reduced, words)
        maximum, others, sum, residue, ties = largest(lowest, words), lowest, zero, zero, zero
        if is_long:
            state = others, sum, residue, ties
            state = fold_stored(state, n_tiles, x, x_row, g, g_row, after_held, n, step, reduced, stored, place, layer)
            others, sum, residue, ties = fold_range(state, x, x_row, g, g_row, rest, n, n, step, reduced)
        maximum = meet_largest(larger(maximum, others))
        if is_long:
            sum, residue, ties = advance(others, sum, residue, ties, maximum)
        sum, residue, ties = add((sum, residue, ties), words, maximum)
        sum, residue, ties = meet_sums(sum, residue, ties)
        sum, residue = close(maximum, sum, residue, ties)
        shared, low = of_row(maximum, sum, residue)

        if is_reduction:
            if lane == 0 and row < n_rows:
                write_logsumexp(y, y_row, shared)
        else:
            g_of_row = read_g(g, g_row) if has_g and row < n_rows else zero
            write(0, y, y_row, first, step, n, reduced, words, maximum, shared, low, g_of_row)
            if is_long:
                write_stored(
                    n_tiles, y, y_row, after_held, n, step, reduced, stored, place, layer,
                    maximum, shared, low, g_of_row,
                )  # fmt: skip
                write_range(x, x_row, y, y_row, g, g_row, rest, n, n, step, reduced, maximum, shared, low, g_of_row)

    return rows


@cache
def chunk_state_kernel(kernel: Kernel, format: Format, vectorized: bool) -> Any:
    """Make a kernel that leaves the state of each chunk of each row: a maximum, and the sum of the others' terms."""
    vector, _, _ = access(format, vectorized)
    meet, compute, zero = row_meeting(states_of(kernel), format, 0), states(kernel, format), format.real(0)
    meet_largest, meet_sums, fold_range = meet.largest, meet.sums, ranges(kernel, format, vectorized).fold_range
    advance, close, lowest = compute.advance, compute.close, compute.lowest

    def chunk_states(
        x: Any, g: Any, maxima: Any, sums: Any, residues: Any,
        n_chunks: Any, chunk: Any, n_cols: Any, phase: Any, kept: Any, reduced: Any,
    ) -> None:  # fmt: skip
        block = np.int64(cuda.blockIdx.x)
        x_row, _, g_row = places(block // n_chunks, kept)
        start = block % n_chunks * chunk - ((phase + x_row) & (vector - 1))
        begin, end = start + cuda.threadIdx.x * vector, min(start + chunk, n_cols)
        step = cuda.blockDim.x * vector
        state = lowest, zero, zero, zero
        own, sum, residue, ties = fold_range(state, x, x_row, g, g_row, begin, end, n_cols, step, reduced)
        maximum = meet_largest(own)
        sum, residue, ties = advance(own, sum, residue, ties, maximum)
        sum, residue, ties = meet_sums(sum, residue, ties)
        if cuda.threadIdx.x == 0:
            maxima[block] = maximum
            sums[block], residues[block] = close(maximum, sum, residue, ties)

    return chunk_states


@cache
def chunk_result_kernel(kernel: Kernel, format: Format, vectorized: bool) -> Any:
    """Make a kernel that merges the states of a row's chunks and writes one chunk of the result."""
    vector, _, _ = access(format, vectorized)
    compute, merge_all = states(kernel, format), row_meeting(states_of(kernel), format, 0).states
    merge, of_row, lowest, zero = compute.merge, results(kernel, format).of_row, compute.lowest, format.real(0)
    write_logsumexp, read_g = row_values(format).write_logsumexp, row_values(format).read_g
    write_range = ranges(kernel, format, vectorized).write_range
    is_reduction, has_g = kernel == "logsumexp", kernel == "logsumexp_vjp"

    def chunk_results(
        x: Any, y: Any, g: Any, maxima: Any, sums: Any, residues: Any,
        n_chunks: Any, chunk: Any, n_cols: Any, phase: Any, kept: Any, reduced: Any,
    ) -> None:  # fmt: skip
        # From the last block to the first: what the kernel before read last is still in the cache.
        block = np.int64(cuda.gridDim.x) - 1 - cuda.blockIdx.x
        row = block if is_reduction else block // n_chunks
        x_row, y_row, g_row = places(row, kept)

        maximum, sum, residue = lowest, zero, zero
        for c in range(row * n_chunks + cuda.threadIdx.x, (row + 1) * n_chunks, cuda.blockDim.x):
            maximum, sum, residue = merge(maximum, sum, residue, maxima[c], sums[c], residues[c])
        maximum, sum, residue = merge_all(maximum, sum, residue)
        shared, low = of_row(maximum, sum, residue)

        if is_reduction:
            if cuda.threadIdx.x == 0:
                write_logsumexp(y, y_row, shared)
        else:
            start = block % n_chunks * chunk - ((phase + x_row) & (vector - 1))
            begin, end = start + cuda.threadIdx.x * vector, min(start + chunk, n_cols)
            step, g_of_row = cuda.blockDim.x * vector, read_g(g, g_row) if has_g else zero
            write_range(x, x_row, y, y_row, g, g_row, begin, end, n_cols, step, reduced, maximum, shared, low, g_of_row)

    return chunk_results


@cache
def strip_parts(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions for what the lanes of a block do with a strip, or with a chunk of its elements.

    ``fold`` takes the elements of a lane's rows from one index to another into the states of a lane, ``meet`` makes of
    those of all layers the states of rows, ``finish`` gets from them and from g what results need, and writes that of
    logsumexp; ``write`` writes the others.
    """
    vector, _, _ = access(format, vectorized)
    strip, of_row = across_rows(kernel, format, vectorized), results(kernel, format).of_row
    read, write_tile, n_tile = strip.read, strip.write, strip.n_words
    write_logsumexp, read_g = row_values(format).write_logsumexp, row_values(format).read_g
    word, zero = format.word, format.real(0)
    is_reduction, has_g = kernel == "logsumexp", kernel == "logsumexp_vjp"

    @device
    def write(
        x: Any, x_start: Any, y: Any, y_start: Any, g: Any, g_start: Any, reduced: Any, begin: Any, end: Any,
        column: Any, n_inner: Any, maxima: Any, shared: Any, lows: Any, gs: Any,
    ) -> Any:  # fmt: skip
        words = cuda.local.array(n_tile, word)
        for j in range(begin, end, IN_FLIGHT * cuda.blockDim.y):
            read(0, x, x_start, g, g_start, reduced, j, end, column, n_inner, words)
            write_tile(0, y, y_start, reduced, j, end, column, n_inner, words, maxima, shared, lows, gs)

    @device
    def finish_one(
        v: Any, carry: Any, y: Any, y_start: Any, g: Any, g_start: Any, column: Any, n_inner: Any, inner: Any,
        maxima: Any, sums: Any, residues: Any, shared: Any, lows: Any, gs: Any,
    ) -> Any:  # fmt: skip
        shared[v], lows[v] = of_row(maxima[v], sums[v], residues[v])
        is_row = column + v >= 0 and column + v < n_inner
        if is_reduction and is_row and cuda.threadIdx.y == 0:
            write_logsumexp(y, y_start + (column + v) * inner[2], shared[v])
        gs[v] = read_g(g, g_start + (column + v) * inner[3]) if has_g and is_row else zero
        return carry

    folded = _folded_strip_parts(states_of(kernel), format, vectorized)
    return SimpleNamespace(**vars(folded), finish=repeated(finish_one, vector), write=write)


@cache
def _folded_strip_parts(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return what `strip_parts` has for all kernels with the same states."""
    vector, _, _ = access(format, vectorized)
    strip, compute = across_rows(kernel, format, vectorized), states(kernel, format)
    read, fold_tile, n_tile = strip.read, strip.fold, strip.n_words
    advance, larger, close = compute.advance, compute.largest, compute.close
    word, zero, has_maximum = format.word, format.real(0), kernel not in PRODUCTS
    plus = _state.on_device(format.precision).plus

    @device
    def fold(
        x: Any, x_start: Any, g: Any, g_start: Any, reduced: Any, begin: Any, end: Any, column: Any, n_inner: Any,
        maxima: Any, sums: Any, residues: Any, ties: Any,
    ) -> Any:  # fmt: skip
        words = cuda.local.array(n_tile, word)
        for j in range(begin, end, IN_FLIGHT * cuda.blockDim.y):
            read(0, x, x_start, g, g_start, reduced, j, end, column, n_inner, words)
            fold_tile(0, words, maxima, sums, residues, ties)

    @device
    def show_one(v: Any, carry: Any, values: Any, mine: Any, meeting: Any) -> Any:
        meeting[mine + v] = values[v]
        return carry

    @device
    def advance_one(
        v: Any, carry: Any, maxima: Any, sums: Any, residues: Any, ties: Any, base: Any, meeting_a: Any
    ) -> Any:
        maximum = meeting_a[base + v]
        sums[v], residues[v], ties[v] = advance(maxima[v], sums[v], residues[v], ties[v], maximum)
        maxima[v] = maximum
        return carry

    @device
    def close_one(
        v: Any, carry: Any, maxima: Any, sums: Any, residues: Any, base: Any, meeting_a: Any, meeting_b: Any,
        meeting_c: Any,
    ) -> Any:  # fmt: skip
        ties = meeting_c[base + v] if has_maximum else zero
        sums[v], residues[v] = close(maxima[v], meeting_a[base + v], meeting_b[base + v], ties)
        return carry

    show, advance_all = repeated(show_one, vector), repeated(advance_one, vector)
    close_all = repeated(close_one, vector)

    @device
    def meet(maxima: Any, sums: Any, residues: Any, ties: Any, meeting_a: Any, meeting_b: Any, meeting_c: Any) -> Any:
        # Layers meet two by two: first their maxima, then the sums beside these.
        layer, base, layer_size = cuda.threadIdx.y, cuda.threadIdx.x * vector, cuda.blockDim.x * vector
        mine = layer * layer_size + base
        if has_maximum:
            show(0, maxima, mine, meeting_a)
            cuda.syncthreads()
            half = np.int64(cuda.blockDim.y // 2)
            while half > 0:
                if layer < half:
                    for place in range(mine, mine + vector):
                        meeting_a[place] = larger(meeting_a[place], meeting_a[place + half * layer_size])
                cuda.syncthreads()
                half //= 2
            advance_all(0, maxima, sums, residues, ties, base, meeting_a)
            cuda.syncthreads()
            show(0, ties, mine, meeting_c)
        show(0, sums, mine, meeting_a)
        show(0, residues, mine, meeting_b)
        cuda.syncthreads()
        half = np.int64(cuda.blockDim.y // 2)
        while half > 0:
            if layer < half:
                for place in range(mine, mine + vector):
                    other = place + half * layer_size
                    meeting_a[place], meeting_b[place] = plus(
                        meeting_a[place], meeting_b[place], meeting_a[other], meeting_b[other]
                    )
                    if has_maximum:
                        meeting_c[place] += meeting_c[other]
            cuda.syncthreads()
            half //= 2
        close_all(0, maxima, sums, residues, base, meeting_a, meeting_b, meeting_c)

    return SimpleNamespace(fold=fold, meet=meet)


@cache
def no_states(kernel: Kernel, format: Format, vectorized: bool) -> Any:
    """Return a device function that begins the states of a lane's rows in a strip."""
    lowest, zero = states(kernel, format).lowest, format.real(0)

    @device
    def begin_one(v: Any, carry: Any, maxima: Any, sums: Any, residues: Any, ties: Any) -> Any:
        maxima[v], sums[v], residues[v], ties[v] = lowest, zero, zero, zero
        return carry

    return repeated(begin_one, access(format, vectorized).vector)


@cache
def strip_kernel(kernel: Kernel, format: Format, vectorized: bool, threads: int) -> Any:
    """Make a kernel for rows that lie side by side: a block has a strip of them, ``blockDim.x`` vectors wide.

    Lanes above each other (in ``threadIdx.y``, a power of two of them) have different elements of the same rows. Each
    element is read twice; strips are narrow enough that those under way stay in the L2 cache.
    """
    vector, _, _ = access(format, vectorized)
    part, begin, real = (
        strip_parts(kernel, format, vectorized),
        no_states(states_of(kernel), format, vectorized),
        format.real,
    )
    fold, meet, finish, write = part.fold, part.meet, part.finish, part.write
    is_reduction, n_meeting = kernel == "logsumexp", threads * vector

    def strips(
        x: Any, y: Any, g: Any,
        n_inner: Any, n_cols: Any, phase: Any, n_strips: Any, kept: Any, inner: Any, reduced: Any,
    ) -> None:  # fmt: skip
        block, layer = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.y)
        x_start, y_start, g_start = places(block // n_strips, kept)
        column = (block % n_strips * cuda.blockDim.x + cuda.threadIdx.x) * vector - phase

        maxima = cuda.local.array(vector, real)
        sums = cuda.local.array(vector, real)
        residues = cuda.local.array(vector, real)
        ties = cuda.local.array(vector, real)
        meeting_a = cuda.shared.array(n_meeting, real)
        meeting_b = cuda.shared.array(n_meeting, real)
        meeting_c = cuda.shared.array(n_meeting, real)
        begin(0, maxima, sums, residues, ties)
        fold(x, x_start, g, g_start, reduced, layer, n_cols, column, n_inner, maxima, sums, residues, ties)
        meet(maxima, sums, residues, ties, meeting_a, meeting_b, meeting_c)

        shared = cuda.local.array(vector, real)
        lows = cuda.local.array(vector, real)
        gs = cuda.local.array(vector, real)
        finish(0, y, y_start, g, g_start, column, n_inner, inner, maxima, sums, residues, shared, lows, gs)
        if not is_reduction:
            write(x, x_start, y, y_start, g, g_start, reduced, layer, n_cols, column, n_inner, maxima, shared, lows, gs)

    return strips


@cache
def strip_state_kernel(kernel: Kernel, format: Format, vectorized: bool, threads: int) -> Any:
    """Make a kernel that leaves the states of each chunk of the rows of each strip."""
    vector, _, _ = access(format, vectorized)
    part, begin, real = (
        strip_parts(kernel, format, vectorized),
        no_states(states_of(kernel), format, vectorized),
        format.real,
    )
    fold, meet, n_meeting = part.fold, part.meet, threads * vector

    @device
    def leave_one(
        v: Any, carry: Any, maxima: Any, sums: Any, residues: Any, first_row: Any, n_chunks: Any, c: Any,
        column: Any, n_inner: Any, of_maxima: Any, of_sums: Any, of_residues: Any,
    ) -> Any:  # fmt: skip
        if column + v >= 0 and column + v < n_inner and cuda.threadIdx.y == 0:
            place = (first_row + column + v) * n_chunks + c
            maxima[place], sums[place], residues[place] = of_maxima[v], of_sums[v], of_residues[v]
        return carry

    leave = repeated(leave_one, vector)

    def strip_states(
        x: Any, g: Any, maxima: Any, sums: Any, residues: Any, n_chunks: Any, chunk: Any,
        n_inner: Any, n_cols: Any, phase: Any, n_strips: Any, kept: Any, inner: Any, reduced: Any,
    ) -> None:  # fmt: skip
        strip, c = np.int64(cuda.blockIdx.x) // n_chunks, np.int64(cuda.blockIdx.x) % n_chunks
        x_start, _, g_start = places(strip // n_strips, kept)
        column = (strip % n_strips * cuda.blockDim.x + cuda.threadIdx.x) * vector - phase
        first, end = c * chunk + cuda.threadIdx.y, min((c + 1) * chunk, n_cols)

        of_maxima = cuda.local.array(vector, real)
        of_sums = cuda.local.array(vector, real)
        of_residues = cuda.local.array(vector, real)
        ties = cuda.local.array(vector, real)
        meeting_a = cuda.shared.array(n_meeting, real)
        meeting_b = cuda.shared.array(n_meeting, real)
        meeting_c = cuda.shared.array(n_meeting, real)
        begin(0, of_maxima, of_sums, of_residues, ties)
        fold(x, x_start, g, g_start, reduced, first, end, column, n_inner, of_maxima, of_sums, of_residues, ties)
        meet(of_maxima, of_sums, of_residues, ties, meeting_a, meeting_b, meeting_c)
        first_row = strip // n_strips * n_inner
        leave(
            0, maxima, sums, residues, first_row, n_chunks, c, column, n_inner, of_maxima, of_sums, of_residues
        )  # fmt: skip

    return strip_states


@cache
def strip_result_kernel(kernel: Kernel, format: Format, vectorized: bool, threads: int) -> Any:
    """Make a kernel that merges the states of the chunks of a strip's rows and writes one chunk of their results.

    A state is what a lane knows, with one element that is the maximum: so layers that merged some each meet as ever.
    """
    vector, _, _ = access(format, vectorized)
    part, begin = strip_parts(kernel, format, vectorized), no_states(states_of(kernel), format, vectorized)
    meet, finish, write, compute = part.meet, part.finish, part.write, states(kernel, format)
    advance, larger, real, one = compute.advance, compute.largest, format.real, format.real(1)
    is_reduction, n_meeting, plus = kernel == "logsumexp", threads * vector, _state.on_device(format.precision).plus

    @device
    def merge_one(
        v: Any, carry: Any, maxima: Any, sums: Any, residues: Any, first_row: Any, n_chunks: Any, c: Any,
        column: Any, n_inner: Any, of_maxima: Any, of_sums: Any, of_residues: Any, ties: Any,
    ) -> Any:  # fmt: skip
        if column + v >= 0 and column + v < n_inner:
            place = (first_row + column + v) * n_chunks + c
            maximum = larger(of_maxima[v], maxima[place])
            sum, residue, n_ties = advance(of_maxima[v], of_sums[v], of_residues[v], ties[v], maximum)
            other, other_residue, more_ties = advance(maxima[place], sums[place], residues[place], one, maximum)
            of_sums[v], of_residues[v] = plus(sum, residue, other, other_residue)
            of_maxima[v], ties[v] = maximum, n_ties + more_ties
        return carry

    merge = repeated(merge_one, vector)

    def strip_results(
        x: Any, y: Any, g: Any, maxima: Any, sums: Any, residues: Any, n_chunks: Any, chunk: Any,
        n_inner: Any, n_cols: Any, phase: Any, n_strips: Any, kept: Any, inner: Any, reduced: Any,
    ) -> None:  # fmt: skip
        # From the last block to the first: what the kernel before read last is still in the cache.
        block, layer = np.int64(cuda.gridDim.x) - 1 - cuda.blockIdx.x, np.int64(cuda.threadIdx.y)
        strip = block if is_reduction else block // n_chunks
        x_start, y_start, g_start = places(strip // n_strips, kept)
        column = (strip % n_strips * cuda.blockDim.x + cuda.threadIdx.x) * vector - phase

        of_maxima = cuda.local.array(vector, real)
        of_sums = cuda.local.array(vector, real)
        of_residues = cuda.local.array(vector, real)
        ties = cuda.local.array(vector, real)
        meeting_a = cuda.shared.array(n_meeting, real)
        meeting_b = cuda.shared.array(n_meeting, real)
        meeting_c = cuda.shared.array(n_meeting, real)
        begin(0, of_maxima, of_sums, of_residues, ties)
        for c in range(layer, n_chunks, cuda.blockDim.y):
            first_row = strip // n_strips * n_inner
            merge(
                0, maxima, sums, residues, first_row, n_chunks, c, column, n_inner,
                of_maxima, of_sums, of_residues, ties,
            )  # fmt: skip
        meet(of_maxima, of_sums, of_residues, ties, meeting_a, meeting_b, meeting_c)

        shared = cuda.local.array(vector, real)
        lows = cuda.local.array(vector, real)
        gs = cuda.local.array(vector, real)
        finish(0, y, y_start, g, g_start, column, n_inner, inner, of_maxima, of_sums, of_residues, shared, lows, gs)
        if not is_reduction:
            first, end = block % n_chunks * chunk + layer, min((block % n_chunks + 1) * chunk, n_cols)
            write(x, x_start, y, y_start, g, g_start, reduced, first, end, column, n_inner, of_maxima, shared, lows, gs)

    return strip_results
