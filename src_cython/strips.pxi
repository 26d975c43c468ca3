"""Kernels for strips: bands of adjacent rows, which are copied to a scratch as tiles.

Rows of an array are read far more at a time than a tile is wide, for each is another page of memory; and they are read
once, for where they are a power of two apart they evict each other.
"""

cdef enum:
    STRIP_BYTES = 512  # of each row of the array
    PREFETCH_ROWS = 8  # how many rows ahead the next ones are fetched; strides are too long for the processor to
    MAX_COLUMNS = STRIP_BYTES // 4
    MAX_TILES = STRIP_BYTES // 16


cdef inline int strip_columns(const vec* like) noexcept nogil:
    return STRIP_BYTES // itemsize(like)


cdef inline Py_ssize_t tile_registers(Py_ssize_t n, const vec* like) noexcept nogil:
    """Scratch for a tile of rows of n elements, in registers: one more than a chunk, for another set of the cache."""
    return min(n, chunk_length(like)) + 1


cdef inline void copy_strip(
    const void* x, Py_ssize_t x_stride, int n_columns, Py_ssize_t n, vec* tiles, Py_ssize_t tile_size, Storage storage
) noexcept nogil:
    if storage == AS_COMPUTED:
        copy_stored_strip(x, x_stride, n_columns, n, tiles, tile_size, AS_COMPUTED)
    elif storage == FLOAT16:
        copy_stored_strip(x, x_stride, n_columns, n, tiles, tile_size, FLOAT16)
    else:
        copy_stored_strip(x, x_stride, n_columns, n, tiles, tile_size, BFLOAT16)


cdef inline void copy_stored_strip(
    const void* x, Py_ssize_t x_stride, int n_columns, Py_ssize_t n, vec* tiles, Py_ssize_t tile_size, Storage storage
) noexcept nogil:
    cdef int n_tiles = (n_columns + lanes(<const vec*>tiles) - 1) // lanes(<const vec*>tiles), t
    cdef Py_ssize_t element, register_size = lanes(<const vec*>tiles) * stored_size(storage, <const vec*>tiles)
    cdef const char* place
    for element in range(n):
        for t in range(n_tiles):
            place = <const char*>x + element * x_stride + t * register_size
            prefetch(place + PREFETCH_ROWS * x_stride)
            tiles[t * tile_size + element] = load_stored(
                place, rows_in_tile(n_columns, t, <const vec*>tiles), splat(-INFINITY, <const vec*>tiles), storage)


cdef void run_long_strip(
    const void* x, Py_ssize_t x_stride, void* y, Py_ssize_t y_stride, int n_columns, Py_ssize_t n, const Job* job,
    vec* tiles, vec* log_sums
) noexcept nogil:
    """Run columns of more than one chunk: each chunk is copied once for the states and once to be written."""
    cdef const vec* like = tiles
    cdef Py_ssize_t length = chunk_length(like), tile_size = tile_registers(n, like), first = 0, size
    cdef State[MAX_COLUMNS] totals
    cdef State state
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec[FINISHERS * MAX_TILES] finishers
    cdef vec[MAX_TILES] row_offsets
    cdef vec largest, high, low
    cdef bint apart = job.function != SOFTMAX
    cdef int n_tiles = (n_columns + lanes(like) - 1) // lanes(like), t, column, row
    for t in range(n_tiles):
        row_offsets[t] = splat(0.0, like)
        for row in range(REFERENCE):
            references[t * REFERENCE + row] = splat(0.0, like)
        for row in range(FINISHERS):
            finishers[t * FINISHERS + row] = splat(0.0, like)
    while first < n:
        size = min(length, n - first)
        copy_strip(
            <const char*>x + first * x_stride, x_stride, n_columns, size, tiles, tile_size, job.storage)
        for t in range(n_tiles):
            fold_tile(
                tiles + t * tile_size, rows_in_tile(n_columns, t, like), size, apart, row_offsets[t],
                references + t * REFERENCE, &largest, &high, &low)
            for row in range(rows_in_tile(n_columns, t, like)):
                column = t * lanes(like) + row
                state = state_in_lane(row, references + t * REFERENCE, largest, high, low)
                if first == 0:
                    totals[column] = state
                    put(row_offsets, column, state.offset)
                else:
                    totals[column] = merge(totals[column], state, apart)
        first += size
    for column in range(n_columns):
        put_finish(within_range(totals[column], like), job.function, column, references, finishers, log_sums)
    first = 0
    while first < n and job.function != LOGSUMEXP:
        size = min(length, n - first)
        copy_strip(
            <const char*>x + first * x_stride, x_stride, n_columns, size, tiles, tile_size, job.storage)
        if job.function == SOFTMAX:
            write_tiles(
                EXP_SCALE, <const vec*>tiles, tile_size, n_columns, size, references, <const vec*>finishers,
                <char*>y + first * y_stride, y_stride, job.streaming, job.storage)
        else:
            finish_tiles(
                <const vec*>tiles, tile_size, n_columns, size, LOG_SOFTMAX, <const vec*>finishers,
                <char*>y + first * y_stride, y_stride, job.streaming, job.storage)
        first += size


cdef inline State state_in_lane(int row, const vec* reference, vec largest, vec high, vec low) noexcept nogil:
    """What is known of one row of a chunk, as a state that can be merged."""
    cdef State state
    state.maximum = get(&largest, row)
    if fabs(state.maximum) == INFINITY:
        state = infinite_state(state.maximum, False, True)
    else:
        state.offset = get(reference + OFFSET, row)
        state.exponent = lane(exponent_of(reference), row)
    state.high, state.low = get(&high, row), get(&low, row)
    return state


cdef inline void put_finish(
    State total, Function function, int column, vec* references, vec* finishers, vec* y
) noexcept nogil:
    """Set what the second pass needs to write one column; for logsumexp, write it."""
    cdef vec[REFERENCE] reference
    cdef int t = column // lanes(<const vec*>y), row = column % lanes(<const vec*>y), i
    finishers += t * FINISHERS
    if function == LOGSUMEXP:
        put(y, column, total.maximum + log_sum(total, <const vec*>y))
    elif function == LOG_SOFTMAX:
        put_scale(finishers, row, scale_by(total.maximum, log_sum(total, <const vec*>y)))
    elif not is_regular(total):
        put_scale(finishers, row, scale_by(INFINITY - INFINITY, 0.0))
    else:
        put_scale(finishers, row, scale_of(total, <const vec*>y))
        make_reference(splat(total.offset, y), splat(total.exponent, y), reference)
        for i in range(REFERENCE):
            put(references + t * REFERENCE + i, row, lane(reference[i], 0))


cdef void run_strip(
    const void* x, void* y, const Job* job, Py_ssize_t outer, Py_ssize_t index, vec* tiles
) noexcept nogil:
    """Run one strip; `tiles` has room for a chunk of its columns."""
    cdef const vec* like = tiles
    cdef Py_ssize_t x_offset, y_offset, first = index * strip_columns(like), n = job.row.size[0]
    cdef Py_ssize_t tile_size = tile_registers(n, like), size = stored_size(job.storage, like)
    cdef vec[FINISHERS * MAX_TILES] finishers
    cdef vec[MAX_TILES] log_sums
    cdef int inner = job.kept.count, n_columns = <int>min(job.kept.size[inner] - first, <Py_ssize_t>strip_columns(like))
    cdef int n_tiles = (n_columns + lanes(like) - 1) // lanes(like), t
    locate(&job.kept, outer, &x_offset, &y_offset)
    x = <const char*>x + x_offset + first * size
    y = <char*>y + y_offset + first * job.kept.y_stride[inner]
    if n > chunk_length(like):
        run_long_strip(x, job.row.x_stride[0], y, job.row.y_stride[0], n_columns, n, job, tiles, log_sums)
    else:
        copy_strip(x, job.row.x_stride[0], n_columns, n, tiles, tile_size, job.storage)
        for t in range(n_tiles):
            reduce_tile(
                tiles + t * tile_size, rows_in_tile(n_columns, t, like), n, job.function, finishers + t * FINISHERS,
                log_sums + t)
        finish_tiles(
            <const vec*>tiles, tile_size, n_columns, n, job.function, <const vec*>finishers, y, job.row.y_stride[0],
            job.streaming, job.storage)
    if job.function == LOGSUMEXP:
        for t in range(n_tiles):
            store_stored(
                <char*>y + t * lanes(like) * size, log_sums[t], rows_in_tile(n_columns, t, like), job.storage)
