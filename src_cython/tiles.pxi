"""Kernels for short rows: a tile of them is turned on its side in a scratch, and becomes a strip.

A row of ten elements would leave most lanes of a register empty, and spend its time on what comes after the sum. As
columns of a strip, as many rows as a register has lanes share all of it. The bits are those of the row alone.
"""


cdef inline Py_ssize_t tile_bytes(Py_ssize_t n) noexcept nogil:
    """Memory for a tile of rows of n elements: their logits, and what is to be written."""
    return 2 * n * STRIP_BYTES


cdef inline vec* tile_register(vec* tile, Py_ssize_t element, int row) noexcept nogil:
    """Where a tile on its side holds this element of the rows from `row` on."""
    return <vec*>at(below(tile, element, STRIP_BYTES), row)


cdef inline void turn_on_side(const vec** rows, int n_rows, Py_ssize_t n, vec* tile) noexcept nogil:
    """Copy rows of n elements to a tile, square by square: registers of a row become registers of an element."""
    cdef vec[MAX_LANES] square
    cdef Py_ssize_t element
    cdef int row, i, count, width = lanes(<const vec*>tile)
    for row from 0 <= row < n_rows by width:
        for element from 0 <= element < n by width:
            count = <int>min(<Py_ssize_t>width, n - element)
            for i in range(width):  # behind the last row, it once more
                square[i] = load_first(at(rows[min(row + i, n_rows - 1)], element), count, splat(0.0, tile))
            transpose(square)
            for i in range(count):
                store(tile_register(tile, element + i, row), square[i])


cdef inline void turn_back(const vec* tile, vec** rows, int n_rows, Py_ssize_t n) noexcept nogil:
    """Copy a tile to rows of n elements."""
    cdef vec[MAX_LANES] square
    cdef Py_ssize_t element
    cdef int row, i, count, width = lanes(tile)
    for row from 0 <= row < n_rows by width:
        for element from 0 <= element < n by width:
            count = <int>min(<Py_ssize_t>width, n - element)
            for i in range(width):
                square[i] = load(tile_register(<vec*>tile, element + min(i, count - 1), row))
            transpose(square)
            for i in range(min(width, n_rows - row)):
                store_first(<vec*>at(<const vec*>rows[row + i], element), square[i], count)


cdef void run_tile(
    const vec* x, vec* y, Function function, const Dimensions* kept, Py_ssize_t first, int n_rows, Py_ssize_t n,
    vec* scratch
) noexcept nogil:
    """Run n_rows contiguous rows of n elements, from `first` on."""
    cdef vec* results = <vec*>below(<const vec*>scratch, n, STRIP_BYTES)
    cdef const vec* sources[MAX_COLUMNS]
    cdef vec* targets[MAX_COLUMNS]
    cdef Py_ssize_t x_offset, y_offset
    cdef Strip strip
    cdef int row
    strip.length, strip.n_columns, strip.x_stride, strip.y_stride = n, n_rows, STRIP_BYTES, STRIP_BYTES
    for row in range(n_rows):
        locate(kept, first + row, &x_offset, &y_offset)
        sources[row], targets[row] = <const vec*>(<const char*>x + x_offset), <vec*>(<char*>y + y_offset)
    turn_on_side(sources, n_rows, n, scratch)
    if function == SOFTMAX:
        softmax_strip(<const vec*>scratch, results, strip, IN_OUTPUT, <vec*>NULL, <State*>NULL, False)
    elif function == LOG_SOFTMAX:
        log_softmax_strip(<const vec*>scratch, results, strip, False)
    else:
        logsumexp_strip(<const vec*>scratch, results, strip)
        n = 1
    turn_back(<const vec*>results, targets, n_rows, n)
