"""Calls like one before, for which nothing has to be decided again.

Deciding what to do takes more than half of a small call on the Numba backend: (64, 16) float32 take 11 us, and 4.5 if a
call before is remembered. All that is remembered was decided by the general way. The compiled backend has such calls of
its own (src_cython/direct_calls.pxi).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastsoftmax import _dispatch
from fastsoftmax._layout import Array, Layout

# More than programs have kinds of calls; where they have not, all are forgotten.
_MOST_REMEMBERED = 1024


# All that decides how a call is computed, but for where the array and its output lie. A NamedTuple would cost 0.3 us.
Request = tuple[Any, ...]


class _Remembered(NamedTuple):
    run: Callable[[Array, Array], None]
    shape: tuple[int, ...]  # of the result
    dtype: np.dtype[Any]


_remembered: dict[Request, _Remembered] = {}


def request_of(
    function: str, x: Any, axis: Any, out: Any, where: Any, temperature: Any, dtype: Any, backend: Any
) -> Request | None:
    """Return what a call asks for; None if it is none that is remembered."""
    surroundings = _dispatch.choices.get()
    name = surroundings.backend if backend is None else backend
    if name != "numba" and (name is not None or _dispatch.direct_calls is not None):
        return None
    if where is not None or dtype is not None or surroundings.plans is not None:
        return None
    # True and 1.0 are equal to 1, and are no axes.
    if type(temperature) is not float or temperature != 1.0 or not (axis is None or type(axis) is int):
        return None
    if type(x) is not np.ndarray or not x.flags.aligned:
        return None
    if out is None:
        return function, name, axis, x.dtype, x.shape, x.strides
    if type(out) is not np.ndarray or not (out.flags.aligned and out.flags.writeable):
        return None
    return function, name, axis, x.dtype, x.shape, x.strides, out is x, out.dtype, out.shape, out.strides


def run_remembered(request: Request | None, x: Any, out: Any) -> Any:
    """Return the result of a call like one before; None if there was none, or memory is shared."""
    if request is None or (call := _remembered.get(request)) is None:
        return None
    if out is None:
        target: Array = np.empty(call.shape, call.dtype) if call.shape != x.shape else np.empty_like(x)
    elif out is not x and np.may_share_memory(x, out):
        return None
    else:
        target = out
    call.run(x, target)
    return target if out is not None or target.ndim else target[()]


def remember(
    request: Request | None,
    module: _dispatch.BackendModule,
    function: _dispatch.Function,
    layout: Layout,
    x: Any,
    data: Array,
    out: Array | None,
    result: Array,
) -> None:
    """Remember what has been decided for a call, if the backend read ``x`` itself and wrote the ``result`` itself."""
    prepare = getattr(module, "prepare", None)
    if request is None or prepare is None or data is not x or not (out is None or result is out):
        return
    if (run := prepare(module.plan(function, layout, out is x), layout, data, result)) is not None:
        if len(_remembered) == _MOST_REMEMBERED:
            _remembered.clear()
        _remembered[request] = _Remembered(run, result.shape, result.dtype)
