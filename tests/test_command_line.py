"""``python -m fastsoftmax info`` and ``bench``, as a user runs them, and how the benchmark judges its contenders."""

import json
import os
import platform
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _bench

BENCH = ("bench", "--quick", "--threads", "1", "--dtypes", "float32", "--shapes", "7,6x5@0")


def run(*arguments, **variables):
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FASTSOFTMAX_")}
    return subprocess.run(
        [sys.executable, "-m", "fastsoftmax", *arguments],
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_info_reports_versions_backends_and_threads():
    finished = run("info", FASTSOFTMAX_NUM_THREADS="3")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in finished.stdout.splitlines() if line.startswith("  ")}
    assert lines["numpy"] == ["available"]
    assert lines["python"] == [platform.python_version()]
    assert lines["fastsoftmax"] == [fastsoftmax.__version__]
    assert lines["threads"] == lines["FASTSOFTMAX_NUM_THREADS"] == ["3"]
    for name in ("cython", "numba", "cuda"):
        assert (lines[name][0] == "available") == (name in fastsoftmax.available_backends())


def test_info_names_the_tiers_of_the_compiled_backend():
    compiled = pytest.importorskip("fastsoftmax.backends.compiled", exc_type=ImportError)
    assert f"in use: {compiled.active_tier()}" in run("info", FASTSOFTMAX_ISA=compiled.active_tier()).stdout
    refused = run("info", FASTSOFTMAX_ISA="sse9")
    assert refused.returncode == 0
    assert "not available: FASTSOFTMAX_ISA must be one of" in refused.stdout
    assert run(*BENCH, FASTSOFTMAX_ISA="sse9").returncode == 2


@pytest.mark.parametrize(("variable", "text"), [("FASTSOFTMAX_NUM_THREADS", "none"), ("FASTSOFTMAX_BACKEND", "blas")])
def test_info_survives_what_the_environment_forces_wrongly(variable, text):
    finished = run("info", **{variable: text})
    assert finished.returncode == 0
    assert f"error: {variable} must be" in finished.stdout


@pytest.fixture(scope="module", params=["svg", "png"])
def bench(request, tmp_path_factory):
    """A finished run of ``bench``, with the path of its JSON file and of its figure."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench") / "made"
    record, figure = folder / "bench.json", folder / f"bench.{request.param}"
    return run(*BENCH, "--json", str(record), "--plot", str(figure)), record, figure


def test_bench_prints_a_row_for_each_case_and_its_progress_apart(bench):
    finished, _, _ = bench
    assert finished.returncode == 0, finished.stderr
    rows = [line.split() for line in finished.stdout.splitlines() if line.startswith("float32")]
    assert [row[1] for row in rows] == ["7", "6x5@0"]
    header = next(line for line in finished.stdout.splitlines() if line.startswith("dtype")).split()
    assert len(rows[0][: len(header) - 2]) == len(header) - 2  # "served by" is two words
    assert "[2/2] softmax float32 6x5@0" in finished.stderr
    assert "[2/2]" not in finished.stdout


def test_bench_accounts_for_every_contender(bench):
    finished, record, _ = bench
    measured = set(json.loads(record.read_text())["measurements"][0]["timings"]) | {"copy:torch"}  # needs two threads
    for contender in _bench.CONTENDERS:
        assert contender.name in measured or f"not measured: {contender.name}: " in finished.stdout


def test_bench_writes_what_it_measured(bench):
    _, record, _ = bench
    document = json.loads(record.read_text())
    assert document["machine"]["cores"] == os.cpu_count()
    assert document["versions"]["numpy"] == np.__version__
    assert document["parameters"] == {"functions": ["softmax"], "n_threads": 1, "n_rounds": _bench.QUICK_ROUNDS}
    for measurement, shape, axis in zip(document["measurements"], ([7], [6, 5]), (0, 0), strict=True):
        assert measurement["case"] == {"shape": shape, "axis": axis, "dtype": "float32"}
        assert measurement["excluded"] == {}
        assert measurement["choice"]["backend"] in fastsoftmax.available_backends()
        for backend in fastsoftmax.available_backends():
            assert measurement["plans"][f"fastsoftmax:{backend}"]["backend"] == backend
        for name, timing in measurement["timings"].items():
            assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"] < 1
            assert timing["calls_per_sample"] >= 1, name
            assert timing["n_samples"] >= _bench.QUICK_ROUNDS, name


def test_bench_draws_a_figure_in_the_format_of_its_suffix(bench):
    _, _, figure = bench
    content = figure.read_bytes()
    if figure.suffix == ".svg":
        assert ElementTree.fromstring(content).tag.endswith("svg")
    else:
        assert content.startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--functions", "softmin"), "argument --functions: 'softmin' is not one of softmax, log_softmax, logsumexp"),
        (("--dtypes", "float16"), "argument --dtypes: on the processor float32 and float64 are compared"),
        (("--shapes", "64y10"), "argument --shapes: '64y10' is not a shape such as"),
        (("--shapes", "8x0"), "argument --shapes: '8x0' has a size below 1"),
        (("--shapes", "8x8@2"), "argument --shapes: '8x8@2' has no axis 2"),
        (("--threads", "0"), "argument --threads: '0' is not a positive integer"),
        (("--rounds", "1.5"), "argument --rounds: '1.5' is not a positive integer"),
        (("--plot", "figure.docx"), "argument --plot: 'figure.docx' must end in .svg or .png"),
        (("--fast",), "unrecognized arguments: --fast"),
    ],
)
def test_bench_refuses_an_argument_by_name_before_it_measures(arguments, message):
    finished = run("bench", *arguments)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert finished.stdout == ""


def test_bench_refuses_what_the_environment_forces_wrongly():
    finished = run(*BENCH, FASTSOFTMAX_BACKEND="blas")
    assert finished.returncode == 2
    assert "FASTSOFTMAX_BACKEND must be one of" in finished.stderr


def test_a_command_is_required():
    finished = run()
    assert finished.returncode == 2
    assert "info" in finished.stderr
    assert "bench" in finished.stderr


def test_a_contender_that_is_wrong_or_fails_is_named_and_not_timed(monkeypatch):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")  # preparing a call sets it; this puts it back

    def fail():
        raise OSError("no such library")

    shifted = _bench.Contender("shifted", "peer", lambda: None, lambda f, x, axis, n: lambda: np.full_like(x, 0.5))
    broken = _bench.Contender("broken", "peer", lambda: None, lambda f, x, axis, n: fail)
    absent = _bench.Contender("absent", "peer", lambda: None, lambda f, x, axis, n: None)
    right = next(contender for contender in _bench.CONTENDERS if contender.name == "numpy")
    contenders = [shifted, broken, absent, right]
    measurement = _bench.measure("softmax", _bench.Case((9,), 0, "float64"), contenders, 1, 1, lambda step: None)
    assert list(measurement.timings) == ["numpy"]
    assert measurement.excluded["shifted"].startswith("wrong: off by")
    assert measurement.excluded["broken"] == "failed: OSError: no such library"
    row = _bench.table_row(measurement, [contender.name for contender in contenders]).split()
    assert row[2:5] == ["wrong", "failed", "-"]


def test_errors_count_units_in_the_last_place():
    expected = np.array([1.0, 0.25])
    result = np.array([1.0, np.nextafter(np.nextafter(np.float32(0.25), np.float32(1)), np.float32(1))], np.float32)
    assert _bench.error_in_ulp(result, expected) == 2
    assert _bench.error_in_ulp(result, expected, expected * 4) == 0.5
    assert np.isnan(_bench.error_in_ulp(np.array([np.nan, 0.25], np.float32), expected))
