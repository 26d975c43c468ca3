"""The same call gives what `scipy.special` gives, wherever SciPy is right."""

import inspect

import numpy as np
import pytest
import scipy.special

import fastsoftmax

RTOL = {np.float32: 1e-5, np.float64: 1e-12}


def test_signatures_begin_with_scipys(function):
    ours = list(inspect.signature(getattr(fastsoftmax, function)).parameters.values())
    theirs = list(inspect.signature(getattr(scipy.special, function)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), ()], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 60, 70)], ids=str)
def test_same_values_and_types(backend, function, dtype, shape, axis):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype) * 10
    ours = getattr(fastsoftmax, function)(x, axis)
    theirs = getattr(scipy.special, function)(x, axis)
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=RTOL[dtype], atol=RTOL[dtype])
