"""Softmax cross-entropy for the Numba backend: a row at a time, gathered and computed in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastsoftmax import _state
from fastsoftmax._dispatch import CrossEntropy, Plan
from fastsoftmax._executor import run_blocks
from fastsoftmax._layout import Array, Layout
from fastsoftmax.backends.numba_cpu import (
    _LANES,
    _U,
    _X,
    _Y,
    _arithmetic,
    _biased_term,
    _collect,
    _distribute,
    _elements,
    _jit_entry,
    _jit_exact,
    _of_factors,
    _offset_of,
    _table,
)
from fastsoftmax.backends.numba_derivatives import _fold, _total


@_jit_exact
def _maximum(row: Any, n: Any) -> Any:
    """Return the index of the maximum, and whether there is a NaN."""
    top, has_nan = 0, False
    for j in range(n):
        has_nan = has_nan or math.isnan(row[_U(j)])
        if row[_U(j)] > row[_U(top)] or math.isnan(row[_U(top)]):
            top = j
    return top, has_nan


@_jit_exact
def _store_terms(row: Any, maximum: Any, terms: Any, n: Any) -> None:
    """Write exp(x - maximum), without the rounding error of the subtraction."""
    arithmetic = _arithmetic(row)
    for j in range(n):
        difference, error = _state.two_sum(row[_U(j)], -maximum)
        error = 0.0 if difference == -math.inf else error
        term, low = _biased_term(difference, 0.0, -arithmetic.span, arithmetic.power_bias, arithmetic)
        terms[_U(j)] = (term + (low + term * error)) * arithmetic.unbias


@_jit_exact
def _sum_of_factors(row: Any, factors: Any, n: Any, maximum: Any, log_sum: Any) -> Any:
    """sum(factor * ((maximum - x) + log_sum)), and sum(factor); a factor of 0 drops its class, whatever x."""
    loss = loss_rest = factor_sum = factor_rest = 0.0
    for j in range(n):
        if factors[_U(j)] != 0.0:
            loss, error = _state.two_sum(loss, factors[_U(j)] * ((maximum - row[_U(j)]) + log_sum))
            loss_rest += 0.0 if math.isnan(error) else error
            factor_sum, error = _state.two_sum(factor_sum, factors[_U(j)])
            factor_rest += error
    return loss + loss_rest, factor_sum + factor_rest


@_jit_entry
def run_rows(
    x: Any,
    y: Any,
    targets: Any,
    labels: Any,
    weights: Any,
    spread: Any,
    losses: Any,
    kept: Any,
    reduced: Any,
    targets_kept: Any,
    targets_reduced: Any,
    n: Any,
    first_row: Any,
    end_row: Any,
    smoothing: Any,
    scale: Any,
    z_scale: Any,
    softcap: Any,
    has_gradient: Any,
) -> None:
    """Run rows one after the other. Of targets, labels, weights and spread, those that are empty are not there."""
    row, factors, terms = np.empty(n), np.empty(n), np.empty(n)
    high, low = np.empty(_LANES), np.empty(_LANES)
    for index in range(first_row, end_row):
        label = labels[index] if len(labels) else np.int64(-1)
        if len(labels) and label < 0:
            losses[index] = 0.0
            row[:] = 0.0
            if has_gradient:
                _distribute(row, y, _offset_of(index, kept, _Y), reduced, 0, n)
            continue
        _collect(x, _offset_of(index, kept, _X), reduced, 0, n, row)
        if softcap > 0.0:
            for j in range(n):
                row[j] = softcap * math.tanh(row[j] / softcap)
        factors[:] = 0.0
        if len(targets):
            _collect(targets, _offset_of(index, targets_kept, _X), targets_reduced, 0, n, factors)
            for j in range(n):
                factors[j] = factors[j] * (1.0 - smoothing) + smoothing / n
                factors[j] *= weights[j] if len(weights) else 1.0
        elif len(spread):
            factors[:] = spread
        top, has_nan = _maximum(row, n)
        maximum = row[top]
        _store_terms(row, maximum, terms, n)
        terms[top] = 0.0
        high[:] = 0.0
        low[:] = 0.0
        _fold(terms, terms, n, False, high, low)
        others, rest = _total(high, low)
        log_sum = math.log1p(others + rest)
        if math.isinf(maximum):
            log_sum = math.nan if has_nan else 0.0
        loss, factor_sum = _sum_of_factors(row, factors, n, maximum, log_sum)
        label_factor = log_p = 0.0
        if label >= 0:
            label_factor = (1.0 - smoothing) * (weights[label] if len(weights) else 1.0)
            log_p = (row[label] - maximum) - log_sum
            loss -= label_factor * log_p if label_factor != 0.0 else 0.0
        log_total = maximum + log_sum
        losses[index] = loss * scale + (z_scale * log_total * log_total if z_scale != 0.0 else 0.0)
        if has_gradient:
            terms[top] = 1.0
            spread_size = factor_sum * scale + 2.0 * z_scale * log_total
            size = (spread_size + label_factor * scale) / (1.0 + (others + rest))
            for j in range(n):
                terms[j] = terms[j] * size - factors[j] * scale
            if label >= 0 and not math.isinf(maximum):
                # p - 1 has its digits only where it is computed as such.
                of_label = label_factor * scale * math.expm1(log_p) + spread_size * math.exp(log_p)
                terms[label] = of_label - factors[label] * scale
            if softcap > 0.0:
                for j in range(n):
                    terms[j] *= 1.0 - (row[j] / softcap) * (row[j] / softcap)
            if math.isinf(maximum):
                terms[:] = math.nan
            _distribute(terms, y, _offset_of(index, kept, _Y), reduced, 0, n)


def run(plan: Plan, layout: Layout, x: Array, gradient: Array | None, losses: Array, terms: CrossEntropy) -> None:
    """Run a cross-entropy by its plan."""
    kept, reduced = _table(layout.kept, layout.itemsize), _table(layout.reduced, layout.itemsize)
    targets_kept, targets_reduced = (
        _table(_of_factors(part), layout.itemsize) for part in (layout.kept, layout.reduced)
    )
    nothing, no_labels = np.empty(0), np.empty(0, np.int64)
    source, target = _elements(x), _elements(x if gradient is None else gradient)
    targets = source[:0] if terms.probabilities is None else _elements(terms.probabilities)
    labels = no_labels if terms.labels is None else terms.labels
    weights = nothing if terms.weights is None else terms.weights
    spread = nothing if terms.spread is None else terms.spread.astype(np.float64)
    n_rows, n_blocks = layout.n_rows, plan.schedule.n_blocks

    def run_block(block: int, alive: tuple[Any, ...] = (x, gradient, terms)) -> None:
        run_rows(
            source,
            target,
            targets,
            labels,
            weights,
            spread,
            losses,
            kept,
            reduced,
            targets_kept,
            targets_reduced,
            layout.n_cols,
            n_rows * block // n_blocks,
            n_rows * (block + 1) // n_blocks,
            terms.smoothing,
            terms.scale,
            terms.z_scale,
            terms.softcap,
            gradient is not None,
        )

    run_blocks(run_block, n_blocks, plan.schedule.n_threads)
