"""The generic backend: NumPy expressions over whole arrays, for every inexact dtype.

It is the reference of the package and computes what no kernel does (long double, complex). It makes temporaries of the
size of its input.

Rounding ``x - m`` is what costs the usual NumPy expression 65 ULP in float32 and 512 in float64. Here float32 is
computed in float64, and wider types keep the rounding error ``r`` of the subtraction, and of its division by a
temperature: exp((x - m) / T) = exp(q) * (1 + r). In float64 r also has what `numpy.exp`, which may be off by 0.7 ULP,
would round, and sums are long double: it is within 2 ULP then, as the kernels are, at twice the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fastsoftmax import _state
from fastsoftmax._dispatch import Adjustment, CrossEntropy, Function, Plan, Truncation
from fastsoftmax._layout import Array, Dimension, Layout
from fastsoftmax._schedule import Schedule
from fastsoftmax._state import scaled_temperature

READS: frozenset[str] = frozenset()
CONVERTS: frozenset[str] = frozenset()

# Elements of the rows that are computed at once: twice as fast as 1,000,000, whose temporaries leave the cache.
BLOCK = 32768

_SCHEDULE = Schedule("array", "none")


def plan(
    function: Function, layout: Layout, in_place: bool, adjustment: Adjustment | None = None, n_selected: int = 0
) -> Plan:
    return Plan(function, "numpy", None, _SCHEDULE)


def run(plan: Plan, layout: Layout, x: Array, out: Array, g: Array | None) -> None:
    dimensions = layout.kept + layout.reduced
    with np.errstate(all="ignore"):
        rows = _rows(x, layout, [d.x_stride for d in dimensions])
        if g is not None:
            gradients = _rows(g, layout, [d.b_stride for d in dimensions])
            _write(_VJP_ROWS[plan.function](rows, gradients), out, dimensions)
        elif plan.function == "logsumexp":
            _write(_in_blocks(logsumexp_rows, rows), out, layout.kept)
        else:
            _write(_in_blocks(_MAP_ROWS[plan.function], rows), out, dimensions)


def run_weighted(
    plan: Plan, layout: Layout, a: Array, out: Array, b: Array, sign: Array | None, adjustment: Adjustment
) -> None:
    dimensions = layout.kept + layout.reduced
    with np.errstate(all="ignore"):
        terms = _rows(a, layout, [d.x_stride for d in dimensions])
        factors = _rows(b, layout, [d.b_stride for d in dimensions])
        if adjustment.mask is not None:
            mask = _rows(adjustment.mask, layout, [d.mask_stride for d in dimensions])
            factors = np.where(mask, factors, factors.dtype.type(0))
        log_sums, signs = weighted_logsumexp_rows(terms / adjustment.temperature, factors)
        if sign is not None:
            _write(signs, sign, layout.kept)
        else:
            log_sums = log_sums + np.log(signs) if np.iscomplexobj(a) else np.where(signs < 0, np.nan, log_sums)
        _write(log_sums, out, layout.kept)


def run_adjusted(plan: Plan, layout: Layout, x: Array, out: Array, adjustment: Adjustment) -> None:
    dimensions = layout.kept + layout.reduced
    with np.errstate(all="ignore"):
        rows, mask = _rows(x, layout, [d.x_stride for d in dimensions]), None
        if adjustment.mask is not None:
            mask = _rows(adjustment.mask, layout, [d.mask_stride for d in dimensions])
            rows = np.where(mask, rows, rows.dtype.type(-np.inf))
        if plan.function == "logsumexp":
            _write(_in_blocks(logsumexp_rows, rows, adjustment.temperature), out, layout.kept)
            return
        rows_of, masked = (softmax_rows, 0) if plan.function == "softmax" else (log_softmax_rows, -np.inf)
        result = _in_blocks(rows_of, rows, adjustment.temperature).reshape(rows.shape)
        _write(result if mask is None else np.where(mask, result, masked), out, dimensions)


def run_cross_entropy(
    plan: Plan, layout: Layout, x: Array, gradient: Array | None, losses: Array, terms: CrossEntropy
) -> None:
    dimensions = layout.kept + layout.reduced
    with np.errstate(all="ignore"):
        rows = _rows(x, layout, [d.x_stride for d in dimensions]).reshape(-1, layout.n_cols)
        if terms.labels is not None:
            targets = (np.arange(layout.n_cols) == terms.labels[:, np.newaxis]).astype(rows.dtype)
        elif terms.probabilities is not None:
            targets = _rows(terms.probabilities, layout, [d.b_stride for d in dimensions]).reshape(rows.shape)
        result, losses[...] = cross_entropy_rows(rows, targets, terms)
        if gradient is not None:
            _write(result, gradient, dimensions)


def run_topk(plan: Plan, layout: Layout, x: Array, values: Array, indices: Array) -> None:
    with np.errstate(all="ignore"):
        rows = _rows(x, layout, [d.x_stride for d in layout.kept + layout.reduced]).reshape(-1, layout.n_cols)
        indices[:] = _order(rows)[:, : indices.shape[1]]
        values[:] = np.take_along_axis(softmax_rows(rows), indices, axis=1)


def run_sampling(plan: Plan, layout: Layout, x: Array, uniforms: Array, draws: Array, terms: Truncation) -> None:
    with np.errstate(all="ignore"):
        rows = _rows(x, layout, [d.x_stride for d in layout.kept + layout.reduced]).reshape(-1, layout.n_cols)
        draws[:] = sampled_rows(rows, uniforms, terms)


def run_states(plan: Plan, layout: Layout, x: Array, out: Array | None, states: Array) -> None:
    dimensions = layout.kept + layout.reduced
    precision = _precision(x.dtype == np.float32)
    with np.errstate(all="ignore"):
        rows = _rows(x, layout, [d.x_stride for d in dimensions]).reshape(-1, layout.n_cols)
        if out is not None:
            _write(normalized_rows(rows, states, precision), out, dimensions)
        else:
            for packed, row in zip(states, rows, strict=True):
                state = _state.merge(_unpack(packed, precision), state_of_row(row, precision), precision)
                packed[:] = _state.pack(state, precision)


def merge_states(states: Array, others: Array, is_single: bool) -> None:
    precision = _precision(is_single)
    for packed, other in zip(states, others, strict=True):
        merged = _state.merge(_unpack(packed, precision), _unpack(other, precision), precision)
        packed[:] = _state.pack(merged, precision)


def logsumexp_of_states(states: Array, is_single: bool) -> Array:
    precision = _precision(is_single)
    return np.array([_state.logsumexp(_unpack(packed, precision), precision) for packed in states])


def _precision(is_single: bool) -> _state.Precision:
    return _state.FLOAT32_WIDE if is_single else _state.FLOAT64


def _unpack(packed: Array, precision: _state.Precision) -> _state.State:
    maximum, offset, exponent, sum, residue = packed.tolist()
    return _state.unpack(maximum, offset, exponent, sum, residue, precision)


def _rows(array: Array, layout: Layout, strides: list[int]) -> Array:
    """Return a contiguous copy with the reduced dimensions as one last axis; float32 as float64."""
    source = as_strided(array, [d.size for d in layout.kept + layout.reduced], strides, writeable=False)
    dtype = np.float64 if array.dtype == np.float32 else None
    return np.ascontiguousarray(source.reshape(*(d.size for d in layout.kept), layout.n_cols), dtype)


def _in_blocks(function_of: Callable[..., Array], rows: Array, *arguments: float) -> Array:
    """Call a function of rows on some of them after the other; return its results one below the other."""
    rows = rows.reshape(-1, rows.shape[-1])
    size = max(1, BLOCK // rows.shape[-1])
    return np.concatenate([function_of(rows[i : i + size], *arguments) for i in range(0, len(rows), size)])


def _write(result: Array, out: Array, dimensions: tuple[Dimension, ...]) -> None:
    shape, strides = [d.size for d in dimensions], [d.y_stride for d in dimensions]
    as_strided(out, shape, strides)[...] = result.reshape(shape)


def softmax_rows(rows: Array, temperature: float = 1.0) -> Array:
    """Softmax over the last axis."""
    maximum, shift = _maximum(rows), _shift_of(rows)
    exponentials, residuals = _exp_parts(*_quotients(rows, maximum, temperature), shift)
    terms = exponentials + exponentials * residuals
    if np.iscomplexobj(rows):
        total = _sum(terms)
    else:
        others = np.ldexp(_sum_of_others(terms, rows), -shift)
        total = np.where(np.isfinite(maximum), 1 + others, np.nan)
    return _over(exponentials, residuals, total, shift)


def log_softmax_rows(rows: Array, temperature: float = 1.0) -> Array:
    """Log-softmax over the last axis."""
    maximum = _maximum(rows)
    quotients, residuals = _quotients(rows, maximum, temperature)
    log_sum = _log_sum(rows, maximum, quotients, residuals).astype(rows.dtype)
    result: Array = (quotients - log_sum) + residuals
    return result


def logsumexp_rows(rows: Array, temperature: float = 1.0) -> Array:
    """Logsumexp over the last axis."""
    maximum = _maximum(rows)
    log_sum = _log_sum(rows, maximum, *_quotients(rows, maximum, temperature))
    result: Array = (maximum / temperature + log_sum)[..., 0]
    return result


def softmax_one_rows(rows: Array) -> Array:
    """exp(x) / (1 + sum(exp(x))) over the last axis: the softmax with a zero more."""
    maximum, shift = np.maximum(_maximum(rows), 0), _shift_of(rows)
    exponentials, residuals = _exp_parts(*_quotients(rows, maximum, 1.0), shift)
    total = _sum(exponentials + exponentials * residuals) * 2.0**-shift + np.exp(-maximum)
    return _over(exponentials, residuals, total, shift)


def _order(rows: Array) -> Array:
    """The indices of each row from the largest element down: NaN first, and of equal ones the lowest index."""
    order: Array = np.lexsort((-rows, ~np.isnan(rows)))
    return order


def sampled_rows(rows: Array, uniforms: Array, terms: Truncation) -> Array:
    """An index for each uniform number: the first whose cumulative probability is above it."""
    rows = rows / terms.temperature
    maximum = _maximum(rows)
    weights = np.where(rows == -np.inf, 0, _exp_difference(rows, maximum))
    if terms.top_k is not None or terms.top_p < 1:
        order = _order(rows)
        ordered = np.take_along_axis(weights, order, axis=1)
        ordered[:, terms.top_k or rows.shape[1] :] = 0
        sums = ordered.cumsum(axis=1)
        before = np.concatenate([np.zeros_like(sums[:, :1]), sums[:, :-1]], axis=1)
        ordered[before >= terms.top_p * sums[:, -1:]] = 0
        np.put_along_axis(weights, order, ordered, axis=1)
    sums = weights.cumsum(axis=1)
    targets = np.minimum(uniforms * sums[:, -1:], np.nextafter(sums[:, -1:], 0))
    draws = [row.searchsorted(target, "right") for row, target in zip(sums, targets, strict=True)]
    return np.where(np.isfinite(maximum), draws, -1)


def state_of_row(row: Array, precision: _state.Precision) -> _state.State:
    """The state of a float64 row."""
    known = row[~np.isnan(row)]
    maximum = float(known.max(initial=-np.inf))
    if known.size < row.size or np.isinf(maximum):
        return _state.State(maximum, 0.0 if known.size == row.size else np.nan, 0.0)
    others = float(_sum_of_others(_exp_difference(row, np.asarray(maximum)), row)[0])
    top, top_low = _state.term(maximum, *_state.reference(maximum, precision), precision)
    sum = others * top
    return _state.State(maximum, sum, _state.product_error(others, top, sum) + others * top_low)


def normalized_rows(rows: Array, states: Array, precision: _state.Precision) -> Array:
    """exp(x) over the sum of the exponentials that each row's state has seen."""
    unpacked = [_unpack(packed, precision) for packed in states]
    maximum = np.array([[state.maximum] for state in unpacked])
    totals = np.array([[_total_over_top(state, precision)] for state in unpacked])
    quotients, residuals = _quotients(rows, maximum, 1.0)
    shift = np.where(quotients > 0, 0, _shift_of(rows))  # of what is larger than all that was seen it may overflow
    exponentials, residuals = _exp_parts(quotients, np.where(rows > maximum, 0, residuals), shift)
    ratios = np.where(np.isinf(exponentials), np.inf, _over(exponentials, residuals, totals, shift))
    return np.where(np.isnan(totals), np.nan, ratios)


def _total_over_top(state: _state.State, precision: _state.Precision) -> np.longdouble:
    """The sum of exp(x - maximum) over what a state has seen; NaN if the maximum is infinite."""
    if np.isinf(state.maximum):
        return np.longdouble(np.nan)
    top, top_low = _state.term(state.maximum, *_state.reference(state.maximum, precision), precision)
    high, low = _state.total(state, precision)
    return (np.longdouble(high) + low) / (np.longdouble(top) + top_low)


def _maximum(rows: Array) -> Array:
    """Return the last axis's maximum (of the real parts), NaN where there is one."""
    maximum: Array = rows.real.max(axis=-1, keepdims=True)
    return maximum


def _quotients(rows: Array, maximum: Array, temperature: float) -> tuple[Array, Array]:
    """Return (rows - maximum) / temperature, and what rounding took from it where that is finite."""
    t, shrink, grow = (1.0, 1.0, 1.0) if temperature == 1 else scaled_temperature(temperature)
    rows, maximum = rows * shrink, maximum * shrink
    difference = rows - maximum
    if np.iscomplexobj(rows):
        return difference * grow / t, np.zeros((), rows.real.dtype)
    other = difference - rows  # Knuth's TwoSum: (rows - (difference - other)) - (maximum + other) is the error
    residual = ((rows - (difference - other)) - (maximum + other)) * grow
    difference = difference * grow
    quotients = difference / t
    if t != 1:
        residual = (residual - _product_minus(quotients, t, difference)) / t
    return quotients, np.where(np.isfinite(residual), residual, 0)


def _product_minus(a: Array, b: float | Array, c: Array) -> Array:
    """Return a * b - c, exactly, where the product is near c (Dekker)."""
    splitter = a.dtype.type(2.0 ** (np.finfo(a.dtype).nmant // 2 + 1) + 1)
    a_high = a * splitter - (a * splitter - a)
    b_high = b * splitter - (b * splitter - b)
    a_low, b_low = a - a_high, b - b_high
    result: Array = ((a_high * b_high - c) + a_high * b_low + a_low * b_high) + a_low * b_low
    return result


def _shift_of(rows: Array) -> int:
    """How many binary digits the terms of rows are shifted up, so that subnormal ones keep theirs until the end."""
    return 200 if rows.dtype == np.float64 else 0


def _exp_parts(quotients: Array, residuals: Array, shift: int | Array = 0) -> tuple[Array, Array]:
    """Return e and r: e * (1 + r) are the exponentials of quotients and residuals, in float64 times 2**shift."""
    if quotients.dtype == np.float64:
        p, low, shifted_k = _state.split(np.clip(quotients, -1000.0, 1000.0), _state.FLOAT64)
        exponentials = np.ldexp(p, (shifted_k - _state.FLOAT64.rounder).astype(np.int32) + shift)
        residuals = residuals + low / p
    else:
        exponentials = np.exp(quotients)
    # Far below zero a residual may be as large as anything.
    return exponentials, np.where(exponentials.real > 0, residuals, 0)


def _exp(quotients: Array, residuals: Array, shift: int = 0) -> Array:
    exponentials, residuals = _exp_parts(quotients, residuals, shift)
    terms: Array = exponentials + exponentials * residuals
    return terms


def _over(exponentials: Array, residuals: Array, total: Array, shift: int | Array) -> Array:
    """Return e * (1 + r) / total / 2**shift, rounded twice: in the division, and where r and what divisors lack are
    added. A subnormal result is rounded once more, and so what the division loses is added too."""
    divisor = total.astype(exponentials.dtype)
    rest = ((total - divisor) / divisor).astype(exponentials.dtype)
    quotients: Array = exponentials / divisor
    power = np.ldexp(quotients.real.dtype.type(1), -shift)
    corrections = quotients * (residuals - rest)
    if np.any(shift):
        is_small = (quotients > 0) & (quotients * power < 2 * np.finfo(quotients.dtype).tiny)
        if is_small.any():
            lost = _product_minus(quotients, divisor, exponentials) / divisor
            corrections -= np.where(is_small, lost, 0)
    result: Array = (quotients + corrections) * power
    return result


def _exp_difference(rows: Array, maximum: Array) -> Array:
    """Return exp(rows - maximum) without the rounding error of the subtraction."""
    return _exp(*_quotients(rows, maximum, 1.0))


def _log_sum(rows: Array, maximum: Array, quotients: Array, residuals: Array) -> Array:
    """Return log(sum(exp(quotients))) in long double; 0 where the maximum is infinite, so that it alone decides."""
    shift = _shift_of(rows)
    terms = _exp(quotients, residuals, shift)
    is_complex = np.iscomplexobj(rows)
    total = np.log(_sum(terms)) if is_complex else np.log1p(np.ldexp(_sum_of_others(terms, rows), -shift))
    return np.where(np.isinf(maximum), 0.0, total)


def _sum(terms: Array) -> Array:
    """Sum over the last axis, in long double: `numpy.sum` adds 16 terms to each other before it pairs sums, which would
    cost softmax of float64 up to 7.6 ULP."""
    total: Array = terms.sum(axis=-1, keepdims=True, dtype=np.result_type(terms, np.longdouble))
    return total


def _sum_of_others(terms: Array, rows: Array) -> Array:
    """Sum all terms but the largest, which is 1: the others keep their digits however small they are."""
    largest = rows.argmax(axis=-1, keepdims=True)
    top = np.take_along_axis(terms, largest, axis=-1)
    np.put_along_axis(terms, largest, 0.0, axis=-1)
    others = _sum(terms)
    np.put_along_axis(terms, largest, top, axis=-1)
    return others


def weighted_logsumexp_rows(a: Array, b: Array) -> tuple[Array, Array]:
    """Return log|sum(b * exp(a))| over the last axis and the sign of the sum, or its phase if it is complex."""
    a, b = np.where(b == 0, -np.inf, a), np.where(b == 0, 1, b)
    sizes = a.real + np.log(np.abs(b))
    largest = np.where(np.isnan(sizes), np.inf, sizes).argmax(axis=-1, keepdims=True)
    a_top, b_top, size_top = (np.take_along_axis(part, largest, axis=-1) for part in (a, b, sizes))
    # Each term relative to the largest, which is then 1 and kept out of the sum. Where the factors overflow on the way
    # to a product of at most 1, the product is taken as the exponential of the logarithms' sum.
    terms: Any = (b / b_top) * np.exp(a - a_top)
    terms = np.where(np.isfinite(terms), terms, np.sign(b) / np.sign(b_top) * np.exp(sizes - size_top))
    np.put_along_axis(terms, largest, 0.0, axis=-1)
    rest = terms.sum(axis=-1, keepdims=True)
    total = 1 + rest
    log_sum = size_top + (np.log(np.abs(total)) if np.iscomplexobj(total) else np.log1p(np.maximum(rest, -1)))
    log_sum = np.where(total.real < -0.0, size_top + np.log(np.abs(total)), log_sum)
    phase_top = np.sign(b_top) * (np.exp(1j * a_top.imag) if np.iscomplexobj(a) else 1)
    sign = phase_top * (total / np.where(total == 0, 1, np.abs(total)))

    infinite = np.isposinf(sizes)
    signs_of_infinite = np.where(infinite, np.sign(b), 0)
    count = infinite.sum(axis=-1, keepdims=True)
    net = signs_of_infinite.sum(axis=-1, keepdims=True)
    log_sum = np.where(count > 0, np.where(np.abs(net) == count, np.inf, np.nan), log_sum)
    sign = np.where(count > 0, np.where(np.abs(net) == count, net / np.maximum(count, 1), np.nan), sign)
    empty = size_top == -np.inf
    invalid = (np.isnan(a) | np.isnan(b)).any(axis=-1, keepdims=True)
    log_sum = np.where(empty, -np.inf, log_sum)
    sign = np.where(empty, 0, sign)
    return np.where(invalid, np.nan, log_sum)[..., 0], np.where(invalid, np.nan, sign)[..., 0]


def softmax_vjp_rows(p: Array, g: Array) -> Array:
    """p * (g - sum(p * g)) over the last axis; 0 where p is, whatever g."""
    total = _sum(np.where(p == 0, 0, p * g)).astype(p.dtype)
    return np.where(p == 0, 0, p * (g - total))


def log_softmax_vjp_rows(log_p: Array, g: Array) -> Array:
    """g - exp(log_p) * sum(g) over the last axis; g where the probability is 0."""
    p = np.exp(log_p)
    return np.where(p == 0, g, g - p * _sum(g).astype(p.dtype))


def logsumexp_vjp_rows(a: Array, g: Array) -> Array:
    """g * softmax(a) over the last axis; 0 where the probability is, whatever g."""
    p = softmax_rows(a)
    return np.where(p == 0, 0, g * p)


def cross_entropy_rows(logits: Array, targets: Array, terms: CrossEntropy) -> tuple[Array, Array]:
    """The gradients and the losses of rows, given target probabilities; see `fastsoftmax._cross_entropy`."""
    x = terms.softcap * np.tanh(logits / terms.softcap) if terms.softcap else logits
    factors = (1 - terms.smoothing) * targets + terms.smoothing / targets.shape[-1]
    factors = terms.scale * (factors if terms.weights is None else factors * terms.weights)
    log_p, log_total = log_softmax_rows(x), logsumexp_rows(x)
    losses = -np.where(factors == 0, 0, factors * log_p).sum(axis=-1)
    if terms.z_scale:
        losses += terms.z_scale * log_total**2
    size = factors.sum(axis=-1) + 2 * terms.z_scale * log_total
    gradients = softmax_rows(x) * size[:, np.newaxis] - factors
    if terms.softcap:
        gradients *= 1 - (x / terms.softcap) ** 2
    if terms.labels is not None:
        gradients[terms.labels < 0] = losses[terms.labels < 0] = 0
    return gradients, losses


_MAP_ROWS = {"softmax": softmax_rows, "log_softmax": log_softmax_rows, "softmax_one": softmax_one_rows}
_VJP_ROWS = {
    "softmax_vjp": softmax_vjp_rows,
    "log_softmax_vjp": log_softmax_vjp_rows,
    "logsumexp_vjp": logsumexp_vjp_rows,
}
