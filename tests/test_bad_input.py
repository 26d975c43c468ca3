"""Arguments that cannot be right raise the exception that says why, and leave ``out`` as it was."""

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import logsumexp, record_plans

X = np.arange(12.0).reshape(3, 4)


@pytest.fixture
def call(function):
    return getattr(fastsoftmax, function)


# axis


@pytest.mark.parametrize("axis", [2, -3, (0, 2), (-3,), 10**6, 2**70])
def test_axis_out_of_range(backend, call, axis):
    with pytest.raises(np.exceptions.AxisError, match="out of bounds for array of dimension 2"):
        call(X, axis)


@pytest.mark.parametrize("axis", [1, -2, (0, 1)])
def test_axis_out_of_range_of_a_scalar(backend, call, axis):
    with pytest.raises(np.exceptions.AxisError, match="out of bounds for array of dimension 0"):
        call(1.0, axis)


@pytest.mark.parametrize("axis", [(0, 0), (1, -1)])
def test_repeated_axis(backend, call, axis):
    with pytest.raises(ValueError, match="repeated"):
        call(X, axis)


@pytest.mark.parametrize(
    "axis",
    [1.0, True, np.bool_(False), "0", (0, 1.0), (True,), np.float64(1), [None], {0}, np.array([1]), (np.array([1]),)],
)
def test_axis_of_the_wrong_type(backend, call, axis):
    with pytest.raises(TypeError, match="axis must be an integer"):
        call(X, axis)


def test_axis_is_checked_for_empty_arrays_too(backend, call):
    with pytest.raises(np.exceptions.AxisError):
        call(np.empty((0, 3)), 2)


# The data


@pytest.mark.parametrize(
    ("x", "name"),
    [
        (np.array([1, 2], object), "object"),
        (np.array(["1", "2"]), "<U1"),
        (np.array([b"1"]), "S1"),
        (np.array(["2018-05-08"], "M8[D]"), "datetime64"),
        (np.array([1], "m8[s]"), "timedelta64"),
        (np.zeros(2, [("a", float)]), "'a'"),
        (np.zeros(2, "V4"), "V4"),
        (["text"], "<U4"),
        (None, "object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dtypes_without_numbers_are_named(backend, call, x, name):
    with pytest.raises(TypeError, match="must hold numbers, not") as raised:
        call(x)
    assert name in str(raised.value)


def test_ragged_lists(backend, call):
    with pytest.raises(ValueError, match="inhomogeneous"):
        call([[1.0], [1.0, 2.0]])


def test_masked_weights():
    with pytest.raises(TypeError, match="b is a masked array"):
        logsumexp(X, b=np.ma.masked_array(X))


def test_weights_that_do_not_broadcast():
    with pytest.raises(ValueError, match=r"b of shape \(3,\) does not broadcast with a of shape \(3, 4\)"):
        logsumexp(X, b=np.ones(3))


def test_unknown_backend_for_weights():
    with pytest.raises(ValueError, match="must be one of 'cython', 'numba', 'cuda', 'numpy'"):
        logsumexp(X, b=X, backend="nonsense")


# out


def read_only(array):
    array.flags.writeable = False
    return array


def result_shape(function, keepdims=False):
    return (X.sum(1, keepdims=keepdims) if function == "logsumexp" else X).shape


BAD_OUTS = {
    "a list": (lambda shape: np.zeros(shape).tolist(), TypeError, "out must be a numpy.ndarray, not list"),
    "a scalar": (lambda shape: np.float64(1), TypeError, "out must be a numpy.ndarray, not float64"),
    "a tuple": (lambda shape: (np.zeros(shape),), TypeError, "out must be a numpy.ndarray, not tuple"),
    "float32": (lambda shape: np.full(shape, 7, np.float32), TypeError, "dtype float64, not float32"),
    "int64": (lambda shape: np.full(shape, 7), TypeError, "dtype float64, not int64"),
    "complex": (lambda shape: np.full(shape, 7j), TypeError, "dtype float64, not complex128"),
    "object": (lambda shape: np.full(shape, None), TypeError, "dtype float64, not object"),
    "more dimensions": (lambda shape: np.full((1, *shape), 7.0), ValueError, "out must have shape"),
    "fewer dimensions": (lambda shape: np.full(shape[1:], 7.0), ValueError, "out must have shape"),
    "another size": (lambda shape: np.full((*shape[:-1], 9), 7.0), ValueError, "out must have shape"),
    "empty": (lambda shape: np.empty((0, *shape[1:])), ValueError, "out must have shape"),
    "read-only": (lambda shape: read_only(np.full(shape, 7.0)), ValueError, "read-only"),
    "masked": (lambda shape: np.ma.masked_array(np.full(shape, 7.0)), TypeError, "out must not be a masked array"),
    "a broadcast view": (
        lambda shape: np.lib.stride_tricks.as_strided(np.full(1, 7.0), shape, [0] * len(shape)),
        ValueError,
        "share memory",
    ),
    "overlapping rows": (
        lambda shape: np.lib.stride_tricks.as_strided(np.full(99, 7.0), shape, [8, 16] if len(shape) == 2 else [4]),
        ValueError,
        "share memory",
    ),
    "overlapping elements": (
        lambda shape: np.lib.stride_tricks.as_strided(np.full(99, 7.0), shape, [60, 4][-len(shape) :]),
        ValueError,
        "share memory",
    ),
}


@pytest.mark.parametrize("bad", BAD_OUTS)
def test_bad_out(backend, function, call, bad):
    make, exception, message = BAD_OUTS[bad]
    out = make(result_shape(function))
    before = np.array(out, copy=True)
    with pytest.raises(exception, match=message):
        call(X, 1, out=out)
    np.testing.assert_array_equal(np.array(out), before)


@pytest.mark.parametrize("bad", BAD_OUTS)
def test_bad_out_of_a_weighted_sum(backend, bad):
    make, exception, message = BAD_OUTS[bad]
    out = make((3,))
    before = np.array(out, copy=True)
    with record_plans() as plans, pytest.raises(exception, match=message):
        logsumexp(X, 1, X, out=out)
    np.testing.assert_array_equal(np.array(out), before)
    assert plans == []


def test_logsumexp_out_must_follow_keepdims(backend):
    for keepdims in (False, True):
        with pytest.raises(ValueError, match="out must have shape"):
            logsumexp(X, 1, keepdims=keepdims, out=np.empty(result_shape("logsumexp", not keepdims)))


@pytest.mark.parametrize("arguments", [{"axis": 2}, {"axis": 1.0}, {"axis": 1, "backend": "nonsense"}])
def test_other_errors_leave_out_alone(backend, function, call, arguments):
    out = np.full(result_shape(function), 7.0)
    with pytest.raises((TypeError, ValueError)):
        call(X, out=out, **arguments)
    assert (out == 7).all()


def test_out_is_by_keyword_only(call):
    with pytest.raises(TypeError, match="positional argument"):
        call(X, 1, None, False, False, X)
