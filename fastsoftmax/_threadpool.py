"""What threadpoolctl knows this package's threads by, so that ``threadpool_limits`` holds for them too."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from fastsoftmax import _dispatch, _schedule


@cache
def register() -> None:
    """Tell threadpoolctl of the pool, if there are both."""
    try:
        import threadpoolctl

        import_module("fastsoftmax._threads")  # threadpoolctl looks among the libraries that are loaded
    except ImportError:
        return

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]
        """The pool of src_cython/threads.h, limited where its users look for their number of threads."""

        user_api = internal_api = "fastsoftmax"
        filename_prefixes = ("_threads",)
        check_symbols = ("fastsoftmax_run_on_threads",)

        def get_num_threads(self) -> int:
            return _schedule.max_threads()

        def set_num_threads(self, num_threads: int) -> None:
            _schedule.limit_threads(num_threads)
            if _dispatch.direct_calls is not None:
                _dispatch.direct_calls.forget_schedules()

        def get_version(self) -> None:
            return None

    threadpoolctl.register(Controller)
