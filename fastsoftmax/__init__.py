"""Fast and accurate softmax, log_softmax and logsumexp for NumPy arrays.

The functions are drop-ins for those of `scipy.special`, computed by single-pass online kernels in Cython or Numba.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastsoftmax._api import log_softmax, logsumexp, softmax
from fastsoftmax._dispatch import BackendUnavailableError, Plan, available_backends, record_plans, use_backend
from fastsoftmax._outputs import limit_output_cache
from fastsoftmax._schedule import Schedule

if TYPE_CHECKING:
    from fastsoftmax._cross_entropy import softmax_cross_entropy
    from fastsoftmax._derivatives import log_softmax_vjp, logsumexp_vjp, softmax_jacobian, softmax_vjp
    from fastsoftmax._sampling import sample
    from fastsoftmax._selection import TopK, softmax_topk
    from fastsoftmax._streaming import OnlineSoftmax, merge_states
    from fastsoftmax._variants import softmax_one, softmin

__all__ = [
    "BackendUnavailableError",
    "OnlineSoftmax",
    "Plan",
    "Schedule",
    "TopK",
    "available_backends",
    "limit_output_cache",
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "logsumexp_vjp",
    "merge_states",
    "record_plans",
    "sample",
    "softmax",
    "softmax_cross_entropy",
    "softmax_jacobian",
    "softmax_one",
    "softmax_topk",
    "softmax_vjp",
    "softmin",
    "use_backend",
]

if "threadpoolctl" in sys.modules:  # else when the compiled backend is loaded: importing it takes a few milliseconds
    from fastsoftmax._threadpool import register

    register()
    del register


# Modules of their own, which are loaded when a name of theirs is first used: they take as long as all others together.
_MODULES = {
    "OnlineSoftmax": "_streaming",
    "TopK": "_selection",
    "log_softmax_vjp": "_derivatives",
    "logsumexp_vjp": "_derivatives",
    "merge_states": "_streaming",
    "sample": "_sampling",
    "softmax_cross_entropy": "_cross_entropy",
    "softmax_jacobian": "_derivatives",
    "softmax_one": "_variants",
    "softmax_topk": "_selection",
    "softmax_vjp": "_derivatives",
    "softmin": "_variants",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"fastsoftmax.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":  # looked up when asked for: importlib.metadata would double the import time
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fastsoftmax")
        except PackageNotFoundError:
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
