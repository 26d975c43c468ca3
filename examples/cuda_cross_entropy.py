"""A kernel of one's own with the online softmax in it: the cross-entropy of logits and labels, in one pass.

Each block has a row. Its threads fold their elements into a state each, `block_reduce` merges these, and the loss of
the row is its logsumexp less the logit of its label. Neither probabilities nor anything else of that size are written.
"""

import numpy as np
from numba import cuda

from fastsoftmax.cuda import device_functions

fold, merge, warp_reduce, block_reduce, probability, logsumexp = device_functions("float32")
NOTHING, ZERO = np.float32(-np.inf), np.float32(0)


@cuda.jit
def cross_entropy(logits, labels, losses):
    row = cuda.blockIdx.x
    maximum, sum, residue = NOTHING, ZERO, ZERO
    for column in range(cuda.threadIdx.x, logits.shape[1], cuda.blockDim.x):
        maximum, sum, residue = fold(maximum, sum, residue, logits[row, column])
    maximum, sum, residue = block_reduce(maximum, sum, residue)
    if cuda.threadIdx.x == 0:
        losses[row] = logsumexp(maximum, sum, residue) - logits[row, labels[row]]


def main():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1000, 5000)).astype(np.float32)
    labels = rng.integers(0, 5000, 1000)
    losses = cuda.device_array(1000, np.float32)
    cross_entropy[1000, 256](cuda.to_device(logits), cuda.to_device(labels), losses)
    print(f"mean loss {losses.copy_to_host().mean():.4f}; of a guess it is {np.log(5000):.4f}")


if __name__ == "__main__":
    main()
