"""The examples run, and reach what they promise."""

import runpy
from pathlib import Path

import pytest

DIGITS = Path(__file__).parents[1] / "examples" / "digits.py"


def test_digits_are_read(capsys):
    pytest.importorskip("sklearn")
    accuracy = runpy.run_path(str(DIGITS))["main"]()
    assert accuracy >= 0.95
    assert "held-out digits are read correctly" in capsys.readouterr().out
