"""How the kernels are compiled, and the functions of `fastsoftmax._state` in compiled form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.extending import overload, register_jitable

from fastsoftmax import _state

# No flag lets LLVM change what is computed: it would simplify rounding steps away. What is to be fused is written so.
# A division by 0 is not looked for: lanes without a row may hold any number, and a loop that may raise is no vector's.
OPTIONS = {"nogil": True, "error_model": "numpy"}

inline: Callable[[Callable[..., Any]], Any] = njit(**OPTIONS, forceinline=True)


def jit(function):
    """Compile a kernel; one that was made by another function is named after those it closes over.

    Numba tells compiled functions apart by their names, the types of their arguments, and when their process compiled
    them. A kernel that is kept for all processes keeps those that it calls. So where two have the same name and types,
    a process that loads one and compiles the other may run either for both.
    """
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    if cells:
        names = ", ".join(cell.__qualname__ for cell in cells)
        function.__qualname__ += f"({names})"
    return njit(**OPTIONS)(function)


def jit_entry(function):
    """Compile a kernel that is called from Python, once for all processes where Numba finds a place to keep it."""
    try:
        return njit(**OPTIONS, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written to
        return jit(function)


def by_dtype(function):
    """Register a function of Numba types that returns what `function` is for them."""
    return overload(function, jit_options={"forceinline": True})


_polynomial32 = register_jitable(_state.polynomial32)
_polynomial64 = register_jitable(_state.polynomial64)
for _function in (
    _state.split,
    _state.reference,
    _state.term,
    _state.identity,
    _state.single,
    _state.fold,
    _state.merge,
    _state._rebase,
    _state.two_sum,
    _state.product_error,
    _state.total,
    _state.normalize,
    _state.log_total,
    _state.logsumexp,
    _state.pack,
    _state.weighted_identity,
    _state.exp_difference,
    _state.unpack,
    _state.kept_term,
    _state.merge_weighted,
    _state.weighted_logsumexp,
):
    register_jitable(_function)


@by_dtype(_state.polynomial)
def _select_polynomial(r: Any) -> Any:
    return _polynomial32 if r == types.float32 else _polynomial64
