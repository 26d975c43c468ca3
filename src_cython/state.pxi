"""The state of a row: its running maximum and sum, with the sum's scale carried as a power of two.

exp(x - offset) is computed as p * 2**k (p in [0.7, 1.42], k an integer), and the sum of such terms is kept relative to
2**exponent. The pair (exponent, sum) is the monoid of online softmax (Milakov and Gimelshein, arXiv 1805.02867) with a
binary exponent in the place of the maximum (Dukhan and Ablavatski, arXiv 2001.04438), so that rescaling is an exact
multiplication by a power of two. It needs no subtraction of the maximum, hence has no cancellation error.

Exponents of references are even. x * log2(e) may lie just between two integers; to which it is rounded then depends on
whether the exponent in the rounding constant is odd, and the same term would have other last bits under another
reference.

The reduction x = k * ln 2 + r is accurate while |x| is moderate. Beyond (2**10 in float32, 2**14 in float64) the row
has an `offset`, one of its own elements; there x - offset is exact for every x that can matter, since x and offset
are multiples of the same power of two and their difference is short.
"""


cdef enum:
    # The sum of a row is taken in chunks of this many bytes, merged in order. A chunk fits the L1 cache, where it waits
    # from the search for its maximum until its exponentials.
    CHUNK_BYTES = 32768
    # Elements of a short row: see `sum_base`. Tiles of short rows keep one high part for all lanes, for which (32, 1024)
    # float32 on axis 0 take 5 % less.
    SHORT = 64

cdef extern from *:
    """
    #define LOG2_E 1.4426950408889634
    #define LOG2_E_REST 2.0355273740931033e-17  /* what its rounding leaves */
    #define LN2 0.6931471805599453
    #define LN2_REST 2.3190468138462996e-17
    /* ln 2 = high + low, the first short enough for k * high to be exact (Cody and Waite). */
    #define LN2_HIGH_F64 6.93147180369123816490e-01
    #define LN2_LOW_F64 1.90821492927058770002e-10
    #define LN2_HIGH_F32 0.693359375
    #define LN2_LOW_F32 -2.12194440e-4
    """
    const double LOG2_E, LOG2_E_REST, LN2, LN2_REST
    const double LN2_HIGH_F32, LN2_LOW_F32, LN2_HIGH_F64, LN2_LOW_F64


cdef struct State:
    double maximum  # of the elements seen
    double offset
    double exponent
    double high  # high + low: sum of exp(x - offset) * 2**-exponent over the elements seen; in the logarithmic
    double low   # functions without the maximum itself, so that log1p of the rest keeps all its digits


# How terms and sums are computed.
cdef enum Arithmetic:
    FULL
    MODERATE  # as FULL, with the same bits, for elements that have an offset of 0 and are above the floor
    COARSE    # for results of 16 bits: to 2**-18


# What makes a probability of a term: four registers, with a value for each lane.
cdef enum:
    FACTOR      # 1 / sum = FACTOR + FACTOR_LOW
    FACTOR_LOW
    LIMIT       # probabilities from here on are SHARE
    SHARE
    FINISHERS   # registers


# What terms are relative to: exp(x - offset) * 2**-exponent. Three registers, with a value for each lane.
cdef enum:
    OFFSET
    FLOOR      # what lies so far below the offset contributes less than any result can show, and is raised to here
    MAGIC      # added to (x - offset) * log2(e) * powers: rounds it to an integer, and leaves it in the lowest bits
    REFERENCE  # registers in a reference


cdef inline vec rounder(const vec* like) noexcept nogil:
    """Rounds what is added to it to an integer, and has that in its lowest bits."""
    return splat(by_type(1.5 * 2.0**23, 1.5 * 2.0**52, like), like)


cdef inline vec magic_for(vec exponent) noexcept nogil:
    return rounder(&exponent) - exponent * splat(powers(&exponent), &exponent)


cdef inline vec exponent_of(const vec* reference) noexcept nogil:
    return (rounder(reference) - reference[MAGIC]) * splat(1.0 / powers(reference), reference)


cdef inline void make_reference(vec offset, vec exponent, vec* reference) noexcept nogil:
    """Terms relative to 2**exponent, which keep all their bits between 2**-125 and 2**127 (float32)."""
    reference[OFFSET] = offset
    reference[FLOOR] = (exponent - splat(by_type(125.0, 1021.0, &offset), &offset)) * splat(LN2, &offset)
    reference[MAGIC] = magic_for(exponent)


cdef inline void reference_at(vec largest, vec row_offset, vec* reference) noexcept nogil:
    """The reference for a chunk with this maximum.

    Where it needs an offset, it takes the `row_offset` of the row's first chunk if that is near enough for exact
    differences: chunks that share their offset merge exactly.

    The term of the maximum becomes about 2**64 (float32; 2**100 in float64): so far above the smallest that even
    subnormal results come from terms with all their digits, so far below the largest that their sum is in range.
    """
    cdef vec zero = splat(0.0, &largest), finite = splat(by_type(FLT_MAX, DBL_MAX, &largest), &largest)
    cdef vec size = maximum(largest, zero - largest), distance = largest - row_offset, offset = zero, k
    cdef vec moderate = splat(by_type(1024.0, 16384.0, &largest), &largest)
    if any_greater(size, moderate):
        distance = maximum(distance, zero - distance)
        offset = where_at_most(distance, splat(by_type(256.0, 4096.0, &largest), &largest), row_offset, largest)
        offset = where_at_most(size, moderate, zero, offset)
        offset = where_at_most(size, finite, offset, zero)
        largest = where_at_most(size, finite, largest, zero)
    k = (largest - offset) * splat(LOG2_E, &largest)
    k = (k + splat(by_type(1.5 * 2.0**24, 1.5 * 2.0**53, &largest), &largest)) - splat(
        by_type(1.5 * 2.0**24, 1.5 * 2.0**53, &largest), &largest)  # the nearest even number
    make_reference(offset, k - splat(by_type(64.0, 100.0, &largest), &largest), reference)


cdef inline void coarse_reference_at(vec largest, vec* reference) noexcept nogil:
    """The same for COARSE terms, whose offset is the maximum: differences from it are small, so that one step reduces
    them."""
    cdef vec offset = is_finite_then(largest, largest, splat(0.0, &largest))
    make_reference(offset, splat(-64.0, &largest), reference)


cdef inline vec is_finite_then(vec v, vec finite, vec otherwise) noexcept nogil:
    """`finite` in the lanes where v is so, `otherwise` where it is infinite or NaN."""
    cdef vec size = maximum(splat(0.0, &v) - v, v)  # in this order of operands, NaN where v is
    return where_at_most(size, splat(by_type(FLT_MAX, DBL_MAX, &v), &v), finite, otherwise)


cdef inline vec sum_base(Py_ssize_t n, const vec* like) noexcept nogil:
    """A power of two above every term of a chunk of n elements whose reference is at its maximum.

    If there are at most SHORT, it is above their sum as well: then high parts are multiples of one power of two, and add
    up exactly in any order.
    """
    return splat(by_type(2.0**65, 2.0**101, like) * (power_of_two_from(n) if n <= SHORT else 2), like)


cdef inline void start(vec* q, const vec* r, int count, double coefficient) noexcept nogil:
    cdef int j
    for j in range(count):
        q[j] = splat(coefficient, r)


cdef inline void horner(vec* q, const vec* r, int count, double coefficient) noexcept nogil:
    cdef int j
    for j in range(count):
        q[j] = q[j] * r[j] + splat(coefficient, r)


cdef inline void exp_tail(const vec* r, vec* q, int count) noexcept nogil:
    """q with exp(r) = 1 + r + r**2 q for |r| <= ln(2) / (2 powers), minimax: 2**-28.2 relative to exp(r), 2**-57.9 in
    float64, and less with a table.

    As f * q' with f = r * powers / ln(2) it would be an operation less, but then q' rounds what should ascend with r:
    of all float32, 134 terms were less than that of a smaller number.
    """
    cdef int j
    if vec is f32v and powers(r) == 16:
        start(q, r, count, 0.166667178273201)
        horner(q, r, count, 0.5000161528587341)
    elif vec is f32v and powers(r) == 8:
        start(q, r, count, 0.041660431772470474)
        horner(q, r, count, 0.1666802614927292)
        horner(q, r, count, 0.5)
    elif vec is f32v:
        start(q, r, count, 1.3814328e-3)
        horner(q, r, count, 8.368848e-3)
        horner(q, r, count, 4.16684e-2)
        horner(q, r, count, 1.666652e-1)
        horner(q, r, count, 4.9999994e-1)
    elif powers(r) == 8:
        start(q, r, count, 0.00019840568660682776)
        horner(q, r, count, 0.0013889780684357437)
        horner(q, r, count, 0.008333333371042426)
        horner(q, r, count, 0.041666666570070315)
        horner(q, r, count, 0.1666666666666373)
        horner(q, r, count, 0.5000000000000296)
    else:
        start(q, r, count, 2.4999863292277574e-08)
        horner(q, r, count, 2.7630516674528656e-07)
        horner(q, r, count, 2.7557588370633496e-06)
        horner(q, r, count, 2.480149240587303e-05)
        horner(q, r, count, 0.0001984126950283603)
        horner(q, r, count, 0.0013888888944233843)
        horner(q, r, count, 0.008333333333496862)
        horner(q, r, count, 0.04166666666652816)
        horner(q, r, count, 0.16666666666666408)
        horner(q, r, count, 0.5000000000000011)


cdef inline void exp_parts(
    const vec* x, vec* heads, vec* factors, vec* rests, int count, const vec* reference, int step,
    Arithmetic arithmetic
) noexcept nogil:
    """exp(x - offset) * 2**-exponent of a reference as head + factor * rest, where the product is below a tenth of it.

    x - offset = k * ln(2) / powers + r. With a table, the head is an element of it times a power of two; r is so small
    that its own rounding and that of the rest do not matter. Without, the head is 1 + r, and they are kept.
    What is added to the product must be so in one operation, `times_plus`: left to the compiler, it is rounded in
    between in one place and not in another, and the same element has different bits there.

    With a `step` of 1 each register has a reference of its own, with 0 all have the same.

    `count` registers, at most GROUP, go through each step together: one alone is a chain of 20 operations that wait
    for each other, and a processor's scheduler holds too few of them to overlap enough chains by itself.
    """
    cdef vec[GROUP] z, magic, k, r, r_low, q
    cdef vec one = splat(1.0, x), error
    cdef int j
    for j in range(count):
        z[j] = x[j]
        if arithmetic != MODERATE:
            z[j] = maximum(reference[j * step * REFERENCE + FLOOR], x[j] - reference[j * step * REFERENCE + OFFSET])
    for j in range(count):
        magic[j] = z[j] * splat(LOG2_E * powers(x), x) + reference[j * step * REFERENCE + MAGIC]
    for j in range(count):
        k[j] = magic[j] - reference[j * step * REFERENCE + MAGIC]
    for j in range(count):
        r_low[j] = z[j] - k[j] * splat(by_type(LN2_HIGH_F32, LN2_HIGH_F64, x) / powers(x), x)
    for j in range(count):
        r[j] = r_low[j] - k[j] * splat(by_type(LN2_LOW_F32, LN2_LOW_F64, x) / powers(x), x)
    exp_tail(r, q, count)
    if powers(x) > 1:
        for j in range(count):
            heads[j] = times_power(root_of_two(magic[j], &error), magic[j])
            factors[j], rests[j] = heads[j], r[j] * r[j] * q[j] + (r[j] + error)
        return
    for j in range(count):
        r_low[j] = (r_low[j] - r[j]) - k[j] * splat(by_type(LN2_LOW_F32, LN2_LOW_F64, x), x)
    for j in range(count):
        heads[j] = one + r[j]
        rests[j] = r[j] * r[j] * q[j] + ((r[j] - (heads[j] - one)) + r_low[j])
    for j in range(count):
        factors[j] = times_power(one, magic[j])
        heads[j] = heads[j] * factors[j]


cdef inline vec times_plus(vec factor, vec rest, vec c) noexcept nogil:
    """factor * rest + c, rounded once; without fused multiply-adds, for factors that are powers of two."""
    if HAS_FMA:
        return fused(factor, rest, c)
    return factor * rest + c


cdef inline void scaled_exp(
    const vec* x, vec* terms, vec* residuals, int count, const vec* reference, int step
) noexcept nogil:
    """exp(x - offset) * 2**-exponent of a reference; NaN stays NaN, -inf becomes a term that scales to 0.

    `residuals`, where they are not NULL, are what rounding took from the terms: without them the error of a row's
    largest term, the larger half of an ULP, would be the error of the sum and so of every probability.
    """
    cdef vec[GROUP] heads, factors, rests
    cdef int j
    exp_parts(x, heads, factors, rests, count, reference, step, FULL)
    for j in range(count):
        terms[j] = times_plus(factors[j], rests[j], heads[j])
    if residuals != NULL:
        for j in range(count):
            residuals[j] = times_plus(factors[j], rests[j], heads[j] - terms[j])


cdef inline void coarse_exp(const vec* x, vec* terms, int count, const vec* reference, int step) noexcept nogil:
    """`scaled_exp` to 2**-18, in half the operations."""
    cdef vec[GROUP] z, magic, r, q
    cdef vec error
    cdef int j
    if powers(x) == 1:
        scaled_exp(x, terms, <vec*>NULL, count, reference, step)
        return
    for j in range(count):
        z[j] = maximum(reference[j * step * REFERENCE + FLOOR], x[j] - reference[j * step * REFERENCE + OFFSET])
    for j in range(count):
        magic[j] = z[j] * splat(LOG2_E * powers(x), x) + reference[j * step * REFERENCE + MAGIC]
    for j in range(count):
        r[j] = minus_product(z[j], magic[j] - reference[j * step * REFERENCE + MAGIC], splat(LN2 / powers(x), x))
    if powers(x) == 16:
        start(q, r, count, 0.5000161528587341)
    else:
        start(q, r, count, 0.1666802614927292)
        horner(q, r, count, 0.5)
    for j in range(count):
        terms[j] = times_power(root_of_two(magic[j], &error), magic[j])
        terms[j] = times_plus(terms[j], r[j] * r[j] * q[j] + r[j], terms[j])


cdef inline vec two_sum(vec a, vec b, vec* error) noexcept nogil:
    """a + b, with its rounding error (Knuth)."""
    cdef vec total = a + b
    cdef vec b_seen = total - a
    error[0] = (a - (total - b_seen)) + (b - b_seen)
    return total


cdef inline vec product_error(vec a, vec b, vec rounded) noexcept nogil:
    """a * b - rounded, exactly, where `rounded` is the rounded product and multiply-adds are not fused (Dekker)."""
    cdef vec splitter = splat(by_type(4097.0, 134217729.0, &a), &a)
    cdef vec a_high = a * splitter - (a * splitter - a), a_low = a - a_high
    cdef vec b_high = b * splitter - (b * splitter - b), b_low = b - b_high
    return ((a_high * b_high - rounded) + a_high * b_low + a_low * b_high) + a_low * b_low


cdef inline vec minus_product(vec c, vec a, vec b) noexcept nogil:
    """c - a * b, rounded once; where the product is near c, exactly."""
    if HAS_FMA:
        return fused(-a, b, c)
    cdef vec rounded = a * b
    return (c - rounded) - product_error(a, b, rounded)


cdef inline vec product(vec v, vec factor, vec factor_low) noexcept nogil:
    """v * (factor + factor_low), rounded once: the product of a row's only term and the reciprocal of its sum is 1."""
    if HAS_FMA:
        return fused(v, factor, v * factor_low)
    cdef vec raise_by = splat(2.0**64, &v)
    return raised_product(v, factor * raise_by, v * (factor_low * raise_by))


cdef inline vec raised_product(vec v, vec raised, vec low) noexcept nogil:
    """(v * raised + low) * 2**-64: the detour keeps parts from underflowing where the result is a very small number."""
    cdef vec rounded = fused(v, raised, low) if HAS_FMA else v * raised
    if not HAS_FMA:
        rounded = rounded + (product_error(v, raised, rounded) + low)
    return rounded * splat(2.0**-64, &v)


cdef inline vec mended(vec probability, vec term, vec residual, const vec* finishers) noexcept nogil:
    """A probability from its term and what rounding took from that, where it is below `mending_edge` and not 0.

    Of terms and products that are rounded before it, a subnormal one is up to 1.41 of its steps off; then it is 0.87.
    """
    cdef vec raise_by = splat(2.0**64, &term), factor = finishers[FACTOR] * raise_by, edge = mending_edge(finishers)
    cdef vec low = times_plus(term, finishers[FACTOR_LOW] * raise_by, residual * factor)
    return where_at_most(
        edge, not_zero(probability), probability, minimum(edge, raised_product(term, factor, low)))


cdef inline vec mending_edge(const vec* like) noexcept nogil:
    """Twice the smallest normal number, lest a subnormal result be rounded to a normal one."""
    return splat(by_type(2.0**-125, 2.0**-1021, like), like)


cdef inline vec not_zero(vec probability) noexcept nogil:
    """A probability, or `mending_edge` for 0."""
    return where_at_most(probability, splat(0.0, &probability), mending_edge(&probability), probability)


cdef inline State identity() noexcept nogil:
    """The state of no elements."""
    cdef State state
    state.maximum = state.offset = -INFINITY
    state.exponent = state.high = state.low = 0.0
    return state


cdef inline State infinite_state(double largest, bint has_nan, bint apart) noexcept nogil:
    """The state of elements whose maximum is +inf or -inf."""
    cdef State state = identity()
    state.maximum = state.offset = largest
    if has_nan:
        state.high = INFINITY - INFINITY
    elif largest > 0 and not apart:
        state.high = INFINITY
    return state


cdef inline f64v exp_split_lanes(f64v x, f64v* low, f64v* exponent) noexcept nogil:
    """exp(x) as (p + low) * 2**exponent to 57 bits and more, for x of no use one that is next to nothing.

    A row whose chunks have different offsets takes its sum from a product with this, whose roundings would add up with
    those of the terms to 2.6 ULP.
    """
    cdef f64v half, k, high, r, term, residual
    cdef f64v[REFERENCE] reference
    x = maximum(x, splat(-1e6, &x))
    half = (x * splat(0.5 * LOG2_E, &x) + rounder(&x)) - rounder(&x)
    k = half + half
    high = x - k * splat(LN2_HIGH_F64, &x)
    r = high - k * splat(LN2_LOW_F64, &x)
    make_reference(splat(0.0, &x), splat(0.0, &x), reference)
    scaled_exp(&r, &term, &residual, 1, reference, 0)
    low[0], exponent[0] = residual + term * ((high - r) - k * splat(LN2_LOW_F64, &x)), k
    return term


cdef inline double exp_split(double x, double* low, double* exponent) noexcept nogil:
    """The same for one number; p is 0 for x below any use."""
    cdef f64v p, p_low, k
    if x < -1e6:
        low[0], exponent[0] = 0.0, -2e6
        return 0.0
    p = exp_split_lanes(splat(x, &p), &p_low, &k)
    low[0], exponent[0] = lane(p_low, 0), lane(k, 0)
    return lane(p, 0)


cdef inline double by_power_of_two(double value, double k) noexcept nogil:
    """value * 2**k, without a call of `ldexp` for the usual k: merging 100,000 states takes 1.9 ms instead of 3.7."""
    return value * exact_power_of_two(k) if -1022.0 <= k <= 1023.0 else ldexp(value, <int>max(k, -5000.0))


cdef inline double loser_of(const State* a, const State* b) noexcept nogil:
    """The smaller maximum, relative to the offset of the state of both."""
    return min(a.maximum, b.maximum) - max(a.offset, b.offset)


cdef State merge(State a, State b, bint apart) noexcept nogil:
    """The state of the elements of both; exact but for the rounding of the sum where the offsets agree."""
    cdef double p = 0.0, p_low = 0.0, k = 0.0
    if apart and fabs(min(a.maximum, b.maximum)) != INFINITY:
        p = exp_split(loser_of(&a, &b), &p_low, &k)
    return merge_with_loser(a, b, apart, p, p_low, k)


cdef void merge_each(State* into, const State* others, int count) noexcept nogil:
    """Merge up to MAX_LANES states, with their maxima apart, with others.

    The exponentials are computed side by side: folding (100000, 10) float32 into states takes 2.4 ms instead of 3.2.
    """
    cdef f64v[MAX_LANES] losers, p, p_low, k
    cdef int width = lanes(<const f64v*>losers), i
    for i in range(count):
        put(losers, i, loser_of(&into[i], &others[i]))
    for i in range(count, (count + width - 1) // width * width):
        put(losers, i, 0.0)
    for i in range((count + width - 1) // width):
        p[i] = exp_split_lanes(losers[i], &p_low[i], &k[i])
    for i in range(count):
        into[i] = merge_with_loser(
            into[i], others[i], True, get(<const f64v*>p, i), get(<const f64v*>p_low, i), get(<const f64v*>k, i))


cdef inline State merge_with_loser(
    State a, State b, bint apart, double loser, double loser_low, double power
) noexcept nogil:
    """`merge`, given the term of the smaller maximum: (loser + loser_low) * 2**power, if it is finite."""
    cdef double p, p_low, k, smaller, exponent, scaled
    if b.offset > a.offset:
        a, b = b, a
    if b.maximum == -INFINITY and b.high == 0.0:  # no elements, or nothing but -inf
        return a
    if a.maximum == -INFINITY and a.high == 0.0:
        return b
    if b.offset != a.offset:
        p = exp_split(b.offset - a.offset, &p_low, &k)
        scaled = b.high * p
        b.low = b.low * p + b.high * p_low
        if fabs(scaled) < INFINITY:
            b.low += fma(b.high, p, -scaled)
        b.high, b.exponent = scaled, b.exponent + k
    smaller = min(a.maximum, b.maximum)
    a.maximum = max(a.maximum, b.maximum)
    exponent = max(a.exponent, b.exponent)
    k = a.exponent - exponent
    a.high, a.low, a.exponent = by_power_of_two(a.high, k), by_power_of_two(a.low, k), exponent
    k = b.exponent - exponent
    a.low += by_power_of_two(b.low, k)
    add(&a, by_power_of_two(b.high, k))
    if apart and fabs(smaller) != INFINITY and a.maximum != INFINITY:
        a.low += by_power_of_two(loser_low, power - exponent)
        add(&a, by_power_of_two(loser, power - exponent))
    return a


cdef inline void add(State* state, double term) noexcept nogil:
    """Add a term that has the offset and the exponent of the state."""
    cdef double total = state.high + term, term_seen = total - state.high
    state.low += (state.high - (total - term_seen)) + (term - term_seen)
    state.high = total


cdef inline void normalize(vec largest, vec high, vec low, const vec* reference, vec* finishers) noexcept nogil:
    """What makes probabilities of terms whose sum is high + low."""
    cdef vec total = high + low, rest = (high - total) + low, factor = splat(1.0, &total) / total
    finishers[FACTOR] = factor
    finishers[FACTOR_LOW] = factor * (minus_product(splat(1.0, &total), factor, total) - factor * rest)
    find_ties(largest, high, low, reference, finishers)


cdef inline void find_ties(vec largest, vec high, vec low, const vec* reference, vec* finishers) noexcept nogil:
    """Make the probability exactly 1 / m where a row is m equal elements and others too small to matter.

    Terms are rounded and their sum is not, so their quotient may be a neighbour of 1 / m. The row is such a one if its
    sum is that of m unrounded terms to far more digits than chance would have it. An element that is alone (m = 1) needs
    less: that the others are below a quarter of an ULP together.

    m is tested, so an estimate of the quotient is enough to find it; the share of each is worked out where there is one.
    """
    finishers[LIMIT], finishers[SHARE] = splat(INFINITY, &largest), splat(0.0, &largest)
    if powers(&largest) > 1 and not may_have_ties(largest, high, reference):
        return
    cdef vec zero = splat(0.0, &largest), one = splat(1.0, &largest)
    cdef vec rounder = splat(by_type(1.5 * 2.0**23, 1.5 * 2.0**52, &largest), &largest)
    cdef vec top, top_low, bound, others, m, distance
    scaled_exp(&largest, &top, &top_low, 1, reference, 0)
    bound = top * splat(by_type(0.9 * 2.0**-25, 0.9 * 2.0**-54, &top), &top)
    others = (high - top) + (low - top_low)
    m = (high * about_reciprocal(top) + rounder) - rounder
    distance = minus_product(high, m, top) + minus_product(low, m, top_low)
    distance = maximum(distance, zero - distance)
    m = where_at_most(distance, high * splat(by_type(2.0**-32, 2.0**-88, &m), &m), m, splat(INFINITY, &m))
    m = where_at_most(others, bound, one, m)
    # Beyond 4096 the digits of the sum no longer rule out chance.
    m = where_at_most(m, splat(4096.0, &m), m, splat(INFINITY, &m))
    if any_greater(finishers[LIMIT], m):
        finishers[SHARE] = one / m
        finishers[LIMIT] = where_at_most(m, splat(4096.0, &m), finishers[SHARE] * splat(0.75, &m), m)


cdef inline bint may_have_ties(vec largest, vec high, const vec* reference) noexcept nogil:
    """Whether the quotient of a row's sum and its largest term is near an integer, as far as an estimate tells."""
    cdef vec top, ratio, distance
    cdef vec rounder = splat(by_type(1.5 * 2.0**23, 1.5 * 2.0**52, &largest), &largest)
    coarse_exp(&largest, &top, 1, reference, 0)
    ratio = high * about_reciprocal(top)
    distance = ratio - ((ratio + rounder) - rounder)
    return any_greater(ratio * splat(2.0**-12, &ratio), maximum(distance, splat(0.0, &ratio) - distance))


cdef inline void rest_over_top(
    vec largest, vec high, vec low, const vec* reference, vec* ratio, vec* ratio_low
) noexcept nogil:
    """The sum of all but the maximum, high + low, over the maximum's term, which has the errors of the other terms."""
    cdef vec top, top_low
    scaled_exp(&largest, &top, &top_low, 1, reference, 0)
    ratio[0] = high / top
    ratio_low[0] = (minus_product(high, ratio[0], top) + times_plus(splat(0.0, &top) - ratio[0], top_low, low)) / top


cdef inline void log1p_parts(vec ratio, vec ratio_low, vec* high, vec* low) noexcept nogil:
    """high + low = log(1 + ratio + ratio_low) for a ratio of at least 0, `low` being at most a few digits of it.

    1 + ratio = m * 2**k with m between sqrt(1/2) and sqrt(2), and f = m - 1 is exact. With s = f / (2 + f),
    log(1 + f) = log((1 + s) / (1 - s)) = 2 s + s * tail(s**2), where 2 s = f - s * f = f - (f**2 / 2 - s * f**2 / 2).
    """
    cdef vec one = splat(1.0, &ratio), zero = splat(0.0, &ratio), lost, one_plus, k, m, f, s, square, z, tail
    one_plus = two_sum(one, ratio, &lost)
    lost = (lost + ratio_low) / one_plus
    k, m = binary_exponent(one_plus), significand(one_plus)
    k = where_at_most(m, splat(1.4142135623730951, &m), k, k + one)
    m = where_at_most(m, splat(1.4142135623730951, &m), m, m * splat(0.5, &m))
    f = m - one
    s = f / (f + splat(2.0, &f))
    square = f * f * splat(0.5, &f)
    z = s * s
    if vec is f32v:  # minimax for |s| < 0.172: 2**-30.2 of 2 s, 2**-59.5 in float64
        start(&tail, &z, 1, 0.29871732922265126)
        horner(&tail, &z, 1, 0.39977541375987813)
        horner(&tail, &z, 1, 0.6666677638325047)
    else:
        start(&tail, &z, 1, 0.1479595352520824)
        horner(&tail, &z, 1, 0.15314050162244672)
        horner(&tail, &z, 1, 0.18183564342221895)
        horner(&tail, &z, 1, 0.22222198572840465)
        horner(&tail, &z, 1, 0.28571428742391597)
        horner(&tail, &z, 1, 0.39999999999414654)
        horner(&tail, &z, 1, 0.6666666666666734)
    tail = times_plus(s, times_plus(z, tail, square), zero - square)
    high[0] = two_sum(k * splat(by_type(LN2_HIGH_F32, LN2_HIGH_F64, &k), &k), f, low)  # k * LN2_HIGH is exact
    low[0] = low[0] + (tail + times_plus(k, splat(by_type(LN2_LOW_F32, LN2_LOW_F64, &k), &k), lost))


cdef inline void log_sums_of(
    vec largest, vec high, vec low, const vec* reference, vec* log_high, vec* log_low
) noexcept nogil:
    """log(sum(exp(x - maximum))) in two parts, where high + low is the sum without the maximum's own term; 0 where the
    maximum is infinite, so that it alone decides."""
    cdef vec ratio, ratio_low, zero = splat(0.0, &high), leading, remainder
    leading = two_sum(high, low, &remainder)  # for what many small terms have lost may be as large as the rest
    rest_over_top(largest, leading, remainder, reference, &ratio, &ratio_low)
    log1p_parts(ratio, ratio_low, log_high, log_low)
    log_high[0] = is_finite_then(high, is_finite_then(largest, log_high[0], zero), high)
    log_low[0] = is_finite_then(high, is_finite_then(largest, log_low[0], zero), zero)


cdef inline vec add_log_sums(vec largest, vec log_high, vec log_low) noexcept nogil:
    """The maximum plus the logarithm of the sum."""
    cdef vec error, total = two_sum(largest, log_high, &error)
    return is_finite_then(total, total + (error + log_low), largest + log_high)


cdef inline State within_range(State state, const vec* like) noexcept nogil:
    """The state with a sum whose reciprocal has two parts in the element type: that of 2**26 float32 terms of 2**64
    would not."""
    if state.high > by_type(2.0**90, INFINITY, like):
        state.high, state.low, state.exponent = state.high * 2.0**-40, state.low * 2.0**-40, state.exponent + 40.0
    return state


cdef inline void to_registers(State state, const vec* like, vec* high, vec* low, vec* reference) noexcept nogil:
    """The sum and the reference of a state in every lane."""
    cdef double leading = to_lane(state.high, like)
    high[0], low[0] = splat(leading, like), splat((state.high - leading) + state.low, like)
    make_reference(splat(state.offset, like), splat(state.exponent, like), reference)


cdef struct Scale:  # the finishers of one row
    double factor
    double factor_low
    double limit
    double share
    bint is_mended  # whether some probabilities of the row are to be mended


cdef inline bint is_below_mended(vec smallest, vec largest, double n, double temperature) noexcept nogil:
    """Whether rows of n with these maxima may have probabilities below `mending_edge`, where these are the smallest
    logits."""
    # No sum is more than n + 1 times the largest term, or twice the power of two in that.
    cdef vec bits = binary_exponent(splat(n + 1.0, &largest)) - splat(by_type(123.98, 1019.98, &largest), &largest)
    return any_greater(largest + bits * splat(LN2 * temperature, &largest) + spacing_above(largest), smallest)


cdef inline vec spacing_above(vec v) noexcept nogil:
    """At least what lies between numbers of this size."""
    return maximum(v, splat(0.0, &v) - v) * splat(by_type(2.0**-23, 2.0**-52, &v), &v)


cdef inline Scale scale_by(double factor, double factor_low) noexcept nogil:
    cdef Scale scale
    scale.factor, scale.factor_low, scale.limit, scale.share = factor, factor_low, INFINITY, 0.0
    scale.is_mended = False
    return scale


cdef inline Scale scale_in_lane(const vec* finishers, int row) noexcept nogil:
    """The finishers of one of several rows."""
    cdef Scale scale = scale_by(get(finishers + FACTOR, row), get(finishers + FACTOR_LOW, row))
    scale.limit, scale.share = get(finishers + LIMIT, row), get(finishers + SHARE, row)
    return scale


cdef inline void spread_scale(Scale scale, vec* finishers) noexcept nogil:
    """The finishers of one row in every lane."""
    finishers[FACTOR], finishers[FACTOR_LOW] = splat(scale.factor, finishers), splat(scale.factor_low, finishers)
    finishers[LIMIT], finishers[SHARE] = splat(scale.limit, finishers), splat(scale.share, finishers)


cdef inline void put_scale(vec* finishers, int row, Scale scale) noexcept nogil:
    """Set the finishers of one of several rows."""
    put(finishers + FACTOR, row, scale.factor)
    put(finishers + FACTOR_LOW, row, scale.factor_low)
    put(finishers + LIMIT, row, scale.limit)
    put(finishers + SHARE, row, scale.share)


cdef inline Scale scale_of(State state, const vec* like) noexcept nogil:
    """`normalize` for one row."""
    cdef vec[REFERENCE] reference
    cdef vec[FINISHERS] finishers
    cdef vec high, low
    to_registers(state, like, &high, &low, reference)
    normalize(splat(state.maximum, like), high, low, reference, finishers)
    return scale_in_lane(<const vec*>finishers, 0)


cdef inline Scale coarse_scale_of(State state, const vec* like) noexcept nogil:
    """`scale_of` for COARSE terms: the rounding to 16 bits gives equal elements their 1 / m."""
    return scale_by(to_lane(1.0 / to_lane(state.high + state.low, like), like), 0.0)


cdef inline bint is_regular(State state) noexcept nogil:
    """Whether the elements have a positive, finite sum: no NaN, no +inf, not only -inf."""
    return 0.0 < state.high < INFINITY


cdef inline void log_sums_of_state(State state, const vec* like, vec* log_high, vec* log_low) noexcept nogil:
    """`log_sums_of` for a state that holds its maximum apart, in every lane."""
    cdef vec[REFERENCE] reference
    cdef vec high, low
    to_registers(state, like, &high, &low, reference)
    log_sums_of(splat(state.maximum, like), high, low, reference, log_high, log_low)


cdef inline Scale log_scale_of(State state, const vec* like) noexcept nogil:
    """What makes log-probabilities of logits."""
    cdef vec log_high, log_low
    log_sums_of_state(state, like, &log_high, &log_low)
    return scale_by(state.maximum, lane(log_high + log_low, 0))


cdef inline double log_sum(State state, const vec* like) noexcept nogil:
    """log(sum(exp(x - maximum))) of a state that holds its maximum apart."""
    cdef vec log_high, log_low
    log_sums_of_state(state, like, &log_high, &log_low)
    return lane(log_high, 0) + lane(log_low, 0)


cdef inline double logsumexp_of_state(State state, const vec* like) noexcept nogil:
    cdef vec log_high, log_low
    log_sums_of_state(state, like, &log_high, &log_low)
    return lane(add_log_sums(splat(state.maximum, like), log_high, log_low), 0)
