"""The benchmark for cards, as far as it goes without one."""

import argparse
import subprocess
import sys

import pytest

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
    assert CardMeasurement(case, "copy", 1e-3, 0.0, 0.0).gigabytes_per_second == pytest.approx(4.0)


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    measurements = [
        CardMeasurement(_bench.parse_case(f"4x{length}", dtype), name, length * 1e-9, 0.0, 0.0)
        for dtype in ("float32", "bfloat16")
        for name in ("copy", "fastsoftmax", "torch")
        for length in (256, 512)
    ]
    _figure.draw_row_lengths(measurements, "a card", tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.count("<path") > 20
