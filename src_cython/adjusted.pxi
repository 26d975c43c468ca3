"""Rows with a mask, or divided by a temperature.

Where rows are not adjacent elements they are collected a chunk at a time, as in gather.pxi; where neighbouring rows lie
side by side, a *panel* of some cache lines of them is turned on its side. A masked element becomes -inf on the way. All
of it is then a matter of contiguous rows, and gives the bits that a row filled with -inf gives.

With a temperature T, a term is exp((x - m) / T) with the maximum m of the whole row: it cannot overflow, however small
T is. The quotient is kept in two parts. Rounded to one, it would be off by half an ULP of itself, which for x / T = 80
in float32 makes 40 ULP of the exponential. x - m and what it rounds off are exact; the quotient is its product with
1 / T, of which there are two parts too. All terms are relative to the same power of two, so that chunks merge exactly.
"""

cdef enum:
    # The logits of a panel take up to this much, and its results as much again: 32 columns of (4096, 4096) float32.
    PANEL_BYTES = 524288
    LINE_BYTES = 64
    MAX_PANEL_LINES = 16


# What makes the quotient of an element: five registers.
cdef enum:
    SHRINK       # a power of two at most 1: products with it do not overflow in the difference
    LARGEST      # the maximum of the row times SHRINK
    GROW         # a power of two at least 1
    INVERSE      # INVERSE + INVERSE_LOW = 1 / (T * SHRINK * GROW)
    INVERSE_LOW
    DIVISOR      # registers


cdef struct Temperature:
    double value
    double shrink
    double grow
    double inverse
    double inverse_low


cdef struct AdjustedCall:
    Function function
    Storage storage
    bint is_single
    bint streaming
    bint is_divided
    bint is_direct  # input and output are rows of adjacent elements of the type that is computed in
    Temperature temperature
    const void* x
    const char* mask  # NULL for none
    void* y
    Dimensions kept
    Dimensions row
    Dimensions mask_kept
    Dimensions mask_row
    Py_ssize_t columns  # of a panel; 1 where rows are taken one by one
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory


cdef struct AdjustedRow:
    const char* x
    const char* mask  # NULL for none
    char* y
    bint is_divided  # by the temperature, which leaves an infinite maximum as it is
    double largest
    Py_ssize_t top  # the index of the first element that is the largest
    double row_offset
    State total
    Scale scale


cdef Temperature temperature_of(double value, bint is_single) noexcept nogil:
    """A temperature as factors in the range of the element type; in float32 it must be within 2**-100 and 2**100."""
    cdef Temperature result
    cdef int exponent, limit = 100 if is_single else 1000
    cdef double t = frexp(value, &exponent), inverse
    cdef int shift = min(max(-exponent, -limit), limit)
    result.value = value
    result.shrink, result.grow = ldexp(1.0, min(shift, 0)), ldexp(1.0, max(shift, 0))
    inverse = 1.0 / t
    result.inverse = <float>inverse if is_single else inverse
    result.inverse_low = (inverse - result.inverse) + fma(-inverse, t, 1.0) / t
    result.inverse = ldexp(result.inverse, -exponent - shift)
    result.inverse_low = ldexp(result.inverse_low, -exponent - shift)
    return result


cdef inline void make_divisor(const Temperature* temperature, double largest, vec* divisor) noexcept nogil:
    divisor[SHRINK], divisor[GROW] = splat(temperature.shrink, divisor), splat(temperature.grow, divisor)
    divisor[LARGEST] = splat(largest * temperature.shrink, divisor)
    divisor[INVERSE] = splat(temperature.inverse, divisor)
    divisor[INVERSE_LOW] = splat(temperature.inverse_low, divisor)


cdef inline void quotients(const vec* x, vec* high, vec* low, int count, const vec* divisor) noexcept nogil:
    """(x - maximum) / T in two parts; the low one may be NaN where the high one is -inf."""
    cdef vec difference, other, error
    # Without fused multiply-adds, what `minus_product` splits would overflow beside the largest numbers.
    cdef vec down = splat(1.0 if HAS_FMA else 2.0**-32, x), up = splat(1.0 if HAS_FMA else 2.0**32, x)
    cdef int j
    for j in range(count):
        high[j] = x[j] * divisor[SHRINK]
        difference = high[j] - divisor[LARGEST]
        other = difference - high[j]
        error = (high[j] - (difference - other)) - (divisor[LARGEST] + other)  # Knuth
        difference, error = difference * divisor[GROW], error * divisor[GROW]
        high[j] = difference * divisor[INVERSE]
        low[j] = times_plus(difference, divisor[INVERSE_LOW], error * divisor[INVERSE]) - up * minus_product(
            high[j] * down, difference * down, divisor[INVERSE])


cdef inline void fold_quotients(
    const vec* x, vec* terms, int count, Py_ssize_t left_out, const vec* divisor, const vec* reference,
    vec* high, vec* low
) noexcept nogil:
    """Add the terms of `count` registers, and give them; one of their elements may be left out of the sum."""
    cdef vec[GROUP] whole, part, residuals
    cdef vec zero = splat(0.0, x), rest
    cdef int j
    quotients(x, whole, part, count, divisor)
    scaled_exp(whole, terms, residuals, count, reference, 0)
    for j in range(count):
        # Below the floor the low part may be as large as anything.
        part[j] = where_at_most(reference[FLOOR], whole[j], part[j], zero)
        rest = times_plus(terms[j], part[j], residuals[j])
        whole[j] = terms[j]
        terms[j] = whole[j] + rest
        residuals[j] = (whole[j] - terms[j]) + rest
        whole[j] = terms[j]
    if 0 <= left_out < count * lanes(x):
        put(whole, left_out, 0.0)
        put(residuals, left_out, 0.0)
    for j in range(count):
        accumulate(high, low, whole[j], residuals[j])


cdef State fold_divided(
    const vec* x, vec* terms, Py_ssize_t n, bint keep, Py_ssize_t left_out, const vec* divisor
) noexcept nogil:
    """The state of a chunk of quotients, whose largest in the row is 0; with `keep`, its terms too.

    Without the element that is left out, it is a state with the maximum apart.
    """
    cdef vec zero = splat(0.0, x), high = zero, low = zero
    cdef vec[REFERENCE] reference
    cdef vec[GROUP] logits, group
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int j, count, distance = lanes(x) // 2
    cdef State state
    # The term of the maximum is where `reference_at` would have it.
    make_reference(zero, splat(by_type(-64.0, -100.0, x), x), reference)
    while i * width < n:
        count = <int>min(<Py_ssize_t>GROUP, (n - i * width + width - 1) // width)
        if (i + GROUP) * width <= n:
            for j in range(GROUP):
                logits[j] = load(x + i + j)
        else:
            for j in range(GROUP):
                logits[j] = load_within(x, i + j, n)
        fold_quotients(logits, group, GROUP, left_out - i * width, divisor, reference, &high, &low)
        if keep:
            for j in range(count):
                store_within(terms, i + j, n, group[j])
        i += GROUP
    while distance:
        accumulate(&high, &low, swap(high, distance), swap(low, distance))
        distance //= 2
    state.maximum = 0.0 if left_out < n else -INFINITY
    state.offset, state.exponent = 0.0, by_type(-64.0, -100.0, x)
    state.high, state.low = lane(high, 0), lane(low, 0)
    return state


cdef void write_divided_logs(const vec* x, vec* y, Py_ssize_t n, const vec* divisor, double log_sum) noexcept nogil:
    """Write log-probabilities of n elements."""
    cdef vec[GROUP] logits, whole, part
    cdef vec zero = splat(0.0, x), log_sums = splat(log_sum, x)
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int j
    while i * width < n:
        for j in range(GROUP):
            logits[j] = load_within(x, i + j, n)
        quotients(logits, whole, part, GROUP, divisor)
        for j in range(GROUP):
            part[j] = is_finite_then(part[j], part[j], zero)
            store_within(y, i + j, n, (whole[j] - log_sums) + part[j])
        i += GROUP


cdef double logsumexp_of_divided(
    State total, double largest, const Temperature* temperature, const vec* like
) noexcept nogil:
    """The quotient of the maximum, which the state does not know, plus the logarithm of the sum."""
    cdef vec log_high, log_low
    cdef double quotient = largest / temperature.value, low, result
    log_sums_of_state(total, like, &log_high, &log_low)
    if fabs(quotient) == INFINITY:
        return quotient + lane(log_high, 0)
    low = fma(-quotient, temperature.value, largest) / temperature.value + lane(log_low, 0)
    result = two_sum_of(quotient, lane(log_high, 0), &low)
    return result + low


cdef Py_ssize_t find_largest(const vec* x, Py_ssize_t n, double largest) noexcept nogil:
    """The index of the first element that is the largest."""
    cdef Py_ssize_t block = GROUP * lanes(x), first = 0
    while first + block < n and lane(largest_lane(lane_maxima(at(x, first), block)), 0) != largest:
        first += block
    while get(x, first) != largest:
        first += 1
    return first


cdef void hide(
    vec* y, const char* mask, const Dimensions* row, Py_ssize_t first, Py_ssize_t n, double fill
) noexcept nogil:
    """Fill the masked ones of n adjacent elements; the strides of the mask are those of the input of `row`."""
    cdef Py_ssize_t offset, unused, run, stride = row.x_stride[row.count - 1], inner = row.size[row.count - 1]
    cdef Py_ssize_t done = 0, i
    while done < n:
        locate(row, first + done, &offset, &unused)
        run = min(inner - (first + done) % inner, n - done)
        if stride == 1:
            hide_adjacent(at(<const vec*>y, done), <vec*>at(<const vec*>y, done), mask + offset, run, fill)
        elif stride != 0 or not mask[offset]:
            for i in range(done, done + run):
                if not mask[offset + (i - done) * stride]:
                    put(y, i, fill)
        done += run


cdef inline void hide_adjacent(const vec* x, vec* y, const char* mask, Py_ssize_t n, double fill) noexcept nogil:
    """Copy n elements, but for the masked ones; x and y may be the same."""
    cdef Py_ssize_t width = lanes(x), i
    cdef vec fills = splat(fill, x)
    for i in range(n // width):
        store(y + i, where_true(mask + i * width, <int>width, load(x + i), fills))
    i = n // width
    store_within(y, i, n, where_true(mask + i * width, <int>(n - i * width), load_within(x, i, n), fills))


cdef inline Py_ssize_t panel_pitch(Py_ssize_t n, const vec* like) noexcept nogil:
    """Elements from one row of a panel to the next: a cache line more than whole registers, lest all rows begin in the
    same set of the cache."""
    cdef Py_ssize_t size = min(n, chunk_length(like)), width = lanes(like)
    return (size + width - 1) // width * width + LINE_BYTES // itemsize(like)


cdef inline Py_ssize_t columns_of_panel(Py_ssize_t n, const vec* like) noexcept nogil:
    cdef Py_ssize_t lines = PANEL_BYTES // (LINE_BYTES * max(min(n, chunk_length(like)), <Py_ssize_t>1))
    return min(max(lines, <Py_ssize_t>1), <Py_ssize_t>MAX_PANEL_LINES) * LINE_BYTES // itemsize(like)


cdef void read_panel(
    const AdjustedCall* call, const AdjustedRow* rows, int n_rows, Py_ssize_t first, Py_ssize_t n, vec* logits,
    Py_ssize_t pitch
) noexcept nogil:
    """Turn n elements of each row of a panel, from `first` on, to rows of adjacent ones, masked ones to -inf."""
    cdef vec[MAX_LANES] turned
    cdef const vec* like = logits
    cdef vec fill = splat(-INFINITY, like)
    cdef int width = lanes(like), size = stored_size(call.storage, like), left, count, i, c
    cdef Py_ssize_t x_stride = call.row.x_stride[0], mask_stride = call.mask_row.x_stride[0], j = 0
    cdef bint masks_columns = call.mask != NULL and call.mask_kept.x_stride[call.kept.count - 1] == 1
    while j < n:
        left = 0
        while left < n_rows:
            count = min(width, n_rows - left)
            for i in range(width):
                turned[i] = fill
                if j + i < n:
                    prefetch(rows.x + (first + j + i + PREFETCH_ROWS) * x_stride + left * size)
                    turned[i] = load_stored(
                        rows.x + (first + j + i) * x_stride + left * size, count, fill, call.storage)
                    if masks_columns:
                        turned[i] = where_true(
                            rows.mask + (first + j + i) * mask_stride + left, count, turned[i], fill)
            transpose(turned)
            for c in range(count):
                store(<vec*>at(<const vec*>logits, (left + c) * pitch + j), turned[c])
            left += width
        j += width
    if call.mask != NULL and not masks_columns:
        for c in range(n_rows):
            hide(<vec*>at(<const vec*>logits, c * pitch), rows[c].mask, &call.mask_row, first, n, -INFINITY)


cdef void write_panel(
    const AdjustedCall* call, const AdjustedRow* rows, int n_rows, Py_ssize_t first, Py_ssize_t n, const vec* results,
    Py_ssize_t pitch
) noexcept nogil:
    """Turn rows of results back to where they belong."""
    cdef vec[MAX_LANES] turned
    cdef int width = lanes(results), size = stored_size(call.storage, results), left, count, i, c
    cdef Py_ssize_t j = 0
    while j < n:
        left = 0
        while left < n_rows:
            count = min(width, n_rows - left)
            for c in range(width):
                turned[c] = load(at(results, (left + min(c, count - 1)) * pitch + j))
            transpose(turned)
            for i in range(<int>min(<Py_ssize_t>width, n - j)):
                store_stored(
                    rows.y + (first + j + i) * call.row.y_stride[0] + left * size, turned[i], count, call.storage)
            left += width
        j += width


cdef inline void collect_rows(
    const AdjustedCall* call, const AdjustedRow* rows, int n_rows, Py_ssize_t first, Py_ssize_t n, vec* logits,
    Py_ssize_t pitch, const vec** sources
) noexcept nogil:
    """Find n adjacent elements of each row, from `first` on: where they are, or a pitch apart in the scratch."""
    cdef vec* target
    cdef int r
    if call.columns > 1:
        read_panel(call, rows, n_rows, first, n, logits, pitch)
    for r in range(n_rows):
        target = <vec*>at(<const vec*>logits, r * pitch)
        sources[r] = target
        if call.columns > 1:
            continue
        if call.is_direct and call.mask == NULL:
            sources[r] = at(<const vec*>rows[r].x, first)
        elif call.is_direct and call.mask_row.x_stride[0] == 1:
            hide_adjacent(at(<const vec*>rows[r].x, first), target, rows[r].mask + first, n, -INFINITY)
        else:
            gather(rows[r].x, &call.row, first, n, target, call.storage)
            if call.mask != NULL:
                hide(target, rows[r].mask, &call.mask_row, first, n, -INFINITY)


cdef inline void deliver_rows(
    const AdjustedCall* call, const AdjustedRow* rows, int n_rows, Py_ssize_t first, Py_ssize_t n, const vec* results,
    Py_ssize_t pitch
) noexcept nogil:
    """Bring n results of each row, from `first` on, to where they belong, if they are not there."""
    cdef int r
    if call.columns > 1:
        write_panel(call, rows, n_rows, first, n, results, pitch)
    elif not call.is_direct:
        for r in range(n_rows):
            scatter(at(results, r * pitch), rows[r].y, &call.row, first, n, call.storage)


cdef inline vec* place_of_results(
    const AdjustedCall* call, const AdjustedRow* row, Py_ssize_t first, const vec* results
) noexcept nogil:
    return <vec*>at(<const vec*>row.y, first) if call.is_direct else <vec*>results


cdef inline void note_largest(AdjustedRow* row, const vec* x, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef double largest = lane(largest_lane(lane_maxima(x, n)), 0)
    if largest > row.largest:
        row.largest = largest
        row.top = first + find_largest(x, n, largest)
        row.is_divided = largest < INFINITY


cdef inline void fold_part(
    const AdjustedCall* call, AdjustedRow* row, const vec* x, vec* terms, Py_ssize_t first, Py_ssize_t n, bint keep
) noexcept nogil:
    cdef vec[DIVISOR] divisor
    cdef bint apart = call.function != SOFTMAX
    cdef State state
    if row.is_divided:
        make_divisor(&call.temperature, row.largest, divisor)
        state = fold_divided(x, terms, n, keep, row.top - first if apart and row.top >= first else n, divisor)
        if not apart:
            state.maximum = 0.0
    else:
        state = fold_chunk(x, terms, n, keep, apart, row.row_offset)
    if first == 0:
        row.total, row.row_offset = state, state.offset
    else:
        row.total = merge(row.total, state, apart)


cdef inline void end_fold(const AdjustedCall* call, AdjustedRow* row, const vec* like) noexcept nogil:
    """Find what finishes a row; write logsumexp, which is all there is."""
    row.total = within_range(row.total, like)
    if call.function == SOFTMAX and is_regular(row.total):
        row.scale = scale_of(row.total, like)
    elif call.function == LOG_SOFTMAX:
        row.scale = log_scale_of(row.total, like)
    elif call.function == LOGSUMEXP and row.is_divided:
        store_stored(
            row.y, splat(logsumexp_of_divided(row.total, row.largest, &call.temperature, like), like), 1, call.storage)
    elif call.function == LOGSUMEXP:
        store_stored(row.y, splat(logsumexp_of_state(row.total, like), like), 1, call.storage)


cdef inline void write_part(
    const AdjustedCall* call, const AdjustedRow* row, const vec* x, const vec* terms, vec* y, Py_ssize_t first,
    Py_ssize_t n
) noexcept nogil:
    """Write n elements of a row, by way of their terms where these wait."""
    cdef vec[DIVISOR] divisor
    cdef vec[REFERENCE] reference
    cdef bint of_softmax = call.function == SOFTMAX
    if row.is_divided:
        make_divisor(&call.temperature, row.largest, divisor)
    if of_softmax and not is_regular(row.total):
        fill_nan(y, n)
    elif of_softmax and row.is_divided:
        if terms == NULL:
            fold_divided(x, y, n, True, n, divisor)
            terms = y
        write_chunk(
            SCALE, terms, y, n, reference,
            scaled(row.scale, exact_power_of_two(by_type(-64.0, -100.0, y) - row.total.exponent)), call.streaming)
    elif of_softmax:
        write_probabilities(x, terms, y, n, row.total, row.total, row.scale, call.streaming)
    elif row.is_divided:
        write_divided_logs(x, y, n, divisor, row.scale.factor_low)
    else:
        write_chunk(SUBTRACT, x, y, n, reference, row.scale, call.streaming)
    if row.mask != NULL and not is_regular_with_top(row.total, of_softmax):
        hide(y, row.mask, &call.mask_row, first, n, 0.0 if of_softmax else -INFINITY)


cdef inline bint is_regular_with_top(State total, bint of_softmax) noexcept nogil:
    """Whether results of -inf are what masked elements should give: no NaN, and a finite maximum."""
    return is_regular(total) if of_softmax else fabs(total.maximum) < INFINITY and total.high == total.high


cdef inline void end_folds(
    const AdjustedCall* call, AdjustedRow* rows, int n_rows, bint of_one_chunk, const vec* like
) noexcept nogil:
    """Find what finishes rows: a row in each lane, if they are of one chunk, as this is a long chain of operations."""
    cdef vec[REFERENCE] reference
    cdef vec[FINISHERS] finishers
    cdef vec high, low, log_high, log_low, zero = splat(0.0, like)
    cdef int width = lanes(like), left = 0, r
    while left < n_rows:
        high = low = zero
        for r in range(left, min(left + width, n_rows)):
            if not (rows[r].is_divided and of_one_chunk) or call.function == LOGSUMEXP:
                end_fold(call, &rows[r], like)
            put(&high, r - left, rows[r].total.high)
            put(&low, r - left, rows[r].total.low)
        if of_one_chunk and call.is_divided and call.function != LOGSUMEXP:
            make_reference(zero, splat(by_type(-64.0, -100.0, like), like), reference)
            if call.function == SOFTMAX:
                normalize(zero, high, low, reference, finishers)
            else:
                log_sums_of(zero, high, low, reference, &log_high, &log_low)
            for r in range(left, min(left + width, n_rows)):
                if rows[r].is_divided and call.function == SOFTMAX:
                    rows[r].scale = scale_in_lane(<const vec*>finishers, r - left)
                elif rows[r].is_divided:
                    rows[r].scale = scale_by(0.0, lane(log_high + log_low, r - left))
        left += width


cdef void run_adjusted_rows(
    const AdjustedCall* call, AdjustedRow* rows, int n_rows, vec* logits, vec* results, const vec** sources
) noexcept nogil:
    """Run a panel, or some rows one after the other."""
    cdef Py_ssize_t n = total_size(&call.row), length = chunk_length(<const vec*>logits), first = 0, size
    cdef Py_ssize_t pitch = panel_pitch(n, <const vec*>logits)
    cdef bint stays = n <= length, waits = stays and call.function == SOFTMAX
    cdef vec* y
    cdef int r
    for r in range(n_rows):
        rows[r].is_divided, rows[r].largest, rows[r].top, rows[r].row_offset = False, -INFINITY, 0, 0.0
    while first < n and call.is_divided:
        size = min(length, n - first)
        collect_rows(call, rows, n_rows, first, size, logits, pitch, sources)
        for r in range(n_rows):
            note_largest(&rows[r], sources[r], first, size)
        first += size
    first = 0
    while first < n:
        size = min(length, n - first)
        if not (stays and call.is_divided):
            collect_rows(call, rows, n_rows, first, size, logits, pitch, sources)
        for r in range(n_rows):
            fold_part(call, &rows[r], sources[r], <vec*>at(<const vec*>results, r * pitch), first, size, waits)
        first += size
    end_folds(call, rows, n_rows, stays, <const vec*>logits)
    first = 0
    while first < n and call.function != LOGSUMEXP:
        size = min(length, n - first)
        if not stays:
            collect_rows(call, rows, n_rows, first, size, logits, pitch, sources)
        for r in range(n_rows):
            y = <vec*>at(<const vec*>results, r * pitch)
            write_part(
                call, &rows[r], sources[r], y if waits else NULL, place_of_results(call, &rows[r], first, y), first,
                size)
        deliver_rows(call, rows, n_rows, first, size, <const vec*>results, pitch)
        first += size


cdef void run_masked_rows(
    const AdjustedCall* call, AdjustedRow* rows, int n_rows, vec* logits, vec* results, const vec** sources
) noexcept nogil:
    """Run rows of up to a chunk that are only masked, by the kernel for batches of rows."""
    cdef Py_ssize_t n = total_size(&call.row), pitch = panel_pitch(n, <const vec*>logits)
    cdef vec* terms[MAX_LANES]
    cdef vec* targets[MAX_LANES]
    cdef bint of_sums = call.function == LOGSUMEXP, streams = call.streaming and call.is_direct
    cdef int left = 0, count, r
    collect_rows(call, rows, n_rows, 0, n, logits, pitch, sources)
    while left < n_rows:
        count = min(n_rows - left, batch_rows(n, <const vec*>logits))
        for r in range(count):
            terms[r] = <vec*>at(<const vec*>results, (left + r) * pitch)
            targets[r] = terms[r] if of_sums else place_of_results(call, &rows[left + r], 0, terms[r])
            if not streams:
                terms[r] = targets[r]
        run_rows(
            sources + left, terms, targets, count, n, call.function, IN_SCRATCH if streams else IN_OUTPUT, streams)
        for r in range(count):
            if of_sums:
                store_stored(rows[left + r].y, splat(get(<const vec*>targets[r], 0), logits), 1, call.storage)
            elif get(<const vec*>targets[r], 0) != get(<const vec*>targets[r], 0):
                # Of a row that is not regular, the first result is NaN, or -inf as is a masked one's logarithm.
                hide(
                    targets[r], rows[left + r].mask, &call.mask_row, 0, n,
                    0.0 if call.function == SOFTMAX else -INFINITY)
        left += count
    if not of_sums:
        deliver_rows(call, rows, n_rows, 0, n, <const vec*>results, pitch)


def panel_columns(Py_ssize_t n, Py_ssize_t size):
    """How many rows of n elements of a size, in bytes, that lie side by side are run together."""
    return columns_of_panel(n, <const f32v*>NULL) if size <= 4 else columns_of_panel(n, <const f64v*>NULL)


def run_adjusted(
    int function, int traversal, bint streaming, int storage, tuple kept, tuple reduced, cnp.ndarray x,
    cnp.ndarray mask, double temperature, cnp.ndarray out, Py_ssize_t n_blocks, int n_threads
):
    """Run a call with a mask or a temperature.

    Parameters
    ----------
    function, traversal, storage : int
        The values of the enumerations, as for `run`; rows are gathered, or run in strips.
    streaming : bool
        Write past the caches, where rows are adjacent elements.
    kept, reduced : tuple of Dimension
        The layout, with the mask for factors.
    x, out : ndarray
        As for `run`.
    mask : ndarray or None
        Of bool: which elements count.
    temperature : double
        Positive and finite; of float32 data within 2**-100 and 2**100.
    n_blocks, n_threads : int
        Into how many equal parts it is cut, and how many threads share them.
    """
    cdef AdjustedCall call
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    call.function, call.storage, call.streaming = <Function>function, <Storage>storage, streaming
    call.is_single, call.n_blocks = cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64, n_blocks
    call.x, call.y, call.mask = cnp.PyArray_DATA(x), cnp.PyArray_DATA(out), NULL
    if mask is not None:
        call.mask = <const char*>cnp.PyArray_DATA(mask)
    call.is_divided, call.temperature = temperature != 1.0, temperature_of(temperature, call.is_single)
    call.kept, call.row = dimensions(kept), dimensions(reduced)
    call.mask_kept, call.mask_row = dimensions_of_factors(kept), dimensions_of_factors(reduced)
    call.is_direct = (
        storage == AS_COMPUTED and traversal == GATHER and call.row.count == 1 and call.row.x_stride[0] == itemsize
        and call.row.y_stride[0] == itemsize)
    call.columns = panel_columns(total_size(&call.row), itemsize) if traversal == STRIPS else 1
    call.lacks_memory = False
    run_in_parts(run_adjusted_block_of_call, &call, &call.first, n_blocks, n_threads)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a softmax row")


cdef void run_adjusted_block_of_call(void* context, Py_ssize_t block) noexcept nogil:
    cdef AdjustedCall* call = <AdjustedCall*>context
    cdef bint has_memory
    if call.is_single:
        has_memory = run_adjusted_block(<const f32v*>call.x, call, call.first + block)
    else:
        has_memory = run_adjusted_block(<const f64v*>call.x, call, call.first + block)
    if not has_memory:
        call.lacks_memory = True


cdef inline void place_rows(const AdjustedCall* call, Py_ssize_t unit, int count, AdjustedRow* rows) noexcept nogil:
    """Set where rows are: `count` that follow each other, from the unit-th on."""
    cdef Py_ssize_t x_offset, y_offset, unused
    cdef int r
    for r in range(count):
        locate(&call.kept, unit + r, &x_offset, &y_offset)
        rows[r].x, rows[r].y, rows[r].mask = <const char*>call.x + x_offset, <char*>call.y + y_offset, NULL
        if call.mask != NULL:
            locate(&call.mask_kept, unit + r, &x_offset, &unused)
            rows[r].mask = call.mask + x_offset


cdef bint run_adjusted_block(const vec* like, const AdjustedCall* call, Py_ssize_t block) noexcept nogil:
    """Run one of the equal parts of a call; False if there is no memory for its scratch."""
    cdef Py_ssize_t n = total_size(&call.row), n_units = total_size(&call.kept), per_run = 1, inner = 1, unit, end
    cdef Py_ssize_t together = call.columns, room, count
    cdef bint in_one_chunk = n <= chunk_length(like)
    if call.columns > 1:
        inner = call.kept.size[call.kept.count - 1]
        per_run = (inner + call.columns - 1) // call.columns
        n_units = n_units // inner * per_run
    elif in_one_chunk:
        together = batch_rows(n, like)
    room = together * panel_pitch(n, like) * itemsize(like)
    cdef void* memory = malloc(2 * room + REGISTER_BYTES)
    cdef AdjustedRow* rows = <AdjustedRow*>malloc(together * sizeof(AdjustedRow))
    cdef const vec** sources = <const vec**>malloc(together * sizeof(vec*))
    if memory == NULL or rows == NULL or sources == NULL:
        free(memory)
        free(rows)
        free(sources)
        return False
    cdef char* scratch = <char*>memory + <Py_ssize_t>(-<uintptr_t>memory % REGISTER_BYTES)
    unit, end = n_units * block // call.n_blocks, n_units * (block + 1) // call.n_blocks
    while unit < end:
        if call.columns > 1:
            count = min(call.columns, inner - unit % per_run * call.columns)
            place_rows(call, unit // per_run * inner + unit % per_run * call.columns, <int>count, rows)
            unit += 1
        else:
            count = min(together, end - unit)
            place_rows(call, unit, <int>count, rows)
            unit += count
        if in_one_chunk and not call.is_divided:
            run_masked_rows(call, rows, <int>count, <vec*>scratch, <vec*>(scratch + room), sources)
        else:
            run_adjusted_rows(call, rows, <int>count, <vec*>scratch, <vec*>(scratch + room), sources)
    if call.streaming:
        stream_fence()
    free(memory)
    free(rows)
    free(sources)
    return True
