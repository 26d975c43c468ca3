"""Rows in bands: for functions that want their rows contiguous, a chunk at a time, however they lie in memory.

A row of adjacent elements is a band of its own and is read where it lies. Adjacent rows, as where the reduced axis is
not the last, make bands as broad as a narrow strip, which are turned into rows of adjacent elements. Any other row is
collected. The chunks are those of `softmax_row`, so that states have the bits of those there.
"""

cdef enum:
    # Turned rows lie this much apart, lest those a power of two long evict each other from the cache.
    GAP_BYTES = 64

cdef struct Rows:
    const void* x
    void* y  # of the shape of x, or NULL
    Storage storage
    Traversal traversal  # ROWS, BANDS or GATHER
    Py_ssize_t n
    Py_ssize_t spacing  # bytes from a turned row to the next
    double divisor  # of all elements
    Dimensions kept
    Dimensions row

cdef struct Band:
    Py_ssize_t row  # the number of the first one
    int count
    Py_ssize_t x_offset
    Py_ssize_t y_offset


cdef Rows rows_of(int traversal, int storage, tuple kept, tuple reduced, cnp.ndarray x, cnp.ndarray y):
    cdef Rows rows
    rows.x, rows.y = cnp.PyArray_DATA(x), data_of(y)
    rows.storage, rows.traversal = <Storage>storage, <Traversal>traversal
    rows.kept, rows.row = dimensions(kept), dimensions(reduced)
    rows.n, rows.divisor = total_size(&rows.row), 1.0
    rows.spacing = min(rows.n * max(x.itemsize, 4), <Py_ssize_t>CHUNK_BYTES)
    rows.spacing += -rows.spacing % GAP_BYTES + GAP_BYTES
    return rows


cdef inline Py_ssize_t count_bands(const Rows* rows, const vec* like) noexcept nogil:
    cdef Py_ssize_t n_rows = total_size(&rows.kept), inner
    if rows.traversal != BANDS:
        return n_rows
    inner = rows.kept.size[rows.kept.count - 1]
    return n_rows // inner * bands_together(inner, like)


cdef inline Py_ssize_t bands_together(Py_ssize_t inner, const vec* like) noexcept nogil:
    """How many bands so many adjacent rows make."""
    return (inner + narrow_strip_columns(like) - 1) // narrow_strip_columns(like)


cdef inline Band band_at(const Rows* rows, Py_ssize_t index, const vec* like) noexcept nogil:
    cdef Band band
    cdef Py_ssize_t inner, first
    band.row, band.count = index, 1
    if rows.traversal == BANDS:
        inner = rows.kept.size[rows.kept.count - 1]
        first = index % bands_together(inner, like) * narrow_strip_columns(like)
        band.row = index // bands_together(inner, like) * inner + first
        band.count = <int>min(<Py_ssize_t>narrow_strip_columns(like), inner - first)
    locate(&rows.kept, band.row, &band.x_offset, &band.y_offset)
    return band


cdef inline Py_ssize_t count_chunks(const Rows* rows, const vec* like) noexcept nogil:
    return (rows.n + chunk_length(like) - 1) // chunk_length(like)


cdef inline Py_ssize_t band_bytes(const Rows* rows, const vec* like) noexcept nogil:
    """Scratch for a chunk of each row of a band."""
    return rows.spacing * (narrow_strip_columns(like) if rows.traversal == BANDS else 1)


cdef inline vec* row_of_band(const Rows* rows, const vec* chunks, int row) noexcept nogil:
    """Where a row's chunk is, among those that `read_band` returned."""
    return <vec*>below(chunks, row, rows.spacing)


cdef inline const vec* read_band(
    const Rows* rows, const Band* band, Py_ssize_t first, Py_ssize_t size, vec* scratch
) noexcept nogil:
    """A chunk of each row, as contiguous elements: those of the array itself, or a copy in the scratch."""
    cdef const char* x = <const char*>rows.x + band.x_offset
    cdef int row
    if rows.traversal == ROWS and rows.divisor == 1.0:
        return at(<const vec*>x, first)
    if rows.traversal == ROWS:
        divide(at(<const vec*>x, first), scratch, size, rows.divisor)
        return scratch
    if rows.traversal == BANDS:
        turn(
            x + first * rows.row.x_stride[0], rows.row.x_stride[0], size, band.count, scratch, rows.spacing, AS_COMPUTED,
            AS_COMPUTED, scratch)
    else:
        gather(x, &rows.row, first, size, scratch, rows.storage)
    if rows.divisor != 1.0:
        for row in range(band.count):
            divide(row_of_band(rows, scratch, row), row_of_band(rows, scratch, row), size, rows.divisor)
    return scratch


cdef inline void divide(const vec* x, vec* y, Py_ssize_t n, double divisor) noexcept nogil:
    cdef vec divisors = splat(divisor, x)
    cdef Py_ssize_t width = lanes(x), i = 0
    while (i + 1) * width <= n:
        store(y + i, load(x + i) / divisors)
        i += 1
    if i * width < n:
        store_within(y, i, n, load_within(x, i, n) / divisors)


cdef inline void write_band(
    const Rows* rows, const Band* band, Py_ssize_t first, Py_ssize_t size, const vec* chunks
) noexcept nogil:
    """Write a chunk of each row to its place in the output, unless it is there already."""
    cdef char* y = <char*>rows.y + band.y_offset
    if rows.traversal == BANDS:
        turn(
            chunks, rows.spacing, band.count, size, y + first * rows.row.y_stride[0], rows.row.y_stride[0], AS_COMPUTED,
            AS_COMPUTED, chunks)
    elif rows.traversal == GATHER:
        scatter(chunks, y, &rows.row, first, size, rows.storage)


cdef inline vec* output_of_band(const Rows* rows, const Band* band, Py_ssize_t first, vec* scratch) noexcept nogil:
    """Where the results of a chunk go before `write_band`."""
    if rows.traversal == ROWS:
        return <vec*>at(<const vec*>(<const char*>rows.y + band.y_offset), first)
    return scratch


cdef inline double offset_for_more(State state) noexcept nogil:
    """The offset of a row that more is folded into."""
    return state.offset if state.offset > -INFINITY else 0.0


cdef void fold_band(
    const Rows* rows, const Band* band, bint apart, State* totals, vec* scratch, Best* bests, State* chunk_states
) noexcept nogil:
    """Fold all elements of a band's rows into their states.

    `bests`, one a row, and `chunk_states`, one for each row of each chunk, may be NULL.
    """
    cdef Py_ssize_t length = chunk_length(<const vec*>scratch), first = 0, size
    cdef double[MAX_NARROW_COLUMNS] row_offsets
    cdef const vec* chunks
    cdef State state
    cdef int row
    for row in range(band.count):
        row_offsets[row] = offset_for_more(totals[row])
    while first < rows.n:
        size = min(length, rows.n - first)
        chunks = read_band(rows, band, first, size, scratch)
        for row in range(band.count):
            state = fold_chunk(row_of_band(rows, chunks, row), <vec*>NULL, size, False, apart, False, row_offsets[row],
                <vec*>NULL)
            if first == 0 and totals[row].offset == -INFINITY:
                row_offsets[row] = state.offset
            totals[row] = merge(totals[row], state, apart)
            if bests != NULL:
                offer(&bests[row], row_of_band(rows, chunks, row), size, first)
            if chunk_states != NULL:
                chunk_states[first // length * band.count + row] = state
        first += size
