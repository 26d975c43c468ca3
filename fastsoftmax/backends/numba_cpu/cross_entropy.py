"""The kernel for softmax cross-entropy: a row at a time, gathered and computed in float64."""

from __future__ import annotations

import math

from fastsoftmax import _state

from .jit import jit, jit_entry
from .registers import pointer_to
from .rows import COLUMNS, X, Y, collect, distribute, offset_of
from .scalars import add_numbers, exp, total_of

_LANES = 32


def bytes_of_cross_entropy(n):
    """Scratch memory for rows of n classes."""
    return (3 * n + 2 * _LANES) * 8


@jit
def _find_maximum(row, n):
    """The index of the maximum, and whether there is a NaN."""
    highest, probe = -math.inf, 0.0
    for j in range(n):
        highest = max(highest, row[j])
        probe += 1.0 if row[j] != row[j] else 0.0
    top = 0
    while top < n - 1 and row[top] != highest:
        top += 1
    return top, probe > 0.0


@jit
def _store_terms(row, maximum, terms, n):
    """Write exp(x - maximum), without the rounding error of the subtraction."""
    for j in range(n):
        difference, error = _state.two_sum(row[j], -maximum)
        terms[j] = exp(difference, 0.0 if difference == -math.inf else error)


@jit
def _sum_without(top, terms, n, sums, rests):
    """The sum of all terms but one."""
    terms[top] = 0.0
    lanes = min(n, _LANES)
    for j in range(lanes):
        sums[j] = rests[j] = 0.0
    add_numbers(terms, n, lanes, sums, rests)
    total, rest = total_of(sums, rests, lanes)
    return total + rest


@jit
def _sum_of_factors(row, factors, n, maximum, log_sum):
    """sum(factor * ((maximum - x) + log_sum)), and sum(factor); a factor of 0 drops its class, whatever x."""
    loss = loss_rest = factor_sum = factor_rest = 0.0
    for j in range(n):
        if factors[j] != 0.0:
            loss, error = _state.two_sum(loss, factors[j] * ((maximum - row[j]) + log_sum))
            loss_rest += 0.0 if math.isnan(error) else error
            factor_sum, error = _state.two_sum(factor_sum, factors[j])
            factor_rest += error
    return loss + loss_rest, factor_sum + factor_rest


@jit_entry
def run_cross_entropy(
    like,
    x_address,
    y_address,
    losses_address,
    targets_address,
    labels_address,
    weights_address,
    spread_address,
    tables,
    n_kept,
    n_reduced,
    n,
    smoothing,
    scale,
    z_scale,
    softcap,
    first_row,
    end_row,
    scratch,
):
    """Run rows. An address is 0 where there is no such array; the tables of targets follow those of the logits."""
    x, y, targets = pointer_to(x_address, like), pointer_to(y_address, like), pointer_to(targets_address, like)
    losses, labels = pointer_to(losses_address, 0.0), pointer_to(labels_address, 0)
    weights, spread = pointer_to(weights_address, 0.0), pointer_to(spread_address, 0.0)
    row, factors = pointer_to(scratch, 0.0), pointer_to(scratch + n * 8, 0.0)
    terms, sums = pointer_to(scratch + 2 * n * 8, 0.0), pointer_to(scratch + 3 * n * 8, 0.0)
    rests = pointer_to(scratch + (3 * n + _LANES) * 8, 0.0)
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    target_tables = tables + (n_kept + n_reduced) * COLUMNS * 8
    target_kept, target_reduced = pointer_to(target_tables, 0), pointer_to(target_tables + n_kept * COLUMNS * 8, 0)
    for index in range(first_row, end_row):
        y_at = offset_of(index, kept, n_kept, Y)
        label = labels[index] if labels_address else -1
        if labels_address and label < 0:
            losses[index] = 0.0
            for j in range(n):
                terms[j] = 0.0
            if y_address:
                distribute(terms, 0, y, y_at, reduced, n_reduced, 0, n)
            continue
        collect(x, offset_of(index, kept, n_kept, X), reduced, n_reduced, 0, n, row, 0)
        if softcap > 0.0:
            for j in range(n):
                row[j] = softcap * math.tanh(row[j] / softcap)
        if targets_address:
            collect(targets, offset_of(index, target_kept, n_kept, X), target_reduced, n_reduced, 0, n, factors, 0)
        for j in range(n):
            if targets_address:
                factors[j] = factors[j] * (1.0 - smoothing) + smoothing / n
                factors[j] *= weights[j] if weights_address else 1.0
            else:
                factors[j] = spread[j] if spread_address else 0.0
        top, has_nan = _find_maximum(row, n)
        maximum = row[top]
        _store_terms(row, maximum, terms, n)
        others = _sum_without(top, terms, n, sums, rests)
        log_sum = math.log1p(others)
        if has_nan or math.isinf(maximum):
            log_sum = math.nan if has_nan else 0.0
        loss, factor_sum = _sum_of_factors(row, factors, n, maximum, log_sum)
        label_factor = log_p = 0.0
        if label >= 0:
            label_factor = (1.0 - smoothing) * (weights[label] if weights_address else 1.0)
            log_p = (row[label] - maximum) - log_sum
            loss -= label_factor * log_p if label_factor != 0.0 else 0.0
        log_total = maximum + log_sum
        losses[index] = loss * scale + (z_scale * log_total * log_total if z_scale != 0.0 else 0.0)
        if not y_address:
            continue
        terms[top] = 1.0
        spread_size = factor_sum * scale + 2.0 * z_scale * log_total
        size = (spread_size + label_factor * scale) / (1.0 + others)
        for j in range(n):
            terms[j] = terms[j] * size - factors[j] * scale
        if label >= 0 and not math.isinf(maximum):
            # p - 1 has its digits only where it is computed as such.
            of_label = label_factor * scale * math.expm1(log_p) + spread_size * math.exp(log_p)
            terms[label] = of_label - factors[label] * scale
        for j in range(n):
            if softcap > 0.0:
                terms[j] *= 1.0 - (row[j] / softcap) * (row[j] / softcap)
            if math.isinf(maximum):
                terms[j] = math.nan
        distribute(terms, 0, y, y_at, reduced, n_reduced, 0, n)
