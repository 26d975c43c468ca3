"""Arrays of more than 2**31 elements, on every axis and as one row: ``make test-large``.

The Cython backend computes in float16, where the input and a result take 4.3 GB each. The Numba backend has other
kernels for that; it computes float32 in place, in 8.6 GB. What is right is known from rows computed alone, which have
the same bits, and of one long row from what it is made of.
"""

import math

import numpy as np
import pytest

import fastsoftmax

BEYOND = 2**31 + 2**21
NEEDED_GIB = 12
# Its few columns are compared whole.
NEEDED_GIB_OF_FEW_COLUMNS = {"cython": 12, "numba": 20}
DTYPES = {"cython": np.float16, "numba": np.float32}

# Shapes of that many elements and more, the axis that is computed along, and the axis of the rows.
CASES = {
    "rows": ((2**19 + 2**9 + 1, 4099), 1, 0),
    "short rows": ((2**28 + 2**18 + 1, 8), 1, 0),
    "columns": ((2051, 2**20 + 1025), 0, 1),
    "few columns": ((2**29 + 2**19 + 1, 4), 0, 1),
    "planes": ((3, 26_755, 26_757), 1, 2),
}


@pytest.fixture(params=["cython", "numba"])
def backend(request):
    if request.param not in fastsoftmax.available_backends():
        pytest.skip(f"backend {request.param!r} is not available")
    skip_without_memory(NEEDED_GIB)
    with fastsoftmax.use_backend(request.param):
        yield request.param


def skip_without_memory(needed_gib):
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if available < needed_gib:
        pytest.skip(f"{needed_gib} GiB of memory are needed, and {available:.1f} are available")


def logits(size, dtype):
    """Values of period 2**22 + 3, so that nothing that is wrong by a power of two falls on the same ones."""
    period = np.random.default_rng(0).normal(size=2**22 + 3).astype(dtype)
    x = np.empty(size, dtype)
    for first in range(0, size, period.size):
        part = x[first : first + period.size]
        part[...] = period[: part.size]
    return x


def pieces_of(shape, axis):
    """Slices along an axis: the first, those around element 2**30 and 2**31, the last, and others between."""
    size = shape[axis]
    stride = math.prod(shape[axis + 1 :])
    beyond = [2**30 // stride, 2**31 // stride, size - 1]
    width = max(1, 2**20 * size // math.prod(shape))
    starts = {
        0,
        *(min(max(i - width // 2, 0), size - width) for i in beyond),
        *range(0, size - width, max(4, size // 7 + 1)),
    }
    return [tuple([slice(None)] * axis + [slice(start, start + width)]) for start in sorted(starts)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", ["softmax", "log_softmax", "logsumexp"])
def test_rows_have_the_bits_of_rows_alone(backend, function, case):
    shape, axis, rows = CASES[case]
    if case == "few columns":
        skip_without_memory(NEEDED_GIB_OF_FEW_COLUMNS[backend])
    assert math.prod(shape) > 2**31
    call = getattr(fastsoftmax, function)
    x = logits(math.prod(shape), DTYPES[backend]).reshape(shape)
    alone = [(piece, np.array(x[piece], order="C")) for piece in pieces_of(shape, rows)]
    result = call(x, axis, out=x if backend == "numba" and function != "logsumexp" else None)
    for piece, values in alone:
        of_result = piece if function != "logsumexp" else piece[:axis] + piece[axis + 1 :]
        np.testing.assert_array_equal(result[of_result], call(values, axis))


PEAKS = {0: 0.0, 12_345: -0.5, 2**30 + 1: -1.0, 2**31 - 1: 0.0, 2**31: -0.25, 2**31 + 2**20: -2.0, BEYOND - 1: 0.0}


@pytest.fixture
def long_row(backend):
    """A row of -20, with the peaks that make most of the sum, and the logarithm of that sum."""
    x = np.full(BEYOND, -20, DTYPES[backend])
    x[list(PEAKS)] = list(PEAKS.values())
    return x, math.log(math.fsum([*map(math.exp, PEAKS.values()), (BEYOND - len(PEAKS)) * math.exp(-20)]))


def assert_near(result, expected):
    result = np.asarray(result)
    np.testing.assert_array_max_ulp(result, np.array(expected, result.dtype), 2)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_one_row(backend, function, long_row):
    x, log_sum = long_row
    result = getattr(fastsoftmax, function)(x, out=x if backend == "numba" else None)
    finish = math.exp if function == "softmax" else float
    assert_near(result[list(PEAKS)], [finish(value - log_sum) for value in PEAKS.values()])
    assert_near(result[1], finish(-20 - log_sum))
    for first in range(0, BEYOND, 2**24):
        part = result[first : first + 2**24]
        assert {*np.flatnonzero(part != result[1]) + first} <= set(PEAKS)


def test_sum_of_one_row(backend, long_row):
    x, log_sum = long_row
    assert_near(fastsoftmax.logsumexp(x), log_sum)


def test_one_row_of_steps(backend, long_row):
    """Every second element of as much memory: byte offsets beyond 2**32."""
    x, log_sum = long_row
    every_second = fastsoftmax.logsumexp(x[::2])
    others = fastsoftmax.logsumexp(x[1::2])
    assert np.logaddexp(float(every_second), float(others)) == pytest.approx(log_sum, abs=2e-3)


def test_one_row_in_pieces(backend, long_row):
    x, log_sum = long_row
    online = fastsoftmax.OnlineSoftmax().update(x[: 2**30]).update(x[2**30 :])
    assert_near(online.logsumexp(), log_sum)


def test_largest_of_one_row(backend, long_row):
    x, log_sum = long_row
    values, indices = fastsoftmax.softmax_topk(x, 4)
    np.testing.assert_array_equal(indices, [0, 2**31 - 1, BEYOND - 1, 2**31])
    assert_near(values, [math.exp(value - log_sum) for value in (0, 0, 0, -0.25)])


def test_draws_from_one_row(backend, long_row):
    x, _ = long_row
    draws = fastsoftmax.sample(x, temperature=0.5, size=4000, rng=np.random.default_rng(0))
    assert draws.dtype == np.int64
    exact = {index: math.exp(2 * value) for index, value in PEAKS.items()}
    total = sum(exact.values()) + (BEYOND - len(PEAKS)) * math.exp(-40)
    for index, term in exact.items():
        expected = 4000 * term / total
        assert abs((draws == index).sum() - expected) < 5 * math.sqrt(expected)


def test_labels_of_one_row(backend, long_row):
    x, log_sum = long_row
    losses = [fastsoftmax.softmax_cross_entropy(x[np.newaxis], [label]) for label in (2**31 + 2**20, 7)]
    np.testing.assert_allclose(losses, [2 + log_sum, 20 + log_sum], rtol=1e-6)
    with pytest.raises(ValueError, match=str(BEYOND)):
        fastsoftmax.softmax_cross_entropy(x[np.newaxis], [BEYOND])
