"""Rows divided by a temperature.

With a temperature T, a term is exp((x - m) / T) with the maximum m of the whole row: it cannot overflow, however small
T is. The quotient is never rounded: half an ULP of x / T = 80 in float32 would make 40 ULP of the exponential. It is
the reduction of `exp_parts` that is divided: (x - m) * log2(e) / T = k + f with log2(e) / T in two parts, or without a
table (x - m) / T = k * ln(2) + r with r = ((x - m) - k * T * ln(2)) / T and T * ln(2) in two parts. x - m is exact with
what it rounds off. All terms are relative to the same power of two, so that chunks merge exactly.

Logarithms need the quotient itself, which has two parts there. Rows side by side are tiles, as in tiles.pxi: the bits
are those of a row alone here too.
"""

# What divides an element: registers with a value for each lane. T is that of differences times SHRINK and GROW.
cdef enum:
    SHRINK       # a power of two at most 1: products with it do not overflow in the difference
    LARGEST      # the maximum of the row times SHRINK
    GROW         # a power of two at least 1
    INVERSE      # INVERSE + INVERSE_LOW = 1 / T
    INVERSE_LOW
    LOWEST       # differences that lie so far below contribute less than any result can show
    PER_POWER    # PER_POWER + PER_POWER_LOW = log2(e) * powers / T
    PER_POWER_LOW
    ROUNDER      # as the MAGIC of a reference
    POWER_HIGH   # POWER_HIGH + POWER_LOW = T * ln(2), the first short enough for its product with k to be exact
    POWER_LOW
    DIVISOR      # registers


cdef Temperature temperature_of(double value, const vec* like) noexcept nogil:
    """A temperature as factors in the range of the element type; in float32 it must be within 2**-100 and 2**100."""
    cdef Temperature result
    cdef int exponent, limit = <int>by_type(100.0, 1000.0, like)
    cdef double t = frexp(value, &exponent), inverse, inverse_low, power, power_low, per_power, per_power_low
    cdef double digits = by_type(2.0**12, 2.0**38, like)  # of the products with k, 24 and 53, less those of k
    cdef int shift = min(max(-exponent, -limit), limit)
    result.value = value
    result.shrink, result.grow = ldexp(1.0, min(shift, 0)), ldexp(1.0, max(shift, 0))
    inverse = 1.0 / t
    inverse_low = fma(-inverse, t, 1.0) / t
    result.inverse = to_lane(inverse, like)
    result.inverse_low = (inverse - result.inverse) + inverse_low
    per_power = LOG2_E * inverse
    per_power_low = fma(LOG2_E, inverse, -per_power) + (LOG2_E * inverse_low + LOG2_E_REST * inverse)
    result.per_power = to_lane(per_power, like)
    result.per_power_low = (per_power - result.per_power) + per_power_low
    power = t * LN2
    power_low = fma(t, LN2, -power) + t * LN2_REST
    result.power = rint(power * digits) / digits
    result.power_low = (power - result.power) + power_low
    result.inverse = ldexp(result.inverse, -exponent - shift)
    result.inverse_low = ldexp(result.inverse_low, -exponent - shift)
    result.per_power = ldexp(result.per_power, -exponent - shift) * powers(like)
    result.per_power_low = ldexp(result.per_power_low, -exponent - shift) * powers(like)
    result.power = ldexp(result.power, exponent + shift)
    result.power_low = ldexp(result.power_low, exponent + shift)
    result.lowest = ldexp((exponent_of_divided(like) - by_type(125.0, 1021.0, like)) * power, exponent + shift)
    return result


cdef inline void make_divisor(const Temperature* temperature, vec largest, vec* divisor) noexcept nogil:
    divisor[SHRINK], divisor[GROW] = splat(temperature.shrink, divisor), splat(temperature.grow, divisor)
    divisor[LARGEST] = largest * divisor[SHRINK]
    divisor[INVERSE] = splat(temperature.inverse, divisor)
    divisor[INVERSE_LOW] = splat(temperature.inverse_low, divisor)
    divisor[LOWEST] = splat(temperature.lowest, divisor)
    divisor[PER_POWER] = splat(temperature.per_power, divisor)
    divisor[PER_POWER_LOW] = splat(temperature.per_power_low, divisor)
    divisor[ROUNDER] = magic_for(splat(exponent_of_divided(divisor), divisor))
    divisor[POWER_HIGH] = splat(temperature.power, divisor)
    divisor[POWER_LOW] = splat(temperature.power_low, divisor)


cdef inline vec difference_of(vec x, const vec* divisor, vec* error) noexcept nogil:
    """x - maximum, and what it rounds off."""
    cdef vec shrunk = x * divisor[SHRINK], difference = shrunk - divisor[LARGEST], other = difference - shrunk
    error[0] = ((shrunk - (difference - other)) - (divisor[LARGEST] + other)) * divisor[GROW]  # Knuth
    return difference * divisor[GROW]


cdef inline void quotients(const vec* x, vec* high, vec* low, int count, const vec* divisor) noexcept nogil:
    """(x - maximum) / T in two parts; the low one may be NaN where the high one is -inf."""
    cdef vec difference, error
    # Without fused multiply-adds, what `minus_product` splits would overflow beside the largest numbers.
    cdef vec down = splat(1.0 if HAS_FMA else 2.0**-32, x), up = splat(1.0 if HAS_FMA else 2.0**32, x)
    cdef int j
    for j in range(count):
        difference = difference_of(x[j], divisor, &error)
        high[j] = difference * divisor[INVERSE]
        low[j] = times_plus(difference, divisor[INVERSE_LOW], error * divisor[INVERSE]) - up * minus_product(
            high[j] * down, difference * down, divisor[INVERSE])


cdef inline void divided_parts(
    const vec* x, vec* heads, vec* factors, vec* rests, int count, const vec* divisor
) noexcept nogil:
    """`exp_parts` for quotients."""
    cdef vec[GROUP] z, error, magic, k, f, r, r_low, q
    cdef vec one = splat(1.0, x), zero = splat(0.0, x), table_error
    cdef int j
    for j in range(count):
        z[j] = difference_of(x[j], divisor, &error[j])
        # Below the lowest the error may be as large as anything.
        error[j] = where_at_most(divisor[LOWEST], z[j], error[j], zero)
        z[j] = maximum(divisor[LOWEST], z[j])
    for j in range(count):
        magic[j] = z[j] * divisor[PER_POWER] + divisor[ROUNDER]
    for j in range(count):
        k[j] = magic[j] - divisor[ROUNDER]
    if powers(x) > 1:
        for j in range(count):
            f[j] = fused(z[j], divisor[PER_POWER], -k[j])
        for j in range(count):
            f[j] = fused(z[j], divisor[PER_POWER_LOW], f[j])
        for j in range(count):
            r[j] = fused(error[j], divisor[PER_POWER], f[j]) * splat(LN2 / powers(x), x)
        exp_tail(r, q, count)
        for j in range(count):
            heads[j] = times_power(root_of_two(magic[j], &table_error), magic[j])
            factors[j], rests[j] = heads[j], r[j] * r[j] * q[j] + (r[j] + table_error)
        return
    for j in range(count):
        z[j] = z[j] - k[j] * divisor[POWER_HIGH]
    for j in range(count):
        r[j] = z[j] - k[j] * divisor[POWER_LOW]
    for j in range(count):
        # The error may be a few hundred ULP of r: too much to be left to the linear term alone.
        r_low[j] = error[j] + ((z[j] - r[j]) - k[j] * divisor[POWER_LOW])
        r[j] = two_sum(r[j], r_low[j], &error[j])
        z[j] = r[j] * divisor[INVERSE]
        r_low[j] = (r[j] * divisor[INVERSE_LOW] + error[j] * divisor[INVERSE]) - minus_product(
            z[j], r[j], divisor[INVERSE])
        r[j] = z[j]
    exp_tail(r, q, count)
    for j in range(count):
        heads[j] = one + r[j]
        rests[j] = r[j] * r[j] * q[j] + ((r[j] - (heads[j] - one)) + r_low[j])
    for j in range(count):
        factors[j] = times_power(one, magic[j])
        heads[j] = heads[j] * factors[j]


cdef inline void fold_divided_parts(
    const vec* heads, const vec* factors, const vec* rests, vec* terms, int count, bint apart, vec* highs, vec* lows,
    int step
) noexcept nogil:
    """The end of `fold_registers`: add a term to each lane of `count` registers, and give the terms."""
    cdef vec total, seen, lost
    cdef int j
    for j in range(count):
        terms[j] = times_plus(factors[j], rests[j], heads[j])
    for j in range(count):
        total = highs[j * step] + terms[j]
        seen = total - highs[j * step]
        lost = times_plus(factors[j], rests[j], heads[j] - seen)
        if apart:
            lost = lost + (highs[j * step] - (total - seen))
        lows[j * step] = lows[j * step] + lost
        highs[j * step] = total


cdef inline void divided_probabilities(
    vec* v, int count, const vec* divisor, const vec* finishers
) noexcept nogil:
    """Make probabilities of `count` registers of logits, in place, and mend the smallest."""
    cdef vec[GROUP] heads, factors, rests
    cdef vec term, probability
    cdef int j
    divided_parts(v, heads, factors, rests, count, divisor)
    for j in range(count):
        term = times_plus(factors[j], rests[j], heads[j])
        probability = product(term, finishers[FACTOR], finishers[FACTOR_LOW])
        probability = where_at_most(finishers[LIMIT], probability, finishers[SHARE], probability)
        v[j] = mended(probability, term, times_plus(factors[j], rests[j], heads[j] - term), finishers)


cdef inline double exponent_of_divided(const vec* like) noexcept nogil:
    """What terms are relative to: that of the maximum is where `reference_at` would have it."""
    return by_type(-64.0, -100.0, like)


cdef inline void make_divided_reference(vec* reference) noexcept nogil:
    make_reference(splat(0.0, reference), splat(exponent_of_divided(reference), reference), reference)


cdef inline vec quotient_of(vec largest) noexcept nogil:
    """The quotient of the maximum, to which quotients are relative: 0, unless it is infinite."""
    return is_finite_then(largest, splat(0.0, &largest), largest)


cdef inline void divided_logs(const vec* x, vec* logs, int count, const vec* divisor, vec log_sums) noexcept nogil:
    """The log-probabilities of `count` registers."""
    cdef vec[GROUP] whole, part
    cdef vec zero = splat(0.0, x)
    cdef int j
    quotients(x, whole, part, count, divisor)
    for j in range(count):
        logs[j] = (whole[j] - log_sums) + is_finite_then(part[j], part[j], zero)


cdef inline double logsumexp_of_divided(
    double largest, double log_high, double log_low, const Temperature* temperature
) noexcept nogil:
    """The quotient of the maximum plus the logarithm of the sum, which is relative to it."""
    cdef double quotient = largest / temperature.value, low, result
    if fabs(quotient) == INFINITY:
        return quotient + log_high
    low = fma(-quotient, temperature.value, largest) / temperature.value + log_low
    result = two_sum_of(quotient, log_high, &low)
    return result + low


# A row of adjacent elements


cdef inline void fold_divided_elements(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, bint apart, Py_ssize_t left_out, const vec* divisor, vec* high,
    vec* low
) noexcept nogil:
    """The sums of the lanes over a chunk, with its terms if they are kept; or apart, but for an element."""
    cdef vec zero = splat(0.0, x)
    cdef Py_ssize_t block = GROUP * lanes(x), i = 0
    high[0] = low[0] = zero
    if not apart:
        high[0] = sum_base(n, x)
    while i + block <= n:
        if keep:
            fold_divided_group(
                at(x, i), <vec*>at(<const vec*>terms, i), block, True, True, False, -1, divisor, high, low)
        elif not apart:
            fold_divided_group(at(x, i), <vec*>NULL, block, True, False, False, -1, divisor, high, low)
        elif i <= left_out < i + block:
            fold_divided_group(at(x, i), <vec*>NULL, block, True, False, True, left_out - i, divisor, high, low)
        else:
            fold_divided_group(at(x, i), <vec*>NULL, block, True, False, True, -1, divisor, high, low)
        i += block
    if i < n and keep:
        fold_divided_group(
            at(x, i), <vec*>at(<const vec*>terms, i), n - i, False, True, False, -1, divisor, high, low)
    elif i < n and not apart:
        fold_divided_group(at(x, i), <vec*>NULL, n - i, False, False, False, -1, divisor, high, low)
    elif i < n:
        fold_divided_group(at(x, i), <vec*>NULL, n - i, False, False, True, left_out - i, divisor, high, low)
    if not apart:
        high[0] = high[0] - sum_base(n, x)


cdef inline void fold_divided_group(
    const vec* x, vec* terms, Py_ssize_t n, bint is_whole, bint keep, bint apart, Py_ssize_t left_out, const vec* divisor,
    vec* high, vec* low
) noexcept nogil:
    """Fold a group of registers with n elements; one of them may be left out."""
    cdef vec[GROUP] logits, heads, factors, rests, group
    cdef int j
    for j in range(GROUP):
        logits[j] = load(x + j) if is_whole else load_within(x, j, n)
    divided_parts(logits, heads, factors, rests, GROUP, divisor)
    if 0 <= left_out < GROUP * lanes(x):
        put(heads, left_out, 0.0)
        put(factors, left_out, 0.0)
    fold_divided_parts(heads, factors, rests, group, GROUP, apart, high, low, 0)
    for j in range(GROUP):
        if keep and is_whole:
            store(terms + j, group[j])
        elif keep:
            store_within(terms, j, n, group[j])


cdef State fold_divided(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, Py_ssize_t left_out, const vec* divisor
) noexcept nogil:
    """The state of a chunk of quotients, whose largest in the row is 0; with `keep`, its terms too.

    Without the element that is left out, it is a state with the maximum apart.
    """
    cdef vec high, low
    cdef int distance = lanes(x) // 2
    fold_divided_elements(x, terms, n, keep, not keep, left_out, divisor, &high, &low)
    while distance:
        accumulate(&high, &low, swap(high, distance), swap(low, distance))
        distance //= 2
    return divided_state(lane(high, 0), lane(low, 0), left_out < n, x)


cdef inline State divided_state(double high, double low, bint has_maximum, const vec* like) noexcept nogil:
    """The state of a chunk, which may have the maximum of the row."""
    cdef State state
    state.maximum = 0.0 if has_maximum else -INFINITY
    state.offset, state.exponent = 0.0, exponent_of_divided(like)
    state.high, state.low = high, low
    return state


cdef void write_divided_logs(const vec* x, vec* y, Py_ssize_t n, const vec* divisor, double log_sum) noexcept nogil:
    """Write log-probabilities of n elements."""
    cdef vec[GROUP] logits
    cdef vec log_sums = splat(log_sum, x)
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int j
    while i * width < n:
        for j in range(GROUP):
            logits[j] = load_within(x, i + j, n)
        divided_logs(logits, logits, GROUP, divisor, log_sums)
        for j in range(GROUP):
            store_within(y, i + j, n, logits[j])
        i += GROUP


cdef void write_divided_probabilities(
    const vec* x, vec* y, Py_ssize_t n, const vec* divisor, Scale scale
) noexcept nogil:
    """Write probabilities of n elements, some of which are to be mended."""
    cdef vec[FINISHERS] finishers
    cdef vec[GROUP] v
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int j
    spread_scale(scale, finishers)
    while i * width < n:
        for j in range(GROUP):
            v[j] = load_within(x, i + j, n)
        divided_probabilities(v, GROUP, divisor, finishers)
        for j in range(GROUP):
            store_within(y, i + j, n, v[j])
        i += GROUP


cdef Py_ssize_t find_largest(const vec* x, Py_ssize_t n, double largest) noexcept nogil:
    """The index of the first element that is the largest."""
    cdef Py_ssize_t block = GROUP * lanes(x), first = 0
    while first + block < n and lane(largest_lane(lane_maxima(at(x, first), block)), 0) != largest:
        first += block
    while get(x, first) != largest:
        first += 1
    return first


# Several such rows, each of one chunk


cdef void run_divided_rows(
    const vec** x, vec** terms, vec** y, int n_rows, Py_ssize_t n, Function function, const Temperature* temperature,
    bint streaming
) noexcept nogil:
    """`run_rows` for rows divided by a temperature; for softmax, terms wait in `terms`."""
    cdef vec[MAX_LANES] tops, smallest, highs, lows
    cdef vec[REFERENCE] reference
    cdef vec[FINISHERS] finishers
    cdef vec[DIVISOR] divisor
    cdef bint[MAX_LANES] is_mended
    cdef vec zero = splat(0.0, reference), largest, log_high, log_low, log_sums
    cdef bint apart = function != SOFTMAX
    cdef double top
    cdef int row
    make_divided_reference(reference)
    for row in range(lanes(<const vec*>reference)):
        tops[row] = lane_extremes(x[row], n, &smallest[row]) if row < n_rows else zero
        highs[row] = lows[row] = zero
        is_mended[row] = False
    transpose(tops)
    largest = tops[0]
    for row in range(1, lanes(<const vec*>reference)):
        largest = maximum(largest, tops[row])
    if not apart:
        find_to_mend(x, n_rows, n, <const vec*>smallest, &largest, temperature.value, is_mended)
    for row in range(n_rows):
        top = get(&largest, row)
        make_divisor(temperature, splat(top, reference), divisor)
        fold_divided_elements(
            x[row], terms[row], n, not apart and not is_mended[row], apart,
            find_largest(x[row], n, top) if apart and fabs(top) < INFINITY else n,
            divisor, &highs[row], &lows[row])
    transpose(highs)
    transpose(lows)
    merge_lanes(<const vec*>NULL, largest, lanes(<const vec*>reference), False, reference, highs, lows)
    for row in range(n_rows):
        if fabs(get(&largest, row)) == INFINITY:
            put_sum(highs, lows, row, infinite_state(get(&largest, row), has_nan(x[row], n), apart))
    if apart:
        log_sums_of(quotient_of(largest), highs[0], lows[0], reference, &log_high, &log_low)
    else:
        normalize_rows(quotient_of(largest), highs[0], lows[0], reference, finishers)
    for row in range(n_rows):
        if is_mended[row]:
            make_divisor(temperature, splat(get(&largest, row), reference), divisor)
            write_divided_probabilities(x[row], y[row], n, divisor, scale_in_lane(<const vec*>finishers, row))
        elif function == SOFTMAX:
            write_chunk(
                SCALE, terms[row], y[row], n, reference, scale_in_lane(<const vec*>finishers, row), streaming)
        elif function == LOG_SOFTMAX:
            make_divisor(temperature, splat(get(&largest, row), reference), divisor)
            log_sums = log_high + log_low
            write_divided_logs(x[row], y[row], n, divisor, get(&log_sums, row))
        else:
            put(
                y[row], 0,
                logsumexp_of_divided(get(&largest, row), get(&log_high, row), get(&log_low, row), temperature))


# Tiles


cdef inline vec first_places(const vec* tile, Py_ssize_t n, vec largest) noexcept nogil:
    """Where each row of a tile has its maximum first; n where it has not."""
    cdef vec places = splat(n, tile)
    cdef Py_ssize_t element
    for element in range(n - 1, -1, -1):
        places = where_at_most(largest, tile[element], splat(element, tile), places)
    return places


cdef void fold_divided_tile(
    vec* tile, Py_ssize_t n, bint keep, bint apart, vec left_out, const vec* divisor, vec* high, vec* low
) noexcept nogil:
    """The sums of the rows of a tile, apart but for an element of each; with `keep`, terms take the place of the elements."""
    cdef vec[MAX_LANES] highs, lows
    cdef int n_lanes = lanes_with_elements(n, divisor), l = 0
    while l + TOGETHER <= n_lanes:
        if keep:
            fold_divided_lanes(tile, l, TOGETHER, n, True, False, left_out, divisor, highs + l, lows + l)
        else:
            fold_divided_lanes(tile, l, TOGETHER, n, False, apart, left_out, divisor, highs + l, lows + l)
        l += TOGETHER
    while l < n_lanes:
        fold_divided_lanes(tile, l, 1, n, keep, apart, left_out, divisor, highs + l, lows + l)
        l += 1
    merge_lanes(<const vec*>NULL, left_out, n_lanes, False, <const vec*>NULL, highs, lows)
    high[0], low[0] = highs[0], lows[0]


cdef inline void fold_divided_lanes(
    vec* tile, int first, int count, Py_ssize_t n, bint keep, bint apart, vec left_out, const vec* divisor, vec* highs,
    vec* lows
) noexcept nogil:
    cdef vec base = splat(0.0, divisor) if apart else sum_base(n, divisor)
    cdef Py_ssize_t element = first
    cdef int j
    for j in range(count):
        highs[j], lows[j] = base, splat(0.0, divisor)
    while element + count <= n:
        fold_divided_registers(tile, element, count, keep, apart, left_out, divisor, highs, lows)
        element += lanes(divisor)
    for j in range(count):
        if element + j < n:  # in the last row of lanes, which is shorter
            fold_divided_registers(tile, element + j, 1, keep, apart, left_out, divisor, highs + j, lows + j)
        highs[j] = highs[j] - base


cdef inline void fold_divided_registers(
    vec* tile, Py_ssize_t element, int count, bint keep, bint apart, vec left_out, const vec* divisor, vec* highs, vec* lows
) noexcept nogil:
    cdef vec[TOGETHER] heads, factors, rests, terms
    cdef int j
    divided_parts(tile + element, heads, factors, rests, count, divisor)
    for j in range(count):
        if apart:
            heads[j] = where_nonzero(left_out - splat(element + j, divisor), heads[j])
            factors[j] = where_nonzero(left_out - splat(element + j, divisor), factors[j])
    fold_divided_parts(heads, factors, rests, terms, count, apart, highs, lows, 1)
    for j in range(count):
        if keep:
            tile[element + j] = terms[j]


cdef void reduce_divided_tiles(
    vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Function function,
    const Temperature* temperature, const vec* smallest, const vec* all_largest, vec* finishers, vec* y
) noexcept nogil:
    """`reduce_tiles` for rows divided by a temperature; logits become log-probabilities here, or mended probabilities."""
    cdef vec[DIVISOR] divisor
    cdef vec[REFERENCE] reference
    cdef vec zero = splat(0.0, tiles), largest, quotient, high, low, log_high, log_low
    cdef vec* tile
    cdef Py_ssize_t element
    cdef bint apart = function != SOFTMAX, is_mended
    cdef int t, row
    make_divided_reference(reference)
    for t in range(columns.n_tiles):
        tile = tiles + t * tile_size
        largest = all_largest[t]
        quotient = quotient_of(largest)
        make_divisor(temperature, largest, divisor)
        is_mended = not apart and any_tile_to_mend(
            <const vec*>tile, n, 1, n, False, smallest + t, &largest, temperature.value)
        if apart:
            fold_divided_tile(tile, n, False, True, first_places(tile, n, largest), divisor, &high, &low)
        else:
            fold_divided_tile(tile, n, not is_mended, False, zero, divisor, &high, &low)
        if has_infinite_lane(largest):
            for row in range(columns.count[t]):
                if fabs(get(&largest, row)) == INFINITY:
                    put_sum(
                        &high, &low, row,
                        infinite_state(get(&largest, row), row_of_tile_has_nan(tile, n, row), apart))
        if function == SOFTMAX:
            normalize_rows(quotient, high, low, reference, finishers + t * FINISHERS)
            if is_mended:
                finish_divided_tile(tile, n, divisor, finishers + t * FINISHERS)
                make_unit_finishers(finishers + t * FINISHERS)
            continue
        log_sums_of(quotient, high, low, reference, &log_high, &log_low)
        if function == LOGSUMEXP:
            for row in range(columns.count[t]):
                put(
                    y + t, row,
                    logsumexp_of_divided(get(&largest, row), get(&log_high, row), get(&log_low, row), temperature))
            continue
        for element in range(n):
            divided_logs(tile + element, tile + element, 1, divisor, log_high + log_low)
        finishers[t * FINISHERS + FACTOR] = finishers[t * FINISHERS + FACTOR_LOW] = zero


cdef void finish_divided_tile(vec* tile, Py_ssize_t n, const vec* divisor, const vec* finishers) noexcept nogil:
    """Make probabilities of the logits of a tile, and mend the smallest."""
    cdef Py_ssize_t element
    for element in range(n):
        divided_probabilities(tile + element, 1, divisor, finishers)


cdef inline void make_unit_finishers(vec* finishers) noexcept nogil:
    """What leaves finished elements as they are."""
    finishers[FACTOR], finishers[FACTOR_LOW] = splat(1.0, finishers), splat(0.0, finishers)
    finishers[LIMIT], finishers[SHARE] = splat(INFINITY, finishers), splat(0.0, finishers)


cdef void run_long_divided_strip(
    const StripSource* source, void* y, Py_ssize_t y_stride, const Columns* columns, Py_ssize_t n, const Job* job,
    vec* tiles, vec* log_sums
) noexcept nogil:
    """`run_long_strip` for rows divided by a temperature: one pass more, for the maxima."""
    cdef const vec* like = tiles
    cdef Py_ssize_t length = chunk_length(like), tile_size = tile_registers(n, like), first = 0, size, element
    cdef State[MAX_TILES * MAX_LANES] totals
    cdef vec[FINISHERS * MAX_TILES] finishers, units
    cdef vec[DIVISOR] divisor
    cdef vec[MAX_TILES] smallest, largest, is_left, tops, bottoms
    cdef vec zero = splat(0.0, like), places, high, low
    cdef bint apart = job.function != SOFTMAX, is_mended = False
    cdef const vec* own = finishers
    cdef int t, row, i
    cdef vec* tile
    for t in range(columns.n_tiles):
        smallest[t], largest[t], is_left[t] = splat(INFINITY, like), splat(-INFINITY, like), splat(1.0, like)
        make_unit_finishers(units + t * FINISHERS)
        for row in range(columns.count[t]):
            totals[t * MAX_LANES + row] = identity()
        for i in range(FINISHERS):
            finishers[t * FINISHERS + i] = zero
    while first < n:
        size = min(length, n - first)
        copy_strip(source, first, columns, size, tiles, tile_size, bottoms, tops)
        for t in range(columns.n_tiles):
            largest[t] = maximum(tops[t], largest[t])
            smallest[t] = minimum(smallest[t], counted_smallest(
                <const vec*>tiles + t * tile_size, size * lanes(like), bottoms[t], largest[t],
                job.adjusted.temperature.value))
        first += size
    first = 0
    while first < n:
        size = min(length, n - first)
        copy_strip(source, first, columns, size, tiles, tile_size, bottoms, tops)
        for t in range(columns.n_tiles):
            tile = tiles + t * tile_size
            places = splat(size, like)
            if apart:
                places = first_places(tile, size, largest[t])
                places = where_at_most(is_left[t], zero, splat(size, like), places)
                is_left[t] = where_at_most(splat(size, like), places, is_left[t], zero)
            make_divisor(&job.adjusted.temperature, largest[t], divisor)
            fold_divided_tile(tile, size, False, True, places, divisor, &high, &low)
            for row in range(columns.count[t]):
                merge_divided(
                    &totals[t * MAX_LANES + row], get(&largest[t], row), get(&high, row), get(&low, row),
                    not apart or get(&places, row) < size, row_of_tile_has_nan_at(tile, size, row, largest[t]), apart,
                    like)
        first += size
    for t in range(columns.n_tiles):
        is_mended = is_mended or not apart and is_below_mended(
            smallest[t], largest[t], n, job.adjusted.temperature.value)
        for row in range(columns.count[t]):
            put_divided_finish(
                within_range(totals[t * MAX_LANES + row], like), get(&largest[t], row), job.function,
                &job.adjusted.temperature, row, finishers + t * FINISHERS, log_sums + t)
    if is_mended:
        own = units
    first = 0
    while first < n and job.function != LOGSUMEXP:
        size = min(length, n - first)
        copy_strip(source, first, columns, size, tiles, tile_size, bottoms, tops)
        for t in range(columns.n_tiles):
            tile = tiles + t * tile_size
            make_divisor(&job.adjusted.temperature, largest[t], divisor)
            if is_mended:
                finish_divided_tile(tile, size, divisor, finishers + t * FINISHERS)
                continue
            if not apart:
                fold_divided_tile(tile, size, True, False, zero, divisor, &high, &low)
                continue
            for element in range(size):
                divided_logs(tile + element, tile + element, 1, divisor, log_sums[t])
        finish_tiles(
            <const vec*>tiles, tile_size, columns, size, job.function, False, False, <const vec*>NULL,
            own, <char*>y + first * y_stride, y_stride, job.streaming, job.storage)
        first += size


cdef inline bint row_of_tile_has_nan_at(const vec* tile, Py_ssize_t n, int row, vec largest) noexcept nogil:
    """Whether a row whose maximum is infinite has a NaN; of others the sum tells."""
    return fabs(get(&largest, row)) == INFINITY and row_of_tile_has_nan(tile, n, row)


cdef inline void merge_divided(
    State* total, double largest, double high, double low, bint has_maximum, bint has_nan, bint apart, const vec* like
) noexcept nogil:
    """Merge the state of a chunk, whose row has this maximum, into that of the row."""
    if fabs(largest) == INFINITY:
        total[0] = infinite_state(largest, has_nan or total.high != total.high, apart)
    else:
        total[0] = merge(total[0], divided_state(high, low, has_maximum, like), apart)


cdef inline void put_divided_finish(
    State total, double largest, Function function, const Temperature* temperature, int row, vec* finishers,
    vec* log_sums
) noexcept nogil:
    """Set what the last pass needs to write one row of a tile; for logsumexp, its result."""
    cdef const vec* like = finishers
    cdef vec log_high, log_low
    if function == SOFTMAX:
        put_scale(finishers, row, scale_of_divided(total, like))
        return
    log_sums_of_state(total, like, &log_high, &log_low)
    if function == LOGSUMEXP:
        put(log_sums, row, logsumexp_of_divided(largest, lane(log_high, 0), lane(log_low, 0), temperature))
    else:
        put(log_sums, row, lane(log_high + log_low, 0))


cdef inline Scale scale_of_divided(State total, const vec* like) noexcept nogil:
    """What makes probabilities of terms relative to the exponent that they have in a chunk."""
    if not is_regular(total):
        return scale_by(INFINITY - INFINITY, 0.0)
    return scaled(scale_of(total, like), exact_power_of_two(exponent_of_divided(like) - total.exponent))
