"""Which candidates of a sweep become checkpoints, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.front import Point, pareto

Keep = Literal["none", "best", "pareto", "all"]
KEEP: tuple[Keep, ...] = ("none", "best", "pareto", "all")


def kept(
    points: Sequence[Point], chosen: Point, keep: Keep, out: Path, folder: Path
) -> Iterator[tuple[Candidate, Path]]:
    """The candidates to write: the chosen one to `out`, others below `folder`, by their values.

    pareto: those of the front besides the chosen one. Unmerged models are checkpoints already, and not written unless
    one of them was chosen.
    """
    if keep == "none":
        return
    yield chosen.candidate, out
    for point, on_front in zip(points, pareto(points), strict=True):
        wanted = keep == "all" or (keep == "pareto" and on_front)
        if wanted and point is not chosen and point.candidate.role == "candidate":
            yield point.candidate, folder / folder_name(point.candidate)


def folder_name(candidate: Candidate) -> str:
    """ "ratio_0.3", with nothing in it that a file system minds."""
    said = "_".join(f"{path}_{value:g}" for path, value in candidate.values.items())
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in said)
