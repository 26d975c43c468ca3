"""The k largest of a stream of elements.

What is above a threshold goes to a buffer with room for four times k; when that is full, all but the k largest leave
it, and the k-th of them is the new threshold. The first one is a bound that maxima of parts of the first chunk give,
and so is a later one where elements ascend. Most registers have no element above it, and cost one comparison.
"""

cdef enum:
    ROOM = 4  # times k
    # The first threshold is the k-th largest of the maxima of at least twice as many parts: so few more than k elements
    # are above it that the 50 largest of 50,000 take about 200 elements, and 800 without.
    PARTS = 2  # times k
    MAX_PART_REGISTERS = 8
    SMALL = 64  # candidates that are sorted by insertion

cdef struct Candidate:
    double value
    int64_t index

cdef struct Best:
    Candidate* candidates
    Py_ssize_t k
    Py_ssize_t room
    Py_ssize_t count
    Py_ssize_t n_taken  # of the last elements offered
    bint ascends  # so many were taken once that a new bound is looked for each time
    bint has_threshold
    double threshold  # k elements or more are above it, or as large but earlier


cdef inline Py_ssize_t room_for(Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    """How many candidates there may be at a time for the k largest of n elements."""
    return min(ROOM * k, n)


cdef inline Best best_of_none(Candidate* candidates, Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    cdef Best best
    best.candidates, best.k, best.room, best.count = candidates, k, room_for(k, n), 0
    best.n_taken, best.ascends, best.has_threshold, best.threshold = 0, False, False, -INFINITY
    return best


cdef inline bint is_worse(Candidate a, Candidate b) noexcept nogil:
    """Of equal elements the later one is worse."""
    return a.value < b.value or (a.value == b.value and a.index > b.index)


cdef void offer(Best* best, const vec* x, Py_ssize_t n, Py_ssize_t first) noexcept nogil:
    """Offer n elements, whose indices begin at `first` and are above all earlier ones. NaN are left out."""
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef vec threshold, top
    cdef int j
    best.ascends = best.ascends or best.n_taken > ROOM * best.room
    if best.count == 0 or best.ascends:
        find_threshold(best, x, n)
    best.n_taken = 0
    while not best.has_threshold and i < n:
        if get(x, i) == get(x, i):
            take(best, get(x, i), first + i)
        i += 1
    threshold = splat(best.threshold, x)
    while i + GROUP * width <= n:
        top = threshold
        for j in range(GROUP):
            top = maximum(load(at(x, i) + j), top)  # in this order of operands a NaN is passed over
        if any_greater(top, threshold):
            for j in range(GROUP):
                if any_greater(load(at(x, i) + j), threshold):
                    take_larger(best, x, i + j * width, i + (j + 1) * width, first)
                    threshold = splat(best.threshold, x)
        i += GROUP * width
    take_larger(best, x, i, n, first)


cdef inline void find_threshold(Best* best, const vec* x, Py_ssize_t n) noexcept nogil:
    """Set a threshold below k of these elements or more, if k is small beside n."""
    cdef vec[MAX_PART_REGISTERS] tops
    cdef Candidate[MAX_PART_REGISTERS * MAX_LANES] maxima
    cdef Py_ssize_t width = lanes(x), i = 0
    cdef int count = 1, j
    while count * width < PARTS * best.k:
        count *= 2
    if count > MAX_PART_REGISTERS or n < 4 * count * width:
        return
    for j in range(count):
        tops[j] = splat(-INFINITY, x)
    while i + count * width <= n:
        for j in range(count):
            tops[j] = maximum(load(at(x, i) + j), tops[j])
        i += count * width
    for j in range(count * <int>width):
        maxima[j].value, maxima[j].index = get(<const vec*>tops, j), j
    select_first(maxima, count * width, best.k)
    if maxima[best.k - 1].value > best.threshold:
        best.has_threshold, best.threshold = True, max(best.threshold, before(maxima[best.k - 1].value, x))


cdef inline double before(double value, const vec* like) noexcept nogil:
    """The next smaller number of the element type."""
    if vec is f32v:
        return nextafterf(<float>value, -INFINITY)
    else:
        return nextafter(value, -INFINITY)


cdef inline void take_larger(Best* best, const vec* x, Py_ssize_t i, Py_ssize_t end, Py_ssize_t first) noexcept nogil:
    while i < end:
        if get(x, i) > best.threshold:
            take(best, get(x, i), first + i)
        i += 1


cdef inline void take(Best* best, double value, int64_t index) noexcept nogil:
    best.candidates[best.count].value, best.candidates[best.count].index = value, index
    best.count += 1
    best.n_taken += 1
    if best.count == best.room:
        select_first(best.candidates, best.count, best.k)
        best.count = best.k
        best.has_threshold, best.threshold = True, best.candidates[best.k - 1].value


cdef void select_from_tile(const vec* tile, Py_ssize_t n, Py_ssize_t k, vec* tops, vec* places) noexcept nogil:
    """The k largest elements of each row of a tile, in order, and where they are. NaN count as -inf.

    An element takes the last place and rises past those that are smaller. Most elements of long rows do not get there.
    """
    cdef vec nothing = splat(-INFINITY, tile), x, place, above
    cdef Py_ssize_t element, j
    for element in range(n):
        x, place, j = maximum(tile[element], nothing), splat(element, tile), min(element, k - 1)
        if element >= k:
            if not any_greater(x, tops[j]):
                continue
            place = where_at_most(x, tops[j], places[j], place)
            x = maximum(x, tops[j])
        while j:
            above = tops[j - 1]
            tops[j], places[j] = minimum(x, above), where_at_most(x, above, place, places[j - 1])
            place = where_at_most(x, above, places[j - 1], place)
            x, j = maximum(x, above), j - 1
        tops[0], places[0] = x, place


cdef void keep_best(Best* best) noexcept nogil:
    """Leave no more than k candidates, and none of them out; after the last offer."""
    if best.count > best.k:
        select_first(best.candidates, best.count, best.k)
        best.count = best.k


cdef inline void exchange(Candidate* candidates, Py_ssize_t i, Py_ssize_t j) noexcept nogil:
    cdef Candidate other = candidates[i]
    candidates[i] = candidates[j]
    candidates[j] = other


cdef void select_first(Candidate* candidates, Py_ssize_t count, Py_ssize_t k) noexcept nogil:
    """Bring the best k to the front, the worst of them last (Hoare's quickselect, with the median of three)."""
    cdef Py_ssize_t low = 0, high = count - 1, i, j
    cdef int n_left = 64
    cdef Candidate pivot
    while low < high:
        n_left -= 1
        if n_left == 0:  # a bad case
            sort_candidates(candidates, count)
            return
        i, j = (low + high) // 2, high
        if is_worse(candidates[low], candidates[i]):
            exchange(candidates, low, i)
        if is_worse(candidates[i], candidates[high]):
            exchange(candidates, i, high)
            if is_worse(candidates[low], candidates[i]):
                exchange(candidates, low, i)
        pivot, i = candidates[i], low
        while i <= j:
            while is_worse(pivot, candidates[i]):
                i += 1
            while is_worse(candidates[j], pivot):
                j -= 1
            if i <= j:
                exchange(candidates, i, j)
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


cdef inline void sink(Candidate* heap, Py_ssize_t count, Py_ssize_t place) noexcept nogil:
    """Let a candidate sink in a heap until those below it are better."""
    cdef Candidate sinking = heap[place]
    cdef Py_ssize_t child = 2 * place + 1
    while child < count:
        if child + 1 < count and is_worse(heap[child + 1], heap[child]):
            child += 1
        if not is_worse(heap[child], sinking):
            break
        heap[place] = heap[child]
        place, child = child, 2 * child + 1
    heap[place] = sinking


cdef void sort_candidates(Candidate* candidates, Py_ssize_t count) noexcept nogil:
    """Put candidates into order, the best first: few by insertion."""
    cdef Candidate moving
    cdef Py_ssize_t end, i, j
    if count <= SMALL:
        for i in range(1, count):
            moving, j = candidates[i], i
            while j and is_worse(candidates[j - 1], moving):
                candidates[j], j = candidates[j - 1], j - 1
            candidates[j] = moving
        return
    for end in range(count // 2 - 1, -1, -1):
        sink(candidates, count, end)
    for end in range(count - 1, 0, -1):
        exchange(candidates, 0, end)
        sink(candidates, end, 0)
