"""The state of a row: its running maximum and sum, with the sum's scale carried as a power of two.

exp(x - offset) is computed as p * 2**k (p in [0.7, 1.42], k an integer), and the sum of such terms is kept relative to
2**exponent. The pair (exponent, sum) is the monoid of online softmax (Milakov and Gimelshein, arXiv 1805.02867) with a
binary exponent in the place of the maximum (Dukhan and Ablavatski, arXiv 2001.04438), so that rescaling is an exact
multiplication by a power of two. It needs no subtraction of the maximum, hence has no cancellation error.

The reduction x = k * ln 2 + r is accurate while |x| is moderate. Beyond (2**10 in float32, 2**14 in float64) the row
has an `offset`, one of its own elements; there x - offset is exact for every x that can matter, since x and offset
are multiples of the same power of two and their difference is short.
"""


cdef enum:
    # The sum of a row is taken in chunks of this many bytes, merged in order: the unit of work for one thread, and of
    # starting again when the first guess of the exponent was too low. The exponentials of a chunk fit the L1 cache.
    CHUNK_BYTES = 32768
    GROUP = 4  # registers that go through the exponential together

cdef extern from *:
    """
    #define LOG2_E 1.4426950408889634
    #define LN2 0.6931471805599453
    /* ln 2 = high + low, the first short enough for k * high to be exact (Cody and Waite). */
    #define LN2_HIGH_F64 6.93147180369123816490e-01
    #define LN2_LOW_F64 1.90821492927058770002e-10
    #define LN2_HIGH_F32 0.693359375
    #define LN2_LOW_F32 -2.12194440e-4
    """
    const double LOG2_E, LN2, LN2_HIGH_F32, LN2_LOW_F32, LN2_HIGH_F64, LN2_LOW_F64


cdef struct State:
    double maximum  # of the elements seen
    double offset
    double exponent
    double high  # high + low: sum of exp(x - offset) * 2**-exponent over the elements seen; in the logarithmic
    double low   # functions without the maximum itself, so that log1p of the rest keeps all its digits


cdef struct Reference:
    double offset
    double exponent  # terms are exp(x - offset) * 2**-exponent
    double magic     # added to x * log2(e): rounds it to an integer and leaves the term's exponent bits behind
    double floor     # what lies below contributes less than any result can show, and is raised to here
    double limit     # elements above need another reference


cdef inline Reference make_reference(double offset, double exponent, const vec* like) noexcept nogil:
    """Terms relative to 2**exponent, which keep all their bits between 2**-125 and 2**127 (float32)."""
    cdef Reference reference
    reference.offset = offset
    reference.exponent = exponent
    reference.magic = by_type(1.5 * 2.0**23 + 127.0, 1.5 * 2.0**52 + 1023.0, like) - exponent
    reference.floor = (exponent - by_type(125.0, 1021.0, like)) * LN2
    reference.limit = INFINITY
    return reference


cdef inline Reference reference_below(double guess, double row_offset, const vec* like) noexcept nogil:
    """The reference for a chunk with an element `guess` that is hoped to be near its maximum.

    Where it needs an offset, it takes the `row_offset` of an earlier chunk if that is near enough for exact differences:
    chunks that share their offset merge exactly.

    The term of `guess` becomes 2**64 (float32; 2**100 in float64): 190 binary digits above the smallest term, so that
    even subnormal results come from full terms, and 32 below the `limit` that true maxima may reach. A chunk of terms
    at the limit sums to 2**109, inside float32.
    """
    cdef double offset = guess
    if fabs(guess) < by_type(1024.0, 16384.0, like):
        offset = 0.0
    elif row_offset != 0.0 and fabs(guess - row_offset) < by_type(256.0, 4096.0, like):
        offset = row_offset
    cdef double k = rint((guess - offset) * LOG2_E)
    cdef Reference reference = make_reference(offset, k - by_type(64.0, 100.0, like), like)
    reference.limit = offset + (k + by_type(32.0, 512.0, like)) * LN2
    return reference


cdef inline void horner(vec* q, const vec* r, int count, double coefficient) noexcept nogil:
    cdef int j
    for j in range(count):
        q[j] = q[j] * r[j] + splat(coefficient, r)


cdef inline void exp_tail(const vec* r, vec* q, int count) noexcept nogil:
    """q with exp(r) = 1 + r + r**2 q on [-ln2/2, ln2/2]; minimax, exp's relative error is 2**-28.2 (float64 2**-57.9)."""
    cdef int j
    for j in range(count):
        q[j] = splat(by_type(1.3814328e-3, 2.4999863292277574e-08, r), r)
    if vec is f32v:
        horner(q, r, count, 8.368848e-3)
        horner(q, r, count, 4.16684e-2)
        horner(q, r, count, 1.666652e-1)
        horner(q, r, count, 4.9999994e-1)
    else:
        horner(q, r, count, 2.7630516674528656e-07)
        horner(q, r, count, 2.7557588370633496e-06)
        horner(q, r, count, 2.480149240587303e-05)
        horner(q, r, count, 0.0001984126950283603)
        horner(q, r, count, 0.0013888888944233843)
        horner(q, r, count, 0.008333333333496862)
        horner(q, r, count, 0.04166666666652816)
        horner(q, r, count, 0.16666666666666408)
        horner(q, r, count, 0.5000000000000011)


cdef inline void scaled_exp(
    const vec* x, vec* terms, vec* residuals, int count, vec offset, vec floor, vec magic
) noexcept nogil:
    """exp(x - offset) * 2**-exponent of a `Reference`; NaN stays NaN, -inf becomes a term that scales to 0.

    `residuals` are what rounding took from the terms: without them the error of a row's largest term, the larger half
    of an ULP, would be the error of the sum and so of every probability.

    `count` registers, at most GROUP, go through each step together: one alone is a chain of 20 operations that wait
    for each other, and a processor's scheduler holds too few of them to overlap enough chains by itself.
    """
    cdef vec[GROUP] z, biased, k, r, q, scale, head, tail
    cdef vec one = splat(1.0, x)
    cdef int j
    for j in range(count):
        z[j] = maximum(floor, x[j] - offset)
    for j in range(count):
        biased[j] = z[j] * splat(LOG2_E, x) + magic
    for j in range(count):
        k[j] = biased[j] - magic
    for j in range(count):
        r[j] = z[j] - k[j] * splat(by_type(LN2_HIGH_F32, LN2_HIGH_F64, x), x)
    for j in range(count):
        r[j] = r[j] - k[j] * splat(by_type(LN2_LOW_F32, LN2_LOW_F64, x), x)
    exp_tail(r, q, count)
    for j in range(count):
        head[j] = one + r[j]
    for j in range(count):  # 1 + r + r**2 q as head + tail, so that only their sum is rounded
        tail[j] = r[j] * r[j] * q[j] + (r[j] - (head[j] - one))
    for j in range(count):
        scale[j] = power_of_two(biased[j])
    for j in range(count):
        head[j] = head[j] * scale[j]
    for j in range(count):
        terms[j] = tail[j] * scale[j] + head[j]
    for j in range(count):  # exact: the product by a power of two is, and so is the difference (Sterbenz)
        residuals[j] = tail[j] * scale[j] - (terms[j] - head[j])


cdef inline vec two_sum(vec a, vec b, vec* error) noexcept nogil:
    """a + b, with its rounding error (Knuth)."""
    cdef vec total = a + b
    cdef vec b_seen = total - a
    error[0] = (a - (total - b_seen)) + (b - b_seen)
    return total


cdef inline vec product(vec v, vec factor, vec factor_low) noexcept nogil:
    """v * (factor + factor_low), rounded once: the product of a row's only term and the reciprocal of its sum is 1."""
    if HAS_FMA:
        return fused(v, factor, v * factor_low)
    # Dekker: halves of v and factor multiply exactly. The detour by 2**64 keeps their products from underflowing where
    # the result is near the smallest normal number.
    cdef vec splitter = splat(by_type(4097.0, 134217729.0, &v), &v), raised = factor * splat(2.0**64, &v)
    cdef vec v_high = v * splitter - (v * splitter - v), v_low = v - v_high
    cdef vec f_high = raised * splitter - (raised * splitter - raised), f_low = raised - f_high
    cdef vec rounded = v * raised
    cdef vec error = ((v_high * f_high - rounded) + v_high * f_low + v_low * f_high) + v_low * f_low
    return (rounded + (error + v * (factor_low * splat(2.0**64, &v)))) * splat(2.0**-64, &v)


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


cdef inline double exp_split(double x, double* exponent) noexcept nogil:
    """exp(x) as p * 2**exponent, accurate however large x is; 0 for x below any use."""
    if x < -1e6:
        exponent[0] = 0.0
        return 0.0
    cdef double k = rint(x * LOG2_E)
    exponent[0] = k
    return exp((x - k * LN2_HIGH_F64) - k * LN2_LOW_F64)


cdef State merge(State a, State b, bint apart) noexcept nogil:
    """The state of the elements of both; exact but for the rounding of the sum where the offsets agree."""
    cdef double p, k, loser, exponent
    if b.offset > a.offset:
        a, b = b, a
    if b.offset != a.offset:
        p = exp_split(b.offset - a.offset, &k)
        b.high, b.low, b.exponent = b.high * p, b.low * p, b.exponent + k
    loser = min(a.maximum, b.maximum)
    a.maximum = max(a.maximum, b.maximum)
    exponent = b.exponent if a.high == 0 else a.exponent if b.high == 0 else max(a.exponent, b.exponent)
    k = max(a.exponent - exponent, -5000.0)
    a.high, a.low, a.exponent = ldexp(a.high, <int>k), ldexp(a.low, <int>k), exponent
    k = max(b.exponent - exponent, -5000.0)
    a.low += ldexp(b.low, <int>k)
    add(&a, ldexp(b.high, <int>k))
    if apart and fabs(loser) != INFINITY and a.maximum != INFINITY:
        p = exp_split(loser - a.offset, &k)
        add(&a, ldexp(p, <int>(k - exponent)))
    return a


cdef inline void add(State* state, double term) noexcept nogil:
    """Add a term that has the offset and the exponent of the state."""
    cdef double total = state.high + term, term_seen = total - state.high
    state.low += (state.high - (total - term_seen)) + (term - term_seen)
    state.high = total


cdef struct Scale:
    # The probability of a term e = exp(x - offset) * 2**-exponent is e * (factor + factor_low).
    double exponent
    double factor
    double factor_low


cdef inline Scale normalize(State state, const vec* like) noexcept nogil:
    """What turns the terms of a row into probabilities.

    The sum is brought to [2**64, 2**65) (float32; 2**100 in float64), so that the smallest subnormal probability comes
    from a normal term and is rounded once.
    """
    cdef Scale scale
    settle_dominated(&state, like)
    cdef double exponent = floor_log2(state.high) - by_type(64.0, 100.0, like)
    cdef double high = state.high * exact_power_of_two(-exponent), low = state.low * exact_power_of_two(-exponent)
    cdef double total = high + low, rest = (high - total) + low
    scale.exponent = state.exponent + exponent
    scale.factor = to_lane(1.0 / total, like)
    scale.factor_low = scale.factor * (fma(-scale.factor, total, 1.0) - scale.factor * rest)
    return scale


cdef inline void settle_dominated(State* state, const vec* like) noexcept nogil:
    """Make the probability of an element that is all of its row's sum exactly 1.

    Its term is rounded and the sum is not, so their quotient may be a neighbour of 1. Where the other elements are less
    than a quarter of an ULP together, the sum is brought within a quarter of an ULP of the term.
    """
    cdef double top, top_low, bound, others
    if state.high >= 1.5 * exact_power_of_two(rint((state.maximum - state.offset) * LOG2_E) - state.exponent):
        return  # the largest term is below sqrt(2) times this power of two: there are others
    top = term_of(state.maximum, state[0], like, &top_low)
    bound = 0.9 * top * by_type(2.0**-25, 2.0**-54, like)
    others = (state.high - top) + (state.low - top_low)
    if others <= bound:
        state.high, state.low = top, max(-bound, min(bound, top_low + others))


cdef inline double term_of(double x, State state, const vec* like, double* residual) noexcept nogil:
    """The term of one element, relative to the state's exponent, and what rounding took from it."""
    cdef Reference reference = make_reference(state.offset, state.exponent, like)
    cdef vec logit = splat(x, like), term, rounded_off
    scaled_exp(
        &logit, &term, &rounded_off, 1, splat(reference.offset, like), splat(reference.floor, like),
        splat(reference.magic, like))
    residual[0] = lane(rounded_off, 0)
    return lane(term, 0)


cdef inline bint is_regular(State state) noexcept nogil:
    """Whether the elements have a positive, finite sum: no NaN, no +inf, not only -inf."""
    return 0.0 < state.high < INFINITY


cdef inline double log_sum(State state, const vec* like) noexcept nogil:
    """log(sum(exp(x - maximum))) of a state that holds its maximum apart; 0 where the maximum is infinite, so that it
    alone decides."""
    cdef double top, top_low, rest, rest_low
    if state.high != state.high or state.maximum != state.maximum:
        return state.high + state.maximum
    if fabs(state.maximum) == INFINITY:
        return 0.0
    # The rest of the sum over the term of the maximum, which has the errors of the other terms and no more.
    top = term_of(state.maximum, state, like, &top_low)
    rest = state.high / top
    rest_low = (fma(-rest, top, state.high) + (state.low - rest * top_low)) / top
    return log1p(rest) + rest_low / (1.0 + rest)
