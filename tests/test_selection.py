"""The largest probabilities of a softmax."""

import ml_dtypes
import numpy as np
import pytest

from fastsoftmax import record_plans, softmax, softmax_topk

from .inputs import ALL_VALUES, LAYOUTS, OnDevice, values
from .reference import exact, max_ulp_error


def expected_indices(x, k, axis):
    """The order of the logits: NaN first, and of equal ones the lowest index."""
    x = np.moveaxis(np.asarray(x, np.longdouble), axis, -1)
    order = np.lexsort((-x, ~np.isnan(x)), axis=-1)[..., :k]
    return np.moveaxis(order, -1, axis)


def check(backend, x, k, axis=-1, **arguments):
    selected, indices = softmax_topk(x, k, axis, **arguments)
    np.testing.assert_array_equal(indices, expected_indices(x, k, axis))
    assert indices.dtype == np.int64
    p = softmax(x, axis)
    assert selected.dtype == p.dtype
    if backend.name == "cython":
        np.testing.assert_array_equal(selected, np.take_along_axis(p, indices, axis))
    elif x.dtype in (np.float32, np.float64):
        reference = np.take_along_axis(exact("softmax", x, axis), indices, axis)
        assert max_ulp_error(selected, reference) <= backend.max_ulps
    return selected, indices


@pytest.mark.parametrize(
    ("shape", "axis", "ks"),
    [((3, 21), 1, (1, 2, 21)), ((2, 17_000), 1, (1, 5, 300, 17_000)), ((60, 150), 0, (1, 7, 60)), ((4, 9, 3), 1, (4,))],
    ids=str,
)
def test_every_kind_of_data(backend, dtype, shape, axis, ks):
    for kind in ALL_VALUES:
        x = values(kind, shape, dtype)
        for k in ks if kind in ("normal", "ties", "anything") or shape[1] < 1000 else ks[:2]:
            check(backend, x, k, axis)


@pytest.mark.parametrize(
    ("shape", "axis", "ks", "traversal"),
    [
        ((150, 1), 1, (1,), "tiles"),
        ((99, 9), 1, (1, 4, 9), "tiles"),
        ((50, 24), 1, (3, 23), "tiles"),
        ((40, 70), 1, (65, 70), "rows"),
        ((9, 150), 0, (1, 9), "strips"),
        ((3, 70, 21), 1, (5, 64), "strips"),
        ((70, 21), 0, (65,), "bands"),
        ((9000, 3), 0, (2,), "bands"),
    ],
    ids=str,
)
def test_rows_side_by_side(backend, dtype, shape, axis, ks, traversal):
    for kind in ALL_VALUES:
        x = values(kind, shape, dtype)
        for k in ks:
            with record_plans() as plans:
                check(backend, x, k, axis)
            assert backend.name != "cython" or plans[0].schedule.traversal == traversal


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 129, 1000])
def test_every_place(backend, dtype, rng, n):
    """The largest element is found wherever it is, and so are equal ones, in order."""
    k = min(n, 3)
    for place in {0, n // 2, n - 1, max(n - 2, 0)}:
        x = rng.normal(size=(2, n)).astype(dtype)
        x[0, place] = 9
        x[1, [place, 0, n - 1]] = 9
        check(backend, x, k)


def test_layouts(backend, dtype, rng):
    for axis in (0, 1):
        for layout in LAYOUTS.values():
            x = layout(rng.normal(size=(11, 150)).astype(dtype))
            check(backend, x, 4, axis)
    x = rng.normal(size=(3, 40, 5, 2)).astype(dtype)
    for axis in range(-4, 4):
        assert check(backend, x, 2, axis)[0].shape[axis] == 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.uint16, np.int64, bool, ">f4"])
def test_dtypes(backend, rng, dtype):
    x = rng.integers(0, 2 if dtype is bool else 100, (30, 50)).astype(dtype)
    for axis in (0, 1):
        selected, indices = softmax_topk(x, 5, axis)
        np.testing.assert_array_equal(indices, expected_indices(x.astype(float), 5, axis))
        p = softmax(x, axis)
        assert selected.dtype == p.dtype
        reference = exact("softmax", x.astype(float), axis)
        assert max_ulp_error(selected, np.take_along_axis(reference, indices, axis)) <= backend.max_ulps


def test_long_double():
    x = np.array([1, 3, 3, 2], np.longdouble)
    selected, indices = softmax_topk(x, 3)
    assert selected.dtype == np.longdouble
    assert indices.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("row", "indices"),
    [
        ([1.0, np.nan, 3.0, np.nan], [1, 3, 2]),
        ([np.nan, np.nan, np.nan, np.nan], [0, 1, 2]),
        ([1.0, np.inf, 3.0, np.inf], [1, 3, 2]),
        ([np.inf, -np.inf, np.nan, 0.0], [2, 0, 3]),
        ([-np.inf, -np.inf, -np.inf, -np.inf], [0, 1, 2]),
    ],
)
def test_rows_without_probabilities(backend, dtype, row, indices):
    few = np.array([row, [0, 1, -np.inf, 0]], dtype)
    for x, axis in ((few, 1), (few.T, 0), (np.tile(few, (20, 1)), 1), (few.T.copy(), 0)):
        selected, found = check(backend, x, 3, axis)
        assert np.moveaxis(found, axis, -1)[:2].tolist() == [indices, [1, 0, 3]]
        assert np.isnan(np.moveaxis(selected, axis, -1)[0]).all()


def test_fewer_finite_elements_than_asked_for(backend, dtype):
    selected, indices = softmax_topk(np.array([-np.inf, 0, -np.inf, 0], dtype), 4)
    assert selected.tolist() == [0.5, 0.5, 0, 0]
    assert indices.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("axis", [0, 1])
def test_out(backend, rng, axis):
    for dtype in (np.float64, np.float16):
        x = rng.normal(size=(20, 30)).astype(dtype)
        result = softmax_topk(x, 3, axis)
        shape = result.values.shape
        for out in (
            (np.zeros(shape, dtype), np.zeros(shape, np.int64)),
            (np.zeros(shape, dtype, "F"), np.zeros((2 * shape[0], shape[1]), np.int64)[::2]),
            (x[: shape[0], : shape[1]], np.zeros(shape, ">i8")),
        ):
            returned = softmax_topk(x, 3, axis, out=out)
            assert returned.values is out[0]
            assert returned.indices is out[1]
            np.testing.assert_array_equal(out[0], result.values)
            np.testing.assert_array_equal(out[1], result.indices)


@pytest.mark.parametrize("axis", [0, 1])
def test_bits_do_not_depend_on_threads(backend, rng, monkeypatch, axis):
    x = rng.normal(size=(600, 700)).astype(np.float32)
    results = []
    for n_threads in ("1", "3"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        with record_plans() as plans:
            results.append(softmax_topk(x, 6, axis))
        assert plans[0].function == "softmax_topk"
        assert backend.name == "numpy" or plans[0].schedule.n_threads == int(n_threads)
    np.testing.assert_array_equal(results[0].values, results[1].values)
    np.testing.assert_array_equal(results[0].indices, results[1].indices)


def test_empty_rows(backend):
    values, indices = softmax_topk(np.zeros((0, 5)), 2)
    assert values.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be from 1 to 4, the number of elements along axis, not 0"),
        ({"k": 5}, ValueError, "k must be from 1 to 4, the number of elements along axis, not 5"),
        ({"k": -1}, ValueError, "not -1"),
        ({"k": 2.0}, TypeError, "k must be an integer, not 2.0"),
        ({"k": True}, TypeError, "k must be an integer, not True"),
        ({"k": None}, TypeError, "k must be an integer, not None"),
        ({"axis": 2}, np.exceptions.AxisError, "out of bounds"),
        ({"axis": None}, TypeError, "axis must be one integer, not None"),
        ({"axis": (0,)}, TypeError, r"axis must be one integer, not \(0,\)"),
        ({"x": 1.0}, ValueError, "x must have an axis to select from, not be a scalar"),
        ({"x": np.zeros((3, 0))}, ValueError, "k must be from 1 to 0"),
        ({"x": np.ones(4, complex)}, TypeError, "x must hold real numbers, not complex128"),
        ({"x": np.ma.ones(4)}, TypeError, "x is a masked array"),
        ({"backend": "fortran"}, ValueError, "backend must be one of"),
        ({"out": np.zeros((3, 2))}, TypeError, "out must be a tuple of two arrays"),
        ({"out": (np.full((3, 2), 7.0),)}, TypeError, "out must be a tuple of two arrays"),
        (
            {"out": (np.full((3, 2), 7.0), np.full((3, 2), 7.0))},
            TypeError,
            r"out\[1\] must have dtype int64, not float64",
        ),
        ({"out": (np.full((3, 3), 7.0), np.full((3, 2), 7))}, ValueError, r"out\[0\] must have shape \(3, 2\)"),
        ({"out": (np.full((3, 2), 7.0), np.full((2, 3), 7))}, ValueError, r"out\[1\] must have shape \(3, 2\)"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        softmax_topk(**({"x": np.ones((3, 4)), "k": 2} | arguments))
    out = arguments.get("out")
    assert not isinstance(out, tuple) or all((array == 7).all() for array in out)


def test_arrays_on_a_device(backend):
    with pytest.raises(TypeError, match="x is on a CUDA device, where this is not computed"):
        softmax_topk(OnDevice(), 1)


def test_the_cuda_backend():
    with pytest.raises(
        TypeError, match="backend 'cuda' does not compute softmax_topk; these do: 'cython', 'numba', 'numpy'"
    ):
        softmax_topk([1.0], 1, backend="cuda")
