"""``dtype=``: what the numbers are converted to, computed in (float16 and bfloat16 in float32), and returned in."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import logsumexp, record_plans

from .inputs import LAYOUTS
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, call, rng, layout):
    for given in (np.float64, np.int32, np.float16):
        x = LAYOUTS[layout](rng.integers(0, 9, (9, 40)).astype(given))
        for axis in (0, 1):
            np.testing.assert_array_equal(call(x, axis, dtype=np.float32), call(x.astype(np.float32), axis))


@pytest.mark.parametrize("given", [np.float64, np.uint8, bool], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(40, 3), (40, 79), (3, 20_000), (2, 1)], ids=str)
def test_short_and_long_rows(backend, call, rng, given, shape):
    x = rng.integers(0, 2, shape).astype(given)
    for array, axis in ((x, 1), (x.T.copy(), 0)):
        expected = call(array.astype(np.float32), axis)
        np.testing.assert_array_equal(call(array, axis, dtype=np.float32), expected)


@pytest.mark.parametrize("given", [np.int8, np.uint16, np.int64, bool], ids=lambda d: np.dtype(d).name)
def test_integers_without_it(backend, call, rng, given):
    """They are computed in float64, and rounded once."""
    x = rng.integers(0, 2 if given is bool else 50, (40, 33)).astype(given)
    for axis in (0, 1):
        result = call(x, axis)
        np.testing.assert_array_equal(result, np.asarray(call(x.astype(np.float64), axis)).astype(result.dtype))


def test_any_byte_but_0_is_true(backend, call):
    x = np.array([[0, 1, 2, 255]] * 20, np.uint8).view(bool)
    np.testing.assert_array_equal(call(x, 1, dtype=np.float32), call(np.float32([[0, 1, 1, 1]] * 20), 1))


def test_numbers_beyond_the_range(backend, call):
    """They are infinite in that dtype; nothing warns of it."""
    x = np.array([1e300, 0.0])
    np.testing.assert_array_equal(call(x, dtype=np.float32), call(np.float32([np.inf, 0.0])))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_every_number_of_16_bits(backend, dtype):
    """A row of one element has that for its logsumexp."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    result = logsumexp(x[:, np.newaxis], 1)
    with np.errstate(invalid="ignore"):  # signalling NaN
        np.testing.assert_array_equal(result.astype(np.float32), x.astype(np.float32))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("asked", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_rounding_to_16_bits(backend, rng, asked, step):
    """Of results side by side, which are rounded by registers, and of others, which are by themselves."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        numbers = np.sort(np.arange(1 << 16, dtype=np.uint16).view(asked).astype(np.float32))
    numbers = numbers[np.isfinite(numbers)]
    halfway = numbers[1:] / 2 + numbers[:-1] / 2
    near = np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(-np.inf))
    anything = rng.integers(0, 1 << 32, 10_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halfway, *near, anything])
    result = logsumexp(x[:, np.newaxis], 1, dtype=asked, out=np.empty((len(x), step), asked)[:, 0])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(result.astype(np.float32), x.astype(asked).astype(np.float32))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, ml_dtypes.bfloat16),
        (np.float32, np.float64),
        (np.int64, None),
        (np.int16, None),
        (bool, np.float16),
    ],
)
@pytest.mark.parametrize("name", ["cython", "numba"])
def test_no_array_is_made(function, call, rng, monkeypatch, name, given, asked, axis):
    """But for the result: elements are converted on their way."""
    if name not in fastsoftmax.available_backends():
        pytest.skip(f"backend {name!r} is not available")
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")
    x = rng.integers(0, 2, (300, 8000)).astype(given)  # beside which the scratch of a thread is small
    where = rng.random(x.shape) < 0.9
    for options in ({}, {"where": where, "temperature": 0.7}):
        out = call(x, axis, dtype=asked, backend=name, **options)
        tracemalloc.start()
        call(x, axis, dtype=asked, backend=name, out=out, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < x.size / 10


@pytest.mark.parametrize(("shape", "traversal"), [((300, 10), "tiles"), ((300, 200), "gather"), ((30, 99), "strips")])
def test_threads_change_no_bit(call, rng, monkeypatch, shape, traversal):
    if "cython" not in fastsoftmax.available_backends():
        pytest.skip("backend 'cython' is not available")
    x = rng.normal(size=(60, *shape))
    axis = 1 if traversal == "strips" else 2
    results = []
    for n_threads in ("1", "3"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        with record_plans() as plans:
            results.append(call(x, axis, dtype=np.float32, backend="cython"))
        assert plans[0].schedule.traversal == traversal
        assert plans[0].schedule.n_threads == int(n_threads)
    np.testing.assert_array_equal(*results)


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
