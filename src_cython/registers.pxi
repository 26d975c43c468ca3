"""The registers of simd.h under one name for both element types.

Cython takes `f32v` and `f64v` for numbers, so kernels are written as if for one element: `a * b + c` is the compiler's
arithmetic on whole registers. A row is a sequence of registers and, at its end, one that is only partly filled.
"""

cdef extern from "simd.h" nogil:
    ctypedef float f32v
    ctypedef double f64v
    const int REGISTER_BYTES, BLOCK_BYTES
    const bint HAS_FMA
    enum:
        GROUP

    f32v f32v_splat(double c)
    f64v f64v_splat(double c)
    f32v f32v_load(const f32v* p)
    f64v f64v_load(const f64v* p)
    f32v f32v_load_first(const f32v* p, int count, f32v fill)
    f64v f64v_load_first(const f64v* p, int count, f64v fill)
    void f32v_store(f32v* p, f32v v)
    void f64v_store(f64v* p, f64v v)
    void f32v_store_first(f32v* p, f32v v, int count)
    void f64v_store_first(f64v* p, f64v v, int count)
    void f32v_stream(f32v* p, f32v v)
    void f64v_stream(f64v* p, f64v v)
    f32v f32v_drop_first_equal(f32v v, f32v keys, double key)
    f64v f64v_drop_first_equal(f64v v, f64v keys, double key)
    f32v f32v_maximum(f32v a, f32v b)
    f64v f64v_maximum(f64v a, f64v b)
    f32v f32v_minimum(f32v a, f32v b)
    f64v f64v_minimum(f64v a, f64v b)
    f32v f32v_minimum_above(f32v v, f32v bound, f32v least)
    f64v f64v_minimum_above(f64v v, f64v bound, f64v least)
    f32v f32v_fused(f32v a, f32v b, f32v c)
    f64v f64v_fused(f64v a, f64v b, f64v c)
    const int F32_POWERS, F64_POWERS, F32_POWERS_LOG2, F64_POWERS_LOG2
    const f32v f32v_powers, f32v_powers_error
    const f64v f64v_powers, f64v_powers_error
    f32v f32v_pick(f32v table, f32v v)
    f64v f64v_pick(f64v table, f64v v)
    f32v f32v_about_reciprocal(f32v v)
    f64v f64v_about_reciprocal(f64v v)
    bint f32v_any_greater(f32v a, f32v b)
    bint f64v_any_greater(f64v a, f64v b)
    f32v f32v_raise(f32v v, f32v magic, int dropped)
    f64v f64v_raise(f64v v, f64v magic, int dropped)
    f32v f32v_significand(f32v v)
    f64v f64v_significand(f64v v)
    f32v f32v_binary_exponent(f32v v)
    f64v f64v_binary_exponent(f64v v)
    f32v f32v_where_at_most(f32v a, f32v b, f32v x, f32v y)
    f64v f64v_where_at_most(f64v a, f64v b, f64v x, f64v y)
    f32v f32v_where_true(const char* p, int count, f32v v, f32v fill)
    f64v f64v_where_true(const char* p, int count, f64v v, f64v fill)
    f32v f32v_where_nonzero(f32v p, f32v v)
    f64v f64v_where_nonzero(f64v p, f64v v)
    f32v f32v_swap(f32v v, unsigned distance)
    f64v f64v_swap(f64v v, unsigned distance)
    void f32v_turn_blocks(f32v* rows)
    void f64v_turn_blocks(f64v* rows)
    f32v f32v_load_blocks(const char* p, Py_ssize_t step)
    f64v f64v_load_blocks(const char* p, Py_ssize_t step)
    void f32v_store_blocks(char* p, Py_ssize_t step, const f32v* rows)
    void f64v_store_blocks(char* p, Py_ssize_t step, const f64v* rows)
    void f32v_transpose(f32v* rows)
    void f64v_transpose(f64v* rows)
    float f32v_lane(f32v v, int lane)
    double f64v_lane(f64v v, int lane)
    ctypedef unsigned short u16v
    u16v u16v_load_first(const uint16_t* p, int count)
    void u16v_store_first(uint16_t* p, u16v v, int count)
    f32v filled_up(f32v v, int count, f32v fill)
    f32v f32v_from_float16(u16v v)
    u16v f32v_to_float16(f32v v)
    f32v f32v_from_bfloat16(u16v v)
    u16v f32v_to_bfloat16(f32v v)
    double exact_power_of_two(double k)
    long power_of_two_from(long n)
    void prefetch(const void* p)
    void prefetch_far(const char* p, long step, int count)
    bint is_zen_5
    int first_cache_of_amd()
    void stream_fence()
    bint processor_runs(const char* tier)

cdef extern from "conversions.h" nogil:
    ctypedef enum Storage "enum Storage":  # how an element lies in memory
        AS_COMPUTED
        FLOAT16
        BFLOAT16
        FLOAT32

    int size_of_storage(int storage)
    void f32v_read(const char* source, long stride, f32v* target, long n, int storage)
    void f64v_read(const char* source, long stride, f64v* target, long n, int storage)
    void f64v_write(const f64v* source, char* target, long stride, long n, int storage)

ctypedef fused vec:
    f32v
    f64v


# `like` tells the element type and is never read.

cdef inline double by_type(double for_f32, double for_f64, const vec* like) noexcept nogil:
    """The constant that belongs to the element type."""
    if vec is f32v:
        return for_f32
    else:
        return for_f64


cdef inline double to_lane(double c, const vec* like) noexcept nogil:
    """c, rounded to the element type."""
    if vec is f32v:
        return <float>c
    else:
        return c


cdef inline int itemsize(const vec* like) noexcept nogil:
    if vec is f32v:
        return 4
    else:
        return 8


cdef inline int lanes(const vec* like) noexcept nogil:
    """Elements in a register."""
    return REGISTER_BYTES // itemsize(like)


cdef inline vec splat(double c, const vec* like) noexcept nogil:
    """A register with `c` in every lane."""
    if vec is f32v:
        return f32v_splat(c)
    else:
        return f64v_splat(c)


cdef inline vec load(const vec* p) noexcept nogil:
    if vec is f32v:
        return f32v_load(p)
    else:
        return f64v_load(p)


cdef inline vec load_first(const vec* p, int count, vec fill) noexcept nogil:
    """The first `count` elements at `p`, `fill` in the lanes behind them."""
    if vec is f32v:
        return f32v_load_first(p, count, fill)
    else:
        return f64v_load_first(p, count, fill)


cdef inline void store(vec* p, vec v) noexcept nogil:
    if vec is f32v:
        f32v_store(p, v)
    else:
        f64v_store(p, v)


cdef inline void store_first(vec* p, vec v, int count) noexcept nogil:
    if vec is f32v:
        f32v_store_first(p, v, count)
    else:
        f64v_store_first(p, v, count)


cdef inline void stream(vec* p, vec v) noexcept nogil:
    """Store past the caches; `p` is aligned to a whole register."""
    if vec is f32v:
        f32v_stream(p, v)
    else:
        f64v_stream(p, v)


cdef inline vec drop_first_equal(vec v, vec keys, double key) noexcept nogil:
    """v, but for 0 in the first lane where `keys` equals `key`."""
    if vec is f32v:
        return f32v_drop_first_equal(v, keys, key)
    else:
        return f64v_drop_first_equal(v, keys, key)


cdef inline vec maximum(vec a, vec b) noexcept nogil:
    """The larger of each lane; `b` where either is NaN."""
    if vec is f32v:
        return f32v_maximum(a, b)
    else:
        return f64v_maximum(a, b)


cdef inline vec minimum(vec a, vec b) noexcept nogil:
    """The smaller of each lane; `b` where either is NaN."""
    if vec is f32v:
        return f32v_minimum(a, b)
    else:
        return f64v_minimum(a, b)


cdef inline vec minimum_above(vec v, vec bound, vec least) noexcept nogil:
    """The smaller of v and `least` in the lanes where v > bound, `least` in the others."""
    if vec is f32v:
        return f32v_minimum_above(v, bound, least)
    else:
        return f64v_minimum_above(v, bound, least)


cdef inline vec fused(vec a, vec b, vec c) noexcept nogil:
    """a * b + c with one rounding, where HAS_FMA."""
    if vec is f32v:
        return f32v_fused(a, b, c)
    else:
        return f64v_fused(a, b, c)


cdef inline vec about_reciprocal(vec v) noexcept nogil:
    """1 / v to 14 bits at least."""
    if vec is f32v:
        return f32v_about_reciprocal(v)
    else:
        return f64v_about_reciprocal(v)


cdef inline bint any_greater(vec a, vec b) noexcept nogil:
    """Whether a > b in any lane."""
    if vec is f32v:
        return f32v_any_greater(a, b)
    else:
        return f64v_any_greater(a, b)


cdef inline int powers(const vec* like) noexcept nogil:
    """How many powers 2**(j / powers) there is a table of; 1 without a table."""
    if vec is f32v:
        return F32_POWERS
    else:
        return F64_POWERS


cdef inline vec times_power(vec v, vec magic) noexcept nogil:
    """v * 2**k, where the lowest bits of `magic` hold powers * k + j, and both are normal numbers."""
    if vec is f32v:
        return f32v_raise(v, magic, F32_POWERS_LOG2)
    else:
        return f64v_raise(v, magic, F64_POWERS_LOG2)


cdef inline vec root_of_two(vec magic, vec* error) noexcept nogil:
    """2**(j / powers), rounded, and its relative error, where the lowest bits of `magic` hold j."""
    if vec is f32v:
        error[0] = f32v_pick(f32v_powers_error, magic)
        return f32v_pick(f32v_powers, magic)
    else:
        error[0] = f64v_pick(f64v_powers_error, magic)
        return f64v_pick(f64v_powers, magic)


cdef inline vec significand(vec v) noexcept nogil:
    """The m of v = m * 2**k with 1 <= |m| < 2, for normal v."""
    if vec is f32v:
        return f32v_significand(v)
    else:
        return f64v_significand(v)


cdef inline vec binary_exponent(vec v) noexcept nogil:
    """The k of v = m * 2**k with 1 <= |m| < 2, for normal v."""
    if vec is f32v:
        return f32v_binary_exponent(v)
    else:
        return f64v_binary_exponent(v)


cdef inline vec where_at_most(vec a, vec b, vec x, vec y) noexcept nogil:
    """x in the lanes where a <= b, y in the others."""
    if vec is f32v:
        return f32v_where_at_most(a, b, x, y)
    else:
        return f64v_where_at_most(a, b, x, y)


cdef inline vec where_nonzero(vec p, vec v) noexcept nogil:
    """v, but 0 in the lanes where p is."""
    if vec is f32v:
        return f32v_where_nonzero(p, v)
    else:
        return f64v_where_nonzero(p, v)


cdef inline vec where_true(const char* p, int count, vec v, vec fill) noexcept nogil:
    """v where a byte of the `count` at `p` is not 0; `fill` where it is, and in the lanes behind them."""
    if vec is f32v:
        return f32v_where_true(p, count, v, fill)
    else:
        return f64v_where_true(p, count, v, fill)


cdef inline vec swap(vec v, int distance) noexcept nogil:
    """Lane i of the result is lane i ^ distance of v."""
    if vec is f32v:
        return f32v_swap(v, distance)
    else:
        return f64v_swap(v, distance)


cdef inline void transpose(vec* rows) noexcept nogil:
    """Lane i of register j becomes lane j of register i, of as many registers as each has lanes."""
    if vec is f32v:
        f32v_transpose(rows)
    else:
        f64v_transpose(rows)


cdef inline int block_length(const vec* like) noexcept nogil:
    """Elements in a block."""
    return BLOCK_BYTES // itemsize(like)


cdef inline void turn_blocks(vec* rows) noexcept nogil:
    """`transpose` within blocks, of as many registers as a block has elements."""
    if vec is f32v:
        f32v_turn_blocks(rows)
    else:
        f64v_turn_blocks(rows)


cdef inline vec load_blocks(const char* p, Py_ssize_t step, const vec* like) noexcept nogil:
    """A register of blocks that are `step` bytes apart."""
    if vec is f32v:
        return f32v_load_blocks(p, step)
    else:
        return f64v_load_blocks(p, step)


cdef inline void store_blocks(char* p, Py_ssize_t step, const vec* rows) noexcept nogil:
    """Store as many registers as a block has elements: their first blocks, `step` bytes apart, then their second ones."""
    if vec is f32v:
        f32v_store_blocks(p, step, rows)
    else:
        f64v_store_blocks(p, step, rows)


cdef inline double lane(vec v, int index) noexcept nogil:
    if vec is f32v:
        return f32v_lane(v, index)
    else:
        return f64v_lane(v, index)


cdef inline void put(vec* registers, Py_ssize_t element, double value) noexcept nogil:
    """Set one element of an array of registers."""
    if vec is f32v:
        (<float*>registers)[element] = <float>value
    else:
        (<double*>registers)[element] = value


cdef inline double get(const vec* registers, Py_ssize_t element) noexcept nogil:
    if vec is f32v:
        return (<const float*>registers)[element]
    else:
        return (<const double*>registers)[element]


cdef inline int stored_size(Storage storage, const vec* like) noexcept nogil:
    """Bytes of an element in memory."""
    return itemsize(like) if storage == AS_COMPUTED else size_of_storage(storage)


cdef inline vec load_stored(const void* p, int count, vec fill, Storage storage) noexcept nogil:
    """The first `count` elements at `p`, `fill` in the lanes behind them."""
    if vec is f32v:
        if storage == FLOAT16:
            return filled_up(f32v_from_float16(u16v_load_first(<const uint16_t*>p, count)), count, fill)
        if storage == BFLOAT16:
            return filled_up(f32v_from_bfloat16(u16v_load_first(<const uint16_t*>p, count)), count, fill)
    if storage != AS_COMPUTED:
        read_converted(<const char*>p, stored_size(storage, &fill), &fill, count, storage)
        return fill
    return load_first(<const vec*>p, count, fill)


cdef inline void read_converted(
    const char* source, Py_ssize_t stride, vec* target, Py_ssize_t n, Storage storage
) noexcept nogil:
    """Copy elements of another type than is computed in to contiguous memory."""
    if vec is f32v:
        f32v_read(source, stride, target, n, storage)
    else:
        f64v_read(source, stride, target, n, storage)


cdef inline void store_stored(void* p, vec v, int count, Storage storage) noexcept nogil:
    if vec is f32v:
        if storage == FLOAT16:
            u16v_store_first(<uint16_t*>p, f32v_to_float16(v), count)
            return
        if storage == BFLOAT16:
            u16v_store_first(<uint16_t*>p, f32v_to_bfloat16(v), count)
            return
    elif storage != AS_COMPUTED:
        f64v_write(&v, <char*>p, stored_size(storage, &v), count, storage)
        return
    store_first(<vec*>p, v, count)
