"""Whether what is released can be built again, byte for byte: ``python -m tests.reproduce``.

The last commit is cloned to two folders, and the source archive, and the wheel from it, are built in each. Both pairs
must be the same. The wheel is then repaired for other distributions by auditwheel, which vendors what it needs and
names the oldest C library that it runs with, installed to an environment of its own, and used there on every backend
and tier.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "reproduce"

# As different as paths can be, so that one that got into a result shows.
CLONES = ("one", "a/longer/path to the same")


class Built(NamedTuple):
    sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command without what is set for Python and for the package; print its output if it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTSOFTMAX"))}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path, time: str, options: list[str]) -> Built:
    """Clone the last commit and build it, as if at a time."""
    run("git", "clone", "--quiet", ROOT, folder)
    settings = [f"--config-setting=setup-args={option}" for option in options]
    run(sys.executable, "-m", "build", "--no-isolation", *settings, cwd=folder, SOURCE_DATE_EPOCH=time)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return Built(sdist, wheel)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def members(archive: Path) -> Iterator[tuple[str, str]]:
    """The files in an archive, with their digests."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, digest(wheel.read(name))) for name in wheel.namelist())
        return
    with tarfile.open(archive) as sdist:
        for member in sdist.getmembers():
            if (file := sdist.extractfile(member)) is not None:
                yield member.name, digest(file.read())


def differences(first: Path, second: Path) -> list[str]:
    """Return what differs between two archives, empty if no byte does: files, or else what is told of them."""
    if first.read_bytes() == second.read_bytes():
        return []
    files, others = dict(members(first)), dict(members(second))
    names = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
    return names or ["the order, times or modes of files"]


def smoke_test(python: Path) -> dict[str, object]:
    """Use an installed package where the source tree cannot be imported."""
    from .test_packaging import USE_PACKAGE

    report: dict[str, object] = json.loads(run(python, "-W", "error", "-c", USE_PACKAGE, cwd=FOLDER))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reproduce", description=__doc__)
    parser.add_argument("--setup", action="append", default=[], help="an option for Meson, such as -Doptimization=1")
    arguments = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    time = run("git", "log", "-1", "--format=%ct").strip()
    first, second = (build(FOLDER / clone, time, arguments.setup) for clone in CLONES)
    differs = False
    for one, other in zip(first, second, strict=True):
        found = differences(one, other)
        differs = differs or bool(found)
        print(f"{one.name}: {f'differs in {found}' if found else f'twice the same, sha256 {digest(one.read_bytes())}'}")
    if differs:
        return 1
    wheel = first.wheel
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        run("auditwheel", "repair", "--wheel-dir", FOLDER / "repaired", wheel, SOURCE_DATE_EPOCH=time)
        (wheel,) = (FOLDER / "repaired").glob("*.whl")
        print(run("auditwheel", "show", wheel).strip())
    else:
        print("not repaired: auditwheel is for Linux with glibc")
    venv.create(FOLDER / "fresh", with_pip=True)
    python = FOLDER / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    print(f"{wheel.name} computes: {smoke_test(python)['ran']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
