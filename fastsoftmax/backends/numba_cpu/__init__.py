"""The Numba backend on the CPU: for machines where the compiled extension cannot be built.

It computes as the compiled kernels do: see docs/method.md. Its parts: `registers` lets Numba compute with vectors,
`terms` has the exponentials, `rows` and `tiles` the traversals, `converted` rows of other types than are computed in,
`stored` their elements, `streaming` the states that outlive a call. The others are loops over scalars, computed in
float64 with the functions of `scalars`: `weighted` for sums with factors, `adjusted` for rows with a mask or a
temperature, `derivatives` for vector-Jacobian products, `cross_entropy`, `selection` for the largest, and `sampling`.
The states of parts of a row merge by the functions of `fastsoftmax._state`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

try:
    import numba  # noqa: F401
except ImportError as error:
    raise ImportError(f"the numba backend needs the numba package: {error}") from error

from fastsoftmax import _schedule, _state
from fastsoftmax._dispatch import (
    BANDED,
    CROSS_ENTROPIES,
    VJPS,
    Adjustment,
    CrossEntropy,
    Function,
    Plan,
    Truncation,
)
from fastsoftmax._executor import run_blocks
from fastsoftmax._layout import Array, Dimension, Layout
from fastsoftmax._schedule import BLOCKS_PER_THREAD, Exponentials, Schedule, Traversal, cache_sizes
from fastsoftmax._state import inverse_in_parts, scaled_temperature

from . import (
    adjusted,
    converted,
    cross_entropy,
    derivatives,
    rows,
    sampling,
    selection,
    stored,
    streaming,
    tiles,
    weighted,
)
from .registers import HAS_HALF

READS = frozenset({"float16", "bfloat16"})
CONVERTS = frozenset(stored.STORAGES)

_FUNCTIONS = {"softmax": rows.SOFTMAX, "log_softmax": rows.LOG_SOFTMAX, "logsumexp": rows.LOGSUMEXP}
_STREAMING_FUNCTIONS = {
    "fold_states": streaming.FOLD_STATES,
    "normalize": streaming.NORMALIZE,
    "softmax_one": streaming.SOFTMAX_ONE,
}
_EXPONENTIALS = {
    "output": rows.IN_OUTPUT,
    "scratch": rows.IN_SCRATCH,
    "recompute": rows.RECOMPUTE,
    "none": rows.IN_SCRATCH,
}

_NOTHING = np.empty(0, np.uint8)
# They tell kernels the dtype that elements of so many bytes are computed in: Numba's dispatcher knows the type of an
# array in a fifth of the time of a scalar's.
_LIKE: dict[int, Array] = {2: np.empty(0, np.float32), 4: np.empty(0, np.float32), 8: np.empty(0, np.float64)}

# The same for elements of 16 bits, by their storage.
_IMAGES = {stored.FLOAT16: np.empty(0, np.uint16), stored.BFLOAT16: np.empty(0, np.int16)}

# Each thread gets at least this many elements: handing a block to a thread of Python's pool and waiting for it costs
# 20-100 us, in which one core finishes up to 500,000 float32 elements.
MIN_ELEMENTS_PER_THREAD = 131_072

# The terms of a row wait in a scratch of up to this share of the last cache level, which threads share.
SCRATCH_SHARE = 16

# Rows of up to this many elements, by their size, are computed side by side if there are at least so many.
MAX_TILE_COLS = {4: 64, 8: 48}
MIN_TILE_ROWS = 16


def plan(
    function: Function, layout: Layout, in_place: bool, adjustment: Adjustment | None = None, n_selected: int = 0
) -> Plan:
    max_threads = _schedule.max_threads() if layout.size >= 2 * MIN_ELEMENTS_PER_THREAD else 1
    if adjustment is not None:
        return _make_adjusted_plan(
            function, layout, adjustment.dtype.itemsize, _is_only_converted(adjustment), max_threads
        )
    return _make_plan(function, layout, in_place, max_threads)


def _is_only_converted(adjustment: Adjustment) -> bool:
    return adjustment.mask is None and adjustment.temperature == 1


@lru_cache(maxsize=1024)
def _make_adjusted_plan(
    function: Function,
    layout: Layout,
    itemsize: int,
    is_only_converted: bool,
    max_threads: int,
    is_of_16_bits: bool = False,
) -> Plan:
    """Choose tiles, strips of adjacent rows, or one row after the other, for elements that are computed in `itemsize`.

    Rows with a mask or a temperature do not come in tiles. Elements of 16 bits are converted by loads and stores if
    they come and go as the same type.
    """
    traversal: Traversal = "gather"
    n_units = layout.n_rows
    if is_only_converted and _is_of_tiles(layout, itemsize):
        traversal = "tiles"
    elif layout.has_adjacent_rows and not layout.has_contiguous_rows:
        traversal, n_units = "strips", _count_strips(layout, itemsize)
    elif is_of_16_bits and HAS_HALF and layout.has_contiguous_rows and layout.n_cols * itemsize <= rows.CHUNK_BYTES:
        traversal = "rows"
    n_threads = max(1, min(layout.size // MIN_ELEMENTS_PER_THREAD, max_threads))
    n_blocks = 1 if n_threads == 1 else min(n_units, n_threads * BLOCKS_PER_THREAD)
    exponentials: Exponentials = "recompute" if function == "softmax" else "none"
    if function == "softmax" and is_only_converted and layout.n_cols * itemsize <= rows.CHUNK_BYTES:
        exponentials = "scratch"
    return Plan(function, "numba", None, Schedule(traversal, exponentials, False, min(n_threads, n_blocks), n_blocks))


def _is_of_tiles(layout: Layout, itemsize: int) -> bool:
    """Whether rows are so short, and as many, that they are turned to be computed side by side in `itemsize`."""
    short = layout.n_cols <= MAX_TILE_COLS[itemsize] and layout.n_rows >= MIN_TILE_ROWS
    return short and layout.has_contiguous_rows and len(layout.kept) == 1


@lru_cache(maxsize=1024)
def _make_plan(function: Function, layout: Layout, in_place: bool, max_threads: int) -> Plan:
    """Choose the traversal from the strides, and from the sizes where the exponentials wait for their sum."""
    if function == "logsumexp_vjp":  # a softmax, whose rows are then multiplied
        return replace(_make_plan("softmax", layout, in_place, max_threads), function=function)
    if layout.itemsize == 2 and function in _FUNCTIONS:
        return _make_adjusted_plan(function, layout, 4, True, max_threads, is_of_16_bits=True)
    itemsize = max(4, layout.itemsize)  # 16 bits are computed in 32
    n_bytes, row_bytes = layout.size * itemsize, layout.n_cols * itemsize
    n_threads = max(1, min(layout.size // MIN_ELEMENTS_PER_THREAD, max_threads))
    # Input and output together leave the last cache: what is written will not be read from there.
    streaming = function in ("softmax", "log_softmax") and 2 * n_bytes > cache_sizes().last_level
    traversal: Traversal = "gather"
    n_units = layout.n_rows
    if function in VJPS:
        if layout.has_adjacent_rows and layout.kept[-1].b_stride == layout.itemsize:
            traversal, n_units = "strips", _count_strips(layout, itemsize)
    elif function in BANDED or function == "softmax_one":
        traversal = "rows" if layout.has_contiguous_rows and layout.itemsize > 2 else "gather"
    elif function == "weighted_logsumexp" or function in CROSS_ENTROPIES:
        pass
    elif _is_of_tiles(layout, itemsize):
        traversal = "tiles"
        streaming &= layout.kept[0].y_stride == layout.n_cols * layout.itemsize
    elif layout.has_contiguous_rows:
        traversal = "rows"
        n_chunks = -(-row_bytes // rows.CHUNK_BYTES)
        if n_threads > 1 and n_units < n_threads * BLOCKS_PER_THREAD and n_chunks >= 2 * n_threads:
            traversal, n_units = "split", n_chunks
    elif layout.has_adjacent_rows:
        traversal = "strips"
        n_units = _count_strips(layout, itemsize)
    else:
        streaming = False
    exponentials: Exponentials = "none"
    if function == "softmax":
        if traversal in ("gather", "strips"):
            exponentials = "scratch" if row_bytes <= rows.CHUNK_BYTES else "recompute"
        elif traversal == "tiles":
            exponentials = "scratch"
        elif not (streaming or in_place):
            exponentials = "output"
        else:
            exponentials = "scratch" if row_bytes <= cache_sizes().last_level // SCRATCH_SHARE else "recompute"
    n_blocks = 1 if n_threads == 1 else min(n_units, n_threads * BLOCKS_PER_THREAD)
    schedule = Schedule(traversal, exponentials, streaming, min(n_threads, n_blocks), n_blocks)
    return Plan(function, "numba", None, schedule)


def _count_strips(layout: Layout, itemsize: int, streaming: bool = False) -> int:
    """Count the strips of elements that are computed in so many bytes."""
    inner = layout.kept[-1].size
    n_strips: int = tiles.count_strips(inner, itemsize, streaming)
    return layout.n_rows // inner * n_strips


class _Call(NamedTuple):
    """What the calls of one plan and layout have in common: a kernel, and its arguments but for addresses and units."""

    kernel: Callable[..., None]
    leading: tuple[Any, ...]  # the first is an array of the dtype
    tables: Array
    sizes: tuple[int, ...]  # the first is the address of the tables
    n_units: int
    scratch_bytes: int

    def run(self, x: int, y: int, first: int, end: int) -> None:
        """Run units of the arrays at these addresses."""
        _memory, scratch = _scratch(self.scratch_bytes)
        self.kernel(*self.leading, x, y, *self.sizes, first, end, scratch)


@lru_cache(maxsize=1024)
def _prepare(plan: Plan, layout: Layout, itemsize: int, storages: tuple[int, int]) -> _Call:
    """Prepare calls that compute in `itemsize`; rows that are no tiles or strips have it in memory too, or 16 bits."""
    schedule, n = plan.schedule, layout.n_cols
    like, function = _LIKE[itemsize], _FUNCTIONS[plan.function]
    n_units, n_reduced = layout.n_rows, 0
    kernel: Callable[..., None]
    leading: tuple[Any, ...]
    if schedule.traversal == "tiles":
        kernel, leading, room = tiles.run_turned, (like, function, schedule.streaming, storages), tiles.bytes_of_tile(n)
    elif schedule.traversal == "strips":
        kernel, leading = tiles.run_strips, (like, function, schedule.streaming, storages)
        n_units, room = _count_strips(layout, itemsize, schedule.streaming), tiles.bytes_of_strip(n, itemsize)
    elif layout.itemsize == 2:
        image = _IMAGES[storages[0]]
        kernel, leading = converted.run_adjacent, (like, image, function, schedule.streaming)
        room = converted.bytes_of_converted(n, itemsize)
    else:
        kernel, leading = rows.run_rows, (like, function, _EXPONENTIALS[schedule.exponentials], schedule.streaming)
        n_reduced = len(layout.reduced) if schedule.traversal == "gather" else 0
        is_waiting = schedule.exponentials == "scratch" or (schedule.streaming and n * itemsize <= rows.SHARED_BYTES)
        room = rows.bytes_of_rows(n, itemsize, is_waiting, n_reduced > 0)
    tables = _tables(layout.kept + layout.reduced, layout.itemsize, layout.y_itemsize)
    return _Call(kernel, leading, tables, (_address(tables), len(layout.kept), n_reduced, n), n_units, room)


def prepare(plan: Plan, layout: Layout, x: Array, out: Array) -> Callable[[Array, Array], None] | None:
    """Return what runs `plan` on any arrays of this layout; None for what threads share, and what is not one kernel."""
    is_large = layout.size >= 2 * MIN_ELEMENTS_PER_THREAD
    is_gathered_to_convert = layout.itemsize == 2 and plan.schedule.traversal == "gather"
    if is_large or plan.function not in _FUNCTIONS or is_gathered_to_convert:
        return None
    call = _prepare(plan, layout, max(4, layout.itemsize), (_storage(x), _storage(out)))
    return lambda x, out: call.run(_address(x), _address(out), 0, call.n_units)


def run(plan: Plan, layout: Layout, x: Array, out: Array, g: Array | None) -> None:
    if layout.itemsize == 2 and (plan.function in _FUNCTIONS or plan.function == "logsumexp_vjp"):
        _run_converted(plan, layout, x, out, np.dtype(np.float32), g)
    elif g is not None:
        _run_vjp(plan, layout, x, g, out)
    elif plan.function == "softmax_one":
        run_states(plan, layout, x, out, None)
    elif plan.schedule.traversal == "split":
        _run_split(plan, layout, x, out)
    else:
        _run_prepared(plan, layout, x, out, layout.itemsize)


def _run_prepared(plan: Plan, layout: Layout, x: Array, out: Array, itemsize: int) -> None:
    """Run rows, tiles or strips that are computed in `itemsize`."""
    call = _prepare(plan, layout, itemsize, (_storage(x), _storage(out)))
    addresses = _address(x), _address(out)
    _in_blocks(lambda first, end: call.run(*addresses, first, end), call.n_units, plan.schedule)


def _run_split(plan: Plan, layout: Layout, x: Array, out: Array) -> None:
    """Run a few long rows, all threads on each."""
    stored = plan.schedule.exponentials in ("output", "scratch")
    waiting = np.empty(layout.n_cols if plan.schedule.exponentials == "scratch" else 0, out.dtype)
    for row in range(layout.n_rows):
        x_offset, y_offset = _offsets(layout.kept, row)
        addresses = _address(x) + x_offset, _address(out) + y_offset
        terms = _address(waiting) if waiting.size else addresses[1]
        _run_split_row(plan, layout, *addresses, terms, stored)


def _run_split_row(plan: Plan, layout: Layout, x: int, y: int, terms: int, stored: bool) -> None:
    """Fold the chunks of a row on threads, merge their states in order, write on threads; arguments are addresses."""
    schedule, n, like, function = plan.schedule, layout.n_cols, _LIKE[layout.itemsize], _FUNCTIONS[plan.function]
    n_chunks = -(-n * layout.itemsize // rows.CHUNK_BYTES)
    memory = np.empty(rows.FIELDS_OF_STATE * (n_chunks + 1), np.float64)
    states = _address(memory)

    def fold(first: int, end: int) -> None:
        rows.fold_split(like, function, stored, x, terms, n, first, end, states)

    def write(first: int, end: int) -> None:
        rows.write_split(like, function, stored, schedule.streaming, x, y, terms, n, first, end, states)

    _in_blocks(fold, n_chunks, schedule)
    rows.merge_split(like, function, y, n_chunks, states)
    if plan.function != "logsumexp":
        _in_blocks(write, n_chunks, schedule)


def _run_vjp(plan: Plan, layout: Layout, x: Array, g: Array, out: Array) -> None:
    schedule, itemsize = plan.schedule, max(4, layout.itemsize)
    _memory, sizes = _prepare_operands(layout)
    columns, n_units = 1, layout.n_rows
    if schedule.traversal == "strips":
        columns, n_units = tiles.STRIP_BYTES // itemsize, _count_strips(layout, itemsize)
    addresses = tuple(map(_address, (x, g, out)))

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(derivatives.BYTES_OF_VJP)
        of_softmax = plan.function == "softmax_vjp"
        derivatives.run_vjp(_storage(x), of_softmax, columns, *addresses, *sizes, first, end, scratch)

    def scale_units(first: int, end: int) -> None:
        derivatives.scale_rows(_LIKE[itemsize], columns, *addresses[1:], *sizes, first, end)

    if plan.function == "logsumexp_vjp":
        run(replace(plan, function="softmax"), layout, x, out, None)
    _in_blocks(scale_units if plan.function == "logsumexp_vjp" else run_units, n_units, schedule)


def run_adjusted(plan: Plan, layout: Layout, x: Array, out: Array, adjustment: Adjustment) -> None:
    if _is_only_converted(adjustment):
        _run_converted(plan, layout, x, out, adjustment.dtype)
        return
    columns, n_units, itemsize = 1, layout.n_rows, adjustment.dtype.itemsize
    if plan.schedule.traversal == "strips":
        columns, n_units = tiles.STRIP_BYTES // itemsize, _count_strips(layout, itemsize)
    _memory, sizes = _prepare_operands(layout)
    storages, addresses = (_storage(x), _storage(out)), (_address(x), _address(out))
    like, function = _LIKE[itemsize], _FUNCTIONS[plan.function]
    t, shrink, grow = scaled_temperature(adjustment.temperature)
    divisor = shrink, grow, *inverse_in_parts(t)
    mask, temperature = _address(adjustment.mask), adjustment.temperature

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(adjusted.BYTES_OF_ADJUSTED)
        adjusted.run_adjusted(
            like, function, columns, storages, addresses, mask, *sizes, temperature, divisor, first, end, scratch
        )

    _in_blocks(run_units, n_units, plan.schedule)


def _run_converted(
    plan: Plan, layout: Layout, x: Array, out: Array, dtype: np.dtype[Any], factors: Array | None = None
) -> None:
    """Run rows that are computed in a dtype; multiply the probabilities of each by its factor, if there are any."""
    if factors is None and plan.schedule.traversal != "gather":
        _run_prepared(plan, layout, x, out, dtype.itemsize)
        return
    _memory, sizes = _prepare_operands(layout)
    like, function = _LIKE[dtype.itemsize], _FUNCTIONS["softmax" if factors is not None else plan.function]
    storages, addresses = (_storage(x), _storage(out)), (_address(x), _address(out))

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(converted.bytes_of_converted(layout.n_cols, dtype.itemsize))
        converted.run_converted(like, function, storages, addresses, _address(factors), *sizes, first, end, scratch)

    _in_blocks(run_units, layout.n_rows, plan.schedule)


def run_weighted(
    plan: Plan, layout: Layout, a: Array, out: Array, b: Array, sign: Array | None, adjustment: Adjustment
) -> None:
    _memory, sizes = _prepare_operands(layout, b.itemsize)
    storages, addresses = tuple(map(_storage, (a, b, out))), tuple(map(_address, (a, b, out, sign)))
    like, mask = _LIKE[adjustment.dtype.itemsize], _address(adjustment.mask)

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(weighted.BYTES_OF_WEIGHTED)
        weighted.run_weighted(like, storages, addresses, mask, adjustment.temperature, *sizes, first, end, scratch)

    _in_blocks(run_units, layout.n_rows, plan.schedule)


def run_cross_entropy(
    plan: Plan, layout: Layout, x: Array, gradient: Array | None, losses: Array, terms: CrossEntropy
) -> None:
    _memory, sizes = _prepare_operands(layout)
    spread = None if terms.spread is None else terms.spread.astype(np.float64)
    addresses = map(_address, (x, gradient, losses, terms.probabilities, terms.labels, terms.weights, spread))
    numbers = (terms.smoothing, terms.scale, terms.z_scale, terms.softcap)
    arguments = (_storage(x), *addresses, *sizes, *numbers)

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(cross_entropy.BYTES_OF_CROSS_ENTROPY)
        cross_entropy.run_cross_entropy(*arguments, first, end, scratch)

    _in_blocks(run_units, layout.n_rows, plan.schedule)


def run_states(plan: Plan, layout: Layout, x: Array, out: Array | None, states: Array | None) -> None:
    n, like = layout.n_cols, _LIKE[layout.itemsize]
    tables = _tables(layout.kept + layout.reduced, layout.itemsize)
    n_reduced = len(layout.reduced) if plan.schedule.traversal == "gather" else 0
    leading = like, _STREAMING_FUNCTIONS[plan.function], _storage(x)
    addresses = tuple(map(_address, (x, out, states, tables)))

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(streaming.bytes_of_streaming(n, like.itemsize))
        streaming.run_streaming(*leading, *addresses, len(layout.kept), n_reduced, n, first, end, scratch)

    _in_blocks(run_units, layout.n_rows, plan.schedule)


def run_topk(plan: Plan, layout: Layout, x: Array, values: Array, indices: Array) -> None:
    """Fold rows, select from them while they are in the cache, and normalize what was selected."""
    n, k, itemsize, like = layout.n_cols, values.shape[1], values.itemsize, _LIKE[values.itemsize]
    states, tables = _state.identities(layout.n_rows), _tables(layout.kept + layout.reduced, layout.itemsize)
    selected = Dimension(layout.n_rows, k * itemsize, k * itemsize), Dimension(k, itemsize, itemsize)
    tables_of_selected = _tables(selected, itemsize)
    of_x, of_values, of_indices, of_states, of_tables, of_selected = map(
        _address, (x, values, indices, states, tables, tables_of_selected)
    )
    storages, n_kept, n_reduced = (_storage(x), _storage(values)), len(layout.kept), len(layout.reduced)
    n_folded = n_reduced if plan.schedule.traversal == "gather" else 0
    n_bytes = max(streaming.bytes_of_streaming(n, itemsize), selection.bytes_of_selection(k))

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(n_bytes)
        together = max(1, rows.BATCH_BYTES // (n * itemsize))
        for row in range(first, end, together):
            few = (row, min(row + together, end), scratch)
            of_rows = (of_states, of_tables, n_kept, n_folded, n)
            streaming.run_streaming(like, streaming.FOLD_STATES, storages[0], of_x, 0, *of_rows, *few)
            selection.run_selection(storages, of_x, of_values, of_indices, k, of_tables, n_kept, n_reduced, n, *few)
            of_best = (of_values, of_values, of_states, of_selected, 1, 0, k)
            streaming.run_streaming(like, streaming.NORMALIZE, storages[1], *of_best, *few)

    _in_blocks(run_units, layout.n_rows, plan.schedule)


def run_sampling(plan: Plan, layout: Layout, x: Array, uniforms: Array, draws: Array, terms: Truncation) -> None:
    n, tables = layout.n_cols, _tables(layout.kept + layout.reduced, layout.itemsize)
    n_selected = terms.n_selected(n)
    addresses = tuple(map(_address, (x, uniforms, draws)))
    numbers = (uniforms.shape[1], terms.temperature, terms.top_k or 0, terms.top_p, n_selected)
    arguments = (_storage(x), *addresses, *numbers, _address(tables), len(layout.kept), len(layout.reduced), n)

    def run_units(first: int, end: int) -> None:
        _memory, scratch = _scratch(sampling.bytes_of_sampling(n, n_selected))
        sampling.run_sampling(*arguments, first, end, scratch)

    _in_blocks(run_units, layout.n_rows, plan.schedule)


def merge_states(states: Array, others: Array, is_single: bool) -> None:
    streaming.merge_rows(_LIKE[4 if is_single else 8], _address(states), _address(others), len(states))


def logsumexp_of_states(states: Array, is_single: bool) -> Array:
    log_sums = np.empty(len(states))
    streaming.logsumexp_of_rows(_LIKE[4 if is_single else 8], _address(states), _address(log_sums), len(states))
    return log_sums


def _address(array: Array | None) -> int:
    """Where the memory of an array begins, or 0: what PyArray_DATA reads, behind what every object begins with.

    `array.ctypes.data`, which makes two objects on its way, takes 0.95 us instead of 0.2.
    """
    return 0 if array is None else ctypes.c_size_t.from_address(id(array) + object.__basicsize__).value


def _storage(array: Array) -> int:
    return _storage_of(array.dtype)


@lru_cache(maxsize=64)
def _storage_of(dtype: np.dtype[Any]) -> int:
    return stored.STORAGES.index(dtype.name)


def _prepare_operands(layout: Layout, b_itemsize: int | None = None) -> tuple[Array, tuple[int, ...]]:
    """The tables of the input, then of the factors, then of the mask, and what kernels take of them.

    They are one array, to be kept alive. Factors are of the input's size, if not of another.
    """
    dimensions, itemsize = layout.kept + layout.reduced, layout.itemsize
    of_input = _tables(dimensions, itemsize, layout.y_itemsize)
    of_factors = _tables(tuple(d._replace(x_stride=d.b_stride) for d in dimensions), b_itemsize or itemsize)
    of_mask = _tables(tuple(d._replace(x_stride=d.mask_stride) for d in dimensions), 1)
    tables = np.concatenate([of_input, of_factors, of_mask])
    return tables, (_address(tables), len(layout.kept), len(layout.reduced), layout.n_cols)


def _in_blocks(run_units: Callable[[int, int], None], n_units: int, schedule: Schedule) -> None:
    """Run units from one up to another, in as many equal parts as the schedule says."""
    n_blocks = schedule.n_blocks
    if n_blocks == 1:
        run_units(0, n_units)
        return
    run_blocks(
        lambda block: run_units(n_units * block // n_blocks, n_units * (block + 1) // n_blocks),
        n_blocks,
        schedule.n_threads,
    )


def _scratch(n_bytes: int) -> tuple[Array, int]:
    """Memory, which lives as long as the array, and the address in it where a cache line begins."""
    if not n_bytes:
        return _NOTHING, 0
    memory = np.empty(n_bytes + 64, np.uint8)
    return memory, -(-_address(memory) // 64) * 64


def _offsets(dimensions: tuple[Dimension, ...], index: int) -> tuple[int, int]:
    """Where, in bytes, the index-th of the positions that the dimensions enumerate lies in the input and the output."""
    x_offset = y_offset = 0
    for dimension in reversed(dimensions):
        index, place = divmod(index, dimension.size)
        x_offset += place * dimension.x_stride
        y_offset += place * dimension.y_stride
    return x_offset, y_offset


def _tables(dimensions: tuple[Dimension, ...], itemsize: int, y_itemsize: int | None = None) -> Array:
    """Sizes and strides in elements, as the kernels read them; those of the output may have another size."""
    table = [(d.size, d.x_stride // itemsize, d.y_stride // (y_itemsize or itemsize)) for d in dimensions]
    return np.array(table, np.int64)
