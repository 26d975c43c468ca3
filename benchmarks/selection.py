"""How long do the largest probabilities take, and random draws, beside the ways of NumPy and torch?"""

import numpy as np

import fastsoftmax
from fastsoftmax._bench import parse_case

SHAPES = ["64x1000", "256x50257", "100000x10", "20000x50", "64x100x1000@1", "4096x4096@0"]


def numpy_topk(x, k, axis):
    p = np.exp(x - x.max(axis, keepdims=True))
    p /= p.sum(axis, keepdims=True)
    indices = np.argpartition(-p, k - 1, axis).take(range(k), axis)
    values = np.take_along_axis(p, indices, axis)
    order = np.argsort(-values, axis)
    return np.take_along_axis(values, order, axis), np.take_along_axis(indices, order, axis)


def numpy_sample(x, axis, rng):
    """`Generator.choice` for each row, the only way it has with probabilities."""
    p = np.exp(x - x.max(axis, keepdims=True), dtype=np.float64)
    p /= p.sum(axis, keepdims=True)
    return [rng.choice(row.size, p=row) for row in np.moveaxis(p, axis, -1).reshape(-1, x.shape[axis])]


def numpy_gumbel(x, axis, rng):
    return (x + rng.gumbel(size=x.shape)).argmax(axis)


def _torch():
    """Return torch, on one thread as NumPy is; skip the benchmark where there is none."""
    try:
        import torch
    except ImportError as error:
        raise NotImplementedError(str(error)) from error
    torch.set_num_threads(1)
    return torch


class TopK:
    params = (
        SHAPES,
        [1, 5, 50],
        ["cython", "numba", "numpy", "peer:numpy", "peer:torch", "logsumexp"],
    )
    param_names = ("shape", "k", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, k, contender):
        case = parse_case(shape, "float32")
        x, axis = case.data(), case.axis
        if k > x.shape[axis]:
            raise NotImplementedError("rows are shorter than k")
        if contender == "peer:numpy":
            self.call = lambda: numpy_topk(x, k, axis)
        elif contender == "peer:torch":
            torch = _torch()
            tensor = torch.from_numpy(x)
            self.call = lambda: torch.topk(torch.softmax(tensor, axis), k, axis)
        elif contender == "logsumexp":
            self.call = lambda: fastsoftmax.logsumexp(x, axis)
        else:
            self.call = lambda: fastsoftmax.softmax_topk(x, k, axis, backend=contender)
        self.call()

    def time_call(self, shape, k, contender):
        self.call()


class Sample:
    params = (
        SHAPES,
        ["all", "top_k", "top_p"],
        ["cython", "numba", "numpy", "peer:choice", "peer:gumbel", "peer:torch"],
    )
    param_names = ("shape", "truncation", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, truncation, contender):
        case = parse_case(shape, "float32")
        x, axis, rng = case.data() * 3, case.axis, np.random.default_rng(0)
        if contender.startswith("peer") and truncation != "all":
            raise NotImplementedError("the peers draw from all elements")
        if contender == "peer:choice":
            self.call = lambda: numpy_sample(x, axis, rng)
        elif contender == "peer:gumbel":
            self.call = lambda: numpy_gumbel(x, axis, rng)
        elif contender == "peer:torch":
            torch = _torch()
            rows = torch.from_numpy(np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]))
            self.call = lambda: torch.multinomial(torch.softmax(rows, -1), 1)
        else:
            options = {"all": {}, "top_k": {"top_k": min(x.shape[axis], 50)}, "top_p": {"top_p": 0.9}}[truncation]
            self.call = lambda: fastsoftmax.sample(x, axis, rng=rng, backend=contender, **options)
        self.call()

    def time_call(self, shape, truncation, contender):
        self.call()
