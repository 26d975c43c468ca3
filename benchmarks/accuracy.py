"""How far is a result from the true one, at worst, in units in the last place?"""

import numpy as np

from fastsoftmax._bench import error_in_ulp, reference

from .common import CONTENDER_NAMES, prepare

_INPUTS = {
    "normal": lambda rng: rng.standard_normal((16, 4096)),
    "wide": lambda rng: rng.uniform(-80, 80, (16, 4096)),  # x - maximum loses digits that exp then magnifies
    "offset": lambda rng: rng.standard_normal((16, 4096)) + 1000,
    "ascending": lambda rng: np.linspace(-40, 40, 2**18)[np.newaxis],  # a new maximum at every element
    "long": lambda rng: rng.standard_normal((1, 2**21)),  # the error of a plain sum grows with the row
}


class Error:
    params = (["softmax", "logsumexp"], list(_INPUTS), ["float32", "float64"], CONTENDER_NAMES)
    param_names = ("function", "input", "dtype", "contender")
    unit = "ULP"

    def setup(self, function, name, dtype, contender):
        self.x = _INPUTS[name](np.random.default_rng(0)).astype(dtype)
        self.call = prepare(contender, function, self.x, 1, 1)

    def track_largest_error(self, function, name, dtype, contender):
        return round(error_in_ulp(np.asarray(self.call()), reference(function, self.x, 1)), 3)
