"""What the backends check, and work out, alike before they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_candidates(outs: Sequence[Any], weights: Sequence[Sequence[float]]) -> None:
    """ValueError or TypeError unless there are outputs, of one dtype, with a row of weights each."""
    if not outs:
        raise ValueError("at least one output is needed")
    if len(weights) != len(outs):
        raise ValueError(f"{len(outs)} outputs need {len(outs)} rows of weights, found {len(weights)}")
    if len({out.dtype for out in outs}) > 1:
        raise TypeError("the outputs must have one dtype, found " + ", ".join(str(out.dtype) for out in outs))


def alone(weight: float, normalize: bool, scale: float) -> float:
    """The weight with which a single voter, who wins every election, is added."""
    if not normalize:
        return scale * weight
    return scale if weight > 0 else -scale if weight < 0 else 0.0
