"""The k largest probabilities of each row, from one pass over the data (Milakov and Gimelshein, section 4)."""

cdef struct Selection:
    Rows rows
    Py_ssize_t k
    void* values  # k for each row, in the order of the axes
    int64_t* indices
    bint is_single
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory


def run_topk(
    int traversal, int storage, tuple kept, tuple reduced, cnp.ndarray x, cnp.ndarray values, cnp.ndarray indices,
    Py_ssize_t n_blocks, int n_threads
):
    """Run a call.

    Parameters
    ----------
    traversal, storage, kept, reduced, x, n_blocks, n_threads
        As for `run`; the kept dimensions are in the order of the axes.
    values, indices : ndarray
        Of the type that is computed in, and int64; contiguous, k for each row.
    """
    cdef Selection call
    call.k, call.values, call.indices = values.shape[1], data_of(values), <int64_t*>data_of(indices)
    if traversal in (TILES, STRIPS):
        run_sink(SOFTMAX_TOPK, &call, call.k, traversal, storage, kept, reduced, x, n_blocks, n_threads)
        return
    call.rows = rows_of(traversal, storage, kept, reduced, x, None)
    call.is_single, call.n_blocks, call.lacks_memory = cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64, n_blocks, False
    run_in_parts(run_selection_block, &call, &call.first, n_blocks, n_threads)
    if call.lacks_memory:
        raise MemoryError("no memory for the candidates of a row")


cdef void run_selection_block(void* context, Py_ssize_t block) noexcept nogil:
    cdef Selection* call = <Selection*>context
    if call.is_single:
        run_selection_bands(call, call.first + block, <const f32v*>NULL)
    else:
        run_selection_bands(call, call.first + block, <const f64v*>NULL)


cdef void run_selection_bands(Selection* call, Py_ssize_t block, const vec* like) noexcept nogil:
    cdef Py_ssize_t n_bands = count_bands(&call.rows, like), index
    cdef Py_ssize_t n_together = narrow_strip_columns(like) if call.rows.traversal == BANDS else 1
    cdef Py_ssize_t n_candidates = room_for(call.k, call.rows.n) * n_together
    cdef void* memory = malloc(band_bytes(&call.rows, like) + REGISTER_BYTES)
    cdef Candidate* candidates = <Candidate*>malloc(n_candidates * sizeof(Candidate))
    if memory == NULL or candidates == NULL:
        call.lacks_memory = True
    else:
        for index in range(n_bands * block // call.n_blocks, n_bands * (block + 1) // call.n_blocks):
            select_from_band(
                call, index, <vec*>(<char*>memory + <Py_ssize_t>(-<uintptr_t>memory % REGISTER_BYTES)), candidates)
    free(memory)
    free(candidates)


cdef void select_from_band(
    const Selection* call, Py_ssize_t index, vec* scratch, Candidate* candidates
) noexcept nogil:
    cdef const vec* like = scratch
    cdef Band band = band_at(&call.rows, index, like)
    cdef State[MAX_NARROW_COLUMNS] totals
    cdef Best[MAX_NARROW_COLUMNS] bests
    cdef vec* values
    cdef int64_t* indices
    cdef int row
    for row in range(band.count):
        totals[row] = identity()
        bests[row] = best_of_none(candidates + row * room_for(call.k, call.rows.n), call.k, call.rows.n)
    fold_band(&call.rows, &band, False, totals, scratch, bests, NULL)
    for row in range(band.count):
        keep_best(&bests[row])
        sort_candidates(bests[row].candidates, bests[row].count)
        values = <vec*>at(<const vec*>call.values, (band.row + row) * call.k)
        indices = call.indices + (band.row + row) * call.k
        if totals[row].high != totals[row].high:
            put_nan_first(&call.rows, &band, row, &bests[row], scratch, indices)
        else:
            put_candidates(&bests[row], values, indices)
        write_selected(values, call.k, within_range(totals[row], like))


cdef inline void put_candidates(const Best* best, vec* values, int64_t* indices) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(best.count):
        put(values, i, best.candidates[i].value)
        indices[i] = best.candidates[i].index


cdef void put_nan_first(
    const Rows* rows, const Band* band, int row, const Best* best, vec* scratch, int64_t* indices
) noexcept nogil:
    """The indices of a row with NaN, which count as the largest, as they do for NumPy's sort."""
    cdef Py_ssize_t length = chunk_length(<const vec*>scratch), first = 0, size, count = 0, i
    cdef const vec* x
    while first < rows.n:
        size = min(length, rows.n - first)
        x = row_of_band(rows, read_band(rows, band, first, size, scratch), row)
        for i in range(size):
            if get(x, i) != get(x, i) and count < best.k:
                indices[count] = first + i
                count += 1
        first += size
    for i in range(best.k - count):
        indices[count + i] = best.candidates[i].index


cdef void select_from_tiles(
    vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Upcoming* upcoming, const Selection* call,
    Py_ssize_t first_row, const vec* smallest, vec* largest, vec* room
) noexcept nogil:
    """Select from rows of up to a chunk; `room` has twice k registers for each tile."""
    cdef vec[MAX_TILES] row_offsets, high, low
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec[FINISHERS] finishers
    cdef Py_ssize_t k = call.k, j
    cdef vec* tops
    cdef vec* places
    cdef vec* values
    cdef int64_t* indices
    cdef int t, row
    for t in range(columns.n_tiles):
        row_offsets[t] = splat(0.0, tiles)
        select_from_tile(tiles + t * tile_size, n, k, room + 2 * k * t, room + 2 * k * t + k)
    fold_tiles(
        tiles, tile_size, columns, n, upcoming, False, False, False, False, row_offsets, smallest, references,
        largest, high, low)
    for t in range(columns.n_tiles):
        tops, places = room + 2 * k * t, room + 2 * k * t + k
        values = <vec*>at(<const vec*>call.values, (first_row + columns.first[t]) * k)
        indices = call.indices + (first_row + columns.first[t]) * k
        normalize_rows(largest[t], high[t], low[t], references + t * REFERENCE, finishers)
        j = 0
        while j < k:
            finish(tops + j, <int>min(<Py_ssize_t>GROUP, k - j), MENDED_EXP_SCALE, references + t * REFERENCE, finishers, 0, True)
            j += GROUP
        turn(
            tops, REGISTER_BYTES, k, columns.count[t], values, k * itemsize(<const vec*>tops), AS_COMPUTED, AS_COMPUTED,
            <const vec*>tops)
        for row in range(columns.count[t]):
            for j in range(k):
                indices[row * k + j] = <int64_t>get(places + j, row)
            if get(high + t, row) != get(high + t, row):
                put_nan_of_tile_first(tiles + t * tile_size, n, row, places, k, indices + row * k)


cdef void put_nan_of_tile_first(
    const vec* tile, Py_ssize_t n, int row, const vec* places, Py_ssize_t k, int64_t* indices
) noexcept nogil:
    """`put_nan_first` for a row of a tile."""
    cdef Py_ssize_t count = 0, element, j
    for element in range(n):
        if count < k and get(tile + element, row) != get(tile + element, row):
            indices[count], count = element, count + 1
    for j in range(k):
        element = <Py_ssize_t>get(places + j, row)
        if count < k and get(tile + element, row) == get(tile + element, row):
            indices[count], count = element, count + 1


cdef void write_selected(vec* values, Py_ssize_t k, State total) noexcept nogil:
    """Make the probabilities of selected logits, as those of the whole row are made."""
    cdef Scale scale = scale_of(total, <const vec*>values)
    scale.is_mended = True
    if is_regular(total):
        write_probabilities(<const vec*>values, <const vec*>NULL, values, k, total, total, scale, False)
    else:
        fill_nan(values, k)
