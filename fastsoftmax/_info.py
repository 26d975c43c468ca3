"""What this installation can do, and why not the rest: ``python -m fastsoftmax info``.

Everything is asked of the system when the command runs; nothing here is imported by the package itself.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import fastsoftmax
from fastsoftmax import _dispatch, _schedule

Line = tuple[str, str]


def versions() -> dict[str, str | None]:
    """Return the version of each package a result may depend on; None where it is not installed."""
    found: dict[str, str | None] = {"fastsoftmax": fastsoftmax.__version__, "python": platform.python_version()}
    for name in ("numpy", "numba", "numba-cuda", "scipy", "torch", "onnxruntime", "jax", "ml_dtypes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Return what a figure measured here must be read with."""
    caches = _schedule.cache_sizes()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "private_cache_bytes": caches.private,
        "last_level_cache_bytes": caches.last_level,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def report() -> str:
    """Return the text that the command prints."""
    sections = {
        "versions": [(name, text or "not installed") for name, text in versions().items()],
        "machine": list(_machine_lines()),
        "backends": list(_backend_lines()),
        "choices": list(_choice_lines()),
    }
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in lines)]) for title, lines in sections.items()
    )


def _machine_lines() -> Iterator[Line]:
    facts = machine()
    yield "platform", facts["platform"]
    yield "CPU", facts["cpu"]
    yield "cores", f"{facts['cores']}, of which this process may use {facts['usable_cores']}"
    private, last_level = facts["private_cache_bytes"] // 1024, facts["last_level_cache_bytes"] // 1024
    yield "caches", f"{private} KiB private to a core, {last_level} KiB last level"


def _backend_lines() -> Iterator[Line]:
    for backend in _dispatch.BACKENDS:
        reason = _dispatch.unavailable_reason(backend)
        yield backend.name, "available" if reason is None else f"not available: {reason}"
        if reason is None and backend.name == "cython":
            yield from _tier_lines()
        if reason is None and backend.name == "cuda":
            yield "device", _device()


def _tier_lines() -> Iterator[Line]:
    from fastsoftmax.backends import compiled

    yield "tiers", f"{', '.join(compiled.tiers())} run here; in use: {compiled.active_tier()}"


def _device() -> str:
    from numba import cuda

    device = cuda.get_current_device()
    name = device.name if isinstance(device.name, str) else device.name.decode()
    return f"{name}, compute capability {'.'.join(map(str, device.compute_capability))}"


def _choice_lines() -> Iterator[Line]:
    forced = sorted(name for name in os.environ if name.startswith("FASTSOFTMAX_"))
    for name in forced:
        yield name, os.environ[name]
    if not forced:
        yield "environment", "no FASTSOFTMAX_* variable is set"
    try:
        yield "threads", str(_schedule.max_threads())
    except ValueError as error:
        yield "threads", f"error: {error}"
    for size in (1_000, 1_000_000):
        try:
            module = _dispatch.select(np.dtype(np.float32), size)
        except (ValueError, fastsoftmax.BackendUnavailableError) as error:
            yield f"{size:,} floats", f"error: {error}"
        else:
            names = {_dispatch.load(backend): backend.name for backend in _dispatch.BACKENDS}
            yield f"{size:,} floats", f"go to {names[module]}"
