"""Single calls under pytest-benchmark, on every backend and tier: ``pytest --benchmark-only``."""

import numpy as np
import pytest

import fastsoftmax


@pytest.mark.parametrize(
    ("shape", "axis"), [((10,), 0), ((64, 1000), 1), ((4096, 16), 1), ((512, 512), 0)], ids=lambda value: str(value)
)
def test_softmax(benchmark, backend, shape, axis):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    out = np.empty_like(x)
    fastsoftmax.softmax(x, axis, out=out)  # loads and compiles what is needed
    benchmark(fastsoftmax.softmax, x, axis, out=out)
    np.testing.assert_allclose(out.sum(axis), 1, rtol=1e-6)


def test_logsumexp(benchmark, backend):
    x = np.random.default_rng(0).standard_normal((64, 1000), np.float32)
    fastsoftmax.logsumexp(x, 1)
    result = benchmark(fastsoftmax.logsumexp, x, 1)
    np.testing.assert_allclose(result, np.log(np.exp(x, dtype=np.float64).sum(1)), rtol=1e-6)
