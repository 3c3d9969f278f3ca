"""Every input under the base's names, so that whatever comes after this can compare names as they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ggez_merge.checkpoint import Checkpoint
from ggez_merge.components import component
from ggez_merge.errors import Problem
from ggez_merge.fused import refit
from ggez_merge.names import Match, Rule, match
from ggez_merge.recipe import ModelReference
from ggez_merge.untrusted import printable


@dataclass(frozen=True)
class Renaming:
    """How one input's names became the base's."""

    reference: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Aligned:
    """The inputs with their tensors under the base's names; each Tensor still knows its own."""

    checkpoints: dict[ModelReference, Checkpoint]
    renamings: tuple[Renaming, ...]
    problems: tuple[Problem, ...]


def align(layout: Checkpoint, checkpoints: Mapping[ModelReference, Checkpoint]) -> Aligned:
    """Bring all inputs to the names of `layout`. What has no counterpart keeps its name, or follows its neighbours."""
    ours = {name: tensor.shape for name, tensor in layout.tensors.items()}
    renamed: dict[ModelReference, Checkpoint] = {}
    renamings: dict[str, Renaming] = {}
    problems: dict[str, Problem] = {}
    for reference, checkpoint in checkpoints.items():
        found = match(ours, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, component)
        problems.update((problem.what, problem) for problem in _problems(layout, checkpoint, found))
        tensors = {found.canonical[name]: tensor for name, tensor in checkpoint.tensors.items()}
        refitted = refit(layout.tensors, tensors)
        rules = found.rules + refitted.rules
        if any(rule.theirs != rule.ours for rule in rules):
            renamings[checkpoint.reference] = Renaming(checkpoint.reference, rules)
        renamed[reference] = replace(checkpoint, tensors=refitted.tensors)
    return Aligned(renamed, tuple(renamings.values()), tuple(problems.values()))


def _problems(layout: Checkpoint, checkpoint: Checkpoint, found: Match) -> Iterable[Problem]:
    for one, other in found.ambiguous:
        yield Problem(
            f"it is not clear which tensors of {layout.reference} those of {checkpoint.reference} are",
            expected=printable(str(one)),
            found="as well: " + printable(str(other)),
            remedy="save it as part of the whole model, or give its tensors the base's names",
        )
    for name, own in found.doubled.items():
        yield Problem(
            f"{checkpoint.reference} holds one tensor of {layout.reference} under several names",
            tensor=printable(name),
            found=printable(", ".join(own)),
            remedy="remove what does not belong to the model",
        )
