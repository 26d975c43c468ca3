"""States that outlive a call, one a row: data are folded into them, and probabilities written from them."""

cdef struct Streaming:
    Rows rows
    State* states  # one a row, in the order of the axes, with the maximum apart
    bint streaming
    bint is_single
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory


def run_streaming(
    int traversal, bint streaming, int storage, tuple kept, tuple reduced, cnp.ndarray x, cnp.ndarray y,
    cnp.ndarray states, Py_ssize_t n_blocks, int n_threads
):
    """Run a call.

    Parameters
    ----------
    traversal, streaming, storage, kept, reduced, x, n_blocks, n_threads
        As for `run`; the kept dimensions are in the order of the states.
    y : ndarray or None
        Where probabilities go; None to fold.
    states : ndarray
        float64, five numbers for each row: the members of State.
    """
    cdef Streaming call
    call.streaming, call.states = streaming, <State*>data_of(states)
    if traversal in (TILES, STRIPS):
        run_sink(FOLD_STATES, &call, 0, traversal, storage, kept, reduced, x, n_blocks, n_threads)
        return
    call.rows = rows_of(traversal, storage, kept, reduced, x, y)
    call.is_single, call.n_blocks, call.lacks_memory = cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64, n_blocks, False
    run_in_parts(run_streaming_block, &call, &call.first, n_blocks, n_threads)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a row")


cdef void run_streaming_block(void* context, Py_ssize_t block) noexcept nogil:
    cdef Streaming* call = <Streaming*>context
    if call.is_single:
        run_streaming_bands(call, call.first + block, <const f32v*>NULL)
    else:
        run_streaming_bands(call, call.first + block, <const f64v*>NULL)


cdef void run_streaming_bands(Streaming* call, Py_ssize_t block, const vec* like) noexcept nogil:
    cdef Py_ssize_t n_bands = count_bands(&call.rows, like), room = band_bytes(&call.rows, like), index
    cdef void* memory = malloc(room + REGISTER_BYTES)
    cdef char* scratch = <char*>memory + <Py_ssize_t>(-<uintptr_t>memory % REGISTER_BYTES)
    if memory == NULL:
        call.lacks_memory = True
        return
    for index in range(n_bands * block // call.n_blocks, n_bands * (block + 1) // call.n_blocks):
        run_streaming_band(call, index, <vec*>scratch)
    if call.streaming:
        stream_fence()
    free(memory)


cdef void run_streaming_band(const Streaming* call, Py_ssize_t index, vec* scratch) noexcept nogil:
    cdef Band band = band_at(&call.rows, index, <const vec*>scratch)
    if call.rows.y == NULL:
        fold_band(&call.rows, &band, True, call.states + band.row, scratch, NULL, NULL)
    else:
        write_normalized(call, &band, scratch)


cdef void fold_tiles_into_states(
    vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Upcoming* upcoming, const Streaming* call,
    Py_ssize_t first_row, const vec* smallest, vec* largest
) noexcept nogil:
    """Fold rows of up to a chunk, as `fold_band` does."""
    cdef vec[MAX_TILES] row_offsets, high, low
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec exponent
    cdef State[MAX_LANES] others
    cdef State* states
    cdef int t, row
    for t in range(columns.n_tiles):
        row_offsets[t] = splat(0.0, tiles)
        states = call.states + first_row + columns.first[t]
        for row in range(columns.count[t]):
            put(row_offsets + t, row, offset_for_more(states[row]))
    fold_tiles(
        tiles, tile_size, columns, n, upcoming, False, True, False, False, row_offsets, smallest, references,
        largest, high, low)
    for t in range(columns.n_tiles):
        states = call.states + first_row + columns.first[t]
        exponent = exponent_of(references + t * REFERENCE)
        for row in range(columns.count[t]):
            others[row] = state_in_lane(row, references + t * REFERENCE, &exponent, largest + t, high + t, low + t)
        merge_each(states, others, columns.count[t])


cdef void write_normalized(const Streaming* call, const Band* band, vec* scratch) noexcept nogil:
    """Write probabilities by states that have their maxima apart."""
    cdef const vec* like = scratch
    cdef Py_ssize_t length = chunk_length(like), first = 0, size
    cdef State[MAX_NARROW_COLUMNS] totals
    cdef double[MAX_NARROW_COLUMNS] log_sums
    cdef Scale[MAX_NARROW_COLUMNS] scales
    cdef vec smallest
    cdef double largest
    cdef const vec* chunks
    cdef const vec* logits
    cdef vec* y
    cdef vec* shares
    cdef int row
    for row in range(band.count):
        log_sums[row] = log_sum(within_range(call.states[band.row + row], like), like)
        totals[row] = within_range(with_maximum(call.states[band.row + row], like), like)
        if fabs(totals[row].maximum) < INFINITY and is_regular(totals[row]):
            scales[row] = scale_of(totals[row], like)
        else:
            totals[row].high = INFINITY - INFINITY
    while first < call.rows.n:
        size = min(length, call.rows.n - first)
        chunks = read_band(&call.rows, band, first, size, scratch)
        y = output_of_band(&call.rows, band, first, scratch)
        for row in range(band.count):
            logits = row_of_band(&call.rows, chunks, row)
            shares = row_of_band(&call.rows, <const vec*>y, row)
            largest = lane(largest_lane(lane_extremes(logits, size, &smallest)), 0)
            if not is_regular(totals[row]):
                fill_nan(shares, size)
                continue
            # The sum, over the term of the maximum, is at most this power of two.
            scales[row].is_mended = needs_mending(
                logits, size, smallest, splat(totals[row].maximum, like),
                exact_power_of_two(rint(log_sums[row] * LOG2_E + 0.6)), 1.0)
            if largest > totals[row].maximum:
                write_beyond(logits, shares, size, totals[row].maximum, log_sums[row])
            else:
                write_probabilities(
                    logits, <const vec*>NULL, shares, size, totals[row], totals[row], scales[row], call.streaming)
        write_band(&call.rows, band, first, size, <const vec*>y)
        first += size


cdef void write_beyond(const vec* x, vec* y, Py_ssize_t n, double largest, double log_sum_of_row) noexcept nogil:
    """exp(x - logsumexp) where some x is larger than all that the state has seen, and terms may overflow."""
    cdef Py_ssize_t i
    for i in range(n):
        put(y, i, exp((get(x, i) - largest) - log_sum_of_row))


def merge_rows(cnp.ndarray states, cnp.ndarray others):
    """Make of each state that of its elements and of those of another."""
    cdef State* into = <State*>cnp.PyArray_DATA(states)
    cdef const State* other = <const State*>cnp.PyArray_DATA(others)
    cdef Py_ssize_t row = 0, n_rows = states.shape[0]
    with nogil:
        while row < n_rows:
            merge_each(into + row, other + row, <int>min(<Py_ssize_t>MAX_LANES, n_rows - row))
            row += MAX_LANES


def logsumexp_of_rows(cnp.ndarray states, bint is_single, cnp.ndarray result):
    """Write the logarithm of the sum of each state of float32 or float64 elements, as float64."""
    cdef const State* state = <const State*>cnp.PyArray_DATA(states)
    cdef double* log_sums = <double*>cnp.PyArray_DATA(result)
    cdef Py_ssize_t row, n_rows = states.shape[0]
    with nogil:
        for row in range(n_rows):
            if is_single:
                log_sums[row] = logsumexp_of_state(within_range(state[row], <const f32v*>NULL), <const f32v*>NULL)
            else:
                log_sums[row] = logsumexp_of_state(state[row], <const f64v*>NULL)
