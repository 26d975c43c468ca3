"""Kernels of the CUDA backend as machine code, without a device: Numba's compiler to PTX, and ptxas.

``python -m tests.ptx float32`` prints what becomes of the kernels for this dtype on every architecture, as JSON. What
Numba makes of a kernel is the same for all of them: it is compiled once, turned into PTX, and assembled for each. That
takes ten minutes of a core for all dtypes, so that without ``--all`` it is a quarter of the kernels.
"""

import gc
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, files
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from numba.cuda import compiler
from numpy.lib.stride_tricks import as_strided

from fastsoftmax._layout import make_layout
from fastsoftmax.cuda import _launch
from fastsoftmax.cuda._functions import n_inputs
from fastsoftmax.cuda._plan import Device, choose
from fastsoftmax.cuda._vectors import FORMATS

ARCHITECTURES = (80, 90, 100)

# NVVM has an older compiler for what came before Blackwell, whose PTX is the same but for the name of the target.
SAME_PTX = {80: (80, 90), 100: (100,)}

H200 = Device(n_multiprocessors=132, l2_bytes=60 * 2**20, shared_bytes=227 * 1024)

# Shapes, and strides in elements where they are not those of C order: one of each kernel that a plan can ask for, with
# the most registers. Where a kernel reads two arrays, rows are half as long.
SHAPES = {
    "rows of a lane": ((100_000, 10), None),
    "rows of a warp": ((8192, 500), None),
    "rows of a block": ((8192, 2000), None),
    "rows of 512 threads": ((8192, 16384), None),
    "long rows": ((8192, 65536), None),
    "rows elsewhere": ((4096, 3000), (6008, 2)),
    "long rows elsewhere": ((4096, 30000), (60008, 2)),
    "rows split": ((1, 10_000_000), None),
    "strips": ((4096, 4096), None),
    "narrow strips": ((4096, 5), None),
    "strips split": ((1_000_000, 8), None),
}
FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "softmax_vjp", "log_softmax_vjp", "logsumexp_vjp")
INSTRUCTIONS = (
    "ld.global.v4", "ld.global.v2", "st.global.v4", "st.global.v2", "ld.local", "st.local", "cp.async.cg",
    "ld.shared.v4", "ld.shared.v2", "ex2.approx.ftz.f32",
)  # fmt: skip


def find_ptxas():
    """Return the ptxas that was installed with the compiler to PTX, else the system's; None if there is neither."""
    try:
        for file in files("nvidia-cuda-nvcc") or ():
            if file.name == "ptxas":
                return str(file.locate())
    except PackageNotFoundError:
        pass
    return shutil.which("ptxas")


def laid_out(shape, axis, itemsize, function="softmax", strides=None):
    """Return the layout of arrays that take no memory, and the phases of aligned ones; strides are in elements."""
    axis %= len(shape)
    x_strides = tuple(stride * itemsize for stride in strides) if strides else _c_strides(shape, itemsize)
    x = as_strided(np.zeros(1, f"u{itemsize}"), shape, x_strides)
    reduced = [1 if number == axis else size for number, size in enumerate(shape)]
    y_shape = reduced if function == "logsumexp" else shape
    y = as_strided(x, y_shape, _c_strides(y_shape, itemsize))
    g = None
    if function.endswith("_vjp"):
        g = as_strided(x, shape, _c_strides(shape, itemsize))
    if function == "logsumexp_vjp":
        g = np.broadcast_to(as_strided(x, reduced, _c_strides(reduced, itemsize)), shape)
    n_arrays = {"logsumexp": 1, "softmax_vjp": 3, "log_softmax_vjp": 3}.get(function, 2)
    return make_layout(x, (axis,), y, g), (0,) * n_arrays


def _c_strides(shape, itemsize):
    return tuple(itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


def launches(name, function, dtype):
    """Return the plan for one of the shapes, and its launches."""
    shape, strides = SHAPES[name]
    if "rows" in name:
        shape = shape[0], shape[1] // n_inputs(function)
    format = FORMATS[dtype]
    layout, phases = laid_out(shape, 0 if "strips" in name else 1, format.itemsize, function, strides)
    plan = choose(layout, phases, H200, n_inputs(function))
    return plan, _launch.launches(function, format, layout, plan, 0)


def compiled(launch):
    """Return a kernel as a library that gives its PTX for any architecture."""
    # The functions it calls ask for the current device's architecture; what Numba makes of them does not depend on it.
    device = SimpleNamespace(compute_capability=divmod(ARCHITECTURES[0], 10))
    options = dict.fromkeys(("debug", "lineinfo", "fastmath", "forceinline", "lto"), False)
    options |= {"opt": True, "device": False, "abi": "numba", "abi_info": None, "cc": device.compute_capability}
    options["launch_bounds"] = _launch.launch_bounds(launch)
    with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        library, _ = compiler._compile_pyfunc_with_fixup(launch.make(), launch.signature, **options)
    library._llvm_strs = list(dict.fromkeys(library.llvm_strs))  # one for each caller: NVVM drops the others again
    return library


def texts(library):
    """Return the PTX of a kernel for each architecture."""
    found = {}
    for compiled_for, architectures in SAME_PTX.items():
        text = library.get_asm_str(cc=divmod(compiled_for, 10))
        for architecture in architectures:
            found[architecture] = text.replace(f".target sm_{compiled_for}", f".target sm_{architecture}")
    return found


def assemble(text, architecture, directory):
    """Assemble PTX; return registers, bytes of stack, of spilling and of shared memory, and instructions of the PTX."""
    source = Path(directory, "kernel.ptx")
    source.write_text(text)
    command = [find_ptxas(), "-v", "-arch", f"sm_{architecture}", source, "-o", source.with_suffix(".cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", said
    ).groups()
    shared, alignment = re.search(r"(\d+) bytes smem", said), re.search(r"\.extern \.shared \.align (\d+)", text)
    return {
        "architecture": architecture,
        "parameters": len(re.findall(r"^\s*\.param ", text.partition(".visible .entry")[2].partition("{")[0], re.M)),
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "stack": int(stack),
        "spilled": int(stores) + int(loads),
        "shared": int(shared[1]) if shared else 0,
        "stored_alignment": int(alignment[1]) if alignment else 0,
        **{instruction: text.count(instruction) for instruction in INSTRUCTIONS},
    }


def chosen(dtype, of_all):
    """Return pairs of a shape and a function: all, or a quarter, so that each pair comes in one of the dtypes."""
    pairs, part = product(enumerate(SHAPES), enumerate(FUNCTIONS)), list(FORMATS).index(dtype)
    return [(name, function) for (i, name), (j, function) in pairs if of_all or (i + j) % len(FORMATS) == part]


def report(dtype, of_all):
    """Assemble the kernels for shapes and functions in a dtype, once for each architecture."""
    found, seen = [], set()
    with tempfile.TemporaryDirectory() as directory:
        for name, function in chosen(dtype, of_all):
            plan, steps = launches(name, function, dtype)
            for step in steps:
                if step.make() in seen:  # chunks have the same states for several functions
                    continue
                seen.add(step.make())
                head = {"name": name, "function": function, "dtype": dtype, "kernel": step.make().__name__}
                head |= {"vector": plan.vector, "held": plan.held, "threads": step.block[0] * step.block[1]}
                head |= {"inputs": n_inputs(function), "shared_bytes": step.shared_bytes}
                head["arguments"] = sum(len(one) if isinstance(one, tuple) else 1 for one in step.arguments)
                for architecture, text in texts(compiled(step)).items():
                    found.append(head | assemble(text, architecture, directory))
    return found


if __name__ == "__main__":
    gc.set_threshold(200_000, 20, 100)  # what Numba makes stays: looking through it again takes a tenth longer
    json.dump(report(sys.argv[1], "--all" in sys.argv), sys.stdout, indent=1)
