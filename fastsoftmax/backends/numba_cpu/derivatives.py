"""Kernels for vector-Jacobian products: rows, or strips of adjacent ones, copied a chunk at a time.

A row is read twice: for its sum, and to be written. Sums are taken with the error of each product and of each addition,
so that their error does not grow with the row.
"""

from __future__ import annotations

import math

from .jit import jit, jit_entry
from .registers import pointer_to
from .rows import COLUMNS, SIZE, X, Y, offset_of
from .scalars import add_numbers, add_products, exp, total_of
from .stored import collect_strip_of_floats, distribute_strip, place_of_strip
from .tiles import STRIP_BYTES

CHUNK = 4096

# Running sums of a row that is alone; rows of a strip have one each.
_LANES = 32
_MAX_LANES = STRIP_BYTES // 4
BYTES_OF_VJP = (2 * CHUNK + 2 * _MAX_LANES) * 8


@jit
def _store_softmax_vjp(p, g, n, lanes, sums, rests):
    """Replace probabilities by what each lane's sum of p * g makes of them."""
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            value = p[first + j] * ((g[first + j] - sums[j]) - rests[j])
            p[first + j] = 0.0 if p[first + j] == 0.0 else value


@jit
def _store_log_softmax_vjp(log_p, g, n, lanes, sums, rests):
    """Replace log-probabilities by what each lane's sum of g makes of them."""
    for first in range(0, n, lanes):
        for j in range(min(lanes, n - first)):
            # NaN for what is far from being a logarithm of a probability.
            p = exp(log_p[first + j], 0.0 if log_p[first + j] < 640.0 else math.nan)
            value = (g[first + j] - p * sums[j]) - p * rests[j]
            log_p[first + j] = g[first + j] if p == 0.0 else value


@jit_entry
def run_vjp(storage, of_softmax, columns, x, g, y, tables, n_kept, n_reduced, n, strip, end_strip, scratch):
    """Run strips of up to so many adjacent rows; if that is 1, rows of any strides.

    All arrays are of one storage. The tables of the gradient follow those of the input.
    """
    values, gradients = pointer_to(scratch, 0.0), pointer_to(scratch + CHUNK * 8, 0.0)
    sums, rests = pointer_to(scratch + 2 * CHUNK * 8, 0.0), pointer_to(scratch + (2 * CHUNK + _MAX_LANES) * 8, 0.0)
    kept, reduced = pointer_to(tables, 0), pointer_to(tables + n_kept * COLUMNS * 8, 0)
    g_tables = tables + (n_kept + n_reduced) * COLUMNS * 8
    g_kept, g_reduced = pointer_to(g_tables, 0), pointer_to(g_tables + n_kept * COLUMNS * 8, 0)
    while strip < end_strip:
        run, column, width, n_outer = place_of_strip(strip, columns, kept, n_kept)
        x_at, y_at = offset_of(run, kept, n_outer, X) + column, offset_of(run, kept, n_outer, Y) + column
        g_at = offset_of(run, g_kept, n_outer, X) + column
        lanes = min(n, _LANES) if columns == 1 else width
        for j in range(lanes):
            sums[j] = rests[j] = 0.0
        length = CHUNK // width
        for first in range(0, n, length):
            size = min(length, n - first)
            part = columns, width, first, size, values
            collect_strip_of_floats(storage, x, x_at, reduced, n_reduced, *part, values)
            collect_strip_of_floats(storage, g, g_at, g_reduced, n_reduced, *part, gradients)
            if of_softmax:
                add_products(values, gradients, size * width, lanes, sums, rests)
            else:
                add_numbers(gradients, size * width, lanes, sums, rests)
        if columns == 1:
            total, rest = total_of(sums, rests, lanes)
            for j in range(lanes):
                sums[j], rests[j] = total, rest
        for j in range(lanes):
            rests[j] = rests[j] if math.isfinite(rests[j]) else 0.0
        for first in range(0, n, length):
            size = min(length, n - first)
            part = columns, width, first, size, values
            if n > length:  # else they are still there
                collect_strip_of_floats(storage, x, x_at, reduced, n_reduced, *part, values)
                collect_strip_of_floats(storage, g, g_at, g_reduced, n_reduced, *part, gradients)
            if of_softmax:
                _store_softmax_vjp(values, gradients, size * width, lanes, sums, rests)
            else:
                _store_log_softmax_vjp(values, gradients, size * width, lanes, sums, rests)
            distribute_strip(values, values, storage, y, y_at, reduced, n_reduced, columns, width, first, size)
        strip += 1


@jit_entry
def scale_rows(like, columns, g_address, y_address, tables, n_kept, n_reduced, n, strip, end_strip):
    """Multiply probabilities by the number of their row; those that are 0 stay so, whatever that is.

    Strips and tables are those of `run_vjp`.
    """
    g, y, kept = pointer_to(g_address, like), pointer_to(y_address, like), pointer_to(tables, 0)
    reduced = pointer_to(tables + n_kept * COLUMNS * 8, 0)
    g_kept = pointer_to(tables + (n_kept + n_reduced) * COLUMNS * 8, 0)
    inner, step = reduced[(n_reduced - 1) * COLUMNS + SIZE], reduced[(n_reduced - 1) * COLUMNS + Y]
    while strip < end_strip:
        run, column, width, n_outer = place_of_strip(strip, columns, kept, n_kept)
        y_at = offset_of(run, kept, n_outer, Y) + column
        for first in range(0, n, inner):
            start = y_at + offset_of(first, reduced, n_reduced, Y)
            if columns == 1:
                factor = g[offset_of(run, g_kept, n_kept, X)]
                for i in range(inner):
                    p = y[start + i * step]
                    y[start + i * step] = p * factor if p != 0.0 else p
                continue
            g_step = g_kept[n_outer * COLUMNS + X]
            g_at = offset_of(run, g_kept, n_outer, X) + column * g_step
            for i in range(inner):
                for j in range(width):
                    p = y[start + i * step + j]
                    y[start + i * step + j] = p * g[g_at + j * g_step] if p != 0.0 else p
        strip += 1
