"""The compiled backend: Cython kernels, built once for each instruction-set tier and chosen here at run time.

The tier is the best one this processor runs, or the one that the environment variable ``FASTSOFTMAX_ISA`` names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from fastsoftmax import _dispatch, _schedule, _threadpool
from fastsoftmax._dispatch import (
    BANDED,
    CROSS_ENTROPIES,
    VJPS,
    Adjustment,
    CrossEntropy,
    ForcedTierError,
    Function,
    Plan,
    Truncation,
)
from fastsoftmax._layout import Array, Layout, c_order_layout
from fastsoftmax._outputs import empty_like
from fastsoftmax._schedule import Exponentials, Schedule, Traversal

# Best first. `portable` is compiled for every processor of the architecture; away from x86-64 it is the only one.
TIERS = ("x86_64_v4", "x86_64_v3", "x86_64_v2", "portable")

# The numbers by which the kernels know their choices: the enumerations in src_cython.
_FUNCTIONS: dict[Function, int] = {
    "softmax": 0,
    "log_softmax": 1,
    "logsumexp": 2,
    "softmax_vjp": 3,
    "log_softmax_vjp": 4,
    "logsumexp_vjp": 5,
    "softmax_one": 6,
}
_FUNCTION_NAMES = {number: name for name, number in _FUNCTIONS.items()}
_TRAVERSALS: dict[Traversal, int] = {"rows": 0, "strips": 1, "gather": 2, "tiles": 3, "split": 4, "bands": 5}
_EXPONENTIALS: dict[Exponentials, int] = {"output": 0, "scratch": 1, "recompute": 2, "none": 0}

_STORAGES = {"float32": 0, "float64": 0, "float16": 1, "bfloat16": 2}
# Where an element has another dtype than is computed in.
_CONVERTED = {
    "float16": 1,
    "bfloat16": 2,
    "float32": 3,
    "float64": 4,
    "bool": 5,
    "int8": 6,
    "uint8": 7,
    "int16": 8,
    "uint16": 9,
    "int32": 10,
    "uint32": 11,
    "int64": 12,
    "uint64": 13,
}

READS = frozenset({"float16", "bfloat16"})
CONVERTS = frozenset(_CONVERTED)

# The terms of a row wait in a scratch of up to this share of the last cache level, which threads share. From a 32nd to
# a quarter the times agree.
_SCRATCH_SHARE = 16

# Rows of up to this many elements, by their size, are computed side by side if there are at least so many. In ns a row,
# in tiles and one after the other: softmax of float32 on v4 56 elements 61 and 73, 64 elements 76 and 67; on v3 60
# elements 52 and 65, 64 elements 55 and 52; on v2 60 elements 158 and 185, 64 elements 167 and 159. Tiles of 16 bits
# are slow to convert where no instruction does it: on v2 12 elements 81 and 83, 28 elements 202 and 174. The other
# functions gain more: logsumexp of 96 float32 on v4 takes 0.85 of the time in tiles, and the largest of 50 a 20th.
_MAX_TILE_COLS = {
    "x86_64_v4": {
        "softmax": {2: 60, 4: 56, 8: 40},
        "log_softmax": {2: 96, 4: 60, 8: 56},
        "others": {2: 96, 4: 104, 8: 56},
    },
    "x86_64_v3": {
        "softmax": {2: 52, 4: 60, 8: 30},
        "log_softmax": {2: 88, 4: 60, 8: 30},
        "others": {2: 88, 4: 60, 8: 32},
    },
    "x86_64_v2": {
        "softmax": {2: 14, 4: 60, 8: 22},
        "log_softmax": {2: 14, 4: 60, 8: 16},
        "others": {2: 80, 4: 80, 8: 40},
    },
}
_MAX_TILE_COLS["portable"] = _MAX_TILE_COLS["x86_64_v2"]
_MIN_TILE_ROWS = 16

# Up to so many elements are selected from rows side by side. In ms, so and one after the other: (20000, 50) float32 1.7
# and 38 for 8 elements, 9.6 and 51 for 50; (64, 100, 1000) over axis 1 17 and 97 for 8, 91 and 324 for 64; but
# (2000, 2000) over axis 0 8.1 and 10.2 for 8, 49 and 33 for 64.
_MAX_SELECTED = 64

# Each thread gets at least this many elements: 4 us of work in float32. On two threads
# (64, 1000) float32 take 7.8 us instead of 11.5, but (40, 1000) 8.5 instead of 7.6.
_MIN_ELEMENTS_PER_THREAD = 24_576

# The same for vector-Jacobian products, which do less with an element.
_MIN_VJP_ELEMENTS_PER_THREAD = 65_536

_CACHE_LINE_BYTES = 64

# A call returns to Python between blocks of this many bytes of input, so that Ctrl-C is heard within some 10 ms; but a
# block is one row at least.
_MAX_BLOCK_BYTES = 64 * 1024 * 1024


def load_tier(tier: str) -> Any:
    """Return the kernels of a tier; ModuleNotFoundError if it is not built."""
    return import_module(f"fastsoftmax._kernels_{tier}")


@cache
def tiers() -> tuple[str, ...]:
    """Return the tiers that are built and that this processor runs, best first."""
    runs_here = load_tier("portable").runs_here
    found = []
    for tier in TIERS:
        if runs_here(tier):
            try:
                load_tier(tier)
            except ModuleNotFoundError:  # the compiler that built the package did not know the tier
                continue
            found.append(tier)
    return tuple(found)


def _initial_tier() -> str:
    forced = os.environ.get("FASTSOFTMAX_ISA")
    if not forced:
        return tiers()[0]
    if forced not in tiers():
        raise ForcedTierError(f"FASTSOFTMAX_ISA must be one of {', '.join(tiers())} on this machine, not {forced!r}")
    return forced


_tier: str
_kernels: Any


def _serve_from(tier: str) -> None:
    """Let a tier's kernels serve all calls, those included that never come to this module."""
    global _tier, _kernels
    _tier, _kernels = tier, load_tier(tier)
    make_schedule.cache_clear()
    _make_adjusted_schedule.cache_clear()
    _kernels.serve_direct_calls(_dispatch.choices, _direct_schedule, empty_like)
    _dispatch.direct_calls = _kernels


def active_tier() -> str:
    """Return the tier that serves calls."""
    return _tier


@contextmanager
def use_tier(tier: str) -> Iterator[None]:
    """Serve all calls of the process from another tier inside a ``with`` block: for tests and benchmarks."""
    if tier not in tiers():
        raise ValueError(f"tier must be one of {', '.join(tiers())} on this machine, not {tier!r}")
    before = _tier
    _serve_from(tier)
    try:
        yield
    finally:
        _serve_from(before)


def kernel_addresses() -> dict[tuple[str, str], int]:
    """Return the addresses of the active tier's C functions for one contiguous row, by function and dtype."""
    addresses: dict[tuple[str, str], int] = _kernels.addresses()
    return addresses


def plan(
    function: Function, layout: Layout, in_place: bool, adjustment: Adjustment | None = None, n_selected: int = 0
) -> Plan:
    return Plan(function, "cython", _tier, _choose_schedule(function, layout, in_place, adjustment, n_selected))


def _choose_schedule(
    function: Function, layout: Layout, in_place: bool, adjustment: Adjustment | None = None, n_selected: int = 0
) -> Schedule:
    max_threads = _schedule.max_threads() if layout.size >= 2 * _MIN_ELEMENTS_PER_THREAD else 1
    if adjustment is not None:
        return _make_adjusted_schedule(function, layout, adjustment.dtype.itemsize, max_threads)
    return make_schedule(function, layout, in_place, max_threads, n_selected)


def _direct_schedule(
    function: int, itemsize: int, outer: int, n: int, inner: int, in_place: bool
) -> tuple[int, int, bool, int, int]:
    """Choose the schedule of an array in C order, in the numbers of the kernels."""
    name = _FUNCTION_NAMES[function]
    layout = c_order_layout(outer, n, inner, itemsize, name == "logsumexp", name in VJPS)
    schedule = _choose_schedule(name, layout, in_place)
    return (
        _TRAVERSALS[schedule.traversal],
        _EXPONENTIALS[schedule.exponentials],
        schedule.streaming,
        schedule.n_blocks,
        schedule.n_threads,
    )


@lru_cache(maxsize=1024)
def make_schedule(
    function: Function, layout: Layout, in_place: bool, max_threads: int, n_selected: int = 0
) -> Schedule:
    """Choose the traversal from the strides, and from the sizes where the exponentials wait for their sum.

    Remembered, for choosing takes longer than a short row.
    """
    n_bytes = layout.size * layout.itemsize
    n_threads = max(1, min(layout.size // _MIN_ELEMENTS_PER_THREAD, max_threads))
    n_blocks = max(n_threads * _schedule.BLOCKS_PER_THREAD if n_threads > 1 else 1, -(-n_bytes // _MAX_BLOCK_BYTES))
    caches = _schedule.cache_sizes()
    # Input and output together leave the last cache: what is written will not be read from there.
    streaming = function != "logsumexp" and 2 * n_bytes > caches.last_level
    if layout.itemsize == 2:  # other kernels round results where they are
        streaming &= function in ("softmax", "softmax_one")
    itemsize = max(layout.itemsize, 4)  # that is computed in
    if function in VJPS:
        return _make_vjp_schedule(function, layout, in_place, max_threads)
    if function == "weighted_logsumexp":
        n_blocks = min(n_blocks, layout.n_rows)
        return Schedule("gather", "none", False, min(n_threads, n_blocks), n_blocks)
    traversal: Traversal
    by_function = _MAX_TILE_COLS[_tier]
    max_tile_cols = by_function.get(function, by_function["others"])
    short = layout.n_cols <= max_tile_cols[layout.itemsize] and layout.n_rows >= _MIN_TILE_ROWS
    if function in CROSS_ENTROPIES:
        return _make_cross_entropy_schedule(function, layout, in_place, n_threads, n_blocks)
    if function in BANDED:
        streaming &= function == "normalize" and not in_place
        side_by_side = function != "normalize" and n_selected <= _MAX_SELECTED
        return _make_banded_schedule(layout, short, side_by_side, n_threads, n_blocks, streaming)
    is_long = layout.n_cols * itemsize > _kernels.chunk_bytes
    if layout.itemsize == 2 and layout.has_contiguous_rows and is_long:
        traversal, n_units, unit_bytes, streaming = "gather", layout.n_rows, 0, False
    elif layout.has_contiguous_rows and short and len(layout.kept) == 1:
        traversal, n_units, unit_bytes = "tiles", layout.n_rows, 0
        streaming &= layout.kept[0].y_stride == layout.n_cols * layout.itemsize
    elif layout.has_contiguous_rows:
        traversal, n_units, unit_bytes = "rows", layout.n_rows, layout.n_cols * itemsize
        n_chunks = -(-unit_bytes // _kernels.chunk_bytes)
        if n_threads > 1 and n_units < n_threads * _schedule.BLOCKS_PER_THREAD and n_chunks >= 2 * n_threads:
            traversal, n_units = "split", n_chunks
    elif layout.has_adjacent_rows:
        traversal, n_units, unit_bytes = "strips", _count_strips(layout), 0
        streaming &= _may_stream_strips(layout)
    else:
        traversal, n_units, unit_bytes, streaming = "gather", layout.n_rows, layout.n_cols * layout.itemsize, False
    exponentials: Exponentials = "none"
    if function in ("softmax", "softmax_one"):
        if traversal in ("gather", "strips") or layout.itemsize == 2:
            exponentials = "scratch" if layout.n_cols * itemsize <= _kernels.chunk_bytes else "recompute"
        elif traversal in ("rows", "split") and not (streaming or in_place):
            exponentials = "output"
        else:
            exponentials = "scratch" if unit_bytes <= caches.last_level // _SCRATCH_SHARE else "recompute"
    n_blocks = min(n_blocks, n_units)
    return Schedule(traversal, exponentials, streaming, min(n_threads, n_blocks), n_blocks)


def _count_strips(layout: Layout) -> int:
    inner = layout.kept[-1].size
    n_strips: int = -(-inner // _kernels.columns_of_strip(layout.n_cols, layout.itemsize, inner))
    return layout.n_rows // inner * n_strips


def _may_stream_strips(layout: Layout) -> bool:
    """Whether cache lines end at the same columns in each row of the output.

    Elsewhere strips would share lines in most rows: (3000, 4001) float32 on axis 0 take 43 ns a line instead of 33.
    """
    return layout.reduced[0].y_stride % _CACHE_LINE_BYTES == 0


def _make_vjp_schedule(function: Function, layout: Layout, in_place: bool, max_threads: int) -> Schedule:
    """Choose the traversal of a vector-Jacobian product, whose gradient is one more input."""
    row, n_units = layout.reduced[-1], layout.n_rows
    n_bytes = 3 * layout.size * layout.itemsize
    n_threads = max(1, min(layout.size // _MIN_VJP_ELEMENTS_PER_THREAD, max_threads))
    n_blocks = max(n_threads * _schedule.BLOCKS_PER_THREAD if n_threads > 1 else 1, -(-n_bytes // _MAX_BLOCK_BYTES))
    traversal: Traversal = "gather"
    has_contiguous_gradient = function == "logsumexp_vjp" or row.b_stride == layout.itemsize or row.size == 1
    if layout.itemsize > 2 and layout.has_contiguous_rows and has_contiguous_gradient:
        traversal = "rows"
    elif layout.has_adjacent_rows and layout.kept[-1].b_stride == layout.itemsize:
        traversal = "strips"
        n_strips = -(-layout.kept[-1].size * max(layout.itemsize, 4) // _kernels.narrow_strip_bytes)
        n_units = layout.n_rows // layout.kept[-1].size * n_strips
    streaming = traversal == "rows" and not in_place and n_bytes > _schedule.cache_sizes().last_level
    n_blocks = min(n_blocks, n_units)
    return Schedule(traversal, "none", streaming, min(n_threads, n_blocks), n_blocks)


@lru_cache(maxsize=1024)
def _make_adjusted_schedule(function: Function, layout: Layout, itemsize: int, max_threads: int) -> Schedule:
    """Choose the traversal of rows that are masked, divided or converted, as `make_schedule` does where it can."""
    n_bytes = layout.size * (layout.itemsize + layout.y_itemsize)
    n_threads = max(1, min(layout.size // _MIN_ELEMENTS_PER_THREAD, max_threads))
    n_blocks = max(n_threads * _schedule.BLOCKS_PER_THREAD if n_threads > 1 else 1, -(-n_bytes // _MAX_BLOCK_BYTES))
    traversal: Traversal = "gather"
    n_units = layout.n_rows
    streaming = (
        function != "logsumexp" and layout.y_itemsize == itemsize and n_bytes > _schedule.cache_sizes().last_level
    )
    short = layout.n_cols <= _MAX_TILE_COLS[_tier]["others"][itemsize] and layout.n_rows >= _MIN_TILE_ROWS
    if layout.has_contiguous_rows and short and len(layout.kept) == 1:
        traversal = "tiles"
        streaming &= layout.kept[0].y_stride == layout.n_cols * itemsize
    elif layout.has_contiguous_rows:
        pass
    elif layout.has_adjacent_rows:
        traversal = "strips"
        n_units = _count_strips(layout)
        streaming &= _may_stream_strips(layout)
    else:
        streaming = False
    exponentials: Exponentials = "none"
    if function == "softmax":
        exponentials = "scratch" if layout.n_cols * itemsize <= _kernels.chunk_bytes else "recompute"
    n_blocks = min(n_blocks, n_units)
    return Schedule(traversal, exponentials, streaming, min(n_threads, n_blocks), n_blocks)


def _make_cross_entropy_schedule(
    function: Function, layout: Layout, in_place: bool, n_threads: int, n_blocks: int
) -> Schedule:
    """Choose the traversal of a cross-entropy. Rows with labels are run side by side where they are adjacent:

    (8, 21, 128, 128) float32 over axis 1 take 8.8 ms instead of 29.5.
    """
    traversal: Traversal = "gather"
    if layout.itemsize > 2 and layout.has_contiguous_rows:
        traversal = "rows"
    elif layout.has_adjacent_rows and function == "softmax_cross_entropy":
        traversal = "strips"
    n_bytes = 2 * layout.size * layout.itemsize
    streaming = traversal == "rows" and not in_place and n_bytes > _schedule.cache_sizes().last_level
    n_blocks = min(n_blocks, layout.n_rows)
    return Schedule(traversal, "recompute", streaming, min(n_threads, n_blocks), n_blocks)


def _make_banded_schedule(
    layout: Layout, short: bool, side_by_side: bool, n_threads: int, n_blocks: int, streaming: bool
) -> Schedule:
    """Choose the traversal of a function that visits rows in bands, or some of them side by side."""
    traversal: Traversal = "gather"
    n_units, itemsize = layout.n_rows, max(layout.itemsize, 4)
    if side_by_side and short and layout.has_contiguous_rows and len(layout.kept) == 1:
        traversal = "tiles"
    elif layout.itemsize > 2 and layout.has_contiguous_rows:
        traversal = "rows"
    elif side_by_side and layout.has_adjacent_rows and layout.n_cols * itemsize <= _kernels.chunk_bytes:
        traversal, n_units = "strips", _count_strips(layout)
    elif layout.itemsize > 2 and layout.has_adjacent_rows:
        traversal = "bands"
        inner = layout.kept[-1].size
        n_units = layout.n_rows // inner * -(-inner * layout.itemsize // _kernels.narrow_strip_bytes)
    n_blocks = min(n_blocks, n_units)
    return Schedule(traversal, "none", streaming and traversal == "rows", min(n_threads, n_blocks), n_blocks)


def run_cross_entropy(
    plan: Plan, layout: Layout, x: Array, gradient: Array | None, losses: Array, terms: CrossEntropy
) -> None:
    schedule = plan.schedule
    _kernels.run_cross_entropy(
        _TRAVERSALS[schedule.traversal],
        schedule.streaming and gradient is not None,
        _STORAGES[x.dtype.name],
        layout.kept,
        layout.reduced,
        x,
        gradient,
        terms.probabilities,
        terms.labels,
        terms.weights,
        terms.spread,
        losses,
        terms.smoothing,
        terms.scale,
        terms.z_scale,
        terms.softcap,
        schedule.n_blocks,
        schedule.n_threads,
    )


@cache
def _storage(dtype: np.dtype[Any], computed: np.dtype[Any]) -> int:
    """Return how an element lies in memory; looking up the name of a dtype takes longer than a short row."""
    return 0 if dtype == computed else _CONVERTED[dtype.name]


def run_adjusted(plan: Plan, layout: Layout, x: Array, out: Array, adjustment: Adjustment) -> None:
    schedule = plan.schedule
    _kernels.run_adjusted(
        _FUNCTIONS[plan.function],
        _TRAVERSALS[schedule.traversal],
        _EXPONENTIALS[schedule.exponentials],
        schedule.streaming,
        adjustment.dtype.itemsize == 4,
        _storage(x.dtype, adjustment.dtype),
        _storage(out.dtype, adjustment.dtype),
        layout.kept,
        layout.reduced,
        x,
        adjustment.mask,
        adjustment.temperature,
        out,
        schedule.n_blocks,
        schedule.n_threads,
    )


def run_weighted(
    plan: Plan, layout: Layout, a: Array, out: Array, b: Array, sign: Array | None, adjustment: Adjustment
) -> None:
    _kernels.run_weighted(
        adjustment.dtype.itemsize == 4,
        _storage(a.dtype, adjustment.dtype),
        _storage(b.dtype, adjustment.dtype),
        _storage(out.dtype, adjustment.dtype),
        layout.kept,
        layout.reduced,
        a,
        b,
        out,
        sign,
        adjustment.mask,
        adjustment.temperature,
        plan.schedule.n_blocks,
        plan.schedule.n_threads,
    )


def run_states(plan: Plan, layout: Layout, x: Array, out: Array | None, states: Array) -> None:
    schedule = plan.schedule
    _kernels.run_streaming(
        _TRAVERSALS[schedule.traversal],
        schedule.streaming,
        _STORAGES[x.dtype.name],
        layout.kept,
        layout.reduced,
        x,
        out,
        states,
        schedule.n_blocks,
        schedule.n_threads,
    )


def run_topk(plan: Plan, layout: Layout, x: Array, values: Array, indices: Array) -> None:
    schedule = plan.schedule
    _kernels.run_topk(
        _TRAVERSALS[schedule.traversal],
        _STORAGES[x.dtype.name],
        layout.kept,
        layout.reduced,
        x,
        values,
        indices,
        schedule.n_blocks,
        schedule.n_threads,
    )


def run_sampling(plan: Plan, layout: Layout, x: Array, uniforms: Array, draws: Array, terms: Truncation) -> None:
    schedule = plan.schedule
    _kernels.run_sampling(
        _TRAVERSALS[schedule.traversal],
        _STORAGES[x.dtype.name],
        layout.kept,
        layout.reduced,
        x,
        uniforms,
        draws,
        terms.temperature,
        terms.top_k or 0,
        terms.top_p,
        schedule.n_blocks,
        schedule.n_threads,
    )


def merge_states(states: Array, others: Array, is_single: bool) -> None:
    _kernels.merge_rows(states, others)


def logsumexp_of_states(states: Array, is_single: bool) -> Array:
    log_sums = np.empty(len(states))
    _kernels.logsumexp_of_rows(states, is_single, log_sums)
    return log_sums


def run(plan: Plan, layout: Layout, x: Array, out: Array, g: Array | None) -> None:
    schedule = plan.schedule
    kernel: Callable[..., None]
    arguments: tuple[Any, ...]
    if g is None:
        kernel = _kernels.run
        arguments = (
            _FUNCTIONS[plan.function],
            _TRAVERSALS[schedule.traversal],
            _EXPONENTIALS[schedule.exponentials],
            schedule.streaming,
            _STORAGES[x.dtype.name],
            layout.kept,
            layout.reduced,
            x,
            out,
        )
    else:
        kernel = _kernels.run_vjp
        arguments = (
            _FUNCTIONS[plan.function],
            _TRAVERSALS[schedule.traversal],
            schedule.streaming,
            _STORAGES[x.dtype.name],
            layout.kept,
            layout.reduced,
            x,
            g,
            out,
        )
    kernel(*arguments, schedule.n_blocks, schedule.n_threads)


_serve_from(_initial_tier())
_threadpool.register()
