"""The compiled backend's kernels: one call runs a range of rows or strips by a given schedule, without the GIL.

This one source is built once for each instruction-set tier.
"""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, PyObject
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.math cimport INFINITY, copysign, exp, expm1, fabs, fma, frexp, ldexp, log, log1p, nextafter, nextafterf, rint
from libc.stdint cimport int64_t, uint16_t, uintptr_t
from libc.stdlib cimport free, getenv, malloc
from libc.string cimport memcmp, memcpy, memset, strncmp, strncpy

include "registers.pxi"
include "state.pxi"
include "rows.pxi"
include "gather.pxi"
include "weighted.pxi"

from fastsoftmax._threads import address as address_of_threads

ctypedef void (*block_function)(void* context, Py_ssize_t block) noexcept nogil
ctypedef void (*thread_function)(
    block_function run, void* context, Py_ssize_t n_blocks, int n_threads) noexcept nogil

cdef thread_function run_on_threads = <thread_function><uintptr_t>address_of_threads()

cdef enum:
    # Blocks that each thread gets between two looks for Ctrl-C: a call in fewer, as most are, is handed over at once.
    BLOCKS_IN_A_PART = 4


cdef extern from "Python.h":
    int PyContextVar_Get(object variable, PyObject* default_value, PyObject** value) except -1


cnp.import_array()
is_zen_5 = first_cache_of_amd() >= 48

cdef enum Function:
    SOFTMAX
    LOG_SOFTMAX
    LOGSUMEXP
    SOFTMAX_VJP
    LOG_SOFTMAX_VJP
    LOGSUMEXP_VJP
    SOFTMAX_ONE  # the softmax of rows that have a zero beside their elements, and is run as that
    FOLD_STATES
    SOFTMAX_TOPK
    SAMPLE

cdef enum Traversal:
    ROWS
    STRIPS
    GATHER
    TILES
    SPLIT
    BANDS

cdef struct Temperature:  # with what a quotient is made of: see divided.pxi
    double value
    double shrink
    double grow
    double inverse
    double inverse_low
    double lowest
    double per_power
    double per_power_low
    double power
    double power_low

cdef struct Adjusted:  # what is done to elements before anything else
    bint is_single  # the type that is computed in
    Storage x_storage
    bint is_divided
    Temperature temperature
    const char* mask  # NULL for none
    Dimensions mask_kept
    Dimensions mask_row

cdef struct Job:
    Function function
    Traversal traversal
    Exponentials exponentials
    bint has_zero  # of which nothing is written
    bint streaming
    Storage storage  # of the output; of the input too, where nothing is adjusted
    const Adjusted* adjusted  # NULL for nothing
    void* sink  # what takes the rows of a function that has no output of their shape; else NULL
    Py_ssize_t n_selected  # elements of each row, for the sink
    Dimensions kept
    Dimensions row

include "batches.pxi"
include "stored_batches.pxi"
include "tiles.pxi"
include "strips.pxi"

include "split.pxi"

chunk_bytes, narrow_strip_bytes = CHUNK_BYTES, MIN_STRIP_BYTES


def columns_of_strip(Py_ssize_t n, Py_ssize_t size, Py_ssize_t n_columns):
    """How many columns a strip has, of so many of n elements, which are of so many bytes in memory."""
    if size == sizeof(double):
        return strip_columns(n, size, n_columns, <const f64v*>NULL)
    return strip_columns(n, size, n_columns, <const f32v*>NULL)


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


cdef struct Call:
    Job* job
    const void* x
    void* y
    bint is_single
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory


def run(
    int function, int traversal, int exponentials, bint streaming, int storage, tuple kept, tuple reduced,
    cnp.ndarray x, cnp.ndarray out, Py_ssize_t n_blocks, int n_threads
):
    """Run a call.

    Parameters
    ----------
    function, traversal, exponentials, storage : int
        The values of the enumerations above, in the order of their names in the Python module.
    streaming : bool
        Write past the caches.
    kept, reduced : tuple of Dimension
        The layout.
    x, out : ndarray
        Aligned and native, both float32 or both float64; with another storage, both of 16 bits.
    n_blocks, n_threads : int
        Into how many equal parts it is cut, and how many threads share them.
    """
    global bfloat16_number
    cdef Job job
    if storage == BFLOAT16:
        bfloat16_number = cnp.PyArray_TYPE(x)
    job.function, job.has_zero = <Function>function, False
    if function == SOFTMAX_ONE:
        job.function, job.has_zero = SOFTMAX, True
    job.traversal, job.exponentials = <Traversal>traversal, <Exponentials>exponentials
    job.streaming, job.storage, job.adjusted, job.sink = streaming, <Storage>storage, NULL, NULL
    job.kept, job.row = dimensions(kept), dimensions(reduced)
    run_job(&job, x, out, n_blocks, n_threads, True)


cdef int run_sink(
    Function function, void* sink, Py_ssize_t n_selected, int traversal, int storage, tuple kept, tuple reduced,
    cnp.ndarray x, Py_ssize_t n_blocks, int n_threads
) except -1:
    """Run tiles or strips of rows for a function that has results of its own, in the order of the kept dimensions."""
    cdef Job job
    job.function, job.has_zero, job.traversal, job.exponentials = function, False, <Traversal>traversal, IN_SCRATCH
    job.streaming, job.storage, job.adjusted, job.sink = False, <Storage>storage, NULL, sink
    job.kept, job.row, job.n_selected = dimensions(kept), dimensions(reduced), n_selected
    return run_job(&job, x, x, n_blocks, n_threads, True)


cdef inline void sink_tiles(
    vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Upcoming* upcoming, const Job* job,
    Py_ssize_t first_row, const vec* smallest, vec* largest, vec* room
) noexcept nogil:
    """Hand over rows, of which this is the number of the first; they may be overwritten."""
    if job.function == FOLD_STATES:
        fold_tiles_into_states(tiles, tile_size, columns, n, upcoming, <Streaming*>job.sink, first_row, smallest, largest)
    elif job.function == SOFTMAX_TOPK:
        select_from_tiles(tiles, tile_size, columns, n, upcoming, <Selection*>job.sink, first_row, smallest, largest, room)
    else:
        sample_from_tiles(tiles, tile_size, columns, n, upcoming, <Sampling*>job.sink, first_row, smallest, largest, room)


cdef inline Py_ssize_t room_for_sink(const Job* job, int n_tiles, Py_ssize_t n, const vec* like) noexcept nogil:
    """Scratch of a sink, in registers: for what is selected and where it is, or the terms of a tile and their sums."""
    if job.sink == NULL or job.function == FOLD_STATES:
        return 0
    if job.n_selected:
        return 2 * job.n_selected * n_tiles
    return n + 2 * (n + lanes(like)) * <Py_ssize_t>sizeof(double) // REGISTER_BYTES


cdef int run_job(
    Job* job, cnp.ndarray x, cnp.ndarray out, Py_ssize_t n_blocks, int n_threads, bint releases
) except -1:
    """Run a job; unless it `releases` the GIL, in one block."""
    cdef Call call
    if job.traversal == SPLIT:
        return run_split(job, x, out, n_blocks, n_threads)
    call.job, call.x, call.y = job, cnp.PyArray_DATA(x), cnp.PyArray_DATA(out)
    call.is_single, call.n_blocks = cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64, n_blocks
    if job.adjusted != NULL:
        call.is_single = job.adjusted.is_single
    call.lacks_memory = False
    if releases:
        run_in_parts(run_block_of_call, &call, &call.first, n_blocks, n_threads)
    else:
        call.first = 0
        run_block_of_call(&call, 0)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a softmax row")
    return 0


cdef void run_block_of_call(void* context, Py_ssize_t block) noexcept nogil:
    cdef Call* call = <Call*>context
    cdef Job job = call.job[0]
    cdef bint has_memory
    if call.is_single:
        has_memory = run_block(<const f32v*>call.x, <f32v*>call.y, &job, call.first + block, call.n_blocks)
    else:
        has_memory = run_block(<const f64v*>call.x, <f64v*>call.y, &job, call.first + block, call.n_blocks)
    if not has_memory:
        call.lacks_memory = True


cdef int run_in_parts(
    block_function run_one, void* context, Py_ssize_t* first, Py_ssize_t n_blocks, int n_threads
) except -1:
    """Run the blocks of a call on threads, a few for each thread at a time, so that Ctrl-C is heard in between.

    `first` is where the function that runs a block finds the number that its own counts from.
    """
    cdef Py_ssize_t n_together = BLOCKS_IN_A_PART * n_threads if n_threads > 1 else 1
    first[0] = 0
    while first[0] < n_blocks:
        with nogil:
            run_on_threads(run_one, context, min(n_together, n_blocks - first[0]), n_threads)
        PyErr_CheckSignals()
        first[0] += n_together
    return 0


cdef bint run_block(const vec* x, vec* y, Job* job, Py_ssize_t block, Py_ssize_t n_blocks) noexcept nogil:
    """Run one of `n_blocks` equal parts of a job; False if there is no memory for its scratch."""
    cdef Py_ssize_t n = total_size(&job.row), n_units = total_size(&job.kept), n_strips = 1, n_together = 1
    cdef Py_ssize_t n_states = (n + chunk_length(x) - 1) // chunk_length(x), scratch_bytes = 0, unit, end
    cdef void* memory
    cdef vec* scratch
    cdef State* states
    cdef Py_ssize_t width
    cdef int left_out = 0
    if job.traversal == STRIPS:
        job.kept.count -= 1
        left_out = columns_left_out(y, job, x)
        width = strip_columns(n, stored_size(source_storage(job), x), left_out + job.kept.size[job.kept.count], x)
        n_strips = rounded_up_quotient(left_out + job.kept.size[job.kept.count], width)
        n_units = total_size(&job.kept) * n_strips
        scratch_bytes = width * itemsize(x) * tile_registers(n, x)
        scratch_bytes += room_for_sink(job, <int>width // lanes(x), n, x) * REGISTER_BYTES
    elif job.traversal == TILES:
        n_together = turned_tiles(n) * lanes(x)
        scratch_bytes = (2 if job.adjusted == NULL else 3) * turned_tiles(n) * n * REGISTER_BYTES
        scratch_bytes += room_for_sink(job, turned_tiles(n), n, x) * REGISTER_BYTES
    elif job.traversal == GATHER:
        scratch_bytes = 2 * chunk_length(x) * itemsize(x)
    else:
        if 0 < n <= chunk_length(x):
            n_together = batch_rows(n, job.streaming, x)
        if job.storage != AS_COMPUTED or job.function == SOFTMAX and job.exponentials == IN_SCRATCH:
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
            run_strip(x, y, job, width, n_strips, unit, left_out, scratch)
        elif job.traversal == TILES and job.adjusted != NULL:
            run_adjusted_turned(x, y, job, unit, <int>n_together, n, scratch)
        elif job.traversal == TILES:
            run_turned(x, y, job, unit, <int>n_together, n, scratch)
        elif n_together > 1 or job.storage != AS_COMPUTED and job.traversal == ROWS:
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
    if job.traversal != GATHER:
        if job.function == LOGSUMEXP:
            put(y, 0, logsumexp_of_state(fold_row(x, n), x))
        elif job.function == SOFTMAX:
            softmax_row(x, y, n, job.has_zero, job.exponentials, scratch, states, job.streaming)
        else:
            log_softmax_row(x, y, n, job.streaming)
    elif job.function == LOGSUMEXP:
        total = fold_gathered(x, &job.row, n, True, False, scratch, job.storage, <vec*>NULL)
        store_stored(y, splat(logsumexp_of_state(total, x), y), 1, job.storage)
    elif job.function == SOFTMAX:
        softmax_gathered(x, y, &job.row, n, job.has_zero, scratch, job.storage)
    else:
        log_softmax_gathered(x, y, &job.row, n, scratch, job.storage)


include "direct_calls.pxi"
include "derivatives.pxi"
include "cross_entropy.pxi"
include "divided.pxi"
include "adjusted.pxi"
include "best.pxi"
include "bands.pxi"
include "streaming.pxi"
include "selection.pxi"
include "sampling.pxi"


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
        return logsumexp_of_state(state, <const f32v*>NULL)
    return logsumexp_of_state(state, <const f64v*>NULL)


cdef void write_terms(
    const vec* x, vec* terms, vec* residuals, Py_ssize_t n, double largest, Arithmetic arithmetic, double* origin
) noexcept nogil:
    cdef vec[REFERENCE] reference
    cdef vec[GROUP] logits, group, heads, factors, rests
    cdef vec top = splat(largest, x)
    cdef Py_ssize_t i = 0
    cdef int j
    if arithmetic == COARSE:
        coarse_reference_at(top, reference)
    else:
        reference_at(top, splat(INFINITY, x), reference)
    origin[0], origin[1] = lane(reference[OFFSET], 0), lane(exponent_of(reference), 0)
    while i * lanes(x) < n:
        for j in range(GROUP):
            logits[j] = load_first(x + i + j, count_within(i + j, n, x), top)
        if arithmetic == COARSE:
            coarse_exp(logits, group, GROUP, reference, 0)
        elif arithmetic == MODERATE:
            exp_parts(logits, heads, factors, rests, GROUP, reference, 0, MODERATE)
        else:
            exp_parts(logits, heads, factors, rests, GROUP, reference, 0, FULL)
        for j in range(GROUP):
            if arithmetic != COARSE:
                group[j] = times_plus(factors[j], rests[j], heads[j])
                store_within(residuals, i + j, n, times_plus(factors[j], rests[j], heads[j] - group[j]))
            store_within(terms, i + j, n, group[j])
        i += GROUP


def terms_of(cnp.ndarray x, double largest, int arithmetic, cnp.ndarray terms, cnp.ndarray residuals):
    """Write the terms exp(x - offset) * 2**-exponent of contiguous elements in a row with this maximum, and what rounding
    took from them (but for COARSE ones); return offset and exponent.
    """
    cdef double[2] origin
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32:
        write_terms(
            <const f32v*>cnp.PyArray_DATA(x), <f32v*>cnp.PyArray_DATA(terms), <f32v*>cnp.PyArray_DATA(residuals),
            x.shape[0], largest, <Arithmetic>arithmetic, origin)
    else:
        write_terms(
            <const f64v*>cnp.PyArray_DATA(x), <f64v*>cnp.PyArray_DATA(terms), <f64v*>cnp.PyArray_DATA(residuals),
            x.shape[0], largest, <Arithmetic>arithmetic, origin)
    return origin[0], origin[1]


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
    cdef char[CHUNK_BYTES + 64] memory  # for terms where they would take the place of logits, which may be needed again
    cdef char* terms = memory + <Py_ssize_t>(-<uintptr_t>memory % REGISTER_BYTES)
    # Longer rows are recomputed because their states need memory, which a call that cannot fail should not ask for.
    if n > chunk_length(x):
        softmax_row(x, y, n, False, RECOMPUTE, <vec*>NULL, &state, False)
    elif n:
        softmax_row(x, y, n, False, IN_SCRATCH if x == y else IN_OUTPUT, <vec*>terms, &state, False)


cdef void one_log_softmax(const vec* x, vec* y, Py_ssize_t n) noexcept nogil:
    if n:
        log_softmax_row(x, y, n, False)


cdef float logsumexp_f32(const float* x, Py_ssize_t n) noexcept nogil:
    return <float>logsumexp_of_state(fold_row(<const f32v*>x, n), <const f32v*>x)


cdef double logsumexp_f64(const double* x, Py_ssize_t n) noexcept nogil:
    return logsumexp_of_state(fold_row(<const f64v*>x, n), <const f64v*>x)
