"""How long do the largest probabilities take, and random draws, beside the ways of NumPy and torch?"""

import numpy as np

import fastsoftmax
from fastsoftmax._bench import parse_case


def numpy_topk(x, k):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    indices = np.argpartition(p, -k, axis=-1)[..., -k:]
    values = np.take_along_axis(p, indices, axis=-1)
    order = np.argsort(-values, axis=-1)
    return np.take_along_axis(values, order, axis=-1), np.take_along_axis(indices, order, axis=-1)


def numpy_sample(x, rng):
    """`Generator.choice` for each row, the only way it has with probabilities."""
    p = np.exp(x - x.max(axis=-1, keepdims=True), dtype=np.float64)
    p /= p.sum(axis=-1, keepdims=True)
    return [rng.choice(row.size, p=row) for row in p]


def numpy_gumbel(x, rng):
    return (x + rng.gumbel(size=x.shape)).argmax(axis=-1)


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
        ["64x1000", "256x50257"],
        [1, 5, 50],
        ["cython", "numba", "numpy", "peer:numpy", "peer:torch", "logsumexp"],
    )
    param_names = ("shape", "k", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, k, contender):
        x = parse_case(shape, "float32").data()
        if contender == "peer:numpy":
            self.call = lambda: numpy_topk(x, k)
        elif contender == "peer:torch":
            torch = _torch()
            tensor = torch.from_numpy(x)
            self.call = lambda: torch.topk(torch.softmax(tensor, -1), k)
        elif contender == "logsumexp":
            self.call = lambda: fastsoftmax.logsumexp(x, -1)
        else:
            self.call = lambda: fastsoftmax.softmax_topk(x, k, backend=contender)
        self.call()

    def time_call(self, shape, k, contender):
        self.call()


class Sample:
    params = (
        ["64x1000", "256x50257"],
        ["all", "top_k", "top_p"],
        ["cython", "numba", "numpy", "peer:choice", "peer:gumbel", "peer:torch"],
    )
    param_names = ("shape", "truncation", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, truncation, contender):
        x, rng = parse_case(shape, "float32").data() * 3, np.random.default_rng(0)
        if contender.startswith("peer") and truncation != "all":
            raise NotImplementedError("the peers draw from all elements")
        if contender == "peer:choice":
            self.call = lambda: numpy_sample(x, rng)
        elif contender == "peer:gumbel":
            self.call = lambda: numpy_gumbel(x, rng)
        elif contender == "peer:torch":
            torch = _torch()
            tensor = torch.from_numpy(x)
            self.call = lambda: torch.multinomial(torch.softmax(tensor, -1), 1)
        else:
            options = {"all": {}, "top_k": {"top_k": 50}, "top_p": {"top_p": 0.9}}[truncation]
            self.call = lambda: fastsoftmax.sample(x, rng=rng, backend=contender, **options)
        self.call()

    def time_call(self, shape, truncation, contender):
        self.call()
