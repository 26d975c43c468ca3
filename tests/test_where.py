"""``where=``: which elements of a row count. The others count for -inf, and their own results are 0 and -inf."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import scipy.special

import fastsoftmax
from fastsoftmax import log_softmax, logsumexp, record_plans, softmax

from .inputs import WRITABLE_LAYOUTS, values
from .reference import error_of

NAN, INF = np.nan, np.inf
MASKED = {"softmax": 0, "log_softmax": -INF}


@pytest.fixture
def call(function):
    return getattr(fastsoftmax, function)


def filled(x, where):
    return np.where(where, x, x.dtype.type(-INF))


# The mask's shape for an x of shape (5, 70), and its place in memory
MASKS = {
    "of x's shape": lambda rng: rng.random((5, 70)) < 0.7,
    "in Fortran order": lambda rng: np.asfortranarray(rng.random((5, 70)) < 0.7),
    "in steps": lambda rng: (rng.random((5, 140)) < 0.7)[:, ::2],
    "reversed": lambda rng: (rng.random((5, 70)) < 0.7)[::-1, ::-1],
    "a row": lambda rng: rng.random(70) < 0.7,
    "a column": lambda rng: np.array([[True], [False], [True], [True], [False]]),
    "all": lambda rng: True,
    "nothing": lambda rng: np.False_,
    "a list": lambda rng: (rng.random(70) < 0.7).tolist(),
    "bytes other than 1": lambda rng: (rng.integers(0, 2, (5, 70)) * 4).astype(np.uint8).view(bool),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend, function, call, dtype, rng, mask):
    x = rng.normal(size=(5, 70)).astype(dtype) * 5
    where = MASKS[mask](rng)
    kept = np.broadcast_to(np.asarray(where).view(np.uint8) != 0, x.shape)
    for axis in (0, 1, None, (), (0, 1)):
        result, full = call(x, axis, where=where), filled(x, kept)
        if function != "logsumexp":
            np.testing.assert_array_equal(result[~kept], MASKED[function])
            has_value = kept.any(axis, keepdims=True) & np.ones_like(kept)
            result, full = np.where(has_value, result, call(np.zeros_like(x), axis)), np.where(has_value, full, 0)
        assert error_of(function, result, full, axis) <= backend.max_ulps


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_layouts(backend, function, call, dtype, rng, layout):
    """The same bits for every layout of the input, the output and the mask."""
    x, where = rng.normal(size=(9, 40)).astype(dtype), rng.random((9, 40)) < 0.6
    for axis in (0, 1):
        expected = call(x, axis, where=where)
        laid_out = WRITABLE_LAYOUTS[layout](x)
        np.testing.assert_array_equal(call(laid_out, axis, where=where), expected)
        if function != "logsumexp":
            assert call(laid_out, axis, where=WRITABLE_LAYOUTS["permuted"](where), out=laid_out) is laid_out
            np.testing.assert_array_equal(laid_out, expected)


@pytest.mark.parametrize("shape", [(3, 1), (40, 3), (7, 33), (3, 20_000)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_bits_of_rows_filled_with_minus_infinity(backend, call, dtype, rng, shape, axis):
    x, where = rng.normal(size=shape).astype(dtype), rng.random(shape) < 0.6
    x, where = (x, where) if axis == 1 else (x.T.copy(), where.T.copy())
    where[(0,) * 2] = True
    result, expected = call(x, axis, where=where), call(filled(x, where), axis)
    usual = ~np.isnan(expected)
    if backend.name == "numba":  # whose loops for masks are others
        np.testing.assert_allclose(result[usual], expected[usual], rtol=4 * np.finfo(dtype).eps)
    else:
        np.testing.assert_array_equal(result[usual], expected[usual])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("n_cols", [3, 9000])
def test_whatever_is_masked(backend, call, dtype, rng, n_cols, axis):
    """NaN and infinities too."""
    x, where = rng.normal(size=(20, n_cols)).astype(dtype), rng.random((20, n_cols)) < 0.5
    x, where = (x, where) if axis == 1 else (x.T.copy(), where.T.copy())
    expected = call(x, axis, where=where)
    for poison in (NAN, INF, -INF, np.finfo(dtype).max):
        np.testing.assert_array_equal(call(np.where(where, x, dtype(poison)), axis, where=where), expected)


# What the kept elements of a row are, and what becomes of them, with masked ones around
ROWS = {
    "nothing kept": ([], [], [], -INF),
    "only -inf kept": ([-INF, -INF], [NAN, NAN], [NAN, NAN], -INF),
    "a nan kept": ([1, NAN], [NAN, NAN], [NAN, NAN], NAN),
    "+inf kept": ([1, INF], [NAN, NAN], [-INF, NAN], INF),
    "one kept": ([5], [1], [0], 5),
    "0 and -inf kept": ([0, -INF], [1, 0], [0, -INF], 0),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("row", ROWS)
def test_special_rows(backend, dtype, row, axis):
    for n_masked in (1, 40, 9000):
        check_special_row(dtype, row, n_masked, axis)


def check_special_row(dtype, row, n_masked, axis):
    kept, probabilities, logarithms, total = ROWS[row]
    where = np.zeros((2, n_masked + len(kept)), bool)
    where[:, n_masked // 2 : n_masked // 2 + len(kept)] = True
    x = np.full(where.shape, 7, dtype)
    x[where] = np.tile(kept, 2)
    x, where = (x, where) if axis == 1 else (x.T.copy(), where.T.copy())
    for temperature in (1, 0.5):
        options = {"where": where, "temperature": temperature}
        p, log_p = softmax(x, axis, **options), log_softmax(x, axis, **options)
        for result, expected, masked in ((p, probabilities, 0), (log_p, logarithms, -INF)):
            result, mask = (result, where) if axis == 1 else (result.T, where.T)
            np.testing.assert_array_equal(result[mask], np.tile(np.array(expected, dtype), 2))
            np.testing.assert_array_equal(result[~mask], masked)
        np.testing.assert_array_equal(logsumexp(x, axis, **options), dtype(total) / temperature)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_halves(backend, call, rng, half, axis):
    x, where = rng.normal(size=(40, 33)).astype(half), rng.random((40, 33)) < 0.6
    result = call(x, axis, where=where)
    assert result.dtype == half
    np.testing.assert_array_equal(result, call(x.astype(np.float32), axis, where=where).astype(half))


@pytest.mark.parametrize("dtype_name", ["uint8", "int64", "bool", "longdouble", "complex128"])
def test_other_dtypes(function, call, rng, dtype_name):
    x, where = rng.integers(0, 2, (4, 9)).astype(dtype_name), rng.random((4, 9)) < 0.7
    wide = x.astype(np.result_type(x, float))
    expected = call(filled(wide, where), 1)
    if function != "logsumexp":
        expected[~where] = MASKED[function]
    result = call(x, 1, where=where)
    assert result.dtype == call(x, 1).dtype
    np.testing.assert_allclose(result.astype(expected.dtype), expected, rtol=1e-3 if x.dtype.itemsize == 1 else 1e-15)


@pytest.mark.parametrize("where", [True, False, np.array(True)])
def test_no_dimensions(backend, dtype, where):
    results = [function(dtype(2.5), where=where) for function in (softmax, log_softmax, logsumexp)]
    assert results == ([1, 0, 2.5] if where else [0, -INF, -INF])
    assert all(type(result) is dtype for result in results)


def test_no_elements(backend, dtype):
    x, where = np.zeros((3, 0), dtype), np.ones((3, 1), bool)
    assert softmax(x, 1, where=where).shape == log_softmax(x, 1, where=where).shape == (3, 0)
    np.testing.assert_array_equal(logsumexp(x, 1, where=where), [-INF] * 3)
    assert logsumexp(x, 0, where=where).shape == (0,)


# out


@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("axis", [0, 1])
def test_out_that_overlaps_the_input(backend, map_function, dtype, rng, axis, offset):
    memory, where = rng.normal(size=(9, 40)).astype(dtype), rng.random((9, 32)) < 0.6
    x, out = memory[:, :32], memory[:, offset : offset + 32]
    expected = map_function(x.copy(), axis, where=where)
    assert map_function(x, axis, where=where, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_a_mask_in_the_memory_of_out(backend, map_function, dtype, rng):
    x, out = rng.normal(size=(8, 16)).astype(dtype), np.empty((8, 16), dtype)
    where = out.reshape(-1).view(bool)[: x.size].reshape(x.shape)
    where[...] = kept = rng.random(x.shape) < 0.5
    np.testing.assert_array_equal(map_function(x, 1, where=where, out=out), map_function(x, 1, where=kept))


def test_keepdims_and_signs(backend, dtype, rng):
    x = rng.normal(size=(3, 4)).astype(dtype)
    where = np.array([[True], [False], [True]])
    result, sign = logsumexp(x, 1, keepdims=True, return_sign=True, where=where)
    np.testing.assert_array_equal(result[:, 0], [logsumexp(x[0]), -INF, logsumexp(x[2])])
    np.testing.assert_array_equal(sign[:, 0], [1, 0, 1])


def test_factors(backend, dtype, rng):
    a, b, where = rng.normal(size=(3, 8)).astype(dtype), rng.normal(size=(3, 8)).astype(dtype), rng.random(8) < 0.6
    a[:, ~where], b[1, ~where] = NAN, NAN
    expected = logsumexp(a[:, where], 1, b[:, where], return_sign=True)
    for result, value in zip(logsumexp(a, 1, b, return_sign=True, where=where), expected, strict=True):
        np.testing.assert_array_equal(result, value)


# Masked arrays


def test_masked_arrays(backend, call, dtype, rng):
    x, mask = rng.normal(size=(3, 8)).astype(dtype), rng.random((3, 8)) < 0.4
    result = call(np.ma.masked_array(x, mask), 1)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, call(x, 1, where=~mask))
    np.testing.assert_array_equal(call(np.ma.masked_array(x), 1), call(x, 1))
    where = rng.random(8) < 0.7
    np.testing.assert_array_equal(call(np.ma.masked_array(x, mask), 1, where=where), call(x, 1, where=~mask & where))


# How it is done


@pytest.mark.parametrize("axis", [0, 1])
def test_threads_change_no_bit(backend, call, rng, monkeypatch, axis):
    x, where = rng.normal(size=(600, 900)).astype(np.float32), rng.random((600, 900)) < 0.5
    results = []
    for n_threads in ("1", "3"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        with record_plans() as plans:
            results.append(call(x, axis, where=where, temperature=0.7))
        if backend.has_kernels:
            assert plans[0].schedule.traversal == ("strips" if axis == 0 else "gather")
            assert plans[0].schedule.n_threads <= int(n_threads)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["cython", "numba"])
def test_no_array_is_made(map_function, rng, monkeypatch, name, axis):
    """But for the result: neither of the size of the input, nor of that of the mask."""
    if name not in fastsoftmax.available_backends():
        pytest.skip(f"backend {name!r} is not available")
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")
    x, where = rng.normal(size=(2000, 1000)), rng.random((2000, 1000)) < 0.5
    out = np.empty_like(x)
    options = {"where": where, "temperature": 0.7, "out": out, "backend": name}
    map_function(x, axis, **options)
    tracemalloc.start()
    map_function(x, axis, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.size / 10


def test_the_exact_value(backend, function, call, dtype):
    """Of kinds of values that are hard, against long double."""
    for kind in ("wide", "offset", "extremes", "subnormal results", "ties"):
        x = values(kind, (4, 300), dtype)
        where = np.random.default_rng(3).random(x.shape) < 0.8
        where[:, x.shape[1] // 2] = True
        full = filled(x, where)
        assert error_of(function, call(x, 1, where=where), full, 1) <= backend.max_ulps, kind


def test_scipy_filled_by_hand(backend, function, call, rng):
    x, where = rng.normal(size=(3, 8)), rng.random((3, 8)) < 0.7
    expected = getattr(scipy.special, function)(filled(x, where), axis=1)
    np.testing.assert_allclose(call(x, 1, where=where), expected, rtol=1e-13)


# Bad input


@pytest.mark.parametrize("array_type", [int, float, np.uint8, object, str])
def test_masks_that_are_not_of_bool(backend, function, call, array_type):
    x, where = np.ones((3, 4)), np.ones((3, 4), array_type)
    out = np.full((3,) if function == "logsumexp" else x.shape, 7.0)
    with pytest.raises(TypeError, match=f"where must hold bool, not {where.dtype}"):
        call(x, 1, where=where, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("shape", [(3,), (4, 3), (1, 3, 4), (0,)])
def test_masks_that_do_not_broadcast(backend, function, call, shape):
    x = np.ones((3, 4))
    out = np.full((3,) if function == "logsumexp" else x.shape, 7.0)
    name = "a" if function == "logsumexp" else "x"
    message = f"where of shape {shape} does not broadcast to {name} of shape (3, 4)"
    with pytest.raises(ValueError) as raised:
        call(x, 1, where=np.ones(shape, bool), out=out)
    assert str(raised.value) == message
    assert (out == 7).all()


def test_masked_masks(call):
    with pytest.raises(TypeError, match="where must not be a masked array"):
        call(np.ones(3), where=np.ma.masked_array([True] * 3))


def test_by_keyword_only(call):
    with pytest.raises(TypeError, match="positional argument"):
        call(np.ones(3), None, None, False, False, None, np.ones(3, bool))


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ({"where": True}, "where: set what does not count to -inf first"),
        ({"temperature": 2}, "temperature: divide by it first"),
        ({"dtype": float}, "dtype: convert the array first"),
    ],
    ids=["where", "temperature", "dtype"],
)
def test_arrays_on_a_gpu_are_refused_by_name(function, call, option, instead):
    class OnDevice:
        is_cuda = True

    with pytest.raises(TypeError, match=f"{function} of an array on a CUDA device takes no {instead}"):
        call(OnDevice(), **option)
