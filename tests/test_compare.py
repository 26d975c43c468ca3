"""benchmarks/compare.py and figures.py: the targets, how a measurement is held against them, and small runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _bench

ROOT = Path(__file__).parents[1]

ABSENT = "raise ImportError('not for this test')"
DEADLY = "import os\nclass SessionOptions:\n    def __init__(self):\n        os._exit(3)\n"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare, figures = load("compare"), load("figures")


def run(folder, *arguments, script="compare.py", **modules):
    """Run a script where the peers beyond NumPy and SciPy are absent, or are what ``modules`` says."""
    for name in ("torch", "onnxruntime", "jax"):
        (folder / f"{name}.py").write_text(modules.get(name, ABSENT))
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FASTSOFTMAX_")}
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env=kept | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on a few small cases, and the path of its JSON file."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ("--groups", "small-calls,import", "--function", "softmax,logsumexp", "--threads", "1", "--quick")
    record = folder / "made" / "compare.json"
    return run(folder, *arguments, "--json", str(record)), record


def test_every_target_names_cases_and_a_yardstick_that_exist():
    known = set(compare.contenders(True)) | set(compare.contenders(False))
    asked = compare.questions(compare.GROUPS, compare.FUNCTIONS, (1, 2))
    assert {question.group for question in asked} | {"import"} == set(compare.GROUPS)
    for question in asked:
        assert known.issuperset(compare.YARDSTICKS[question.yardstick])
        assert question.limit > 0
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    ("group", "function", "case", "n_threads", "yardstick", "limit"),
    [
        ("in-cache", "log_softmax", "333x777", 1, "peer", 0.60),
        ("in-cache", "log_softmax", "333x777", 2, "peer", 0.45),
        ("in-cache", "softmax", "64x1000", 2, "peer", 0.60),
        ("beyond-cache", "logsumexp", "8192x4096", 2, "read", 1.10),
        ("in-cache", "logsumexp", "100000", 1, "scipy", 0.10),
        ("other-axis", "softmax", "64x100x1000@1", 1, "copy", 1.50),
    ],
)
def test_the_limit_depends_on_the_function_and_the_threads(group, function, case, n_threads, yardstick, limit):
    asked = compare.questions([group], [function], [n_threads])
    found = [
        (one.yardstick, one.limit) for one in asked if str(one.job.case) == case and one.job.case.dtype == "float32"
    ]
    assert found == [(yardstick, limit)]


def measurement(job, plan, **seconds):
    timings = {name: _bench.Timing(time, time, time, 1, 1) for name, time in seconds.items()}
    excluded = {"jax": "failed: OSError: no such library"}
    return _bench.Measurement(job.function, job.case, job.n_threads, plan, {}, {}, excluded, timings)


@pytest.fixture
def plan():
    with fastsoftmax.record_plans() as plans:
        fastsoftmax.softmax(np.zeros(3), backend="numpy")
    return plans[0]


def test_a_ratio_up_to_the_limit_meets_the_target(plan):
    question = compare.questions(["in-cache-f64"], ["softmax"], [1])[0]
    met = compare.answer(question, measurement(question.job, plan, fastsoftmax=4.0, scipy=20.0, torch=10.0))
    assert (met.against, met.ratio, met.verdict) == ("torch", 0.4, "met")
    assert (met.served_by, met.remark) == ("numpy array/none", "jax failed")
    missed = compare.answer(question, measurement(question.job, plan, fastsoftmax=12.5, scipy=20.0, torch=10.0))
    assert (missed.peer, missed.verdict) == ("torch", "missed")
    lines = compare.summary([met, missed]).splitlines()
    assert "| in-cache-f64 | softmax | 1 | 1 | 0 |" in lines
    assert lines[-1] == "- in-cache-f64, softmax float64 64x1000 on 1: torch 0.80"


def test_what_was_not_timed_neither_meets_nor_misses_its_target(plan):
    question = compare.questions(["small-calls"], ["softmax"], [1])[0]
    alone = compare.answer(question, measurement(question.job, plan, fastsoftmax=1.0))
    failed = compare.answer(question, "OSError: no such library")
    assert alone.verdict == failed.verdict == "unmeasured"
    assert failed.remark == "OSError: no such library"
    assert "| small-calls | softmax | 0 | 0 | 2 |" in compare.summary([alone, failed])


def test_onnxruntime_is_no_yardstick_of_a_tier_it_cannot_be_held_to(plan):
    question = compare.questions(["tier-v3"], ["softmax"], [1])[0]
    line = compare.answer(question, measurement(question.job, plan, fastsoftmax=5.0, torch=10.0, onnxruntime=4.0))
    assert (line.against, line.peer, line.verdict) == ("torch", "torch", "met")
    assert "onnxruntime, not held to AVX2: 1.25" in line.remark


def test_the_yardstick_is_the_faster_copy(plan):
    question = compare.questions(["long-row"], ["softmax"], [2])[0]
    times = {"fastsoftmax": 3.0, "copy:numpy": 1.0, "copy:torch": 2.0}
    line = compare.answer(question, measurement(question.job, plan, **times))
    assert (line.against, line.ratio) == ("copy:numpy", 3.0)


def test_a_run_without_peers_fills_its_table(finished):
    process, _ = finished
    assert process.returncode == 0, process.stderr
    for peer in ("torch", "onnxruntime", "jax"):
        assert f"not measured: {peer}: not for this test" in process.stdout
    rows = [
        line for line in process.stdout.splitlines() if line.startswith(("| softmax ", "| logsumexp ", "|        "))
    ]
    assert len(rows) == 6 + 6 + 1
    assert all(" met " in row or " missed " in row for row in rows)
    assert "| small-calls | logsumexp | " in process.stdout


def test_a_run_writes_what_it_measured(finished):
    _, record = finished
    document = json.loads(record.read_text())
    assert document["parameters"]["threads"] == [1]
    assert [one["function"] for one in document["answers"]] == ["softmax"] * 6 + ["logsumexp"] * 6 + [""]
    for one in document["answers"]:
        assert one["ratio"] == one["ours"] / one["against_seconds"]
        assert one["verdict"] == ("met" if one["ratio"] <= one["limit"] else "missed")
    for one in document["answers"][:-1]:
        assert one["against"] in ("numpy", "scipy")
        assert one["served_by"].split()[0] in fastsoftmax.available_backends()
    assert len(document["measurements"]) == 12
    assert min(document["import_seconds"]) > 0


def test_a_contender_that_ends_the_process_costs_its_rows_alone(tmp_path):
    arguments = ("--groups", "small-calls", "--function", "softmax", "--threads", "1", "--quick")
    process = run(tmp_path, *arguments, onnxruntime=DEADLY)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("BrokenProcessPool") == 6
    assert "| small-calls | softmax | 0 | 0 | 6 |" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--groups", "small"), "argument --groups: 'small' is not one of small-calls, "),
        (("--function", "softmin"), "argument --function: 'softmin' is not one of softmax, log_softmax, logsumexp"),
        (("--threads", "1,0"), "argument --threads: '0' is not a positive integer"),
    ],
)
def test_an_argument_is_refused_by_name_before_anything_is_measured(tmp_path, arguments, message):
    process = run(tmp_path, *arguments)
    assert process.returncode == 2
    assert message in process.stderr
    assert process.stdout == ""


def test_figures_are_drawn_from_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    shapes = dict.fromkeys(figures.BANDWIDTH_SHAPES + figures.HEAT_SHAPES)
    seconds = {"fastsoftmax": 1e-3, "numpy": 2e-3, "copy:numpy": 5e-4}
    document = {
        "machine": {"cpu": "any", "private_cache_bytes": 2**20, "last_level_cache_bytes": 2**25},
        "n_threads": 1,
        "measurements": [{"shape": shape, "seconds": seconds} for shape in shapes],
    }
    source = tmp_path / "figures.json"
    source.write_text(json.dumps(document))
    process = run(tmp_path, "--from", str(source), "--folder", str(tmp_path), script="figures.py")
    assert process.returncode == 0, process.stderr
    for name in ("bandwidth", "speedup"):
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_figures_measure_what_they_draw(monkeypatch):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "1")  # preparing a call sets it; this puts it back
    monkeypatch.setattr(figures, "BANDWIDTH_SHAPES", ((1, 8),))
    monkeypatch.setattr(figures, "HEAT_SHAPES", ((1, 8), (4, 4)))
    monkeypatch.setattr(
        figures, "CONTENDERS", [one for one in figures.CONTENDERS if "numpy" in one.name or one is figures.OURS]
    )
    measured = json.loads(json.dumps(figures.measure(1)))["measurements"]
    assert [one["shape"] for one in measured] == [[1, 8], [4, 4]]
    for one in measured:
        assert set(one["seconds"]) == {"fastsoftmax", "numpy", "copy:numpy"}
        assert figures.speedup(one["seconds"]) == one["seconds"]["numpy"] / one["seconds"]["fastsoftmax"]
