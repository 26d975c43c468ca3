"""The examples run, and reach what they promise."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_digits_are_read(capsys):
    pytest.importorskip("sklearn")
    accuracy = runpy.run_path(str(EXAMPLES / "digits.py"))["main"]()
    assert accuracy >= 0.95
    assert "held-out digits are read correctly" in capsys.readouterr().out


def test_texts_are_written(capsys):
    example = runpy.run_path(str(EXAMPLES / "trigrams.py"))
    example["main"]()
    assert "After 'th': 'e'" in capsys.readouterr().out
    pairs = {example["TEXT"].replace("\n", " ")[i : i + 3] for i in range(len(example["TEXT"]) - 2)}
    for text in example["write"](example["learn"](example["TEXT"]), "th", 99, np.random.default_rng(1), 3, top_k=2):
        assert len(text) == 101
        assert all(text[i : i + 3] in pairs for i in range(99))
