"""The exponential of the kernels, over a part of what ``make exponential`` covers in whole."""

import numpy as np
import pytest

from benchmarks import exponential

compiled = pytest.importorskip("fastsoftmax.backends.compiled", exc_type=ImportError)

# The errors of docs/accuracy.md, rounded up.
MAX_TERM, MAX_BEFORE_ROUNDING = 0.85, 0.35
MAX_COARSE = {"x86_64_v4": 2**-18.5, "x86_64_v3": 2**-21, "x86_64_v2": 2**-23.5, "portable": 2**-23.5}


@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [
        ("float32", lambda: exponential.every_float32(block=2**14, of=1024)),
        ("float64", lambda: exponential.hard_float64(20_000)),
    ],
    ids=["float32", "float64"],
)
def test_terms(dtype, blocks):
    found = exponential.measure(blocks(), exponential.ways(dtype))
    assert {*compiled.tiers()} <= {*found}
    for name, one in found.items():
        assert one["size"] > 100_000
        assert one["max"] <= MAX_TERM, (name, one)
        assert one["unrounded"] <= MAX_BEFORE_ROUNDING, (name, one)
        assert one["decreases"] == 0, (name, one)


@pytest.mark.parametrize("tier", MAX_COARSE)
def test_terms_for_16_bit_results(tier):
    if tier not in compiled.tiers():
        pytest.skip(f"this machine or this build lacks the tier {tier!r}; it has {compiled.tiers()}")
    blocks = exponential.every_float32(exponential.COARSE_ENDS[1], 0.0, block=2**14, of=1024)
    found = exponential.measure(blocks, {tier: lambda *arguments: exponential.coarse_terms(tier, *arguments)})
    assert found[tier]["size"] > 100_000
    assert found[tier]["relative"] <= MAX_COARSE[tier]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moderate_elements_have_the_bits_of_all(dtype):
    x = np.sort(np.random.default_rng(0).uniform(-60, 60, 10_000)).astype(dtype)
    for tier in compiled.tiers():
        results = []
        for arithmetic in (exponential.FULL, exponential.MODERATE):
            terms, residuals = np.empty_like(x), np.empty_like(x)
            exponential.compiled_terms(tier, arithmetic, x, 60.0, terms, residuals)
            results.append((terms, residuals))
        np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("name", [*MAX_COARSE, "numba"])
def test_neighbouring_terms_ascend_below_one(name):
    """Where many numbers share a term, and whether it ascends hangs on its last bit: all between -2**-6 and -2**-9."""
    write = exponential.ways("float32").get(name)
    if write is None:
        pytest.skip(f"this machine or this build lacks {name!r}; it has {compiled.tiers()}")
    for first in range(0x3B000000, 0x3C800000, 2**18):
        x = (np.arange(first, first + 2**18 + 1, dtype=np.uint32) | np.uint32(2**31)).view(np.float32)[::-1].copy()
        terms, residuals = np.empty_like(x), np.empty_like(x)
        write(x, 0.0, terms, residuals)
        assert (terms[1:] >= terms[:-1]).all()
