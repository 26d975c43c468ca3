"""Kernels for strips: bands of adjacent rows, which are copied to a scratch as tiles.

Rows of an array are read far more at a time than a tile is wide, for each is another page of memory; and they are read
once, for where they are a power of two apart they evict each other.
"""

cdef enum:
    # Of each row of the array a strip has as much as makes so large a scratch, half of an L1 cache: (16, 21, 16384) float32
    # on axis 1 take 2.0 ms, with 128 KiB 2.1. But 512 bytes at least, or 256 where the scratch would take half of a
    # second-level cache: of one of 2 MiB, (2000, 3000) float32 on axis 0 take 6.0 ms instead of 7.5, (4096, 4096) 16.5
    # instead of 19.6, (1000, 1000) the same.
    STRIP_BYTES = 24576
    MIN_STRIP_BYTES = 512
    TALL_STRIP_BYTES = 256
    MAX_NARROW_COLUMNS = MIN_STRIP_BYTES // 4
    # The next strip is fetched while one is computed: (16, 21, 16384) float32 on axis 1 take 2.6 ms instead of 3.1. A
    # larger one would not stay until it is copied: (3000, 4000) float32 on axis 0 take 11.8 ms, and would take 12.6. The
    # third cache of Zen 5 gives back soon enough what the second one loses: they take 3.7 ms, and would take 4.7.
    STAYING_BYTES = 524288
    STAYING_BYTES_OF_ZEN_5 = 2621440
    MANY_STRIPS = 16  # fewer are as narrow there as elsewhere, for threads to have their share of
    PREFETCH_ROWS = 8  # how many rows ahead the next ones are fetched; strides are too long for the processor to


cdef inline Py_ssize_t strip_columns(Py_ssize_t n, Py_ssize_t size, Py_ssize_t n_columns, const vec* like) noexcept nogil:
    """How many columns a strip has, of so many of n elements, which are of so many bytes in memory.

    The last one is not much narrower than the others: (64, 100, 1000) float32 on axis 1 take 2.5 ms instead of 2.6.
    """
    cdef Py_ssize_t n_tiles = STRIP_BYTES // (max(n, <Py_ssize_t>1) * REGISTER_BYTES), group, n_strips
    cdef Py_ssize_t staying = staying_bytes() if n_columns * size >= MANY_STRIPS * MIN_STRIP_BYTES else STAYING_BYTES
    cdef Py_ssize_t least = TALL_STRIP_BYTES if n * MIN_STRIP_BYTES > staying else MIN_STRIP_BYTES
    n_tiles = min(max(n_tiles, least // size // lanes(like), <Py_ssize_t>ABREAST // 2), <Py_ssize_t>MAX_TILES)
    group = (ABREAST if n_tiles >= ABREAST else ABREAST // 2) * lanes(like)
    n_strips = rounded_up_quotient(n_columns, n_tiles * lanes(like) // group * group)
    return rounded_up_quotient(n_columns, n_strips * group) * group


cdef inline Py_ssize_t staying_bytes() noexcept nogil:
    """How large the next strip may be to be fetched before it is copied."""
    return STAYING_BYTES_OF_ZEN_5 if is_zen_5 else STAYING_BYTES


cdef inline Py_ssize_t rounded_up_quotient(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline int narrow_strip_columns(const vec* like) noexcept nogil:
    """How many columns a strip has that is read where it lies."""
    return MIN_STRIP_BYTES // itemsize(like)


cdef inline Py_ssize_t tile_registers(Py_ssize_t n, const vec* like) noexcept nogil:
    """Scratch for a tile of rows of n elements, in registers: one more than a chunk, for another set of the cache."""
    return min(n, chunk_length(like)) + 1


cdef struct StripSource:
    const char* x
    Py_ssize_t x_stride
    Storage storage
    const Adjusted* adjusted
    const char* mask  # NULL for none


cdef inline void copy_strip(
    const StripSource* source, Py_ssize_t first, const Columns* columns, Py_ssize_t n, vec* tiles, Py_ssize_t tile_size,
    vec* smallest, vec* largest
) noexcept nogil:
    """Copy n elements of each column, from `first` on, and find the extremes of those that are not NaN."""
    cdef const char* x = source.x + first * source.x_stride
    if source.mask != NULL or is_converted(source.storage, <const vec*>tiles):
        copy_adjusted_strip(source, first, columns, n, tiles, tile_size, smallest, largest)
    elif source.storage == AS_COMPUTED:
        copy_stored_strip(x, source.x_stride, columns, n, tiles, tile_size, smallest, largest, AS_COMPUTED)
    elif source.storage == FLOAT16:
        copy_stored_strip(x, source.x_stride, columns, n, tiles, tile_size, smallest, largest, FLOAT16)
    else:
        copy_stored_strip(x, source.x_stride, columns, n, tiles, tile_size, smallest, largest, BFLOAT16)


cdef inline void copy_stored_strip(
    const char* x, Py_ssize_t x_stride, const Columns* columns, Py_ssize_t n, vec* tiles, Py_ssize_t tile_size,
    vec* smallest, vec* largest, Storage storage
) noexcept nogil:
    cdef const vec* like = tiles
    cdef const char* place
    cdef vec* tile
    cdef vec* small
    cdef vec* large
    cdef int t = 0, count
    while t < columns.n_tiles:
        place, tile = x + columns.first[t] * stored_size(storage, like), tiles + t * tile_size
        small, large, count = smallest + t, largest + t, tiles_abreast(columns, t, like)
        if count == ABREAST:
            copy_stored_tiles(ABREAST, lanes(like), place, x_stride, n, tile, tile_size, small, large, storage)
        elif count == ABREAST // 2:
            copy_stored_tiles(ABREAST // 2, lanes(like), place, x_stride, n, tile, tile_size, small, large, storage)
        else:
            copy_stored_tiles(1, columns.count[t], place, x_stride, n, tile, tile_size, small, large, storage)
        t += max(count, 1)


cdef inline void copy_stored_tiles(
    int count, int n_rows, const char* x, Py_ssize_t x_stride, Py_ssize_t n, vec* tiles, Py_ssize_t tile_size,
    vec* smallest, vec* largest, Storage storage
) noexcept nogil:
    """Copy tiles side by side, which have so many rows each."""
    cdef const vec* like = tiles
    cdef Py_ssize_t element, step = lanes(like) * stored_size(storage, like)
    cdef vec* targets[ABREAST]
    cdef vec[ABREAST] tops, bottoms
    cdef vec value
    cdef int t
    for t in range(count):
        targets[t], tops[t], bottoms[t] = tiles + t * tile_size, splat(-INFINITY, like), splat(INFINITY, like)
    for element in range(n):
        # Rows that are no multiple of a line apart end in one line more: (64, 100, 1000) float32 on axis 1 take 2.4 ms
        # instead of 2.8, with that of the output.
        prefetch(x + PREFETCH_ROWS * x_stride + count * step - 1)
        for t in range(count):
            prefetch(x + PREFETCH_ROWS * x_stride + t * step)
            value = load_stored(x + t * step, n_rows, splat(-INFINITY, like), storage)
            targets[t][element] = value
            # In this order of operands a NaN is passed over.
            tops[t], bottoms[t] = maximum(value, tops[t]), minimum(value, bottoms[t])
        x += x_stride
    for t in range(count):
        smallest[t], largest[t] = bottoms[t], tops[t]


cdef void run_long_strip(
    const StripSource* source, void* y, Py_ssize_t y_stride, const Columns* columns, Py_ssize_t n, const Job* job,
    vec* tiles, vec* log_sums
) noexcept nogil:
    """Run columns of more than one chunk: each chunk is copied once for the states and once to be written."""
    cdef const vec* like = tiles
    cdef Py_ssize_t length = chunk_length(like), tile_size = tile_registers(n, like), first = 0, size
    cdef State[MAX_TILES * MAX_LANES] totals
    cdef State state
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec[FINISHERS * MAX_TILES] finishers
    cdef vec[MAX_TILES] row_offsets, smallest, largest, high, low, bottoms, tops
    cdef vec exponent
    cdef Upcoming nothing = nothing_upcoming(tiles)  # what was copied first is in no cache when it would be read again
    cdef bint apart = job.function != SOFTMAX, is_mended = False
    cdef int t, row, i
    for t in range(columns.n_tiles):
        row_offsets[t], bottoms[t], tops[t] = splat(0.0, like), splat(INFINITY, like), splat(-INFINITY, like)
        for i in range(FINISHERS):
            finishers[t * FINISHERS + i] = splat(0.0, like)
    while first < n:
        size = min(length, n - first)
        copy_strip(source, first, columns, size, tiles, tile_size, smallest, largest)
        fold_tiles(
            tiles, tile_size, columns, size, &nothing, False, apart, is_coarse(job), job.has_zero and first == 0,
            row_offsets, smallest, references, largest, high, low)
        for t in range(columns.n_tiles):
            tops[t] = maximum(largest[t], tops[t])
            if not apart and not is_coarse(job):  # so that tiles are not terms
                bottoms[t] = minimum(bottoms[t], counted_smallest(
                    <const vec*>tiles + t * tile_size, size * lanes(like), smallest[t], tops[t], 1.0))
            exponent = exponent_of(references + t * REFERENCE)
            for row in range(columns.count[t]):
                state = state_in_lane(row, references + t * REFERENCE, &exponent, largest + t, high + t, low + t)
                if first == 0:
                    totals[t * MAX_LANES + row] = state
                    put(row_offsets + t, row, state.offset)
                else:
                    totals[t * MAX_LANES + row] = merge(totals[t * MAX_LANES + row], state, apart)
        first += size
    for t in range(columns.n_tiles):
        is_mended = is_mended or is_below_mended(bottoms[t], tops[t], n, 1.0)
        for row in range(columns.count[t]):
            put_finish(
                within_range(totals[t * MAX_LANES + row], like), job.function, is_coarse(job), row, references + t * REFERENCE,
                finishers + t * FINISHERS, log_sums + t)
    first = 0
    while first < n and job.function != LOGSUMEXP:
        size = min(length, n - first)
        copy_strip(source, first, columns, size, tiles, tile_size, smallest, largest)
        if vec is f32v and is_coarse(job):
            write_tiles(
                COARSE_EXP_SCALE, <const vec*>tiles, tile_size, columns, size, references, <const vec*>finishers,
                <char*>y + first * y_stride, y_stride, job.streaming, job.storage)
        elif job.function == SOFTMAX and is_mended:
            write_mended_tiles(
                <const vec*>tiles, tile_size, columns, size, references, <const vec*>finishers,
                <char*>y + first * y_stride, y_stride, job.streaming, job.storage)
        elif job.function == SOFTMAX:
            write_tiles(
                EXP_SCALE, <const vec*>tiles, tile_size, columns, size, references, <const vec*>finishers,
                <char*>y + first * y_stride, y_stride, job.streaming, job.storage)
        else:
            finish_tiles(
                <const vec*>tiles, tile_size, columns, size, LOG_SOFTMAX, False, False, references, <const vec*>finishers,
                <char*>y + first * y_stride, y_stride, job.streaming, job.storage)
        first += size


cdef inline State state_in_lane(
    int row, const vec* reference, const vec* exponent, const vec* largest, const vec* high, const vec* low
) noexcept nogil:
    """What is known of one row of a chunk, as a state that can be merged."""
    cdef State state
    state.maximum = get(largest, row)
    if fabs(state.maximum) == INFINITY:
        state = infinite_state(state.maximum, False, True)
    else:
        state.offset = get(reference + OFFSET, row)
        state.exponent = get(exponent, row)
    state.high, state.low = get(high, row), get(low, row)
    return state


cdef inline void put_finish(
    State total, Function function, bint coarse, int row, vec* references, vec* finishers, vec* log_sums
) noexcept nogil:
    """Set what the second pass needs to write one row of a tile; for logsumexp, its result."""
    cdef vec[REFERENCE] reference
    cdef const vec* like = references
    cdef int i
    if function == LOGSUMEXP:
        put(log_sums, row, logsumexp_of_state(total, like))
    elif function == LOG_SOFTMAX:
        put_scale(finishers, row, log_scale_of(total, like))
    elif not is_regular(total):
        put_scale(finishers, row, scale_by(INFINITY - INFINITY, 0.0))
    else:
        put_scale(finishers, row, coarse_scale_of(total, like) if coarse else scale_of(total, like))
        make_reference(splat(total.offset, like), splat(total.exponent, like), reference)
        for i in range(REFERENCE):
            put(references + i, row, lane(reference[i], 0))


cdef inline int columns_left_out(const void* y, const Job* job, const vec* like) noexcept nogil:
    """The lanes that the first tile leaves out for results to be streamed."""
    return <int>(<uintptr_t>y % REGISTER_BYTES) // stored_size(job.storage, like) if job.streaming else 0


cdef inline Storage source_storage(const Job* job) noexcept nogil:
    return job.storage if job.adjusted == NULL else job.adjusted.x_storage


cdef void run_strip(
    const void* x, void* y, const Job* job, Py_ssize_t width, Py_ssize_t n_strips, Py_ssize_t unit, int left_out, vec* tiles
) noexcept nogil:
    """Run one strip of this width; `tiles` has room for a chunk of its columns."""
    cdef const vec* like = tiles
    cdef Py_ssize_t n = job.row.size[0], x_size = stored_size(source_storage(job), like), x_offset, y_offset
    cdef Py_ssize_t outer = unit // n_strips, index = unit % n_strips, first = max(index * width - left_out, 0)
    cdef Py_ssize_t tile_size = tile_registers(n, like), size = stored_size(job.storage, like)
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec[FINISHERS * MAX_TILES] finishers
    cdef vec[MAX_TILES] smallest, largest, log_sums
    cdef bint is_mended
    cdef StripSource source
    cdef Upcoming upcoming
    cdef int t, inner = job.kept.count
    cdef Columns columns = share_out(
        min((index + 1) * width - left_out, job.kept.size[inner]) - first,
        left_out % lanes(like) if index == 0 else 0, like)
    locate(&job.kept, outer, &x_offset, &y_offset)
    source.adjusted, source.mask, source.x_stride = job.adjusted, NULL, job.row.x_stride[0]
    source.storage = source_storage(job)
    source.x = <const char*>x + x_offset + first * x_size
    if job.adjusted != NULL and job.adjusted.mask != NULL:
        source.mask = mask_of_strip(job, outer, first)
    y = <char*>y + y_offset + first * job.kept.y_stride[inner]
    upcoming = nothing_upcoming(tiles)
    if n * width * x_size < staying_bytes() and unit + 1 < n_strips * total_size(&job.kept):
        upcoming.place = source.x + width * x_size
        if index + 1 == n_strips:
            locate(&job.kept, outer + 1, &x_offset, &y_offset)
            upcoming.place = <const char*>x + x_offset
        upcoming.per_piece = GROUP if n <= SHORT else width // lanes(like)
        upcoming.step, upcoming.left, upcoming.is_far = lanes(like) * x_size, upcoming.per_piece, True
        upcoming.gap = source.x_stride - upcoming.per_piece * upcoming.step
        upcoming.back = upcoming.per_piece * upcoming.step - n * source.x_stride
    if n > chunk_length(like) and is_divided(job):
        run_long_divided_strip(&source, y, job.row.y_stride[0], &columns, n, job, tiles, log_sums)
    elif n > chunk_length(like):
        run_long_strip(&source, y, job.row.y_stride[0], &columns, n, job, tiles, log_sums)
    else:
        copy_strip(&source, 0, &columns, n, tiles, tile_size, smallest, largest)
        if job.sink != NULL:
            sink_tiles(
                tiles, tile_size, &columns, n, &upcoming, job, outer * job.kept.size[inner] + first, smallest, largest,
                tiles + width // lanes(like) * tile_size)
            return
        is_mended = reduce_tiles(
            tiles, tile_size, &columns, n, &upcoming, job, smallest, largest, references, finishers, log_sums)
        finish_tiles(
            <const vec*>tiles, tile_size, &columns, n, job.function, is_coarse(job), is_mended, <const vec*>references,
            <const vec*>finishers, y, job.row.y_stride[0], job.streaming, job.storage)
    if job.function == LOGSUMEXP:
        for t in range(columns.n_tiles):
            store_stored(
                <char*>y + columns.first[t] * size, log_sums[t], columns.count[t],
                job.storage)
    elif source.mask != NULL:
        hide_in_strip(&source, job, n, &columns, <char*>y, like)
