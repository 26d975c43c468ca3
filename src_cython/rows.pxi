"""Kernels for one contiguous row.

A row is folded chunk by chunk into states, the states are merged, and the row is written. Within a chunk, element j
belongs to lane j % lanes; each lane adds up its elements in order, in twice the precision, and the lanes are added as a
tree. The strip kernels follow the same order, so every memory layout gives the same bits.
"""


cdef enum Exponentials:
    IN_OUTPUT
    IN_SCRATCH
    RECOMPUTE

cdef enum:
    SAMPLED = 4  # registers at the beginning of a chunk that the first guess is made from


cdef enum Finish:  # what `write_chunk` does to each element on its way to the output
    SCALE      # a term to a probability: term * c * (a + b)
    EXP_SCALE  # a logit to a probability, by way of its term
    SUBTRACT   # a logit to a log-probability: (logit - a) - b


cdef inline Py_ssize_t chunk_length(const vec* like) noexcept nogil:
    return CHUNK_BYTES // itemsize(like)


cdef inline const vec* at(const vec* p, Py_ssize_t element) noexcept nogil:
    """Address of an element, which need not be the first of a register."""
    return <const vec*>(<const char*>p + element * itemsize(p))


cdef inline double largest_lane(vec v) noexcept nogil:
    cdef int distance = lanes(&v) // 2
    while distance:
        v = maximum(v, swap(v, distance))
        distance //= 2
    return lane(v, 0)


cdef inline double sample_maximum(const vec* x, Py_ssize_t n) noexcept nogil:
    """The maximum of the first few registers and the last one: where a sorted or a padded row has its largest."""
    cdef vec fill = splat(-INFINITY, x), top = fill
    cdef Py_ssize_t i = 0, width = lanes(x)
    if n < width:
        return largest_lane(load_first(x, <int>n, fill))
    top = load(at(x, n - width))
    while i < SAMPLED and (i + 1) * width <= n:
        top = maximum(top, load(x + i))
        i += 1
    return largest_lane(top)


cdef inline double exact_maximum(const vec* x, Py_ssize_t n) noexcept nogil:
    """The maximum of all elements that are not NaN."""
    cdef vec fill = splat(-INFINITY, x), top = fill
    cdef Py_ssize_t i = 0, width = lanes(x)
    while (i + 1) * width <= n:
        top = maximum(load(x + i), top)
        i += 1
    if i * width < n:
        top = maximum(load_first(x + i, <int>(n - i * width), fill), top)
    return largest_lane(top)


cdef inline bint has_nan(const vec* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if get(x, i) != get(x, i):
            return True
    return False


cdef inline void fold_registers(
    const vec* x, vec* terms, int count, vec* tops, vec* highs, vec* lows, bint apart, const vec* references, int step
) noexcept nogil:
    """Fold an element into each lane of `count` registers, and give the terms.

    With a `step` of 1 each register has a sum and a reference of its own, with 0 all are of one row. With the maxima
    kept apart, it is the smaller of x and the lane's maximum so far that is folded.
    """
    cdef vec[GROUP] folded, residuals
    cdef int j
    for j in range(count):
        folded[j] = minimum(tops[j * step], x[j]) if apart else x[j]
        tops[j * step] = maximum(x[j], tops[j * step])
    scaled_exp(folded, terms, residuals, count, references, step)
    for j in range(count):
        accumulate(&highs[j * step], &lows[j * step], terms[j], residuals[j])


cdef inline void accumulate(vec* high, vec* low, vec term, vec residual) noexcept nogil:
    """Add term + residual to the sum high + low."""
    cdef vec error
    high[0] = two_sum(high[0], term, &error)
    low[0] = low[0] + (error + residual)


cdef inline bint fold_with_reference(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, const vec* reference, State* state
) noexcept nogil:
    """Fold a chunk; False, with `state` untouched and `terms` overwritten, if an element is above the limit."""
    cdef vec top = splat(-INFINITY, x), fill = top, limit = reference[LIMIT], high = splat(0.0, x), low = high
    cdef vec[GROUP] logits, group
    cdef Py_ssize_t width = lanes(x), i = 0, n_full = n // width
    cdef int j, distance
    while i + GROUP <= n_full:
        for j in range(GROUP):
            logits[j] = load(x + i + j)
        fold_registers(logits, group, GROUP, &top, &high, &low, apart, reference, 0)
        if keep:
            for j in range(GROUP):
                store(terms + i + j, group[j])
        if any_greater(top, limit):
            return False
        i += GROUP
    while i < n_full:
        logits[0] = load(x + i)
        fold_registers(logits, group, 1, &top, &high, &low, apart, reference, 0)
        if keep:
            store(terms + i, group[0])
        i += 1
    if i * width < n:  # the lanes behind the end hold -inf, which leaves a sum as it is
        logits[0] = load_first(x + i, <int>(n - i * width), fill)
        fold_registers(logits, group, 1, &top, &high, &low, apart, reference, 0)
        if keep:
            store_first(terms + i, group[0], <int>(n - i * width))
    if any_greater(top, limit):
        return False
    state.maximum = largest_lane(top)
    if apart:  # the lanes' own maxima, all but the one that is the chunk's
        scaled_exp(&top, group, logits, 1, reference, 0)
        accumulate(
            &high, &low, drop_first_equal(group[0], top, state.maximum),
            drop_first_equal(logits[0], top, state.maximum))
    distance = lanes(x) // 2
    while distance:
        accumulate(&high, &low, swap(high, distance), swap(low, distance))
        distance //= 2
    state.offset = lane(reference[OFFSET], 0)
    state.exponent = lane(exponent_of(reference), 0)
    state.high = lane(high, 0)
    state.low = lane(low, 0)
    return True


cdef State fold_chunk(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, double row_offset
) noexcept nogil:
    """The state of one chunk; with `keep`, its terms too, relative to the state's exponent."""
    cdef vec[REFERENCE] reference
    cdef State state = identity()
    reference_below(splat(sample_maximum(x, n), x), splat(row_offset, x), reference)
    if not fold_specialized(x, terms, n, keep, apart, reference, &state):
        reference_below(splat(exact_maximum(x, n), x), splat(row_offset, x), reference)
        fold_specialized(x, terms, n, keep, apart, reference, &state)
    if fabs(state.maximum) == INFINITY:
        return infinite_state(state.maximum, has_nan(x, n), apart)
    return state


cdef inline bint fold_specialized(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, const vec* reference, State* state
) noexcept nogil:
    """`fold_with_reference` in one copy for each kind of call, so that its loops hold no decisions."""
    if apart:
        return fold_with_reference(x, terms, n, False, True, reference, state)
    if keep:
        return fold_with_reference(x, terms, n, True, False, reference, state)
    return fold_with_reference(x, terms, n, False, False, reference, state)


cdef inline void finish(
    vec* v, int count, Finish kind, const vec* references, const vec* a, const vec* b, const vec* c, int step
) noexcept nogil:
    """What `kind` does, to `count` registers in place; with a `step` of 1 each has its own reference, a, b and c."""
    cdef vec[GROUP] residuals
    cdef int j
    if kind == EXP_SCALE:
        scaled_exp(v, v, residuals, count, references, step)
    for j in range(count):
        v[j] = (v[j] - a[j * step]) - b[j * step] if kind == SUBTRACT else product(
            v[j] * c[j * step], a[j * step], b[j * step])


cdef inline void write_chunk(
    Finish kind, const vec* source, vec* y, Py_ssize_t n, const vec* reference, double a, double b, double c,
    bint streaming
) noexcept nogil:
    """Write n elements of the output, past the caches if `streaming`."""
    cdef vec fill = splat(0.0, y), va = splat(a, y), vb = splat(b, y), vc = splat(c, y)
    cdef vec[GROUP] v
    cdef Py_ssize_t width = lanes(y), i = 0
    cdef int count, j
    if streaming:  # up to the first whole register of the output
        count = <int>min(n, <Py_ssize_t>(-<uintptr_t>y % REGISTER_BYTES) * width // REGISTER_BYTES)
        if count:
            v[0] = load_first(source, count, fill)
            finish(v, 1, kind, reference, &va, &vb, &vc, 0)
            store_first(y, v[0], count)
            source, y, n = at(source, count), <vec*>at(<const vec*>y, count), n - count
    while (i + GROUP) * width <= n:
        for j in range(GROUP):
            v[j] = load(source + i + j)
        finish(v, GROUP, kind, reference, &va, &vb, &vc, 0)
        for j in range(GROUP):
            if streaming:
                stream(y + i + j, v[j])
            else:
                store(y + i + j, v[j])
        i += GROUP
    while i * width < n:
        count = <int>min(width, n - i * width)
        v[0] = load_first(source + i, count, fill)
        finish(v, 1, kind, reference, &va, &vb, &vc, 0)
        store_first(y + i, v[0], count)
        i += 1


cdef void write_probabilities(
    const vec* x, const vec* terms, vec* y, Py_ssize_t n, State chunk, State total, Scale scale, bint streaming
) noexcept nogil:
    """Write one chunk of probabilities, from its terms where they are there and have the offset of the whole row."""
    cdef vec[REFERENCE] reference
    make_reference(splat(total.offset, y), splat(total.exponent, y), reference)
    if terms != NULL and terms_scale_to(chunk, total.offset, scale.exponent, x):
        write_chunk(
            SCALE, terms, y, n, reference, scale.factor, scale.factor_low,
            exact_power_of_two(chunk.exponent - scale.exponent), streaming)
    else:
        write_chunk(EXP_SCALE, x, y, n, reference, scale.factor, scale.factor_low, scale.multiplier, streaming)


cdef inline bint terms_scale_to(State chunk, double offset, double exponent, const vec* like) noexcept nogil:
    """Whether a power of two makes a chunk's terms those of the whole row: the power must be in the type's range."""
    return chunk.offset == offset and chunk.exponent - exponent >= by_type(-120.0, -1000.0, like)


cdef inline void fill_nan(vec* y, Py_ssize_t n) noexcept nogil:
    cdef vec nan = splat(INFINITY - INFINITY, y)
    cdef Py_ssize_t width = lanes(y), i = 0
    while (i + 1) * width <= n:
        store(y + i, nan)
        i += 1
    store_first(y + i, nan, <int>(n - i * width))


cdef void softmax_row(
    const vec* x, vec* y, Py_ssize_t n, Exponentials exponentials, vec* scratch, State* states, bint streaming
) noexcept nogil:
    """Softmax of one row.

    `scratch` has room for the row's terms if they go there, `states` for one state a chunk.
    """
    cdef Py_ssize_t length = chunk_length(x), first, size
    cdef vec* terms = y if exponentials == IN_OUTPUT else scratch
    cdef State state, total = identity()
    first = 0
    while first < n:
        size = min(length, n - first)
        if exponentials == RECOMPUTE:
            state = fold_chunk(at(x, first), <vec*>NULL, size, False, False, total.offset)
        else:
            state = fold_chunk(at(x, first), <vec*>at(<const vec*>terms, first), size, True, False, total.offset)
            states[first // length] = state
        total = merge(total, state, False) if first else state
        first += size
    total = within_range(total, x)
    if not is_regular(total):
        fill_nan(y, n)
        return
    cdef Scale scale = scale_of(total, x)
    first = 0
    while first < n:
        size = min(length, n - first)
        if exponentials == RECOMPUTE:
            write_probabilities(
                at(x, first), <const vec*>NULL, <vec*>at(<const vec*>y, first), size, total, total, scale, streaming)
        else:
            write_probabilities(
                at(x, first), at(<const vec*>terms, first), <vec*>at(<const vec*>y, first), size,
                states[first // length], total, scale, streaming)
        first += size


cdef State fold_row(const vec* x, Py_ssize_t n) noexcept nogil:
    """The state of a row with its maximum kept apart."""
    cdef Py_ssize_t length = chunk_length(x), first = 0
    cdef State state, total = identity()
    while first < n:
        state = fold_chunk(at(x, first), <vec*>NULL, min(length, n - first), False, True, total.offset)
        total = merge(total, state, True) if first else state
        first += length
    return within_range(total, x)


cdef void log_softmax_row(const vec* x, vec* y, Py_ssize_t n, bint streaming) noexcept nogil:
    cdef State total = fold_row(x, n)
    write_chunk(SUBTRACT, x, y, n, <const vec*>NULL, total.maximum, log_sum(total, x), 0.0, streaming)
