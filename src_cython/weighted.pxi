"""logsumexp with factors: log|sum(b * exp(a))|, and the sign of the sum.

A factor is a significand times a power of two, and the power is added to the exponent of the term: b * exp(a) neither
overflows nor underflows on the way. Of each chunk, a term as large as the largest, but for a factor of 4, is found
first. It is kept out of the sum, so that log1p of the rest over it has all digits, and its `a` becomes the offset.
Elements with the same `a` then have their factors for terms, without rounding: b = [1, 2, -3] leaves exactly nothing.

Short rows are folded side by side, as tiles: alone, one of ten elements is a chain of hundreds of operations.
"""

cdef enum:
    # Rows of up to this many elements are folded side by side, as many as a register has lanes. In ms, so and one after
    # the other: (100000, 10) float32 5.2 and 14.1, (2000, 100) 0.29 and 0.44, (1562, 128) 0.27 and 0.33, float64 0.49 and
    # 0.45. With their factors and their turned copies they take a scratch of two chunks of 16 KiB.
    MAX_WEIGHTED_TILE = 128


cdef struct WeightedState:
    double a  # of the term kept out of the sum
    double b  # its factor; 0 in the state of no elements
    double offset
    double exponent
    double high  # high + low: sum of b * exp(a - offset) * 2**-exponent over the other elements; of only the terms that
    double low   # are infinite or NaN, if there are any


cdef inline WeightedState weighted_identity() noexcept nogil:
    """The state of no elements."""
    cdef WeightedState state
    state.a = state.offset = -INFINITY
    state.b = state.exponent = state.high = state.low = 0.0
    return state


cdef inline Py_ssize_t weighted_length(const vec* like) noexcept nogil:
    """Elements of a chunk: with their factors they fit the L1 cache."""
    return chunk_length(like) // 2


cdef inline vec absolute(vec v) noexcept nogil:
    return maximum(v, splat(0.0, &v) - v)


cdef inline void split_factor(vec b, vec* m, vec* k) noexcept nogil:
    """b = m * 2**k, with 1 <= |m| < 2."""
    cdef vec least = splat(by_type(FLT_MIN, DBL_MIN, &b), &b), up = splat(by_type(64.0, 512.0, &b), &b)
    cdef vec size = absolute(b), normal = where_at_most(least, size, b, b * splat(by_type(2.0**64, 2.0**512, &b), &b))
    m[0] = significand(normal)
    k[0] = binary_exponent(normal) - where_at_most(least, size, splat(0.0, &b), up)


cdef inline double top_exponent(const vec* like) noexcept nogil:
    """The power of two that the term of the top becomes about: the smallest is then as far below it as the smallest
    subnormal result is below 1."""
    return by_type(64.0, 100.0, like)


cdef inline void survey(vec* a, const vec* b, vec* highest, vec* probe) noexcept nogil:
    """Make -inf of `a` where b is 0; note the highest finite `a`, and NaN where a term is infinite or NaN."""
    cdef vec zero = splat(0.0, a), factor = load(b)
    cdef vec value = where_at_most(absolute(factor), zero, splat(-INFINITY, a), load(<const vec*>a))
    store(a, value)
    value = maximum(splat(by_type(-FLT_MAX, -DBL_MAX, a), a), value)  # which leaves +inf and NaN
    highest[0] = maximum(value, highest[0])
    probe[0] = probe[0] + ((value - value) + (factor - factor))


cdef inline vec term_size(vec a, vec b, vec highest) noexcept nogil:
    """The logarithm of a term over exp(highest), of its factor the exponent alone: beside a large `a` even that would not
    be seen in a sum."""
    cdef vec m, k
    split_factor(b, &m, &k)
    return (a - highest) + k * splat(LN2, &a)


cdef inline Py_ssize_t find_top(vec* a, const vec* b, Py_ssize_t n_registers, bint* is_regular) noexcept nogil:
    """The index of one of the largest terms, -1 if all are 0; whether none is infinite or NaN.

    Where b is 0, `a` becomes -inf.
    """
    cdef vec highest = splat(by_type(-FLT_MAX, -DBL_MAX, a), a), probe = splat(0.0, a), where = probe
    cdef vec largest = splat(-INFINITY, a), size
    cdef double largest_size
    cdef Py_ssize_t i
    cdef int l, distance = lanes(a) // 2
    for i in range(n_registers):
        survey(a + i, b + i, &highest, &probe)
    while distance:
        probe = probe + swap(probe, distance)
        distance //= 2
    is_regular[0] = lane(probe, 0) == 0.0
    highest = largest_lane(highest)
    for i in range(n_registers):
        size = term_size(load(<const vec*>a + i), load(b + i), highest)
        where = where_at_most(size, largest, where, splat(i, a))
        largest = maximum(size, largest)
    largest_size = lane(largest_lane(largest), 0)
    if largest_size == -INFINITY:
        return -1
    for l in range(lanes(a)):
        if lane(largest, l) == largest_size:
            return <Py_ssize_t>lane(where, l) * lanes(a) + l
    return -1  # of a chunk that is not regular


cdef inline double sum_of_irregular(
    const vec* a, const vec* b, Py_ssize_t n, Py_ssize_t first, Py_ssize_t step
) noexcept nogil:
    """The sum of those terms that are infinite or NaN, of n that are a step apart."""
    cdef double total = 0.0, size, factor
    cdef Py_ssize_t i
    for i in range(n):
        size, factor = get(a, first + i * step), get(b, first + i * step)
        if factor != 0.0:
            size = factor * (1.0 if fabs(size) < INFINITY else exp(size))
            if not fabs(size) < INFINITY:
                total += size
    return total


cdef inline void fold_products(
    const vec* a, const vec* b, int count, vec offsets, vec exponents, vec* high, vec* low, int step
) noexcept nogil:
    """Add the terms b * exp(a - offset) * 2**-exponent of `count` registers to a sum in each lane.

    With a `step` of 1 each register has a sum of its own, with 0 all have the same.
    """
    cdef vec[REFERENCE * GROUP] references
    cdef vec[GROUP] differences, errors, factors, terms, residuals
    cdef vec zero = splat(0.0, a), least = splat(by_type(-FLT_MAX, -DBL_MAX, a), a), k, seen
    cdef int j
    for j in range(count):
        split_factor(load(b + j), &factors[j], &k)
        make_reference(zero, exponents - k, references + j * REFERENCE)
        differences[j] = load(a + j) - offsets
        seen = differences[j] + offsets
        errors[j] = (load(a + j) - seen) + (offsets - (seen - differences[j]))  # Knuth; NaN for -inf
        errors[j] = where_at_most(least, load(a + j), errors[j], zero)
        factors[j] = where_at_most(least, load(a + j), factors[j], zero)
    scaled_exp(differences, terms, residuals, count, references, 1)
    for j in range(count):
        residuals[j] = (residuals[j] + terms[j] * errors[j]) * factors[j]
        seen = terms[j] * factors[j]
        accumulate(
            high + j * step, low + j * step, seen, residuals[j] - minus_product(seen, terms[j], factors[j]))


cdef WeightedState fold_weighted_chunk(vec* a, const vec* b, Py_ssize_t n, double row_offset) noexcept nogil:
    """The state of a chunk. The last register is filled up with factors of 0; `a` is overwritten.

    It takes the `row_offset` of an earlier chunk if that is near: their sums then merge exactly.
    """
    cdef vec high = splat(0.0, a), low = high, offsets, exponents, m, k
    cdef WeightedState state = weighted_identity()
    cdef Py_ssize_t n_registers = (n + lanes(a) - 1) // lanes(a), i = 0, top
    cdef int distance = lanes(a) // 2
    cdef bint is_regular
    top = find_top(a, b, n_registers, &is_regular)
    if not is_regular:
        state.b, state.high = 1.0, sum_of_irregular(a, b, n, 0, 1)
        return state
    if top < 0:
        return state
    state.a, state.b = get(<const vec*>a, top), get(b, top)
    put(a, top, -INFINITY)
    state.offset = row_offset if fabs(state.a - row_offset) <= 16.0 else state.a
    split_factor(splat(state.b, a), &m, &k)
    state.exponent = rint((state.a - state.offset) * LOG2_E) + lane(k, 0) - top_exponent(a)
    offsets, exponents = splat(state.offset, a), splat(state.exponent, a)
    while i + GROUP <= n_registers:
        fold_products(<const vec*>a + i, b + i, GROUP, offsets, exponents, &high, &low, 0)
        i += GROUP
    while i < n_registers:
        fold_products(<const vec*>a + i, b + i, 1, offsets, exponents, &high, &low, 0)
        i += 1
    while distance:
        accumulate(&high, &low, swap(high, distance), swap(low, distance))
        distance //= 2
    state.high, state.low = lane(high, 0), lane(low, 0)
    return state


cdef void fold_weighted_tile(vec* a, const vec* b, Py_ssize_t n, WeightedState* states) noexcept nogil:
    """The states of rows of n elements, one in each lane; `a` is overwritten.

    There is a sum for each of the lanes that a row alone would have, so that the bits are the same.
    """
    cdef vec[MAX_LANES] highs, lows
    cdef vec zero = splat(0.0, a), none = splat(-1.0, a), highest = splat(by_type(-FLT_MAX, -DBL_MAX, a), a), probe = zero
    cdef vec top = none, top_a = zero, top_b = zero, largest = splat(-INFINITY, a), value, factor, size, exponents, m, k
    cdef int width = lanes(a), n_lanes = lanes_with_elements(n, a), distance = lanes(a) // 2, l = 0, j, count
    cdef Py_ssize_t i
    for i in range(n):
        survey(a + i, b + i, &highest, &probe)
    for l in range(n_lanes):  # in the order in which `find_top` compares
        i = l
        while i < n:
            value, factor = load(<const vec*>a + i), load(b + i)
            size = term_size(value, factor, highest)
            top = where_at_most(size, largest, top, splat(i, a))
            top_a, top_b = where_at_most(size, largest, top_a, value), where_at_most(size, largest, top_b, factor)
            largest = maximum(size, largest)
            i += width
    top = where_at_most(absolute(probe), zero, top, none)
    split_factor(top_b, &m, &k)
    exponents = k - splat(top_exponent(a), a)
    for i in range(n):
        store(a + i, where_at_most(absolute(top - splat(i, a)), zero, splat(-INFINITY, a), load(<const vec*>a + i)))
    for l in range(n_lanes):
        highs[l] = lows[l] = zero
    l = 0
    while l < n_lanes:
        count = GROUP if l + GROUP <= n_lanes else 1
        i = l
        while i + count <= n:
            if count == GROUP:
                fold_products(<const vec*>a + i, b + i, GROUP, top_a, exponents, highs + l, lows + l, 1)
            else:
                fold_products(<const vec*>a + i, b + i, 1, top_a, exponents, highs + l, lows + l, 1)
            i += width
        for j in range(<int>max(n - i, <Py_ssize_t>0)):
            fold_products(<const vec*>a + i + j, b + i + j, 1, top_a, exponents, highs + l + j, lows + l + j, 1)
        l += count
    while distance:
        for l in range(min(distance, n_lanes - distance)):
            accumulate(&highs[l], &lows[l], highs[l + distance], lows[l + distance])
        distance //= 2
    for l in range(width):
        states[l] = weighted_identity()
        if lane(probe, l) != 0.0:
            states[l].b, states[l].high = 1.0, sum_of_irregular(<const vec*>a, b, n, l, width)
        elif lane(top, l) >= 0.0:
            states[l].a = states[l].offset = lane(top_a, l)
            states[l].b, states[l].exponent = lane(top_b, l), lane(exponents, l)
            states[l].high, states[l].low = lane(highs[0], l), lane(lows[0], l)


cdef inline double exp_difference(double x, double offset, double* low, double* exponent) noexcept nogil:
    """exp(x - offset) in the parts of `exp_split`, without the rounding of the difference."""
    cdef double difference = x - offset, seen = difference + offset, p = exp_split(difference, low, exponent)
    low[0] += p * ((x - seen) + (offset - (seen - difference)))
    return p


cdef inline void rescale(WeightedState* state, double offset) noexcept nogil:
    """Give the sum of a state another offset."""
    cdef double p_low, k, p = exp_difference(state.offset, offset, &p_low, &k), scaled = state.high * p
    state.low = state.low * p + state.high * p_low + fma(state.high, p, -scaled)
    state.high, state.offset, state.exponent = scaled, offset, state.exponent + k


cdef inline double kept_term(WeightedState state, double* low) noexcept nogil:
    """The term that is kept out of the sum, relative to what the sum is relative to."""
    cdef int b_exponent
    cdef double factor = frexp(state.b, &b_exponent), p_low, k, p, term
    p = exp_difference(state.a, state.offset, &p_low, &k)
    term = p * factor
    k = min(max(k + b_exponent - state.exponent, -5000.0), 5000.0)
    low[0] = ldexp(fma(p, factor, -term) + p_low * factor, <int>k)
    return ldexp(term, <int>k)


cdef inline void raise_exponent(WeightedState* state, double exponent) noexcept nogil:
    cdef int k = <int>max(state.exponent - exponent, -5000.0)
    state.high, state.low, state.exponent = ldexp(state.high, k), ldexp(state.low, k), exponent


cdef WeightedState merge_weighted(WeightedState x, WeightedState y) noexcept nogil:
    """The state of the elements of both."""
    cdef double term, term_low
    if y.b == 0.0:
        return x
    if x.b == 0.0:
        return y
    if not fabs(y.high) < INFINITY:
        x, y = y, x
    if not fabs(x.high) < INFINITY:
        if not fabs(y.high) < INFINITY:
            x.high += y.high
        return x
    if (y.a - x.a) + (log(fabs(y.b)) - log(fabs(x.b))) > 0.0:
        x, y = y, x
    if y.offset != x.offset:
        rescale(&y, x.offset)
    raise_exponent(&x, max(x.exponent, y.exponent))
    raise_exponent(&y, x.exponent)
    term = kept_term(y, &term_low)
    x.low += y.low + term_low
    x.high = two_sum_of(x.high, y.high, &x.low)
    x.high = two_sum_of(x.high, term, &x.low)
    return x


cdef inline double two_sum_of(double a, double b, double* low) noexcept nogil:
    """a + b; its rounding error is added to `low`."""
    cdef double total = a + b, b_seen = total - a
    low[0] += (a - (total - b_seen)) + (b - b_seen)
    return total


cdef void weighted_log_sums(const WeightedState* states, int count, double* results, double* signs) noexcept nogil:
    """The logarithms of the absolute values of sums, and their signs.

    A result is 0 until the registers have it: those that are not theirs to find are infinite or NaN.
    """
    cdef f64v[MAX_LANES] tops, factors, exponents, ratios, ratios_low, others
    cdef f64v one = splat(1.0, tops), zero = splat(0.0, tops), high, error, log_high, log_low, rest
    cdef double term, term_low, total, low, ratio
    cdef int i, b_exponent
    for i in range((count + lanes(tops) - 1) // lanes(tops)):
        tops[i], factors[i], exponents[i], ratios[i], ratios_low[i], others[i] = zero, one, zero, zero, zero, zero
    for i in range(count):
        if states[i].b == 0.0:
            results[i], signs[i] = -INFINITY, 0.0
            continue
        if not fabs(states[i].high) < INFINITY:
            results[i], signs[i] = fabs(states[i].high), states[i].high
            if signs[i] == signs[i]:
                signs[i] = copysign(1.0, signs[i])
            continue
        term, low = kept_term(states[i], &term_low), 0.0
        total = two_sum_of(term, states[i].high, &low)
        total += low + (states[i].low + term_low)
        results[i], signs[i] = -INFINITY, 0.0
        if total == 0.0:
            continue
        results[i], signs[i], ratio = 0.0, copysign(1.0, total), states[i].high / term
        put(tops, i, states[i].a)
        put(factors, i, 2.0 * frexp(fabs(states[i].b), &b_exponent))
        put(exponents, i, b_exponent - 1)
        if ratio > -0.5:
            put(ratios, i, ratio)
            put(ratios_low, i, (fma(-ratio, term, states[i].high) + (states[i].low - ratio * term_low)) / term)
        else:
            put(others, i, log(fabs(total / term)))
    for i in range((count + lanes(tops) - 1) // lanes(tops)):
        high = two_sum(tops[i], exponents[i] * splat(LN2_HIGH_F64, tops), &rest)  # the product is exact
        rest = rest + exponents[i] * splat(LN2_LOW_F64, tops)
        log1p_parts(factors[i] - one, zero, &log_high, &log_low)
        high = two_sum(high, log_high, &error)
        rest = rest + (error + log_low)
        log1p_parts(ratios[i], ratios_low[i], &log_high, &log_low)
        high = two_sum(high, log_high + others[i], &error)
        tops[i] = high + (rest + (error + log_low))
    for i in range(count):
        if results[i] == 0.0:
            results[i] = get(<const f64v*>tops, i)


cdef struct WeightedCall:
    const char* a
    const char* b
    const char* mask  # NULL for none
    char* y
    char* signs  # NULL for none
    bint is_single
    Storage a_storage
    Storage b_storage
    Storage storage  # of the output and the signs
    double temperature
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory
    Dimensions a_kept
    Dimensions a_row
    Dimensions b_kept
    Dimensions b_row
    Dimensions mask_kept
    Dimensions mask_row


def run_weighted(
    bint is_single, int a_storage, int b_storage, int storage, tuple kept, tuple reduced, cnp.ndarray a, cnp.ndarray b,
    cnp.ndarray out, cnp.ndarray sign, cnp.ndarray mask, double temperature, Py_ssize_t n_blocks, int n_threads
):
    """Run a weighted logsumexp.

    Parameters
    ----------
    is_single : bool
        Whether float32 is computed in, not float64.
    a_storage, b_storage, storage : int
        How elements of `a`, of `b`, and of `out` lie in memory.
    kept, reduced : tuple of Dimension
        The layout.
    a, b, out : ndarray
        Aligned and native, stored in these ways.
    sign : ndarray or None
        Where the signs go, like `out`; None to have NaN for the logarithm of a negative sum.
    mask : ndarray or None
        Of bool: which elements count.
    temperature : float
        What `a` is divided by.
    n_blocks, n_threads : int
        Into how many equal parts it is cut, and how many threads share them.
    """
    cdef WeightedCall call
    call.a, call.b, call.y = cnp.PyArray_BYTES(a), cnp.PyArray_BYTES(b), cnp.PyArray_BYTES(out)
    call.signs = NULL if sign is None else cnp.PyArray_BYTES(sign)
    call.mask = NULL if mask is None else cnp.PyArray_BYTES(mask)
    call.a_storage, call.b_storage, call.storage = <Storage>a_storage, <Storage>b_storage, <Storage>storage
    call.is_single, call.temperature, call.n_blocks, call.lacks_memory = is_single, temperature, n_blocks, False
    call.a_kept, call.a_row = dimensions(kept), dimensions(reduced)
    call.b_kept, call.b_row = dimensions_of_factors(kept), dimensions_of_factors(reduced)
    call.mask_kept, call.mask_row = dimensions_of_mask(kept), dimensions_of_mask(reduced)
    run_in_parts(run_weighted_block_of_call, &call, &call.first, n_blocks, n_threads)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a weighted sum")


cdef void run_weighted_block_of_call(void* context, Py_ssize_t block) noexcept nogil:
    cdef WeightedCall* call = <WeightedCall*>context
    cdef bint has_memory
    if call.is_single:
        has_memory = run_weighted_block(call, call.first + block, <const f32v*>NULL)
    else:
        has_memory = run_weighted_block(call, call.first + block, <const f64v*>NULL)
    if not has_memory:
        call.lacks_memory = True


cdef Dimensions dimensions_of_factors(tuple layout):
    """The dimensions with the strides of the factors for those of the input."""
    cdef Dimensions result = dimensions(layout)
    for i, dimension in enumerate(layout):
        result.x_stride[i] = dimension.b_stride
    return result


cdef inline void collect_weighted(
    const WeightedCall* call, Py_ssize_t row, Py_ssize_t first, Py_ssize_t n, vec* terms, vec* factors
) noexcept nogil:
    """n elements of a row, from `first` on, and their factors, which are 0 where they are masked."""
    cdef Py_ssize_t offset, unused, i
    locate(&call.a_kept, row, &offset, &unused)
    gather(call.a + offset, &call.a_row, first, n, terms, call.a_storage)
    locate(&call.b_kept, row, &offset, &unused)
    gather(call.b + offset, &call.b_row, first, n, factors, call.b_storage)
    if call.mask != NULL:  # a factor of 0 drops its term, whatever that is
        locate(&call.mask_kept, row, &offset, &unused)
        hide(factors, call.mask + offset, &call.mask_row, first, n, 0.0)
    if call.temperature != 1.0:  # as a double: rounded to float32 it would be an error of every quotient
        for i in range(n):
            put(terms, i, get(<const vec*>terms, i) / call.temperature)


cdef WeightedState fold_weighted(const WeightedCall* call, Py_ssize_t row, Py_ssize_t n, vec* scratch) noexcept nogil:
    """The state of a row of any strides; `scratch` has room for two chunks."""
    cdef Py_ssize_t length = weighted_length(<const vec*>scratch), width = lanes(<const vec*>scratch), first = 0, size, i
    cdef vec* factors = <vec*>at(<const vec*>scratch, length)
    cdef WeightedState total = weighted_identity()
    while first < n:
        size = min(length, n - first)
        collect_weighted(call, row, first, size, scratch, factors)
        for i in range(size, (size + width - 1) // width * width):
            put(scratch, i, 0.0)
            put(factors, i, 0.0)
        total = merge_weighted(total, fold_weighted_chunk(scratch, <const vec*>factors, size, total.offset))
        first += size
    return total


cdef void fold_weighted_rows(
    const WeightedCall* call, Py_ssize_t first, Py_ssize_t n, WeightedState* states, vec* scratch
) noexcept nogil:
    """The states of as many short rows as a register has lanes; `scratch` has room for them twice, and their factors."""
    cdef const vec* like = scratch
    cdef vec* factors = scratch + n
    cdef Py_ssize_t stride = n * itemsize(like), row
    for row in range(lanes(like)):
        collect_weighted(
            call, first + row, 0, n, <vec*>at(<const vec*>scratch, row * n), <vec*>at(<const vec*>factors, row * n))
    turn(scratch, stride, lanes(like), n, scratch + 2 * n, REGISTER_BYTES, AS_COMPUTED, AS_COMPUTED, like)
    turn(factors, stride, lanes(like), n, scratch + 3 * n, REGISTER_BYTES, AS_COMPUTED, AS_COMPUTED, like)
    fold_weighted_tile(scratch + 2 * n, <const vec*>scratch + 3 * n, n, states)


cdef inline void write_log_sums(
    const WeightedCall* call, Py_ssize_t first, int count, const WeightedState* states, const vec* like
) noexcept nogil:
    """Write the results of `count` rows, from the `first` on."""
    cdef double[MAX_LANES] results, signs
    cdef Py_ssize_t unused, y_offset
    cdef int i
    weighted_log_sums(states, count, results, signs)
    for i in range(count):
        locate(&call.a_kept, first + i, &unused, &y_offset)
        if call.signs != NULL:
            store_stored(call.signs + y_offset, splat(signs[i], like), 1, call.storage)
        elif signs[i] < 0.0:
            results[i] = INFINITY - INFINITY
        store_stored(call.y + y_offset, splat(results[i], like), 1, call.storage)


cdef bint run_weighted_block(const WeightedCall* call, Py_ssize_t block, const vec* like) noexcept nogil:
    cdef Py_ssize_t n = total_size(&call.a_row), n_rows = total_size(&call.a_kept)
    cdef Py_ssize_t row = n_rows * block // call.n_blocks, end = n_rows * (block + 1) // call.n_blocks
    cdef WeightedState[MAX_LANES] states
    cdef vec* scratch = <vec*>malloc(2 * weighted_length(like) * itemsize(like))
    if scratch == NULL:
        return False
    while n <= MAX_WEIGHTED_TILE and row + lanes(like) <= end:
        fold_weighted_rows(call, row, n, states, scratch)
        write_log_sums(call, row, lanes(like), states, like)
        row += lanes(like)
    while row < end:
        states[0] = fold_weighted(call, row, n, scratch)
        write_log_sums(call, row, 1, states, like)
        row += 1
    free(scratch)
    return True
