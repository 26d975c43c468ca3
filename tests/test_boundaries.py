"""Nothing is read or written outside the arrays of a call: at their ends is a page whose touch ends the process."""

import ctypes
import mmap

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax

from .inputs import values

pytestmark = pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="this system has no mprotect")

N_PAGES = 256

# Around registers, groups of them, what a tile holds and a chunk; rows around those of a tile.
SHAPES = [(1, n) for n in (1, 2, 3, 5, 7, 15, 17, 31, 33, 63, 65, 100, 127, 1001, 8191, 16_385)]
SHAPES += [(rows, n) for rows in (2, 16, 17, 33) for n in (1, 2, 3, 4, 5, 9, 10, 33, 70, 130)] + [(3, 9001)]
SHAPES += [(rows, n) for rows in (128, 145) for n in (1, 2, 3)]  # of whole groups of tiles, and a row more


@pytest.fixture(scope="module")
def pages():
    """Memory between two pages that cannot be touched."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, N_PAGES * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for first in (address, address + (N_PAGES - 1) * page):
        assert mprotect(first, page, 0) == 0, ctypes.get_errno()
    yield np.frombuffer(memory, np.uint8)[page:-page]
    for first in (address, address + (N_PAGES - 1) * page):
        assert mprotect(first, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0, ctypes.get_errno()


class Room:
    """Places for arrays in two halves of memory: what is read is at one end of it, what is written at the other."""

    def __init__(self, memory, is_read_last):
        self.first, self.last = memory[: memory.size // 2], memory[memory.size // 2 :]
        self.is_read_last = is_read_last

    def placed(self, array, is_read=True):
        """Return a copy of an array that touches a boundary."""
        is_last = is_read == self.is_read_last
        place = self.last[self.last.size - array.nbytes :] if is_last else self.first[: array.nbytes]
        result = place.view(array.dtype).reshape(array.shape)
        result[...] = array
        return result

    def for_result(self, like):
        return self.placed(np.zeros_like(like), is_read=False)


@pytest.fixture(params=[True, False], ids=["input last", "output last"])
def room(request, pages):
    return Room(pages, request.param)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_the_three_functions(backend, function, room, name, axis):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    compute = getattr(fastsoftmax, function)
    for shape in SHAPES:
        x = values("masked by -inf", shape, np.float32).astype(dtype)
        expected = compute(x, axis)
        result = compute(room.placed(x), axis, out=room.for_result(expected))
        np.testing.assert_array_equal(bits(result), bits(expected))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("options", ["mask", "temperature", "conversion"])
def test_adjusted_rows(backend, map_function, dtype, room, options, axis):
    for shape in SHAPES:
        x = values("normal", shape, dtype)
        if options == "mask":
            mask = np.random.default_rng(1).random(shape) < 0.7
            expected = map_function(x, axis, where=mask)
            out = room.for_result(x)
            np.testing.assert_array_equal(map_function(room.placed(x), axis, where=mask, out=out), expected)
            np.testing.assert_array_equal(map_function(x, axis, where=room.placed(mask), out=out), expected)
        elif options == "temperature":
            expected = map_function(x, axis, temperature=0.7)
            out = room.for_result(x)
            np.testing.assert_array_equal(map_function(room.placed(x), axis, temperature=0.7, out=out), expected)
        else:
            x = (x * 10).astype(np.int16)
            expected = map_function(x, axis, dtype=dtype)
            out = room.for_result(expected)
            np.testing.assert_array_equal(map_function(room.placed(x), axis, dtype=dtype, out=out), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("vjp", ["softmax_vjp", "log_softmax_vjp"])
def test_derivatives(backend, vjp, dtype, room, axis):
    compute = getattr(fastsoftmax, vjp)
    for shape in SHAPES:
        x, g = values("normal", shape, dtype), values("normal", shape, dtype, 1)
        results = (fastsoftmax.softmax if vjp == "softmax_vjp" else fastsoftmax.log_softmax)(x, axis)
        expected = compute(results, g, axis)
        out = room.for_result(x)
        np.testing.assert_array_equal(compute(room.placed(results), g, axis, out=out), expected)
        np.testing.assert_array_equal(compute(results, room.placed(g), axis, out=out), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_functions_that_read_rows(backend, dtype, room, axis):
    for shape in SHAPES:
        x = values("normal", shape, dtype)
        n, n_rows = shape[axis], x.size // shape[axis]
        labels = np.arange(n_rows) % n
        expected = fastsoftmax.softmax_cross_entropy(x, labels, axis=axis, reduction="none")
        result = fastsoftmax.softmax_cross_entropy(room.placed(x), labels, axis=axis, reduction="none")
        np.testing.assert_array_equal(result, expected)
        k = min(n, 5)
        for result, expected in zip(
            fastsoftmax.softmax_topk(room.placed(x), k, axis), fastsoftmax.softmax_topk(x, k, axis), strict=True
        ):
            np.testing.assert_array_equal(result, expected)
        draws = [fastsoftmax.sample(place, axis=axis, rng=np.random.default_rng(3)) for place in (x, room.placed(x))]
        np.testing.assert_array_equal(*draws)
        np.testing.assert_array_equal(fastsoftmax.softmax_one(room.placed(x), axis), fastsoftmax.softmax_one(x, axis))
        factors = values("normal", shape, dtype, 2)
        np.testing.assert_array_equal(
            fastsoftmax.logsumexp(room.placed(x), axis, b=factors), fastsoftmax.logsumexp(x, axis, b=factors)
        )
