"""How far is a result from the true one, at worst and on average, in units in the last place: ``make accuracy``.

Every implementation, each instruction-set tier in a process of its own, computes the same rows, which are hard in
different ways (`KINDS`) and of 1 to ten million elements. Results are held against the reference of the tests, computed
in long double (float64 for dtypes narrower than that). The table and the figure of docs/accuracy.md are made from the
file that this writes, so ``--from FILE`` makes them again without measuring.

asv follows some of these errors from commit to commit.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
from ml_dtypes import finfo

from fastsoftmax import _bench, _info

sys.path.append(str(Path(__file__).parents[1]))  # wherever asv or a new process starts
from benchmarks.common import CONTENDER_NAMES, prepare
from tests.inputs import values
from tests.reference import error_of, exact, ulp, wide_for

FUNCTIONS = _bench.FUNCTIONS
DTYPES = ("float32", "float64", "float16", "bfloat16")
LENGTHS = tuple(10**exponent for exponent in range(8))
MIN_ELEMENTS = 20_000  # short rows are as many as have so many elements

# Kinds of `tests.inputs.VALUES`.
KINDS = (
    "normal",
    "uniform",
    "wide",
    "near ties",
    "constant",
    "ascending",
    "descending",
    "offset",
    "coarse",
    "subnormal results",
    "cancelling",
)

# The contender of `fastsoftmax._bench` that each is, and what the process it runs in finds in its environment.
IMPLEMENTATIONS = {
    "cython v4": ("fastsoftmax:cython", {"FASTSOFTMAX_ISA": "x86_64_v4"}),
    "cython v3": ("fastsoftmax:cython", {"FASTSOFTMAX_ISA": "x86_64_v3"}),
    "cython v2": ("fastsoftmax:cython", {"FASTSOFTMAX_ISA": "x86_64_v2"}),
    "cython portable": ("fastsoftmax:cython", {"FASTSOFTMAX_ISA": "portable"}),
    "numba": ("fastsoftmax:numba", {}),
    "numba AVX2": ("fastsoftmax:numba", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+sse4.2"}),
    "numba SSE4.2": ("fastsoftmax:numba", {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2"}),
    "numpy backend": ("fastsoftmax:numpy", {}),
    "NumPy expression": ("numpy", {}),
    "scipy": ("scipy", {}),
    "torch": ("torch", {}),
    "jax": ("jax", {}),
    "onnxruntime": ("onnxruntime", {}),
}
OURS = tuple(name for name, (contender, _) in IMPLEMENTATIONS.items() if contender.startswith("fastsoftmax"))

# In the figure. The implementations that are not there are other tiers.
STYLES = {
    "cython v4": {"color": "#0072B2", "linewidth": 2.5, "marker": "o", "markersize": 5},
    "numba": {"color": "#D55E00", "linewidth": 1.5, "marker": "D", "markersize": 4},
    "numpy backend": {"color": "#009E73", "linewidth": 1, "marker": "s", "markersize": 4},
} | {
    name: {"color": "#777777", "linewidth": 0.8, "marker": marker, "markersize": 5, "markerfacecolor": "none"}
    for name, marker in zip(("NumPy expression", "scipy", "torch", "jax", "onnxruntime"), "^vsPX", strict=True)
}

TARGETS = {"float32": 2, "float64": 2, "float16": 0.51, "bfloat16": 0.51}
SUBNORMAL_TARGET = 1


class Error:
    """What asv follows."""

    params = (["softmax", "logsumexp"], ["normal", "wide", "coarse", "ascending"], list(DTYPES[:2]), CONTENDER_NAMES)
    param_names = ("function", "kind", "dtype", "contender")
    unit = "ULP"

    def setup(self, function, kind, dtype, contender):
        self.x = rows(kind, 4096, np.dtype(dtype))
        self.call = prepare(contender, function, self.x, 1, 1)

    def track_largest_error(self, function, kind, dtype, contender):
        return round(error_of(function, np.asarray(self.call()), self.x, 1), 3)


def rows(kind, length, dtype):
    """Return rows of a kind, one of its own for each: what a kind does, it does along a row."""
    n_rows = -(-MIN_ELEMENTS // length)
    return np.stack([values(kind, length, dtype, seed) for seed in range(n_rows)])


@cache
def worker(environment):
    """Start the process for the implementations that find this in their environment."""
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with mock.patch.dict(os.environ, dict(environment)):
        executor.submit(os.getpid).result()  # starts it
    return executor


def missing(contender):
    """Return why an implementation cannot run, in a worker: finding out imports it."""
    return _by_name[contender].missing()


def compute(contender, x):
    """Return the results of an implementation by function, less those it has none of, in a worker."""
    results = {}
    for function in FUNCTIONS:
        # onnxruntime lacks bfloat16 and raises an error of its own.
        with suppress(Exception), np.errstate(all="ignore"):
            results[function] = np.asarray(_by_name[contender].prepare(function, x, 1, 1)())
    return results


_by_name = {contender.name: contender for contender in _bench.CONTENDERS}


def exact_results(x):
    """Return the exact results of each function and the ULP they are measured in: that of the larger summand for
    logsumexp, whose sum may cancel."""
    wide = wide_for(x.dtype)
    results = {function: exact(function, x, 1, wide=wide) for function in FUNCTIONS}
    units = {function: ulp(result, x.dtype) for function, result in results.items()}
    maximum, total = x.max(axis=1, keepdims=True).astype(wide), results["logsumexp"]
    units["logsumexp"] = ulp(np.max([abs(maximum), abs(total - maximum), abs(total)], axis=0), x.dtype)
    return {function: (result, units[function]) for function, result in results.items()}


def errors(actual, expected, unit):
    """Return the largest and the mean error, and the largest of results that are subnormal; None if there are none."""
    error = abs(actual.reshape(expected.shape).astype(expected.dtype) - expected) / unit
    error[np.isnan(error)] = np.inf
    subnormal = error[abs(expected) < float(finfo(actual.dtype).smallest_normal)]
    return {
        "max": float(error.max()),
        "mean": float(error.mean()),
        "subnormal": float(subnormal.max()) if subnormal.size else None,
    }


def measure(lengths):
    """Measure everything; return what a JSON file can hold."""
    reasons = {
        name: worker(tuple(environment.items())).submit(missing, contender).result()
        for name, (contender, environment) in IMPLEMENTATIONS.items()
    }
    for name, reason in reasons.items():
        if reason:
            print(f"not measured: {name}: {reason}", file=sys.stderr)
    measured = []
    for dtype, length, kind in product(DTYPES, lengths, KINDS):
        with _bench.show_progress(f"{dtype} {length} {kind}") as progress:
            x = rows(kind, length, _bench.Case((length,), 0, dtype).numpy_dtype)
            computed = {
                name: worker(tuple(environment.items())).submit(compute, contender, x)
                for name, (contender, environment) in IMPLEMENTATIONS.items()
                if not reasons[name]
            }
            expected = exact_results(x)
            for name in list(computed):
                progress(name)
                for function, actual in computed.pop(name).result().items():
                    case = {"dtype": dtype, "length": length, "kind": kind, "function": function}
                    measured.append(case | {"implementation": name} | errors(actual, *expected[function]))
    return {"machine": _info.machine(), "versions": _info.versions(), "measurements": measured}


def chosen(measured, **wanted):
    """Return the measurements that agree with what is wanted."""
    return [one for one in measured if all(one[key] == value for key, value in wanted.items())]


def worst(measured, **wanted):
    """Return the largest error among them; None if there are none."""
    return max((one["max"] for one in chosen(measured, **wanted)), default=None)


def misses(measured):
    """Return a line for each of ours, function and dtype that misses a target, with the case that misses it by most."""
    lines = []
    for name, function, dtype in product(OURS, FUNCTIONS, DTYPES):
        ones = chosen(measured, implementation=name, function=function, dtype=dtype)
        for what, target in (("max", TARGETS[dtype]), ("subnormal", SUBNORMAL_TARGET)):
            one = max(ones, key=lambda one: one[what] or 0, default=None)
            if one and not (one[what] or 0) <= target:
                error, where = one[what], f"{one['kind']}, rows of {one['length']:,}"
                what = "" if what == "max" else " in subnormal results"
                lines.append(f"{name}, {function} of {dtype}: {error:.2f} ULP{what} ({where}), not {target}")
    return lines


def number(value):
    """Return an error as the tables show it."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}".replace("e+0", "e")


def table(head, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def by_function(measured, name, dtype):
    """Return a line of the table of a dtype: the largest and the mean error of each function."""
    of = {function: chosen(measured, implementation=name, dtype=dtype, function=function) for function in FUNCTIONS}
    subnormal = [one["subnormal"] for one in of["softmax"] if one["subnormal"] is not None]
    cells = [name]
    for ones in of.values():
        cells += [number(worst(ones)), number(np.mean([one["mean"] for one in ones]) if ones else None)]
    return [*cells, number(max(subnormal, default=None))]


def report(document):
    """Return the tables of docs/accuracy.md."""
    measured = document["measurements"]
    names = [name for name in IMPLEMENTATIONS if chosen(measured, implementation=name)]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    parts = [f"Measured on {document['machine']['cpu']} with {versions}.", "### By function"]
    head = [f"{function}{what}" for function in FUNCTIONS for what in (" max", " mean")]
    parts += [
        table([dtype, *head, "subnormal"], [by_function(measured, name, dtype) for name in names]) for dtype in DTYPES
    ]
    parts.append("### By kind of row\n\nThe largest error of softmax, over rows of all lengths.")
    parts += [
        table(
            [dtype, *KINDS],
            [
                [
                    name,
                    *(
                        number(worst(measured, implementation=name, dtype=dtype, function="softmax", kind=kind))
                        for kind in KINDS
                    ),
                ]
                for name in names
            ],
        )
        for dtype in DTYPES[:2]
    ]
    missed = misses(measured)
    parts.append(
        "Targets missed:\n\n" + "\n".join(f"- {line}" for line in missed) if missed else "No target is missed."
    )
    return "\n\n".join(parts)


def draw(document, path):
    """Draw the largest error against the length of the rows, a panel for each function (down) and dtype (across)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(len(FUNCTIONS), len(DTYPES), sharex=True, sharey=True)
    for (row, column), panel in np.ndenumerate(panels):
        function, dtype = FUNCTIONS[row], DTYPES[column]
        for name, style in STYLES.items():
            ones = chosen(document["measurements"], implementation=name, dtype=dtype, function=function)
            lengths = list(dict.fromkeys(one["length"] for one in ones))
            panel.plot(lengths, [worst(ones, length=length) for length in lengths], label=name, **style)
        panel.axhline(TARGETS[dtype], color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(f"{function}, {dtype}", loc="left", fontsize=10)
        panel.grid(color="#eeeeee")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("row length")
    for panel in panels[:, 0]:
        panel.set_ylabel("ULP")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False
    )
    figure.suptitle("Largest error over all kinds of rows; the grey line is the target", fontsize=11)
    figure.savefig(path, metadata={"Date": None})


def rewrite(path, name, text):
    """Replace the section of a page that begins and ends with a comment of this name."""
    before, begin, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    if not end:
        raise SystemExit(f"{path} has no section between <!-- {name} --> and <!-- end of {name} -->")
    path.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is measured")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="report what such a file holds")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where accuracy.md is, and its figure [docs]")
    parser.add_argument("--lengths", type=lengths_list, default=LENGTHS, help="of rows, such as 1,1000 [1 to 10**7]")
    options = parser.parse_args(arguments)
    document = json.loads(options.source.read_text()) if options.source else measure(options.lengths)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    rewrite(options.folder / "accuracy.md", "make accuracy", report(document))
    draw(document, options.folder / "accuracy.svg")
    missed = misses(document["measurements"])
    print(*(f"missed: {line}" for line in missed), sep="\n", file=sys.stderr)
    return 1 if missed else 0


def lengths_list(text):
    return tuple(_bench.positive_integer(one) for one in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
