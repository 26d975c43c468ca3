"""Kernels for tiles: as many rows side by side as a register has lanes, so that register j holds element j of each.

Adjacent rows, as where the reduced axis is not the last, lie in memory like this. Short rows are turned on their side
for it: one of ten elements would leave most lanes of a register empty, and spend its time on what comes after the sum.
The bits are those of a row alone, because there is a sum for each of the lanes that its elements would have there.
"""


cdef inline void turn(
    const vec* source, Py_ssize_t source_stride, Py_ssize_t n_rows, Py_ssize_t n_columns, vec* target,
    Py_ssize_t target_stride
) noexcept nogil:
    """Copy rows of adjacent elements as columns, square by square; strides are in bytes."""
    cdef vec[MAX_LANES] square
    cdef vec fill = splat(0.0, source)
    cdef vec* place
    cdef Py_ssize_t row = 0, column, width = lanes(source)
    cdef int i, height, breadth
    while row < n_rows:
        height = <int>min(width, n_rows - row)
        column = 0
        while column < n_columns:
            breadth = <int>min(width, n_columns - column)
            for i in range(width):
                square[i] = fill
                if i < height:
                    square[i] = load_first(at(below(source, row + i, source_stride), column), breadth, fill)
                    # A million rows of 10 float32 take 16.5 ms instead of 20.5.
                    prefetch(at(below(source, row + i + 4 * width, source_stride), column))
            transpose(square)
            for i in range(breadth):
                place = <vec*>at(below(<const vec*>target, column + i, target_stride), row)
                if height == width:  # a load has to wait for a store by a mask
                    store(place, square[i])
                else:
                    store_first(place, square[i], height)
            column += width
        row += width


cdef inline const vec* below(const vec* p, Py_ssize_t row, Py_ssize_t stride) noexcept nogil:
    return <const vec*>(<const char*>p + row * stride)


cdef bint row_of_tile_has_nan(const vec* tile, Py_ssize_t n, int row) noexcept nogil:
    cdef Py_ssize_t element
    for element in range(n):
        if get(tile + element, row) != get(tile + element, row):
            return True
    return False


cdef inline void fold_tile_elements(
    vec* tile, Py_ssize_t n, bint keep, bint apart, const vec* reference, vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """Fold the elements into their lanes' sums; with `keep`, terms take the place of the elements."""
    cdef vec[GROUP] terms
    cdef vec base = splat(0.0, reference) if apart else sum_base(reference)
    cdef Py_ssize_t element = 0
    cdef int together = min(<int>GROUP, lanes(reference)), l, j
    for l in range(lanes(reference)):
        tops[l], highs[l], lows[l] = splat(-INFINITY, reference), base, splat(0.0, reference)
    while element + together <= n:
        l = <int>(element % lanes(reference))
        fold_registers(tile + element, terms, together, tops + l, highs + l, lows + l, apart, reference, 1)
        for j in range(together):
            if keep:
                tile[element + j] = terms[j]
        element += together
    while element < n:
        l = <int>(element % lanes(reference))
        fold_registers(tile + element, terms, 1, tops + l, highs + l, lows + l, apart, reference, 1)
        if keep:
            tile[element] = terms[0]
        element += 1
    for l in range(lanes(reference)):
        highs[l] = highs[l] - base


cdef void sum_tile(
    vec* tile, Py_ssize_t n, bint keep, bint apart, vec largest, const vec* reference, vec* high, vec* low
) noexcept nogil:
    cdef vec[MAX_LANES] tops, highs, lows
    if apart:
        fold_tile_elements(tile, n, False, True, reference, tops, highs, lows)
    elif keep:
        fold_tile_elements(tile, n, True, False, reference, tops, highs, lows)
    else:
        fold_tile_elements(tile, n, False, False, reference, tops, highs, lows)
    merge_lanes(tops, largest, apart, reference, highs, lows)
    high[0], low[0] = highs[0], lows[0]


cdef void fold_tile(
    vec* tile, int n_rows, Py_ssize_t n, bint apart, vec row_offsets, vec* references, vec* largest, vec* high, vec* low
) noexcept nogil:
    """The references, maxima and sums of the rows over a chunk; without the maxima apart, tile becomes their terms."""
    cdef vec top = splat(-INFINITY, largest), enough, high_apart, low_apart
    cdef Py_ssize_t element
    cdef int row
    for element in range(n):
        top = maximum(tile[element], top)  # in this order of operands a NaN is passed over
    largest[0] = top
    reference_at(top, row_offsets, references)
    sum_tile(tile, n, not apart, False, top, references, high, low)
    if apart:
        enough = without_top(top, references, high, low)
        enough = load_first(&enough, n_rows, splat(-INFINITY, references))
        if any_greater(enough, high[0]):
            sum_tile(tile, n, False, True, top, references, &high_apart, &low_apart)
            low[0] = where_at_most(enough, high[0], low[0], low_apart)
            high[0] = where_at_most(enough, high[0], high[0], high_apart)
    if has_infinite_lane(top):
        for row in range(n_rows):
            if fabs(get(&top, row)) == INFINITY:
                put_sum(high, low, row, infinite_state(get(&top, row), row_of_tile_has_nan(tile, n, row), apart))


cdef inline int rows_in_tile(int n_rows, int tile, const vec* like) noexcept nogil:
    return min(n_rows - tile * lanes(like), lanes(like))


cdef inline void write_tiles(
    Finish kind, const vec* tiles, Py_ssize_t tile_size, int n_rows, Py_ssize_t n, const vec* references,
    const vec* finishers, void* y, Py_ssize_t y_stride, bint streaming, Storage storage
) noexcept nogil:
    """Write tiles side by side: n elements of n_rows adjacent rows; each tile has its own reference and finishers."""
    cdef int n_tiles = (n_rows + lanes(tiles) - 1) // lanes(tiles), t, count
    cdef Py_ssize_t element, register_size = lanes(tiles) * stored_size(storage, tiles)
    cdef vec value
    cdef char* place
    for element in range(n):
        for t in range(n_tiles):
            value = tiles[t * tile_size + element]
            finish(&value, 1, kind, references + t * REFERENCE, finishers + t * FINISHERS, True)
            place = <char*>y + element * y_stride + t * register_size
            count = rows_in_tile(n_rows, t, tiles)
            if streaming and count == lanes(tiles) and <uintptr_t>place % REGISTER_BYTES == 0:
                stream(<vec*>place, value)
            else:
                store_stored(place, value, count, storage)


cdef void reduce_tile(
    vec* tile, int n_rows, Py_ssize_t n, Function function, vec* finishers, vec* y
) noexcept nogil:
    """Make terms of the logits for softmax, and find what finishes elements; write logsumexp, which is all there is."""
    cdef vec[REFERENCE] references
    cdef vec largest, high, low
    cdef double[MAX_LANES] log_sums
    cdef int row
    fold_tile(tile, n_rows, n, function != SOFTMAX, splat(0.0, y), references, &largest, &high, &low)
    if function == SOFTMAX:
        normalize_rows(largest, high, low, references, finishers)
        return
    finishers[FACTOR] = finishers[FACTOR_LOW] = largest
    log_sums_of(largest, high, low, references, n_rows, log_sums)
    for row in range(n_rows):
        if function == LOGSUMEXP:
            put(y, row, get(&largest, row) + log_sums[row])
        else:
            put(finishers + FACTOR_LOW, row, log_sums[row])


cdef inline void finish_tiles(
    const vec* tiles, Py_ssize_t tile_size, int n_rows, Py_ssize_t n, Function function, const vec* finishers, void* y,
    Py_ssize_t y_stride, bint streaming, Storage storage
) noexcept nogil:
    """Write what `reduce_tile` has prepared."""
    if function == SOFTMAX:
        write_tiles(SCALE, tiles, tile_size, n_rows, n, <const vec*>NULL, finishers, y, y_stride, streaming, storage)
    elif function == LOG_SOFTMAX:
        write_tiles(SUBTRACT, tiles, tile_size, n_rows, n, <const vec*>NULL, finishers, y, y_stride, streaming, storage)


cdef void run_turned(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* tile
) noexcept nogil:
    """Run n_rows contiguous short rows, at most a register's lanes, from `first` on."""
    cdef Py_ssize_t x_stride = job.kept.x_stride[0], y_stride = job.kept.y_stride[0]
    cdef vec[FINISHERS] finishers
    turn(below(x, first, x_stride), x_stride, n_rows, n, tile, REGISTER_BYTES)
    reduce_tile(tile, n_rows, n, job.function, finishers, tile)
    finish_tiles(
        <const vec*>tile, n, lanes(x), n, job.function, <const vec*>finishers, tile, REGISTER_BYTES, False, AS_COMPUTED)
    turn(
        <const vec*>tile, REGISTER_BYTES, 1 if job.function == LOGSUMEXP else n, n_rows,
        <vec*>below(<const vec*>y, first, y_stride), y_stride)
