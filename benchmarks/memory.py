"""How much memory does a call take at its peak, the interpreter, the input and the output included?"""

from fastsoftmax._bench import parse_case

from .common import CONTENDER_NAMES, prepare


class Peak:
    params = (["softmax", "logsumexp"], ["4096x4096", "4096x4096@0"], [*CONTENDER_NAMES, "copy:numpy"])
    param_names = ("function", "shape", "contender")

    def setup(self, function, shape, contender):
        case = parse_case(shape, "float32")
        self.call = prepare(contender, function, case.data(), case.axis, 1)

    def peakmem_call(self, function, shape, contender):
        self.call()
