"""logsumexp with factors, and the signs of sums, on a device."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import record_plans
from tests.reference import max_ulp_error

DTYPES = {name: np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name)) for name in
          ("float16", "bfloat16", "float32", "float64")}  # fmt: skip
LONG = np.longdouble


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def expected(a, b, axis, keepdims=False):
    """Return log|sum(b * exp(a))|, the sign of the sum, and the largest of the logarithm and its summands."""
    a, b = np.broadcast_arrays(a.astype(LONG), b.astype(LONG))
    top = a.max(axis, keepdims=True)
    total = (b * np.exp(a - top)).sum(axis, keepdims=True)
    log_sum = top + np.log(np.abs(total))
    results = log_sum, np.sign(total), np.max([np.abs(log_sum), np.abs(top), np.abs(log_sum - top)], axis=0)
    return results if keepdims else tuple(np.squeeze(one, axis) for one in results)


def check(gpu, a, b, axis, keepdims=False):
    """Compute on the device, hold the results against long double, and return the plan that served."""
    log_sum, sign, scale = expected(a, b, axis, keepdims)
    with record_plans() as plans:
        data, factors = gpu.to_device(a, 0), gpu.to_device(b, 0)
        found, found_sign = fastsoftmax.logsumexp(data, axis, factors, keepdims, return_sign=True)
    found, found_sign = gpu.to_host(found), gpu.to_host(found_sign)
    assert found.dtype == found_sign.dtype == a.dtype
    assert found.shape == found_sign.shape == log_sum.shape
    assert np.array_equal(found_sign.astype(float), sign.astype(float))
    assert max_ulp_error(found, log_sum, scale) <= (1.5 if a.dtype == np.float64 else 0.51)
    (plan,) = plans
    assert (plan.function, plan.backend) == ("weighted_logsumexp", "cuda")
    return plan.launch


def operands(shape, dtype, b_shape=None):
    """Return terms, and factors most of which are positive, so that no sum cancels."""
    rng = np.random.default_rng(0)
    b = rng.uniform(-0.2, 2, shape if b_shape is None else b_shape)
    return (rng.normal(size=shape) * 5).astype(dtype), b.astype(dtype)


@pytest.mark.parametrize(("shape", "axis"), [((3, 1), 1), ((5, 40), 1), ((2, 300), 1), ((40, 5), 0), ((2, 7, 3), 1)])
def test_rows(gpu, dtype, shape, axis):
    launch = check(gpu, *operands(shape, dtype), axis)
    assert launch.n_chunks == 1 or shape[axis] > 256
    assert launch.traversal == ("strips" if axis < len(shape) - 1 else "split" if launch.n_chunks > 1 else "rows")
    assert launch.block[0] * launch.block[1] == 128


@pytest.mark.parametrize("shape", [(1, 1500), (3, 600), (600, 2)])
def test_chunks(gpu, shape):
    launch = check(gpu, *operands(shape, np.float32), shape.index(max(shape)))
    assert launch.n_chunks > 1
    assert (launch.n_chunks - 1) * launch.chunk < max(shape) <= launch.n_chunks * launch.chunk


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), (0, 1), None])
def test_any_axes(gpu, axis):
    a, b = operands((3, 4, 5), np.float32)
    check(gpu, a, b, (0, 1, 2) if axis is None else axis, keepdims=axis == 1)


@pytest.mark.parametrize(("shape", "b_shape"), [((4, 6), (6,)), ((4, 6), (4, 1)), ((6,), (4, 6)), ((4, 1), (1, 6))])
def test_factors_broadcast(gpu, shape, b_shape):
    check(gpu, *operands(shape, np.float32, b_shape), 0)


def test_one_factor_for_all_and_none(gpu):
    a = operands((3, 8), np.float32)[0]
    data, plain = gpu.to_device(a, 0), fastsoftmax.logsumexp(a, 1, backend="numpy")
    log_sum, sign = fastsoftmax.logsumexp(data, 1, return_sign=True)
    np.testing.assert_allclose(gpu.to_host(log_sum), plain, rtol=1e-6)
    assert gpu.to_host(sign).tolist() == [1.0] * 3
    np.testing.assert_allclose(gpu.to_host(fastsoftmax.logsumexp(data, 1, 2.0)), plain + np.log(2.0), rtol=1e-6)
    log_sum, sign = fastsoftmax.logsumexp(data, 1, -1, return_sign=True)
    np.testing.assert_allclose(gpu.to_host(log_sum), plain, rtol=1e-6)
    assert gpu.to_host(sign).tolist() == [-1.0] * 3
    assert np.isnan(gpu.to_host(fastsoftmax.logsumexp(data, 1, -1))).all()


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([2.5, 2.5, 2.5], [1.0, 2.0, -3.0]),
        ([0.0, -40.0], [1.0, 1.0]),
        ([0.0, -40.0], [1.0, -1.0]),
        ([NAN, 1.0, INF], [0.0, 2.0, 0.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([-INF, -INF], [1.0, -1.0]),
        ([INF, 0.0], [1.0, -1.0]),
        ([INF, 0.0], [-1.0, 1.0]),
        ([INF, INF], [1.0, -1.0]),
        ([NAN, 0.0], [1.0, 1.0]),
        ([0.0, 1.0], [NAN, 1.0]),
        ([0.0, 1.0], [INF, 1.0]),
        ([-INF, 1.0], [INF, 1.0]),
        ([190.0, 0.0], [1e-45, 1e38]),
        ([-3e38, 3e38], [1e38, 1e-45]),
        ([1e4, 1e4 - 1], [3.0, -3.0]),
    ],
)
def test_special_values(gpu, a, b):
    a, b = np.array([a], np.float32), np.array([b], np.float32)
    compare_with_the_cpu(gpu, a, b)


@pytest.mark.parametrize(("value", "factor"), [(0.0, 1.0), (0.0, -3.0), (INF, 1.0), (NAN, 0.0), (1.0, NAN)])
def test_special_values_in_one_of_two_chunks(gpu, value, factor):
    a, b = np.full((1, 600), -INF, np.float32), np.full((1, 600), 2.0, np.float32)
    a[0, [0, 599]], b[0, 599] = [0.0, value], factor
    b[0, 0] = 3.0
    compare_with_the_cpu(gpu, a, b)


def compare_with_the_cpu(gpu, a, b):
    found = fastsoftmax.logsumexp(gpu.to_device(a, 0), 1, gpu.to_device(b, 0), return_sign=True)
    log_sum, sign = fastsoftmax.logsumexp(a.astype(float), 1, b.astype(float), return_sign=True, backend="numpy")
    np.testing.assert_allclose(gpu.to_host(found[0]), log_sum, rtol=2e-7)
    np.testing.assert_array_equal(gpu.to_host(found[1]), sign)
    without = gpu.to_host(fastsoftmax.logsumexp(gpu.to_device(a, 0), 1, gpu.to_device(b, 0)))
    np.testing.assert_allclose(without, np.where(sign < 0, NAN, log_sum), rtol=2e-7)


def test_factors_of_any_size_in_float64(gpu):
    a, b = np.array([[700.0, -700.0, 0.0]]), np.array([[1e-300, 1e308, -1e300]])
    exact = sum(
        Fraction(factor) * Fraction(math.exp(x)) for x, factor in zip(a[0].tolist(), b[0].tolist(), strict=True)
    )
    found, sign = fastsoftmax.logsumexp(gpu.to_device(a, 0), 1, gpu.to_device(b, 0), return_sign=True)
    assert gpu.to_host(sign).tolist() == [-1.0]
    assert gpu.to_host(found).tolist() == pytest.approx([math.log(-exact)], rel=1e-15)


def test_out_and_empty_arrays(gpu):
    a, b = operands((4, 6), np.float32)
    data, factors = gpu.to_device(a, 0), gpu.to_device(b, 0)
    out = gpu.to_device(np.zeros(4, np.float32), 0)
    assert fastsoftmax.logsumexp(data, 1, factors, out=out) is out
    np.testing.assert_allclose(gpu.to_host(out), expected(a, b, 1)[0].astype(np.float32), rtol=1e-6)
    empty = gpu.to_device(np.empty((3, 0), np.float32), 0)
    log_sum, sign = fastsoftmax.logsumexp(empty, 1, 2.0, return_sign=True)
    assert gpu.to_host(log_sum).tolist() == [-INF] * 3
    assert gpu.to_host(sign).tolist() == [0.0] * 3


def test_results_are_the_same_each_time(gpu):
    a, b = operands((1, 1100), np.float32)
    data, factors = gpu.to_device(a, 0), gpu.to_device(b, 0)
    first, second = (gpu.to_host(fastsoftmax.logsumexp(data, 1, factors)).tobytes() for _ in range(2))
    assert first == second


def test_bad_factors(gpu):
    a, b = operands((3, 4), np.float32)
    data, factors = gpu.to_device(a, 0), gpu.to_device(b, 0)
    with pytest.raises(TypeError, match="b must be a number or a "):
        fastsoftmax.logsumexp(data, 1, b)
    with pytest.raises(TypeError, match="b must have dtype float32, not float64"):
        fastsoftmax.logsumexp(data, 1, gpu.to_device(b.astype(float), 0))
    with pytest.raises(ValueError, match=r"b of shape \(3,\) does not broadcast with a of shape \(3, 4\)"):
        fastsoftmax.logsumexp(data, 1, gpu.to_device(b[:, 0].copy(), 0))
    with pytest.raises(ValueError, match=r"out must have shape \(3,\), not \(4,\)"):
        fastsoftmax.logsumexp(data, 1, factors, out=gpu.to_device(np.zeros(4, np.float32), 0))
    with pytest.raises(TypeError, match="b is on a CUDA device"):
        fastsoftmax.logsumexp(a, 1, factors)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("shape", "axis"), [((64, 1000), 1), ((2, 1_000_003), 1), ((4096, 512), 0), ((100_000, 8), 0)])
def test_large_arrays(gpu, dtype, shape, axis):
    check(gpu, *operands(shape, dtype), axis)
