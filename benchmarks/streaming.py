"""How long does the softmax of data in pieces take, and that with a one in the denominator?"""

import fastsoftmax
from fastsoftmax._bench import parse_case


class Streaming:
    params = (
        ["first", "update", "merge", "normalize", "logsumexp"],
        ["1024x1024", "256x50257", "100000x10", "1000000x3", "4096x4096@0", "64x100x1000@1"],
        ["cython", "numba", "numpy"],
    )
    param_names = ("method", "shape", "backend")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, method, shape, backend):
        case = parse_case(shape, "float32")
        x, out, axis = case.data(), case.data(), case.axis
        online = fastsoftmax.OnlineSoftmax(axis, backend=backend).update(x)
        self.call = {
            "first": lambda: fastsoftmax.OnlineSoftmax(axis, backend=backend).update(x),
            "update": lambda: online.update(x),
            "merge": lambda: fastsoftmax.merge_states(online, online),
            "normalize": lambda: online.normalize(x, out=out),
            "logsumexp": lambda: fastsoftmax.logsumexp(x, axis, backend=backend),  # what the others may cost
        }[method]
        self.call()

    def time_call(self, method, shape, backend):
        self.call()


class Variants:
    params = (
        ["softmax", "softmin", "softmax_one"],
        ["64x1000", "1024x1024", "100000x10", "1000000x3", "4096x4096@0", "64x100x1000@1"],
        ["cython", "numba", "numpy"],
    )
    param_names = ("function", "shape", "backend")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, function, shape, backend):
        case = parse_case(shape, "float32")
        self.x, self.axis, self.function = case.data(), case.axis, getattr(fastsoftmax, function)
        self.out = self.x.copy()
        self.time_call(function, shape, backend)

    def time_call(self, function, shape, backend):
        self.function(self.x, self.axis, out=self.out, backend=backend)
