"""Softmax cross-entropy and its gradient."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import softmax_cross_entropy

from .inputs import LAYOUTS, WRITABLE_LAYOUTS, OnDevice
from .reference import LONG, exact

SHAPES = [((11,), 0), ((7, 11), 0), ((2, 20_000), -1), ((4, 9, 3, 5), 1), ((5, 1), 1)]
OPTIONS = {
    "plain": {},
    "weights": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "all smooth": {"label_smoothing": 1.0},
    "weights and smoothing": {"weight": True, "label_smoothing": 0.3},
    "z-loss": {"z_loss": 0.01},
    "softcap": {"softcap": 2.0},
    "everything": {"weight": True, "label_smoothing": 0.1, "z_loss": 0.02, "softcap": 5.0},
}


@pytest.fixture(params=["labels", "ignored", "probabilities"])
def kind(request):
    """A kind of targets: labels, labels of which some are to be ignored, probabilities."""
    return request.param


@pytest.fixture(params=["mean", "sum", "none"])
def reduction(request):
    return request.param


def case(kind, rng, shape, axis, dtype, options, scale=3):
    """Return logits, targets and the arguments of a call."""
    axis %= len(shape)
    n_classes, rows = shape[axis], shape[:axis] + shape[axis + 1 :]
    logits = (rng.normal(size=shape) * scale).astype(dtype)
    arguments = {"axis": axis} | options
    if options.get("weight"):
        arguments["weight"] = rng.uniform(0.1, 2, n_classes).astype(np.float64 if dtype == LONG else dtype)
    if kind == "probabilities":
        return logits, np.moveaxis(rng.dirichlet(np.ones(n_classes), rows).astype(dtype), -1, axis), arguments
    targets = rng.integers(0, n_classes, rows)
    if kind == "ignored":
        targets, arguments["ignore_index"] = np.where(rng.random(rows) < 0.4, -100, targets), -100
        targets.flat[-1] = n_classes - 1
    return logits, targets, arguments


def expected(
    logits,
    targets,
    axis,
    weight=None,
    ignore_index=None,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
):
    """Return the loss and the gradient in long double, and the largest of the two terms whose difference that is."""
    x = np.moveaxis(np.asarray(logits, LONG), axis, -1)
    n_classes = x.shape[-1]
    weight = np.ones(n_classes, LONG) if weight is None else np.asarray(weight, LONG)
    capped = x if softcap is None else softcap * np.tanh(x / softcap)
    if np.issubdtype(targets.dtype, np.integer):
        counts = np.ones(targets.shape, bool) if ignore_index is None else targets != ignore_index
        labels = np.where(counts, targets, 0)
        one_hot = (np.arange(n_classes) == labels[..., np.newaxis]).astype(LONG)
        row_weights = weight[labels] * counts
    else:
        one_hot, counts = np.moveaxis(np.asarray(targets, LONG), axis, -1), np.ones(x.shape[:-1], bool)
        row_weights = np.ones(x.shape[:-1], LONG)
    factors = weight * ((1 - LONG(label_smoothing)) * one_hot + LONG(label_smoothing) / n_classes)
    factors = factors * counts[..., np.newaxis]
    log_p, log_sum = exact("log_softmax", capped, -1), exact("logsumexp", capped, -1)
    nll = -np.where(factors == 0, 0, factors * log_p).sum(-1)
    z_losses = z_loss * counts * log_sum[..., 0] ** 2
    scale, z_scale = LONG(1), LONG(1)
    if reduction == "mean":
        scale, z_scale = 1 / row_weights.sum(), 1 / LONG(counts.sum())
    losses = nll * scale + z_losses * z_scale
    size = factors.sum(-1, keepdims=True) * scale + 2 * z_loss * z_scale * counts[..., np.newaxis] * log_sum
    spread = exact("softmax", capped, -1) * size
    gradient = spread - factors * scale
    largest = max(abs(spread).max(), (factors * scale).max())
    if softcap is not None:
        gradient = gradient * (1 - (capped / softcap) ** 2)
    return losses if reduction == "none" else losses.sum(), np.moveaxis(gradient, -1, axis), largest


def assert_close(actual, value, rtol, atol):
    assert np.shape(actual) == np.shape(value)
    assert (abs(np.asarray(actual).astype(LONG) - value) <= rtol * abs(value) + atol).all()


# Values


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_accuracy(backend, kind, dtype, rng, shape, axis, options):
    for reduction in ("mean", "sum", "none"):
        logits, targets, arguments = case(kind, rng, shape, axis, dtype, options)
        arguments["reduction"] = reduction
        loss, gradient = softmax_cross_entropy(logits, targets, return_grad=True, **arguments)
        assert loss.dtype == gradient.dtype == dtype
        value, slope, largest = expected(logits, targets, **arguments)
        # The terms of a loss have one sign, so that it has all digits, but for what capping the logits rounds.
        eps = np.finfo(dtype).eps
        assert_close(loss, value, 10 * eps, 10 * eps * options.get("softcap", 0) * (1 if reduction == "none" else 10))
        assert_close(gradient, slope, 10 * eps, 10 * eps * largest)
        assert softmax_cross_entropy(logits, targets, **arguments).tolist() == loss.tolist()


@pytest.mark.parametrize("offset", [0, 1e4, -3e4])
@pytest.mark.parametrize("scale", [0.01, 50, 400])
@pytest.mark.parametrize("layout", ["C", "Fortran"])
def test_wide_logits(backend, dtype, rng, scale, offset, layout):
    """Losses far from 1 have all their digits, and so has a label's gradient where its probability is nearly 1."""
    logits = LAYOUTS[layout]((rng.normal(size=(50, 300)) * scale + offset).astype(dtype))
    labels = np.where(rng.random(50) < 0.5, logits.argmax(1), rng.integers(0, 300, 50))
    arguments = {"axis": 1, "reduction": "none"}
    loss, gradient = softmax_cross_entropy(logits, labels, return_grad=True, **arguments)
    value, slope, _ = expected(logits, labels, **arguments)
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    if backend.has_kernels:
        assert_close(loss, value, 10 * eps, tiny)
        value = exact("log_softmax", np.asarray(logits, LONG), 1)[np.arange(50), labels]
        assert_close(gradient[np.arange(50), labels], np.expm1(value), 10 * eps, tiny)
    assert_close(gradient, slope, 10 * eps, 10 * eps)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_finite_differences(backend, kind, reduction, rng, options):
    logits, targets, arguments = case(kind, rng, (4, 6), 1, np.float64, options, scale=1)
    _, gradient = softmax_cross_entropy(logits, targets, reduction=reduction, return_grad=True, **arguments)
    direction, step = rng.normal(size=(4, 6)), LONG(1e-6)
    ahead, behind = (
        softmax_cross_entropy(
            logits + sign * step * direction,
            targets.astype(LONG) if kind == "probabilities" else targets,
            reduction=reduction,
            backend="numpy",
            **arguments,
        ).sum()
        for sign in (1, -1)
    )
    np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-8)


@pytest.mark.parametrize(
    "options", [OPTIONS[name] for name in ("plain", "weights", "smoothing", "weights and smoothing")]
)
@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 4)], ids=str)
def test_same_values_as_torch(backend, kind, reduction, dtype, rng, shape, options):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'fastsoftmax[peers]'")
    logits, targets, arguments = case(kind, rng, shape, 1, dtype, options)
    leaf = torch.tensor(logits, requires_grad=True)
    theirs = {name: value for name, value in arguments.items() if name in ("ignore_index", "label_smoothing")}
    if "weight" in arguments:
        theirs["weight"] = torch.tensor(arguments["weight"])
    loss = torch.nn.functional.cross_entropy(leaf, torch.tensor(targets), reduction=reduction, **theirs)
    loss.sum().backward()
    ours, gradient = softmax_cross_entropy(logits, targets, reduction=reduction, return_grad=True, **arguments)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(ours, loss.detach().numpy(), **close)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), **close)


@pytest.mark.parametrize("limit", [0.5, 30, 1e4])
def test_softcap_of_any_size(backend, dtype, rng, limit):
    """Capped logits have all their digits, be they far below the cap or far above."""
    logits = np.append(-np.geomspace(1e-30, 1e5, 40), np.geomspace(1e-30, 1e5, 41)).astype(dtype)
    loss = [softmax_cross_entropy(logits[[0, index]], 1, softcap=limit) for index in range(81)]
    capped = limit * np.tanh(np.asarray(logits, LONG) / limit)
    value = np.log1p(np.exp(capped[0] - capped))
    assert_close(loss, value, 100 * np.finfo(dtype).eps * min(limit, 1), 20 * np.finfo(dtype).eps)


# Special values


def test_a_class_that_counts_nothing_adds_nothing(backend, dtype):
    logits = np.array([[0, -np.inf, 0], [-np.inf, 0, 0]], dtype)
    loss, gradient = softmax_cross_entropy(logits, [0, 2], return_grad=True, reduction="none")
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0, 0.5], [0, 0.5, -0.5]], rtol=1e-6)
    targets = np.array([[1, 0, 0], [0, 0, 1]], dtype)
    loss, gradient = softmax_cross_entropy(logits, targets, return_grad=True, reduction="none")
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0, 0.5], [0, 0.5, -0.5]], rtol=1e-6)
    weighted = softmax_cross_entropy(logits, [0, 2], weight=[1, 0, 1], reduction="none", label_smoothing=0.1)
    assert np.isfinite(weighted[0])
    assert weighted[1] == np.inf
    strips = softmax_cross_entropy(logits.T.copy(), [0, 2], axis=0, reduction="none", label_smoothing=0.1)
    assert (strips == np.inf).all()


def test_a_label_of_no_probability(backend, dtype):
    loss, gradient = softmax_cross_entropy(np.array([0, -np.inf], dtype), 1, return_grad=True)
    assert loss == np.inf
    assert gradient.tolist() == [1, -1]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("row", "loss"),
    [([np.nan, 1, 2], np.nan), ([0, np.inf, 1], np.inf), ([0, np.inf, np.nan], np.nan), ([-np.inf] * 3, np.nan)],
    ids=str,
)
def test_rows_without_probabilities(backend, dtype, row, loss, axis):
    logits = np.array([[0, 0, 0], row], dtype)
    logits = logits.T.copy() if axis == 0 else logits
    losses, gradient = softmax_cross_entropy(logits, [0, 0], axis=axis, return_grad=True, reduction="none")
    gradient = gradient.T if axis == 0 else gradient
    np.testing.assert_allclose(losses, [np.log(3), loss], rtol=1e-6)
    assert np.isfinite(gradient[0]).all()
    assert np.isnan(gradient[1]).all()


def test_the_mean_of_nothing(backend, dtype, kind):
    if kind == "ignored":
        loss, gradient = softmax_cross_entropy(np.ones((3, 4), dtype), [9, 9, 9], ignore_index=9, return_grad=True)
        assert gradient.tolist() == np.zeros((3, 4)).tolist()
    else:
        targets = np.empty((0, 4), dtype) if kind == "probabilities" else np.empty(0, int)
        loss, gradient = softmax_cross_entropy(np.empty((0, 4), dtype), targets, return_grad=True)
        assert gradient.shape == (0, 4)
    assert np.isnan(loss)


@pytest.mark.parametrize("axis", [0, 1])
def test_ignored_rows_may_hold_anything(backend, dtype, axis):
    logits = np.array([[np.nan] * 3, [0, 0, 0]], dtype)
    logits = logits.T.copy() if axis == 0 else logits
    loss, gradient = softmax_cross_entropy(logits, [5, 0], axis=axis, ignore_index=5, z_loss=1, return_grad=True)
    np.testing.assert_allclose(loss, np.log(3) + np.log(3) ** 2, rtol=1e-6)
    assert not (gradient[:, 0] if axis == 0 else gradient[0]).any()


# dtypes, layouts, outputs


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_16_bits(backend, kind, dtype, rng, options):
    logits, targets, arguments = case(kind, rng, (5, 70), 1, dtype, options)
    loss, gradient = softmax_cross_entropy(logits, targets, return_grad=True, **arguments)
    assert loss.dtype == np.float32
    assert gradient.dtype == dtype
    if "weight" in arguments:
        arguments["weight"] = np.asarray(arguments["weight"], LONG)
    value, slope, _ = expected(
        logits.astype(np.float32), targets.astype(LONG) if kind == "probabilities" else targets, **arguments
    )
    np.testing.assert_allclose(loss, value.astype(float), rtol=1e-5)
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert_close(gradient, slope, 0.51 * eps, max(float(ml_dtypes.finfo(dtype).smallest_subnormal), 1e-6))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, bool])
def test_integer_logits_are_converted(backend, dtype):
    loss, gradient = softmax_cross_entropy(np.array([[1, 0]], dtype), [0], return_grad=True)
    assert loss.dtype == gradient.dtype == np.float64
    np.testing.assert_allclose(loss, np.log1p(np.exp(-1)), rtol=1e-14)


def test_long_double(kind, rng):
    logits, targets, arguments = case(kind, rng, (5, 30), 1, LONG, OPTIONS["everything"])
    loss, gradient = softmax_cross_entropy(logits, targets, return_grad=True, **arguments)
    assert loss.dtype == gradient.dtype == LONG
    value, slope, _ = expected(logits, targets, **arguments)
    np.testing.assert_allclose(loss, value, rtol=1e-15)
    np.testing.assert_allclose(gradient, slope, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, ">i4"])
def test_dtypes_of_labels(backend, dtype):
    assert softmax_cross_entropy([[0.0, 0.0, 700.0]], np.array([2], dtype)) < 1e-300


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "broadcast" not in name])
def test_layouts_give_the_same_bits(backend, kind, rng, layout, axis):
    logits, targets, arguments = case(kind, rng, (6, 5, 40), axis, np.float32, OPTIONS["everything"])
    plain, slope = softmax_cross_entropy(logits, targets, return_grad=True, **arguments)
    loss, gradient = softmax_cross_entropy(
        LAYOUTS[layout](logits),
        LAYOUTS[layout](targets) if targets.ndim == 3 else targets,
        return_grad=True,
        **arguments,
    )
    if backend.name == "numpy":  # whose sums depend on the order in memory
        np.testing.assert_allclose(loss, plain, rtol=1e-6)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)
    else:
        np.testing.assert_array_equal(loss, plain)
        np.testing.assert_array_equal(gradient, slope)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_in_place_over_the_logits(backend, kind, rng, layout, options):
    for axis in (0, 1):
        logits, targets, arguments = case(kind, rng, (40, 33), axis, np.float32, options)
        plain, slope = softmax_cross_entropy(logits, targets, return_grad=True, **arguments)
        own = WRITABLE_LAYOUTS[layout](logits)
        loss, gradient = softmax_cross_entropy(own, targets, return_grad=True, grad_out=own, **arguments)
        assert gradient is own
        np.testing.assert_allclose(loss, plain, rtol=1e-6)
        np.testing.assert_allclose(own, slope, rtol=1e-5, atol=1e-7)


def test_the_gradient_overlaps_an_argument(backend, dtype, rng):
    memory = rng.dirichlet(np.ones(40), 9).astype(dtype)
    logits, targets = memory[:6], memory[3:]
    expected_loss, slope = softmax_cross_entropy(logits.copy(), targets.copy(), return_grad=True)
    for out in (memory[:6], memory[1:7], memory[3:]):
        memory_before = memory.copy()
        loss, gradient = softmax_cross_entropy(logits, targets, return_grad=True, grad_out=out)
        assert gradient is out
        assert loss == expected_loss
        np.testing.assert_array_equal(out, slope)
        memory[...] = memory_before
    weight = np.ones(40, dtype)
    logits = np.lib.stride_tricks.as_strided(weight, (1, 40))
    _, slope = softmax_cross_entropy(logits.copy(), [3], weight=weight.copy(), return_grad=True)
    softmax_cross_entropy(logits, [3], weight=weight, return_grad=True, grad_out=logits)
    np.testing.assert_array_equal(logits, slope)


def test_large_gradients_are_streamed(dtype, rng):
    """A gradient that leaves the caches is written past them, wherever its rows begin."""
    from fastsoftmax import _schedule

    n_rows = _schedule.cache_sizes().last_level // (1001 * dtype().itemsize)
    logits, labels = rng.normal(size=(n_rows, 1001)).astype(dtype), rng.integers(0, 1001, n_rows)
    with fastsoftmax.use_backend("cython"), fastsoftmax.record_plans() as plans:
        for options in OPTIONS["plain"], {"label_smoothing": 0.1}:
            _, gradient = softmax_cross_entropy(logits, labels, return_grad=True, reduction="sum", **options)
            assert plans[-1].schedule.streaming
            _, last = softmax_cross_entropy(logits[-9:], labels[-9:], return_grad=True, reduction="sum", **options)
            assert not plans[-1].schedule.streaming
            np.testing.assert_array_equal(gradient[-9:], last)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
def test_any_number_of_threads_gives_the_same_bits(backend, kind, dtype, rng, monkeypatch, options):
    logits, targets, arguments = case(kind, rng, (300, 2000), 1, dtype, options)
    results = []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
        with fastsoftmax.record_plans() as plans:
            results.append(softmax_cross_entropy(logits, targets, return_grad=True, **arguments))
        is_dense = kind == "probabilities" or "softcap" in options
        function = "dense_cross_entropy" if is_dense else "softmax_cross_entropy"
        assert [(plan.function, plan.backend) for plan in plans] == [(function, backend.name)]
        assert plans[0].schedule.n_threads == (int(n_threads) if backend.has_kernels else 1)
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(gradient, results[0][1])


@pytest.mark.parametrize(
    ("shape", "axis", "options", "traversal"),
    [
        ((30, 20), 1, {}, "rows"),
        ((20, 300), 0, {}, "strips"),
        ((20, 300), 0, {"softcap": 1.0}, "gather"),
        ((5, 20, 30), 1, {"label_smoothing": 0.1}, "strips"),
    ],
    ids=str,
)
def test_the_traversal(backend, dtype, rng, shape, axis, options, traversal):
    logits, labels, arguments = case("labels", rng, shape, axis, dtype, options)
    with fastsoftmax.record_plans() as plans:
        softmax_cross_entropy(logits, labels, **arguments)
    expected_traversals = {"cython": traversal, "numba": "gather", "numpy": "array"}
    assert plans[0].schedule.traversal == expected_traversals[backend.name]


def test_no_temporaries_of_the_size_of_the_logits(backend, kind, dtype, rng):
    if not backend.has_kernels:
        pytest.skip("the numpy backend makes temporaries of the size of its input")
    logits, targets, arguments = case(kind, rng, (500, 4000), 1, dtype, OPTIONS["everything"])

    def peak(**more):
        softmax_cross_entropy(logits, targets, **arguments, **more)
        tracemalloc.start()
        softmax_cross_entropy(logits, targets, **arguments, **more)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak() < logits.nbytes / 10
    assert peak(return_grad=True) < logits.nbytes * 1.1
    assert peak(return_grad=True, grad_out=logits) < logits.nbytes / 10


# Bad input


X = np.zeros((3, 4))
BAD_CALLS = [
    (([["1"]], [0]), {}, TypeError, "logits must hold numbers"),
    ((X + 1j, [0, 0, 0]), {}, TypeError, "logits must hold real numbers"),
    ((1.0, 0), {}, ValueError, "logits must have an axis of classes"),
    ((np.zeros((3, 0)), [0, 0, 0]), {}, ValueError, "logits has no classes along axis -1"),
    ((X, [0, 0, 0]), {"axis": 2}, np.exceptions.AxisError, "out of bounds"),
    ((X, [0, 0, 0]), {"axis": None}, TypeError, "axis must be one integer, not None"),
    ((X, [0, 0, 0]), {"axis": 1.0}, TypeError, "axis must be an integer"),
    ((X, [0, 4, 0]), {}, ValueError, r"targets must hold labels from 0 to 3, not 4 at index \(1,\)"),
    ((X, [0, 0, -1]), {}, ValueError, r"targets must hold labels from 0 to 3, not -1 at index \(2,\)"),
    ((X, [0, -100, 5]), {"ignore_index": -100}, ValueError, r"from 0 to 3, not 5 at index \(2,\)"),
    ((X, np.array([0, 2**64 - 1, 0], np.uint64)), {}, ValueError, "not 18446744073709551615"),
    ((X[0], 7), {}, ValueError, "targets must hold labels from 0 to 3, not 7$"),
    ((X, [0, 0]), {}, ValueError, r"targets of labels must have the shape \(3,\), not \(2,\)"),
    ((X, np.zeros((3, 4), int)), {}, ValueError, r"targets of labels must have the shape \(3,\), not \(3, 4\)"),
    ((X, X[:, :3]), {}, ValueError, r"targets must have the shape of logits, \(3, 4\), not \(3, 3\)"),
    ((X, [True, False, True]), {}, TypeError, "targets must hold integer labels or probabilities, not bool"),
    ((X, ["a", "b", "c"]), {}, TypeError, "targets must hold numbers"),
    ((X, np.ma.masked_array([0, 1, 2])), {}, TypeError, "targets is a masked array"),
    ((X, X), {"ignore_index": 1}, ValueError, "ignore_index is for labels, but targets holds probabilities"),
    ((X, [0, 0, 0]), {"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, not 1.5"),
    ((X, [0, 0, 0]), {"weight": [1, 1, 1]}, ValueError, r"weight must have one number for each class, shape \(4,\)"),
    (
        (X, [0, 0, 0]),
        {"weight": [1, 1, -0.5, 1]},
        ValueError,
        "must be not negative and finite, not -0.5 at index 2",
    ),
    (
        (X, [0, 0, 0]),
        {"weight": [1, np.nan, 1, 1]},
        ValueError,
        "must be not negative and finite, not nan at index 1",
    ),
    ((X, [0, 0, 0]), {"weight": ["1"] * 4}, TypeError, "weight must hold numbers"),
    ((X, [0, 0, 0]), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1 and finite, not 1.5"),
    (
        (X, [0, 0, 0]),
        {"label_smoothing": np.nan},
        ValueError,
        "must be from 0 to 1 and finite, not nan",
    ),
    ((X, [0, 0, 0]), {"label_smoothing": "0"}, TypeError, "label_smoothing must be a number, not '0'"),
    ((X, [0, 0, 0]), {"z_loss": -1}, ValueError, "z_loss must be not negative and finite, not -1"),
    ((X, [0, 0, 0]), {"z_loss": np.inf}, ValueError, "z_loss must be not negative and finite, not inf"),
    ((X, [0, 0, 0]), {"softcap": 0}, ValueError, "softcap must be positive and finite, not 0"),
    ((X, [0, 0, 0]), {"softcap": -3.0}, ValueError, "softcap must be positive and finite, not -3.0"),
    ((X, [0, 0, 0]), {"softcap": True}, TypeError, "softcap must be a number, not True"),
    (
        (X, [0, 0, 0]),
        {"reduction": "batchmean"},
        ValueError,
        "must be 'mean', 'sum' or 'none', not 'batchmean'",
    ),
    ((X, [0, 0, 0]), {"reduction": None}, ValueError, "reduction must be 'mean', 'sum' or 'none', not None"),
]


@pytest.mark.parametrize(
    ("arguments", "options", "exception", "message"), BAD_CALLS, ids=[message for *_, message in BAD_CALLS]
)
def test_bad_input(backend, arguments, options, exception, message):
    out = np.full(np.shape(arguments[0]), 7.0)
    with fastsoftmax.record_plans() as plans, pytest.raises(exception, match=message):
        softmax_cross_entropy(*arguments, return_grad=True, grad_out=out, **options)
    assert (out == 7).all()
    assert plans == []


@pytest.mark.parametrize(
    ("out", "exception", "message"),
    [
        (np.full((3, 3), 7.0), ValueError, "grad_out must have shape"),
        (np.full((3, 4), 7, np.float32), TypeError, "grad_out must have dtype float64"),
        ([[7.0] * 4] * 3, TypeError, "grad_out must be a numpy.ndarray, not list"),
        (np.broadcast_to(7.0, (3, 4)), ValueError, "grad_out is read-only"),
    ],
    ids=["shape", "dtype", "list", "read-only"],
)
def test_bad_grad_out(backend, out, exception, message):
    with pytest.raises(exception, match=message):
        softmax_cross_entropy(X, [0, 1, 2], return_grad=True, grad_out=out)
    assert (np.asarray(out) == 7).all()


def test_a_place_for_a_gradient_that_is_not_wanted():
    with pytest.raises(TypeError, match="grad_out takes the gradient, which needs return_grad=True"):
        softmax_cross_entropy(X, [0, 1, 2], grad_out=X)


def test_the_cuda_backend():
    with pytest.raises(
        TypeError, match="backend 'cuda' does not compute softmax_cross_entropy; these do: 'cython', 'numba', 'numpy'"
    ):
        softmax_cross_entropy(X, [0, 0, 0], backend="cuda")
    with pytest.raises(TypeError, match="targets is on a CUDA device, where this is not computed"):
        softmax_cross_entropy(X, OnDevice())


def test_probabilities_of_more_digits_than_the_logits(backend):
    logits = np.array([[-1.321, 1.257], [3.0, 0.5]], np.float16)
    targets = np.array([[0.3, 0.3], [0.1, 0.9]], np.float32)
    loss, gradient = softmax_cross_entropy(logits, targets, return_grad=True)
    expected, _ = softmax_cross_entropy(logits.astype(np.float64), targets.astype(np.float64), return_grad=True)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert gradient.dtype == np.float16
