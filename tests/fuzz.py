"""Calls that Hypothesis thinks of: arrays of any shape, strides, dtype and alignment, arguments right and wrong.

Their law: a call raises an exception of the documented kinds and leaves every byte as it was, or it writes to the
elements of its ``out`` alone, and returns what it returns for plain copies of its arguments: the same bits, and near
those of the NumPy backend.

``python -m tests.fuzz --seconds 600`` goes on until the time is over; with ``--atheris``, if that is installed, the
branches that calls reach in the Python code guide what comes next.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsoftmax

from .inputs import ALL_VALUES, values

FLOATS = ["float16", "bfloat16", "float32", "float64"]
REALS = [*FLOATS, "longdouble", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
OTHERS = ["complex64", "complex128", "object", "U3", "S3", "M8[s]", "m8[s]", "V4"]
DOCUMENTED = (TypeError, ValueError, fastsoftmax.BackendUnavailableError)  # AxisError is a ValueError


@dataclass
class Call:
    """A function's name and its arguments, and the memory that the arrays among them lie in."""

    function: str
    arguments: dict[str, Any]
    rooms: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def run(self, **changes):
        arguments = self.arguments | changes
        if "seed" in arguments:
            arguments["rng"] = np.random.default_rng(arguments.pop("seed"))
        if self.function == "OnlineSoftmax":
            axis, x, out, backend = (arguments.get(name) for name in ("axis", "x", "out", "backend"))
            return fastsoftmax.OnlineSoftmax(axis, backend=backend).update(x).normalize(x, out=out)
        return getattr(fastsoftmax, self.function)(**arguments)


def check(call):
    """Hold a call to the law."""
    before = {name: room.copy() for name, room in call.rooms.items()}
    out_name = "grad_out" if "grad_out" in call.arguments else "out"
    out = call.arguments.get(out_name)
    try:
        result = call.run()
    except DOCUMENTED as error:
        assert str(error)
        for name, room in call.rooms.items():
            np.testing.assert_array_equal(room, before[name], err_msg=f"{name} after {error!r}")
        return
    if isinstance(out, np.ndarray):
        assert (result[-1] if isinstance(result, tuple) else result) is out
    assert_written_alone(call, before, out)
    # What is left of the input, where `out` was written over it, is not what the function was given.
    restored = {
        name: as_in(call.arguments[name], call.rooms[name], before[name]) for name in call.rooms if name != out_name
    }
    plain = {name: np.array(x, native(x.dtype), order="C") for name, x in restored.items()}
    changes = plain if out is None else {**plain, out_name: None}
    assert_same(result, call.run(**changes), call)
    if is_tame(plain):
        assert_near(result, call.run(**changes, backend="numpy"), plain, call)


def native(dtype):
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def as_in(view, room, other):
    """Return the same view of other memory."""
    offset = view.__array_interface__["data"][0] - room.ctypes.data if view.size else 0
    return np.ndarray(view.shape, view.dtype, other, offset, view.strides)


def assert_written_alone(call, before, out):
    for name, room in call.rooms.items():
        is_kept = np.ones(room.shape, bool)
        if isinstance(out, np.ndarray) and out.size and np.may_share_memory(room, out):
            element = as_in(out.view(f"V{out.itemsize}"), room, is_kept.view(np.uint8))
            element[...] = np.zeros((), element.dtype)
        np.testing.assert_array_equal(room[is_kept], before[name][is_kept], err_msg=name)


def parts_of(result):
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


def assert_same(result, expected, call):
    for part, wanted in zip(parts_of(result), parts_of(expected), strict=True):
        assert native(part.dtype) == wanted.dtype
        assert part.shape == wanted.shape
        if has_same_bits(call, wanted.dtype):
            # NumPy does not take a NaN of bfloat16 for one.
            exact = np.float32 if wanted.dtype == ml_dtypes.bfloat16 else wanted.dtype
            np.testing.assert_array_equal(part.astype(exact), wanted.astype(exact))


def has_same_bits(call, dtype):
    """Whether a result does not depend on the memory layout of the arguments.

    Elements along several axes are summed up in the order in which they lie in memory. Sums of NumPy (of long double,
    complex and weighted numbers, among others) and those of the derivatives depend on the layout in their last bits.
    """
    is_one_row = call.arguments["axis"] is None or isinstance(call.arguments["axis"], tuple)
    is_derivative = call.function.endswith("_vjp") or call.function == "softmax_cross_entropy"
    return not (is_one_row or is_derivative or dtype.char in "gFDG" or call.arguments.get("b") is not None)


def is_tame(arguments):
    """Whether the functions are well conditioned: the bounds of the others are in the tests of their accuracy."""
    return all(np.isfinite(x := np.asarray(a, complex)).all() and (abs(x) < 100).all() for a in arguments.values())


def assert_near(result, expected, arguments, call):
    if call.function == "sample" or call.arguments.get("b") is not None:
        return
    scale = max([1.0, *(float(abs(np.asarray(x, complex)).max()) for x in arguments.values() if x.size)])
    for part, wanted in zip(parts_of(result), parts_of(expected), strict=True):
        if part.dtype.kind in "biu":
            continue  # indices of equal logits and signs have tests of their own
        eps = float(ml_dtypes.finfo(wanted.dtype).eps)
        wide = complex if wanted.dtype.kind == "c" else np.longdouble
        np.testing.assert_allclose(
            part.astype(wide), wanted.astype(wide), rtol=64 * eps, atol=64 * eps * scale**2, equal_nan=True
        )


# What calls are made of

KINDS = tuple(sorted(ALL_VALUES))


@st.composite
def views(draw, shape, dtype, kinds=KINDS):
    """A view of memory of its own, of any strides; the two of them, with values of one of the kinds in it."""
    dtype = np.dtype(dtype)
    if dtype.kind not in "biufc" and dtype != ml_dtypes.bfloat16:
        return np.zeros(shape, dtype), None
    if draw(st.integers(0, 9)) == 9 and dtype != ml_dtypes.bfloat16:  # which has one byte order
        dtype = dtype.newbyteorder()
    strides, extent = [0] * len(shape), dtype.itemsize
    for axis in draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else reversed(range(len(shape))):
        step = draw(st.sampled_from([1] * 12 + [2, 3, -1, -1, -2, 0]))
        gap = draw(st.sampled_from([0] * 12 + [1, dtype.itemsize, 64, -dtype.itemsize]))
        strides[axis] = step * extent + gap
        extent = max(extent, abs(strides[axis]) * max(shape[axis], 1))
    reach = [stride * max(size - 1, 0) for stride, size in zip(strides, shape, strict=True)]
    before = draw(st.sampled_from([0, 0, 0, dtype.itemsize, 1, 16, 64]))
    after = draw(st.sampled_from([0, 0, 0, 1, 64]))  # with none, whatever reads beyond the last element leaves the room
    lowest = -sum(min(r, 0) for r in reach) + before
    room = np.zeros(lowest + sum(max(r, 0) for r in reach) + dtype.itemsize + after, np.uint8)
    view = np.ndarray(shape, dtype, room, lowest, strides)
    if view.size:
        narrow = np.float32 if dtype.itemsize <= 4 else np.float64
        contents = values(draw(st.sampled_from(kinds)), shape, narrow, draw(st.integers(0, 2**32 - 1)))
        with np.errstate(all="ignore"):
            view[...] = contents.astype(dtype)
    if draw(st.integers(0, 19)) == 19:
        view.flags.writeable = False
    return view, room


SIZES = st.one_of(st.integers(0, 5), st.integers(1, 40), st.integers(1, 700))
SHAPES = st.lists(SIZES, max_size=4).map(tuple).filter(lambda shape: np.prod(shape, dtype=float) <= 20_000)


def dtypes(usual):
    return st.one_of(st.sampled_from(usual), st.sampled_from(usual), st.sampled_from(REALS + OTHERS))


def axes(ndim, one):
    """Axes: right ones more often than not; if not `one`, several or none of them too."""
    right = [st.integers(-ndim, ndim - 1)] * 6 if ndim else []
    wrong = [st.integers(-9, 9), st.sampled_from([1.0, "0", True, 2**70])]
    several = [st.none(), st.lists(st.integers(-ndim - 1, ndim), max_size=3).map(tuple)] * 2
    return st.one_of(*right, *([] if one else several), st.one_of(*wrong) if ndim else st.sampled_from([0, -1, 1]))


@st.composite
def outs(draw, x, room, shape, dtype):
    """Something for ``out``, and its memory: of the right shape and dtype, in the input's memory too, or not."""
    kind = draw(st.integers(0, 9))
    if kind == 0 and x.shape == shape:
        return x, None
    if kind == 1 and room is not None and x.shape == shape and x.size and x.flags.writeable:
        offset = draw(st.integers(0, min(room.size, 70)))
        needed = sum((n - 1) * abs(stride) for n, stride in zip(shape, x.strides, strict=True)) + x.itemsize
        lowest = -sum(min((n - 1) * stride, 0) for n, stride in zip(shape, x.strides, strict=True))
        return np.ndarray(shape, x.dtype, room, lowest + min(offset, room.size - needed), x.strides), None
    if kind == 2:
        return draw(st.sampled_from([1, [0.0], "out", np.float64(1)])), None
    if kind == 3:
        shape = draw(SHAPES)
    if kind == 4:
        dtype = draw(st.sampled_from(REALS + OTHERS))
    return draw(views(shape, dtype))


def reduced(x, axis, keepdims=False):
    try:
        return np.broadcast_to(0, x.shape).sum(axis, keepdims=keepdims).shape
    except Exception:
        return x.shape


def numbers(*right):
    """One of some right numbers, or of those that are wrong in many places."""
    return st.one_of(
        *[st.sampled_from(right)] * 4, st.sampled_from([0, -1, -0.5, np.nan, np.inf, "1", 10**6, 1e-320, []])
    )


@st.composite
def calls(draw):
    """A call of one of the functions, with what it may be given."""
    function = draw(st.sampled_from(sorted(MAKERS)))
    call = Call(function, {})
    x, room = draw(views(draw(SHAPES), draw(dtypes(FLOATS))))

    def add(name, value_and_room):
        value, memory = value_and_room
        call.arguments[name] = value
        if memory is not None:
            call.rooms[name] = memory

    MAKERS[function](draw, call.arguments, add, x, room)
    if draw(st.integers(0, 19)) == 19:
        call.arguments["backend"] = draw(st.sampled_from(["numpy", "numba", "cython", "cuda", "none", 1]))
    return call


def make_map(draw, arguments, add, x, room):
    add("x", (x, room))
    arguments["axis"] = draw(axes(x.ndim, one=False))
    if draw(st.booleans()):
        add("out", draw(outs(x, room, x.shape, x.dtype)))


def make_adjusted_map(draw, arguments, add, x, room):
    make_map(draw, arguments, add, x, room)
    make_adjustments(draw, arguments, add, x)


def make_adjustments(draw, arguments, add, x):
    if draw(st.integers(0, 3)) == 3:
        shape = draw(st.sampled_from([(2,), *(x.shape[cut:] for cut in range(x.ndim + 1))]))
        dtype = draw(st.sampled_from(["bool"] * 7 + ["uint8"]))
        add("where", draw(views(shape, dtype, ("ties",))))
    if draw(st.integers(0, 3)) == 3:
        arguments["temperature"] = draw(numbers(1, 0.7, 3.0, 1e-3, 1e3))
    if draw(st.integers(0, 3)) == 3:
        arguments["dtype"] = draw(st.sampled_from([*FLOATS, "longdouble", "complex64", "int32", "object", 3]))


def make_logsumexp(draw, arguments, add, x, room):
    add("a", (x, room))
    arguments["axis"] = draw(axes(x.ndim, one=False))
    arguments["keepdims"] = draw(st.booleans())
    if draw(st.integers(0, 3)) == 3:
        add("b", draw(views(draw(st.sampled_from([x.shape, x.shape[1:], (2,)])), draw(dtypes(FLOATS)))))
        arguments["return_sign"] = draw(st.booleans())
    elif draw(st.booleans()):
        add("out", draw(outs(x, room, reduced(x, arguments["axis"], arguments["keepdims"]), x.dtype)))
    make_adjustments(draw, arguments, add, x)


def make_map_vjp(name):
    def make(draw, arguments, add, x, room):
        add(name, (x, room))
        same = draw(st.integers(0, 9)) < 9
        add("g", draw(views(x.shape if same else draw(SHAPES), x.dtype if same else draw(dtypes(FLOATS)))))
        arguments["axis"] = draw(axes(x.ndim, one=False))
        if draw(st.booleans()):
            add("out", draw(outs(x, room, x.shape, x.dtype)))

    return make


def make_logsumexp_vjp(draw, arguments, add, x, room):
    add("a", (x, room))
    arguments["axis"] = draw(axes(x.ndim, one=False))
    arguments["keepdims"] = draw(st.booleans())
    add("g", draw(views(reduced(x, arguments["axis"], arguments["keepdims"]), x.dtype)))
    if draw(st.booleans()):
        add("out", draw(outs(x, room, x.shape, x.dtype)))


def make_topk(draw, arguments, add, x, room):
    add("x", (x, room))
    arguments["axis"] = draw(axes(x.ndim, one=True))
    arguments["k"] = draw(numbers(1, 1, 2, 5, 30))


def make_sample(draw, arguments, add, x, room):
    add("logits", (x, room))
    arguments["axis"] = draw(axes(x.ndim, one=True))
    arguments["seed"] = draw(st.integers(0, 9))
    for name, right in {"temperature": (1, 0.5, 2.0), "top_k": (1, 3, 10), "top_p": (0.5, 0.9, 1.0)}.items():
        if draw(st.integers(0, 3)) == 3:
            arguments[name] = draw(numbers(*right))
    if draw(st.integers(0, 3)) == 3:
        rows = reduced(x, arguments["axis"])
        arguments["size"] = draw(st.sampled_from([rows, (3, *rows), 3, (0,), -1, "2"]))


def make_cross_entropy(draw, arguments, add, x, room):
    axis = draw(axes(x.ndim, one=True))
    rows = reduced(x, axis)
    n = x.shape[axis] if isinstance(axis, int) and -x.ndim <= axis < x.ndim else 1
    add("logits", (x, room))
    arguments["axis"] = axis
    if draw(st.integers(0, 3)) == 3:
        add("targets", draw(views(x.shape, draw(st.sampled_from(FLOATS)), ("constant", "uniform"))))
    else:
        slack = draw(st.sampled_from([0] * 9 + [1]))  # a label too many
        labels = np.random.default_rng(draw(st.integers(0, 99))).integers(-slack, max(n, 1) + slack, rows)
        targets, memory = draw(views(rows, draw(st.sampled_from(["int64", "int32", "uint8", "int16"]))))
        if targets.flags.writeable:
            targets[...] = labels.astype(targets.dtype)
        add("targets", (targets, memory))
        if draw(st.integers(0, 3)) == 3:
            arguments["ignore_index"] = draw(numbers(0, -1, -100))
    if draw(st.integers(0, 3)) == 3:
        add("weight", draw(views((n,), draw(st.sampled_from(FLOATS)), ("constant", "uniform", "normal"))))
    for name, right in {"label_smoothing": (0.1, 1.0), "z_loss": (1e-4,), "softcap": (30.0,)}.items():
        if draw(st.integers(0, 3)) == 3:
            arguments[name] = draw(numbers(*right))
    arguments["reduction"] = draw(st.sampled_from(["mean", "sum", "none", "max"]))
    if draw(st.booleans()):
        arguments["return_grad"] = True
        if draw(st.booleans()):
            add("grad_out", draw(outs(x, room, x.shape, x.dtype)))


MAKERS = {
    "softmax": make_adjusted_map,
    "log_softmax": make_adjusted_map,
    "logsumexp": make_logsumexp,
    "softmin": make_map,
    "softmax_one": make_map,
    "OnlineSoftmax": make_map,
    "softmax_vjp": make_map_vjp("p"),
    "log_softmax_vjp": make_map_vjp("log_p"),
    "logsumexp_vjp": make_logsumexp_vjp,
    "softmax_topk": make_topk,
    "sample": make_sample,
    "softmax_cross_entropy": make_cross_entropy,
}


# Without end


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (%(default)s)")
    parser.add_argument("--backend", action="append", help="one of the backends; may be repeated (all that are there)")
    parser.add_argument("--atheris", action="store_true", help="let the coverage of the Python code guide it")
    options = parser.parse_args()
    # Numba does not compile what atheris has instrumented.
    left_out = {"cuda", "numba"} if options.atheris else {"cuda"}
    backends = options.backend or [name for name in fastsoftmax.available_backends() if name not in left_out]
    end, n_calls = time.monotonic() + options.seconds, 0

    def run(call):
        nonlocal n_calls
        if call.arguments.get("backend") in left_out:
            return
        for backend in backends:
            with np.errstate(all="ignore"), fastsoftmax.use_backend(backend):
                check(call)
            n_calls += 1

    fuzz = settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(calls())(run)
    )
    if options.atheris:
        import atheris

        atheris.instrument_all()
        atheris.Setup([sys.argv[0], f"-max_total_time={int(options.seconds)}"], fuzz.hypothesis.fuzz_one_input)
        atheris.Fuzz()  # which ends the process
    while time.monotonic() < end:
        fuzz()
        print(f"{n_calls} calls on {', '.join(backends)}: nothing found", flush=True)


if __name__ == "__main__":
    main()
