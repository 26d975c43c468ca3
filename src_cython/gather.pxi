"""Rows whose elements are not adjacent: collected a chunk at a time into a scratch that fits the L1 cache.

A row of any stride, or over several axes that memory does not let be one, is read through the same kernels as a
contiguous row and gives the same bits. So is a row of float16 or bfloat16, which becomes float32 on the way.
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


cdef inline void read_elements(
    const char* source, Py_ssize_t stride, vec* target, Py_ssize_t n, Storage storage
) noexcept nogil:
    """Copy elements to contiguous memory, in the type that is computed in."""
    cdef Py_ssize_t i, width = lanes(<const vec*>target), size = stored_size(storage, <const vec*>target)
    cdef vec zero = splat(0.0, <const vec*>target)
    if stride == size and storage == AS_COMPUTED:
        memcpy(target, source, n * size)
    elif storage > BFLOAT16 or vec is f64v and storage != AS_COMPUTED:
        read_converted(source, stride, target, n, storage)
    elif stride == size:
        for i in range(n // width):
            store(target + i, load_stored(source + i * width * size, <int>width, zero, storage))
        i = n // width * width
        store_first(
            <vec*>at(<const vec*>target, i), load_stored(source + i * size, <int>(n - i), zero, storage), <int>(n - i))
    elif storage != AS_COMPUTED:
        for i in range(n):
            put(target, i, lane(load_stored(source + i * stride, 1, zero, storage), 0))
    else:
        for i in range(n):
            put(target, i, get(<const vec*>(source + i * stride), 0))


cdef inline void write_elements_to(
    const vec* source, char* target, Py_ssize_t stride, Py_ssize_t n, Storage storage
) noexcept nogil:
    """Copy contiguous elements to where they belong, in the type that they have there."""
    cdef Py_ssize_t i, width = lanes(source), size = stored_size(storage, source)
    if stride == size and storage == AS_COMPUTED:
        memcpy(target, source, n * size)
    elif vec is f64v and storage != AS_COMPUTED:
        f64v_write(source, target, stride, n, storage)
    elif stride == size:
        for i in range(n // width):
            store_stored(target + i * width * size, load(source + i), <int>width, storage)
        i = n // width * width
        store_stored(
            target + i * size, load_first(at(source, i), <int>(n - i), splat(0.0, source)), <int>(n - i), storage)
    elif storage != AS_COMPUTED:
        for i in range(n):
            store_stored(target + i * stride, splat(get(source, i), source), 1, storage)
    else:
        for i in range(n):
            put(<vec*>(target + i * stride), 0, get(source, i))


cdef void gather(
    const void* x, const Dimensions* row, Py_ssize_t first, Py_ssize_t n, vec* target, Storage storage
) noexcept nogil:
    """Copy n elements of a row, from `first` on, to contiguous memory."""
    cdef Py_ssize_t x_offset, y_offset, run, inner = row.size[row.count - 1], done = 0
    while done < n:
        locate(row, first + done, &x_offset, &y_offset)
        run = min(inner - (first + done) % inner, n - done)
        read_elements(
            <const char*>x + x_offset, row.x_stride[row.count - 1], <vec*>at(<const vec*>target, done), run, storage)
        done += run


cdef void scatter(
    const vec* source, void* y, const Dimensions* row, Py_ssize_t first, Py_ssize_t n, Storage storage
) noexcept nogil:
    """Copy n contiguous elements to their places in a row of the output."""
    cdef Py_ssize_t x_offset, y_offset, run, inner = row.size[row.count - 1], done = 0
    while done < n:
        locate(row, first + done, &x_offset, &y_offset)
        run = min(inner - (first + done) % inner, n - done)
        write_elements_to(
            at(source, done), <char*>y + y_offset, row.y_stride[row.count - 1], run, storage)
        done += run


cdef State fold_gathered(
    const void* x, const Dimensions* row, Py_ssize_t n, bint apart, bint has_zero, vec* scratch, Storage storage,
    vec* smallest
) noexcept nogil:
    """The state of a row; the scratch is left with its last chunk. 16-bit rows whose maximum is not apart are COARSE.

    `smallest` is as for `fold_chunk`.
    """
    cdef Py_ssize_t length = chunk_length(<const vec*>scratch), first = 0, size
    cdef State state, total = identity()
    cdef double row_offset = 0.0
    while first < n:
        size = min(length, n - first)
        gather(x, row, first, size, scratch, storage)
        if storage != AS_COMPUTED and not apart:
            state = fold_coarse_chunk(<const vec*>scratch, <vec*>NULL, size, False, has_zero and first == 0)
        else:
            state = fold_chunk(
                <const vec*>scratch, <vec*>NULL, size, False, apart, has_zero and first == 0, row_offset, smallest)
        if first == 0:
            total, row_offset = state, state.offset
        else:
            total = merge(total, state, apart)
        first += size
    return within_range(total, <const vec*>scratch)


cdef void softmax_gathered(
    const void* x, void* y, const Dimensions* row, Py_ssize_t n, bint has_zero, vec* scratch, Storage storage
) noexcept nogil:
    """Softmax of one row; `scratch` has room for two chunks."""
    cdef Py_ssize_t length = chunk_length(<const vec*>scratch), first = 0, size
    cdef vec* result = <vec*>at(<const vec*>scratch, length)
    cdef const vec* terms = result if n <= length else NULL  # of a row in one chunk; longer ones are computed again
    cdef bint coarse = storage != AS_COMPUTED
    cdef vec[REFERENCE] reference
    cdef vec smallest = splat(INFINITY, <const vec*>scratch)
    cdef State total
    cdef Scale scale
    if terms != NULL:
        gather(x, row, 0, n, scratch, storage)
        if coarse:
            total = fold_coarse_chunk(<const vec*>scratch, result, n, True, has_zero)
        else:
            total = fold_chunk(<const vec*>scratch, result, n, True, False, has_zero, 0.0, &smallest)
    else:
        total = fold_gathered(x, row, n, False, has_zero, scratch, storage, &smallest)
    cdef bint regular = is_regular(total)
    if regular and coarse:
        make_reference(splat(total.offset, scratch), splat(total.exponent, scratch), reference)
        scale = coarse_scale_of(total, <const vec*>scratch)
    elif regular:
        scale = scale_of(total, <const vec*>scratch)
        scale.is_mended = is_below_mended(smallest, splat(total.maximum, scratch), n, 1.0)
    while first < n:
        size = min(length, n - first)
        if not regular:
            fill_nan(result, size)
        else:
            if terms == NULL:
                gather(x, row, first, size, scratch, storage)
            if not coarse:
                write_probabilities(<const vec*>scratch, terms, result, size, total, total, scale, False)
            elif terms == NULL:
                write_elements(COARSE_EXP_SCALE, <const vec*>scratch, result, size, reference, scale, False, False)
            else:
                write_elements(COARSE_SCALE, terms, result, size, reference, scale, False, False)
        scatter(<const vec*>result, y, row, first, size, storage)
        first += size


cdef void log_softmax_gathered(
    const void* x, void* y, const Dimensions* row, Py_ssize_t n, vec* scratch, Storage storage
) noexcept nogil:
    cdef Py_ssize_t length = chunk_length(<const vec*>scratch), first = 0, size
    cdef State total = fold_gathered(x, row, n, True, False, scratch, storage, <vec*>NULL)
    cdef Scale scale = log_scale_of(total, <const vec*>scratch)
    while first < n:
        size = min(length, n - first)
        if n > length:
            gather(x, row, first, size, scratch, storage)
        write_chunk(SUBTRACT, <const vec*>scratch, scratch, size, <const vec*>NULL, scale, False)
        scatter(<const vec*>scratch, y, row, first, size, storage)
        first += size
