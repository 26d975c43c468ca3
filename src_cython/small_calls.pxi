"""Small calls: the whole way from the arguments to the result in compiled code, for the most usual of them.

A row of ten elements is computed in 80 ns, and the general way through fastsoftmax/_api.py takes 4.5 us. A call is
served here if it needs nothing that is decided there: rows of adjacent elements in order, float32 or float64, no other
backend forced, nobody who records plans, no threads, no exception. For any other call the functions return None, and the
general way does all of it. What is computed here is what `run` does with the schedule that the general way chooses.
"""

cdef enum:
    MAX_CHUNKS = 64  # of a small row: their states are on the stack
    RELEASED_SIZE = 8192  # elements from which other threads may run meanwhile: about 2 us

cdef object choices = None
cdef Py_ssize_t max_small_size = 0
cdef Py_ssize_t max_tile_cols = 0
cdef Py_ssize_t min_tile_rows = 0


def serve_small_calls(context_choices, Py_ssize_t size_limit, Py_ssize_t tile_cols, Py_ssize_t tile_rows):
    """Set what the functions below need to know.

    Parameters
    ----------
    context_choices : ContextVar
        Holds the `Choices` of the surroundings of a call.
    size_limit : int
        Elements of the largest call that is made without threads.
    tile_cols, tile_rows : int
        Rows of up to `tile_cols` elements are no small call if there are `tile_rows` or more: they are run as tiles.
    """
    global choices, max_small_size, max_tile_cols, min_tile_rows
    choices, max_small_size, max_tile_cols, min_tile_rows = context_choices, size_limit, tile_cols, tile_rows


@cython.binding(False)
def small_softmax(x, axis, out, backend):
    return small_call(SOFTMAX, x, axis, out, backend)


@cython.binding(False)
def small_log_softmax(x, axis, out, backend):
    return small_call(LOG_SOFTMAX, x, axis, out, backend)


@cython.binding(False)
def small_logsumexp(x, axis, out, backend):
    return small_call(LOGSUMEXP, x, axis, out, backend)


cdef inline object small_call(Function function, object x, object axis, object out, object backend):
    """The result of a call, or None if the call is not for here."""
    cdef cnp.ndarray source, target
    cdef int ndim, kept_ndim, type_number
    cdef Py_ssize_t size, n_cols
    cdef const char* data
    cdef char* target_data
    if not is_plain(x, False):
        return None
    source = x
    ndim, type_number, size = cnp.PyArray_NDIM(source), cnp.PyArray_TYPE(source), cnp.PyArray_SIZE(source)
    if ndim == 0 or not 0 < size <= max_small_size or type_number not in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64):
        return None
    if axis is None:
        n_cols, kept_ndim = size, 0
    elif type(axis) is int and (axis == -1 or axis == ndim - 1):
        n_cols, kept_ndim = cnp.PyArray_DIM(source, ndim - 1), ndim - 1
    else:
        return None
    if (n_cols <= max_tile_cols and size // n_cols >= min_tile_rows) or not is_for_here(backend):
        return None
    if function != LOGSUMEXP:
        kept_ndim = ndim
    if out is None:
        target = cnp.PyArray_EMPTY(kept_ndim, cnp.PyArray_DIMS(source), type_number, 0)
    elif not is_plain(out, True):
        return None
    else:
        target = out
        if cnp.PyArray_TYPE(target) != type_number or cnp.PyArray_NDIM(target) != kept_ndim:
            return None
        if memcmp(cnp.PyArray_DIMS(target), cnp.PyArray_DIMS(source), kept_ndim * sizeof(cnp.npy_intp)) != 0:
            return None
        data, target_data = <const char*>cnp.PyArray_DATA(source), <char*>cnp.PyArray_DATA(target)
        if data < target_data + cnp.PyArray_NBYTES(target) and target_data < data + cnp.PyArray_NBYTES(source):
            return None
    if size < RELEASED_SIZE:
        run_small(function, type_number, cnp.PyArray_DATA(source), cnp.PyArray_DATA(target), size // n_cols, n_cols)
    else:
        with nogil:
            run_small(function, type_number, cnp.PyArray_DATA(source), cnp.PyArray_DATA(target), size // n_cols, n_cols)
    if kept_ndim == 0 and out is None:
        return cnp.PyArray_ToScalar(cnp.PyArray_DATA(target), target)
    return target


cdef inline bint is_plain(object array, bint writeable) noexcept:
    """Whether it is an array of adjacent, aligned, native elements in C order, and of no subclass."""
    cdef int flags = cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED
    if writeable:
        flags |= cnp.NPY_ARRAY_WRITEABLE
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_CHKFLAGS(array, flags) and cnp.PyArray_ISNOTSWAPPED(array)


cdef inline bint is_for_here(object backend):
    """Whether the argument and the surroundings leave the call to this backend, and want no plan of it."""
    cdef PyObject* reference = NULL
    PyContextVar_Get(choices, NULL, &reference)
    cdef tuple current = <tuple>reference  # (backend, source, plans)
    Py_DECREF(current)
    if backend is None:
        backend = current[0]
    return current[2] is None and (backend is None or backend == "cython")


cdef void run_small(
    Function function, int type_number, const void* x, void* y, Py_ssize_t n_rows, Py_ssize_t n_cols
) noexcept nogil:
    if type_number == cnp.NPY_FLOAT32:
        run_small_rows(function, <const f32v*>x, <f32v*>y, n_rows, n_cols)
    else:
        run_small_rows(function, <const f64v*>x, <f64v*>y, n_rows, n_cols)


cdef inline void run_small_rows(
    Function function, const vec* x, vec* y, Py_ssize_t n_rows, Py_ssize_t n_cols
) noexcept nogil:
    cdef State[MAX_CHUNKS] states
    cdef State total
    cdef Py_ssize_t row
    for row in range(n_rows):
        if function == SOFTMAX:
            softmax_row(x, y, n_cols, IN_OUTPUT, <vec*>NULL, states, False)
            y = <vec*>at(<const vec*>y, n_cols)
        elif function == LOG_SOFTMAX:
            log_softmax_row(x, y, n_cols, False)
            y = <vec*>at(<const vec*>y, n_cols)
        else:
            total = fold_row(x, n_cols)
            put(y, row, total.maximum + log_sum(total, x))
        x = at(x, n_cols)
