"""The vector-Jacobian products of softmax, log_softmax and logsumexp, and the Jacobian of softmax."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import log_softmax_vjp, logsumexp_vjp, softmax_jacobian, softmax_vjp

from .inputs import LAYOUTS, WRITABLE_LAYOUTS
from .reference import LONG, exact

VJPS = {"softmax": softmax_vjp, "log_softmax": log_softmax_vjp, "logsumexp": logsumexp_vjp}
SHAPES = [
    ((1,), 0),
    ((10,), 0),
    ((7, 33), 1),
    ((7, 33), 0),
    ((3, 20_000), 1),
    ((9000, 5), 0),
    ((20, 130), 0),
    ((5, 40, 70), 1),
    ((5, 40, 70), (0, 2)),
    ((5, 40, 70), None),
    ((0, 3), 1),
    ((3, 0), 1),
    ((), None),
    ((4, 3), ()),
]


@pytest.fixture(params=VJPS)
def vjp(request):
    """The name of a function."""
    return request.param


def operands(function, rng, shape, axis, dtype, scale=3):
    """Return what the derivative of a function takes: its result, or input, and the gradient."""
    x = (rng.normal(size=shape) * scale).astype(dtype)
    if function == "logsumexp":
        return x, np.asarray(rng.normal(size=np.shape(fastsoftmax.logsumexp(x, axis, backend="numpy")))).astype(dtype)
    forward = getattr(fastsoftmax, function)
    return np.asarray(forward(x, axis, backend="numpy")), np.asarray(rng.normal(size=shape)).astype(dtype)


def sum_over(x, axis):
    return x if axis == () else x.sum(axis, keepdims=True)


def expected(function, x, g, axis):
    """Return the derivative in long double, and what its error is relative to: the sizes of what is added up."""
    x, g = np.asarray(x, LONG), np.asarray(g, LONG)
    with np.errstate(all="ignore"):
        if function == "softmax":
            products = np.where(x == 0, 0, x * g)
            total, size = sum_over(products, axis), sum_over(abs(products), axis)
            return np.where(x == 0, 0, x * (g - total)), np.where(x == 0, 0, x * (abs(g) + size))
        if function == "log_softmax":
            p = np.exp(x)
            return np.where(p == 0, g, g - p * sum_over(g, axis)), abs(g) + p * sum_over(abs(g), axis)
        p = exact("softmax", x, axis) if x.size else x
        if axis is None:
            g = g.reshape((1,) * x.ndim)
        elif axis != ():
            g = np.expand_dims(g, axis)
        return np.where(p == 0, 0, p * g), p * abs(g)


def max_errors(backend):
    """Return the bound on an error: in units of the dtype's eps, which is two roundings.

    Of a kernel's sum, each product and the three additions after it are rounded; then g - sum, in two steps, and its
    product with p.
    """
    return 4 if backend.has_kernels else 10


def assert_right(result, function, x, g, axis, max_errors):
    value, size = expected(function, x, g, axis)
    assert np.shape(result) == value.shape
    limits = ml_dtypes.finfo(np.asarray(result).dtype)
    error = abs(np.asarray(result).astype(LONG) - value)
    assert (error <= max_errors * (LONG(limits.eps) * size + LONG(limits.smallest_subnormal))).all()


# Values


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.1, 3, 40])
def test_accuracy(backend, vjp, dtype, rng, shape, axis, scale):
    x, g = operands(vjp, rng, shape, axis, dtype, scale)
    result = VJPS[vjp](x, g, axis)
    assert result.dtype == dtype
    assert_right(result, vjp, x, g, axis, max_errors(backend))


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_gradients_of_any_size(backend, vjp, dtype, rng, size):
    for shape, axis in (((7, 100), 1), ((100, 20), 0)):
        x, g = operands(vjp, rng, shape, axis, dtype)
        g = (g * size).astype(dtype)
        assert_right(VJPS[vjp](x, g, axis), vjp, x, g, axis, max_errors(backend))


def test_a_small_probability_of_a_large_gradient():
    """A probability that is subnormal has few digits, its product with a large gradient has all."""
    a, g = np.array([0, -100], np.float32), np.float32(1e10)
    with fastsoftmax.use_backend("cython"):
        assert_right(logsumexp_vjp(a, g), "logsumexp", a, g, None, 1)


def test_the_error_does_not_grow_with_the_row(backend, dtype):
    n = 2_000_000
    p, g = np.full(n, 1 / n, dtype), np.full(n, 0.1, dtype)
    g[::2] = 0.3
    assert_right(softmax_vjp(p, g), "softmax", p, g, 0, max_errors(backend))
    log_p = np.full(n, -np.log(n), dtype)
    assert_right(log_softmax_vjp(log_p, g), "log_softmax", log_p, g, 0, max_errors(backend))


@pytest.mark.parametrize("axis", [0, 1, None])
def test_finite_differences(backend, vjp, rng, axis):
    """g @ (f(x + h v) - f(x - h v)) / 2h is the product of the derivative with v."""
    x, v, h = rng.normal(size=(6, 9)).astype(LONG), rng.normal(size=(6, 9)).astype(LONG), LONG(1e-6)
    forward = getattr(fastsoftmax, vjp)
    ahead, behind = (np.asarray(forward(x + step, axis, backend="numpy")) for step in (h * v, -h * v))
    g = rng.normal(size=ahead.shape)
    argument = x if vjp == "logsumexp" else forward(x, axis, backend="numpy")
    product = VJPS[vjp](np.asarray(argument, np.float64), g, axis)
    np.testing.assert_allclose((product * v).sum(), (g * (ahead - behind)).sum() / (2 * h), rtol=1e-10)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_same_values_as_torch_autograd(backend, vjp, dtype, rng, axis):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'fastsoftmax[peers]'")
    x = rng.normal(size=(4, 30, 17)).astype(dtype)
    leaf = torch.tensor(x, requires_grad=True)
    y = getattr(torch, vjp)(leaf, axis)
    g = rng.normal(size=y.shape).astype(dtype)
    y.backward(torch.tensor(g))
    result = VJPS[vjp](x if vjp == "logsumexp" else y.detach().numpy(), g, axis)
    np.testing.assert_allclose(result, leaf.grad.numpy(), rtol=1e-4, atol=20 * np.finfo(dtype).eps)


# Special values


@pytest.mark.parametrize("layout", ["rows", "strips", "gather"])
@pytest.mark.parametrize("gradient", [np.inf, -np.inf, np.nan, 1e38, 1])
def test_no_probability_no_gradient(backend, dtype, layout, gradient):
    """Where the probability is 0, so is the derivative by it, whatever the gradient."""
    gradient = dtype(gradient)
    p, g = np.zeros((40, 40), dtype), np.ones((40, 40), dtype)
    p[:, :2], g[:, 2:] = 0.5, gradient
    log_p = np.where(p > 0, -np.log(dtype(2)), -np.inf).astype(dtype)
    a, sums = np.where(p > 0, 1, -np.inf).astype(dtype), np.full(40, gradient, dtype)
    axis = 0 if layout == "strips" else 1

    def laid_out(x):
        return x[:, ::-1].T.copy().T[:, ::-1] if layout == "gather" else x.T.copy() if layout == "strips" else x

    def in_rows(y):
        return y.T if layout == "strips" else y

    p, log_p, a, g = (laid_out(x) for x in (p, log_p, a, g))
    assert not in_rows(softmax_vjp(p, g, axis)).any()
    np.testing.assert_array_equal(in_rows(log_softmax_vjp(log_p, g, axis))[:, 2:], gradient)
    result = in_rows(logsumexp_vjp(a, sums, axis))
    assert not result[:, 2:].any()
    np.testing.assert_allclose(result[:, :2], gradient / 2, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gradient_that_counts_and_is_infinite(backend, dtype, axis):
    p, g = np.full((3, 20), 0.05, dtype), np.zeros((3, 20), dtype)
    g[1, 3] = np.inf
    if axis == 0:
        p, g = p.T.copy(), g.T.copy()
    result = softmax_vjp(p, g, axis)
    row = result[:, 1] if axis == 0 else result[1]
    assert np.isnan(row[3])
    assert (np.delete(row, 3) == -np.inf).all()
    assert not np.delete(result, 1, 1 - axis).any()


@pytest.mark.parametrize("row", [[np.nan, 1, 2], [np.inf, 1, 2], [-np.inf, -np.inf, -np.inf]], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_without_probabilities(backend, dtype, row, axis):
    a = np.array([[0, 0, 0], row] * 20, dtype)
    a, g = (a.T.copy() if axis == 0 else a), np.ones(40, dtype)
    result = logsumexp_vjp(a, g, axis)
    result = result.T if axis == 0 else result
    assert np.isnan(result[1::2]).all()
    np.testing.assert_allclose(result[::2], 1 / 3, rtol=1e-6)


def test_an_outlier_among_chunks(backend, dtype):
    """Chunks of very different maxima, and offsets, merge into one row."""
    a = np.concatenate([np.full(9000, -5000.0), [3000.0], np.full(9000, 2990.0)]).astype(dtype)
    assert_right(logsumexp_vjp(a, dtype(2)), "logsumexp", a, dtype(2), None, max_errors(backend))


# dtypes


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((7, 33), 1), ((33, 70), 0), ((3, 9000), 1), ((4, 5, 6), (0, 2))], ids=str)
def test_16_bits_are_rounded_once(backend, vjp, dtype, rng, shape, axis):
    x, g = operands(vjp, rng, shape, axis, dtype)
    result = VJPS[vjp](x, g, axis)
    assert result.dtype == dtype
    value, size = expected(vjp, x, g, axis)
    spacing = np.spacing(abs(value).astype(np.float16)) if dtype == np.float16 else abs(value) * 2.0**-7
    assert (abs(result.astype(LONG) - value) <= 0.5 * spacing.astype(LONG) + 2.0**-22 * size + 1e-30).all()


def test_dtypes_combine_as_in_numpy(backend, vjp):
    for x, g, result in (
        (np.float32, np.float64, np.float64),
        (np.float16, np.float32, np.float32),
        (np.int8, np.float32, np.float64),
        (np.float32, np.int64, np.float64),
        (bool, bool, np.float64),
        (np.dtype(np.float32).newbyteorder(), np.float32, np.float32),
        (ml_dtypes.bfloat16, np.float32, np.float32),
    ):
        shape = (3,) if vjp == "logsumexp" else (3, 1)
        values = VJPS[vjp](np.ones((3, 1)).astype(x), np.ones(shape).astype(g), 1)
        assert values.dtype == result
        np.testing.assert_allclose(values, {"softmax": 0, "log_softmax": 1 - np.e, "logsumexp": 1}[vjp], rtol=1e-6)


def test_a_python_number_takes_the_dtype_of_the_other():
    assert logsumexp_vjp(np.zeros(4, np.float32), 2.0).tolist() == [0.5] * 4
    assert logsumexp_vjp(np.zeros(4, np.float32), 2.0).dtype == np.float32


def test_long_double(vjp, rng):
    x, g = operands(vjp, rng, (6, 30), 1, LONG)
    assert VJPS[vjp](x, g, 1).dtype == LONG
    np.testing.assert_allclose(VJPS[vjp](x, g, 1), expected(vjp, x, g, 1)[0], rtol=1e-16, atol=1e-18)


# Layouts and outputs


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), None], ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "broadcast" not in name])
def test_layouts(backend, vjp, dtype, rng, layout, axis):
    x, g = operands(vjp, rng, (4, 33, 21), axis, dtype)
    plain = VJPS[vjp](x, g, axis)
    before = x.copy(), g.copy()
    for x_view, g_view in ((LAYOUTS[layout](x), g), (x, LAYOUTS[layout](g) if g.ndim == 3 else g)):
        result = VJPS[vjp](x_view, g_view, axis)
        np.testing.assert_allclose(result, plain, rtol=1e-4, atol=20 * np.finfo(dtype).eps)
    np.testing.assert_array_equal((x, *before[1:])[0], before[0])
    np.testing.assert_array_equal(g, before[1])


def test_broadcast_gradients(backend, dtype, rng):
    p, row = fastsoftmax.softmax(rng.normal(size=(5, 40)), 1).astype(dtype), rng.normal(size=40).astype(dtype)
    for g in (np.broadcast_to(row, (5, 40)), np.broadcast_to(row[:5, np.newaxis], (5, 40))):
        for axis in (0, 1):
            assert_right(softmax_vjp(p, g, axis), "softmax", p, g, axis, max_errors(backend))


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_out_is_the_input_or_the_gradient(backend, vjp, dtype, rng, layout, axis):
    x, g = operands(vjp, rng, (37, 60), axis, dtype)
    plain = VJPS[vjp](x, g, axis)
    close = {"rtol": 1e-4, "atol": 20 * np.finfo(dtype).eps}
    own = WRITABLE_LAYOUTS[layout](x)
    assert VJPS[vjp](own, g, axis, out=own) is own
    np.testing.assert_allclose(own, plain, **close)
    if vjp != "logsumexp":
        own = WRITABLE_LAYOUTS[layout](g)
        assert VJPS[vjp](x, own, axis, out=own) is own
        np.testing.assert_allclose(own, plain, **close)
    room = WRITABLE_LAYOUTS[layout](np.zeros_like(x))
    VJPS[vjp](x, g, axis, out=room)
    np.testing.assert_allclose(room, plain, **close)


@pytest.mark.parametrize("size", [60, 20_000])
def test_out_overlaps_in_part(backend, vjp, dtype, rng, size):
    x, g = operands(vjp, rng, (3, size), 1, dtype)
    plain = VJPS[vjp](x, g, 1)
    for part in (x,) if vjp == "logsumexp" else (x, g):
        memory = np.zeros(4 * size, dtype)
        own, out = memory[: 3 * size].reshape(3, size), memory[size:].reshape(3, size)
        own[...] = part
        VJPS[vjp](*((own, g) if part is x else (x, own)), 1, out=out)
        np.testing.assert_array_equal(out, plain)


def test_out_holds_the_gradient_of_logsumexp(backend, dtype, rng):
    a, memory = rng.normal(size=(4, 50)).astype(dtype), rng.normal(size=(4, 50)).astype(dtype)
    plain = logsumexp_vjp(a, memory[:, 49].copy(), 1)
    np.testing.assert_array_equal(logsumexp_vjp(a, memory[:, 49], 1, out=memory), plain)
    plain = logsumexp_vjp(a, memory, ())
    np.testing.assert_array_equal(logsumexp_vjp(a, memory, (), out=memory), plain)


def test_keepdims(backend, dtype, rng):
    a, g = rng.normal(size=(3, 4, 5)).astype(dtype), rng.normal(size=(3, 5)).astype(dtype)
    np.testing.assert_array_equal(logsumexp_vjp(a, g[:, np.newaxis], 1, True), logsumexp_vjp(a, g, 1))
    g = np.full((1, 1, 1), 2, dtype)
    np.testing.assert_array_equal(logsumexp_vjp(a, g, None, True), logsumexp_vjp(a, 2.0))


@pytest.mark.parametrize(("shape", "axis"), [((300, 2000), 1), ((2000, 300), 0), ((200, 30, 100), (0, 2))], ids=str)
def test_any_number_of_threads_gives_the_same_bits(backend, vjp, dtype, rng, monkeypatch, shape, axis):
    x, g = operands(vjp, rng, shape, axis, dtype)
    results = []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        results.append(VJPS[vjp](x, g, axis))  # served directly, where it can be
        with fastsoftmax.record_plans() as plans:
            results.append(VJPS[vjp](x, g, axis))
        assert [(plan.function, plan.backend) for plan in plans] == [(f"{vjp}_vjp", backend.name)]
        assert plans[0].schedule.n_threads == (min(int(n_threads), 4) if backend.has_kernels else 1)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize(
    ("shape", "axis", "traversal"),
    [((30, 200), 1, "rows"), ((200, 300), 0, "strips"), ((20, 30, 40), (0, 2), "gather")],
    ids=str,
)
def test_the_traversal(backend, vjp, dtype, rng, shape, axis, traversal):
    x, g = operands(vjp, rng, shape, axis, dtype)
    with fastsoftmax.record_plans() as plans:
        VJPS[vjp](x, g, axis)
    if backend.name == "numba" and traversal == "rows" and vjp != "logsumexp":
        traversal = "gather"  # its kernel copies rows of any strides
    assert plans[0].schedule.traversal == (traversal if backend.has_kernels else "array")


def test_large_results_are_streamed(dtype, rng):
    """A result that leaves the caches is written past them, wherever its rows begin."""
    from fastsoftmax import _schedule

    n_rows = _schedule.cache_sizes().last_level // (1001 * dtype().itemsize) // 2
    p, g = rng.random(size=(n_rows, 1001)).astype(dtype), rng.normal(size=(n_rows, 1001)).astype(dtype)
    with fastsoftmax.use_backend("cython"), fastsoftmax.record_plans() as plans:
        results = [softmax_vjp(p, g, 1), log_softmax_vjp(p, g, 1), logsumexp_vjp(p, g[:, 0], 1)]
        assert all(plan.schedule.streaming for plan in plans)
        for result, vjp, gradient in zip(results, VJPS, (g, g, g[:, 0]), strict=True):
            np.testing.assert_array_equal(result[-9:], VJPS[vjp](p[-9:], gradient[-9:], 1))


def test_no_temporaries_of_the_size_of_the_input(backend, vjp, dtype, rng):
    if not backend.has_kernels:
        pytest.skip("the numpy backend makes temporaries of the size of its input")
    x, g = operands(vjp, rng, (64, 20_000), 1, dtype)
    out = np.empty_like(x)
    VJPS[vjp](x, g, 1, out=out)
    tracemalloc.start()
    VJPS[vjp](x, g, 1, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 20


# Bad input


P = np.full((3, 4), 0.25)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((P, np.ones((3, 3)), 1), ValueError, r"g must have the shape of p, \(3, 4\), not \(3, 3\)"),
        ((P, 1.0, 1), ValueError, r"g must have the shape of p, \(3, 4\), not \(\)"),
        ((P, P + 1j, 1), TypeError, "g must hold real numbers, not complex128"),
        ((P + 1j, P, 1), TypeError, "p must hold real numbers, not complex128"),
        ((P.astype(object), P, 1), TypeError, "p must hold numbers, not object"),
        ((P, np.full((3, 4), "1"), 1), TypeError, "g must hold numbers, not <U1"),
        ((np.ma.masked_array(P), P, 1), TypeError, "p is a masked array"),
        ((P, np.ma.masked_array(P), 1), TypeError, "g is a masked array"),
        ((P, P, 2), np.exceptions.AxisError, "out of bounds"),
        ((P, P, (0, 0)), ValueError, "repeated"),
        ((P, P, 1.0), TypeError, "axis must be an integer"),
    ],
    ids=str,
)
def test_bad_input(backend, arguments, exception, message):
    out = np.full((3, 4), 7.0)
    with pytest.raises(exception, match=message):
        softmax_vjp(*arguments, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("out", "exception", "message"),
    [
        (np.full((3, 3), 7.0), ValueError, "out must have shape"),
        (np.full((3, 4), 7, np.float32), TypeError, "out must have dtype float64"),
        ([[7.0] * 4] * 3, TypeError, "out must be a numpy.ndarray, not list"),
        (np.broadcast_to(7.0, (3, 4)), ValueError, "read-only"),
    ],
    ids=["shape", "dtype", "list", "read-only"],
)
def test_bad_out(backend, vjp, out, exception, message):
    with pytest.raises(exception, match=message):
        VJPS[vjp](P, P[:, 0] if vjp == "logsumexp" else P, 1, out=out)
    assert (np.asarray(out) == 7).all()


def test_the_name_of_the_argument():
    with pytest.raises(TypeError, match="log_p must hold numbers"):
        log_softmax_vjp(["text"], [1.0])
    with pytest.raises(ValueError, match=r"g must have the shape of logsumexp's result, \(3,\), not \(3, 4\)"):
        logsumexp_vjp(P, P, 1)
    with pytest.raises(ValueError, match=r"g must have the shape of logsumexp's result, \(3, 1\), not \(3,\)"):
        logsumexp_vjp(P, P[:, 0], 1, True)
    with pytest.raises(TypeError, match="g of dtype float16 does not combine with p of dtype bfloat16"):
        softmax_vjp(P.astype(ml_dtypes.bfloat16), P.astype(np.float16))


# The Jacobian


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_jacobian_times_a_gradient(dtype, rng, axis):
    p = fastsoftmax.softmax(rng.normal(size=(4, 6, 5)), axis).astype(dtype)
    g = rng.normal(size=p.shape).astype(dtype)
    jacobian = softmax_jacobian(p, axis)
    assert jacobian.dtype == dtype
    product = np.einsum("...ij,...j->...i", jacobian, np.moveaxis(g, axis, -1))
    np.testing.assert_allclose(np.moveaxis(product, -1, axis), softmax_vjp(p, g, axis), rtol=1e-4, atol=1e-6)


def test_the_jacobian_near_certainty():
    """1 - p has the digits that p - p**2 would lose."""
    p = np.array([1 - 2.0**-53, 2.0**-53])
    assert softmax_jacobian(p)[0, 0] == p[0] * 2.0**-53


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64], ids=str)
def test_dtypes_of_the_jacobian(dtype):
    jacobian = softmax_jacobian(np.array([1, 0]).astype(dtype))
    assert jacobian.dtype == (np.float64 if dtype is np.int64 else dtype)
    assert not jacobian.any()


def test_the_jacobian_of_a_scalar():
    np.testing.assert_array_equal(softmax_jacobian(1.0), [[0]])


@pytest.mark.parametrize(
    ("p", "axis", "exception", "message"),
    [
        (P, (0, 1), TypeError, "axis must be one integer"),
        (P, None, TypeError, "axis must be one integer"),
        (P, 1.0, TypeError, "axis must be an integer"),
        (P, 2, np.exceptions.AxisError, "out of bounds"),
        (P + 0j, 1, TypeError, "p must hold real numbers"),
    ],
    ids=str,
)
def test_bad_input_of_the_jacobian(p, axis, exception, message):
    with pytest.raises(exception, match=message):
        softmax_jacobian(p, axis)
