"""Random draws from the softmax of each row, by the inverse of its cumulative distribution: one uniform for each draw.

A row is read once for the sums of its chunks. A draw falls into one of them, then into a block of it, then on an
element: only the chunk is read again. At each level the target is a share of a sum in float64 that was added up in the
order in which it is searched, so that no rounding moves a draw to an element that has no probability.

Where only the most probable elements count (top-k, top-p), they are selected in the first pass, and drawn from as one
level, in the order of their indices. For top-p these are a guess, enough for the peaked rows of language models. In
others, elements are counted by how far they are below the maximum, which tells how many are needed, and collected.
"""

cdef enum:
    BLOCK = 64  # elements
    MAX_BLOCKS = CHUNK_BYTES // 4 // BLOCK
    FIRST_CANDIDATES = 64  # of top-p alone, which may need more
    # Distances from the maximum, in steps of 1 / 32: what is 64 below it has no share that can be seen.
    LEVELS = 2048
    LEVELS_PER_UNIT = 32

cdef struct Sampling:
    Rows rows
    Py_ssize_t top_k  # 0 for all
    double top_p
    Py_ssize_t n_draws
    double* uniforms  # n_draws for each row, in the order of the axes; they are used as scratch
    int64_t* indices  # -1 where a row has no probabilities
    bint is_single
    Py_ssize_t first  # block of the part of the call that runs now
    Py_ssize_t n_blocks
    bint lacks_memory

cdef struct Workspace:  # of one thread
    void* chunks  # a band
    void* terms  # a chunk
    double* element_sums  # as many as a chunk has elements
    State* states  # one for each chunk of a band
    double* chunk_sums  # one for each chunk of a row
    int64_t* lists  # for each chunk of each row of a band, the first draw from it; -1 for none
    Candidate* candidates  # for a band


def run_sampling(
    int traversal, int storage, tuple kept, tuple reduced, cnp.ndarray x, cnp.ndarray uniforms, cnp.ndarray indices,
    double temperature, Py_ssize_t top_k, double top_p, Py_ssize_t n_blocks, int n_threads
):
    """Run a call.

    Parameters
    ----------
    traversal, storage, kept, reduced, x, n_blocks, n_threads
        As for `run`; the kept dimensions are in the order of the axes.
    uniforms, indices : ndarray
        float64 from 0 to below 1, which are overwritten, and int64; contiguous, as many for each row.
    temperature, top_k, top_p
        Those of `fastsoftmax.sample`; top_k is 0 for all, top_p 1.
    """
    cdef Sampling call
    call.rows = rows_of(traversal, storage, kept, reduced, x, None)
    call.rows.divisor, call.top_k, call.top_p, call.n_draws = temperature, top_k, top_p, uniforms.shape[1]
    call.uniforms, call.indices = <double*>data_of(uniforms), <int64_t*>data_of(indices)
    call.is_single, call.n_blocks, call.lacks_memory = cnp.PyArray_TYPE(x) != cnp.NPY_FLOAT64, n_blocks, False
    if traversal in (TILES, STRIPS):
        run_sink(SAMPLE, &call, n_candidates(&call), traversal, storage, kept, reduced, x, n_blocks, n_threads)
        return
    run_in_parts(run_sampling_block, &call, &call.first, n_blocks, n_threads)
    if call.lacks_memory:
        raise MemoryError("no memory for the scratch of a row")


cdef void run_sampling_block(void* context, Py_ssize_t block) noexcept nogil:
    cdef Sampling* call = <Sampling*>context
    if call.is_single:
        sample_bands(call, call.first + block, <const f32v*>NULL)
    else:
        sample_bands(call, call.first + block, <const f64v*>NULL)


cdef void sample_bands(Sampling* call, Py_ssize_t block, const vec* like) noexcept nogil:
    cdef Py_ssize_t n_bands = count_bands(&call.rows, like), n_chunks = count_chunks(&call.rows, like), index
    cdef Py_ssize_t n_together = narrow_strip_columns(like) if call.rows.traversal == BANDS else 1
    cdef Py_ssize_t room = band_bytes(&call.rows, like)
    cdef char* memory = <char*>malloc(room + CHUNK_BYTES + REGISTER_BYTES)
    cdef Workspace work
    work.element_sums = <double*>malloc(chunk_length(like) * sizeof(double))
    work.states = <State*>malloc(n_chunks * n_together * sizeof(State))
    work.chunk_sums = <double*>malloc(n_chunks * sizeof(double))
    work.lists = <int64_t*>malloc(n_chunks * n_together * sizeof(int64_t))
    work.candidates = <Candidate*>malloc(
        (room_for(n_candidates(call), call.rows.n) * n_together + 1) * sizeof(Candidate))
    if (memory == NULL or work.element_sums == NULL or work.states == NULL or work.chunk_sums == NULL
            or work.lists == NULL or work.candidates == NULL):
        call.lacks_memory = True
    else:
        work.chunks = memory + <Py_ssize_t>(-<uintptr_t>memory % REGISTER_BYTES)
        work.terms = <char*>work.chunks + room
        for index in range(n_bands * block // call.n_blocks, n_bands * (block + 1) // call.n_blocks):
            sample_band(call, index, &work, like)
    free(memory)
    free(work.element_sums)
    free(work.states)
    free(work.chunk_sums)
    free(work.lists)
    free(work.candidates)


cdef inline Py_ssize_t n_candidates(const Sampling* call) noexcept nogil:
    """How many elements of a row are selected at first."""
    if call.top_k:
        return call.top_k
    return min(call.rows.n, <Py_ssize_t>FIRST_CANDIDATES) if call.top_p < 1.0 else 0


cdef void sample_band(Sampling* call, Py_ssize_t index, Workspace* work, const vec* like) noexcept nogil:
    cdef Band band = band_at(&call.rows, index, like)
    cdef Py_ssize_t n_chunks = count_chunks(&call.rows, like), k = n_candidates(call)
    cdef State[MAX_NARROW_COLUMNS] totals
    cdef Best[MAX_NARROW_COLUMNS] bests
    cdef int row
    for row in range(band.count):
        totals[row] = identity()
        bests[row] = best_of_none(work.candidates + row * room_for(k, call.rows.n), k, call.rows.n)
    fold_band(
        &call.rows, &band, False, totals, <vec*>work.chunks, bests if k else NULL, NULL if k else work.states)
    for row in range(band.count):
        if not is_regular(totals[row]):
            mark_faulty(call, band.row + row)
            if not k:
                put_lists(work.lists + row * n_chunks, n_chunks)
        elif k:
            draw_from_best(call, &band, row, totals[row], bests[row], work, like)
        else:
            put_lists(work.lists + row * n_chunks, n_chunks)
            draw_chunks(call, band.row + row, row, band.count, n_chunks, totals[row], work)
    if not k:
        draw_elements(call, &band, n_chunks, work, like)


cdef void sample_from_tiles(
    vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Upcoming* upcoming, Sampling* call,
    Py_ssize_t first_row, vec* smallest, vec* largest, vec* room
) noexcept nogil:
    """`sample_band` for rows of up to a chunk: by their terms, or by what is selected if nothing else may be drawn.

    `room` is that of `room_for_sink`.
    """
    cdef vec[MAX_TILES] row_offsets, high, low
    cdef vec[REFERENCE * MAX_TILES] references
    cdef vec exponent, divisor = splat(call.rows.divisor, tiles)
    cdef Py_ssize_t k = n_candidates(call), spacing = n * itemsize(<const vec*>tiles), element
    cdef Candidate[SMALL] candidates
    cdef double chunk_sum
    cdef int64_t draw
    cdef State total
    cdef Workspace work
    cdef Best best
    cdef Band band
    cdef int t, row
    work.states, work.chunk_sums, work.lists = &total, &chunk_sum, &draw
    work.element_sums = <double*>(room + n)
    band.count = 1
    for t in range(columns.n_tiles):
        row_offsets[t] = splat(0.0, tiles)
        if call.rows.divisor != 1.0:  # rounded quotients are in the order of what is divided
            smallest[t], largest[t] = smallest[t] / divisor, largest[t] / divisor
        for element in range(n if call.rows.divisor != 1.0 else 0):
            tiles[t * tile_size + element] = tiles[t * tile_size + element] / divisor
        if k:
            select_from_tile(tiles + t * tile_size, n, k, room + 2 * k * t, room + 2 * k * t + k)
    fold_tiles(
        tiles, tile_size, columns, n, upcoming, True, False, False, False, row_offsets, smallest, references,
        largest, high, low)
    for t in range(columns.n_tiles):
        exponent = exponent_of(references + t * REFERENCE)
        if not k:
            turn(
                tiles + t * tile_size, REGISTER_BYTES, n, columns.count[t], room, spacing, AS_COMPUTED, AS_COMPUTED,
                <const vec*>tiles)
        for row in range(columns.count[t]):
            band.row = first_row + columns.first[t] + row
            total = state_in_lane(row, references + t * REFERENCE, &exponent, largest + t, high + t, low + t)
            if not is_regular(total):
                mark_faulty(call, band.row)
            elif k:
                best = best_of_none(candidates, k, n)
                best.count = k
                for element in range(k):
                    candidates[element].value = get(room + 2 * k * t + element, row)
                    candidates[element].index = <int64_t>get(room + 2 * k * t + k + element, row)
                draw_from_best(call, &band, 0, total, best, &work, <const vec*>tiles)
            else:
                draw = -1
                draw_chunks(call, band.row, 0, 1, 1, total, &work)
                draw_from_terms(call, band.row, draw, below(<const vec*>room, row, spacing), n, 0, &work)


cdef inline void mark_faulty(Sampling* call, Py_ssize_t row) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(call.n_draws):
        call.indices[row * call.n_draws + i] = -1


cdef inline void put_lists(int64_t* lists, Py_ssize_t n_chunks) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n_chunks):
        lists[i] = -1


cdef inline Py_ssize_t pick(const double* sums, Py_ssize_t n, double share, double* rest) noexcept nogil:
    """The first of n cumulative sums that is above a share of the last one, and at what share of its summand that is.

    One that adds nothing is never the first.
    """
    cdef double total = sums[n - 1], target = share * total, before
    cdef Py_ssize_t low = 0, high = n - 1, middle
    if target >= total:  # rounded up
        target = total * (1.0 - 2.0**-53)
    if n <= BLOCK:  # without branches that nothing foretells: (100000, 10) float32 take 4.2 ms, and took 8.3
        for middle in range(n - 1):
            low += sums[middle] <= target
        high = low
    while low < high:
        middle = (low + high) // 2
        if sums[middle] > target:
            high = middle
        else:
            low = middle + 1
    before = sums[low - 1] if low else 0.0
    rest[0] = (target - before) / (sums[low] - before)
    return low


cdef void draw_chunks(
    Sampling* call, Py_ssize_t row, int row_of_states, int n_together, Py_ssize_t n_chunks, State total,
    Workspace* work
) noexcept nogil:
    """Find the chunk of each draw of a row, and chain up those of the same one: each has the next in its place."""
    cdef int64_t* draws = call.indices + row * call.n_draws
    cdef double* shares = call.uniforms + row * call.n_draws
    cdef int64_t* lists = work.lists + row_of_states * n_chunks
    cdef double sum = 0.0
    cdef State state
    cdef Py_ssize_t i, chunk
    for i in range(n_chunks):
        state = work.states[i * n_together + row_of_states]
        if state.maximum > -INFINITY:
            sum += sum_at(state, total.offset, total.exponent)
        work.chunk_sums[i] = sum
    for i in range(call.n_draws):
        chunk = pick(work.chunk_sums, n_chunks, shares[i], &shares[i])
        draws[i], lists[chunk] = lists[chunk], i


cdef inline double sum_at(State state, double offset, double exponent) noexcept nogil:
    """The sum of a state relative to another offset and exponent."""
    cdef double p, p_low, k
    if state.offset == offset and state.exponent == exponent:  # as in a row of one chunk
        return state.high + state.low
    p = exp_split(state.offset - offset, &p_low, &k)
    return ldexp((state.high + state.low) * (p + p_low), <int>max(k + state.exponent - exponent, -5000.0))


cdef void draw_elements(
    Sampling* call, const Band* band, Py_ssize_t n_chunks, Workspace* work, const vec* like
) noexcept nogil:
    """Find the element of each draw, in the chunk that it is known to be in."""
    cdef Py_ssize_t length = chunk_length(like), chunk, size
    cdef const vec* chunks
    cdef bint is_read
    cdef int row
    for chunk in range(n_chunks):
        is_read = False
        size = min(length, call.rows.n - chunk * length)
        for row in range(band.count):
            if work.lists[row * n_chunks + chunk] >= 0:
                if not is_read:
                    chunks = read_band(&call.rows, band, chunk * length, size, <vec*>work.chunks)
                    is_read = True
                draw_from_chunk(
                    call, band.row + row, work.lists[row * n_chunks + chunk], row_of_band(&call.rows, chunks, row),
                    size, chunk * length, work)


cdef void draw_from_chunk(
    Sampling* call, Py_ssize_t row, int64_t draw, const vec* x, Py_ssize_t n, Py_ssize_t first, Workspace* work
) noexcept nogil:
    """Run a list of draws."""
    fold_chunk(x, <vec*>work.terms, n, True, False, False, 0.0, <vec*>NULL)
    draw_from_terms(call, row, draw, <const vec*>work.terms, n, first, work)


cdef void draw_from_terms(
    Sampling* call, Py_ssize_t row, int64_t draw, const vec* terms, Py_ssize_t n, Py_ssize_t first, Workspace* work
) noexcept nogil:
    """Run a list of draws. The elements of a block are added up when the first draw falls into it."""
    cdef int64_t* draws = call.indices + row * call.n_draws
    cdef double* shares = call.uniforms + row * call.n_draws
    cdef double[MAX_BLOCKS] block_sums
    cdef bint[MAX_BLOCKS] is_summed
    cdef Py_ssize_t n_blocks = (n + BLOCK - 1) // BLOCK, block, start, i
    cdef double sum = 0.0, share
    cdef int64_t following
    for block in range(n_blocks):
        sum += sum_of_block(terms, block * BLOCK, min(<Py_ssize_t>BLOCK, n - block * BLOCK))
        block_sums[block], is_summed[block] = sum, False
    while draw >= 0:
        following = draws[draw]
        block = pick(block_sums, n_blocks, shares[draw], &share)
        start = block * BLOCK
        if not is_summed[block]:
            sum, is_summed[block] = 0.0, True
            for i in range(start, min(start + BLOCK, n)):
                sum += seen(get(terms, i), terms)
                work.element_sums[i] = sum
        draws[draw] = first + start + pick(
            work.element_sums + start, min(<Py_ssize_t>BLOCK, n - start), share, &share)
        draw = following


cdef inline double seen(double term, const vec* like) noexcept nogil:
    """A term, but 0 where it is as small as that of -inf, which is not 0."""
    return term if term > by_type(2.0**-120, 2.0**-1016, like) else 0.0


cdef inline double sum_of_block(const vec* terms, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """The sum of a block of terms, in eight parts that do not wait for each other."""
    cdef double[8] sums
    cdef Py_ssize_t i = 0
    cdef int j
    for j in range(8):
        sums[j] = 0.0
    while i + 8 <= n:
        for j in range(8):
            sums[j] += seen(get(terms, first + i + j), terms)
        i += 8
    while i < n:
        sums[0] += seen(get(terms, first + i), terms)
        i += 1
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))


cdef void draw_from_best(
    Sampling* call, const Band* band, int row, State total, Best best, Workspace* work, const vec* like
) noexcept nogil:
    """Draw from the most probable elements of a row: of more of them, where those at hand do not make up top_p."""
    cdef int64_t* draws = call.indices + (band.row + row) * call.n_draws
    cdef double* shares = call.uniforms + (band.row + row) * call.n_draws
    cdef double[SMALL] few
    cdef double* sums = few
    cdef double* many = NULL
    cdef Candidate* more = NULL
    cdef double limit = 0.0, sum = 0.0, unused
    cdef Py_ssize_t i
    keep_best(&best)
    if call.top_p < 1.0 and call.top_k:
        if best.count <= SMALL:  # or else they are not selected side by side
            sort_candidates(best.candidates, best.count)  # for a sum that does not depend on how they were selected
        limit = call.top_p * sum_of_terms(best.candidates, best.count, total.maximum)
    elif call.top_p < 1.0:
        limit = call.top_p * sum_at(total, total.maximum, 0.0)
        if best.count < call.rows.n and sum_of_terms(best.candidates, best.count, total.maximum) < limit:
            more = collect_largest(call, band, row, total.maximum, limit, work, like, &best.count)
            best.candidates = more
    if best.candidates != NULL and best.count > SMALL:
        sums = many = <double*>malloc(best.count * sizeof(double))
    if best.candidates == NULL or sums == NULL:
        call.lacks_memory = True
    else:
        if call.top_p < 1.0:
            cut_to_limit(&best, limit, total.maximum)
        order_by_index(call, band, row, &best, work, like)
        for i in range(best.count):
            sum += exp(best.candidates[i].value - total.maximum)
            sums[i] = sum
        for i in range(call.n_draws):
            draws[i] = best.candidates[pick(sums, best.count, shares[i], &unused)].index
    free(more)
    free(many)


cdef Candidate* collect_largest(
    const Sampling* call, const Band* band, int row, double largest, double limit, Workspace* work, const vec* like,
    Py_ssize_t* count
) noexcept nogil:
    """The largest elements of a row, in new memory: a few more than make up the limit."""
    cdef Py_ssize_t length = chunk_length(like), first = 0, size, i
    cdef double[LEVELS] sums
    cdef Py_ssize_t[LEVELS] counts
    cdef Candidate* candidates
    cdef const vec* terms = <const vec*>work.terms
    cdef const vec* x
    cdef double factor, sum = 0.0
    cdef State state
    cdef int level, last = -1
    memset(sums, 0, sizeof(sums))
    memset(counts, 0, sizeof(counts))
    while first < call.rows.n:
        size = min(length, call.rows.n - first)
        x = row_of_band(&call.rows, read_band(&call.rows, band, first, size, <vec*>work.chunks), row)
        state = fold_chunk(x, <vec*>work.terms, size, True, False, False, 0.0, <vec*>NULL)
        factor = 0.0
        if state.maximum > -INFINITY:
            state.high, state.low = 1.0, 0.0
            factor = sum_at(state, largest, 0.0)
        for i in range(size):
            level = level_of(get(x, i), largest)
            counts[level] += 1
            if factor > 0.0:
                sums[level] += get(terms, i) * factor
        first += size
    count[0] = 0
    while last < LEVELS - 1 and sum <= limit * 1.000001:  # for terms may be in float32
        last += 1
        sum, count[0] = sum + sums[last], count[0] + counts[last]
    candidates = <Candidate*>malloc(count[0] * sizeof(Candidate))
    first = count[0] = 0
    while first < call.rows.n and candidates != NULL:
        size = min(length, call.rows.n - first)
        x = row_of_band(&call.rows, read_band(&call.rows, band, first, size, <vec*>work.chunks), row)
        for i in range(size):
            if level_of(get(x, i), largest) <= last:
                candidates[count[0]].value, candidates[count[0]].index = get(x, i), first + i
                count[0] += 1
        first += size
    return candidates


cdef inline int level_of(double x, double largest) noexcept nogil:
    cdef double level = (largest - x) * LEVELS_PER_UNIT
    return <int>level if level < LEVELS - 1 else LEVELS - 1


cdef inline double sum_of_terms(const Candidate* candidates, Py_ssize_t count, double largest) noexcept nogil:
    """The sum of exp(x - largest) over candidates."""
    cdef double sum = 0.0
    cdef Py_ssize_t i
    for i in range(count):
        sum += exp(candidates[i].value - largest)
    return sum


cdef void cut_to_limit(Best* best, double limit, double largest) noexcept nogil:
    """Leave as few of the best candidates as make up the limit."""
    cdef Candidate* candidates = best.candidates
    cdef Py_ssize_t low = 0, high = best.count, middle, i
    cdef double sum = 0.0, part
    while high - low > SMALL:
        middle = (low + high) // 2
        select_first(candidates + low, high - low, middle - low)
        part = sum_of_terms(candidates + low, middle - low, largest)
        if sum + part >= limit:
            high = middle
        else:
            sum, low = sum + part, middle
    sort_candidates(candidates + low, high - low)
    for i in range(low, high):
        sum += exp(candidates[i].value - largest)
        best.count = i + 1
        if sum >= limit:
            return


cdef void order_by_index(
    const Sampling* call, const Band* band, int row, Best* best, Workspace* work, const vec* like
) noexcept nogil:
    """Put the candidates into the order of their indices: few by insertion, many by another look at the row."""
    cdef Candidate* candidates = best.candidates
    cdef Candidate moving, worst = candidates[0]
    cdef Py_ssize_t length = chunk_length(like), first = 0, size, i, j
    cdef const vec* x
    if best.count > SMALL:
        for i in range(best.count):
            if is_worse(candidates[i], worst):
                worst = candidates[i]
        best.count = 0
        while first < call.rows.n:
            size = min(length, call.rows.n - first)
            x = row_of_band(&call.rows, read_band(&call.rows, band, first, size, <vec*>work.chunks), row)
            collect_from(x, size, first, worst, best)
            first += size
        return
    for i in range(1, best.count):
        moving, j = candidates[i], i
        while j and candidates[j - 1].index > moving.index:
            candidates[j] = candidates[j - 1]
            j -= 1
        candidates[j] = moving


cdef inline void collect_from(
    const vec* x, Py_ssize_t n, Py_ssize_t first, Candidate worst, Best* best
) noexcept nogil:
    """Append the elements that are no worse than a candidate; most registers have none."""
    cdef Py_ssize_t width = lanes(x), i = 0, end
    cdef vec threshold = splat(before(worst.value, x), x)
    cdef Candidate one
    while i < n:
        end = min(i + width, n)
        if end - i < width or any_greater(load(at(x, i)), threshold):
            while i < end:
                one.value, one.index = get(x, i), first + i
                if not is_worse(one, worst):
                    best.candidates[best.count] = one
                    best.count += 1
                i += 1
        i = end
