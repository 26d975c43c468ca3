"""How long does a call take, for each shape, axis, dtype and contender?"""

from fastsoftmax._schedule import max_threads

from .common import CONTENDER_NAMES, prepare_warm


class Softmax:
    params = (
        ["64x1000", "1024x1024", "100000x128", "1000000x10", "64x100x1000@1", "4096x4096@0", "10000000"],
        ["float32", "float64"],
        CONTENDER_NAMES,
    )
    param_names = ("shape", "dtype", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, dtype, contender):
        self.call = prepare_warm(contender, "softmax", shape, dtype, max_threads())

    def time_call(self, shape, dtype, contender):
        self.call()


class OtherFunctions:
    params = (["log_softmax", "logsumexp"], ["1024x1024", "4096x1024@0"], ["float32", "float64"], CONTENDER_NAMES)
    param_names = ("function", "shape", "dtype", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, function, shape, dtype, contender):
        self.call = prepare_warm(contender, function, shape, dtype, max_threads())

    def time_call(self, function, shape, dtype, contender):
        self.call()
