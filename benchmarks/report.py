"""Plots of results, drawn from their CSV files alone.

    ggez-merge bench report --out FOLDER [CSV…]

A file's columns tell what it holds: whole merges are drawn as seconds per method and tool, kernels as shares of the
copy bandwidth that was measured beside them. FOLDER gets NAME.png and NAME.svg for each NAME.csv. Where a table was
appended to, the last row of a kind counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ggez_merge.errors import Failed, Problem, Refused

from .table import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, str]]

# Okabe and Ito's colours, distinct also to the colour-blind
COLOURS = {"mergekit": "#D55E00", "ggez-merge": "#0072B2", "copy": "#999999", "copy-bare": "#DDDDDD"}
LABELS = {"copy": "the same engine, copying only", "copy-bare": "a bare copy, nothing measured"}
MARKERS = {"eager": ("torch, eager", "v", "#E69F00"), "compile": ("torch.compile", "D", "#009E73")}
MARKERS |= {"stats": ("torch.compile, with statistics", "d", "#56B4E9")}
MARKERS |= {"mergekit": ("mergekit", "s", "#D55E00"), "apart": ("in several calls", "o", "#333333")}
INK = "#333333"


def report(tables: Sequence[Path] = (), out: Path = Path()) -> list[Path]:
    """Draw each table (by default those committed); the files written. Raises Refused for one of another kind."""
    drawn = []
    for path in tables or sorted([*RESULTS.glob("merge*.csv"), *RESULTS.glob("kernels*.csv")]):
        rows = load(path)
        kinds = {"method,tool,median_s,cache": _merges, "op,tool,share_of_copy,threads": _kernels}
        draw = next((draw for columns, draw in kinds.items() if rows and {*columns.split(",")} <= rows[0].keys()), None)
        if draw is None:
            what = "this table holds neither whole merges nor kernels"
            raise Refused(Problem(what, place=str(path), found=", ".join(rows[0] if rows else [])))
        drawn += _save(draw(rows), out / path.stem)
    return drawn


def _save(figure: Figure, stem: Path) -> list[Path]:
    import matplotlib

    written = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": stem.name}):  # the same file from the same table
            for path in written:
                figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise Failed(f"{stem}: the plot cannot be written: {error.strerror}") from error
    return written


def _merges(rows: Rows) -> Figure:
    """Horizontal bars on a logarithmic axis: the slowest takes a hundred times as long as the fastest."""
    from matplotlib.figure import Figure

    seconds = {(row["cache"], row["method"], row["tool"]): float(row["median_s"]) for row in rows}
    groups = list(dict.fromkeys((cache, method) for cache, method, _ in seconds))
    tools = [tool for tool in COLOURS if any(tool == name for _, _, name in seconds)]
    height = 0.8 / len(tools)
    figure = Figure(figsize=(8, 0.5 + 0.32 * len(tools) * len(groups)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, tool in enumerate(tools):
        shown = [(i, seconds[(*group, tool)]) for i, group in enumerate(groups) if (*group, tool) in seconds]
        heights = [i + height * (place - (len(tools) - 1) / 2) for i, _ in shown]
        bars = axes.barh(
            heights, [s for _, s in shown], 0.9 * height, color=COLOURS[tool], label=LABELS.get(tool, tool)
        )
        axes.bar_label(bars, [f" {s:.1f} s" for _, s in shown], fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.set_xlim(left=0.9 * min(1, *seconds.values()), right=axes.get_xlim()[1] * 1.6)
    axes.set_yticks(range(len(groups)), [f"{method}{', cold' * (cache == 'cold')}" for cache, method in groups])
    axes.set_xlabel("seconds, whole process (logarithmic)", fontsize=9)
    _tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _kernels(rows: Rows) -> Figure:
    """A panel per dtype, size, device and threads: bars for our kernels, marks for what they are compared with."""
    from matplotlib.figure import Figure

    shares = {
        ((row["dtype"], row["elements"], row["device"], row["threads"]), row["op"], row["tool"]): float(
            row["share_of_copy"]
        )
        for row in rows
        if row["share_of_copy"]
    }
    panels = list(dict.fromkeys(panel for panel, _, _ in shares))
    ops = list(dict.fromkeys(op for _, op, _ in shares))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = (5 * columns + 1.5, lines * (0.9 + 0.26 * len(ops)) + 0.5)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        bars = axes.barh(
            range(len(ops)), [shares.get((panel, op, "ggez-merge"), 0) for op in ops], 0.7, color=COLOURS["ggez-merge"]
        )
        axes.bar_label(
            bars, [f" {bar.get_width():.0%}" if bar.get_width() else "" for bar in bars], fontsize=7, color=INK
        )
        bars.set_label("ggez-merge")
        for tool, (label, marker, colour) in MARKERS.items():
            marks = [(shares[panel, op, tool], i) for i, op in enumerate(ops) if (panel, op, tool) in shares]
            if marks:
                axes.plot(
                    *zip(*marks, strict=True), marker, color=colour, markersize=5, mec="white", mew=0.5, label=label
                )
        axes.axvline(1, color=COLOURS["copy"], linewidth=1)
        dtype, elements, device, threads = panel
        where = f"{device}, {threads} thread{'s' * (threads != '1')}" if threads else device
        axes.set_title(f"{dtype}, {int(elements) / 2**20:.3g} Mi elements, {where}", fontsize=8, loc="left", color=INK)
        axes.set_yticks(range(len(ops)), ops)
        _tidy(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("GB/s as a share of a memory copy (grey line)", fontsize=8)
    shown = {label: mark for axes in grid.flat for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, frameon=False, fontsize=8, loc="outside lower center", ncols=5)
    return figure


def _tidy(axes: Axes) -> None:
    if not axes.yaxis_inverted():
        axes.invert_yaxis()  # the first one on top; panels that share an axis are turned once
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
