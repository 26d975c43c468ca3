"""The memory of large results is used again, within a limit, and never while anybody holds it."""

import gc

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import limit_output_cache, softmax
from fastsoftmax._outputs import _DEFAULT_LIMIT, _MIN_BYTES, empty_like

output_cache = pytest.importorskip("fastsoftmax._output_cache")

FLOAT32 = np.dtype(np.float32)
LARGE = (_MIN_BYTES // 4 // 1024 + 1, 1024)  # float32: just above the limit


@pytest.fixture(autouse=True)
def empty_cache():
    limit_output_cache(0)
    limit_output_cache(_DEFAULT_LIMIT)
    yield
    limit_output_cache(0)
    limit_output_cache(_DEFAULT_LIMIT)


@pytest.fixture
def x():
    return np.zeros(LARGE, np.float32)


def address(array):
    return array.ctypes.data


def test_freed_memory_is_used_again(x):
    first = softmax(x, 1)
    place = address(first)
    assert output_cache.kept_bytes() == 0
    del first
    assert output_cache.kept_bytes() == x.nbytes
    second = softmax(x, 1)
    assert address(second) == place
    assert output_cache.kept_bytes() == 0
    assert (second == np.float32(1 / 1024)).all()


def test_memory_that_is_held_is_not_used(x):
    first = softmax(x, 1)
    view = first[5:10, ::3]
    kept = view.copy()
    del first
    assert output_cache.kept_bytes() == 0
    second = softmax(x + np.arange(1024, dtype=np.float32), 1)
    np.testing.assert_array_equal(view, kept)
    del view
    assert output_cache.kept_bytes() == x.nbytes
    del second


def test_results_are_ordinary_arrays(x):
    result = softmax(x, 1)
    assert type(result) is np.ndarray
    assert result.flags.owndata
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert result.base is None
    result.resize((3, 1024), refcheck=False)
    assert (result == np.float32(1 / 1024)).all()
    result.resize(LARGE, refcheck=False)
    assert (result[3:] == 0).all()
    del result
    assert output_cache.kept_bytes() == x.nbytes


def test_memory_order_is_that_of_the_input(x):
    assert softmax(np.asfortranarray(x), 0).flags.f_contiguous


def test_small_results_are_left_to_numpy():
    result = softmax(np.zeros((1000, 1000), np.float32), 1)
    del result
    assert output_cache.kept_bytes() == 0


def test_other_arrays_are_left_to_numpy(x):
    del x
    softmax(np.zeros(LARGE, np.float32), 1)
    before = output_cache.kept_bytes()
    other = np.empty(LARGE, np.float32)
    del other
    assert output_cache.kept_bytes() == before


def test_a_failing_allocation_leaves_numpys_allocator_in_place():
    huge = np.lib.stride_tricks.as_strided(np.zeros(1), (2**58,), (0,))
    with pytest.raises(MemoryError):
        empty_like(huge, np.dtype(np.float64))
    other = np.empty(LARGE, np.float32)
    del other
    assert output_cache.kept_bytes() == 0


def test_blocks_of_other_sizes_are_used_only_if_nearly_as_large(x):
    result = softmax(x, 1)
    place = address(result)
    del result
    twice = softmax(np.zeros((LARGE[0] * 2, 1024), np.float32), 1)
    assert address(twice) != place
    assert output_cache.kept_bytes() == x.nbytes
    del twice
    slightly_less = softmax(x[1:], 1) if x[1:].nbytes > _MIN_BYTES else softmax(x, 1)
    assert address(slightly_less) == place


def test_the_limit_is_kept_and_the_oldest_goes_first(x):
    limit_output_cache(2 * x.nbytes)
    results = [softmax(x, 1) for _ in range(3)]
    places = [address(result) for result in results]
    while results:
        del results[0]
        assert output_cache.kept_bytes() <= 2 * x.nbytes
    assert output_cache.kept_bytes() == 2 * x.nbytes
    again = [softmax(x, 1) for _ in range(2)]
    assert {address(result) for result in again} == set(places[1:])
    del again
    limit_output_cache(x.nbytes)
    assert output_cache.kept_bytes() == x.nbytes
    limit_output_cache(x.nbytes - 1)
    assert output_cache.kept_bytes() == 0
    softmax(x, 1)
    assert output_cache.kept_bytes() == 0


def test_memory_does_not_grow(x):
    for n_rows in range(LARGE[0], LARGE[0] + 60):
        softmax(np.zeros((n_rows, 1024), np.float32), 1)
    gc.collect()
    assert output_cache.kept_bytes() <= _DEFAULT_LIMIT


@pytest.mark.parametrize("n_bytes", [1.0, "1", None, True])
def test_limits_that_are_no_integers(n_bytes):
    with pytest.raises(TypeError, match="n_bytes must be an integer"):
        limit_output_cache(n_bytes)


def test_negative_limits():
    with pytest.raises(ValueError, match="n_bytes must not be negative: -1"):
        limit_output_cache(-1)


KEPT = """
import numpy as np
from fastsoftmax import softmax, _output_cache
softmax(np.zeros((9000, 1024), np.float32), 1)
print(_output_cache.kept_bytes())
"""


@pytest.mark.parametrize(
    ("text", "kept"), [("", 9000 * 4096), ("0", 0), ("100000000", 9000 * 4096), ("9" * 30, 9000 * 4096)]
)
def test_the_environment_sets_the_limit(python, text, kept):
    assert python(KEPT, FASTSOFTMAX_OUTPUT_CACHE=text) == str(kept)


def test_a_bad_limit_in_the_environment(python_error):
    message = python_error(KEPT, FASTSOFTMAX_OUTPUT_CACHE="256M")
    assert message == "ValueError: FASTSOFTMAX_OUTPUT_CACHE must be a number of bytes, not '256M'"


def test_results_outlive_the_interpreter_in_silence(python):
    assert (
        python("import numpy as np, fastsoftmax\nkept = fastsoftmax.softmax(np.zeros(10**7))\nprint(kept.size)")
        == "10000000"
    )


def test_without_the_allocator(monkeypatch, x):
    monkeypatch.setattr("fastsoftmax._outputs._allocator", lambda: None)
    result = fastsoftmax.softmax(x, 1)
    limit_output_cache(10)
    del result
    assert output_cache.kept_bytes() == 0
