"""Arrays of other libraries on a GPU: what they hold, and new ones of the same kind.

Torch and CuPy are asked directly. Arrays of anyone else who implements the array API, JAX for one, or offers nothing
but DLPack, are borrowed by Torch or CuPy, and results are handed back in the same way. Anything else with
``__cuda_array_interface__`` (version 3) is taken for Numba's. Nothing here waits for the device: work is queued on the
stream that the caller's library is using, or that the interface names, and DLPack puts streams in order.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class View:
    """Where an array lies: what `fastsoftmax._layout` needs to lay it out, and its address.

    Parameters
    ----------
    address : int
        Of its first element.
    shape, strides : tuple of int
        Strides in bytes.
    dtype : str
        The name of the dtype.
    itemsize : int
        Bytes of an element.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def flags(self) -> View:
        return self

    @cached_property
    def c_contiguous(self) -> bool:
        return self.strides == c_strides(self.shape, self.itemsize)

    def at(self, address: int) -> View:
        """Return the view of the same elements elsewhere."""
        return View(address, self.shape, self.strides, self.dtype, self.itemsize)

    def overlaps(self, other: View) -> bool:
        """Whether the two lie in one stretch of memory, at least in part."""
        (start, end), (other_start, other_end) = self.extent(), other.extent()
        return start < other_end and other_start < end

    def extent(self) -> tuple[int, int]:
        """Return where its elements begin and end."""
        steps = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        before, after = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
        return (self.address + before, self.address + after + self.itemsize) if self.size else (self.address,) * 2

    def expand_dims(self, axes: tuple[int, ...]) -> View:
        """Return the view with axes of length 1 put in."""
        shape, strides = list(self.shape), list(self.strides)
        for axis in axes:
            shape.insert(axis, 1)
            strides.insert(axis, self.itemsize)
        return View(self.address, tuple(shape), tuple(strides), self.dtype, self.itemsize)

    def broadcast_to(self, shape: tuple[int, ...]) -> View:
        """Return the view with axes of length 1 repeated."""
        strides = tuple(
            0 if one != size else stride for one, size, stride in zip(self.shape, shape, self.strides, strict=True)
        )
        return View(self.address, shape, strides, self.dtype, self.itemsize)


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of an array in C order."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Library(Protocol):
    """What is asked of a library of arrays."""

    def view(self, x: Any) -> View: ...

    def address(self, x: Any) -> int: ...

    def form(self, x: Any) -> Hashable:
        """Return what all but the address follows from, in the form that the library has it."""

    def device(self, x: Any) -> int: ...

    def stream(self, x: Any) -> int:
        """Return the handle of the stream that the library is using on the array's device; 0 is the default one."""

    def own_stream(self, x: Any) -> int:
        """Return the stream that an array names as its own, whatever the library is using; 0 if it names none."""

    def on_device_of(self, x: Any) -> AbstractContextManager[Any]:
        """Make the array's device the library's current one, if it cannot do without."""

    def is_writable(self, x: Any) -> bool: ...

    def assign(self, x: Any, value: Any, stream: int) -> None:
        """Write a number, or an array of the same library and shape, to all of an array, on the stream in use."""

    def empty(self, x: Any, shape: tuple[int, ...] | None, offset: int = 0) -> Any:
        """Return a new array like ``x`` in memory order, or in C order of another shape.

        It begins so many elements after the library's own boundaries; with an offset, ``x`` is in C order.
        """


class Torch:
    def address(self, x: Any) -> int:
        return int(x.data_ptr())

    def form(self, x: Any) -> Hashable:
        return x.shape, x.stride(), x.dtype

    def view(self, x: Any) -> View:
        itemsize = x.element_size()
        strides = tuple(stride * itemsize for stride in x.stride())
        return View(x.data_ptr(), tuple(x.shape), strides, str(x.dtype).removeprefix("torch."), itemsize)

    def device(self, x: Any) -> int:
        return int(x.device.index) if x.is_cuda else -1

    def stream(self, x: Any) -> int:
        return int(sys.modules["torch"].cuda.current_stream(x.device).cuda_stream)

    def own_stream(self, x: Any) -> int:
        return 0

    def on_device_of(self, x: Any) -> AbstractContextManager[Any]:
        return nullcontext()  # torch allocates where the array is

    def is_writable(self, x: Any) -> bool:
        return True

    def assign(self, x: Any, value: Any, stream: int) -> None:
        x[...] = value

    def empty(self, x: Any, shape: tuple[int, ...] | None, offset: int = 0) -> Any:
        if shape is not None:
            return x.new_empty(shape)
        if offset:
            return x.new_empty(x.numel() + offset)[offset:].view(x.shape)
        return sys.modules["torch"].empty_like(x, requires_grad=False)


class Cupy:
    def address(self, x: Any) -> int:
        return int(x.data.ptr)

    def form(self, x: Any) -> Hashable:
        return x.shape, x.strides, x.dtype

    def view(self, x: Any) -> View:
        return View(x.data.ptr, x.shape, x.strides, x.dtype.name, x.itemsize)

    def device(self, x: Any) -> int:
        return int(x.device.id)

    def stream(self, x: Any) -> int:
        return int(sys.modules["cupy"].cuda.get_current_stream(x.device.id).ptr)

    def own_stream(self, x: Any) -> int:
        return 0

    def on_device_of(self, x: Any) -> AbstractContextManager[Any]:
        device: AbstractContextManager[Any] = x.device
        return device

    def is_writable(self, x: Any) -> bool:
        return True

    def assign(self, x: Any, value: Any, stream: int) -> None:
        x[...] = value

    def empty(self, x: Any, shape: tuple[int, ...] | None, offset: int = 0) -> Any:
        cupy = sys.modules["cupy"]
        if offset:
            return cupy.empty(x.size + offset, x.dtype)[offset:].reshape(x.shape)
        return cupy.empty_like(x) if shape is None else cupy.empty(shape, x.dtype)


class Interface:
    """``__cuda_array_interface__``: of Numba's own arrays and of libraries that are not known here."""

    def address(self, x: Any) -> int:
        return int(x.__cuda_array_interface__["data"][0])

    def form(self, x: Any) -> Hashable:
        interface = x.__cuda_array_interface__
        layout = interface["shape"], interface.get("strides"), interface["typestr"]
        return layout, interface["data"][1], interface.get("stream"), interface.get("mask") is None

    def view(self, x: Any) -> View:
        interface = x.__cuda_array_interface__
        if interface.get("mask") is not None:
            raise TypeError(f"an array of {_name(x)} has a mask, which is not supported: fill what is masked first")
        dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
        strides = interface.get("strides") or c_strides(shape, dtype.itemsize)
        name = dtype.name if dtype.isnative else dtype.str
        return View(interface["data"][0], shape, tuple(strides), name, dtype.itemsize)

    def device(self, x: Any) -> int:
        return device_of(x.__cuda_array_interface__["data"][0])

    def stream(self, x: Any) -> int:
        # None: there is nothing to wait for. The driver takes 1 and 2 for the default streams, as the interface does.
        return int(x.__cuda_array_interface__.get("stream") or 0)

    own_stream = stream

    def on_device_of(self, x: Any) -> AbstractContextManager[Any]:
        from numba import cuda

        context: AbstractContextManager[Any] = cuda.gpus[self.device(x)]
        return context

    def is_writable(self, x: Any) -> bool:
        return not x.__cuda_array_interface__["data"][1]

    def assign(self, x: Any, value: Any, stream: int) -> None:
        assign(x, value, stream)

    def empty(self, x: Any, shape: tuple[int, ...] | None, offset: int = 0) -> Any:
        view = self.view(x)
        return new_array(view.shape if shape is None else shape, np.dtype(view.dtype), offset, self.stream(x))


def device_of(address: int) -> int:
    """Return the number of the device that memory belongs to: of the current one for that of an empty array."""
    from cuda.bindings import driver
    from numba import cuda

    from fastsoftmax.cuda._launch import checked

    if not address:
        return int(cuda.get_current_device().id)
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(checked(driver.cuPointerGetAttribute(attribute, address)))


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any], offset: int, stream: int) -> Any:
    """Return a new array of Numba's in C order, so many elements after a boundary, that names a stream as its own."""
    from numba import cuda

    if offset:
        array = cuda.device_array(prod(shape) + offset, dtype)[offset:].reshape(shape)
    else:
        array = cuda.device_array(shape, dtype)
    return array.bind(cuda.external_stream(stream)) if stream else array


def assign(x: Any, value: Any, stream: int) -> None:
    """Write to all of an array on a stream, by means of Numba's; it would wait for the default one if that were 0."""
    from numba import cuda

    cuda.as_cuda_array(x, sync=False).bind(cuda.external_stream(stream or 1))[...] = value


_LIBRARIES: dict[str, Library] = {"torch": Torch(), "cupy": Cupy()}
_INTERFACE = Interface()


@cache
def library_of(kind: type) -> Library | None:
    """Return who is asked about arrays of a type; None where only DLPack can tell. Torch's subclasses are Torch's."""
    for ancestor in kind.__mro__:
        if (library := _LIBRARIES.get(ancestor.__module__.partition(".")[0])) is not None:
            return library
    has_only_dlpack = hasattr(kind, "__dlpack__") and not hasattr(kind, "__cuda_array_interface__")
    return None if hasattr(kind, "__array_namespace__") or has_only_dlpack else _INTERFACE


def borrow(x: Any) -> Any:
    """Return an array of Torch or CuPy in the memory of one that has DLPack, in the order of both their streams.

    Raises
    ------
    TypeError
        If neither of the two is installed.
    """
    for name in sorted(_LIBRARIES, key=lambda name: name not in sys.modules):
        if find_spec(name) is not None:
            return import_module(name).from_dlpack(x)
    raise TypeError(f"an array of {_name(x)} is read through torch or cupy, and neither is installed")


def hand_back(x: Any, result: Any) -> Any:
    """Return a result of Torch or CuPy as an array of x's library, in the same memory; as it is if that takes none."""
    if not hasattr(x, "__array_namespace__"):
        return result
    with _lending(result):
        return x.__array_namespace__().from_dlpack(result)


def _lending(array: Any) -> AbstractContextManager[Any]:
    # Torch refuses to lend what is on another device than its current one.
    torch = sys.modules.get("torch")
    return torch.cuda.device_of(array) if torch and isinstance(array, torch.Tensor) else nullcontext()


def is_immutable(x: Any) -> bool:
    """Whether a library promises that its arrays never change, and lends their memory all the same: JAX does."""
    return type(x).__module__.partition(".")[0] in ("jax", "jaxlib")


def _name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
