"""From an array and an axis to rows: the view that every kernel works on.

A softmax over any set of axes is the same softmax over many *rows*: the reduced axes together form one row, the kept
axes enumerate the rows. A `Layout` states where the rows of the input and of the output lie, as sizes and byte strides,
with neighbouring dimensions fused wherever memory allows it. Nothing here loops over data. An input whose dtype, byte
order or alignment no kernel reads is converted here (see `readable`); its strides never are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Dimension(NamedTuple):
    """One dimension of a layout: its size and its byte strides in the input, the output, the factors b and the mask."""

    size: int
    x_stride: int
    y_stride: int
    b_stride: int = 0
    mask_stride: int = 0

    def continues(self, inner: Dimension) -> bool:
        """Whether this dimension steps exactly over ``inner``, so that the two are one."""
        return (
            self.x_stride == inner.size * inner.x_stride
            and self.y_stride == inner.size * inner.y_stride
            and self.b_stride == inner.size * inner.b_stride
            and self.mask_stride == inner.size * inner.mask_stride
        )


class Layout(NamedTuple):
    """The rows of an input and of its output.

    Parameters
    ----------
    kept : tuple of Dimension
        The dimensions that enumerate the rows, outermost first.
    reduced : tuple of Dimension
        The dimensions that one row runs over, outermost first; never empty.
    itemsize : int
        Bytes of one element of the input.
    other_itemsize : int
        Bytes of one element of the output, if they are not as many; 0 where they are.
    """

    kept: tuple[Dimension, ...]
    reduced: tuple[Dimension, ...]
    itemsize: int
    other_itemsize: int = 0

    @property
    def y_itemsize(self) -> int:
        return self.other_itemsize or self.itemsize

    @property
    def n_rows(self) -> int:
        return prod(dimension.size for dimension in self.kept)

    @property
    def n_cols(self) -> int:
        return prod(dimension.size for dimension in self.reduced)

    @property
    def size(self) -> int:
        return self.n_rows * self.n_cols

    @property
    def has_contiguous_rows(self) -> bool:
        """Whether each row is one run of adjacent elements, in the input and in the output."""
        row = self.reduced[-1]
        # The output of logsumexp has one element a row: its stride along the row is 0.
        return len(self.reduced) == 1 and row.x_stride == self.itemsize and row.y_stride in (self.y_itemsize, 0)

    @property
    def has_adjacent_rows(self) -> bool:
        """Whether neighbouring rows lie side by side, element by element: the reduced axis is not the last one."""
        if len(self.reduced) != 1 or not self.kept:
            return False
        return self.kept[-1].x_stride == self.itemsize and self.kept[-1].y_stride == self.y_itemsize


def normalize_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Return ``axis`` as a sorted tuple of axes, each in ``range(ndim)``.

    A scalar (``ndim == 0``) is taken as an array of one element: axis 0 and -1 are accepted for it.

    Raises
    ------
    TypeError
        If ``axis`` is neither an integer, a sequence of integers, nor None.
    numpy.exceptions.AxisError
        If an axis is out of range.
    ValueError
        If an axis is repeated.
    """
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    normalized = []
    for one in axes:
        try:
            if isinstance(one, (bool, np.bool_)):
                raise TypeError
            index, bound = operator.index(one), max(ndim, 1)
        except TypeError:
            raise TypeError(f"axis must be an integer, a tuple of integers or None, not {one!r}") from None
        if not -bound <= index < bound:
            raise np.exceptions.AxisError(index, ndim, "axis")
        normalized.append(index % bound)
    if len(set(normalized)) != len(normalized):
        raise ValueError(f"axis has a repeated entry: {axis!r}")
    return tuple(sorted(normalized)) if ndim else ()


def readable(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``x`` as aligned, native-endian elements of ``dtype``: ``x`` itself wherever it already is that."""
    if x.dtype == dtype and x.flags.aligned:
        return x
    with np.errstate(all="ignore"):  # a number beyond the range becomes infinite
        return x.astype(dtype, order="K")


def make_layout(
    x: Array,
    axes: Sequence[int],
    out: Array,
    b: Array | None = None,
    mask: Array | None = None,
    in_order: bool = False,
) -> Layout:
    """Lay out ``x``, ``out``, and the factors ``b`` and the ``mask`` if there are any, as rows along ``axes``.

    ``b`` and ``mask`` have the shape of ``x``; so has ``out``, or that shape with every reduced axis of length 1. If
    ``in_order``, rows are enumerated in the order of the axes, whatever that in memory.
    """
    is_converted = out.itemsize != x.itemsize
    is_plain = b is None and mask is None and not is_converted
    is_usual = is_plain and axes == (x.ndim - 1,) and out.shape == x.shape
    if is_usual and x.flags.c_contiguous and out.flags.c_contiguous:
        # What the general way finds, in a third of its time: most calls are this one.
        return c_order_layout(x.size // x.shape[-1], x.shape[-1], 1, x.itemsize)
    strides = [(0,) * x.ndim if array is None else array.strides for array in (x, out, b, mask)]
    kept, reduced = [], []
    for axis, dimension in enumerate(map(Dimension, x.shape, *strides)):
        if axis not in axes:
            kept.append(dimension)
        elif out.shape[axis] == dimension.size:
            reduced.append(dimension)
        else:
            reduced.append(dimension._replace(y_stride=0))
    one = Dimension(1, x.itemsize, out.itemsize)
    return Layout(_fuse(kept, in_order), _fuse(reduced) or (one,), x.itemsize, out.itemsize if is_converted else 0)


@lru_cache(maxsize=1024)
def c_order_layout(
    outer: int, n: int, inner: int, itemsize: int, is_reduced: bool = False, has_b: bool = False
) -> Layout:
    """Lay out an array in C order, as ``outer`` by ``n`` by ``inner``, as rows along its middle axis.

    The output is in C order too; if ``is_reduced``, it has one element for each row. So is b, if it ``has_b``.
    """
    x_row, x_outer = inner * itemsize, n * inner * itemsize
    y_row, y_outer = (0, x_row) if is_reduced else (x_row, x_outer)
    kept = (Dimension(outer, x_outer, y_outer, x_outer * has_b), Dimension(inner, itemsize, itemsize, itemsize * has_b))
    return Layout(tuple(d for d in kept if d.size > 1), (Dimension(n, x_row, y_row, x_row * has_b),), itemsize)


def _fuse(dimensions: list[Dimension], in_order: bool = False) -> tuple[Dimension, ...]:
    """Order dimensions by falling stride, unless they are to stay, and merge the neighbours that memory lets be one."""
    fused: list[Dimension] = []
    for inner in sorted((d for d in dimensions if d.size != 1), key=lambda d: 0 if in_order else -abs(d.x_stride)):
        if fused and fused[-1].continues(inner):
            outer = fused.pop()
            inner = inner._replace(size=outer.size * inner.size)
        fused.append(inner)
    return tuple(fused)
