"""``dtype=``: what the numbers are converted to, computed in (float16 and bfloat16 in float32), and returned in."""

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import logsumexp

from .reference import error_of

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
NAMES = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture
def call(function):
    return getattr(fastsoftmax, function)


@pytest.mark.parametrize("asked", FLOATS, ids=NAMES)
@pytest.mark.parametrize("given", [*FLOATS, np.int8, np.uint16, np.int64, bool], ids=lambda d: np.dtype(d).name)
def test_of_the_result_and_the_computation(backend, call, rng, given, asked):
    x = rng.integers(0, 2 if given is bool else 9, (5, 40)).astype(given)
    computed = np.float64 if asked is np.float64 else np.float32
    for axis in (0, 1, None):
        result = call(x, axis, dtype=asked)
        assert result.dtype == asked
        np.testing.assert_array_equal(result, np.asarray(call(x.astype(computed), axis)).astype(asked))


@pytest.mark.parametrize("dtype_name", ["float32", "f8", ">f4", "d"])
def test_names_of_dtypes(backend, call, rng, dtype_name):
    result = call(rng.normal(size=8).astype(np.float16), dtype=dtype_name)
    assert result.dtype == np.dtype(dtype_name).newbyteorder("=")


def test_wider_than_the_numbers(backend, function, call, rng):
    """More digits than their own dtype has."""
    x = rng.normal(size=(3, 70)).astype(np.float16)
    assert error_of(function, call(x, 1, dtype=np.float64), x.astype(np.float64), 1) <= backend.max_ulps


@pytest.mark.parametrize("asked", [np.longdouble, np.complex64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_the_generic_path(function, call, rng, asked):
    x = rng.normal(size=(3, 7)).astype(np.float32)
    result = call(x, 1, dtype=asked)
    assert result.dtype == asked
    np.testing.assert_allclose(result, call(x, 1).astype(asked), rtol=1e-5)


def test_with_out(backend, call, rng):
    x = rng.normal(size=(3, 40)).astype(np.float32)
    expected = call(x, 1, dtype=np.float64)
    out = np.empty(expected.shape)
    assert call(x, 1, dtype=np.float64, out=out) is out
    np.testing.assert_array_equal(out, expected)
    narrow = np.full(expected.shape, 7, np.float32)
    with pytest.raises(TypeError, match="out must have dtype float64, not float32"):
        call(x, 1, dtype=np.float64, out=narrow)
    assert (narrow == 7).all()


def test_with_where_and_temperature(backend, call, rng):
    x, where = rng.normal(size=(9, 40)).astype(np.float16), rng.random((9, 40)) < 0.5
    options = {"where": where, "temperature": 0.3}
    for axis in (0, 1):
        result = call(x, axis, dtype=np.float64, **options)
        np.testing.assert_array_equal(result, call(x.astype(np.float64), axis, **options))


def test_with_factors(backend, rng):
    a, b = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=8)
    result, sign = logsumexp(a, 1, b, return_sign=True, dtype=np.float64)
    expected, expected_sign = logsumexp(a.astype(np.float64), 1, b, return_sign=True)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(sign, expected_sign)


def test_complex_numbers_with_real_signs(rng):
    result, sign = logsumexp(rng.normal(size=8), return_sign=True, dtype=np.complex128)
    assert (result.dtype, sign.dtype) == (np.float64, np.complex128)


def test_numbers_beyond_the_range(backend, call):
    """They are infinite in that dtype, and NumPy says so, as in its own reductions."""
    with pytest.warns(RuntimeWarning, match="overflow encountered in cast"):
        result = call(np.array([1e300, 0.0]), dtype=np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(result, call(np.array([1e300, 0.0]).astype(np.float32)))


@pytest.mark.parametrize("asked", [int, bool, np.uint8, object, str, "M8[s]", ml_dtypes.float8_e5m2], ids=str)
def test_dtypes_that_are_not_computed_in(backend, function, call, asked):
    x = np.ones((3, 4))
    out = np.full((3,) if function == "logsumexp" else x.shape, 7.0)
    with pytest.raises(TypeError, match="dtype must be a floating or complex type, not") as raised:
        call(x, 1, dtype=asked, out=out)
    assert str(np.dtype(asked)) in str(raised.value)
    assert (out == 7).all()


@pytest.mark.parametrize("asked", ["nonsense", 3.5, [1, 2, 3]], ids=repr)
def test_what_is_no_dtype(call, asked):
    with pytest.raises(TypeError, match="dtype must be a floating or complex type, not"):
        call(np.ones(3), dtype=asked)


def test_complex_numbers_in_a_real_dtype(call, function):
    name = "a" if function == "logsumexp" else "x"
    with pytest.raises(TypeError, match=f"dtype float32 does not hold {name} of dtype complex128"):
        call(np.ones(3, complex), dtype=np.float32)
    with pytest.raises(TypeError, match="dtype float32 does not hold b of dtype complex128"):
        logsumexp(np.ones(3), b=np.ones(3, complex), dtype=np.float32)


@pytest.mark.parametrize("asked", FLOATS, ids=NAMES)
def test_the_dtype_that_it_has_changes_nothing(backend, call, rng, asked):
    x = rng.normal(size=(5, 40)).astype(asked)
    with fastsoftmax.record_plans() as plans:
        np.testing.assert_array_equal(call(x, 1, dtype=asked), call(x, 1))
    assert plans[0] == plans[1]
