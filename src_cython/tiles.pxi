"""Kernels for short rows: a tile of them is turned on its side in a scratch, and becomes a strip.

A row of ten elements would leave most lanes of a register empty, and spend its time on what comes after the sum. As
columns of a strip, as many rows as a register has lanes share all of it. The bits are those of the row alone.
"""


cdef inline Py_ssize_t tile_bytes(Py_ssize_t n) noexcept nogil:
    """Memory for a tile of rows of n elements: their logits, and what is to be written."""
    return 2 * n * STRIP_BYTES


cdef void run_tile(
    const vec* x, vec* y, Function function, const Dimensions* kept, Py_ssize_t first, int n_rows, Py_ssize_t n,
    vec* scratch
) noexcept nogil:
    """Run n_rows contiguous rows of n elements, from `first` on."""
    cdef vec* results = <vec*>below(<const vec*>scratch, n, STRIP_BYTES)
    cdef Py_ssize_t x_offset, y_offset
    cdef Strip strip
    cdef int row
    strip.length, strip.n_columns, strip.x_stride, strip.y_stride = n, n_rows, STRIP_BYTES, STRIP_BYTES
    for row in range(n_rows):
        locate(kept, first + row, &x_offset, &y_offset)
        copy_elements(
            <const char*>x + x_offset, itemsize(x), <char*>scratch + row * itemsize(x), STRIP_BYTES, n, x)
    if function == SOFTMAX:
        softmax_strip(<const vec*>scratch, results, strip, IN_OUTPUT, <vec*>NULL, <State*>NULL, False)
    elif function == LOG_SOFTMAX:
        log_softmax_strip(<const vec*>scratch, results, strip, False)
    else:
        logsumexp_strip(<const vec*>scratch, results, strip)
        n = 1
    for row in range(n_rows):
        locate(kept, first + row, &x_offset, &y_offset)
        copy_elements(
            <const char*>results + row * itemsize(x), STRIP_BYTES, <char*>y + y_offset, itemsize(x), n, x)
