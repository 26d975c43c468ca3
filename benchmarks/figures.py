"""Measure and draw the two figures of docs/performance.md: ``make figures``.

How does the bandwidth of softmax change as an array outgrows the caches, and at which numbers of rows and columns is it
ahead of the peers? `fastsoftmax._bench` measures; the figures are drawn from the file that this writes, so
``--from FILE`` draws them again without measuring.
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from fastsoftmax import _bench, _info

OURS = _bench.Contender("fastsoftmax", "backend", lambda: None, partial(_bench.prepare_fastsoftmax, None))
CONTENDERS = (OURS, *(one for one in _bench.CONTENDERS if one.kind in ("peer", "copy")))

# Arrays from 4 KiB, which a first-level cache holds, to 256 MiB, which no cache does.
BANDWIDTH_COLS = 1024
BANDWIDTH_SHAPES = tuple((2**exponent, BANDWIDTH_COLS) for exponent in range(17))

# Up to 2**24 elements: 64 MiB each of input and output.
HEAT_ROWS, HEAT_COLS = 4 ** np.arange(10), 4 ** np.arange(1, 12)
HEAT_SHAPES = tuple(
    (int(n_rows), int(n_cols)) for n_cols in HEAT_COLS for n_rows in HEAT_ROWS if n_rows * n_cols <= 2**24
)

N_ROUNDS, TURN_SECONDS = 3, 10e-3

STYLES = {
    "fastsoftmax": {"color": "#0072B2", "linewidth": 2.5, "marker": "o", "markersize": 4},
    "torch": {"color": "#D55E00", "marker": "^"},
    "onnxruntime": {"color": "#009E73", "marker": "v"},
    "jax": {"color": "#CC79A7", "marker": "s"},
    "scipy": {"color": "#777777", "marker": "x"},
    "numpy": {"color": "#777777", "marker": "+"},
}


def measure(n_threads):
    """Measure all shapes of both figures; return what a JSON file can hold."""
    contenders = [contender for contender in CONTENDERS if contender.missing() is None]
    measured = []
    for shape in dict.fromkeys(BANDWIDTH_SHAPES + HEAT_SHAPES):
        case = _bench.Case(shape, 1, "float32")
        with _bench.show_progress(f"softmax {case}") as progress:
            result = _bench.measure("softmax", case, contenders, n_threads, N_ROUNDS, progress, TURN_SECONDS)
        seconds = {name: timing.median for name, timing in result.timings.items()}
        measured.append(
            {"shape": shape, "seconds": seconds, "excluded": result.excluded, "plan": asdict(result.choice)}
        )
    return {
        "machine": _info.machine(),
        "versions": _info.versions(),
        "n_threads": n_threads,
        "measurements": measured,
    }


def title(document, what):
    n_threads = document["n_threads"]
    return f"{what}\n{document['machine']['cpu']}, {n_threads} thread{'s' * (n_threads > 1)}"


def draw_bandwidth(document, path):
    """Draw GB/s against the bytes of input and output, a line for each contender."""
    from matplotlib.figure import Figure

    seconds = {tuple(one["shape"]): one["seconds"] for one in document["measurements"]}
    sizes = {shape: 8 * shape[0] * shape[1] for shape in BANDWIDTH_SHAPES}  # float32, in and out
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")

    def plot(name, time, **style):
        points = [(size, size / time(seconds[shape]) / 1e9) for shape, size in sizes.items() if time(seconds[shape])]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)

    copies = ("copy:numpy", "copy:torch")
    plot("copy", lambda times: min(times[name] for name in copies if name in times), color="black", linestyle=":")
    for name, style in STYLES.items():
        plot(name, lambda times, name=name: times.get(name), **({"linewidth": 1, "markersize": 4} | style))
    for level, name in (("private", "L2"), ("last_level", "last level")):
        size = document["machine"][f"{level}_cache_bytes"]
        axes.axvline(size, color="#bbbbbb", linewidth=1, zorder=0)
        axes.annotate(
            name, (size, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points", fontsize=9
        )
    axes.xaxis.set_major_formatter(
        lambda size, _: f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"input and output together, rows of {BANDWIDTH_COLS:,} float32")
    axes.set_ylabel("GB/s")
    axes.grid(color="#eeeeee")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(title(document, "softmax: bytes read and written once, over the median time"), fontsize=11)
    figure.savefig(path, metadata={"Date": None})


def speedup(seconds):
    """Return the time of the fastest peer over ours."""
    peers = [contender.name for contender in CONTENDERS if contender.kind == "peer"]
    return min(seconds[name] for name in peers if name in seconds) / seconds["fastsoftmax"]


def draw_speedup(document, path):
    """Draw the speed-up over the fastest peer by rows and columns, blue where we are ahead."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    ratios = np.full((len(HEAT_ROWS), len(HEAT_COLS)), np.nan)
    for one in document["measurements"]:
        n_rows, n_cols = one["shape"]
        if (n_rows, n_cols) in HEAT_SHAPES:
            ratios[np.searchsorted(HEAT_ROWS, n_rows), np.searchsorted(HEAT_COLS, n_cols)] = speedup(one["seconds"])
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(ratios, cmap="RdBu", norm=LogNorm(1 / 8, 8), edgecolors="white", linewidth=1)
    for (row, column), ratio in np.ndenumerate(ratios):
        if not np.isnan(ratio):
            colour = "white" if abs(np.log2(ratio)) > 1.8 else "black"
            axes.text(column + 0.5, row + 0.5, f"{ratio:.2g}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(np.arange(len(HEAT_COLS)) + 0.5, [f"{size:,}" for size in HEAT_COLS], rotation=45, ha="right")
    axes.set_yticks(np.arange(len(HEAT_ROWS)) + 0.5, [f"{size:,}" for size in HEAT_ROWS])
    axes.set_xlabel("columns")
    axes.set_ylabel("rows")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], format="{x:g}")
    bar.minorticks_off()
    bar.set_label("time of the fastest peer over that of fastsoftmax")
    axes.set_title(
        title(document, "softmax of float32 along the last axis: speed-up over the fastest peer"), fontsize=11
    )
    figure.savefig(path, metadata={"Date": None})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is measured")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="draw what such a file holds")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the figures go [docs]")
    parser.add_argument("--threads", type=_bench.positive_integer, default=1, help="for every contender [1]")
    options = parser.parse_args(arguments)
    document = json.loads(options.source.read_text()) if options.source else measure(options.threads)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    options.folder.mkdir(parents=True, exist_ok=True)
    draw_bandwidth(document, options.folder / "bandwidth.svg")
    draw_speedup(document, options.folder / "speedup.svg")


if __name__ == "__main__":
    main()
