"""What is particular to the Numba backend: its traversals, its compiled forms and its import."""

import itertools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax._schedule import Caches, cache_sizes

from .reference import error_of

pytest.importorskip("numba")
import numba

from fastsoftmax.backends import numba_cpu
from fastsoftmax.backends.numba_cpu import registers, rows, tiles


def call(function, x, axis, out=None):
    """Return a result and the schedule that made it."""
    with fastsoftmax.record_plans() as plans:
        result = getattr(fastsoftmax, function)(x, axis, backend="numba", out=out)
    assert plans[0].backend == "numba"
    return result, plans[0].schedule


def logits(shape, dtype, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 5).astype(dtype)


STORED = cache_sizes().last_level // numba_cpu.SCRATCH_SHARE // 4  # elements of float32 that a scratch holds
CHUNK = rows.CHUNK_BYTES // 8  # elements of float64, half a chunk of float32


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((65, 16), 1),
        ((130, 37), 1),
        ((17, 3), 1),
        ((21, 100), 1),
        ((5, 3000), 1),
        ((3, 20, 256), 1),
        ((9000, 80), 0),
        ((40, 130), 0),
    ],
)
def test_streamed_results(dtype, shape, axis, monkeypatch):
    """Results past the caches have the same bits, and nothing beside them is written, wherever the output begins."""
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")
    x = logits(shape, dtype)
    expected = {function: call(function, x, axis)[0] for function in ("softmax", "log_softmax")}
    monkeypatch.setattr(numba_cpu, "cache_sizes", lambda: Caches(64, 64))
    monkeypatch.setattr(numba_cpu, "SCRATCH_SHARE", 64 / rows.CHUNK_BYTES)  # no cache is too small for a chunk
    numba_cpu._make_plan.cache_clear()  # plans are remembered, as caches never change
    try:
        for function, first in itertools.product(expected, (0, 1, 3, 16)):
            room = np.full(x.size + 32, 7, dtype)
            result, schedule = call(function, x, axis, out=room[first : first + x.size].reshape(shape))
            assert schedule.streaming
            np.testing.assert_array_equal(result, expected[function])
            assert (room[:first] == 7).all()
            assert (room[first + x.size :] == 7).all()
    finally:
        numba_cpu._make_plan.cache_clear()


@pytest.mark.parametrize(
    ("shape", "axis", "step", "traversal", "exponentials", "in_place"),
    [
        ((5, 300), 1, 1, "rows", "output", "scratch"),
        ((2, 2 * CHUNK + 1), 1, 1, "rows", "output", "scratch"),
        ((1, STORED + 1), 1, 1, "rows", "output", "recompute"),
        ((50, 30), 1, 1, "tiles", "scratch", "scratch"),
        ((70, 300), 0, 1, "strips", "scratch", "scratch"),
        ((3, 70, 40), 1, 1, "strips", "scratch", "scratch"),
        ((2 * CHUNK + 1, 40), 0, 1, "strips", "recompute", "recompute"),
        ((5, 300), 1, 2, "gather", "scratch", "scratch"),
        ((5, 40, 30), (0, 2), 1, "gather", "scratch", "scratch"),
        ((2, 2 * CHUNK + 1), 1, 2, "gather", "recompute", "recompute"),
    ],
)
def test_every_traversal(function, dtype, shape, axis, step, traversal, exponentials, in_place, monkeypatch):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")
    x = logits((*shape[:-1], shape[-1] * step), dtype)[..., ::step]
    result, schedule = call(function, x, axis)
    assert schedule.traversal == traversal
    assert schedule.exponentials == (exponentials if function == "softmax" else "none")
    assert error_of(function, result, x, axis) <= 2
    if function != "logsumexp":
        again, schedule = call(function, x, axis, out=x)
        assert schedule.exponentials == (in_place if function == "softmax" else "none")
        assert again is x
        np.testing.assert_array_equal(again, result)


@pytest.mark.parametrize("width", [16, 17, 127, 128, 129, 255, 256, 257, 600])
def test_strips_of_any_width(function, dtype, width):
    x = logits((2, 21, width), dtype)
    result, schedule = call(function, x, 1)
    assert schedule.traversal == "strips"
    assert error_of(function, result, x, 1) <= 2


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (np.float16, None),
        (ml_dtypes.bfloat16, None),
        (np.int16, None),
        (np.float64, np.float32),
        (np.float32, np.float64),
        (np.uint8, np.float64),
    ],
)
@pytest.mark.parametrize(
    ("shape", "axis", "step", "traversal"),
    [
        ((50, 30), 1, 1, "tiles"),
        ((50, 30), 1, 2, "gather"),
        ((50, 48), 1, 1, "tiles"),
        ((70, 300), 0, 1, "strips"),
        ((3, 70, 41), 1, 1, "strips"),
        ((4 * CHUNK + 1, 40), 0, 1, "strips"),
    ],
)
def test_converted_rows_have_the_bits_of_others(function, shape, axis, step, traversal, given, asked):
    x = (np.random.default_rng(0).normal(size=(*shape[:-1], shape[-1] * step)) * 5 + 20).astype(given)[..., ::step]
    if traversal == "tiles":  # rows that are apart
        memory = np.zeros((shape[0], shape[1] + 3), given)
        memory[:, : shape[1]] = x
        x = memory[:, : shape[1]]
    working = asked or (np.float32 if x.dtype.itemsize == 2 and x.dtype.kind != "i" else np.float64)
    with fastsoftmax.record_plans() as plans:
        result = getattr(fastsoftmax, function)(x, axis, dtype=asked, backend="numba")
    assert plans[0].schedule.traversal == traversal
    expected, _ = call(function, x.astype(working), axis)
    np.testing.assert_array_equal(result, expected.astype(result.dtype))
    if function != "logsumexp" and asked is None and working == np.float32:
        assert getattr(fastsoftmax, function)(x, axis, backend="numba", out=x) is x
        np.testing.assert_array_equal(x, result)


@pytest.mark.parametrize("n_cols", [1, 2, 4095, 4096, 4097, 8191, 8192, 8193, 24_577])
def test_chunk_boundaries(function, dtype, n_cols):
    x = logits((3, n_cols), dtype)
    assert error_of(function, call(function, x, 1)[0], x, 1) <= 2


@pytest.mark.parametrize("n_cols", [5000, 9000])
def test_a_sum_whose_low_part_is_large(dtype, n_cols, rng):
    """Thousands of terms below the last digit of the high part; leaving out the square of theirs costs 235 ULP."""
    x = rng.uniform(-16.5, -15.5, (30, n_cols))
    x[:, 0], x[:, 1] = 0, -3.5
    x = (x + rng.uniform(-1, 1, (30, 1))).astype(dtype)
    assert error_of("log_softmax", call("log_softmax", x, 1)[0], x, 1) <= 2


def test_a_long_row_of_nothing_but_infinities(function, dtype):
    for value, expected in ((-np.inf, -np.inf), (np.inf, np.inf)):
        for shape, axis in (((2, 9000), 1), ((9000, 40), 0)):
            result, _ = call(function, np.full(shape, value, dtype), axis)
            if function == "logsumexp":
                np.testing.assert_array_equal(result, expected)
            else:
                assert np.isnan(result).all()


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
    for others in (1.0, -np.inf, np.inf):
        row = np.full(40, others, dtype)
        row[7] = np.copysign(dtype(np.nan), -1 if sign else 1)
        for shape in ((1, 40), (32, 40)):
            assert np.isnan(call(function, np.broadcast_to(row, shape).copy(), 1)[0]).all()
        assert np.isnan(call(function, np.tile(row[:, np.newaxis], 32), 0)[0]).all()


def test_a_certain_element_has_probability_1(dtype):
    for x in (0.3, 5.5, -700.25, 1e6):
        row = np.array([x, -np.inf, -np.inf], dtype)
        np.testing.assert_array_equal(call("softmax", row, 0)[0], [1, 0, 0])
        np.testing.assert_array_equal(call("log_softmax", row, 0)[0], [0, -np.inf, -np.inf])
        np.testing.assert_array_equal(call("softmax", np.tile(row[:, np.newaxis], 32), 0)[0][:, 5], [1, 0, 0])


@pytest.mark.parametrize("x", [np.zeros(3), np.zeros((4, 6))[1::2, ::-1], np.float32(1)[...], np.ma.zeros(5).data])
def test_addresses_of_arrays(x):
    assert numba_cpu._address(x) == x.ctypes.data
    x.flags.writeable = False
    assert numba_cpu._address(x.view(np.memmap)) == x.ctypes.data


def test_each_kernel_is_compiled_once_for_a_dtype():
    for dtype in (np.float32, np.float64):
        read_only = logits((20, 30, 40), dtype)
        read_only.flags.writeable = False
        for x in (read_only, read_only.T, read_only[:, ::-2], read_only[0, 0].copy()):
            for axis in range(x.ndim):
                call("softmax", x, axis)
                call("logsumexp", x, axis)
    assert len(rows.run_rows.signatures) == 2
    assert len(tiles.run_strips.signatures) == 2


TWO_OF_ONE_NAME = """
from fastsoftmax.backends.numba_cpu.jit import inline, jit, jit_entry


def total_of(operation):
    @jit
    def total(x):
        result = 0.0
        for i in range(len(x)):
            result += operation(x[i])
            if result < 0:
                print(result, x[i])  # so that it is not inlined
        return result

    return total


@inline
def double(x):
    return 2 * x


@inline
def triple(x):
    return 3 * x


total_of_doubles, total_of_triples = map(total_of, (double, triple))


@jit_entry
def doubles(x):
    return total_of_doubles(x)


@jit_entry
def triples(x):
    return total_of_triples(x)
"""


def test_kernels_of_one_name_are_kept_apart(tmp_path):
    """One that another process has compiled and kept does not meet another that this one compiles."""
    (tmp_path / "two_of_one_name.py").write_text(TWO_OF_ONE_NAME)
    code = "import sys, numpy, two_of_one_name as m; print(*(getattr(m, f)(numpy.ones(3)) for f in sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path)}
    results = []
    for functions in (["doubles"], ["triples", "doubles"], ["doubles", "triples"]):
        command = [sys.executable, "-c", code, *functions]
        results.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert results == ["6.0\n", "9.0 6.0\n", "6.0 9.0\n"]


def test_no_two_kernels_have_one_name():
    kernels = {
        kernel.py_func
        for module in vars(numba_cpu).values()
        if getattr(module, "__name__", "").startswith(numba_cpu.__name__)
        for kernel in vars(module).values()
        if isinstance(kernel, numba.core.dispatcher.Dispatcher)
    }
    assert len(kernels) > 100
    assert len({(kernel.__module__, kernel.__qualname__) for kernel in kernels}) == len(kernels)


# Registers


def run_on(x, kernel, *numbers):
    """Run a kernel on pointers to an array and to another of its size; return that and what the kernel returns."""

    @numba.njit
    def entry(like, x_address, y_address, numbers):
        return kernel(registers.pointer_to(x_address, like), registers.pointer_to(y_address, like), *numbers)

    y = np.full(x.size, -1, x.dtype)
    result = entry(x[:0], x.ctypes.data, y.ctypes.data, numbers)
    return y, result


@pytest.fixture(params=[registers.register_of, registers.group_of], ids=["register", "group"])
def of(request):
    return request.param


def test_arithmetic_is_that_of_every_lane(dtype, of, rng):
    @numba.njit
    def kernel(x, y):
        a = registers.load(x, 0, of(x, 0.0))
        lanes = registers.lanes_in(a)
        b = registers.load(x, lanes, a)
        registers.store(y, 0, (a + b) * 3.0 - 1 / b)
        registers.store(y, lanes, registers.where((a < b) & (b > 0.5), registers.floor(a * 8.0), 0.25))
        return lanes

    x = rng.normal(size=400).astype(dtype)
    y, n = run_on(x, kernel)
    a, b = x[:n], x[n : 2 * n]
    np.testing.assert_array_equal(y[:n], (a + b) * dtype(3) - 1 / b)
    np.testing.assert_array_equal(y[n : 2 * n], np.where((a < b) & (b > 0.5), np.floor(a * 8), dtype(0.25)))


@pytest.mark.parametrize("count", [0, 1, 3, 10**12])
def test_only_the_first_lanes_are_loaded_and_stored(dtype, of, count):
    @numba.njit
    def kernel(x, y, count):
        v = registers.load_first(x, 0, count, of(x, 7.0))
        registers.store(y, 0, v)
        registers.store_first(y, registers.lanes_in(v), v + 1.0, count)
        return registers.lanes_in(v)

    x = np.arange(400, dtype=dtype)
    y, n = run_on(x, kernel, count)
    np.testing.assert_array_equal(y[:n], np.where(np.arange(n) < count, x[:n], 7))
    np.testing.assert_array_equal(y[n : 2 * n], np.where(np.arange(n) < count, x[:n] + 1, -1))


def test_rows_are_turned(dtype):
    lanes = registers.REGISTER_BYTES // np.dtype(dtype).itemsize

    @numba.njit
    def kernel(x, y, n_rows, n_columns, y_rows, y_columns):
        registers.turn(x, 0, 20, n_rows, n_columns, y, 0, 17, y_rows, y_columns)

    x = np.arange(1, 401, dtype=dtype)
    for n_rows, n_columns, y_rows, y_columns in ((lanes, lanes, lanes, lanes), (1, lanes, lanes, 1), (2, 1, lanes, 2)):
        y, _ = run_on(x, kernel, n_rows, n_columns, y_rows, y_columns)
        read = np.zeros((lanes, lanes), dtype)
        read[:n_rows, :n_columns] = x.reshape(20, 20)[:n_rows, :n_columns]
        expected = np.full(400, -1, dtype)
        np.lib.stride_tricks.as_strided(expected, (20, lanes), (17 * x.itemsize, x.itemsize))[:y_rows, :y_columns] = (
            read.T[:y_rows, :y_columns]
        )
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_are_turned(dtype):
    lanes, length = (size // np.dtype(dtype).itemsize for size in (registers.REGISTER_BYTES, registers.BLOCK_BYTES))

    @numba.njit
    def read(x, y):
        registers.read_blocks(x, 0, 5, length, y, 0, 17)

    @numba.njit
    def read_narrow(x, y, n_columns):
        registers.read_narrow_blocks(x, 0, 5, n_columns, y, 0, 17)

    @numba.njit
    def write(x, y):
        registers.write_blocks(x, 0, 17, y, 0, 5)

    x, expected = np.arange(1, 401, dtype=dtype), np.full(400, -1, dtype)
    rows = x.reshape(80, 5)[:lanes, :length]
    columns = np.lib.stride_tricks.as_strided(expected, (length, lanes), (17 * x.itemsize, x.itemsize))
    columns[:] = rows.T
    y, _ = run_on(x, read)
    np.testing.assert_array_equal(y, expected)
    columns[1:] = 0
    y, _ = run_on(x, read_narrow, 1)
    np.testing.assert_array_equal(y, expected)
    y, _ = run_on(x, write)
    expected = np.full(400, -1, dtype)
    expected.reshape(80, 5)[:lanes, :length] = np.lib.stride_tricks.as_strided(x, (length, lanes), columns.strides).T
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("n_cols", range(1, 7))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_short_rows_in_place_and_with_others_between(function, dtype, n_cols, rng):
    """Blocks end behind such rows: what is there is not yet read, or not to be written."""
    memory = rng.normal(size=(1000, 9)).astype(dtype)
    for x in (memory[:, :n_cols].copy(), memory[:, 1 : 1 + n_cols].copy(), memory[:, 1 : 1 + n_cols]):
        between = memory.copy()
        expected = getattr(fastsoftmax, function)(x, axis=1, backend="numba")
        if x.base is memory:
            between[:, 1 : 1 + n_cols] = expected
        getattr(fastsoftmax, function)(x, axis=1, out=x, backend="numba")
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(memory, between)
        in_wide = np.full((1000, 9), -1, dtype)
        getattr(fastsoftmax, function)(memory[:, :n_cols], axis=1, out=in_wide[:, :n_cols], backend="numba")
        assert (in_wide[:, n_cols:] == -1).all()


# What `lscpu` says of processors with AVX2 and without, in LLVM's words. Each has one dtype here, as that compiles for
# half a minute; `make accuracy` has both.
@pytest.mark.parametrize(("features", "dtype"), [("+avx2,+fma,+avx,+sse4.2", "float32"), ("+sse4.2", "float64")])
def test_narrower_registers(python, features, dtype):
    code = """
import numpy as np
import fastsoftmax
from fastsoftmax.backends.numba_cpu import registers
from tests.reference import error_of
print(registers.REGISTER_BYTES)
rng = np.random.default_rng(0)
for shape, axis in (((50, 9), 1), ((9, 50), 0), ((3, 333), 1), ((2, 9001), 1)):
    x = (rng.normal(size=shape) * 20).astype(DTYPE)
    x[0, :7] = x[0, 0]
    for function in ("softmax", "log_softmax", "logsumexp"):
        result = getattr(fastsoftmax, function)(x, axis, backend="numba")
        assert error_of(function, result, x, axis) <= 2, (shape, function)
"""
    width = python(code.replace("DTYPE", repr(dtype)), NUMBA_CPU_NAME="nehalem", NUMBA_CPU_FEATURES=features)
    assert int(width) == (32 if "avx2" in features else 16)


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
