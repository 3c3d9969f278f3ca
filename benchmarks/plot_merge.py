"""Draws benchmarks/results/merge.csv: seconds of whole merges, warm, one group of bars a method.

python benchmarks/plot_merge.py benchmarks/results/merge.csv benchmarks/results/merge.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {"mergekit": "#D55E00", "ggez-merge": "#0072B2", "copy": "#999999"}
LABELS = {"mergekit": "mergekit 0.1.5", "ggez-merge": "ggez-merge", "copy": "the same engine, copying only"}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Horizontal bars on a logarithmic axis: the slowest takes a hundred times as long as the fastest."""
    warm = [row for row in rows if row["cache"] == "warm"]
    methods = list(dict.fromkeys(row["method"] for row in warm))
    seconds = {(row["method"], row["tool"]): float(row["median_s"]) for row in warm}
    figure = Figure(figsize=(8, 0.5 + 0.95 * len(methods)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, tool in enumerate(COLOURS):
        shown = [(i, seconds[method, tool]) for i, method in enumerate(methods) if (method, tool) in seconds]
        heights = [i + 0.27 * (place - 1) for i, _ in shown]
        bars = axes.barh(heights, [s for _, s in shown], 0.25, color=COLOURS[tool], label=LABELS[tool])
        axes.bar_label(bars, [f" {s:.1f} s" for _, s in shown], fontsize=8, color="#333333")
    axes.set_xscale("log")
    axes.set_xlim(left=1, right=axes.get_xlim()[1] * 1.6)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel("seconds, whole process (logarithmic)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    with open(sys.argv[1], newline="") as file:
        draw(list(csv.DictReader(file)), Path(sys.argv[2]))
