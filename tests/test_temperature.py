"""``temperature=``: the softmax of x / T, whose quotients are not rounded."""

from fractions import Fraction

import ml_dtypes
import mpmath
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import log_softmax, logsumexp, record_plans, softmax

from .inputs import WRITABLE_LAYOUTS, values
from .reference import error_of, exact, max_ulp_error

INF = np.inf
TEMPERATURES = (0.7, 0.01, 3, 37.5, 1e-30, 1e30)


@pytest.fixture
def call(function):
    return getattr(fastsoftmax, function)


@pytest.mark.parametrize("kind", ["normal", "wide", "offset", "negative offset", "ties", "extremes", "masked by -inf"])
def test_the_exact_value(backend, function, call, dtype, kind):
    x = values(kind, (3, 300), dtype)
    for temperature in TEMPERATURES:
        for array, axis in ((x, 1), (x.T.copy(), 0)):
            result = call(array, axis, temperature=temperature)
            assert error_of(function, result, array, axis, temperature) <= backend.max_ulps, (temperature, axis)


@pytest.mark.parametrize("n_cols", [1, 2, 31, 8193, 20_000])
def test_every_length(backend, function, call, dtype, n_cols):
    x = values("wide", (2, n_cols), dtype)
    result = call(x, 1, temperature=0.3)
    assert error_of(function, result, x, 1, 0.3) <= backend.max_ulps
    # The order of the additions is another one in Numba's loops over strips.
    same_bits = np.testing.assert_array_equal if backend.name != "numba" else np.testing.assert_allclose
    same_bits(call(x.T.copy(), 0, temperature=0.3), result.T)


def test_rounded_quotients_would_not_do(backend, dtype):
    """Their half ULP is magnified by the exponential: the usual way is tens of ULP off."""
    x = values("wide", 300, dtype) / dtype(10)
    assert max_ulp_error(softmax(x / dtype(0.7)), exact("softmax", x, None, 0.7)) > 10
    assert max_ulp_error(softmax(x, temperature=0.7), exact("softmax", x, None, 0.7)) <= backend.max_ulps


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-45, 1e-38, 1e-5, 1e5, 1e38, 1e300, 1.7e308])
def test_quotients_beyond_the_range(backend, dtype, temperature):
    """Against mpmath: the largest elements win, or all are equal; nothing is NaN."""
    info = np.finfo(dtype)
    for x in (
        [info.max, -info.max, info.max / 2, 0],
        [1, 2, 2, -3],
        [0, info.smallest_subnormal, info.tiny, -info.tiny],
    ):
        x = np.array(x, dtype)
        with mpmath.workdps(100):
            quotients = [mpmath.mpf(float(value)) / mpmath.mpf(temperature) for value in x]
            largest, top = max(quotients), int(np.argmax(x))
            others = mpmath.fsum(mpmath.exp(q - largest) for i, q in enumerate(quotients) if i != top)
            log_sum = mpmath.log1p(others)
            probabilities = [mpmath.exp(q - largest) / (1 + others) for q in quotients]
            logarithms = [q - largest - log_sum for q in quotients]
            total = largest + log_sum

        def nearest(numbers):
            in_range = [
                0 if abs(q) < mpmath.mpf("1e-400") else mpmath.sign(q) * min(abs(q), mpmath.mpf("1e400"))
                for q in numbers
            ]
            return np.array([np.longdouble(mpmath.nstr(number, 30)) for number in in_range])

        assert max_ulp_error(softmax(x, temperature=temperature), nearest(probabilities)) <= backend.max_ulps
        assert max_ulp_error(log_softmax(x, temperature=temperature), nearest(logarithms)) <= backend.max_ulps
        scale = nearest([max(abs(largest), abs(log_sum), abs(total))])[0]
        result = logsumexp(x, temperature=temperature)
        assert max_ulp_error(result, nearest([total])[0], scale) <= backend.max_ulps


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_layouts(backend, function, call, dtype, rng, layout):
    x = rng.normal(size=(9, 40)).astype(dtype)
    for axis in (0, 1):
        expected, laid_out = call(x, axis, temperature=0.3), WRITABLE_LAYOUTS[layout](x)
        np.testing.assert_array_equal(call(laid_out, axis, temperature=0.3), expected)
        if function != "logsumexp":
            assert call(laid_out, axis, temperature=0.3, out=laid_out) is laid_out
            np.testing.assert_array_equal(laid_out, expected)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.3, 1e-200])
def test_halves(backend, call, rng, half, temperature):
    """Computed wider, and rounded once."""
    x = rng.normal(size=(5, 33)).astype(half)
    for axis in (0, 1):
        result = call(x, axis, temperature=temperature)
        assert result.dtype == half
        with np.errstate(over="ignore"):
            expected = call(x.astype(np.float32), axis, temperature=temperature).astype(half)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype_name", ["uint8", "int64", "longdouble", "complex128"])
def test_other_dtypes(function, call, rng, dtype_name):
    x = rng.integers(0, 9, (4, 9)).astype(dtype_name)
    result = call(x, 1, temperature=0.3)
    assert result.dtype == call(x, 1).dtype
    expected = call(x.astype(np.result_type(x, float)) / 0.3, 1)
    np.testing.assert_allclose(
        result, expected.astype(result.dtype), rtol=1e-3 if result.dtype == np.float16 else 1e-13
    )


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), np.int64(1), Fraction(1)], ids=repr)
def test_one_is_as_if_it_were_not_given(backend, call, dtype, rng, one):
    x = rng.normal(size=(3, 40)).astype(dtype)
    with record_plans() as plans:
        np.testing.assert_array_equal(call(x, 1, temperature=one), call(x, 1))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("temperature", [np.float32(0.5), np.int64(2), Fraction(1, 2), 2])
def test_numbers_of_any_kind(backend, call, rng, temperature):
    x = rng.normal(size=8)
    np.testing.assert_array_equal(call(x, temperature=temperature), call(x, temperature=float(temperature)))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(7, 1), (3, 40), (2, 9000)], ids=str)
def test_beside_factors(backend, dtype, rng, shape, temperature):
    """`logsumexp` with `b`: the error is that of the largest quotient, whatever the signs."""
    a = (rng.normal(size=shape) * 5).astype(dtype)
    b = rng.uniform(0.5, 2, shape).astype(dtype) * np.where(rng.random(shape) < 0.1, -1, 1).astype(dtype)
    where = rng.random(shape) < 0.9
    quotients = a.astype(np.longdouble) / temperature
    largest = quotients.max(1, keepdims=True)
    for mask in (None, where):
        terms = np.where(True if mask is None else mask, b * np.exp(quotients - largest), 0)
        total = terms.sum(1, keepdims=True)
        with np.errstate(divide="ignore"):
            expected = (largest + np.log(abs(total))).ravel()
        # What the additions and a rounded quotient may lose of the sum, where its terms cancel.
        sharpness = abs(terms).sum(1) / np.maximum(abs(total).ravel(), np.finfo(dtype).tiny)
        bound = 4 * np.finfo(dtype).eps * (abs(expected) + sharpness * (1 + abs(largest).ravel()))
        for array, factors, axis in ((a, b, 1), (a.T.copy(), b.T, 0)):
            counted = mask if mask is None or axis == 1 else mask.T
            result, sign = logsumexp(array, axis, factors, temperature=temperature, return_sign=True, where=counted)
            np.testing.assert_array_equal(sign, np.sign(total).ravel())
            is_sum = sign != 0
            assert (abs(result - expected)[is_sum] <= bound[is_sum]).all()


# Bad input


@pytest.mark.parametrize("temperature", [0, 0.0, -1, -0.5, np.nan, INF, -INF, 10**400])
def test_temperatures_out_of_range(backend, function, call, temperature):
    x = np.ones((3, 4))
    out = np.full((3,) if function == "logsumexp" else x.shape, 7.0)
    with pytest.raises(ValueError, match="temperature must be positive and finite, not") as raised:
        call(x, 1, temperature=temperature, out=out)
    assert repr(temperature) in str(raised.value)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "temperature", ["1", None, 1j, True, np.bool_(True), [1.0], np.ones(3), np.array(2.0)], ids=repr
)
def test_temperatures_that_are_no_numbers(backend, function, call, temperature):
    x = np.ones((3, 4))
    out = np.full((3,) if function == "logsumexp" else x.shape, 7.0)
    with pytest.raises(TypeError, match="temperature must be a real number, not"):
        call(x, 1, temperature=temperature, out=out)
    assert (out == 7).all()
