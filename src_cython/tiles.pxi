"""Kernels for tiles: as many rows side by side as a register has lanes, so that register j holds element j of each.

Adjacent rows, as where the reduced axis is not the last, lie in memory like this. Short rows are turned on their side
for it: one of ten elements would leave most lanes of a register empty, and spend its time on what comes after the sum.
The bits are those of a row alone, because there is a sum for each of the lanes that its elements would have there.
"""


cdef enum:
    TOGETHER = 4  # lanes of a tile whose sums stay in registers while their elements are folded
    # Of short rows at a time: with 4, (1000, 10) float32 take 2 % longer, with 2, 7 %. But fewer where the tiles would
    # take half of the L1 cache, which the rows need too: (1000, 64) float32 take 30.1 us instead of 33.9, float64 58
    # instead of 68.
    TURNED_TILES = 8
    TURNED_BYTES = 20480
    MAX_TILES = 32  # of a strip
    # Tiles of a strip that are read or written together, at most twice a GROUP. One after the other, an address is computed
    # for each register: (1000, 64) float32 on axis 0 take 11 us instead of 18.
    ABREAST = 8
    MAX_BLOCK = BLOCK_BYTES // 4  # elements of a block
    # What longer tiles are made of next is fetched to the second-level cache: (300000, 37) float32 take 4 % less time.
    LONG_TILE = 16
    # So many rows ahead a strip fetches the lines that it writes: (2000, 3000) float32 on axis 0 take 2.8 ms, with 8 rows
    # 3.0, with 4 rows 3.2.
    PREFETCH_LINES = 16


cdef inline int turned_tiles(Py_ssize_t n) noexcept nogil:
    """How many tiles of rows of n elements are turned at a time."""
    return <int>min(max(TURNED_BYTES // (max(n, <Py_ssize_t>1) * REGISTER_BYTES), <Py_ssize_t>2), <Py_ssize_t>TURNED_TILES)


cdef inline void turn(
    const void* source, Py_ssize_t source_stride, Py_ssize_t n_rows, Py_ssize_t n_columns, void* target,
    Py_ssize_t target_stride, Storage source_storage, Storage target_storage, const vec* like
) noexcept nogil:
    """Copy rows of adjacent elements as columns, square by square; strides are in bytes.

    Whole squares have a copy of the code that decides nothing: (1000, 10) float32 take 7.6 us, and took 9.3 before that
    and the zips of `transpose`.
    """
    cdef Py_ssize_t row = 0, column, width = lanes(like)
    cdef Py_ssize_t source_size = stored_size(source_storage, like), target_size = stored_size(target_storage, like)
    cdef const char* from_square
    cdef char* to_square
    while row < n_rows:
        column = 0
        while column < n_columns:
            from_square = <const char*>source + row * source_stride + column * source_size
            to_square = <char*>target + column * target_stride + row * target_size
            if n_rows - row >= width:
                turn_square(
                    from_square, source_stride, <int>width, <int>min(width, n_columns - column), to_square, target_stride,
                    source_storage, target_storage, like)
            else:
                turn_square(
                    from_square, source_stride, <int>(n_rows - row), <int>min(width, n_columns - column), to_square,
                    target_stride, source_storage, target_storage, like)
            column += width
        row += width


cdef inline void turn_square(
    const char* source, Py_ssize_t source_stride, int height, int breadth, char* target, Py_ssize_t target_stride,
    Storage source_storage, Storage target_storage, const vec* like
) noexcept nogil:
    cdef vec[MAX_LANES] square
    cdef vec fill = splat(0.0, like)
    cdef int i
    for i in range(lanes(like)):
        square[i] = fill
        if i < height:
            square[i] = load_stored(source + i * source_stride, breadth, fill, source_storage)
    transpose(square)
    for i in range(breadth):
        if height == lanes(like) and target_storage == AS_COMPUTED:  # a load has to wait for a store by a mask
            store(<vec*>(target + i * target_stride), square[i])
        else:
            store_stored(target + i * target_stride, square[i], height, target_storage)


cdef inline bint is_in_blocks(Py_ssize_t n, Py_ssize_t stride, int count, Storage storage, const vec* like) noexcept nogil:
    """Whether a tile is read or written by blocks: one of as many rows as a register has lanes, that are no shorter than a
    block or adjacent. Written by squares, of which they fill little, (2048, 3) float32 take 12.0 us instead of 9.0."""
    return storage == AS_COMPUTED and count == lanes(like) and (
        n >= block_length(like) or stride == n * itemsize(like))


cdef inline bint has_room_behind(Py_ssize_t n, Py_ssize_t n_rows, const vec* like) noexcept nogil:
    """Whether n_rows of n elements behind a tile hold what its last block has beyond its last row."""
    return n_rows * n >= block_length(like) - n


cdef inline void read_tile(
    const char* rows, Py_ssize_t stride, Py_ssize_t n, vec* tile, vec* smallest, vec* largest
) noexcept nogil:
    """Turn as many rows as a register has lanes to a tile, a block of columns at a time, and find the extremes.

    A square needs half the registers there are, and most of one is empty if rows are short: by squares (1000, 5) float32
    take 9.6 us instead of 7.2, (1000, 37) 28.2 instead of 24.8. Rows shorter than a block are read with what is behind.
    """
    cdef vec[MAX_LANES] band
    cdef vec top = splat(-INFINITY, <const vec*>tile), bottom = splat(INFINITY, <const vec*>tile)
    cdef Py_ssize_t column = 0, length = block_length(<const vec*>tile), first
    cdef int i
    while column < n:
        first = max(<Py_ssize_t>0, min(column, n - length))  # the last block may overlap the one before
        for i in range(length):
            band[i] = load_blocks(rows + i * stride + first * itemsize(<const vec*>tile), length * stride, <const vec*>tile)
        turn_blocks(band)
        for i in range(length):
            if first + i < n:
                store(tile + first + i, band[i])
                top, bottom = maximum(band[i], top), minimum(band[i], bottom)
        column += length
    smallest[0], largest[0] = bottom, top


cdef inline void write_tile(
    Finish kind, const vec* tile, Py_ssize_t n, const vec* reference, const vec* finishers, bint has_ties, char* rows,
    Py_ssize_t stride
) noexcept nogil:
    """The reverse of `read_tile`, which finishes the elements on their way.

    Rows are written in their order, as the next takes the place of what a block has beyond a shorter row. There the last
    element is repeated: what lies behind may be subnormal, with which some processors take a hundred cycles.
    """
    cdef vec[MAX_LANES] band
    cdef Py_ssize_t column = 0, length = block_length(tile), first
    cdef int i
    while column < n:
        first = max(<Py_ssize_t>0, min(column, n - length))
        for i in range(length):
            band[i] = load(tile + min(first + i, n - 1))
        finish(band, <int>length, kind, reference, finishers, 0, has_ties)
        turn_blocks(band)
        store_blocks(rows + first * itemsize(tile), stride, <const vec*>band)
        column += length


cdef void write_mended_tile(
    const vec* tile, Py_ssize_t n, const vec* reference, const vec* finishers, char* rows, Py_ssize_t stride
) noexcept nogil:
    """`write_tile` for logits, of which some have probabilities that are to be mended."""
    write_tile(MENDED_EXP_SCALE, tile, n, reference, finishers, True, rows, stride)


cdef inline const vec* below(const vec* p, Py_ssize_t row, Py_ssize_t stride) noexcept nogil:
    return <const vec*>(<const char*>p + row * stride)


cdef struct Columns:  # adjacent rows, as they are shared out among tiles
    int n_tiles
    int[MAX_TILES] first
    int[MAX_TILES] count


cdef inline Columns share_out(Py_ssize_t n_rows, int left_out, const vec* like) noexcept nogil:
    """Share rows out among tiles, the first of which leaves out some lanes for the others to begin at a cache line."""
    cdef Columns columns
    cdef int t
    columns.n_tiles = <int>(left_out + n_rows + lanes(like) - 1) // lanes(like)
    for t in range(columns.n_tiles):
        columns.first[t] = max(t * lanes(like) - left_out, 0)
        columns.count[t] = <int>min(n_rows, <Py_ssize_t>((t + 1) * lanes(like) - left_out)) - columns.first[t]
    return columns


cdef bint row_of_tile_has_nan(const vec* tile, Py_ssize_t n, int row) noexcept nogil:
    cdef Py_ssize_t element
    for element in range(n):
        if get(tile + element, row) != get(tile + element, row):
            return True
    return False


cdef inline int lanes_with_elements(Py_ssize_t n, const vec* like) noexcept nogil:
    """In how many of its lanes a row of n elements would have any."""
    return <int>min(n, <Py_ssize_t>lanes(like))


cdef struct Upcoming:  # what is probably read next, fetched while terms are computed: a cache line for each register
    const char* place
    Py_ssize_t step  # from one line to the next, in bytes
    Py_ssize_t per_piece  # lines that follow each other
    Py_ssize_t left  # of them, in this piece
    Py_ssize_t gap  # between pieces, in bytes
    Py_ssize_t back  # further after each group of tiles
    bint is_far  # whether it goes to the second-level cache, as the first has no room for it


cdef inline Upcoming nothing_upcoming(const vec* tiles) noexcept nogil:
    cdef Upcoming nothing
    nothing.place, nothing.step, nothing.gap, nothing.back, nothing.is_far = <const char*>tiles, 0, 0, 0, False
    nothing.per_piece = nothing.left = <Py_ssize_t>1 << 62
    return nothing


cdef inline void fetch(Upcoming* upcoming, int count) noexcept nogil:
    """Fetch the next `count` lines."""
    cdef int j
    if upcoming.is_far:
        prefetch_far(upcoming.place, upcoming.step, count)
    else:
        for j in range(count):
            prefetch(upcoming.place + j * upcoming.step)
    upcoming.place += count * upcoming.step
    upcoming.left -= count
    if upcoming.left <= 0:
        upcoming.place += upcoming.gap
        upcoming.left = upcoming.per_piece


cdef inline void fold_tile_elements(
    vec* tile, Py_ssize_t n, Upcoming* upcoming, bint keep, bint apart, Arithmetic arithmetic, const vec* reference,
    vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """Fold the elements into their lanes' sums; with `keep`, terms take the place of the elements."""
    cdef int n_lanes = lanes_with_elements(n, reference), l = 0
    while l + TOGETHER <= n_lanes:
        fold_lanes(tile, l, TOGETHER, n, upcoming, keep, apart, arithmetic, reference, tops + l, highs + l, lows + l)
        l += TOGETHER
    while l < n_lanes:
        fold_lanes(tile, l, 1, n, upcoming, keep, apart, arithmetic, reference, tops + l, highs + l, lows + l)
        l += 1


cdef inline void fold_lanes(
    vec* tile, int first, int count, Py_ssize_t n, Upcoming* upcoming, bint keep, bint apart,
    Arithmetic arithmetic, const vec* reference, vec* tops, vec* highs, vec* lows
) noexcept nogil:
    """Fold the elements of `count` lanes, from the `first` on."""
    cdef vec[TOGETHER] terms, top, high, low, earlier
    cdef vec zero = splat(0.0, reference), base = zero if apart or arithmetic == COARSE else sum_base(n, reference)
    cdef Py_ssize_t element = first, end_of_run = first + RUN * lanes(reference)
    cdef Upcoming own = upcoming[0]
    cdef int j
    for j in range(count):
        top[j], high[j], low[j], earlier[j] = splat(-INFINITY, reference), base, zero, zero
    while element + count <= n:
        fold_registers(tile + element, terms, count, top, high, low, apart, arithmetic, reference, 0, 1)
        fetch(&own, count)
        for j in range(count):
            if keep:
                tile[element + j] = terms[j]
        element += lanes(reference)
        if element == end_of_run:
            end_of_run += RUN * lanes(reference)
            for j in range(count):
                if arithmetic == COARSE:
                    earlier[j], high[j] = earlier[j] + high[j], zero
                else:
                    earlier[j], low[j] = earlier[j] + low[j], zero
    for j in range(count):
        if element + j < n:  # in the last row of lanes, which is shorter
            fold_registers(tile + element + j, terms, 1, top + j, high + j, low + j, apart, arithmetic, reference, 0, 1)
            fetch(&own, 1)
            if keep:
                tile[element + j] = terms[0]
        if arithmetic == COARSE:
            highs[j], lows[j] = earlier[j] + high[j], zero
        else:
            tops[j], highs[j], lows[j] = top[j], high[j] - base, earlier[j] + low[j]
    upcoming[0] = own


cdef void sum_tile(
    vec* tile, Py_ssize_t n, Upcoming* upcoming, bint keep, bint apart, Arithmetic arithmetic, vec largest,
    const vec* reference, vec* high, vec* low
) noexcept nogil:
    cdef vec[MAX_LANES] tops, highs, lows
    cdef int n_lanes = lanes_with_elements(n, reference)
    if vec is f32v and arithmetic == COARSE:
        fold_tile_elements(tile, n, upcoming, True, False, COARSE, reference, tops, highs, lows)
        merge_coarse_lanes(highs, n_lanes)
        high[0], low[0] = highs[0], splat(0.0, reference)
        return
    if apart:
        fold_tile_elements(tile, n, upcoming, False, True, FULL, reference, tops, highs, lows)
    elif arithmetic == MODERATE:
        if keep:
            fold_tile_elements(tile, n, upcoming, True, False, MODERATE, reference, tops, highs, lows)
        else:
            fold_tile_elements(tile, n, upcoming, False, False, MODERATE, reference, tops, highs, lows)
    elif keep:
        fold_tile_elements(tile, n, upcoming, True, False, FULL, reference, tops, highs, lows)
    else:
        fold_tile_elements(tile, n, upcoming, False, False, FULL, reference, tops, highs, lows)
    merge_lanes(tops, largest, n_lanes, apart, reference, highs, lows)
    high[0], low[0] = highs[0], lows[0]


cdef inline void fold_beside(
    vec* tiles, Py_ssize_t tile_size, Upcoming* upcoming, bint keep, Arithmetic arithmetic,
    const vec* references, vec* highs, vec* lows
) noexcept nogil:
    """Fold an element of each row of GROUP tiles."""
    cdef vec[GROUP] logits, terms
    cdef int j
    for j in range(GROUP):
        logits[j] = tiles[j * tile_size]
    fetch(upcoming, GROUP)
    fold_registers(logits, terms, GROUP, <vec*>NULL, highs, lows, False, arithmetic, references, 1, 1)
    for j in range(GROUP):
        if keep:
            tiles[j * tile_size] = terms[j]


cdef inline void sum_short_tiles(
    vec* tiles, Py_ssize_t tile_size, Py_ssize_t n, Upcoming* upcoming, bint keep, Arithmetic arithmetic,
    const vec* references, vec* high, vec* low
) noexcept nogil:
    """`sum_tile` for GROUP tiles of short rows, without their maxima apart.

    It goes element by element with the tiles side by side, as one tile has too few elements to go through the
    exponential together: (2048, 3) float32 take 12.0 us instead of 13.3. What is added up for each lane is COARSE terms, or
    what the exact sums of the high parts leave.
    """
    cdef vec[MAX_LANES * GROUP] sums
    cdef vec[GROUP] sum_of_lane
    cdef vec zero = splat(0.0, references), base = sum_base(n, references)
    cdef bint is_coarse = arithmetic == COARSE
    cdef int n_lanes = lanes_with_elements(n, references), element, j, l, distance = lanes(references) // 2
    for j in range(GROUP):
        high[j] = base
    for element in range(n_lanes):
        for j in range(GROUP):
            sum_of_lane[j] = zero
        fold_beside(
            tiles + element, tile_size, upcoming, keep, arithmetic, references, &sum_of_lane[0] if is_coarse else high,
            &sum_of_lane[0])
        for j in range(GROUP):
            sums[element * GROUP + j] = sum_of_lane[j]
    for element in range(n_lanes, n):
        l = element % lanes(references) * GROUP
        fold_beside(
            tiles + element, tile_size, upcoming, keep, arithmetic, references, &sums[l] if is_coarse else high, &sums[l])
    while distance:
        for l in range(min(distance, n_lanes - distance) * GROUP):
            sums[l] = sums[l] + sums[l + distance * GROUP]
        distance //= 2
    for j in range(GROUP):
        high[j], low[j] = sums[j] if is_coarse else high[j] - base, sums[j]


cdef inline vec tile_extremes(const vec* tile, Py_ssize_t n, vec* smallest) noexcept nogil:
    """The maxima of the rows over all elements that are not NaN, and the minima."""
    cdef vec top = splat(-INFINITY, tile), bottom = splat(INFINITY, tile)
    cdef Py_ssize_t element
    for element in range(n):
        # In this order of operands a NaN is passed over.
        top, bottom = maximum(tile[element], top), minimum(tile[element], bottom)
    smallest[0] = bottom
    return top


cdef void fold_tiles(
    vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Upcoming* upcoming, bint keep,
    bint apart, bint coarse, bint has_zero, const vec* row_offsets, const vec* smallest, vec* references, vec* largest,
    vec* high, vec* low
) noexcept nogil:
    """The references and sums of the rows over a chunk, whose maxima and minima are given; with `keep`, or if they are
    COARSE, tiles become terms.

    Each step is taken for all tiles before the next: one tile alone is a chain of some hundred operations that wait for
    each other. (1000, 10) float32 take 9.3 us instead of 11.4.
    """
    cdef vec enough, high_apart, low_apart
    cdef vec* tile
    cdef int t, row
    for t in range(columns.n_tiles):
        largest[t] = raised_to_zero(largest[t], has_zero)
    for t in range(columns.n_tiles):
        if coarse:
            coarse_reference_at(largest[t], references + t * REFERENCE)
        else:
            reference_at(largest[t], row_offsets[t], references + t * REFERENCE)
    t = 0
    while n <= SHORT and t + GROUP <= columns.n_tiles:
        if vec is f32v and coarse:
            sum_short_tiles(
                tiles + t * tile_size, tile_size, n, upcoming, True, COARSE, references + t * REFERENCE, high + t, low + t)
        elif keep:
            sum_short_tiles(
                tiles + t * tile_size, tile_size, n, upcoming, True, FULL, references + t * REFERENCE, high + t, low + t)
        else:
            sum_short_tiles(
                tiles + t * tile_size, tile_size, n, upcoming, False, FULL, references + t * REFERENCE, high + t, low + t)
        upcoming.place += upcoming.back
        t += GROUP
    while t < columns.n_tiles:
        sum_tile(
            tiles + t * tile_size, n, upcoming, keep, False,
            COARSE if coarse else arithmetic_for(smallest[t], references + t * REFERENCE), largest[t],
            references + t * REFERENCE, high + t, low + t)
        t += 1
    for t in range(columns.n_tiles if has_zero else 0):
        add_zero(COARSE if coarse else FULL, references + t * REFERENCE, high + t, low + t)
    for t in range(columns.n_tiles):
        tile = tiles + t * tile_size
        if apart:
            enough = without_top(largest[t], n, references + t * REFERENCE, high + t, low + t)
            enough = load_first(&enough, columns.count[t], splat(-INFINITY, references))
            if any_greater(enough, high[t]):
                sum_tile(
                    tile, n, upcoming, False, True, FULL, largest[t], references + t * REFERENCE, &high_apart,
                    &low_apart)
                low[t] = where_at_most(enough, high[t], low[t], low_apart)
                high[t] = where_at_most(enough, high[t], high[t], high_apart)
        if has_infinite_lane(largest[t]):
            for row in range(columns.count[t]):
                if fabs(get(largest + t, row)) == INFINITY:
                    put_sum(
                        high + t, low + t, row,
                        infinite_state(get(largest + t, row), row_of_tile_has_nan(tile, n, row), apart))


cdef inline void write_tiles(
    Finish kind, const vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, const vec* references,
    const vec* finishers, void* y, Py_ssize_t y_stride, bint streaming, Storage storage
) noexcept nogil:
    """Write tiles side by side, n elements of each row; each tile has its own reference and finishers."""
    if kind in (SCALE, EXP_SCALE) and any_ties(finishers, columns.n_tiles):
        write_tiles_by_groups(
            kind, tiles, tile_size, columns, n, references, finishers, <char*>y, y_stride, True, streaming, storage)
    else:
        write_tiles_by_groups(
            kind, tiles, tile_size, columns, n, references, finishers, <char*>y, y_stride, False, streaming, storage)


cdef void write_mended_tiles(
    const vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, const vec* references,
    const vec* finishers, void* y, Py_ssize_t y_stride, bint streaming, Storage storage
) noexcept nogil:
    """`write_tiles` for logits, of which some have probabilities that are to be mended."""
    write_tiles_by_groups(
        MENDED_EXP_SCALE, tiles, tile_size, columns, n, references, finishers, <char*>y, y_stride, True, streaming, storage)


cdef inline void write_tiles_by_groups(
    Finish kind, const vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, const vec* references,
    const vec* finishers, char* y, Py_ssize_t y_stride, bint has_ties, bint streaming, Storage storage
) noexcept nogil:
    cdef Py_ssize_t size = stored_size(storage, tiles)
    cdef const vec* tile
    cdef const vec* reference
    cdef const vec* finisher
    cdef char* place
    cdef int t = 0, count
    while t < columns.n_tiles:
        tile, reference, finisher = tiles + t * tile_size, references + t * REFERENCE, finishers + t * FINISHERS
        place, count = y + columns.first[t] * size, tiles_abreast(columns, t, tiles)
        if streaming and storage != AS_COMPUTED and <uintptr_t>place % REGISTER_BYTES:
            count = min(count, 1)  # so that the next begins with a cache line
        if count == ABREAST:
            write_whole_tiles(
                kind, ABREAST, tile, tile_size, n, reference, finisher, place, y_stride, has_ties, streaming, storage)
        elif count == ABREAST // 2:
            write_whole_tiles(
                kind, ABREAST // 2, tile, tile_size, n, reference, finisher, place, y_stride, has_ties, streaming, storage)
        elif count == 1:
            write_whole_tiles(
                kind, 1, tile, tile_size, n, reference, finisher, place, y_stride, has_ties, streaming, storage)
        else:
            write_partial_tile(
                kind, tile, columns.count[t], n, reference, finisher, place, y_stride, has_ties, storage)
        t += max(count, 1)


cdef inline int tiles_abreast(const Columns* columns, int first, const vec* like) noexcept nogil:
    """How many tiles from the `first` on are read or written together; 0 if that has not a row for each lane."""
    cdef int count = ABREAST
    if columns.count[first] < lanes(like):
        return 0
    while first + count > columns.n_tiles or columns.count[first + count - 1] < lanes(like):
        count = ABREAST // 2 if count == ABREAST else 1
    return count


cdef inline void write_whole_tiles(
    Finish kind, int count, const vec* tiles, Py_ssize_t tile_size, Py_ssize_t n, const vec* references,
    const vec* finishers, char* y, Py_ssize_t y_stride, bint has_ties, bint streaming, Storage storage
) noexcept nogil:
    """Write tiles that have a row for each lane; in one copy for each kind of store, so that the loop decides nothing."""
    if storage != AS_COMPUTED:
        write_whole_tiles_by(
            kind, count, tiles, tile_size, n, references, finishers, y, y_stride, has_ties, streaming, True, storage)
    elif streaming:
        write_whole_tiles_by(
            kind, count, tiles, tile_size, n, references, finishers, y, y_stride, has_ties, True, False, AS_COMPUTED)
    else:
        write_whole_tiles_by(
            kind, count, tiles, tile_size, n, references, finishers, y, y_stride, has_ties, False, False, AS_COMPUTED)


cdef inline void write_whole_tiles_by(
    Finish kind, int count, const vec* tiles, Py_ssize_t tile_size, Py_ssize_t n, const vec* references,
    const vec* finishers, char* y, Py_ssize_t y_stride, bint has_ties, bint streaming, bint is_converted, Storage storage
) noexcept nogil:
    cdef vec[ABREAST] values, line
    cdef const vec* sources[ABREAST]
    cdef Py_ssize_t element, step = lanes(tiles) * stored_size(storage, tiles)
    cdef bint is_fetched = y_stride > REGISTER_BYTES  # adjacent registers the processor itself fetches
    cdef int t
    for t in range(count):
        sources[t] = tiles + t * tile_size
    for element in range(n):
        for t in range(count):
            values[t] = sources[t][element]
            if is_fetched and not streaming:
                prefetch(y + PREFETCH_LINES * y_stride + t * step)
        if is_fetched and not streaming:
            prefetch(y + PREFETCH_LINES * y_stride + count * step - 1)
        finish(values, min(count, <int>GROUP), kind, references, finishers, 1, has_ties)
        if count > GROUP:
            finish(
                values + GROUP, count - GROUP, kind, references + GROUP * REFERENCE, finishers + GROUP * FINISHERS, 1,
                has_ties)
        if is_converted:
            for t in range(count):
                store_stored((<char*>line if streaming else y) + t * step, values[t], lanes(tiles), storage)
            if streaming:
                stream_bytes(line, y, count * step)
        elif streaming and <uintptr_t>y % REGISTER_BYTES == 0:
            for t in range(count):
                stream(<vec*>y + t, values[t])
        else:
            for t in range(count):
                store(<vec*>y + t, values[t])
        y += y_stride


cdef inline void write_partial_tile(
    Finish kind, const vec* tile, int n_rows, Py_ssize_t n, const vec* references, const vec* finishers, char* y,
    Py_ssize_t y_stride, bint has_ties, Storage storage
) noexcept nogil:
    cdef Py_ssize_t element
    cdef vec value
    for element in range(n):
        value = tile[element]
        finish(&value, 1, kind, references, finishers, 0, has_ties)
        store_stored(y + element * y_stride, value, n_rows, storage)


cdef inline bint any_ties(const vec* finishers, int n_tiles) noexcept nogil:
    """Whether the LIMIT of any row is finite."""
    cdef vec infinity = splat(INFINITY, finishers)
    cdef int t
    for t in range(n_tiles):
        if any_greater(infinity, finishers[t * FINISHERS + LIMIT]):
            return True
    return False


cdef bint any_tile_to_mend(
    const vec* tiles, Py_ssize_t tile_size, int n_tiles, Py_ssize_t n, bint has_zero, const vec* smallest,
    const vec* largest, double temperature
) noexcept nogil:
    """Whether some of the rows' probabilities are to be mended."""
    cdef vec zero = splat(0.0, tiles), range_of_rows = zero
    cdef int t
    for t in range(n_tiles):  # all at once: with a decision for each (10, 256) float32 on axis 0 take 6 % longer
        range_of_rows = maximum(raised_to_zero(largest[t], has_zero) - smallest[t], range_of_rows)
    if not is_far_below(zero, range_of_rows, temperature):
        return False
    for t in range(n_tiles):
        if needs_mending(
            tiles + t * tile_size, n * lanes(tiles), smallest[t], raised_to_zero(largest[t], has_zero), n, temperature
        ):
            return True
    return False


cdef bint reduce_tiles(
    vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Upcoming* upcoming, const Job* job,
    const vec* smallest, vec* largest, vec* references, vec* finishers, vec* y
) noexcept nogil:
    """Make terms of the logits for softmax, and find what finishes elements; write logsumexp, which is all there is.

    The maxima of the rows become those of the rows with what they have beside their elements. True if logits are left as
    they are, as probabilities among theirs are to be mended.
    """
    cdef Function function = job.function
    cdef bint coarse = is_coarse(job), is_mended
    cdef vec[MAX_TILES] row_offsets, high, low
    cdef vec log_high, log_low
    cdef int t
    if is_divided(job):
        reduce_divided_tiles(
            tiles, tile_size, columns, n, function, &job.adjusted.temperature, smallest, largest, finishers, y)
        return False
    is_mended = function == SOFTMAX and not coarse and any_tile_to_mend(
        <const vec*>tiles, tile_size, columns.n_tiles, n, job.has_zero, smallest, <const vec*>largest, 1.0)
    for t in range(columns.n_tiles):
        row_offsets[t] = splat(0.0, y)
    fold_tiles(
        tiles, tile_size, columns, n, upcoming, function == SOFTMAX and not is_mended, function != SOFTMAX, coarse,
        job.has_zero, row_offsets, smallest, references, largest, high, low)
    for t in range(columns.n_tiles):
        if coarse:
            coarse_normalize_rows(high[t], finishers + t * FINISHERS)
            continue
        if function == SOFTMAX:
            normalize_rows(largest[t], high[t], low[t], references + t * REFERENCE, finishers + t * FINISHERS)
            continue
        log_sums_of(largest[t], high[t], low[t], references + t * REFERENCE, &log_high, &log_low)
        if function == LOGSUMEXP:
            y[t] = add_log_sums(largest[t], log_high, log_low)
        else:
            finishers[t * FINISHERS + FACTOR] = largest[t]
            finishers[t * FINISHERS + FACTOR_LOW] = log_high + log_low
    return is_mended


cdef inline void finish_tiles(
    const vec* tiles, Py_ssize_t tile_size, const Columns* columns, Py_ssize_t n, Function function,
    bint coarse, bint is_mended, const vec* references, const vec* finishers, void* y, Py_ssize_t y_stride, bint streaming,
    Storage storage
) noexcept nogil:
    """Write what `reduce_tiles` has prepared."""
    if is_mended:
        write_mended_tiles(tiles, tile_size, columns, n, references, finishers, y, y_stride, streaming, storage)
    elif vec is f32v and coarse:
        write_tiles(
            COARSE_SCALE, tiles, tile_size, columns, n, <const vec*>NULL, finishers, y, y_stride, streaming, storage)
    elif function == SOFTMAX:
        write_tiles(SCALE, tiles, tile_size, columns, n, <const vec*>NULL, finishers, y, y_stride, streaming, storage)
    elif function == LOG_SOFTMAX:
        write_tiles(SUBTRACT, tiles, tile_size, columns, n, <const vec*>NULL, finishers, y, y_stride, streaming, storage)


cdef void run_turned(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* tiles
) noexcept nogil:
    """Run n_rows contiguous short rows, of at most `turned_tiles` tiles, from `first` on."""
    if job.storage == AS_COMPUTED:
        run_turned_stored_as(x, y, job, first, n_rows, n, tiles, AS_COMPUTED, AS_COMPUTED)
    elif job.adjusted != NULL:
        run_turned_stored_as(x, y, job, first, n_rows, n, tiles, AS_COMPUTED, job.storage)
    elif vec is f32v and job.storage == FLOAT16:
        run_turned_stored_as(x, y, job, first, n_rows, n, tiles, FLOAT16, FLOAT16)
    elif vec is f32v and job.storage == BFLOAT16:
        run_turned_stored_as(x, y, job, first, n_rows, n, tiles, BFLOAT16, BFLOAT16)


cdef inline void run_turned_stored_as(
    const vec* x, vec* y, const Job* job, Py_ssize_t first, int n_rows, Py_ssize_t n, vec* tiles, Storage x_storage,
    Storage storage
) noexcept nogil:
    cdef Py_ssize_t x_stride = job.kept.x_stride[0], y_stride = job.kept.y_stride[0]
    cdef vec* rows
    cdef Columns all_rows = share_out(n_rows, 0, x), whole_tile = share_out(lanes(x), 0, x)
    cdef vec[REFERENCE * TURNED_TILES] references
    cdef vec[FINISHERS * TURNED_TILES] finishers
    cdef vec[TURNED_TILES] smallest, largest, log_sums
    cdef vec* tile
    cdef const vec* own
    cdef const vec* reference
    cdef const char* source
    cdef char* target
    cdef char* place
    cdef Upcoming upcoming
    cdef bint coarse = x_storage != AS_COMPUTED and job.function == SOFTMAX, is_mended
    cdef vec[MAX_BLOCK] edge  # a copy of rows that have no room behind them
    cdef int t, n_behind
    upcoming = nothing_upcoming(tiles)
    upcoming.place, upcoming.step = <const char*>below(x, first + n_rows, x_stride), lanes(x) * stored_size(x_storage, x)
    upcoming.is_far = n > LONG_TILE
    x, y = below(x, first, x_stride), <vec*>below(<const vec*>y, first, y_stride)
    rows = tiles + turned_tiles(n) * n if job.streaming else y  # scratch that results are streamed from
    for t in range(all_rows.n_tiles):
        source, n_behind = <const char*>below(x, t * lanes(x), x_stride), n_rows - (t + 1) * lanes(x)
        if not is_in_blocks(n, x_stride, all_rows.count[t], x_storage, x):
            turn(source, x_stride, all_rows.count[t], n, tiles + t * n, REGISTER_BYTES, x_storage, AS_COMPUTED, x)
            largest[t] = tile_extremes(<const vec*>tiles + t * n, n, smallest + t)
        elif has_room_behind(n, n_behind, x):
            read_tile(source, x_stride, n, tiles + t * n, smallest + t, largest + t)
        else:
            memcpy(edge, source, n * REGISTER_BYTES)
            read_tile(<const char*>edge, x_stride, n, tiles + t * n, smallest + t, largest + t)
    if job.sink != NULL:
        sink_tiles(tiles, n, &all_rows, n, &upcoming, job, first, smallest, largest, tiles + turned_tiles(n) * n)
        return
    is_mended = reduce_tiles(
        tiles, n, &all_rows, n, &upcoming, job, smallest, largest, references, finishers, log_sums)
    if job.function == LOGSUMEXP:
        turn(log_sums, REGISTER_BYTES, 1, n_rows, y, y_stride, AS_COMPUTED, storage, x)
        return
    for t in range(all_rows.n_tiles):
        tile, target = tiles + t * n, <char*>below(<const vec*>rows, t * lanes(x), y_stride)
        reference, own = references + t * REFERENCE, finishers + t * FINISHERS
        n_behind = n_rows - (t + 1) * lanes(x)
        if not is_in_blocks(n, y_stride, all_rows.count[t], storage, x):
            finish_tiles(
                <const vec*>tile, n, &whole_tile, n, job.function, coarse, is_mended, reference, own, tile, REGISTER_BYTES,
                False, AS_COMPUTED)
            turn(tile, REGISTER_BYTES, n, all_rows.count[t], target, y_stride, AS_COMPUTED, storage, x)
            continue
        place = target if has_room_behind(n, n_behind, x) else <char*>edge
        if job.function == LOG_SOFTMAX:
            write_tile(SUBTRACT, <const vec*>tile, n, reference, own, False, place, y_stride)
        elif is_mended:
            write_mended_tile(<const vec*>tile, n, reference, own, place, y_stride)
        elif any_ties(own, 1):
            write_tile(SCALE, <const vec*>tile, n, reference, own, True, place, y_stride)
        else:
            write_tile(SCALE, <const vec*>tile, n, reference, own, False, place, y_stride)
        if place != target:
            memcpy(target, edge, n * REGISTER_BYTES)
    if job.streaming:  # (1000000, 10) float32 take 11 ms instead of 15
        stream_bytes(rows, y, n_rows * n * stored_size(storage, x))
