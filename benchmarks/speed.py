"""How long does a call take, in each group of cases that compare.py holds to a target?"""

from fastsoftmax._bench import FUNCTIONS
from fastsoftmax._schedule import max_threads

from .common import CONTENDER_NAMES, prepare_warm
from .compare import TARGETS


def cases_of(*groups):
    """List the cases of some groups of targets, each as its dtype and its shape."""
    targets = [target for target in TARGETS if target[0] in groups]
    cases = [
        f"{dtype} {shape}" for _, dtypes, shapes, *_ in targets for dtype in dtypes.split() for shape in shapes.split()
    ]
    return list(dict.fromkeys(cases))


class _Group:
    param_names = ("function", "case", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, function, case, contender):
        dtype, shape = case.split()
        self.call = prepare_warm(contender, function, shape, dtype, max_threads())

    def time_call(self, function, case, contender):
        self.call()


class InCache(_Group):
    params = (FUNCTIONS, cases_of("in-cache", "in-cache-f64"), CONTENDER_NAMES)


class BeyondCache(_Group):
    params = (FUNCTIONS, cases_of("beyond-cache"), CONTENDER_NAMES)


class LongRow(_Group):
    params = (FUNCTIONS, cases_of("long-row"), CONTENDER_NAMES)


class TinyRows(_Group):
    params = (FUNCTIONS, cases_of("tiny-rows"), CONTENDER_NAMES)


class OtherAxis(_Group):
    params = (FUNCTIONS, cases_of("other-axis"), CONTENDER_NAMES)


class LowPrecision(_Group):
    params = (FUNCTIONS[:1], cases_of("low-precision"), CONTENDER_NAMES)
