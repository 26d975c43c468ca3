"""The exact values the package is held to, and the unit in which it may differ from them.

The reference computes in long double. With a 64-bit significand its own error is 2**-11 of a float64 ULP and less,
provided that the rounding error of ``x - maximum`` is kept: over +-700 that error alone would be half an ULP. For
narrower dtypes float64 would do as well, in a fifth of the time: its error is 2**-26 of a float32 ULP.
`test_accuracy.py` holds the reference itself to mpmath.
"""

import numpy as np
from ml_dtypes import finfo

LONG = np.longdouble


def exact(function, x, axis=None, temperature=1, wide=LONG):
    """Return softmax, log_softmax or logsumexp of real ``x / temperature``, in a wide dtype; logsumexp keeps axes."""
    x, temperature = np.asarray(x, wide), wide(temperature)
    if axis == ():
        x, axis = x[..., np.newaxis], -1
        return exact(function, x, axis, temperature, wide)[..., 0]
    maximum = x.max(axis, keepdims=True)
    with np.errstate(all="ignore"):
        difference, error = (part / temperature for part in _difference(x, maximum))
        terms = np.exp(difference) * (1 + error)
        if function == "softmax":
            return terms / terms.sum(axis, keepdims=True)
        log_sum = _log_sum(x, terms, maximum, axis)
        return maximum / temperature + log_sum if function == "logsumexp" else difference - log_sum + error


def wide_for(dtype):
    """Return what results of a dtype are held against."""
    return LONG if dtype.itemsize > 4 else np.float64


def summand_scale(x, axis=None, temperature=1):
    """Return the largest of maximum, log(sum) and their sum, logsumexp, of each row: the sum may cancel."""
    x = np.asarray(x, LONG)
    if axis == ():
        return abs(x / temperature)
    maximum = x.max(axis, keepdims=True)
    with np.errstate(invalid="ignore"):
        log_sum = exact("logsumexp", x - maximum, axis, temperature)
        maximum = maximum / LONG(temperature)
        return np.maximum(np.maximum(abs(maximum), abs(log_sum)), abs(maximum + log_sum))


def _difference(x, maximum):
    """Return x - maximum and its rounding error (Knuth's TwoSum); the error of an infinite difference is 0."""
    difference = x - maximum
    other = difference - x
    error = (x - (difference - other)) - (maximum + other)
    return difference, np.where(np.isfinite(error), error, 0)


def _log_sum(x, terms, maximum, axis):
    """Return log(sum(terms)) with the largest term, 1, kept apart; 0 where the maximum is infinite."""
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    ties = (x == maximum).sum(axis, keepdims=True)
    rest = np.where(x == maximum, 0, terms).sum(axes, keepdims=True) + (ties - 1)
    return np.where(np.isinf(maximum), 0, np.log1p(rest))


def ulp(size, dtype):
    """Return the ULP of a dtype at numbers of a size, which are of a wider one.

    One ULP of a value in [2**e, 2**(e + 1)) is the spacing of the dtype there, ``eps * 2**e``; below the normal
    numbers it is the smallest subnormal.
    """
    limits = finfo(dtype)
    exponent = np.where(size == 0, limits.minexp, np.frexp(size)[1] - 1)
    return np.ldexp(size.dtype.type(limits.eps), np.maximum(exponent, limits.minexp))


def ulps(actual, exact_value, scale=None):
    """Return the error of each element of ``actual``, in ULP of its dtype.

    The ULP is that of ``exact_value``, or of ``scale`` where that is given. A NaN differs by 0 from a NaN, and so does
    an infinity from a value that rounds to it; any other pair with a non-finite member differs by infinity.
    """
    actual, exact_value = np.asarray(actual), np.asarray(exact_value, LONG)
    with np.errstate(all="ignore"):
        rounded = exact_value.astype(actual.dtype)
        unit = ulp(exact_value if scale is None else np.asarray(scale, LONG), actual.dtype)
        error = abs(actual.astype(LONG) - exact_value) / unit
    same = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
    return np.where(np.isfinite(actual) & np.isfinite(rounded), error, np.where(same, 0.0, np.inf)).astype(float)


def max_ulp_error(actual, exact_value, scale=None):
    """Return the largest of `ulps`; 0 for no elements."""
    return float(ulps(actual, exact_value, scale).max(initial=0.0))


def error_of(function, actual, x, axis=None, temperature=1):
    """Return the largest error of a result in ULP: of the result itself, for logsumexp of the larger summand."""
    value = exact(function, x, axis, temperature, wide_for(np.asarray(actual).dtype))
    if function != "logsumexp":
        assert np.shape(actual) == value.shape
        return max_ulp_error(actual, value)
    return max_ulp_error(np.reshape(actual, value.shape), value, summand_scale(x, axis, temperature))
