"""How long do vector-Jacobian products take, Jacobians, and a loss with its gradient?"""

import numpy as np

import fastsoftmax
from fastsoftmax._bench import parse_case


class Derivatives:
    params = (
        ["softmax", "log_softmax", "logsumexp"],
        ["10", "64x1000", "1024x1024", "8192x4096", "4096x4096@0"],
        ["float32", "float64"],
        ["cython", "numba", "numpy"],
    )
    param_names = ("function", "shape", "dtype", "backend")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, function, shape, dtype, backend):
        case = parse_case(shape, dtype)
        x = case.data()
        result = getattr(fastsoftmax, function)(x, case.axis)
        self.vjp, self.axis, self.out = getattr(fastsoftmax, f"{function}_vjp"), case.axis, x.copy()
        self.operands = (x, result) if function == "logsumexp" else (result, x)
        self.backend = backend
        self.time_call(function, shape, dtype, backend)

    def time_call(self, function, shape, dtype, backend):
        self.vjp(*self.operands, self.axis, out=self.out, backend=self.backend)


class Jacobian:
    """The whole matrix of each row, by one call and by hand; no backend has kernels for it."""

    params = (["10", "1000x10", "64x100", "1000"], ["float32", "float64"], ["fastsoftmax", "by hand"])
    param_names = ("shape", "dtype", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, dtype, contender):
        case = parse_case(shape, dtype)
        p = fastsoftmax.softmax(case.data(), case.axis)
        every = np.eye(p.shape[-1], dtype=p.dtype)
        self.call = {
            "fastsoftmax": lambda: fastsoftmax.softmax_jacobian(p, case.axis),
            "by hand": lambda: p[..., :, np.newaxis] * (every - p[..., np.newaxis, :]),
        }[contender]
        self.call()

    def time_call(self, shape, dtype, contender):
        self.call()


class CrossEntropy:
    params = (["64x1000", "1024x1024", "512x50257"], ["loss", "gradient"], ["cython", "numba", "numpy"])
    param_names = ("shape", "result", "backend")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, result, backend):
        self.logits = parse_case(shape, "float32").data()
        n_rows, n_classes = self.logits.shape
        self.labels = np.random.default_rng(0).integers(0, n_classes, n_rows)
        self.options = {"backend": backend}
        if result == "gradient":
            self.options |= {"return_grad": True, "grad_out": self.logits.copy()}
        self.time_call(shape, result, backend)

    def time_call(self, shape, result, backend):
        fastsoftmax.softmax_cross_entropy(self.logits, self.labels, **self.options)
