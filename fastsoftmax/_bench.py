"""Time every backend beside its peers: ``python -m fastsoftmax bench``.

A *contender* computes one of the functions in its own way: a backend of this package, a peer, or a plain copy of the
same bytes, which is what the memory system allows. `measure` has all of them compute the same data in the same process
and takes their samples in turn, in a new order each round, so that a change in the machine's speed meets all alike.
A contender is timed only after its result was held against a reference of higher precision.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby, repeat
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Literal

import numpy as np

from fastsoftmax import BackendUnavailableError, Plan, _api, _dispatch, _info, record_plans
from fastsoftmax._dispatch import Function
from fastsoftmax._layout import Array
from fastsoftmax._schedule import max_threads

Call = Callable[[], Any]
Kind = Literal["backend", "peer", "copy", "read"]

FUNCTIONS: tuple[Function, ...] = ("softmax", "log_softmax", "logsumexp")
DTYPES = ("float32", "float64")
ALL_DTYPES = (*DTYPES, "bfloat16", "float16")

# A sample lasts at least this long, so that reading the clock (about 50 ns) does not show in it.
SAMPLE_SECONDS = 0.2e-3

# At its turn a contender takes samples for this long, but one at least.
TURN_SECONDS = 20e-3

# With several threads a contender first waits this long, for the idle threads of the one before go on spinning: those
# of onnxruntime for 35 ms, those of torch's OpenMP for 9 ms. Right after onnxruntime a two-thread exp of a million
# floats took 520 us instead of 410 us.
PAUSE_SECONDS = 40e-3

ROUNDS, QUICK_ROUNDS = 5, 2

# With one more busy process a two-thread torch.softmax of 64x1000 took 8 ms instead of 22 us.
BUSY_LOAD = 0.5

DESCRIPTION = """Time every backend of fastsoftmax beside NumPy, scipy.special, torch, onnxruntime and jax, as far as
they are installed, and beside a copy of the same bytes. Columns are medians in microseconds; the last ones compare the
backend that serves a plain call with the fastest peer (higher is better) and the fastest copy (lower is better)."""


@dataclass(frozen=True, slots=True)
class Case:
    """One input: its shape, the axis that is reduced, and its dtype."""

    shape: tuple[int, ...]
    axis: int
    dtype: str

    def __str__(self) -> str:
        last = self.axis == len(self.shape) - 1
        return "x".join(map(str, self.shape)) + ("" if last else f"@{self.axis}")

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        if self.dtype == "bfloat16":
            import_module("ml_dtypes")  # which tells NumPy of it
        return np.dtype(self.dtype)

    def data(self) -> Array:
        """Return seeded normals: zeros would spare every contender the branches that real data take."""
        dtype = np.float64 if self.dtype == "float64" else np.float32
        return np.random.default_rng(0).standard_normal(self.shape, dtype).astype(self.numpy_dtype, copy=False)


def parse_case(text: str, dtype: str) -> Case:
    """Read ``64x1000`` or ``4096x4096@0``: sizes, and after the @ the axis if it is not the last.

    Raises
    ------
    ValueError
        If the text is not of this form.
    """
    sizes, at, axis_text = text.strip().partition("@")
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
        axis = int(axis_text) if at else -1
    except ValueError:
        raise ValueError(f"{text!r} is not a shape such as 64x1000 or 4096x4096@0") from None
    if min(shape) < 1:
        raise ValueError(f"{text!r} has a size below 1")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{text!r} has no axis {axis}")
    return Case(shape, axis % len(shape), dtype)


# Short rows, long rows, many rows, other axes; in cache and far beyond it.
DEFAULT_SHAPES = (
    "10",
    "1000",
    "64x1000",
    "100000",
    "1024x1024",
    "64x100x1000@1",
    "10000000",
    "1000000x10",
    "100000x128",
    "4096x4096@0",
    "8192x4096",
)
OMITTED = {("8192x4096", "float64")}  # 0.5 GB of data that tell no more than 4096x4096@0
QUICK_SIZE = 2**21  # elements; up to here a case needs little besides its budget


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute, or to copy.

    Parameters
    ----------
    name : str
        What its column is called; a backend's begins with ``fastsoftmax:``.
    kind : {"backend", "peer", "copy", "read"}
        What it is compared as; a copy and a read of the input compute nothing and are not checked.
    missing : callable
        Returns why it cannot run here, or None if it can.
    prepare : callable
        ``prepare(function, x, axis, n_threads)`` returns a call without arguments that computes (into memory of its
        own wherever it can) and returns the result; or None where the contender does not apply.
    """

    name: str
    kind: Kind
    missing: Callable[[], str | None]
    prepare: Callable[[Function, Array, int, int], Call | None]


def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except ImportError as error:
        return str(error)
    return None


def _empty_output(function: Function, x: Array, axis: int) -> Array:
    return np.empty_like(x) if function != "logsumexp" else np.empty(x.shape[:axis] + x.shape[axis + 1 :], x.dtype)


def prepare_fastsoftmax(backend: str | None, function: Function, x: Array, axis: int, n_threads: int) -> Call:
    """Prepare a call of this package; with None for a backend, the one that it chooses."""
    os.environ["FASTSOFTMAX_NUM_THREADS"] = str(n_threads)  # read anew at every call
    out = _empty_output(function, x, axis)
    return partial(getattr(_api, function), x, axis=axis, out=out, backend=backend)


def _prepare_numpy(function: Function, x: Array, axis: int, n_threads: int) -> Call:
    """Prepare the expressions one writes by hand, with ``out=`` wherever NumPy takes it."""
    out = np.empty_like(x)
    scratch = np.empty_like(x)

    def softmax() -> Any:
        np.subtract(x, x.max(axis=axis, keepdims=True), out=out)
        np.exp(out, out=out)
        return np.divide(out, out.sum(axis=axis, keepdims=True), out=out)

    def log_softmax() -> Any:
        np.subtract(x, x.max(axis=axis, keepdims=True), out=out)
        np.exp(out, out=scratch)
        return np.subtract(out, np.log(scratch.sum(axis=axis, keepdims=True)), out=out)

    def logsumexp() -> Any:
        maximum = x.max(axis=axis, keepdims=True)
        np.subtract(x, maximum, out=scratch)
        np.exp(scratch, out=scratch)
        return np.log(scratch.sum(axis=axis)) + maximum.squeeze(axis)

    return {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}[function]


def _prepare_scipy(function: Function, x: Array, axis: int, n_threads: int) -> Call:
    from scipy import special

    return partial(getattr(special, function), x, axis=axis)


def _prepare_torch(function: Function, x: Array, axis: int, n_threads: int) -> Call:
    import torch

    torch.set_num_threads(n_threads)
    result = _empty_output(function, x, axis)
    compute = partial(getattr(torch, function), as_tensor(x), axis, out=as_tensor(result))

    def call() -> Array:
        compute()
        return result

    return call


def as_tensor(x: Array) -> Any:
    """Return an array as a torch tensor in the same memory; torch knows no dtype of ml_dtypes."""
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


# The numbers of the element types in onnx.proto.
_ONNX_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}


def onnx_session(function: Function, x: Array, axis: int, n_threads: int) -> Any:
    """Return an onnxruntime session that computes y = function(x) for arrays of the dtype of ``x``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    model = _onnx_model(function, x.dtype, axis)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _prepare_onnxruntime(function: Function, x: Array, axis: int, n_threads: int) -> Call:
    session, element_type = onnx_session(function, x, axis, n_threads), _ONNX_TYPES[x.dtype.name]
    result = _empty_output(function, x, axis)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, element_type, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, element_type, result.shape, result.ctypes.data)

    def call() -> Array:
        session.run_with_iobinding(binding)
        return result

    return call


def _onnx_model(function: Function, dtype: np.dtype[Any], axis: int) -> bytes:
    """Return an ONNX model (operator set 13) of one node, y = function(x).

    The numbers are those of the fields in onnx.proto; writing them here spares the onnx package.
    """
    element_type = _ONNX_TYPES[dtype.name]
    operator = {"softmax": "Softmax", "log_softmax": "LogSoftmax", "logsumexp": "ReduceLogSumExp"}[function]
    if function == "logsumexp":
        attributes = [_message((1, "axes"), (8, axis), (20, 7)), _message((1, "keepdims"), (3, 0), (20, 2))]
    else:
        attributes = [_message((1, "axis"), (3, axis), (20, 2))]
    tensor = _message((1, _message((1, element_type))))
    node = _message((1, "x"), (2, "y"), (4, operator), *((5, attribute) for attribute in attributes))
    values = [_message((1, name), (2, tensor)) for name in "xy"]
    graph = _message((1, node), (2, function), (11, values[0]), (12, values[1]))
    return _message((1, 7), (7, graph), (8, _message((2, 13))))


def _message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Encode a protobuf message: integers as varints, text and nested messages with their length before them."""
    encoded = b""
    for number, value in fields:
        if isinstance(value, int):
            encoded += _varint(number << 3) + _varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            encoded += _varint(number << 3 | 2) + _varint(len(content)) + content
    return encoded


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def prepare_jax(function: Function, x: Array, axis: int, n_threads: int) -> Call:
    """Prepare a compiled call; jax has no ``out=``."""
    os.environ["NPROC"] = str(n_threads)  # XLA's threads: read once, when the first array is made
    import jax

    jax.config.update("jax_enable_x64", True)
    compute = jax.jit(partial(getattr(jax.nn, function), axis=axis))
    data = jax.device_put(x, jax.devices("cpu")[0])
    return lambda: compute(data).block_until_ready()


def _prepare_numpy_copy(function: Function, x: Array, axis: int, n_threads: int) -> Call:
    return partial(np.copyto, np.empty_like(x), x)


def _prepare_torch_copy(function: Function, x: Array, axis: int, n_threads: int) -> Call | None:
    import torch

    if n_threads == 1:
        return None  # the same memcpy as NumPy's
    torch.set_num_threads(n_threads)
    return partial(as_tensor(np.empty_like(x)).copy_, as_tensor(x))


CONTENDERS = (
    *(
        Contender(
            f"fastsoftmax:{backend.name}",
            "backend",
            partial(_dispatch.unavailable_reason, backend),
            partial(prepare_fastsoftmax, backend.name),
        )
        for backend in _dispatch.BACKENDS
        if backend.is_automatic  # the others are not for arrays in main memory
    ),
    Contender("numpy", "peer", lambda: None, _prepare_numpy),
    Contender("scipy", "peer", partial(_import_error, "scipy.special"), _prepare_scipy),
    Contender("torch", "peer", partial(_import_error, "torch"), _prepare_torch),
    Contender("onnxruntime", "peer", partial(_import_error, "onnxruntime"), _prepare_onnxruntime),
    Contender("jax", "peer", partial(_import_error, "jax"), prepare_jax),
    Contender("copy:numpy", "copy", lambda: None, _prepare_numpy_copy),
    Contender("copy:torch", "copy", partial(_import_error, "torch"), _prepare_torch_copy),
)


def reference(function: Function, x: Array, axis: int) -> Array:
    """Compute a function in a wider dtype: float64 in long double, others in float64."""
    shifted: Array = x.astype(np.float64 if x.itemsize < 8 else np.longdouble)
    maximum: Array = shifted.max(axis=axis, keepdims=True)
    np.subtract(shifted, maximum, out=shifted)
    terms: Array = np.exp(shifted)
    total: Array = terms.sum(axis=axis, keepdims=True)
    if function == "softmax":
        return np.divide(terms, total, out=terms)
    if function == "log_softmax":
        return np.subtract(shifted, np.log(total), out=shifted)
    return np.asarray((maximum + np.log(total)).squeeze(axis))


def error_in_ulp(result: Array, expected: Array, scale: Array | float = 0.0) -> float:
    """Return the largest error of ``result``, in units in the last place of what it should be; NaN if there is one.

    Where ``scale`` is larger than the result, the units are its own: a sum that cancels has lost the digits of its
    summands, and the maximum is one of those of logsumexp.
    """
    unit = np.spacing(np.maximum(np.abs(expected), np.abs(scale)).astype(result.dtype))
    return float(np.max(np.abs(result - expected) / unit))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call: the median and the quartiles of ``n_samples``, each over ``calls_per_sample`` calls."""

    median: float
    lower_quartile: float
    upper_quartile: float
    n_samples: int
    calls_per_sample: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What became of each contender in one case, by its name.

    Parameters
    ----------
    function, case, n_threads
        What was computed.
    choice : Plan
        What served a call that forced nothing.
    plans : dict of str to Plan
        What served each backend's calls.
    errors : dict of str to float
        Largest errors in units in the last place.
    excluded : dict of str to str
        Why a contender that should have been timed was not: it was wrong, or it failed.
    timings : dict of str to Timing
        The others, less those that do not apply.
    """

    function: Function
    case: Case
    n_threads: int
    choice: Plan
    plans: dict[str, Plan]
    errors: dict[str, float]
    excluded: dict[str, str]
    timings: dict[str, Timing]

    @property
    def copied_bytes(self) -> int:
        """The bytes that a copy of the input reads and writes."""
        return 2 * self.case.size * self.case.numpy_dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """The bytes of the input and of the output, each counted once: no computation moves fewer."""
        if self.function != "logsumexp":
            return self.copied_bytes
        return self.copied_bytes // 2 * (1 + self.case.shape[self.case.axis]) // self.case.shape[self.case.axis]

    def fastest(self, kind: Kind) -> float:
        """Return the smallest median among the contenders of a kind, NaN if none was timed."""
        names = [contender.name for contender in CONTENDERS if contender.kind == kind]
        return min((self.timings[name].median for name in names if name in self.timings), default=float("nan"))

    @property
    def chosen(self) -> float:
        """The median of the backend that serves a call that forces nothing; NaN if it was not timed."""
        timing = self.timings.get(f"fastsoftmax:{self.choice.backend}")
        return timing.median if timing else float("nan")


def measure(
    function: Function,
    case: Case,
    contenders: Sequence[Contender],
    n_threads: int,
    n_rounds: int,
    progress: Callable[[str], None],
    turn_seconds: float = TURN_SECONDS,
) -> Measurement:
    """Check contenders on one case, then time those that are right, each once in every round."""
    x = case.data()
    with record_plans() as chosen:
        prepare_fastsoftmax(None, function, x, case.axis, n_threads)()
    plans: dict[str, Plan] = {}
    errors: dict[str, float] = {}
    excluded: dict[str, str] = {}
    calls: dict[str, Call] = {}
    expected = reference(function, x, case.axis)
    scale = x.max(axis=case.axis) if function == "logsumexp" else 0.0
    for contender in contenders:
        progress(f"checking {contender.name}")
        try:
            call = contender.prepare(function, x, case.axis, n_threads)
            if call is None:
                continue
            with record_plans() as served:
                result = call()
        except Exception as error:
            excluded[contender.name] = f"failed: {type(error).__name__}: {error}"
            continue
        if served:
            plans[contender.name] = served[0]
        if contender.kind in ("backend", "peer"):
            ulp = errors[contender.name] = error_in_ulp(np.asarray(result), expected, scale)
            if not ulp <= np.spacing(x.dtype.type(1)) ** -0.5:  # half of the digits; NaN is not below it either
                excluded[contender.name] = f"wrong: off by {ulp:.3g} ULP"
                continue
        calls[contender.name] = call
    del expected
    timings = _take_turns(calls, n_rounds, turn_seconds, PAUSE_SECONDS if n_threads > 1 else 0.0, progress)
    return Measurement(function, case, n_threads, chosen[0], plans, errors, excluded, timings)


def _take_turns(
    calls: dict[str, Call], n_rounds: int, turn_seconds: float, pause: float, progress: Callable[[str], None]
) -> dict[str, Timing]:
    repeats = {name: _calls_per_sample(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    with _without_garbage_collection():
        for number in range(n_rounds):
            progress(f"round {number + 1} of {n_rounds}")
            shuffle(order)
            for name in order:
                sleep(pause)
                turn: list[float] = []
                end = perf_counter() + turn_seconds
                while not turn or perf_counter() < end:
                    turn.append(_seconds_per_call(calls[name], repeats[name]))
                # The first sample finds the caches and the threads cold; where it is the only one, it is long enough
                # not to show that.
                samples[name] += turn[1:] or turn
    timings = {}
    for name, values in samples.items():
        lower, median, upper = (float(value) for value in np.percentile(values, (25, 50, 75)))
        timings[name] = Timing(median, lower, upper, len(values), repeats[name])
    return timings


def _seconds_per_call(call: Call, n_calls: int) -> float:
    start = perf_counter()
    for _ in repeat(None, n_calls):
        call()
    return (perf_counter() - start) / n_calls


def _calls_per_sample(call: Call) -> int:
    n_calls = 1
    # The better of two, for the first may still be loading something.
    while (seconds := min(_seconds_per_call(call, n_calls) for _ in range(2))) * n_calls < SAMPLE_SECONDS:
        n_calls = max(2 * n_calls, int(SAMPLE_SECONDS / seconds))
    return n_calls


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def table_header(names: Sequence[str]) -> str:
    """Return the two header lines above the rows of `table_row`."""
    groups = []
    for group, members in groupby(names, _group):
        groups.append(f" {group} ".center(sum(map(_width, members)) - 1, "-"))
    columns = "".join(f"{_short(name):>{_width(name)}}" for name in names)
    head = f"{'dtype':8} {'shape@axis':14}"
    return f"{'':{len(head)}} {' '.join(groups)}\n{head}{columns}{'peer/ours':>10}{'ours/copy':>10}  served by"


def table_row(measurement: Measurement, names: Sequence[str]) -> str:
    """Return one case as a line of the table; one that was not timed is ``wrong``, ``failed`` or does not apply (-)."""
    cells = []
    for name in names:
        timing, (verdict, _, _) = measurement.timings.get(name), measurement.excluded.get(name, "-").partition(":")
        cell = microseconds(timing.median) if timing else verdict
        cells.append(f"{cell:>{_width(name)}}")
    ours = measurement.chosen
    ratios = f"{measurement.fastest('peer') / ours:10.2f}{ours / measurement.fastest('copy'):10.2f}"
    head = f"{measurement.case.dtype:8} {measurement.case!s:14}"
    return f"{head}{''.join(cells)}{ratios}  {describe(measurement.choice)}"


def _group(name: str) -> str:
    return {"fastsoftmax": "ours", "": "peers"}.get(group := name.rpartition(":")[0], group)


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def _width(name: str) -> int:
    return max(len(_short(name)) + 1, 10)


def microseconds(seconds: float) -> str:
    """Return a time as the table shows it."""
    value = seconds * 1e6
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def describe(plan: Plan) -> str:
    """Return what served a call, in words: backend, tier, traversal/exponentials and what is special."""
    schedule = plan.schedule
    words = [plan.backend, plan.isa or "", f"{schedule.traversal}/{schedule.exponentials}"]
    words += ["streaming"] * schedule.streaming + [f"{schedule.n_threads} threads"] * (schedule.n_threads > 1)
    return " ".join(filter(None, words))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``bench``."""
    parser.add_argument(
        "--functions", type=list_of(FUNCTIONS), default=("softmax",), help=f"of {', '.join(FUNCTIONS)} [softmax]"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: softmax on a card, beside the peers there [cpu]"
    )
    parser.add_argument(
        "--dtypes", type=list_of(ALL_DTYPES), help="float32 and float64; on a card also bfloat16 and float16 [two]"
    )
    parser.add_argument(
        "--shapes", type=_shapes, help="such as 64x1000,4096x4096@0: sizes, and the axis if it is not the last"
    )
    parser.add_argument(
        "--threads", type=positive_integer, help="for every contender that has threads [all usable cores]"
    )
    parser.add_argument("--rounds", type=positive_integer, help=f"turns of each contender in each case [{ROUNDS}]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a first look: {QUICK_ROUNDS} rounds, and no case above {QUICK_SIZE:,} elements unless --shapes names it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all figures")
    parser.add_argument("--plot", type=_plot_path, metavar="FILE.svg|FILE.png", help="draw the figures (matplotlib)")


def list_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of names with commas between them, each one of those known."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(name.strip() for name in text.split(","))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return chosen

    return parse


def _shapes(text: str) -> tuple[str, ...]:
    shapes = tuple(text.split(","))
    for shape in shapes:
        try:
            parse_case(shape, DTYPES[0])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return shapes


def positive_integer(text: str) -> int:
    """Parse the value of an option that must be 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _plot_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .svg or .png")
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is not installed: pip install 'fastsoftmax[bench]'")
    return path


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark that the options describe; print its table, write its files."""
    if options.device == "cuda":
        from fastsoftmax import _bench_cuda

        return _bench_cuda.run(options, parser)
    dtypes = options.dtypes or DTYPES
    if not set(dtypes) <= set(DTYPES):
        parser.error(f"argument --dtypes: on the processor {' and '.join(DTYPES)} are compared")
    try:
        n_threads = options.threads or max_threads()
        _dispatch.select(np.dtype(DTYPES[0]), 0)
    except (ValueError, BackendUnavailableError) as error:
        parser.error(str(error))  # the environment forces what cannot be
    for path in filter(None, (options.json, options.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    cases = [
        parse_case(text, dtype)
        for dtype in dtypes
        for text in options.shapes or DEFAULT_SHAPES
        if options.shapes or (text, dtype) not in OMITTED
    ]
    if options.quick and not options.shapes:
        cases = [case for case in cases if case.size <= QUICK_SIZE]
    n_rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)

    machine, versions = _info.machine(), _info.versions()
    print(introduction(machine, versions, str(n_threads)))
    contenders = []
    for contender in CONTENDERS:
        if (reason := contender.missing()) is None:
            contenders.append(contender)
        else:
            print(f"not measured: {contender.name}: {reason}")
    names = [contender.name for contender in contenders]

    measurements: list[Measurement] = []
    for function in options.functions:
        print(f"\n{function}: median microseconds per call\n{table_header(names)}", flush=True)
        for case in cases:
            number = f"[{len(measurements) + 1}/{len(options.functions) * len(cases)}]"
            with show_progress(f"{number} {function} {case.dtype} {case}") as progress:
                measurements.append(measure(function, case, contenders, n_threads, n_rounds, progress))
            print(table_row(measurements[-1], names), flush=True)
    failures = [
        f"{name}: {measurement.function} {measurement.case.dtype} {measurement.case}: {reason}"
        for measurement in measurements
        for name, reason in measurement.excluded.items()
    ]
    print("".join(f"\nnot timed: {failure}" for failure in failures))
    if options.json:
        document = {
            "machine": machine,
            "versions": versions,
            "parameters": {"functions": options.functions, "n_threads": n_threads, "n_rounds": n_rounds},
            "measurements": [asdict(measurement) for measurement in measurements],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        from fastsoftmax import _figure

        _figure.draw(
            measurements, CONTENDERS, f"{machine['cpu']}, {n_threads} thread{'s' * (n_threads > 1)}", options.plot
        )
    return 1 if any(failure.startswith("fastsoftmax:") for failure in failures) else 0


def introduction(machine: dict[str, Any], versions: dict[str, str | None], threads: str) -> str:
    """Return the line above a table that says what it is measured on, and another if the machine is busy."""
    line = f"fastsoftmax {versions['fastsoftmax']}, {machine['cpu']}, {threads} of {machine['usable_cores']} cores"
    load = machine["load_average"]
    if load is not None and load > BUSY_LOAD:
        line += f"\nload average {load:.1f}: other processes are using this machine, and the figures suffer from it"
    return line


@contextmanager
def show_progress(case: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what a case is at: on one line of a terminal, else one line per case."""
    if sys.stderr.isatty():
        yield lambda step: print(f"\r\033[K{case}: {step}", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    else:
        print(case, file=sys.stderr, flush=True)
        yield lambda step: None
