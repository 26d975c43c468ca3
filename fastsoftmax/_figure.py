"""The figures of ``python -m fastsoftmax bench --plot``: how near each contender comes to a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastsoftmax._bench import Contender, Measurement
    from fastsoftmax._bench_cuda import CardMeasurement

# Backends in colours that the colour-blind tell apart, peers in grey outlines: the eye compares ours with the field.
_BACKEND_STYLES = (("o", "#0072B2"), ("D", "#D55E00"), ("s", "#009E73"))
_PEER_MARKERS = ("^", "v", "s", "P", "X")
_GREY, _COPY = "#555555", "#dfe5ea"
_ROW_HEIGHT, _PANEL_WIDTH = 0.34, 4.9  # inches


def draw(measurements: Sequence[Measurement], contenders: Sequence[Contender], machine: str, path: Path) -> None:
    """Draw bandwidth by shape, a panel for each function (down) and dtype (across), in the format of the suffix."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    functions = list(dict.fromkeys(measurement.function for measurement in measurements))
    dtypes = list(dict.fromkeys(measurement.case.dtype for measurement in measurements))
    sizes = {str(measurement.case): measurement.case.size for measurement in measurements}
    labels = sorted(sizes, key=lambda label: (-sizes[label], label))  # the smallest on top

    height = 1.3 + len(functions) * (0.8 + _ROW_HEIGHT * len(labels))
    figure = Figure(figsize=(1.2 + _PANEL_WIDTH * len(dtypes), height), layout="constrained")
    panels = figure.subplots(len(functions), len(dtypes), sharex=True, sharey=True, squeeze=False)
    legend: dict[str, Any] = {}
    styles = _styles(contenders)
    for (row, column), panel in np.ndenumerate(panels):
        function, dtype = functions[row], dtypes[column]
        members = [one for one in measurements if one.function == function and one.case.dtype == dtype]
        _draw_panel(panel, members, labels, styles)
        panel.set_title(f"{function}, {dtype}", loc="left", fontsize=11)
        handles, names = panel.get_legend_handles_labels()
        legend.update(zip(names, handles, strict=True))
    for panel in panels[-1]:
        panel.set_xlabel("GB/s")
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=4 * len(dtypes),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    figure.suptitle(f"Bandwidth by shape: bytes read and written once, over the median time\n{machine}", fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_panel(
    panel: Any, members: Sequence[Measurement], labels: Sequence[str], styles: dict[str, dict[str, Any]]
) -> None:
    rows = {str(measurement.case): labels.index(str(measurement.case)) for measurement in members}
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.barh(
        [rows[str(measurement.case)] for measurement in members],
        [measurement.copied_bytes / measurement.fastest("copy") / 1e9 for measurement in members],
        height=0.72,
        color=_COPY,
        label="fastest copy",
    )
    for name, style in styles.items():
        points = [
            (measurement.moved_bytes / measurement.timings[name].median / 1e9, rows[str(measurement.case)])
            for measurement in members
            if name in measurement.timings
        ]
        if points:
            panel.scatter(*zip(*points, strict=True), label=name.replace(":", " "), **style)
    panel.set_yticks(range(len(labels)), labels)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="#eeeeee", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _styles(contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Return how each contender is drawn, but the copies: the backends on top of the peers."""
    backends = [contender.name for contender in contenders if contender.kind == "backend"]
    peers = [contender.name for contender in contenders if contender.kind == "peer"]
    styles: dict[str, dict[str, Any]] = {}
    for name, (marker, colour) in zip(backends, _BACKEND_STYLES, strict=True):
        styles[name] = {"marker": marker, "s": 44, "color": colour, "linewidths": 0, "zorder": 3}
    for name, marker in zip(peers, _PEER_MARKERS, strict=True):
        styles[name] = {"marker": marker, "s": 34, "facecolors": "none", "edgecolors": _GREY, "linewidths": 1.0}
    return styles


def draw_row_lengths(measurements: Sequence[CardMeasurement], card: str, path: Path) -> None:
    """Draw bandwidth over row length, a panel for each function (down) and dtype (across), ours in colour."""
    from matplotlib.figure import Figure

    functions = list(dict.fromkeys(one.function for one in measurements))
    dtypes = list(dict.fromkeys(one.case.dtype for one in measurements))
    size = 1.2 + _PANEL_WIDTH * len(dtypes), 0.9 + 3.3 * len(functions)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(functions), len(dtypes), sharex=True, sharey=True, squeeze=False)
    peers = [name for name in dict.fromkeys(one.name for one in measurements) if name not in ("copy", "fastsoftmax")]
    styles: dict[str, dict[str, Any]] = {
        "copy": {"color": "#9aa7b1", "linewidth": 5, "alpha": 0.5},
        "fastsoftmax": {"color": _BACKEND_STYLES[0][1], "marker": "o", "linewidth": 1.8},
    }
    for name, marker in zip(peers, _PEER_MARKERS, strict=False):
        styles[name] = {"color": _GREY, "marker": marker, "markerfacecolor": "none", "linewidth": 0.8}
    for (row, column), panel in np.ndenumerate(panels):
        function, dtype = functions[row], dtypes[column]
        for name, style in styles.items():
            of_panel = [
                one for one in measurements if (one.function, one.case.dtype, one.name) == (function, dtype, name)
            ]
            lengths = [one.case.shape[one.case.axis] for one in of_panel]
            panel.plot(lengths, [one.gigabytes_per_second for one in of_panel], label=name, **style)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{function}, {dtype}", loc="left", fontsize=11)
        panel.grid(axis="y", color="#eeeeee", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("row length")
    for panel in panels[:, 0]:
        panel.set_ylabel("GB/s")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    figure.suptitle(f"Bytes read and written once, over the median time\n{card}", fontsize=11)
    figure.savefig(path, dpi=150)
