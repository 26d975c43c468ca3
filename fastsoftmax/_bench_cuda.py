"""Time the CUDA backend beside its peers on a card: ``python -m fastsoftmax bench --device cuda``.

Every contender computes the same data, in sets of buffers that are larger together than the L2 cache is, in turn. What
Torch can capture is timed as the replay of a graph, so that no launch waits for Python; the others are timed by events
around a run of calls, but JAX, which has streams of its own, by the clock until the last one is done. The time that a
call takes on the processor stands beside it. A copy on the device, measured in the same way in the same run, is what
the memory allows.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any, Literal

import numpy as np

import fastsoftmax
from fastsoftmax import _info
from fastsoftmax._bench import FUNCTIONS, Case, parse_case
from fastsoftmax._dispatch import select_on_gpu

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROW_LENGTHS = tuple(2**power for power in range(5, 19))

# Elements of an input: 1 GiB in float32, twenty times the L2 cache of an H200.
SIZE, QUICK_SIZE = 2**28, 2**24

# Bytes of all sets of buffers together, over those of the L2 cache.
CACHE_MULTIPLE = 4

# Calls of a sample, so that a sample of small calls is longer than the resolution of events (0.5 us) by far.
SAMPLE_CALLS, N_SAMPLES, WARM_UP = 20, 15, 3
HOST_CALLS = 200

# Rows whose results are compared with float64.
CHECKED_ROWS = 64

Call = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to compute: ``prepare(function, case)`` returns a function of input and output, both of Torch.

    A function that returns something has written nothing to the output, and its result is what it returned.
    """

    name: str
    module: str
    prepare: Callable[[str, Case], Call]
    timing: Literal["graph", "events", "clock"] = "graph"
    functions: tuple[str, ...] = FUNCTIONS


def _prepare_fastsoftmax(function: str, case: Case) -> Call:
    compute = getattr(fastsoftmax, function)

    def call(x: Any, out: Any) -> None:
        compute(x, case.axis, out=out)

    return call


def _prepare_torch(function: str, case: Case) -> Call:
    import torch

    compute = getattr(torch, function)

    def call(x: Any, out: Any) -> None:
        compute(x, case.axis, out=out)

    return call


def _prepare_compiled(function: str, case: Case) -> Call:
    import torch

    compiled = torch.compile(partial(getattr(torch, function), dim=case.axis), dynamic=False)
    return lambda x, out: compiled(x)


def _prepare_cupy(function: str, case: Case) -> Call:
    import cupy
    from cupyx.scipy import special

    compute, borrowed = getattr(special, function), _borrowing(cupy.from_dlpack)
    return lambda x, out: compute(borrowed(x), axis=case.axis)


def _prepare_jax(function: str, case: Case) -> Call:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes three quarters of the card's memory
    import jax

    compiled = jax.jit(partial(getattr(jax.nn, function), axis=case.axis))
    borrowed = _borrowing(jax.dlpack.from_dlpack)
    return lambda x, out: compiled(borrowed(x))


def _borrowing(from_dlpack: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that borrows an array the first time, and knows it by its address afterwards."""
    known: dict[int, Any] = {}

    def borrowed(x: Any) -> Any:
        address = x.data_ptr()
        if address not in known:
            known[address] = from_dlpack(x)
        return known[address]

    return borrowed


def _prepare_triton(function: str, case: Case) -> Call:
    from fastsoftmax._bench_triton import row_softmax

    if case.axis != len(case.shape) - 1:
        raise ValueError("rows of the last axis only")
    return row_softmax


PEERS = (
    Peer("fastsoftmax", "torch", _prepare_fastsoftmax),
    Peer("torch", "torch", _prepare_torch),
    Peer("torch.compile", "torch", _prepare_compiled),
    Peer("triton", "triton", _prepare_triton, functions=("softmax",)),
    Peer("cupyx", "cupyx", _prepare_cupy, "events"),
    Peer("jax", "jax", _prepare_jax, "clock"),
)


@dataclass(frozen=True, slots=True)
class CardMeasurement:
    """One contender on one case: seconds per call on the card and on the processor, the error, and how it was run."""

    function: str
    case: Case
    name: str
    seconds: float
    host_seconds: float
    max_ulps: float
    plan: Any = None

    @property
    def gigabytes_per_second(self) -> float:
        n_written = self.case.size
        if self.function == "logsumexp" and self.name != "copy":
            n_written //= self.case.shape[self.case.axis]
        return (self.case.size + n_written) * _itemsize(self.case.dtype) / self.seconds / 1e9


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for: row lengths, unless there are shapes."""
    size = QUICK_SIZE if options.quick else SIZE
    shapes = options.shapes or [f"{size // length}x{length}" for length in ROW_LENGTHS]
    dtypes = options.dtypes if options.dtypes is not None else DTYPES[:2]
    return [parse_case(shape, dtype) for dtype in dtypes for shape in shapes]


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark that the options describe; print its table, write its files.

    Returns 1 if fastsoftmax failed in a case, else 0.
    """
    if options.threads:
        parser.error("argument --threads: a card is not shared out by threads")
    if find_spec("torch") is None:
        parser.error("--device cuda needs torch, whose arrays and events it uses")
    try:
        select_on_gpu()
    except fastsoftmax.BackendUnavailableError as error:
        parser.error(str(error))
    for path in filter(None, (options.json, options.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    import torch

    card = {
        "name": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size,
    }
    print(f"fastsoftmax {fastsoftmax.__version__}, {card['name']}, driver {card['driver']}")
    print(
        f"{'function':12}{'dtype':9}{'shape@axis':18}{'contender':15}"
        f"{'GB/s':>8}{'of copy':>9}{'us':>10}{'host us':>9}{'ULP':>7}"
    )
    n_samples = options.rounds or N_SAMPLES
    measurements: list[CardMeasurement] = []
    failed = False
    for function in options.functions:
        for case in cases_of(options):
            found = measure(function, case, card["l2_bytes"], n_samples)
            copy = next(one.gigabytes_per_second for one in found if one.name == "copy")
            for one in found:
                print(_row(one, copy), flush=True)
            failed |= all(one.name != "fastsoftmax" for one in found)
            measurements += found
    if options.json:
        document = {
            "card": card,
            "versions": _info.versions(),
            "parameters": {"functions": options.functions, "n_samples": n_samples},
            "measurements": [asdict(one) | {"gigabytes_per_second": one.gigabytes_per_second} for one in measurements],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        from fastsoftmax import _figure

        _figure.draw_row_lengths(measurements, f"{card['name']}, driver {card['driver']}", options.plot)
    return int(failed)


def _driver_version() -> str:
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def _row(one: CardMeasurement, copy: float) -> str:
    head = f"{one.function:12}{one.case.dtype:9}{one.case!s:18}{one.name:15}"
    figures = f"{one.gigabytes_per_second:8.0f}{one.gigabytes_per_second / copy:9.2f}{one.seconds * 1e6:10.2f}"
    return f"{head}{figures}{one.host_seconds * 1e6:9.2f}{one.max_ulps:7.2f}"


def measure(function: str, case: Case, l2_bytes: int, n_samples: int) -> list[CardMeasurement]:
    """Check each contender that is installed on one case, and time it; a copy first."""
    import torch

    dtype, n_bytes = getattr(torch, case.dtype), case.size * _itemsize(case.dtype)
    n_sets = max(1, -(-CACHE_MULTIPLE * l2_bytes // (2 * n_bytes)))
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(case.shape, dtype=dtype, device="cuda", generator=generator) for _ in range(n_sets)]
    copies = [torch.empty_like(x) for x in inputs]
    rows = tuple(size for axis, size in enumerate(case.shape) if axis != case.axis)
    outputs = copies if function != "logsumexp" else [x.new_empty(rows) for x in inputs]

    def copy(x: Any, out: Any) -> None:
        out.copy_(x)

    seconds, host = _device_seconds(copy, inputs, copies, "graph", n_samples), _host_seconds(copy, inputs, copies)
    found = [CardMeasurement(function, case, "copy", seconds, host, 0.0)]
    for peer in PEERS:
        if find_spec(peer.module) is None or function not in peer.functions:
            continue
        try:
            call = peer.prepare(function, case)
            outputs[0].fill_(float("nan"))
            with fastsoftmax.record_plans() as plans:
                result = call(inputs[0], outputs[0])
            result = outputs[0] if result is None else torch.from_dlpack(result)
            ulps = _max_ulps(function, inputs[0], result, case)
            seconds = _device_seconds(call, inputs, outputs, peer.timing, n_samples)
            host = _host_seconds(call, inputs, outputs)
        except Exception as error:  # a peer that cannot do a case is no reason to end
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"not timed: {peer.name}: {function} {case.dtype} {case}: {reason}")
            continue
        plan = asdict(plans[0].launch) if plans and plans[0].launch else None
        found.append(CardMeasurement(function, case, peer.name, seconds, host, ulps, plan))
    return found


def _max_ulps(function: str, x: Any, result: Any, case: Case) -> float:
    """Return the largest error of some rows against float64, in units of the result's dtype.

    Of logsumexp it is in units of the larger of the result and the maximum, which is what its last sum can tell.
    """
    lines = tuple(slice(None) if axis == case.axis else slice(CHECKED_ROWS) for axis in range(x.ndim))
    kept = tuple(line for axis, line in enumerate(lines) if axis != case.axis or function != "logsumexp")
    logits, computed = x[lines].double().cpu().numpy(), result[kept].double().cpu().numpy()
    maximum = logits.max(case.axis, keepdims=True)
    terms = np.exp(logits - maximum)
    total = terms.sum(case.axis, keepdims=True)
    if function == "logsumexp":
        expected = (maximum + np.log(total)).reshape(computed.shape)
        scale = np.maximum(abs(expected), abs(maximum).reshape(computed.shape))
    else:
        expected = terms / total if function == "softmax" else logits - maximum - np.log(total)
        scale = abs(expected)
    digits = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[case.dtype]
    smallest = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}[case.dtype]
    exponent = np.maximum(np.frexp(scale)[1] - 1, smallest)
    return float((abs(computed - expected) / np.ldexp(1.0, exponent - digits)).max())


def _device_seconds(
    call: Call, inputs: Sequence[Any], outputs: Sequence[Any], timing: Literal["graph", "events", "clock"], n: int
) -> float:
    """Return the median time of a call on the card, over n samples that go through all buffers in turn."""
    import torch

    n_calls = -(-SAMPLE_CALLS // len(inputs)) * len(inputs) if inputs[0].numel() < QUICK_SIZE else len(inputs)

    def sample() -> Any:
        result = None
        for number in range(n_calls):
            result = call(inputs[number % len(inputs)], outputs[number % len(inputs)])
        return result

    for _ in range(WARM_UP):
        sample()
    torch.cuda.synchronize()
    if timing == "clock":
        return float(median(_clocked(sample) for _ in range(n))) / n_calls
    timed: Callable[[], Any] = sample
    if timing == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sample()
        graph.replay()
        timed = graph.replay
    times = []
    for _ in range(n):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        timed()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / n_calls)
    return float(median(times))


def _clocked(sample: Callable[[], Any]) -> float:
    """Return how long a sample takes whose last result says when it is there, by JAX's word for it."""
    start = perf_counter()
    sample().block_until_ready()
    return perf_counter() - start


def _host_seconds(call: Call, inputs: Sequence[Any], outputs: Sequence[Any]) -> float:
    """Return how long a call keeps the processor, while the card has nothing to do before it."""
    import torch

    times = []
    for number in range(HOST_CALLS if inputs[0].numel() < QUICK_SIZE else N_SAMPLES):
        torch.cuda.synchronize()
        start = perf_counter()
        call(inputs[number % len(inputs)], outputs[number % len(inputs)])
        times.append(perf_counter() - start)
    torch.cuda.synchronize()
    return float(np.median(times))
