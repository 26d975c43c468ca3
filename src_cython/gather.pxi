"""Rows whose elements are not adjacent: collected a chunk at a time into a scratch that fits the L1 cache.

A row of any stride, or over several axes that memory does not let be one, is read through the same kernels as a
contiguous row and gives the same bits.
"""


cdef struct Dimensions:
    int count
    Py_ssize_t[64] size  # outermost first
    Py_ssize_t[64] x_stride  # in bytes, as all strides
    Py_ssize_t[64] y_stride


cdef inline void locate(
    const Dimensions* dimensions, Py_ssize_t index, Py_ssize_t* x_offset, Py_ssize_t* y_offset
) noexcept nogil:
    """The byte offsets of the index-th place of some dimensions, in the input and in the output."""
    cdef int i
    x_offset[0] = y_offset[0] = 0
    for i in range(dimensions.count - 1, 0, -1):
        x_offset[0] += index % dimensions.size[i] * dimensions.x_stride[i]
        y_offset[0] += index % dimensions.size[i] * dimensions.y_stride[i]
        index //= dimensions.size[i]
    if dimensions.count:
        x_offset[0] += index * dimensions.x_stride[0]
        y_offset[0] += index * dimensions.y_stride[0]


cdef inline void copy_elements(
    const char* source, Py_ssize_t source_stride, char* target, Py_ssize_t target_stride, Py_ssize_t n, const vec* like
) noexcept nogil:
    cdef Py_ssize_t i
    if source_stride == target_stride == itemsize(like):
        memcpy(target, source, n * itemsize(like))
    elif vec is f32v:
        for i in range(n):
            (<float*>(target + i * target_stride))[0] = (<const float*>(source + i * source_stride))[0]
    else:
        for i in range(n):
            (<double*>(target + i * target_stride))[0] = (<const double*>(source + i * source_stride))[0]


cdef void gather(
    const vec* x, const Dimensions* row, Py_ssize_t first, Py_ssize_t n, vec* target
) noexcept nogil:
    """Copy n elements of a row, from `first` on, to contiguous memory."""
    cdef Py_ssize_t x_offset, y_offset, run, inner = row.size[row.count - 1], done = 0
    while done < n:
        locate(row, first + done, &x_offset, &y_offset)
        run = min(inner - (first + done) % inner, n - done)
        copy_elements(
            <const char*>x + x_offset, row.x_stride[row.count - 1], <char*>target + done * itemsize(x), itemsize(x),
            run, x)
        done += run


cdef void scatter(
    const vec* source, vec* y, const Dimensions* row, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    """Copy n contiguous elements to their places in a row of the output."""
    cdef Py_ssize_t x_offset, y_offset, run, inner = row.size[row.count - 1], done = 0
    while done < n:
        locate(row, first + done, &x_offset, &y_offset)
        run = min(inner - (first + done) % inner, n - done)
        copy_elements(
            <const char*>source + done * itemsize(source), itemsize(source), <char*>y + y_offset,
            row.y_stride[row.count - 1], run, source)
        done += run


cdef State fold_gathered(const vec* x, const Dimensions* row, Py_ssize_t n, bint apart, vec* scratch) noexcept nogil:
    """The state of a row; the scratch is left with its last chunk."""
    cdef Py_ssize_t length = chunk_length(x), first = 0, size
    cdef State state, total = identity()
    cdef double row_offset = 0.0
    while first < n:
        size = min(length, n - first)
        gather(x, row, first, size, scratch)
        state = fold_chunk(<const vec*>scratch, <vec*>NULL, size, False, apart, row_offset)
        if first == 0:
            total, row_offset = state, state.offset
        else:
            total = merge(total, state, apart)
        first += size
    return within_range(total, x)


cdef void softmax_gathered(const vec* x, vec* y, const Dimensions* row, Py_ssize_t n, vec* scratch) noexcept nogil:
    """Softmax of one row; `scratch` has room for two chunks."""
    cdef Py_ssize_t length = chunk_length(x), first = 0, size
    cdef vec* result = <vec*>(<char*>scratch + length * itemsize(x))
    cdef State total = fold_gathered(x, row, n, False, scratch)
    cdef bint regular = is_regular(total)
    cdef Scale scale = scale_of(total, x)
    while first < n:
        size = min(length, n - first)
        if not regular:
            fill_nan(result, size)
        else:
            if n > length:  # else the only chunk is still there
                gather(x, row, first, size, scratch)
            write_probabilities(<const vec*>scratch, <const vec*>NULL, result, size, total, total, scale, False)
        scatter(<const vec*>result, y, row, first, size)
        first += size


cdef void log_softmax_gathered(const vec* x, vec* y, const Dimensions* row, Py_ssize_t n, vec* scratch) noexcept nogil:
    cdef Py_ssize_t length = chunk_length(x), first = 0, size
    cdef State total = fold_gathered(x, row, n, True, scratch)
    while first < n:
        size = min(length, n - first)
        if n > length:
            gather(x, row, first, size, scratch)
        write_chunk(
            SUBTRACT, <const vec*>scratch, scratch, size, <const vec*>NULL, scale_by(total.maximum, log_sum(total, x)), False)
        scatter(<const vec*>scratch, y, row, first, size)
        first += size
