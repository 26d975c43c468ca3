"""The device functions for kernels of one's own, and the example that uses them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

from fastsoftmax.cuda import device_functions
from tests.reference import exact, max_ulp_error, summand_scale

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "cuda_cross_entropy.py"

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("n_cols", [1, 50, 300])
def test_the_example(n_cols):
    kernel = runpy.run_path(str(EXAMPLE))["cross_entropy"]
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(3, n_cols)) * 10).astype(np.float32)
    labels, losses = rng.integers(0, n_cols, 3), np.zeros(3, np.float32)
    kernel[3, 64](logits, labels, losses)
    expected = exact("logsumexp", logits, 1)[:, 0] - logits[np.arange(3), labels]
    assert max_ulp_error(losses, expected, np.maximum(abs(expected), summand_scale(logits, 1)[:, 0])) <= 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reductions_and_probabilities(dtype):
    fold, merge, warp_reduce, block_reduce, probability, logsumexp = device_functions(dtype)
    nothing, zero = np.dtype(dtype).type(-np.inf), np.dtype(dtype).type(0)

    @cuda.jit
    def kernel(x, of_warps, of_block, log_sums):
        thread = cuda.threadIdx.x
        first = fold(nothing, zero, zero, x[thread])
        second = fold(nothing, zero, zero, x[thread + 64])
        state = merge(first[0], first[1], first[2], second[0], second[1], second[2])
        of_warp = warp_reduce(state[0], state[1], state[2])
        of_all = block_reduce(state[0], state[1], state[2])
        again = block_reduce(of_warp[0], of_warp[1], of_warp[2])  # every element 32 times
        of_warps[thread] = probability(x[thread], of_warp[0], of_warp[1], of_warp[2])
        of_block[thread] = probability(x[thread], of_all[0], of_all[1], of_all[2])
        if thread == 0:
            log_sums[0] = logsumexp(of_all[0], of_all[1], of_all[2])
            log_sums[1] = logsumexp(again[0], again[1], again[2])

    x = (np.random.default_rng(0).normal(size=128) * 20).astype(dtype)
    of_warps, of_block, log_sums = (np.zeros(size, dtype) for size in (64, 64, 2))
    kernel[1, 64](x, of_warps, of_block, log_sums)
    warps = x.reshape(2, 2, 32).transpose(1, 0, 2).reshape(2, 64)
    assert max_ulp_error(of_warps.reshape(2, 32), exact("softmax", warps, 1)[:, :32]) <= 2
    assert max_ulp_error(of_block, exact("softmax", x)[:64]) <= 2
    total = exact("logsumexp", x)[0]
    assert log_sums.tolist() == pytest.approx([float(total), float(total) + np.log(32)], rel=1e-6)
