"""How elements lie in memory, and how lanes read and write them: one at a time, or a vector of 16 bytes at once.

What a lane has read stays as it was read, in *words* of 32 bits (64 for float64), of which one holds two 16-bit
elements. It becomes numbers where it is computed with.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, types

from fastsoftmax.cuda import _instructions
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._state import Precision


class Format(NamedTuple):
    """How elements lie in memory, and the arithmetic they are computed in.

    Parameters
    ----------
    name : str
        The dtype.
    precision : {"half", "single", "double"}
        Whose functions of `fastsoftmax.cuda._state` compute.
    itemsize : int
        Bytes of an element.
    minus_infinity : int
        The bits of -inf.
    """

    name: str
    precision: Precision
    itemsize: int
    minus_infinity: int

    @property
    def real(self) -> Any:
        """The dtype that is computed in."""
        return np.float64 if self.precision == "double" else np.float32

    @property
    def word(self) -> Any:
        """The dtype of a word in registers."""
        return np.uint64 if self.itemsize == 8 else np.uint32

    @property
    def element(self) -> Any:
        """The dtype of an element in memory."""
        return {2: np.uint16, 4: np.uint32, 8: np.uint64}[self.itemsize]

    @property
    def pointer(self) -> Any:
        return types.CPointer({2: types.uint16, 4: types.uint32, 8: types.uint64}[self.itemsize])


FORMATS = {
    "float16": Format("float16", "half", 2, 0xFC00),
    "bfloat16": Format("bfloat16", "half", 2, 0xFF80),
    "float32": Format("float32", "single", 4, 0xFF800000),
    "float64": Format("float64", "double", 8, 0xFFF0000000000000),
}


@cache
def elements(format: Format) -> SimpleNamespace:
    """Return device functions from bits to numbers and back."""
    if format.itemsize == 8:

        @device
        def value(word: Any, place: Any) -> Any:
            return word.view(np.float64)

        @device
        def pack(first: Any, second: Any) -> Any:
            return first.view(np.uint64)

    elif format.itemsize == 4:

        @device
        def value(word: Any, place: Any) -> Any:
            return word.view(np.float32)

        @device
        def pack(first: Any, second: Any) -> Any:
            return first.view(np.uint32)

    elif format.name == "bfloat16":
        pack = _instructions.pack_bfloat16

        @device
        def value(word: Any, place: Any) -> Any:
            return np.uint32(word << np.uint32(16) if place == 0 else word & np.uint32(0xFFFF0000)).view(np.float32)

    else:
        pack = _instructions.pack_float16

        @device
        def value(word: Any, place: Any) -> Any:
            return _instructions.float16_value(np.uint16(word if place == 0 else word >> np.uint32(16)))

    return SimpleNamespace(value=value, pack=pack)


class Access(NamedTuple):
    """How lanes read and write: the number of elements to a vector (1: any place), of words, of elements to a word."""

    vector: int
    words: int
    per_word: int


def access(format: Format, vectorized: bool) -> Access:
    if not vectorized:
        return Access(1, 1, 1)
    per_word = 2 if format.itemsize == 2 else 1
    return Access(16 // format.itemsize, 16 // format.itemsize // per_word, per_word)


def repeated(body: Any, count: int) -> Any:
    """Return a device function that hands a carry on through ``body(number, carry, ...)`` for every number below count.

    It is a loop written out. Where a compiler leaves a loop a loop, words whose place is not known beforehand are kept
    in memory instead of registers: NVVM does so for sm_100, while it unrolls the same loops for sm_90.
    """

    @device
    def chain(carry: Any, *arguments: Any) -> Any:
        return carry

    for number in range(0, count - 3, 4):
        chain = _followed_by_four(chain, body, number)
    for number in range(count - count % 4, count):
        chain = _followed_by_one(chain, body, number)
    return chain


def _followed_by_one(chain: Any, body: Any, number: int) -> Any:
    @device
    def longer(carry: Any, *arguments: Any) -> Any:
        return body(number, chain(carry, *arguments), *arguments)

    return longer


def _followed_by_four(chain: Any, body: Any, number: int) -> Any:
    # Each device function takes Numba some 10 ms; four in one spare as many.
    @device
    def longer(carry: Any, *arguments: Any) -> Any:
        carry = body(number + 1, body(number, chain(carry, *arguments), *arguments), *arguments)
        return body(number + 3, body(number + 2, carry, *arguments), *arguments)

    return longer


def _single_elements(format: Format, padding: Any) -> SimpleNamespace:
    """Return `vectors` of one element."""
    word, element = format.word, format.element

    @device
    def load(x: Any, address: Any, index: Any, n: Any, words: Any, position: Any) -> Any:
        words[position] = word(x[address]) if index < n else padding

    @device
    def store(y: Any, address: Any, index: Any, n: Any, words: Any, position: Any) -> Any:
        if index < n:
            y[address] = element(words[position])

    @device
    def copy(x: Any, address: Any, index: Any, n: Any, stored: Any, position: Any) -> Any:
        stored[position] = word(x[address]) if index < n else padding

    @device
    def take(stored: Any, place: Any, words: Any, position: Any) -> Any:
        words[position] = stored[place]

    return SimpleNamespace(load=load, store=store, copy=copy, take=take)


@cache
def vectors(format: Format, vectorized: bool, padding: int) -> SimpleNamespace:
    """Return device functions that read and write one vector of a row, by elements where it is not wholly in it.

    Their arguments: a pointer, the place in memory and the index in the row of the vector's first element, the length
    of the row, an array of words, and where in it the words begin. What is not in the row is read as the padding.
    ``copy`` reads to shared memory, and may not be through when it returns; ``take`` has the words from there.
    """
    vector, n_words, per_word = access(format, vectorized)
    word, element = format.word, format.element
    bits = 8 * format.itemsize
    full_padding = word(padding | padding << bits if per_word == 2 else padding)

    if not vectorized:
        return _single_elements(format, full_padding)

    @device
    def pad_one(w: Any, carry: Any, words: Any, position: Any) -> Any:
        words[position + w] = full_padding
        return carry

    @device
    def load_one(e: Any, carry: Any, x: Any, address: Any, index: Any, n: Any, words: Any, position: Any) -> Any:
        if index + e >= 0 and index + e < n:
            if per_word == 1:
                words[position + e] = word(x[address + e])
            else:
                w, shift = position + e // 2, word(bits * (e % 2))
                other = words[w] & word(word(0xFFFF0000) >> shift)
                words[w] = other | word(word(x[address + e]) << shift)
        return carry

    @device
    def store_one(e: Any, carry: Any, y: Any, address: Any, index: Any, n: Any, words: Any, position: Any) -> Any:
        if index + e >= 0 and index + e < n:
            shift = word(bits * (e % per_word))
            y[address + e] = element(words[position + e // per_word] >> shift)
        return carry

    pad, load_elements, store_elements = (
        repeated(pad_one, n_words),
        repeated(load_one, vector),
        repeated(store_one, vector),
    )

    @device
    def load(x: Any, address: Any, index: Any, n: Any, words: Any, position: Any) -> Any:
        if index >= 0 and index + vector <= n:
            _instructions.load_vector(x, address, words, position)
        else:
            pad(0, words, position)
            load_elements(0, x, address, index, n, words, position)

    @device
    def store(y: Any, address: Any, index: Any, n: Any, words: Any, position: Any) -> Any:
        if index >= 0 and index + vector <= n:
            _instructions.store_vector(y, address, words, position)
        else:
            store_elements(0, y, address, index, n, words, position)

    @device
    def copy(x: Any, address: Any, index: Any, n: Any, stored: Any, position: Any) -> Any:
        if index >= 0 and index + vector <= n:
            _instructions.copy_vector(x, address, stored, position)
        else:
            words = cuda.local.array(n_words, word)
            pad(0, words, 0)
            load_elements(0, x, address, index, n, words, 0)
            _instructions.store_stored(stored, position, words, 0)

    @device
    def take(stored: Any, place: Any, words: Any, position: Any) -> Any:
        _instructions.load_stored(stored, place, words, position)

    return SimpleNamespace(load=load, store=store, copy=copy, take=take)


@device
def places(index: Any, dimensions: Any) -> Any:
    """Return how far the element of an index in some dimensions is from the first, in x, in y and in g."""
    x, y, g = np.int64(0), np.int64(0), np.int64(0)
    for d in range(len(dimensions) - 4, 0, -4):
        i = index % dimensions[d]
        index //= dimensions[d]
        x += i * dimensions[d + 1]
        y += i * dimensions[d + 2]
        g += i * dimensions[d + 3]
    return x + index * dimensions[1], y + index * dimensions[2], g + index * dimensions[3]
