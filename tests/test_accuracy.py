"""How far results are from the exact ones, in ULP, and what must hold to the last bit."""

from functools import lru_cache

import mpmath
import numpy as np
import pytest

import fastsoftmax

from .inputs import LAYOUTS, VALUES, values
from .reference import LONG, error_of, exact, max_ulp_error, summand_scale, ulps

LENGTHS = [1, 2, 3, 8, 17, 100, 1000, 4099, 70_001]
LONG_ROW_KINDS = ["normal", "wide", "constant", "ascending", "offset"]

pytestmark = pytest.mark.skipif(
    np.finfo(LONG).nmant <= np.finfo(np.float64).nmant, reason="long double is no wider than float64 here"
)


# The reference


def exact_by_mpmath(function, row):
    """Return the exact result of one row as a list of mpmath numbers of 60 digits."""
    with mpmath.workdps(60):
        terms = sorted(mpmath.mpf(float(x)) for x in row)
        maximum = terms.pop()
        log_sum = mpmath.log1p(mpmath.fsum(mpmath.exp(x - maximum) for x in terms))
        if function == "logsumexp":
            return [maximum + log_sum]
        logarithms = [mpmath.mpf(float(x)) - maximum - log_sum for x in row]
        return logarithms if function == "log_softmax" else [mpmath.exp(x) for x in logarithms]


def to_long_double(number):
    return LONG(mpmath.nstr(number, 30)) if abs(number) > mpmath.mpf("1e-4900") else LONG(0)


@pytest.mark.parametrize("kind", [kind for kind in VALUES if "inf" not in kind])
def test_reference_agrees_with_mpmath(function, dtype, kind):
    row = values(kind, 60, dtype, seed=3)
    expected = np.array([to_long_double(number) for number in exact_by_mpmath(function, row)])
    result = exact(function, row)
    scale = np.maximum(abs(result), abs(LONG(row.max()))) if function == "logsumexp" else abs(expected)
    # A float64 ULP is 2048 of the reference's roundings; results below the range of float64 count by its smallest
    # step.
    unit = np.maximum(scale * np.finfo(np.float64).eps, LONG(np.finfo(np.float64).smallest_subnormal))
    assert (abs(result - expected) / unit).max() < 0.01


def test_ulps():
    one_and_a_step = np.float32(1) + np.finfo(np.float32).eps
    assert max_ulp_error(one_and_a_step, 1) == 1
    assert max_ulp_error(np.float32(1), LONG(one_and_a_step)) == 1
    assert max_ulp_error(np.float32(2), LONG(2) + LONG(2) ** -23) == 0.5
    tiny = np.finfo(np.float64).smallest_subnormal
    assert max_ulp_error(tiny, 0) == 1
    assert max_ulp_error(np.float64(0), LONG(tiny) / 2) == 0.5
    assert max_ulp_error(np.float64(1), 1.5, scale=LONG(2) ** 51) == 1
    np.testing.assert_array_equal(
        ulps(np.float32([np.nan, np.inf, -np.inf, np.nan, 1, np.inf]), [np.nan, np.inf, -1e300, 1, np.nan, -np.inf]),
        [0, 0, 0, np.inf, np.inf, np.inf],
    )


# Bounds


@pytest.mark.parametrize("kind", VALUES)
def test_rows_of_every_kind(backend, function, dtype, kind):
    for length in LENGTHS:
        row = values(kind, length, dtype)
        result = getattr(fastsoftmax, function)(row)
        assert error_of(function, result, row) <= backend.max_ulps


@lru_cache(maxsize=len(LONG_ROW_KINDS))
def long_row(function, dtype, kind):
    row = values(kind, 1_000_000, dtype)
    return row, exact(function, row), summand_scale(row) if function == "logsumexp" else None


@pytest.mark.parametrize("kind", LONG_ROW_KINDS)
def test_a_row_of_a_million(function, dtype, backend, kind):
    row, *expected = long_row(function, dtype, kind)
    assert max_ulp_error(getattr(fastsoftmax, function)(row), *expected) <= backend.max_ulps


@pytest.mark.parametrize("kind", ["normal", "wide", "ascending", "subnormal results"])
@pytest.mark.parametrize("length", [2, 5, 10, 32, 150])
def test_many_short_rows(backend, function, dtype, kind, length):
    rows = values(kind, (60_000 // length, length), dtype)
    for x, axis in [(rows, 1), (rows.T.copy(), 0)]:
        assert error_of(function, getattr(fastsoftmax, function)(x, axis), x, axis) <= backend.max_ulps


def test_logsumexp_of_well_conditioned_rows_in_ulps_of_the_result(backend, dtype):
    for kind in ("ascending", "constant", "wide"):
        row = abs(values(kind, 1000, dtype))  # maximum and log(sum) have one sign, so nothing cancels
        assert max_ulp_error(fastsoftmax.logsumexp(row), exact("logsumexp", row)[0]) <= backend.max_ulps


def test_logsumexp_near_zero(backend, dtype):
    """What is not the maximum decides, however small it is."""
    for small in (-5, -20, -40, -80):
        row = np.array([0, small], dtype)
        assert max_ulp_error(fastsoftmax.logsumexp(row), exact("logsumexp", row)[0]) <= backend.max_ulps


def test_log_softmax_of_a_certain_class(backend, dtype):
    """The log-probability of a class that is all but certain is a small number, not a rounded 0."""
    row = np.array([0, -30, -31], dtype)
    result = fastsoftmax.log_softmax(row)
    assert result[0] < 0
    assert max_ulp_error(result, exact("log_softmax", row)) <= backend.max_ulps


def test_float32_over_200_000_rows(backend):
    """SciPy's sum over a leading axis is 1.5e-5 off here: it adds the rows one by one in float32."""
    x = values("normal", (200_000, 4), np.float32)
    assert error_of("softmax", fastsoftmax.softmax(x, 0), x, 0) <= backend.max_ulps


# Properties of probabilities


@pytest.mark.parametrize("kind", VALUES)
def test_probabilities_are_at_most_1_and_sum_to_1(backend, dtype, kind):
    for length in LENGTHS:
        row = values(kind, length, dtype)
        if np.isneginf(row).all():
            continue
        probabilities = fastsoftmax.softmax(row)
        assert probabilities.min() >= 0
        assert probabilities.max() <= 1
        # Each is within `max_ulps` of the exact one: a relative error of at most eps, or of steps of the subnormals.
        limits = np.finfo(dtype)
        bound = backend.max_ulps * (LONG(limits.eps) + length * LONG(limits.smallest_subnormal))
        assert abs(probabilities.astype(LONG).sum() - 1) <= bound
        assert fastsoftmax.log_softmax(row).max() <= 0


@pytest.mark.parametrize("value", [0, -0.0, 1, -1e9, 1e-40, 3e38, -3e38])
def test_a_single_element_is_certain(backend, dtype, value):
    row = np.full((3, 1), value, dtype)
    np.testing.assert_array_equal(fastsoftmax.softmax(row, 1), np.ones((3, 1)))
    np.testing.assert_array_equal(fastsoftmax.log_softmax(row, 1), np.zeros((3, 1)))
    np.testing.assert_array_equal(fastsoftmax.logsumexp(row, 1), row[:, 0])


def test_equal_logits_have_equal_probabilities(backend, dtype, map_function):
    for length in (2, 7, 31, 100, 5000):
        row = values("ties", length, dtype)
        result = map_function(row)
        for value in range(3):
            assert np.unique(result[row == value]).size <= 1
    assert (fastsoftmax.softmax(np.zeros(8, dtype)) == 0.125).all()


def test_a_shift_of_all_logits_changes_nothing(backend, dtype, map_function):
    row = np.round(values("ascending", 1000, dtype) * 8) / 8  # exact after the shift as well
    for shift in (64, -1024, 2**14):
        shifted = map_function(row + dtype(shift))
        assert max_ulp_error(shifted, map_function(row).astype(LONG)) <= 2 * backend.max_ulps


# The same bits

BIT_SHAPES = [(7, 1), (40, 3), (19, 31), (33, 100), (5, 1000), (3, 9001), (3, 40_000)]


@pytest.mark.parametrize("shape", BIT_SHAPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_company(backend, function, dtype, shape):
    x = values("wide", shape, dtype)
    call = getattr(fastsoftmax, function)
    batch = call(x, 1)
    order = np.random.default_rng(0).permutation(shape[0])
    np.testing.assert_array_equal(call(x[order], 1), batch[order])
    for row, result in zip(x, batch, strict=True):
        np.testing.assert_array_equal(call(row), result)


@pytest.mark.parametrize("shape", BIT_SHAPES, ids=str)
def test_a_row_has_the_same_bits_in_every_layout(backend, function, dtype, shape):
    x = values("normal", shape, dtype)
    call = getattr(fastsoftmax, function)
    expected = call(x, 1)
    for name, layout in LAYOUTS.items():
        if not name.startswith("broadcast"):
            np.testing.assert_array_equal(call(layout(x), 1), expected, err_msg=name)
    transposed = call(x.T.copy(), 0)
    np.testing.assert_array_equal(transposed if function == "logsumexp" else transposed.T, expected)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((700_001,), 0), ((2, 300_000), 1), ((3000, 300), 1), ((300, 3000), 0), ((90_000, 10), 1), ((30, 200, 150), 1)],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(backend, function, dtype, shape, axis, monkeypatch):
    x = values("normal", shape, dtype)
    results = {}
    for n_threads in (1, 2, 3):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", str(n_threads))
        with fastsoftmax.record_plans() as plans:
            results[n_threads] = getattr(fastsoftmax, function)(x, axis)
        if x.size // x.shape[axis] > 100:  # whether few rows are cut for the sake of threads is the backend's choice
            assert plans[0].schedule.n_threads == (n_threads if backend.has_kernels else 1)
    np.testing.assert_array_equal(results[1], results[2])
    np.testing.assert_array_equal(results[1], results[3])


@pytest.mark.parametrize("n_ties", [1, 2, 3, 7, 100, 1000, 4096])
def test_equal_logits_share_exactly(backend, dtype, rng, n_ties):
    """Also where others lie so far below that they do not matter."""
    logits = (rng.normal(size=20) * 30).astype(dtype)[:, np.newaxis]
    for others in (0, 3):
        x = np.concatenate([np.repeat(logits, n_ties, axis=1), np.full((20, others), -np.inf, dtype)], axis=1)
        for result in (fastsoftmax.softmax(x, axis=1), fastsoftmax.softmax(np.asfortranarray(x), axis=1)):
            assert np.all(result[:, :n_ties] == dtype(1) / dtype(n_ties))


@pytest.mark.parametrize("n_ties", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("distance", [(1e-4, 0.1), (0.1, 5), (3, 6), (10, 30), (30, 80)], ids=str)
def test_equal_maxima_and_others_below(backend, function, dtype, rng, n_ties, distance):
    """The rounding of a term that dominates the row is in every result; so are those of the parts of its sum."""
    x = -rng.uniform(*distance, (400, n_ties + 6))
    x[:, :n_ties] = 0
    x = (x + rng.uniform(-20, 20, (400, 1))).astype(dtype)
    x = rng.permuted(x, axis=1)
    result = getattr(fastsoftmax, function)(x, 1)
    assert error_of(function, result, x, 1) <= backend.max_ulps


@pytest.mark.parametrize("n_cols", [64, 1000, 8192])
def test_many_elements_far_below_one(backend, function, dtype, n_cols):
    """What a sum loses of each of many terms, all alike, is a part of it to be reckoned with."""
    x = np.zeros((60, n_cols), dtype)
    x[:, :] = np.linspace(*((-18, -6) if dtype == np.float32 else (-40, -10)), 60)[:, np.newaxis]
    x[:, n_cols // 3] = 0
    result = getattr(fastsoftmax, function)(x, 1)
    assert error_of(function, result, x, 1) <= backend.max_ulps
