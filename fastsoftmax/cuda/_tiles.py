"""A few vectors of a row in a lane's registers, and the parts of a row that are gone through a few vectors at a time.

With two inputs, the words of a vector of x are followed in registers by those of the same vector of g. In shared memory
the vectors of all lanes lie side by side, as a layer; there a layer of x is followed by that of g.

What reads elements and takes them into states is made for `states_of` a kernel: Numba, whose time is in functions more
than in kernels, compiles it once for softmax, log_softmax, logsumexp and the product of that.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from fastsoftmax.cuda import _instructions
from fastsoftmax.cuda._functions import Kernel, n_inputs, results, states, states_of
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._plan import IN_FLIGHT, tile_vectors
from fastsoftmax.cuda._vectors import Format, access, elements, places, repeated, vectors

# Tiles on their way to shared memory while one is computed with: of 512 lanes, these are 128 KiB.
TILES_AHEAD = 4


@cache
def second_input(kernel: Kernel, format: Format, vectorized: bool) -> Any:
    """Return a device function of words, the place of a word of x, that of an element in it, and the g of the row.

    It gives the g of the element: the second input, or that of the row where there is but one.
    """
    _, n_words, _ = access(format, vectorized)
    value = elements(format).value
    if n_inputs(kernel) == 1:

        @device
        def of_element(words: Any, position: Any, place: Any, g: Any) -> Any:
            return g

    else:

        @device
        def of_element(words: Any, position: Any, place: Any, g: Any) -> Any:
            return value(words[position + n_words], place)

    return of_element


@cache
def folding(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions that take the words of a vector of one row into a state."""
    _, n_words, per_word = access(format, vectorized)
    compute, zero, value = states(kernel, format), format.real(0), elements(format).value
    g_of = second_input(states_of(kernel), format, vectorized)
    reference, add_element, larger, joined = compute.reference, compute.add, compute.largest, compute.joined

    @device
    def largest_of_word(w: Any, maximum: Any, words: Any, position: Any) -> Any:
        for_first = larger(maximum, value(words[position + w], 0))
        return larger(for_first, value(words[position + w], 1)) if per_word == 2 else for_first

    @device
    def add_word(w: Any, carry: Any, words: Any, position: Any, maximum: Any, offset: Any, shift: Any) -> Any:
        place = position + w
        first, g = value(words[place], 0), g_of(words, place, 0, zero)
        sum, rest, ties = add_element(carry[0], carry[1], carry[2], first, g, maximum, offset, shift)
        if per_word == 2:
            second, g = value(words[place], 1), g_of(words, place, 1, zero)
            sum, rest, ties = add_element(sum, rest, ties, second, g, maximum, offset, shift)
        return sum, rest, ties

    largest, add_words = repeated(largest_of_word, n_words), repeated(add_word, n_words)

    @device
    def add(sum: Any, residue: Any, ties: Any, words: Any, position: Any, maximum: Any) -> Any:
        offset, shift = reference(maximum)
        of_vector, rest, ties = add_words((zero, zero, ties), words, position, maximum, offset, shift)
        sum, residue = joined(sum, residue, of_vector, rest)
        return sum, residue, ties

    return SimpleNamespace(largest=largest, add=add)


@cache
def vector_results(kernel: Kernel, format: Format, vectorized: bool) -> Any:
    """Return a device function that turns the words of a vector of one row into those of its results."""
    _, n_words, per_word = access(format, vectorized)
    zero, value, pack = format.real(0), elements(format).value, elements(format).pack
    reference, of_element = states(kernel, format).reference, results(kernel, format).of_element
    g_of = second_input(states_of(kernel), format, vectorized)

    @device
    def result_of_word(
        w: Any, carry: Any, words: Any, position: Any,
        maximum: Any, offset: Any, shift: Any, shared: Any, low: Any, g: Any,
    ) -> Any:  # fmt: skip
        place, second = position + w, zero
        if per_word == 2:
            of_second = g_of(words, place, 1, g)
            second = of_element(value(words[place], 1), of_second, maximum, offset, shift, shared, low)
        of_first = g_of(words, place, 0, g)
        first = of_element(value(words[place], 0), of_first, maximum, offset, shift, shared, low)
        words[place] = pack(first, second)
        return carry

    result_of_words = repeated(result_of_word, n_words)

    @device
    def make_results(words: Any, position: Any, maximum: Any, shared: Any, low: Any, g: Any) -> Any:
        offset, shift = reference(maximum)
        result_of_words(0, words, position, maximum, offset, shift, shared, low, g)

    return make_results


@cache
def tiles(kernel: Kernel, format: Format, vectorized: bool, count: int) -> SimpleNamespace:
    """Return device functions for so many vectors of a row that a lane has in registers, ``step`` elements apart.

    ``read`` reads them to registers; ``copy`` to shared memory, where those of a block's lanes lie side by side, and
    ``take`` has them from there. ``largest`` and ``add`` take them into the state of the lane, ``write`` writes their
    results.
    """
    _, n_words, _ = access(format, vectorized)
    n_vector = n_inputs(kernel) * n_words
    store = vectors(format, vectorized, states(kernel, format).padding).store
    make_results = vector_results(kernel, format, vectorized)

    @device
    def write_one(
        h: Any, carry: Any, y: Any, y_row: Any, first: Any, step: Any, n: Any, reduced: Any, words: Any,
        maximum: Any, shared: Any, low: Any, g: Any,
    ) -> Any:  # fmt: skip
        i = first + h * step
        make_results(words, h * n_vector, maximum, shared, low, g)
        store(y, y_row + (i if vectorized else places(i, reduced)[1]), i, n, words, h * n_vector)
        return carry

    folded = _folded_tiles(states_of(kernel), format, vectorized, count)
    return SimpleNamespace(**vars(folded), write=repeated(write_one, count))


@cache
def _folded_tiles(kernel: Kernel, format: Format, vectorized: bool, count: int) -> SimpleNamespace:
    """Return what `tiles` has for all kernels with the same states."""
    _, n_words, _ = access(format, vectorized)
    inputs = n_inputs(kernel)
    is_product, n_vector = inputs == 2, inputs * n_words
    memory = vectors(format, vectorized, states(kernel, format).padding)
    load, copy, take = memory.load, memory.copy, memory.take
    of_vector = folding(kernel, format, vectorized)
    vector_largest, vector_add = of_vector.largest, of_vector.add

    @device
    def read_one(
        h: Any, carry: Any, x: Any, x_row: Any, g: Any, g_row: Any, first: Any, step: Any, n: Any, reduced: Any,
        words: Any,
    ) -> Any:  # fmt: skip
        i = first + h * step
        load(x, x_row + (i if vectorized else places(i, reduced)[0]), i, n, words, h * n_vector)
        if is_product:
            load(g, g_row + (i if vectorized else places(i, reduced)[2]), i, n, words, h * n_vector + n_words)
        return carry

    @device
    def copy_one(
        h: Any, carry: Any, x: Any, x_row: Any, g: Any, g_row: Any, first: Any, step: Any, n: Any, reduced: Any,
        stored: Any, place: Any, layer: Any,
    ) -> Any:  # fmt: skip
        i = first + h * step
        copy(x, x_row + (i if vectorized else places(i, reduced)[0]), i, n, stored, place + h * inputs * layer)
        if is_product:
            g_place = place + (h * inputs + 1) * layer
            copy(g, g_row + (i if vectorized else places(i, reduced)[2]), i, n, stored, g_place)
        return carry

    @device
    def take_one(h: Any, carry: Any, stored: Any, place: Any, layer: Any, words: Any) -> Any:
        take(stored, place + h * inputs * layer, words, h * n_vector)
        if is_product:
            take(stored, place + (h * inputs + 1) * layer, words, h * n_vector + n_words)
        return carry

    @device
    def largest_of_one(h: Any, maximum: Any, words: Any) -> Any:
        return vector_largest(maximum, words, h * n_vector)

    @device
    def add_one(h: Any, carry: Any, words: Any, maximum: Any) -> Any:
        return vector_add(carry[0], carry[1], carry[2], words, h * n_vector, maximum)

    return SimpleNamespace(
        read=repeated(read_one, count),
        copy=repeated(copy_one, count),
        take=repeated(take_one, count),
        largest=repeated(largest_of_one, count),
        add=repeated(add_one, count),
        n_words=count * n_vector,
    )


@cache
def ranges(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions for the parts of a row that are read twice: take them into a state, write their results.

    Both take the index of a lane's first element, where the part ends, the length of the row and a lane's step.
    """
    tile, word = tiles(kernel, format, vectorized, IN_FLIGHT), format.word
    read, write, n_tile = tile.read, tile.write, tile.n_words

    @device
    def write_range(
        x: Any, x_row: Any, y: Any, y_row: Any, g: Any, g_row: Any, begin: Any, end: Any, n: Any, step: Any,
        reduced: Any, maximum: Any, shared: Any, low: Any, g_of_row: Any,
    ) -> Any:  # fmt: skip
        words = cuda.local.array(n_tile, word)
        for first in range(begin, end, IN_FLIGHT * step):
            read(0, x, x_row, g, g_row, first, step, n, reduced, words)
            write(0, y, y_row, first, step, n, reduced, words, maximum, shared, low, g_of_row)

    return SimpleNamespace(fold_range=_fold_range(states_of(kernel), format, vectorized), write_range=write_range)


@cache
def _fold_range(kernel: Kernel, format: Format, vectorized: bool) -> Any:
    tile, advance = tiles(kernel, format, vectorized, IN_FLIGHT), states(kernel, format).advance
    read, largest, add = tile.read, tile.largest, tile.add
    word, n_tile = format.word, tile.n_words

    @device
    def fold_range(
        state: Any, x: Any, x_row: Any, g: Any, g_row: Any, begin: Any, end: Any, n: Any, step: Any, reduced: Any
    ) -> Any:
        maximum, sum, residue, ties = state
        words = cuda.local.array(n_tile, word)
        for first in range(begin, end, IN_FLIGHT * step):
            read(0, x, x_row, g, g_row, first, step, n, reduced, words)
            new_maximum = largest(maximum, words)
            sum, residue, ties = add(advance(maximum, sum, residue, ties, new_maximum), words, new_maximum)
            maximum = new_maximum
        return maximum, sum, residue, ties

    return fold_range


@cache
def stored_part(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions for the part of a row that a block keeps in shared memory.

    ``begin`` sends for the first tiles, before the lane reads what it holds in registers. ``fold`` takes tiles into a
    state as they come, and sends for more; ``write`` writes the results of all. Every lane has its own words there, so
    nobody waits for another one. ``place`` is where those of its first vector are, ``layer`` how many words those of
    one vector of every lane are.
    """
    count = tile_vectors(n_inputs(kernel))
    tile, word = tiles(kernel, format, vectorized, count), format.word
    take, write, n_tile, per_tile = tile.take, tile.write, tile.n_words, count * n_inputs(kernel)

    @device
    def write_all(
        n_tiles: Any, y: Any, y_row: Any, first: Any, n: Any, step: Any, reduced: Any,
        stored: Any, place: Any, layer: Any, maximum: Any, shared: Any, low: Any, g_of_row: Any,
    ) -> Any:  # fmt: skip
        words = cuda.local.array(n_tile, word)
        for t in range(n_tiles):
            take(0, stored, place + t * per_tile * layer, layer, words)
            write(0, y, y_row, first + t * count * step, step, n, reduced, words, maximum, shared, low, g_of_row)

    folded = _folded_stored_part(states_of(kernel), format, vectorized)
    return SimpleNamespace(**vars(folded), write=write_all)


@cache
def _folded_stored_part(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return what `stored_part` has for all kernels with the same states."""
    count = tile_vectors(n_inputs(kernel))
    tile, advance = tiles(kernel, format, vectorized, count), states(kernel, format).advance
    copy, take, largest, add = tile.copy, tile.take, tile.largest, tile.add
    word, n_tile, per_tile = format.word, tile.n_words, count * n_inputs(kernel)
    commit, wait = _instructions.commit_copies, _instructions.await_copies(TILES_AHEAD)

    @device
    def send_for(
        t: Any, n_tiles: Any, x: Any, x_row: Any, g: Any, g_row: Any, first: Any, n: Any, step: Any, reduced: Any,
        stored: Any, place: Any, layer: Any,
    ) -> Any:  # fmt: skip
        if t < n_tiles:
            begin, there = first + t * count * step, place + t * per_tile * layer
            copy(0, x, x_row, g, g_row, begin, step, n, reduced, stored, there, layer)
        commit()  # a group for each tile, also for those after the last one: so the count of groups is the tile's

    @device
    def begin(
        n_tiles: Any, x: Any, x_row: Any, g: Any, g_row: Any, first: Any, n: Any, step: Any, reduced: Any,
        stored: Any, place: Any, layer: Any,
    ) -> Any:  # fmt: skip
        for t in range(TILES_AHEAD):
            send_for(t, n_tiles, x, x_row, g, g_row, first, n, step, reduced, stored, place, layer)

    @device
    def fold(
        state: Any, n_tiles: Any, x: Any, x_row: Any, g: Any, g_row: Any, first: Any, n: Any, step: Any, reduced: Any,
        stored: Any, place: Any, layer: Any,
    ) -> Any:  # fmt: skip
        maximum, sum, residue, ties = state
        words = cuda.local.array(n_tile, word)
        for t in range(n_tiles):
            send_for(t + TILES_AHEAD, n_tiles, x, x_row, g, g_row, first, n, step, reduced, stored, place, layer)
            wait()
            take(0, stored, place + t * per_tile * layer, layer, words)
            new_maximum = largest(maximum, words)
            sum, residue, ties = add(advance(maximum, sum, residue, ties, new_maximum), words, new_maximum)
            maximum = new_maximum
        return maximum, sum, residue, ties

    return SimpleNamespace(begin=begin, fold=fold)


@cache
def across_rows(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return device functions for the vectors of a strip, whose elements belong to as many rows.

    A lane keeps what it knows of each of its rows in arrays: ``maxima``, ``sums``, ``residues`` and ``ties``, and in
    the end ``shared``, ``lows`` and ``gs``, the arguments of their results.
    """
    _, n_words, per_word = access(format, vectorized)
    compute, zero, n_vector = states(kernel, format), format.real(0), n_inputs(kernel) * n_words
    store = vectors(format, vectorized, compute.padding).store
    value, pack, g_of = (
        elements(format).value,
        elements(format).pack,
        second_input(states_of(kernel), format, vectorized),
    )
    reference, of_element = compute.reference, results(kernel, format).of_element

    @device
    def result_of(words: Any, position: Any, place: Any, v: Any, maxima: Any, shared: Any, lows: Any, gs: Any) -> Any:
        offset, shift = reference(maxima[v])
        x, g = value(words[position], place), g_of(words, position, place, gs[v])
        return of_element(x, g, maxima[v], offset, shift, shared[v], lows[v])

    @device
    def result_word(w: Any, carry: Any, position: Any, words: Any, maxima: Any, shared: Any, lows: Any, gs: Any) -> Any:
        place, v = position + w, w * per_word
        second = result_of(words, place, 1, v + 1, maxima, shared, lows, gs) if per_word == 2 else zero
        words[place] = pack(result_of(words, place, 0, v, maxima, shared, lows, gs), second)
        return carry

    result_words = repeated(result_word, n_words)

    @device
    def write_one(
        h: Any, carry: Any, y: Any, y_start: Any, reduced: Any, j: Any, n: Any, column: Any, n_inner: Any, words: Any,
        maxima: Any, shared: Any, lows: Any, gs: Any,
    ) -> Any:  # fmt: skip
        i = j + h * cuda.blockDim.y
        result_words(0, h * n_vector, words, maxima, shared, lows, gs)
        width = n_inner if i < n else np.int64(0)
        store(y, y_start + i * reduced[2] + column, column, width, words, h * n_vector)
        return carry

    folded = _folded_across_rows(states_of(kernel), format, vectorized)
    return SimpleNamespace(**vars(folded), write=repeated(write_one, IN_FLIGHT))


@cache
def _folded_across_rows(kernel: Kernel, format: Format, vectorized: bool) -> SimpleNamespace:
    """Return what `across_rows` has for all kernels with the same states."""
    vector, n_words, per_word = access(format, vectorized)
    inputs, compute, zero = n_inputs(kernel), states(kernel, format), format.real(0)
    is_product, n_vector, joined = inputs == 2, inputs * n_words, compute.joined
    load, value = vectors(format, vectorized, compute.padding).load, elements(format).value
    g_of = second_input(states_of(kernel), format, vectorized)
    advance, add_element, larger, reference = compute.advance, compute.add, compute.largest, compute.reference

    @device
    def read_one(
        h: Any, carry: Any, x: Any, x_start: Any, g: Any, g_start: Any, reduced: Any, j: Any, n: Any,
        column: Any, n_inner: Any, words: Any,
    ) -> Any:  # fmt: skip
        i = j + h * cuda.blockDim.y
        width = n_inner if i < n else np.int64(0)
        load(x, x_start + i * reduced[1] + column, column, width, words, h * n_vector)
        if is_product:
            load(g, g_start + i * reduced[3] + column, column, width, words, h * n_vector + n_words)
        return carry

    @device
    def larger_one(h: Any, maximum: Any, words: Any, v: Any) -> Any:
        return larger(maximum, value(words[h * n_vector + v // per_word], v % per_word))

    @device
    def add_one(h: Any, carry: Any, words: Any, v: Any, maximum: Any, offset: Any, shift: Any) -> Any:
        position, place = h * n_vector + v // per_word, v % per_word
        x, g = value(words[position], place), g_of(words, position, place, zero)
        return add_element(carry[0], carry[1], carry[2], x, g, maximum, offset, shift)

    largest, add = repeated(larger_one, IN_FLIGHT), repeated(add_one, IN_FLIGHT)

    @device
    def fold_one(v: Any, carry: Any, words: Any, maxima: Any, sums: Any, residues: Any, ties: Any) -> Any:
        maximum = largest(maxima[v], words, v)
        offset, shift = reference(maximum)
        sum, residue, n_ties = advance(maxima[v], sums[v], residues[v], ties[v], maximum)
        of_tile, rest, ties[v] = add((zero, zero, n_ties), words, v, maximum, offset, shift)
        sums[v], residues[v] = joined(sum, residue, of_tile, rest)
        maxima[v] = maximum
        return carry

    return SimpleNamespace(
        read=repeated(read_one, IN_FLIGHT),
        fold=repeated(fold_one, vector),
        n_words=IN_FLIGHT * n_vector,
    )
