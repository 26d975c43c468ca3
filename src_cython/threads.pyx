"""The pool of threads (threads.h), one for the kernels of all tiers."""

from libc.stdint cimport uintptr_t

cdef extern from "threads.h" nogil:
    ctypedef void (*block_function)(void* context, Py_ssize_t block) noexcept nogil
    void fastsoftmax_run_on_threads(block_function run, void* context, Py_ssize_t n_blocks, int n_threads)
    int forget_pool_after_fork()

if forget_pool_after_fork() != 0:
    raise MemoryError("no memory for a handler of forks")


def address():
    """The address of the function that runs blocks on threads."""
    return <uintptr_t><void*>fastsoftmax_run_on_threads


def run_blocks(function, Py_ssize_t n_blocks, int n_threads):
    """Call ``function(block)`` for each block on up to ``n_threads`` threads: how the tests see the pool."""
    cdef void* context = <void*>function
    with nogil:
        fastsoftmax_run_on_threads(call_function, context, n_blocks, n_threads)


cdef void call_function(void* context, Py_ssize_t block) noexcept nogil:
    with gil:
        (<object>context)(block)
