"""The kernels: who visits which element, and where partial states meet.

Every kernel reads a row once into states, lets the states meet, and maps the row to its result. What differs is who
shares a row:

- `row_kernel`: the lanes of a part of a warp, a warp, or a block. What they read stays in their registers; of a row
  that does not fit there the rest is read again, from the L2 cache while few rows are under way at a time.
- `chunk_state_kernel` and `chunk_result_kernel`: many blocks, one per chunk of a row. The first leaves a state for
  each chunk, the second merges them all, in the same order in every block.
- `product_row_kernel`: as the first, for the vector-Jacobian products that have two inputs of one size.
- `strip_kernel`: the lanes of a block side by side on adjacent rows, for a reduced axis that is not the last.

Lanes meet in two steps: first the maximum of all, then the sum of all, each rescaled to that maximum once. The order of
additions is fixed by the plan, and so are the bits of the result.

A kernel is made from a `Format` and the numbers of a plan, and sees them as constants. Pointers are to unsigned
integers of the element's size; `fastsoftmax.cuda._vectors` reads and writes by them. A row need not begin at a 16-byte
boundary for 16-byte access: lanes count vectors from the boundary before it (`first`), and those at either end go
element by element.

Sizes and strides are 64-bit and count elements. ``kept`` and ``reduced`` are dimensions, outermost first, of four
numbers each: size, and the strides in x, in y and in the second input g.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numba import cuda, types

from fastsoftmax.cuda import _instructions, _state
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._plan import IN_FLIGHT
from fastsoftmax.cuda._state import Precision
from fastsoftmax.cuda._vectors import Format, access, elements, places, repeated, vectors

# The functions, and their vector-Jacobian products: of softmax from p and g, of log_softmax from log p and g, of
# logsumexp from a and one g per row.
Kernel = Literal["softmax", "log_softmax", "logsumexp", "softmax_vjp", "log_softmax_vjp", "logsumexp_vjp"]


def signature(format: Format, kernel: Any, n_kept: int, n_reduced: int) -> Any:
    """Return the types of a kernel's arguments: see the functions themselves."""
    pointer, real = format.pointer, types.float64 if format.precision == "double" else types.float32
    known = {"x": pointer, "y": pointer, "g": pointer, "maxima": types.CPointer(real), "sums": types.CPointer(real)}
    known |= {"kept": types.UniTuple(types.int64, 4 * n_kept), "reduced": types.UniTuple(types.int64, 4 * n_reduced)}
    known["inner"] = types.UniTuple(types.int64, 4)
    code = kernel.__code__
    return types.void(*(known.get(name, types.int64) for name in code.co_varnames[: code.co_argcount]))


@cache
def meeting(precision: Precision, lanes: int) -> SimpleNamespace:
    """Return device functions by which lanes meet: so many neighbours of a warp, or all of a block if that is 0."""
    larger = _state.on_device(precision).larger
    real = np.float64 if precision == "double" else np.float32
    n_steps = (lanes or 32).bit_length() - 1

    @device
    def warp_largest(value: Any) -> Any:
        for step in range(n_steps):
            value = larger(value, _instructions.exchange(value, 1 << step))
        return value

    @device
    def warp_sum(value: Any) -> Any:
        for step in range(n_steps):
            value += _instructions.exchange(value, 1 << step)
        return value

    if lanes:
        return SimpleNamespace(largest=warp_largest, sum=warp_sum)

    @device
    def block_largest(value: Any) -> Any:
        of_warps = cuda.shared.array(32, real)
        value = warp_largest(value)
        if cuda.threadIdx.x % 32 == 0:
            of_warps[cuda.threadIdx.x // 32] = value
        cuda.syncthreads()
        value = of_warps[0]
        for warp in range(1, cuda.blockDim.x // 32):
            value = larger(value, of_warps[warp])
        cuda.syncthreads()  # the array may be written to again now
        return value

    @device
    def block_sum(value: Any) -> Any:
        of_warps = cuda.shared.array(32, real)
        value = warp_sum(value)
        if cuda.threadIdx.x % 32 == 0:
            of_warps[cuda.threadIdx.x // 32] = value
        cuda.syncthreads()
        value = of_warps[0]
        for warp in range(1, cuda.blockDim.x // 32):
            value += of_warps[warp]
        cuda.syncthreads()  # the array may be written to again now
        return value

    return SimpleNamespace(largest=block_largest, sum=block_sum)


@cache
def folding(format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions that take the elements of vectors into the state of a lane.

    It is the maximum, the sum of the terms of smaller elements, and the number of elements that are the maximum: one of
    these is left out of the state of the row, where all lanes have met.
    """
    _, n_words, per_word = access(format, vectorized)
    value = elements(format).value
    state = _state.on_device(format.precision)
    reference, power, rebase, term, larger = state.reference, state.power, state.rebase, state.term, state.larger
    zero, one = format.real(0), format.real(1)

    @device
    def largest_of_word(w: Any, maximum: Any, words: Any, position: Any) -> Any:
        for_first = larger(maximum, value(words[position + w], 0))
        return larger(for_first, value(words[position + w], 1)) if per_word == 2 else for_first

    @device
    def advance(maximum: Any, sum: Any, ties: Any, new_maximum: Any) -> Any:
        """Return sum and ties beside a maximum that is as large or larger."""
        if maximum == new_maximum:
            return sum, ties
        return (sum + ties * term(maximum, maximum)) * rebase(maximum, new_maximum), zero

    @device
    def add_element(sum: Any, ties: Any, x: Any, maximum: Any, offset: Any, shift: Any) -> Any:
        of_x = power(x - offset, shift)
        return sum + (zero if x == maximum else of_x), ties + (one if x == maximum else zero)

    @device
    def add_word(w: Any, carry: Any, words: Any, position: Any, maximum: Any, offset: Any, shift: Any) -> Any:
        word = words[position + w]
        sum, ties = add_element(carry[0], carry[1], value(word, 0), maximum, offset, shift)
        if per_word == 2:
            sum, ties = add_element(sum, ties, value(word, 1), maximum, offset, shift)
        return sum, ties

    largest, add_words = repeated(largest_of_word, n_words), repeated(add_word, n_words)

    @device
    def add(sum: Any, ties: Any, words: Any, position: Any, maximum: Any) -> Any:
        offset, shift = reference(maximum)
        of_vector, ties = add_words((zero, ties), words, position, maximum, offset, shift)
        return sum + of_vector, ties

    return SimpleNamespace(largest=largest, advance=advance, add=add, add_element=add_element)


@cache
def merging(format: Format, lanes: int) -> Any:
    """Return a device function that merges the states of lanes that meet, each of any number of elements."""
    meet, state = meeting(format.precision, lanes), _state.on_device(format.precision)
    meet_largest, meet_sum, rebase, term = meet.largest, meet.sum, state.rebase, state.term
    zero, one = format.real(0), format.real(1)

    @device
    def merge_all(maximum: Any, sum: Any) -> Any:
        largest = meet_largest(maximum)
        sum = sum * rebase(maximum, largest) + (zero if maximum == largest else term(maximum, largest))
        ties = one if maximum == largest else zero
        sum, ties = meet_sum(sum), meet_sum(ties)
        return largest, sum + (ties - one) * term(largest, largest)

    return merge_all


@cache
def results(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions from a row's state to its result.

    ``of_row`` gives the number that all elements of the row share, in two parts; ``of_words`` turns the words of a
    vector into those of its result, with that number and the g of the row.
    """
    _, n_words, per_word = access(format, vectorized)
    value, pack = elements(format).value, elements(format).pack
    state = _state.on_device(format.precision)
    reference, power = state.reference, state.power
    zero, word, element = format.real(0), format.word, format.element

    log_total, scaled = state.log_total, state.scaled

    if kernel in ("log_softmax", "logsumexp"):

        @device
        def of_row(maximum: Any, sum: Any) -> Any:
            return log_total(maximum, sum), zero

    else:
        of_row = state.inverse_total

    if format.precision == "half":  # the second part is below what a result shows

        @device
        def scaled(term: Any, inverse: Any, inverse_low: Any) -> Any:
            return term * inverse

    if kernel == "log_softmax":

        @device
        def one(x: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any, g: Any) -> Any:
            return (x - maximum) - shared

    elif kernel == "logsumexp_vjp":

        @device
        def one(x: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any, g: Any) -> Any:
            p = scaled(power(x - offset, shift), shared, low)
            return zero if p == zero else p * g

    else:

        @device
        def one(x: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any, g: Any) -> Any:
            return scaled(power(x - offset, shift), shared, low)

    @device
    def of_word(
        w: Any,
        carry: Any,
        words: Any,
        position: Any,
        maximum: Any,
        offset: Any,
        shift: Any,
        shared: Any,
        low: Any,
        g: Any,
    ) -> Any:
        word = words[position + w]
        second = one(value(word, 1), maximum, offset, shift, shared, low, g) if per_word == 2 else zero
        words[position + w] = pack(one(value(word, 0), maximum, offset, shift, shared, low, g), second)
        return carry

    of_each_word = repeated(of_word, n_words)

    @device
    def of_words(words: Any, position: Any, maximum: Any, shared: Any, low: Any, g: Any) -> Any:
        offset, shift = reference(maximum)
        of_each_word(0, words, position, maximum, offset, shift, shared, low, g)

    @device
    def write_logsumexp(y: Any, address: Any, maximum: Any, log_total: Any) -> Any:
        y[address] = element(pack(maximum + log_total, zero))

    @device
    def read_g(g: Any, address: Any) -> Any:
        return value(word(g[address]), 0)

    return SimpleNamespace(of_row=of_row, of_one=one, of_words=of_words, write_logsumexp=write_logsumexp, read_g=read_g)


@cache
def tiles(kernel: Kernel, format: Format, vectorized: bool, count: int) -> SimpleNamespace:
    """Return device functions for so many vectors of a row that a lane has in registers, ``step`` elements apart.

    ``read`` and ``write`` move them, ``largest`` and ``add`` take them into the state of the lane.
    """
    _, n_words, _ = access(format, vectorized)
    memory, fold = vectors(format, vectorized, format.minus_infinity), folding(format, vectorized)
    load, store, vector_largest, vector_add = memory.load, memory.store, fold.largest, fold.add
    of_words = results(kernel, format, vectorized).of_words

    @device
    def read_one(
        h: Any, carry: Any, x: Any, start: Any, first: Any, step: Any, n: Any, reduced: Any, words: Any
    ) -> Any:
        i = first + h * step
        load(x, start + (i if vectorized else places(i, reduced)[0]), i, n, words, h * n_words)
        return carry

    @device
    def largest_of_one(h: Any, maximum: Any, words: Any) -> Any:
        return vector_largest(maximum, words, h * n_words)

    @device
    def add_one(h: Any, carry: Any, words: Any, maximum: Any) -> Any:
        return vector_add(carry[0], carry[1], words, h * n_words, maximum)

    @device
    def write_one(
        h: Any, carry: Any, y: Any, start: Any, first: Any, step: Any, n: Any, reduced: Any, words: Any,
        maximum: Any, shared: Any, low: Any, g: Any,
    ) -> Any:  # fmt: skip
        i = first + h * step
        of_words(words, h * n_words, maximum, shared, low, g)
        store(y, start + (i if vectorized else places(i, reduced)[1]), i, n, words, h * n_words)
        return carry

    return SimpleNamespace(
        read=repeated(read_one, count),
        largest=repeated(largest_of_one, count),
        add=repeated(add_one, count),
        write=repeated(write_one, count),
    )


@cache
def ranges(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions for parts of a row that do not stay in registers: read them, and read them again.

    Both take the index of a lane's first element, where the part ends, the length of the row and a lane's step.
    """
    _, n_words, _ = access(format, vectorized)
    tile, advance = tiles(kernel, format, vectorized, IN_FLIGHT), folding(format, vectorized).advance
    read, largest, add, write = tile.read, tile.largest, tile.add, tile.write
    word, lowest, zero, n_tile = format.word, format.real(-np.inf), format.real(0), IN_FLIGHT * n_words

    @device
    def fold_range(x: Any, x_row: Any, begin: Any, end: Any, n: Any, step: Any, reduced: Any) -> Any:
        maximum, sum, ties = lowest, zero, zero
        words = cuda.local.array(n_tile, word)
        for first in range(begin, end, IN_FLIGHT * step):
            read(0, x, x_row, first, step, n, reduced, words)
            new_maximum = largest(maximum, words)
            sum, ties = add(advance(maximum, sum, ties, new_maximum), words, new_maximum)
            maximum = new_maximum
        return maximum, sum, ties

    @device
    def write_range(
        x: Any, x_row: Any, y: Any, y_row: Any, begin: Any, end: Any, n: Any, step: Any, reduced: Any,
        maximum: Any, shared: Any, low: Any, g: Any,
    ) -> Any:  # fmt: skip
        words = cuda.local.array(n_tile, word)
        for first in range(begin, end, IN_FLIGHT * step):
            read(0, x, x_row, first, step, n, reduced, words)
            write(0, y, y_row, first, step, n, reduced, words, maximum, shared, low, g)

    return SimpleNamespace(fold_range=fold_range, write_range=write_range)


@cache
def row_kernel(kernel: Kernel, format: Format, vectorized: bool, lanes: int, held: int, has_rest: bool) -> Any:
    """Make a kernel for rows that so many neighbouring lanes share, or the lanes of a block if that is 0.

    Each lane holds so many vectors in registers. The rest of the row, if any, is read twice.
    """
    vector, n_words, _ = access(format, vectorized)
    tile = tiles(kernel, format, vectorized, held)
    meet = meeting(format.precision, lanes)
    part = ranges(kernel, format, vectorized)
    read, largest, add, write = tile.read, tile.largest, tile.add, tile.write
    meet_largest, meet_sum, fold_range, write_range = meet.largest, meet.sum, part.fold_range, part.write_range
    result, state = results(kernel, format, vectorized), _state.on_device(format.precision)
    of_row, write_logsumexp, read_g = result.of_row, result.write_logsumexp, result.read_g
    advance, larger, term = folding(format, vectorized).advance, state.larger, state.term
    word, lowest, zero, one = format.word, format.real(-np.inf), format.real(0), format.real(1)
    is_reduction, has_g, n_held = kernel == "logsumexp", kernel == "logsumexp_vjp", held * n_words

    def rows(x: Any, y: Any, g: Any, n_rows: Any, n_cols: Any, phase: Any, kept: Any, reduced: Any) -> None:
        if lanes:
            width, lane = np.int64(lanes), np.int64(cuda.threadIdx.x % lanes)
            row = np.int64(cuda.blockIdx.x) * (cuda.blockDim.x // lanes) + cuda.threadIdx.x // lanes
        else:
            width, lane, row = np.int64(cuda.blockDim.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        n = n_cols if row < n_rows else np.int64(0)
        x_row, y_row, g_row = places(row, kept)
        first = lane * vector - ((phase + x_row) & (vector - 1))
        step = width * vector
        rest = first + held * step

        words = cuda.local.array(n_held, word)
        read(0, x, x_row, first, step, n, reduced, words)
        maximum, rest_maximum, sum, ties = largest(lowest, words), lowest, zero, zero
        if has_rest:
            rest_maximum, sum, ties = fold_range(x, x_row, rest, n, n, step, reduced)
        maximum = meet_largest(larger(maximum, rest_maximum))
        if has_rest:
            sum, ties = advance(rest_maximum, sum, ties, maximum)
        sum, ties = add((sum, ties), words, maximum)
        sum, ties = meet_sum(sum), meet_sum(ties)
        shared, low = of_row(maximum, sum + (ties - one) * term(maximum, maximum))

        if is_reduction:
            if lane == 0 and row < n_rows:
                write_logsumexp(y, y_row, maximum, shared)
        else:
            g_of_row = read_g(g, g_row) if has_g and row < n_rows else zero
            write(0, y, y_row, first, step, n, reduced, words, maximum, shared, low, g_of_row)
            if has_rest:
                write_range(x, x_row, y, y_row, rest, n, n, step, reduced, maximum, shared, low, g_of_row)

    return rows


@cache
def product_row_kernel(kernel: Kernel, format: Format, vectorized: bool, lanes: int, held: int, has_rest: bool) -> Any:
    """Make a kernel for the vector-Jacobian products of softmax, from p and g, and of log_softmax, from log p and g.

    Rows are shared as in `row_kernel`. What lanes meet about is a sum over the row, of p * g or of g; an element whose
    probability is 0 adds nothing to the first and gets no gradient through it, whatever its g.
    """
    vector, n_words, per_word = access(format, vectorized)
    memory, meet_sum = vectors(format, vectorized, 0), meeting(format.precision, lanes).sum
    load, store, value, pack = memory.load, memory.store, elements(format).value, elements(format).pack
    exponential = _state.on_device(format.precision).exponential
    word, zero, n_held, is_softmax = format.word, format.real(0), held * n_words, kernel == "softmax_vjp"

    @device
    def summand(x: Any, g: Any) -> Any:
        if is_softmax:
            return zero if x == zero else x * g
        return g

    @device
    def result(x: Any, g: Any, sum: Any) -> Any:
        if is_softmax:
            return zero if x == zero else x * (g - sum)
        p = exponential(x)
        return g if p == zero else g - p * sum

    @device
    def add_word(w: Any, sum: Any, x_words: Any, g_words: Any, position: Any) -> Any:
        x_word, g_word = x_words[position + w], g_words[position + w]
        sum += summand(value(x_word, 0), value(g_word, 0))
        if per_word == 2:
            sum += summand(value(x_word, 1), value(g_word, 1))
        return sum

    @device
    def of_word(w: Any, carry: Any, x_words: Any, g_words: Any, position: Any, sum: Any) -> Any:
        x_word, g_word = x_words[position + w], g_words[position + w]
        second = result(value(x_word, 1), value(g_word, 1), sum) if per_word == 2 else zero
        x_words[position + w] = pack(result(value(x_word, 0), value(g_word, 0), sum), second)
        return carry

    add_words, of_words = repeated(add_word, n_words), repeated(of_word, n_words)

    @device
    def read_one(
        h: Any, carry: Any, x: Any, x_row: Any, g: Any, g_row: Any, first: Any, step: Any, n: Any, reduced: Any,
        x_words: Any, g_words: Any,
    ) -> Any:  # fmt: skip
        i = first + h * step
        load(x, x_row + (i if vectorized else places(i, reduced)[0]), i, n, x_words, h * n_words)
        load(g, g_row + (i if vectorized else places(i, reduced)[2]), i, n, g_words, h * n_words)
        return carry

    @device
    def add_one(h: Any, sum: Any, x_words: Any, g_words: Any) -> Any:
        return sum + add_words(zero, x_words, g_words, h * n_words)

    @device
    def write_one(
        h: Any, carry: Any, y: Any, y_row: Any, first: Any, step: Any, n: Any, reduced: Any,
        x_words: Any, g_words: Any, sum: Any,
    ) -> Any:  # fmt: skip
        i = first + h * step
        of_words(0, x_words, g_words, h * n_words, sum)
        store(y, y_row + (i if vectorized else places(i, reduced)[1]), i, n, x_words, h * n_words)
        return carry

    read, add, write = repeated(read_one, held), repeated(add_one, held), repeated(write_one, held)

    def product_rows(x: Any, y: Any, g: Any, n_rows: Any, n_cols: Any, phase: Any, kept: Any, reduced: Any) -> None:
        if lanes:
            width, lane = np.int64(lanes), np.int64(cuda.threadIdx.x % lanes)
            row = np.int64(cuda.blockIdx.x) * (cuda.blockDim.x // lanes) + cuda.threadIdx.x // lanes
        else:
            width, lane, row = np.int64(cuda.blockDim.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        n = n_cols if row < n_rows else np.int64(0)
        x_row, y_row, g_row = places(row, kept)
        first = lane * vector - ((phase + x_row) & (vector - 1))
        step = width * vector

        x_words = cuda.local.array(n_held, word)
        g_words = cuda.local.array(n_held, word)
        read(0, x, x_row, g, g_row, first, step, n, reduced, x_words, g_words)
        sum = add(zero, x_words, g_words)
        if has_rest:
            x_rest = cuda.local.array(n_held, word)
            g_rest = cuda.local.array(n_held, word)
            for begin in range(first + held * step, n, held * step):
                read(0, x, x_row, g, g_row, begin, step, n, reduced, x_rest, g_rest)
                sum += add(zero, x_rest, g_rest)
        sum = meet_sum(sum)
        write(0, y, y_row, first, step, n, reduced, x_words, g_words, sum)
        if has_rest:
            for begin in range(first + held * step, n, held * step):
                read(0, x, x_row, g, g_row, begin, step, n, reduced, x_rest, g_rest)
                write(0, y, y_row, begin, step, n, reduced, x_rest, g_rest, sum)

    return product_rows


@cache
def chunk_state_kernel(format: Format, vectorized: bool) -> Any:
    """Make a kernel that leaves the state of each chunk of each row: a maximum, and the sum of the others' terms."""
    vector, _, _ = access(format, vectorized)
    merge_all, fold_range = merging(format, 0), ranges("softmax", format, vectorized).fold_range
    term, zero, one = _state.on_device(format.precision).term, format.real(0), format.real(1)

    def chunk_states(
        x: Any, maxima: Any, sums: Any, n_chunks: Any, chunk: Any, n_cols: Any, phase: Any, kept: Any, reduced: Any
    ) -> None:
        block = np.int64(cuda.blockIdx.x)
        x_row, _, _ = places(block // n_chunks, kept)
        start = block % n_chunks * chunk - ((phase + x_row) & (vector - 1))
        begin, end = start + cuda.threadIdx.x * vector, min(start + chunk, n_cols)
        maximum, sum, ties = fold_range(x, x_row, begin, end, n_cols, cuda.blockDim.x * vector, reduced)
        maximum, sum = merge_all(maximum, sum + (ties - one) * term(maximum, maximum) if ties > zero else sum)
        if cuda.threadIdx.x == 0:
            maxima[block] = maximum
            sums[block] = sum

    return chunk_states


@cache
def chunk_result_kernel(kernel: Kernel, format: Format, vectorized: bool) -> Any:
    """Make a kernel that merges the states of a row's chunks and writes one chunk of the result."""
    vector, _, _ = access(format, vectorized)
    result = results(kernel, format, vectorized)
    merge = _state.on_device(format.precision).merge
    merge_all = merging(format, 0)
    of_row, write_logsumexp, read_g = result.of_row, result.write_logsumexp, result.read_g
    write_range = ranges(kernel, format, vectorized).write_range
    lowest, zero = format.real(-np.inf), format.real(0)
    is_reduction, has_g = kernel == "logsumexp", kernel == "logsumexp_vjp"

    def chunk_results(
        x: Any, y: Any, g: Any, maxima: Any, sums: Any,
        n_chunks: Any, chunk: Any, n_cols: Any, phase: Any, kept: Any, reduced: Any,
    ) -> None:  # fmt: skip
        # From the last block to the first: what the kernel before read last is still in the cache.
        block = np.int64(cuda.gridDim.x) - 1 - cuda.blockIdx.x
        row = block if is_reduction else block // n_chunks
        x_row, y_row, g_row = places(row, kept)

        maximum, sum = lowest, zero
        for c in range(row * n_chunks + cuda.threadIdx.x, (row + 1) * n_chunks, cuda.blockDim.x):
            maximum, sum = merge(maximum, sum, maxima[c], sums[c])
        maximum, sum = merge_all(maximum, sum)
        shared, low = of_row(maximum, sum)

        if is_reduction:
            if cuda.threadIdx.x == 0:
                write_logsumexp(y, y_row, maximum, shared)
        else:
            start = block % n_chunks * chunk - ((phase + x_row) & (vector - 1))
            begin, end = start + cuda.threadIdx.x * vector, min(start + chunk, n_cols)
            step, g_of_row = cuda.blockDim.x * vector, read_g(g, g_row) if has_g else zero
            write_range(x, x_row, y, y_row, begin, end, n_cols, step, reduced, maximum, shared, low, g_of_row)

    return chunk_results


@cache
def columns(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions for the vectors of a strip, whose elements belong to as many rows.

    A lane keeps what it knows of each of its rows in arrays: ``maxima``, ``sums`` and ``ties``, and in the end
    ``shared``, ``lows`` and ``gs``, the arguments of their results.
    """
    vector, n_words, per_word = access(format, vectorized)
    memory, one_result = vectors(format, vectorized, format.minus_infinity), results(kernel, format, vectorized).of_one
    load, store, value, pack = memory.load, memory.store, elements(format).value, elements(format).pack
    fold, state, zero = folding(format, vectorized), _state.on_device(format.precision), format.real(0)
    advance, add_element, larger, reference = fold.advance, fold.add_element, state.larger, state.reference

    @device
    def read_one(
        h: Any, carry: Any, x: Any, start: Any, step: Any, j: Any, n: Any, column: Any, n_inner: Any, words: Any
    ) -> Any:
        i = j + h * cuda.blockDim.y
        load(x, start + i * step + column, column, n_inner if i < n else np.int64(0), words, h * n_words)
        return carry

    @device
    def larger_one(h: Any, maximum: Any, words: Any, v: Any) -> Any:
        return larger(maximum, value(words[h * n_words + v // per_word], v % per_word))

    @device
    def add_one(h: Any, carry: Any, words: Any, v: Any, maximum: Any, offset: Any, shift: Any) -> Any:
        x = value(words[h * n_words + v // per_word], v % per_word)
        return add_element(carry[0], carry[1], x, maximum, offset, shift)

    largest, add = repeated(larger_one, IN_FLIGHT), repeated(add_one, IN_FLIGHT)

    @device
    def fold_one(v: Any, carry: Any, words: Any, maxima: Any, sums: Any, ties: Any) -> Any:
        maximum = largest(maxima[v], words, v)
        offset, shift = reference(maximum)
        sums[v], ties[v] = add(advance(maxima[v], sums[v], ties[v], maximum), words, v, maximum, offset, shift)
        maxima[v] = maximum
        return carry

    @device
    def result_of(word: Any, place: Any, v: Any, maxima: Any, shared: Any, lows: Any, gs: Any) -> Any:
        offset, shift = reference(maxima[v])
        return one_result(value(word, place), maxima[v], offset, shift, shared[v], lows[v], gs[v])

    @device
    def result_word(w: Any, carry: Any, position: Any, words: Any, maxima: Any, shared: Any, lows: Any, gs: Any) -> Any:
        word, v = words[position + w], w * per_word
        second = result_of(word, 1, v + 1, maxima, shared, lows, gs) if per_word == 2 else zero
        words[position + w] = pack(result_of(word, 0, v, maxima, shared, lows, gs), second)
        return carry

    result_words = repeated(result_word, n_words)

    @device
    def write_one(
        h: Any, carry: Any, y: Any, start: Any, step: Any, j: Any, n: Any, column: Any, n_inner: Any, words: Any,
        maxima: Any, shared: Any, lows: Any, gs: Any,
    ) -> Any:  # fmt: skip
        i = j + h * cuda.blockDim.y
        result_words(0, h * n_words, words, maxima, shared, lows, gs)
        store(y, start + i * step + column, column, n_inner if i < n else np.int64(0), words, h * n_words)
        return carry

    return SimpleNamespace(
        read=repeated(read_one, IN_FLIGHT), fold=repeated(fold_one, vector), write=repeated(write_one, IN_FLIGHT)
    )


@cache
def strip_kernel(kernel: Kernel, format: Format, vectorized: bool, threads: int) -> Any:
    """Make a kernel for rows that lie side by side: a block has a strip of them, ``blockDim.x`` vectors wide.

    Lanes above each other (in ``threadIdx.y``, a power of two of them) have different elements of the same rows. Each
    element is read twice; strips are narrow enough that those under way stay in the L2 cache.
    """
    vector, n_words, _ = access(format, vectorized)
    strip = columns(kernel, format, vectorized)
    result = results(kernel, format, vectorized)
    state = _state.on_device(format.precision)
    read, fold, write, advance = strip.read, strip.fold, strip.write, folding(format, vectorized).advance
    of_row = result.of_row
    write_logsumexp = result.write_logsumexp
    read_g = result.read_g
    larger = state.larger
    term = state.term
    word, real, lowest, zero, one = format.word, format.real, format.real(-np.inf), format.real(0), format.real(1)
    is_reduction, has_g = kernel == "logsumexp", kernel == "logsumexp_vjp"
    n_tile, n_meeting = IN_FLIGHT * n_words, threads * vector

    @device
    def advance_one(v: Any, carry: Any, maxima: Any, sums: Any, ties: Any, base: Any, meeting_a: Any) -> Any:
        maximum = meeting_a[base + v]
        sums[v], ties[v] = advance(maxima[v], sums[v], ties[v], maximum)
        maxima[v] = maximum
        return carry

    @device
    def finish_one(
        v: Any, carry: Any, y: Any, y_start: Any, g: Any, g_start: Any, column: Any, n_inner: Any, inner: Any,
        base: Any, meeting_a: Any, meeting_b: Any, maxima: Any, shared: Any, lows: Any, gs: Any,
    ) -> Any:  # fmt: skip
        top = term(maxima[v], maxima[v])
        shared[v], lows[v] = of_row(maxima[v], meeting_a[base + v] + (meeting_b[base + v] - one) * top)
        is_row = column + v >= 0 and column + v < n_inner
        if is_reduction and is_row and cuda.threadIdx.y == 0:
            write_logsumexp(y, y_start + (column + v) * inner[2], maxima[v], shared[v])
        gs[v] = read_g(g, g_start + (column + v) * inner[3]) if has_g and is_row else zero
        return carry

    @device
    def begin_one(v: Any, carry: Any, maxima: Any, sums: Any, ties: Any) -> Any:
        maxima[v], sums[v], ties[v] = lowest, zero, zero
        return carry

    @device
    def show_one(v: Any, carry: Any, values: Any, mine: Any, meeting: Any) -> Any:
        meeting[mine + v] = values[v]
        return carry

    begin, show = repeated(begin_one, vector), repeated(show_one, vector)
    advance_all, finish = repeated(advance_one, vector), repeated(finish_one, vector)

    def strips(
        x: Any,
        y: Any,
        g: Any,
        n_inner: Any,
        n_cols: Any,
        phase: Any,
        n_strips: Any,
        kept: Any,
        inner: Any,
        reduced: Any,
    ) -> None:
        block, layer = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.y)
        x_start, y_start, g_start = places(block // n_strips, kept)
        column = (block % n_strips * cuda.blockDim.x + cuda.threadIdx.x) * vector - phase
        stride = IN_FLIGHT * cuda.blockDim.y

        words = cuda.local.array(n_tile, word)
        maxima = cuda.local.array(vector, real)
        sums = cuda.local.array(vector, real)
        ties = cuda.local.array(vector, real)
        begin(0, maxima, sums, ties)
        for j in range(layer, n_cols, stride):
            read(0, x, x_start, reduced[1], j, n_cols, column, n_inner, words)
            fold(0, words, maxima, sums, ties)

        # Layers meet two by two: first their maxima, then the sums beside these.
        meeting_a = cuda.shared.array(n_meeting, real)
        meeting_b = cuda.shared.array(n_meeting, real)
        base, layer_size = cuda.threadIdx.x * vector, cuda.blockDim.x * vector
        mine = layer * layer_size + base
        show(0, maxima, mine, meeting_a)
        cuda.syncthreads()
        half = np.int64(cuda.blockDim.y // 2)
        while half > 0:
            if layer < half:
                for place in range(mine, mine + vector):
                    meeting_a[place] = larger(meeting_a[place], meeting_a[place + half * layer_size])
            cuda.syncthreads()
            half //= 2
        advance_all(0, maxima, sums, ties, base, meeting_a)
        cuda.syncthreads()
        show(0, sums, mine, meeting_a)
        show(0, ties, mine, meeting_b)
        cuda.syncthreads()
        half = np.int64(cuda.blockDim.y // 2)
        while half > 0:
            if layer < half:
                for place in range(mine, mine + vector):
                    meeting_a[place] += meeting_a[place + half * layer_size]
                    meeting_b[place] += meeting_b[place + half * layer_size]
            cuda.syncthreads()
            half //= 2

        shared = cuda.local.array(vector, real)
        lows = cuda.local.array(vector, real)
        gs = cuda.local.array(vector, real)
        finish(0, y, y_start, g, g_start, column, n_inner, inner, base, meeting_a, meeting_b, maxima, shared, lows, gs)
        if not is_reduction:
            for j in range(layer, n_cols, stride):
                read(0, x, x_start, reduced[1], j, n_cols, column, n_inner, words)
                write(0, y, y_start, reduced[2], j, n_cols, column, n_inner, words, maxima, shared, lows, gs)

    return strips
