"""Rows that are masked, divided by a temperature, or of another type than is computed in.

Elements are read, converted and masked on their way to the scratch where other kernels have them too: strips, tiles of
short rows, and other rows a chunk at a time. A masked element becomes -inf, so that the bits are those of a row filled
with -inf; only rows that are not regular are looked at once more, for the results of what is masked.
"""

cdef enum:
    LINE_BYTES = 64


cdef struct AdjustedCall:
    Job* job
    const void* x
    void* y
    bint is_read_directly  # rows are adjacent elements of the type that is computed in
    bint is_written_directly
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory


cdef struct AdjustedRow:
    const char* x
    const char* mask  # NULL for none
    char* y
    bint is_divided  # by the temperature, which leaves an infinite maximum as it is
    double largest
    Py_ssize_t top  # the index of the first element that is the largest
    double row_offset
    double smallest
    State total
    Scale scale


def run_adjusted(
    int function, int traversal, int exponentials, bint streaming, bint is_single, int x_storage, int storage,
    tuple kept, tuple reduced, cnp.ndarray x, cnp.ndarray mask, double temperature, cnp.ndarray out, Py_ssize_t n_blocks,
    int n_threads
):
    """Run a call with a mask, a temperature, or an input of another type than is computed in.

    Parameters
    ----------
    function, traversal, exponentials, x_storage, storage : int
        The values of the enumerations, as for `run`; rows are gathered, or run in strips or tiles.
    streaming : bool
        Write past the caches.
    is_single : bool
        Whether float32 is computed in, not float64.
    kept, reduced : tuple of Dimension
        The layout.
    x, out : ndarray
        Aligned and native, stored in these ways.
    mask : ndarray or None
        Of bool: which elements count.
    temperature : double
        Positive and finite; where float32 is computed in within 2**-100 and 2**100.
    n_blocks, n_threads : int
        Into how many equal parts it is cut, and how many threads share them.
    """
    cdef Adjusted adjusted
    cdef Job job
    cdef AdjustedCall call
    cdef Py_ssize_t itemsize = sizeof(float) if is_single else sizeof(double)
    job.function, job.traversal, job.exponentials = <Function>function, <Traversal>traversal, <Exponentials>exponentials
    job.has_zero, job.streaming, job.storage = False, streaming, <Storage>storage
    job.adjusted, job.sink = &adjusted, NULL
    job.kept, job.row = dimensions(kept), dimensions(reduced)
    adjusted.is_single, adjusted.x_storage = is_single, <Storage>x_storage
    adjusted.is_divided, adjusted.mask = temperature != 1.0, NULL
    if is_single:
        adjusted.temperature = temperature_of(temperature, <const f32v*>NULL)
    else:
        adjusted.temperature = temperature_of(temperature, <const f64v*>NULL)
    if mask is not None:
        adjusted.mask = <const char*>cnp.PyArray_DATA(mask)
    adjusted.mask_kept, adjusted.mask_row = dimensions_of_mask(kept), dimensions_of_mask(reduced)
    if traversal != GATHER:
        run_job(&job, x, out, n_blocks, n_threads, True)
        return
    call.job, call.x, call.y = &job, cnp.PyArray_DATA(x), cnp.PyArray_DATA(out)
    call.is_read_directly = x_storage == AS_COMPUTED and job.row.count == 1 and job.row.x_stride[0] == itemsize
    call.is_written_directly = storage == AS_COMPUTED and job.row.count == 1 and job.row.y_stride[0] == itemsize
    call.n_blocks, call.lacks_memory = n_blocks, False
    run_in_parts(run_adjusted_block_of_call, &call, &call.first, n_blocks, n_threads)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a softmax row")


cdef Dimensions dimensions_of_mask(tuple layout):
    """The dimensions with the strides of the mask for those of the input."""
    cdef Dimensions result = dimensions(layout)
    for i, dimension in enumerate(layout):
        result.x_stride[i] = dimension.mask_stride
    return result


cdef inline bint is_divided(const Job* job) noexcept nogil:
    return job.adjusted != NULL and job.adjusted.is_divided


cdef inline bint is_converted(Storage storage, const vec* like) noexcept nogil:
    """Whether `read_elements` copies elements of such a kind best."""
    return storage > BFLOAT16 or vec is f64v and storage != AS_COMPUTED


cdef inline double hidden(const Job* job) noexcept nogil:
    """The result of what is masked."""
    return 0.0 if job.function == SOFTMAX else -INFINITY


cdef inline void hide_adjacent(const vec* x, vec* y, const char* mask, Py_ssize_t n, double fill) noexcept nogil:
    """Copy n elements, but for the masked ones; x and y may be the same."""
    cdef Py_ssize_t width = lanes(x), i
    cdef vec fills = splat(fill, x)
    for i in range(n // width):
        store(y + i, where_true(mask + i * width, <int>width, load(x + i), fills))
    i = n // width
    store_within(y, i, n, where_true(mask + i * width, <int>(n - i * width), load_within(x, i, n), fills))


cdef void hide(
    vec* y, const char* mask, const Dimensions* row, Py_ssize_t first, Py_ssize_t n, double fill
) noexcept nogil:
    """Fill the masked ones of n adjacent elements; the strides of the mask are those of the input of `row`."""
    cdef Py_ssize_t offset, unused, run, stride = row.x_stride[row.count - 1], inner = row.size[row.count - 1]
    cdef Py_ssize_t done = 0, i
    while done < n:
        locate(row, first + done, &offset, &unused)
        run = min(inner - (first + done) % inner, n - done)
        if stride == 1:
            hide_adjacent(at(<const vec*>y, done), <vec*>at(<const vec*>y, done), mask + offset, run, fill)
        elif stride != 0 or not mask[offset]:
            for i in range(done, done + run):
                if not mask[offset + (i - done) * stride]:
                    put(y, i, fill)
        done += run


cdef inline bint has_any_nan(vec v) noexcept nogil:
    cdef vec zero = splat(0.0, &v)
    return any_greater(where_at_most(v, splat(INFINITY, &v), zero, splat(1.0, &v)), zero)


cdef inline void hide_results(
    const Job* job, char* y, Py_ssize_t y_stride, const char* mask, Py_ssize_t mask_stride, Py_ssize_t n, const vec* like
) noexcept nogil:
    """Fill the masked ones of n results where they are."""
    cdef vec fill = splat(hidden(job), like)
    cdef Py_ssize_t i
    if job.storage == AS_COMPUTED and y_stride == itemsize(like) and mask_stride == 1:
        hide_adjacent(<const vec*>y, <vec*>y, mask, n, hidden(job))
        return
    for i in range(n):
        if not mask[i * mask_stride]:
            store_stored(y + i * y_stride, fill, 1, job.storage)


# Strips


cdef inline const char* mask_of_strip(const Job* job, Py_ssize_t outer, Py_ssize_t first) noexcept nogil:
    """The mask of the columns from `first` on of one of the outer places."""
    cdef Py_ssize_t offset, unused
    locate(&job.adjusted.mask_kept, outer * job.kept.size[job.kept.count] + first, &offset, &unused)
    return job.adjusted.mask + offset


cdef void copy_adjusted_strip(
    const StripSource* source, Py_ssize_t first, const Columns* columns, Py_ssize_t n, vec* tiles, Py_ssize_t tile_size,
    vec* smallest, vec* largest
) noexcept nogil:
    """`copy_strip` for elements that are masked, or of another type."""
    cdef const vec* like = tiles
    cdef vec[MAX_TILES] converted
    cdef vec fill = splat(-INFINITY, like), value
    cdef Storage storage = source.storage
    cdef Py_ssize_t size = stored_size(storage, like), mask_stride = 0, mask_step = 0, element, i
    cdef int t, last = columns.n_tiles - 1, n_columns = columns.first[last] + columns.count[last]
    cdef const char* mask = source.mask
    cdef const char* place
    if mask != NULL:
        mask_stride = source.adjusted.mask_row.x_stride[0]
        mask_step = source.adjusted.mask_kept.x_stride[source.adjusted.mask_kept.count - 1]
        mask += first * mask_stride
    for element in range(n):
        place = source.x + (first + element) * source.x_stride
        i = 0
        while i < n_columns * size:
            prefetch(place + PREFETCH_ROWS * source.x_stride + i)
            i += LINE_BYTES
        prefetch(place + PREFETCH_ROWS * source.x_stride + n_columns * size - 1)
        if is_converted(source.storage, like):
            read_elements(place, size, converted, n_columns, source.storage)
            place, storage = <const char*>converted, AS_COMPUTED
        for t in range(columns.n_tiles):
            value = load_stored(
                place + columns.first[t] * stored_size(storage, like), columns.count[t], fill, storage)
            if mask != NULL and mask_step == 1:
                value = where_true(mask + columns.first[t], columns.count[t], value, fill)
            elif mask != NULL and mask_step == 0 and not mask[0]:
                value = fill
            elif mask != NULL and mask_step != 0:
                for i in range(columns.count[t]):
                    if not mask[(columns.first[t] + i) * mask_step]:
                        put(&value, i, -INFINITY)
            tiles[t * tile_size + element] = value
        mask += mask_stride
    for t in range(columns.n_tiles):
        largest[t] = tile_extremes(<const vec*>tiles + t * tile_size, n, smallest + t)


cdef void hide_in_strip(
    const StripSource* source, const Job* job, Py_ssize_t n, const Columns* columns, char* y, const vec* like
) noexcept nogil:
    """Fill what is masked in tiles where the first result of a row is NaN: such a row is not regular.

    So is one with +inf, whose masked logarithms are -inf by themselves.
    """
    cdef Py_ssize_t step = job.adjusted.mask_kept.x_stride[job.adjusted.mask_kept.count - 1], element, first
    cdef vec zero = splat(0.0, like)
    cdef int size = stored_size(job.storage, like), t
    for t in range(columns.n_tiles):
        first = columns.first[t]
        if has_any_nan(load_stored(y + first * size, columns.count[t], zero, job.storage)):
            for element in range(n):
                hide_results(
                    job, y + element * job.row.y_stride[0] + first * size, size,
                    source.mask + element * job.adjusted.mask_row.x_stride[0] + first * step, step, columns.count[t], like)


# Tiles of short rows


cdef void run_adjusted_turned(
    const void* x, vec* y, Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """`run_turned`; `scratch` has room for the rows too, where they are collected if need be."""
    cdef vec* rows = scratch + 2 * turned_tiles(n) * n
    cdef Py_ssize_t x_stride = job.kept.x_stride[0], size = n * itemsize(<const vec*>rows), mask_stride, row
    cdef const char* mask = job.adjusted.mask
    cdef Storage storage = job.adjusted.x_storage
    if mask == NULL and storage == AS_COMPUTED:
        run_turned(<const vec*>x, y, job, first, n_rows, n, scratch)
        return
    x = <const char*>x + first * x_stride
    if x_stride == n * stored_size(storage, <const vec*>rows):
        read_elements(<const char*>x, stored_size(storage, <const vec*>rows), rows, n_rows * n, storage)
    else:
        for row in range(n_rows):
            read_elements(
                <const char*>x + row * x_stride, stored_size(storage, <const vec*>rows),
                <vec*>at(<const vec*>rows, row * n), n, storage)
    mask_stride = job.adjusted.mask_kept.x_stride[0]
    if mask != NULL:
        mask += first * mask_stride
        hide_short_rows(job, rows, mask, mask_stride, n_rows, n)
    job.kept.x_stride[0] = size
    run_turned(below(<const vec*>rows, -first, size), y, job, first, n_rows, n, scratch)
    job.kept.x_stride[0] = x_stride
    if mask != NULL and job.function != LOGSUMEXP:
        hide_in_short_rows(
            job, <char*>y + first * job.kept.y_stride[0], mask, mask_stride, n_rows, n, <const vec*>rows)


cdef inline void hide_short_rows(
    const Job* job, vec* rows, const char* mask, Py_ssize_t mask_stride, int n_rows, Py_ssize_t n
) noexcept nogil:
    """Make -inf of what is masked in rows that follow each other."""
    cdef bint is_adjacent = job.adjusted.mask_row.x_stride[0] == 1
    cdef vec* place
    cdef int row
    if is_adjacent and mask_stride == n:
        hide_adjacent(<const vec*>rows, rows, mask, n_rows * n, -INFINITY)
        return
    for row in range(n_rows):
        place = <vec*>at(<const vec*>rows, row * n)
        if is_adjacent:
            hide_adjacent(<const vec*>place, place, mask + row * mask_stride, n, -INFINITY)
        else:
            hide(place, mask + row * mask_stride, &job.adjusted.mask_row, 0, n, -INFINITY)


cdef inline void hide_in_short_rows(
    const Job* job, char* y, const char* mask, Py_ssize_t mask_stride, int n_rows, Py_ssize_t n, const vec* like
) noexcept nogil:
    """`hide_in_strip` for rows one below the other."""
    cdef double first
    cdef int row
    for row in range(n_rows):
        first = lane(load_stored(y + row * job.kept.y_stride[0], 1, splat(0.0, like), job.storage), 0)
        if first != first:
            hide_results(
                job, y + row * job.kept.y_stride[0], job.row.y_stride[0], mask + row * mask_stride,
                job.adjusted.mask_row.x_stride[0], n, like)


# Other rows: some of up to a chunk together, or one after the other, a chunk at a time


cdef inline Py_ssize_t pitch_of_rows(Py_ssize_t n, const vec* like) noexcept nogil:
    """Elements from one row in the scratch to the next: a cache line more than whole registers, lest all rows begin in
    the same set of the cache."""
    cdef Py_ssize_t size = min(n, chunk_length(like)), width = lanes(like)
    return (size + width - 1) // width * width + LINE_BYTES // itemsize(like)


cdef inline const vec* collect_row(
    const AdjustedCall* call, const AdjustedRow* row, Py_ssize_t first, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """n adjacent elements of a row, from `first` on: where they are, or in the scratch."""
    cdef const Adjusted* adjusted = call.job.adjusted
    cdef bint is_masked_by_bytes = adjusted.mask_row.count == 1 and adjusted.mask_row.x_stride[0] == 1
    if call.is_read_directly and row.mask == NULL:
        return at(<const vec*>row.x, first)
    if call.is_read_directly and is_masked_by_bytes:
        hide_adjacent(at(<const vec*>row.x, first), scratch, row.mask + first, n, -INFINITY)
        return scratch
    gather(row.x, &call.job.row, first, n, scratch, adjusted.x_storage)
    if row.mask != NULL:
        hide(scratch, row.mask, &adjusted.mask_row, first, n, -INFINITY)
    return scratch


cdef inline void deliver_row(
    const AdjustedCall* call, const AdjustedRow* row, Py_ssize_t first, Py_ssize_t n, const vec* results
) noexcept nogil:
    """Bring n results of a row, from `first` on, to where they belong, if they are not there."""
    if not call.is_written_directly:
        scatter(results, row.y, &call.job.row, first, n, call.job.storage)


cdef inline vec* place_of_results(
    const AdjustedCall* call, const AdjustedRow* row, Py_ssize_t first, const vec* scratch
) noexcept nogil:
    return <vec*>at(<const vec*>row.y, first) if call.is_written_directly else <vec*>scratch


cdef inline void note_extremes(
    const AdjustedCall* call, AdjustedRow* row, const vec* x, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef vec smallest
    cdef double largest = lane(largest_lane(lane_extremes(x, n, &smallest)), 0)
    if largest > row.largest:
        row.largest = largest
        row.top = first + find_largest(x, n, largest)
        row.is_divided = largest < INFINITY
    smallest = counted_smallest(x, n, smallest, splat(row.largest, x), call.job.adjusted.temperature.value)
    row.smallest = min(row.smallest, smallest_lane(smallest))


cdef inline void fold_part(
    const AdjustedCall* call, AdjustedRow* row, const vec* x, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef vec[DIVISOR] divisor
    cdef bint apart = call.job.function != SOFTMAX
    cdef vec smallest = splat(INFINITY, x)
    cdef State state
    if row.is_divided:
        make_divisor(&call.job.adjusted.temperature, splat(row.largest, x), divisor)
        state = fold_divided(
            x, <vec*>NULL, n, False, row.top - first if apart and row.top >= first else n, divisor)
        if not apart:
            state.maximum = 0.0
    else:
        state = fold_chunk(x, <vec*>NULL, n, False, apart, False, row.row_offset, &smallest)
        row.smallest = min(row.smallest, smallest_lane(smallest))
    if first == 0:
        row.total, row.row_offset = state, state.offset
    else:
        row.total = merge(row.total, state, apart)


cdef inline void end_fold(const AdjustedCall* call, AdjustedRow* row, const vec* like) noexcept nogil:
    """Find what finishes a row; write logsumexp, which is all there is."""
    cdef Function function = call.job.function
    cdef vec log_high, log_low
    cdef double result, temperature = call.job.adjusted.temperature.value if row.is_divided else 1.0
    row.total = within_range(row.total, like)
    if function == SOFTMAX and row.is_divided:
        row.scale = scale_of_divided(row.total, like)
    elif function == SOFTMAX and is_regular(row.total):
        row.scale = scale_of(row.total, like)
    elif function == LOG_SOFTMAX:
        row.scale = log_scale_of(row.total, like)
    elif function == LOGSUMEXP:
        result = logsumexp_of_state(row.total, like)
        if row.is_divided:
            log_sums_of_state(row.total, like, &log_high, &log_low)
            result = logsumexp_of_divided(
                row.largest, lane(log_high, 0), lane(log_low, 0), &call.job.adjusted.temperature)
        store_stored(row.y, splat(result, like), 1, call.job.storage)
    if function == SOFTMAX:
        row.scale.is_mended = is_below_mended(
            splat(row.smallest, like), splat(row.largest if row.is_divided else row.total.maximum, like),
            total_size(&call.job.row), temperature)


cdef inline void write_part(
    const AdjustedCall* call, const AdjustedRow* row, const vec* x, vec* y, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    """Write n elements of a row."""
    cdef vec[DIVISOR] divisor
    cdef vec[REFERENCE] reference
    cdef bint of_softmax = call.job.function == SOFTMAX, streaming = call.job.streaming
    if row.is_divided:
        make_divisor(&call.job.adjusted.temperature, splat(row.largest, x), divisor)
    if of_softmax and not is_regular(row.total):
        fill_nan(y, n)
    elif of_softmax and row.is_divided and row.scale.is_mended:
        write_divided_probabilities(x, y, n, divisor, row.scale)
    elif of_softmax and row.is_divided:
        fold_divided(x, y, n, True, n, divisor)
        write_chunk(SCALE, y, y, n, reference, row.scale, streaming)
    elif of_softmax:
        write_probabilities(x, <const vec*>NULL, y, n, row.total, row.total, row.scale, streaming)
    elif row.is_divided:
        write_divided_logs(x, y, n, divisor, row.scale.factor_low)
    else:
        write_chunk(SUBTRACT, x, y, n, reference, row.scale, streaming)
    if row.mask != NULL and not is_regular_with_top(row.total, of_softmax):
        hide(y, row.mask, &call.job.adjusted.mask_row, first, n, hidden(call.job))


cdef inline bint is_regular_with_top(State total, bint of_softmax) noexcept nogil:
    """Whether results of -inf are what masked elements should give: no NaN, and a finite maximum."""
    return is_regular(total) if of_softmax else fabs(total.maximum) < INFINITY and total.high == total.high


cdef void run_long_adjusted_row(const AdjustedCall* call, AdjustedRow* row, vec* logits, vec* results) noexcept nogil:
    """Run a row of more than a chunk."""
    cdef Py_ssize_t n = total_size(&call.job.row), length = chunk_length(<const vec*>logits), first = 0, size
    cdef const vec* x
    row.is_divided, row.largest, row.top, row.row_offset, row.smallest = False, -INFINITY, 0, 0.0, INFINITY
    while first < n and call.job.adjusted.is_divided:
        size = min(length, n - first)
        note_extremes(call, row, collect_row(call, row, first, size, logits), first, size)
        first += size
    first = 0
    while first < n:
        size = min(length, n - first)
        fold_part(call, row, collect_row(call, row, first, size, logits), first, size)
        first += size
    end_fold(call, row, <const vec*>logits)
    first = 0
    while first < n and call.job.function != LOGSUMEXP:
        size = min(length, n - first)
        x = collect_row(call, row, first, size, logits)
        write_part(call, row, x, place_of_results(call, row, first, <const vec*>results), first, size)
        deliver_row(call, row, first, size, <const vec*>results)
        first += size


cdef void run_adjusted_rows(
    const AdjustedCall* call, AdjustedRow* rows, int n_rows, vec* logits, vec* results
) noexcept nogil:
    """Run rows of up to a chunk, by the kernels for batches of rows."""
    cdef Py_ssize_t n = total_size(&call.job.row), pitch = pitch_of_rows(n, <const vec*>logits)
    cdef Function function = call.job.function
    cdef const vec* sources[MAX_LANES]
    cdef vec* terms[MAX_LANES]
    cdef vec* targets[MAX_LANES]
    cdef bint streams = call.job.streaming and call.is_written_directly
    cdef int r
    for r in range(n_rows):
        sources[r] = collect_row(call, &rows[r], 0, n, <vec*>at(<const vec*>logits, r * pitch))
        terms[r] = <vec*>at(<const vec*>results, r * pitch)
        targets[r] = terms[r]
        if function != LOGSUMEXP:
            targets[r] = place_of_results(call, &rows[r], 0, <const vec*>terms[r])
        if not streams:
            terms[r] = targets[r]
    if call.job.adjusted.is_divided:
        run_divided_rows(
            sources, terms, targets, n_rows, n, function, &call.job.adjusted.temperature, streams)
    else:
        run_rows(sources, terms, targets, n_rows, n, function, False, IN_SCRATCH if streams else IN_OUTPUT, streams)
    for r in range(n_rows):
        if function == LOGSUMEXP:
            store_stored(rows[r].y, splat(get(<const vec*>targets[r], 0), logits), 1, call.job.storage)
            continue
        # Of a row that is not regular, the first result is NaN, or -inf as is a masked one's logarithm.
        if rows[r].mask != NULL and get(<const vec*>targets[r], 0) != get(<const vec*>targets[r], 0):
            hide(targets[r], rows[r].mask, &call.job.adjusted.mask_row, 0, n, hidden(call.job))
        deliver_row(call, &rows[r], 0, n, <const vec*>targets[r])


cdef void run_adjusted_block_of_call(void* context, Py_ssize_t block) noexcept nogil:
    cdef AdjustedCall* call = <AdjustedCall*>context
    cdef bint has_memory
    if call.job.adjusted.is_single:
        has_memory = run_adjusted_block(<const f32v*>call.x, call, call.first + block)
    else:
        has_memory = run_adjusted_block(<const f64v*>call.x, call, call.first + block)
    if not has_memory:
        call.lacks_memory = True


cdef inline void place_row(const AdjustedCall* call, Py_ssize_t index, AdjustedRow* row) noexcept nogil:
    """Set where a row is."""
    cdef Py_ssize_t x_offset, y_offset, unused
    locate(&call.job.kept, index, &x_offset, &y_offset)
    row.x, row.y, row.mask = <const char*>call.x + x_offset, <char*>call.y + y_offset, NULL
    if call.job.adjusted.mask != NULL:
        locate(&call.job.adjusted.mask_kept, index, &x_offset, &unused)
        row.mask = call.job.adjusted.mask + x_offset


cdef bint run_adjusted_block(const vec* like, const AdjustedCall* call, Py_ssize_t block) noexcept nogil:
    """Run one of the equal parts of a call; False if there is no memory for its scratch."""
    cdef Py_ssize_t n = total_size(&call.job.row), n_rows = total_size(&call.job.kept), room, row, end
    cdef bint is_batch = n <= chunk_length(like)
    cdef int together = batch_rows(n, call.job.streaming, like) if is_batch else 1, r
    cdef AdjustedRow[MAX_LANES] rows
    room = together * pitch_of_rows(n, like) * itemsize(like)
    cdef void* memory = malloc(2 * room + REGISTER_BYTES)
    if memory == NULL:
        return False
    cdef char* scratch = <char*>memory + <Py_ssize_t>(-<uintptr_t>memory % REGISTER_BYTES)
    row, end = n_rows * block // call.n_blocks, n_rows * (block + 1) // call.n_blocks
    while row < end:
        together = <int>min(<Py_ssize_t>together, end - row)
        for r in range(together):
            place_row(call, row + r, &rows[r])
        if is_batch:
            run_adjusted_rows(call, rows, together, <vec*>scratch, <vec*>(scratch + room))
        else:
            run_long_adjusted_row(call, rows, <vec*>scratch, <vec*>(scratch + room))
        row += together
    if call.job.streaming:
        stream_fence()
    free(memory)
    return True
