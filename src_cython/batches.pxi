"""Kernels for several contiguous rows at a time, where each is one chunk.

What comes between the passes over a row - its reference, the addition of its lanes, the reciprocal - is a chain of some
two hundred operations that wait for each other. A batch does it for all its rows at once, a row in each lane, and a
batch is written only after the next one's maxima are found, so that the processor has other work meanwhile: (64, 1000)
float32 take 17 us row by row, 10 in batches. The bits are those of the row alone.
"""


cdef enum:
    MAX_LANES = 16
    # Rows and terms of a batch stay in the L1 cache from one pass to the next.
    BATCH_BYTES = 65536


cdef inline int batch_rows(Py_ssize_t n, const vec* like) noexcept nogil:
    """The number of rows of n elements in a batch."""
    return <int>max(<Py_ssize_t>1, min(BATCH_BYTES // (n * itemsize(like)), <Py_ssize_t>lanes(like)))


cdef inline void reference_of(const vec* references, int row, vec* reference) noexcept nogil:
    """The reference of one row, in every lane."""
    cdef int i
    for i in range(REFERENCE):
        reference[i] = splat(get(references + i, row), references)


cdef inline void find_batch_references(
    const vec** x, int n_rows, Py_ssize_t n, vec* references, vec* largest
) noexcept nogil:
    """The maxima and references of the rows, a row in each lane."""
    cdef vec[MAX_LANES] tops
    cdef int row, distance = lanes(<const vec*>largest) // 2
    for row in range(2 * distance):
        tops[row] = lane_maxima(x[row], n) if row < n_rows else splat(0.0, largest)
    transpose(tops)
    while distance:
        for row in range(distance):
            tops[row] = maximum(tops[row], tops[row + distance])
        distance //= 2
    largest[0] = tops[0]
    reference_at(largest[0], splat(0.0, largest), references)


cdef inline void fold_batch(
    const vec** x, vec** terms, int n_rows, Py_ssize_t n, bint keep, bint apart, const vec* references, vec largest,
    vec* high, vec* low
) noexcept nogil:
    """The sums of the rows, a row in each lane; with `keep`, their terms too."""
    cdef vec[MAX_LANES] tops, highs, lows
    cdef vec[REFERENCE] reference
    cdef int row
    for row in range(lanes(references)):
        tops[row] = highs[row] = lows[row] = splat(0.0, references)
    for row in range(n_rows):
        reference_of(references, row, reference)
        fold_specialized(x[row], terms[row], n, keep, apart, reference, &tops[row], &highs[row], &lows[row])
    transpose(highs)
    transpose(lows)
    if apart:
        transpose(tops)
    merge_lanes(tops, largest, apart, references, highs, lows, lanes(references), 1)
    if has_infinite_lane(largest):
        for row in range(n_rows):
            if fabs(get(&largest, row)) == INFINITY:
                put_sum(highs, lows, row, infinite_state(get(&largest, row), has_nan(x[row], n), apart))
    high[0], low[0] = highs[0], lows[0]


cdef inline void write_batch(
    const vec** x, vec** terms, vec** y, int n_rows, Py_ssize_t n, const Job* job, const vec* references, const vec* a,
    const vec* b
) noexcept nogil:
    cdef vec[REFERENCE] reference
    cdef int row
    for row in range(n_rows):
        if job.function == LOG_SOFTMAX:
            write_chunk(SUBTRACT, x[row], y[row], n, references, get(a, row), get(b, row), job.streaming)
        elif job.exponentials == RECOMPUTE:
            reference_of(references, row, reference)
            write_chunk(EXP_SCALE, x[row], y[row], n, reference, get(a, row), get(b, row), job.streaming)
        else:
            write_chunk(
                SCALE, <const vec*>terms[row], y[row], n, references, get(a, row), get(b, row), job.streaming)


cdef void run_batch(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """Run n_rows rows from `first` on; `scratch` has room for their terms if they go there."""
    cdef const vec* sources[MAX_LANES]
    cdef vec* targets[MAX_LANES]
    cdef vec* terms[MAX_LANES]
    cdef vec[REFERENCE] references
    cdef vec largest, high, low, a, b
    cdef double[MAX_LANES] log_sums
    cdef Py_ssize_t x_offset, y_offset
    cdef int row
    for row in range(n_rows):
        locate(&job.kept, first + row, &x_offset, &y_offset)
        sources[row], targets[row] = <const vec*>(<const char*>x + x_offset), <vec*>(<char*>y + y_offset)
        terms[row] = <vec*>at(<const vec*>scratch, row * n) if job.exponentials == IN_SCRATCH else targets[row]
    find_batch_references(sources, n_rows, n, references, &largest)
    fold_batch(
        sources, terms, n_rows, n, job.exponentials != RECOMPUTE, job.function != SOFTMAX, references, largest, &high,
        &low)
    if job.function == SOFTMAX:
        normalize_columns(largest, high, low, references, &a, &b)
        write_batch(sources, terms, targets, n_rows, n, job, references, &a, &b)
        return
    log_sums_of_columns(largest, high, low, references, n_rows, log_sums)
    for row in range(n_rows):
        if job.function == LOGSUMEXP:
            put(targets[row], 0, get(&largest, row) + log_sums[row])
        else:
            put(&b, row, log_sums[row])
    if job.function == LOG_SOFTMAX:
        write_batch(sources, terms, targets, n_rows, n, job, references, &largest, &b)


cdef void run_batches(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, Py_ssize_t end, Py_ssize_t n, vec* scratch
) noexcept nogil:
    cdef int n_rows
    while first < end:
        n_rows = <int>min(<Py_ssize_t>batch_rows(n, x), end - first)
        run_batch(x, y, job, first, n_rows, n, scratch)
        first += n_rows
