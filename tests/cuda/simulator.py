"""What Numba's CUDA simulator lacks: shuffles, the instructions of `fastsoftmax.cuda._instructions`, and pointers.

Import it, with ``NUMBA_ENABLE_CUDASIM=1`` in the environment, before the kernels. Device memory is NumPy arrays that
`allocate` made; a pointer refuses what is not in one of them, and a vector that is not on a 16-byte boundary.
"""

import sys
import threading
from bisect import bisect_right
from collections import Counter, defaultdict
from contextlib import nullcontext

import ml_dtypes
import numpy as np
from numba import cuda
from numba.core import config
from numba.cuda.simulator import kernel, kernelapi
from numpy.lib.stride_tricks import as_strided

from fastsoftmax.cuda import _arrays, _instructions, _launch, _state
from fastsoftmax.cuda._arrays import View
from fastsoftmax.cuda._plan import Device

assert config.ENABLE_CUDASIM

# A small card, so that small arrays have the plans of large ones.
SMALL_CARD = Device(n_multiprocessors=4, l2_bytes=1 << 20, shared_bytes=21 << 10)

BOUNDARY = 256
_allocations = {}  # by address


def allocate(n_bytes):
    """Return bytes that begin at a boundary as those of a GPU do, poisoned."""
    room = np.full(n_bytes + BOUNDARY, 0xA5, np.uint8)
    start = -room.ctypes.data % BOUNDARY
    memory = room[start : start + n_bytes]
    _allocations[memory.ctypes.data] = memory
    return memory


def free(memory):
    del _allocations[memory.ctypes.data]


class Pointer:
    """The address of an element of a dtype."""

    def __init__(self, address, dtype):
        base = sorted(_allocations)[bisect_right(sorted(_allocations), address) - 1]
        memory = _allocations[base]
        self.dtype = np.dtype(dtype)
        self.origin, rest = divmod(address - base, self.dtype.itemsize)
        assert rest == 0 and address - base <= memory.nbytes
        self.elements = memory[: memory.nbytes // self.dtype.itemsize * self.dtype.itemsize].view(dtype)

    def place(self, index, length=1):
        place = self.origin + int(index)
        assert place >= 0 and place + length <= self.elements.size, f"{index} is outside of the allocation"
        return place

    def __getitem__(self, index):
        return self.elements[self.place(index)]

    def __setitem__(self, index, value):
        self.elements[self.place(index)] = value

    def vector(self, index, word):
        length = 16 // self.dtype.itemsize
        place = self.place(index, length)
        assert place % length == 0, f"{index} is not on a 16-byte boundary"
        return self.elements[place : place + length].view(word)


def exchange(value, mask):
    thread = threading.current_thread()
    values = thread._manager.__dict__.setdefault("exchanged", {})
    thread.syncwarp()
    values[thread.thread_id] = value
    thread.syncwarp()
    return values[thread.thread_id ^ mask]


def load_vector(pointer, index, words, position):
    vector = pointer.vector(index, words.dtype)
    for number, word in enumerate(vector):
        words[position + number] = word


def store_vector(pointer, index, words, position):
    vector = pointer.vector(index, words.dtype)
    for number in range(vector.size):
        vector[number] = words[position + number]


def load_stored(stored, place, words, position):
    assert place % (16 // stored.itemsize) == 0, f"{place} is not on a 16-byte boundary"
    for number in range(16 // stored.itemsize):
        words[position + number] = stored[place + number]


def store_stored(stored, place, words, position):
    for number in range(16 // stored.itemsize):
        stored[place + number] = words[position + number]


def shared_array(self, shape, dtype, alignment=None):
    """Return an array that a block's threads share: by where it is made, or all that the launch asked for."""
    if shape == 0:
        return self._dynshared[: self._dynshared_size].view(dtype)
    frame = sys._getframe(1)
    return self._allocations.setdefault((frame.f_code, frame.f_lineno), np.empty(shape, dtype))


def _copies():
    """Return the groups of copies that the current thread has under way; the last one is not closed yet."""
    return threading.current_thread().__dict__.setdefault("copies", [[]])


def copy_vector(pointer, index, stored, place):
    """Do nothing yet: a copy may arrive as late as when it is waited for."""
    assert place % (16 // stored.itemsize) == 0, f"{place} is not on a 16-byte boundary"
    _copies()[-1].append((pointer.vector(index, stored.dtype), stored, place))


def commit_copies():
    _copies().append([])


def await_copies(n_groups):
    def wait():
        groups = _copies()
        while len(groups) - 1 > n_groups:
            for vector, stored, place in groups.pop(0):
                stored[place : place + vector.size] = vector

    return wait


def _pack(dtype):
    def pack(low, high):
        return np.array([low, high], np.float32).astype(dtype).view(np.uint32)[0]

    return pack


_instructions.ex2, _instructions.log1p, _instructions.fused = np.exp2, np.log1p, _state.fused
_instructions.larger32 = _instructions.larger64 = np.maximum
_instructions.float16_value = lambda bits: np.float32(bits.view(np.float16))
_instructions.pack_float16, _instructions.pack_bfloat16 = _pack(np.float16), _pack(ml_dtypes.bfloat16)
_instructions.exchange = exchange
_instructions.load_vector, _instructions.store_vector = load_vector, store_vector
_instructions.load_stored, _instructions.store_stored = load_stored, store_stored
_instructions.copy_vector, _instructions.commit_copies = copy_vector, commit_copies
_instructions.await_copies = await_copies
kernelapi.FakeCUDAShared.array = shared_array  # its own knows no alignment


BLOCK = -1  # as a group of threads, beside the numbers of warps


class Thread(kernel.BlockThread):
    """A thread of a block, which runs alone, up to where it waits for the others or for those of its warp.

    Numba's own threads all run at once and are polled, which takes five times as long.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.warp = self.thread_id // 32
        self.turn = threading.Semaphore(0)

    def run(self):
        self.turn.acquire()
        if self._manager.error is None:
            super().run()
        self._manager.leave(self)

    def wait_for(self, group):
        self._manager.arrive(self, group)
        self.turn.acquire()
        if self._manager.error:
            raise RuntimeError("another thread of the block has failed")

    def syncthreads(self):
        self.wait_for(BLOCK)

    def syncwarp(self):
        self.wait_for(self.warp)


class Block(kernel.BlockManager):
    """Runs the threads of a block one after the other, the last to arrive at a barrier first, and those of every second
    block in the opposite order: so a missing barrier shows, whichever thread would have to wait for which."""

    def run(self, grid_point, *arguments):
        def target():
            self._f(*arguments)

        threads = [Thread(target, self, grid_point, place, False) for place in np.ndindex(*self._block_dim)]
        self.running = Counter(group for thread in threads for group in (thread.warp, BLOCK))
        self.arrived, self.error = defaultdict(list), None
        self.ready = threads[:: (-1) ** sum(grid_point)]
        for thread in threads:
            thread.start()
        self.go_on()
        for thread in threads:
            thread.join()
        if self.error:
            error, traceback = self.error
            raise error.with_traceback(traceback)

    def arrive(self, thread, group):
        self.arrived[group].append(thread)
        self.go_on()

    def leave(self, thread):
        self.error = self.error or thread.exception
        self.running.subtract((thread.warp, BLOCK))
        self.go_on()

    def go_on(self):
        """Let the next thread run; of the groups that are complete, or after an error, all may."""
        for group in [
            group for group, threads in self.arrived.items() if self.error or len(threads) == self.running[group]
        ]:
            self.ready += self.arrived.pop(group)
        if self.ready:
            self.ready.pop().turn.release()


kernel.BlockManager = Block


in_kernel = []  # the globals of modules that have the kernel's `cuda`


def call(self, *arguments, launch=kernel.FakeCUDAKernel.__call__):
    """Launch a kernel, or call one of its functions, whose modules find the kernel's `cuda` until it is done.

    Numba's own takes locks and looks through all globals in each call, which takes longer than most functions.
    """
    if kernel._kernel_context:
        if self.fn.__globals__.get("cuda") is cuda:
            self.fn.__globals__["cuda"] = kernel._kernel_context
            in_kernel.append(self.fn.__globals__)
        return self.fn(*arguments)
    try:
        return launch(self, *arguments)
    finally:
        while in_kernel:
            in_kernel.pop()["cuda"] = cuda


kernel.FakeCUDAKernel.__call__ = call


streams = []  # of all launches


class Prepared:
    """Takes the place of `fastsoftmax.cuda._launch.Prepared`."""

    def __init__(self, launches, n_states, real_bytes, device):
        self.launches, self.state_bytes = launches, n_states * real_bytes

    def run(self, addresses, stream):
        streams.append(stream)
        states = allocate(len(_launch.NUMBERS_OF_STATES) * self.state_bytes)
        addresses = {**addresses, **_launch.addresses_of_states(states.ctypes.data, self.state_bytes)}
        for launch in self.launches:
            arguments = [
                Pointer(addresses[argument], _dtype(type)) if isinstance(argument, str) else argument
                for argument, type in zip(launch.arguments, launch.signature.args, strict=True)
            ]
            cuda.jit(launch.make())[launch.grid, launch.block, 0, launch.shared_bytes](*arguments)
        free(states)


def _dtype(pointer):
    return np.dtype(str(pointer.dtype))


_launch.Prepared = Prepared


class Array:
    """An array in simulated device memory, as a library of its own would have it."""

    def __init__(self, elements):
        self.elements = elements

    is_cuda = True

    @property
    def shape(self):
        return self.elements.shape


class Library:
    """Takes the place of Torch and its like in `fastsoftmax.cuda._arrays`."""

    def view(self, x):
        elements = x.elements
        return View(elements.ctypes.data, x.shape, elements.strides, elements.dtype.name, elements.itemsize)

    def address(self, x):
        return x.elements.ctypes.data

    def form(self, x):
        return x.elements.shape, x.elements.strides, x.elements.dtype.name

    def device(self, x):
        return 0

    def stream(self, x):
        return 0

    own_stream = stream

    def on_device_of(self, x):
        return nullcontext()

    def is_writable(self, x):
        return x.elements.flags.writeable

    def assign(self, x, value, stream):
        x.elements[...] = value.elements if isinstance(value, Array) else value

    def empty(self, x, shape, offset=0):
        elements = x.elements
        order = np.empty_like(elements) if shape is None else np.empty(shape, elements.dtype)
        memory = allocate(order.nbytes + offset * elements.itemsize).view(elements.dtype)[offset:]
        return Array(as_strided(memory, order.shape, order.strides))


def from_dlpack(x):
    """Borrow the memory of anything with DLPack, in the order of the library's stream, which is number 7."""
    capsule = x.__dlpack__(stream=7)
    return Array(capsule)


_arrays._LIBRARIES[__name__] = Library()
_launch.device_facts = lambda device: SMALL_CARD
_launch.current_device = lambda: 0


class Upload:
    """What is asked of an array that Numba copied to the device."""

    def __init__(self, array):
        self.elements = allocate(array.nbytes).view(array.dtype).reshape(array.shape)
        self.elements[...] = array
        self.__cuda_array_interface__ = {"data": (self.elements.ctypes.data, False)}

    def copy_to_host(self):
        return self.elements.copy()


_launch.upload = Upload


def to_device(array, offset):
    """Return an array in device memory with the elements and strides of one in main memory, so many elements on."""
    memory = allocate((array.size + offset) * array.itemsize).view(array.dtype)[offset:]
    elements = as_strided(memory, array.shape, np.empty_like(array).strides)
    elements[...] = array
    return Array(elements)


def to_host(array):
    return array.elements
