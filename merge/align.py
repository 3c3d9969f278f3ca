"""Every input under the base's names, so that whatever comes after this can compare names as they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

from ggez_merge.checkpoint import Checkpoint, Tensor
from ggez_merge.components import component
from ggez_merge.conversions import Conversions, conversions, every_conversion
from ggez_merge.diffusion import converted, parts
from ggez_merge.errors import Problem
from ggez_merge.fused import Unclear, folded, of_another, refit
from ggez_merge.names import Match, Rule, explained, match
from ggez_merge.pipeline import is_denoiser
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
    unclear: tuple[Problem, ...]


@dataclass(frozen=True)
class Counterpart:
    """One input under the base's names, and the rules of that.

    With `problems` its names are not to be relied on; `unclear` are why some tensors have no counterpart.
    """

    checkpoint: Checkpoint
    rules: tuple[Rule, ...]
    problems: tuple[Problem, ...]
    unclear: tuple[Problem, ...]


def align(layout: Checkpoint, checkpoints: Mapping[ModelReference, Checkpoint]) -> Aligned:
    """Bring all inputs to the names of `layout`. What has no counterpart keeps its name, or follows its neighbours."""
    renamed: dict[ModelReference, Checkpoint] = {}
    renamings: dict[str, Renaming] = {}
    problems: dict[str, Problem] = {}
    unclear: list[Problem] = []
    for reference, checkpoint in checkpoints.items():
        found = counterpart(layout, checkpoint)
        problems.update((problem.what, problem) for problem in found.problems)
        unclear += [problem for problem in found.unclear if problem not in unclear]
        if any(rule.theirs != rule.ours for rule in found.rules):
            renamings[checkpoint.reference] = Renaming(checkpoint.reference, found.rules)
        renamed[reference] = found.checkpoint
    return Aligned(renamed, tuple(renamings.values()), tuple(problems.values()), tuple(unclear))


def counterpart(layout: Checkpoint, checkpoint: Checkpoint) -> Counterpart:
    """Bring one input to the names of `layout`; of a diffusion model, part by part, those that the layout has."""
    ours, theirs = parts(layout), parts(checkpoint)
    if not ours or not theirs:
        return _counterpart(layout, checkpoint)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name in layout.tensors}
    rules: list[Rule] = []
    problems: list[Problem] = []
    unclear: list[Problem] = []
    for name in [name for name in ours if name in theirs]:
        a, b = ours[name], theirs[name]
        if a.style == b.style:
            found = _counterpart(replace(layout, tensors=a.tensors), replace(checkpoint, tensors=b.tensors))
            own, told = ({} if found.problems else found.checkpoint.tensors), found.rules
            if is_denoiser(name):  # what is not merged may be as unclear as it likes
                problems += found.problems
                unclear += found.unclear
        else:
            own, extra = converted(a, b)
            same = a.prefix == b.prefix
            told = (Rule(f"{b.style} names", f"{a.style} names", len(own), whole=True),) if same else ()
            if is_denoiser(name):
                own = {**extra, **own}
        tensors.update((a.prefix + own_name, tensor) for own_name, tensor in own.items())
        told = told or (Rule("", "", len(own)),)
        rules += [
            replace(rule, theirs=_under(b.prefix, rule.theirs), ours=_under(a.prefix, rule.ours)) for rule in told
        ]
    for name in [name for name in theirs if name not in ours and is_denoiser(name)]:  # then it lacks a counterpart
        tensors.update((theirs[name].prefix + own_name, tensor) for own_name, tensor in theirs[name].tensors.items())
    return Counterpart(replace(checkpoint, tensors=tensors), tuple(rules), tuple(problems), tuple(unclear))


def _under(prefix: str, name: str) -> str:
    return (prefix + name).rstrip(".")


def _counterpart(layout: Checkpoint, checkpoint: Checkpoint) -> Counterpart:
    ours = {name: tensor.shape for name, tensor in layout.tensors.items()}
    found = match(ours, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, part)
    tensors = {found.canonical[name]: tensor for name, tensor in checkpoint.tensors.items()}
    rules, unclear = found.rules, tuple[Unclear, ...]()
    if tensors.keys() - ours.keys() and ours.keys() - tensors.keys():
        known = conversions(layout.config)
        tensors, more = _by_transformers(layout.tensors, tensors, known)
        refitted = refit(layout.tensors, tensors, known)
        tensors, rules, unclear = refitted.tensors, (*rules, *more, *refitted.rules), refitted.unclear
        left, right = _left(tensors, ours), _left(ours, tensors)
        examples = [*(tensors[name].name for name in left), *right]
        complete = (
            _by_one_table(layout.tensors, checkpoint.tensors, examples) if left and right and not unclear else None
        )
        if complete:
            return Counterpart(replace(checkpoint, tensors=complete[0]), complete[1], (), ())
    problems = tuple(_problems(layout, checkpoint, found))
    said = tuple(_unclear(layout, checkpoint, each) for each in unclear)
    return Counterpart(replace(checkpoint, tensors=tensors), rules, problems, said)


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


def _unclear(layout: Checkpoint, checkpoint: Checkpoint, found: Unclear) -> Problem:
    return Problem(
        f"{checkpoint.reference} and {layout.reference} hold the same weights, fused and split, but which is which is "
        f"not certain: {found.reason}",
        expected=f"in {layout.reference}: {printable(found.ours)}",
        found=f"in {checkpoint.reference}: {printable(found.theirs)} ({found.n} fused)",
        remedy="save both with one version of one program",
    )


def _by_one_table(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], examples: Iterable[str]
) -> tuple[dict[str, Tensor], tuple[Rule, ...]] | None:
    """Their tensors under our names, if any table of transformers makes the two the same, tensor by tensor.

    So authors' own layouts meet transformers': the table may stand under the name of a later model that has the same
    parts. Nothing, if a table leaves anything open, if two differ in what they make of it, or one doubts what a fused
    tensor holds. examples: names that nothing else led to; a table that does not change them is of no use.
    """
    told = {folded([name]): name for name in examples}.values()
    answers = {}
    for known in every_conversion():
        if all(known.renamed(name) == name for name in told):
            continue
        to_ours = {known.renamed(name): name for name in ours}
        to_theirs = {known.renamed(name): name for name in theirs}
        if len(to_ours) < len(ours) or len(to_theirs) < len(theirs):
            continue
        found = match(
            {name: ours[own].shape for name, own in to_ours.items()},
            {name: theirs[own].shape for name, own in to_theirs.items()},
            part,
        )
        strays = any(found.canonical[name] not in to_ours and own in ours for name, own in to_theirs.items())
        if found.ambiguous or found.doubled or strays:
            continue
        names = {own: to_ours.get(found.canonical[name], own) for name, own in to_theirs.items()}
        spoken = {own: name for name, own in to_ours.items()}
        spoken |= {own: found.canonical[name] for name, own in to_theirs.items() if names[own] not in ours}
        tensors = {names[own]: tensor for own, tensor in theirs.items()}
        refitted = refit(ours, tensors, Conversions(spoken.__getitem__, of_another(known.fusions)))
        if refitted.unclear:
            return None
        if not _left(ours, refitted.tensors) and not _left(refitted.tensors, ours):
            plain = {own: name for own, name in names.items() if name in ours}
            answers[tuple(plain.items()), refitted.rules] = refitted.tensors, (*explained(plain), *refitted.rules)
    return next(iter(answers.values())) if len(answers) == 1 else None


def _left(names: Iterable[str], others: Container[str]) -> list[str]:
    """The names that the others lack; a head that one ties to its embeddings is seen to later."""
    return [name for name in names if name not in others and component(name) != "lm_head"]


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
