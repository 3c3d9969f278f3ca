"""Merging into a live module: what a sweep calls for each of its candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from ggez_merge.arguments import value_of
from ggez_merge.diffusion import blocks
from ggez_merge.errors import Problem
from ggez_merge.methods import METHODS
from ggez_merge.methods.method import Job
from ggez_merge.parameters import Scalar
from ggez_merge.selection import read_selection, remedy
from ggez_merge.tensors import Buffers, Nonfinite, StateDict, lacking, refuse
from ggez_merge.untrusted import some
from ggez_merge.work import FLOATS, Work, carry_out, check_alike

Live = Sequence[tuple[Sequence[str], torch.Tensor]]  # every tensor of a module once, with all its names


def merge_into(
    model: torch.nn.Module,
    base: StateDict,
    tuned: StateDict,
    ratio: float | Mapping[str, float],
    *,
    nonfinite: Nonfinite = "error",
    buffers: Buffers = "error",
) -> None:
    """Write an interpolation into a live module's parameters and buffers, without a copy of any weight.

        parameter = (1 - ratio) * base + ratio * tuned       rounded once, to the parameter's own dtype

    What a sweep calls for each of its candidates; the same bytes as `linear`. base and tuned hold what the module's
    `state_dict()` has, on its device, in memory of their own. ratio: a number, or a mapping to numbers of what a
    recipe's `components:` may name (components, layers of them, globs): the first that selects a tensor wins. Tied
    parameters are one tensor, under any of their names. Integers become the base's; buffers that are not persistent
    stay as they are. The other arguments and errors as for `linear`; when NaN or infinities are raised, the module has
    them already.
    """
    method = METHODS["linear"]
    problems: list[Problem] = []
    live = _live(model)
    base_tensors = _under_first_names("base", base, live, problems)
    tuned_tensors = _under_first_names("tuned", tuned, live, problems)
    ratios = _ratios(ratio, [names for names, out in live if out.dtype in FLOATS], problems)
    works = []
    for (name, *_), out in live:
        if name not in base_tensors or name not in tuned_tensors:
            continue
        inputs = {"base": base_tensors[name], "tuned": tuned_tensors[name]}
        faults = check_alike(name, {"model": out, **inputs})
        problems += faults
        if not faults:
            values: dict[str, Scalar] = {"ratio": ratios.get(name, 0.0), "normalize": True}
            job = Job(name, out.numel(), values, [{}]) if out.dtype in FLOATS else None
            works.append(Work(name, job, inputs, out))
    refuse(method, works, problems, nonfinite, buffers)
    carry_out(method, works, nonfinite)


def _live(module: torch.nn.Module) -> Live:
    """The tensors of the module's state dict; those that are the same memory in the same shape are tied."""
    names: dict[object, list[str]] = defaultdict(list)
    tensors: dict[object, torch.Tensor] = {}
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # others are what a module wants to remember besides
            key = (tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else name
            names[key].append(name)
            tensors[key] = tensor
    return [(names[key], tensor) for key, tensor in tensors.items()]


def _under_first_names(label: str, side: StateDict, live: Live, problems: list[Problem]) -> StateDict:
    """A state dict with tied tensors once, by the first of their names in the module."""
    found: dict[str, torch.Tensor] = {}
    lost = []
    for names, _ in live:
        present = {name: side[name] for name in names if name in side}
        if not present:
            lost.append(names[0])
            continue
        (name, tensor), *others = present.items()
        found[names[0]] = tensor
        for other_name, other in others:
            if other.data_ptr() != tensor.data_ptr() and not _same(tensor, other):
                problems.append(
                    Problem(
                        f"what is one tensor in the model are different ones in {label}",
                        place=label,
                        tensor=f"{name}, {other_name}",
                        remedy="leave out the name that does not count",
                    )
                )
    known = {name for names, _ in live for name in names}
    surplus = [name for name in side if name not in known]
    problems += [lacking(label, "the model", lost)] if lost else []
    problems += [lacking("the model", label, surplus)] if surplus else []
    return found


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and left.device == right.device and torch.equal(left, right)


def _ratios(
    ratio: float | Mapping[str, float], groups: Sequence[Sequence[str]], problems: list[Problem]
) -> dict[str, float]:
    """The ratio of each group of tied names, by its first name. The first key that selects a name is its own."""
    parameter = METHODS["linear"].shared["ratio"]
    keys = ratio if isinstance(ratio, Mapping) else {"*": ratio}
    unet = blocks([name for names in groups for name in names])
    selections = {key: read_selection(key, unet) for key in keys}
    numbers = {key: value_of(METHODS["linear"], "ratio", parameter, value, problems) for key, value in keys.items()}
    ratios: dict[str, float] = {}
    used: set[str] = set()
    unreached = []
    for names in groups:
        matches = {name: next((key for key, own in selections.items() if own.takes(name)), None) for name in names}
        unreached += [name for name, key in matches.items() if key is None]
        found = {numbers[key] for key in matches.values() if key is not None}
        used |= {key for key in matches.values() if key is not None}
        if len(found) > 1:
            problems.append(
                Problem(
                    "one tensor has two ratios, under two names",
                    place="ratio",
                    tensor=", ".join(names),
                    found=", ".join(map(str, sorted(found))),
                )
            )
        ratios[names[0]] = float(next(iter(found), 0.0))
    if unreached:
        problems.append(
            Problem("no ratio reaches some tensors", "ratio", some(unreached), remedy='add "*" as the last')
        )
    every = [name for names in groups for name in names]
    for key, selection in selections.items() if isinstance(ratio, Mapping) else ():
        fault = selection.fault(every)
        if fault or key not in used:
            what = fault or "a key reaches no tensor"
            problems.append(Problem(what, place="ratio", found=key, remedy=remedy(selection, every)))
    return ratios
