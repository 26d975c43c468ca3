"""The facts a schedule is chosen from, the choice itself, and that no result depends on it."""

import dataclasses
import os
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _schedule
from fastsoftmax._layout import Dimension, Layout
from fastsoftmax._schedule import Caches, Schedule, cache_sizes, max_threads

from . import inputs

TIERS = ["cython-portable", "cython-x86_64_v2", "cython-x86_64_v3", "cython-x86_64_v4"]


def test_a_schedule_is_a_value():
    assert Schedule("rows", "output") == Schedule("rows", "output", streaming=False, n_threads=1, n_blocks=1)
    assert len({Schedule("rows", "output"), Schedule("rows", "output")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule("rows", "output").n_threads = 2


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("2", 2), ("64", 64), ("007", 7)])
def test_number_of_threads_from_the_environment(monkeypatch, text, number):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", text)
    assert max_threads() == number


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", " ", "1e3", "+2", "²"])
def test_anything_but_a_positive_integer_is_refused(monkeypatch, text):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", text)
    with pytest.raises(ValueError, match="FASTSOFTMAX_NUM_THREADS must be a positive integer, not"):
        max_threads()


def test_number_of_threads_is_that_of_the_cores_allowed(monkeypatch):
    monkeypatch.delenv("FASTSOFTMAX_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert max_threads() == 3
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "")
    assert max_threads() == 3


def test_number_of_threads_where_affinity_is_unknown(monkeypatch):
    monkeypatch.delenv("FASTSOFTMAX_NUM_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert max_threads() == 1


def test_cache_sizes():
    caches = cache_sizes()
    assert 128 * 1024 <= caches.private <= caches.last_level
    assert caches.last_level >= 8 * 1024 * 1024


def test_cache_sizes_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/nonexistent/index0")]))
    caches = cache_sizes.__wrapped__()
    assert (caches.private, caches.last_level) == (512 * 1024, 8 * 1024 * 1024)


def test_a_last_level_that_many_cores_share_counts_in_part(monkeypatch, tmp_path):
    for level, size in ((2, 2), (3, 480)):
        (index := tmp_path / f"index{level}").mkdir()
        for name, text in (("type", "Unified"), ("level", f"{level}"), ("size", f"{size * 1024}K")):
            (index / name).write_text(text)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: tmp_path.iterdir())
    assert cache_sizes.__wrapped__() == Caches(2 * 1024 * 1024, 64 * 1024 * 1024)


# The choice of the compiled backend


def contiguous_rows(n_rows, n_cols, itemsize=4):
    step = n_cols * itemsize
    return Layout((Dimension(n_rows, step, step),), (Dimension(n_cols, itemsize, itemsize),), itemsize)


def adjacent_rows(outer, n_cols, inner, itemsize=4):
    step = inner * itemsize
    outermost = Dimension(outer, n_cols * step, n_cols * step)
    return Layout((outermost, Dimension(inner, itemsize, itemsize)), (Dimension(n_cols, step, step),), itemsize)


def padded_rows(n_rows, n_cols, itemsize=4):
    step = n_cols * itemsize
    return Layout((Dimension(n_rows, step, 2 * step),), (Dimension(n_cols, itemsize, itemsize),), itemsize)


def stepped_rows(n_rows, n_cols, itemsize=4):
    step = n_cols * itemsize
    return Layout((Dimension(n_rows, 2 * step, step),), (Dimension(n_cols, 2 * itemsize, itemsize),), itemsize)


# With caches of 1 and 32 MiB, up to 8 threads, float32 if no itemsize is given. In this order: small calls; large ones,
# rows being split where there are few;
# those that leave the cache, their scratch at its limit of 2 MiB and beyond it; calls in place; strips, which hold
# 512 bytes of each row and more, or 256 of many rows.
@pytest.mark.parametrize(
    ("function", "layout", "in_place", "schedule"),
    [
        ("softmax", contiguous_rows(40, 1000), False, Schedule("rows", "output")),
        ("log_softmax", contiguous_rows(40, 1000), False, Schedule("rows", "none")),
        ("logsumexp", contiguous_rows(40, 1000), False, Schedule("rows", "none")),
        ("softmax", contiguous_rows(16, 56), False, Schedule("tiles", "scratch")),
        ("softmax", contiguous_rows(15, 56), False, Schedule("rows", "output")),
        ("softmax", contiguous_rows(16, 57), False, Schedule("rows", "output")),
        ("softmax", contiguous_rows(16, 40, 8), False, Schedule("tiles", "scratch")),
        ("softmax", contiguous_rows(16, 41, 8), False, Schedule("rows", "output")),
        ("logsumexp", contiguous_rows(16, 104), False, Schedule("tiles", "none")),
        ("logsumexp", contiguous_rows(16, 105), False, Schedule("rows", "none")),
        ("softmax", contiguous_rows(1_000_000, 10), True, Schedule("tiles", "scratch", True, 8, 32)),
        ("softmax", padded_rows(1_000_000, 10), False, Schedule("tiles", "scratch", False, 8, 32)),
        ("logsumexp", contiguous_rows(1_000_000, 10), False, Schedule("tiles", "none", False, 8, 32)),
        ("softmax", adjacent_rows(20, 60, 40), False, Schedule("strips", "scratch")),
        ("softmax", stepped_rows(40, 1000), False, Schedule("gather", "scratch")),
        ("softmax", contiguous_rows(48, 1023), False, Schedule("rows", "output")),
        ("softmax", contiguous_rows(48, 1024), False, Schedule("rows", "output", n_threads=2, n_blocks=8)),
        ("softmax", contiguous_rows(7, 16_384), False, Schedule("rows", "output", n_threads=4, n_blocks=7)),
        ("softmax", contiguous_rows(11, 49_153), False, Schedule("rows", "output", n_threads=8, n_blocks=11)),
        ("softmax", contiguous_rows(2, 32_769), False, Schedule("split", "output", n_threads=2, n_blocks=5)),
        ("softmax", contiguous_rows(1024, 1024), False, Schedule("rows", "output", n_threads=8, n_blocks=32)),
        ("softmax", contiguous_rows(192, 384), False, Schedule("rows", "output", n_threads=3, n_blocks=12)),
        ("softmax", contiguous_rows(1, 1 << 20), False, Schedule("split", "output", False, 8, 32)),
        ("softmax", contiguous_rows(4096, 1024), False, Schedule("rows", "output", False, 8, 32)),
        ("softmax", contiguous_rows(4097, 1024), False, Schedule("rows", "scratch", True, 8, 32)),
        ("softmax", contiguous_rows(2049, 1024, 8), False, Schedule("rows", "scratch", True, 8, 32)),
        ("log_softmax", contiguous_rows(4097, 1024), False, Schedule("rows", "none", True, 8, 32)),
        ("logsumexp", contiguous_rows(4097, 1024), False, Schedule("rows", "none", False, 8, 32)),
        ("softmax", contiguous_rows(16, 1 << 19), False, Schedule("split", "scratch", True, 8, 32)),
        ("softmax", contiguous_rows(16, 1 + (1 << 19)), False, Schedule("split", "recompute", True, 8, 32)),
        ("softmax", contiguous_rows(1 << 20, 1024), False, Schedule("rows", "scratch", True, 8, 64)),
        ("softmax", stepped_rows(4097, 1024), False, Schedule("gather", "scratch", False, 8, 32)),
        ("log_softmax", stepped_rows(4097, 1024), False, Schedule("gather", "none", False, 8, 32)),
        ("softmax", contiguous_rows(40, 1000), True, Schedule("rows", "scratch")),
        ("softmax", contiguous_rows(1, 1 << 20), True, Schedule("split", "recompute", False, 8, 32)),
        ("log_softmax", contiguous_rows(40, 1000), True, Schedule("rows", "none")),
        ("softmax", adjacent_rows(20, 60, 40), True, Schedule("strips", "scratch")),
        ("softmax", adjacent_rows(1, 1024, 128), True, Schedule("strips", "scratch")),
        ("softmax", adjacent_rows(1, 4096, 128), True, Schedule("strips", "scratch", False, 2, 2)),
        ("softmax", adjacent_rows(1, 8192, 40), True, Schedule("strips", "scratch")),
        ("softmax", adjacent_rows(1, 8193, 40), True, Schedule("strips", "recompute")),
        ("softmax", adjacent_rows(1, 4096, 30, 8), True, Schedule("strips", "scratch")),
        ("softmax", adjacent_rows(1, 4097, 30, 8), True, Schedule("strips", "recompute")),
        ("softmax", adjacent_rows(1, 4096, 4096), False, Schedule("strips", "scratch", True, 8, 32)),
        ("softmax", adjacent_rows(1, 8193, 4096), False, Schedule("strips", "recompute", True, 8, 32)),
        ("softmax", adjacent_rows(1, 4096, 4096, 8), False, Schedule("strips", "scratch", True, 8, 32)),
        ("softmax", adjacent_rows(1, 4096, 4104), False, Schedule("strips", "scratch", False, 8, 32)),
        ("softmax", adjacent_rows(1, 4096, 300), False, Schedule("strips", "scratch", False, 5, 5)),
        ("softmax", adjacent_rows(2, 1024, 300), False, Schedule("strips", "scratch", False, 6, 6)),
        ("logsumexp", adjacent_rows(1, 4096, 4096), False, Schedule("strips", "none", False, 8, 32)),
        ("softmax", stepped_rows(64, 8193), False, Schedule("gather", "recompute", False, 8, 32)),
        ("softmax", contiguous_rows(40, 1000, 2), False, Schedule("rows", "scratch")),
        ("softmax", contiguous_rows(9000, 1024, 2), False, Schedule("rows", "scratch", True, 8, 32)),
        ("softmax", contiguous_rows(64, 9000, 2), True, Schedule("gather", "recompute", False, 8, 32)),
        ("softmax", contiguous_rows(1_000_000, 10, 2), False, Schedule("tiles", "scratch", True, 8, 32)),
        ("softmax", adjacent_rows(1, 8192, 4096, 2), False, Schedule("strips", "scratch", True, 8, 32)),
        ("softmax", adjacent_rows(1, 8192, 4100, 2), False, Schedule("strips", "scratch", False, 8, 32)),
        ("softmax", adjacent_rows(1, 4096, 300, 2), False, Schedule("strips", "scratch", False, 3, 3)),
    ],
)
def test_compiled_schedules(monkeypatch, function, layout, in_place, schedule):
    compiled = pytest.importorskip("fastsoftmax.backends.compiled", exc_type=ImportError)
    monkeypatch.setattr(compiled, "_tier", "x86_64_v4")  # of which the plan asks nothing but how long tiled rows may be
    with caches_of(1 << 20, 32 << 20):
        assert compiled.make_schedule(function, layout, in_place, 8) == schedule


@pytest.mark.parametrize(
    ("function", "layout", "n_selected", "schedule"),
    [
        ("softmax_one", contiguous_rows(16, 104), 0, Schedule("tiles", "scratch")),
        ("softmax_one", adjacent_rows(20, 60, 40), 0, Schedule("strips", "scratch")),
        ("fold_states", contiguous_rows(16, 104), 0, Schedule("tiles", "none")),
        ("fold_states", contiguous_rows(15, 104), 0, Schedule("rows", "none")),
        ("fold_states", contiguous_rows(1_000_000, 10, 2), 0, Schedule("tiles", "none", False, 8, 32)),
        ("fold_states", contiguous_rows(40, 1000, 2), 0, Schedule("gather", "none")),
        ("fold_states", adjacent_rows(1, 8192, 300), 0, Schedule("strips", "none", False, 5, 5)),
        ("fold_states", adjacent_rows(1, 8193, 300), 0, Schedule("bands", "none", False, 3, 3)),
        ("normalize", contiguous_rows(16, 104), 0, Schedule("rows", "none")),
        ("normalize", adjacent_rows(1, 4096, 300), 0, Schedule("bands", "none", False, 3, 3)),
        ("softmax_topk", contiguous_rows(16, 104), 64, Schedule("tiles", "none")),
        ("softmax_topk", contiguous_rows(16, 104), 65, Schedule("rows", "none")),
        ("softmax_topk", adjacent_rows(20, 60, 40), 60, Schedule("strips", "none")),
        ("sample", adjacent_rows(20, 70, 30), 0, Schedule("strips", "none")),
        ("sample", adjacent_rows(20, 70, 30), 70, Schedule("bands", "none")),
    ],
)
def test_compiled_schedules_of_banded_functions(monkeypatch, function, layout, n_selected, schedule):
    compiled = pytest.importorskip("fastsoftmax.backends.compiled", exc_type=ImportError)
    monkeypatch.setattr(compiled, "_tier", "x86_64_v4")
    with caches_of(1 << 20, 32 << 20):
        assert compiled.make_schedule(function, layout, False, 8, n_selected) == schedule


def test_how_long_rows_in_tiles_are_depends_on_the_tier(monkeypatch):
    compiled = pytest.importorskip("fastsoftmax.backends.compiled", exc_type=ImportError)
    for tier, function, itemsize, n_cols in (
        ("x86_64_v4", "softmax", 4, 56),
        ("x86_64_v4", "logsumexp", 4, 104),
        ("x86_64_v3", "softmax", 4, 60),
        ("x86_64_v3", "log_softmax", 2, 88),
        ("x86_64_v2", "softmax", 2, 14),
        ("portable", "log_softmax", 8, 16),
    ):
        monkeypatch.setattr(compiled, "_tier", tier)
        for n, traversal in ((n_cols, "tiles"), (n_cols + 1, "rows")):
            with caches_of(1 << 20, 32 << 20):
                layout = contiguous_rows(16, n, itemsize)
                assert compiled.make_schedule(function, layout, False, 8).traversal == traversal


def test_one_thread_returns_to_python_after_each_64_mib():
    compiled = pytest.importorskip("fastsoftmax.backends.compiled", exc_type=ImportError)
    for n_rows, n_blocks in ((4096, 1), (4097, 2), (8192, 2), (8193, 3)):
        schedule = compiled.make_schedule("logsumexp", contiguous_rows(n_rows, 4096), False, 1)
        assert (schedule.n_threads, schedule.n_blocks) == (1, n_blocks)


# Its results


@contextmanager
def caches_of(private, last_level):
    from fastsoftmax.backends import compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_schedule, "cache_sizes", lambda: Caches(private, last_level))
        compiled.make_schedule.cache_clear()  # plans are remembered, as caches never change
        try:
            yield
        finally:
            compiled.make_schedule.cache_clear()


@pytest.fixture
def wide_tiles(backend, monkeypatch):
    """Rows of up to 32 elements are in tiles, though on older tiers some are quicker one after the other."""
    if backend.name == "cython":
        from fastsoftmax.backends import compiled

        monkeypatch.setitem(compiled._MAX_TILE_COLS, compiled.active_tier(), {"others": {2: 32, 4: 32, 8: 32}})
        compiled.make_schedule.cache_clear()
        yield
        compiled.make_schedule.cache_clear()
    else:
        yield


def run(function, x, axis, out):
    with fastsoftmax.record_plans() as plans:
        getattr(fastsoftmax, function)(x, axis, out=out)
    return out.copy(), plans[0].schedule


def placed(shape, dtype, offset):
    """Return an array whose memory begins so many elements after the beginning of a cache line."""
    itemsize = np.dtype(dtype).itemsize
    room = np.empty(np.prod(shape) * itemsize + 128, np.uint8)
    first = -room.ctypes.data % 64 + offset * itemsize
    return room[first : first + np.prod(shape) * itemsize].view(dtype).reshape(shape)


@pytest.mark.parametrize("backend", TIERS, indirect=True)
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("shape", "axis", "traversal", "streaming", "waiting"),
    [
        ((80, 512), 1, "rows", True, "scratch"),
        ((80, 501), 1, "rows", True, "scratch"),
        ((600, 501), 1, "rows", True, "scratch"),  # on two threads
        ((300, 130), 1, "rows", True, "scratch"),  # cache lines are shared by rows, and rows by batches
        ((2, 16_500), 1, "rows", True, "recompute"),
        ((2000, 10), 1, "tiles", True, "scratch"),
        ((777, 29), 1, "tiles", True, "scratch"),
        ((6007, 3), 1, "tiles", True, "scratch"),
        ((4, 500), 1, "rows", False, "scratch"),
        ((2, 1500), 1, "rows", False, "recompute"),
        ((8, 4096), 0, "strips", True, "scratch"),
        ((3, 7, 1008), 1, "strips", True, "scratch"),
        ((3, 7, 1003), 1, "strips", False, "scratch"),  # rows whose cache lines do not end at the same columns
        ((3, 90, 192), 1, "strips", True, "scratch"),
        ((9001, 32), 0, "strips", True, "recompute"),
        ((9001, 21), 0, "strips", False, "recompute"),
        ((8, 70), 0, "strips", False, "scratch"),
        ((20, 70), 0, "strips", False, "scratch"),
        ((20, 30, 41), (0, 2), "gather", False, "scratch"),
        ((200, 3, 51), (0, 2), "gather", False, "recompute"),
    ],
)
def test_results_do_not_depend_on_the_schedule(
    backend, wide_tiles, monkeypatch, function, dtype, shape, axis, traversal, streaming, waiting
):
    """With caches so small that this data leaves them, the bits are those of large ones, in place or not."""
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "2")
    waiting_in_output = waiting if streaming or traversal != "rows" else "output"
    for kind in ("wide", "ascending", "masked by -inf", "offset", "one nan"):
        x = inputs.values(kind, shape, dtype)
        with caches_of(1 << 20, 1 << 30):
            expected, natural = run(function, x, axis, np.empty_like(x))
        assert natural.exponentials in ("output", "none") or traversal != "rows"
        assert not natural.streaming
        with caches_of(1 << 14, 1 << 16):
            for offset in (0, 1):
                out = placed(shape, dtype, offset)
                result, schedule = run(function, x, axis, out)
                assert (schedule.traversal, schedule.streaming) == (traversal, streaming)
                assert schedule.exponentials == (waiting_in_output if function == "softmax" else "none")
                np.testing.assert_array_equal(result.view(np.uint8), expected.view(np.uint8))
                out[...] = x
                result, schedule = run(function, out, axis, out)
                assert (schedule.traversal, schedule.streaming) == (traversal, streaming)
                assert schedule.exponentials == (waiting if function == "softmax" else "none")
                np.testing.assert_array_equal(result.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("backend", TIERS, indirect=True)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "traversal"),
    [
        ((80, 512), "rows"),
        ((300, 130), "rows"),
        ((150, 101), "rows"),
        ((777, 27), "tiles"),
        ((9001, 160), "strips"),
        ((90, 416), "strips"),
        ((90, 401), "strips"),
    ],
)
def test_16_bit_results_do_not_depend_on_the_schedule(backend, wide_tiles, monkeypatch, dtype, shape, traversal):
    """They are those of small caches, of a row alone, of a row that is collected, and of a column."""
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "2")
    is_columns = traversal == "strips"
    waiting = "recompute" if is_columns and shape[0] > 8192 else "scratch"
    for kind in ("wide", "masked by -inf", "one nan"):
        x = inputs.values(kind, shape, np.float32).astype(dtype)
        with caches_of(1 << 20, 1 << 30):
            expected, natural = run("softmax", x, 0 if is_columns else 1, np.empty_like(x))
        assert natural == dataclasses.replace(natural, traversal=traversal, exponentials=waiting, streaming=False)
        with caches_of(1 << 14, 1 << 16):
            for offset in (0, 1, 16, 20, 31):
                out = placed(shape, dtype, offset)
                result, schedule = run("softmax", x, 0 if is_columns else 1, out)
                assert schedule.streaming == (4 * x.size > 1 << 16 and not (is_columns and 2 * shape[1] % 64))
                np.testing.assert_array_equal(result.view(np.uint16), expected.view(np.uint16))
        if is_columns:
            x, expected = x.T.copy(), expected.T.copy()
        alone = np.array([fastsoftmax.softmax(row) for row in x[:20]])
        np.testing.assert_array_equal(alone.view(np.uint16), expected[:20].view(np.uint16))
        columns = fastsoftmax.softmax(x.T.copy(), 0)
        np.testing.assert_array_equal(columns.T.copy().view(np.uint16), expected.view(np.uint16))
        collected = fastsoftmax.softmax(np.repeat(x, 2, 1)[:, ::2], 1)
        np.testing.assert_array_equal(collected.copy().view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("n_cols", [1, 2, 3, 4, 7, 16, 17, 29, 32])
@pytest.mark.parametrize("kind", ["normal", "wide", "anything", "lowest first", "straddling an offset"])
def test_a_tile_gives_each_row_the_bits_it_has_alone(backend, wide_tiles, function, dtype, n_cols, kind):
    if not backend.has_kernels:
        pytest.skip(f"backend {backend.name!r} has no tiles")
    compute = getattr(fastsoftmax, function)
    x = np.array([inputs.values(kind, (n_cols,), dtype, seed) for seed in range(150)])
    with fastsoftmax.record_plans() as plans:
        together = compute(x, axis=1)
        alone = np.array([compute(row) for row in x])
    assert [plan.schedule.traversal for plan in plans] == ["tiles"] + ["rows"] * len(x)
    np.testing.assert_array_equal(together, alone)
    if function != "logsumexp":
        compute(x, axis=1, out=x)
        np.testing.assert_array_equal(x, alone)


@pytest.mark.parametrize("backend", TIERS, indirect=True)
@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "wide",
        "ascending",
        "offset",
        "straddling an offset",
        "far from the first",
        "masked by -inf",
        "one nan",
    ],
)
@pytest.mark.parametrize(
    ("last_level", "waiting", "waiting_in_place"), [(1 << 30, "output", "scratch"), (1 << 16, "recompute", "recompute")]
)
def test_a_row_shared_by_threads_has_the_bits_of_one(
    backend, monkeypatch, function, dtype, last_level, waiting, waiting_in_place, kind
):
    for shape in ((1, 100_001), (3, 66_000)):
        x = inputs.values(kind, shape, dtype)
        out = np.empty(shape[0] if function == "logsumexp" else shape, dtype)
        results = []
        for n_threads in (1, 2, 3):
            monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", str(n_threads))
            with caches_of(1 << 14, last_level):
                result, schedule = run(function, x, 1, out)
                results.append(result)
                assert schedule.traversal == ("rows" if n_threads == 1 else "split")
                assert schedule.exponentials == (waiting if function == "softmax" else "none")
                if function != "logsumexp":
                    in_place = x.copy()
                    result, schedule = run(function, in_place, 1, in_place)
                    assert schedule.exponentials == (waiting_in_place if function == "softmax" else "none")
                    np.testing.assert_array_equal(result, results[0])
        np.testing.assert_array_equal(results[1], results[0])
        np.testing.assert_array_equal(results[2], results[0])
