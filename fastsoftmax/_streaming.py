"""The softmax of data that come in pieces: of a stream, or of a memory map larger than memory.

What a softmax has to know of a row is its state: the maximum, and the sum of the exponentials (see
`fastsoftmax._state`). States of parts merge into the state of the whole, so one pass over the pieces finds it, in any
order and on any machine, and a second one writes the probabilities.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastsoftmax import _state
from fastsoftmax._api import _check_out, _deliver, _dtypes, _is_same_view, _is_writable_as, _read_as
from fastsoftmax._derivatives import _real_numbers
from fastsoftmax._dispatch import execute_states, forced_backend, select_for
from fastsoftmax._layout import Array, make_layout, normalize_axes, readable
from fastsoftmax._outputs import empty_like


class OnlineSoftmax:
    """The running state of a softmax over data that come in chunks.

    Parameters
    ----------
    axis : int, tuple of ints or None, optional
        The axes over which the probabilities sum to 1, as for `softmax`. Chunks may differ in length along these; the
        other axes enumerate the rows, each with a state of its own. None, the default, means all axes.
    backend : {"cython", "numba", "numpy"}, optional
        Force a backend; by default the fastest that fits is chosen for each chunk.

    Raises
    ------
    TypeError
        If ``axis`` is not made of integers.
    ValueError
        If an axis is repeated; if ``backend`` is unknown.

    Notes
    -----
    The state is five float64 numbers for each row, whatever has been seen. It is folded by the kernels of `logsumexp`,
    which keep the maximum out of the sum and carry what additions round off: results are within 2 ULP however the data
    are cut. An accumulator can be copied and pickled, to be merged in another process. (M. Milakov, N. Gimelshein,
    *Online normalizer calculation for softmax*, arXiv 1805.02867.)

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import OnlineSoftmax, softmax
    >>> x = np.random.default_rng(0).normal(size=(4, 1000))
    >>> online = OnlineSoftmax(axis=1)
    >>> for chunk in np.split(x, 5, axis=1):
    ...     online = online.update(chunk)
    >>> bool(np.allclose(online.normalize(x[:, :10]), softmax(x, axis=1)[:, :10], rtol=1e-15))
    True
    """

    def __init__(self, axis: int | tuple[int, ...] | None = None, *, backend: str | None = None) -> None:
        normalize_axes(axis, _MAX_DIMENSIONS)
        forced_backend(backend)
        self._axis = tuple(axis) if isinstance(axis, list) else axis
        self._backend = backend
        # Set by the first chunk; later ones must agree.
        self._dtype: np.dtype[Any] | None = None
        self._shape: tuple[int, ...] = ()
        self._states: Array = np.empty((0, 5))

    def __repr__(self) -> str:
        seen = "nothing folded" if self._dtype is None else f"{self._dtype}, rows of shape {self._shape}"
        return f"<OnlineSoftmax over axis {self._axis}: {seen}>"

    def update(self, chunk: ArrayLike) -> OnlineSoftmax:
        """Fold a chunk of the data into the state.

        Parameters
        ----------
        chunk : array_like
            Logits of any real dtype but long double. Its rows, which are the axes that are not summed over, must have
            the shape of those before it; so must its dtype be theirs.

        Returns
        -------
        OnlineSoftmax
            Itself.

        Raises
        ------
        TypeError
            If ``chunk`` does not hold real numbers of up to 64 bits, is a masked array or on a CUDA device, or is of
            another dtype than those before it.
        ValueError
            If its rows are not of the shape of those before it.
        numpy.exceptions.AxisError
            If it does not have the axis.
        """
        values, axes, shape = self._rows_of(chunk)
        states = self._states.copy() if self._dtype is not None else _state.identities(math.prod(shape))
        if values.size:
            working, _ = _dtypes(values.dtype, "softmax")
            module = select_for("OnlineSoftmax", working, values.size, self._backend)
            data = readable(values, _read_as(module, values, working))
            execute_states(module, "fold_states", make_layout(data, axes, data, in_order=True), data, None, states)
        self._dtype, self._shape, self._states = _native(values.dtype), shape, states
        return self

    def merge(self, other: OnlineSoftmax) -> OnlineSoftmax:
        """Take in all that another accumulator has seen.

        Parameters
        ----------
        other : OnlineSoftmax
            Of the same axis, dtype and shape of rows; it stays as it is.

        Returns
        -------
        OnlineSoftmax
            Itself.

        Raises
        ------
        TypeError
            If ``other`` is not an OnlineSoftmax, or has seen chunks of another dtype.
        ValueError
            If its axis or the shape of its rows is another.
        """
        if not isinstance(other, OnlineSoftmax):
            raise TypeError(f"other must be an OnlineSoftmax, not {type(other).__name__}")
        if other._axis != self._axis:
            raise ValueError(f"other must be over axis {self._axis}, not {other._axis}")
        if other._dtype is None:
            return self
        if self._dtype is None:
            self._dtype, self._shape, self._states = other._dtype, other._shape, other._states
            return self
        self._check("other", other._dtype, other._shape)
        working, _ = _dtypes(self._dtype, "softmax")
        states = self._states.copy()
        select_for("OnlineSoftmax", working, states.size, self._backend).merge_states(
            states, other._states, working.itemsize == 4
        )
        self._states = states
        return self

    def logsumexp(self) -> Any:
        """Compute the logarithm of the sum of the exponentials of all that was seen.

        Returns
        -------
        ndarray or scalar
            One number for each row, in the dtype that `fastsoftmax.logsumexp` would give.

        Raises
        ------
        ValueError
            If no chunk was seen, so that the shape of the rows is not known.
        """
        working, dtype = _dtypes(self._seen_dtype(), "logsumexp")
        module = select_for("OnlineSoftmax", working, self._states.size, self._backend)
        log_sums = module.logsumexp_of_states(self._states, working.itemsize == 4)
        return _deliver(log_sums.reshape(self._shape), None, dtype)

    def normalize(self, chunk: ArrayLike, out: Array | None = None) -> Any:
        """Compute the probabilities of a chunk in the whole: ``exp(chunk - logsumexp())``.

        Parameters
        ----------
        chunk : array_like
            Logits, as for `update`. They need not have been seen; the probability of one that was not may be above 1.
        out : ndarray, optional
            Where to write the result; it must have the shape of ``chunk`` and the dtype of the result. It may be
            ``chunk``.

        Returns
        -------
        ndarray or scalar
            Probabilities, in the shape and memory order of ``chunk``; dtypes as for `softmax`.

        Raises
        ------
        TypeError, ValueError, numpy.exceptions.AxisError
            As for `update`; if ``out`` has the wrong shape or dtype or cannot be written; if no chunk was seen.
        """
        self._seen_dtype()
        values, axes, _ = self._rows_of(chunk)
        working, dtype = _dtypes(values.dtype, "softmax")
        module = select_for("OnlineSoftmax", working, values.size, self._backend)
        if out is not None:
            _check_out(out, values.shape, dtype)
        storage = _read_as(module, values, working)
        data = readable(values, storage)
        shared = out is not None and np.may_share_memory(data, out)
        in_place = out is not None and shared and _is_same_view(data, out)
        if out is not None and _is_writable_as(out, storage) and (in_place or not shared):
            target = out
        else:
            target, in_place = empty_like(values, storage), False
        if target.size:
            layout = make_layout(data, axes, target, in_order=True)
            execute_states(module, "normalize", layout, data, target, self._states, in_place)
        return _deliver(target, out, dtype)

    def _rows_of(self, chunk: ArrayLike) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
        """Return a chunk as an array, the axes that it is summed over, and the shape of its rows."""
        values = _real_numbers(chunk, "chunk")
        if values.dtype.itemsize > 8:
            raise TypeError(f"chunk must hold numbers of up to 64 bits, not {values.dtype}")
        axes = normalize_axes(self._axis, values.ndim)
        shape = tuple(size for axis, size in enumerate(values.shape) if axis not in axes)
        if self._dtype is not None:
            self._check("chunk", _native(values.dtype), shape)
        return values, axes, shape

    def _check(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Refuse an argument that does not agree with what was seen."""
        if dtype != self._dtype:
            raise TypeError(f"{name} must be of dtype {self._dtype}, as what was seen, not {dtype}")
        if shape != self._shape:
            raise ValueError(f"{name} must have rows of shape {self._shape}, as what was seen, not {shape}")

    def _seen_dtype(self) -> np.dtype[Any]:
        if self._dtype is None:
            raise ValueError("no chunk was seen, so the rows have no shape yet: call update first")
        return self._dtype


def merge_states(a: OnlineSoftmax, b: OnlineSoftmax) -> OnlineSoftmax:
    """Return the state of all that two accumulators have seen: to states what `numpy.logaddexp` is to logarithms.

    Parameters
    ----------
    a, b : OnlineSoftmax
        Of the same axis, dtype and shape of rows; they stay as they are.

    Returns
    -------
    OnlineSoftmax
        A new one, of the backend of ``a``. The order matters to rounding only.

    Raises
    ------
    TypeError, ValueError
        If one of them is not an OnlineSoftmax, or they do not agree: as for `OnlineSoftmax.merge`.

    Examples
    --------
    >>> from fastsoftmax import OnlineSoftmax, merge_states
    >>> a, b = OnlineSoftmax().update([1.0, 2.0]), OnlineSoftmax().update([3.0])
    >>> merge_states(a, b).normalize([1.0, 2.0, 3.0]).round(3)
    array([0.09 , 0.245, 0.665])
    """
    if not isinstance(a, OnlineSoftmax):
        raise TypeError(f"a must be an OnlineSoftmax, not {type(a).__name__}")
    if not isinstance(b, OnlineSoftmax):
        raise TypeError(f"b must be an OnlineSoftmax, not {type(b).__name__}")
    return copy.copy(a).merge(b)


_MAX_DIMENSIONS = 64  # of NumPy's arrays


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("=")
