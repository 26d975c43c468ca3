"""What `make reproduce` and `make test-oldest` go by: the differences of archives, and the bounds in pyproject.toml."""

import tarfile
import zipfile

import pytest

from .reproduce import differences


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return path


def test_archives_that_are_the_same(tmp_path):
    files = {"a": "1", "b": "2"}
    assert differences(wheel(tmp_path / "1.whl", files), wheel(tmp_path / "2.whl", files)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "1", "b": "3"}, ["b"]),
        ({"a": "1"}, ["b"]),
        ({"a": "1", "b": "2", "c": ""}, ["c"]),
        ({"b": "2", "a": "1"}, ["the order, times or modes of files"]),
    ],
    ids=["content", "fewer", "more", "order"],
)
def test_archives_that_differ(tmp_path, files, expected):
    first = wheel(tmp_path / "1.whl", {"a": "1", "b": "2"})
    assert differences(first, wheel(tmp_path / "2.whl", files)) == expected


def test_source_archives_that_differ(tmp_path):
    archives = []
    for i in range(2):
        (tmp_path / "file").write_text(str(i))
        archives.append(tmp_path / f"{i}.tar.gz")
        with tarfile.open(archives[-1], "w:gz") as archive:
            archive.add(tmp_path / "file", "folder/file")
    assert differences(*archives) == ["folder/file"]


def test_the_oldest_releases_are_those_of_the_lower_bounds():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    from .oldest import PYPROJECT, oldest

    project = tomllib.loads(PYPROJECT.read_text())
    pins = dict(pin.split("==") for pin in oldest(project))
    assert set(pins) == {"meson-python", "cython", "numpy", "numba"}
    requirements = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    assert {requirement.split(",")[0] for requirement in requirements} == {
        f"{name}>={version}" for name, version in pins.items()
    }


def test_a_requirement_without_a_lower_bound_is_an_error():
    pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    from .oldest import oldest

    with pytest.raises(ValueError, match="'numpy' has no lower bound"):
        oldest({"build-system": {"requires": ["cython>=3"]}, "project": {"dependencies": ["numpy"]}})
