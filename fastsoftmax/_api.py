"""The public functions: check the arguments, lay the data out as rows, select a backend, run it.

No function here loops over data. What each returns for every kind of input is stated in docs/semantics.md.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from numbers import Real
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastsoftmax import _dispatch
from fastsoftmax._dispatch import (
    Adjustment,
    BackendModule,
    Function,
    execute,
    execute_adjusted,
    execute_weighted,
    is_on_gpu,
    select,
    select_on_gpu,
)
from fastsoftmax._layout import Array, make_layout, normalize_axes, readable
from fastsoftmax._outputs import empty_like
from fastsoftmax._remembered import remember, request_of, run_remembered

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)


def softmax(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = None,
    *,
    out: Array | None = None,
    where: ArrayLike | None = None,
    temperature: float = 1.0,
    dtype: DTypeLike | None = None,
    backend: str | None = None,
) -> Any:
    """Compute the softmax: ``exp(x) / sum(exp(x), axis)``.

    A drop-in for `scipy.special.softmax`.

    Parameters
    ----------
    x : array_like
        Logits of any shape and any real or complex dtype; or an array on a CUDA device, see docs/gpu.md.
    axis : int, tuple of ints or None, optional
        The axes over which the probabilities sum to 1. None, the default, means all of them, as in SciPy.
    out : ndarray, optional
        Where to write the result; it must have the shape of ``x`` and the dtype of the result. It may be ``x``.
    where : array_like of bool, optional
        Which elements count; it broadcasts to ``x``. The others are taken for -inf, whatever they are; their
        probabilities are 0.
    temperature : float, optional
        What ``x`` is divided by before anything else: positive and finite. The quotients are not rounded.
    dtype : dtype, optional
        A floating or complex dtype: ``x`` is converted to it (float16 and bfloat16 are computed in float32), and the
        result has it.
    backend : {"cython", "numba", "numpy", "cuda"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        Probabilities, in the shape and memory order of ``x``. Floating dtypes are kept; integers of 8, 16 and more
        bits give float16, float32 and float64, computed in float64. Of a row where nothing counts, they are 0.

    Raises
    ------
    TypeError
        If ``x`` does not hold numbers, or ``where`` not bool; if ``axis`` is not made of integers; if ``temperature``
        is not a number; if ``dtype`` is not floating or complex; if ``out`` is not an array of the result's dtype.
    ValueError
        If ``where`` does not broadcast to ``x``; if ``temperature`` is not positive and finite; if ``out`` has the
        wrong shape or cannot be written; if an axis is repeated; if ``backend`` is unknown.
    numpy.exceptions.AxisError
        If an axis is out of range.
    BackendUnavailableError
        If ``backend`` cannot run here.

    Notes
    -----
    The running maximum and sum are found in one pass (Milakov and Gimelshein, arXiv 1805.02867), with the maximum
    carried as an exponent of two (Dukhan and Ablavatski, arXiv 2001.04438), which makes rescaling exact. A row with a
    NaN or +inf, or of nothing but -inf, is NaN throughout, but for what ``where`` leaves out. A masked array counts as
    ``where=~mask``, together with the ``where`` that is given.

    Examples
    --------
    >>> from fastsoftmax import softmax
    >>> softmax([[0.0, 0.0], [1000.0, 0.0]], axis=1)
    array([[0.5, 0.5],
           [1. , 0. ]])
    >>> softmax([2.0, 1.0, 9.0], where=[True, True, False], temperature=0.5).round(3)
    array([0.881, 0.119, 0.   ])
    """
    direct = _dispatch.direct_calls
    if direct is not None:
        result = direct.direct_softmax(x, axis, out, where, temperature, dtype, backend)
        if result is not None:
            return result
    return _map_rows("softmax", x, axis, out, where, temperature, dtype, backend)


def log_softmax(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = None,
    *,
    out: Array | None = None,
    where: ArrayLike | None = None,
    temperature: float = 1.0,
    dtype: DTypeLike | None = None,
    backend: str | None = None,
) -> Any:
    """Compute the logarithm of the softmax: ``x - logsumexp(x, axis)``.

    A drop-in for `scipy.special.log_softmax`; finite where ``log(softmax(x))`` underflows to -inf.

    Parameters
    ----------
    x : array_like
        Logits of any shape and any real or complex dtype; or an array on a CUDA device, see docs/gpu.md.
    axis : int, tuple of ints or None, optional
        The axes over which the probabilities sum to 1. None, the default, means all of them, as in SciPy.
    out : ndarray, optional
        Where to write the result; it must have the shape of ``x`` and the dtype of the result. It may be ``x``.
    where : array_like of bool, optional
        Which elements count; it broadcasts to ``x``. The others are taken for -inf, whatever they are; their
        log-probabilities are -inf.
    temperature : float, optional
        What ``x`` is divided by before anything else: positive and finite. The quotients are not rounded.
    dtype : dtype, optional
        A floating or complex dtype: ``x`` is converted to it (float16 and bfloat16 are computed in float32), and the
        result has it.
    backend : {"cython", "numba", "numpy", "cuda"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    ndarray or scalar
        Log-probabilities, in the shape and memory order of ``x``; dtypes as for `softmax`. Of a row where nothing
        counts, they are -inf.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, BackendUnavailableError
        As for `softmax`.

    Notes
    -----
    Computed as ``(x - m) - log(d)`` with the row's maximum ``m`` and ``d = sum(exp(x - m))``: both terms are at most
    zero, so nothing cancels. The maximum itself is kept out of the sum, so that ``log(d)`` is exact near ``d = 1``.

    Examples
    --------
    >>> from fastsoftmax import log_softmax
    >>> log_softmax([1000.0, 0.0])
    array([    0., -1000.])
    >>> log_softmax([1000.0, 0.0, 0.0], temperature=1000.0, where=[True, True, False]).round(3)
    array([-0.313, -1.313,   -inf])
    """
    direct = _dispatch.direct_calls
    if direct is not None:
        result = direct.direct_log_softmax(x, axis, out, where, temperature, dtype, backend)
        if result is not None:
            return result
    return _map_rows("log_softmax", x, axis, out, where, temperature, dtype, backend)


@overload
def logsumexp(
    a: ArrayLike,
    axis: int | tuple[int, ...] | None = ...,
    b: ArrayLike | None = ...,
    keepdims: bool = ...,
    return_sign: Literal[False] = ...,
    *,
    out: Array | None = ...,
    where: ArrayLike | None = ...,
    temperature: float = ...,
    dtype: DTypeLike | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def logsumexp(
    a: ArrayLike,
    axis: int | tuple[int, ...] | None = ...,
    b: ArrayLike | None = ...,
    keepdims: bool = ...,
    *,
    return_sign: Literal[True],
    out: Array | None = ...,
    where: ArrayLike | None = ...,
    temperature: float = ...,
    dtype: DTypeLike | None = ...,
    backend: str | None = ...,
) -> tuple[Any, Any]: ...
def logsumexp(
    a: ArrayLike,
    axis: int | tuple[int, ...] | None = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    *,
    out: Array | None = None,
    where: ArrayLike | None = None,
    temperature: float = 1.0,
    dtype: DTypeLike | None = None,
    backend: str | None = None,
) -> Any:
    """Compute the logarithm of the sum of exponentials: ``log(sum(b * exp(a), axis))``.

    A drop-in for `scipy.special.logsumexp`.

    Parameters
    ----------
    a : array_like
        Exponents of any shape and any real or complex dtype; or an array on a CUDA device, see docs/gpu.md.
    axis : int, tuple of ints or None, optional
        The axes to sum over. None, the default, means all of them.
    b : array_like, optional
        Factors that broadcast with ``a``; they may be negative. A zero drops its term, even where ``a`` is infinite
        or NaN.
    keepdims : bool, optional
        Keep the summed axes with length 1.
    return_sign : bool, optional
        Also return the sign of the sum, so that a negative sum has a real logarithm.
    out : ndarray, optional
        Where to write the result; it must have the shape and the dtype of the result.
    where : array_like of bool, optional
        Which elements count; it broadcasts to ``a``. The others are taken for -inf, whatever they are.
    temperature : float, optional
        What ``a`` is divided by before anything else: positive and finite. The quotients are not rounded, but beside
        ``b``.
    dtype : dtype, optional
        A floating or complex dtype: ``a`` is converted to it (float16 and bfloat16 are computed in float32), and the
        result has it.
    backend : {"cython", "numba", "numpy", "cuda"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    res : ndarray or scalar
        The logarithm of the sum, or of its absolute value where ``return_sign`` is given; NaN where the sum is
        negative and it is not. Integers give float64.
    sgn : ndarray or scalar
        Only with ``return_sign``: the sign of the sum, 0 for an empty or zero sum; for complex input its phase.

    Raises
    ------
    TypeError
        If ``a`` or ``b`` does not hold numbers, or ``where`` not bool; if ``b`` is a masked array; if ``axis`` is not
        made of integers; if ``temperature`` is not a number; if ``dtype`` is not floating or complex; if ``out`` is
        not an array of the result's dtype.
    ValueError
        If ``a`` and ``b`` do not broadcast, or ``where`` to ``a``; if ``temperature`` is not positive and finite; if
        ``out`` has the wrong shape or cannot be written; if an axis is repeated; if ``backend`` is unknown.
    numpy.exceptions.AxisError
        If an axis is out of range.
    BackendUnavailableError
        If ``backend`` cannot run here.

    Notes
    -----
    One pass; the maximum is kept out of the sum, so that the result is accurate near 0 as well.

    Examples
    --------
    >>> from fastsoftmax import logsumexp
    >>> float(logsumexp([0.0, -40.0]))
    4.248354255291589e-18
    >>> logsumexp([1.0, 1.0], b=[1.0, -2.0], return_sign=True)
    (np.float64(1.0), np.float64(-1.0))
    >>> float(logsumexp([0.0, 0.0, float("nan")], where=[True, True, False], temperature=2.0))
    0.6931471805599453
    """
    direct = _dispatch.direct_calls
    if direct is not None and b is None and not (keepdims or return_sign):
        result = direct.direct_logsumexp(a, axis, out, where, temperature, dtype, backend)
        if result is not None:
            return result
    is_usual = b is None and not (keepdims or return_sign)
    request = request_of("logsumexp", a, axis, out, where, temperature, dtype, backend) if is_usual else None
    if (result := run_remembered(request, a, out)) is not None:
        return result
    if not isinstance(a, np.ndarray) and is_on_gpu(a):
        _refuse_on_gpu("logsumexp", where, temperature, dtype)
        module = select_on_gpu(backend)
        if b is not None or return_sign:
            return module.compute_weighted(a, axis, b, out, keepdims, return_sign)
        return module.compute("logsumexp", a, axis, out, keepdims, name="a")
    terms, mask = _numbers_and_mask(a, "a", where)
    factors = None if b is None else _numbers(b, "b")
    temperature = _check_temperature(temperature)
    asked = None if dtype is None else _check_dtype(dtype, terms, "a")
    if asked is not None and factors is not None:
        _check_dtype(asked, factors, "b")
    elif factors is not None:
        asked = _common_dtype("a", a, terms, "b", b, factors)
    working, result_dtype = _dtypes(terms.dtype if asked is None else asked, "logsumexp")
    working = _wide_enough(working, temperature)
    shape = terms.shape if factors is None else _broadcast_shape(terms, factors)
    module = select(working, prod(shape), backend)
    reading, writing = _read_and_written_as(module, terms.dtype, working, result_dtype)
    if factors is not None:  # converted, where no kernel reads them, before they are repeated
        factors = readable(factors, _read_and_written_as(module, factors.dtype, working, result_dtype)[0])
        terms, factors = np.broadcast_to(readable(terms, reading), shape), np.broadcast_to(factors, shape)
        mask = None if mask is None else np.broadcast_to(mask, shape)
    axes = normalize_axes(axis, terms.ndim)
    shape = _reduced_shape(terms.shape, axes, keepdims)
    log_dtype = np.empty(0, result_dtype).real.dtype if return_sign else result_dtype
    if out is not None:
        _check_out(out, shape, log_dtype)
    is_adjusted = factors is not None or _is_converted(module, working, reading, writing)
    adjustment = _adjustment(module, mask, temperature, working, is_adjusted, out)
    log_sum, sign = _log_sums_with_signs(shape, writing) if factors is not None and return_sign else (None, None)
    if log_sum is None:
        is_direct = out is not None and _is_writable_as(out, writing) and not _shares_memory(out, terms, factors)
        log_sum = out if out is not None and is_direct else np.empty(shape, writing)
    if terms.size == 0:
        log_sum.fill(-np.inf)
    else:
        data = readable(terms, reading)
        rows = log_sum if keepdims else np.expand_dims(log_sum, axes) if terms.ndim else log_sum
        layout = make_layout(data, axes, rows, factors, None if adjustment is None else adjustment.mask)
        if adjustment is None:
            execute(module, "logsumexp", layout, data, rows)
            remember(request, module, "logsumexp", layout, a, data, out, log_sum)
        elif factors is None:
            execute_adjusted(module, "logsumexp", layout, data, rows, adjustment)
        else:
            execute_weighted(module, layout, data, rows, factors, sign, adjustment)
    if not return_sign:
        return _deliver(log_sum, out, result_dtype)
    if sign is None:
        sign = _sign_of_positive_sum(log_sum)
    return _deliver(log_sum.real, out, log_dtype), _deliver(sign, None, result_dtype)


def _map_rows(
    function: Function,
    x: ArrayLike,
    axis: Any,
    out: Array | None,
    where: ArrayLike | None,
    temperature: float,
    dtype: DTypeLike | None,
    backend: str | None,
) -> Any:
    """Run a function whose output has the shape of its input."""
    request = request_of(function, x, axis, out, where, temperature, dtype, backend)
    if (served := run_remembered(request, x, out)) is not None:
        return served
    if not isinstance(x, np.ndarray) and is_on_gpu(x):
        _refuse_on_gpu(function, where, temperature, dtype)
        return select_on_gpu(backend).compute(function, x, axis, out)
    logits, mask = _numbers_and_mask(x, "x", where)
    axes = normalize_axes(axis, logits.ndim)
    temperature = _check_temperature(temperature)
    working, result = _dtypes(logits.dtype if dtype is None else _check_dtype(dtype, logits, "x"), function)
    working = _wide_enough(working, temperature)
    module = select(working, logits.size, backend)
    reading, writing = _read_and_written_as(module, logits.dtype, working, result)
    is_converted = _is_converted(module, working, reading, writing)
    if function == "softmax_one" and is_converted:  # no backend converts for it
        reading, writing, is_converted = working, working, False
    if out is not None:
        _check_out(out, logits.shape, result)
    adjustment = _adjustment(module, mask, temperature, working, is_converted, out)
    data = readable(logits, reading)
    shared = out is not None and np.may_share_memory(data, out)
    in_place = out is not None and shared and _is_same_view(data, out)
    if out is not None and _is_writable_as(out, writing) and (in_place or not shared):
        target = out
    else:
        target, in_place = empty_like(logits, writing), False
    if target.size and adjustment is not None:
        layout = make_layout(data, axes, target, mask=adjustment.mask)
        execute_adjusted(module, function, layout, data, target, adjustment)
    elif target.size:
        layout = make_layout(data, axes, target)
        execute(module, function, layout, data, target, in_place)
        remember(request, module, function, layout, x, data, out, target)
    return _deliver(target, out, result)


def _refuse_on_gpu(function: str, where: object, temperature: object, dtype: object) -> None:
    refused = [
        ("where", where is not None, "set what does not count to -inf first"),
        ("temperature", temperature != 1, "divide by it first"),
        ("dtype", dtype is not None, "convert the array first"),
    ]
    for name, is_given, instead in refused:
        if is_given:
            raise TypeError(f"{function} of an array on a CUDA device takes no {name}: {instead}")


def _numbers_and_mask(value: ArrayLike, name: str, where: ArrayLike | None) -> tuple[Array, Array | None]:
    """Return ``value`` as an array of numbers, and which of them count, in its shape; None if all do.

    What a masked array masks does not count.
    """
    mask = None
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.getmask(value) is not np.ma.nomask:
            mask = ~np.ma.getmaskarray(value)
        value = value.data
    array = _numbers(value, name)
    if where is not None:
        if isinstance(where, np.ma.MaskedArray):
            raise TypeError("where must not be a masked array")
        asked = np.asarray(where)
        if asked.dtype != np.bool_:
            raise TypeError(f"where must hold bool, not {asked.dtype}")
        asked = _broadcast_mask(asked, array.shape, name)
        mask = asked if mask is None else mask & asked
    return array, mask


def _broadcast_mask(mask: Array, shape: tuple[int, ...], name: str) -> Array:
    if mask.shape == shape:
        return mask
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"where of shape {mask.shape} does not broadcast to {name} of shape {shape}") from None


def _check_temperature(temperature: object) -> float:
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        raise TypeError(f"temperature must be a real number, not {temperature!r}")
    try:
        value = float(temperature)
    except OverflowError:
        value = np.inf
    if not 0 < value < np.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature!r}")
    return value


def _wide_enough(working: np.dtype[Any], temperature: float) -> np.dtype[Any]:
    """Return the dtype in whose range quotients by a temperature can be taken apart."""
    return _FLOAT64 if working == _FLOAT32 and not 2.0**-100 <= temperature <= 2.0**100 else working


def _check_dtype(dtype: DTypeLike, x: Array, name: str) -> np.dtype[Any]:
    """Return the dtype that is asked for, if numbers of ``x`` can be computed in it."""
    try:
        asked = np.dtype(dtype)
        asked = asked if asked.isnative else asked.newbyteorder("=")
    except (TypeError, ValueError):
        raise TypeError(f"dtype must be a floating or complex type, not {dtype!r}") from None
    if not _is_inexact(asked):
        raise TypeError(f"dtype must be a floating or complex type, not {asked}")
    if x.dtype.kind == "c" and asked.kind != "c":
        raise TypeError(f"dtype {asked} does not hold {name} of dtype {x.dtype}")
    return asked


def _adjustment(
    module: BackendModule,
    mask: Array | None,
    temperature: float,
    working: np.dtype[Any],
    is_adjusted: bool,
    out: Array | None,
) -> Adjustment | None:
    """Return what a backend has to do to the elements, or None; refuse the backend that cannot.

    It has something to do where there is a mask or a temperature, or where it ``is_adjusted`` anyhow.
    """
    is_changed = mask is not None or temperature != 1
    if not (is_changed or is_adjusted):
        return None
    if is_changed and not hasattr(module, "run_adjusted"):
        raise TypeError(f"backend 'cuda' takes no {'where' if mask is not None else 'temperature'}")
    if mask is not None and out is not None and np.may_share_memory(mask, out):
        mask = mask.copy()
    return Adjustment(mask, temperature, working)


def _common_dtype(a_name: str, a: object, terms: Array, b_name: str, b: object, factors: Array) -> np.dtype[Any]:
    """Return the dtype that a and b combine to; a Python number takes that of the other, as everywhere in NumPy."""
    operands = [
        value if type(value) is complex else _dtypes(array.dtype, "logsumexp")[1]
        for value, array in ((a, terms), (b, factors))
        if type(value) not in (bool, int, float)
    ]
    try:
        return np.result_type(*operands or [_FLOAT64])
    except TypeError:
        message = f"{b_name} of dtype {factors.dtype} does not combine with {a_name} of dtype {terms.dtype}"
        raise TypeError(message) from None


def _broadcast_shape(terms: Array, factors: Array) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(terms.shape, factors.shape)
    except ValueError:
        raise ValueError(f"b of shape {factors.shape} does not broadcast with a of shape {terms.shape}") from None


def _log_sums_with_signs(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return two arrays of the same strides, zeros."""
    pair = np.zeros((2, *shape), dtype)
    return pair[0, ...], pair[1, ...]


def _reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    if keepdims:
        return tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _sign_of_positive_sum(log_sum: Array) -> Array:
    """Return the sign of a sum of exponentials from its logarithm: 0 if it is empty, else 1 (or its phase, or NaN)."""
    phase = np.exp(1j * log_sum.imag) if np.iscomplexobj(log_sum) else np.where(np.isnan(log_sum), log_sum, 1.0)
    return np.where(log_sum.real == -np.inf, 0.0, phase)


def _numbers(value: ArrayLike, name: str) -> Array:
    """Return ``value`` as an array of numbers, or raise a TypeError that names the argument."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; fill what is masked first: {name}.filled(-inf) leaves it out")
    if not isinstance(value, np.ndarray) and is_on_gpu(value):
        raise TypeError(f"{name} is on a CUDA device, where this is not computed with it: copy it to main memory first")
    array = np.asarray(value)
    if array.dtype.kind not in "iub" and not _is_inexact(array.dtype):
        raise TypeError(f"{name} must hold numbers, not {array.dtype}")
    return array


def _is_inexact(dtype: np.dtype[Any]) -> bool:
    """Whether it is a floating or complex dtype that is computed in; those of 8 bits are not."""
    return (dtype.kind in "fc" and dtype.itemsize > 1) or dtype.name == "bfloat16"


def _dtypes(dtype: np.dtype[Any], function: Function) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Return the dtype to compute in and the dtype of the result."""
    if dtype.kind in "iub":
        # SciPy's result, but computed in float64: in the integers' own arithmetic x - max(x) wraps around.
        narrow: dict[int, np.dtype[Any]] = {1: np.dtype(np.float16), 2: _FLOAT32}
        return _FLOAT64, _FLOAT64 if function == "logsumexp" else narrow.get(dtype.itemsize, _FLOAT64)
    native = dtype.newbyteorder("=") if not dtype.isnative else dtype
    return (_FLOAT32, native) if dtype.itemsize == 2 else (native, native)


def _read_as(module: BackendModule, x: Array, working: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that a backend reads ``x`` in: its own, or the one that is computed in."""
    # Looking up the name of a dtype takes longer than a short row.
    is_read = x.dtype.itemsize == 2 and x.dtype.name in module.READS
    return x.dtype.newbyteorder("=") if is_read else working


@lru_cache(maxsize=1024)
def _is_among(dtype: np.dtype[Any], names: frozenset[str]) -> bool:
    """Whether a dtype has one of these names; remembered, for looking it up takes longer than a short row."""
    return dtype.name in names


def _read_and_written_as(
    module: BackendModule, given: np.dtype[Any], working: np.dtype[Any], result: np.dtype[Any]
) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Return the dtypes in which a backend reads elements and writes results: their own, or what is computed in."""
    native = given if given.isnative else given.newbyteorder("=")
    if native == result and working == _FLOAT32 and _is_among(native, module.READS):
        return native, native
    return (native, result) if _is_among(native, module.CONVERTS) else (working, working)


def _is_converted(
    module: BackendModule, working: np.dtype[Any], reading: np.dtype[Any], writing: np.dtype[Any]
) -> bool:
    """Whether elements are converted on their way, and not by kernels that are made for them."""
    return reading != writing or (reading != working and not _is_among(reading, module.READS))


def _check_out(out: object, shape: tuple[int, ...], dtype: np.dtype[Any], name: str = "out") -> None:
    """Refuse an ``out`` (called ``name``) that cannot take a result of ``shape`` and ``dtype``."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, not {type(out).__name__}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array")
    if out.dtype != dtype and out.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, not {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {out.shape}")
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only")
    if not out.flags.c_contiguous and out.size and _overlaps_itself(out):
        raise ValueError(f"{name} has elements that share memory with others of its own")


def _overlaps_itself(out: Array) -> bool:
    """Whether two elements of an array share a byte: those of a broadcast view do, or of some made by `as_strided`."""
    extent = out.itemsize
    for stride, size in sorted((abs(stride), size) for size, stride in zip(out.shape, out.strides, strict=True)):
        if size > 1 and stride < extent:
            break
        extent += stride * (size - 1)
    else:
        return False
    # Dimensions that do not lie one inside the other may still miss each other's elements.
    offsets = np.zeros(1, np.intp)
    for size, stride in zip(out.shape, out.strides, strict=True):
        if size > 1 and abs(stride) < out.itemsize:
            return True
        offsets = np.add.outer(offsets, np.arange(size) * stride).ravel()
    offsets.sort()
    return bool((np.diff(offsets) < out.itemsize).any())


def _is_writable_as(out: Array, dtype: DTypeLike) -> bool:
    """Whether kernels that compute in ``dtype`` can write to ``out`` directly."""
    return out.dtype == dtype and out.flags.aligned


def _shares_memory(out: Array, *inputs: Array | None) -> bool:
    return any(array is not None and np.may_share_memory(out, array) for array in inputs)


def _is_same_view(x: Array, out: Array) -> bool:
    return x.ctypes.data == out.ctypes.data and x.strides == out.strides and x.dtype == out.dtype


def _deliver(target: Array, out: Array | None, dtype: np.dtype[Any]) -> Any:
    """Return the result in ``out`` or in ``dtype``; a scalar for 0 dimensions."""
    if out is None and target.dtype == dtype:
        return target if target.ndim else target[()]
    if target is out:
        return out
    with np.errstate(all="ignore"):  # a float16 that overflows to -inf is the right log-probability
        if out is None:
            converted = target.astype(dtype)
            return converted if converted.ndim else converted[()]
        np.copyto(out, target, casting="unsafe")
    return out
