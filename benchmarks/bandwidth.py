"""How near does a large call come to a copy of the same bytes, and what do more threads bring?"""

from statistics import median
from time import perf_counter

import numpy as np

from fastsoftmax._bench import parse_case
from fastsoftmax._schedule import max_threads

from .common import prepare_warm


class Bandwidth:
    params = (
        ["100000x128", "4096x4096@0"],
        ["float32", "float64"],
        sorted({1, max_threads()}),
        ["fastsoftmax:cython", "fastsoftmax:numba", "copy:numpy", "copy:torch"],
    )
    param_names = ("shape", "dtype", "n_threads", "contender")
    unit = "GB/s"

    def setup(self, shape, dtype, n_threads, contender):
        self.call = prepare_warm(contender, "softmax", shape, dtype, n_threads)

    def track_bandwidth(self, shape, dtype, n_threads, contender):
        seconds = []
        for _ in range(5):
            start = perf_counter()
            self.call()
            seconds.append(perf_counter() - start)
        moved_bytes = 2 * parse_case(shape, dtype).size * np.dtype(dtype).itemsize
        return round(moved_bytes / median(seconds) / 1e9, 2)
