"""Input data: values that are hard in different ways, and the same values in different places in memory."""

import numpy as np
from ml_dtypes import finfo


def _prefix(values, length, value):
    values[:length] = value
    return values


def _one(values, value):
    values[values.size // 2] = value
    return values


def _subnormal_results(rng, n, dtype):
    """A zero and values whose exponentials are around the smallest normal number and below it."""
    smallest = np.log(float(finfo(dtype).tiny))
    return _one(rng.uniform(smallest - 20, smallest + 5, n), 0)


def _rounding_ties(rng, n, dtype):
    """Values whose product with log2(e) rounds to a number half-way between two integers, below a 40."""
    log2e = dtype(np.log2(np.e))
    halves = np.arange(-60, 50) + 0.5
    near = np.nextafter((halves / np.log2(np.e)).astype(dtype)[:, np.newaxis], dtype([-np.inf, 0, np.inf]), dtype=dtype)
    ties = near[near * log2e == halves.astype(dtype)[:, np.newaxis]]
    return _prefix(rng.choice(ties, n), 1, 40)


def _straddling(rng, n, dtype):
    """Values on both sides of where a chunk has an offset, far apart enough for chunks to differ in it."""
    edge = 1024 if dtype == np.float32 else 16384
    return _prefix(np.full(n, 1.0 - edge), max(n - 10, 0), -edge - 0.9 - abs(rng.normal(size=max(n - 10, 0))) * 0.1)


def _far_from_first(rng, n, dtype):
    """Values whose chunks, but for the first of a long row, have offsets of their own and count all."""
    first, rest = (1100.0, 1400.0) if dtype == np.float32 else (20_000.0, 25_000.0)
    return _prefix(rest + rng.normal(size=n), n // 8, first)


def _near_ties(rng, n, dtype):
    """Neighbouring numbers."""
    return 2 + rng.integers(0, 4, n) * 2 * float(finfo(dtype).eps)


def _offset(rng, n, dtype):
    """Neighbouring numbers so large that exponentials of their differences are next to nothing, or 1."""
    offset = {"float16": 6e4, "float64": 1e300}.get(np.dtype(dtype).name, 1e8)
    return offset * (1 + rng.integers(-5, 6, n) * float(finfo(dtype).eps))


def _coarse(rng, n, dtype):
    """Numbers so large that they are multiples of a half."""
    return 0.5 / float(finfo(dtype).eps) + rng.integers(-20, 21, n) / 2


def _cancelling(rng, n, dtype):
    """Logarithms of probabilities: the maximum and the logarithm of the sum cancel, but for what is rounded."""
    logits = rng.normal(size=n)
    return logits - np.log(np.exp(logits).sum()) if n else logits


# Each takes a random generator, a number of elements and a dtype, and returns that many values.
VALUES = {
    "normal": lambda rng, n, dtype: rng.normal(size=n),
    "uniform": lambda rng, n, dtype: rng.random(n),
    "wide": lambda rng, n, dtype: rng.uniform(-700, 700, n),
    "constant": lambda rng, n, dtype: np.full(n, 0.3),
    "ascending": lambda rng, n, dtype: np.sort(rng.normal(size=n) * 10),
    "descending": lambda rng, n, dtype: -np.sort(rng.normal(size=n) * 10),
    "ties": lambda rng, n, dtype: rng.integers(0, 3, n).astype(float),
    "near ties": _near_ties,
    "offset": _offset,
    "coarse": _coarse,
    "negative offset": lambda rng, n, dtype: rng.normal(size=n) * 5 - 1500,
    "cancelling": _cancelling,
    "log-probabilities": lambda rng, n, dtype: rng.normal(size=n) - np.log(max(n, 1)) - 0.5,
    "outlier": lambda rng, n, dtype: _one(rng.normal(size=n), 300.0),
    "masked by -inf": lambda rng, n, dtype: np.where(rng.random(n) < 0.4, -np.inf, rng.normal(size=n)),
    "-inf first": lambda rng, n, dtype: _prefix(rng.normal(size=n), n // 2, -np.inf),
    "-1e9 first": lambda rng, n, dtype: _prefix(rng.normal(size=n), n // 2, -1e9),
    "lowest first": lambda rng, n, dtype: _prefix(rng.normal(size=n), n // 2, -3.4e38),
    "extremes": lambda rng, n, dtype: rng.choice([-1.0, 1.0], n) * float(np.finfo(dtype).max),
    "subnormal": lambda rng, n, dtype: rng.normal(size=n) * float(np.finfo(dtype).smallest_subnormal) * 100,
    "subnormal results": _subnormal_results,
    "rounding ties": _rounding_ties,
    "straddling an offset": _straddling,
    "far from the first": _far_from_first,
}
NON_FINITE_VALUES = {
    "one nan": lambda rng, n, dtype: _one(rng.normal(size=n), np.nan),
    "one +inf": lambda rng, n, dtype: _one(rng.normal(size=n), np.inf),
    "all -inf": lambda rng, n, dtype: np.full(n, -np.inf),
    "anything": lambda rng, n, dtype: rng.choice(
        [np.nan, np.inf, -np.inf, 0.0, 1e30, -1e30], n, p=[0.02, 0.02, *[0.24] * 4]
    ),
}
ALL_VALUES = VALUES | NON_FINITE_VALUES


def values(kind, shape, dtype, seed=0):
    """Return an array of one of the kinds in `ALL_VALUES`; what a kind does along a row, it does in C order."""
    data = ALL_VALUES[kind](np.random.default_rng(seed), int(np.prod(shape)), dtype)
    return data.astype(dtype).reshape(shape)


def _stepped(x):
    room = np.empty([2 * size for size in x.shape], x.dtype)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def _permuted(x):
    return np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0)


def _gapped(x):
    room = np.empty((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
    room[..., 1:-2] = x
    return room[..., 1:-2]


def _unaligned(x):
    room = np.zeros(x.nbytes + 1, np.uint8)
    view = np.frombuffer(room, x.dtype, x.size, offset=1).reshape(x.shape)
    view[...] = x
    return view


# Each returns an array of the same shape and values, in memory of its own that can be written to.
WRITABLE_LAYOUTS = {
    "C": lambda x: x.copy(),
    "Fortran": lambda x: x.copy("F"),
    "permuted": _permuted,
    "stepped": _stepped,
    "gapped rows": _gapped,
    "reversed": lambda x: np.flip(np.flip(x).copy()),
    "reversed steps": lambda x: np.flip(_stepped(np.flip(x))),
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": _unaligned,
}


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


# These keep the shape; a broadcast one repeats the values of its first row or column.
LAYOUTS = WRITABLE_LAYOUTS | {
    "broadcast outer": lambda x: np.broadcast_to(x[:1], x.shape),
    "broadcast inner": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "read-only": _read_only,
}


class _UnreadInterface(dict):
    def __getitem__(self, key):
        raise AssertionError("the memory of a device was asked for")


class OnDevice:
    """What says of itself that it is on a CUDA device, and must not be asked for more."""

    __cuda_array_interface__ = _UnreadInterface()
