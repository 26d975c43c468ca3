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
    axes = tuple(range(len(shape))) if axis is None else axis
    g_shape = tuple(np.delete(shape, axes)) if kernel == "logsumexp_vjp" else shape
    g = np.asarray(rng.normal(size=g_shape), dtype, order=order)
    given, product = expected(kernel, x, g, axes)
    with fastsoftmax.record_plans() as plans:
        result = gpu.to_host(getattr(fastsoftmax, kernel)(gpu.to_device(given, 0), gpu.to_device(g, 0), axis))
    scale = np.abs(product).max()
    assert np.abs(result - product).max() / scale < 16 * np.finfo(dtype).eps
    return plans[0].launch


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 10), (2, 129)])
def test_rows(gpu, kernel, shape, dtype):
    assert check(gpu, kernel, shape, 1, dtype).vector == 16 // np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((21, 24), np.float16), ((21, 24), np.float32), ((2, 9, 21), np.float32), ((20, 8), np.float64)],
)
def test_strips(gpu, kernel, shape, dtype, small_plans):
    launch = check(gpu, kernel, shape, -2, dtype)
    assert launch.traversal == "strips"
    assert launch.vector == (16 // np.dtype(dtype).itemsize if shape[-1] % 8 == 0 else 1)


def test_strips_split_over_blocks(gpu, kernel, small_plans):
    launch = check(gpu, kernel, (130, 8), 0)
    assert launch.traversal == "strips"
    assert launch.n_chunks > 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
@pytest.mark.parametrize("kernel", ["softmax_vjp", "log_softmax_vjp"])
def test_an_infinite_sum_is_what_it_is_on_the_processor(gpu, kernel, infinite, axis):
    p, g = np.full((8, 8), 0.125, np.float32), np.ones((8, 8), np.float32)
    given = p if kernel == "softmax_vjp" else np.log(p)
    g[3, 3] = infinite
    product = getattr(fastsoftmax, kernel)
    result = gpu.to_host(product(gpu.to_device(given, 0), gpu.to_device(g, 0), axis))
    on_processor = product(given, g, axis, backend="numpy")
    assert np.isinf(on_processor).sum() == 7
    np.testing.assert_allclose(result, on_processor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), None])
def test_any_axes(gpu, kernel, axis):
    check(gpu, kernel, (2, 3, 5), axis)


def test_rows_that_do_not_fit_in_registers(gpu, kernel, small_plans):
    launch = check(gpu, kernel, (3, 3003), 1)
    inputs = 1 if kernel == "logsumexp_vjp" else 2
    assert launch.stored > 0
    assert launch.shared_bytes == launch.stored * 64 * 16 * inputs
    assert launch.has_rest == (inputs == 2)


def test_rows_split_over_blocks(gpu, kernel, small_plans):
    launch = check(gpu, kernel, (1, 2500), 1)
    assert (launch.traversal, launch.n_chunks) == ("split", 3)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("shape", "axis"), [((300, 16385), 1), ((300, 32768), 1), ((2, 1_000_003), 1), ((4096, 512), 0), ((100_000, 8), 0)]
)
def test_large_arrays(gpu, kernel, shape, axis):
    check(gpu, kernel, shape, axis)


def test_no_gradient_where_the_probability_is_0(gpu):
    x = np.array([[0.0, -np.inf, 0.0]], np.float32)
    g = np.array([[1.0, np.inf, -1.0]], np.float32)
    p = gpu.to_device(fastsoftmax.softmax(x, 1), 0)
    assert gpu.to_host(fastsoftmax.softmax_vjp(p, gpu.to_device(g, 0), 1)).tolist() == [[0.5, 0.0, -0.5]]
    one = gpu.to_device(np.array([np.inf], np.float32), 0)
    result = gpu.to_host(fastsoftmax.logsumexp_vjp(gpu.to_device(x, 0), one, 1))
    assert result.tolist() == [[np.inf, 0.0, np.inf]]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("axis", [1, (0, 2), None])
def test_arrays_in_main_memory(kernel, axis, dtype):
    rng = np.random.default_rng(0)
    axes = axis or (0, 1, 2) if axis != 1 else 1
    x = rng.normal(size=(2, 5, 7)).astype(dtype)[:, ::-2]
    g = rng.normal(size=np.delete(x.shape, axes) if kernel == "logsumexp_vjp" else x.shape).astype(dtype)
    given, product = expected(kernel, x, g, axes)
    with fastsoftmax.record_plans() as plans:
        result = getattr(fastsoftmax, kernel)(given, g, axis, backend="cuda")
    assert plans[0].backend == "cuda"
    assert isinstance(result, np.ndarray)
    assert np.abs(result - product).max() / np.abs(product).max() < 16 * np.finfo(dtype).eps


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
