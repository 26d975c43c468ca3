"""The kernel for softmax cross-entropy: a few short rows at a time, or a chunk of a long one, converted to float64.

A row is read for its sum, for its loss if more than its label counts, and for its gradient; one of a single chunk is
converted once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastsoftmax import _state

from .jit import inline, jit, jit_entry
from .registers import address_of, lane, lanes_in, pointer_to, register_of, stack_memory
from .rows import (
    BYTES_OF_STATE,
    BYTES_OF_WORK,
    CHUNK_BYTES,
    COLUMNS,
    LOGSUMEXP,
    X,
    Y,
    fold_chunks,
    fold_others,
    folded_of,
    load_state,
    log_sum_of,
    make_work,
    offset_of,
)
from .scalars import exp
from .stored import Row, read_part, write_part
from .terms import constants, rest_over_top

# That of `fold_chunks` in float64.
CHUNK = CHUNK_BYTES // 8
BYTES_OF_CROSS_ENTROPY = 3 * CHUNK * 8


class Logits(NamedTuple):
    """A row, and the cap of its elements, 0 for none."""

    row: Row
    softcap: float


class Targets(NamedTuple):
    """What each class of a row counts: probabilities, or what smoothing adds beside a label; addresses, 0 for none."""

    row: Row
    smoothing: float
    weights: int
    spread: int


@inline
def _is_counted(targets):
    """Whether more counts than a label."""
    return targets.row.address != 0 or targets.spread != 0


@jit
def _read_logits(logits, first, n, x):
    read_part(logits.row, first, n, x)
    if logits.softcap > 0.0:
        for j in range(n):
            x[j] = logits.softcap * math.tanh(x[j] / logits.softcap)


@jit
def _read_factors(targets, logits, first, n, factors):
    if not targets.row.address:
        spread = pointer_to(targets.spread, 0.0)
        for j in range(n):
            factors[j] = spread[first + j]
        return
    read_part(targets.row, first, n, factors)
    for j in range(n):
        factors[j] = factors[j] * (1.0 - targets.smoothing) + targets.smoothing / logits.row.n
    if targets.weights:
        weights = pointer_to(targets.weights, 0.0)
        for j in range(n):
            factors[j] *= weights[first + j]


@jit
def _fold_long_row(logits, x, work):
    """What `fold_others` would give for a row of several chunks."""
    of_chunk, nothing = pointer_to(stack_memory(BYTES_OF_STATE), 0.0), pointer_to(0, 0)
    total = _state.identity()
    for first in range(0, logits.row.n, CHUNK):
        n = min(CHUNK, logits.row.n - first)
        _read_logits(logits, first, n, x)
        fold_chunks(LOGSUMEXP, x, 0, n, nothing, 0, 0, 1, False, x, of_chunk, x, work)
        total = _state.merge(total, load_state(of_chunk, 0), constants(x).state)
    return folded_of(total, x)


@jit
def _sum_of_factors(logits, targets, maximum, log_sum, x, factors):
    """sum(factor * ((maximum - x) + log_sum)), and sum(factor); a factor of 0 drops its class, whatever x."""
    loss = loss_rest = factor_sum = factor_rest = 0.0
    for first in range(0, logits.row.n, CHUNK):
        n = min(CHUNK, logits.row.n - first)
        _read_factors(targets, logits, first, n, factors)
        if logits.row.n > CHUNK:
            _read_logits(logits, first, n, x)
        for j in range(n):
            if factors[j] != 0.0:
                loss, error = _state.two_sum(loss, factors[j] * ((maximum - x[j]) + log_sum))
                loss_rest += 0.0 if math.isnan(error) else error
                factor_sum, error = _state.two_sum(factor_sum, factors[j])
                factor_rest += error
    return loss + loss_rest, factor_sum + factor_rest


@jit
def _store_terms(x, n, maximum, size):
    """Replace x by exp(x - maximum) * size, without the rounding error of the subtraction."""
    for j in range(n):
        difference, error = _state.two_sum(x[j], -maximum)
        x[j] = exp(difference, error) * size


@jit
def _write_gradient(logits, targets, maximum, size, scale, label, of_label, y, y_at, x, factors, slopes):
    """exp(x - maximum) * size - factor * scale, where the first is another term for the label, if it is one.

    All is multiplied by the slope of the cap.
    """
    for first in range(0, logits.row.n, CHUNK):
        n = min(CHUNK, logits.row.n - first)
        if logits.row.n > CHUNK:
            _read_logits(logits, first, n, x)
            if _is_counted(targets):
                _read_factors(targets, logits, first, n, factors)
        if logits.softcap > 0.0:
            for j in range(n):
                slopes[j] = 1.0 - (x[j] / logits.softcap) * (x[j] / logits.softcap)
        _store_terms(x, n, maximum, size)
        if 0 <= label - first < n:
            x[label - first] = of_label
        if _is_counted(targets):
            for j in range(n):
                x[j] -= factors[j] * scale
        if logits.softcap > 0.0:
            for j in range(n):
                x[j] *= slopes[j]
        write_part(x, logits.row, y, y_at, first, n)


@jit
def _write_zeros(logits, y, y_at, x):
    for j in range(min(logits.row.n, CHUNK)):
        x[j] = 0.0
    for first in range(0, logits.row.n, CHUNK):
        n = min(CHUNK, logits.row.n - first)
        write_part(x, logits.row, y, y_at, first, n)


@jit_entry
def run_cross_entropy(
    storage,
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
    """Run rows; logits, gradient and targets are of one storage.

    An address is 0 where there is no such array; the tables of targets follow those of the logits.
    """
    losses, labels = pointer_to(losses_address, 0.0), pointer_to(labels_address, 0)
    weights, label_logit = pointer_to(weights_address, 0.0), pointer_to(stack_memory(8), 0.0)
    x, factors = pointer_to(scratch, 0.0), pointer_to(scratch + CHUNK * 8, 0.0)
    slopes = pointer_to(scratch + 2 * CHUNK * 8, 0.0)
    work = make_work(stack_memory(BYTES_OF_WORK), x)
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    target_tables = tables + (n_kept + n_reduced) * COLUMNS * 8
    target_kept, target_reduced = pointer_to(target_tables, 0), pointer_to(target_tables + n_kept * COLUMNS * 8, 0)
    together = max(1, min(CHUNK // n, lanes_in(register_of(x, 0.0))))
    for first in range(first_row, end_row, together):
        count = min(together, end_row - first)
        for s in range(count):
            x_at = offset_of(first + s, kept, n_kept, X)
            logits = Logits(Row(storage, x_address, x_at, reduced, n_reduced, n), softcap)
            if n <= CHUNK:
                _read_logits(logits, 0, n, pointer_to(address_of(x, s * n), x))
                work.places[s], work.sizes[s] = s * n, n
        folded = fold_others(x, count, work) if n <= CHUNK else _fold_long_row(logits, x, work)
        ratios, ratios_low = rest_over_top(folded.largest, folded.high, folded.low, folded.reference)
        for s in range(count):
            row = first + s
            x_at, y_at = offset_of(row, kept, n_kept, X), offset_of(row, kept, n_kept, Y)
            target_at = offset_of(row, target_kept, n_kept, X)
            logits = Logits(Row(storage, x_address, x_at, reduced, n_reduced, n), softcap)
            of_targets = Row(storage, targets_address, target_at, target_reduced, n_reduced, n)
            targets = Targets(of_targets, smoothing, weights_address, spread_address)
            of_row = pointer_to(address_of(x, s * n if n <= CHUNK else 0), x)
            label = labels[row] if labels_address else -1
            if labels_address and label < 0:
                losses[row] = 0.0
                if y_address:
                    _write_zeros(logits, y_address, y_at, of_row)
                continue
            maximum, ratio, ratio_low = lane(folded.largest, s), lane(ratios, s), lane(ratios_low, s)
            log_sum, low = log_sum_of(maximum, lane(folded.high, s), ratio, ratio_low)
            log_sum += low
            loss = factor_sum = label_factor = log_p = 0.0
            if _is_counted(targets):
                loss, factor_sum = _sum_of_factors(logits, targets, maximum, log_sum, of_row, factors)
            if label >= 0:
                _read_logits(logits, label, 1, label_logit)
                label_factor = (1.0 - smoothing) * (weights[label] if weights_address else 1.0)
                log_p = (label_logit[0] - maximum) - log_sum
                loss -= label_factor * log_p if label_factor != 0.0 else 0.0
            log_total = maximum + log_sum
            losses[row] = loss * scale + (z_scale * log_total * log_total if z_scale != 0.0 else 0.0)
            if not y_address:
                continue
            spread_size = factor_sum * scale + 2.0 * z_scale * log_total
            size = (spread_size + label_factor * scale) / (1.0 + (ratio + ratio_low))
            if math.isinf(maximum):
                size, label = math.nan, -1  # all of the gradient is NaN
            # p - 1 has its digits only where it is computed as such.
            of_label = label_factor * scale * math.expm1(log_p) + spread_size * math.exp(log_p)
            _write_gradient(
                *(logits, targets, maximum, size, scale, label, of_label, y_address, y_at, of_row, factors, slopes)
            )
