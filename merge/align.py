"""Every input under the base's names, so that whatever comes after this can compare names as they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ggez_merge.checkpoint import Checkpoint, Tensor
from ggez_merge.components import component
from ggez_merge.conversions import Conversions, conversions
from ggez_merge.errors import Problem
from ggez_merge.experts import folded, refit
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


@dataclass(frozen=True)
class Counterpart:
    """One input under the base's names, and the rules of that; with `problems` its names are not to be relied on."""

    checkpoint: Checkpoint
    rules: tuple[Rule, ...]
    problems: tuple[Problem, ...]


def align(layout: Checkpoint, checkpoints: Mapping[ModelReference, Checkpoint]) -> Aligned:
    """Bring all inputs to the names of `layout`. What has no counterpart keeps its name, or follows its neighbours."""
    renamed: dict[ModelReference, Checkpoint] = {}
    renamings: dict[str, Renaming] = {}
    problems: dict[str, Problem] = {}
    for reference, checkpoint in checkpoints.items():
        found = counterpart(layout, checkpoint)
        problems.update((problem.what, problem) for problem in found.problems)
        if any(rule.theirs != rule.ours for rule in found.rules):
            renamings[checkpoint.reference] = Renaming(checkpoint.reference, found.rules)
        renamed[reference] = found.checkpoint
    return Aligned(renamed, tuple(renamings.values()), tuple(problems.values()))


def counterpart(layout: Checkpoint, checkpoint: Checkpoint) -> Counterpart:
    """Bring one input to the names of `layout`."""
    ours = {name: tensor.shape for name, tensor in layout.tensors.items()}
    found = match(ours, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, part)
    tensors = {found.canonical[name]: tensor for name, tensor in checkpoint.tensors.items()}
    rules = found.rules
    if tensors.keys() - ours.keys() and ours.keys() - tensors.keys():
        known = conversions(layout.config)
        tensors, more = _by_transformers(layout.tensors, tensors, known)
        refitted = refit(layout.tensors, tensors, known)
        tensors, rules = refitted.tensors, (*rules, *more, *refitted.rules)
    return Counterpart(replace(checkpoint, tensors=tensors), rules, tuple(_problems(layout, checkpoint, found)))


def part(name: str) -> str | None:
    """The component, where its words say it: any stack of layers may be of any model."""
    found = component(name)
    return None if found in ("language_model", "encoder", "decoder", "embeddings", "other") else found


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


def _by_transformers(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], known: Conversions
) -> tuple[dict[str, Tensor], tuple[Rule, ...]]:
    """Their tensors, those that nothing led to under our name wherever transformers has one name for both."""
    open_ours = {known.renamed(name): name for name in ours if name not in theirs}
    renamed: dict[str, Tensor] = {}
    counted: Counter[tuple[str, str]] = Counter()
    for name, tensor in theirs.items():
        ours_name = name if name in ours else open_ours.pop(known.renamed(name), name)
        renamed[ours_name] = tensor
        if ours_name != name:
            counted[folded([name]), folded([ours_name])] += 1
    return renamed, tuple(Rule(a, b, n, whole=True) for (a, b), n in counted.items())
