"""What each kind of input returns, by the rows of two tables: that of the edges, and that of what others get wrong.

Each row of them is a test by its name. Where a row is of many cases, they have a file of their own as well.
"""

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import log_softmax, logsumexp, softmax

from .inputs import LAYOUTS
from .reference import LONG, error_of

NAN, INF = np.nan, np.inf
FUNCTIONS = (softmax, log_softmax, logsumexp)
HALVES = (np.float16, ml_dtypes.bfloat16)

EDGE_ROWS = {
    "any NaN in the row": ([1, NAN, 2], [NAN] * 3, [NAN] * 3, NAN),
    "any NaN, beside +inf": ([INF, NAN, 2], [NAN] * 3, [NAN] * 3, NAN),
    "any NaN, beside -inf": ([-INF, NAN], [NAN] * 2, [NAN] * 2, NAN),
    "any NaN, alone": ([NAN], [NAN], [NAN], NAN),
    "[1, +inf]": ([1, INF], [NAN, NAN], [-INF, NAN], INF),
    "[1, inf, inf]": ([1, INF, INF], [NAN] * 3, [-INF, NAN, NAN], INF),
    "[-inf, +inf]": ([-INF, INF], [NAN, NAN], [-INF, NAN], INF),
    "all -inf": ([-INF, -INF], [NAN, NAN], [NAN, NAN], -INF),
    "-inf alone": ([-INF], [NAN], [NAN], -INF),
    "[0, -inf]": ([0, -INF], [1, 0], [0, -INF], 0),
    "-inf before the maximum": ([-INF, -INF, 5], [0, 0, 1], [-INF, -INF, 0], 5),
    "+-1e30": ([-1e30, 1e30], [0, 1], [-2e30, 0], 1e30),
    "a single element": ([5], [1], [0], 5),
}


@pytest.mark.parametrize("length", [None, 40, 3000], ids=["short", "a vector more", "a block more"])
@pytest.mark.parametrize("row", EDGE_ROWS)
def test_edge_row(backend, dtype, row, length):
    """Also with the rest of a longer row masked out, so that no branch for short rows hides another."""
    x, probabilities, logarithms, total = EDGE_ROWS[row]
    all_nan = np.isnan(logarithms).all()
    n_masked = 0 if length is None else length - len(x)
    for order in (1, -1):  # the masked part after the row, or before it

        def extended(part, filler, order=order):
            return np.concatenate([part, [filler] * n_masked][::order]).astype(dtype)

        masked = extended(x, -INF)
        np.testing.assert_array_equal(
            softmax(masked), extended(probabilities, NAN if np.isnan(probabilities).all() else 0)
        )
        np.testing.assert_array_equal(log_softmax(masked), extended(logarithms, NAN if all_nan else -INF))
        np.testing.assert_array_equal(logsumexp(masked), dtype(total))


@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_row_leaves_its_neighbours_alone(backend, dtype, axis):
    rows = [x for x, *_ in EDGE_ROWS.values() if len(x) == 2] + [[1.0, 2.0]] * 15
    x = np.array(rows, dtype)
    for function in (softmax, log_softmax, logsumexp):
        batch = function(x if axis == 1 else x.T.copy(), axis)
        batch = batch.T if axis == 0 else batch
        for row, result in zip(x, batch, strict=True):
            np.testing.assert_array_equal(result, function(row))


# Checks by their names: of the other rows of the table of edges for a dtype that is computed in, and of what others get
# silently wrong for a function

CHECKS = {"dtype": {}, "function": {}}


def check(argument, name):
    def add(test):
        CHECKS[argument][name] = test
        return test

    return add


@check("dtype", "all -inf, with where all False")
def _(backend, dtype):
    for x in (np.full(3, -INF, dtype), np.array([1, NAN, INF], dtype)):
        np.testing.assert_array_equal(softmax(x, where=False), [0, 0, 0])
        np.testing.assert_array_equal(log_softmax(x, where=False), [-INF] * 3)
        assert logsumexp(x, where=False) == -INF


@check("dtype", "+-1e308")
def _(backend, dtype):
    """The largest numbers there are."""
    largest = np.finfo(dtype).max
    x = np.array([-largest, largest], dtype)
    np.testing.assert_array_equal(softmax(x), [0, 1])
    np.testing.assert_array_equal(log_softmax(x), [-INF, 0])
    assert logsumexp(x) == largest
    assert logsumexp(np.full(10, largest)) == largest
    np.testing.assert_array_equal(softmax(np.full(4, -largest)), np.full(4, 0.25))


@check("dtype", "reduced axis of length 0")
def _(backend, dtype):
    x = np.empty((3, 0), dtype)
    assert softmax(x, 1).shape == log_softmax(x, 1).shape == (3, 0)
    np.testing.assert_array_equal(logsumexp(x, 1), [-INF] * 3)


@check("dtype", "another axis of length 0")
def _(backend, dtype):
    x = np.empty((3, 0), dtype)
    assert softmax(x, 0).shape == log_softmax(x, 0).shape == (3, 0)
    assert logsumexp(x, 0).shape == (0,)


@check("dtype", "0-d array, Python scalar, list")
def _(backend, dtype):
    for axis in (None, 0, -1, ()):
        for make in (dtype, lambda value: np.array(value, dtype)):
            for function, expected in zip(FUNCTIONS, (1, 0, 2.5), strict=True):
                result = function(make(2.5), axis)
                assert type(result) is dtype
                assert result == expected
    for value in (3, 2.5, True):
        results = [function(value) for function in FUNCTIONS]
        assert results == [1, 0, value]
        assert all(isinstance(result, np.floating) for result in results)
    np.testing.assert_array_equal(softmax([[0.0, 0.0], [1000.0, 0.0]], axis=1), [[0.5, 0.5], [1, 0]])
    np.testing.assert_array_equal(log_softmax([1000, 0]), [0, -1000])
    assert logsumexp([[]]) == -INF


@check("dtype", "axis=()")
def _(backend, dtype):
    x = np.array([[1, -2], [3, 1e30]], dtype)
    np.testing.assert_array_equal(softmax(x, ()), np.ones((2, 2)))
    np.testing.assert_array_equal(log_softmax(x, ()), np.zeros((2, 2)))
    np.testing.assert_array_equal(logsumexp(x, ()), x)


@check("dtype", "axis int, negative, tuple, None")
def _(backend, dtype):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(dtype)
    for function in FUNCTIONS:
        name = function.__name__
        for axis in (0, 1, 2, -1, -3, (0, 1), (0, 2), (-1, 1), (0, 1, 2), None):
            assert error_of(name, function(x, axis), x, axis) <= backend.max_ulps
        np.testing.assert_array_equal(function(x, np.int64(1)), function(x, 1))


@check("dtype", "bad axis")
def _(backend, dtype):
    x = np.ones((2, 3), dtype)
    for function in FUNCTIONS:
        for axis, error in ((2, np.exceptions.AxisError), ((0, 0), ValueError), (1.0, TypeError), (True, TypeError)):
            with pytest.raises(error, match="axis"):
                function(x, axis)


@check("dtype", "signed ints, unsigned ints, bool")
def _(backend, dtype):
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"):
        x = np.array([0, 1, 1], name)
        narrow = {1: np.float16, 2: np.float32}.get(x.dtype.itemsize, np.float64)
        expected = [function(x.astype(np.float64)) for function in FUNCTIONS]
        for function, value, result_dtype in zip(FUNCTIONS, expected, (narrow, narrow, np.float64), strict=True):
            result = function(x)
            assert result.dtype == result_dtype
            np.testing.assert_array_equal(result, value.astype(result_dtype))


@check("dtype", "float16, bfloat16")
def _(backend, dtype):
    for half in HALVES:
        x = np.random.default_rng(0).normal(size=(3, 50)).astype(half)
        for function in FUNCTIONS:
            result = function(x, 1)
            assert result.dtype == half
            np.testing.assert_array_equal(result, function(x.astype(np.float32), 1).astype(half))


@check("dtype", "longdouble, complex")
def _(backend, dtype):
    with fastsoftmax.use_backend("numpy"):
        for wide in (LONG, np.complex64, np.complex128):
            x = np.array([1, 2, 3.5], wide)
            for function in FUNCTIONS:
                assert function(x).dtype == wide
                np.testing.assert_allclose(function(x).real, function(x.real), rtol=1e-6)


@check("dtype", "Fortran order, transposes, negative strides, broadcast")
def _(backend, dtype):
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(dtype)
    for lay_out in LAYOUTS.values():
        laid_out = lay_out(x)
        for function in FUNCTIONS:
            np.testing.assert_array_equal(function(laid_out, 1), function(laid_out.astype(dtype, order="C"), 1))
    assert softmax(np.asfortranarray(x), 1).flags.f_contiguous


@check("dtype", "byte-swapped, unaligned, read-only")
def _(backend, dtype):
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(dtype)
    for name in ("byte-swapped", "unaligned", "read-only"):
        for function in FUNCTIONS:
            result = function(LAYOUTS[name](x), 1)
            assert result.dtype.isnative
            np.testing.assert_array_equal(result, function(x, 1))


@check("dtype", "np.matrix")
def _(backend, dtype):
    matrix = np.matrix([[1, 2], [3, 5]], dtype)
    for function in FUNCTIONS:
        result = function(matrix, 1)
        assert type(result) is np.ndarray
        np.testing.assert_array_equal(result, function(np.array(matrix), 1))


@check("dtype", "pandas")
def _(backend, dtype):
    """It is not installed here; what NumPy converts by its protocol is taken so."""

    class Series:
        def __array__(self, dtype=None, copy=None):
            return np.array([1.0, 2.0], dtype)

    for function in FUNCTIONS:
        np.testing.assert_array_equal(function(Series()), function([1.0, 2.0]))
    assert type(softmax(Series())) is np.ndarray


@check("dtype", "object, str, datetime, structured")
def _(backend, dtype):
    for bad in (
        np.array([1, 2], object),
        np.array(["1"]),
        np.array(["2018-05-08"], "M8[D]"),
        np.zeros(2, [("a", dtype)]),
    ):
        for function in FUNCTIONS:
            with pytest.raises(TypeError) as raised:
                function(bad)
            assert f"must hold numbers, not {bad.dtype}" in str(raised.value)


@check("dtype", "out= wrong shape/dtype/read-only")
def _(backend, dtype):
    x, read_only = np.ones((2, 3), dtype), np.full((2, 3), 7, dtype)
    read_only.flags.writeable = False
    for out, error in (
        (np.full((3, 2), 7, dtype), ValueError),
        (np.full((2, 3), 7, int), TypeError),
        (read_only, ValueError),
    ):
        for function in (softmax, log_softmax):
            with pytest.raises(error, match="out"):
                function(x, 1, out=out)
            assert (out == 7).all()


@check("dtype", "out= is the input, or overlaps it partly")
def _(backend, dtype):
    for function in (softmax, log_softmax):
        for offset in (0, 1, 7):
            memory = np.random.default_rng(0).normal(size=(5, 60)).astype(dtype)
            x, out = memory[:, :40], memory[:, offset : offset + 40]
            expected = function(x.copy(), 1)
            assert function(x, 1, out=out) is out
            np.testing.assert_array_equal(out, expected)


@check("dtype", "arrays > 2**31 elements")
def _(backend, dtype):
    if not backend.has_kernels or dtype != np.float32:
        pytest.skip("the numpy backend would need 17 GB for it; kernels count the elements of all dtypes alike")
    row = np.zeros(2**15 + 1, dtype)
    x = np.broadcast_to(row, (2**16, row.size))  # all of it in the memory of one row
    np.testing.assert_allclose(logsumexp(x), np.log(float(x.size)), rtol=1e-7)


@check("dtype", "logsumexp b, return_sign, keepdims")
def _(backend, dtype):
    a = np.array([NAN, INF, 1, 2], dtype)
    np.testing.assert_array_equal(logsumexp(a, b=[0, 0, 1, 1]), logsumexp(a[2:], b=[1, 1]))
    signs = (([1, 1], 1), ([-INF], 0), ([], 0), ([INF], 1), ([NAN], NAN))
    for x, sign in signs:
        result, result_sign = logsumexp(np.array(x, dtype), return_sign=True)
        assert type(result) is type(result_sign) is dtype
        np.testing.assert_array_equal(result, logsumexp(np.array(x, dtype)))
        np.testing.assert_array_equal(result_sign, sign)
    assert type(logsumexp(np.zeros((3, 4), dtype), (0, 1))) is dtype
    x = np.zeros((2, 3, 4), dtype)
    for axis, keepdims, shape in ((1, False, (2, 4)), (1, True, (2, 1, 4)), (None, True, (1, 1, 1))):
        assert logsumexp(x, axis, keepdims=keepdims).shape == shape


@check("dtype", "warnings")
def _(backend, dtype):
    """Pytest makes every warning an error; `test_no_floating_point_error_is_raised_or_left_behind` does more."""
    for x, *_ in EDGE_ROWS.values():
        for function in FUNCTIONS:
            with np.errstate(all="raise"):
                function(np.array(x, dtype))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", CHECKS["dtype"])
def test_edge(backend, dtype, name):
    CHECKS["dtype"][name](backend, dtype)


# What others get silently wrong


@check("function", "integers that wrap around")
def _(backend, function):
    for x in (np.array([1, 2, 3], np.uint8), np.array([-128, 127, 0], np.int8)):
        result = function(x)
        np.testing.assert_array_equal(result, function(x.astype(np.float64)).astype(result.dtype))


@check("function", "float16 over a strided axis")
def _(backend, function):
    for half in HALVES:
        result = function(np.zeros((4096, 3), half), 0)
        value = {softmax: 1 / 4096, log_softmax: -np.log(4096), logsumexp: np.log(4096)}[function]
        np.testing.assert_array_equal(result, np.full_like(result, value))


@check("function", "float32, 200,000 rows, axis 0")
def _(backend, function):
    x = np.random.default_rng(0).normal(size=(200_000, 4)).astype(np.float32)
    assert error_of(function.__name__, function(x, 0), x, 0) <= backend.max_ulps


@check("function", "masked arrays")
def _(backend, function):
    x = np.ma.masked_array([1.0, 2.0, NAN], [False, False, True])
    expected = {softmax: [*softmax([1.0, 2.0]), 0], log_softmax: [*log_softmax([1.0, 2.0]), -INF]}
    np.testing.assert_array_equal(function(x), function(x.data, where=~x.mask))
    tolerance = 4 * np.finfo(float).eps if backend.name == "numba" else 0  # whose loops for masks are others
    np.testing.assert_allclose(function(x), expected.get(function, logsumexp([1.0, 2.0])), rtol=tolerance)


@check("function", "no elements over all axes")
def _(backend, function):
    result = function(np.zeros((3, 0)))
    np.testing.assert_array_equal(result, -INF if function is logsumexp else np.zeros((3, 0)))


@check("function", "[0, -40]")
def _(backend, function):
    rest = 4.248354255291589e-18
    expected = {softmax: [1, rest], log_softmax: [-rest, -40], logsumexp: rest}[function]
    np.testing.assert_allclose(function([0.0, -40.0]), expected, rtol=1e-15)


@check("function", "a large common offset")
def _(backend, function):
    for dtype, offset in ((np.float32, -1e7), (np.float64, -1e15)):
        x = np.arange(8, dtype=dtype)
        expected = function(x) + (offset if function is logsumexp else 0)
        np.testing.assert_allclose(function(x + dtype(offset)), expected, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", CHECKS["function"])
def test_where_others_are_silently_wrong(backend, function, name):
    CHECKS["function"][name](backend, getattr(fastsoftmax, function))


def test_no_floating_point_error_is_raised_or_left_behind(backend, function, dtype):
    """Pytest makes every warning an error; this holds the stricter modes and the environment of the caller."""
    everything = [x for x, *_ in EDGE_ROWS.values()] + [
        [-3e38, 3e38],
        [0, -100],
        [0, -740],
        [1e-45, 0],
        np.arange(-999, 9),
    ]
    call = getattr(fastsoftmax, function)
    with np.errstate(all="raise"):
        before = np.geterr()
        for x in everything:
            call(np.array(x, dtype))
            call(np.tile(np.array(x, dtype), (40, 1)), 0)
        assert np.geterr() == before
        np.add(np.ones(3), 1)
    assert np.float32(1e-45) * np.float32(1) > 0
    assert (np.full(100, 1e-320) * 1 > 0).all()  # subnormal numbers are not flushed to zero
