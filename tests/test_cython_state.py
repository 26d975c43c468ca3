"""The laws of the state, for the Cython restatement of it, on every tier."""

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .reference import exact, max_ulp_error, summand_scale

compiled = pytest.importorskip("fastsoftmax.backends.compiled")

SPECIAL = [-np.inf, np.inf, np.nan]


@st.composite
def rows(draw, dtype, special=False):
    """Rows of many lengths and scales, some far from 0, where a state has an offset."""
    size = draw(st.one_of(st.integers(0, 40), st.sampled_from([128, 300])))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 300.0]))
    offset = draw(st.sampled_from([0.0, 1e3, 1e4, -3e4, 1e8]))
    row = (np.random.default_rng(draw(st.integers(0, 99))).normal(size=size) * scale + offset).astype(dtype)
    if special and size:
        row[draw(st.integers(0, size - 1))] = draw(st.sampled_from(SPECIAL))
    return row


@pytest.fixture(params=["portable", "x86_64_v2", "x86_64_v3", "x86_64_v4"])
def kernels(request):
    if request.param not in compiled.tiers():
        pytest.skip(f"this machine or this build lacks the tier {request.param!r}; it has {compiled.tiers()}")
    return compiled.load_tier(request.param)


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def total(state):
    """The sum with the maximum's own term, relative to exp(maximum), to many digits."""
    maximum, offset, exponent, high, low = (mpmath.mpf(value) for value in state)
    with mpmath.workprec(400):
        return 1 + (high + low) * mpmath.mpf(2) ** int(exponent) * mpmath.exp(offset - maximum)


def is_regular(state):
    return np.isfinite(state[0]) and np.isfinite(state[3])


def test_identity_is_the_state_of_no_elements(kernels, dtype):
    identity = kernels.fold(np.empty(0, dtype))
    assert identity[0] == -np.inf
    assert identity[3:] == (0.0, 0.0)
    assert kernels.merge_states(identity, identity)[3:] == (0.0, 0.0)
    assert kernels.logsumexp_of(identity, dtype is np.float32) == -np.inf


@given(data=st.data())
def test_identity_is_neutral(kernels, dtype, data):
    state = kernels.fold(data.draw(rows(dtype, special=True)))
    identity = kernels.fold(np.empty(0, dtype))
    nothing = kernels.fold(np.full(3, -np.inf, dtype))
    for empty in (identity, nothing):
        for merged in (kernels.merge_states(empty, state), kernels.merge_states(state, empty)):
            assert same(merged[0], state[0])
            assert same(merged[3:], state[3:])


@given(data=st.data())
def test_merge_is_commutative_to_the_bit(kernels, dtype, data):
    a, b = (kernels.fold(data.draw(rows(dtype, special=True))) for _ in range(2))
    assert same(kernels.merge_states(a, b), kernels.merge_states(b, a))


@given(data=st.data())
def test_merge_is_associative(kernels, dtype, data):
    """With one offset the groupings agree to the square of eps; a new offset multiplies by a rounded exponential."""
    a, b, c = (kernels.fold(data.draw(rows(dtype))) for _ in range(3))
    left = kernels.merge_states(kernels.merge_states(a, b), c)
    right = kernels.merge_states(a, kernels.merge_states(b, c))
    assert left[0] == right[0]
    if is_regular(left):
        # Each merge adds the loser's exponential, which libm rounds to float64.
        assert abs(total(left) - total(right)) <= 2.0**-50 * total(left)


@given(data=st.data())
def test_a_row_is_the_merge_of_its_parts(kernels, dtype, data):
    row = data.draw(rows(dtype))
    cut = data.draw(st.integers(0, row.size))
    whole = kernels.fold(row)
    merged = kernels.merge_states(kernels.fold(row[:cut].copy()), kernels.fold(row[cut:].copy()))
    assert merged[0] == whole[0]
    if is_regular(whole):
        assert abs(total(merged) - total(whole)) <= np.finfo(dtype).eps * total(whole)


@given(data=st.data())
def test_the_logarithm_of_a_merged_state(kernels, dtype, data):
    row = data.draw(rows(dtype).filter(lambda row: row.size > 0))
    cut = data.draw(st.integers(0, row.size))
    merged = kernels.merge_states(kernels.fold(row[:cut].copy()), kernels.fold(row[cut:].copy()))
    result = np.array([kernels.logsumexp_of(merged, dtype is np.float32)]).astype(dtype)
    assert max_ulp_error(result, exact("logsumexp", row), summand_scale(row)) <= 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([np.nan], np.nan),
        ([np.inf], np.inf),
        ([-np.inf], -np.inf),
        ([3.0], 3.0),
        ([np.inf, np.nan], np.nan),
        ([-np.inf, np.nan], np.nan),
        ([np.inf, np.inf], np.inf),
        ([-np.inf, 3.0], 3.0),
        ([np.inf, -np.inf, 3.0], np.inf),
    ],
    ids=str,
)
def test_special_elements(kernels, dtype, row, expected):
    parts = [kernels.fold(np.array([x], dtype)) for x in row]
    merged = parts[0]
    for part in parts[1:]:
        merged = kernels.merge_states(merged, part)
    for state in (merged, kernels.fold(np.array(row, dtype))):
        assert same(kernels.logsumexp_of(state, dtype is np.float32), expected)
