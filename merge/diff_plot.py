"""A picture of a diff: how far each layer of each component has moved."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ggez_merge.diff import Diff, Group
from ggez_merge.errors import Failed, Problem, Refused
from ggez_merge.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinct also to the colour-blind: the same for the same component in every plot, and
# different for components that one model has together.
_COLOURS = {
    "vision_tower": "#0072B2",
    "audio_tower": "#56B4E9",
    "projector": "#E69F00",
    "embeddings": "#009E73",
    "encoder": "#56B4E9",
    "decoder": "#D55E00",
    "language_model": "#D55E00",
    "lm_head": "#CC79A7",
    "text_encoder": "#D55E00",
    "text_encoder_2": "#E69F00",
    "text_encoder_3": "#CC79A7",
    "projection": "#E69F00",
    "logit_scale": "#CC79A7",
    "unet": "#0072B2",
    "transformer": "#0072B2",
    "vae": "#009E73",
    "other": "#888888",
}
_INK, _FAINT = "#333333", "#DDDDDD"


def plot(result: Diff, path: Path) -> None:
    """Draw relative L2 per layer, one line per component, and bars for what lies outside the layers.

    The suffix of `path` says the format: .png or .svg. Raises Refused for another one, when nothing was
    compared, or without matplotlib; Failed when the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise Refused(Problem("a plot is a .png or an .svg file", found=path.name, remedy="give the file that suffix"))
    if not result.groups:
        raise Refused(Problem("the checkpoints have no tensor in common that could be compared", found=result.b))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Refused(Problem("matplotlib is not installed", remedy="pip install matplotlib")) from None
    layered = [group for group in result.groups if group.stack is not None]
    rest = [group for group in result.groups if group.stack is None]
    figure = Figure(figsize=(10 if layered and rest else 7, 4.2), dpi=150, layout="constrained")
    title = f"How far {_short(result.b)} is from {_short(result.a)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK, parse_math=False)
    shares = [1.7] * bool(layered) + [1.0] * bool(rest)
    axes = list(figure.subplots(1, len(shares), squeeze=False, width_ratios=shares)[0])
    if layered:
        _lines(axes.pop(0), layered)
    if rest:
        _bars(axes.pop(0), rest)
    try:
        figure.savefig(path, format=path.suffix.lower()[1:])
    except OSError as error:
        raise Failed(f"{path}: the plot cannot be written: {error.strerror}") from error


def _lines(axes: Axes, groups: list[Group]) -> None:
    from matplotlib.ticker import MaxNLocator

    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for group in groups:
        if group.stack is not None and group.number is not None:
            curve = curves.setdefault((group.component, group.stack), [])
            curve.append((group.number, math.nan if group.change.relative_l2 is None else _percent(group)))
    drawn: set[str] = set()
    n_stacks = Counter(component for component, _ in curves)
    for (component, stack), curve in curves.items():
        axes.plot(
            *zip(*curve, strict=True),
            color=_COLOURS[component],
            linestyle="--" if component in drawn else "-",
            marker="s" if component in drawn else "o",
            markersize=4,
            linewidth=1.8,
            clip_on=False,
            label=component if n_stacks[component] == 1 else f"{component} ({printable(stack)[-40:]})",
        )
        drawn.add(component)
    _style(axes)
    axes.set_xlabel("layer", color=_INK)
    axes.set_ylabel("‖b − a‖ / ‖a‖, %", color=_INK)
    axes.set_ylim(0, max(_percent(group) for group in groups) * 1.08 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4 if len(drawn) == len(curves) else 1,
        frameon=False,
        fontsize=9,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(_INK)


def _bars(axes: Axes, groups: list[Group]) -> None:
    groups = groups[::-1]  # the first one on top
    values = [_percent(group) for group in groups]
    bars = axes.barh(
        [group.component for group in groups],
        values,
        color=[_COLOURS[g.component] for g in groups],
        height=0.6,
    )
    labels = ["undefined" if group.change.relative_l2 is None else f"{_percent(group):.3g}" for group in groups]
    axes.bar_label(bars, labels, padding=4, fontsize=9, color=_INK)
    _style(axes)
    axes.set_title("outside the layers", loc="left", fontsize=9, color=_INK)
    axes.set_xlabel("‖b − a‖ / ‖a‖, %", color=_INK)
    axes.set_xlim(0, max(values, default=0) * 1.2 or 1)
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)
    axes.tick_params(axis="y", length=0)


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)


def _percent(group: Group) -> float:
    return 100 * (group.change.relative_l2 or 0.0)


def _short(reference: str) -> str:
    """The last part of a path or an id: what tells two models apart in a title."""
    return printable(Path(reference).name or reference)[-48:]
