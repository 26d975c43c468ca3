"""Batches of rows of float16 or bfloat16, which are read to a scratch of float32, computed there, and rounded once.

Results of 16 bits are no better for terms and sums of 24 digits than for those of 18, which take half the operations.
So softmax, in every traversal, is COARSE for them; where a logarithm may cancel, digits matter, and nothing changes.
"""


cdef inline bint is_coarse(const Job* job) noexcept nogil:
    return job.storage != AS_COMPUTED and job.function == SOFTMAX and job.adjusted == NULL


cdef inline vec read_row(const void* x, vec* row, Py_ssize_t n, Storage storage) noexcept nogil:
    """Copy a row to the type that is computed in; the maximum of each lane over all elements that are not NaN."""
    cdef vec[EXTREMES] tops
    cdef vec fill = splat(-INFINITY, row), v
    cdef Py_ssize_t i = 0, width = lanes(<const vec*>row), size = stored_size(storage, <const vec*>row)
    cdef int j
    for j in range(EXTREMES):
        tops[j] = fill
    while (i + EXTREMES) * width <= n:
        for j in range(EXTREMES):
            v = load_stored(<const char*>x + (i + j) * width * size, <int>width, fill, storage)
            store(row + i + j, v)
            tops[j] = maximum(v, tops[j])  # in this order of operands a NaN is passed over
        prefetch_far(<const char*>x + i * width * size + PREFETCHED_BYTES, REGISTER_BYTES, EXTREMES // 2)
        i += EXTREMES
    while i * width < n:
        v = load_stored(<const char*>x + i * width * size, count_within(i, n, <const vec*>row), fill, storage)
        store_within(row, i, n, v)
        tops[0] = maximum(v, tops[0])
        i += 1
    return maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]))


cdef inline void write_row(const vec* terms, char* y, Py_ssize_t n, vec factor, Storage storage) noexcept nogil:
    """Write the probabilities of a row, perhaps over its terms."""
    cdef Py_ssize_t i = 0, step = lanes(terms) * stored_size(storage, terms)
    while (i + 1) * lanes(terms) <= n:
        store_stored(y + i * step, load(terms + i) * factor, lanes(terms), storage)
        i += 1
    store_stored(y + i * step, load_within(terms, i, n) * factor, count_within(i, n, terms), storage)


cdef inline void softmax_stored_rows(
    const void** x, char** y, int n_rows, Py_ssize_t n, bint has_zero, vec* scratch, Storage storage,
    bint streaming
) noexcept nogil:
    """Softmax of rows of n elements, at most a register's lanes and a chunk, a row in each lane in between."""
    cdef vec[MAX_LANES] tops, highs
    cdef vec[REFERENCE] references, reference
    cdef vec[FINISHERS] finishers
    cdef vec zero = splat(0.0, <const vec*>scratch), largest, top, low
    cdef Py_ssize_t pitch = n * stored_size(storage, <const vec*>scratch)
    cdef char* target
    cdef bint is_joined = streaming and are_adjacent(<const char**>y, n_rows, pitch)
    cdef int row
    for row in range(lanes(<const vec*>scratch)):
        tops[row] = highs[row] = zero
        if row < n_rows:
            tops[row] = read_row(x[row], <vec*>at(<const vec*>scratch, row * n), n, storage)
    transpose(tops)
    largest = tops[0]
    for row in range(1, lanes(<const vec*>scratch)):
        largest = maximum(largest, tops[row])
    largest = raised_to_zero(largest, has_zero)
    coarse_reference_at(largest, references)
    for row in range(n_rows):
        reference_of(<const vec*>references, row, reference)
        fold_elements(
            at(<const vec*>scratch, row * n), <vec*>at(<const vec*>scratch, row * n), n, True, False, COARSE, reference,
            &top, &highs[row], &low)
    transpose(highs)
    merge_coarse_lanes(highs, lanes(<const vec*>scratch))
    if has_zero:
        add_zero(COARSE, <const vec*>references, highs, &low)
    for row in range(n_rows):
        if fabs(get(&largest, row)) == INFINITY:  # then terms are NaN or 0, but the result is NaN
            put(highs, row, INFINITY - INFINITY)
    coarse_normalize_rows(highs[0], finishers)
    for row in range(n_rows):
        target = <char*>scratch + row * pitch if is_joined else y[row]
        write_row(
            at(<const vec*>scratch, row * n), target, n, splat(get(finishers + FACTOR, row), <const vec*>scratch), storage)
    if is_joined:
        stream_bytes(scratch, y[0], n_rows * pitch)


cdef void run_stored_batch(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """Run n_rows rows from `first` on; `scratch` has room for them."""
    if vec is f32v:
        if job.storage == FLOAT16:
            run_batch_stored_as(x, y, job, first, n_rows, n, scratch, FLOAT16)
        else:
            run_batch_stored_as(x, y, job, first, n_rows, n, scratch, BFLOAT16)


cdef inline void run_batch_stored_as(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* scratch, Storage storage
) noexcept nogil:
    cdef const void* sources[MAX_LANES]
    cdef char* targets[MAX_LANES]
    cdef vec* rows[MAX_LANES]
    cdef vec* results[MAX_LANES]
    cdef vec[MAX_LANES] log_sums
    cdef Py_ssize_t x_offset, y_offset
    cdef int row
    for row in range(n_rows):
        locate(&job.kept, first + row, &x_offset, &y_offset)
        sources[row], targets[row] = <const char*>x + x_offset, <char*>y + y_offset
        rows[row] = results[row] = <vec*>at(<const vec*>scratch, row * n)
        if job.function == LOGSUMEXP:
            results[row] = log_sums + row
    if job.function == SOFTMAX:
        softmax_stored_rows(sources, targets, n_rows, n, job.has_zero, scratch, storage, job.streaming)
        return
    for row in range(n_rows):
        read_row(sources[row], rows[row], n, storage)
    run_rows(<const vec**>rows, rows, results, n_rows, n, job.function, job.has_zero, job.exponentials, False)
    for row in range(n_rows):
        write_elements_to(
            <const vec*>results[row], targets[row], stored_size(storage, x), 1 if job.function == LOGSUMEXP else n,
            storage)
