"""The same call gives what `scipy.special` gives, wherever SciPy is right."""

import inspect

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import fastsoftmax

RTOL = {np.float32: 1e-5, np.float64: 1e-12}


def test_signatures_begin_with_scipys(function):
    ours = list(inspect.signature(getattr(fastsoftmax, function)).parameters.values())
    theirs = list(inspect.signature(getattr(scipy.special, function)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), ()], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 60, 70)], ids=str)
def test_same_values_and_types(backend, function, dtype, shape, axis):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype) * 10
    ours = getattr(fastsoftmax, function)(x, axis)
    theirs = getattr(scipy.special, function)(x, axis)
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=RTOL[dtype], atol=RTOL[dtype])


def shapes_that_broadcast():
    return npst.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=6)


@st.composite
def weighted_calls(draw, weights):
    a_shape, b_shape = draw(shapes_that_broadcast()).input_shapes
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    a = rng.normal(size=a_shape).astype(dtype) * dtype(draw(st.sampled_from([1, 20])))
    b = draw(weights)(rng, b_shape).astype(dtype)
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
ANY_WEIGHTS = st.sampled_from([positive, with_zeros, of_one_sign_each_row])


@given(weighted_calls(ANY_WEIGHTS))
def test_weighted_logsumexp(call):
    a, b, axis, keepdims = call
    ours = fastsoftmax.logsumexp(a, axis, b, keepdims)
    theirs = scipy.special.logsumexp(a, axis, b, keepdims)
    assert np.shape(ours) == np.shape(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@given(weighted_calls(ANY_WEIGHTS))
def test_weighted_logsumexp_with_sign(call):
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
def test_weights(a, b, total, sign):
    np.testing.assert_array_equal(fastsoftmax.logsumexp(a, b=b, return_sign=True), (total, sign))
    np.testing.assert_array_equal(fastsoftmax.logsumexp(a, b=b), np.nan if sign == -1 else total)


def test_a_weight_for_each_column():
    a = np.log([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(np.exp(fastsoftmax.logsumexp(a, 1, b=[10, 1])), [12, 34], rtol=1e-14)
    np.testing.assert_allclose(np.exp(fastsoftmax.logsumexp([[0.0], [1.0]], 0, b=np.ones((1, 3)))), [1 + np.e] * 3)


def test_complex_weights():
    a, b = np.array([1 + 2j, 0.5]), np.array([2j, -1])
    expected = (b * np.exp(a)).sum()
    np.testing.assert_allclose(np.exp(fastsoftmax.logsumexp(a, b=b)), expected, rtol=1e-14)
    size, phase = fastsoftmax.logsumexp(a, b=b, return_sign=True)
    np.testing.assert_allclose([size, phase], [np.log(abs(expected)), expected / abs(expected)], rtol=1e-14)


def test_weighted_out(dtype):
    a, b = np.ones((3, 4), dtype), np.full((3, 4), 2, dtype)
    out = np.empty(3, dtype)
    assert fastsoftmax.logsumexp(a, 1, b, out=out) is out
    np.testing.assert_allclose(out, 1 + np.log(8), rtol=1e-6)


@pytest.mark.parametrize(
    "b", [2, 2.0, True, 2j, np.float32(2), np.float64(2), np.array([2.0]), np.array([2])], ids=repr
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.complex64])
def test_dtype_of_a_weighted_sum(dtype, b):
    a = np.array([1, 0], dtype)
    ours, theirs = fastsoftmax.logsumexp(a, b=b), scipy.special.logsumexp(a, b=b)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=4 * np.finfo(ours.dtype).eps)


def test_a_python_number_as_weight_leaves_out_its_dtype():
    out = np.empty(3, np.float32)
    assert fastsoftmax.logsumexp(np.ones((3, 4), np.float32), 1, 2.0, out=out) is out
    np.testing.assert_allclose(out, 1 + np.log(8), rtol=1e-6)
    with pytest.raises(TypeError, match="out must have dtype float64, not float32"):
        fastsoftmax.logsumexp(np.ones((3, 4), np.float32), 1, np.full(4, 2.0), out=out)


def test_weights_of_bfloat16():
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
