"""Which backend serves a call, who may force it, and what is said when it cannot be had."""

import asyncio
import contextvars
import threading

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import BackendUnavailableError, Plan, _dispatch, record_plans, softmax, use_backend
from fastsoftmax._dispatch import BACKENDS, Backend, available_backends, load, select, unavailable_reason

NAMES = tuple(backend.name for backend in BACKENDS)
FLOAT64 = np.dtype(np.float64)


@pytest.fixture
def force_by_environment(monkeypatch):
    """Choose a backend as the environment does when the package is imported."""
    available_backends()  # loads the compiled backend, which remembers the true environment's choice

    def force(name):
        default = _dispatch.Choices(name, "FASTSOFTMAX_BACKEND", None)
        monkeypatch.setattr(_dispatch, "choices", contextvars.ContextVar("choices", default=default))
        monkeypatch.setattr(_dispatch, "direct_calls", None)

    return force


@pytest.fixture
def nothing_forced(monkeypatch, force_by_environment):
    """Take back what the environment of the test run forces."""
    force_by_environment(None)
    monkeypatch.delenv("FASTSOFTMAX_ISA", raising=False)


@pytest.fixture
def only_numpy(monkeypatch, nothing_forced):
    """Make the kernels' modules impossible to import, as on a machine without them."""
    records = tuple(
        Backend(record.name, f"fastsoftmax.backends.missing_{record.name}", record.dtypes, record.min_size)
        if record.name != "numpy"
        else record
        for record in BACKENDS
    )
    monkeypatch.setattr(_dispatch, "BACKENDS", records)
    monkeypatch.setattr(_dispatch, "_by_name", {record.name: record for record in records})


def backends_of(calls):
    with record_plans() as plans:
        calls()
    return [plan.backend for plan in plans]


# What ran


def test_the_forced_backend_and_tier_ran(backend, function, dtype):
    with record_plans() as plans:
        getattr(fastsoftmax, function)(np.ones((3, 4), dtype), 1)
    assert len(plans) == 1
    assert isinstance(plans[0], Plan)
    assert (plans[0].function, plans[0].backend, plans[0].isa) == (function, backend.name, backend.tier)


@pytest.mark.parametrize(
    ("make", "axis", "traversal"),
    [
        (lambda dtype: np.ones((300, 400), dtype), 1, "rows"),
        (lambda dtype: np.ones((30, 400), dtype), None, "rows"),
        (lambda dtype: np.ones((300, 400), dtype), 0, "strips"),
        (lambda dtype: np.ones((20, 300, 40), dtype), 1, "strips"),
        (lambda dtype: np.ones((300, 400), dtype)[:, ::2], 1, "gather"),
        (lambda dtype: np.ones((30, 40, 50), dtype), (0, 2), "gather"),
    ],
)
def test_the_traversal_follows_the_layout(backend, dtype, make, axis, traversal):
    with record_plans() as plans:
        softmax(make(dtype), axis)
    assert plans[0].schedule.traversal == (traversal if backend.has_kernels else "array")


def test_an_empty_array_needs_no_plan(backend, function):
    assert backends_of(lambda: getattr(fastsoftmax, function)(np.empty((3, 0)), 1)) == []


def test_recorders_nest():
    with record_plans() as outer:
        softmax([1.0])
        with record_plans() as inner:
            softmax([1.0])
            softmax([1.0])
        softmax([1.0])
    assert (len(outer), len(inner)) == (2, 2)


# The automatic choice


@pytest.mark.usefixtures("nothing_forced")
def test_automatic_choice_prefers_the_first_that_is_available(dtype):
    best = available_backends()[0]
    assert backends_of(lambda: softmax(np.ones(100_000, dtype))) == [best]


@pytest.mark.usefixtures("nothing_forced")
@pytest.mark.parametrize("dtype", [np.longdouble, np.complex64, np.complex128])
def test_automatic_choice_takes_numpy_for_what_kernels_do_not_compute(dtype):
    if np.dtype(dtype).name in ("float32", "float64"):
        pytest.skip("long double is float64 here")
    assert backends_of(lambda: softmax(np.ones(100_000, dtype))) == ["numpy"]


@pytest.mark.usefixtures("nothing_forced")
@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.int64, bool, ">f4", ">f8"])
def test_automatic_choice_sees_the_dtype_computed_in(dtype):
    assert backends_of(lambda: softmax(np.ones(100_000, dtype))) == [available_backends()[0]]


@pytest.mark.usefixtures("nothing_forced")
def test_numba_is_not_loaded_for_small_arrays_where_cython_is_missing(monkeypatch):
    missing = Backend("cython", "fastsoftmax.backends.missing_cython", BACKENDS[0].dtypes)
    monkeypatch.setattr(_dispatch, "BACKENDS", (missing, *BACKENDS[1:]))
    assert backends_of(lambda: softmax(np.ones(65_535))) == ["numpy"]
    if unavailable_reason(BACKENDS[1]) is None:
        assert backends_of(lambda: softmax(np.ones(65_536))) == ["numba"]


@pytest.mark.usefixtures("only_numpy")
def test_automatic_choice_falls_back():
    assert available_backends() == ("numpy",)
    assert backends_of(lambda: softmax(np.ones(100_000))) == ["numpy"]


@pytest.mark.usefixtures("nothing_forced")
@pytest.mark.parametrize(
    ("exception", "message"),
    [
        (ValueError, "numpy.dtype size changed, may indicate binary incompatibility"),
        (OSError, "libomp.so.5: cannot open shared object file"),
        (AttributeError, "_ARRAY_API not found"),
    ],
)
def test_automatic_choice_passes_over_a_module_that_cannot_load(monkeypatch, tmp_path, exception, message):
    module = f"broken_by_{exception.__name__}"
    (tmp_path / f"{module}.py").write_text(f"raise {exception.__name__}({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    broken = Backend("broken", module, BACKENDS[0].dtypes)
    monkeypatch.setattr(_dispatch, "BACKENDS", (broken, BACKENDS[-1]))
    monkeypatch.setitem(_dispatch._by_name, "broken", broken)
    assert unavailable_reason(broken) == message
    assert available_backends() == ("numpy",)
    assert backends_of(lambda: softmax([1.0, 2.0])) == ["numpy"]
    with pytest.raises(BackendUnavailableError, match=f"backend 'broken' is not available: {message}"):
        softmax([1.0, 2.0], backend="broken")


# Forcing


@pytest.mark.parametrize("name", NAMES)
def test_argument_goes_before_context_goes_before_environment(name, force_by_environment):
    if name not in available_backends():
        pytest.skip(unavailable_reason(BACKENDS[NAMES.index(name)]))
    x = np.ones(3)
    assert backends_of(lambda: softmax(x, backend=name)) == [name]
    with use_backend("numpy"):
        assert backends_of(lambda: softmax(x, backend=name)) == [name]
    with use_backend(name):
        assert backends_of(lambda: softmax(x)) == [name]
        assert backends_of(lambda: softmax(x, backend="numpy")) == ["numpy"]
    force_by_environment(name)
    assert backends_of(lambda: softmax(x)) == [name]
    with use_backend("numpy"):
        assert backends_of(lambda: softmax(x)) == ["numpy"]


@pytest.mark.parametrize("name", ["", "Cython", "CUDA", "fortran", 3, b"numpy"])
def test_unknown_backends_are_answered_with_those_that_exist(function, name):
    with pytest.raises(ValueError, match="backend must be one of 'cython', 'numba', 'cuda', 'numpy', not"):
        getattr(fastsoftmax, function)([1.0], backend=name)
    with pytest.raises(ValueError, match="backend must be one of"), use_backend(name):
        pass


@pytest.mark.usefixtures("only_numpy")
@pytest.mark.parametrize("name", ["cython", "numba"])
def test_unavailable_backends_are_answered_with_those_that_are(function, name):
    message = f"backend '{name}' is not available: No module named .*missing_{name}.*; available: 'numpy'"
    with pytest.raises(BackendUnavailableError, match=message):
        getattr(fastsoftmax, function)([1.0], backend=name)
    with pytest.raises(BackendUnavailableError, match=message), use_backend(name):
        pass
    assert issubclass(BackendUnavailableError, RuntimeError)


@pytest.mark.usefixtures("only_numpy")
def test_a_forced_environment_never_falls_back(force_by_environment):
    force_by_environment("numba")
    with pytest.raises(BackendUnavailableError):
        softmax([1.0])


def test_a_failing_module_is_not_imported_twice(monkeypatch):
    record = Backend("broken", "fastsoftmax.backends.missing", None)
    assert isinstance(load(record), ImportError)
    monkeypatch.setattr(_dispatch, "import_module", None)
    assert load(record) is load(record)


def test_forced_backends_that_lack_a_dtype_name_those_that_have_it():
    with pytest.raises(TypeError, match="backend 'cython' does not compute in int32; these do: 'numpy'"):
        select(np.dtype(np.int32), 1, "cython")
    with pytest.raises(TypeError, match="does not compute in complex128; these do: 'numpy'"):
        select(np.dtype(complex), 1, "numba")


# The context


def test_contexts_nest_and_end_with_an_exception():
    assert _dispatch.choices.get().backend is None
    with use_backend("numpy"):
        with pytest.raises(KeyError), use_backend(available_backends()[0]):
            assert _dispatch.choices.get().backend == available_backends()[0]
            raise KeyError
        assert _dispatch.choices.get().backend == "numpy"
    assert _dispatch.choices.get().backend is None


@pytest.mark.usefixtures("nothing_forced")
def test_other_threads_are_not_forced():
    seen = []
    with use_backend("numpy"), record_plans() as plans:
        thread = threading.Thread(target=lambda: seen.extend(backends_of(lambda: softmax(np.ones(100_000)))))
        thread.start()
        thread.join()
        inherited = contextvars.copy_context()
        thread = threading.Thread(target=inherited.run, args=(softmax, np.ones(100_000)))
        thread.start()
        thread.join()
    assert seen == [available_backends()[0]]
    assert [plan.backend for plan in plans] == ["numpy"]


@pytest.mark.usefixtures("nothing_forced")
def test_asynchronous_tasks_are_forced_apart():
    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return backends_of(lambda: softmax(np.ones(3)))[0]

    async def together():
        return await asyncio.gather(*(task(name) for name in available_backends()))

    assert tuple(asyncio.run(together())) == available_backends()


# The environment


WHAT_RAN = """
import fastsoftmax
with fastsoftmax.record_plans() as plans:
    fastsoftmax.softmax([1.0, 2.0])
print(plans[0].backend, plans[0].isa)
"""


@pytest.mark.parametrize("name", NAMES)
def test_environment_forces_a_backend(python, python_error, name):
    if name in available_backends():
        assert python(WHAT_RAN, FASTSOFTMAX_BACKEND=name).split()[0] == name
    else:
        assert "BackendUnavailableError" in python_error(WHAT_RAN, FASTSOFTMAX_BACKEND=name)


def test_environment_with_an_unknown_backend(python_error):
    assert python_error(WHAT_RAN, FASTSOFTMAX_BACKEND="fortran") == (
        "ValueError: FASTSOFTMAX_BACKEND must be one of 'cython', 'numba', 'cuda', 'numpy', not 'fortran'"
    )


def test_an_empty_environment_variable_forces_nothing(python):
    assert python(WHAT_RAN, FASTSOFTMAX_BACKEND="", FASTSOFTMAX_ISA="") == python(WHAT_RAN)


def compiled_tiers():
    if reason := unavailable_reason(BACKENDS[NAMES.index("cython")]):
        pytest.skip(f"backend 'cython': {reason}")
    from fastsoftmax.backends import compiled

    return compiled.tiers()


def test_environment_forces_a_tier(python):
    for tier in compiled_tiers():
        assert python(WHAT_RAN, FASTSOFTMAX_ISA=tier) == f"cython {tier}"


def test_without_the_environment_the_best_tier_runs(python):
    assert python(WHAT_RAN) == f"cython {compiled_tiers()[0]}"


def test_environment_with_an_unknown_tier(python, python_error):
    message = f"FASTSOFTMAX_ISA must be one of {', '.join(compiled_tiers())} on this machine, not 'sse9'"
    caught = WHAT_RAN.replace("softmax([1.0, 2.0])", "softmax([1.0] * {size})")
    for size in (2, 100_000):  # the second would suit Numba too
        assert python_error(caught.format(size=size), FASTSOFTMAX_ISA="sse9").endswith(f"Error: {message}")
    code = f"""
import fastsoftmax
try:
    fastsoftmax.softmax([1.0, 2.0])
except ValueError as error:
    print(error)
print(*fastsoftmax.available_backends())
{WHAT_RAN.replace("[1.0, 2.0]", "[1.0, 2.0], backend='numpy'")}
"""
    others = " ".join(name for name in available_backends() if name != "cython")
    assert python(code, FASTSOFTMAX_ISA="sse9").splitlines() == [message, others, "numpy None"]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_environment_with_a_bad_number_of_threads(python_error, value):
    code = "import fastsoftmax, numpy; fastsoftmax.softmax(numpy.ones(10**6))"
    if available_backends() == ("numpy",):
        pytest.skip("only kernels use threads")
    assert python_error(code, FASTSOFTMAX_NUM_THREADS=value) == (
        f"ValueError: FASTSOFTMAX_NUM_THREADS must be a positive integer, not '{value}'"
    )
