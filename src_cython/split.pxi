"""Kernels for a few long rows: the chunks of a row are shared among threads.

Each thread folds chunks into states of their own, one thread merges them in their order, and all write. No state depends
on who computed it or on the chunk before, so the bits are those of one thread.
"""


cdef struct SplitRow:
    Function function
    bint has_zero
    Exponentials exponentials
    bint streaming
    bint is_single
    const void* x
    void* y
    void* terms  # of the row, if they wait
    Py_ssize_t n
    double row_offset
    State* states  # one for each chunk
    double* smallest  # elements that count, one for each chunk
    State total
    Scale scale
    Py_ssize_t n_blocks
    Py_ssize_t first  # block of the part that runs now


cdef int run_split(Job* job, cnp.ndarray x, cnp.ndarray out, Py_ssize_t n_blocks, int n_threads) except -1:
    """Run rows one after the other, each on all threads."""
    cdef SplitRow row
    cdef Py_ssize_t x_offset, y_offset, index, itemsize = cnp.PyArray_ITEMSIZE(x)
    row.function, row.has_zero = job.function, job.has_zero
    row.exponentials, row.streaming = job.exponentials, job.streaming
    row.is_single, row.n, row.n_blocks = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32, total_size(&job.row), n_blocks
    row.states = <State*>malloc((row.n * itemsize + CHUNK_BYTES - 1) // CHUNK_BYTES * sizeof(State))
    row.smallest = <double*>malloc((row.n * itemsize + CHUNK_BYTES - 1) // CHUNK_BYTES * sizeof(double))
    cdef bint has_scratch = job.function == SOFTMAX and job.exponentials == IN_SCRATCH
    cdef void* scratch = malloc(row.n * itemsize) if has_scratch else NULL
    try:
        if row.states == NULL or row.smallest == NULL or (has_scratch and scratch == NULL):
            raise MemoryError("no memory for the scratch of a softmax row")
        for index in range(total_size(&job.kept)):
            locate(&job.kept, index, &x_offset, &y_offset)
            row.x, row.y = <const char*>cnp.PyArray_DATA(x) + x_offset, <char*>cnp.PyArray_DATA(out) + y_offset
            row.terms = scratch if has_scratch else row.y
            begin_split_row(&row)
            run_in_parts(fold_split_block, &row, &row.first, n_blocks, n_threads)
            end_split_fold(&row)
            if job.function != LOGSUMEXP:
                run_in_parts(write_split_block, &row, &row.first, n_blocks, n_threads)
    finally:
        free(row.states)
        free(row.smallest)
        free(scratch)
    return 0


cdef void begin_split_row(SplitRow* row) noexcept nogil:
    if row.is_single:
        row.row_offset = offset_of_chunk(<const f32v*>row.x, row.n, row.has_zero)
    else:
        row.row_offset = offset_of_chunk(<const f64v*>row.x, row.n, row.has_zero)


cdef inline double offset_of_chunk(const vec* x, Py_ssize_t n, bint has_zero) noexcept nogil:
    """The offset that the state of the first chunk of a row has."""
    cdef vec[REFERENCE] reference
    cdef vec largest = largest_lane(lane_maxima(x, min(n, chunk_length(x))))
    reference_at(raised_to_zero(largest, has_zero), splat(0.0, x), reference)
    return lane(reference[OFFSET], 0)


cdef void fold_split_block(void* context, Py_ssize_t block) noexcept nogil:
    cdef SplitRow* row = <SplitRow*>context
    if row.is_single:
        fold_split_chunks(<const f32v*>row.x, row, row.first + block)
    else:
        fold_split_chunks(<const f64v*>row.x, row, row.first + block)


cdef inline void fold_split_chunks(const vec* x, SplitRow* row, Py_ssize_t block) noexcept nogil:
    cdef Py_ssize_t length = chunk_length(x), n_chunks = (row.n + length - 1) // length, chunk, first
    cdef bint keep = row.function == SOFTMAX and row.exponentials != RECOMPUTE
    cdef vec smallest
    for chunk in range(n_chunks * block // row.n_blocks, n_chunks * (block + 1) // row.n_blocks):
        first, smallest = chunk * length, splat(INFINITY, x)
        row.states[chunk] = fold_chunk(
            at(x, first), <vec*>at(<const vec*>row.terms, first), min(length, row.n - first), keep,
            row.function != SOFTMAX, row.has_zero and chunk == 0, row.row_offset, &smallest)
        row.smallest[chunk] = smallest_lane(smallest)


cdef void end_split_fold(SplitRow* row) noexcept nogil:
    if row.is_single:
        merge_split_row(<f32v*>row.y, row)
    else:
        merge_split_row(<f64v*>row.y, row)


cdef inline void merge_split_row(vec* y, SplitRow* row) noexcept nogil:
    """Merge the states of the chunks, and find what finishes the row; write logsumexp, which is all there is."""
    cdef Py_ssize_t length = chunk_length(<const vec*>y), chunk
    cdef double smallest = row.smallest[0]
    row.total = row.states[0]
    for chunk in range(1, (row.n + length - 1) // length):
        row.total = merge(row.total, row.states[chunk], row.function != SOFTMAX)
        smallest = min(smallest, row.smallest[chunk])
    row.total = within_range(row.total, <const vec*>y)
    if row.function == SOFTMAX:
        row.scale = scale_of(row.total, <const vec*>y)
        row.scale.is_mended = is_below_mended(
            splat(smallest, <const vec*>y), splat(row.total.maximum, <const vec*>y), row.n, 1.0)
    elif row.function == LOG_SOFTMAX:
        row.scale = log_scale_of(row.total, <const vec*>y)
    else:
        put(y, 0, logsumexp_of_state(row.total, <const vec*>y))


cdef void write_split_block(void* context, Py_ssize_t block) noexcept nogil:
    cdef SplitRow* row = <SplitRow*>context
    if row.is_single:
        write_split_chunks(<const f32v*>row.x, <f32v*>row.y, row, row.first + block)
    else:
        write_split_chunks(<const f64v*>row.x, <f64v*>row.y, row, row.first + block)
    if row.streaming:
        stream_fence()


cdef inline void write_split_chunks(const vec* x, vec* y, SplitRow* row, Py_ssize_t block) noexcept nogil:
    cdef Py_ssize_t length = chunk_length(x), n_chunks = (row.n + length - 1) // length, chunk, first, size
    cdef vec* target
    for chunk in range(n_chunks * block // row.n_blocks, n_chunks * (block + 1) // row.n_blocks):
        first = chunk * length
        size, target = min(length, row.n - first), <vec*>at(<const vec*>y, first)
        if row.function == LOG_SOFTMAX:
            write_chunk(SUBTRACT, at(x, first), target, size, <const vec*>NULL, row.scale, row.streaming)
        elif not is_regular(row.total):
            fill_nan(target, size)
        elif row.exponentials == RECOMPUTE:
            write_probabilities(
                at(x, first), <const vec*>NULL, target, size, row.total, row.total, row.scale, row.streaming)
        else:
            write_probabilities(
                at(x, first), at(<const vec*>row.terms, first), target, size, row.states[chunk], row.total, row.scale,
                row.streaming)
