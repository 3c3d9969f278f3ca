"""What a recipe may write as the value of a merge parameter, and what that means for one tensor.

- a scalar, `weight: 0.5`;
- a gradient over the layers, `weight: [0, 0.5, 1]`;
- filters, `weight: [{filter: mlp, value: 1}, {value: 0}]`: the first one found in the tensor's name decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ggez_merge.check import Check
from ggez_merge.yaml_lines import Where

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Filtered:
    """`value`, for the tensors whose name contains `filter`; None and "*" reach every tensor."""

    filter: str | None
    value: Scalar | list[float]

    def reaches(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name


Value = Scalar | list[float] | list[Filtered]


def matching(value: Value, name: str) -> int | None:
    """Which element of a list of filters decides for the tensor `name`: None if none does. Else 0."""
    for i, step in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(step, Filtered) or step.reaches(name):
            return i
    return None if isinstance(value, list) else 0


def evaluate(value: Value, name: str, t: float) -> Scalar | None:
    """What `value` is for the tensor `name` at the relative depth t; None if no filter reaches the tensor.

    A scalar is itself. A gradient v_0 ... v_n is linear between the points (i/n, v_i): what `numpy.interp`
    gives, but in plain floats, so that every machine rounds alike. t: 0 for the first layer, 1 for the last.
    """
    if not isinstance(value, list):
        return value
    gradient: list[float] = []
    for step in value:
        if not isinstance(step, Filtered):
            gradient.append(step)
        elif step.reaches(name):
            return evaluate(step.value, name, t)
    return _interpolate(gradient, t) if gradient else None


def _interpolate(gradient: list[float], t: float) -> float:
    position = t * (len(gradient) - 1)
    i = int(position)
    fraction = position - i
    if fraction == 0:
        return gradient[i]
    return gradient[i] + (gradient[i + 1] - gradient[i]) * fraction


def read_parameters(check: Check, where: Where, value: Any) -> dict[str, Value]:
    """The parameters of one mapping; their names are checked against the merge method later."""
    read = {name: read_value(check, (*where, name), given) for name, given in check.mapping(where, value).items()}
    return {name: given for name, given in read.items() if given is not None}


def read_value(check: Check, where: Where, value: Any) -> Value | None:
    """A scalar, a gradient, one {filter, value}, or a list of these."""
    steps = [value] if isinstance(value, dict) else value
    if not isinstance(steps, list) or not any(isinstance(step, dict) for step in steps):
        return _unfiltered(check, where, steps)
    if not all(isinstance(step, dict) for step in steps):
        check.refuse(
            where,
            "a list mixes plain values and filters",
            expected="numbers only, or {filter, value} only",
            found=value,
            remedy="write the value for all other tensors as {value: ...}, last",
        )
        return None
    read: list[Filtered] = []
    for i, step in enumerate(steps):
        entry = check.mapping((*where, i), step, ("filter", "value"), needed=True)
        name = check.text((*where, i, "filter"), entry.get("filter"))
        if any(earlier.reaches(name or "") for earlier in read):
            check.refuse(
                (*where, i),
                "this filter is never reached: one above it takes all its tensors",
                remedy="remove it, or move it up",
            )
        if check.required((*where, i), entry, "value"):
            given = _unfiltered(check, (*where, i, "value"), entry["value"])
            read += [] if given is None else [Filtered(name, given)]
    return read


def _unfiltered(check: Check, where: Where, value: Any) -> Scalar | list[float] | None:
    if isinstance(value, bool | str) or _is_finite(value):
        scalar: Scalar = value
        return scalar
    if isinstance(value, list) and value and all(map(_is_finite, value)):
        return [float(number) for number in value]
    if isinstance(value, list):
        check.refuse(where, "a gradient is a list of at least one finite number", found=value)
    else:
        expected = "a finite number, true or false, a word, a list of numbers, or a list of {filter, value}"
        check.refuse(where, "a parameter has no usable value", expected, "nothing" if value is None else value)
    return None


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
