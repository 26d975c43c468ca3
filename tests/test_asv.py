"""The asv suite is found, its signatures agree with its parameters, and each of its benchmarks runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# One small case of each benchmark; asv matches these against "module.Class.method('parameter', ...)".
SMALL_CASES = (
    r"speed\.InCache.*\('softmax', 'float32 64x1000', 'fastsoftmax:numpy'",
    r"speed\.BeyondCache.*\('softmax', 'float32 100000x128', 'fastsoftmax:cython'",
    r"speed\.LongRow.*\('logsumexp', 'float64 5000000', 'fastsoftmax:cython'",
    r"speed\.TinyRows.*\('softmax', 'float32 300000x37', 'fastsoftmax:cython'",
    r"speed\.OtherAxis.*\('log_softmax', 'float32 64x100x1000@1', 'fastsoftmax:cython'",
    r"speed\.LowPrecision.*\('softmax', 'float16 1024x1024', 'fastsoftmax:cython'",
    r"options\.Options.*\('softmax', '10', 'where and temperature', 'numpy'",
    r"options\.Weighted.*\('100000x3', 'b and where', 'cython'",
    r"gradients\.Derivatives.*\('softmax', '64x1000', 'float32', 'numpy'",
    r"gradients\.Jacobian.*\('1000x10', 'float64', 'fastsoftmax'",
    r"gradients\.CrossEntropy.*\('64x1000', 'gradient', 'numpy'",
    r"selection\.TopK.*\('64x1000', 5, 'numpy'",
    r"selection\.Sample.*\('64x1000', 'top_p', 'cython'",
    r"streaming\.Streaming.*\('normalize', '1024x1024', 'cython'",
    r"streaming\.Streaming.*\('merge', '1024x1024', 'numba'",
    r"streaming\.Variants.*\('softmin', '64x1000', 'cython'",
    r"overhead\.SmallCall.*\('10', 'float64', 'scipy'",
    r"overhead\.Import.*\('numpy'",
    r"bandwidth\.Bandwidth.*\('100000x128', 'float32', 1, 'copy:numpy'",
    r"accuracy\.Error.*\('softmax', 'normal', 'float32', 'fastsoftmax:numpy'",
    r"memory\.Peak.*\('softmax', '4096x4096', 'numpy'",
)


@pytest.fixture(scope="module")
def asv(tmp_path_factory):
    """Run asv with the project's suite, results and machine file in a folder that goes away."""
    pytest.importorskip("asv", reason="asv is not installed: pip install 'fastsoftmax[bench]'")
    folder = tmp_path_factory.mktemp("asv")
    shutil.copy(ROOT / "asv.json", folder)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").symlink_to(ROOT / "tests")  # whose inputs and exact results accuracy.py takes
    # asv drops PYTHONPATH, which the package may be imported from, unless it is told so.
    environment = os.environ | {"HOME": str(folder), "ASV_PYTHONPATH": os.environ.get("PYTHONPATH", "")}

    def run(*arguments):
        command = [sys.executable, "-m", "asv", "--config", "asv.json", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    assert run("machine", "--yes").returncode == 0
    return run


def test_every_benchmark_takes_its_parameters(asv):
    finished = asv("check")
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_each_benchmark_runs(asv):
    finished = asv("run", "--quick", "--dry-run", "--show-stderr", "--bench", "|".join(SMALL_CASES))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for case in SMALL_CASES:
        name = case.partition(".*")[0].replace("\\", "")
        line = next(line for line in finished.stdout.splitlines() if f"··· {name}." in line)
        assert line.split()[-1] != "failed", finished.stdout
