"""The most usual calls take a way of their own through compiled code, and give what the general way gives."""

import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _dispatch, record_plans, use_backend

from .inputs import VALUES, values

compiled = pytest.importorskip("fastsoftmax.backends.compiled")

X = np.arange(12.0).reshape(3, 4)


@pytest.fixture(params=["portable", "x86_64_v2", "x86_64_v3", "x86_64_v4"])
def tier(request):
    if request.param not in compiled.tiers():
        pytest.skip(f"this machine or this build lacks the tier {request.param!r}; it has {compiled.tiers()}")
    with compiled.use_tier(request.param), use_backend("cython"):
        yield request.param


@pytest.fixture
def direct(function):
    """The function's direct calls: what they return, or None."""

    def call(x, axis=None, out=None, backend=None, *, where=None, temperature=1.0, dtype=None):
        serve = getattr(_dispatch.direct_calls, f"direct_{function}")
        return serve(x, axis, out, where, temperature, dtype, backend)

    return call


@pytest.fixture
def general(function):
    """The function by the general way, which records plans."""

    def call(*arguments, **keywords):
        with record_plans() as plans:
            result = getattr(fastsoftmax, function)(*arguments, **keywords)
        assert len(plans) == 1
        return result

    return call


def assert_same(result, expected):
    assert type(result) is type(expected)
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    np.testing.assert_array_equal(result, expected)


SHAPES = [
    (1,),
    (10,),
    (1, 1),
    (4, 10),
    (1000,),
    (2, 3, 70),
    (3, 20_000),
    (64, 1000),
    (300, 7),
    (5, 1, 40),
    (40, 9, 130),
]
CASES = [(shape, axis) for shape in SHAPES for axis in (None, *range(-len(shape), len(shape)))]


@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_the_same_bits(tier, function, direct, general, dtype, rng, shape, axis):
    x = rng.normal(size=shape).astype(dtype)
    expected = general(x, axis)
    assert_same(direct(x, axis), expected)
    assert_same(getattr(fastsoftmax, function)(x, axis), expected)
    out = np.empty_like(expected) if np.shape(expected) else np.empty((), dtype)
    assert getattr(fastsoftmax, function)(x, axis, out=out) is out
    np.testing.assert_array_equal(out, expected)
    if function != "logsumexp":
        assert direct(x, axis, x) is x
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((10,), None), ((64, 1000), 1), ((40, 9, 130), 1), ((300, 7), -1)], ids=str
)
def test_the_same_bits_of_16_bits(tier, function, direct, general, dtype, rng, shape, axis):
    x = rng.normal(size=shape).astype(dtype)
    expected = general(x, axis)  # from which the kernels know NumPy's number of the dtype
    assert_same(direct(x, axis), expected)
    if function != "logsumexp":
        assert direct(x, axis, x) is x
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("n_threads", ["1", "2", "3"])
@pytest.mark.parametrize(("shape", "axis"), [((1000, 700), 1), ((1000, 700), 0), ((3, 400_000), 1), ((100_000, 8), 1)])
def test_the_same_bits_on_threads(tier, direct, general, rng, monkeypatch, shape, axis, n_threads):
    x = rng.normal(size=shape).astype(np.float32)
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
    expected = general(x, axis)
    assert_same(direct(x, axis), expected)
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "2")
    assert_same(direct(x, axis), expected)


def test_the_schedule_is_that_of_the_general_way(tier, function, direct, general, dtype, monkeypatch):
    chosen, make_schedule = [], compiled.make_schedule

    def choose(*arguments):
        chosen.append(make_schedule(*arguments))
        return chosen[-1]

    monkeypatch.setattr(compiled, "make_schedule", choose)
    for shape, axis in [*CASES, ((1000, 700), 1), ((1000, 700), 0)]:
        x = np.zeros(shape, dtype)
        chosen.clear()
        _dispatch.direct_calls.forget_schedules()
        direct(x, axis)
        direct(x, axis)
        assert len(chosen) == 1
        with record_plans() as plans:
            getattr(fastsoftmax, function)(x, axis)
        assert plans[0].schedule == chosen[0]


def test_functions_and_dtypes_of_a_shape_are_remembered_together(tier, monkeypatch):
    chosen, make_schedule = [], compiled.make_schedule

    def choose(*arguments):
        chosen.append(arguments)
        return make_schedule(*arguments)

    monkeypatch.setattr(compiled, "make_schedule", choose)
    _dispatch.direct_calls.forget_schedules()
    for _ in range(2):
        for dtype in (np.float16, np.float32, np.float64):
            x = np.zeros((4, 10), dtype)
            for compute in (fastsoftmax.softmax, fastsoftmax.log_softmax, fastsoftmax.logsumexp):
                compute(x, 1)
    assert len(chosen) == 9


def test_a_bad_number_of_threads(tier, direct, monkeypatch):
    x = np.zeros(10**6)
    monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", "many")
    for _ in range(2):
        with pytest.raises(ValueError, match="FASTSOFTMAX_NUM_THREADS must be a positive integer, not 'many'"):
            direct(x)


@pytest.mark.parametrize("kind", VALUES)
def test_the_same_bits_for_all_kinds_of_values(tier, direct, general, dtype, kind):
    x = values(kind, 300, dtype, seed=1)
    assert_same(direct(x), general(x))


def shared(offset):
    memory = np.zeros(20)
    return memory[:12].reshape(3, 4), 1, memory[offset : offset + 12].reshape(3, 4)


NOT_DIRECT = {
    "a list": (X.tolist(), 1, None),
    "a subclass": (X.view(np.recarray), 1, None),
    "masked": (np.ma.masked_array(X), 1, None),
    "integers": (X.astype(int), 1, None),
    "complex": (X.astype(complex), 1, None),
    "long double": (X.astype(np.longdouble), 1, None),
    "byte-swapped": (X.astype(X.dtype.newbyteorder()), 1, None),
    "unaligned": (np.frombuffer(b"?" + X.tobytes(), X.dtype, offset=1).reshape(3, 4), 1, None),
    "Fortran order": (np.asfortranarray(X), 1, None),
    "strided": (X[:, ::2], 1, None),
    "no dimensions": (np.array(3.0), None, None),
    "no elements": (np.empty((3, 0)), 1, None),
    "a tuple of axes": (X, (1,), None),
    "an axis out of range": (X, 2, None),
    "a negative axis out of range": (X, -3, None),
    "a bool for an axis": (X, True, None),
    "an integer of NumPy for an axis": (X, np.int64(1), None),
}
BAD_OUTS = {
    "a list": X.tolist(),
    "of another dtype": np.empty((3, 4), np.float32),
    "of another shape": np.empty((4, 3)),
    "of more dimensions": np.empty((1, 3, 4)),
    "of no dimensions": np.empty(()),
    "strided": np.empty((3, 8))[:, ::2],
    "byte-swapped": np.empty((3, 4), X.dtype.newbyteorder()),
    "masked": np.ma.masked_array(X),
}


@pytest.mark.parametrize("case", NOT_DIRECT)
def test_what_is_left_to_the_general_way(tier, direct, case):
    assert direct(*NOT_DIRECT[case]) is None


@pytest.mark.parametrize("case", BAD_OUTS)
def test_outs_that_are_left_to_the_general_way(tier, direct, case):
    before = np.array(BAD_OUTS[case])
    assert direct(X, 1, BAD_OUTS[case]) is None
    np.testing.assert_array_equal(np.array(BAD_OUTS[case]), before)


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_overlapping_outs_are_left_to_the_general_way(tier, offset):
    assert _dispatch.direct_calls.direct_softmax(*shared(offset), None, 1.0, None, None) is None


def test_read_only_outs_are_left_to_the_general_way(tier):
    out = np.empty_like(X)
    out.flags.writeable = False
    assert _dispatch.direct_calls.direct_softmax(X, 1, out, None, 1.0, None, None) is None


def test_other_choices_are_left_to_the_general_way(direct):
    with use_backend("cython"):
        assert direct(X) is not None
        with record_plans():
            assert direct(X) is None
    assert direct(X, backend="numpy") is None
    assert direct(X, backend="nonsense") is None
    with use_backend("numpy"):
        assert direct(X) is None
        assert direct(X, backend="cython") is not None
        with use_backend("cython"):
            assert direct(X) is not None


@pytest.mark.parametrize(
    "options", [{"where": True}, {"temperature": 0.5}, {"temperature": np.float64(1)}, {"dtype": float}], ids=str
)
def test_options_are_left_to_the_general_way(direct, options):
    with use_backend("cython"):
        assert direct(X, temperature=1) is not None
        assert direct(X, **options) is None


def test_no_reference_is_kept_or_lost(tier, direct):
    def references():
        return [sys.getrefcount(value) for value in (x, out, None, -1, _dispatch.choices.get())]

    x, out = np.ones(10), np.ones(10) if direct(np.ones(10)).shape else np.ones(())
    direct(x, -1, out)
    before = references()
    for _ in range(1000):
        direct(x, -1, out)
        direct(x, 0, x.tolist())
        direct(x.reshape(2, 5), 0)
        direct(x, -1)
    after = references()
    assert all(abs(b - a) < 50 for a, b in zip(before, after, strict=True))


def test_memory_does_not_grow(tier, direct):
    x = np.ones((4, 100))
    for _ in range(10):
        direct(x, -1)
    tracemalloc.start()
    for _ in range(1000):
        direct(x, -1)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 2 * x.nbytes
