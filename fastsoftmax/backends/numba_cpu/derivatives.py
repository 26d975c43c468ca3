"""Vector-Jacobian products for the Numba backend: the traversals of `numba_cpu` with one more input.

A row is read twice: for its sum, and to be written. Sums are taken in float64 with the error of each product and of
each addition, so that their error does not grow with the row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastsoftmax import _state
from fastsoftmax._dispatch import Plan
from fastsoftmax._executor import run_blocks
from fastsoftmax._layout import Array, Layout

from fastsoftmax.backends.numba_cpu import (
    _LANES,
    _SIZE,
    _U,
    _X,
    _Y,
    CHUNK,
    MAX_STRIP,
    _arithmetic,
    _biased_term,
    _collect,
    _distribute,
    _elements,
    _jit,
    _jit_entry,
    _jit_exact,
    _of_factors,
    _offset_of,
    _strip_width,
    _table,
)

_FUNCTIONS = {"softmax_vjp": 0, "log_softmax_vjp": 1, "logsumexp_vjp": 2}
_SOFTMAX_VJP, _LOG_SOFTMAX_VJP, _LOGSUMEXP_VJP = _FUNCTIONS.values()


@_jit_exact
def _fold(x: Any, g: Any, n: Any, has_products: Any, high: Any, low: Any) -> None:
    """Add n elements of g, or products, to running sums, every `_LANES`-th to the same one."""
    for first in range(0, n, _LANES):
        for j in range(min(_LANES, n - first)):
            factor = np.float64(x[_U(first + j)]) if has_products else 1.0
            value = np.float64(g[_U(first + j)])
            product = factor * value
            high[_U(j)], error = _state.two_sum(high[_U(j)], product)
            low[_U(j)] += error + _state.product_error(factor, value, product)


@_jit_exact
def _total(high: Any, low: Any) -> Any:
    """The sum of running sums, in two parts."""
    total = rest = 0.0
    for j in range(_LANES):
        total, error = _state.two_sum(total, high[j])
        rest += error + low[j]
    return total, rest


@_jit
def _plain_sum(x: Any, g: Any, n: Any, has_products: Any) -> Any:
    """A sum in which an element, a product or the error of one is not finite."""
    total = 0.0
    for j in range(n):
        if not has_products:
            total += g[_U(j)]
        elif x[_U(j)] != 0:
            total += np.float64(x[_U(j)]) * np.float64(g[_U(j)])
    return total


@_jit_exact
def _in_two_parts(x: Any, total: Any, rest: Any) -> Any:
    """A sum in the dtype of x, and what that leaves of it."""
    high = x.dtype.type(total)
    return high, x.dtype.type((total - np.float64(high)) + rest if math.isfinite(total) else 0.0)


@_jit
def _gradient_of_softmax(p: Any, g: Any, high: Any, low: Any) -> Any:
    return p * ((g - high) - low) if p != 0 else p * p


@_jit
def _gradient_of_log_softmax(log_p: Any, g: Any, high: Any, low: Any, zero: Any, arithmetic: Any) -> Any:
    term, _ = _biased_term(log_p, zero, -arithmetic.span, arithmetic.power_bias, arithmetic)
    p = term * arithmetic.unbias
    return (g - p * high) - p * low if p != 0 else g


@_jit
def _write(x: Any, g: Any, y: Any, n: Any, has_products: Any, high: Any, low: Any) -> None:
    arithmetic, zero = _arithmetic(x), x.dtype.type(0)
    if has_products:
        for j in range(n):
            y[_U(j)] = _gradient_of_softmax(x[_U(j)], g[_U(j)], high, low)
    else:
        for j in range(n):
            y[_U(j)] = _gradient_of_log_softmax(x[_U(j)], g[_U(j)], high, low, zero, arithmetic)


@_jit_entry
def run_rows(
    function: Any,
    x: Any,
    g: Any,
    y: Any,
    kept: Any,
    reduced: Any,
    g_kept: Any,
    g_reduced: Any,
    n_cols: Any,
    first_row: Any,
    end_row: Any,
) -> None:
    """Run rows one after the other, of any strides, through scratches for a chunk each."""
    step = min(n_cols, CHUNK)
    x_chunk, g_chunk, y_chunk = np.empty(step, x.dtype), np.empty(step, x.dtype), np.empty(step, x.dtype)
    high_sums, low_sums = np.empty(_LANES), np.empty(_LANES)
    has_products = function == _SOFTMAX_VJP
    for row in range(first_row, end_row):
        x_at, g_at, y_at = _offset_of(row, kept, _X), _offset_of(row, g_kept, _X), _offset_of(row, kept, _Y)
        high_sums[:] = 0.0
        low_sums[:] = 0.0
        for first in range(0, n_cols, step):
            size = min(step, n_cols - first)
            _collect(x, x_at, reduced, first, size, x_chunk)
            _collect(g, g_at, g_reduced, first, size, g_chunk)
            _fold(x_chunk, g_chunk, size, has_products, high_sums, low_sums)
        total, rest = _total(high_sums, low_sums)
        if not math.isfinite(total + rest):
            total = rest = 0.0
            for first in range(0, n_cols, step):
                size = min(step, n_cols - first)
                _collect(x, x_at, reduced, first, size, x_chunk)
                _collect(g, g_at, g_reduced, first, size, g_chunk)
                total += _plain_sum(x_chunk, g_chunk, size, has_products)
        high, low = _in_two_parts(x, total, rest)
        for first in range(0, n_cols, step):
            size = min(step, n_cols - first)
            if n_cols > step:  # else they are still there
                _collect(x, x_at, reduced, first, size, x_chunk)
                _collect(g, g_at, g_reduced, first, size, g_chunk)
            _write(x_chunk, g_chunk, y_chunk, size, has_products, high, low)
            _distribute(y_chunk, y, y_at, reduced, first, size)


@_jit_exact
def _fold_strip(x: Any, x_at: Any, g: Any, g_at: Any, width: Any, has_products: Any, high: Any, low: Any) -> None:
    """Add an element of each of some adjacent rows to its sum."""
    for j in range(width):
        factor = np.float64(x[_U(x_at + j)]) if has_products else 1.0
        value = np.float64(g[_U(g_at + j)])
        product = factor * value
        high[_U(j)], error = _state.two_sum(high[_U(j)], product)
        low[_U(j)] += error + _state.product_error(factor, value, product)


@_jit_entry
def run_strips(
    function: Any,
    x: Any,
    g: Any,
    y: Any,
    kept: Any,
    reduced: Any,
    g_kept: Any,
    g_reduced: Any,
    n_cols: Any,
    first_strip: Any,
    end_strip: Any,
    strip_width: Any,
) -> None:
    """Run strips of adjacent rows."""
    inner = kept[-1, _SIZE]
    x_step, g_step, y_step = reduced[0, _X], g_reduced[0, _X], reduced[0, _Y]
    strips_per_inner = (inner + strip_width - 1) // strip_width
    high_sums, low_sums = np.empty(MAX_STRIP), np.empty(MAX_STRIP)
    highs, lows, results = np.empty(MAX_STRIP, x.dtype), np.empty(MAX_STRIP, x.dtype), np.empty(MAX_STRIP, x.dtype)
    has_products, arithmetic, zero = function == _SOFTMAX_VJP, _arithmetic(x), x.dtype.type(0)
    for strip in range(first_strip, end_strip):
        outer = strip // strips_per_inner
        lane = (strip - outer * strips_per_inner) * strip_width
        width = min(strip_width, inner - lane)
        row = outer * inner + lane
        x_at, g_at, y_at = _offset_of(row, kept, _X), _offset_of(row, g_kept, _X), _offset_of(row, kept, _Y)
        high_sums[:] = 0.0
        low_sums[:] = 0.0
        for i in range(n_cols):
            _fold_strip(x, x_at + i * x_step, g, g_at + i * g_step, width, has_products, high_sums, low_sums)
        for j in range(width):
            total, rest = high_sums[j], low_sums[j]
            if not math.isfinite(total + rest):
                total = rest = 0.0
                for i in range(n_cols):
                    factor, value = x[_U(x_at + i * x_step + j)], g[_U(g_at + i * g_step + j)]
                    if not has_products:
                        total += value
                    elif factor != 0:
                        total += np.float64(factor) * np.float64(value)
            highs[j], lows[j] = _in_two_parts(x, total, rest)
        for i in range(n_cols):
            x_row, g_row, y_row = x_at + i * x_step, g_at + i * g_step, y_at + i * y_step
            if has_products:
                for j in range(width):
                    results[_U(j)] = _gradient_of_softmax(x[_U(x_row + j)], g[_U(g_row + j)], highs[_U(j)], lows[_U(j)])
            else:
                for j in range(width):
                    results[_U(j)] = _gradient_of_log_softmax(
                        x[_U(x_row + j)], g[_U(g_row + j)], highs[_U(j)], lows[_U(j)], zero, arithmetic
                    )
            for j in range(width):
                y[_U(y_row + j)] = results[_U(j)]


@_jit_entry
def scale_rows(g: Any, y: Any, kept: Any, reduced: Any, g_kept: Any, n_cols: Any, first_row: Any, end_row: Any) -> None:
    """Multiply each row of probabilities by its g; 0 stays 0."""
    inner, step = reduced[-1, _SIZE], reduced[-1, _Y]
    for row in range(first_row, end_row):
        factor, y_at = g[_U(_offset_of(row, g_kept, _X))], _offset_of(row, kept, _Y)
        for first in range(0, n_cols, inner):
            start = y_at + _offset_of(first, reduced, _Y)
            for j in range(inner):
                p = y[_U(start + j * step)]
                y[_U(start + j * step)] = p * factor if p != 0 else p


def run(plan: Plan, layout: Layout, x: Array, gradient: Array, out: Array) -> None:
    """Run a vector-Jacobian product by its plan."""
    kept, reduced = _table(layout.kept, layout.itemsize), _table(layout.reduced, layout.itemsize)
    g_kept, g_reduced = (_table(_of_factors(part), layout.itemsize) for part in (layout.kept, layout.reduced))
    source, g, target = _elements(x), _elements(gradient), _elements(out)
    function, n_cols, n_units = _FUNCTIONS[plan.function], layout.n_cols, layout.n_rows
    schedule = plan.schedule
    if function == _LOGSUMEXP_VJP:
        numba_cpu.run(numba_cpu.plan("softmax", layout, False), layout, x, out, None)
    elif schedule.traversal == "strips":
        inner = layout.kept[-1].size
        n_units = n_units // inner * -(-inner // _strip_width(layout))

    def run_block(block: int, alive: tuple[Array, ...] = (x, gradient, out)) -> None:
        first, end = n_units * block // schedule.n_blocks, n_units * (block + 1) // schedule.n_blocks
        if function != _LOGSUMEXP_VJP and schedule.traversal == "strips":
            width = _strip_width(layout)
            run_strips(function, source, g, target, kept, reduced, g_kept, g_reduced, n_cols, first, end, width)
        elif function != _LOGSUMEXP_VJP:
            run_rows(function, source, g, target, kept, reduced, g_kept, g_reduced, n_cols, first, end)
        else:
            scale_rows(g, target, kept, reduced, g_kept, n_cols, first, end)

    run_blocks(run_block, schedule.n_blocks, schedule.n_threads)
