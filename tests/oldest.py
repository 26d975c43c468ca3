"""The oldest releases that pyproject.toml admits for the build and the package, as constraints for pip.

``python tests/oldest.py`` prints them; it needs Python 3.11.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest(project: dict[str, Any]) -> list[str]:
    """Return ``name==version`` for each requirement of the build and of the package.

    Raises
    ------
    ValueError
        If a requirement has no lower bound.
    """
    pins = {}
    for requirement in [*project["build-system"]["requires"], *project["project"]["dependencies"]]:
        if not (found := re.match(r"([\w.-]+)>=([\w.]+)", requirement)):
            raise ValueError(f"{requirement!r} has no lower bound")
        pins[found[1]] = found[2]
    return [f"{name}=={version}" for name, version in pins.items()]


if __name__ == "__main__":
    import tomllib

    print(*oldest(tomllib.loads(PYPROJECT.read_text())), sep="\n")
