"""How lanes that share a row meet, so that each of them knows what all know.

They do so in two steps: first the maximum of all, then the sum of all, each rescaled to that maximum once. The order of
additions is fixed by the number of lanes, and so are the bits of the result.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from fastsoftmax.cuda import _instructions, _state
from fastsoftmax.cuda._functions import PRODUCTS, Kernel
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._state import Precision
from fastsoftmax.cuda._vectors import Format


@cache
def meeting(precision: Precision, lanes: int) -> SimpleNamespace:
    """Return device functions by which lanes meet: so many neighbours of a warp, or all of a block if that is 0."""
    return _meeting_in_a_warp(precision, lanes) if lanes else _meeting_of_a_block(precision)


@cache
def _meeting_in_a_warp(precision: Precision, lanes: int) -> SimpleNamespace:
    state, n_steps = _state.on_device(precision), lanes.bit_length() - 1
    larger, plus = state.larger, state.plus

    @device
    def warp_largest(value: Any) -> Any:
        for step in range(n_steps):
            value = larger(value, _instructions.exchange(value, 1 << step))
        return value

    @device
    def warp_count(value: Any) -> Any:
        for step in range(n_steps):
            value += _instructions.exchange(value, 1 << step)
        return value

    @device
    def warp_sum(sum: Any, residue: Any) -> Any:
        for step in range(n_steps):
            other, other_residue = _instructions.exchange(sum, 1 << step), _instructions.exchange(residue, 1 << step)
            sum, residue = plus(sum, residue, other, other_residue)
        return sum, residue

    return SimpleNamespace(largest=warp_largest, count=warp_count, sum=warp_sum)


def _meeting_of_a_block(precision: Precision) -> SimpleNamespace:
    """Return device functions by which warps meet: each leaves its value, and every lane goes through all of them."""
    state, in_warp = _state.on_device(precision), _meeting_in_a_warp(precision, 32)
    larger, plus = state.larger, state.plus
    warp_largest, warp_count, warp_sum = in_warp.largest, in_warp.count, in_warp.sum
    real = np.float64 if precision == "double" else np.float32

    @device
    def block_largest(value: Any) -> Any:
        of_warps = cuda.shared.array(32, real)
        value = warp_largest(value)
        if cuda.threadIdx.x % 32 == 0:
            of_warps[cuda.threadIdx.x // 32] = value
        cuda.syncthreads()
        value = of_warps[0]
        for warp in range(1, cuda.blockDim.x // 32):
            value = larger(value, of_warps[warp])
        cuda.syncthreads()  # the array may be written to again now
        return value

    @device
    def block_count(value: Any) -> Any:
        of_warps = cuda.shared.array(32, real)
        value = warp_count(value)
        if cuda.threadIdx.x % 32 == 0:
            of_warps[cuda.threadIdx.x // 32] = value
        cuda.syncthreads()
        value = of_warps[0]
        for warp in range(1, cuda.blockDim.x // 32):
            value += of_warps[warp]
        cuda.syncthreads()  # the array may be written to again now
        return value

    @device
    def block_sum(sum: Any, residue: Any) -> Any:
        of_warps = cuda.shared.array(32, real)
        residues = cuda.shared.array(32, real)
        sum, residue = warp_sum(sum, residue)
        if cuda.threadIdx.x % 32 == 0:
            of_warps[cuda.threadIdx.x // 32], residues[cuda.threadIdx.x // 32] = sum, residue
        cuda.syncthreads()
        sum, residue = of_warps[0], residues[0]
        for warp in range(1, cuda.blockDim.x // 32):
            sum, residue = plus(sum, residue, of_warps[warp], residues[warp])
        cuda.syncthreads()  # the arrays may be written to again now
        return sum, residue

    return SimpleNamespace(largest=block_largest, count=block_count, sum=block_sum)


@cache
def merging(format: Format, lanes: int) -> Any:
    """Return a device function that merges the states of lanes that meet, each of any number of elements."""
    meet, state = meeting(format.precision, lanes), _state.on_device(format.precision)
    meet_largest, meet_count, meet_sum = meet.largest, meet.count, meet.sum
    rebased, with_ties, zero, one = state.rebased, state.with_ties, format.real(0), format.real(1)

    @device
    def merge_all(maximum: Any, sum: Any, residue: Any) -> Any:
        largest = meet_largest(maximum)
        ties = one if maximum == largest else zero
        if maximum != largest:
            sum, residue = with_ties(maximum, sum, residue, one)
            sum, residue = rebased(maximum, sum, residue, largest)
        sum, residue = meet_sum(sum, residue)
        sum, residue = with_ties(largest, sum, residue, meet_count(ties) - one)
        return largest, sum, residue

    return merge_all


@cache
def row_meeting(kernel: Kernel, format: Format, lanes: int) -> SimpleNamespace:
    """Return device functions for lanes with parts of a row: ``largest(maximum)``, ``sums(sum, residue, ties)`` of all.

    ``states(maximum, sum, residue)`` merges states, of any number of elements each.
    """
    meet = meeting(format.precision, lanes)
    meet_count, meet_sum = meet.count, meet.sum
    if kernel in PRODUCTS:
        return _without_maximum(meet_sum)

    @device
    def sums(sum: Any, residue: Any, ties: Any) -> Any:
        sum, residue = meet_sum(sum, residue)
        return sum, residue, meet_count(ties)

    return SimpleNamespace(largest=meet.largest, sums=sums, states=merging(format, lanes))


def _without_maximum(meet_sum: Any) -> SimpleNamespace:
    @device
    def largest(maximum: Any) -> Any:
        return maximum

    @device
    def sums(sum: Any, residue: Any, ties: Any) -> Any:
        sum, residue = meet_sum(sum, residue)
        return sum, residue, ties

    @device
    def states(maximum: Any, sum: Any, residue: Any) -> Any:
        sum, residue = meet_sum(sum, residue)
        return maximum, sum, residue

    return SimpleNamespace(largest=largest, sums=sums, states=states)
