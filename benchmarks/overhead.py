"""What does a call cost that has next to nothing to compute, and what does the import cost?"""

from .common import CONTENDER_NAMES, prepare_warm


class SmallCall:
    params = (["10", "4x10", "1000"], ["float32", "float64"], CONTENDER_NAMES)
    param_names = ("shape", "dtype", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, dtype, contender):
        self.call = prepare_warm(contender, "softmax", shape, dtype, 1)

    def time_call(self, shape, dtype, contender):
        self.call()


class Import:
    params = ("numpy", "fastsoftmax", "scipy.special")
    param_names = ("module",)
    repeat = 5

    def timeraw_import(self, module):
        return f"import {module}"
