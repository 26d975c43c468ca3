"""How long does the softmax of data in pieces take, and that with a one in the denominator?"""

import fastsoftmax
from fastsoftmax._bench import parse_case


class Streaming:
    params = (["update", "normalize"], ["1024x1024", "256x50257", "4096x4096@0"], ["cython", "numba", "numpy"])
    param_names = ("method", "shape", "backend")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, method, shape, backend):
        case = parse_case(shape, "float32")
        self.x, self.online = case.data(), fastsoftmax.OnlineSoftmax(case.axis, backend=backend)
        self.online.update(self.x)
        self.arguments = {"out": self.x.copy()} if method == "normalize" else {}
        self.time_call(method, shape, backend)

    def time_call(self, method, shape, backend):
        getattr(self.online, method)(self.x, **self.arguments)


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
