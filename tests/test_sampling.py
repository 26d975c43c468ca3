"""Random draws from a softmax."""

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from fastsoftmax import record_plans, sample

from .inputs import LAYOUTS, VALUES, OnDevice, values
from .reference import exact


class Fixed(np.random.Generator):
    """A generator of given uniform numbers."""

    def __init__(self, uniforms):
        super().__init__(np.random.PCG64(0))
        self.uniforms = uniforms

    def random(self, size):
        return np.broadcast_to(np.asarray(self.uniforms, float), size).copy()


def probabilities_of(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Return the exact probabilities of one row."""
    p = exact("softmax", np.asarray(logits, np.longdouble) / temperature)
    order = np.lexsort((np.arange(p.size), -np.asarray(logits, float)))
    p[order[top_k or p.size :]] = 0
    p /= p.sum()
    before = p[order].cumsum() - p[order]
    p[order[before >= top_p]] = 0
    return (p / p.sum()).astype(float)


OPTIONS = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "everything": {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
}


# Frequencies


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n", [3, 40, 300])
def test_frequencies(backend, dtype, rng, n, options):
    """A chi-square test; elements that are expected fewer than 10 times are taken together."""
    if options.get("top_k", 0) > n:
        options = options | {"top_k": n}
    logits = (rng.normal(size=n) * 2).astype(dtype)
    logits[1] = -np.inf
    p = probabilities_of(logits, **options)
    counts = np.bincount(sample(logits, size=100_000, rng=rng, **options), minlength=n)
    assert counts[p == 0].sum() == 0
    often = p * 100_000 >= 10
    observed, expected = counts[often], p[often] * 100_000
    if p[~often].sum() > 0:
        observed, expected = np.append(observed, counts[~often].sum()), np.append(expected, p[~often].sum() * 100_000)
    if observed.size > 1:
        assert stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 1e-4


@pytest.mark.parametrize("axis", [0, 1])
def test_frequencies_of_rows(backend, dtype, rng, axis):
    """One draw from each of a thousand equal rows, which are longer than a chunk."""
    p = rng.dirichlet(np.full(20, 0.5))
    logits = np.full((1, 9000), -np.inf)
    logits[0, ::450] = np.log(p)
    logits = np.broadcast_to(logits, (1000, 9000)).astype(dtype)[:, : 9000 if axis == 1 else 8600]
    p = p[: logits[0, ::450].size]
    draws = sample(np.ascontiguousarray(logits.T) if axis == 0 else logits, axis, rng=rng)
    assert (draws % 450 == 0).all()
    counts = np.bincount(draws // 450, minlength=p.size)
    often = p * 1000 >= 5
    expected = np.append(p[often], p[~often].sum() + 1e-9)
    observed = np.append(counts[often], counts[~often].sum())
    assert stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-4


def test_rare_elements_are_as_rare_as_they_are(backend):
    """Elements of a probability of 2**-44 lie at the end of a long row, where a float32 sum would lose them."""
    n, m = 20_000, 2000
    logits = np.zeros(n, np.float32)
    logits[-m:] = -30 * np.log(2)
    total = (n - m) + m * 2.0**-30
    uniforms = (n - m + (np.arange(m) + 0.5) * 2.0**-30) / total
    draws = sample(logits, size=m, rng=Fixed(uniforms))
    assert (abs(draws - (n - m + np.arange(m))) <= 1).all()


# The inverse of the cumulative distribution


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9999}], ids=str)
@pytest.mark.parametrize("n", [4, 100, 9000])
def test_the_ends_of_the_unit_interval(backend, dtype, n, options):
    logits = np.full(n, -np.inf, dtype)
    logits[[1, n // 2, n - 2]] = [1.0, 0.5, 0.0] if n > 4 else [1.0, 0.5, 0.5]
    finite = {1, n // 2, n - 2}
    assert sample(logits, rng=Fixed(0.0), **options) == 1
    last = sample(logits, rng=Fixed(1 - 2.0**-53), **options)
    assert last == n - 2 if n > 4 else last in finite
    grid = sample(logits, size=4001, rng=Fixed(np.linspace(0, 1 - 2.0**-53, 4001)), **options)
    assert set(grid.tolist()) == finite


def test_draws_are_the_inverse(backend, dtype, rng):
    """Draws for increasing numbers increase, and change where the cumulative probability says they do."""
    for kind in VALUES:
        logits = values(kind, 5000, dtype)
        uniforms = np.linspace(0, 1, 999, endpoint=False)
        draws = sample(logits, size=999, rng=Fixed(uniforms))
        assert (np.diff(draws) >= 0).all()
        sums = exact("softmax", logits).cumsum()
        eps = 40 * np.finfo(dtype).eps
        assert (sums[draws] >= uniforms - eps).all(), kind
        assert (np.append(0, sums)[draws] <= uniforms + eps).all(), kind
        assert (exact("softmax", logits)[draws] > 0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_truncated_draws_are_the_inverse(backend, dtype, rng, options):
    """Also of what is left, in the order of the indices."""
    for n, scale in [(30, 1.0), (500, 1.0), (500, 0.1)]:
        logits = (rng.normal(size=n) * scale).astype(dtype)
        uniforms = rng.random(500)
        sums = probabilities_of(logits, **options).cumsum()
        draws = sample(logits, size=500, rng=Fixed(uniforms), **options)
        is_near = abs(sums - uniforms[:, np.newaxis]).min(axis=1) < 100 * np.finfo(dtype).eps
        assert is_near.mean() < 0.1
        np.testing.assert_array_equal(draws[~is_near], sums.searchsorted(uniforms, "right")[~is_near])


def test_top_p_is_the_smallest_set(backend, dtype, rng):
    """Also where it has more elements than are selected at first."""
    for scale, n in [(0.01, 700), (1.0, 700), (5.0, 700), (0.0, 2000), (1.0, 9000)]:
        logits = (rng.normal(size=n) * scale).astype(dtype)
        for top_p in (1e-9, 0.1, 0.5, 0.95, 1.0):
            p = probabilities_of(logits, top_p=top_p)
            draws = sample(logits, top_p=top_p, size=20_000, rng=Fixed(np.linspace(0, 1, 20_000, endpoint=False)))
            assert set(np.unique(draws)) <= set(np.flatnonzero(p)) if scale else draws.max() <= np.ceil(top_p * n)
            if scale and p[p > 0].min() > 1e-3:
                assert set(np.unique(draws)) == set(np.flatnonzero(p))


def test_what_leaves_all_changes_nothing(backend, dtype, rng):
    logits = rng.normal(size=(50, 300)).astype(dtype)
    draws = sample(logits, rng=np.random.default_rng(3))
    for options in ({"top_k": 300}, {"top_p": 1.0}, {"top_p": 1, "top_k": np.int64(300), "temperature": 1}):
        np.testing.assert_array_equal(sample(logits, rng=np.random.default_rng(3), **options), draws)


def test_ties_go_to_the_lowest_index(backend):
    draws = sample([1.0, 2.0, 1.0, 1.0], top_k=2, size=1000, rng=np.random.default_rng(0))
    assert set(draws.tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-45, 1e-300])
def test_low_temperatures_give_the_largest(backend, dtype, rng, temperature):
    logits = (rng.normal(size=(50, 300)) * 1e6).astype(dtype)
    np.testing.assert_array_equal(sample(logits, temperature=temperature, rng=rng), logits.argmax(1))
    assert set(sample([0, 5, 5, -9], temperature=temperature, size=200, rng=rng).tolist()) == {1, 2}


def test_a_low_temperature_and_the_largest_differences(backend, dtype):
    most = np.finfo(dtype).max
    assert sample(np.array([-most, most, np.nextafter(most, 0)], dtype), temperature=1e-9) == 1


def test_high_temperatures_give_all(backend, dtype):
    draws = sample(np.array([1, 900, -900, -np.inf], dtype), temperature=1e30, size=999, rng=np.random.default_rng(0))
    assert (abs(np.bincount(draws) - 333) < 80).all()


# Shapes, dtypes and layouts


def test_size(backend, rng):
    logits = rng.normal(size=(2, 3, 40))
    for axis, rows in ((-1, (2, 3)), (1, (2, 40)), (0, (3, 40))):
        assert sample(logits, axis, rng=rng).shape == rows
        assert sample(logits, axis, size=(5, *rows), rng=rng).shape == (5, *rows)
        assert sample(logits, axis, size=(0, *rows), rng=rng).shape == (0, *rows)
    assert sample(logits[:, :1], size=(4, 2, 7), rng=rng).shape == (4, 2, 7)
    assert sample(logits[0, 0], size=6, rng=rng).shape == (6,)
    assert sample(logits[:0], rng=rng).shape == (0, 3)
    one = sample(logits[0, 0], rng=rng)
    assert type(one) is np.int64
    assert sample(logits, rng=rng).dtype == np.int64


def test_each_row_has_its_own_draws(backend):
    """Rows with one possible element each, broadcast in every way."""
    places = np.array([[3, 1, 4], [1, 5, 9]])
    logits = np.where(np.arange(10) == places[..., np.newaxis], 0.0, -np.inf)
    np.testing.assert_array_equal(sample(logits), places)
    np.testing.assert_array_equal(sample(logits, size=(7, 2, 3)), np.broadcast_to(places, (7, 2, 3)))
    np.testing.assert_array_equal(sample(logits[:, :1], size=(7, 2, 3)), np.broadcast_to(places[:, :1], (7, 2, 3)))
    np.testing.assert_array_equal(sample(logits[:1], size=(2, 3)), np.broadcast_to(places[:1], (2, 3)))
    np.testing.assert_array_equal(sample(np.moveaxis(logits, -1, 0), axis=0), places)


def test_reproducible(backend, rng):
    logits = rng.normal(size=(40, 50))
    draws = [sample(logits, size=(3, 40), rng=np.random.default_rng(7)) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    generator = np.random.default_rng(7)
    np.testing.assert_array_equal(sample(logits, size=(3, 40), rng=generator), draws[0])
    reference = np.random.default_rng(7)
    reference.random((3, 40))
    assert generator.random() == reference.random()  # one uniform number a draw
    assert (sample(logits) != sample(logits)).any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layouts(backend, rng, options):
    logits = rng.normal(size=(130, 150)) * 0.3  # so flat that top-p takes more than are selected at first
    for axis in (0, 1):
        for layout in LAYOUTS.values():
            x = layout(logits)
            expected = sample(np.ascontiguousarray(x), axis, rng=np.random.default_rng(0), **options)
            np.testing.assert_array_equal(sample(x, axis, rng=np.random.default_rng(0), **options), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("shape", "traversal"),
    [((150, 9), "tiles"), ((40, 29), "tiles"), ((10, 3000), "rows"), ((150, 9), "strips"), ((50, 3000), "strips")],
    ids=str,
)
def test_a_row_has_its_draws_in_every_traversal(backend, dtype, rng, options, shape, traversal):
    """As beside other rows, so alone and collected element by element."""
    n_rows, n = shape
    if traversal == "strips" and n > 64 and options.get("top_p") and not options.get("top_k"):
        traversal = "bands"
    for kind in ("normal", "wide", "masked by -inf", "offset", "ties"):
        x, uniforms = values(kind, shape, dtype), rng.random((3, n_rows))
        uniforms[0] = np.nextafter(1, 0)
        x[:, 0] = np.maximum(x[:, 1:].max(1), -5)  # that something may be drawn
        rows = x.T.copy().T if traversal in ("strips", "bands") else x
        with record_plans() as plans:
            draws = sample(rows, size=(3, n_rows), rng=Fixed(uniforms), **options)
        assert backend.name != "cython" or plans[0].schedule.traversal == traversal
        collected = np.repeat(x, 2, 1)[:, ::2]
        np.testing.assert_array_equal(sample(collected, size=(3, n_rows), rng=Fixed(uniforms), **options), draws)
        for row in range(0, n_rows, 7):
            alone = sample(x[row], size=3, rng=Fixed(uniforms[:, row]), **options)
            np.testing.assert_array_equal(alone, draws[:, row])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64, bool, ">f4", "g"])
def test_dtypes(backend, dtype):
    if dtype == "g" and backend.name != "numpy":
        pytest.skip("long double is for the numpy backend")
    x = np.array([[0, 1, 0, 1], [1, 0, 0, 0]]).astype(dtype)
    for axis in (0, 1):
        uniforms = np.linspace(0.05, 0.95, 4 if axis == 0 else 2)
        expected = sample(x.astype(float), axis, rng=Fixed(uniforms))
        np.testing.assert_array_equal(sample(x, axis, rng=Fixed(uniforms)), expected)


def test_bits_do_not_depend_on_threads(backend, rng, monkeypatch):
    for shape, axis in [((600, 700), 1), ((700, 600), 0)]:
        x = rng.normal(size=shape).astype(np.float32)
        results = []
        for n_threads in ("1", "3"):
            monkeypatch.setenv("FASTSOFTMAX_NUM_THREADS", n_threads)
            with record_plans() as plans:
                results.append(sample(x, axis, size=(2, 600), rng=np.random.default_rng(0)))
            assert plans[0].function == "sample"
            assert backend.name == "numpy" or plans[0].schedule.n_threads == int(n_threads)
        np.testing.assert_array_equal(*results)


def test_logits_stay_as_they_are(backend, rng):
    logits = rng.normal(size=(3, 40))
    before = logits.copy()
    sample(logits, temperature=1e-30, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(logits, before)


# Errors


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([np.nan, 0.0], "a NaN"),
        ([np.nan, np.inf], "a NaN"),
        ([np.inf, 0.0], r"\+inf"),
        ([-np.inf, -np.inf], "nothing but -inf"),
    ],
)
def test_rows_without_probabilities(backend, dtype, row, what):
    x = np.zeros((2, 3, 2), dtype)
    x[1, 2] = row
    for options in ({}, {"temperature": 2.0}, {"temperature": 1e-9}, {"top_k": 1}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match=rf"logits must not have {what} in the row at index \(1, 2\)"):
            sample(x, **options)
        with pytest.raises(ValueError, match=rf"logits must not have {what} in the row at index \(1, 2\)"):
            sample(np.moveaxis(x, -1, 0), 0, size=(4, 2, 3), **options)
        with pytest.raises(ValueError, match=rf"logits must not have {what} in the row:"):
            sample(x[1, 2], **options)
        many = np.zeros((40, 2), dtype)
        many[17] = row
        with pytest.raises(ValueError, match=rf"logits must not have {what} in the row at index \(17,\)"):
            sample(many, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, not 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, not -1.0"),
        ({"temperature": np.nan}, ValueError, "temperature must be positive and finite, not nan"),
        ({"temperature": np.inf}, ValueError, "temperature must be positive and finite, not inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, not '1'"),
        ({"top_k": 0}, ValueError, "top_k must be from 1 to 4, the number of elements along axis, not 0"),
        ({"top_k": 5}, ValueError, "top_k must be from 1 to 4, the number of elements along axis, not 5"),
        ({"top_k": 1.0}, TypeError, "top_k must be an integer, not 1.0"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": -0.1}, ValueError, "top_p must be above 0 and at most 1, not -0.1"),
        ({"top_p": 1.1}, ValueError, "top_p must be above 0 and at most 1, not 1.1"),
        ({"top_p": np.nan}, ValueError, "top_p must be above 0 and at most 1, not nan"),
        ({"top_p": None, "rng": 0}, TypeError, "rng must be a numpy.random.Generator, not 0"),
        ({"rng": np.random.RandomState(0)}, TypeError, "rng must be a numpy.random.Generator, not RandomState"),
        ({"size": (2,)}, ValueError, r"size must be a shape that rows of shape \(3,\) broadcast to, not \(2,\)"),
        ({"size": (3, 1)}, ValueError, r"size must be a shape that rows of shape \(3,\) broadcast to, not \(3, 1\)"),
        ({"size": ()}, ValueError, r"size must be a shape that rows of shape \(3,\) broadcast to, not \(\)"),
        ({"size": -1}, ValueError, "size must not be negative, not -1"),
        ({"size": 3.0}, TypeError, "size must be an integer or a tuple of integers, not 3.0"),
        ({"size": True}, TypeError, "size must be an integer or a tuple of integers, not True"),
        ({"axis": 2}, np.exceptions.AxisError, "out of bounds"),
        ({"axis": None}, TypeError, "axis must be one integer, not None"),
        ({"logits": 1.0}, ValueError, "logits must have an axis to select from, not be a scalar"),
        ({"logits": np.zeros((3, 0))}, ValueError, "logits has nothing to draw from along axis -1"),
        ({"logits": np.ones(4, complex)}, TypeError, "logits must hold real numbers, not complex128"),
        ({"logits": np.ma.ones(4)}, TypeError, "logits is a masked array"),
        ({"backend": "fortran"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        sample(**({"logits": np.ones((3, 4))} | arguments))


def test_arrays_on_a_device(backend):
    with pytest.raises(TypeError, match="logits is on a CUDA device, where this is not computed"):
        sample(OnDevice())


def test_the_cuda_backend():
    with pytest.raises(TypeError, match="backend 'cuda' does not compute sample; these do: 'cython', 'numba', 'numpy'"):
        sample([1.0], backend="cuda")
