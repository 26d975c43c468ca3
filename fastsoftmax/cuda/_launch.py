"""From a plan to launches, and the way to the driver.

What a call needs besides addresses is prepared once for its sizes: the compiled kernels, and a buffer of arguments in
the form the driver takes. A call then writes a few addresses into it and calls ``cuLaunchKernel``: the launch of a
Numba kernel by itself takes some 10 us for every array among its arguments, which is longer than small kernels run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache, partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import driver
from numba import cuda

from fastsoftmax._dispatch import BackendUnavailableError
from fastsoftmax._layout import Dimension, Layout
from fastsoftmax.cuda import _kernels, _weighted
from fastsoftmax.cuda._functions import Kernel, n_inputs, states_of
from fastsoftmax.cuda._plan import MEETING_BYTES, MOST_THREADS, VECTOR_BYTES, Device, LaunchPlan, tile_vectors
from fastsoftmax.cuda._vectors import Format

# That has bfloat16 and copies to shared memory past the registers.
MIN_CAPABILITY = 8, 0


class Launch(NamedTuple):
    """One kernel, and what it is launched with.

    Parameters
    ----------
    make : callable
        Makes the kernel as a Python function, the same one each time.
    signature : numba signature
        The types of its arguments.
    grid : int
        Blocks.
    block : tuple of int
        Threads of a block.
    arguments : tuple
        Integers, tuples of integers, and the names of pointers.
    shared_bytes : int
        Shared memory of a block beyond what is part of the kernel.
    """

    make: Callable[[], Any]
    signature: Any
    grid: int
    block: tuple[int, int]
    arguments: tuple[Any, ...]
    shared_bytes: int


def launches(kernel: Kernel, format: Format, layout: Layout, plan: LaunchPlan, phase: int) -> tuple[Launch, ...]:
    """Return the launches that carry out a plan, in order; ``phase`` is the address of the input modulo 16."""
    vectorized = plan.vector > 1
    phase = phase // format.itemsize if vectorized else 0
    kept = _dimensions(layout.kept, format.itemsize)
    reduced = _dimensions(layout.reduced, format.itemsize)
    n_rows, n_cols = layout.n_rows, layout.n_cols

    def launch(make: Callable[[], Any], grid: int, *arguments: Any) -> Launch:
        kept = next(argument for argument in arguments if type(argument) is tuple)
        signature = _kernels.signature(format, make(), len(kept) // 4, len(reduced) // 4)
        return Launch(make, signature, grid, plan.block, arguments, plan.shared_bytes)

    stateful, chunks = states_of(kernel), (plan.n_chunks, plan.chunk)
    if plan.traversal == "strips":
        threads = plan.block[0] * plan.block[1]
        n_inner = layout.kept[-1].size
        n_strips = -(-(n_inner + phase) // plan.rows_per_block)
        outer = kept[:-4] or (1, 0, 0, 0)
        sizes_of_strips = n_inner, n_cols, phase, n_strips, outer, kept[-4:], reduced
        n_blocks = n_rows // n_inner * n_strips
        if plan.n_chunks == 1:
            make = partial(_kernels.strip_kernel, kernel, format, vectorized, threads)
            return (launch(make, n_blocks, "x", "y", "g", *sizes_of_strips),)
        states = partial(_kernels.strip_state_kernel, stateful, format, vectorized, threads)
        results = partial(_kernels.strip_result_kernel, kernel, format, vectorized, threads)
        n_of_results = n_blocks if kernel == "logsumexp" else n_blocks * plan.n_chunks
        return (
            launch(states, n_blocks * plan.n_chunks, "x", "g", "maxima", "sums", "residues", *chunks, *sizes_of_strips),
            launch(results, n_of_results, "x", "y", "g", "maxima", "sums", "residues", *chunks, *sizes_of_strips),
        )
    if plan.traversal == "rows":
        lanes = plan.threads_per_row if plan.threads_per_row <= 32 else 0
        make = partial(_kernels.row_kernel, kernel, format, vectorized, lanes, plan.held, plan.stored > 0)
        n_tiles = plan.stored // tile_vectors(n_inputs(kernel))
        sizes_of_rows = n_rows, n_cols, n_tiles, phase, kept, reduced
        return (launch(make, -(-n_rows // plan.rows_per_block), "x", "y", "g", *sizes_of_rows),)
    sizes = *chunks, n_cols, phase, kept, reduced
    states = partial(_kernels.chunk_state_kernel, stateful, format, vectorized)
    results = partial(_kernels.chunk_result_kernel, kernel, format, vectorized)
    n_blocks = n_rows * plan.n_chunks
    return (
        launch(states, n_blocks, "x", "g", "maxima", "sums", "residues", *sizes),
        launch(
            results, n_rows if kernel == "logsumexp" else n_blocks, "x", "y", "g", "maxima", "sums", "residues", *sizes
        ),
    )


def weighted_launches(format: Format, layout: Layout, plan: LaunchPlan, has_signs: bool) -> tuple[Launch, ...]:
    """Return the launches that carry out a plan of `choose_weighted`, in order."""
    kept, reduced = _dimensions(layout.kept, format.itemsize), _dimensions(layout.reduced, format.itemsize)
    n_lanes, n_side = plan.threads_per_row, plan.rows_per_block
    side_step, lane_step = (1, n_side) if plan.traversal == "strips" else (n_lanes, 1)
    n_blocks = -(-layout.n_rows // n_side)
    sizes = layout.n_rows, layout.n_cols, plan.n_chunks, plan.chunk or layout.n_cols
    arguments = *sizes, n_side, n_lanes, side_step, lane_step, int(has_signs), kept, reduced

    def launch(is_first: bool, is_last: bool, grid: int) -> Launch:
        make = partial(_weighted.weighted_kernel, format, is_first, is_last)
        signature = _kernels.signature(format, make(), len(kept) // 4, len(reduced) // 4)
        return Launch(make, signature, grid, plan.block, ("x", "y", "g", "signs", "states", *arguments), 0)

    if plan.n_chunks == 1:
        return (launch(True, True, n_blocks),)
    return launch(True, False, n_blocks * plan.n_chunks), launch(False, True, n_blocks)


def _dimensions(dimensions: tuple[Dimension, ...], itemsize: int) -> tuple[int, ...]:
    """Return sizes and strides in elements, as kernels take them: they know no mask."""
    numbers = [(d.size, d.x_stride, d.y_stride, d.b_stride) for d in dimensions]
    if any(stride % itemsize for _, *strides in numbers for stride in strides):
        raise ValueError(f"strides must be multiples of the item size, {itemsize} bytes")
    flat = [number for size, *strides in numbers for number in (size, *(stride // itemsize for stride in strides))]
    return tuple(flat) or (1, 0, 0, 0)


def launch_bounds(launch: Launch) -> int | tuple[int, int] | None:
    """Return the threads that a kernel must leave registers for, and so many blocks; None where it does anyway."""
    width, height = launch.block
    if width * height < MOST_THREADS:
        return None
    # Unless one block is said to be enough, ptxas for sm_80 would rather spill at 40 registers of a long row, or at 64
    # of a strip, than take the 100 that are there for it.
    return (MOST_THREADS, 1) if launch.shared_bytes or height > 1 else MOST_THREADS


def current_device() -> int:
    """Return the number of the device that arrays from main memory go to."""
    return int(cuda.get_current_device().id)


def upload(array: Any) -> Any:
    """Return a copy of an array on the current device; ``copy_to_host`` of that brings it back."""
    return cuda.to_device(array)


class CudaError(RuntimeError):
    """The driver refused."""


def checked(result: tuple[Any, ...]) -> Any:
    code, *values = result
    if code:
        _, name = driver.cuGetErrorName(code)
        raise CudaError(name.decode() if name else str(code))
    return values[0] if values else None


@cache
def device_facts(device: int) -> Device:
    """Ask a card what plans depend on.

    Raises
    ------
    BackendUnavailableError
        If kernels use instructions that it does not have.
    """
    capability = cuda.gpus[device].compute_capability
    if capability < MIN_CAPABILITY:
        wanted, had = (".".join(map(str, one)) for one in (MIN_CAPABILITY, capability))
        reason = f"it needs a device of compute capability {wanted} or newer, and device {device} has {had}"
        raise BackendUnavailableError(f"backend 'cuda' is not available: {reason}")
    attribute = driver.CUdevice_attribute
    facts = (
        attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE,
        attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    )
    handle = checked(driver.cuDeviceGet(device))
    return Device(*(int(checked(driver.cuDeviceGetAttribute(one, handle))) for one in facts))


def queue_behind(stream: int, other: int) -> None:
    """Have what is queued on a stream from now on wait, on the device, for what is queued on another one."""
    event = checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    checked(driver.cuEventRecord(event, other))
    checked(driver.cuStreamWaitEvent(stream, event, 0))
    checked(driver.cuEventDestroy(event))  # when both are through with it


# Each has an array of its own.
NUMBERS_OF_STATES = ("maxima", "sums", "residues")


def addresses_of_states(memory: int, n_bytes: int) -> dict[str, int]:
    """Return the addresses of the states of chunks by the names of kernels; each number of them takes so many bytes."""
    places = {name: memory + number * n_bytes for number, name in enumerate(NUMBERS_OF_STATES)}
    return {"states": memory, **places}


class Prepared:
    """Launches compiled for one device, with the buffers that the driver reads their arguments from.

    Parameters
    ----------
    launches : tuple of Launch
        Run one after the other.
    n_states : int
        States of chunks that they need room for.
    real_bytes : int
        Bytes of each number of a state.
    device : int
        The number of the device.
    """

    def __init__(self, launches: tuple[Launch, ...], n_states: int, real_bytes: int, device: int) -> None:
        self._device, self._state_bytes, self._lock = device, n_states * real_bytes, Lock()
        with cuda.gpus[device]:
            self._bound = [_Bound(launch, device) for launch in launches]

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        """Queue the launches on a stream; ``addresses`` are those of x, y, g and signs."""
        error, current = driver.cuCtxGetDevice()
        if error or int(current) != self._device:
            with cuda.gpus[self._device]:
                self._launch(addresses, stream)
        else:
            self._launch(addresses, stream)

    def _launch(self, addresses: Mapping[str, int], stream: int) -> None:
        if not self._state_bytes:
            with self._lock:
                for bound in self._bound:
                    bound.launch(addresses, stream)
            return
        # Allocated and freed in the order of the stream: another call may have the memory when this one is through.
        states = int(checked(driver.cuMemAllocAsync(len(NUMBERS_OF_STATES) * self._state_bytes, stream)))
        addresses = {**addresses, **addresses_of_states(states, self._state_bytes)}
        try:
            with self._lock:
                for bound in self._bound:
                    bound.launch(addresses, stream)
        finally:
            checked(driver.cuMemFreeAsync(states, stream))


class _Bound:
    """One compiled kernel and its arguments, each of which is eight bytes."""

    def __init__(self, launch: Launch, device: int) -> None:
        handle = int(_compiled(launch.make(), launch.signature, launch_bounds(launch)))
        self._function = driver.CUfunction(handle)  # the driver takes a kernel of a library for one
        if launch.shared_bytes:
            # A block has 48 KiB unless a kernel is allowed more; the same kernel serves rows that need more and less.
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            most = device_facts(device).shared_bytes - MEETING_BYTES
            checked(driver.cuKernelSetAttribute(attribute, most, driver.CUkernel(handle), driver.CUdevice(device)))
        flat: list[Any] = []
        for argument in launch.arguments:
            flat += argument if isinstance(argument, tuple) else (argument,)
        self._names = [(place, name) for place, name in enumerate(flat) if isinstance(name, str)]
        self._values = (ctypes.c_int64 * len(flat))(*(0 if isinstance(value, str) else value for value in flat))
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(flat))(*(base + 8 * place for place in range(len(flat))))
        self._parameters = ctypes.addressof(self._pointers)
        self._grid, self._block, self._shared_bytes = launch.grid, launch.block, launch.shared_bytes

    def launch(self, addresses: Mapping[str, int], stream: int) -> None:
        for place, name in self._names:
            self._values[place] = addresses[name]
        sizes = self._grid, 1, 1, *self._block, 1, self._shared_bytes
        checked(driver.cuLaunchKernel(self._function, *sizes, stream, self._parameters, 0))


def prepare(kernel: Kernel, format: Format, layout: Layout, plan: LaunchPlan, address: int, device: int) -> Prepared:
    """Prepare the launches of a plan for an input at this address, or any other with the same alignment."""
    n_states = layout.n_rows * plan.n_chunks if plan.chunk else 0
    steps = launches(kernel, format, layout, plan, address % VECTOR_BYTES)
    return Prepared(steps, n_states, np.dtype(format.real).itemsize, device)


def prepare_weighted(format: Format, layout: Layout, plan: LaunchPlan, has_signs: bool, device: int) -> Prepared:
    """Prepare the launches of a plan of `choose_weighted`."""
    n_numbers = layout.n_rows * plan.n_chunks * _weighted.N_NUMBERS if plan.chunk else 0
    n_states = -(-n_numbers // len(NUMBERS_OF_STATES))  # that take the memory of as many numbers
    return Prepared(weighted_launches(format, layout, plan, has_signs), n_states, 8, device)


_kernel_handles: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def _compiled(kernel: Any, signature: Any, bounds: int | tuple[int, int] | None) -> Any:
    """Return the handle of a kernel compiled for the current device."""
    key = kernel, signature, bounds, cuda.get_current_device().id
    if key not in _kernel_handles:
        compiled = cuda.jit(signature, launch_bounds=bounds)(kernel)
        (overload,) = compiled.overloads.values()
        function = overload.library.get_cufunc()
        _kernel_handles[key] = compiled, function  # which the handle lives no longer than
    return _kernel_handles[key][1].handle
