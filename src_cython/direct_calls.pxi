"""Direct calls: the whole way from the arguments to the result in compiled code, for the most usual of them.

A row of ten elements is computed in 80 ns, and the general way through fastsoftmax/_api.py takes 4.5 us. A call is
served here if it needs nothing that is decided there: a dtype of the kernels in C order, one axis or all of them, no other
backend forced, nobody who records plans, no exception. For any other call the functions return None, and the general
way does all of it. The schedule is that of the general way, asked for once and remembered.
"""

cdef enum:
    MAX_DIMENSIONS = 64
    REMEMBERED = 256  # schedules
    SMALL_SIZE = 8192  # elements up to which a call, of 2 us at most, keeps the GIL and looks at nothing but the shape
    ALLOCATED_BYTES = 1048576  # from here on `empty_like` decides where the memory of a result comes from
    MAX_TEXT = 32


cdef struct Shape:
    # In C order, one axis makes of an array an `outer` by `n` by `inner` one, of which the middle is reduced.
    Function function
    int type_number
    bint in_place
    Py_ssize_t outer
    Py_ssize_t n
    Py_ssize_t inner


cdef struct Remembered:
    Shape shape
    Traversal traversal
    Exponentials exponentials
    bint streaming
    Py_ssize_t n_blocks
    int n_threads  # 0 where nothing is remembered


cdef Remembered[REMEMBERED] remembered
cdef int bfloat16_number = -1  # NumPy's for the dtype, as far as a general call has met it
cdef char[MAX_TEXT] threads_text  # of the environment variable, when schedules were chosen
cdef object choices = None
cdef object choose_schedule = None
cdef object empty_like = None


def serve_direct_calls(context_choices, schedule_function, allocate):
    """Set what the functions below need, and forget all schedules.

    Parameters
    ----------
    context_choices : ContextVar
        Holds the `Choices` of the surroundings of a call.
    schedule_function : callable
        Gives ``(traversal, exponentials, streaming, n_blocks, n_threads)``, as `run` takes them, for ``(function,
        itemsize, outer, n, inner, in_place)``.
    allocate : callable
        ``allocate(x, dtype)`` gives an array like x for a result.
    """
    global choices, choose_schedule, empty_like
    choices, choose_schedule, empty_like = context_choices, schedule_function, allocate
    memset(remembered, 0, sizeof(remembered))


def forget_schedules():
    """Forget all schedules, which depend on the number of threads."""
    memset(remembered, 0, sizeof(remembered))


@cython.binding(False)
def direct_softmax(x, axis, out, where, temperature, dtype, backend):
    if where is not None or dtype is not None or not is_one(temperature):
        return None
    return direct_call(SOFTMAX, x, axis, out, backend, None)


@cython.binding(False)
def direct_log_softmax(x, axis, out, where, temperature, dtype, backend):
    if where is not None or dtype is not None or not is_one(temperature):
        return None
    return direct_call(LOG_SOFTMAX, x, axis, out, backend, None)


@cython.binding(False)
def direct_logsumexp(x, axis, out, where, temperature, dtype, backend):
    if where is not None or dtype is not None or not is_one(temperature):
        return None
    return direct_call(LOGSUMEXP, x, axis, out, backend, None)


cdef inline object direct_call(
    Function function, object x, object axis, object out, object backend, object g
):
    """The result of a call, or None if the call is not for here; g is the gradient that a derivative takes."""
    cdef cnp.ndarray source, target, gradient = None
    cdef cnp.npy_intp[MAX_DIMENSIONS] target_shape
    cdef Shape shape
    cdef int ndim, target_ndim, reduced, d
    if not is_plain(x, False):
        return None
    source = x
    ndim = cnp.PyArray_NDIM(source)
    shape.function, shape.type_number = function, cnp.PyArray_TYPE(source)
    if shape.type_number not in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64, cnp.NPY_FLOAT16, bfloat16_number):
        return None
    if g is not None:
        if not is_plain(g, False):
            return None
        gradient = g
        if cnp.PyArray_TYPE(gradient) != shape.type_number or not cnp.PyArray_SAMESHAPE(source, gradient):
            return None
    if axis is None and ndim > 0:
        reduced = -1
    elif type(axis) is int and -ndim <= axis < ndim:
        reduced = axis
        if reduced < 0:
            reduced += ndim
    else:
        return None
    if not is_for_here(backend):
        return None
    shape.outer = shape.n = shape.inner = 1
    target_ndim = 0
    for d in range(ndim):
        if reduced < 0 or d == reduced:
            shape.n *= cnp.PyArray_DIM(source, d)
        elif d < reduced:
            shape.outer *= cnp.PyArray_DIM(source, d)
        else:
            shape.inner *= cnp.PyArray_DIM(source, d)
        if function != LOGSUMEXP or not (reduced < 0 or d == reduced):
            target_shape[target_ndim] = cnp.PyArray_DIM(source, d)
            target_ndim += 1
    if shape.outer * shape.n * shape.inner == 0:
        return None
    if shape.n == 1:
        shape.outer, shape.inner = shape.outer * shape.inner, 1
    shape.in_place = False
    if out is None:
        if function == LOGSUMEXP:
            target = cnp.PyArray_EMPTY(target_ndim, target_shape, shape.type_number, 0)
        elif cnp.PyArray_NBYTES(source) < ALLOCATED_BYTES:
            target = cnp.PyArray_EMPTY(ndim, cnp.PyArray_DIMS(source), shape.type_number, 0)
        else:
            target = empty_like(source, source.dtype)
    elif not is_plain(out, True):
        return None
    else:
        target = out
        if cnp.PyArray_TYPE(target) != shape.type_number or cnp.PyArray_NDIM(target) != target_ndim:
            return None
        if target_ndim and memcmp(cnp.PyArray_DIMS(target), target_shape, target_ndim * sizeof(cnp.npy_intp)) != 0:
            return None
        shape.in_place = function != LOGSUMEXP and cnp.PyArray_DATA(source) == cnp.PyArray_DATA(target)
        if not shape.in_place and overlap(source, target):
            return None
        if g is not None and cnp.PyArray_DATA(gradient) != cnp.PyArray_DATA(target):
            if overlap(gradient, target):
                return None
        elif g is not None:
            shape.in_place = True
    if g is None:
        run_remembered(schedule_of(&shape), source, target)
    else:
        run_remembered_vjp(schedule_of(&shape), source, gradient, target)
    if target_ndim == 0 and out is None:
        return cnp.PyArray_ToScalar(cnp.PyArray_DATA(target), target)
    return target


cdef inline bint is_one(object temperature) noexcept:
    return type(temperature) is float and <double>temperature == 1.0 or type(temperature) is int and temperature == 1


cdef inline bint is_plain(object array, bint writeable) noexcept:
    """Whether it is an array of adjacent, aligned, native elements in C order, and of no subclass."""
    cdef int flags = cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED
    if writeable:
        flags |= cnp.NPY_ARRAY_WRITEABLE
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_CHKFLAGS(array, flags) and cnp.PyArray_ISNOTSWAPPED(array)


cdef inline Storage storage_of_type(int type_number) noexcept:
    if type_number == cnp.NPY_FLOAT16:
        return FLOAT16
    return BFLOAT16 if type_number == bfloat16_number else AS_COMPUTED


cdef inline int size_of_type(int type_number) noexcept:
    """Bytes of an element in memory."""
    if storage_of_type(type_number) != AS_COMPUTED:
        return 2
    return 4 if type_number == cnp.NPY_FLOAT32 else 8


cdef inline bint overlap(cnp.ndarray x, cnp.ndarray y) noexcept:
    cdef const char* x_data = <const char*>cnp.PyArray_DATA(x)
    cdef const char* y_data = <const char*>cnp.PyArray_DATA(y)
    return x_data < y_data + cnp.PyArray_NBYTES(y) and y_data < x_data + cnp.PyArray_NBYTES(x)


cdef inline bint is_for_here(object backend):
    """Whether the argument and the surroundings leave the call to this backend, and want no plan of it."""
    cdef PyObject* reference = NULL
    PyContextVar_Get(choices, NULL, &reference)
    cdef tuple current = <tuple>reference  # (backend, source, plans)
    Py_DECREF(current)
    if backend is None:
        backend = current[0]
    return current[2] is None and (backend is None or backend == "cython")


cdef inline Remembered* schedule_of(const Shape* shape) except NULL:
    """The schedule for a shape; Python is asked for it once for each number of threads."""
    cdef size_t mixed = <size_t>shape.outer * 0x9E3779B1u + <size_t>shape.n
    mixed = (mixed * 0x9E3779B1u + <size_t>shape.inner) * 16 + <size_t>shape.function * 2 + shape.in_place
    # Two bits for the type: what is multiplied further up is not in the place, so that functions would share it.
    mixed = mixed * 4 + (3 if shape.type_number == cnp.NPY_FLOAT64 else <size_t>storage_of_type(shape.type_number))
    cdef Remembered* place = &remembered[(mixed ^ (mixed >> 16)) % REMEMBERED]
    if shape.outer * shape.n * shape.inner > SMALL_SIZE:
        forget_if_threads_changed()
    if place.n_threads == 0 or not same_shape(&place.shape, shape):
        place.n_threads = 0
        traversal, exponentials, place.streaming, place.n_blocks, n_threads = choose_schedule(
            shape.function, size_of_type(shape.type_number), shape.outer, shape.n, shape.inner, shape.in_place)
        place.traversal, place.exponentials = <Traversal><int>traversal, <Exponentials><int>exponentials
        place.shape, place.n_threads = shape[0], n_threads
    return place


cdef inline void forget_if_threads_changed() noexcept:
    cdef const char* text = getenv("FASTSOFTMAX_NUM_THREADS")
    if text == NULL:
        text = ""
    if strncmp(text, threads_text, MAX_TEXT) != 0:
        strncpy(threads_text, text, MAX_TEXT)
        memset(remembered, 0, sizeof(remembered))


cdef inline bint same_shape(const Shape* a, const Shape* b) noexcept:
    return (
        a.n == b.n and a.outer == b.outer and a.inner == b.inner and a.function == b.function
        and a.type_number == b.type_number and a.in_place == b.in_place)


cdef inline int run_remembered(const Remembered* schedule, cnp.ndarray source, cnp.ndarray target) except -1:
    """Run a call by its schedule, laid out as the general way does it."""
    cdef Job job
    job.function, job.traversal = schedule.shape.function, schedule.traversal
    job.exponentials, job.streaming, job.storage = (
        schedule.exponentials, schedule.streaming, storage_of_type(schedule.shape.type_number))
    job.has_zero, job.adjusted, job.sink = False, NULL, NULL
    lay_out(&schedule.shape, &job.kept, &job.row)
    return run_job(&job, source, target, schedule.n_blocks, schedule.n_threads, cnp.PyArray_SIZE(source) > SMALL_SIZE)


cdef inline void lay_out(const Shape* shape, Dimensions* kept, Dimensions* row) noexcept:
    cdef Py_ssize_t itemsize = size_of_type(shape.type_number)
    cdef bint reduces = shape.function == LOGSUMEXP
    kept.count = row.count = 0
    if shape.outer > 1:
        add_dimension(
            kept, shape.outer, shape.n * shape.inner * itemsize, (1 if reduces else shape.n) * shape.inner * itemsize)
    if shape.inner > 1:
        add_dimension(kept, shape.inner, itemsize, itemsize)
    add_dimension(row, shape.n, shape.inner * itemsize, 0 if reduces else shape.inner * itemsize)


cdef inline void add_dimension(
    Dimensions* dimensions, Py_ssize_t size, Py_ssize_t x_stride, Py_ssize_t y_stride
) noexcept:
    cdef int d = dimensions.count
    dimensions.size[d], dimensions.x_stride[d], dimensions.y_stride[d] = size, x_stride, y_stride
    dimensions.count = d + 1
