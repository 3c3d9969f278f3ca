"""What a recipe may write as the value of a merge parameter, and what that means for one tensor.

    weight: 0.5                                     a scalar
    weight: [0, 0.5, 1]                             a gradient over the layers
    weight: [{filter: mlp, value: 1}, {value: 0}]   the first filter found in the tensor's name decides
"""

from __future__ import annotations

from dataclasses import dataclass

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Filtered:
    """`value`, for the tensors whose name contains `filter`; None and "*" reach every tensor."""

    filter: str | None
    value: Scalar | list[float]

    @property
    def reaches_all(self) -> bool:
        return self.filter is None or self.filter == "*"


Value = Scalar | list[float] | list[Filtered]


def evaluate(value: Value, name: str, t: float | None) -> Scalar | None:
    """What `value` is for the tensor `name` at the relative depth `t`; None if no filter reaches the tensor.

    A scalar is itself. A gradient v_0 ... v_n is linear between the points (i/n, v_i): the same numbers as
    `numpy.interp`, but in plain floats, so that every machine rounds alike. t is in [0, 1]: 0 is the first layer,
    1 the last; None is a tensor outside the layers, which takes v_0, as in mergekit.
    """
    if not isinstance(value, list):
        return value
    for step in value:
        if isinstance(step, Filtered) and (step.reaches_all or str(step.filter) in name):
            return evaluate(step.value, name, t)
    gradient = [step for step in value if not isinstance(step, Filtered)]
    return _interpolate(gradient, t or 0.0) if gradient else None


def _interpolate(gradient: list[float], t: float) -> float:
    position = t * (len(gradient) - 1)
    i = int(position)
    fraction = position - i
    if fraction == 0:
        return gradient[i]
    return gradient[i] + (gradient[i + 1] - gradient[i]) * fraction


def filters(value: Value) -> list[str]:
    """The filters that must each be found in some tensor's name, in order; those that reach everything are left out."""
    steps = value if isinstance(value, list) else []
    return [str(step.filter) for step in steps if isinstance(step, Filtered) and not step.reaches_all]
