"""The online softmax as building blocks for kernels of your own, written with ``numba.cuda``.

A state is three numbers: the largest element seen, the sum of the others' exponentials, relative to it in a way that
only the functions here know, and what that sum rounds off. `device_functions` gives the functions that work on states.
Needs the ``numba-cuda`` package; `fastsoftmax` itself imports this module when it first meets an array on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

from fastsoftmax.cuda import _meetings, _state
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._vectors import FORMATS, Format

__all__ = ["DeviceFunctions", "device_functions"]


class DeviceFunctions(NamedTuple):
    """Functions for kernels. A state is ``maximum, sum, residue``; that of no element is ``-inf, 0, 0``.

    Parameters
    ----------
    fold : device function
        ``fold(maximum, sum, residue, x)``: the state with one more element.
    merge : device function
        ``merge(maximum, sum, residue, other_maximum, other_sum, other_residue)``: the state of the elements of two.
    warp_reduce : device function
        ``warp_reduce(maximum, sum, residue)``: the state of all 32 lanes of a warp, in each of them. Every
        lane must call it.
    block_reduce : device function
        ``block_reduce(maximum, sum, residue)``: the same for a block of whole warps in one dimension. Every
        thread must call it.
    probability : device function
        ``probability(x, maximum, sum, residue)``: exp(x) / (the sum of the exponentials of all elements).
    logsumexp : device function
        ``logsumexp(maximum, sum, residue)``: the logarithm of that sum.
    """

    fold: Any
    merge: Any
    warp_reduce: Any
    block_reduce: Any
    probability: Any
    logsumexp: Any


@cache
def device_functions(dtype: Literal["float32", "float64"] = "float32") -> DeviceFunctions:
    """Return the functions for states in one dtype.

    Numba compiles a kernel with them where they are names of the module or of a function around the kernel:
    ``fold, merge, warp_reduce, block_reduce, probability, logsumexp = device_functions("float32")``.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        What states, elements and results are; other types must be converted first.

    Returns
    -------
    DeviceFunctions
    """
    format = FORMATS[dtype]
    state = _state.on_device(format.precision)
    return DeviceFunctions(
        state.fold,
        state.merge,
        _reduce(format, lanes=32),
        _reduce(format, lanes=0),
        state.probability,
        state.logsumexp,
    )


def _reduce(format: Format, lanes: int) -> Any:
    merge_all = _meetings.merging(format, lanes)

    @device
    def reduce(maximum: Any, sum: Any, residue: Any) -> Any:
        return merge_all(maximum, sum, residue)

    return reduce
