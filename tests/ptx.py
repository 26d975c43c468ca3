"""Kernels of the CUDA backend as machine code, without a device: Numba's compiler to PTX, and ptxas.

``python -m tests.ptx 90`` prints what becomes of each kernel for sm_90, as JSON. Each architecture takes a process of
its own: Numba keeps device functions as it compiled them for the first.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from numba import cuda
from numpy.lib.stride_tricks import as_strided

from fastsoftmax._layout import make_layout
from fastsoftmax.cuda import _launch
from fastsoftmax.cuda._plan import Device, choose
from fastsoftmax.cuda._vectors import FORMATS

H200 = Device(n_multiprocessors=132, threads_per_multiprocessor=2048, l2_bytes=60 * 2**20)

# Shapes, and strides in elements where they are not those of C order: one of each kernel that a plan can ask for, with
# the most registers.
SHAPES = {
    "rows of a lane": ((100_000, 10), None),
    "rows of a warp": ((8192, 500), None),
    "rows of a block": ((8192, 2000), None),
    "rows of 512 threads": ((8192, 16384), None),
    "rows with a rest": ((8192, 65536), None),
    "rows elsewhere": ((64, 3000), (6008, 2)),
    "rows split": ((1, 10_000_000), None),
    "strips": ((4096, 4096), None),
    "narrow strips": ((4096, 5), None),
}
FUNCTIONS = ("softmax", "log_softmax", "logsumexp")
INSTRUCTIONS = ("ld.global.v4", "ld.global.v2", "st.global.v4", "st.global.v2", "ld.local", "ex2.approx.ftz.f32")


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
    if function == "logsumexp":
        shape = [1 if number == axis else size for number, size in enumerate(shape)]
    y = as_strided(x, shape, _c_strides(shape, itemsize))
    return make_layout(x, (axis,), y), (0,) if function == "logsumexp" else (0, 0)


def _c_strides(shape, itemsize):
    return tuple(itemsize * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def launches(name, function, dtype):
    """Return the plan for one of the shapes, and its launches."""
    shape, strides = SHAPES[name]
    format = FORMATS[dtype]
    layout, phases = laid_out(shape, 0 if "strips" in name else 1, format.itemsize, function, strides)
    plan = choose(layout, phases, H200)
    return plan, _launch.launches(function, format, layout, plan, 0)


def assemble(launch, architecture, directory):
    """Compile a kernel; return its registers, bytes of stack and of spilling, and the instructions in its PTX."""
    capability = divmod(architecture, 10)
    device = SimpleNamespace(compute_capability=capability)
    options = {"device": False, "abi": "numba", "cc": capability, "launch_bounds": _launch.launch_bounds(launch)}
    with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        text, _ = cuda.compile(launch.make(), launch.signature, **options)
    source = Path(directory, "kernel.ptx")
    source.write_text(text)
    command = [find_ptxas(), "-v", "-arch", f"sm_{architecture}", source, "-o", source.with_suffix(".cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", said
    ).groups()
    return {
        "kernel": launch.make().__name__,
        "parameters": len(re.findall(r"^\s*\.param ", text.partition(".visible .entry")[2].partition("{")[0], re.M)),
        "arguments": sum(len(one) if isinstance(one, tuple) else 1 for one in launch.arguments),
        "threads": launch.block[0] * launch.block[1],
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "stack": int(stack),
        "spilled": int(stores) + int(loads),
        **{instruction: text.count(instruction) for instruction in INSTRUCTIONS},
    }


def report(architecture):
    """Assemble every kernel of softmax, and the largest ones of the other functions.

    Of those for float16 one stands for all: they differ from those for bfloat16 in how elements are converted.
    """
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for dtype in FORMATS:
            for name in SHAPES if dtype != "float16" else ("rows of 512 threads",):
                for function in FUNCTIONS if name in ("rows of 512 threads", "strips") else FUNCTIONS[:1]:
                    plan, steps = launches(name, function, dtype)
                    head = {
                        "name": name,
                        "function": function,
                        "dtype": dtype,
                        "vector": plan.vector,
                        "held": plan.held,
                    }
                    found += [head | assemble(step, architecture, directory) for step in steps]
    return found


if __name__ == "__main__":
    json.dump(report(int(sys.argv[1])), sys.stdout, indent=1)
