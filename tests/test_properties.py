"""Any shape, axes, memory layout and values that Hypothesis can think of."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsoftmax

from .inputs import ALL_VALUES, values
from .reference import error_of

SHAPES = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 70)), min_size=1, max_size=5).filter(
    lambda shape: np.prod(shape) <= 20_000
)


@st.composite
def arrays(draw):
    """An array of hard values, seen through permuted axes, steps of either sign, broadcasts and byte orders."""
    shape = draw(SHAPES)
    steps = draw(st.lists(st.sampled_from([1, 1, 2, -1, -3]), min_size=len(shape), max_size=len(shape)))
    room = values(
        draw(st.sampled_from(sorted(ALL_VALUES))),
        [size * abs(step) for size, step in zip(shape, steps, strict=True)],
        draw(st.sampled_from([np.float32, np.float64])),
        draw(st.integers(0, 2**32 - 1)),
    )
    x = room[tuple(slice(None, None, step) for step in steps)].transpose(draw(st.permutations(range(len(shape)))))
    repeated = draw(st.integers(0, 3 * len(shape)))
    if repeated < len(shape):
        x = np.broadcast_to(x.take([0], repeated), x.shape)
    return x.astype(x.dtype.newbyteorder()) if draw(st.integers(0, 9)) == 9 else x


@st.composite
def arrays_and_axes(draw):
    x = draw(arrays())
    one = st.integers(-x.ndim, x.ndim - 1)
    several = st.lists(one, unique_by=lambda axis: axis % x.ndim).map(tuple)
    return x, draw(st.one_of(one, several, st.none()))


@given(arrays_and_axes())
def test_values(backend, function, x_and_axis):
    x, axis = x_and_axis
    result = getattr(fastsoftmax, function)(x, axis)
    assert error_of(function, result, x, axis) <= backend.max_ulps


@given(arrays_and_axes(), st.integers(0, 2))
def test_out_holds_what_would_have_been_returned(backend, map_function, x_and_axis, kind_of_out):
    x, axis = x_and_axis
    expected = map_function(x, axis)
    if kind_of_out == 0 and x.flags.writeable:
        out = x
    elif kind_of_out == 1:
        out = np.empty_like(x)
    else:
        out = np.empty([2 * size for size in x.shape[::-1]], x.dtype)[tuple(slice(None, None, -2) for _ in x.shape)].T
    assert map_function(x, axis, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("of_dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@given(
    st.sampled_from(sorted(ALL_VALUES)),
    st.one_of(st.integers(1, 40), st.integers(1, 20_000)),
    st.integers(0, 2**32 - 1),
)
def test_probabilities_keep_the_order_of_logits(backend, of_dtype, kind, n, seed):
    with np.errstate(over="ignore"):
        x = values(kind, (n,), np.float32, seed).astype(of_dtype)
    p = fastsoftmax.softmax(x)
    if np.isnan(p).any():
        assert np.isnan(p).all()
        return
    ascending = np.argsort(x, kind="stable")
    x, p = x[ascending], p[ascending].astype(float)
    assert (np.diff(p) >= 0).all()
    assert (p[:-1] == p[1:])[x[:-1] == x[1:]].all()
    assert 0 <= p[0] <= p[-1] <= 1
