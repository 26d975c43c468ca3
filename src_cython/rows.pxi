"""Kernels for one contiguous row.

A row is folded chunk by chunk into states, the states are merged, and the row is written. A chunk is looked at twice:
for its maximum, then for its terms. Within a chunk, element j belongs to lane j % lanes; each lane adds up its elements
in order, in twice the precision, and the lanes are added as a tree. Tiles follow the same order, so every memory
layout gives the same bits.
"""


cdef enum Exponentials:
    IN_OUTPUT
    IN_SCRATCH
    RECOMPUTE

cdef enum:
    # How far ahead of the exponentials what is probably next is fetched, so that memory is busy meanwhile: (8192, 4096)
    # float32 take 10.7 ms instead of 13.5.
    PREFETCHED_BYTES = 65536
    # The low parts of a lane's sum are added up in runs of so many, so that rounding adds up over 64 + 8 additions, not
    # 512: the log-probabilities of a chunk with one large element and many of a millionth were 8 ULP off, and are 1.2.
    RUN = 64
    ALIGNED = 16  # from so many registers on, passes without an order of lanes begin at a cache line
    EXTREMES = 4  # registers in which a maximum is looked for: each waits two cycles for the one before


cdef enum Finish:  # what `write_chunk` does to each element on its way to the output
    SCALE      # a term to a probability: term * (FACTOR + FACTOR_LOW), or SHARE
    EXP_SCALE  # a logit to a probability, by way of its term
    MENDED_EXP_SCALE  # the same, where some are so small that they need mending
    SUBTRACT   # a logit to a log-probability: (logit - FACTOR) - FACTOR_LOW
    COARSE_SCALE      # COARSE terms
    COARSE_EXP_SCALE


cdef inline Py_ssize_t chunk_length(const vec* like) noexcept nogil:
    return CHUNK_BYTES // itemsize(like)


cdef inline const vec* at(const vec* p, Py_ssize_t element) noexcept nogil:
    """Address of an element, which need not be the first of a register."""
    return <const vec*>(<const char*>p + element * itemsize(p))


cdef inline vec largest_lane(vec v) noexcept nogil:
    """The largest lane, in all lanes."""
    cdef int distance = lanes(&v) // 2
    while distance:
        v = maximum(v, swap(v, distance))
        distance //= 2
    return v


cdef inline double smallest_lane(vec v) noexcept nogil:
    return -lane(largest_lane(splat(0.0, &v) - v), 0)


cdef inline vec lane_extremes(const vec* x, Py_ssize_t n, vec* smallest) noexcept nogil:
    """The maximum of each lane over all elements that are not NaN, and the minimum."""
    cdef vec nothing = splat(-INFINITY, x), v
    cdef vec[EXTREMES] tops, bottoms
    cdef Py_ssize_t i = 0, width = lanes(x), n_full, unaligned
    cdef int j
    for j in range(EXTREMES):
        tops[j], bottoms[j] = nothing, splat(INFINITY, x)
    # In this order of operands a NaN is passed over.
    if n >= ALIGNED * width:  # elements may be looked at twice, so the first register ends wherever
        unaligned = <Py_ssize_t>(-<uintptr_t>x % REGISTER_BYTES) // itemsize(x)
        tops[0], bottoms[0] = maximum(load(x), tops[0]), minimum(load(x), bottoms[0])
        x, n = at(x, unaligned), n - unaligned
    n_full = n // width
    while i + EXTREMES <= n_full:
        for j in range(EXTREMES):
            v = load(x + i + j)
            tops[j], bottoms[j] = maximum(v, tops[j]), minimum(v, bottoms[j])
        i += EXTREMES
    while i < n_full:
        tops[0], bottoms[0] = maximum(load(x + i), tops[0]), minimum(load(x + i), bottoms[0])
        i += 1
    if i * width < n:
        tops[1] = maximum(load_first(x + i, <int>(n - i * width), nothing), tops[1])
        bottoms[1] = minimum(load_first(x + i, <int>(n - i * width), splat(INFINITY, x)), bottoms[1])
    smallest[0] = minimum(minimum(bottoms[0], bottoms[1]), minimum(bottoms[2], bottoms[3]))
    return maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]))


cdef inline vec lane_maxima(const vec* x, Py_ssize_t n) noexcept nogil:
    """The maximum of each lane over all elements that are not NaN."""
    cdef vec smallest
    return lane_extremes(x, n, &smallest)


cdef inline bint needs_mending(
    const vec* x, Py_ssize_t n, vec smallest, vec largest, double n_of_row, double temperature
) noexcept nogil:
    """Whether any of n logits may have a probability below `mending_edge` that is not 0, in a row or rows of a tile."""
    return is_far_below(smallest, largest, temperature) and is_below_mended(
        counted_smallest(x, n, smallest, largest, temperature), largest, n_of_row, temperature)


cdef inline bint is_far_below(vec smallest, vec largest, double temperature) noexcept nogil:
    """Whether rows come into question for `needs_mending`; with fewer than 10**11 elements others do not."""
    return any_greater(largest - splat(by_type(60.0, 660.0, &largest) * temperature, &largest), smallest)


cdef inline vec counted_smallest(
    const vec* x, Py_ssize_t n, vec smallest, vec largest, double temperature
) noexcept nogil:
    """The smallest in each lane of n logits, but for those so far below the largest that their probability is 0.

    Where the smallest of all is not, it takes no look at the others. Masked elements are: (64, 1000) float32 with 40 % of
    -inf take 16.5 us instead of 15.0.
    """
    cdef vec bound = (largest - splat(by_type(104.0, 745.2, x) * temperature, x)) - spacing_above(largest)
    bound = maximum(bound, splat(-by_type(FLT_MAX, DBL_MAX, x), x))  # where all are -inf
    return smallest_above(x, n, bound) if any_greater(bound, smallest) else smallest


cdef vec smallest_above(const vec* x, Py_ssize_t n, vec bound) noexcept nogil:
    """The minimum of each lane over all elements above a bound."""
    cdef vec[EXTREMES] bottoms
    cdef Py_ssize_t i = 0, width = lanes(x)
    cdef int j
    for j in range(EXTREMES):
        bottoms[j] = splat(INFINITY, x)
    while (i + EXTREMES) * width <= n:
        for j in range(EXTREMES):
            bottoms[j] = minimum_above(load(x + i + j), bound, bottoms[j])
        i += EXTREMES
    while i * width < n:
        bottoms[0] = minimum_above(load_within(x, i, n), bound, bottoms[0])
        i += 1
    return minimum(minimum(bottoms[0], bottoms[1]), minimum(bottoms[2], bottoms[3]))


cdef inline Arithmetic arithmetic_for(vec smallest, const vec* reference) noexcept nogil:
    """FULL, or MODERATE for elements that are so, of which these are the smallest."""
    cdef vec zero = splat(0.0, reference), offset = reference[OFFSET]
    if any_greater(reference[FLOOR], smallest) or any_greater(maximum(offset, zero - offset), zero):
        return FULL
    return MODERATE


cdef inline bint has_nan(const vec* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if get(x, i) != get(x, i):
            return True
    return False


cdef inline void fold_registers(
    const vec* x, vec* terms, int count, vec* tops, vec* highs, vec* lows, bint apart, Arithmetic arithmetic,
    const vec* references, int reference_step, int step
) noexcept nogil:
    """Fold an element into each lane of `count` registers, and give the terms.

    With a step of 1 each register has a reference or a sum of its own, with 0 all have the same. With the maxima kept
    apart, it is the smaller of x and the lane's maximum so far that is folded.

    Sums begin at `sum_base` and stay above every term, so that what an addition loses is known after two subtractions
    (Dekker). With the maxima apart they begin at 0, as what is left may be far smaller, and Knuth's five are needed.
    """
    cdef vec[GROUP] folded, heads, factors, rests
    cdef vec total, seen, lost
    cdef int j
    if arithmetic == COARSE:
        coarse_exp(x, terms, count, references, reference_step)
        for j in range(count):
            highs[j * step] = highs[j * step] + terms[j]
        return
    for j in range(count):
        folded[j] = x[j]
        if apart:
            folded[j] = minimum(tops[j * step], x[j])
            tops[j * step] = maximum(x[j], tops[j * step])
    exp_parts(folded, heads, factors, rests, count, references, reference_step, arithmetic)
    for j in range(count):
        terms[j] = times_plus(factors[j], rests[j], heads[j])
    for j in range(count):
        total = highs[j * step] + terms[j]
        seen = total - highs[j * step]
        lost = times_plus(factors[j], rests[j], heads[j] - seen)  # of the unrounded term
        if apart:
            lost = lost + (highs[j * step] - (total - seen))
        lows[j * step] = lows[j * step] + lost
        highs[j * step] = total


cdef inline void accumulate(vec* high, vec* low, vec term, vec residual) noexcept nogil:
    """Add term + residual to the sum high + low."""
    cdef vec error
    high[0] = two_sum(high[0], term, &error)
    low[0] = low[0] + (error + residual)


cdef inline int count_within(Py_ssize_t i, Py_ssize_t n, const vec* like) noexcept nogil:
    """How many of n elements are in the i-th register."""
    return <int>max(<Py_ssize_t>0, min(n - i * lanes(like), <Py_ssize_t>lanes(like)))


cdef inline vec load_within(const vec* x, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """The i-th register of n elements; -inf in the lanes behind the end."""
    return load_first(x + i, count_within(i, n, x), splat(-INFINITY, x))


cdef inline void store_within(vec* y, Py_ssize_t i, Py_ssize_t n, vec v) noexcept nogil:
    """Store the i-th register of n elements, but for what would be behind the end."""
    store_first(y + i, v, count_within(i, n, <const vec*>y))


cdef inline void fold_elements(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, Arithmetic arithmetic, const vec* reference, vec* top,
    vec* high, vec* low
) noexcept nogil:
    """Fold a chunk into lanes; with the maxima apart, `top` becomes those of the lanes."""
    cdef vec zero = splat(0.0, x), tops = splat(-INFINITY, x), highs = zero, lows = zero, earlier = zero
    cdef vec fill = reference[FLOOR] if arithmetic == MODERATE else tops  # behind the end, where it leaves a sum as it is
    cdef vec[GROUP] logits, group
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int j
    cdef bint has_base = not apart and arithmetic != COARSE
    if has_base:
        highs = sum_base(n, x)
    while (i + GROUP) * width <= n:
        for j in range(GROUP):
            logits[j] = load(x + i + j)
        prefetch_far(<const char*>(x + i) + PREFETCHED_BYTES, REGISTER_BYTES, GROUP)
        fold_registers(logits, group, GROUP, &tops, &highs, &lows, apart, arithmetic, reference, 0, 0)
        for j in range(GROUP):
            if keep:
                store(terms + i + j, group[j])
        i += GROUP
        if i % RUN == 0 and arithmetic == COARSE:
            earlier, highs = earlier + highs, zero
        elif i % RUN == 0:
            earlier, lows = earlier + lows, zero
    # By half groups, of which less is empty: (500, 160) float32 take 42 us instead of 51. Two registers alone take longer.
    while n > (i + 1) * width:
        for j in range(GROUP // 2):
            logits[j] = load_first(x + i + j, count_within(i + j, n, x), fill)
        prefetch_far(<const char*>(x + i) + PREFETCHED_BYTES, REGISTER_BYTES, GROUP // 2)
        fold_registers(logits, group, GROUP // 2, &tops, &highs, &lows, apart, arithmetic, reference, 0, 0)
        for j in range(GROUP // 2):
            if keep:
                store_within(terms, i + j, n, group[j])
        i += GROUP // 2
    if n > i * width:
        logits[0] = load_first(x + i, count_within(i, n, x), fill)
        prefetch_far(<const char*>(x + i) + PREFETCHED_BYTES, REGISTER_BYTES, 1)
        fold_registers(logits, group, 1, &tops, &highs, &lows, apart, arithmetic, reference, 0, 0)
        if keep:
            store_within(terms, i, n, group[0])
    if arithmetic == COARSE:
        high[0], low[0] = earlier + highs, zero
        return
    if has_base:
        highs = highs - sum_base(n, x)
    top[0], high[0], low[0] = tops, highs, earlier + lows


cdef inline void fold_specialized(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, Arithmetic arithmetic, const vec* reference, vec* top,
    vec* high, vec* low
) noexcept nogil:
    """`fold_elements` in one copy for each kind of call, so that its loops hold no decisions."""
    if vec is f32v and arithmetic == COARSE:
        if keep:
            fold_elements(x, terms, n, True, False, COARSE, reference, top, high, low)
        else:
            fold_elements(x, terms, n, False, False, COARSE, reference, top, high, low)
    elif apart:
        fold_elements(x, terms, n, False, True, FULL, reference, top, high, low)
    elif arithmetic == MODERATE:
        if keep:
            fold_elements(x, terms, n, True, False, MODERATE, reference, top, high, low)
        else:
            fold_elements(x, terms, n, False, False, MODERATE, reference, top, high, low)
    elif keep:
        fold_elements(x, terms, n, True, False, FULL, reference, top, high, low)
    else:
        fold_elements(x, terms, n, False, False, FULL, reference, top, high, low)


cdef inline void sum_chunk(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, Arithmetic arithmetic, const vec* reference,
    vec largest, vec* high, vec* low
) noexcept nogil:
    """The sum of a chunk, in every lane."""
    cdef vec top, term, residual
    cdef int distance = lanes(x) // 2
    fold_specialized(x, terms, n, keep, apart, arithmetic, reference, &top, high, low)
    if apart:  # the lanes' own maxima, all but the one that is the chunk's
        scaled_exp(&top, &term, &residual, 1, reference, 0)
        accumulate(
            high, low, drop_first_equal(term, top, lane(largest, 0)),
            drop_first_equal(residual, top, lane(largest, 0)))
    while distance:
        accumulate(high, low, swap(high[0], distance), swap(low[0], distance))
        distance //= 2


cdef inline vec without_top(
    vec largest, Py_ssize_t n, const vec* reference, vec* high, vec* low
) noexcept nogil:
    """Take the maximum's term out of a sum of n; give what the rest is above where it has digits enough for log1p.

    A term below 2**-22 of the maximum's (2**-51 in float64) is lost to the high part of its lane's sum, and the low part
    adds up what is lost with less care: that may be a 32nd of the rest. In a short row it is n halves of a last digit of
    `sum_base`, and a 2**-24 of them what rounding takes.
    """
    cdef vec top, top_low, error
    scaled_exp(&largest, &top, &top_low, 1, reference, 0)
    high[0] = two_sum(high[0], splat(0.0, &top) - top, &error)
    low[0] = (low[0] - top_low) + error
    if n <= SHORT:
        return sum_base(n, &top) * splat(n * by_type(2.0**-21, 2.0**-50, &top), &top)
    return top * splat(n * by_type(2.0**-17, 2.0**-46, &top), &top)


cdef inline vec raised_to_zero(vec largest, bint has_zero) noexcept nogil:
    """Maxima, of the elements and of a zero beside them if there is one."""
    return maximum(largest, splat(0.0, &largest)) if has_zero else largest


cdef inline void add_zero(Arithmetic arithmetic, const vec* reference, vec* high, vec* low) noexcept nogil:
    """Add the term of the zero beside the elements to their sum."""
    cdef vec zero = splat(0.0, reference), term, residual
    if arithmetic == COARSE:
        coarse_exp(&zero, &term, 1, reference, 0)
        high[0] = high[0] + term
    else:
        scaled_exp(&zero, &term, &residual, 1, reference, 0)
        accumulate(high, low, term, residual)


cdef State fold_chunk(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, bint has_zero, double row_offset, vec* row_smallest
) noexcept nogil:
    """The state of one chunk; with `keep`, its terms too, relative to the state's exponent.

    `row_smallest`, where it is not NULL, is lowered to the smallest element of each lane that counts.
    """
    cdef vec[REFERENCE] reference
    cdef vec smallest, largest = raised_to_zero(largest_lane(lane_extremes(x, n, &smallest)), has_zero)
    cdef vec high, low, enough
    cdef Arithmetic arithmetic
    cdef State state
    if row_smallest != NULL:
        row_smallest[0] = minimum(counted_smallest(x, n, smallest, largest, 1.0), row_smallest[0])
    state.maximum = lane(largest, 0)
    if fabs(state.maximum) == INFINITY:
        return infinite_state(state.maximum, has_nan(x, n), apart)
    reference_at(largest, splat(row_offset, x), reference)
    arithmetic = arithmetic_for(smallest, reference)
    sum_chunk(x, terms, n, keep, False, arithmetic, reference, largest, &high, &low)
    if has_zero:
        add_zero(FULL, reference, &high, &low)
    if apart:
        enough = without_top(largest, n, reference, &high, &low)
        if any_greater(enough, high):
            sum_chunk(x, terms, n, False, True, FULL, reference, largest, &high, &low)
    state.offset = lane(reference[OFFSET], 0)
    state.exponent = lane(exponent_of(reference), 0)
    state.high = lane(high, 0)
    state.low = lane(low, 0)
    return state


cdef State fold_coarse_chunk(const vec* x, vec* terms, Py_ssize_t n, bint keep, bint has_zero) noexcept nogil:
    """`fold_chunk` for COARSE terms."""
    cdef vec[REFERENCE] reference
    cdef vec smallest, largest = raised_to_zero(largest_lane(lane_extremes(x, n, &smallest)), has_zero), top, high, low
    cdef int distance = lanes(x) // 2
    cdef State state = identity()
    state.maximum = lane(largest, 0)
    if fabs(state.maximum) == INFINITY:
        return infinite_state(state.maximum, has_nan(x, n), False)
    coarse_reference_at(largest, reference)
    fold_specialized(x, terms, n, keep, False, COARSE, reference, &top, &high, &low)
    while distance:
        high = high + swap(high, distance)
        distance //= 2
    if has_zero:
        add_zero(COARSE, reference, &high, &low)
    state.offset, state.exponent, state.high = state.maximum, lane(exponent_of(reference), 0), lane(high, 0)
    return state


cdef inline void finish(
    vec* v, int count, Finish kind, const vec* references, const vec* finishers, int step, bint has_ties
) noexcept nogil:
    """What `kind` does, to `count` registers in place; without ties no LIMIT is finite.

    With a `step` of 1 each register has a reference and finishers of its own, with 0 all have the same.
    """
    cdef const vec* own
    cdef vec[GROUP] logits
    cdef vec smallest
    cdef int j
    if kind == MENDED_EXP_SCALE:
        for j in range(count):
            logits[j] = v[j]
    if kind == EXP_SCALE or kind == MENDED_EXP_SCALE:
        scaled_exp(v, v, <vec*>NULL, count, references, step)
    elif kind == COARSE_EXP_SCALE:
        coarse_exp(v, v, count, references, step)
    for j in range(count):
        own = finishers + j * step * FINISHERS
        if kind == SUBTRACT:
            v[j] = (v[j] - own[FACTOR]) - own[FACTOR_LOW]
        elif kind == COARSE_SCALE or kind == COARSE_EXP_SCALE:
            v[j] = v[j] * own[FACTOR]
        else:
            v[j] = product(v[j], own[FACTOR], own[FACTOR_LOW])
            if has_ties:
                v[j] = where_at_most(own[LIMIT], v[j], own[SHARE], v[j])
    if kind == MENDED_EXP_SCALE:
        smallest = mending_edge(v)
        for j in range(count):
            smallest = minimum(not_zero(v[j]), smallest)
        if any_greater(mending_edge(v), smallest):
            mend(logits, v, count, references, finishers, step)


cdef void mend(
    const vec* logits, vec* probabilities, int count, const vec* references, const vec* finishers, int step
) noexcept nogil:
    """Put right what is very small of `count` registers of probabilities."""
    cdef vec[GROUP] terms, residuals
    cdef int j
    scaled_exp(logits, terms, residuals, count, references, step)
    for j in range(count):
        probabilities[j] = mended(probabilities[j], terms[j], residuals[j], finishers + j * step * FINISHERS)


cdef inline void write_chunk(
    Finish kind, const vec* source, vec* y, Py_ssize_t n, const vec* reference, Scale scale, bint streaming
) noexcept nogil:
    """Write n elements of the output, past the caches if `streaming`."""
    if scale.limit < INFINITY:
        write_elements(kind, source, y, n, reference, scale, True, streaming)
    else:  # (64, 1000) float32 take 8 % less
        write_elements(kind, source, y, n, reference, scale, False, streaming)


cdef void write_mended(
    const vec* x, vec* y, Py_ssize_t n, const vec* reference, Scale scale, bint streaming
) noexcept nogil:
    """Write probabilities some of which are to be mended."""
    write_elements(MENDED_EXP_SCALE, x, y, n, reference, scale, True, streaming)


cdef inline void write_elements(
    Finish kind, const vec* source, vec* y, Py_ssize_t n, const vec* reference, Scale scale, bint has_ties,
    bint streaming
) noexcept nogil:
    cdef vec fill = splat(0.0, y)
    cdef vec[FINISHERS] finishers
    cdef vec[GROUP] v
    cdef Py_ssize_t width = lanes(y), i = 0
    cdef int count, j
    spread_scale(scale, finishers)
    # Up to the first whole register of the output: no streaming before, and every store would cross a cache line,
    # for which (1024, 1024) float32 take 8 % longer.
    if streaming or n >= ALIGNED * width:
        count = <int>min(n, <Py_ssize_t>(-<uintptr_t>y % REGISTER_BYTES) * width // REGISTER_BYTES)
        if count:
            v[0] = load_first(source, count, fill)
            finish(v, 1, kind, reference, finishers, 0, has_ties)
            store_first(y, v[0], count)
            source, y, n = at(source, count), <vec*>at(<const vec*>y, count), n - count
    while (i + GROUP) * width <= n:
        for j in range(GROUP):
            v[j] = load(source + i + j)
        if kind == EXP_SCALE or kind == MENDED_EXP_SCALE:  # (10000000,) float32 take 3.2 ms instead of 4.2
            prefetch_far(<const char*>(source + i) + PREFETCHED_BYTES, REGISTER_BYTES, GROUP)
        finish(v, GROUP, kind, reference, finishers, 0, has_ties)
        for j in range(GROUP):
            if streaming:
                stream(y + i + j, v[j])
            else:
                store(y + i + j, v[j])
        i += GROUP
    while (i + 1) * width <= n:
        v[0] = load(source + i)
        finish(v, 1, kind, reference, finishers, 0, has_ties)
        store(y + i, v[0])
        i += 1
    if i * width < n:
        v[0] = load_within(source, i, n)
        finish(v, 1, kind, reference, finishers, 0, has_ties)
        store_within(y, i, n, v[0])


cdef inline void stream_bytes(const void* source, void* y, Py_ssize_t size) noexcept nogil:
    """Copy past the caches, but for what shares a cache line with other bytes."""
    cdef Py_ssize_t i = min(size, <Py_ssize_t>(-<uintptr_t>y % REGISTER_BYTES))
    cdef f32v line
    memcpy(y, source, i)
    while i + REGISTER_BYTES <= size:
        memcpy(&line, <const char*>source + i, REGISTER_BYTES)  # not a load: elements of 16 bits may lie at odd multiples of 2
        stream(<f32v*>(<char*>y + i), line)
        i += REGISTER_BYTES
    memcpy(<char*>y + i, <const char*>source + i, size - i)


cdef void write_probabilities(
    const vec* x, const vec* terms, vec* y, Py_ssize_t n, State chunk, State total, Scale scale, bint streaming
) noexcept nogil:
    """Write one chunk of probabilities, from its terms where they are there and have the offset of the whole row, and none
    is to be mended."""
    cdef vec[REFERENCE] reference
    cdef double power = exact_power_of_two(chunk.exponent - total.exponent)
    if not scale.is_mended and terms != NULL and chunk.offset == total.offset and scales_exactly(power, scale, x):
        write_chunk(SCALE, terms, y, n, reference, scaled(scale, power), streaming)
        return
    make_reference(splat(total.offset, y), splat(total.exponent, y), reference)
    if scale.is_mended:
        write_mended(x, y, n, reference, scale, streaming)
    else:
        write_chunk(EXP_SCALE, x, y, n, reference, scale, streaming)


cdef inline Scale scaled(Scale scale, double power) noexcept nogil:
    """The scale for terms that are larger by a power of two."""
    scale.factor, scale.factor_low = scale.factor * power, scale.factor_low * power
    return scale


cdef inline bint scales_exactly(double power, Scale scale, const vec* like) noexcept nogil:
    """Whether a power of two leaves the factor its digits, so that a chunk's terms give the bits of the whole row's."""
    cdef double tiniest = by_type(2.0**-120, 2.0**-1000, like), low = fabs(scale.factor_low * power)
    return scale.factor * power >= tiniest and (low >= tiniest or scale.factor_low == 0.0)


cdef inline void fill_nan(vec* y, Py_ssize_t n) noexcept nogil:
    cdef vec nan = splat(INFINITY - INFINITY, y)
    cdef Py_ssize_t width = lanes(y), i = 0
    while (i + 1) * width <= n:
        store(y + i, nan)
        i += 1
    store_first(y + i, nan, <int>(n - i * width))


cdef void softmax_row(
    const vec* x, vec* y, Py_ssize_t n, bint has_zero, Exponentials exponentials, vec* scratch, State* states,
    bint streaming
) noexcept nogil:
    """Softmax of one row, or of one that `has_zero` beside its elements.

    `scratch` has room for the row's terms if they go there, `states` for one state a chunk.
    """
    cdef Py_ssize_t length = chunk_length(x), first, size
    cdef vec* terms = y if exponentials == IN_OUTPUT else scratch
    cdef State state, total = identity()
    cdef vec smallest = splat(INFINITY, x)
    cdef double row_offset = 0.0
    first = 0
    while first < n:
        size = min(length, n - first)
        if exponentials == RECOMPUTE:
            state = fold_chunk(
                at(x, first), <vec*>NULL, size, False, False, has_zero and first == 0, row_offset, &smallest)
        else:
            state = fold_chunk(
                at(x, first), <vec*>at(<const vec*>terms, first), size, True, False, has_zero and first == 0, row_offset,
                &smallest)
            states[first // length] = state
        if first == 0:
            total, row_offset = state, state.offset
        else:
            total = merge(total, state, False)
        first += size
    total = within_range(total, x)
    if not is_regular(total):
        fill_nan(y, n)
        return
    cdef Scale scale = scale_of(total, x)
    scale.is_mended = is_below_mended(smallest, splat(total.maximum, x), n, 1.0)
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
    cdef double row_offset = 0.0
    while first < n:
        state = fold_chunk(
            at(x, first), <vec*>NULL, min(length, n - first), False, True, False, row_offset, <vec*>NULL)
        if first == 0:
            total, row_offset = state, state.offset
        else:
            total = merge(total, state, True)
        first += length
    return within_range(total, x)


cdef void log_softmax_row(const vec* x, vec* y, Py_ssize_t n, bint streaming) noexcept nogil:
    cdef State total = fold_row(x, n)
    write_chunk(SUBTRACT, x, y, n, <const vec*>NULL, log_scale_of(total, x), streaming)
