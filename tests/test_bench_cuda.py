"""The benchmark for cards, as far as it goes without one."""

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from time import perf_counter
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _bench, _bench_cuda, _figure
from fastsoftmax._bench_cuda import CardMeasurement

BENCH = [sys.executable, "-m", "fastsoftmax", "bench", "--device", "cuda"]


def options(*arguments):
    parser = argparse.ArgumentParser()
    _bench.add_arguments(parser)
    return parser.parse_args(["--device", "cuda", *arguments])


def test_without_a_card_or_torch_it_says_what_is_missing():
    done = subprocess.run([*BENCH, "--quick"], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 0:
        pytest.skip("there is a card")
    assert done.returncode == 2
    assert "needs torch" in done.stderr or "backend 'cuda' is not available" in done.stderr


def test_cases_are_row_lengths_of_equal_size():
    cases = _bench_cuda.cases_of(options())
    assert {case.size for case in cases} == {2**28}
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert max(case.shape[1] for case in cases) == 262_144
    assert [str(case) for case in _bench_cuda.cases_of(options("--shapes", "8x9@0", "--dtypes", "float16"))] == [
        "8x9@0"
    ]


def test_bandwidth_counts_bytes_once():
    case = _bench.parse_case("1000x1000", "bfloat16")
    gigabytes = {
        (function, name): CardMeasurement(function, case, name, 1e-3, 0.0, 0.0).gigabytes_per_second
        for function in ("softmax", "logsumexp")
        for name in ("copy", "torch")
    }
    assert gigabytes["softmax", "torch"] == gigabytes["softmax", "copy"] == pytest.approx(4.0)
    assert gigabytes["logsumexp", "copy"] == pytest.approx(4.0)
    assert gigabytes["logsumexp", "torch"] == pytest.approx(2.002)


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    measurements = [
        CardMeasurement(function, _bench.parse_case(f"4x{length}", dtype), name, length * 1e-9, 0.0, 0.0)
        for function in ("softmax", "logsumexp")
        for dtype in ("float32", "bfloat16")
        for name in ("copy", "fastsoftmax", "torch")
        for length in (256, 512)
    ]
    _figure.draw_row_lengths(measurements, "a card", tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.count("<path") > 40
    assert text.count("<!-- logsumexp, bfloat16 -->") == 1


# A run of the whole command, with stand-ins for the card, for the libraries and for the backend: arrays in main memory
# that answer to what is asked of Torch's.


class Tensor:
    is_cuda = True

    def __init__(self, elements):
        self.elements = np.asarray(elements)

    shape = property(lambda self: self.elements.shape)
    ndim = property(lambda self: self.elements.ndim)

    def numel(self):
        return self.elements.size

    def data_ptr(self):
        return self.elements.ctypes.data

    def new_empty(self, shape):
        return Tensor(np.empty(shape, self.elements.dtype))

    def copy_(self, other):
        self.elements[...] = other.elements

    def fill_(self, value):
        self.elements.fill(value)

    def __getitem__(self, key):
        return Tensor(self.elements[key])

    def double(self):
        return Tensor(self.elements.astype(np.float64))

    def cpu(self):
        return self

    def numpy(self):
        return self.elements

    def block_until_ready(self):
        events.append("waited")


events = []


def compute(function, x, axis, out=None):
    result = getattr(fastsoftmax, function)(x.elements, axis, backend="numpy")
    if out is None:
        return Tensor(result)
    out.elements[...] = result
    return out


class Generator:
    def __init__(self, device):
        assert device == "cuda"

    def manual_seed(self, seed):
        return np.random.default_rng(seed)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        events.append("event")
        return (end.time - self.time) * 1e3


class Graph:
    def replay(self):
        events.append("replay")


def library(name, **members):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    return module


class TritonKernel:
    def __init__(self, function):
        assert function.__name__ == "_kernel"

    def __getitem__(self, grid):
        def launch(x, out, n_cols, BLOCK, num_warps):
            assert grid == (x.numel() // n_cols,)
            assert n_cols <= BLOCK
            compute("softmax", x, -1, out)

        return launch


@pytest.fixture
def card(monkeypatch):
    """All contenders, none of them fast."""
    functions = {name: partial(compute, name) for name in ("softmax", "log_softmax", "logsumexp")}
    by_dim = {
        name: lambda x, axis=None, dim=None, out=None, f=f: f(x, axis if dim is None else dim, out)
        for name, f in functions.items()
    }
    properties = SimpleNamespace(L2_cache_size=2**14)
    cuda = SimpleNamespace(
        Event=Event, CUDAGraph=Graph, graph=lambda graph: nullcontext(), synchronize=lambda: None,
        get_device_name=lambda: "stand-in", get_device_properties=lambda device: properties,
    )  # fmt: skip
    torch = library(
        "torch", cuda=cuda, Generator=Generator, float32=np.float32, float16=np.float16, **by_dim,
        randn=lambda shape, dtype, device, generator: Tensor(generator.normal(size=shape).astype(dtype)),
        empty_like=lambda x: x.new_empty(x.shape), compile=lambda f, dynamic: f, from_dlpack=lambda x: x,
    )  # fmt: skip
    special = library("cupyx.scipy.special", **functions)
    jax = library(
        "jax", jit=lambda f: f, nn=SimpleNamespace(**functions), dlpack=SimpleNamespace(from_dlpack=lambda x: x)
    )
    language = library("triton.language", constexpr=None)
    triton = library("triton", jit=TritonKernel, language=language, next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    modules = [torch, special, jax, triton, language, library("cupy", from_dlpack=lambda x: x)]
    modules += [library("cupyx"), library("cupyx.scipy", special=special)]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "fastsoftmax._bench_triton", raising=False)
    backend = SimpleNamespace(compute=lambda function, x, axis, out, *rest, **named: compute(function, x, axis, out))
    for place in ("fastsoftmax._api", "fastsoftmax._bench_cuda"):
        monkeypatch.setattr(f"{place}.select_on_gpu", lambda argument=None: backend)
    monkeypatch.setattr(_bench_cuda, "_driver_version", lambda: "13.0")
    monkeypatch.setattr(_bench_cuda, "HOST_CALLS", 3)
    monkeypatch.setattr(_bench_cuda, "SAMPLE_CALLS", 2)
    events.clear()
    yield
    sys.modules.pop("fastsoftmax._bench_triton", None)


def test_a_run_with_every_contender(card, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    parser, json_path, figure = argparse.ArgumentParser(), tmp_path / "gpu.json", tmp_path / "gpu.svg"
    _bench.add_arguments(parser)
    arguments = ["--functions", "softmax,logsumexp", "--shapes", "6x40,9x8@0", "--dtypes", "float32,float16"]
    arguments += ["--rounds", "2", "--device", "cuda", "--json", str(json_path), "--plot", str(figure)]
    assert _bench.run(parser.parse_args(arguments), parser) == 0
    printed = capsys.readouterr().out
    assert "stand-in, driver 13.0" in printed
    assert "not timed: triton: softmax float32 9x8@0: ValueError: rows of the last axis only" in printed
    document = json.loads(json_path.read_text())
    assert document["card"]["l2_bytes"] == 2**14
    assert document["parameters"] == {"functions": ["softmax", "logsumexp"], "n_samples": 2}
    by_case = {}
    for one in document["measurements"]:
        by_case.setdefault((one["function"], one["case"]["dtype"], one["case"]["axis"]), []).append(one)
        assert one["seconds"] > 0 and one["host_seconds"] > 0 and one["gigabytes_per_second"] > 0
        assert one["max_ulps"] < {"float32": 100, "float16": 0.6}[one["case"]["dtype"]]
    everybody = ["copy", "fastsoftmax", "torch", "torch.compile", "triton", "cupyx", "jax"]
    for (function, _, axis), found in by_case.items():
        has_triton = function == "softmax" and axis == 1
        assert [one["name"] for one in found] == [name for name in everybody if has_triton or name != "triton"]
    assert len(by_case) == 8
    assert {"event", "replay", "waited"} == set(events)
    assert figure.read_text().count("<!-- logsumexp, float16 -->") == 1


def test_a_failure_of_fastsoftmax_is_one_of_the_run(card, monkeypatch, capsys):
    def refuse(*arguments, **named):
        raise RuntimeError("it is raining")

    monkeypatch.setattr("fastsoftmax._api.select_on_gpu", refuse)
    assert _bench_cuda.run(options("--shapes", "6x40", "--dtypes", "float32", "--rounds", "1"), None) == 1
    assert "not timed: fastsoftmax: softmax float32 6x40: RuntimeError: it is raining" in capsys.readouterr().out


def test_sets_of_buffers_are_larger_than_the_cache(card, monkeypatch):
    sizes = []
    timing = _bench_cuda._device_seconds
    monkeypatch.setattr(
        _bench_cuda,
        "_device_seconds",
        lambda call, inputs, *rest: sizes.append(len(inputs)) or timing(call, inputs, *rest),
    )
    case = _bench.parse_case("8x64", "float32")
    _bench_cuda.measure("softmax", case, l2_bytes=2**14, n_samples=1)
    assert set(sizes) == {16}
    assert _bench_cuda.CACHE_MULTIPLE * 2**14 <= 16 * 2 * 8 * 64 * 4


def test_threads_are_refused():
    done = subprocess.run([*BENCH, "--threads", "2"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "--threads: a card is not shared out by threads" in done.stderr
