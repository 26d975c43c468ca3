"""Softmax cross-entropy with its gradient: the loss of classification, and of language models.

For logits x of a row, capped as x' = softcap * tanh(x / softcap) if that is asked for, and targets t (probabilities, or
1 for the label and 0 for other classes), smoothed as t' = (1 - label_smoothing) * t + label_smoothing / n_classes::

    loss = -sum(weight * t' * log_softmax(x')) + z_loss * logsumexp(x')**2

The gradient follows from dlogsumexp(x)/dx = softmax(x), and leaves with the loss in one visit of each row::

    dloss/dx' = softmax(x') * (sum(weight * t') + 2 * z_loss * logsumexp(x')) - weight * t'
    dx'/dx = 1 - (x' / softcap)**2
"""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike

from fastsoftmax._api import _check_out, _dtypes, _is_same_view, _is_writable_as, _numbers, _read_as, _shares_memory
from fastsoftmax._derivatives import _real_numbers
from fastsoftmax._dispatch import CrossEntropy, execute_cross_entropy, select_for
from fastsoftmax._layout import Array, make_layout, normalize_axes, readable
from fastsoftmax._outputs import empty_like

Reduction = Literal["mean", "sum", "none"]


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = ...,
    weight: ArrayLike | None = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    return_grad: Literal[False] = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = ...,
    weight: ArrayLike | None = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    reduction: Reduction = ...,
    return_grad: Literal[True],
    grad_out: Array | None = ...,
    backend: str | None = ...,
) -> tuple[Any, Array]: ...
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    return_grad: bool = False,
    grad_out: Array | None = None,
    backend: str | None = None,
) -> Any:
    """Compute the cross-entropy of softmax probabilities and targets, and its gradient.

    Parameters
    ----------
    logits : array_like
        Scores of the classes, of real numbers.
    targets : array_like
        Integers are labels: the index of the right class of each row, in the shape of ``logits`` without ``axis``.
        Floating-point numbers are probabilities of the classes, in the shape of ``logits``.
    axis : int, optional
        The axis of the classes; the last by default.
    weight : array_like, optional
        How much each class counts; one number for each, none negative.
    ignore_index : int, optional
        A label that marks rows which do not count: their loss and gradient are 0. Only with labels.
    label_smoothing : float, optional
        How much of the target is spread evenly over all classes, from 0 to 1.
    z_loss : float, optional
        Adds ``z_loss * logsumexp(logits)**2`` to the loss of each row that counts, whatever the weights.
    softcap : float, optional
        Replaces the logits by ``softcap * tanh(logits / softcap)``.
    reduction : {"mean", "sum", "none"}, optional
        What becomes of the losses of the rows. The mean over labels divides by the sum of the labels' weights, that of
        the squares of ``z_loss`` by the number of rows that count; the mean over probabilities divides by the number
        of rows.
    return_grad : bool, optional
        Also return the gradient with respect to the logits: of the reduced loss, or of each row's own.
    grad_out : ndarray, optional
        Where to write the gradient, in the shape of ``logits`` and the dtype of the gradient. It may be ``logits``.
    backend : {"cython", "numba", "numpy"}, optional
        Force a backend; by default the fastest that fits is chosen.

    Returns
    -------
    loss : scalar or ndarray
        In the dtype that is computed in: float32 for logits of 16 bits, float64 for integers, else that of the logits.
        The mean over no row is NaN.
    grad : ndarray
        Only with ``return_grad``: in the shape of ``logits``, and in their dtype or, for integers, float64.

    Raises
    ------
    TypeError
        If an argument is of the wrong type; the message names it.
    ValueError
        If a label is neither a class nor ``ignore_index``; if ``targets`` or ``weight`` has the wrong shape; if another
        argument is out of its range.
    numpy.exceptions.AxisError
        If ``axis`` is out of range.
    BackendUnavailableError
        If ``backend`` cannot run here.

    Notes
    -----
    Weights, smoothing and reductions are those of ``torch.nn.functional.cross_entropy``. A class that counts nothing (a
    weight, or target probability, of 0 without smoothing) adds nothing, even if its logit is -inf.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import softmax_cross_entropy
    >>> logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    >>> loss, grad = softmax_cross_entropy(logits, [0, 2], return_grad=True)
    >>> round(float(loss), 4)  # -(log(0.5) + log(0.8)) / 2
    0.4581
    >>> grad.round(3)
    array([[-0.25 ,  0.125,  0.125],
           [ 0.05 ,  0.05 , -0.1  ]])
    """
    scores = _real_numbers(logits, "logits")
    if isinstance(axis, (tuple, list)) or axis is None:
        raise TypeError(f"axis must be one integer, not {axis!r}")
    if scores.ndim == 0:
        raise ValueError("logits must have an axis of classes, not be a scalar")
    (classes,) = normalize_axes(axis, scores.ndim)
    n_classes, rows_shape = scores.shape[classes], scores.shape[:classes] + scores.shape[classes + 1 :]
    if n_classes == 0:
        raise ValueError(f"logits has no classes along axis {axis}")
    smoothing = _number(label_smoothing, "label_smoothing", 0, 1)
    z_factor = _number(z_loss, "z_loss", 0, math.inf)
    cap = 0.0 if softcap is None else _number(softcap, "softcap", sys.float_info.min, math.inf)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if grad_out is not None and not return_grad:
        raise TypeError("grad_out takes the gradient, which needs return_grad=True")
    working, dtype = _dtypes(scores.dtype, "logsumexp")
    module = select_for("softmax_cross_entropy", working, scores.size, backend)
    storage = _read_as(module, scores, working)
    weights = _weights(weight, n_classes)
    target_values = _numbers(targets, "targets")
    labels = probabilities = None
    if target_values.dtype.kind in "iu":
        labels = _labels(target_values, rows_shape, n_classes, ignore_index)
    elif target_values.dtype.kind in "bc":
        raise TypeError(f"targets must hold integer labels or probabilities, not {target_values.dtype}")
    elif ignore_index is not None:
        raise ValueError(f"ignore_index is for labels, but targets holds probabilities: {ignore_index!r}")
    elif target_values.shape != scores.shape:
        raise ValueError(f"targets must have the shape of logits, {scores.shape}, not {target_values.shape}")
    else:
        if storage.itemsize < working.itemsize and target_values.dtype != storage:
            storage = working  # probabilities of more digits than the logits keep them
        probabilities = readable(target_values, storage)
    if grad_out is not None:
        _check_out(grad_out, scores.shape, dtype, "grad_out")

    scale = z_scale = 1.0
    if reduction == "mean":
        scale, z_scale = _mean_scales(labels, weights, math.prod(rows_shape))
    spread = None
    if labels is not None and smoothing > 0:
        spread = np.full(n_classes, smoothing / n_classes) if weights is None else weights * (smoothing / n_classes)
        spread = spread.astype(working)
    data, gradient = readable(scores, storage), None
    if return_grad:
        gradient = _gradient_target(grad_out, data, scores, probabilities, storage)
    losses = np.zeros(math.prod(rows_shape), np.float64 if working.itemsize <= 8 else working)
    if losses.size:
        like = data if gradient is None else gradient
        layout = make_layout(data, (classes,), like, data if probabilities is None else probabilities, in_order=True)
        terms = CrossEntropy(probabilities, labels, weights, spread, smoothing, scale, z_factor * z_scale, cap)
        execute_cross_entropy(module, layout, data, gradient, losses, terms)
    loss = _reduced(losses, rows_shape, reduction, math.isfinite(scale)).astype(working)
    if gradient is None:
        return loss[()]
    if grad_out is None:
        return loss[()], gradient if gradient.dtype == dtype else gradient.astype(dtype)
    if gradient is not grad_out and gradient is not data:
        np.copyto(grad_out, gradient, casting="unsafe")
    return loss[()], grad_out


def _number(value: Any, name: str, least: float, most: float) -> float:
    """Return a finite number in a range, or raise an error that names the argument."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    number = float(value)
    if not least <= number <= most or math.isinf(number):
        bounds = f"from {least} to {most}" if most < math.inf else "positive" if least else "not negative"
        raise ValueError(f"{name} must be {bounds} and finite, not {value!r}")
    return number


def _weights(weight: ArrayLike | None, n_classes: int) -> Array | None:
    if weight is None:
        return None
    weights = _real_numbers(weight, "weight")
    if weights.shape != (n_classes,):
        raise ValueError(f"weight must have one number for each class, shape ({n_classes},), not {weights.shape}")
    weights = weights.astype(np.float64)
    wrong = ~(weights >= 0) | np.isinf(weights)
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"weight must be not negative and finite, not {weights[index]} at index {index}")
    return np.ascontiguousarray(weights)


def _labels(targets: Array, rows_shape: tuple[int, ...], n_classes: int, ignore_index: int | None) -> Array:
    """Return one int64 label for each row, -1 where the row does not count."""
    if ignore_index is not None and (
        isinstance(ignore_index, (bool, np.bool_)) or not isinstance(ignore_index, (int, np.integer))
    ):
        raise TypeError(f"ignore_index must be an integer, not {ignore_index!r}")
    if targets.shape != rows_shape:
        raise ValueError(f"targets of labels must have the shape {rows_shape}, not {targets.shape}")
    is_ignored = np.zeros(rows_shape, bool) if ignore_index is None else targets == ignore_index
    wrong = ((targets < 0) | (targets >= n_classes)) & ~is_ignored
    if wrong.any():
        index = np.unravel_index(int(wrong.argmax()), rows_shape)
        where = f" at index {tuple(map(int, index))}" if rows_shape else ""
        raise ValueError(f"targets must hold labels from 0 to {n_classes - 1}, not {targets[index]}{where}")
    return np.where(is_ignored, -1, targets.astype(np.int64)).ravel()


def _mean_scales(labels: Array | None, weights: Array | None, n_rows: int) -> tuple[float, float]:
    """Return what a mean multiplies by: the losses, and the squares of z_loss. NaN where nothing counts."""
    if labels is None:
        return (1 / n_rows, 1 / n_rows) if n_rows else (math.nan, math.nan)
    counted = labels[labels >= 0]
    denominator = float(counted.size if weights is None else weights[counted].sum())
    return 1 / denominator if denominator else math.nan, 1 / counted.size if counted.size else math.nan


def _gradient_target(
    grad_out: Array | None, data: Array, scores: Array, probabilities: Array | None, storage: np.dtype[Any]
) -> Array:
    """Return the array that the backend writes the gradient to: ``grad_out`` wherever that can be."""
    if grad_out is not None and _is_writable_as(grad_out, storage) and not _shares_memory(grad_out, probabilities):
        if _is_same_view(data, grad_out):
            return data
        if not np.may_share_memory(data, grad_out):
            return grad_out
    return empty_like(scores, storage)


def _reduced(losses: Array, shape: tuple[int, ...], reduction: str, is_finite: bool) -> Array:
    if reduction == "none":
        return losses.reshape(shape)
    return losses.sum() if reduction == "sum" or is_finite else np.asarray(math.nan)
