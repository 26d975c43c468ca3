"""The CUDA backend, as far as it can be tried without a device: state, plans, machine code, and the simulator.

``make kernels`` runs the tests of machine code on every kernel.
"""

import ctypes
import json
import os
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastsoftmax
from tests.reference import exact, max_ulp_error, summand_scale

pytest.importorskip("numba_cuda", reason="the cuda backend needs numba-cuda", exc_type=ImportError)

from fastsoftmax.cuda import _arrays, _launch, _state, _weighted
from fastsoftmax.cuda._functions import n_inputs
from fastsoftmax.cuda._plan import IN_FLIGHT, MEETING_BYTES, choose, choose_weighted
from fastsoftmax.cuda._vectors import FORMATS
from tests import ptx

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy's scalars, where terms are infinite


# The state


@pytest.fixture(params=["half", "single", "double"])
def precision(request):
    return request.param


def real(precision):
    return np.float64 if precision == "double" else np.float32


def folded(functions, elements):
    """Return the state of elements, taken in as lanes do: a few by each, merged in a tree."""
    if len(elements) > 3:
        half = len(elements) // 2
        return functions.merge(*folded(functions, elements[:half]), *folded(functions, elements[half:]))
    zero = elements.dtype.type(0)
    state = elements.dtype.type(-np.inf), zero, zero
    for x in elements:
        state = functions.fold(*state, x)
    return state


def assert_same_state(functions, state, other, tolerance):
    """Compare what two states stand for: the maximum, and the sum in units of the maximum's own term."""
    if np.isnan(state[0]):
        assert np.isnan(other[0])
        return
    assert state[0] == other[0]
    if np.isfinite(state[0]):
        top, _ = functions.term(state[0], state[0])
        difference = (state[1] - other[1]) + (state[2] - other[2])
        assert abs(difference / top) <= tolerance * max(1, state[1] / top)


PARTS = {
    "moderate": ([0.5, -3.0, 2.0], [1.0, 2.0], [-7.0]),
    "ties": ([2.0, 2.0], [2.0], [1.0, 2.0]),
    "around where there are offsets": ([510.0, 513.0], [512.0, 500.0], [530.0]),
    "large": ([-3e8, -3e8], [-2.9e8], [-3.1e8]),
    "wide": ([80.0, -80.0], [0.0], [79.0]),
    "empty": ([], [1.0], []),
    "-inf": ([-np.inf], [1.0, -np.inf], [0.0]),
    "nothing but -inf": ([-np.inf], [-np.inf], []),
    "+inf": ([np.inf, 1.0], [2.0], [np.inf]),
    "nan": ([1.0], [np.nan], [2.0, np.inf]),
}


@pytest.mark.parametrize("parts", PARTS)
def test_states_are_a_commutative_monoid(precision, parts):
    functions = _state.plain(precision)
    a, b, c = (folded(functions, np.array(part, real(precision))) for part in PARTS[parts])
    tolerance = (8 if precision == "half" else 0.5) * np.finfo(real(precision)).eps
    identity = folded(functions, np.array([], real(precision)))
    assert_same_state(functions, functions.merge(*a, *b), functions.merge(*b, *a), tolerance)
    left, right = functions.merge(*functions.merge(*a, *b), *c), functions.merge(*a, *functions.merge(*b, *c))
    assert_same_state(functions, left, right, tolerance)
    assert_same_state(functions, functions.merge(*a, *identity), a, 0)
    assert_same_state(functions, functions.merge(*identity, *a), a, 0)


@pytest.mark.parametrize("span", [1, 20, 80])
@pytest.mark.parametrize("offset", [0, 300, 1e4, -3e8])
def test_probabilities(precision, span, offset):
    if precision == "half" and span == 80:
        pytest.skip("16-bit results have no digits for what differs")
    functions = _state.plain(precision)
    rng = np.random.default_rng(0)
    x = (rng.uniform(-span, span, 60) + offset).astype(real(precision))
    state = folded(functions, x)
    computed = np.array([functions.probability(one, *state) for one in x])
    bound = 2 if precision != "half" else 60  # of 2**13 to a unit of float16
    assert max_ulp_error(computed, exact("softmax", x)) <= bound


# Of 30 elements each; the last argument is what is far from 0 in a precision: subnormal results, and where offsets are.
ROWS = {
    "normal": lambda rng, far: rng.normal(size=30) * rng.uniform(0.1, 10),
    "wide": lambda rng, far: rng.uniform(-80, 80, 30),
    "nearly equal": lambda rng, far: np.append(rng.uniform(0, 3), np.zeros(29)) + rng.uniform(-5, 5),
    "subnormal results": lambda rng, far: np.append(0, rng.uniform(-1.2, -0.95, 29) * far) + rng.uniform(-3, 3),
    "far from 0": lambda rng, far: rng.normal(size=30) * 5 + rng.choice([-1, 1]) * far * 10 ** rng.uniform(1, 6),
    "across offsets": lambda rng, far: np.linspace(0, rng.uniform(1, far), 30) + far * rng.uniform(5, 20),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
def test_errors(dtype, kind):
    """2 ULP at most, and 1 unit of subnormal results."""
    functions, info = _state.plain("single" if dtype == np.float32 else "double"), np.finfo(dtype)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = ROWS[kind](rng, -float(np.log(info.smallest_normal))).astype(dtype)
        state = folded(functions, x)
        p, expected = np.array([functions.probability(one, *state) for one in x]), exact("softmax", x)
        is_subnormal = expected < info.smallest_normal
        assert is_subnormal.any() or kind != "subnormal results"
        assert max_ulp_error(p[~is_subnormal], expected[~is_subnormal]) <= 2
        assert max_ulp_error(p[is_subnormal], expected[is_subnormal]) <= 1
        assert p.max() <= 1
        (offset, _), (high, low) = functions.reference(state[0]), functions.log_normalizer(*state)
        assert max_ulp_error(((x - offset) - high) - low, exact("log_softmax", x)) <= 2
        log_sum = np.array([functions.logsumexp(*state)])
        assert max_ulp_error(log_sum, exact("logsumexp", x), summand_scale(x, 0)) <= 2


def test_many_sums_round_off_no_more_than_few(precision):
    """Of 2**14 equal elements beside a larger one: without a residue it is 127 ULP in float32, 37 in float64."""
    functions, zero = _state.plain(precision), real(precision)(0)
    x = np.append(real(precision)(1.3), np.full(2**14, 0.1, real(precision)))
    state = real(precision)(-np.inf), zero, zero
    for one in x:
        state = functions.fold(*state, one)
    log_sum = np.array([functions.logsumexp(*state)])
    assert max_ulp_error(log_sum, exact("logsumexp", x)) <= 2


def test_what_is_not_the_maximum_keeps_its_digits(precision):
    functions = _state.plain(precision)
    state = folded(functions, np.array([0.0, -40.0], real(precision)))
    assert functions.logsumexp(*state) == pytest.approx(4.248354255291589e-18, rel=1e-5)


# Plans


@pytest.mark.parametrize(
    ("dtype", "shape", "axis", "traversal", "vector", "threads", "rows", "held", "has_rest", "n_chunks"),
    [
        ("float32", (1_000_000, 10), 1, "rows", 4, 1, 128, 4, False, 1),
        ("float32", (100_000, 128), 1, "rows", 4, 8, 16, 4, False, 1),
        ("bfloat16", (100_000, 128), 1, "rows", 8, 4, 32, 4, False, 1),
        ("float32", (8192, 1024), 1, "rows", 4, 64, 1, 4, False, 1),
        ("float32", (8192, 1025), 1, "rows", 4, 96, 1, 4, False, 1),
        ("bfloat16", (8192, 4096), 1, "rows", 8, 128, 1, 4, False, 1),
        ("float32", (8192, 8192), 1, "rows", 4, 512, 1, 4, False, 1),
        ("float32", (8192, 16384), 1, "rows", 4, 512, 1, 8, False, 1),
        ("float32", (8192, 16385), 1, "rows", 4, 512, 1, 6, False, 1),
        ("bfloat16", (4096, 65536), 1, "rows", 8, 512, 1, 6, False, 1),
        ("float32", (4096, 65536), 1, "rows", 4, 512, 1, 6, False, 1),
        ("float32", (4096, 131072), 1, "rows", 4, 512, 1, 6, True, 1),
        ("float32", (4096, 262144), 1, "split", 4, 256, 1, 0, False, 64),
        ("float32", (1, 100_000_000), 1, "split", 4, 256, 1, 0, False, 1018),
        ("float32", (2**17, 2**17), 1, "rows", 4, 512, 1, 6, True, 1),
        ("float32", (8192, 8192), 0, "strips", 4, 256, 8, 0, False, 1),
        ("float32", (64, 100, 1000), 1, "strips", 4, 16, 128, 0, False, 1),
        ("float32", (16, 21, 128, 128), 1, "strips", 4, 8, 128, 0, False, 1),
        ("bfloat16", (16, 21, 5), 1, "strips", 1, 8, 8, 0, False, 1),
        ("float32", (1_000_000, 64), 0, "strips", 4, 32, 64, 0, False, 261),
        ("float32", (4096, 64), 0, "strips", 4, 32, 64, 0, False, 32),
        ("float32", (500, 64), 0, "strips", 4, 32, 64, 0, False, 1),
        ("float32", (1_000_000, 4, 16), 1, "rows", 1, 1, 128, 4, False, 1),
    ],
)  # fmt: skip
def test_plans(dtype, shape, axis, traversal, vector, threads, rows, held, has_rest, n_chunks):
    plan = choose(*ptx.laid_out(shape, axis, ITEMSIZES[dtype]), ptx.H200)
    assert (plan.traversal, plan.vector, plan.threads_per_row, plan.rows_per_block) == (
        traversal,
        vector,
        threads,
        rows,
    )
    assert (plan.held, plan.has_rest, plan.n_chunks) == (held, has_rest, n_chunks)
    assert 32 <= plan.block[0] * plan.block[1] <= 512


A100 = ptx.Device(n_multiprocessors=108, l2_bytes=40 * 2**20, shared_bytes=163 * 1024)


@pytest.mark.parametrize(
    ("card", "dtype", "n_cols", "stored", "has_rest"),
    [
        (ptx.H200, "float32", 16384, 0, False),
        (ptx.H200, "float32", 16388, 4, False),
        (ptx.H200, "float32", 65536, 28, False),
        (ptx.H200, "float32", 69632, 28, False),
        (ptx.H200, "float32", 69636, 28, True),
        (ptx.H200, "bfloat16", 131072, 28, False),
        (ptx.H200, "float64", 31744, 28, False),
        (A100, "float32", 53248, 20, False),
        (A100, "float32", 53252, 20, True),
    ],
)
def test_what_of_a_row_is_kept_in_shared_memory(card, dtype, n_cols, stored, has_rest):
    plan = choose(*ptx.laid_out((4096, n_cols), 1, ITEMSIZES[dtype]), card)
    assert (plan.traversal, plan.stored, plan.has_rest) == ("rows", stored, has_rest)
    assert plan.shared_bytes == stored * 512 * 16 <= card.shared_bytes - MEETING_BYTES
    kept = (plan.held + plan.stored) * plan.vector * plan.threads_per_row
    assert (kept < n_cols) == has_rest


@pytest.mark.parametrize(
    ("function", "shape", "axis", "traversal", "held", "stored", "has_rest"),
    [
        ("softmax_vjp", (8192, 1024), 1, "rows", 2, 0, False),
        ("softmax_vjp", (8192, 8192), 1, "rows", 4, 0, False),
        ("softmax_vjp", (8192, 32768), 1, "rows", 3, 14, False),
        ("log_softmax_vjp", (8192, 65536), 1, "rows", 3, 14, True),
        ("logsumexp_vjp", (8192, 65536), 1, "rows", 6, 28, False),
        ("softmax_vjp", (8192, 262144), 1, "split", 0, 0, False),
        ("log_softmax_vjp", (1, 10_000_000), 1, "split", 0, 0, False),
        ("logsumexp_vjp", (1, 10_000_000), 1, "split", 0, 0, False),
        ("softmax_vjp", (4096, 4096), 0, "strips", 0, 0, False),
        ("log_softmax_vjp", (64, 100, 1000), 1, "strips", 0, 0, False),
        ("logsumexp_vjp", (64, 100, 1000), 1, "strips", 0, 0, False),
    ],
)
def test_plans_of_derivatives(function, shape, axis, traversal, held, stored, has_rest):
    plan = choose(*ptx.laid_out(shape, axis, 4, function), ptx.H200, n_inputs(function))
    assert (plan.traversal, plan.vector) == (traversal, 4)
    assert (plan.held, plan.stored, plan.has_rest) == (held, stored, has_rest)
    assert plan.shared_bytes == stored * 512 * 16 * n_inputs(function)


@pytest.mark.parametrize(
    ("shape", "axis", "traversal", "lanes", "rows", "n_chunks"),
    [
        ((1_000_000, 10), 1, "rows", 16, 8, 1),
        ((8192, 1000), 1, "rows", 128, 1, 1),
        ((100, 100_000), 1, "split", 128, 1, 5),
        ((1, 100_000_000), 1, "split", 128, 1, 528),
        ((8192, 8192), 0, "strips", 4, 32, 2),
        ((1_000_000, 5), 0, "strips", 16, 8, 521),
        ((64, 100, 1000), 1, "strips", 4, 32, 1),
    ],
)
def test_plans_of_sums_with_factors(shape, axis, traversal, lanes, rows, n_chunks):
    layout, _ = ptx.laid_out(shape, axis, 4, "logsumexp")
    plan = choose_weighted(layout, ptx.H200)
    assert (plan.traversal, plan.threads_per_row, plan.rows_per_block, plan.n_chunks) == (
        traversal,
        lanes,
        rows,
        n_chunks,
    )
    first, *rest = _launch.weighted_launches(FORMATS["float32"], layout, plan, has_signs=True)
    assert first.grid * rows >= layout.n_rows * n_chunks
    assert [step.grid * rows >= layout.n_rows for step in rest] == [True] * (n_chunks > 1)
    assert n_chunks == 1 or (n_chunks - 1) * plan.chunk < layout.n_cols <= n_chunks * plan.chunk


# More elements than 32 bits count, along rows, across them, in both and in a stride.
LARGE = {
    "many rows": ((2**30, 10), 1, None),
    "long rows": ((3, 2**31 + 7), 1, None),
    "strips": ((2**20, 5000), 0, None),
    "strips of many": ((2**22, 3, 1000), 1, None),
    "few strips": ((2**31 + 7, 5), 0, None),
    "short rows beside each other": ((2**30, 2, 3), 1, None),
    "a wide stride": ((8, 1000), 1, (2**33, 1)),
    "rows elsewhere": ((4, 2**31), 1, (1, 4)),
}


@pytest.mark.parametrize("function", ptx.FUNCTIONS)
@pytest.mark.parametrize("name", LARGE)
def test_sizes_beyond_32_bits(function, name):
    """No launch is refused, nothing is rounded, and every element belongs to one place of one block."""
    shape, axis, strides = LARGE[name]
    layout, phases = ptx.laid_out(shape, axis, 4, function, strides)
    plan = choose(layout, phases, ptx.H200, n_inputs(function))
    for step in _launch.launches(function, FORMATS["float32"], layout, plan, 0):
        assert 0 < step.grid < 2**31  # the most blocks in x
        numbers = [number for number in flat(step.arguments) if not isinstance(number, str)]
        assert all(type(number) is int and abs(number) < 2**63 for number in numbers)
        types = [str(one) for one in step.signature.args if not str(one).endswith("*")]
        assert all(one == "int64" or one.startswith("UniTuple(int64") for one in types), types
        assert layout.n_cols in numbers
        if plan.traversal == "rows":
            assert layout.n_rows in numbers
            assert step.grid * plan.rows_per_block >= layout.n_rows
        elif plan.traversal == "split":
            assert plan.n_chunks * plan.chunk >= layout.n_cols
            assert step.grid in (layout.n_rows, layout.n_rows * plan.n_chunks)
        else:
            n_inner = layout.kept[-1].size
            assert step.grid * plan.rows_per_block >= layout.n_rows
            assert step.grid % (layout.n_rows // n_inner) == 0
            assert plan.n_chunks == 1 or plan.n_chunks * plan.chunk >= layout.n_cols


@pytest.mark.parametrize("name", LARGE)
def test_sums_with_factors_of_sizes_beyond_32_bits(name):
    shape, axis, strides = LARGE[name]
    layout, _ = ptx.laid_out(shape, axis, 4, "logsumexp", strides)
    plan = choose_weighted(layout, ptx.H200)
    for step in _launch.weighted_launches(FORMATS["float32"], layout, plan, has_signs=True):
        assert layout.n_rows <= step.grid * plan.rows_per_block < 2**31 * plan.rows_per_block
        numbers = [number for number in flat(step.arguments) if not isinstance(number, str)]
        assert all(type(number) is int and abs(number) < 2**63 for number in numbers)
        assert {layout.n_rows, layout.n_cols} <= set(numbers)
        assert plan.n_chunks == 1 or plan.n_chunks * plan.chunk >= layout.n_cols


def test_vectors_need_rows_on_the_same_boundaries():
    layout, _ = ptx.laid_out((8, 1000), 1, 4)
    assert choose(layout, (0, 0), ptx.H200).vector == 4
    assert choose(layout, (4, 4), ptx.H200).vector == 4
    assert choose(layout, (4, 0), ptx.H200).vector == 1
    layout, phases = ptx.laid_out((8, 1000), 1, 4, strides=(1001, 1))  # a slice of longer rows
    assert choose(layout, phases, ptx.H200).vector == 1
    layout, phases = ptx.laid_out((8, 1000), 1, 4, strides=(1000, 2))  # every second element
    assert choose(layout, phases, ptx.H200).vector == 1
    layout, phases = ptx.laid_out((8, 1000), 1, 4, "logsumexp", strides=(1001, 1))
    assert choose(layout, phases, ptx.H200).vector == 4


@pytest.mark.parametrize("n_cols", [2_000_000, 20_000_001, 2**33])
def test_chunks_cover_a_row_and_end_where_loops_do(n_cols):
    plan = choose(*ptx.laid_out((1, n_cols), 1, 2), ptx.H200)
    assert (plan.n_chunks - 1) * plan.chunk < n_cols <= plan.n_chunks * plan.chunk
    assert plan.n_chunks <= 1024
    assert plan.chunk % (plan.vector * plan.threads_per_row * IN_FLIGHT) == 0


# Machine code


@pytest.fixture(scope="module")
def compilers():
    """Processes that compile kernels for every architecture, one for each dtype, all at once."""
    options = ["--all"] if os.environ.get("FASTSOFTMAX_EVERY_KERNEL") else []
    if ptx.find_ptxas() is None:
        pytest.skip("there is no ptxas: pip install nvidia-cuda-nvcc")
    root, pipes = Path(__file__).parent.parent, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        yield {
            dtype: stack.enter_context(
                subprocess.Popen([sys.executable, "-m", "tests.ptx", dtype, *options], cwd=root, **pipes)
            )
            for dtype in FORMATS
        }


@pytest.fixture(params=FORMATS, scope="module")
def machine_code(request, compilers):
    """What became of kernels for one dtype on each architecture."""
    printed, errors = compilers[request.param].communicate(timeout=1800)
    assert compilers[request.param].returncode == 0, errors
    found = json.loads(printed)
    assert {code["architecture"] for code in found} == {80, 90, 100}
    return found


def test_no_kernel_spills(machine_code):
    for code in machine_code:
        assert (code["spilled"], code["stack"], code["ld.local"], code["st.local"]) == (0, 0, 0, 0), code
        assert code["registers"] * code["threads"] <= 65536, code


def test_blocks_have_the_shared_memory_they_use(machine_code):
    for code in machine_code:
        if code["shared_bytes"]:  # asked for at the launch
            assert code["shared"] <= MEETING_BYTES, code
            assert code["stored_alignment"] == 16, code
            assert code["shared"] + code["shared_bytes"] <= ptx.H200.shared_bytes, code
        assert code["shared"] <= 48 * 1024, code


def test_kernels_take_the_arguments_that_are_passed(machine_code):
    for code in machine_code:
        assert code["parameters"] == code["arguments"], code


def test_vectors_are_read_and_written_at_once(machine_code):
    for code in machine_code:
        width = "v2" if code["dtype"] == "float64" else "v4"
        reads, writes = (code[f"{instruction}.global.{width}"] for instruction in ("ld", "st"))
        has_states = code["kernel"] in ("chunk_results", "strip_results")
        is_reading = code["function"] != "logsumexp" or not has_states  # whose results need nothing else
        assert (reads > 0) == (code["vector"] > 1 and is_reading), code
        assert reads >= (code["held"] * code["inputs"] if code["vector"] > 1 else 0), code
        is_writing = code["function"] != "logsumexp" and code["kernel"] not in ("chunk_states", "strip_states")
        assert (writes > 0) == (code["vector"] > 1 and is_writing), code


def test_rows_in_shared_memory_go_there_past_the_registers(machine_code):
    for code in machine_code:
        is_stored = code["shared_bytes"] > 0 and code["vector"] > 1
        assert (code["cp.async.cg"] > 0) == is_stored, code
        width = "v2" if code["dtype"] == "float64" else "v4"
        assert code[f"ld.shared.{width}"] >= (IN_FLIGHT if is_stored else 0), code


def test_exponentials_are_instructions(machine_code):
    for code in machine_code:
        is_exponential = code["function"] != "softmax_vjp" and code["dtype"] in ("float16", "bfloat16")
        if code["function"] == "log_softmax_vjp" and code["kernel"] in ("chunk_states", "strip_states"):
            is_exponential = False  # the sum of g
        assert (code["ex2.approx.ftz.f32"] > 0) == is_exponential, code


@pytest.mark.parametrize(
    ("name", "function", "dtype"),
    [
        ("rows of 512 threads", "softmax", "float32"),
        ("strips", "log_softmax_vjp", "bfloat16"),
        ("rows split", "logsumexp_vjp", "float64"),
    ],
)
def test_text_is_the_same_where_it_is_taken_for_the_same(name, function, dtype):
    """So that NVVM need not be run for sm_90 as well."""
    for step in ptx.launches(name, function, dtype)[1]:
        library = ptx.compiled(step)
        assert ptx.texts(library)[90] == library.get_asm_str(cc=(9, 0))


@pytest.mark.parametrize("dtype", FORMATS)
def test_machine_code_of_sums_with_factors(dtype, tmp_path):
    if ptx.find_ptxas() is None:
        pytest.skip("there is no ptxas: pip install nvidia-cuda-nvcc")
    format, of_rows, of_chunks = FORMATS[dtype], (100_000, 100), (1, 10_000_000)
    layouts = [ptx.laid_out(shape, 1, format.itemsize, "logsumexp")[0] for shape in (of_rows, of_chunks)]
    plans = [choose_weighted(layout, ptx.H200) for layout in layouts]
    steps = [
        step
        for layout, plan in zip(layouts, plans, strict=True)
        for step in _launch.weighted_launches(format, layout, plan, has_signs=True)
    ]
    assert [step.make() for step in steps] == [
        _weighted.weighted_kernel(format, is_first, is_last)
        for is_first, is_last in ((True, True), (True, False), (False, True))
    ]
    for step in steps:
        for architecture, text in ptx.texts(ptx.compiled(step)).items():
            code = ptx.assemble(text, architecture, tmp_path)
            assert (code["spilled"], code["stack"], code["ld.local"], code["st.local"]) == (0, 0, 0, 0), code
            assert code["parameters"] == len(flat(step.arguments)), code
            assert code["registers"] <= 128, code  # four blocks to a multiprocessor
            assert code["shared"] == 48 * step.block[0], code


# The simulator


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.joinpath("cuda").glob("test_*.py")), ids=lambda f: f.stem)
def test_in_the_simulator(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTSOFTMAX")}
    environment["NUMBA_ENABLE_CUDASIM"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    print(done.stdout[-10_000:], done.stderr[-2_000:])
    assert done.returncode == 0


def run_make(directory, tool_status):
    """Run ``make test-gpu`` with stand-ins for Python and the sanitizer; return it and the commands they were."""
    log = directory / "log"
    for name, status in (("python", 0), ("sanitizer", tool_status)):
        script = directory / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\nexit {status}\n')
        script.chmod(0o755)
    command = ["make", "test-gpu", f"PYTHON={directory}/python", f"SANITIZER={directory}/sanitizer"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    return done, log.read_text().splitlines()


def test_tests_on_a_card_are_run_under_the_sanitizer_too(tmp_path):
    done, (tests, *sanitized) = run_make(tmp_path, 0)
    assert done.returncode == 0, done.stderr
    assert tests == "python -m pytest tests/cuda -q"
    assert [line.split()[2] for line in sanitized] == ["memcheck", "racecheck", "synccheck"]
    assert all("--error-exitcode 9" in line for line in sanitized)
    expression = sanitized[0].partition(" -k ")[2]
    command = [sys.executable, "-m", "pytest", "tests/cuda", "-q", "--collect-only", "-k", expression]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    root = Path(__file__).parent.parent
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=100, check=False)
    for name in ("within_a_warp", "of_a_block", "not_fit_in_registers", "strips", "split_over_blocks"):
        assert f"{name}[" in found.stdout, name


def test_a_finding_of_the_sanitizer_fails_the_run(tmp_path):
    done, commands = run_make(tmp_path, 9)
    assert done.returncode != 0
    assert len(commands) == 2  # the tests, and the first tool


# Launching


@pytest.fixture
def launch(monkeypatch):
    """Run a plan with a stand-in for the driver, and return the calls it got.

    It reads what a launch passes to it from memory, as the driver does.
    """

    def run(function, shape, stream):
        format, has_factors = FORMATS["float32"], function == "weighted_logsumexp"
        layout, phases = ptx.laid_out(shape, 1, 4, "logsumexp" if has_factors else function)
        if has_factors:
            plan = choose_weighted(layout, ptx.H200)
            steps = _launch.weighted_launches(format, layout, plan, True)
        else:
            plan = choose(layout, phases, ptx.H200, n_inputs(function))
            steps = _launch.launches(function, format, layout, plan, 0)
        counts = iter([len(flat(step.arguments)) for step in steps])
        called = []

        class Driver:
            CUfunction, CUkernel, CUdevice = "function {}".format, "kernel {}".format, "device {}".format
            CUfunction_attribute = _launch.driver.CUfunction_attribute
            cuCtxGetDevice = staticmethod(lambda: (0, 0))
            cuMemAllocAsync = staticmethod(lambda size, stream: called.append(("allocate", size, stream)) or (0, 4096))
            cuMemFreeAsync = staticmethod(lambda address, stream: called.append(("free", address, stream)) or (0,))
            cuKernelSetAttribute = staticmethod(lambda *arguments: called.append(("allow", *arguments)) or (0,))

            @staticmethod
            def cuLaunchKernel(function, *sizes_stream_and_pointers):
                *sizes, stream, parameters, _ = sizes_stream_and_pointers
                pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))
                values = [pointers[place][0] for place in range(next(counts))]
                called.append(("launch", function, tuple(sizes), stream, values))
                return (0,)

        monkeypatch.setattr(_launch, "driver", Driver)
        monkeypatch.setattr(_launch, "device_facts", lambda device: ptx.H200)
        monkeypatch.setattr(_launch, "_compiled", lambda kernel, signature, bounds: 7)
        monkeypatch.setattr(_launch.cuda, "gpus", {0: nullcontext()})
        if has_factors:
            prepared = _launch.prepare_weighted(format, layout, plan, True, device=0)
        else:
            prepared = _launch.prepare(function, format, layout, plan, 0, device=0)
        prepared.run({"x": 256, "y": 512, "g": 768, "signs": 1024, "states": 0}, stream)
        return plan, steps, called

    return run


def flat(arguments):
    return [number for one in arguments for number in (one if isinstance(one, tuple) else (one,))]


def test_arguments_reach_the_driver(launch):
    plan, steps, called = launch("softmax_vjp", (1, 3_000_000), stream=11)
    n_states = plan.n_chunks
    names = {"x": 256, "y": 512, "g": 768, "maxima": 4096, "sums": 4096 + 4 * n_states}
    names["residues"] = 4096 + 8 * n_states
    expected = [[names.get(argument, argument) for argument in flat(step.arguments)] for step in steps]
    sizes = (n_states, 1, 1, 256, 1, 1, 0)
    assert called == [
        ("allocate", 12 * n_states, 11),
        ("launch", "function 7", sizes, 11, expected[0]),
        ("launch", "function 7", sizes, 11, expected[1]),
        ("free", 4096, 11),
    ]


@pytest.mark.parametrize("shape", [(100_000, 100), (3, 1_000_000)])
def test_arguments_of_sums_with_factors_reach_the_driver(launch, shape):
    plan, steps, called = launch("weighted_logsumexp", shape, stream=11)
    has_chunks = plan.n_chunks > 1
    names = {"x": 256, "y": 512, "g": 768, "signs": 1024, "states": 4096 if has_chunks else 0}
    launched = [
        (
            "launch",
            "function 7",
            (step.grid, 1, 1, 128, 1, 1, 0),
            11,
            [names.get(one, one) for one in flat(step.arguments)],
        )
        for step in steps
    ]
    room = ("allocate", shape[0] * plan.n_chunks * 48, 11)
    assert called == ([room, *launched, ("free", 4096, 11)] if has_chunks else launched)


def test_a_block_is_allowed_its_shared_memory_before_it_is_launched(launch):
    plan, _, ((allowed, attribute, n_bytes, kernel, device), launched) = launch("softmax", (300, 65536), stream=0)
    assert (allowed, attribute.name) == ("allow", "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES")
    assert (kernel, device) == ("kernel 7", "device 0")
    assert plan.shared_bytes == 7 * 32 * 1024 <= n_bytes == 226 * 1024
    assert launched[2] == (300, 1, 1, 512, 1, 1, plan.shared_bytes)
    assert launched[4][5] == plan.stored // IN_FLIGHT


def test_streams_are_put_in_order_on_the_device(monkeypatch):
    called = []

    def record(name, *results):
        return staticmethod(lambda *arguments: called.append((name, *arguments)) or (0, *results))

    class Driver:
        CUevent_flags = _launch.driver.CUevent_flags
        cuEventCreate = record("create", "event")
        cuEventRecord = record("record")
        cuStreamWaitEvent = record("wait")
        cuEventDestroy = record("destroy")

    monkeypatch.setattr(_launch, "driver", Driver)
    _launch.queue_behind(5, 9)
    flags = Driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
    assert called == [("create", flags), ("record", "event", 9), ("wait", 5, "event", 0), ("destroy", "event")]


def test_devices_without_the_instructions_are_refused(monkeypatch):
    monkeypatch.setattr(_launch.cuda, "gpus", {0: SimpleNamespace(compute_capability=(7, 5))})
    with pytest.raises(fastsoftmax.BackendUnavailableError, match=r"capability 8\.0 or newer, and device 0 has 7\.5"):
        _launch.device_facts.__wrapped__(0)


def test_what_torch_says_of_its_tensors():
    """On tensors in main memory, of which Torch says the same."""
    torch = pytest.importorskip("torch", reason="needs torch")
    x = torch.zeros((6, 8), dtype=torch.bfloat16).t()
    library = _arrays.library_of(type(x))
    assert library is _arrays.library_of(torch.nn.Parameter)
    assert library.view(x) == _arrays.View(x.data_ptr(), (8, 6), (2, 16), "bfloat16", 2)
    assert library.empty(x, None).stride() == x.stride()
    assert library.empty(x, (8,)).shape == (8,)
    apart = library.empty(x.contiguous(), None, 3)
    assert (apart.shape, apart.stride(), apart.data_ptr() % 16) == ((8, 6), (6, 1), 6)
    borrowed = _arrays.borrow(x)
    assert borrowed.data_ptr() == x.data_ptr()
    assert hash(library.form(borrowed)) == hash(library.form(x))


def test_a_refusal_of_the_driver_is_an_error(monkeypatch):
    names = SimpleNamespace(cuGetErrorName=lambda code: (0, b"CUDA_ERROR_INVALID_VALUE"))
    monkeypatch.setattr(_launch, "driver", names)
    with pytest.raises(_launch.CudaError, match="CUDA_ERROR_INVALID_VALUE"):
        _launch.checked((1,))
    assert _launch.checked((0, 5)) == 5


def test_without_a_device_the_backend_says_what_is_missing():
    reason = fastsoftmax._dispatch.unavailable_reason(
        next(backend for backend in fastsoftmax._dispatch.BACKENDS if backend.name == "cuda")
    )
    if reason is None:
        pytest.skip("there is a device")
    with pytest.raises(fastsoftmax.BackendUnavailableError, match="no CUDA device can be used: "):
        fastsoftmax.softmax([1.0], backend="cuda")

    class OnDevice:
        def __dlpack_device__(self):
            return 2, 0

    with pytest.raises(fastsoftmax.BackendUnavailableError, match="backend 'cuda' is not available"):
        fastsoftmax.softmax(OnDevice())
