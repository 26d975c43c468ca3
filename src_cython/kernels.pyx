"""The compiled backend's kernels: one call runs a range of rows or strips by a given schedule, without the GIL.

This one source is built once for each instruction-set tier.
"""

cimport numpy as cnp
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY, fabs, fma, ldexp, log1p, rint
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc

include "registers.pxi"
include "state.pxi"
include "rows.pxi"
include "gather.pxi"


cnp.import_array()

cdef enum Function:
    SOFTMAX
    LOG_SOFTMAX
    LOGSUMEXP

cdef enum Traversal:
    ROWS
    STRIPS
    GATHER
    TILES

cdef struct Job:
    Function function
    Traversal traversal
    Exponentials exponentials
    bint streaming
    Dimensions kept
    Dimensions row

include "batches.pxi"
include "tiles.pxi"
include "strips.pxi"


chunk_bytes, strip_bytes = CHUNK_BYTES, STRIP_BYTES


def runs_here(str tier):
    """Whether this processor runs code compiled for a tier."""
    return processor_runs(tier.encode())


cdef Dimensions dimensions(tuple layout):
    cdef Dimensions result
    result.count = len(layout)
    for i, dimension in enumerate(layout):
        result.size[i], result.x_stride[i], result.y_stride[i] = dimension.size, dimension.x_stride, dimension.y_stride
    return result


cdef inline Py_ssize_t total_size(const Dimensions* dimensions) noexcept nogil:
    cdef Py_ssize_t result = 1
    cdef int i
    for i in range(dimensions.count):
        result *= dimensions.size[i]
    return result


def run(
    int function, int traversal, int exponentials, bint streaming, tuple kept, tuple reduced, cnp.ndarray x,
    cnp.ndarray out, int block, int n_blocks
):
    """Run one of `n_blocks` equal parts of a call.

    Parameters
    ----------
    function, traversal, exponentials : int
        The values of the enumerations above, in the order of their names in the Python module.
    streaming : bool
        Write past the caches.
    kept, reduced : tuple of Dimension
        The layout.
    x, out : ndarray
        Aligned and native, both float32 or both float64.
    block, n_blocks : int
        Which part.
    """
    cdef Job job
    cdef const void* source = cnp.PyArray_DATA(x)
    cdef void* target = cnp.PyArray_DATA(out)
    cdef bint is_single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32, enough_memory
    job.function, job.traversal, job.exponentials = <Function>function, <Traversal>traversal, <Exponentials>exponentials
    job.streaming = streaming
    job.kept, job.row = dimensions(kept), dimensions(reduced)
    with nogil:
        if is_single:
            enough_memory = run_block(<const f32v*>source, <f32v*>target, &job, block, n_blocks)
        else:
            enough_memory = run_block(<const f64v*>source, <f64v*>target, &job, block, n_blocks)
    if not enough_memory:
        raise MemoryError("no memory for the scratch of a softmax row")


cdef bint run_block(const vec* x, vec* y, Job* job, Py_ssize_t block, Py_ssize_t n_blocks) noexcept nogil:
    """Run one of `n_blocks` equal parts of a job; False if there is no memory for its scratch."""
    cdef Py_ssize_t n = total_size(&job.row), n_units = total_size(&job.kept), n_strips = 1, n_together = 1
    cdef Py_ssize_t n_states = (n + chunk_length(x) - 1) // chunk_length(x), scratch_bytes = 0, unit, end
    cdef void* memory
    cdef vec* scratch
    cdef State* states
    if job.traversal == STRIPS:
        job.kept.count -= 1
        n_strips = (job.kept.size[job.kept.count] + strip_columns(x) - 1) // strip_columns(x)
        n_units = total_size(&job.kept) * n_strips
        scratch_bytes = STRIP_BYTES * tile_registers(n, x)
    elif job.traversal == TILES:
        n_together = lanes(x)
        scratch_bytes = n * REGISTER_BYTES
    elif job.traversal == GATHER:
        scratch_bytes = 2 * chunk_length(x) * itemsize(x)
    else:
        if 0 < n <= chunk_length(x):
            n_together = batch_rows(n, x)
        if job.function == SOFTMAX and job.exponentials == IN_SCRATCH:
            scratch_bytes = n_together * n * itemsize(x)
    states = <State*>malloc(n_states * sizeof(State))
    memory = malloc(scratch_bytes + REGISTER_BYTES)
    if states == NULL or memory == NULL:
        free(states)
        free(memory)
        return False
    scratch = <vec*>(<char*>memory + <Py_ssize_t>(-<uintptr_t>memory % REGISTER_BYTES))
    unit, end = n_units * block // n_blocks, n_units * (block + 1) // n_blocks
    while unit < end:
        n_together = min(n_together, end - unit)
        if job.traversal == STRIPS:
            run_strip(x, y, job, unit // n_strips, unit % n_strips, scratch)
        elif job.traversal == TILES:
            run_turned(x, y, job, unit, <int>n_together, n, scratch)
        elif n_together > 1:
            run_batch(x, y, job, unit, <int>n_together, n, scratch)
        else:
            run_row(x, y, job, unit, n, scratch, states)
        unit += n_together
    if job.streaming:
        stream_fence()
    free(states)
    free(memory)
    return True


cdef inline void run_row(
    const vec* x, vec* y, const Job* job, Py_ssize_t row, Py_ssize_t n, vec* scratch, State* states
) noexcept nogil:
    cdef Py_ssize_t x_offset, y_offset
    cdef State total
    locate(&job.kept, row, &x_offset, &y_offset)
    x, y = <const vec*>(<const char*>x + x_offset), <vec*>(<char*>y + y_offset)
    if job.function == LOGSUMEXP:
        total = fold_gathered(x, &job.row, n, True, scratch) if job.traversal == GATHER else fold_row(x, n)
        put(y, 0, total.maximum + log_sum(total, x))
    elif job.function == SOFTMAX:
        if job.traversal == GATHER:
            softmax_gathered(x, y, &job.row, n, scratch)
        else:
            softmax_row(x, y, n, job.exponentials, scratch, states, job.streaming)
    elif job.traversal == GATHER:
        log_softmax_gathered(x, y, &job.row, n, scratch)
    else:
        log_softmax_row(x, y, n, job.streaming)


# The state as Python sees it, for the tests of its laws: a tuple (maximum, offset, exponent, high, low).

def fold(cnp.ndarray row):
    """The state of a contiguous row, with its maximum kept apart."""
    cdef State state
    if cnp.PyArray_TYPE(row) == cnp.NPY_FLOAT32:
        state = fold_row(<const f32v*>cnp.PyArray_DATA(row), row.shape[0])
    else:
        state = fold_row(<const f64v*>cnp.PyArray_DATA(row), row.shape[0])
    return state.maximum, state.offset, state.exponent, state.high, state.low


cdef State from_tuple(tuple values):
    cdef State state
    state.maximum, state.offset, state.exponent, state.high, state.low = values
    return state


def merge_states(tuple a, tuple b):
    """The state of the elements of both."""
    cdef State state = merge(from_tuple(a), from_tuple(b), True)
    return state.maximum, state.offset, state.exponent, state.high, state.low


def logsumexp_of(tuple values, bint is_single):
    """The logarithm of the sum of a state of float32 or float64 elements."""
    cdef State state = from_tuple(values)
    if is_single:
        return state.maximum + log_sum(state, <const f32v*>NULL)
    return state.maximum + log_sum(state, <const f64v*>NULL)


def addresses():
    """The addresses of the functions below, by function and dtype."""
    return {
        ("softmax", "float32"): <uintptr_t><void*>one_softmax[f32v],
        ("softmax", "float64"): <uintptr_t><void*>one_softmax[f64v],
        ("log_softmax", "float32"): <uintptr_t><void*>one_log_softmax[f32v],
        ("log_softmax", "float64"): <uintptr_t><void*>one_log_softmax[f64v],
        ("logsumexp", "float32"): <uintptr_t><void*>logsumexp_f32,
        ("logsumexp", "float64"): <uintptr_t><void*>logsumexp_f64,
    }


cdef void one_softmax(const vec* x, vec* y, Py_ssize_t n) noexcept nogil:
    """Softmax of one contiguous row; x and y may be the same."""
    cdef State state
    # Longer rows are recomputed because their states need memory, which a call that cannot fail should not ask for.
    if n:
        softmax_row(x, y, n, IN_OUTPUT if n <= chunk_length(x) else RECOMPUTE, <vec*>NULL, &state, False)


cdef void one_log_softmax(const vec* x, vec* y, Py_ssize_t n) noexcept nogil:
    if n:
        log_softmax_row(x, y, n, False)


cdef float logsumexp_f32(const float* x, Py_ssize_t n) noexcept nogil:
    cdef State state = fold_row(<const f32v*>x, n)
    return <float>(state.maximum + log_sum(state, <const f32v*>x))


cdef double logsumexp_f64(const double* x, Py_ssize_t n) noexcept nogil:
    cdef State state = fold_row(<const f64v*>x, n)
    return state.maximum + log_sum(state, <const f64v*>x)
