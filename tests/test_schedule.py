"""The facts a schedule is chosen from: the number of threads and the sizes of the caches."""

import dataclasses
import os
from pathlib import Path

import pytest

from fastsoftmax._schedule import Schedule, cache_sizes, max_threads


def test_a_schedule_is_a_value():
    assert Schedule("rows", "output") == Schedule("rows", "output", streaming=False, n_threads=1, n_blocks=1)
    assert len({Schedule("rows", "output"), Schedule("rows", "output")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule("rows", "output").n_threads = 2


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("2", 2), ("64", 64), ("007", 7)])
def test_number_of_threads_from_the_environment(monkeypatch, text, number):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", text)
    assert max_threads() == number


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", " ", "1e3", "+2", "²"])
def test_anything_but_a_positive_integer_is_refused(monkeypatch, text):
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", text)
    with pytest.raises(ValueError, match="FASTSOFTMAX_NUM_THREADS must be a positive integer, not"):
        max_threads()


def test_number_of_threads_is_that_of_the_cores_allowed(monkeypatch):
    monkeypatch.delenv("FASTSOFTMAX_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert max_threads() == 3
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "")
    assert max_threads() == 3


def test_number_of_threads_where_affinity_is_unknown(monkeypatch):
    monkeypatch.delenv("FASTSOFTMAX_NUM_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert max_threads() == 1


def test_cache_sizes():
    caches = cache_sizes()
    assert 128 * 1024 <= caches.private <= caches.last_level
    assert caches.last_level >= 8 * 1024 * 1024


def test_cache_sizes_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/nonexistent/index0")]))
    caches = cache_sizes.__wrapped__()
    assert (caches.private, caches.last_level) == (512 * 1024, 8 * 1024 * 1024)
