"""float16 and bfloat16: computed in float32 or wider, rounded once, read and written as they are."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import OnlineSoftmax

from .reference import exact, max_ulp_error

SHAPES = [((33,), 0), ((7, 33), 1), ((7, 33), 0), ((40, 1000), 1), ((1000, 40), 0), ((3, 9000), 1), ((9000, 5), 0)]


@pytest.fixture(params=[np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def dtype(request):
    return np.dtype(request.param)


def bits(x):
    return np.asarray(x).view(np.uint16)


@pytest.mark.parametrize("order", ["rows", "strips"])
def test_every_number_is_read_and_written(backend, dtype, order):
    """The logarithm of the exponential of a number alone is that number."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    x, axis = (every[:, np.newaxis], 1) if order == "rows" else (every[np.newaxis], 0)
    result = fastsoftmax.logsumexp(x, axis)
    is_nan = np.isnan(every.astype(np.float32))
    assert np.isnan(result[is_nan].astype(np.float32)).all()
    np.testing.assert_array_equal(result[~is_nan].astype(np.float32), every[~is_nan].astype(np.float32))


def test_every_rounding(backend, dtype):
    """Log-probabilities of two logits: -x, but for what is below half a unit in the last place."""
    every = np.arange(2**15, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every.astype(np.float32)) & (every.astype(np.float32) < 3e4)]
    x = np.zeros((every.size, 2), dtype)
    x[:, 1] = every
    result = fastsoftmax.log_softmax(x, 1)
    assert max_ulp_error(result, exact("log_softmax", x.astype(np.float64), 1)) <= 0.51


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_results_are_rounded_once(backend, dtype, function, rng, shape, axis, scale):
    x = (rng.normal(size=shape) * scale).astype(dtype)
    result = getattr(fastsoftmax, function)(x, axis)
    assert result.dtype == dtype
    expected = exact(function, x.astype(np.float64), axis)
    assert max_ulp_error(np.reshape(result, expected.shape), expected) <= 0.51


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_layouts_give_the_same_bits(backend, dtype, function, rng, shape, axis):
    call = getattr(fastsoftmax, function)
    x = (rng.normal(size=shape) * 3).astype(dtype)
    expected = call(x, axis)
    wide = np.repeat(x, 2, axis=-1)
    memory = np.empty(x.nbytes + 1, np.uint8)[1:].view()
    memory[:] = x.reshape(-1).view(np.uint8)
    unaligned = np.frombuffer(memory.data, dtype).reshape(shape)
    for view in (np.asfortranarray(x), wide[..., ::2], unaligned):
        np.testing.assert_array_equal(bits(call(view, axis)), bits(expected))
    out = np.empty_like(expected) if np.shape(expected) else np.empty((), dtype)
    call(x, axis, out=out)
    np.testing.assert_array_equal(bits(out), bits(expected))
    if function != "logsumexp":
        call(x, axis, out=x)
        np.testing.assert_array_equal(bits(x), bits(expected))


def test_special_rows(backend, dtype):
    inf, nan = np.inf, np.nan
    x = np.array([[0, -inf, 1], [nan, 0, 0], [inf, 0, 0], [-inf, -inf, -inf], [5, 5, -inf]], dtype)
    result = fastsoftmax.softmax(x, 1).astype(np.float32)
    expected = fastsoftmax.softmax(x.astype(np.float32), 1).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(fastsoftmax.softmax(x.T.copy(), 0).T.astype(np.float32), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_compiled_kernels_convert_on_the_way(dtype, function, axis):
    if "cython" not in fastsoftmax.available_backends():
        pytest.skip("backend 'cython' is not available")
    x = np.zeros((1000, 3000), dtype)
    out = np.empty(x.shape if function != "logsumexp" else np.delete(x.shape, axis), dtype)
    call = getattr(fastsoftmax, function)
    call(x, axis, out=out, backend="cython")
    tracemalloc.start()
    with fastsoftmax.record_plans() as plans:
        call(x, axis, out=out, backend="cython")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plans[0].schedule.traversal == ("rows" if axis == 1 else "strips")
    assert peak < x.nbytes / 20


# Each is called with logits, a gradient in their shape, labels and an array for its result.
CALLS = {
    "softmax": lambda x, g, labels, out, axis: fastsoftmax.softmax(x, axis, out=out),
    "log_softmax": lambda x, g, labels, out, axis: fastsoftmax.log_softmax(x, axis, out=out),
    "logsumexp": lambda x, g, labels, out, axis: fastsoftmax.logsumexp(x, axis),
    "softmax_one": lambda x, g, labels, out, axis: fastsoftmax.softmax_one(x, axis, out=out),
    "softmax_vjp": lambda x, g, labels, out, axis: fastsoftmax.softmax_vjp(x, g, axis, out=out),
    "log_softmax_vjp": lambda x, g, labels, out, axis: fastsoftmax.log_softmax_vjp(x, g, axis, out=out),
    "logsumexp_vjp": lambda x, g, labels, out, axis: fastsoftmax.logsumexp_vjp(x, g.max(axis), axis, out=out),
    "softmax_cross_entropy": lambda x, g, labels, out, axis: fastsoftmax.softmax_cross_entropy(
        x, labels, axis=axis, label_smoothing=0.1, softcap=20.0, return_grad=True, grad_out=out
    ),
    "dense cross-entropy": lambda x, g, labels, out, axis: fastsoftmax.softmax_cross_entropy(
        x, g, axis=axis, return_grad=True, grad_out=out
    ),
    "softmax_topk": lambda x, g, labels, out, axis: fastsoftmax.softmax_topk(x, 3, axis),
    "sample": lambda x, g, labels, out, axis: fastsoftmax.sample(x, axis=axis, top_k=50, top_p=0.9),
    "OnlineSoftmax": lambda x, g, labels, out, axis: OnlineSoftmax(axis).update(x).normalize(x, out=out),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["cython", "numba"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_array_is_converted(dtype, rng, monkeypatch, call, name, axis):
    """Elements are, on their way."""
    if name not in fastsoftmax.available_backends():
        pytest.skip(f"backend {name!r} is not available")
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")
    x = (rng.normal(size=(1000, 3000)) * 3).astype(dtype)
    g, out = np.abs(x), np.empty_like(x)
    labels = rng.integers(0, x.shape[axis], x.shape[1 - axis])
    with fastsoftmax.use_backend(name):
        call(x, g, labels, out, axis)
        tracemalloc.start()
        call(x, g, labels, out, axis)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < x.nbytes / 4


@pytest.mark.parametrize("n_threads", ["2", "3"])
@pytest.mark.parametrize("axis", [0, 1])
def test_threads_give_the_same_bits(backend, dtype, function, rng, monkeypatch, axis, n_threads):
    x = (rng.normal(size=(500, 700)) * 3).astype(dtype)
    call = getattr(fastsoftmax, function)
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")
    expected = call(x, axis)
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
    np.testing.assert_array_equal(bits(call(x, axis)), bits(expected))
