"""Which kernel serves a call on the GPU, and in what shape: a plain value, chosen from sizes before a launch.

The floor is one reading and one writing of device memory. A row that its block keeps in registers and shared memory is
at it; so is one whose rest is read again from the L2 cache. Of longer rows the second reading is from memory, unless
they end there. No threshold here was measured on a card yet: they are counts of bytes, registers and lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastsoftmax._layout import Dimension, Layout

Traversal = Literal["rows", "split", "strips"]

VECTOR_BYTES, WARP = 16, 32

# Vectors that a lane holds before more lanes are taken: 64 bytes on their way per lane keep the memory busy. Rows that
# need more than 512 lanes have lanes hold more, up to what fits in 128 registers, all that 512 lanes have. That is less
# where the row goes on, and in float64, whose polynomial takes registers: 6 vectors and the loops for more do not fit.
HELD, MOST_HELD, MOST_HELD_OF_DOUBLES, MOST_THREADS = 4, 8, 6, 512
HELD_OF_MORE, HELD_OF_MORE_DOUBLES = 6, 3

# Of a block's shared memory, what is left for lanes to meet in: 32 float64 each of maxima, sums, residues and ties.
MEETING_BYTES = 1024

# Threads of a block of rows that need a warp or less.
ROWS_THREADS = 128

# Vectors that a lane reads before it computes with the first of them, of what it does not hold.
IN_FLIGHT = 4

# A chunk is a multiple of what the threads of its block read at once. A row has no more chunks than its blocks can
# merge in a few steps each.
CHUNK_THREADS, MOST_CHUNKS = 256, 1024

# A strip is no narrower than a sector, the unit in which memory is read. One multiprocessor reads the most bytes of a
# strip that is not split in about the time of a second launch, 3 us.
STRIP_THREADS, SECTOR_BYTES, MOST_STRIP_BYTES = 512, 32, 256 * 1024

# Threads of a block of rows with factors. Their states take some 100 registers of each.
WEIGHTED_THREADS = 128

# Of the L2 cache, for what is to be read again; the rest is for what is written meanwhile.
CACHE_SHARE = 0.7


class Device(NamedTuple):
    """What a plan depends on: multiprocessors, and bytes of L2 cache and of a block's shared memory."""

    n_multiprocessors: int
    l2_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How one call is spread over the GPU.

    Parameters
    ----------
    traversal : {"rows", "split", "strips"}
        ``rows``: each row by the lanes of one block or of a part of it. ``split``: each row by many blocks, in two
        launches. ``strips``: adjacent rows side by side, for a reduced axis that is not the last; in two launches where
        there are few and long ones.
    vector : int
        Elements that a lane reads at once: 16 bytes' worth, or 1 where memory lies otherwise.
    threads_per_row, rows_per_block : int
        Who shares a row. In strips, the rows of a block are those of its strip.
    held : int
        Vectors of a row that a lane keeps in registers.
    stored : int
        Vectors of a row that a lane keeps in shared memory, after those in registers.
    shared_bytes : int
        The shared memory of a block that takes.
    has_rest : bool
        Whether rows are longer than what is held and stored; all else is read twice.
    n_chunks, chunk : int
        Into how many chunks a row is split, and the elements of one; 0 where it is not, and one launch does it all.
    """

    traversal: Traversal
    vector: int
    threads_per_row: int
    rows_per_block: int
    held: int = 0
    stored: int = 0
    shared_bytes: int = 0
    has_rest: bool = False
    n_chunks: int = 1
    chunk: int = 0

    @property
    def elements_per_thread(self) -> int:
        """Elements of a row that a lane keeps in registers."""
        return self.held * self.vector

    @property
    def block(self) -> tuple[int, int]:
        """Threads of a block."""
        if self.traversal == "strips":
            return self.rows_per_block // self.vector, self.threads_per_row
        return self.threads_per_row * self.rows_per_block, 1


def choose(layout: Layout, phases: tuple[int, ...], device: Device, n_inputs: int = 1) -> LaunchPlan:
    """Choose the plan for a layout.

    Parameters
    ----------
    layout : Layout
        Where the rows lie; ``b`` is the second input, if there is one.
    phases : tuple of int
        The address modulo 16 of the input, then that of the output and of the second input as far as they are as large
        as the input; what has one element for each row is read and written by itself.
    device : Device
        The card.
    n_inputs : int
        Inputs of the size of the output, all of which lanes keep.
    """
    if _has_strips(layout, len(phases)):
        vector = VECTOR_BYTES // layout.itemsize if _is_vectorized(layout, phases, strip=True) else 1
        phase = phases[0] // layout.itemsize if vector > 1 else 0
        plan = _strips(layout, vector, device, n_inputs, phase)
        # Lanes that have a row each, or some of it, read a few short and adjacent rows as well as strips of them do.
        if plan.block[0] * plan.block[1] >= WARP:
            return plan
    vector = VECTOR_BYTES // layout.itemsize if _is_vectorized(layout, phases, strip=False) else 1
    n_vectors = -(-(layout.n_cols + (vector - 1 if _has_phase(layout, phases) else 0)) // vector)
    held, most_held = HELD // n_inputs, (MOST_HELD_OF_DOUBLES if layout.itemsize == 8 else MOST_HELD) // n_inputs
    if n_vectors > MOST_THREADS * most_held:
        return _long_rows(layout, n_vectors, vector, device, n_inputs)
    threads = 1
    while threads < WARP and n_vectors > threads * held:
        threads *= 2
    if n_vectors <= threads * held:
        return LaunchPlan("rows", vector, threads, ROWS_THREADS // threads, -(-n_vectors // threads))
    held = held if n_vectors <= MOST_THREADS * held else most_held
    return LaunchPlan("rows", vector, -(-n_vectors // (WARP * held)) * WARP, 1, held)


def choose_weighted(layout: Layout, device: Device) -> LaunchPlan:
    """Choose the plan for sums with factors, ``b`` of the layout: by elements, and in chunks where rows are few.

    Neighbouring lanes have neighbouring elements: of a row, or of rows that lie side by side.
    """
    n_cols, itemsize = layout.n_cols, layout.itemsize
    is_strip = bool(layout.kept) and layout.kept[-1].x_stride == itemsize != layout.reduced[-1].x_stride
    narrowest = min(_power_of_two(layout.kept[-1].size), WARP) if is_strip else 1
    lanes = min(_power_of_two(n_cols), WEIGHTED_THREADS // narrowest)
    n_side = WEIGHTED_THREADS // lanes
    unit, n_blocks = lanes * IN_FLIGHT, -(-layout.n_rows // n_side)
    n_chunks = min(-(-n_cols // unit), max(4 * device.n_multiprocessors // n_blocks, 1), MOST_CHUNKS)
    chunk = unit * -(-n_cols // (unit * n_chunks))
    n_chunks = -(-n_cols // chunk)
    traversal: Traversal = "strips" if is_strip else "split" if n_chunks > 1 else "rows"
    return LaunchPlan(traversal, 1, lanes, n_side, n_chunks=n_chunks, chunk=chunk if n_chunks > 1 else 0)


def tile_vectors(n_inputs: int) -> int:
    """Return the vectors of each input that a lane sends for at once, where they go to shared memory."""
    return IN_FLIGHT // n_inputs


def _long_rows(layout: Layout, n_vectors: int, vector: int, device: Device, n_inputs: int) -> LaunchPlan:
    """Choose for rows that a block cannot hold in registers: 64 KiB and more.

    A block of 512 lanes with 128 registers each is alone on its multiprocessor, and may have all shared memory there:
    226 KiB on sm_90 and sm_100, which is seven tiles of 32 KiB, and with the 48 KiB in registers 69,632 float32; 162
    KiB on sm_80, five tiles and 53,248. One block reads or writes at a time. While half of them read, each needs twice
    its share of the bandwidth, on an H200 72 bytes a nanosecond: some 50 KiB under way at 700 ns. It sends for 128 KiB.
    """
    held = -(-(HELD_OF_MORE_DOUBLES if layout.itemsize == 8 else HELD_OF_MORE) // n_inputs)
    word_bytes = VECTOR_BYTES if vector > 1 else max(layout.itemsize, 4)  # a single element takes a word
    tile = MOST_THREADS * tile_vectors(n_inputs)
    tile_bytes = tile * word_bytes * n_inputs
    n_tiles = min(-(-(n_vectors - MOST_THREADS * held) // tile), (device.shared_bytes - MEETING_BYTES) // tile_bytes)
    n_rest = max(n_vectors - MOST_THREADS * held - n_tiles * tile, 0)
    rest_bytes = n_rest * vector * layout.itemsize * n_inputs
    is_cached = rest_bytes * device.n_multiprocessors <= CACHE_SHARE * device.l2_bytes
    if 2 * layout.n_rows < device.n_multiprocessors or not is_cached:
        return _split(n_vectors, vector)
    stored = n_tiles * tile_vectors(n_inputs)
    return LaunchPlan("rows", vector, MOST_THREADS, 1, held, stored, n_tiles * tile_bytes, has_rest=n_rest > 0)


def _strides(dimension: Dimension, n_arrays: int) -> tuple[int, ...]:
    return (dimension.x_stride, dimension.y_stride, dimension.b_stride)[:n_arrays]


def _has_strips(layout: Layout, n_arrays: int) -> bool:
    """Whether neighbouring rows lie side by side in every array that is as large as the input."""
    if len(layout.reduced) > 1 or not layout.kept or layout.has_contiguous_rows:
        return False
    return set(_strides(layout.kept[-1], n_arrays)) == {layout.itemsize}


def _is_vectorized(layout: Layout, phases: tuple[int, ...], strip: bool) -> bool:
    """Whether every row, or every strip, lies on 16-byte boundaries in all arrays alike."""
    row = layout.reduced[-1]
    if len(set(phases)) > 1 or len(layout.reduced) > 1:
        return False
    if strip:  # the rows of a strip share their vectors: no step may shift them
        steps = (*layout.kept[:-1], row)
        return all(stride % VECTOR_BYTES == 0 for step in steps for stride in _strides(step, len(phases)))
    if set(_strides(row, len(phases))) != {layout.itemsize}:
        return False
    return all(len({stride % VECTOR_BYTES for stride in _strides(step, len(phases))}) == 1 for step in layout.kept)


def _has_phase(layout: Layout, phases: tuple[int, ...]) -> bool:
    return any(phases) or any(dimension.x_stride % VECTOR_BYTES for dimension in layout.kept)


def _split(n_vectors: int, vector: int) -> LaunchPlan:
    unit = CHUNK_THREADS * IN_FLIGHT  # vectors that a block reads at once
    chunk = unit * -(-n_vectors // (unit * MOST_CHUNKS))
    return LaunchPlan("split", vector, CHUNK_THREADS, 1, n_chunks=-(-n_vectors // chunk), chunk=chunk * vector)


def _strips(layout: Layout, vector: int, device: Device, n_inputs: int, phase: int) -> LaunchPlan:
    """Choose for rows side by side; ``phase`` is how many elements after a 16-byte boundary they begin.

    Blocks of 512 lanes with more than 64 registers each are alone on their multiprocessors, and as many strips are
    under way at a time. Strips that are too few for all of them, and long, are split, and as wide as may be: nothing is
    found in the cache again then.
    """
    lane_bytes = vector * layout.itemsize
    # In float64 the strips of sm_100 spill where 512 lanes have 128 registers each.
    most_threads = STRIP_THREADS // 2 if layout.itemsize == 8 else STRIP_THREADS
    most_layers = min(_power_of_two(-(-layout.n_cols // IN_FLIGHT)), most_threads)
    n_vectors = -(-(layout.kept[-1].size + phase) // vector)
    widest = lanes = min(_power_of_two(n_vectors), WARP)

    def n_strips(lanes: int) -> int:
        return layout.n_rows // layout.kept[-1].size * -(-n_vectors // lanes)

    while lanes * lane_bytes > SECTOR_BYTES and most_layers > most_threads // lanes:
        n_under_way = min(n_strips(lanes), device.n_multiprocessors)
        if lanes * lane_bytes * layout.n_cols * n_inputs * n_under_way <= CACHE_SHARE * device.l2_bytes:
            break
        lanes //= 2
    are_few = 2 * n_strips(lanes) <= device.n_multiprocessors
    if are_few:
        lanes = widest
    layers = min(most_layers, most_threads // lanes)
    unit = layers * IN_FLIGHT  # elements of each row that a block reads at once
    n_chunks = min(-(-layout.n_cols // unit), 2 * device.n_multiprocessors // n_strips(lanes), MOST_CHUNKS)
    if not are_few or n_chunks < 2 or lanes * lane_bytes * layout.n_cols * n_inputs <= MOST_STRIP_BYTES:
        return LaunchPlan("strips", vector, layers, lanes * vector)
    chunk = unit * -(-layout.n_cols // (unit * n_chunks))
    n_chunks = -(-layout.n_cols // chunk)
    return LaunchPlan("strips", vector, layers, lanes * vector, n_chunks=n_chunks, chunk=chunk)


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is no smaller."""
    return 1 << max(size - 1, 0).bit_length()
