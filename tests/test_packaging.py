"""What reaches a user: the source archive, the wheel built from it, and that wheel in an environment of its own."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Run where neither the source tree nor this environment can be imported. float64 stands in for the exact result: its
# own error is far below half an ULP of float32.
USE_PACKAGE = """
import json
from importlib.metadata import version

import numpy as np

import fastsoftmax
from fastsoftmax.backends import compiled

x = np.random.default_rng(0).normal(0, 10, (7, 1000)).astype(np.float32)
terms = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
expected = (terms / terms.sum(axis=1, keepdims=True)).astype(np.float32)


def check(backend):
    with fastsoftmax.record_plans() as plans:
        result = fastsoftmax.softmax(x, axis=1, backend=backend)
    np.testing.assert_array_max_ulp(result, expected, maxulp=2)
    return plans[0].backend, plans[0].isa


ran = [check(backend) for backend in fastsoftmax.available_backends() if backend != "cython"]
for tier in compiled.tiers():
    with compiled.use_tier(tier):
        ran.append(check("cython"))
assert fastsoftmax.__version__ == version("fastsoftmax")
print(json.dumps({"file": fastsoftmax.__file__, "ran": ran, "tiers": compiled.tiers()}))
"""

CIMPORT_ROWS = """
from fastsoftmax.cython_softmax cimport (
    log_softmax_f32, log_softmax_f64, logsumexp_f32, logsumexp_f64, softmax_f32, softmax_f64,
)


def apply_f32(const float[::1] x, float[::1] probabilities, float[::1] logarithms):
    cdef float total
    with nogil:
        softmax_f32(&x[0], &probabilities[0], x.shape[0])
        log_softmax_f32(&x[0], &logarithms[0], x.shape[0])
        total = logsumexp_f32(&x[0], x.shape[0])
    return total


def apply_f64(const double[::1] x, double[::1] probabilities, double[::1] logarithms):
    cdef double total
    with nogil:
        softmax_f64(&x[0], &probabilities[0], x.shape[0])
        log_softmax_f64(&x[0], &logarithms[0], x.shape[0])
        total = logsumexp_f64(&x[0], x.shape[0])
    return total
"""

USE_CIMPORT = """
import cimport_rows
import numpy as np

for dtype, apply in ((np.float32, cimport_rows.apply_f32), (np.float64, cimport_rows.apply_f64)):
    x = np.random.default_rng(0).normal(0, 10, 1003).astype(dtype)
    exact = x.astype(np.longdouble)
    total = np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    probabilities, logarithms = np.empty_like(x), np.empty_like(x)
    result = apply(x, probabilities, logarithms)
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(probabilities, np.exp(exact - total), rtol=tolerance, atol=0)
    np.testing.assert_allclose(logarithms, exact - total, rtol=tolerance, atol=0)
    np.testing.assert_allclose(result, total, rtol=tolerance, atol=0)
"""


class Archives(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Build the source archive, and the wheel from it alone, with the build requirements that pyproject.toml names.

    With two of the four tiers and at -O1, the compiler takes a sixth of the time that it takes for what the other tests
    run. `make reproduce` tries the whole wheel.
    """
    source = tmp_path_factory.mktemp("source") / "fastsoftmax"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, source, ignore=lambda folder, names: ignored(folder, names) - {".gitignore"})
    # Meson archives what is committed: a commit of the copy stands for the working tree as it is now.
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    run(*git, "init", cwd=source)
    run(*git, "add", ".", cwd=source)
    run(*git, "commit", "--message", "The working tree", cwd=source)
    quickly = [f"--config-setting=setup-args={option}" for option in ("-Doptimization=1", "-Dtiers=x86_64_v3")]
    run(sys.executable, "-m", "build", *quickly, "--outdir", source / "dist", source, cwd=source)
    (sdist,), (wheel,) = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    return Archives(sdist, wheel)


@pytest.fixture(scope="session")
def clean_python(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, what the wheel requires, and Cython to compile against it; nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", archives.wheel, "cython", "setuptools", cwd=folder)
    return python


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command as if in a fresh shell; return what it prints, or fail with all of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTSOFTMAX", "GIT_"))}
    done = subprocess.run(command, cwd=cwd, env=kept, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sdist_holds_what_the_project_needs(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "Makefile", "README.md", "meson.build", "pyproject.toml"} <= names
    assert {"docs/method.md", "examples/digits.py", "tests/test_packaging.py"} <= names
    assert any(name.startswith("src_cython/") and name.endswith(".pyx") for name in names)


def test_wheel_holds_the_package_and_nothing_else(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(metadata_name).decode()
    assert {name.split("/")[0] for name in names} == {"fastsoftmax", metadata_name.split("/")[0]}
    assert {Path(name).suffix for name in names if name.startswith("fastsoftmax/")} == {".py", ".pxd", ".so", ".typed"}
    assert {"fastsoftmax/py.typed", "fastsoftmax/cython_softmax.pxd"} <= set(names)
    assert any("/licenses/" in name and name.endswith("LICENSE") for name in names)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastsoftmax").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    extras = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")}
    assert extras == {"bench", "cuda", "cuda12", "dev", "peers", "test"}


def test_installed_wheel_computes_on_every_backend_and_tier(clean_python: Path, tmp_path: Path) -> None:
    report = json.loads(run(clean_python, "-W", "error", "-c", USE_PACKAGE, cwd=tmp_path))
    assert Path(report["file"]).is_relative_to(clean_python.parents[1])
    assert report["tiers"]
    expected = [["numba", None], ["numpy", None], *(["cython", tier] for tier in report["tiers"])]
    assert sorted(report["ran"], key=str) == sorted(expected, key=str)


def test_installed_wheel_tells_about_itself(clean_python: Path, tmp_path: Path) -> None:
    text = run(clean_python, "-m", "fastsoftmax", "info", cwd=tmp_path)
    assert {"cython", "numba", "numpy"} <= set(text.replace(":", " ").replace(",", " ").split())


def test_cython_code_can_cimport_the_installed_kernels(clean_python: Path, tmp_path: Path) -> None:
    (tmp_path / "cimport_rows.pyx").write_text(CIMPORT_ROWS)
    (tmp_path / "use_cimport.py").write_text(USE_CIMPORT)
    run(clean_python, "-m", "Cython.Build.Cythonize", "-3", "--inplace", "cimport_rows.pyx", cwd=tmp_path)
    run(clean_python, "use_cimport.py", cwd=tmp_path)


@pytest.mark.parametrize(
    "document", ["README.md", "docs/backends.md", "docs/derivatives.md", "docs/selection.md", "docs/streaming.md"]
)
def test_documents_show_what_happens(document: str) -> None:
    result = doctest.testfile(str(ROOT / document), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0
