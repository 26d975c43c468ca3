"""Kernels for a strip: adjacent rows, element by element side by side, as where the reduced axis is not the last.

A register holds one element of as many rows (columns of the strip) as it has lanes. Within a column the order of
summation is that of a contiguous row: element j belongs to lane j % lanes, each lane adds up its elements in order, and
what there is done between the lanes of a register is done here between registers.

Arrays of registers hold what is known of the columns: register v belongs to columns v * lanes and following. Where each
lane of the sum has its own, it varies slowest: register l * n_registers + v is that of lane l.
"""

cdef enum:
    # Bytes of each row in a strip. Each row is another page of memory: (4096, 4096) float32 on axis 0 took 24 ms with
    # 256, 14 with 512 and 12 with 1024, but (4000, 4100) 23, 12 and 21.
    STRIP_BYTES = 512
    # How many rows ahead the next ones are fetched; strides are too long for the processor to. 14 ms become 12.
    PREFETCH_ROWS = 2
    LANE_ROWS = 4  # rows of one lane that are folded before those of the next: its sums stay in registers
    MAX_COLUMNS = STRIP_BYTES // 4
    MAX_REGISTERS = STRIP_BYTES // 16


cdef struct Strip:
    Py_ssize_t length      # elements of the reduced axis, one under the other
    int n_columns          # rows of the layout, side by side; at most STRIP_BYTES // itemsize
    Py_ssize_t x_stride    # bytes from one element of a column to the next
    Py_ssize_t y_stride


cdef inline int strip_columns(const vec* like) noexcept nogil:
    return STRIP_BYTES // itemsize(like)


cdef inline int strip_registers(Strip strip, const vec* like) noexcept nogil:
    return (strip.n_columns + lanes(like) - 1) // lanes(like)


cdef inline Strip with_length(Strip strip, Py_ssize_t length) noexcept nogil:
    """The strip with another length."""
    strip.length = length
    return strip


cdef inline const vec* below(const vec* p, Py_ssize_t row, Py_ssize_t stride) noexcept nogil:
    return <const vec*>(<const char*>p + row * stride)


cdef inline vec load_columns(const vec* p, int v, int n_columns) noexcept nogil:
    """Register v of a row; -inf behind the last column."""
    if (v + 1) * lanes(p) <= n_columns:
        return load(p + v)
    return load_first(p + v, n_columns - v * lanes(p), splat(-INFINITY, p))


cdef inline void store_columns(vec* p, int v, int n_columns, vec value, bint streaming) noexcept nogil:
    if (v + 1) * lanes(<const vec*>p) > n_columns:
        store_first(p + v, value, n_columns - v * lanes(<const vec*>p))
    elif streaming and <uintptr_t>p % REGISTER_BYTES == 0:
        stream(p + v, value)
    else:
        store(p + v, value)


cdef inline void fold_lane(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart, Py_ssize_t first,
    const vec* references, int v, int count, vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """Fold up to LANE_ROWS rows of one lane, the lanes apart, in `count` registers from v on."""
    cdef vec[GROUP] top, high, low, logits, group
    cdef Py_ssize_t row = first, last = min(strip.length, first + LANE_ROWS * lanes(x))
    cdef int j
    for j in range(count):
        top[j], high[j], low[j] = tops[j], highs[j], lows[j]
    while row < last:
        for j in range(count):
            logits[j] = load_columns(below(x, row, strip.x_stride), v + j, strip.n_columns)
        for j in range(count):
            prefetch(below(x, row + PREFETCH_ROWS, strip.x_stride) + v + j)
        fold_registers(logits, group, count, top, high, low, apart, references + v * REFERENCE, 1)
        if keep:
            for j in range(count):
                store_columns(
                    <vec*>below(<const vec*>terms, row, terms_stride), v + j, strip.n_columns, group[j], False)
        row += lanes(x)
    for j in range(count):
        tops[j], highs[j], lows[j] = top[j], high[j], low[j]


cdef inline void fold_strip_elements(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart, const vec* references,
    vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """Fold the rows of a chunk into the sums and, with the maxima apart, the maxima of each lane."""
    cdef int n_registers = strip_registers(strip, x), width = lanes(x), l, v, i
    cdef Py_ssize_t first = 0
    cdef vec base = splat(0.0, x) if apart else sum_base(x)
    for i in range(width * n_registers):
        tops[i], highs[i], lows[i] = splat(-INFINITY, x), base, splat(0.0, x)
    while first < strip.length:
        for l in range(<int>min(width, strip.length - first)):
            v = 0
            while v < n_registers:
                i = l * n_registers + v
                if n_registers - v >= GROUP:
                    fold_lane(
                        x, terms, strip, terms_stride, keep, apart, first + l, references, v, GROUP, tops + i,
                        highs + i, lows + i)
                    v += GROUP
                else:
                    fold_lane(
                        x, terms, strip, terms_stride, keep, apart, first + l, references, v, 1, tops + i, highs + i,
                        lows + i)
                    v += 1
        first += LANE_ROWS * width
    for i in range(width * n_registers):
        highs[i] = highs[i] - base


cdef void fold_strip_specialized(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart, const vec* references,
    vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """`fold_strip_elements` in one copy for each kind of call, so that its loops hold no decisions."""
    if apart:
        fold_strip_elements(x, terms, strip, terms_stride, False, True, references, tops, highs, lows)
    elif keep:
        fold_strip_elements(x, terms, strip, terms_stride, True, False, references, tops, highs, lows)
    else:
        fold_strip_elements(x, terms, strip, terms_stride, False, False, references, tops, highs, lows)


cdef inline void find_maxima(
    const vec* x, vec* copy, Strip strip, Py_ssize_t copy_stride, bint copied, vec* largest
) noexcept nogil:
    cdef Py_ssize_t row
    cdef int v, n_registers = strip_registers(strip, x)
    cdef vec logits
    for v in range(n_registers):
        largest[v] = splat(-INFINITY, x)
    for row in range(strip.length):
        for v in range(n_registers):
            prefetch(below(x, row + PREFETCH_ROWS, strip.x_stride) + v)
        for v in range(n_registers):
            logits = load_columns(below(x, row, strip.x_stride), v, strip.n_columns)
            largest[v] = maximum(logits, largest[v])  # in this order of operands a NaN is passed over
            if copied:
                store(<vec*>below(<const vec*>copy, row, copy_stride) + v, logits)


cdef void column_maxima(const vec* x, Strip strip, vec* largest) noexcept nogil:
    """Each column's maximum over its elements that are not NaN."""
    find_maxima(x, <vec*>NULL, strip, 0, False, largest)


cdef void copy_and_find_maxima(const vec* x, vec* copy, Strip strip, Py_ssize_t copy_stride, vec* largest) noexcept nogil:
    """`column_maxima`, and the strip in whole registers.

    Rows of an array beyond the caches are far apart, often by a power of two, and evict each other: read a second time
    they come from memory again, (4096, 4096) float32 on axis 0 in 19 ms instead of 12.
    """
    find_maxima(x, copy, strip, copy_stride, True, largest)


cdef bint column_has_nan(const vec* x, Strip strip, int column) noexcept nogil:
    cdef Py_ssize_t row
    cdef double value
    for row in range(strip.length):
        value = get(below(x, row, strip.x_stride), column)
        if value != value:
            return True
    return False


cdef void fold_strip_chunk(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint copied, bint apart,
    const vec* row_offsets, vec* references, vec* largest, vec* highs, vec* lows
) noexcept nogil:
    """The references, maxima and sums of the columns over one chunk of rows; with `keep`, their terms too.

    With `copied`, terms take the place of logits that were copied there. `row_offsets` are those of the columns in an earlier chunk. `highs` and `lows` have room for all lanes; the sums are
    in lane 0. A column whose maximum is infinite has the sum of its `infinite_state`.
    """
    cdef vec[MAX_COLUMNS] tops
    cdef int n_registers = strip_registers(strip, x), n_lanes = <int>min(strip.length, <Py_ssize_t>lanes(x)), v, column
    cdef const vec* logits = x
    cdef Strip source = strip
    cdef double top
    if keep and copied:
        logits, source.x_stride = <const vec*>terms, terms_stride
        copy_and_find_maxima(x, terms, strip, terms_stride, largest)
    else:
        column_maxima(x, strip, largest)
    for v in range(n_registers):
        reference_at(largest[v], row_offsets[v], references + v * REFERENCE)
    fold_strip_specialized(logits, terms, source, terms_stride, keep, apart, references, tops, highs, lows)
    for v in range(n_registers):
        merge_lanes(tops + v, largest[v], apart, references + v * REFERENCE, highs + v, lows + v, n_lanes, n_registers)
    for v in range(n_registers):
        if has_infinite_lane(largest[v]):
            for column in range(v * lanes(x), min((v + 1) * lanes(x), strip.n_columns)):
                top = get(<const vec*>largest, column)
                if fabs(top) == INFINITY:
                    put_sum(highs, lows, column, infinite_state(top, column_has_nan(x, strip, column), apart))


cdef inline bint has_infinite_lane(vec v) noexcept nogil:
    return lane(largest_lane(maximum(v, splat(0.0, &v) - v)), 0) == INFINITY


cdef inline void put_sum(vec* highs, vec* lows, int column, State state) noexcept nogil:
    """Set the sum of one column to that of a state."""
    cdef double leading = to_lane(state.high, <const vec*>highs)
    put(highs, column, leading)
    put(lows, column, (state.high - leading) + state.low)


cdef inline void fold_lane_maxima(
    const vec* tops, int step, vec largest, const vec* reference, vec* highs, vec* lows, int n_lanes
) noexcept nogil:
    """Fold the maxima of a column's lanes, all but one that is the column's own maximum."""
    cdef vec zero = splat(0.0, &largest), one = splat(1.0, &largest), is_left = one, take, term, residual
    cdef int l
    for l in range(n_lanes):
        # 0 for the first lane that holds the maximum, 1 for the others.
        take = where_at_most(largest, tops[l * step], one - is_left, one)
        is_left = where_at_most(largest, tops[l * step], zero, is_left)
        scaled_exp(tops + l * step, &term, &residual, 1, reference, 0)
        accumulate(&highs[l * step], &lows[l * step], term * take, residual * take)


cdef inline void merge_lanes(
    const vec* tops, vec largest, bint apart, const vec* reference, vec* highs, vec* lows, int n_lanes, int step
) noexcept nogil:
    """Bring the sums of the first lanes together in lane 0; with the maxima apart, also the maxima of all but one.

    The other lanes are empty: adding nothing would change nothing, but take half of the time of a tile of short rows.
    """
    cdef int distance = lanes(&largest) // 2, l
    if apart:
        fold_lane_maxima(tops, step, largest, reference, highs, lows, n_lanes)
    while distance:
        for l in range(min(distance, n_lanes - distance)):
            accumulate(&highs[l * step], &lows[l * step], highs[(l + distance) * step], lows[(l + distance) * step])
        distance //= 2


cdef inline State column_state(
    int column, const vec* references, const vec* largest, const vec* highs, const vec* lows
) noexcept nogil:
    """What is known of one column of a chunk, as a state that can be merged."""
    cdef int width = lanes(largest), v = column // width, l = column % width
    cdef State state
    state.maximum = get(largest, column)
    if fabs(state.maximum) == INFINITY:
        state = infinite_state(state.maximum, False, True)
    else:
        state.offset = lane(references[v * REFERENCE + OFFSET], l)
        state.exponent = lane(exponent_of(references + v * REFERENCE), l)
    state.high, state.low = get(highs, column), get(lows, column)
    return state


cdef void fold_strip(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint copied, bint apart, State* states,
    vec* references, vec* largest, vec* highs, vec* lows
) noexcept nogil:
    """`fold_strip_chunk` for any number of rows.

    Where there is more than one chunk, `states` takes the state of each column and chunk, if it is not NULL.
    """
    cdef vec[MAX_REGISTERS] row_offsets
    cdef State[MAX_COLUMNS] totals
    cdef State state
    cdef Py_ssize_t length = chunk_length(x), first = 0
    cdef int column, v
    for v in range(strip_registers(strip, x)):
        row_offsets[v] = splat(0.0, x)
    if strip.length <= length:
        fold_strip_chunk(x, terms, strip, terms_stride, keep, copied, apart, row_offsets, references, largest, highs, lows)
        return
    while first < strip.length:
        fold_strip_chunk(
            below(x, first, strip.x_stride), <vec*>below(<const vec*>terms, first, terms_stride),
            with_length(strip, min(length, strip.length - first)), terms_stride, keep, copied, apart, row_offsets, references,
            largest, highs, lows)
        for column in range(strip.n_columns):
            state = column_state(column, references, largest, <const vec*>highs, <const vec*>lows)
            if states != NULL:
                states[first // length * strip.n_columns + column] = state
            totals[column] = merge(totals[column], state, apart) if first else state
            put(row_offsets, column, totals[column].offset)
        first += length
    for column in range(strip.n_columns):
        state = within_range(totals[column], x)
        put_sum(highs, lows, column, state)
        put(largest, column, state.maximum)
        put_reference(references, column, state)


cdef inline void put_reference(vec* references, int column, State state) noexcept nogil:
    """Set the reference of one column to that of a state."""
    cdef int width = lanes(<const vec*>references), i
    cdef vec[REFERENCE] reference
    make_reference(splat(state.offset, references), splat(state.exponent, references), reference)
    for i in range(REFERENCE):
        put(references + column // width * REFERENCE + i, column % width, lane(reference[i], 0))


cdef inline void write_strip(
    Finish kind, const vec* source, Py_ssize_t source_stride, vec* y, Strip strip, const vec* references, const vec* a,
    const vec* b, bint streaming
) noexcept nogil:
    """Write one chunk of rows from its terms or its logits."""
    cdef int n_registers = strip_registers(strip, source), v, j, count
    cdef Py_ssize_t row
    cdef vec[GROUP] values
    for row in range(strip.length):
        v = 0
        while v < n_registers:
            count = GROUP if n_registers - v >= GROUP else 1
            for j in range(count):
                values[j] = load_columns(below(source, row, source_stride), v + j, strip.n_columns)
            if count == GROUP:
                finish(values, GROUP, kind, references + v * REFERENCE, a + v, b + v, 1)
            else:
                finish(values, 1, kind, references + v * REFERENCE, a + v, b + v, 1)
            for j in range(count):
                store_columns(
                    <vec*>below(<const vec*>y, row, strip.y_stride), v + j, strip.n_columns, values[j], streaming)
            v += count


cdef void softmax_strip(
    const vec* x, vec* y, Strip strip, Exponentials exponentials, vec* scratch, State* states, bint streaming
) noexcept nogil:
    """Softmax of each column.

    `scratch` has room for the terms of the whole strip if they go there, `states` for a state of each column and chunk.
    """
    cdef vec[REFERENCE * MAX_REGISTERS] references
    cdef vec[MAX_REGISTERS] largest, a, b, scaled_a, scaled_b
    cdef vec[MAX_COLUMNS] highs, lows
    cdef Py_ssize_t length = chunk_length(x), first = 0, terms_stride = strip.y_stride
    cdef vec* terms = y
    cdef Strip chunk
    cdef int v
    if exponentials == IN_SCRATCH:
        terms, terms_stride = scratch, strip_registers(strip, x) * REGISTER_BYTES
    fold_strip(
        x, terms, strip, terms_stride, exponentials != RECOMPUTE, exponentials == IN_SCRATCH, False, states, references,
        largest, highs, lows)
    for v in range(strip_registers(strip, x)):
        normalize_columns(largest[v], highs[v], lows[v], references + v * REFERENCE, &a[v], &b[v])
    while first < strip.length:
        chunk = with_length(strip, min(length, strip.length - first))
        if exponentials != RECOMPUTE and scale_terms(
                strip, states + first // length * strip.n_columns, references, a, b, scaled_a, scaled_b):
            write_strip(
                SCALE, below(<const vec*>terms, first, terms_stride), terms_stride,
                <vec*>below(<const vec*>y, first, strip.y_stride), chunk, references, scaled_a, scaled_b, streaming)
        else:
            write_strip(
                EXP_SCALE, below(x, first, strip.x_stride), strip.x_stride,
                <vec*>below(<const vec*>y, first, strip.y_stride), chunk, references, a, b, streaming)
        first += length


cdef inline void normalize_columns(
    vec largest, vec high, vec low, const vec* reference, vec* a, vec* b
) noexcept nogil:
    """`normalize`, but NaN for what has a NaN or +inf in it, or nothing but -inf."""
    cdef vec nan = splat(INFINITY - INFINITY, &high)
    high = where_at_most(high, splat(by_type(FLT_MAX, DBL_MAX, &high), &high), high, nan)
    high = where_at_most(high, splat(0.0, &high), nan, high)
    normalize(largest, high, low, reference, a, b)


cdef bint scale_terms(
    Strip strip, const State* states, const vec* references, const vec* a, const vec* b, vec* scaled_a, vec* scaled_b
) noexcept nogil:
    """The factors for the stored terms of a chunk; False if powers of two do not make those of the whole columns."""
    cdef int width = lanes(references), column, v
    cdef double offset, power
    cdef Scale scale
    for v in range(strip_registers(strip, references)):
        scaled_a[v], scaled_b[v] = a[v], b[v]
    if strip.length <= chunk_length(references):
        return True
    for column in range(strip.n_columns):
        v = column // width
        offset = lane(references[v * REFERENCE + OFFSET], column % width)
        power = exact_power_of_two(
            states[column].exponent - lane(exponent_of(references + v * REFERENCE), column % width))
        scale.factor, scale.factor_low = get(a, column), get(b, column)
        if states[column].offset != offset or not scales_exactly(power, scale, references):
            return False
        put(scaled_a, column, scale.factor * power)
        put(scaled_b, column, scale.factor_low * power)
    return True


cdef void log_softmax_strip(const vec* x, vec* y, Strip strip, bint streaming) noexcept nogil:
    cdef vec[MAX_REGISTERS] largest, subtrahends
    cdef double[MAX_COLUMNS] log_sums
    cdef int column
    log_sums_of_strip(x, strip, largest, log_sums)
    for column in range(strip.n_columns):
        put(subtrahends, column, log_sums[column])
    write_strip(SUBTRACT, x, strip.x_stride, y, strip, largest, largest, subtrahends, streaming)


cdef void logsumexp_strip(const vec* x, vec* y, Strip strip) noexcept nogil:
    cdef vec[MAX_REGISTERS] largest
    cdef double[MAX_COLUMNS] log_sums
    cdef int column
    log_sums_of_strip(x, strip, largest, log_sums)
    for column in range(strip.n_columns):
        put(y, column, get(<const vec*>largest, column) + log_sums[column])


cdef void log_sums_of_strip(const vec* x, Strip strip, vec* largest, double* log_sums) noexcept nogil:
    """The maximum of each column and the logarithm of its sum relative to it (see `log_sum`)."""
    cdef vec[REFERENCE * MAX_REGISTERS] references
    cdef vec[MAX_COLUMNS] highs, lows
    cdef int v, width = lanes(x)
    fold_strip(x, <vec*>NULL, strip, 0, False, False, True, <State*>NULL, references, largest, highs, lows)
    for v in range(strip_registers(strip, x)):
        log_sums_of_columns(
            largest[v], highs[v], lows[v], references + v * REFERENCE, min(width, strip.n_columns - v * width),
            log_sums + v * width)


cdef inline void log_sums_of_columns(
    vec largest, vec high, vec low, const vec* reference, int n_columns, double* log_sums
) noexcept nogil:
    """`log_sum` for each of the first lanes."""
    cdef vec ratio, ratio_low
    cdef double total
    cdef int column
    rest_over_top(largest, high, low, reference, &ratio, &ratio_low)
    for column in range(n_columns):
        total = lane(high, column)
        if total != total:
            log_sums[column] = total
        elif fabs(lane(largest, column)) == INFINITY:
            log_sums[column] = 0.0
        else:
            log_sums[column] = log1p_of(lane(ratio, column), lane(ratio_low, column), reference)
