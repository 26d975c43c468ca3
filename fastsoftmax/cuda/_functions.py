"""What is computed of each element of a row: the functions and their vector-Jacobian products, as traversals see them.

A lane takes elements into four numbers, and the numbers of all lanes that share a row become the state of the row.
For softmax and its like they are the maximum, the sum of the terms of smaller elements, its residue, and how many
elements are the maximum: one of these is left out of the state, where all lanes have met. The products of softmax and
log_softmax need nothing but a sum over the row, of p * g or of g: their maximum and ties are 0 and stay so.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from fastsoftmax.cuda import _state
from fastsoftmax.cuda._instructions import device
from fastsoftmax.cuda._vectors import Format

# The functions, and their vector-Jacobian products: of softmax from p and g, of log_softmax from log p and g, of
# logsumexp from a and one g per row.
Kernel = Literal["softmax", "log_softmax", "logsumexp", "softmax_vjp", "log_softmax_vjp", "logsumexp_vjp"]

# Those that read two arrays of one size.
PRODUCTS = ("softmax_vjp", "log_softmax_vjp")


def n_inputs(kernel: Kernel) -> int:
    """Return how many arrays as large as the result are read."""
    return 2 if kernel in PRODUCTS else 1


def states_of(kernel: Kernel) -> Kernel:
    """Return the first function with the same states: what only makes states is compiled once for all of these."""
    return kernel if kernel in PRODUCTS else "softmax"


@cache
def states(kernel: Kernel, format: Format) -> SimpleNamespace:
    """Return the device functions that make the states of a kernel, and ``lowest``, the maximum of no element.

    Lanes take elements in by ``largest(maximum, x)``, ``reference(maximum)``, which gives an offset and a shift,
    ``add(sum, rest, ties, x, g, maximum, offset, shift)``, of a vector or as few elements of a row in a strip, whose
    ``sum + rest`` is ``joined`` to those of the lane, and ``advance(maximum, sum, residue, ties, new_maximum)``. Of all
    lanes together, ``close(maximum, sum, residue, ties)`` makes sum and residue of a state; ``merge`` makes one of two
    states. ``g`` is that of the element in the products, and nothing elsewhere.
    """
    if kernel != states_of(kernel):
        return states(states_of(kernel), format)
    return _sums_of_products(kernel, format) if kernel in PRODUCTS else _sums_of_exponentials(format)


@cache
def results(kernel: Kernel, format: Format) -> SimpleNamespace:
    """Return the device functions that make the results of a kernel from a state.

    ``of_row`` gives the number that all elements of the row share, in two parts, and from that
    ``of_element(x, g, maximum, offset, shift, shared, low)`` the result of one. ``g`` is that of the element in the
    products, of the row in logsumexp's, and nothing elsewhere.
    """
    of_row, of_element = (_of_product if kernel in PRODUCTS else _of_exponential)(kernel, format)
    return SimpleNamespace(of_row=of_row, of_element=of_element)


def _sums_of_exponentials(format: Format) -> SimpleNamespace:
    """Powers of two are added up apart from what terms are beyond them: their sum has no error, and the rest is small.

    That takes as many operations as to add up terms, which are rounded.
    """
    state, zero, one = _state.on_device(format.precision), format.real(0), format.real(1)
    factors, fused, rebased, with_ties = state.factors, state.fused, state.rebased, state.with_ties
    is_rounded = format.precision == "half"

    @device
    def advance(maximum: Any, sum: Any, residue: Any, ties: Any, new_maximum: Any) -> Any:
        """Return sum, residue and ties beside a maximum that is as large or larger."""
        if maximum == new_maximum:
            return sum, residue, ties
        sum, residue = with_ties(maximum, sum, residue, ties)
        sum, residue = rebased(maximum, sum, residue, new_maximum)
        return sum, residue, zero

    @device
    def add(sum: Any, rest: Any, ties: Any, x: Any, g: Any, maximum: Any, offset: Any, shift: Any) -> Any:
        scale, of_x = factors(x - offset, shift)
        scale = zero if x == maximum else scale
        rest = rest if is_rounded else fused(scale, of_x, rest)
        return sum + scale, rest, ties + (one if x == maximum else zero)

    @device
    def close(maximum: Any, sum: Any, residue: Any, ties: Any) -> Any:
        return with_ties(maximum, sum, residue, ties - one) if ties > zero else (sum, residue)

    return SimpleNamespace(
        lowest=format.real(-np.inf),
        padding=format.minus_infinity,
        largest=state.larger,
        reference=state.reference,
        advance=advance,
        add=add,
        close=close,
        joined=state.joined,
        merge=state.merge,
    )


def _of_exponential(kernel: Kernel, format: Format) -> tuple[Any, Any]:
    state, zero = _state.on_device(format.precision), format.real(0)
    power, scaled, logsumexp = state.power, state.scaled, state.logsumexp

    if format.precision == "half":  # second parts are below what a result shows

        @device
        def scaled(term: Any, term_low: Any, inverse: Any, inverse_low: Any) -> Any:
            return term * inverse

    if kernel == "logsumexp":

        @device
        def of_row(maximum: Any, sum: Any, residue: Any) -> Any:
            return logsumexp(maximum, sum, residue), zero

        return of_row, None

    if kernel == "log_softmax":

        @device
        def of_element(x: Any, g: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any) -> Any:
            return ((x - offset) - shared) - low

        return state.log_normalizer, of_element

    @device
    def probability(x: Any, g: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any) -> Any:
        of_x, of_x_low = power(x - offset, shift)
        return scaled(of_x, of_x_low, shared, low)

    @device
    def share_of_g(x: Any, g: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any) -> Any:
        p = probability(x, g, maximum, offset, shift, shared, low)
        return zero if p == zero else p * g

    return state.inverse_total, share_of_g if kernel == "logsumexp_vjp" else probability


def _sums_of_products(kernel: Kernel, format: Format) -> SimpleNamespace:
    """An element whose probability is 0 adds nothing to the sum of softmax's, and gets no gradient through any sum."""
    state, zero = _state.on_device(format.precision), format.real(0)
    plus = state.plus

    @device
    def largest(maximum: Any, x: Any) -> Any:
        return zero

    @device
    def reference(maximum: Any) -> Any:
        return zero, zero

    @device
    def advance(maximum: Any, sum: Any, residue: Any, ties: Any, new_maximum: Any) -> Any:
        return sum, residue, ties

    @device
    def close(maximum: Any, sum: Any, residue: Any, ties: Any) -> Any:
        return sum, residue

    @device
    def merge(a_maximum: Any, a_sum: Any, a_residue: Any, b_maximum: Any, b_sum: Any, b_residue: Any) -> Any:
        sum, residue = plus(a_sum, a_residue, b_sum, b_residue)
        return zero, sum, residue

    if kernel == "softmax_vjp":

        @device
        def add(sum: Any, rest: Any, ties: Any, x: Any, g: Any, maximum: Any, offset: Any, shift: Any) -> Any:
            return sum + (zero if x == zero else x * g), rest, ties

    else:

        @device
        def add(sum: Any, rest: Any, ties: Any, x: Any, g: Any, maximum: Any, offset: Any, shift: Any) -> Any:
            return sum + g, rest, ties

    return SimpleNamespace(
        lowest=zero,
        padding=0,
        largest=largest,
        reference=reference,
        advance=advance,
        add=add,
        close=close,
        joined=state.joined,
        merge=merge,
    )


def _of_product(kernel: Kernel, format: Format) -> tuple[Any, Any]:
    exponential, zero = _state.on_device(format.precision).exponential, format.real(0)
    infinity = format.real(np.inf)

    @device
    def of_row(maximum: Any, sum: Any, residue: Any) -> Any:
        return sum + residue if abs(sum) < infinity else sum, zero  # what an infinite sum rounds off is NaN

    if kernel == "softmax_vjp":

        @device
        def of_element(x: Any, g: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any) -> Any:
            return zero if x == zero else x * (g - shared)

    else:

        @device
        def of_element(x: Any, g: Any, maximum: Any, offset: Any, shift: Any, shared: Any, low: Any) -> Any:
            p = exponential(x)
            return g if p == zero else g - p * shared

    return of_row, of_element
