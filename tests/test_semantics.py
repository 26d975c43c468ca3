"""The table of docs/semantics.md, row by row: what each kind of input returns."""

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import log_softmax, logsumexp, softmax

NAN, INF = np.nan, np.inf

EDGE_ROWS = {
    "a nan": ([1, NAN, 2], [NAN] * 3, [NAN] * 3, NAN),
    "nan and +inf": ([INF, NAN, 2], [NAN] * 3, [NAN] * 3, NAN),
    "nan and -inf": ([-INF, NAN], [NAN] * 2, [NAN] * 2, NAN),
    "a nan alone": ([NAN], [NAN], [NAN], NAN),
    "one +inf": ([1, INF], [NAN, NAN], [-INF, NAN], INF),
    "two +inf": ([1, INF, INF], [NAN] * 3, [-INF, NAN, NAN], INF),
    "+inf and -inf": ([-INF, INF], [NAN, NAN], [-INF, NAN], INF),
    "all -inf": ([-INF, -INF], [NAN, NAN], [NAN, NAN], -INF),
    "-inf alone": ([-INF], [NAN], [NAN], -INF),
    "0 and -inf": ([0, -INF], [1, 0], [0, -INF], 0),
    "-inf before the maximum": ([-INF, -INF, 5], [0, 0, 1], [-INF, -INF, 0], 5),
    "-1e30 and 1e30": ([-1e30, 1e30], [0, 1], [-2e30, 0], 1e30),
    "a single element": ([5], [1], [0], 5),
}


@pytest.mark.parametrize("length", [None, 40, 3000], ids=["short", "a vector more", "a block more"])
@pytest.mark.parametrize("row", EDGE_ROWS)
def test_edge_row(backend, dtype, row, length):
    """Also with the rest of a longer row masked out, so that no branch for short rows hides another."""
    x, probabilities, logarithms, total = EDGE_ROWS[row]
    all_nan = np.isnan(logarithms).all()
    n_masked = 0 if length is None else length - len(x)
    for order in (1, -1):  # the masked part after the row, or before it

        def extended(part, filler, order=order):
            return np.concatenate([part, [filler] * n_masked][::order]).astype(dtype)

        masked = extended(x, -INF)
        np.testing.assert_array_equal(
            softmax(masked), extended(probabilities, NAN if np.isnan(probabilities).all() else 0)
        )
        np.testing.assert_array_equal(log_softmax(masked), extended(logarithms, NAN if all_nan else -INF))
        np.testing.assert_array_equal(logsumexp(masked), dtype(total))


@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_row_leaves_its_neighbours_alone(backend, dtype, axis):
    rows = [x for x, *_ in EDGE_ROWS.values() if len(x) == 2] + [[1.0, 2.0]] * 15
    x = np.array(rows, dtype)
    for function in (softmax, log_softmax, logsumexp):
        batch = function(x if axis == 1 else x.T.copy(), axis)
        batch = batch.T if axis == 0 else batch
        for row, result in zip(x, batch, strict=True):
            np.testing.assert_array_equal(result, function(row))


def test_the_largest_numbers(backend, dtype):
    largest = np.finfo(dtype).max
    x = np.array([-largest, largest], dtype)
    np.testing.assert_array_equal(softmax(x), [0, 1])
    np.testing.assert_array_equal(log_softmax(x), [-INF, 0])
    assert logsumexp(x) == largest
    assert logsumexp(np.full(10, largest)) == largest
    np.testing.assert_array_equal(softmax(np.full(4, -largest)), np.full(4, 0.25))


def test_softmax_of_integers_does_not_wrap(backend):
    np.testing.assert_allclose(
        softmax(np.array([1, 2, 3], np.uint8)).astype(float), softmax([1.0, 2.0, 3.0]), rtol=2**-11
    )


@pytest.mark.parametrize("axis", [None, 0, -1, ()], ids=str)
@pytest.mark.parametrize("make", [lambda dtype: dtype(2.5), lambda dtype: np.array(2.5, dtype)], ids=["scalar", "0-d"])
def test_no_dimensions(backend, dtype, make, axis):
    for function, expected in ((softmax, 1), (log_softmax, 0), (logsumexp, 2.5)):
        result = function(make(dtype), axis)
        assert type(result) is dtype
        assert result == expected


@pytest.mark.parametrize("value", [3, 2.5, True])
def test_python_scalars(backend, value):
    results = softmax(value), log_softmax(value), logsumexp(value)
    assert results == (1, 0, value)
    assert all(isinstance(result, np.floating) for result in results)


def test_lists(backend):
    np.testing.assert_array_equal(softmax([[0.0, 0.0], [1000.0, 0.0]], axis=1), [[0.5, 0.5], [1, 0]])
    np.testing.assert_array_equal(log_softmax([1000, 0]), [0, -1000])
    assert logsumexp([[]]) == -INF


def test_no_axes(backend, dtype):
    x = np.array([[1, -2], [3, 1e30]], dtype)
    np.testing.assert_array_equal(softmax(x, ()), np.ones((2, 2)))
    np.testing.assert_array_equal(log_softmax(x, ()), np.zeros((2, 2)))
    np.testing.assert_array_equal(logsumexp(x, ()), x)


@pytest.mark.parametrize(
    ("axis", "keepdims", "shape"), [(1, False, (2, 4)), (1, True, (2, 1, 4)), (None, True, (1, 1, 1))]
)
def test_keepdims(backend, dtype, axis, keepdims, shape):
    assert logsumexp(np.zeros((2, 3, 4), dtype), axis, keepdims=keepdims).shape == shape


def test_a_full_reduction_is_a_scalar(backend, dtype):
    assert type(logsumexp(np.zeros(3, dtype))) is dtype
    assert type(logsumexp(np.zeros((3, 4), dtype), (0, 1))) is dtype


def test_signs(backend, dtype):
    for x, total, sign in (([1, 1], None, 1), ([-INF], -INF, 0), ([], -INF, 0), ([INF], INF, 1), ([NAN], NAN, NAN)):
        result, result_sign = logsumexp(np.array(x, dtype), return_sign=True)
        assert type(result) is type(result_sign) is dtype
        np.testing.assert_array_equal(result_sign, sign)
        if total is not None:
            np.testing.assert_array_equal(result, total)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrix_gives_an_array(backend, dtype):
    matrix = np.matrix([[1, 2], [3, 5]], dtype)
    for function in (softmax, log_softmax, logsumexp):
        result = function(matrix, 1)
        assert type(result) is np.ndarray
        np.testing.assert_array_equal(result, function(np.array(matrix), 1))


def test_no_floating_point_error_is_raised_or_left_behind(backend, function, dtype):
    """Pytest makes every warning an error; this holds the stricter modes and the environment of the caller."""
    everything = [x for x, *_ in EDGE_ROWS.values()] + [
        [-3e38, 3e38],
        [0, -100],
        [0, -740],
        [1e-45, 0],
        np.arange(-999, 9),
    ]
    call = getattr(fastsoftmax, function)
    with np.errstate(all="raise"):
        before = np.geterr()
        for x in everything:
            call(np.array(x, dtype))
            call(np.tile(np.array(x, dtype), (40, 1)), 0)
        assert np.geterr() == before
        np.add(np.ones(3), 1)
    assert np.float32(1e-45) * np.float32(1) > 0
    assert (np.full(100, 1e-320) * 1 > 0).all()  # subnormal numbers are not flushed to zero
