"""The CUDA backend: arrays on a GPU where they lie, and arrays in main memory by way of a copy.

The kernels are in `fastsoftmax.cuda`. Here calls become launches: what is the same for all calls with equal shapes,
strides and alignments is prepared once and remembered.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from numbers import Real
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from numpy.lib.stride_tricks import as_strided

if find_spec("numba_cuda") is None:
    raise ImportError("the cuda backend needs the numba-cuda package: pip install 'fastsoftmax[cuda]'")

from numba import cuda

if not cuda.is_available():
    reason = " ".join(str(cuda.cuda_error() or "none is visible").split())
    raise ImportError(f"no CUDA device can be used: {reason}")

from fastsoftmax._dispatch import Function, Plan, choices, is_on_gpu
from fastsoftmax._layout import Array, Dimension, Layout, c_order_layout, make_layout, normalize_axes
from fastsoftmax._schedule import Schedule
from fastsoftmax.cuda import _launch
from fastsoftmax.cuda._arrays import Library, View, borrow, hand_back, is_immutable, library_of
from fastsoftmax.cuda._functions import Kernel, n_inputs
from fastsoftmax.cuda._plan import VECTOR_BYTES, LaunchPlan, choose, choose_weighted
from fastsoftmax.cuda._vectors import FORMATS

READS: frozenset[str] = frozenset({"float16", "bfloat16"})
CONVERTS: frozenset[str] = frozenset()

# Prepared calls that are remembered; one is a few kilobytes.
_REMEMBERED = 4096


class _Known(NamedTuple):
    """What a call like an earlier one needs.

    Of the result its shape (None: that of the input), how many elements after a boundary it begins, and so its
    alignment; the plan, and the launches. Of each array the bytes it reaches before and after its first element, and
    whether the output may be the very inputs.
    """

    shape: tuple[int, ...] | None
    offset: int
    alignment: int
    plan: Plan
    prepared: _launch.Prepared
    x_extent: tuple[int, int]
    y_extent: tuple[int, int]
    g_extent: tuple[int, int]
    is_x_replaceable: bool
    is_g_replaceable: bool

    def may_write(self, y: int, x: int, g: int) -> bool:
        """Whether results may be written to an address while inputs at others are read."""
        begin, end = y + self.y_extent[0], y + self.y_extent[1]
        (x_begin, x_end), (g_begin, g_end) = self.x_extent, self.g_extent
        is_apart_from_x = end <= x + x_begin or x + x_end <= begin or (y == x and self.is_x_replaceable)
        return is_apart_from_x and (end <= g + g_begin or g + g_end <= begin or (y == g and self.is_g_replaceable))


# By everything that distinguishes calls but addresses: looking up what is asked of the library as it stands takes 1 us
# for each array, asking for views and laying them out anew 40.
_known: dict[Hashable, _Known] = {}


def compute(
    kernel: Kernel, x: Any, axis: Any, out: Any = None, keepdims: bool = False, g: Any = None, name: str = "x"
) -> Any:
    """Compute a function of an array on a GPU; the result is an array of the same library, on the same device.

    Parameters
    ----------
    kernel : str
        The function.
    x : array
        Its input, of float16, bfloat16, float32 or float64: for the vector-Jacobian products of softmax and log_softmax
        their output, for that of logsumexp its input.
    axis : int, tuple of ints or None
        The axes that are reduced.
    out : array, optional
        Where to write the result, of the same library, device and dtype.
    keepdims : bool
        Whether the result of logsumexp, or the gradient with respect to it, keeps the reduced axes.
    g : array, optional
        The gradient with respect to the output, for a vector-Jacobian product.
    name : str
        What errors call ``x``.
    """
    library = library_of(type(x))  # type: ignore[arg-type]  # mypy has types that are not hashable
    if library is None:
        if is_immutable(out):
            raise TypeError(f"out is an array of {type(out).__name__}, which must not be written to")
        borrowed = [None if array is None else borrow(array) for array in (x, out, g)]
        result = compute(kernel, borrowed[0], axis, borrowed[1], keepdims, borrowed[2], name)
        return hand_back(x, result) if out is None else out
    with library.on_device_of(x):
        address = library.address(x)
        key: Hashable = None
        if type(axis) is int or axis is None:
            known_by = kernel, axis, keepdims, library.form(x), address % VECTOR_BYTES, library.device(x)
            key = known_by if out is None and g is None else _longer_key(known_by, library, x, out, g)
        if (known := _known.get(key)) is None:
            return _compute(library, kernel, x, axis, out, keepdims, g, name, key)
        g_address = address if g is None else library.address(g)
        result = library.empty(x, known.shape, known.offset) if out is None else out
        y_address = library.address(result)
        may_write = out is None or known.may_write(y_address, address, g_address)
        if y_address % VECTOR_BYTES != known.alignment or not may_write:
            return _compute(library, kernel, x, axis, result, keepdims, g, name)
        known.prepared.run({"x": address, "y": y_address, "g": g_address}, library.stream(x))
        if (plans := choices.get().plans) is not None:
            plans.append(known.plan)
        return result


def _longer_key(key: tuple[Hashable, ...], library: Library, x: Any, out: Any, g: Any) -> Hashable:
    """Return a key with what distinguishes an output and a gradient; None if they do not go together with x."""
    for array in (out, g):
        if array is None:
            key += (None,)
        elif _are_together(library, x, array):
            key += library.form(array), library.address(array) % VECTOR_BYTES
        else:
            return None
    return key


def _compute(
    library: Library,
    kernel: Kernel,
    x: Any,
    axis: Any,
    out: Any,
    keepdims: bool,
    g: Any,
    name: str,
    key: Hashable = None,
) -> Any:
    """Check, lay out and compute; remember the call under a key, if there is one."""
    view = library.view(x)
    if view.dtype not in FORMATS:
        raise TypeError(f"{name} on a CUDA device must be one of {', '.join(FORMATS)}, not {view.dtype}")
    axes = normalize_axes(axis, len(view.shape))
    reduced = tuple(
        1 if number in axes else size for number, size in enumerate(view.shape) if keepdims or number not in axes
    )
    is_reduction = kernel == "logsumexp"
    shape = reduced if is_reduction else view.shape
    gradient = None
    if g is not None:
        gradient = _gradient(library, view, x, g, reduced if kernel == "logsumexp_vjp" else view.shape)
    # An array that begins off a boundary gets a result that does so too: only then are both read by vectors.
    offset = view.address % VECTOR_BYTES // view.itemsize if view.c_contiguous and not is_reduction else 0
    # What has an element per row is read after the first results are written.
    is_g_replaceable = kernel != "logsumexp_vjp"
    if out is None:
        target = library.empty(x, shape if is_reduction else None, offset)
    else:
        _check_out(library, x, out, view.dtype, shape)
        given = library.view(out)
        is_safe = _may_replace(given, view) and (
            gradient is None or (_may_replace(given, gradient) if is_g_replaceable else not given.overlaps(gradient))
        )
        target = out if is_safe else library.empty(x, shape)
    result, stream = library.view(target), library.stream(x)
    with _in_order(library, stream, out, g) as is_one_stream:
        if view.size:
            device = library.device(x)
            views = (_unplaced(one) for one in (view, result, gradient))
            plan, prepared = _prepare(kernel, *views, axes, keepdims, device)
            g_address = view.address if gradient is None else gradient.address
            prepared.run({"x": view.address, "y": result.address, "g": g_address}, stream)
            is_as_asked = is_one_stream and (out is None or target is out)
            if key is not None and is_as_asked and len(_known) < _REMEMBERED:
                x_extent, y_extent = view.at(0).extent(), result.at(0).extent()
                _known[key] = _Known(
                    shape=shape if is_reduction else None,
                    offset=offset,
                    alignment=result.address % VECTOR_BYTES,
                    plan=plan,
                    prepared=prepared,
                    x_extent=x_extent,
                    y_extent=y_extent,
                    g_extent=x_extent if gradient is None else gradient.at(0).extent(),
                    is_x_replaceable=view.strides == result.strides,
                    is_g_replaceable=is_g_replaceable and (gradient or view).strides == result.strides,
                )
            if (plans := choices.get().plans) is not None:
                plans.append(plan)
        elif result.size:
            library.assign(target, -np.inf, stream)
        if out is not None and target is not out:
            library.assign(out, target, stream)
    return target if out is None else out


def compute_weighted(
    a: Any, axis: Any, b: Any, out: Any = None, keepdims: bool = False, return_sign: bool = False
) -> Any:
    """Compute logsumexp with factors, and the signs of the sums if they are asked for, of an array on a GPU.

    Parameters
    ----------
    a, axis, out, keepdims
        As of `compute`.
    b : array, number or None
        The factors, of the same library, device and dtype, which broadcast with ``a``; or one for all; None is 1.
    return_sign : bool
        Whether to return the signs as well, in the shape and dtype of the result.
    """
    library = library_of(type(a))  # type: ignore[arg-type]
    if not (b is None or isinstance(b, Real) or is_on_gpu(b)):
        raise TypeError(f"b must be a number or a {type(a).__name__} on the same device, as a is")
    if library is None:
        if is_immutable(out):
            raise TypeError(f"out is an array of {type(out).__name__}, which must not be written to")
        given = [array if array is None or isinstance(array, Real) else borrow(array) for array in (a, b, out)]
        results = compute_weighted(given[0], axis, given[1], given[2], keepdims, return_sign)
        if not return_sign:
            return hand_back(a, results) if out is None else out
        return hand_back(a, results[0]) if out is None else out, hand_back(a, results[1])
    with library.on_device_of(a):
        view = library.view(a)
        if view.dtype not in FORMATS:
            raise TypeError(f"a on a CUDA device must be one of {', '.join(FORMATS)}, not {view.dtype}")
        factors = _factors(library, a, b, view.dtype)
        factors_view = library.view(factors)
        try:
            shape = np.broadcast_shapes(view.shape, () if factors is not b else factors_view.shape)
        except ValueError:
            message = f"b of shape {factors_view.shape} does not broadcast with a of shape {view.shape}"
            raise ValueError(message) from None
        axes = normalize_axes(axis, len(shape))
        reduced = tuple(1 if number in axes else size for number, size in enumerate(shape))
        result_shape = reduced if keepdims else tuple(np.delete(shape, axes).tolist())
        if out is not None:
            _check_out(library, a, out, view.dtype, result_shape)
        log_sums = library.empty(a, result_shape)
        signs = library.empty(a, result_shape) if return_sign else None
        stream = library.stream(a)
        with _in_order(library, stream, out, None if factors is not b else b):
            if 0 not in shape:
                x, given_b = (_broadcast(one, shape) for one in (view, factors_view))
                y = library.view(log_sums)
                layout = make_layout(x, axes, y if keepdims else y.expand_dims(axes), given_b)  # type: ignore[arg-type]
                plan, prepared = _prepare_weighted(view.dtype, layout, return_sign, library.device(a))
                y_address = library.address(log_sums)
                signs_address = y_address if signs is None else library.address(signs)
                addresses = {"x": view.address, "y": y_address, "g": factors_view.address, "signs": signs_address}
                prepared.run(addresses | {"states": 0}, stream)  # those of chunks, if there are any, get a place there
                if (plans := choices.get().plans) is not None:
                    plans.append(plan)
            elif 0 not in result_shape:
                library.assign(log_sums, -np.inf, stream)
                if signs is not None:
                    library.assign(signs, 0.0, stream)
            if out is not None:
                library.assign(out, log_sums, stream)
    result = log_sums if out is None else out
    return (result, signs) if return_sign else result


def _factors(library: Library, a: Any, b: Any, dtype: str) -> Any:
    """Return the factors as an array: a new one of one element where they are one number."""
    if b is None or isinstance(b, Real):
        factor = library.empty(a, (1,))
        library.assign(factor, 1.0 if b is None else float(b), library.stream(a))
        return factor
    if not _are_together(library, a, b):
        raise TypeError(f"b must be a number or a {type(a).__name__} on the same device, as a is")
    if (given := library.view(b).dtype) != dtype:
        raise TypeError(f"b must have dtype {dtype}, not {given}")
    return b


def _broadcast(view: View, shape: tuple[int, ...]) -> View:
    return view.expand_dims(tuple(range(len(shape) - view.ndim))).broadcast_to(shape)


@lru_cache(_REMEMBERED)
def _prepare_weighted(dtype: str, layout: Layout, has_signs: bool, device: int) -> tuple[Plan, _launch.Prepared]:
    """Plan and compile."""
    plan = choose_weighted(layout, _launch.device_facts(device))
    return _plan("weighted_logsumexp", plan), _launch.prepare_weighted(FORMATS[dtype], layout, plan, has_signs, device)


@contextmanager
def _in_order(library: Library, stream: int, out: Any, g: Any) -> Iterator[bool]:
    """Keep the order of streams where arrays name other ones than that which computes; yield whether none does."""
    others = {library.own_stream(array) for array in (out, g) if array is not None} - {stream, 0}
    for other in others:
        _launch.queue_behind(stream, other)
    yield not others
    if out is not None and (other := library.own_stream(out)) in others:
        _launch.queue_behind(other, stream)


def _check_out(library: Library, x: Any, out: Any, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse an ``out`` that cannot take the result."""
    if not _are_together(library, x, out):
        raise TypeError(f"out must be a {type(x).__name__} on the same device, as the input is")
    given = library.view(out)
    if given.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, not {given.dtype}")
    if given.shape != shape:
        raise ValueError(f"out must have shape {shape}, not {given.shape}")
    if not library.is_writable(out):
        raise ValueError("out is read-only")
    if any(stride == 0 and size > 1 for size, stride in zip(given.shape, given.strides, strict=True)):
        raise ValueError("out has elements that share memory with others of its own")


def _may_replace(given: View, read: View) -> bool:
    """Whether an output is the very input, or shares no memory with it; a result in parts of it comes too early."""
    return (given.address, given.strides) == (read.address, read.strides) or not given.overlaps(read)


def _gradient(library: Library, view: View, x: Any, g: Any, shape: tuple[int, ...]) -> View:
    if not _are_together(library, x, g):
        raise TypeError(f"g must be a {type(x).__name__} on the same device, as the other input is")
    gradient = library.view(g)
    if gradient.dtype != view.dtype:
        raise TypeError(f"g must have dtype {view.dtype}, not {gradient.dtype}")
    if gradient.shape != shape:
        raise ValueError(f"g must have shape {shape}, not {gradient.shape}")
    return gradient


def _are_together(library: Library, x: Any, other: Any) -> bool:
    """Whether another array is of the same library and on the same device."""
    kind: Any = type(other)
    return is_on_gpu(other) and library_of(kind) is library and library.device(other) == library.device(x)


def _unplaced(view: View | None) -> View | None:
    """Return a view that stands for all with the same alignment."""
    return None if view is None else view.at(view.address % VECTOR_BYTES)


@lru_cache(_REMEMBERED)
def _prepare(
    kernel: Kernel, x: View, y: View, g: View | None, axes: tuple[int, ...], keepdims: bool, device: int
) -> tuple[Plan, _launch.Prepared]:
    """Lay out, plan and compile."""
    phases = [x.address]
    if kernel == "logsumexp":
        y = y if keepdims else y.expand_dims(axes)
    else:
        phases.append(y.address)
    if g is not None and kernel == "logsumexp_vjp":
        g = (g if keepdims else g.expand_dims(axes)).broadcast_to(x.shape)
    elif g is not None:
        phases.append(g.address)
    layout = make_layout(x, axes, y, g)  # type: ignore[arg-type]
    plan = choose(layout, tuple(phases), _launch.device_facts(device), n_inputs(kernel))
    return _plan(kernel, plan), _launch.prepare(kernel, FORMATS[x.dtype], layout, plan, x.address, device)


def _plan(kernel: Any, launch: LaunchPlan) -> Plan:
    major, minor = cuda.get_current_device().compute_capability
    return Plan(kernel, "cuda", f"sm_{major}{minor}", Schedule(launch.traversal, "recompute"), launch)


# Arrays in main memory.


def plan(function: Function, layout: Layout, in_place: bool) -> Plan:
    if function not in get_args(Kernel):
        name = "logsumexp with b" if function == "weighted_logsumexp" else function
        raise TypeError(f"backend 'cuda' does not compute {name} of arrays in main memory")
    kernel = cast(Kernel, function)
    phases = (0,) if function == "logsumexp" else (0,) * (1 + n_inputs(kernel))
    facts = _launch.device_facts(_launch.current_device())
    return _plan(function, choose(_contiguous(kernel, layout), phases, facts, n_inputs(kernel)))


def run(plan: Plan, layout: Layout, x: Array, out: Array, g: Array | None) -> None:
    """Copy the rows to the device, compute there, and copy the result back."""
    kernel, device = cast(Kernel, plan.function), _launch.current_device()
    bits = np.dtype(f"u{x.itemsize}")  # Numba knows no bfloat16 in main memory
    every = layout.kept + layout.reduced

    def upload(array: Array, dimensions: tuple[Dimension, ...], strides: Iterable[int]) -> Any:
        rows = as_strided(array, _sizes(dimensions), tuple(strides), writeable=False)
        return _launch.upload(np.ascontiguousarray(rows).view(bits))

    data = gradient = upload(x, every, (dimension.x_stride for dimension in every))
    if g is not None:
        dimensions = layout.kept if kernel == "logsumexp_vjp" else every
        gradient = upload(g, dimensions, (dimension.b_stride for dimension in dimensions))
    results, result = every, data
    if kernel == "logsumexp":
        results, result = layout.kept, _launch.upload(np.empty(_sizes(layout.kept), bits))
    assert plan.launch is not None
    rows = _contiguous(kernel, layout)
    prepared = _launch.prepare(kernel, FORMATS[x.dtype.name], rows, plan.launch, 0, device)
    x_address, y_address, g_address = (one.__cuda_array_interface__["data"][0] for one in (data, result, gradient))
    prepared.run({"x": x_address, "y": y_address, "g": g_address}, 0)
    target = as_strided(out, _sizes(results), [dimension.y_stride for dimension in results])
    target[...] = result.copy_to_host().view(x.dtype)


def _sizes(dimensions: tuple[Dimension, ...]) -> tuple[int, ...]:
    return tuple(dimension.size for dimension in dimensions)


def _contiguous(kernel: Kernel, layout: Layout) -> Layout:
    """Return the layout of the same rows one after the other."""
    has_g = n_inputs(kernel) == 2
    rows = c_order_layout(layout.n_rows, layout.n_cols, 1, layout.itemsize, kernel == "logsumexp", has_g)
    if kernel != "logsumexp_vjp":
        return rows
    return rows._replace(kept=tuple(dimension._replace(b_stride=layout.itemsize) for dimension in rows.kept))
