"""The CUDA backend: arrays on a GPU where they lie, and arrays in main memory by way of a copy.

The kernels are in `fastsoftmax.cuda`. Here calls become launches: what is the same for all calls with equal shapes,
strides and alignments is prepared once and remembered.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.lib.stride_tricks import as_strided

if find_spec("numba_cuda") is None:
    raise ImportError("the cuda backend needs the numba-cuda package: pip install 'fastsoftmax[cuda]'")

from numba import cuda

if not cuda.is_available():
    reason = " ".join(str(cuda.cuda_error() or "none is visible").split())
    raise ImportError(f"no CUDA device can be used: {reason}")

from fastsoftmax._dispatch import Factors, Function, Plan, choices
from fastsoftmax._layout import Array, Layout, c_order_layout, make_layout, normalize_axes
from fastsoftmax._schedule import Schedule
from fastsoftmax.cuda import _launch
from fastsoftmax.cuda._arrays import Library, View, borrow, library_of
from fastsoftmax.cuda._kernels import Kernel
from fastsoftmax.cuda._plan import VECTOR_BYTES, LaunchPlan, choose
from fastsoftmax.cuda._vectors import FORMATS

READS: frozenset[str] = frozenset({"float16", "bfloat16"})

# Prepared calls that are remembered; one is a few kilobytes.
_REMEMBERED = 4096


class _Known(NamedTuple):
    """What a call without ``out`` needs.

    The shape of its result (None: that of the input), how many elements after a boundary it begins, and so its
    alignment; the plan, and the launches.
    """

    shape: tuple[int, ...] | None
    offset: int
    alignment: int
    plan: Plan
    prepared: _launch.Prepared


# By everything that distinguishes such calls: looking up what is asked of the library as it stands takes 1 us, asking
# for views and laying them out anew 5.
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
        Whether logsumexp keeps the reduced axes.
    g : array, optional
        The gradient with respect to the output, for a vector-Jacobian product.
    name : str
        What errors call ``x``.
    """
    library = library_of(type(x))  # type: ignore[arg-type]  # mypy has types that are not hashable
    if library is None:
        borrowed = [None if array is None else borrow(array) for array in (x, out, g)]
        result = compute(kernel, borrowed[0], axis, borrowed[1], keepdims, borrowed[2], name)
        return x.__array_namespace__().from_dlpack(result) if out is None else out
    with library.on_device_of(x):
        if out is not None or g is not None or not (type(axis) is int or axis is None):
            return _compute(library, kernel, x, axis, out, keepdims, g, name)
        address, device = library.address(x), library.device(x)
        key = kernel, axis, keepdims, library.form(x), address % VECTOR_BYTES, device
        known = _known.get(key)
        if known is None:
            return _compute(library, kernel, x, axis, None, keepdims, None, name, key)
        result = library.empty(x, known.shape, known.offset)
        result_address = library.address(result)
        if result_address % VECTOR_BYTES != known.alignment:
            return _compute(library, kernel, x, axis, result, keepdims, None, name)
        known.prepared.run({"x": address, "y": result_address, "g": address}, library.stream(x))
        if (plans := choices.get().plans) is not None:
            plans.append(known.plan)
        return result


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
    reduced = tuple(size for axis, size in enumerate(view.shape) if axis not in axes)
    shape = view.shape if kernel != "logsumexp" else reduced
    if kernel == "logsumexp" and keepdims:
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(view.shape))
    # An array that begins off a boundary gets a result that does so too: only then are both read by vectors.
    offset = view.address % VECTOR_BYTES // view.itemsize if kernel != "logsumexp" and view.c_contiguous else 0
    if out is None:
        target = library.empty(x, shape if kernel == "logsumexp" else None, offset)
    else:
        target = _target(library, view, x, out, shape)
    result = library.view(target)
    if view.size == 0:
        if result.size:
            target[...] = -np.inf
        return target
    gradient = (
        None if g is None else _gradient(library, view, x, g, view.shape if kernel != "logsumexp_vjp" else reduced)
    )
    device = library.device(x)
    plan, prepared = _prepare(kernel, _unplaced(view), _unplaced(result), _unplaced(gradient), axes, keepdims, device)
    addresses = {"x": view.address, "y": result.address, "g": view.address if gradient is None else gradient.address}
    prepared.run(addresses, library.stream(x))
    if key is not None and len(_known) < _REMEMBERED:
        new_shape = shape if kernel == "logsumexp" else None
        _known[key] = _Known(new_shape, offset, result.address % VECTOR_BYTES, plan, prepared)
    if (plans := choices.get().plans) is not None:
        plans.append(plan)
    if out is not None and target is not out:
        out[...] = target
        return out
    return target


def _target(library: Library, view: View, x: Any, out: Any, shape: tuple[int, ...]) -> Any:
    """Return where to write: ``out``, or an array of its own if ``out`` shares some memory with ``x`` but is not it."""
    if type(out) is not type(x) or library.device(out) != library.device(x):
        raise TypeError(f"out must be a {type(x).__name__} on the same device, as the input is")
    given = library.view(out)
    if given.dtype != view.dtype:
        raise TypeError(f"out must have dtype {view.dtype}, not {given.dtype}")
    if given.shape != shape:
        raise ValueError(f"out must have shape {shape}, not {given.shape}")
    if any(stride == 0 and size > 1 for size, stride in zip(given.shape, given.strides, strict=True)):
        raise ValueError("out is a broadcast view: several of its elements share one place in memory")
    same = (given.address, given.strides) == (view.address, view.strides)
    return out if same or not given.overlaps(view) else library.empty(x, shape)


def _gradient(library: Library, view: View, x: Any, g: Any, shape: tuple[int, ...]) -> View:
    if type(g) is not type(x) or library.device(g) != library.device(x):
        raise TypeError(f"g must be a {type(x).__name__} on the same device, as the other input is")
    gradient = library.view(g)
    if gradient.dtype != view.dtype:
        raise TypeError(f"g must have dtype {view.dtype}, not {gradient.dtype}")
    if gradient.shape != shape:
        raise ValueError(f"g must have shape {shape}, not {gradient.shape}")
    return gradient


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
        g = g.expand_dims(axes).broadcast_to(x.shape)
    elif g is not None:
        phases.append(g.address)
    layout = make_layout(x, axes, y, g)  # type: ignore[arg-type]
    n_inputs = 2 if kernel in _launch.PRODUCTS else 1
    plan = choose(layout, tuple(phases), _launch.device_facts(device), n_inputs)
    return _plan(kernel, plan), _launch.prepare(kernel, FORMATS[x.dtype], layout, plan, x.address, device)


def _plan(kernel: Any, launch: LaunchPlan) -> Plan:
    major, minor = cuda.get_current_device().compute_capability
    return Plan(kernel, "cuda", f"sm_{major}{minor}", Schedule(launch.traversal, "recompute"), launch)


# Arrays in main memory.


def plan(function: Function, layout: Layout, in_place: bool) -> Plan:
    if function not in ("softmax", "log_softmax", "logsumexp"):
        name = "logsumexp with b" if function == "weighted_logsumexp" else function
        raise TypeError(f"backend 'cuda' does not compute {name} of arrays in main memory")
    rows = _contiguous(function, layout)
    phases = (0,) if function == "logsumexp" else (0, 0)
    return _plan(function, choose(rows, phases, _launch.device_facts(_launch.current_device())))


def run(plan: Plan, layout: Layout, x: Array, out: Array, factors: Factors | None) -> None:
    """Copy the rows to the device, compute there, and copy the result back."""
    dimensions = layout.kept + layout.reduced
    shape = [dimension.size for dimension in dimensions]
    bits = np.dtype(f"u{x.itemsize}")  # Numba knows no bfloat16 in main memory
    rows = np.ascontiguousarray(as_strided(x, shape, [d.x_stride for d in dimensions], writeable=False)).view(bits)
    data = _launch.upload(rows)
    if plan.function == "logsumexp":
        dimensions, shape = layout.kept, [dimension.size for dimension in layout.kept]
        result = _launch.upload(np.empty(shape, bits))
    else:
        result = data
    device = _launch.current_device()
    assert plan.launch is not None
    rows_layout = _contiguous(plan.function, layout)
    prepared = _launch.prepare(cast(Kernel, plan.function), FORMATS[x.dtype.name], rows_layout, plan.launch, 0, device)
    address, result_address = (array.__cuda_array_interface__["data"][0] for array in (data, result))
    prepared.run({"x": address, "y": result_address, "g": address}, 0)
    as_strided(out, shape, [d.y_stride for d in dimensions])[...] = result.copy_to_host().view(x.dtype)


def _contiguous(function: str, layout: Layout) -> Layout:
    """Return the layout of the same rows one after the other."""
    return c_order_layout(layout.n_rows, layout.n_cols, 1, layout.itemsize, function == "logsumexp")
