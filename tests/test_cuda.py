"""The CUDA backend, as far as it can be tried without a device: state, plans, machine code, and the simulator."""

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
from tests.reference import exact, max_ulp_error

pytest.importorskip("numba_cuda", reason="the cuda backend needs numba-cuda", exc_type=ImportError)

from fastsoftmax.cuda import _launch, _state
from fastsoftmax.cuda._plan import IN_FLIGHT, choose
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
    state = elements.dtype.type(-np.inf), elements.dtype.type(0)
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
        top = functions.term(state[0], state[0])
        assert abs(state[1] / top - other[1] / top) <= tolerance * max(1, state[1] / top)


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
    tolerance = 8 * np.finfo(real(precision)).eps
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
    bound = 4 if precision != "half" else 60  # of 2**13 to a unit of float16
    assert max_ulp_error(computed, exact("softmax", x)) <= bound


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
        ("bfloat16", (4096, 65536), 1, "rows", 8, 512, 1, 6, True, 1),
        ("float32", (4096, 65536), 1, "rows", 4, 512, 1, 6, True, 1),
        ("float32", (4096, 262144), 1, "split", 4, 256, 1, 0, False, 64),
        ("float32", (1, 100_000_000), 1, "split", 4, 256, 1, 0, False, 1018),
        ("float32", (2**17, 2**17), 1, "split", 4, 256, 1, 0, False, 32),
        ("float32", (8192, 8192), 0, "strips", 4, 256, 8, 0, False, 1),
        ("float32", (64, 100, 1000), 1, "strips", 4, 16, 128, 0, False, 1),
        ("float32", (16, 21, 128, 128), 1, "strips", 4, 8, 128, 0, False, 1),
        ("bfloat16", (16, 21, 5), 1, "strips", 1, 8, 8, 0, False, 1),
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


ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def compilers():
    """Processes that compile every kernel, one for each architecture, all at once: each takes 45 s of a processor."""
    if ptx.find_ptxas() is None:
        pytest.skip("there is no ptxas: pip install nvidia-cuda-nvcc")
    root, pipes = Path(__file__).parent.parent, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = {number: [sys.executable, "-m", "tests.ptx", str(number)] for number in ARCHITECTURES}
    with ExitStack() as stack:
        yield {
            number: stack.enter_context(subprocess.Popen(command, cwd=root, **pipes))
            for number, command in commands.items()
        }


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format, scope="module")
def machine_code(request, compilers):
    """What became of each kernel on one architecture."""
    printed, errors = compilers[request.param].communicate(timeout=600)
    assert compilers[request.param].returncode == 0, errors
    return json.loads(printed)


def test_no_kernel_spills(machine_code):
    for code in machine_code:
        assert (code["spilled"], code["stack"], code["ld.local"]) == (0, 0, 0), code
        assert code["registers"] * code["threads"] <= 65536, code


def test_kernels_take_the_arguments_that_are_passed(machine_code):
    for code in machine_code:
        assert code["parameters"] == code["arguments"], code


def test_vectors_are_read_and_written_at_once(machine_code):
    for code in machine_code:
        width = "v2" if code["dtype"] == "float64" else "v4"
        reads, writes = (code[f"{instruction}.global.{width}"] for instruction in ("ld", "st"))
        assert (reads > 0) == (code["vector"] > 1), code
        assert reads >= (code["held"] if code["vector"] > 1 else 0), code
        is_writing = code["function"] != "logsumexp" and code["kernel"] != "chunk_states"
        assert (writes > 0) == (code["vector"] > 1 and is_writing), code


def test_exponentials_are_instructions(machine_code):
    for code in machine_code:
        assert (code["ex2.approx.ftz.f32"] > 0) == (code["dtype"] != "float64"), code


# The simulator


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.joinpath("cuda").glob("test_*.py")), ids=lambda f: f.stem)
def test_in_the_simulator(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTSOFTMAX")}
    environment["NUMBA_ENABLE_CUDASIM"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    print(done.stdout[-10_000:], done.stderr[-2_000:])
    assert done.returncode == 0


# Launching


def test_arguments_reach_the_driver(monkeypatch):
    """A stand-in for the driver reads what a launch passes to it from memory, as the driver does."""
    launched = []

    class Driver:
        CUfunction = staticmethod(lambda handle: f"function {handle}")
        cuCtxGetDevice = staticmethod(lambda: (0, 0))
        cuMemAllocAsync = staticmethod(lambda size, stream: launched.append(("allocate", size, stream)) or (0, 4096))
        cuMemFreeAsync = staticmethod(lambda address, stream: launched.append(("free", address, stream)) or (0,))

        @staticmethod
        def cuLaunchKernel(function, *sizes_stream_and_pointers):
            *sizes, stream, parameters, _ = sizes_stream_and_pointers
            count = len(arguments[len([one for one in launched if one[0] == "launch"])])
            pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))
            launched.append(("launch", function, tuple(sizes), stream, [pointers[i][0] for i in range(count)]))
            return (0,)

    monkeypatch.setattr(_launch, "driver", Driver)
    monkeypatch.setattr(_launch, "_compiled", lambda kernel, signature, bounds: 7)
    monkeypatch.setattr(_launch.cuda, "gpus", {0: nullcontext()})
    layout, _ = ptx.laid_out((1, 3_000_000), 1, 4)
    plan = choose(layout, (0, 0), ptx.H200)
    steps = _launch.launches("softmax", FORMATS["float32"], layout, plan, 0)
    arguments = [[*step.arguments[:-2], *step.arguments[-2], *step.arguments[-1]] for step in steps]
    prepared = _launch.prepare("softmax", FORMATS["float32"], layout, plan, 0, device=0)
    prepared.run({"x": 256, "y": 512, "g": 256}, stream=11)

    n_states = plan.n_chunks
    names = {"x": 256, "y": 512, "g": 256, "maxima": 4096, "sums": 4096 + 4 * n_states}
    expected = [[names.get(argument, argument) for argument in step] for step in arguments]
    sizes = (n_states, 1, 1, 256, 1, 1, 0)
    assert launched == [
        ("allocate", 8 * n_states, 11),
        ("launch", "function 7", sizes, 11, expected[0]),
        ("launch", "function 7", sizes, 11, expected[1]),
        ("free", 4096, 11),
    ]


def test_a_refusal_of_the_driver_is_an_error(monkeypatch):
    names = SimpleNamespace(cuGetErrorName=lambda code: (0, b"CUDA_ERROR_INVALID_VALUE"))
    monkeypatch.setattr(_launch, "driver", names)
    with pytest.raises(_launch.CudaError, match="CUDA_ERROR_INVALID_VALUE"):
        _launch._checked((1,))
    assert _launch._checked((0, 5)) == 5


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
