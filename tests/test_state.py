"""The laws of the state, for the plain functions and for what Numba compiles from them."""

import importlib
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsoftmax import _state
from fastsoftmax._state import FLOAT32, FLOAT32_WIDE, FLOAT64, State

mpmath.mp.prec = 3000  # of 1e300 and 1e-300 in one sum

FUNCTIONS = ("fold", "merge", "normalize", "logsumexp", "total", "log_total", "split", "reference", "polynomial")


class Plain:
    """The functions as they are."""

    def __getattr__(self, name):
        return getattr(_state, name)


class Compiled:
    """The functions as Numba compiles them."""

    def __init__(self):
        numba = pytest.importorskip("numba")
        importlib.import_module("fastsoftmax.backends.numba_cpu")  # lets the functions call each other
        for name in FUNCTIONS:
            setattr(self, name, numba.njit(getattr(_state, name)))


@pytest.fixture(scope="module", params=[Plain, Compiled])
def form(request):
    return request.param()


@pytest.fixture(params=[FLOAT64, FLOAT32_WIDE], ids=["float64", "float32 in float64"])
def precision(request):
    return request.param


FINITE = st.one_of(
    st.floats(-50, 50),
    st.floats(-800, 800),
    st.floats(-20_000, 20_000),
    st.floats(allow_nan=False, allow_infinity=False),
)
ANY = st.one_of(FINITE, st.sampled_from([math.inf, -math.inf, math.nan]))
ROWS = st.lists(ANY, max_size=12)
FINITE_ROWS = st.lists(FINITE, min_size=1, max_size=12)
# Values around one that is far from 0, as close as the spacing of floats allows.
OFFSET_ROWS = st.tuples(
    st.sampled_from([511.0, 513.0, -700.0, 8191.0, 8193.0, -9000.0, 1e6, -1e8, 1e15, 1e300]),
    st.lists(st.floats(-60, 60), min_size=1, max_size=12),
).map(lambda row: [row[0] + x for x in row[1]])


def rounded(row, precision):
    """The row as its dtype holds it: offsets are exact only for what float32 holds."""
    with np.errstate(over="ignore"):
        return [float(np.float32(x)) for x in row] if precision is FLOAT32_WIDE else row


def state_of(form, row, precision):
    state = _state.identity()
    for x in row:
        state = State(*form.fold(state, x, precision))
    return state


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def distance(form, a, b, precision):
    """How far the sums of two states are apart, relative to the sum with the maximum."""
    assert a.maximum == b.maximum
    if math.isnan(a.sum) or math.isnan(b.sum) or math.isinf(a.maximum):
        assert same(a.sum, b.sum)
        return 0.0
    a_high, a_low = form.total(a, precision)
    b_high, b_low = form.total(b, precision)
    return abs((a_high - b_high) + (a_low - b_low)) / a_high


# Laws


@given(row=ROWS)
def test_identity_is_neutral(form, precision, row):
    state = state_of(form, row, precision)
    assert same(form.merge(_state.identity(), state, precision), state)
    assert same(form.merge(state, _state.identity(), precision), state)


def test_two_empty_states_are_empty(form, precision):
    assert same(form.merge(_state.identity(), _state.identity(), precision), _state.identity())


@given(row=ROWS, other=ROWS)
def test_merge_is_commutative_to_the_bit(form, precision, row, other):
    a, b = state_of(form, row, precision), state_of(form, other, precision)
    assert same(form.merge(a, b, precision), form.merge(b, a, precision))


@given(rows=st.tuples(ROWS, ROWS, ROWS))
def test_merge_is_associative(form, precision, rows):
    """With one offset the groupings agree to the square of eps; a new offset multiplies by a rounded exponential."""
    a, b, c = (state_of(form, rounded(row, precision), precision) for row in rows)
    left = State(*form.merge(State(*form.merge(a, b, precision)), c, precision))
    right = State(*form.merge(a, State(*form.merge(b, c, precision)), precision))
    offsets = {form.reference(state.maximum, precision)[0] for state in (a, b, c)}
    bound = 2.0**-100 if len(offsets) == 1 else 2.0**-51
    assert distance(form, left, right, precision) <= bound


@given(row=st.lists(ANY, max_size=20), cut=st.integers(0, 20))
def test_parts_merge_into_the_row(form, precision, row, cut):
    row = rounded(row, precision)
    merged = form.merge(state_of(form, row[:cut], precision), state_of(form, row[cut:], precision), precision)
    assert distance(form, State(*merged), state_of(form, row, precision), precision) <= 2.0**-50


def test_many_merges_do_not_add_up_rounding_errors(form):
    """Of 100,000 equal elements, folded one by one; a plain sum makes it 540 ULP."""
    state = state_of(form, [0.3] * 100_000, FLOAT64)
    assert abs(form.logsumexp(state, FLOAT64) - float(mpmath.log(100_000) + mpmath.mpf(0.3))) <= 2 * math.ulp(11.0)


def test_slowly_rising_offsets_do_not_add_up_rounding_errors(form):
    """Each element is a new maximum beyond the limit; a sum rescaled by exp(old - new) each time makes it 7 ULP."""
    row = [9000 + x / 1024 for x in range(3000)]
    exact = mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(x) - row[-1]) for x in row))
    high, low = form.log_total(state_of(form, row, FLOAT64), FLOAT64)
    assert ulps(high + low, exact) <= 1


# Special values


@pytest.mark.parametrize(
    ("row", "expected", "probabilities"),
    [
        ([], -math.inf, []),
        ([-math.inf], -math.inf, [math.nan]),
        ([-math.inf, -math.inf], -math.inf, [math.nan] * 2),
        ([-math.inf, 3.5, -math.inf], 3.5, [0.0, 1.0, 0.0]),
        ([math.inf], math.inf, [math.nan]),
        ([1.0, math.inf, 2.0, math.inf], math.inf, [math.nan] * 4),
        ([math.inf, -math.inf], math.inf, [math.nan] * 2),
        ([math.nan], math.nan, [math.nan]),
        ([1.0, math.nan, 2.0], math.nan, [math.nan] * 3),
        ([math.inf, math.nan], math.nan, [math.nan] * 2),
        ([math.nan, -math.inf], math.nan, [math.nan] * 2),
        ([-1e9], -1e9, [1.0]),
        ([1e308, -1e308], 1e308, [1.0, 0.0]),
        ([0.0, 0.0], math.log(2), [0.5, 0.5]),
    ],
    ids=str,
)
def test_special_rows(form, precision, row, expected, probabilities):
    state = state_of(form, row, precision)
    assert same(form.logsumexp(state, precision), expected)
    assert same([form.normalize(x, state, precision) for x in row], probabilities)


@given(row=FINITE_ROWS, n=st.integers(1, 5))
def test_minus_infinity_contributes_exactly_nothing(form, precision, row, n):
    row = rounded(row, precision)
    assert same(state_of(form, row + [-math.inf] * n, precision), state_of(form, row, precision))


def test_what_is_not_the_maximum_keeps_its_digits(form):
    state = state_of(form, [0.0, -40.0], FLOAT64)
    assert form.logsumexp(state, FLOAT64) == 4.248354255291589e-18
    assert form.log_total(state, FLOAT64)[0] == 4.248354255291589e-18


# Accuracy


def ulps(result, exact):
    return float(abs(mpmath.mpf(result) - exact) / mpmath.mpf(math.ulp(float(exact))))


@given(row=st.one_of(FINITE_ROWS, OFFSET_ROWS))
def test_values_are_within_2_ulp(form, precision, row):
    row = rounded(row, precision)
    row = [x for x in row if math.isfinite(x)] or [0.0]
    state = state_of(form, row, precision)
    maximum = max(row)
    total = mpmath.fsum(mpmath.exp(mpmath.mpf(x) - maximum) for x in row)
    log_total = mpmath.log(total)
    size = max(abs(maximum), float(log_total), abs(float(maximum + log_total)))
    assert abs(form.logsumexp(state, precision) - (maximum + log_total)) <= 2 * math.ulp(size)
    for x in row:
        exact = mpmath.exp(mpmath.mpf(x) - maximum) / total
        if precision is FLOAT64 or exact > 2.0**-500:  # what float32 cannot hold may be dropped
            assert ulps(form.normalize(x, state, precision), exact) <= 2


@pytest.mark.parametrize("x", [-710.0, -720.25, -744.0, -745.0])
def test_subnormal_probabilities(form, x):
    state = state_of(form, [0.3, x], FLOAT64)
    exact = mpmath.exp(mpmath.mpf(x) - mpmath.mpf(0.3))
    exact /= 1 + exact
    assert abs(form.normalize(x, state, FLOAT64) - exact) <= math.ulp(0.0)


@pytest.mark.parametrize(("polynomial", "bound"), [(_state.polynomial32, 4.1e-9), (_state.polynomial64, 1.3e-17)])
def test_polynomials_have_the_error_they_state(polynomial, bound):
    """The error of the coefficients alone: evaluated in mpmath, nothing is rounded."""
    for r in map(mpmath.mpf, np.linspace(-0.34658, 0.34658, 301)):
        exact = mpmath.exp(r)
        assert abs(1 + r + r**2 * polynomial(r) - exact) <= bound * exact


@pytest.mark.parametrize(("precision", "dtype"), [(FLOAT32, np.float32), (FLOAT64, np.float64)])
def test_split_is_accurate_over_its_range(form, precision, dtype):
    eps = float(np.finfo(dtype).eps)
    limit = float(precision.limit)
    for t in np.random.default_rng(0).uniform(-2 * limit, limit, 300).astype(dtype):
        p, low, shifted_k = form.split(dtype(t), precision)
        exact = mpmath.exp(mpmath.mpf(float(t))) / mpmath.mpf(2) ** int(shifted_k - precision.rounder)
        assert abs(float(p) - exact) <= 0.52 * eps * exact
        assert abs(mpmath.mpf(float(p)) + mpmath.mpf(float(low)) - exact) <= 0.2 * eps * exact


@given(x=st.floats(-600, 600, width=32), distance=st.floats(-100, 100, width=32))
def test_differences_to_the_offset_are_exact_in_float32(x, distance):
    maximum = np.float32(x * 1000)
    offset, _ = _state.reference(float(maximum), FLOAT32_WIDE)
    near = maximum - np.float32(abs(distance))
    assert np.float32(near) - np.float32(offset) == float(near) - offset
