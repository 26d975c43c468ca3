"""Time the CUDA backend beside its peers on a card: ``python -m fastsoftmax bench --device cuda``.

Every contender computes the same data, in sets of buffers that are larger together than the L2 cache is, in turn. What
Torch can capture is timed as the replay of a graph, so that no launch waits for Python; the others are timed by events
around a run of calls. The time that a call takes on the processor stands beside it. A copy on the device, measured in
the same way in the same run, is what the memory allows.
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
from typing import Any

import numpy as np

import fastsoftmax
from fastsoftmax import _info
from fastsoftmax._bench import Case, parse_case
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
    """One way to compute: ``prepare(case)`` returns a function of input and output, both of Torch.

    A function that returns something has written nothing to the output, and its result is what it returned.
    """

    name: str
    module: str
    prepare: Callable[[Case], Call]
    is_captured: bool = True


def _prepare_fastsoftmax(case: Case) -> Call:
    def call(x: Any, out: Any) -> None:
        fastsoftmax.softmax(x, case.axis, out=out)

    return call


def _prepare_torch(case: Case) -> Call:
    import torch

    def call(x: Any, out: Any) -> None:
        torch.softmax(x, case.axis, out=out)

    return call


def _prepare_compiled(case: Case) -> Call:
    import torch

    compiled = torch.compile(partial(torch.softmax, dim=case.axis), dynamic=False)
    return lambda x, out: compiled(x)


def _prepare_cupy(case: Case) -> Call:
    import cupy
    from cupyx.scipy.special import softmax

    return lambda x, out: softmax(cupy.from_dlpack(x), axis=case.axis)


def _prepare_jax(case: Case) -> Call:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes three quarters of the card's memory
    import jax

    compiled = jax.jit(partial(jax.nn.softmax, axis=case.axis))
    return lambda x, out: compiled(jax.dlpack.from_dlpack(x)).block_until_ready()


def _prepare_triton(case: Case) -> Call:
    from fastsoftmax._bench_triton import row_softmax

    if case.axis != len(case.shape) - 1:
        raise ValueError("rows of the last axis only")
    return row_softmax


PEERS = (
    Peer("fastsoftmax", "torch", _prepare_fastsoftmax),
    Peer("torch", "torch", _prepare_torch),
    Peer("torch.compile", "torch", _prepare_compiled),
    Peer("triton", "triton", _prepare_triton),
    Peer("cupyx", "cupyx", _prepare_cupy, is_captured=False),
    Peer("jax", "jax", _prepare_jax, is_captured=False),
)


@dataclass(frozen=True, slots=True)
class CardMeasurement:
    """One contender on one case: seconds per call on the card and on the processor, the error, and how it was run."""

    case: Case
    name: str
    seconds: float
    host_seconds: float
    max_ulps: float
    plan: Any = None

    @property
    def gigabytes_per_second(self) -> float:
        return 2 * self.case.size * _itemsize(self.case.dtype) / self.seconds / 1e9


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for: row lengths, unless there are shapes."""
    size = QUICK_SIZE if options.quick else SIZE
    shapes = options.shapes or [f"{size // length}x{length}" for length in ROW_LENGTHS]
    dtypes = options.dtypes if options.dtypes is not None else DTYPES[:2]
    return [parse_case(shape, dtype) for dtype in dtypes for shape in shapes]


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark that the options describe; print its table, write its files."""
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
    print(f"{'dtype':9}{'shape@axis':18}{'contender':15}{'GB/s':>8}{'of copy':>9}{'us':>10}{'host us':>9}{'ULP':>7}")
    measurements: list[CardMeasurement] = []
    for case in cases_of(options):
        found = measure(case, card["l2_bytes"])
        copy = next(one.seconds for one in found if one.name == "copy")
        for one in found:
            print(_row(one, copy), flush=True)
        measurements += found
    if options.json:
        document = {
            "card": card,
            "versions": _info.versions(),
            "measurements": [asdict(one) | {"gigabytes_per_second": one.gigabytes_per_second} for one in measurements],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        from fastsoftmax import _figure

        _figure.draw_row_lengths(measurements, f"{card['name']}, driver {card['driver']}", options.plot)
    return 0


def _driver_version() -> str:
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def _row(one: CardMeasurement, copy: float) -> str:
    head = f"{one.case.dtype:9}{one.case!s:18}{one.name:15}{one.gigabytes_per_second:8.0f}{copy / one.seconds:9.2f}"
    return f"{head}{one.seconds * 1e6:10.2f}{one.host_seconds * 1e6:9.2f}{one.max_ulps:7.2f}"


def measure(case: Case, l2_bytes: int) -> list[CardMeasurement]:
    """Check each contender that is installed on one case, and time it; a copy first."""
    import torch

    dtype, n_bytes = getattr(torch, case.dtype), case.size * _itemsize(case.dtype)
    n_sets = max(1, -(-CACHE_MULTIPLE * l2_bytes // (2 * n_bytes)))
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(case.shape, dtype=dtype, device="cuda", generator=generator) for _ in range(n_sets)]
    outputs = [torch.empty_like(x) for x in inputs]

    def copy(x: Any, out: Any) -> None:
        out.copy_(x)

    seconds, host = _device_seconds(copy, inputs, outputs, True), _host_seconds(copy, inputs, outputs)
    found = [CardMeasurement(case, "copy", seconds, host, 0.0)]
    for peer in PEERS:
        if find_spec(peer.module) is None:
            continue
        try:
            call = peer.prepare(case)
            outputs[0].fill_(float("nan"))
            with fastsoftmax.record_plans() as plans:
                result = call(inputs[0], outputs[0])
            result = outputs[0] if result is None else torch.from_dlpack(result)
            ulps = _max_ulps(inputs[0], result, case)
            seconds = _device_seconds(call, inputs, outputs, peer.is_captured)
            host = _host_seconds(call, inputs, outputs)
        except Exception as error:  # a peer that cannot do a case is no reason to end
            print(f"not timed: {peer.name}: {case.dtype} {case}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        plan = asdict(plans[0].launch) if plans and plans[0].launch else None
        found.append(CardMeasurement(case, peer.name, seconds, host, ulps, plan))
    return found


def _max_ulps(x: Any, result: Any, case: Case) -> float:
    """Return the largest error of some rows against float64, in units of the result's dtype."""
    import torch

    lines = tuple(slice(None) if axis == case.axis else slice(CHECKED_ROWS) for axis in range(x.ndim))
    expected = torch.softmax(x[lines].double(), case.axis)
    digits = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[case.dtype]
    smallest = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}[case.dtype]
    exponent = torch.frexp(expected).exponent.sub(1).clamp(min=smallest)
    unit = torch.ldexp(torch.ones_like(expected), exponent - digits)
    return float(((result[lines].double() - expected).abs() / unit).max())


def _device_seconds(call: Call, inputs: Sequence[Any], outputs: Sequence[Any], is_captured: bool) -> float:
    """Return the median time of a call on the card, over samples that go through all buffers in turn."""
    import torch

    n_calls = -(-SAMPLE_CALLS // len(inputs)) * len(inputs) if inputs[0].numel() < QUICK_SIZE else len(inputs)

    def sample() -> None:
        for number in range(n_calls):
            call(inputs[number % len(inputs)], outputs[number % len(inputs)])

    for _ in range(WARM_UP):
        sample()
    torch.cuda.synchronize()
    timed = sample
    if is_captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sample()
        graph.replay()
        timed = graph.replay
    times = []
    for _ in range(N_SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        timed()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / n_calls)
    return float(median(times))


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
