"""How much longer does a call take with ``where=``, ``temperature=`` or ``dtype=``, and than by hand?"""

import numpy as np
import scipy.special

import fastsoftmax
from fastsoftmax._bench import parse_case

TEMPERATURE = 0.7


def by_hand(function, x, axis, out, where=None, temperature=1.0, dtype=None):
    """What one would write without them: a temporary for each."""
    logits = x if dtype is None else x.astype(dtype)
    logits = logits if where is None else np.where(where, logits, logits.dtype.type(-np.inf))
    return function(logits if temperature == 1 else logits / logits.dtype.type(temperature), axis, out=out)


class Options:
    params = (
        ["softmax", "log_softmax"],
        ["10", "1024x1024", "8192x4096", "4096x4096@0", "1000000x10"],
        [
            "none",
            "where",
            "temperature",
            "where and temperature",
            "dtype",
            "where by hand",
            "temperature by hand",
            "dtype by hand",
        ],
        ["cython", "numba", "numpy"],
    )
    param_names = ("function", "shape", "options", "backend")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, function, shape, options, backend):
        case = parse_case(shape, "float32")
        self.x, self.axis = case.data(), case.axis
        self.out, self.function = np.empty_like(self.x), getattr(fastsoftmax, function)
        self.options = {}
        if "dtype" in options:
            self.x, self.options["dtype"] = self.x.astype(np.float64), np.float32
        if "where" in options:
            self.options["where"] = np.random.default_rng(1).random(self.x.shape) < 0.8
        if "temperature" in options:
            self.options["temperature"] = TEMPERATURE
        self.is_by_hand = options.endswith("by hand")
        self.backend = backend
        self.time_call(function, shape, options, backend)

    def time_call(self, function, shape, options, backend):
        with fastsoftmax.use_backend(self.backend):
            if self.is_by_hand:
                by_hand(self.function, self.x, self.axis, self.out, **self.options)
            else:
                self.function(self.x, self.axis, out=self.out, **self.options)


class Weighted:
    """logsumexp with factors, of rows as mixture models have them and of longer ones."""

    params = (
        ["100000x3", "100000x10", "10x100000@0", "1000x1000", "1000x1000@0", "1000000"],
        ["none", "b", "b and where", "b of float16"],
        ["cython", "numba", "numpy", "peer:scipy"],
    )
    param_names = ("shape", "factors", "contender")
    repeat = (2, 10, 0.5)
    warmup_time = 0.05

    def setup(self, shape, factors, contender):
        case, rng = parse_case(shape, "float32"), np.random.default_rng(1)
        a, axis = case.data(), case.axis
        b = rng.random([size if axis == i else 1 for i, size in enumerate(a.shape)], np.float32)
        options = {} if factors == "none" else {"b": b}
        if factors == "b of float16":
            a, options["b"] = a.astype(np.float16), b.astype(np.float16)
        if factors == "b and where":
            options["where"] = rng.random(a.shape) < 0.8
        if contender == "peer:scipy":
            if "where" in options:
                raise NotImplementedError("SciPy takes no where")
            self.call = lambda: scipy.special.logsumexp(a, axis, **options)
        else:
            self.call = lambda: fastsoftmax.logsumexp(a, axis, backend=contender, **options)
        self.call()

    def time_call(self, shape, factors, contender):
        self.call()
