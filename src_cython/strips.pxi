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
    """Fold up to GROUP rows of one lane, the lanes apart, in `count` registers from v on."""
    cdef vec[GROUP] top, high, low, logits, group
    cdef Py_ssize_t row = first, last = min(strip.length, first + GROUP * lanes(x))
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


cdef inline bint fold_strip_with_references(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart, const vec* references,
    vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """Fold the rows of a chunk into the sums and maxima of each lane; False if an element is above its limit."""
    cdef int n_registers = strip_registers(strip, x), width = lanes(x), l, v, i
    cdef Py_ssize_t first = 0
    cdef bint exceeded = False
    for i in range(width * n_registers):
        tops[i], highs[i], lows[i] = splat(-INFINITY, x), splat(0.0, x), splat(0.0, x)
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
            for v in range(n_registers):
                exceeded |= any_greater(tops[l * n_registers + v], references[v * REFERENCE + LIMIT])
        if exceeded:
            return False
        first += GROUP * width
    return True


cdef bint fold_strip_specialized(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart, const vec* references,
    vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """`fold_strip_with_references` in one copy for each kind of call, so that its loops hold no decisions."""
    if apart:
        return fold_strip_with_references(x, terms, strip, terms_stride, False, True, references, tops, highs, lows)
    if keep:
        return fold_strip_with_references(x, terms, strip, terms_stride, True, False, references, tops, highs, lows)
    return fold_strip_with_references(x, terms, strip, terms_stride, False, False, references, tops, highs, lows)


cdef void sample_columns(const vec* x, Strip strip, vec* guesses) noexcept nogil:
    """Each column's maximum over the elements that `sample_maximum` looks at in a contiguous row."""
    cdef Py_ssize_t row = 0, width = lanes(x), sampled = min(strip.length // width, <Py_ssize_t>SAMPLED) * width
    cdef int v
    for v in range(strip_registers(strip, x)):
        guesses[v] = splat(-INFINITY, x)
    while row < strip.length:
        for v in range(strip_registers(strip, x)):
            guesses[v] = maximum(guesses[v], load_columns(below(x, row, strip.x_stride), v, strip.n_columns))
        row += 1
        if row == sampled:
            row = max(row, strip.length - width)


cdef void correct_guesses(const vec* x, Strip strip, const vec* references, vec* guesses) noexcept nogil:
    """Where a column has elements above its limit, replace the guess by the column's maximum."""
    cdef Py_ssize_t row
    cdef int v
    cdef vec largest
    for v in range(strip_registers(strip, x)):
        largest = splat(-INFINITY, x)
        for row in range(strip.length):  # in this order of operands a NaN is passed over
            largest = maximum(load_columns(below(x, row, strip.x_stride), v, strip.n_columns), largest)
        guesses[v] = where_at_most(largest, references[v * REFERENCE + LIMIT], guesses[v], largest)


cdef bint column_has_nan(const vec* x, Strip strip, int column) noexcept nogil:
    cdef Py_ssize_t row
    cdef double value
    for row in range(strip.length):
        value = get(below(x, row, strip.x_stride), column)
        if value != value:
            return True
    return False


cdef void fold_strip_chunk(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart, const vec* row_offsets,
    vec* references, vec* largest, vec* highs, vec* lows
) noexcept nogil:
    """The references, maxima and sums of the columns over one chunk of rows; with `keep`, their terms too.

    `row_offsets` are those of the columns in an earlier chunk. `highs` and `lows` have room for all lanes; the sums are
    in lane 0. A column whose maximum is infinite has a sum of NaN if there is a NaN in it, else 0 with the maxima apart
    and the maximum itself without.
    """
    cdef vec[MAX_COLUMNS] tops
    cdef vec[MAX_REGISTERS] guesses
    cdef int n_registers = strip_registers(strip, x), width = lanes(x), v, l, column
    cdef double top
    sample_columns(x, strip, guesses)
    for v in range(n_registers):
        reference_below(guesses[v], row_offsets[v], references + v * REFERENCE)
    if not fold_strip_specialized(x, terms, strip, terms_stride, keep, apart, references, tops, highs, lows):
        correct_guesses(x, strip, references, guesses)
        for v in range(n_registers):
            reference_below(guesses[v], row_offsets[v], references + v * REFERENCE)
        fold_strip_specialized(x, terms, strip, terms_stride, keep, apart, references, tops, highs, lows)
    for v in range(n_registers):
        largest[v] = tops[v]
        for l in range(1, width):
            largest[v] = maximum(largest[v], tops[l * n_registers + v])
        if apart:
            fold_lane_maxima(tops + v, n_registers, largest[v], references + v * REFERENCE, highs + v, lows + v)
        merge_lanes(highs + v, lows + v, n_registers)
    for column in range(strip.n_columns):
        top = get(<const vec*>largest, column)
        if fabs(top) == INFINITY:
            if column_has_nan(x, strip, column):
                put(highs, column, top - top)
            else:
                put(highs, column, 0.0 if apart or top < 0 else top)
            put(lows, column, 0.0)


cdef inline void fold_lane_maxima(
    const vec* tops, int step, vec largest, const vec* reference, vec* highs, vec* lows
) noexcept nogil:
    """Fold the maxima of a column's lanes, all but one that is the column's own maximum."""
    cdef vec zero = splat(0.0, &largest), one = splat(1.0, &largest), is_left = one, take, term, residual
    cdef int l
    for l in range(lanes(&largest)):
        # 0 for the first lane that holds the maximum, 1 for the others.
        take = where_at_most(largest, tops[l * step], one - is_left, one)
        is_left = where_at_most(largest, tops[l * step], zero, is_left)
        scaled_exp(tops + l * step, &term, &residual, 1, reference, 0)
        accumulate(&highs[l * step], &lows[l * step], term * take, residual * take)


cdef inline void merge_lanes(vec* highs, vec* lows, int step) noexcept nogil:
    """Bring the sums of all lanes together in lane 0."""
    cdef int distance = lanes(<const vec*>highs) // 2, l
    while distance:
        for l in range(distance):
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
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart, State* states,
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
    cdef double leading
    for v in range(strip_registers(strip, x)):
        row_offsets[v] = splat(0.0, x)
    if strip.length <= length:
        fold_strip_chunk(x, terms, strip, terms_stride, keep, apart, row_offsets, references, largest, highs, lows)
        return
    while first < strip.length:
        fold_strip_chunk(
            below(x, first, strip.x_stride), <vec*>below(<const vec*>terms, first, terms_stride),
            with_length(strip, min(length, strip.length - first)), terms_stride, keep, apart, row_offsets, references,
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
        leading = to_lane(state.high, x)
        put(highs, column, leading)
        put(lows, column, (state.high - leading) + state.low)
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
    const vec* b, const vec* c, bint streaming
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
                finish(values, GROUP, kind, references + v * REFERENCE, a + v, b + v, c + v, 1)
            else:
                finish(values, 1, kind, references + v * REFERENCE, a + v, b + v, c + v, 1)
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
    cdef vec[MAX_REGISTERS] largest, a, b, c, multipliers
    cdef vec[MAX_COLUMNS] highs, lows
    cdef Py_ssize_t length = chunk_length(x), first = 0, terms_stride = strip.y_stride
    cdef vec* terms = y
    cdef Strip chunk
    cdef int v
    if exponentials == IN_SCRATCH:
        terms, terms_stride = scratch, strip_registers(strip, x) * REGISTER_BYTES
    fold_strip(
        x, terms, strip, terms_stride, exponentials != RECOMPUTE, False, states, references, largest, highs, lows)
    for v in range(strip_registers(strip, x)):
        # A column with a NaN or +inf, or of nothing but -inf, is NaN throughout.
        highs[v] = where_at_most(
            highs[v], splat(by_type(FLT_MAX, DBL_MAX, x), x), highs[v], splat(INFINITY - INFINITY, x))
        highs[v] = where_at_most(highs[v], splat(0.0, x), splat(INFINITY - INFINITY, x), highs[v])
        normalize(largest[v], highs[v], lows[v], references + v * REFERENCE, &multipliers[v], &a[v], &b[v])
    while first < strip.length:
        chunk = with_length(strip, min(length, strip.length - first))
        if exponentials != RECOMPUTE and terms_are_usable(
                strip, states + first // length * strip.n_columns, references, multipliers, c):
            write_strip(
                SCALE, below(<const vec*>terms, first, terms_stride), terms_stride,
                <vec*>below(<const vec*>y, first, strip.y_stride), chunk, references, a, b, c, streaming)
        else:
            write_strip(
                EXP_SCALE, below(x, first, strip.x_stride), strip.x_stride,
                <vec*>below(<const vec*>y, first, strip.y_stride), chunk, references, a, b, multipliers, streaming)
        first += length


cdef bint terms_are_usable(
    Strip strip, const State* states, const vec* references, const vec* multipliers, vec* c
) noexcept nogil:
    """Whether the stored terms of a chunk become those of the whole columns by powers of two, which are put in c."""
    cdef int width = lanes(references), column, v
    cdef double offset, exponent
    for v in range(strip_registers(strip, references)):
        c[v] = multipliers[v]
    if strip.length <= chunk_length(references):
        return True
    for column in range(strip.n_columns):
        v = column // width
        offset = lane(references[v * REFERENCE + OFFSET], column % width)
        exponent = lane(exponent_of(references + v * REFERENCE), column % width)
        exponent -= floor_log2(get(multipliers, column))
        if not terms_scale_to(states[column], offset, exponent, references):
            return False
        put(c, column, exact_power_of_two(states[column].exponent - exponent))
    return True


cdef void log_softmax_strip(const vec* x, vec* y, Strip strip, bint streaming) noexcept nogil:
    cdef vec[MAX_REGISTERS] largest, subtrahends
    cdef double[MAX_COLUMNS] log_sums
    cdef int column
    log_sums_of_strip(x, strip, largest, log_sums)
    for column in range(strip.n_columns):
        put(subtrahends, column, log_sums[column])
    write_strip(SUBTRACT, x, strip.x_stride, y, strip, largest, largest, subtrahends, largest, streaming)


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
    cdef vec[MAX_REGISTERS] ratios, ratio_lows
    cdef int column, v
    cdef double high
    fold_strip(x, <vec*>NULL, strip, 0, False, True, <State*>NULL, references, largest, highs, lows)
    for v in range(strip_registers(strip, x)):
        rest_over_top(largest[v], highs[v], lows[v], references + v * REFERENCE, &ratios[v], &ratio_lows[v])
    for column in range(strip.n_columns):
        high = get(<const vec*>highs, column)
        if high != high:
            log_sums[column] = high
        elif fabs(get(<const vec*>largest, column)) == INFINITY:
            log_sums[column] = 0.0
        else:
            log_sums[column] = log1p_of(get(<const vec*>ratios, column), get(<const vec*>ratio_lows, column), x)
