"""logsumexp with factors: the logarithm and the sign of sum(b * exp(a))."""

import tracemalloc
from functools import cache

import ml_dtypes
import mpmath
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import fastsoftmax
from fastsoftmax import _state


def shapes_that_broadcast():
    return npst.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=6)


@st.composite
def calls(draw, factors):
    a_shape, b_shape = draw(shapes_that_broadcast()).input_shapes
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    a = rng.normal(size=a_shape).astype(dtype) * dtype(draw(st.sampled_from([1, 20])))
    b = draw(factors)(rng, b_shape).astype(dtype)
    ndim = len(np.broadcast_shapes(a_shape, b_shape))
    axes = [None, *range(-ndim, ndim), *([(0, ndim - 1)] if ndim > 1 else [])]
    # SciPy takes a scalar for one-dimensional, so that it has shape (1,) with its dimensions kept.
    return a, b, draw(st.sampled_from(axes)), ndim > 0 and draw(st.booleans())


def positive(rng, shape):
    return rng.uniform(0.1, 3, shape)


def with_zeros(rng, shape):
    return rng.integers(0, 3, shape).astype(float)


def of_one_sign_each_row(rng, shape):
    return rng.uniform(0.5, 3, shape) * rng.choice([-1, 1])


# Sums whose terms cancel are left out: there SciPy, and any other, is as wrong as its roundings.
FACTORS = st.sampled_from([positive, with_zeros, of_one_sign_each_row])


@given(calls(FACTORS))
def test_same_values_as_scipy(backend, call):
    a, b, axis, keepdims = call
    ours = fastsoftmax.logsumexp(a, axis, b, keepdims)
    theirs = scipy.special.logsumexp(a, axis, b, keepdims)
    assert np.shape(ours) == np.shape(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@given(calls(FACTORS))
def test_same_values_and_signs_as_scipy(backend, call):
    a, b, axis, keepdims = call
    ours, our_sign = fastsoftmax.logsumexp(a, axis, b, keepdims, return_sign=True)
    theirs, their_sign = scipy.special.logsumexp(a, axis, b, keepdims, return_sign=True)
    assert ours.dtype == our_sign.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(our_sign, their_sign)


@pytest.mark.parametrize(
    ("a", "b", "total", "sign"),
    [
        ([1, 1], [1, -2], 1, -1),
        ([0, np.nan], [1, 0], 0, 1),
        ([0, np.inf], [1, 0], 0, 1),
        ([0, np.inf], [1, 1], np.inf, 1),
        ([0, np.inf], [1, -1], np.inf, -1),
        ([np.inf, np.inf], [1, -1], np.nan, np.nan),
        ([0, np.nan], [1, 1], np.nan, np.nan),
        ([3, 3], [1, -1], -np.inf, 0),
        ([0, 1], [0, 0], -np.inf, 0),
        ([-np.inf, -np.inf], [1, 1], -np.inf, 0),
        ([1000, 1000], [0.5, 0.5], 1000, 1),
        ([0, -800], [1, -1], 0, 1),
        ([3, 3, 3], [1, 2, -3], -np.inf, 0),
        ([3, -np.inf, 3], [1, 5, -2], 3, -1),
        ([0.5, -200], [0, 1], -200, 1),
        ([], [], -np.inf, 0),
        ([1, 2], [-np.inf, 1], np.inf, -1),
        ([1, 2], [np.inf, 1], np.inf, 1),
        ([1, 2], [np.inf, -np.inf], np.nan, np.nan),
        ([1, 2], [np.inf, 0], np.inf, 1),
        ([np.inf, 2], [np.inf, 1], np.inf, 1),
        ([np.inf, 2], [-np.inf, 1], np.inf, -1),
        ([-np.inf, 2], [np.inf, 1], np.nan, np.nan),
    ],
)
def test_values(backend, dtype, a, b, total, sign):
    a, b = np.array(a, dtype), np.array(b, dtype)
    np.testing.assert_array_equal(fastsoftmax.logsumexp(a, b=b, return_sign=True), (total, sign))
    np.testing.assert_array_equal(fastsoftmax.logsumexp(a, b=b), np.nan if sign == -1 else total)


def test_a_factor_for_each_column(backend):
    a = np.log([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(np.exp(fastsoftmax.logsumexp(a, 1, b=[10, 1])), [12, 34], rtol=1e-14)
    np.testing.assert_allclose(np.exp(fastsoftmax.logsumexp([[0.0], [1.0]], 0, b=np.ones((1, 3)))), [1 + np.e] * 3)


def test_complex_factors():
    a, b = np.array([1 + 2j, 0.5]), np.array([2j, -1])
    expected = (b * np.exp(a)).sum()
    np.testing.assert_allclose(np.exp(fastsoftmax.logsumexp(a, b=b)), expected, rtol=1e-14)
    size, phase = fastsoftmax.logsumexp(a, b=b, return_sign=True)
    np.testing.assert_allclose([size, phase], [np.log(abs(expected)), expected / abs(expected)], rtol=1e-14)


def test_out(backend, dtype):
    a, b = np.ones((3, 4), dtype), np.full((3, 4), 2, dtype)
    out = np.empty(3, dtype)
    assert fastsoftmax.logsumexp(a, 1, b, out=out) is out
    np.testing.assert_allclose(out, 1 + np.log(8), rtol=1e-6)


@pytest.mark.parametrize(
    "b", [2, 2.0, True, 2j, np.float32(2), np.float64(2), np.array([2.0]), np.array([2])], ids=repr
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.complex64])
def test_dtypes(dtype, b):
    a = np.array([1, 0], dtype)
    ours, theirs = fastsoftmax.logsumexp(a, b=b), scipy.special.logsumexp(a, b=b)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=4 * np.finfo(ours.dtype).eps)


def test_a_python_number_leaves_out_its_dtype():
    out = np.empty(3, np.float32)
    assert fastsoftmax.logsumexp(np.ones((3, 4), np.float32), 1, 2.0, out=out) is out
    np.testing.assert_allclose(out, 1 + np.log(8), rtol=1e-6)
    with pytest.raises(TypeError, match="out must have dtype float64, not float32"):
        fastsoftmax.logsumexp(np.ones((3, 4), np.float32), 1, np.full(4, 2.0), out=out)


def test_bfloat16():
    a = np.array([1, 0], ml_dtypes.bfloat16)
    for b, dtype in (
        ([2, 3], np.float64),
        (np.array([2, 3], np.float32), np.float32),
        (np.array([2, 3], a.dtype), a.dtype),
    ):
        result = fastsoftmax.logsumexp(a, b=b)
        assert result.dtype == dtype
        np.testing.assert_allclose(result.astype(float), np.log(2 * np.e + 3), rtol=ml_dtypes.finfo(dtype).eps)
    with pytest.raises(TypeError, match="b of dtype float16 does not combine with a of dtype bfloat16"):
        fastsoftmax.logsumexp(a, b=np.array([2, 3], np.float16))


# Accuracy


SCALES = {"equal": 0, "close": 1e-3, "normal": 1, "wide": 30, "very wide": 300}
OFFSETS = {"none": 0, "small": 1, "large": -1e4, "huge": -3e30}
FACTOR_KINDS = {
    "of one size": lambda rng, n: rng.uniform(0.5, 2, n),
    "of all sizes": lambda rng, n: np.exp(rng.uniform(-87, 87, n)),
    "of both signs": lambda rng, n: rng.uniform(0.5, 2, n) * rng.choice([-1, 1], n),
    "of all sizes and both signs": lambda rng, n: np.exp(rng.uniform(-87, 87, n)) * rng.choice([-1, 1], n),
    "subnormal": lambda rng, n: rng.uniform(1, 1e5, n) * 1e-45,
    "often zero": lambda rng, n: rng.integers(0, 2, n),
}


def exact(a, b):
    """Return the logarithm and the sign of the sum, the unit its error is counted in, and the sum's condition number.

    The unit is one ULP of the largest of the logarithm's parts: the `a` and the factor of the largest term, the sum
    relative to that term, and the result itself.
    """
    with mpmath.workdps(60):
        exponents, factors = [mpmath.mpf(float(x)) for x in a], [mpmath.mpf(float(x)) for x in b]
        highest = max(exponents)
        terms = [factor * mpmath.exp(exponent - highest) for exponent, factor in zip(exponents, factors, strict=True)]
        total, top = mpmath.fsum(terms), max(range(len(terms)), key=lambda i: abs(terms[i]))
        if total == 0:
            return -np.inf, 0, 0, 1
        result = highest + mpmath.log(abs(total))
        parts = [exponents[top], mpmath.log(abs(factors[top])), mpmath.log(abs(total / terms[top])), result]
        unit = np.spacing(np.array(max(abs(part) for part in parts), a.dtype))
        return result, mpmath.sign(total), mpmath.mpf(float(unit)), mpmath.fsum(map(abs, terms)) / abs(total)


@cache
def case(scale, offset, kind, n, dtype):
    """Return a row, its factors and what `exact` says of them."""
    rng = np.random.default_rng(n)
    a = (rng.normal(size=n) * SCALES[scale] + OFFSETS[offset]).astype(dtype)
    b = FACTOR_KINDS[kind](rng, n).astype(dtype)
    return a, b, exact(a, b)


def check(max_ulps, a, b, expected):
    expected, expected_sign, unit, condition = expected
    result, sign = fastsoftmax.logsumexp(a, b=b, return_sign=True)
    assert sign == expected_sign
    if expected_sign == 0:
        assert result == -np.inf
        return
    with mpmath.workdps(60):
        error = abs(mpmath.mpf(float(result)) - expected)
        assert error <= max_ulps * (unit + (condition - 1) * float(np.finfo(a.dtype).eps))


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_accuracy(backend, dtype, scale, kind):
    for offset in OFFSETS:
        for n in (1, 2, 17, 300):
            check(backend.max_ulps, *case(scale, offset, kind, n, dtype))


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize(("scale", "offset"), [("normal", "none"), ("wide", "large")])
def test_accuracy_of_long_rows(backend, dtype, scale, offset, kind):
    check(backend.max_ulps, *case(scale, offset, kind, 9000, dtype))


def test_a_small_rest_is_not_lost(backend, dtype):
    np.testing.assert_allclose(fastsoftmax.logsumexp(np.array([0, -40], dtype), b=1), np.exp(-40), rtol=1e-6)
    np.testing.assert_allclose(fastsoftmax.logsumexp(np.array([0, 0], dtype), b=[1, 1e-30]), 1e-30, rtol=1e-6)
    np.testing.assert_allclose(fastsoftmax.logsumexp(np.array([0, 0], dtype), b=[1, -1e-30]), -1e-30, rtol=1e-6)


def test_factors_of_one_change_nothing(backend, dtype, rng):
    a = rng.normal(size=(5, 3000)).astype(dtype)
    np.testing.assert_allclose(
        fastsoftmax.logsumexp(a, 1, np.ones_like(a)), fastsoftmax.logsumexp(a, 1), rtol=4 * np.finfo(dtype).eps
    )


# Long rows, whose chunks have states that merge


def test_a_sum_that_cancels_over_chunks(backend, dtype):
    a, b = np.full(20_000, 0.7, dtype), np.ones(20_000, dtype)
    b[10_000:] = -1
    assert fastsoftmax.logsumexp(a, b=b, return_sign=True) == (-np.inf, 0)
    b[0] = 2
    np.testing.assert_allclose(fastsoftmax.logsumexp(a, b=b), 0.7, rtol=1e-6)


@cache
def rows_far_from_an_offset(dtype):
    rng, rows = np.random.default_rng(0), np.full((8, 20_000), -90, dtype)
    rows[:, 0], rows[:, -2:] = rng.uniform(-15, -9, 8), rng.uniform(-0.1, 0.1, (8, 2))
    return [(row, exact(row, np.ones_like(row))) for row in rows]


def test_terms_far_from_an_offset(backend, dtype):
    """The last chunk, which makes the sum, keeps the offset of the first, from which its differences are rounded."""
    for row, expected in rows_far_from_an_offset(dtype):
        check(backend.max_ulps, row, np.ones_like(row), expected)


def test_an_ascending_row(backend, dtype):
    a = np.linspace(-300, 300, 50_000).astype(dtype)
    b = np.where(np.arange(a.size) % 3, 1, -0.5).astype(dtype)
    with np.errstate(all="ignore"):
        terms = b * np.exp(a.astype(np.longdouble))
    expected = np.log(terms.sum())
    np.testing.assert_allclose(fastsoftmax.logsumexp(a, b=b), expected, rtol=backend.max_ulps * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("special", "total", "sign"),
    [
        ({9999: (np.inf, -1)}, np.inf, -1),
        ({9999: (np.inf, 0)}, 1, 1),
        ({9999: (np.nan, 1)}, np.nan, np.nan),
        ({3: (np.inf, 2), 9999: (np.inf, 3)}, np.inf, 1),
        ({3: (np.inf, 2), 9999: (np.inf, -3)}, np.nan, np.nan),
        ({3: (np.inf, 2), 9999: (np.nan, 1)}, np.nan, np.nan),
        ({3: (0, np.inf)}, np.inf, 1),
        ({3: (0, np.nan)}, np.nan, np.nan),
        ({3: (-np.inf, np.inf)}, np.nan, np.nan),
        ({3: (-np.inf, 7)}, 1, 1),
    ],
    ids=str,
)
def test_special_terms_anywhere_in_a_long_row(backend, dtype, special, total, sign):
    a, b = np.full(10_000, -np.inf, dtype), np.ones(10_000, dtype)
    a[5000] = 1
    for index, (exponent, factor) in special.items():
        a[index], b[index] = exponent, factor
    np.testing.assert_array_equal(fastsoftmax.logsumexp(a, b=b, return_sign=True), (total, sign))
    np.testing.assert_array_equal(fastsoftmax.logsumexp(a, b=b), np.nan if sign == -1 else total)


# Layouts


def views(rng, dtype):
    """Pairs of a and b of shape (4, 5, 600) in many layouts."""
    a, b = rng.normal(size=(4, 5, 600)).astype(dtype), rng.normal(size=(4, 5, 600)).astype(dtype)
    return {
        "contiguous": (a, b),
        "Fortran order": (np.asfortranarray(a), b),
        "both in Fortran order": (np.asfortranarray(a), np.asfortranarray(b)),
        "negative strides": (a[::-1, :, ::-1], b[:, ::-1]),
        "transposed factors": (a, np.ascontiguousarray(b.transpose(2, 0, 1)).transpose(1, 2, 0)),
        "every second": (np.repeat(a, 2, axis=2)[..., ::2], b),
        "unaligned": (np.frombuffer(b"?" + a.tobytes(), dtype, offset=1).reshape(a.shape), b),
        "byte-swapped": (a, b.astype(b.dtype.newbyteorder())),
        "a number": (a, dtype(0.5)),
        "one a row": (a, b[:, :1, :1]),
        "one a column": (a, b[0, 0]),
        "an a for many factors": (a[:, :, :1], b),
    }


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), None], ids=str)
@pytest.mark.parametrize("layout", sorted(views(np.random.default_rng(0), np.float32)))
def test_layouts_give_the_same_bits(backend, dtype, rng, layout, axis):
    a, b = views(rng, dtype)[layout]
    plain_a, plain_b = (np.array(np.broadcast_to(part, (4, 5, 600)), dtype, order="C") for part in (a, b))
    a_before, b_before = a.copy(), np.copy(b)
    result = fastsoftmax.logsumexp(a, axis, b, return_sign=True)
    expected = fastsoftmax.logsumexp(plain_a, axis, plain_b, return_sign=True)
    np.testing.assert_array_equal(a, a_before)
    np.testing.assert_array_equal(b, b_before)
    if axis in (0, 1, 2):
        np.testing.assert_array_equal(result, expected)
    else:  # the elements of a row over several axes are summed in the order of memory
        np.testing.assert_allclose(result, expected, rtol=1e-4 if dtype is np.float32 else 1e-12, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 10, 16, 17, 31, 40, 127, 128, 129])
def test_rows_have_the_bits_that_they_have_alone(backend, dtype, rng, n):
    a, b = (rng.normal(size=(53, n)) * 10).astype(dtype), rng.normal(size=(53, n)).astype(dtype)
    a[rng.random(a.shape) < 0.1], b[rng.random(a.shape) < 0.1] = -np.inf, 0
    a[5, n // 2], b[7, n // 2], a[11, -1], a[12], b[13] = np.inf, np.inf, np.nan, -np.inf, 0
    a[20:30], b[20:25] = np.round(a[20:30]), np.round(b[20:25])  # ties, and sums that cancel
    for options in ({}, {"where": rng.random(a.shape) < 0.8}, {"temperature": 0.7}):
        alone = []
        for row in range(len(a)):
            of_row = {key: value[row] if key == "where" else value for key, value in options.items()}
            alone.append(fastsoftmax.logsumexp(a[row], b=b[row], return_sign=True, **of_row))
        result = fastsoftmax.logsumexp(a, 1, b, return_sign=True, **options)
        np.testing.assert_array_equal(np.transpose(result), alone)
        turned = {key: value.T if key == "where" else value for key, value in options.items()}
        result = fastsoftmax.logsumexp(a.T.copy(), 0, b.T, return_sign=True, **turned)
        np.testing.assert_array_equal(np.transpose(result), alone)


def test_no_temporaries_of_the_size_of_the_input(backend, dtype):
    if not backend.has_kernels:
        pytest.skip("the numpy backend makes temporaries of the size of its input")
    a, b = np.zeros((64, 20_000), dtype), np.ones(20_000, dtype)
    fastsoftmax.logsumexp(a, 1, b)
    tracemalloc.start()
    fastsoftmax.logsumexp(a, 1, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < a.nbytes / 20


# Elements that are converted or masked on their way

STORED = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, bool, np.int8, np.uint16, np.int64]
STORED_NAMES = [np.dtype(dtype).name for dtype in STORED]


def stored(rng, shape, dtype):
    return rng.integers(0, 2 if dtype is bool else 5, shape).astype(dtype)


def bits(array):
    return array.view(f"u{array.itemsize}")


@pytest.mark.parametrize("asked", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=STORED_NAMES[:4])
@pytest.mark.parametrize("b_dtype", STORED, ids=STORED_NAMES)
@pytest.mark.parametrize("a_dtype", STORED, ids=STORED_NAMES)
def test_the_bits_of_arrays_that_were_converted_first(backend, rng, a_dtype, b_dtype, asked):
    working = np.float64 if asked is np.float64 else np.float32
    for shape, axis in (((6, 37), 1), ((6, 37), 0), ((2, 3, 11), (0, 2)), ((2, 5000), 1)):
        a, b = stored(rng, shape, a_dtype), stored(rng, shape, b_dtype)
        if np.dtype(b_dtype).kind in "fiV":
            b = -b
        result, sign = fastsoftmax.logsumexp(a, axis, b, return_sign=True, dtype=asked)
        expected, expected_sign = fastsoftmax.logsumexp(a.astype(working), axis, b.astype(working), return_sign=True)
        np.testing.assert_array_equal(bits(result), bits(expected.astype(asked)))
        np.testing.assert_array_equal(bits(sign), bits(expected_sign.astype(asked)))


@pytest.mark.parametrize("layout", sorted(views(np.random.default_rng(0), np.float32)))
def test_layouts_of_16_bits(backend, rng, layout):
    a, b = views(rng, np.float32)[layout]
    half_a, half_b = (np.asarray(part).astype(np.float16) for part in (a, b))  # which keeps the order in memory
    if layout == "negative strides":  # but not these
        half_a, half_b = half_a[::-1, ::-1, :300], half_b[..., ::-2]
    for axis in (0, 1, 2, (0, 2)):
        result = fastsoftmax.logsumexp(half_a, axis, half_b, return_sign=True)
        order = {"axis": axis, "return_sign": True}
        wide = fastsoftmax.logsumexp(half_a.astype(np.float32), b=half_b.astype(np.float32), **order)
        assert result[0].dtype == result[1].dtype == np.float16
        np.testing.assert_array_equal(result[0], wide[0].astype(np.float16))
        np.testing.assert_array_equal(result[1], wide[1])


MASKS = {
    "of a's shape": lambda rng: rng.random((6, 5000)) < 0.6,
    "in Fortran order": lambda rng: np.asfortranarray(rng.random((6, 5000)) < 0.6),
    "in steps": lambda rng: (rng.random((6, 10_000)) < 0.6)[::-1, ::2],
    "one a column": lambda rng: rng.random(5000) < 0.6,
    "one a row": lambda rng: np.arange(6)[:, np.newaxis] % 3 > 0,
    "nothing": lambda rng: False,
    "bytes other than 1": lambda rng: (rng.integers(0, 2, (6, 5000)) * 4).astype(np.uint8).view(bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "given", [np.float16, np.float32, np.float64, np.int16], ids=lambda dtype: np.dtype(dtype).name
)
def test_a_masked_element_has_the_factor_0(backend, rng, given, mask):
    a, b, where = stored(rng, (6, 5000), given), rng.normal(size=(6, 5000)).astype(np.float32), MASKS[mask](rng)
    kept = np.broadcast_to(np.asarray(where).view(np.uint8) != 0, a.shape)
    expected_b = np.where(kept, b, np.float32(0))
    b[~kept] = np.nan
    for axis in (0, 1, None):
        result = fastsoftmax.logsumexp(a, axis, b, return_sign=True, where=where)
        expected = fastsoftmax.logsumexp(a, axis, expected_b, return_sign=True)
        np.testing.assert_array_equal(result, expected)


def test_a_mask_and_factors_that_are_broadcast(backend, dtype, rng):
    a, b, where = rng.normal(size=(4, 1, 30)).astype(dtype), rng.normal(size=(5, 1)).astype(dtype), rng.random(30) < 0.5
    result = fastsoftmax.logsumexp(a, -1, b, return_sign=True, where=where)
    expected = fastsoftmax.logsumexp(a[..., where], -1, b, return_sign=True)
    assert result[0].shape == (4, 5)
    np.testing.assert_array_equal(result[1], expected[1])
    np.testing.assert_allclose(result[0], expected[0], rtol=8 * np.finfo(dtype).eps)


def test_out_of_another_dtype_than_is_computed_in(backend, rng):
    a, b = rng.normal(size=(6, 50)).astype(np.float16), rng.normal(size=(6, 50)).astype(np.float16)
    expected, sign = fastsoftmax.logsumexp(a, 1, b, return_sign=True)
    memory = np.full((6, 50), 7, np.float16)
    result, same_sign = fastsoftmax.logsumexp(a, 1, b, return_sign=True, out=memory[:, 3])
    assert result.base is memory
    np.testing.assert_array_equal(memory[:, 3], expected)
    np.testing.assert_array_equal(same_sign, sign)
    assert (np.delete(memory, 3, axis=1) == 7).all()


def test_a_mask_in_the_memory_of_out(backend, rng):
    a, b, where = rng.normal(size=(8, 8)), rng.normal(size=(8, 8)), rng.random((8, 8)) < 0.5
    expected = fastsoftmax.logsumexp(a, 1, b**2, where=where)
    memory = np.zeros(8)
    shared = memory.view(bool).reshape(8, 8)
    shared[...] = where
    np.testing.assert_array_equal(fastsoftmax.logsumexp(a, 1, b**2, where=shared, out=memory), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("a_dtype", "b_dtype", "asked"),
    [
        (np.float16, np.float16, None),
        (ml_dtypes.bfloat16, np.float32, None),
        (np.float32, np.float64, None),
        (np.int32, bool, None),
        (np.float64, np.float64, np.float32),
        (np.float32, np.int8, ml_dtypes.bfloat16),
    ],
)
@pytest.mark.parametrize("name", ["cython", "numba"])
def test_no_array_is_made(rng, monkeypatch, name, a_dtype, b_dtype, asked, axis):
    """Elements are converted and masked on their way."""
    if name not in fastsoftmax.available_backends():
        pytest.skip(f"backend {name!r} is not available")
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")
    a, b, where = stored(rng, (1000, 2000), a_dtype), stored(rng, (1000, 2000), b_dtype), rng.random((1000, 2000)) < 0.9
    options = {"dtype": asked, "where": where, "temperature": 0.7, "backend": name}
    out = fastsoftmax.logsumexp(a, axis, b, **options)
    tracemalloc.start()
    fastsoftmax.logsumexp(a, axis, b, out=out, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < a.size / 10


def test_any_number_of_threads_gives_the_same_bits(backend, dtype, rng, monkeypatch):
    a, b = rng.normal(size=(300, 2000)).astype(dtype), rng.normal(size=2000).astype(dtype)
    results = []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        with fastsoftmax.record_plans() as plans:
            results.append(fastsoftmax.logsumexp(a, 1, b, return_sign=True))
        assert [plan.function for plan in plans] == ["weighted_logsumexp"]
        assert plans[0].backend == backend.name
        assert plans[0].schedule.n_threads == (int(n_threads) if backend.has_kernels else 1)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_out_may_be_strided_and_hold_the_factors(backend, dtype, rng):
    a, b = rng.normal(size=(6, 50)).astype(dtype), rng.uniform(size=(6, 50)).astype(dtype)
    expected = fastsoftmax.logsumexp(a, 1, b)
    memory = np.full((6, 50), 7, dtype)
    fastsoftmax.logsumexp(a, 1, b, out=memory[:, 3])
    np.testing.assert_array_equal(memory[:, 3], expected)
    assert (np.delete(memory, 3, axis=1) == 7).all()
    shared = b[:, 0]
    fastsoftmax.logsumexp(a, 1, b, out=shared)
    np.testing.assert_array_equal(shared, expected)


@pytest.mark.parametrize("keepdims", [False, True])
def test_out_with_signs(backend, dtype, rng, keepdims):
    a, b = rng.normal(size=(6, 50)).astype(dtype), rng.normal(size=(6, 50)).astype(dtype)
    expected, sign = fastsoftmax.logsumexp(a, 0, b, keepdims, return_sign=True)
    out = np.empty_like(expected)
    result, same_sign = fastsoftmax.logsumexp(a, 0, b, keepdims, return_sign=True, out=out)
    assert result is out
    assert out.shape == same_sign.shape == ((1, 50) if keepdims else (50,))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(same_sign, sign)


# The laws of the state


TERMS = st.lists(
    st.tuples(
        st.one_of(st.floats(-50, 50), st.floats(-800, 800), st.sampled_from([-np.inf])),
        st.one_of(st.floats(0.5, 2), st.floats(1e-300, 1e300), st.sampled_from([0.0])),
    ),
    max_size=6,
)
SPECIAL_TERMS = st.sampled_from([(np.inf, 1.0), (np.inf, -1.0), (np.nan, 1.0), (0.0, np.inf)])


def state_of(terms):
    """The merged states of single terms, as the kernels make them."""
    state = _state.weighted_identity()
    for a, b in terms:
        if b == 0 or (a == -np.inf and np.isfinite(b)):
            single = _state.weighted_identity()
        elif np.isfinite(a) and np.isfinite(b):
            single = _state.WeightedState(a, b, a, np.frexp(b)[1] - 1 - _state.WEIGHTED_TOP, 0.0, 0.0)
        else:
            single = _state.WeightedState(-np.inf, 1.0, -np.inf, 0.0, float(b * np.exp(a)), 0.0)
        state = _state.merge_weighted(state, single)
    return state


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


@given(terms=TERMS, special=st.lists(SPECIAL_TERMS, max_size=2))
def test_identity_is_neutral(terms, special):
    state = state_of(terms + special)
    assert same(_state.merge_weighted(_state.weighted_identity(), state), state)
    assert same(_state.merge_weighted(state, _state.weighted_identity()), state)


@given(first=TERMS, second=TERMS, special=st.lists(SPECIAL_TERMS, max_size=2))
def test_merge_is_commutative(first, second, special):
    a, b = state_of(first + special), state_of(second)
    left, right = (_state.weighted_logsumexp(_state.merge_weighted(*pair)) for pair in ((a, b), (b, a)))
    assert same(left, right) or np.allclose(left, right, rtol=4e-16, atol=4e-16)


@given(first=TERMS, second=TERMS, third=TERMS)
def test_merge_is_associative(first, second, third):
    a, b, c = (state_of(terms) for terms in (first, second, third))
    merge = _state.merge_weighted
    left, right = _state.weighted_logsumexp(merge(merge(a, b), c)), _state.weighted_logsumexp(merge(a, merge(b, c)))
    np.testing.assert_allclose(left, right, rtol=1e-15, atol=1e-15)


@given(terms=TERMS)
def test_the_logarithm_of_a_state(terms):
    result, sign = _state.weighted_logsumexp(state_of(terms))
    kept = np.array([term for term in terms if term[1] and np.isfinite(term[0])]).reshape(-1, 2)
    if kept.size == 0:
        assert (result, sign) == (-np.inf, 0)
        return
    expected, expected_sign, unit, _ = exact(kept[:, 0], kept[:, 1])
    assert sign == expected_sign
    assert abs(mpmath.mpf(result) - expected) <= 2 * unit
