"""What is particular to the Numba backend: its traversals, its compiled forms and its import."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax._schedule import cache_sizes

from .reference import error_of

pytest.importorskip("numba")
from fastsoftmax.backends import numba_cpu


def call(function, x, axis, out=None):
    """Return a result and the schedule that made it."""
    with fastsoftmax.record_plans() as plans:
        result = getattr(fastsoftmax, function)(x, axis, backend="numba", out=out)
    assert plans[0].backend == "numba"
    return result, plans[0].schedule


def logits(shape, dtype, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 5).astype(dtype)


STORED = cache_sizes().last_level // numba_cpu.STORED_SHARE // 4  # elements of float32 that a scratch holds
LONG_ROW = STORED + numba_cpu.CHUNK + 1


@pytest.mark.parametrize(
    ("shape", "axis", "step", "traversal", "exponentials"),
    [
        ((5, 300), 1, 1, "rows", "scratch"),
        ((2, LONG_ROW), 1, 1, "rows", "recompute"),
        ((70, 300), 0, 1, "strips", "scratch"),
        ((3, 70, 40), 1, 1, "strips", "scratch"),
        ((3000, 300), 0, 1, "strips", "scratch"),
        ((STORED // numba_cpu.MIN_STRIP + 1, numba_cpu.MIN_STRIP), 0, 1, "strips", "recompute"),
        ((500, numba_cpu.MIN_STRIP - 1), 0, 1, "gather", "scratch"),
        ((5, 300), 1, 2, "gather", "scratch"),
        ((5, 40, 30), (0, 2), 1, "gather", "scratch"),
        ((2, LONG_ROW), 1, 2, "gather", "recompute"),
    ],
)
def test_every_traversal(function, dtype, shape, axis, step, traversal, exponentials):
    x = logits((*shape[:-1], shape[-1] * step), dtype)[..., ::step]
    result, schedule = call(function, x, axis)
    assert schedule.traversal == traversal
    assert schedule.exponentials == (exponentials if function == "softmax" else "none")
    assert error_of(function, result, x, axis) <= 2
    if function != "logsumexp":
        in_place, _ = call(function, x, axis, out=x)
        assert in_place is x
        np.testing.assert_array_equal(in_place, result)


@pytest.mark.parametrize("width", [16, 17, 127, 128, 129, 255, 256, 257, 600])
def test_strips_of_any_width(function, dtype, width):
    x = logits((2, 21, width), dtype)
    result, schedule = call(function, x, 1)
    assert schedule.traversal == "strips"
    assert error_of(function, result, x, 1) <= 2


@pytest.mark.parametrize("n_cols", [1, 2, 4095, 4096, 4097, 12_289])
def test_chunk_boundaries(function, dtype, n_cols):
    x = logits((3, n_cols), dtype)
    assert error_of(function, call(function, x, 1)[0], x, 1) <= 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_special_element_in_any_chunk_changes_its_row_only(function, dtype, value, axis):
    clean = logits((20, 9000), dtype)
    clean = clean if axis == 1 else clean.T.copy()
    expected, _ = call(function, clean, axis)
    for position in (0, 4095, 4096, 8999):
        x = clean.copy()
        x[(3, position) if axis == 1 else (position, 3)] = value
        result, _ = call(function, x, axis)
        assert error_of(function, result, x, axis) <= 2
        others = np.arange(20) != 3
        if function != "logsumexp" and axis == 0:
            result, kept = result.T, expected.T
        else:
            kept = expected
        np.testing.assert_array_equal(result[others], kept[others])


@pytest.mark.parametrize("sign", [0, 1])
def test_nans_of_both_signs(function, dtype, sign):
    """The integer image orders a negative NaN below -inf, where the maximum does not see it."""
    for others in (1.0, -np.inf, np.inf):
        row = np.full(40, others, dtype)
        row[7] = np.copysign(dtype(np.nan), -1 if sign else 1)
        assert np.isnan(call(function, row, 0)[0]).all()
        assert np.isnan(call(function, np.tile(row[:, np.newaxis], 32), 0)[0]).all()


def test_a_certain_element_has_probability_1(dtype):
    for x in (0.3, 5.5, -700.25, 1e6):
        row = np.array([x, -np.inf, -np.inf], dtype)
        np.testing.assert_array_equal(call("softmax", row, 0)[0], [1, 0, 0])
        np.testing.assert_array_equal(call("log_softmax", row, 0)[0], [0, -np.inf, -np.inf])
        np.testing.assert_array_equal(call("softmax", np.tile(row[:, np.newaxis], 32), 0)[0][:, 5], [1, 0, 0])


def test_each_kernel_is_compiled_once_for_a_dtype():
    for dtype in (np.float32, np.float64):
        read_only = logits((20, 30, 40), dtype)
        read_only.flags.writeable = False
        for x in (read_only, read_only.T, read_only[:, ::-2], read_only[0, 0].copy()):
            for axis in range(x.ndim):
                call("softmax", x, axis)
                call("logsumexp", x, axis)
    assert len(numba_cpu.run_rows.signatures) == 2
    assert len(numba_cpu.run_strips.signatures) == 2


def vector_operations(code):
    """Return the operations on vectors of the loops that LLVM has vectorised: of the blocks that jump to themselves."""
    found = set()
    for label, block in re.findall(r"^([\w.]+):(.*?)(?=^\S)", code, re.MULTILINE | re.DOTALL):
        if re.search(rf"\bbr .*label %{re.escape(label)}(,|$)", block, re.MULTILINE):
            found.update(re.findall(r"= (\w+) (?:\w+ )*<\d+ x (?:float|double|i32|i64)>", block))
    return found


def test_loops_are_vectorised(dtype):
    """The loops over elements work on vectors; one that falls back to scalars is 10 times slower and as right."""
    x = logits((300, 300), dtype)
    chunk, zero = x.ravel()[:1000].copy(), dtype(0)
    numba_cpu._maximum(chunk, 0, 1000)
    numba_cpu._store_terms(chunk, 0, chunk.copy(), 0, 1000, chunk.max())
    numba_cpu._sum_others(chunk, 0, 1000, chunk.max(), 1.0)
    numba_cpu._scale(chunk, chunk.copy(), 0, 1000, zero, zero, zero)
    numba_cpu._subtract(chunk, 0, chunk.copy(), 0, 1000, zero, zero)
    lanes = np.zeros(numba_cpu._N_FIELDS * numba_cpu.MAX_STRIP, dtype)
    numba_cpu._strip_maxima(chunk, 0, 100, 10, 100, lanes)
    numba_cpu._strip_store_terms(chunk, 0, 100, chunk.copy(), 10, 100, lanes)
    numba_cpu._strip_sum_others(chunk, 0, 100, 10, 100, lanes)
    numba_cpu._strip_scale(chunk, chunk.copy(), 0, 100, 10, 100, lanes)
    numba_cpu._strip_subtract(chunk, 0, 100, chunk.copy(), 0, 100, 10, 100, lanes)
    for kernel, operations in (
        (numba_cpu._maximum, {"icmp"}),  # of the floats' integer images
        (numba_cpu._store_terms, {"fmul", "fadd", "fsub", "shl"}),
        (numba_cpu._sum_others, {"fmul", "fadd", "fsub", "shl"}),
        (numba_cpu._scale, {"fmul", "fadd"}),
        (numba_cpu._subtract, {"fsub"}),
        (numba_cpu._strip_maxima, {"fcmp"}),
        (numba_cpu._strip_store_terms, {"fmul", "fadd", "fsub", "shl"}),
        (numba_cpu._strip_sum_others, {"fmul", "fadd", "fsub", "shl"}),
        (numba_cpu._strip_scale, {"fmul", "fadd"}),
        (numba_cpu._strip_subtract, {"fsub"}),
    ):
        for code in kernel.inspect_llvm().values():
            assert operations <= vector_operations(code), kernel.__name__


def test_without_numba_the_backend_says_what_it_needs():
    code = """
import sys
sys.modules["numba"] = None
import fastsoftmax
try:
    fastsoftmax.softmax([1.0], backend="numba")
except fastsoftmax.BackendUnavailableError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "FASTSOFTMAX_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "the numba backend needs the numba package" in done.stdout
