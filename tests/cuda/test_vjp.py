"""The vector-Jacobian products on a device, against long double."""

import numpy as np
import pytest

import fastsoftmax
from tests.reference import exact

LONG = np.longdouble


def expected(kernel, x, g, axis):
    """Return the product from the input of the function, and what the kernel takes for it."""
    p = exact("softmax", x, axis)
    if kernel == "softmax_vjp":
        return p.astype(x.dtype), p * (g - (p * g).sum(axis, keepdims=True))
    if kernel == "log_softmax_vjp":
        return exact("log_softmax", x, axis).astype(x.dtype), g - p * g.sum(axis, keepdims=True, dtype=LONG)
    return x, p * np.expand_dims(g, axis)


@pytest.fixture(params=["softmax_vjp", "log_softmax_vjp", "logsumexp_vjp"])
def kernel(request):
    return request.param


def check(gpu, kernel, shape, axis, dtype=np.float32, order="C"):
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=shape), dtype, order=order)
    g_shape = tuple(np.delete(shape, axis)) if kernel == "logsumexp_vjp" else shape
    g = np.asarray(rng.normal(size=g_shape), dtype, order=order)
    given, product = expected(kernel, x, g, axis)
    with fastsoftmax.record_plans() as plans:
        result = gpu.to_host(getattr(fastsoftmax, kernel)(gpu.to_device(given, 0), gpu.to_device(g, 0), axis))
    scale = np.abs(product).max()
    assert np.abs(result - product).max() / scale < 16 * np.finfo(dtype).eps
    return plans[0].launch


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 10), (2, 129)])
def test_rows(gpu, kernel, shape, dtype):
    assert check(gpu, kernel, shape, 1, dtype).vector == 16 // np.dtype(dtype).itemsize


@pytest.mark.parametrize(("shape", "axis"), [((9, 20), 0), ((2, 3, 5), 1)])
def test_other_axes(gpu, kernel, shape, axis):
    check(gpu, kernel, shape, axis)


def test_rows_with_a_rest(gpu, kernel, small_plans):
    launch = check(gpu, kernel, (3, 1500), 1)
    assert launch.has_rest


def test_no_gradient_where_the_probability_is_0(gpu):
    x = np.array([[0.0, -np.inf, 0.0]], np.float32)
    g = np.array([[1.0, np.inf, -1.0]], np.float32)
    p = gpu.to_device(fastsoftmax.softmax(x, 1), 0)
    assert gpu.to_host(fastsoftmax.softmax_vjp(p, gpu.to_device(g, 0), 1)).tolist() == [[0.5, 0.0, -0.5]]
    one = gpu.to_device(np.array([np.inf], np.float32), 0)
    result = gpu.to_host(fastsoftmax.logsumexp_vjp(gpu.to_device(x, 0), one, 1))
    assert result.tolist() == [[np.inf, 0.0, np.inf]]


def test_bad_gradients(gpu):
    p = gpu.to_device(np.ones((2, 3), np.float32), 0)
    with pytest.raises(ValueError, match="g must have shape"):
        fastsoftmax.softmax_vjp(p, gpu.to_device(np.ones((3, 2), np.float32), 0), 1)
    with pytest.raises(TypeError, match="g must have dtype float32, not float64"):
        fastsoftmax.softmax_vjp(p, gpu.to_device(np.ones((2, 3)), 0), 1)
    with pytest.raises(TypeError, match="g must be a"):
        fastsoftmax.softmax_vjp(p, np.ones((2, 3), np.float32), 1)


def test_what_is_not_computed_on_a_device(gpu):
    p = gpu.to_device(np.ones((2, 3), np.float32), 0)
    with pytest.raises(TypeError, match="logits is on a CUDA device"):
        fastsoftmax.softmax_cross_entropy(p, [0, 1])
    with pytest.raises(TypeError, match="g is on a CUDA device"):
        fastsoftmax.softmax_vjp(np.ones((2, 3), np.float32), p, 1)
