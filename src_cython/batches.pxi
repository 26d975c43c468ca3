"""Kernels for several contiguous rows at a time, where each is one chunk.

What comes between the passes over a row - its reference, the addition of its lanes, the reciprocal - is a chain of some
two hundred operations that wait for each other. A batch does it for all its rows at once, a row in each lane:
(64, 1000) float32 take 14 us instead of 17. The bits are those of the row alone.
"""


cdef enum:
    MAX_LANES = 16
    # Input of a batch; its rows stay in the L2 cache from one pass to the next. (64, 1000) float32 take 11.8 us,
    # with 32 KiB 12.6, with 16 KiB 13.3.
    BATCH_BYTES = 65536


cdef inline int batch_rows(Py_ssize_t n, const vec* like) noexcept nogil:
    """The number of rows of n elements in a batch."""
    return <int>max(<Py_ssize_t>1, min(BATCH_BYTES // (n * itemsize(like)), <Py_ssize_t>lanes(like)))


cdef inline void reference_of(const vec* references, int row, vec* reference) noexcept nogil:
    """The reference of one row, in every lane."""
    cdef int i
    for i in range(REFERENCE):
        reference[i] = splat(get(references + i, row), references)


cdef inline void merge_lanes(
    const vec* tops, vec largest, bint apart, const vec* reference, vec* highs, vec* lows
) noexcept nogil:
    """Bring the sums of all lanes together in the first; with the maxima apart, also all lanes' maxima but one."""
    cdef int distance = lanes(&largest) // 2, l
    if apart:
        fold_lane_maxima(tops, largest, reference, highs, lows)
    while distance:
        for l in range(distance):
            accumulate(&highs[l], &lows[l], highs[l + distance], lows[l + distance])
        distance //= 2


cdef inline void fold_lane_maxima(
    const vec* tops, vec largest, const vec* reference, vec* highs, vec* lows
) noexcept nogil:
    """Fold the maxima of a row's lanes, all but one that is the row's own maximum."""
    cdef vec zero = splat(0.0, &largest), one = splat(1.0, &largest), is_left = one, take, term, residual
    cdef int l
    for l in range(lanes(&largest)):
        # 0 for the first lane that holds the maximum, 1 for the others.
        take = where_at_most(largest, tops[l], one - is_left, one)
        is_left = where_at_most(largest, tops[l], zero, is_left)
        scaled_exp(tops + l, &term, &residual, 1, reference, 0)
        accumulate(&highs[l], &lows[l], term * take, residual * take)


cdef inline void put_sum(vec* highs, vec* lows, int row, State state) noexcept nogil:
    """Set the sum of one row to that of a state."""
    cdef double leading = to_lane(state.high, <const vec*>highs)
    put(highs, row, leading)
    put(lows, row, (state.high - leading) + state.low)


cdef inline bint has_infinite_lane(vec v) noexcept nogil:
    return lane(largest_lane(maximum(v, splat(0.0, &v) - v)), 0) == INFINITY


cdef inline void normalize_rows(
    vec largest, vec high, vec low, const vec* reference, vec* finishers
) noexcept nogil:
    """`normalize`, but NaN for what has a NaN or +inf in it, or nothing but -inf."""
    cdef vec nan = splat(INFINITY - INFINITY, &high)
    high = where_at_most(high, splat(by_type(FLT_MAX, DBL_MAX, &high), &high), high, nan)
    high = where_at_most(high, splat(0.0, &high), nan, high)
    normalize(largest, high, low, reference, finishers)


cdef inline void log_sums_of(
    vec largest, vec high, vec low, const vec* reference, int n_rows, double* log_sums
) noexcept nogil:
    """`log_sum` for each of the first lanes."""
    cdef vec ratio, ratio_low
    cdef double total
    cdef int row
    rest_over_top(largest, high, low, reference, &ratio, &ratio_low)
    for row in range(n_rows):
        total = lane(high, row)
        if total != total:
            log_sums[row] = total
        elif fabs(lane(largest, row)) == INFINITY:
            log_sums[row] = 0.0
        else:
            log_sums[row] = log1p_of(lane(ratio, row), lane(ratio_low, row), reference)


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
    cdef vec enough, high_apart, low_apart
    cdef int row
    sum_batch(x, terms, n_rows, n, keep, False, references, largest, high, low)
    if apart:
        enough = without_top(largest, references, high, low)
        enough = load_first(&enough, n_rows, splat(-INFINITY, references))
        if any_greater(enough, high[0]):
            sum_batch(x, terms, n_rows, n, False, True, references, largest, &high_apart, &low_apart)
            low[0] = where_at_most(enough, high[0], low[0], low_apart)
            high[0] = where_at_most(enough, high[0], high[0], high_apart)
    if has_infinite_lane(largest):
        for row in range(n_rows):
            if fabs(get(&largest, row)) == INFINITY:
                put_sum(high, low, row, infinite_state(get(&largest, row), has_nan(x[row], n), apart))


cdef inline void sum_batch(
    const vec** x, vec** terms, int n_rows, Py_ssize_t n, bint keep, bint apart, const vec* references, vec largest,
    vec* high, vec* low
) noexcept nogil:
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
    merge_lanes(tops, largest, apart, references, highs, lows)
    high[0], low[0] = highs[0], lows[0]


cdef void run_rows(
    const vec** x, vec** terms, vec** y, int n_rows, Py_ssize_t n, Function function, Exponentials exponentials,
    bint streaming
) noexcept nogil:
    """Run rows of n elements, at most a register's lanes and a chunk; terms wait in `terms`, if they wait."""
    cdef vec[REFERENCE] references, reference
    cdef vec[FINISHERS] finishers
    cdef vec largest, high, low
    cdef double[MAX_LANES] log_sums
    cdef int row
    find_batch_references(x, n_rows, n, references, &largest)
    fold_batch(
        x, terms, n_rows, n, function == SOFTMAX and exponentials != RECOMPUTE, function != SOFTMAX, references, largest,
        &high, &low)
    if function == SOFTMAX:
        normalize_rows(largest, high, low, references, finishers)
    else:
        log_sums_of(largest, high, low, references, n_rows, log_sums)
    for row in range(n_rows):
        if function == LOGSUMEXP:
            put(y[row], 0, get(&largest, row) + log_sums[row])
        elif function == LOG_SOFTMAX:
            write_chunk(
                SUBTRACT, x[row], y[row], n, references, scale_by(get(&largest, row), log_sums[row]), streaming)
        elif exponentials == RECOMPUTE:
            reference_of(references, row, reference)
            write_chunk(
                EXP_SCALE, x[row], y[row], n, reference, scale_in_lane(<const vec*>finishers, row), streaming)
        else:
            write_chunk(
                SCALE, <const vec*>terms[row], y[row], n, references, scale_in_lane(<const vec*>finishers, row),
                streaming)


cdef void run_batch(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """Run n_rows rows from `first` on; `scratch` has room for their terms if they go there."""
    cdef const vec* sources[MAX_LANES]
    cdef vec* targets[MAX_LANES]
    cdef vec* terms[MAX_LANES]
    cdef Py_ssize_t x_offset, y_offset
    cdef bint adjacent = job.function == SOFTMAX and job.exponentials == IN_SCRATCH and job.streaming
    cdef int row
    for row in range(n_rows):
        locate(&job.kept, first + row, &x_offset, &y_offset)
        sources[row], targets[row] = <const vec*>(<const char*>x + x_offset), <vec*>(<char*>y + y_offset)
        terms[row] = <vec*>at(<const vec*>scratch, row * n) if job.exponentials == IN_SCRATCH else targets[row]
        adjacent &= <const vec*>targets[row] == at(<const vec*>targets[0], row * n)
    # Line by line of the output, not row by row: a cache line that two rows share would be written in parts. Where rows
    # begin in the midst of one, (100000, 128) float32 take 5.9 ms instead of 7.2; elsewhere, 5.3 instead of 4.9.
    if adjacent:
        run_rows(sources, terms, terms, n_rows, n, SOFTMAX, IN_SCRATCH, False)
        write_chunk(SCALE, <const vec*>scratch, targets[0], n_rows * n, <const vec*>NULL, scale_by(1.0, 0.0), True)
    else:
        run_rows(sources, terms, targets, n_rows, n, job.function, job.exponentials, job.streaming)
