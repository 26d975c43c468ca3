"""Dtypes that no kernel computes in: converted, or served by the NumPy backend, and never a wrong answer."""

import ml_dtypes
import numpy as np
import pytest
import scipy.special

import fastsoftmax
from fastsoftmax import log_softmax, logsumexp, softmax

from .reference import LONG, error_of, exact, max_ulp_error

INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"]
HALVES = [np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(backend, function, name):
    dtype = np.dtype(name)
    x = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    if name != "bool":
        limits = np.iinfo(dtype)
        x = np.concatenate([x, np.array([[limits.min, limits.max, 0], [1, 2, 3]], dtype)])
    # SciPy's rule for the dtype of the result.
    expected_dtype = {1: np.float16, 2: np.float32}.get(dtype.itemsize, np.float64)
    expected_dtype = np.float64 if function == "logsumexp" else expected_dtype
    for axis in (0, 1):
        result = getattr(fastsoftmax, function)(x, axis)
        assert result.dtype == expected_dtype
        # Twice rounded where the result is narrower than the float64 it was computed in.
        assert error_of(function, result, x.astype(np.float64), axis) <= backend.max_ulps


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_halves_are_computed_wider(backend, function, dtype):
    """Half an ULP of the narrow dtype, and what float32 was off before the rounding."""
    x = np.random.default_rng(0).uniform(0, 5, size=(300, 7)).astype(dtype)
    for axis in (0, 1, None):
        result = getattr(fastsoftmax, function)(x, axis)
        assert result.dtype == dtype
        value = exact(function, x.astype(np.float32), axis)
        assert max_ulp_error(np.reshape(result, value.shape), value) <= 0.501


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_halves_over_a_leading_axis_sum_to_1(backend, dtype):
    """SciPy accumulates in float16 here: its probabilities sum to 2."""
    probabilities = softmax(np.zeros((4096, 3), dtype), 0)
    np.testing.assert_array_equal(probabilities.astype(np.float64).sum(0), np.ones(3))


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_halves_reach_infinity_silently(backend, dtype):
    largest = ml_dtypes.finfo(dtype).max
    x = np.array([-largest, largest], dtype)
    np.testing.assert_array_equal(log_softmax(x).astype(float), [-np.inf, 0])
    assert logsumexp(x) == largest


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_halves_into_out_and_in_place(backend, dtype):
    x = np.random.default_rng(0).normal(size=(5, 70)).astype(dtype)
    expected = softmax(x, 1)
    assert softmax(x, 1, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_float16_of_every_layout(backend):
    x = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float16)
    expected = softmax(x, 0)
    np.testing.assert_array_equal(softmax(np.asfortranarray(x), 0), expected)
    np.testing.assert_array_equal(softmax(x.astype(">f2"), 0), expected)
    assert softmax(np.asfortranarray(x), 0).flags.f_contiguous


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fn", "int4"])
def test_what_ml_dtypes_adds_beside_bfloat16_is_refused_by_name(backend, function, name):
    with pytest.raises(TypeError, match=f"must hold numbers, not {name}"):
        getattr(fastsoftmax, function)(np.zeros(3, getattr(ml_dtypes, name)))


# Served by the NumPy backend, chosen by the dtype alone


@pytest.mark.skipif(np.finfo(LONG).nmant <= 52, reason="long double is no wider than float64 here")
def test_longdouble(function):
    x = np.random.default_rng(0).normal(size=(4, 50)).astype(LONG) * 20 + LONG(2) ** -60
    with fastsoftmax.record_plans() as plans:
        result = getattr(fastsoftmax, function)(x, 1)
    assert plans[0].backend == "numpy"
    assert result.dtype == LONG
    value = exact(function, x, 1).reshape(result.shape)
    assert max_ulp_error(result, value, None if function != "logsumexp" else abs(value) + 1) <= 8


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex(function, dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 6)) + 1j * rng.normal(size=(4, 6))).astype(dtype)
    for axis in (0, 1, None):
        result = getattr(fastsoftmax, function)(x, axis)
        assert result.dtype == dtype
        expected = getattr(scipy.special, function)(x.astype(np.complex128), axis)
        # The branch of a complex logarithm is free; its exponential is not.
        if function != "softmax":
            result, expected = np.exp(result), np.exp(expected)
        np.testing.assert_allclose(result, expected, rtol=64 * np.finfo(dtype).eps)


def test_complex_sum_and_its_phase():
    x = np.array([1 + 2j, 0.5 - 1j, -1 + 3j])
    size, phase = logsumexp(x, return_sign=True)
    expected_size, expected_phase = scipy.special.logsumexp(x, return_sign=True)
    np.testing.assert_allclose(size, expected_size, rtol=1e-14)
    np.testing.assert_allclose(phase, expected_phase, rtol=1e-14)


@pytest.mark.parametrize("dtype", [LONG, np.complex64, np.complex128])
def test_kernels_refuse_what_they_do_not_compute_in(backend, function, dtype):
    x = np.ones(3, dtype)
    if backend.has_kernels and np.dtype(dtype) != np.float64:
        with pytest.raises(TypeError, match=f"backend '{backend.name}' does not compute in {np.dtype(dtype).name}"):
            getattr(fastsoftmax, function)(x)
    else:
        np.testing.assert_allclose(softmax(x), np.full(3, 1 / 3))
