"""Memory of large results, kept when it is freed and used for the next one.

Beyond 32 MiB the C library asks the system for memory at each allocation and gives it back when it is freed, and the
system fills every new page with zeros: softmax of (2500, 4000) float32 took 8.0 ms with a fresh result, 4.2 with `out=`.
NumPy lets an array have an allocator of its own. The one here is set only while `empty_like` runs; an array made with it
is like any other, owns its memory and brings it back here when it is freed, whoever frees it.

All of this runs under the GIL, which is the only lock it has.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport PyObject
from libc.string cimport memmove, memset, strcpy

import numpy as np

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void* ctx
        void* (*malloc)(void* ctx, size_t size) noexcept
        void* (*calloc)(void* ctx, size_t count, size_t size) noexcept
        void* (*realloc)(void* ctx, void* memory, size_t size) noexcept
        void (*free)(void* ctx, void* memory, size_t size) noexcept

    ctypedef struct PyDataMem_Handler:
        char[127] name
        unsigned char version
        PyDataMemAllocator allocator

    object PyDataMem_SetHandler(object handler)
    PyObject* PyDataMem_DefaultHandler

cdef enum:
    MAX_BLOCKS = 16  # kept at most
    HEADER_BYTES = 64  # before the elements of each block, whose first word is the block's size


cdef struct Block:
    void* memory
    size_t size

cdef Block[MAX_BLOCKS] kept  # oldest first
cdef int n_kept = 0
cdef size_t kept_size = 0, size_limit = 0

cdef PyDataMemAllocator* system = &(<PyDataMem_Handler*>PyCapsule_GetPointer(
    <object>PyDataMem_DefaultHandler, "mem_handler")).allocator


cdef size_t* header_of(void* memory) noexcept:
    return <size_t*>(<char*>memory - HEADER_BYTES)


cdef void* with_header(void* base, size_t size) noexcept:
    if base == NULL:
        return NULL
    (<size_t*>base)[0] = size
    return <char*>base + HEADER_BYTES


cdef void take_out(int index) noexcept:
    """Take a block off the list."""
    global n_kept, kept_size
    kept_size -= kept[index].size
    n_kept -= 1
    memmove(&kept[index], &kept[index + 1], (n_kept - index) * sizeof(Block))


cdef void release_oldest() noexcept:
    cdef Block block = kept[0]
    take_out(0)
    system.free(system.ctx, header_of(block.memory), block.size + HEADER_BYTES)


cdef void* allocate(void* ctx, size_t size) noexcept:
    """The smallest kept block that is large enough and not larger by more than a quarter; else new memory."""
    cdef int index, best = -1
    cdef void* memory
    for index in range(n_kept):
        if size <= kept[index].size <= size + size // 4 and (best < 0 or kept[index].size < kept[best].size):
            best = index
    if best < 0:
        return with_header(system.malloc(system.ctx, size + HEADER_BYTES), size)
    memory = kept[best].memory
    take_out(best)
    return memory


cdef void* allocate_zeros(void* ctx, size_t count, size_t size) noexcept:
    cdef void* memory = allocate(ctx, count * size)  # NumPy has checked the product
    if memory != NULL:
        memset(memory, 0, count * size)
    return memory


cdef void* reallocate(void* ctx, void* memory, size_t size) noexcept:
    return with_header(system.realloc(system.ctx, header_of(memory), size + HEADER_BYTES), size)


cdef void keep(void* ctx, void* memory, size_t size) noexcept:
    """Keep a freed block, in the place of older ones where the limit asks for it."""
    global n_kept, kept_size
    if memory == NULL:
        return
    size = header_of(memory)[0]
    while n_kept and (n_kept == MAX_BLOCKS or kept_size + size > size_limit):
        release_oldest()
    if size > size_limit:
        system.free(system.ctx, header_of(memory), size + HEADER_BYTES)
        return
    kept[n_kept].memory, kept[n_kept].size = memory, size
    n_kept += 1
    kept_size += size


cdef PyDataMem_Handler handler
strcpy(handler.name, b"fastsoftmax_output_cache")
handler.version = 1
handler.allocator.ctx = NULL
handler.allocator.malloc = allocate
handler.allocator.calloc = allocate_zeros
handler.allocator.realloc = reallocate
handler.allocator.free = keep
cdef object capsule = PyCapsule_New(&handler, "mem_handler", NULL)


def empty_like(cnp.ndarray x, dtype):
    """`numpy.empty_like(x, dtype)`, in memory that was freed before if there is some of that size."""
    before = PyDataMem_SetHandler(capsule)
    try:
        return np.empty_like(x, dtype=dtype)
    finally:
        PyDataMem_SetHandler(before)


def limit(size_t n_bytes):
    """Keep at most this many bytes from now on; 0 keeps none."""
    global size_limit
    size_limit = n_bytes
    while kept_size > size_limit:
        release_oldest()


def kept_bytes():
    """How many bytes are kept for later results."""
    return kept_size
