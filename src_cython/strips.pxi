"""Kernels for a strip: adjacent rows, element by element side by side, as where the reduced axis is not the last.

A register holds one element of as many rows (columns of the strip) as it has lanes. Within a column the order of
summation is that of a contiguous row: element j belongs to lane j % lanes, each lane adds up its elements in order, and
what there is done between the lanes of a register is done here between registers.
"""


cdef enum:
    # Bytes of each row in a strip: four cache lines, which adjacent-line prefetching makes cheaper than four times one.
    STRIP_BYTES = 256
    MAX_COLUMNS = STRIP_BYTES // 4
    MAX_REGISTERS = STRIP_BYTES // 16


cdef struct Strip:
    Py_ssize_t n_rows      # elements of the reduced axis, one under the other
    int n_columns          # at most STRIP_BYTES // itemsize
    Py_ssize_t x_stride    # bytes from one element of a column to the next
    Py_ssize_t y_stride
    Py_ssize_t result_stride  # bytes from one column's logsumexp to the next's


cdef inline int strip_columns(const vec* like) noexcept nogil:
    return STRIP_BYTES // itemsize(like)


cdef inline const vec* below(const vec* p, Py_ssize_t row, Py_ssize_t stride) noexcept nogil:
    return <const vec*>(<const char*>p + row * stride)


cdef inline void put(vec* registers, Py_ssize_t element, double value) noexcept nogil:
    """Set one element of an array of registers."""
    if vec is f32v:
        (<float*>registers)[element] = <float>value
    else:
        (<double*>registers)[element] = value


cdef inline double get(const vec* registers, Py_ssize_t element) noexcept nogil:
    if vec is f32v:
        return (<const float*>registers)[element]
    else:
        return (<const double*>registers)[element]


cdef inline bint fold_strip_with_references(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart,
    const vec* offsets, const vec* floors, const vec* magics, const vec* limits, vec* highs, vec* lows, vec* tops
) noexcept nogil:
    """Fold the rows of a chunk; False if an element lies above its column's limit.

    `highs`, `lows` and `tops` receive the sums and maxima of every lane and register, the register varying fastest.
    """
    cdef int width = lanes(x), n_registers = (strip.n_columns + width - 1) // width
    cdef int l, v, u, i, count
    cdef Py_ssize_t group, row
    cdef vec top, high, low
    cdef vec fill = splat(-INFINITY, x), zero = splat(0.0, x)
    cdef vec[GROUP] logits, folded
    cdef bint exceeded = False
    for i in range(width * n_registers):
        highs[i] = lows[i] = zero
        tops[i] = fill
    group = 0
    while group < strip.n_rows:
        for l in range(<int>min(width, strip.n_rows - group)):
            for v in range(n_registers):
                i = l * n_registers + v
                count = min(width, strip.n_columns - v * width)
                top, high, low = tops[i], highs[i], lows[i]
                row = group + l
                if count == width and row + (GROUP - 1) * width < strip.n_rows:
                    for u in range(GROUP):
                        logits[u] = load(below(x, row + u * width, strip.x_stride) + v)
                    fold_registers(
                        logits, folded, GROUP, &top, &high, &low, apart, offsets[v], floors[v], magics[v])
                    if keep:
                        for u in range(GROUP):
                            store(<vec*>below(<const vec*>terms, row + u * width, terms_stride) + v, folded[u])
                else:
                    while row < strip.n_rows and row < group + GROUP * width:
                        logits[0] = load_first_or_all(below(x, row, strip.x_stride) + v, count)
                        fold_registers(logits, folded, 1, &top, &high, &low, apart, offsets[v], floors[v], magics[v])
                        if keep:
                            store_first_or_all(<vec*>below(<const vec*>terms, row, terms_stride) + v, folded[0], count)
                        row += width
                tops[i], highs[i], lows[i] = top, high, low
                exceeded |= any_greater(top, limits[v])
        if exceeded:
            return False
        group += GROUP * width
    return True


cdef inline void store_first_or_all(vec* p, vec v, int count) noexcept nogil:
    if count == lanes(<const vec*>p):
        store(p, v)
    else:
        store_first(p, v, count)


cdef void sample_columns(const vec* x, Strip strip, vec* tops) noexcept nogil:
    """Each column's maximum over the elements that `sample_maximum` looks at in a contiguous row."""
    cdef int width = lanes(x), n_registers = (strip.n_columns + width - 1) // width, v
    cdef Py_ssize_t row = 0, sampled = min(strip.n_rows // width, 8) * width
    for v in range(n_registers):
        tops[v] = splat(-INFINITY, x)
    while row < strip.n_rows:
        include_row(x, strip, row, tops)
        row += 1
        if row == sampled:
            row = max(row, strip.n_rows - width)


cdef inline void include_row(const vec* x, Strip strip, Py_ssize_t row, vec* tops) noexcept nogil:
    cdef int width = lanes(x), v
    for v in range((strip.n_columns + width - 1) // width):
        tops[v] = maximum(
            tops[v], load_first_or_all(below(x, row, strip.x_stride) + v, min(width, strip.n_columns - v * width)))


cdef inline vec load_first_or_all(const vec* p, int count) noexcept nogil:
    if count == lanes(p):
        return load(p)
    return load_first(p, count, splat(-INFINITY, p))


cdef bint column_has_nan(const vec* x, Strip strip, int column) noexcept nogil:
    cdef Py_ssize_t row
    cdef double value
    for row in range(strip.n_rows):
        value = get(below(x, row, strip.x_stride), column)
        if value != value:
            return True
    return False


cdef double column_maximum(const vec* x, Strip strip, int column) noexcept nogil:
    """The maximum of a column's elements that are not NaN."""
    cdef Py_ssize_t row
    cdef double largest = -INFINITY, value
    for row in range(strip.n_rows):
        value = get(below(x, row, strip.x_stride), column)
        if value > largest:
            largest = value
    return largest


cdef void fold_strip_chunk(
    const vec* x, vec* terms, Strip strip, Py_ssize_t terms_stride, bint keep, bint apart,
    const State* earlier, State* states
) noexcept nogil:
    """The states of the columns over one chunk of rows; with `keep`, their terms too.

    `earlier` are the states of the columns over the rows before, NULL for the first chunk.
    """
    cdef vec[MAX_REGISTERS] guesses, offsets, floors, magics, limits
    cdef vec[MAX_COLUMNS] highs, lows, tops
    cdef Reference reference
    cdef int l, column, width = lanes(x), n_registers = (strip.n_columns + width - 1) // width
    cdef double guess, largest
    cdef bint first_try = True
    sample_columns(x, strip, guesses)
    while True:
        for column in range(n_registers * width):
            guess = get(<const vec*>guesses, column) if column < strip.n_columns else 0.0
            reference = reference_below(
                0.0 if fabs(guess) == INFINITY else guess, earlier[column].offset if earlier != NULL and column < strip.n_columns else 0.0, x)
            put(offsets, column, reference.offset)
            put(floors, column, reference.floor)
            put(magics, column, reference.magic)
            if fabs(guess) == INFINITY:
                # A column that is -inf wherever it was sampled is looked at again if anything larger turns up.
                reference.limit = -INFINITY if guess < 0 and first_try else INFINITY
            put(limits, column, reference.limit)
        if fold_strip_with_references(
                x, terms, strip, terms_stride, keep, apart, offsets, floors, magics, limits, highs, lows, tops):
            break
        first_try = False
        for column in range(strip.n_columns):
            guess, largest = get(<const vec*>guesses, column), column_maximum(x, strip, column)
            if largest > get(<const vec*>limits, column) or guess == -INFINITY:
                put(guesses, column, largest)
    for column in range(strip.n_columns):
        largest = get(<const vec*>tops, column)
        for l in range(1, width):
            largest = max(largest, get(<const vec*>tops, l * n_registers * width + column))
        states[column].maximum = largest
    if apart:
        fold_losers(tops, highs, lows, strip.n_columns, states, offsets, floors, magics)
    merge_lanes(highs, lows, width, n_registers)
    for column in range(strip.n_columns):
        if fabs(states[column].maximum) == INFINITY:
            states[column] = infinite_state(states[column].maximum, column_has_nan(x, strip, column), apart)
        else:
            reference = reference_below(
                get(<const vec*>guesses, column), earlier[column].offset if earlier != NULL else 0.0, x)
            states[column].offset, states[column].exponent = reference.offset, reference.exponent
            states[column].high, states[column].low = get(<const vec*>highs, column), get(<const vec*>lows, column)


cdef void fold_losers(
    const vec* tops, vec* highs, vec* lows, int n_columns, const State* states, const vec* offsets, const vec* floors,
    const vec* magics
) noexcept nogil:
    """Fold the maxima of the lanes, all but one in each column that is the column's own maximum."""
    cdef int width = lanes(tops), n_registers = (n_columns + width - 1) // width, i, l, v, column
    cdef vec[MAX_COLUMNS] terms, residuals
    for i in range(width * n_registers):
        v = i % n_registers
        scaled_exp(&tops[i], &terms[i], &residuals[i], 1, offsets[v], floors[v], magics[v])
    for column in range(n_columns):
        for l in range(width):
            i = l * n_registers * width + column
            if get(tops, i) == states[column].maximum:
                put(terms, i, 0.0)
                put(residuals, i, 0.0)
                break
    for i in range(width * n_registers):
        accumulate(&highs[i], &lows[i], terms[i], residuals[i])


cdef void merge_lanes(vec* highs, vec* lows, int width, int n_registers) noexcept nogil:
    """Bring the sums of all lanes together in lane 0."""
    cdef int distance = width // 2, i
    while distance:
        for i in range(distance * n_registers):
            accumulate(&highs[i], &lows[i], highs[i + distance * n_registers], lows[i + distance * n_registers])
        distance //= 2


cdef void write_strip_chunk(
    Finish* finishes, const vec* source, Py_ssize_t source_stride, const vec* x, vec* y, Strip strip,
    const vec* offsets, const vec* floors, const vec* magics, const vec* a, const vec* b, const vec* c, bint streaming
) noexcept nogil:
    """Write one chunk of rows, each register of columns from its terms (`source`) or from the logits."""
    cdef int width = lanes(x), v, count
    cdef Py_ssize_t row
    cdef vec value
    cdef vec* target
    for row in range(strip.n_rows):
        for v in range((strip.n_columns + width - 1) // width):
            count = min(width, strip.n_columns - v * width)
            value = load_first_or_all(
                below(source, row, source_stride) + v if finishes[v] == SCALE else below(x, row, strip.x_stride) + v, count)
            finish(&value, 1, finishes[v], offsets[v], floors[v], magics[v], a[v], b[v], c[v])
            target = <vec*>below(<const vec*>y, row, strip.y_stride) + v
            if streaming and count == width and <uintptr_t>target % REGISTER_BYTES == 0:
                stream(target, value)
            else:
                store_first_or_all(target, value, count)


cdef inline Strip rows_of(Strip strip, Py_ssize_t n_rows) noexcept nogil:
    """The strip with another number of rows."""
    strip.n_rows = n_rows
    return strip


cdef void softmax_strip(
    const vec* x, vec* y, Strip strip, Exponentials exponentials, vec* scratch, State* states, bint streaming
) noexcept nogil:
    """Softmax of each column.

    `scratch` has room for the terms of the whole strip if they go there, `states` for a state of each column and chunk
    and one more for each column.
    """
    cdef vec[MAX_REGISTERS] offsets, floors, magics, a, b, c
    cdef Finish[MAX_REGISTERS] finishes
    cdef Scale[MAX_COLUMNS] scales
    cdef Py_ssize_t length = chunk_length(x), first = 0, terms_stride = strip.y_stride
    cdef State* totals = states + (strip.n_rows + length - 1) // length * strip.n_columns
    cdef State* chunk = states
    cdef vec* terms = y
    cdef int column, v, width = lanes(x)
    cdef Reference reference
    cdef double infinity = INFINITY
    if exponentials == IN_SCRATCH:
        terms, terms_stride = scratch, STRIP_BYTES
    while first < strip.n_rows:
        fold_strip_chunk(
            below(x, first, strip.x_stride), <vec*>below(<const vec*>terms, first, terms_stride),
            rows_of(strip, min(length, strip.n_rows - first)), terms_stride, exponentials != RECOMPUTE, False,
            totals if first else <State*>NULL, chunk)
        for column in range(strip.n_columns):
            totals[column] = merge(totals[column], chunk[column], False) if first else chunk[column]
        first += length
        chunk += strip.n_columns
    for column in range(strip.n_columns):
        if is_regular(totals[column]):
            scales[column] = normalize(totals[column], x)
        else:
            totals[column] = identity()
            scales[column].exponent = 0.0
            scales[column].factor = scales[column].factor_low = infinity - infinity
        reference = make_reference(totals[column].offset, scales[column].exponent, x)
        put(offsets, column, reference.offset)
        put(floors, column, reference.floor)
        put(magics, column, reference.magic)
        put(a, column, scales[column].factor)
        put(b, column, scales[column].factor_low)
    chunk = states
    first = 0
    while first < strip.n_rows:
        for v in range((strip.n_columns + width - 1) // width):
            finishes[v] = EXP_SCALE if exponentials == RECOMPUTE else SCALE
        for column in range(strip.n_columns):
            if not terms_scale_to(chunk[column], totals[column].offset, scales[column].exponent, x):
                finishes[column // width] = EXP_SCALE
            put(c, column, exact_power_of_two(chunk[column].exponent - scales[column].exponent))
        write_strip_chunk(
            finishes, below(<const vec*>terms, first, terms_stride), terms_stride, below(x, first, strip.x_stride),
            <vec*>below(<const vec*>y, first, strip.y_stride), rows_of(strip, min(length, strip.n_rows - first)),
            <const vec*>offsets, <const vec*>floors, <const vec*>magics, <const vec*>a, <const vec*>b, <const vec*>c,
            streaming)
        first += length
        chunk += strip.n_columns


cdef void fold_strip(const vec* x, Strip strip, State* totals) noexcept nogil:
    """The state of each column with its maximum kept apart."""
    cdef State[MAX_COLUMNS] chunk
    cdef Py_ssize_t length = chunk_length(x), first = 0
    cdef int column
    while first < strip.n_rows:
        fold_strip_chunk(
            below(x, first, strip.x_stride), <vec*>NULL, rows_of(strip, min(length, strip.n_rows - first)), 0, False, True,
            totals if first else <State*>NULL, chunk)
        for column in range(strip.n_columns):
            totals[column] = merge(totals[column], chunk[column], True) if first else chunk[column]
        first += length


cdef void log_softmax_strip(const vec* x, vec* y, Strip strip, bint streaming) noexcept nogil:
    cdef State[MAX_COLUMNS] totals
    cdef vec[MAX_REGISTERS] a, b
    cdef Finish[MAX_REGISTERS] finishes
    cdef int column
    fold_strip(x, strip, totals)
    for column in range(strip.n_columns):
        finishes[column // lanes(x)] = SUBTRACT
        put(a, column, totals[column].maximum)
        put(b, column, log_sum(totals[column], x))
    write_strip_chunk(
        finishes, x, strip.x_stride, x, y, strip, <const vec*>a, <const vec*>a, <const vec*>a, <const vec*>a,
        <const vec*>b, <const vec*>b, streaming)


cdef void logsumexp_strip(const vec* x, vec* y, Strip strip) noexcept nogil:
    cdef State[MAX_COLUMNS] totals
    cdef int column
    fold_strip(x, strip, totals)
    for column in range(strip.n_columns):
        put(<vec*>below(<const vec*>y, column, strip.result_stride), 0,
            totals[column].maximum + log_sum(totals[column], x))
