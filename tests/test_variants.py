"""Softmin, and the softmax with a one in the denominator."""

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import record_plans, softmax, softmax_one, softmin

from .inputs import ALL_VALUES, LAYOUTS, VALUES, WRITABLE_LAYOUTS, OnDevice, values
from .reference import LONG, exact, max_ulp_error


def with_zero(x, axis):
    """Return the exact softmax with a zero more in each row, without its probability."""
    x = np.moveaxis(np.asarray(x, LONG), axis, -1)
    zero = np.zeros((*x.shape[:-1], 1), LONG)
    return np.moveaxis(exact("softmax", np.concatenate([x, zero], -1), -1)[..., :-1], -1, axis)


@pytest.fixture(params=["softmin", "softmax_one"])
def variant(request):
    return getattr(fastsoftmax, request.param)


# Values


def test_softmin_is_softmax_of_the_negative(backend, dtype):
    for kind in ALL_VALUES:
        x = values(kind, (30, 70), dtype)
        for axis in (0, 1, None):
            np.testing.assert_array_equal(softmin(x, axis), softmax(-x, axis))


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 10_000), 1), ((9, 141), 1), ((99, 9), 1), ((41, 150), 0), ((9001, 21), 0)], ids=str
)
def test_softmax_one(backend, dtype, shape, axis):
    for kind in VALUES:
        x = values(kind, shape, dtype)
        assert max_ulp_error(softmax_one(x, axis), with_zero(x, axis)) <= backend.max_ulps, kind


@pytest.mark.parametrize("n", [1, 40, 9000])
def test_softmax_one_where_the_one_or_the_others_dominate(backend, dtype, rng, n):
    for offset in [-1e4, -700, -110, -90, -20, -1, 40, 1500, 1e5]:
        x = (rng.normal(size=(5, n)) + offset).astype(dtype)
        x[0] = offset
        x[1] = -np.inf
        x[2, : n // 2] = -np.inf
        assert max_ulp_error(softmax_one(x, 1), with_zero(x, 1)) <= backend.max_ulps
        assert max_ulp_error(softmax_one(x.T, 0), with_zero(x.T, 0)) <= backend.max_ulps
        assert (softmax_one(x, 1)[1] == 0).all()


def test_softmax_one_of_rows_without_probabilities(backend, dtype):
    for row in [[np.nan, 1.0], [np.inf, 1.0], [np.inf, np.inf], [-np.inf, np.inf], [np.nan, -np.inf]]:
        x = np.array([row, [0.0, -np.inf]], dtype)
        np.testing.assert_array_equal(softmax_one(x, 1), [[np.nan, np.nan], [0.5, 0.0]])
        np.testing.assert_array_equal(softmax_one(x.T, 0).T, [[np.nan, np.nan], [0.5, 0.0]])


@pytest.mark.parametrize(
    ("shape", "traversal"),
    [
        ((1000, 1), "tiles"),
        ((177, 9), "tiles"),
        ((40, 300), "rows"),
        ((9, 9000), "rows"),
        ((1, 90_000), "split"),
        ((150, 9), "strips"),
        ((20, 9001), "strips"),
    ],
    ids=str,
)
@pytest.mark.parametrize("of_dtype", [np.float16, np.float32, np.float64])
def test_a_row_of_softmax_one_has_its_bits_in_every_traversal(backend, monkeypatch, of_dtype, shape, traversal):
    """As beside other rows, so alone and collected element by element."""
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "2")
    for kind in ("wide", "ascending", "masked by -inf", "offset", "negative offset", "one nan"):
        with np.errstate(over="ignore"):
            x = values(kind, shape, np.float32).astype(of_dtype)
        with record_plans() as plans:
            p = softmax_one(x.T.copy(), 0).T if traversal == "strips" else softmax_one(x, 1)
        if backend.name == "cython" and (of_dtype != np.float16 or shape[1] < 2000):
            assert plans[0].schedule.traversal == traversal
        rtol = 0 if backend.has_kernels else 4 * np.finfo(of_dtype).eps
        spread = np.zeros((shape[0], 2 * shape[1]), of_dtype)[:, ::2]
        spread[...] = x
        np.testing.assert_allclose(softmax_one(spread, 1), p, rtol)
        for row in range(0, shape[0], max(shape[0] // 9, 1)):
            np.testing.assert_allclose(softmax_one(x[row]), p[row], rtol)


@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 150), 0), ((7, 150), 1), ((4, 3, 50), (0, 2)), ((5, 4, 2), None)], ids=str
)
def test_layouts(backend, variant, dtype, rng, shape, axis):
    rtol = 0 if backend.has_kernels else 4 * np.finfo(dtype).eps  # NumPy adds up in the order of memory
    for layout in LAYOUTS.values():
        x = layout(rng.normal(size=shape).astype(dtype))
        np.testing.assert_allclose(variant(x, axis), variant(np.ascontiguousarray(x), axis), rtol)


@pytest.mark.parametrize("axis", [0, 1])
def test_out(backend, variant, rng, axis):
    for layout in WRITABLE_LAYOUTS.values():
        x = rng.normal(size=(6, 150))
        expected = variant(x, axis)
        out = layout(np.zeros_like(x))
        assert variant(x, axis, out=out) is out
        np.testing.assert_array_equal(out, expected)
        out[...] = x
        assert variant(out, axis, out=out) is out
        np.testing.assert_array_equal(out, expected)
        room = np.zeros((7, 150))
        room[1:] = x
        variant(room[1:], axis, out=room[:-1])
        np.testing.assert_array_equal(room[:-1], expected)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (np.float16, np.float16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.int8, np.float16),
        (np.uint16, np.float32),
        (np.int64, np.float64),
        (bool, np.float16),
        (">f4", np.float32),
    ],
)
def test_dtypes(backend, rng, dtype, result):
    x = rng.integers(0, 2 if dtype is bool else 9, (3, 50)).astype(dtype)
    for axis in (0, 1):
        exact_softmin = exact("softmax", -x.astype(LONG), axis)
        for variant, reference in ((softmax_one, with_zero(x.astype(LONG), axis)), (softmin, exact_softmin)):
            p = variant(x, axis)
            assert p.dtype == result
            assert max_ulp_error(p, reference) <= backend.max_ulps
            out = np.zeros(x.shape, result)
            assert variant(x, axis, out=out) is out
            np.testing.assert_array_equal(out, p)


@pytest.mark.parametrize("dtype", [np.longdouble, complex])
def test_wide_dtypes(dtype, rng):
    x = rng.normal(size=(3, 50)).astype(dtype) + (1j * rng.normal(size=(3, 50)) if dtype is complex else 0)
    terms = np.exp(x)
    for variant, expected in ((softmax_one, terms / (1 + terms.sum(1, keepdims=True))), (softmin, softmax(-x, 1))):
        assert variant(x, 1).dtype == dtype
        np.testing.assert_allclose(variant(x, 1), expected, rtol=1e-13)


def test_scalars_and_empty_arrays(backend, variant):
    assert softmin(3.0) == 1.0
    assert softmax_one(0.0) == 0.5
    assert softmax_one([1, 1]).dtype == np.float64
    assert variant(np.zeros((3, 0)), 1).shape == (3, 0)
    assert variant(np.zeros((0, 3), np.float32), 1).dtype == np.float32


def test_softmax_one_on_threads(backend, rng, monkeypatch):
    for shape, axis in [((600, 700), 1), ((700, 600), 0)]:
        x = rng.normal(size=shape).astype(np.float32)
        results = []
        for n_threads in ("1", "3"):
            monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
            with record_plans() as plans:
                results.append(softmax_one(x, axis))
            assert backend.name == "numpy" or plans[0].schedule.n_threads == int(n_threads)
        np.testing.assert_array_equal(*results)


# Errors


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        (["a"], {}, TypeError, "x must hold numbers"),
        (np.ma.masked_array([1.0]), {}, TypeError, "x is a masked array"),
        ([1.0], {"axis": 1}, np.exceptions.AxisError, "out of bounds"),
        ([1.0], {"axis": 0.0}, TypeError, "axis must be an integer"),
        ([1.0, 2.0], {"backend": "fortran"}, ValueError, "backend must be one of"),
        ([1.0, 2.0], {"out": np.full(3, 7.0)}, ValueError, r"out must have shape \(2,\), not \(3,\)"),
        ([1.0, 2.0], {"out": np.full(2, 7, np.float32)}, TypeError, "out must have dtype float64, not float32"),
        (np.ones(2, np.int8), {"out": np.full(2, 7.0)}, TypeError, "out must have dtype float16, not float64"),
        ([1.0, 2.0], {"axis": 2, "out": np.full(2, 7.0)}, np.exceptions.AxisError, "out of bounds"),
    ],
)
def test_bad_input(variant, x, arguments, error, message):
    with pytest.raises(error, match=message):
        variant(x, **arguments)
    assert (np.asarray(arguments.get("out", 7)) == 7).all()


def test_arrays_on_a_device(backend, variant):
    with pytest.raises(TypeError, match="x is on a CUDA device, where this is not computed"):
        variant(OnDevice())
    with pytest.raises(TypeError, match="backend 'cuda' does not compute softmax_one"):
        softmax_one([1.0], backend="cuda")
