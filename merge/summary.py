"""A plan in a few lines, for the dry run and the model card: which parameters reached how many tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ggez_merge.components import split
from ggez_merge.outputs import Output
from ggez_merge.parameters import Scalar
from ggez_merge.plan import Plan


@dataclass(frozen=True)
class Group:
    """Tensors of one component that were reached by the same line of the recipe."""

    component: str
    via: str
    parameters: str
    n_tensors: int
    n_elements: int
    n_bytes: int


def groups(plan: Plan) -> list[Group]:
    """The groups in layout order; where no component is recognised, by how names begin."""
    labels = split(output.entry.name for output in plan.outputs)
    members: dict[tuple[str, str], list[Output]] = {}
    for output in plan.outputs:
        members.setdefault((labels[output.entry.name], output.via), []).append(output)
    return [
        Group(
            component=part,
            via=via,
            parameters=_parameters(plan, outputs),
            n_tensors=len(outputs),
            n_elements=sum(output.models[0].numel for output in outputs),
            n_bytes=sum(output.entry.nbytes for output in outputs),
        )
        for (part, via), outputs in members.items()
    ]


def applied(output: Output, labels: Sequence[str]) -> dict[str, object]:
    """The parameters of one tensor, those of each model under its label (numbered if a model takes part twice)."""
    if output.job is None:
        return {}
    said: dict[str, object] = dict(output.job.shared)
    for number, (label, parameters) in enumerate(zip(labels, output.job.models, strict=True), start=1):
        if parameters:
            said[label if labels.count(label) == 1 else f"{label} ({number})"] = dict(parameters)
    return said


def renamings(plan: Plan) -> list[dict[str, Any]]:
    """Which input's names were brought to the base's, and by what rules, as plain data."""
    return [
        {"input": renaming.reference, "rules": [{**asdict(rule), "said": str(rule)} for rule in renaming.rules]}
        for renaming in plan.renamings
    ]


def _parameters(plan: Plan, outputs: Sequence[Output]) -> str:
    """What applies to these tensors; a range where it varies (a gradient); defaults are left out."""
    jobs = [output.job for output in outputs if output.job is not None]
    if not jobs:
        return "copied"
    said = []
    for key, parameter in plan.method.shared.items():
        values = {job.shared[key] for job in jobs if key in job.shared}
        if values and values != {parameter.default}:
            said.append(f"{key} {_range(values)}")
    for key in plan.method.per_model:
        columns = [  # modules may differ in how many models they merge
            _range({job.models[m][key] for job in jobs if m < len(job.models) and key in job.models[m]})
            for m in range(max(len(job.models) for job in jobs))
        ]
        if any(columns):
            said.append(f"{key} {' / '.join(columns)}")
    return ", ".join(said) or "defaults"


def _range(values: Iterable[Scalar]) -> str:
    numbers = sorted(values, key=lambda value: (str(type(value)), value))
    if not numbers:
        return ""
    shown = [f"{v:g}" if isinstance(v, float) else str(v).lower() for v in (numbers[0], numbers[-1])]
    return shown[0] if len(numbers) == 1 else f"{shown[0]} … {shown[1]}"
