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
    # Where memory is waited for, a batch stays in the L1 cache: (8192, 4096) float16 take 12.1 ms instead of 15.5.
    STREAMED_BATCH_BYTES = 16384


cdef inline int batch_rows(Py_ssize_t n, bint streaming, const vec* like) noexcept nogil:
    """The number of rows of n elements in a batch."""
    cdef Py_ssize_t size = STREAMED_BATCH_BYTES if streaming else BATCH_BYTES
    return <int>max(<Py_ssize_t>1, min(size // (n * itemsize(like)), <Py_ssize_t>lanes(like)))


cdef inline void reference_of(const vec* references, int row, vec* reference) noexcept nogil:
    """The reference of one row, in every lane."""
    cdef int i
    for i in range(REFERENCE):
        reference[i] = splat(get(references + i, row), references)


cdef inline void merge_lanes(
    const vec* tops, vec largest, int n_lanes, bint apart, const vec* reference, vec* highs, vec* lows
) noexcept nogil:
    """Bring the sums of the lanes together in the first; with the maxima apart, also all lanes' maxima but one.

    Only the first n_lanes hold anything.
    """
    cdef int distance = lanes(&largest) // 2, l
    if apart:
        fold_lane_maxima(tops, largest, n_lanes, reference, highs, lows)
    while distance:
        for l in range(min(distance, n_lanes - distance)):
            accumulate(&highs[l], &lows[l], highs[l + distance], lows[l + distance])
        distance //= 2


cdef inline void merge_coarse_lanes(vec* highs, int n_lanes) noexcept nogil:
    """`merge_lanes` for COARSE sums, which have no low parts."""
    cdef int distance = lanes(<const vec*>highs) // 2, l
    while distance:
        for l in range(min(distance, n_lanes - distance)):
            highs[l] = highs[l] + highs[l + distance]
        distance //= 2


cdef inline void fold_lane_maxima(
    const vec* tops, vec largest, int n_lanes, const vec* reference, vec* highs, vec* lows
) noexcept nogil:
    """Fold the maxima of a row's lanes, all but one that is the row's own maximum."""
    cdef vec zero = splat(0.0, &largest), one = splat(1.0, &largest), is_left = one, take, term, residual
    cdef int l
    for l in range(n_lanes):
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
    return any_greater(maximum(v, splat(0.0, &v) - v), splat(by_type(FLT_MAX, DBL_MAX, &v), &v))


cdef inline void normalize_rows(
    vec largest, vec high, vec low, const vec* reference, vec* finishers
) noexcept nogil:
    """`normalize`, but NaN for what has a NaN or +inf in it, or nothing but -inf."""
    cdef vec nan = splat(INFINITY - INFINITY, &high)
    high = where_at_most(high, splat(by_type(FLT_MAX, DBL_MAX, &high), &high), high, nan)
    high = where_at_most(high, splat(0.0, &high), nan, high)
    normalize(largest, high, low, reference, finishers)


cdef inline void coarse_normalize_rows(vec high, vec* finishers) noexcept nogil:
    """`normalize_rows` for COARSE terms: the rounding to 16 bits gives equal elements their 1 / m."""
    cdef vec infinity = splat(INFINITY, &high), nan = infinity - infinity
    high = where_at_most(high, splat(FLT_MAX, &high), high, nan)
    high = where_at_most(high, splat(0.0, &high), nan, high)
    finishers[FACTOR], finishers[FACTOR_LOW] = splat(1.0, &high) / high, splat(0.0, &high)
    finishers[LIMIT], finishers[SHARE] = infinity, splat(0.0, &high)


cdef inline void find_batch_references(
    const vec** x, int n_rows, Py_ssize_t n, bint has_zero, vec* references, vec* largest, vec* smallest
) noexcept nogil:
    """The maxima and references of the rows, a row in each lane, and the minima of the lanes of each row."""
    cdef vec[MAX_LANES] tops
    cdef int row, distance = lanes(<const vec*>largest) // 2
    for row in range(2 * distance):
        tops[row] = lane_extremes(x[row], n, smallest + row) if row < n_rows else splat(0.0, largest)
    transpose(tops)
    while distance:
        for row in range(distance):
            tops[row] = maximum(tops[row], tops[row + distance])
        distance //= 2
    largest[0] = raised_to_zero(tops[0], has_zero)
    reference_at(largest[0], splat(0.0, largest), references)


cdef inline void fold_batch(
    const vec** x, vec** terms, int n_rows, Py_ssize_t n, bint keep, bint apart, bint has_zero, const vec* smallest,
    const vec* references, vec largest, vec* high, vec* low
) noexcept nogil:
    """The sums of the rows, a row in each lane; with `keep`, their terms too."""
    cdef vec enough, high_apart, low_apart
    cdef int row
    sum_batch(x, terms, n_rows, n, keep, False, smallest, references, largest, high, low)
    if has_zero:
        add_zero(FULL, references, high, low)
    if apart:
        enough = without_top(largest, n, references, high, low)
        enough = load_first(&enough, n_rows, splat(-INFINITY, references))
        if any_greater(enough, high[0]):
            sum_batch(
                x, terms, n_rows, n, False, True, smallest, references, largest, &high_apart, &low_apart)
            low[0] = where_at_most(enough, high[0], low[0], low_apart)
            high[0] = where_at_most(enough, high[0], high[0], high_apart)
    if has_infinite_lane(largest):
        for row in range(n_rows):
            if fabs(get(&largest, row)) == INFINITY:
                put_sum(high, low, row, infinite_state(get(&largest, row), has_nan(x[row], n), apart))


cdef inline void sum_batch(
    const vec** x, vec** terms, int n_rows, Py_ssize_t n, bint keep, bint apart, const vec* smallest,
    const vec* references, vec largest, vec* high, vec* low
) noexcept nogil:
    cdef vec[MAX_LANES] tops, highs, lows
    cdef vec[REFERENCE] reference
    cdef int row
    for row in range(lanes(references)):
        tops[row] = highs[row] = lows[row] = splat(0.0, references)
    for row in range(n_rows):
        reference_of(references, row, reference)
        fold_specialized(
            x[row], terms[row], n, keep, apart, arithmetic_for(smallest[row], reference), reference, &tops[row],
            &highs[row], &lows[row])
    transpose(highs)
    transpose(lows)
    if apart:
        transpose(tops)
    merge_lanes(tops, largest, lanes(references), apart, references, highs, lows)
    high[0], low[0] = highs[0], lows[0]


cdef inline bint are_adjacent(const char** rows, int n_rows, Py_ssize_t size) noexcept nogil:
    """Whether each row of so many bytes begins where the one before ends."""
    cdef int row
    for row in range(1, n_rows):
        if rows[row] != rows[row - 1] + size:
            return False
    return True


cdef inline void stream_adjacent_rows(
    Finish kind, const vec* source, vec* y, int n_rows, Py_ssize_t n, const vec* finishers
) noexcept nogil:
    """`write_chunk` past the caches for rows of at least a register, a row's finishers in each lane.

    It goes by registers of the output, not by rows: a cache line that two rows share, were it written in two parts,
    would have to be read: (100000, 128) float32 take 4.9 ms instead of 5.6.
    """
    cdef vec[FINISHERS] own, following, shared
    cdef vec[GROUP] v
    cdef vec fill = splat(0.0, y)
    cdef Py_ssize_t width = lanes(y), i = 0, end, element = (-<uintptr_t>y % REGISTER_BYTES) // itemsize(y)
    cdef int row, j
    spread_finishers(finishers, 0, own)
    v[0] = load_first(source, <int>element, fill)
    finish(v, 1, kind, <const vec*>NULL, own, 0, True)
    store_first(y, v[0], <int>element)
    for row in range(n_rows):
        end = (row + 1) * n
        while element + GROUP * width <= end:
            for j in range(GROUP):
                v[j] = load(at(source, element + j * width))
            finish(v, GROUP, kind, <const vec*>NULL, own, 0, True)
            for j in range(GROUP):
                stream(<vec*>at(y, element + j * width), v[j])
            element += GROUP * width
        while element + width <= end:
            v[0] = load(at(source, element))
            finish(v, 1, kind, <const vec*>NULL, own, 0, True)
            stream(<vec*>at(y, element), v[0])
            element += width
        if row + 1 == n_rows:
            v[0] = load_first(at(source, element), <int>(end - element), fill)
            finish(v, 1, kind, <const vec*>NULL, own, 0, True)
            store_first(<vec*>at(y, element), v[0], <int>(end - element))
            return
        spread_finishers(finishers, row + 1, following)
        if element < end:
            for j in range(FINISHERS):
                shared[j] = load_first(own + j, <int>(end - element), following[j])
            v[0] = load(at(source, element))
            finish(v, 1, kind, <const vec*>NULL, shared, 0, True)
            stream(<vec*>at(y, element), v[0])
            element += width
        for j in range(FINISHERS):
            own[j] = following[j]


cdef inline void spread_finishers(const vec* finishers, int row, vec* own) noexcept nogil:
    """The finishers of one row in every lane."""
    cdef int i
    for i in range(FINISHERS):
        own[i] = splat(get(finishers + i, row), finishers)


cdef inline bint find_to_mend(
    const vec** x, int n_rows, Py_ssize_t n, const vec* smallest, const vec* largest, double temperature, bint* is_mended
) noexcept nogil:
    """Whether any of some rows has probabilities that are to be mended, and which."""
    cdef bint any_mended = False
    cdef vec lowest = smallest[0]
    cdef int row
    for row in range(1, n_rows):
        lowest = minimum(smallest[row], lowest)
    if not is_far_below(lowest, largest_lane(load_first(largest, n_rows, splat(-INFINITY, largest))), temperature):
        return False
    for row in range(n_rows):
        is_mended[row] = needs_mending(
            x[row], n, smallest[row], splat(get(largest, row), largest), n, temperature)
        any_mended = any_mended or is_mended[row]
    return any_mended


cdef inline void write_mended_rows(
    const vec** x, const vec** sources, vec** y, int n_rows, Py_ssize_t n, bint keep, const bint* is_mended,
    const vec* references, const vec* finishers, bint streaming
) noexcept nogil:
    """`write_rows` where some rows have probabilities that are to be mended."""
    cdef vec[REFERENCE] reference
    cdef Scale scale
    cdef int row
    for row in range(n_rows):
        reference_of(references, row, reference)
        scale = scale_in_lane(finishers, row)
        if is_mended[row]:
            write_mended(x[row], y[row], n, reference, scale, streaming)
        elif keep:
            write_chunk(SCALE, sources[row], y[row], n, reference, scale, streaming)
        else:
            write_chunk(EXP_SCALE, x[row], y[row], n, reference, scale, streaming)


cdef inline void write_rows(
    Finish kind, const vec** sources, vec** y, int n_rows, Py_ssize_t n, const vec* references, const vec* finishers,
    bint streaming
) noexcept nogil:
    """Write the rows of a batch, which have a lane each in the references and finishers."""
    cdef vec[REFERENCE] reference
    cdef Py_ssize_t size = n * itemsize(references)
    cdef int row
    if (
        streaming and kind != EXP_SCALE and n >= lanes(references) and are_adjacent(<const char**>sources, n_rows, size)
        and are_adjacent(<const char**>y, n_rows, size)
    ):
        if kind == SCALE:
            stream_adjacent_rows(SCALE, sources[0], y[0], n_rows, n, finishers)
        else:
            stream_adjacent_rows(SUBTRACT, sources[0], y[0], n_rows, n, finishers)
        return
    for row in range(n_rows):
        reference_of(references, row, reference)
        write_chunk(kind, sources[row], y[row], n, reference, scale_in_lane(finishers, row), streaming)


cdef void run_rows(
    const vec** x, vec** terms, vec** y, int n_rows, Py_ssize_t n, Function function, bint has_zero,
    Exponentials exponentials, bint streaming
) noexcept nogil:
    """Run rows of n elements, at most a register's lanes and a chunk; terms wait in `terms`, if they wait."""
    cdef vec[REFERENCE] references
    cdef vec[FINISHERS] finishers
    cdef vec[MAX_LANES] smallest
    cdef vec largest, high, low, log_high, log_low
    cdef bint keep = function == SOFTMAX and exponentials != RECOMPUTE
    cdef bint[MAX_LANES] is_mended
    cdef int row
    find_batch_references(x, n_rows, n, has_zero, references, &largest, smallest)
    fold_batch(
        x, terms, n_rows, n, keep, function != SOFTMAX, has_zero, <const vec*>smallest, references, largest, &high, &low)
    if function == SOFTMAX:
        normalize_rows(largest, high, low, references, finishers)
        if find_to_mend(x, n_rows, n, <const vec*>smallest, &largest, 1.0, is_mended):
            write_mended_rows(
                x, <const vec**>terms, y, n_rows, n, keep, is_mended, references, finishers, streaming)
        elif keep:
            write_rows(SCALE, <const vec**>terms, y, n_rows, n, references, finishers, streaming)
        else:
            write_rows(EXP_SCALE, x, y, n_rows, n, references, finishers, streaming)
        return
    log_sums_of(largest, high, low, references, &log_high, &log_low)
    if function == LOG_SOFTMAX:
        finishers[FACTOR], finishers[FACTOR_LOW] = largest, log_high + log_low
        finishers[LIMIT], finishers[SHARE] = splat(INFINITY, &largest), splat(0.0, &largest)
        write_rows(SUBTRACT, x, y, n_rows, n, references, finishers, streaming)
        return
    largest = add_log_sums(largest, log_high, log_low)
    for row in range(n_rows):
        put(y[row], 0, get(&largest, row))


cdef void run_batch(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """Run n_rows rows from `first` on; `scratch` has room for their terms if they go there."""
    cdef const vec* sources[MAX_LANES]
    cdef vec* targets[MAX_LANES]
    cdef vec* terms[MAX_LANES]
    cdef Py_ssize_t x_offset, y_offset
    cdef int row
    if job.storage != AS_COMPUTED:
        run_stored_batch(x, y, job, first, n_rows, n, scratch)
        return
    for row in range(n_rows):
        locate(&job.kept, first + row, &x_offset, &y_offset)
        sources[row], targets[row] = <const vec*>(<const char*>x + x_offset), <vec*>(<char*>y + y_offset)
        terms[row] = <vec*>at(<const vec*>scratch, row * n) if job.exponentials == IN_SCRATCH else targets[row]
    run_rows(sources, terms, targets, n_rows, n, job.function, job.has_zero, job.exponentials, job.streaming)
