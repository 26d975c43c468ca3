"""Every axis, memory layout, size and ``out`` gives the right values, in an output of the input's memory order."""

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax._layout import Dimension, Layout, make_layout, normalize_axes

from .inputs import LAYOUTS, WRITABLE_LAYOUTS, values
from .reference import error_of

AXES = [0, 1, 2, -1, -3, (0, 1), (0, 2), (1, 2), (2, 0), (-1, -2), (0, 1, 2), None, ()]


def reduced_shape(shape, axis, keepdims=False):
    return np.zeros(shape).sum(axis, keepdims=keepdims).shape


def assert_right(backend, function, x, axis=None):
    """Call a function and hold shape, dtype and values against the reference."""
    result = getattr(fastsoftmax, function)(x, axis)
    assert result.dtype == x.dtype.newbyteorder("=")
    assert result.shape == (reduced_shape(x.shape, axis) if function == "logsumexp" else x.shape)
    assert error_of(function, result, x, axis) <= backend.max_ulps
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_axis_of_every_layout(backend, function, dtype, layout):
    x = LAYOUTS[layout](values("normal", (6, 5, 7), dtype))
    before = x.copy()
    for axis in AXES:
        assert_right(backend, function, x, axis)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("layout", ["C", "Fortran", "permuted", "reversed steps"])
def test_five_dimensions_that_do_not_fuse(backend, function, dtype, layout):
    x = LAYOUTS[layout](values("wide", (2, 3, 4, 3, 5), dtype))
    for axis in [(0, 2, 4), (1, 3), (0, 4), (3,), (4, 2, 1), None, 2]:
        assert_right(backend, function, x, axis)


def with_rows(geometry, shape, dtype, kind="normal"):
    """Return an array whose rows (along the returned axis) are contiguous, side by side, or neither."""
    n_rows, n_cols = shape
    if geometry == "rows":
        return values(kind, (n_rows, n_cols), dtype), 1
    if geometry == "strips":
        return values(kind, (n_rows, n_cols), dtype).T.copy(), 0
    return WRITABLE_LAYOUTS["reversed steps"](values(kind, (n_rows, n_cols), dtype)), 1


@pytest.mark.parametrize("geometry", ["rows", "strips", "gather"])
def test_every_length_around_vector_widths(backend, function, dtype, geometry):
    for n_cols in range(1, 71):
        for n_rows in (1, 3, 17):
            x, axis = with_rows(geometry, (n_rows, n_cols), dtype)
            assert_right(backend, function, x, axis)


@pytest.mark.parametrize("geometry", ["strips", "gather"])
def test_every_number_of_rows_around_vector_widths(backend, function, dtype, geometry):
    for n_rows in range(1, 71):
        x, axis = with_rows(geometry, (n_rows, 9), dtype)
        assert_right(backend, function, x, axis)


@pytest.mark.parametrize(
    "n_cols", [127, 128, 129, 1023, 1024, 1025, 8191, 8192, 8193, 16383, 16384, 16385, 65_537, 200_003]
)
@pytest.mark.parametrize("geometry", ["rows", "strips", "gather"])
def test_lengths_around_blocks(backend, function, dtype, geometry, n_cols):
    x, axis = with_rows(geometry, (3, n_cols), dtype, "ascending")
    assert_right(backend, function, x, axis)


@pytest.mark.parametrize("shape", [(20_000, 10), (5_000, 33), (1, 50_000), (50_000, 1), (300, 700)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_many_rows(backend, function, dtype, shape, axis):
    assert_right(backend, function, values("normal", shape, dtype), axis)


@pytest.mark.parametrize("shape", [(4096, 3, 5), (3, 2048, 5), (40, 50, 60)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, (0, 2), (0, 1)], ids=str)
def test_reduced_axes_in_the_middle(backend, function, dtype, shape, axis):
    assert_right(backend, function, values("normal", shape, dtype), axis)


@pytest.mark.parametrize(
    "layout", ["C", "Fortran", "permuted", "stepped", "gapped rows", "reversed", "broadcast outer"]
)
def test_fresh_output_keeps_the_memory_order(backend, dtype, map_function, layout):
    x = LAYOUTS[layout](values("normal", (3, 4, 5), dtype))
    for axis in (0, 2, (0, 1)):
        result = map_function(x, axis)
        assert result.strides == np.empty_like(x).strides
        assert result.flags.writeable
        assert not np.may_share_memory(result, x)


# Zero sizes


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0,), 0), ((3, 0), 1), ((3, 0), 0), ((0, 3), 0), ((0, 3), None), ((2, 0, 3), (0, 2)), ((2, 0, 3), ())],
    ids=str,
)
def test_empty(backend, function, dtype, shape, axis):
    result = getattr(fastsoftmax, function)(np.empty(shape, dtype), axis)
    assert result.dtype == dtype
    if function == "logsumexp":
        np.testing.assert_array_equal(result, np.full(reduced_shape(shape, axis), -np.inf))
    else:
        assert result.shape == shape


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)], ids=str)
def test_empty_with_out(backend, dtype, shape):
    out = np.empty(shape, dtype)
    assert fastsoftmax.softmax(out, 1, out=out) is out
    sums = np.full(shape[0], 7, dtype)
    assert fastsoftmax.logsumexp(np.empty(shape, dtype), 1, out=sums) is sums
    np.testing.assert_array_equal(sums, np.full(shape[0], -np.inf))


# out=


@pytest.mark.parametrize("out_layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize("layout", ["C", "Fortran", "reversed steps"])
def test_out_of_every_layout(backend, dtype, map_function, layout, out_layout):
    x = LAYOUTS[layout](values("normal", (6, 5, 7), dtype))
    for axis in (0, -1, (0, 2), None):
        out = WRITABLE_LAYOUTS[out_layout](np.full(x.shape, 99, dtype))
        assert map_function(x, axis, out=out) is out
        np.testing.assert_array_equal(out, map_function(x, axis))


@pytest.mark.parametrize("out_layout", WRITABLE_LAYOUTS)
def test_logsumexp_out_with_and_without_keepdims(backend, dtype, out_layout):
    x = values("normal", (6, 5, 7), dtype)
    for axis in (0, 1, (0, 2), ()):
        for keepdims in (False, True):
            expected = fastsoftmax.logsumexp(x, axis, keepdims=keepdims)
            assert expected.shape == reduced_shape(x.shape, axis, keepdims)
            out = WRITABLE_LAYOUTS[out_layout](np.full_like(expected, 99))
            assert fastsoftmax.logsumexp(x, axis, keepdims=keepdims, out=out) is out
            np.testing.assert_array_equal(out, expected)


def test_out_without_dimensions(backend, dtype, function):
    x = np.asarray(values("normal", (7,) if function == "logsumexp" else (), dtype))
    out = np.asarray(dtype(99))
    assert getattr(fastsoftmax, function)(x, out=out) is out
    assert out[()] == getattr(fastsoftmax, function)(x)


@pytest.mark.parametrize("layout", ["stepped", "gapped rows", "reversed steps"])
def test_out_leaves_the_memory_between_its_elements_alone(backend, function, dtype, layout):
    x = values("normal", (19, 37), dtype)
    elements = {
        "stepped": np.s_[1:39:2, 3:77:2],
        "gapped rows": np.s_[2:21, 5:42],
        "reversed steps": np.s_[39:1:-2, 77:3:-2],
    }[layout]
    if function == "logsumexp":
        elements = (elements[0], 9)
    room, between = np.full((40, 80), 99, dtype), np.ones((40, 80), bool)
    between[elements] = False
    getattr(fastsoftmax, function)(x, 1, out=room[elements])
    assert (room[between] == 99).all()
    assert (room[elements] != 99).all()


def test_out_whose_dimensions_interlace(backend, dtype, map_function):
    """Neither dimension lies inside the other, and yet no two elements share memory."""
    x = values("normal", (2, 3), dtype)
    out = np.lib.stride_tricks.as_strided(np.zeros(8, dtype), (2, 3), [3 * x.itemsize, 2 * x.itemsize])
    assert map_function(x, 1, out=out) is out
    np.testing.assert_array_equal(out, map_function(x, 1))


IN_PLACE_SHAPES = [((5, 7), 1), ((5, 7), 0), ((40, 300), 0), ((3, 9000), 1), ((3, 300_000), 1), ((5, 6, 7), (0, 2))]


@pytest.mark.parametrize(("shape", "axis"), IN_PLACE_SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["C", "Fortran", "reversed steps", "byte-swapped", "unaligned"])
def test_in_place(backend, dtype, map_function, layout, shape, axis):
    x = WRITABLE_LAYOUTS[layout](values("normal", shape, dtype))
    expected = map_function(x.copy("K"), axis)
    assert map_function(x, axis, out=x) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("shift", [-33, -1, 1, 33])
@pytest.mark.parametrize("axis", [0, 1])
def test_partial_overlap_in_both_directions(backend, dtype, map_function, axis, shift):
    room = values("normal", (60 * 50,), dtype)
    x = room[100:-100].reshape(56, 50)
    out = room[100 + shift : room.size - 100 + shift].reshape(56, 50)
    expected = map_function(x.copy(), axis)
    map_function(x, axis, out=out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("view", [np.transpose, np.flip])
def test_out_is_the_transposed_or_reversed_input(backend, dtype, map_function, view):
    x = values("normal", (30, 30), dtype)
    expected = map_function(x.copy(), 1)
    map_function(x, 1, out=view(x))
    np.testing.assert_array_equal(view(x), expected)


def test_logsumexp_out_inside_its_input(backend, dtype):
    for axis in (0, 1):
        x = values("normal", (30, 30), dtype)
        expected = fastsoftmax.logsumexp(x.copy(), axis)
        fastsoftmax.logsumexp(x, axis, out=x[7])
        np.testing.assert_array_equal(x[7], expected)


# The layout itself


@pytest.mark.parametrize(
    ("axis", "ndim", "expected"),
    [
        (None, 3, (0, 1, 2)),
        (None, 0, ()),
        ((), 3, ()),
        (-1, 3, (2,)),
        (np.int64(1), 3, (1,)),
        ((2, -3), 3, (0, 2)),
        ([1, 0], 2, (0, 1)),
        (0, 0, ()),
        (-1, 0, ()),
    ],
)
def test_normalize_axes(axis, ndim, expected):
    assert normalize_axes(axis, ndim) == expected


def layout_of(x, axes, out=None):
    return make_layout(x, axes, np.empty_like(x) if out is None else out)


@pytest.mark.parametrize(
    ("shape", "axes", "n_kept", "n_reduced"),
    [
        ((3, 4, 5), (2,), 1, 1),
        ((3, 4, 5), (0,), 1, 1),
        ((3, 4, 5), (1,), 2, 1),
        ((3, 4, 5), (1, 2), 1, 1),
        ((3, 4, 5), (0, 2), 1, 2),
        ((3, 1, 5), (0, 2), 0, 1),
        ((3, 4, 5), (0, 1, 2), 0, 1),
        ((3, 4, 5), (), 1, 1),
        ((), (), 0, 1),
    ],
    ids=str,
)
def test_neighbouring_dimensions_fuse(shape, axes, n_kept, n_reduced):
    layout = layout_of(np.empty(shape), axes)
    assert (len(layout.kept), len(layout.reduced)) == (n_kept, n_reduced)
    assert layout.size == layout.n_rows * layout.n_cols == np.prod(shape)
    assert layout.n_cols == np.prod([shape[axis] for axis in axes])


def test_dimensions_fuse_only_where_input_and_output_allow_it():
    x = np.empty((6, 5, 7))
    assert len(layout_of(x, (1, 2), WRITABLE_LAYOUTS["gapped rows"](x)).reduced) == 2
    assert len(layout_of(WRITABLE_LAYOUTS["gapped rows"](x), (1, 2), x).reduced) == 2


def test_order_of_memory_is_the_order_of_dimensions():
    fortran = np.empty((3, 4, 5), order="F")
    assert layout_of(fortran, (0,)) == Layout((Dimension(20, 24, 24),), (Dimension(3, 8, 8),), 8)


@pytest.mark.parametrize(
    ("axes", "contiguous", "adjacent"), [((1,), True, False), ((0,), False, True), ((0, 1), True, False)]
)
def test_kind_of_rows(axes, contiguous, adjacent):
    layout = layout_of(np.empty((6, 5)), axes)
    assert layout.has_contiguous_rows is contiguous
    assert layout.has_adjacent_rows is adjacent


def test_steps_make_rows_neither_contiguous_nor_adjacent():
    layout = layout_of(np.empty((6, 10))[:, ::2], (0,))
    assert not layout.has_contiguous_rows
    assert not layout.has_adjacent_rows
