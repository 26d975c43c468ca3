"""Softmax cross-entropy: the loss of each row, and its gradient with respect to the logits, from one visit.

With the maximum m of a row x and d = sum(exp(x - m)), the loss of class c is (m - x_c) + log(d), in which nothing
cancels. Every class may count by a factor (a target probability, or what label smoothing gives it), and one class, the
label, by another:

    loss      sum(factor * ((m - x) + log(d))) * scale + z_scale * (m + log(d))**2
    gradient  softmax(x) * (sum(factor) * scale + 2 * z_scale * (m + log(d))) - factor * scale

A row is read for its state, and again to be written, from the cache if it fits there. Adjacent rows with labels are run
side by side, each in a lane of its own.
"""


cdef struct CrossEntropy:
    const void* x
    void* y  # the gradient; NULL where none is wanted
    const void* targets  # probabilities; NULL where there are labels
    const int64_t* labels  # one a row, -1 where the row does not count
    const double* weights  # one a class, or NULL
    const void* spread  # the factors of all classes in every row with a label, in the type of x; NULL if there are none
    double* losses
    double smoothing
    double scale
    double z_scale
    double softcap  # 0 for none
    Traversal traversal
    bint is_gathered
    bint streaming
    Storage storage
    bint is_single
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory
    Dimensions kept
    Dimensions row
    Dimensions targets_kept  # the same with the strides of the targets for those of the input
    Dimensions targets_row


def run_cross_entropy(
    int traversal, bint streaming, int storage, tuple kept, tuple reduced, cnp.ndarray x, cnp.ndarray y,
    cnp.ndarray targets, cnp.ndarray labels, cnp.ndarray weights, cnp.ndarray spread, cnp.ndarray losses,
    double smoothing, double scale, double z_scale, double softcap, Py_ssize_t n_blocks, int n_threads
):
    """Run a cross-entropy.

    Parameters
    ----------
    traversal, streaming, storage, kept, reduced, x, n_blocks, n_threads
        As for `run`; the kept dimensions are in the order of the labels.
    y : ndarray or None
        Where the gradient goes.
    targets, labels : ndarray or None
        Probabilities, of the type of x, or int64 labels, one for each row.
    weights : ndarray or None
        float64, one for each class.
    spread : ndarray or None
        What label smoothing adds to the factor of each class, in the type that is computed in.
    losses : ndarray
        Where the losses go, float64.
    smoothing, scale, z_scale, softcap : float
        See above.
    """
    cdef CrossEntropy call
    call.x, call.y = cnp.PyArray_DATA(x), data_of(y)
    call.targets, call.labels = data_of(targets), <const int64_t*>data_of(labels)
    call.weights, call.spread = <const double*>data_of(weights), data_of(spread)
    call.losses = <double*>cnp.PyArray_DATA(losses)
    call.smoothing, call.scale, call.z_scale, call.softcap = smoothing, scale, z_scale, softcap
    call.traversal, call.is_gathered = <Traversal>traversal, traversal == GATHER
    call.streaming, call.storage = streaming, <Storage>storage
    call.is_single, call.n_blocks, call.lacks_memory = cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64, n_blocks, False
    call.kept, call.row = dimensions(kept), dimensions(reduced)
    call.targets_kept, call.targets_row = dimensions_of_factors(kept), dimensions_of_factors(reduced)
    run_in_parts(run_cross_entropy_block, &call, &call.first, n_blocks, n_threads)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a row")


cdef inline void* data_of(cnp.ndarray array) noexcept:
    return NULL if array is None else cnp.PyArray_DATA(array)


cdef void run_cross_entropy_block(void* context, Py_ssize_t block) noexcept nogil:
    cdef CrossEntropy* call = <CrossEntropy*>context
    cdef Py_ssize_t n = total_size(&call.row), n_rows = total_size(&call.kept), row
    cdef Py_ssize_t room = (n + 1) * (4 if call.is_single else 8)
    cdef char* scratch
    block += call.first
    if call.traversal == STRIPS:
        if call.is_single:
            run_cross_entropy_strips(<const f32v*>NULL, call, n, block)
        else:
            run_cross_entropy_strips(<const f64v*>NULL, call, n, block)
        return
    scratch = <char*>malloc(2 * room)
    if scratch == NULL:
        call.lacks_memory = True
        return
    for row in range(n_rows * block // call.n_blocks, n_rows * (block + 1) // call.n_blocks):
        if call.is_single:
            run_cross_entropy_row(call, row, n, <f32v*>scratch, <f32v*>(scratch + room))
        else:
            run_cross_entropy_row(call, row, n, <f64v*>scratch, <f64v*>(scratch + room))
    if call.streaming:
        stream_fence()
    free(scratch)


cdef void run_cross_entropy_row(
    const CrossEntropy* call, Py_ssize_t row, Py_ssize_t n, vec* scratch, vec* factor_scratch
) noexcept nogil:
    """Run one row; each scratch is for the elements of one."""
    cdef Py_ssize_t x_offset, y_offset, targets_offset, unused, label = -1
    cdef const vec* x
    cdef const vec* factors = <const vec*>call.spread
    cdef vec* y = NULL
    cdef State state
    cdef double log_sum_of_row, log_p, label_factor = 0.0, label_gradient = 0.0, factor_sum = 0.0, loss = 0.0, total
    locate(&call.kept, row, &x_offset, &y_offset)
    x = <const vec*>(<const char*>call.x + x_offset)
    if call.y != NULL:
        y = scratch if call.is_gathered else <vec*>(<char*>call.y + y_offset)
    if call.labels != NULL:
        label = call.labels[row]
    if call.labels != NULL and label < 0:
        call.losses[row] = 0.0
        fill_zero(y, n)
    else:
        if call.is_gathered or call.softcap > 0.0:
            gather(x, &call.row, 0, n, scratch, call.storage)
            x = <const vec*>scratch
        if call.softcap > 0.0:
            cap(scratch, n, call.softcap)
        if call.targets != NULL:
            locate(&call.targets_kept, row, &targets_offset, &unused)
            gather(<const char*>call.targets + targets_offset, &call.targets_row, 0, n, factor_scratch, call.storage)
            weigh_targets(call, factor_scratch, n)
            factors = <const vec*>factor_scratch
        state = fold_row(x, n)
        log_sum_of_row = log_sum(state, x)
        if factors != NULL:
            loss = sum_of_factors(x, factors, n, state.maximum, log_sum_of_row, &factor_sum)
        if label >= 0:
            label_factor = (1.0 - call.smoothing) * (1.0 if call.weights == NULL else call.weights[label])
            log_p = (get(x, label) - state.maximum) - log_sum_of_row
            if label_factor != 0.0:
                loss -= label_factor * log_p
        total = state.maximum + log_sum_of_row
        call.losses[row] = loss * call.scale
        if call.z_scale != 0.0:
            call.losses[row] += call.z_scale * total * total
        if y != NULL:
            if label >= 0:
                # p - 1 has its digits only where it is computed as such.
                label_gradient = label_factor * call.scale * expm1(log_p) + (
                    factor_sum * call.scale + 2.0 * call.z_scale * total) * exp(log_p)
                if factors != NULL:
                    label_gradient -= call.scale * get(factors, label)
                if call.softcap > 0.0:
                    label_gradient *= 1.0 - (get(x, label) / call.softcap) * (get(x, label) / call.softcap)
            write_cross_entropy(
                call, x, factors, y, n, state, (factor_sum + label_factor) * call.scale + 2.0 * call.z_scale * total)
            if label >= 0 and fabs(state.maximum) < INFINITY:
                put(y, label, label_gradient)
    if call.is_gathered and y != NULL:
        scatter(<const vec*>scratch, <char*>call.y + y_offset, &call.row, 0, n, call.storage)


cdef void fill_zero(vec* y, Py_ssize_t n) noexcept nogil:
    if y != NULL:
        memset(y, 0, n * itemsize(<const vec*>y))


cdef void cap(vec* x, Py_ssize_t n, double limit) noexcept nogil:
    """Replace x by limit * tanh(x / limit), where tanh(u) = (1 - exp(-2 u)) / (1 + exp(-2 u))."""
    cdef vec[REFERENCE] reference
    cdef vec[GROUP] values, z, heads, factors, rests
    cdef vec zero = splat(0.0, x), one = splat(1.0, x), half = splat(0.5 * limit, x), limits = splat(limit, x)
    cdef Py_ssize_t width = lanes(<const vec*>x), i = 0
    cdef int j
    make_reference(zero, zero, reference)
    while i * width < n:
        for j in range(GROUP):
            values[j] = load_first(<const vec*>x + i + j, count_within(i + j, n, <const vec*>x), zero)
            z[j] = zero - absolute(values[j]) / half
        exp_parts(z, heads, factors, rests, GROUP, reference, 0, FULL)
        for j in range(GROUP):
            # Of a small number, 1 - head is exact and the rest has all digits.
            z[j] = ((one - heads[j]) - factors[j] * rests[j]) / (one + times_plus(factors[j], rests[j], heads[j]))
            z[j] = where_at_most(values[j], zero, zero - z[j], z[j]) * limits
            store_first(x + i + j, where_at_most(absolute(values[j]), zero, values[j], z[j]), count_within(
                i + j, n, <const vec*>x))
        i += GROUP


cdef void weigh_targets(const CrossEntropy* call, vec* targets, Py_ssize_t n) noexcept nogil:
    """Make factors of target probabilities: smoothed, and times the weights."""
    cdef double kept = 1.0 - call.smoothing, spread = call.smoothing / n
    cdef Py_ssize_t i
    if call.smoothing > 0.0:
        for i in range(n):
            put(targets, i, get(<const vec*>targets, i) * kept + spread)
    if call.weights != NULL:
        for i in range(n):
            put(targets, i, get(<const vec*>targets, i) * call.weights[i])


cdef double sum_of_factors(
    const vec* x, const vec* factors, Py_ssize_t n, double largest, double log_sum_of_row, double* factor_sum
) noexcept nogil:
    """sum(factor * ((m - x) + log(d))), and sum(factor); a factor of 0 drops its class, whatever x."""
    cdef vec high = splat(0.0, x), low = high, factor_high = high, factor_low = high, error, m = splat(largest, x), factor
    cdef vec zero = high
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef double total = 0.0
    while i * width < n:
        factor = load_first(factors + i, count_within(i, n, x), zero)
        fold_gradient(
            factor, where_nonzero(factor, m - load_first(x + i, count_within(i, n, x), zero)), True, &high, &low)
        factor_high = two_sum(factor_high, factor, &error)
        factor_low = factor_low + error
        i += 1
    merge_lane_sums(&high, &low)
    merge_lane_sums(&factor_high, &factor_low)
    factor_sum[0] = lane(factor_high, 0) + lane(factor_low, 0)
    total = lane(high, 0) + lane(low, 0)
    if not fabs(total) < INFINITY:
        total = 0.0
        for i in range(n):
            if get(factors, i) != 0.0:
                total += get(factors, i) * (largest - get(x, i))
    return total + factor_sum[0] * log_sum_of_row if factor_sum[0] != 0.0 else total


cdef State with_maximum(State state, const vec* like) noexcept nogil:
    """The state of elements whose maximum was kept apart, with it in the sum."""
    cdef vec[REFERENCE] reference
    cdef vec largest = splat(state.maximum, like), term, residual
    if fabs(state.maximum) < INFINITY:
        make_reference(splat(state.offset, like), splat(state.exponent, like), reference)
        scaled_exp(&largest, &term, &residual, 1, reference, 0)
        state.low += lane(residual, 0)
        add(&state, lane(term, 0))
    return state


cdef void write_cross_entropy(
    const CrossEntropy* call, const vec* x, const vec* factors, vec* y, Py_ssize_t n, State state, double size
) noexcept nogil:
    """Write probabilities times `size`, less factors times the scale; NaN where there are no probabilities."""
    cdef vec[REFERENCE] reference
    cdef double reciprocal, leading
    cdef Scale scale
    state = within_range(with_maximum(state, x), x)
    if fabs(state.maximum) == INFINITY or not is_regular(state):
        fill_nan(y, n)
        return
    make_reference(splat(state.offset, x), splat(state.exponent, x), reference)
    reciprocal = size / state.high
    leading = to_lane(reciprocal, x)
    scale = scale_by(leading, (reciprocal - leading) - reciprocal * (state.low / state.high))
    if factors == NULL and call.softcap == 0.0 and call.streaming:
        write_cross_entropy_elements(call, x, factors, y, n, reference, scale, False, False, True)
    elif factors == NULL and call.softcap == 0.0:
        write_cross_entropy_elements(call, x, factors, y, n, reference, scale, False, False, False)
    else:
        write_cross_entropy_elements(
            call, x, factors, y, n, reference, scale, factors != NULL, call.softcap > 0.0, call.streaming)


cdef inline void write_cross_entropy_elements(
    const CrossEntropy* call, const vec* x, const vec* factors, vec* y, Py_ssize_t n, const vec* reference, Scale scale,
    bint has_factors, bint is_capped, bint streaming
) noexcept nogil:
    cdef vec zero = splat(0.0, x), factor = splat(scale.factor, x), factor_low = splat(scale.factor_low, x)
    cdef vec minus_scale = splat(-call.scale, x), limit = splat(call.softcap, x), one = splat(1.0, x), part
    cdef vec[GROUP] logits, v
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int count = 0, j
    if streaming:  # only whole registers at their own boundaries can be
        count = <int>min(n, <Py_ssize_t>(-<uintptr_t>y % REGISTER_BYTES) // itemsize(x))
    while i < n:
        # The first elements up to a boundary, groups, and the rest a register at a time.
        if i > 0 or count == 0:
            count = GROUP * <int>width if i + GROUP * width <= n else <int>min(width, n - i)
        if count == GROUP * width:
            for j in range(GROUP):
                logits[j] = load(at(x, i) + j)
            scaled_exp(logits, v, <vec*>NULL, GROUP, reference, 0)
        else:
            logits[0] = load_first(at(x, i), count, zero)
            scaled_exp(logits, v, <vec*>NULL, 1, reference, 0)
        for j in range(GROUP if count == GROUP * width else 1):
            v[j] = times_plus(v[j], factor, v[j] * factor_low)
            if has_factors:
                part = load_first(at(factors, i) + j, <int>min(width, <Py_ssize_t>count), zero)
                v[j] = times_plus(part, minus_scale, v[j])
            if is_capped:
                v[j] = v[j] * (one - (logits[j] / limit) * (logits[j] / limit))
            if count < GROUP * width:
                store_first(<vec*>at(<const vec*>y, i), v[j], count)
            elif streaming:
                stream(<vec*>at(<const vec*>y, i) + j, v[j])
            else:
                store(<vec*>at(<const vec*>y, i) + j, v[j])
        i += count


# Strips: adjacent rows with labels, and without capping


cdef void run_cross_entropy_strips(
    const vec* like, const CrossEntropy* call, Py_ssize_t n, Py_ssize_t block
) noexcept nogil:
    """Run one of the equal parts of a call."""
    cdef Dimensions kept = call.kept
    cdef Py_ssize_t x_offset, y_offset, inner, n_strips, n_units, unit, column
    cdef Strip strip
    kept.count -= 1
    inner = kept.size[kept.count]
    n_strips = (inner + narrow_strip_columns(like) - 1) // narrow_strip_columns(like)
    n_units = total_size(&kept) * n_strips
    strip.storage, strip.x_stride, strip.y_stride = call.storage, call.row.x_stride[0], call.row.y_stride[0]
    strip.g, strip.g_stride = NULL, 0
    for unit in range(n_units * block // call.n_blocks, n_units * (block + 1) // call.n_blocks):
        locate(&kept, unit // n_strips, &x_offset, &y_offset)
        column = unit % n_strips * narrow_strip_columns(like)
        strip.n_columns = <int>min(inner - column, <Py_ssize_t>narrow_strip_columns(like))
        strip.x = <const char*>call.x + x_offset + column * stored_size(call.storage, like)
        strip.y = NULL
        if call.y != NULL:
            strip.y = <char*>call.y + y_offset + column * stored_size(call.storage, like)
        run_cross_entropy_strip(like, call, &strip, n, unit // n_strips * inner + column)


cdef void run_cross_entropy_strip(
    const vec* like, const CrossEntropy* call, const Strip* strip, Py_ssize_t n, Py_ssize_t first_row
) noexcept nogil:
    """Run a strip whose first column is the row of this number."""
    cdef vec[MAX_TILES] largest, highs, lows, is_left, sums, sum_lows, factors, factor_lows, sizes, counted
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec[FINISHERS] finishers
    cdef vec[GROUP] x, terms, residuals
    cdef vec zero = splat(0.0, like), one = splat(1.0, like), top, top_low, error, log_high, log_low, spread = zero
    cdef double[MAX_NARROW_COLUMNS] of_labels
    cdef int n_tiles = (strip.n_columns + lanes(like) - 1) // lanes(like), t, j, count, column
    cdef double factor_sum = 0.0, log_sum_of_row
    cdef Py_ssize_t element
    for t in range(n_tiles):
        largest[t], is_left[t] = splat(-INFINITY, like), one
        highs[t] = lows[t] = sums[t] = sum_lows[t] = zero
    for element in range(n):
        if call.spread != NULL:
            factor_sum += get(<const vec*>call.spread, element)
        for t in range(n_tiles):
            # In this order of operands a NaN is passed over; it turns up in the sum.
            largest[t] = maximum(load_x(strip, element, t, -INFINITY, like), largest[t])
    for t in range(n_tiles):
        reference_at(largest[t], zero, references + t * REFERENCE)
    for element in range(n):
        if call.spread != NULL:
            spread = splat(get(<const vec*>call.spread, element), like)
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
                # The first maximum is kept out of the sum, so that log1p of the rest has all digits.
                top = where_at_most(largest[t + j], x[j], is_left[t + j], zero)
                is_left[t + j] = is_left[t + j] - top
                top = one - top
                accumulate(&highs[t + j], &lows[t + j], terms[j] * top, residuals[j] * top)
                if call.spread != NULL:
                    fold_gradient(
                        spread, where_nonzero(spread, largest[t + j] - x[j]), True, &sums[t + j], &sum_lows[t + j])
            t += count
    for t in range(n_tiles):
        log_sums_of(largest[t], highs[t], lows[t], references + t * REFERENCE, &log_high, &log_low)
        for j in range(columns_in(strip, t, like)):
            column = t * lanes(like) + j
            if fabs(get(&largest[t], j)) == INFINITY:
                log_sum_of_row = INFINITY - INFINITY if column_has_nan(strip, column, n, like) else 0.0
            else:
                log_sum_of_row = get(&log_high, j) + get(&log_low, j)
            finish_label(
                call, strip, n, first_row + column, column, get(&largest[t], j), log_sum_of_row,
                get(&sums[t], j) + get(&sum_lows[t], j), factor_sum, &sizes[t], &counted[t], &of_labels[column])
        scaled_exp(&largest[t], &top, &top_low, 1, references + t * REFERENCE, 0)
        highs[t] = two_sum(highs[t], top, &error)
        # NaN for a maximum of -inf or +inf
        highs[t] = highs[t] + (largest[t] - largest[t])
        normalize(largest[t], highs[t], lows[t] + (top_low + error), references + t * REFERENCE, finishers)
        factors[t], factor_lows[t] = finishers[FACTOR], finishers[FACTOR_LOW]
    if strip.y == NULL:
        return
    for element in range(n):
        if call.spread != NULL:
            spread = splat(get(<const vec*>call.spread, element) * call.scale, like)
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
                top = times_plus(terms[j], factors[t + j], terms[j] * factor_lows[t + j])
                top = where_nonzero(counted[t + j], times_plus(top, sizes[t + j], -spread))
                store_y(strip, element, t + j, top, False)
            t += count
    for column in range(strip.n_columns):
        element = call.labels[first_row + column]
        if element >= 0 and fabs(get(largest + column // lanes(like), column % lanes(like))) < INFINITY:
            store_stored(
                strip.y + element * strip.y_stride + column * stored_size(strip.storage, like),
                splat(of_labels[column], like), 1, strip.storage)


cdef inline double in_column(const Strip* strip, Py_ssize_t element, int column, const vec* like) noexcept nogil:
    return lane(
        load_stored(
            strip.x + element * strip.x_stride + column * stored_size(strip.storage, like), 1, splat(0.0, like),
            strip.storage),
        0)


cdef bint column_has_nan(const Strip* strip, int column, Py_ssize_t n, const vec* like) noexcept nogil:
    cdef Py_ssize_t element
    for element in range(n):
        if in_column(strip, element, column, like) != in_column(strip, element, column, like):
            return True
    return False


cdef void finish_label(
    const CrossEntropy* call, const Strip* strip, Py_ssize_t n, Py_ssize_t row, int column, double largest,
    double log_sum_of_row, double spread_sum, double factor_sum, vec* size, vec* counted, double* of_label
) noexcept nogil:
    """Write the loss of one column, and set what its gradient needs."""
    cdef const vec* like = size
    cdef Py_ssize_t label = call.labels[row], element
    cdef int in_tile = column % lanes(like)
    cdef double factor, spread, log_p, loss = 0.0, total = largest + log_sum_of_row
    put(counted, in_tile, 1.0 if label >= 0 else 0.0)
    if label < 0:
        call.losses[row] = 0.0
        put(size, in_tile, 0.0)
        return
    factor = (1.0 - call.smoothing) * (1.0 if call.weights == NULL else call.weights[label])
    log_p = (in_column(strip, label, column, like) - largest) - log_sum_of_row
    if call.spread != NULL:
        if not fabs(spread_sum) < INFINITY:
            spread_sum = 0.0
            for element in range(n):
                spread = get(<const vec*>call.spread, element)
                if spread != 0.0:
                    spread_sum += spread * (largest - in_column(strip, element, column, like))
        loss = spread_sum + factor_sum * log_sum_of_row
    if factor != 0.0:
        loss -= factor * log_p
    call.losses[row] = loss * call.scale
    if call.z_scale != 0.0:
        call.losses[row] += call.z_scale * total * total
    put(size, in_tile, (factor_sum + factor) * call.scale + 2.0 * call.z_scale * total)
    # p - 1 has its digits only where it is computed as such.
    of_label[0] = factor * call.scale * expm1(log_p) + (
        factor_sum * call.scale + 2.0 * call.z_scale * total) * exp(log_p)
    if call.spread != NULL:
        of_label[0] -= call.scale * get(<const vec*>call.spread, label)
