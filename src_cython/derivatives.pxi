"""Vector-Jacobian products: from the gradient g of a result to the gradient of what it was computed from.

    softmax_vjp      p * (g - sum(p * g))
    log_softmax_vjp  g - exp(log_p) * sum(g)
    logsumexp_vjp    g * softmax(a), with one g a row

A row is read twice: for its sum, and to be written. Each lane adds up a few elements as they are, and such sums with
the rounding error of each addition (Ogita, Rump and Oishi, "Accurate sum and dot product", 2005), so that the error does
not grow with the row.
"""

cdef enum:
    # Elements of a lane that are added up as they are. With the error of every product and every addition, (64, 1000)
    # float32 take 9.4 us instead of 8.0.
    PLAIN = 4


cdef struct Vjp:
    Function function
    Traversal traversal
    bint streaming
    Storage storage
    const void* x
    const void* g
    void* y
    bint is_single
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory
    Dimensions kept
    Dimensions row
    Dimensions g_kept  # the same with the strides of g for those of the input
    Dimensions g_row


# What makes g * probability of a term: registers, with a value for each lane.
cdef enum:
    RECIPROCAL  # of the sum, in two parts
    RECIPROCAL_LOW
    GRADIENT
    WEIGHTS  # registers


def run_vjp(
    int function, int traversal, bint streaming, int storage, tuple kept, tuple reduced, cnp.ndarray x, cnp.ndarray g,
    cnp.ndarray out, Py_ssize_t n_blocks, int n_threads
):
    """Run a vector-Jacobian product; the parameters are those of `run`, and g, which is of the type of x."""
    cdef Vjp call
    call.function, call.traversal, call.streaming = <Function>function, <Traversal>traversal, streaming
    call.storage = <Storage>storage
    call.kept, call.row = dimensions(kept), dimensions(reduced)
    call.g_kept, call.g_row = dimensions_of_factors(kept), dimensions_of_factors(reduced)
    run_vjp_call(&call, x, g, out, n_blocks, n_threads, True)


cdef int run_vjp_call(
    Vjp* call, cnp.ndarray x, cnp.ndarray g, cnp.ndarray out, Py_ssize_t n_blocks, int n_threads, bint releases
) except -1:
    """Run a call; unless it `releases` the GIL, in one block."""
    call.x, call.g, call.y = cnp.PyArray_DATA(x), cnp.PyArray_DATA(g), cnp.PyArray_DATA(out)
    call.is_single, call.n_blocks = cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64, n_blocks
    call.first, call.lacks_memory = 0, False
    if releases:
        run_in_parts(run_vjp_block_of_call, call, &call.first, n_blocks, n_threads)
    else:
        run_vjp_block_of_call(call, 0)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a vector-Jacobian product")
    return 0


cdef void run_vjp_block_of_call(void* context, Py_ssize_t block) noexcept nogil:
    cdef Vjp* call = <Vjp*>context
    cdef bint has_memory
    if call.is_single:
        has_memory = run_vjp_block(<const f32v*>NULL, call, call.first + block)
    else:
        has_memory = run_vjp_block(<const f64v*>NULL, call, call.first + block)
    if not has_memory:
        call.lacks_memory = True


cdef bint run_vjp_block(const vec* like, const Vjp* call, Py_ssize_t block) noexcept nogil:
    """Run one of the equal parts of a call; False if there is no memory for its scratch."""
    cdef Py_ssize_t n = total_size(&call.row), n_units = total_size(&call.kept), n_strips = 1, unit
    cdef Py_ssize_t x_offset, y_offset, g_offset, g_y_offset
    cdef Dimensions kept = call.kept, g_kept = call.g_kept
    cdef const char* x
    cdef const char* g
    cdef char* y
    cdef vec* scratch = NULL
    if call.traversal == STRIPS:
        kept.count -= 1
        g_kept.count -= 1
        n_strips = (kept.size[kept.count] + narrow_strip_columns(like) - 1) // narrow_strip_columns(like)
        n_units = total_size(&kept) * n_strips
    elif call.traversal == GATHER or call.function == LOGSUMEXP_VJP:
        scratch = <vec*>malloc(2 * CHUNK_BYTES)
        if scratch == NULL:
            return False
    for unit in range(n_units * block // call.n_blocks, n_units * (block + 1) // call.n_blocks):
        locate(&kept, unit // n_strips, &x_offset, &y_offset)
        locate(&g_kept, unit // n_strips, &g_offset, &g_y_offset)
        x, g, y = <const char*>call.x + x_offset, <const char*>call.g + g_offset, <char*>call.y + y_offset
        if call.traversal == STRIPS:
            run_vjp_strip(like, call, x, g, y, unit % n_strips * narrow_strip_columns(like), n)
        elif call.function == LOGSUMEXP_VJP:
            logsumexp_vjp_row(
                call, <const vec*>x, lane(load_stored(g, 1, splat(0.0, like), call.storage), 0), <vec*>y, n, scratch)
        else:
            sum_vjp_row(call, <const vec*>x, <const vec*>g, <vec*>y, n, scratch)
    if call.streaming:
        stream_fence()
    free(scratch)
    return True


cdef inline const vec* piece(
    const Vjp* call, const vec* first_of_row, const Dimensions* row, Py_ssize_t first, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """n adjacent elements of a row: where they lie, or gathered in the scratch."""
    if call.traversal != GATHER:
        return at(first_of_row, first)
    gather(first_of_row, row, first, n, scratch, call.storage)
    return <const vec*>scratch


# Sums


cdef inline void fold_gradient(vec x, vec g, bint has_products, vec* high, vec* low) noexcept nogil:
    """Add x * g, or g alone, to the sum high + low of each lane."""
    cdef vec term = x * g if has_products else g, error
    high[0] = two_sum(high[0], term, &error)
    if has_products:
        error = error + product_residual(x, g, term)
    low[0] = low[0] + error


cdef inline vec product_residual(vec a, vec b, vec rounded) noexcept nogil:
    """a * b - rounded, where `rounded` is the rounded product."""
    if HAS_FMA:
        return fused(a, b, -rounded)
    return product_error(a, b, rounded)


cdef inline void fold_gradients(
    const vec* x, const vec* g, Py_ssize_t n, bint has_products, vec* high, vec* low
) noexcept nogil:
    """Add n elements to the sums of the lanes: element j to that of lane j % lanes."""
    cdef vec zero = splat(0.0, x), highs = high[0], lows = low[0], total, error
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int count, j
    while (i + PLAIN) * width <= n:
        total = zero
        for j in range(PLAIN):
            total = times_plus(load(x + i + j), load(g + i + j), total) if has_products else total + load(g + i + j)
            prefetch(at(g, (i + j) * width + n))  # of the next row, see `write_gradients`
        highs = two_sum(highs, total, &error)
        lows = lows + error
        i += PLAIN
    while i * width < n:
        count = count_within(i, n, x)
        fold_gradient(load_first(x + i, count, zero), load_first(g + i, count, zero), has_products, &highs, &lows)
        i += 1
    high[0], low[0] = highs, lows


cdef inline void merge_lane_sums(vec* high, vec* low) noexcept nogil:
    """Bring the sum of all lanes into every lane."""
    cdef int distance = lanes(<const vec*>high) // 2
    while distance:
        accumulate(high, low, swap(high[0], distance), swap(low[0], distance))
        distance //= 2


cdef inline double plain_term(double x, double g, bint has_products) noexcept nogil:
    if not has_products:
        return g
    return 0.0 if x == 0.0 else x * g


cdef double plain_sum(
    const Vjp* call, const vec* x, const vec* g, Py_ssize_t n, bint has_products, vec* scratch
) noexcept nogil:
    """The sum of a row in which an element, a product or the error of one is not finite."""
    cdef Py_ssize_t length = weighted_length(x), first = 0, size, i
    cdef const vec* x_piece
    cdef const vec* g_piece
    cdef double total = 0.0
    while first < n:
        size = min(length, n - first)
        x_piece = piece(call, x, &call.row, first, size, scratch)
        g_piece = piece(call, g, &call.g_row, first, size, <vec*>at(<const vec*>scratch, length))
        for i in range(size):
            total += plain_term(get(x_piece, i), get(g_piece, i), has_products)
        first += size
    return total


# Elements


cdef inline void make_log_reference(vec* reference) noexcept nogil:
    """The reference for the exponentials of log-probabilities: of those down to the smallest subnormal number."""
    make_reference(splat(0.0, reference), splat(by_type(-24.0, -54.0, reference), reference), reference)


cdef inline void probabilities_of_logs(const vec* log_p, vec* p, int count, const vec* reference) noexcept nogil:
    """exp(log_p) for `count` registers; what is too small for a subnormal number is 0, what overflows is inf."""
    cdef vec zero = splat(0.0, log_p), scale = splat(by_type(2.0**-24, 2.0**-54, log_p), log_p)
    cdef int j
    scaled_exp(log_p, p, <vec*>NULL, count, reference, 0)
    for j in range(count):
        p[j] = where_at_most(log_p[j], reference[FLOOR], zero, p[j] * scale)
        p[j] = where_at_most(splat(by_type(71.0, 671.0, log_p), log_p), log_p[j], splat(INFINITY, log_p), p[j])


cdef inline void gradients_of(
    Function function, const vec* x, const vec* g, vec* v, int count, const vec* highs, const vec* lows, int step,
    const vec* reference
) noexcept nogil:
    """What becomes of `count` registers, given the sums: one for each with a `step` of 1, the same for all with 0."""
    cdef vec zero = splat(0.0, x)
    cdef vec[GROUP] p
    cdef int j
    if function == SOFTMAX_VJP:
        for j in range(count):
            v[j] = where_nonzero(x[j], x[j] * ((g[j] - highs[j * step]) - lows[j * step]))
        return
    probabilities_of_logs(x, p, count, reference)
    for j in range(count):
        v[j] = times_plus(-p[j], lows[j * step], times_plus(-p[j], highs[j * step], g[j]))
        v[j] = where_at_most(p[j], zero, g[j], v[j])  # an infinite sum times a probability of 0


cdef inline void write_gradients(
    Function function, const vec* x, const vec* g, vec* y, Py_ssize_t n, vec high, vec low, bint streaming
) noexcept nogil:
    """Write n elements."""
    cdef vec zero = splat(0.0, x)
    cdef vec[REFERENCE] reference
    cdef vec[GROUP] v, logits, gradients
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int count, j
    make_log_reference(reference)
    if streaming:  # only whole registers at their own boundaries can be
        count = <int>min(n, <Py_ssize_t>(-<uintptr_t>y % REGISTER_BYTES) // itemsize(x))
        if count:
            logits[0], gradients[0] = load_first(x, count, zero), load_first(g, count, zero)
            gradients_of(function, logits, gradients, v, 1, &high, &low, 0, reference)
            store_first(y, v[0], count)
            x, g, y, n = at(x, count), at(g, count), <vec*>at(<const vec*>y, count), n - count
    while (i + GROUP) * width <= n:
        for j in range(GROUP):
            logits[j], gradients[j] = load(x + i + j), load(g + i + j)
            # Memory is busy all the time if one input of the next row is fetched here and the other in the sum:
            # (8192, 4096) float32 take 9.5 ms instead of 11.7.
            prefetch(at(x, (i + j) * width + n))
        gradients_of(function, logits, gradients, v, GROUP, &high, &low, 0, reference)
        for j in range(GROUP):
            if streaming:
                stream(y + i + j, v[j])
            else:
                store(y + i + j, v[j])
        i += GROUP
    while i * width < n:
        count = count_within(i, n, x)
        logits[0], gradients[0] = load_first(x + i, count, zero), load_first(g + i, count, zero)
        gradients_of(function, logits, gradients, v, 1, &high, &low, 0, reference)
        store_first(y + i, v[0], count)
        i += 1


cdef void write_gradients_by_kind(
    const Vjp* call, const vec* x, const vec* g, vec* y, Py_ssize_t n, vec high, vec low
) noexcept nogil:
    """`write_gradients` in one copy for each kind of call, so that its loops hold no decisions."""
    if call.function == SOFTMAX_VJP and call.streaming:
        write_gradients(SOFTMAX_VJP, x, g, y, n, high, low, True)
    elif call.function == SOFTMAX_VJP:
        write_gradients(SOFTMAX_VJP, x, g, y, n, high, low, False)
    elif call.streaming:
        write_gradients(LOG_SOFTMAX_VJP, x, g, y, n, high, low, True)
    else:
        write_gradients(LOG_SOFTMAX_VJP, x, g, y, n, high, low, False)


# Rows


cdef void sum_vjp_row(
    const Vjp* call, const vec* x, const vec* g, vec* y, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """softmax_vjp or log_softmax_vjp of one row; the scratch is for a piece of x and one of g, if they are gathered."""
    cdef bint is_gathered = call.traversal == GATHER, has_products = call.function == SOFTMAX_VJP
    cdef Py_ssize_t length = weighted_length(x) if is_gathered else n, first, size
    cdef vec* g_scratch = <vec*>at(<const vec*>scratch, weighted_length(x))
    cdef const vec* x_piece = x
    cdef const vec* g_piece = g
    cdef vec high = splat(0.0, x), low = high
    first = 0
    while first < n:
        size = min(length, n - first)
        x_piece = piece(call, x, &call.row, first, size, scratch)
        g_piece = piece(call, g, &call.g_row, first, size, g_scratch)
        if has_products:
            fold_gradients(x_piece, g_piece, size, True, &high, &low)
        else:
            fold_gradients(x_piece, g_piece, size, False, &high, &low)
        first += length
    merge_lane_sums(&high, &low)
    if not fabs(lane(high, 0) + lane(low, 0)) < INFINITY:
        high, low = splat(plain_sum(call, x, g, n, has_products, scratch), x), splat(0.0, x)
    first = 0
    while first < n:
        size = min(length, n - first)
        if n > length:  # else they are still there
            x_piece = piece(call, x, &call.row, first, size, scratch)
            g_piece = piece(call, g, &call.g_row, first, size, g_scratch)
        if is_gathered:
            write_gradients_by_kind(call, x_piece, g_piece, scratch, size, high, low)
            scatter(<const vec*>scratch, y, &call.row, first, size, call.storage)
        else:
            write_gradients_by_kind(call, x_piece, g_piece, y, size, high, low)
        first += length


cdef inline bint weigh(vec g, vec reciprocal, vec reciprocal_low, vec* weights) noexcept nogil:
    """Set what makes gradients of terms whose sum has this reciprocal; give whether each g is finite.

    A large g is divided by a power of two that the reciprocal is multiplied by: a subnormal probability would have lost
    the digits that the product shows.
    """
    cdef vec one = splat(1.0, &g), size = absolute(g), largest = splat(by_type(FLT_MAX, DBL_MAX, &g), &g)
    cdef vec raised = where_at_most(one, size, splat(2.0**40, &g), one)
    raised = where_at_most(size, largest, raised, one)
    weights[RECIPROCAL], weights[RECIPROCAL_LOW] = reciprocal * raised, reciprocal_low * raised
    weights[GRADIENT] = g * (one / raised)
    return not any_greater(where_at_most(size, largest, splat(0.0, &g), one), splat(0.0, &g))


cdef inline vec weighted_probability(vec term, const vec* weights, bint is_finite) noexcept nogil:
    """g * probability; 0 where the probability is, whatever g."""
    cdef vec zero = splat(0.0, &term), high, low, result
    # Terms of what lies farthest below the maximum, -inf included, are 2**-189 of its own (float32; 2**-1121).
    term = where_at_most(term, splat(by_type(2.0**-124, 2.0**-1020, &term), &term), zero, term)
    high = term * weights[RECIPROCAL]
    low = times_plus(term, weights[RECIPROCAL_LOW], product_residual(term, weights[RECIPROCAL], high))
    result = times_plus(weights[GRADIENT], high, weights[GRADIENT] * low)
    if is_finite:
        return result
    high = where_at_most(high, zero, zero, high + weights[GRADIENT])
    return where_at_most(
        absolute(weights[GRADIENT]), splat(by_type(FLT_MAX, DBL_MAX, &term), &term), result, high)


cdef inline void write_weighted(
    const vec* source, vec* y, Py_ssize_t n, const vec* reference, const vec* weights, bint are_terms, bint is_finite,
    bint streaming
) noexcept nogil:
    """Write n elements of which the source has the terms, or the logits."""
    cdef vec zero = splat(0.0, reference)
    cdef vec[GROUP] v
    cdef Py_ssize_t width = lanes(reference), i = 0
    cdef int count, j
    if streaming:
        count = <int>min(n, <Py_ssize_t>(-<uintptr_t>y % REGISTER_BYTES) // itemsize(reference))
        if count:
            v[0] = load_first(source, count, zero)
            if not are_terms:
                scaled_exp(v, v, <vec*>NULL, 1, reference, 0)
            store_first(y, weighted_probability(v[0], weights, is_finite), count)
            source, y, n = at(source, count), <vec*>at(<const vec*>y, count), n - count
    while (i + GROUP) * width <= n:
        for j in range(GROUP):
            v[j] = load(source + i + j)
        if not are_terms:
            scaled_exp(v, v, <vec*>NULL, GROUP, reference, 0)
        for j in range(GROUP):
            v[j] = weighted_probability(v[j], weights, is_finite)
        for j in range(GROUP):
            if streaming:
                stream(y + i + j, v[j])
            else:
                store(y + i + j, v[j])
        i += GROUP
    while i * width < n:
        count = count_within(i, n, reference)
        v[0] = load_first(source + i, count, zero)
        if not are_terms:
            scaled_exp(v, v, <vec*>NULL, 1, reference, 0)
        store_first(y + i, weighted_probability(v[0], weights, is_finite), count)
        i += 1


cdef void write_weighted_by_kind(
    const Vjp* call, const vec* source, vec* y, Py_ssize_t n, const vec* reference, const vec* weights, bint are_terms,
    bint is_finite
) noexcept nogil:
    """`write_weighted` in one copy for each usual kind of call."""
    if not is_finite:
        write_weighted(source, y, n, reference, weights, are_terms, False, False)
    elif are_terms and call.streaming:
        write_weighted(source, y, n, reference, weights, True, True, True)
    elif are_terms:
        write_weighted(source, y, n, reference, weights, True, True, False)
    elif call.streaming:
        write_weighted(source, y, n, reference, weights, False, True, True)
    else:
        write_weighted(source, y, n, reference, weights, False, True, False)


cdef void logsumexp_vjp_row(
    const Vjp* call, const vec* x, double g, vec* y, Py_ssize_t n, vec* scratch
) noexcept nogil:
    """logsumexp_vjp of one row; the scratch is for two chunks."""
    cdef bint is_gathered = call.traversal == GATHER, is_one_chunk = n <= chunk_length(x), is_finite
    cdef Py_ssize_t length = chunk_length(x), first, size
    cdef vec* terms = <vec*>at(<const vec*>scratch, length)
    cdef vec* target
    cdef const vec* source
    cdef State state, total = identity()
    cdef Scale scale
    cdef double row_offset = 0.0
    cdef vec[REFERENCE] reference
    cdef vec[WEIGHTS] weights
    first = 0
    while first < n:
        size = min(length, n - first)
        source = piece(call, x, &call.row, first, size, scratch)
        if is_one_chunk:
            total = fold_chunk(source, terms, size, True, False, False, row_offset, <vec*>NULL)
        else:
            state = fold_chunk(source, <vec*>NULL, size, False, False, False, row_offset, <vec*>NULL)
            if first == 0:
                total, row_offset = state, state.offset
            else:
                total = merge(total, state, False)
        first += length
    total = within_range(total, x)
    scale = scale_of(total, x) if is_regular(total) else scale_by(INFINITY - INFINITY, 0.0)
    is_finite = weigh(splat(g, x), splat(scale.factor, x), splat(scale.factor_low, x), weights)
    make_reference(splat(total.offset, x), splat(total.exponent, x), reference)
    first = 0
    while first < n:
        size = min(length, n - first)
        target = scratch if is_gathered else <vec*>at(<const vec*>y, first)
        if not is_regular(total):
            fill_nan(target, size)
        elif is_one_chunk:
            write_weighted_by_kind(call, <const vec*>terms, target, size, reference, weights, True, is_finite)
        else:
            source = piece(call, x, &call.row, first, size, scratch)
            write_weighted_by_kind(call, source, target, size, reference, weights, False, is_finite)
        if is_gathered:
            scatter(<const vec*>scratch, y, &call.row, first, size, call.storage)
        first += length


# Strips: bands of adjacent rows, each in a lane of its own


cdef struct Strip:
    const char* x
    const char* g
    char* y
    Py_ssize_t x_stride
    Py_ssize_t g_stride
    Py_ssize_t y_stride
    int n_columns
    Storage storage


cdef inline int columns_in(const Strip* strip, int tile, const vec* like) noexcept nogil:
    return min(strip.n_columns - tile * lanes(like), lanes(like))


cdef inline Py_ssize_t place_of(const Strip* strip, int tile, const vec* like) noexcept nogil:
    """The bytes from the first column of a strip to the first of a tile."""
    return tile * lanes(like) * stored_size(strip.storage, like)


cdef inline vec load_x(const Strip* strip, Py_ssize_t element, int tile, double fill, const vec* like) noexcept nogil:
    cdef const char* p = strip.x + element * strip.x_stride + place_of(strip, tile, like)
    prefetch(p + PREFETCH_ROWS * strip.x_stride)
    return load_stored(p, columns_in(strip, tile, like), splat(fill, like), strip.storage)


cdef inline vec load_g(const Strip* strip, Py_ssize_t element, int tile, const vec* like) noexcept nogil:
    cdef const char* p = strip.g + element * strip.g_stride + place_of(strip, tile, like)
    prefetch(p + PREFETCH_ROWS * strip.g_stride)
    return load_stored(p, columns_in(strip, tile, like), splat(0.0, like), strip.storage)


cdef inline void store_y(const Strip* strip, Py_ssize_t element, int tile, vec v, bint streaming) noexcept nogil:
    cdef char* p = strip.y + element * strip.y_stride + place_of(strip, tile, &v)
    cdef int count = columns_in(strip, tile, &v)
    if streaming and count == lanes(&v) and <uintptr_t>p % REGISTER_BYTES == 0:
        stream(<vec*>p, v)
    else:
        store_stored(p, v, count, strip.storage)


cdef void run_vjp_strip(
    const vec* like, const Vjp* call, const char* x, const char* g, char* y, Py_ssize_t column, Py_ssize_t n
) noexcept nogil:
    cdef Strip strip
    cdef Py_ssize_t size = stored_size(call.storage, like)
    strip.x, strip.g, strip.y = x + column * size, g + column * size, y + column * size
    strip.x_stride, strip.g_stride, strip.y_stride = call.row.x_stride[0], call.g_row.x_stride[0], call.row.y_stride[0]
    strip.n_columns = <int>min(call.kept.size[call.kept.count - 1] - column, <Py_ssize_t>narrow_strip_columns(like))
    strip.storage = call.storage
    if call.function == LOGSUMEXP_VJP:
        logsumexp_vjp_strip(like, &strip, n, call.streaming)
    elif call.function == SOFTMAX_VJP:
        sum_vjp_strip(like, SOFTMAX_VJP, &strip, n, call.streaming)
    else:
        sum_vjp_strip(like, LOG_SOFTMAX_VJP, &strip, n, call.streaming)


cdef inline void sum_vjp_strip(
    const vec* like, Function function, const Strip* strip, Py_ssize_t n, bint streaming
) noexcept nogil:
    cdef vec[MAX_TILES] highs, lows
    cdef vec[GROUP] x, g
    cdef vec[REFERENCE] reference
    cdef int n_tiles = (strip.n_columns + lanes(like) - 1) // lanes(like), t, j
    cdef bint has_products = function == SOFTMAX_VJP
    cdef Py_ssize_t element
    for t in range(n_tiles):
        highs[t] = lows[t] = splat(0.0, like)
    for element in range(n):
        for t in range(n_tiles):
            x[0] = load_x(strip, element, t, 0.0, like) if has_products else splat(0.0, like)
            fold_gradient(x[0], load_g(strip, element, t, like), has_products, &highs[t], &lows[t])
    for t in range(n_tiles):
        for j in range(columns_in(strip, t, like)):
            if not fabs(get(highs + t, j) + get(lows + t, j)) < INFINITY:
                put(highs + t, j, plain_column_sum(strip, t * lanes(like) + j, n, has_products, like))
                put(lows + t, j, 0.0)
    make_log_reference(reference)
    for element in range(n):
        t = 0
        while t < n_tiles:
            if t + GROUP <= n_tiles:
                for j in range(GROUP):
                    x[j], g[j] = load_x(strip, element, t + j, 0.0, like), load_g(strip, element, t + j, like)
                gradients_of(function, x, g, x, GROUP, highs + t, lows + t, 1, reference)
                for j in range(GROUP):
                    store_y(strip, element, t + j, x[j], streaming)
                t += GROUP
            else:
                x[0], g[0] = load_x(strip, element, t, 0.0, like), load_g(strip, element, t, like)
                gradients_of(function, x, g, x, 1, highs + t, lows + t, 0, reference)
                store_y(strip, element, t, x[0], streaming)
                t += 1


cdef double plain_column_sum(
    const Strip* strip, int column, Py_ssize_t n, bint has_products, const vec* like
) noexcept nogil:
    """`plain_sum` of one column."""
    cdef Py_ssize_t place = column * stored_size(strip.storage, like), element
    cdef vec zero = splat(0.0, like)
    cdef double total = 0.0
    for element in range(n):
        total += plain_term(
            lane(load_stored(strip.x + element * strip.x_stride + place, 1, zero, strip.storage), 0),
            lane(load_stored(strip.g + element * strip.g_stride + place, 1, zero, strip.storage), 0), has_products)
    return total


cdef void logsumexp_vjp_strip(const vec* like, const Strip* strip, Py_ssize_t n, bint streaming) noexcept nogil:
    """Read three times: for the maxima, for the sums, to be written."""
    cdef vec[MAX_TILES] largest, highs, lows
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec[WEIGHTS * MAX_TILES] weights
    cdef vec[FINISHERS] finishers
    cdef vec[GROUP] x, terms, residuals
    cdef vec nan = splat(INFINITY - INFINITY, like), finite = splat(by_type(FLT_MAX, DBL_MAX, like), like)
    cdef int n_tiles = (strip.n_columns + lanes(like) - 1) // lanes(like), t, j, count
    cdef bint is_finite = True
    cdef Py_ssize_t element
    for t in range(n_tiles):
        largest[t], highs[t], lows[t] = splat(-INFINITY, like), splat(0.0, like), splat(0.0, like)
    for element in range(n):
        for t in range(n_tiles):
            # In this order of operands a NaN is passed over; it turns up in the sum.
            largest[t] = maximum(load_x(strip, element, t, -INFINITY, like), largest[t])
    for t in range(n_tiles):
        reference_at(largest[t], splat(0.0, like), references + t * REFERENCE)
    for element in range(n):
        t = 0
        while t < n_tiles:
            count = GROUP if t + GROUP <= n_tiles else 1
            for j in range(count):
                x[j] = load_x(strip, element, t + j, -INFINITY, like)
            if count == GROUP:
                scaled_exp(x, terms, residuals, GROUP, references + t * REFERENCE, 1)
            else:
                scaled_exp(x, terms, residuals, 1, references + t * REFERENCE, 1)
            for j in range(count):
                accumulate(&highs[t + j], &lows[t + j], terms[j], residuals[j])
            t += count
    for t in range(n_tiles):
        highs[t] = where_at_most(absolute(largest[t]), finite, highs[t], nan)
        normalize(largest[t], highs[t], lows[t], references + t * REFERENCE, finishers)
        is_finite &= weigh(
            load_g(strip, 0, t, like), finishers[FACTOR], finishers[FACTOR_LOW], weights + t * WEIGHTS)
    for element in range(n):
        t = 0
        while t < n_tiles:
            count = GROUP if t + GROUP <= n_tiles else 1
            for j in range(count):
                x[j] = load_x(strip, element, t + j, -INFINITY, like)
            if count == GROUP:
                scaled_exp(x, terms, <vec*>NULL, GROUP, references + t * REFERENCE, 1)
            else:
                scaled_exp(x, terms, <vec*>NULL, 1, references + t * REFERENCE, 1)
            for j in range(count):
                terms[j] = weighted_probability(terms[j], weights + (t + j) * WEIGHTS, is_finite)
                store_y(strip, element, t + j, terms[j], streaming)
            t += count


# Direct calls


@cython.binding(False)
def direct_softmax_vjp(p, g, axis, out, backend):
    return direct_call(SOFTMAX_VJP, p, axis, out, backend, g)


@cython.binding(False)
def direct_log_softmax_vjp(log_p, g, axis, out, backend):
    return direct_call(LOG_SOFTMAX_VJP, log_p, axis, out, backend, g)


cdef int run_remembered_vjp(const Remembered* schedule, cnp.ndarray x, cnp.ndarray g, cnp.ndarray out) except -1:
    cdef Vjp call
    cdef Job job
    lay_out(&schedule.shape, &job.kept, &job.row)
    call.function, call.traversal, call.streaming = schedule.shape.function, schedule.traversal, schedule.streaming
    call.storage = storage_of_type(schedule.shape.type_number)
    call.kept, call.row, call.g_kept, call.g_row = job.kept, job.row, job.kept, job.row
    return run_vjp_call(&call, x, g, out, schedule.n_blocks, schedule.n_threads, cnp.PyArray_SIZE(x) > SMALL_SIZE)
