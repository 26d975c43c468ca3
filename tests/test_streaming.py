"""The softmax of data that come in pieces."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import OnlineSoftmax, merge_states, record_plans, softmax

from .inputs import LAYOUTS, VALUES, WRITABLE_LAYOUTS, OnDevice, values
from .reference import LONG, error_of, exact, max_ulp_error

X = np.arange(12.0).reshape(3, 4)


def fold(x, axis, *lengths):
    """Return an accumulator that has seen x in pieces of these lengths along its last axis, and then the rest."""
    online = OnlineSoftmax(axis)
    last = x.ndim - 1 if axis is None else np.max(axis)
    for chunk in np.split(x, np.cumsum(lengths), last):
        online.update(chunk)
    return online


# Accuracy


@pytest.mark.parametrize(
    ("shape", "axis", "lengths"),
    [((2, 10_000), 1, (1, 8300, 3)), ((3, 41), 1, (0, 7, 1, 1, 20)), ((70, 141), 0, (30,))],
    ids=str,
)
def test_any_chunking_is_accurate(backend, dtype, shape, axis, lengths):
    for kind in VALUES:
        x = values(kind, shape, dtype)
        online = fold(x, axis, *lengths)
        assert max_ulp_error(online.normalize(x), exact("softmax", x, axis)) <= backend.max_ulps, kind
        assert error_of("logsumexp", online.logsumexp(), x, axis) <= backend.max_ulps, kind


@pytest.mark.parametrize(
    ("shape", "traversal"),
    [((150, 9), "tiles"), ((9, 3000), "rows"), ((150, 9), "strips"), ((21, 3000), "strips"), ((5, 9001), "bands")],
    ids=str,
)
@pytest.mark.parametrize("of_dtype", [np.float16, np.float32, np.float64])
def test_a_row_has_its_results_in_every_traversal(backend, of_dtype, shape, traversal):
    """As beside other rows, so alone and collected element by element; of the first chunk, and of one more."""
    for kind in ("wide", "ascending", "masked by -inf", "straddling an offset", "offset", "one nan", "ties"):
        with np.errstate(over="ignore"):
            x = values(kind, shape, np.float32 if of_dtype == np.float16 else of_dtype).astype(of_dtype)
        rows = x.T.copy().T if traversal in ("strips", "bands") else x
        with record_plans() as plans:
            online = OnlineSoftmax(1).update(rows).update(rows * of_dtype(0.9))
        if backend.name == "cython" and not (of_dtype == np.float16 and traversal in ("rows", "bands")):
            assert [plan.schedule.traversal for plan in plans] == [traversal] * 2
        collected = OnlineSoftmax(1)
        for chunk in (x, x * of_dtype(0.9)):
            collected.update(np.repeat(chunk, 2, 1)[:, ::2])
        log_sums, p = online.logsumexp(), online.normalize(rows)
        np.testing.assert_array_equal(collected.logsumexp(), log_sums)
        np.testing.assert_array_equal(collected.normalize(x), p)
        for row in range(0, shape[0], 7):
            alone = OnlineSoftmax().update(x[row]).update(x[row] * of_dtype(0.9))
            np.testing.assert_array_equal(alone.logsumexp(), log_sums[row])
            np.testing.assert_array_equal(alone.normalize(x[row]), p[row])


@pytest.mark.parametrize("start", [0.0, 600.0, 3e4])
@pytest.mark.parametrize("step", [0.0, 0.7, -0.7])
def test_many_small_chunks(backend, dtype, rng, start, step):
    """Errors do not add up over hundreds of merges, each of which may bring another maximum and offset."""
    x = (start + step * np.arange(900) + rng.normal(size=(2, 900))).astype(dtype)
    online = fold(x, 1, *[3] * 299)
    assert max_ulp_error(online.normalize(x), exact("softmax", x, 1)) <= backend.max_ulps
    assert error_of("logsumexp", online.logsumexp(), x, 1) <= backend.max_ulps


@pytest.mark.parametrize(
    ("shape", "axis", "rows"),
    [((7, 150), 0, (150,)), ((7, 150), 1, (7,)), ((4, 3, 50), (0, 2), (3,)), ((5, 4, 2), None, ())],
    ids=str,
)
def test_layouts(backend, dtype, rng, shape, axis, rows):
    for name, layout in LAYOUTS.items():
        x = layout(rng.normal(size=shape).astype(dtype))
        online = fold(x, axis, 1)
        assert np.shape(online.logsumexp()) == rows
        assert max_ulp_error(online.normalize(x), exact("softmax", x, axis)) <= backend.max_ulps, name


@pytest.mark.parametrize("axis", [0, 1])
def test_out(backend, rng, axis):
    for layout in WRITABLE_LAYOUTS.values():
        x = rng.normal(size=(6, 150))
        out = layout(np.zeros_like(x))
        online = OnlineSoftmax(axis).update(x)
        expected = online.normalize(x)
        assert online.normalize(x, out) is out
        np.testing.assert_array_equal(out, expected)
        out[...] = x
        assert online.normalize(out, out=out) is out
        np.testing.assert_array_equal(out, expected)
        room = np.zeros((7, 150))
        room[1:] = x
        online.normalize(room[1:], out=room[:-1])
        np.testing.assert_array_equal(room[:-1], expected)


@pytest.mark.parametrize(
    ("dtype", "result", "log_sum"),
    [
        (np.float16, np.float16, np.float16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.int8, np.float16, np.float64),
        (np.uint16, np.float32, np.float64),
        (np.int64, np.float64, np.float64),
        (bool, np.float16, np.float64),
        (">f4", np.float32, np.float32),
    ],
)
def test_dtypes(backend, rng, dtype, result, log_sum):
    x = rng.integers(0, 2 if dtype is bool else 100, (3, 50)).astype(dtype)
    for axis in (0, 1):
        online = fold(x, axis, 2)
        p = online.normalize(x)
        assert p.dtype == result
        assert online.logsumexp().dtype == log_sum
        assert max_ulp_error(p, exact("softmax", x.astype(float), axis)) <= backend.max_ulps


def test_a_chunk_that_was_not_seen(backend, dtype):
    """exp(x - logsumexp) is above 1 where x is larger than what was seen, up to overflow."""
    online = OnlineSoftmax().update(np.array([0.0, 1.0], dtype))
    limit = np.log(np.finfo(dtype).max)
    x = np.array([0.5, 2.0, -np.inf, np.nan, limit, limit + 9, 1e30, np.inf], dtype)
    p = online.normalize(x)
    expected = np.exp(x[:5].astype(LONG) - exact("logsumexp", np.array([0.0, 1.0])))
    np.testing.assert_allclose(p[:5], expected.astype(dtype), rtol=200 * np.finfo(dtype).eps)
    assert (p[5:] == np.inf).all()


# Special values


@pytest.mark.parametrize(
    ("row", "log_sum"),
    [
        ([np.nan, 1.0], np.nan),
        ([np.nan, -np.inf], np.nan),
        ([1.0, np.inf], np.inf),
        ([np.inf, np.inf], np.inf),
        ([-np.inf, -np.inf], -np.inf),
    ],
)
def test_rows_without_probabilities(backend, dtype, row, log_sum):
    for x in (np.array([row, [0.0, 0.0]], dtype), np.array([row[::-1], [0.0, 0.0]], dtype)):
        for online in (OnlineSoftmax(1).update(x), fold(x, 1, 1), fold(x.T, 0, 1)):
            np.testing.assert_allclose(online.logsumexp(), [log_sum, np.log(2)], rtol=1e-6)
            p = online.normalize(x if online._axis == 1 else x.T)
            np.testing.assert_array_equal(p if online._axis == 1 else p.T, [[np.nan, np.nan], [0.5, 0.5]])


def test_scalars_and_empty_chunks(backend):
    online = OnlineSoftmax().update(1.0).update(np.zeros(0)).update(np.zeros((2, 0)))
    assert online.logsumexp() == 1.0
    assert online.normalize(1.0) == 1.0
    assert online.normalize(np.zeros((0, 2))).shape == (0, 2)
    assert OnlineSoftmax(1).update(np.zeros((3, 0), np.float32)).logsumexp().tolist() == [-np.inf] * 3
    assert OnlineSoftmax(1).update(np.zeros((0, 3))).logsumexp().shape == (0,)
    np.testing.assert_array_equal(OnlineSoftmax(()).update(X).logsumexp(), X)


# States


def test_merge_is_that_of_all_elements(backend, dtype, rng):
    x = (rng.normal(size=(4, 300)) * [[1], [100], [1000], [30_000]]).astype(dtype)
    parts = [OnlineSoftmax(1).update(chunk) for chunk in np.split(x, [1, 50, 200], 1)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = OnlineSoftmax(1)
        for index in order:
            assert total.merge(parts[index]) is total
        assert max_ulp_error(total.normalize(x), exact("softmax", x, 1)) <= backend.max_ulps
    both = merge_states(parts[0], parts[1])
    np.testing.assert_allclose(both.logsumexp(), np.logaddexp(parts[0].logsumexp(), parts[1].logsumexp()), rtol=1e-6)


def test_the_identity_and_the_operands_of_merge(backend):
    nothing, something = OnlineSoftmax(1), OnlineSoftmax(1).update(X)
    for merged in (merge_states(nothing, something), merge_states(something, nothing)):
        np.testing.assert_array_equal(merged.logsumexp(), something.logsumexp())
        merged.update(X)
    np.testing.assert_allclose(something.logsumexp() + np.log(2), merged.logsumexp())
    with pytest.raises(ValueError, match="no chunk was seen"):
        nothing.logsumexp()
    doubled = copy.copy(something)
    doubled.merge(doubled)
    np.testing.assert_allclose(doubled.logsumexp(), merged.logsumexp())


def test_copies_and_pickles(backend):
    online = OnlineSoftmax(1).update(X)
    twins = [copy.copy(online), copy.deepcopy(online), pickle.loads(pickle.dumps(online))]
    for twin in twins:
        np.testing.assert_array_equal(twin.update(X - 1).logsumexp(), twins[0].logsumexp())
    np.testing.assert_array_equal(online.logsumexp(), fastsoftmax.logsumexp(X, 1))
    assert repr(online) == "<OnlineSoftmax over axis 1: float64, rows of shape (3,)>"
    assert repr(OnlineSoftmax([0, 1])) == "<OnlineSoftmax over axis (0, 1): nothing folded>"


@pytest.mark.parametrize("scale", [1, 1000, 30_000])
def test_backends_take_over_from_each_other(dtype, rng, scale):
    x = (rng.normal(size=(3, 90)) + scale).astype(dtype)
    names = [name for name in fastsoftmax.available_backends() if name != "cuda"]
    online = OnlineSoftmax(1)
    for index, chunk in enumerate(np.split(x, 9, 1)):
        with fastsoftmax.use_backend(names[index % len(names)]):
            online.update(chunk)
    for name in names:
        with fastsoftmax.use_backend(name):
            assert max_ulp_error(online.normalize(x), exact("softmax", x, 1)) <= (10 if name == "numpy" else 2)


def test_a_memory_map(backend, tmp_path, rng):
    x = np.memmap(tmp_path / "logits", np.float32, "w+", shape=(1000, 30))
    x[:] = rng.normal(size=x.shape)
    online = OnlineSoftmax(axis=0)
    for first in range(0, 1000, 256):
        online.update(x[first : first + 256])
    for first in range(0, 1000, 256):
        online.normalize(x[first : first + 256], out=x[first : first + 256])
    np.testing.assert_allclose(x.sum(0, dtype=np.float64), 1, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_bits_do_not_depend_on_threads(backend, rng, monkeypatch, axis):
    x = rng.normal(size=(600, 700)).astype(np.float32)
    results = []
    for n_threads in ("1", "3"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        with record_plans() as plans:
            online = OnlineSoftmax(axis).update(x)
            results.append((online.logsumexp().tolist(), online.normalize(x).tolist()))
        assert [plan.function for plan in plans] == ["fold_states", "normalize"]
        assert backend.name == "numpy" or plans[0].schedule.n_threads == int(n_threads)
    assert results[0] == results[1]


# Errors


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (np.zeros((3, 4), np.float32), TypeError, "chunk must be of dtype float64, as what was seen, not float32"),
        (np.zeros((4, 4)), ValueError, r"chunk must have rows of shape \(3,\), as what was seen, not \(4,\)"),
        (np.zeros(4), np.exceptions.AxisError, "axis 1 is out of bounds"),
        (np.zeros((3, 4, 1)), ValueError, r"chunk must have rows of shape \(3,\), as what was seen, not \(3, 1\)"),
        (np.zeros((3, 4), complex), TypeError, "chunk must hold real numbers, not complex128"),
        (np.zeros((3, 4), np.longdouble), TypeError, "chunk must hold numbers of up to 64 bits, not longdouble|float"),
        (np.ma.masked_array(X), TypeError, "chunk is a masked array"),
        (np.array(["a"]), TypeError, "chunk must hold numbers"),
    ],
)
def test_chunks_that_do_not_fit(backend, chunk, error, message):
    online = OnlineSoftmax(1).update(X)
    before, out = online.logsumexp(), np.full(np.shape(chunk), 7.0)
    with pytest.raises(error, match=message):
        online.update(chunk)
    with pytest.raises(error, match=message):
        online.normalize(chunk, out=out)
    np.testing.assert_array_equal(online.logsumexp(), before)
    assert (out == 7.0).all()


def test_operands_that_do_not_fit():
    online = OnlineSoftmax(1).update(X)
    with pytest.raises(TypeError, match="other must be an OnlineSoftmax, not ndarray"):
        online.merge(X)
    with pytest.raises(ValueError, match="other must be over axis 1, not 0"):
        online.merge(OnlineSoftmax(0).update(X))
    with pytest.raises(ValueError, match=r"other must have rows of shape \(3,\), as what was seen, not \(4,\)"):
        online.merge(OnlineSoftmax(1).update(X.T))
    with pytest.raises(TypeError, match="other must be of dtype float64, as what was seen, not float32"):
        online.merge(OnlineSoftmax(1).update(X.astype(np.float32)))
    with pytest.raises(TypeError, match="a must be an OnlineSoftmax, not int"):
        merge_states(1, online)
    with pytest.raises(TypeError, match="b must be an OnlineSoftmax, not list"):
        merge_states(online, [])
    with pytest.raises(TypeError, match="axis must be an integer"):
        OnlineSoftmax(1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        OnlineSoftmax(backend="fortran")
    for out, error in [(np.zeros((3, 5)), ValueError), (np.zeros((3, 4), np.float32), TypeError), ([1], TypeError)]:
        with pytest.raises(error, match="out must"):
            online.normalize(X, out=out)


def test_normalize_is_softmax(backend, dtype, rng):
    x = rng.normal(size=(20, 3000)).astype(dtype)
    np.testing.assert_allclose(OnlineSoftmax(1).update(x).normalize(x), softmax(x, 1), rtol=4 * np.finfo(dtype).eps)


def test_arrays_on_a_device(backend):
    with pytest.raises(TypeError, match="chunk is on a CUDA device, where this is not computed"):
        OnlineSoftmax().update(OnDevice())
    with pytest.raises(TypeError, match="backend 'cuda' does not compute OnlineSoftmax"):
        OnlineSoftmax(backend="cuda").update([1.0])
