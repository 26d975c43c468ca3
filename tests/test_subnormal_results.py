"""Probabilities below the smallest normal number: right to one step of the subnormals, in the order of the logits."""

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import OnlineSoftmax, softmax, softmax_one

from .inputs import LAYOUTS
from .reference import LONG, exact, wide_for

# Short rows and tiles, a batch, a chunk, several chunks, and rows that threads share.
SHAPES = [(2000, 10), (600, 37), (60, 400), (5, 4100), (3, 9001), (2, 40_000), (1, 300_000)]

# Each computes the softmax of rows in another way.
WAYS = {name: (lambda x, layout=layout: softmax(layout(x), 1)) for name, layout in LAYOUTS.items()} | {
    "columns": lambda x: softmax(x.T.copy(), 0).T,
    "row by row": lambda x: np.stack([softmax(row) for row in x]),
    "in place": lambda x: _in_place(x.copy(), 1),
    "columns in place": lambda x: _in_place(x.T.copy(), 0).T,
    "two axes": lambda x: softmax(np.stack([x, x]).transpose(1, 0, 2)[:, :1], (1, 2))[:, 0],
}


def _in_place(x, axis):
    return softmax(x, axis, out=x)


def dense_rows(shape, dtype, seed=0, temperature=1.0):
    """Rows of a few elements of the size of the largest, and others whose probabilities are around the smallest normal
    number and below it, down to 0."""
    rng = np.random.default_rng([seed, *shape])
    limits = np.finfo(dtype)
    digits = np.log(limits.tiny) - np.log(limits.smallest_subnormal)
    x = np.where(rng.random(shape) < 0.7, rng.uniform(-1, 1, shape), rng.uniform(-digits - 3, 1, shape))
    x[:, : shape[1] // 10] -= 1000  # of which nothing is left
    large = rng.normal(size=(shape[0], 1 + shape[1] // 50))
    x += np.log(limits.tiny) + np.log(np.exp(large).sum(axis=1, keepdims=True))
    x[:, -large.shape[1] :] = large
    return (rng.permuted(x, axis=1) * temperature).astype(dtype)


def error_in_steps(result, expected):
    """Return the largest error of results whose exact values are subnormal, in steps of the subnormals."""
    limits = np.finfo(result.dtype)
    is_subnormal = expected < float(limits.smallest_normal)
    assert is_subnormal.any()
    error = abs(result.astype(expected.dtype) - expected)[is_subnormal]
    return float(error.max() / expected.dtype.type(limits.smallest_subnormal))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_to_one_step(backend, dtype, shape):
    for seed in range(3):
        x = dense_rows(shape, dtype, seed)
        expected = exact("softmax", x, 1, wide=wide_for(x.dtype))
        result = softmax(x, 1)
        assert error_in_steps(result, expected) <= 1
        for name, way in WAYS.items():
            if not name.startswith("broadcast"):
                np.testing.assert_array_equal(way(x), result, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 7])
def test_temperature(backend, dtype, shape, temperature):
    x = dense_rows(shape, dtype, temperature=temperature)
    expected = exact("softmax", x, 1, temperature, wide_for(x.dtype))
    assert error_in_steps(softmax(x, 1, temperature=temperature), expected) <= 1
    assert error_in_steps(softmax(x.T.copy(), 0, temperature=temperature).T, expected) <= 1
    assert error_in_steps(softmax(x, 1, temperature=temperature, out=x), expected) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where(backend, dtype, rng, shape):
    x = dense_rows(shape, dtype)
    mask = rng.random(shape) < 0.9
    mask[:, -1] |= ~mask.any(axis=1)
    expected = exact("softmax", np.where(mask, x, -np.inf), 1, wide=wide_for(x.dtype))
    for result in (softmax(x, 1, where=mask), softmax(x.T.copy(), 0, where=mask.T.copy()).T):
        assert error_in_steps(result, expected) <= 1
    if backend.name != "numba":  # which computes masked rows in float64
        np.testing.assert_array_equal(softmax(np.where(mask, x, dtype(-np.inf)), 1), result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_zero_beside_the_elements(backend, dtype, shape):
    x = dense_rows(shape, dtype)
    with_zero = np.concatenate([x, np.zeros((shape[0], 1), dtype)], axis=1)
    expected = exact("softmax", with_zero, 1, wide=wide_for(x.dtype))[:, :-1]
    for result in (softmax_one(x, 1), softmax_one(x.T.copy(), 0).T):
        assert error_in_steps(result, expected) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_state(backend, dtype, shape):
    x = dense_rows(shape, dtype)
    expected = exact("softmax", x, 1, wide=wide_for(x.dtype))
    for array, axis in ((x, 1), (x.T.copy(), 0)):
        online = OnlineSoftmax(axis)
        for part in np.array_split(array, 3, axis):
            online.update(part)
        result = online.normalize(array)
        assert error_in_steps(result if axis else result.T, expected) <= 1


@pytest.mark.parametrize("offset", [-3e8, -2000, 90, 2000, 3e5, 1e8])
def test_offsets(backend, dtype, offset):
    """Of large logits, some of which have spaces of many units between them."""
    x = dense_rows((50, 100), np.float64 if dtype == np.float64 else np.float32)
    x = (x.astype(LONG) + LONG(offset)).astype(dtype)
    expected = exact("softmax", x, 1, wide=LONG)
    limits = np.finfo(dtype)
    for result in (softmax(x, 1), softmax(x.T.copy(), 0).T):
        small = expected < float(limits.smallest_normal)
        assert (abs(result - expected)[small] <= LONG(limits.smallest_subnormal)).all()


@pytest.mark.parametrize("size", [30, 3000, 100_000])
@pytest.mark.parametrize("largest", [0, 1], ids=["at 0", "of subnormals at 0"])
def test_order_and_ties(backend, dtype, size, largest):
    """Over the edge between subnormal and normal results; near 0 also where results are farther apart than logits."""
    edge = -np.log(np.finfo(dtype).smallest_normal)
    spread = np.random.default_rng(size).uniform(-1, 1, size) * 10.0 ** np.random.default_rng(0).uniform(-9, 0, size)
    x = np.append(spread + (largest - 1) * edge, largest * edge).astype(dtype)
    x = np.sort(np.concatenate([x[:-1], x]))
    for result in (softmax(x), softmax(np.stack([x, x], 1), 0)[:, 1]):
        assert (np.diff(result) >= 0).all()
        same = np.flatnonzero(np.diff(x) == 0)
        np.testing.assert_array_equal(result[same], result[same + 1])


def test_any_number_of_threads_gives_the_same_bits(backend, dtype, monkeypatch):
    for shape, axis in [((1, 300_000), 1), ((3000, 60), 1), ((60, 3000), 0), ((400, 900), 1)]:
        x = dense_rows(shape, dtype)
        results = []
        for n_threads in (1, 2):
            monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", str(n_threads))
            results.append(softmax(x, axis))
        np.testing.assert_array_equal(*results)


def test_the_largest_probabilities(backend, dtype):
    x = dense_rows((30, 50), dtype)
    expected = -np.sort(-softmax(x, 1), axis=1)
    for k in (5, 50):
        np.testing.assert_array_equal(fastsoftmax.softmax_topk(x, k, 1)[0], expected[:, :k])


@pytest.mark.parametrize("n_cols", [5, 300])
def test_bfloat16(backend, n_cols):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = dense_rows((200, n_cols), np.float32).astype(ml_dtypes.bfloat16)
    expected = exact("softmax", x.astype(np.float32), 1, wide=np.float64)
    small = expected < float(ml_dtypes.finfo(x.dtype).smallest_normal)
    step = float(ml_dtypes.finfo(x.dtype).smallest_subnormal)
    for result in (softmax(x, 1), softmax(x.T.copy(), 0).T):
        assert abs(result.astype(np.float64) - expected)[small].max() <= 0.51 * step
