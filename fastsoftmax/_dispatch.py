"""Which backend serves a call.

A `Backend` record names a module with two functions, ``plan(function, layout, in_place)`` and ``run(plan, layout, x,
out, g)``, and says for which calls it is meant. `select` takes the first record that fits, unless the caller
forces one: by the ``backend`` argument, by `use_backend`, or by the environment variable ``FASTSOFTMAX_BACKEND``, in
this order. A forced backend that cannot serve the call is an error, never a fallback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import numpy as np

from fastsoftmax._layout import Array, Layout
from fastsoftmax._schedule import Schedule

if TYPE_CHECKING:
    from fastsoftmax.cuda._plan import LaunchPlan

Function = Literal[
    "softmax",
    "log_softmax",
    "logsumexp",
    "weighted_logsumexp",
    "softmax_vjp",
    "log_softmax_vjp",
    "logsumexp_vjp",
    "softmax_cross_entropy",
    "dense_cross_entropy",
    "softmax_one",
    "fold_states",
    "normalize",
    "softmax_topk",
    "sample",
]
VJPS: frozenset[Function] = frozenset({"softmax_vjp", "log_softmax_vjp", "logsumexp_vjp"})
# The dense one has probabilities for targets, or capped logits.
CROSS_ENTROPIES: frozenset[Function] = frozenset({"softmax_cross_entropy", "dense_cross_entropy"})
# These visit rows in bands (see src_cython/bands.pxi); two are the ways of `OnlineSoftmax` into and out of its states.
BANDED: frozenset[Function] = frozenset({"fold_states", "normalize", "softmax_topk", "sample"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What serves a call: the function, the backend, its instruction-set tier (if it has tiers) and the schedule.

    On a GPU the tier is the architecture of the card, and ``launch`` says how the call is spread over it.
    """

    function: Function
    backend: str
    isa: str | None
    schedule: Schedule
    launch: LaunchPlan | None = None


class CrossEntropy(NamedTuple):
    """What a cross-entropy has besides its logits, its gradient and its losses.

    Parameters
    ----------
    probabilities : ndarray or None
        The targets, of the shape and dtype of the logits; None where they are labels.
    labels : ndarray or None
        int64, one for each row in the order of the axes; -1 where a row does not count.
    weights : ndarray or None
        float64, one for each class.
    spread : ndarray or None
        What smoothing adds to the factor of each class beside a label, in the dtype that is computed in.
    smoothing, scale, z_scale : float
        The label smoothing; what the losses and the squares of the logarithms are multiplied by.
    softcap : float
        0 for none.
    """

    probabilities: Array | None
    labels: Array | None
    weights: Array | None
    spread: Array | None
    smoothing: float
    scale: float
    z_scale: float
    softcap: float


class Adjustment(NamedTuple):
    """What is done to the elements of a row before anything else.

    Parameters
    ----------
    mask : ndarray or None
        Of bool, in the shape of the input: which elements count. The others are taken for -inf, whatever they are, and
        their own results are 0 and -inf, whatever the row.
    temperature : float
        Positive and finite. Elements are divided by it, without rounding.
    dtype : dtype
        What elements are converted to, first, and computed in.
    """

    mask: Array | None
    temperature: float
    dtype: np.dtype[Any]


class Truncation(NamedTuple):
    """From which elements of a row is drawn.

    Parameters
    ----------
    temperature : float
        What the logits are divided by, first.
    top_k : int or None
        How many of the largest are left; None for all.
    top_p : float
        As few of those as make up this share of their sum are left; 1 for all.
    """

    temperature: float
    top_k: int | None
    top_p: float

    def n_selected(self, n_cols: int) -> int:
        """How many of a row's elements may have to be found and sorted; as few as make up ``top_p`` may be all."""
        return self.top_k or (n_cols if self.top_p < 1 else 0)


class BackendModule(Protocol):
    """What a module in `fastsoftmax.backends` offers.

    ``READS`` names the 16-bit dtypes that it reads and writes as they are, and computes in float32; ``CONVERTS`` the
    dtypes that its `run_adjusted` and `run_weighted` convert in passing. Others are converted for it. Arrays of states
    are float64 and have a row for each state: see `fastsoftmax._state.pack`.
    """

    READS: frozenset[str]
    CONVERTS: frozenset[str]

    def plan(
        self,
        function: Function,
        layout: Layout,
        in_place: bool,
        adjustment: Adjustment | None = None,
        n_selected: int = 0,
    ) -> Plan: ...

    def run(self, plan: Plan, layout: Layout, x: Array, out: Array, g: Array | None) -> None: ...

    def run_weighted(
        self, plan: Plan, layout: Layout, a: Array, out: Array, b: Array, sign: Array | None, adjustment: Adjustment
    ) -> None: ...

    def run_adjusted(self, plan: Plan, layout: Layout, x: Array, out: Array, adjustment: Adjustment) -> None: ...

    def run_cross_entropy(
        self, plan: Plan, layout: Layout, x: Array, gradient: Array | None, losses: Array, terms: CrossEntropy
    ) -> None: ...

    def run_topk(self, plan: Plan, layout: Layout, x: Array, values: Array, indices: Array) -> None: ...

    def run_sampling(
        self, plan: Plan, layout: Layout, x: Array, uniforms: Array, draws: Array, terms: Truncation
    ) -> None: ...

    def run_states(self, plan: Plan, layout: Layout, x: Array, out: Array | None, states: Array) -> None: ...

    def merge_states(self, states: Array, others: Array, is_single: bool) -> None: ...

    def logsumexp_of_states(self, states: Array, is_single: bool) -> Array: ...


class DirectCalls(Protocol):
    """What the compiled backend offers for the most usual calls: each returns None if the call is not one of them."""

    def direct_softmax(
        self,
        x: object,
        axis: object,
        out: object,
        where: object,
        temperature: object,
        dtype: object,
        backend: object,
    ) -> Array | None: ...

    def direct_log_softmax(
        self,
        x: object,
        axis: object,
        out: object,
        where: object,
        temperature: object,
        dtype: object,
        backend: object,
    ) -> Array | None: ...

    def direct_logsumexp(
        self,
        x: object,
        axis: object,
        out: object,
        where: object,
        temperature: object,
        dtype: object,
        backend: object,
    ) -> Array | None: ...

    def direct_softmax_vjp(self, p: object, g: object, axis: object, out: object, backend: object) -> Array | None: ...

    def direct_log_softmax_vjp(
        self, log_p: object, g: object, axis: object, out: object, backend: object
    ) -> Array | None: ...

    def forget_schedules(self) -> None: ...


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that cannot run here."""


class ForcedTierError(ValueError):
    """``FASTSOFTMAX_ISA`` asks for a tier that is not to be had."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute.

    Parameters
    ----------
    name : str
        The name users force it by.
    module : str
        The module that implements it, imported at first use.
    dtypes : frozenset of dtype, or None
        The dtypes it computes in; None for every inexact dtype.
    min_size : int
        Elements from which the automatic choice considers it.
    is_automatic : bool
        Whether the automatic choice considers it at all.
    """

    name: str
    module: str
    dtypes: frozenset[np.dtype[Any]] | None
    min_size: int = 0
    is_automatic: bool = True

    def computes(self, dtype: np.dtype[Any]) -> bool:
        return self.dtypes is None or dtype in self.dtypes


_FLOAT32 = np.dtype(np.float32)
_KERNEL_DTYPES: frozenset[np.dtype[Any]] = frozenset({_FLOAT32, np.dtype(np.float64)})

# In order of preference. Numba is passed over for small arrays: loading it and its kernels costs about a second, which
# only data that NumPy needs long for can repay.
BACKENDS = (
    Backend("cython", "fastsoftmax.backends.compiled", _KERNEL_DTYPES),
    Backend("numba", "fastsoftmax.backends.numba_cpu", _KERNEL_DTYPES, min_size=65_536),
    # Serves arrays that are on a GPU already. The way there and back takes longer than the other backends need.
    Backend("cuda", "fastsoftmax.backends.numba_cuda", _KERNEL_DTYPES, is_automatic=False),
    Backend("numpy", "fastsoftmax.backends.numpy_generic", None),
)
_by_name = {backend.name: backend for backend in BACKENDS}


class Choices(NamedTuple):
    """What the surroundings of a call decide.

    Parameters
    ----------
    backend : str or None
        The backend they force.
    source : str
        By what they force it.
    plans : list of Plan, or None
        Where they want plans recorded.
    """

    backend: str | None
    source: str
    plans: list[Plan] | None


# The environment is read once: looking it up at every call would cost a small call a tenth of its time.
_from_environment = Choices(os.environ.get("FASTSOFTMAX_BACKEND") or None, "FASTSOFTMAX_BACKEND", None)
choices: ContextVar[Choices] = ContextVar("fastsoftmax_choices", default=_from_environment)

# Functions of the compiled backend that serve the most usual calls without the general way, once it is loaded.
direct_calls: DirectCalls | None = None


@cache
def load(backend: Backend) -> BackendModule | Exception:
    """Import the module of a backend, once; return the exception that says why where it cannot be.

    Compiled dependencies fail to import with more than ImportError: with ValueError where NumPy's binary interface
    differs, with OSError where a shared library is missing. Only a tier that the environment forces is never passed
    over.
    """
    try:
        return cast(BackendModule, import_module(backend.module))
    except ForcedTierError:
        raise
    except Exception as error:
        if backend.name == "cython" and (tier := os.environ.get("FASTSOFTMAX_ISA")):
            raise ForcedTierError(
                f"FASTSOFTMAX_ISA is {tier!r}, but backend 'cython' is not available: {error}"
            ) from None
        return error


def unavailable_reason(backend: Backend) -> str | None:
    """Say why a backend cannot run here; None if it can."""
    try:
        loaded = load(backend)
    except ForcedTierError as error:
        return str(error)
    return str(loaded) if isinstance(loaded, Exception) else None


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can run here, in order of preference.

    Examples
    --------
    >>> import fastsoftmax
    >>> "numpy" in fastsoftmax.available_backends()
    True
    """
    return tuple(backend.name for backend in BACKENDS if unavailable_reason(backend) is None)


def _named(name: object, source: str) -> Backend:
    if not isinstance(name, str) or name not in _by_name:
        names = ", ".join(map(repr, _by_name))
        raise ValueError(f"{source} must be one of {names}, not {name!r}")
    return _by_name[name]


def forced_backend(argument: str | None) -> Backend | None:
    """Return the backend that the argument, the context or the environment asks for; None where the choice is free."""
    if argument is not None:
        return _named(argument, "backend")
    backend, source, _ = choices.get()
    return None if backend is None else _named(backend, source)


def select(dtype: np.dtype[Any], size: int, argument: str | None = None) -> BackendModule:
    """Return the backend that computes ``size`` elements in ``dtype``.

    Raises
    ------
    ValueError
        If a backend is forced by a name that does not exist.
    BackendUnavailableError
        If the forced backend cannot run here.
    TypeError
        If the forced backend does not compute in ``dtype``.
    """
    forced = forced_backend(argument)
    if forced is None:
        for backend in BACKENDS:
            if backend.is_automatic and size >= backend.min_size and backend.computes(dtype):
                loaded = load(backend)
                if not isinstance(loaded, Exception):
                    return loaded
        raise AssertionError("the numpy backend takes every call")
    if not forced.computes(dtype):
        names = ", ".join(repr(backend.name) for backend in BACKENDS if backend.computes(dtype))
        raise TypeError(f"backend {forced.name!r} does not compute in {dtype.name}; these do: {names}")
    loaded = load(forced)
    if isinstance(loaded, Exception):
        names = ", ".join(map(repr, available_backends()))
        raise BackendUnavailableError(f"backend {forced.name!r} is not available: {loaded}; available: {names}")
    return loaded


def select_for(function: str, dtype: np.dtype[Any], size: int, argument: str | None = None) -> BackendModule:
    """`select` for a function that the backend "cuda" does not have.

    Raises
    ------
    TypeError
        Also if that is forced.
    """
    forced = forced_backend(argument)
    if forced is not None and forced.name == "cuda":
        names = ", ".join(repr(backend.name) for backend in BACKENDS if backend is not forced)
        raise TypeError(f"backend 'cuda' does not compute {function}; these do: {names}")
    return select(dtype, size, argument)


# Device types of DLPack.
_CUDA, _CUDA_MANAGED = 2, 13


def is_on_gpu(x: object) -> bool:
    """Whether an object is an array in the memory of a CUDA device."""
    kind = type(x)
    if (is_cuda := getattr(x, "is_cuda", None)) is not None:  # Torch's: a tenth of the time of what follows
        return bool(is_cuda)
    if hasattr(kind, "__dlpack_device__"):
        return x.__dlpack_device__()[0] in (_CUDA, _CUDA_MANAGED)  # type: ignore[attr-defined]
    return hasattr(x, "__cuda_array_interface__")


def select_on_gpu(argument: str | None = None) -> Any:
    """Return the module that computes on arrays in the memory of a CUDA device.

    Raises
    ------
    BackendUnavailableError
        If it cannot run here.
    TypeError
        If another backend is forced.
    """
    forced = forced_backend(argument)
    if forced is not None and forced.name != "cuda":
        raise TypeError(f"backend {forced.name!r} does not compute on arrays on a CUDA device; 'cuda' does")
    loaded = load(_by_name["cuda"])
    return loaded if not isinstance(loaded, Exception) else select(_FLOAT32, 0, "cuda")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for every call inside a ``with`` block, in this thread or task.

    Parameters
    ----------
    name : {"cython", "numba", "numpy", "cuda"}
        The backend. The ``backend`` argument of a call goes before it.

    Raises
    ------
    ValueError
        If there is no such backend.
    BackendUnavailableError
        If it cannot run here.

    Examples
    --------
    >>> import fastsoftmax
    >>> with fastsoftmax.use_backend("numpy"):
    ...     fastsoftmax.softmax([1.0, 1.0])
    array([0.5, 0.5])
    """
    backend = _named(name, "backend")
    select(np.dtype(np.float64), 0, backend.name)
    token = choices.set(choices.get()._replace(backend=name, source="backend"))
    try:
        yield
    finally:
        choices.reset(token)


@contextmanager
def record_plans() -> Iterator[list[Plan]]:
    """Collect the `Plan` of every call inside a ``with`` block, in this thread or task.

    Yields
    ------
    list of Plan
        Grows by one plan for each call that computes anything: the very value the kernels were run with.

    Examples
    --------
    >>> import fastsoftmax
    >>> with fastsoftmax.record_plans() as plans:
    ...     probabilities = fastsoftmax.softmax([1.0, 2.0], backend="numpy")
    >>> plans[0].backend, plans[0].schedule.traversal
    ('numpy', 'array')
    """
    plans: list[Plan] = []
    token = choices.set(choices.get()._replace(plans=plans))
    try:
        yield plans
    finally:
        choices.reset(token)


def execute(
    module: BackendModule,
    function: Function,
    layout: Layout,
    x: Array,
    out: Array,
    in_place: bool = False,
    g: Array | None = None,
) -> None:
    """Plan one call, run it, and tell the recorder, if there is one, what served it.

    A vector-Jacobian product has a gradient ``g``, of the shape and dtype of ``x``.
    """
    plan = module.plan(function, layout, in_place)
    module.run(plan, layout, x, out, g)
    if (plans := choices.get().plans) is not None:
        plans.append(plan)


def execute_adjusted(
    module: BackendModule, function: Function, layout: Layout, x: Array, out: Array, adjustment: Adjustment
) -> None:
    """`execute` for rows with a mask, a temperature, or elements of another dtype than is computed in."""
    plan = module.plan(function, layout, out is x, adjustment)
    module.run_adjusted(plan, layout, x, out, adjustment)
    if (plans := choices.get().plans) is not None:
        plans.append(plan)


def execute_weighted(
    module: BackendModule, layout: Layout, a: Array, out: Array, b: Array, sign: Array | None, adjustment: Adjustment
) -> None:
    """`execute` for a logsumexp with the factors ``b``, of the shape of ``a``; quotients by a temperature are rounded.

    Signs of sums go to ``sign``, with the dtype and the strides of the output. Where it is None, the logarithm of a
    negative sum is NaN.
    """
    plan = module.plan("weighted_logsumexp", layout, False)
    module.run_weighted(plan, layout, a, out, b, sign, adjustment)
    _record(plan)


def execute_cross_entropy(
    module: BackendModule, layout: Layout, x: Array, gradient: Array | None, losses: Array, terms: CrossEntropy
) -> None:
    """`execute` for a cross-entropy, which has more operands."""
    is_dense = terms.labels is None or terms.softcap > 0
    plan = module.plan("dense_cross_entropy" if is_dense else "softmax_cross_entropy", layout, gradient is x)
    module.run_cross_entropy(plan, layout, x, gradient, losses, terms)
    if (plans := choices.get().plans) is not None:
        plans.append(plan)


def _record(plan: Plan) -> None:
    if (plans := choices.get().plans) is not None:
        plans.append(plan)


def execute_states(
    module: BackendModule,
    function: Function,
    layout: Layout,
    x: Array,
    out: Array | None,
    states: Array,
    in_place: bool = False,
) -> None:
    """`execute` for a function with one state for each row, which "fold_states" changes."""
    plan = module.plan(function, layout, in_place)
    module.run_states(plan, layout, x, out, states)
    _record(plan)


def execute_topk(module: BackendModule, layout: Layout, x: Array, values: Array, indices: Array) -> None:
    """`execute` for the largest probabilities and their indices: k columns, and a row for each of the input."""
    plan = module.plan("softmax_topk", layout, False, None, values.shape[1])
    module.run_topk(plan, layout, x, values, indices)
    _record(plan)


def execute_sampling(
    module: BackendModule, layout: Layout, x: Array, uniforms: Array, draws: Array, terms: Truncation
) -> None:
    """`execute` for random draws: one for each uniform number, which may be overwritten; -1 where nothing can be drawn.

    Both arrays are contiguous and have a row for each of the input.
    """
    plan = module.plan("sample", layout, False, None, terms.n_selected(layout.n_cols))
    module.run_sampling(plan, layout, x, uniforms, draws, terms)
    _record(plan)
