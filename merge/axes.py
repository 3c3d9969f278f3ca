"""Tensors in parts, each merged as a tensor of its own: along axes that are named as in einops.

"(head d) m -> head"    the rows of a matrix are heads of d rows each, and every head is a part
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from ggez_merge.arguments import Index, Values
from ggez_merge.errors import Problem
from ggez_merge.methods.method import Job, Method
from ggez_merge.work import Work, combine, counted, refuse_nonfinite

NAME = re.compile(r"\b[^\W\d]\w*")


def names_of(axes: str, problems: list[Problem]) -> list[str]:
    """The axes on the right-hand side: those that arrays of parameters have."""
    left, _, right = axes.partition("->")
    names = right.split()
    if not names or len(set(names)) < len(names) or not set(names) <= set(NAME.findall(left)):
        problems.append(
            Problem(
                "`axes` must end in names of axes, each once, that stand on its left-hand side too",
                place="axes",
                expected='such as "(head d) m -> head"',
                found=axes,
                remedy="name all axes of the tensor, then `->`, then those of the parameters",
            )
        )
    return names


def by_part(tensor: torch.Tensor, axes: str, parts: Iterable[Index]) -> torch.Tensor:
    """The tensor, not copied, with the axes of the parts first. EinopsError if it has no such axes."""
    from einops import rearrange

    def own(text: str) -> str:  # a name of ours, as axes may be called `in`, or as an argument of rearrange is
        return NAME.sub(r"axis_\g<0>", text)

    left, _, right = axes.partition("->")
    rest = [name for name in re.findall(rf"\.\.\.|{NAME.pattern}", left) if name not in right.split()]
    lengths = {name: last + 1 for name, last in zip(own(right).split(), max(parts), strict=True)}
    return rearrange(tensor.detach(), own(f"{left} -> {right} {' '.join(rest)}"), **lengths)


def check_axes(tensor: torch.Tensor, axes: str, parts: Iterable[Index]) -> Iterable[Problem]:
    """Why the tensor cannot be cut into these parts."""
    from einops import EinopsError

    try:
        by_part(tensor, axes, parts)
    except EinopsError:
        names = axes.partition("->")[2].split()
        lengths = ", ".join(f"{name} = {last + 1}" for name, last in zip(names, max(parts), strict=True))
        yield Problem(
            "`axes` does not describe the tensor",
            place="axes",
            expected=f"a pattern for the shape {list(tensor.shape)}",
            found=f"{axes} with {lengths}, the shape of the parameters' arrays",
            remedy="name every axis; those in parentheses multiply, and only one of them may be absent on the right",
        )


def carry_out_parts(method: Method, whole: Work, axes: str, parts: Mapping[Index, Values], nonfinite: str) -> None:
    """Merge one tensor part by part; then Refused as for one that is merged whole.

    Where the parameters' axes come first, a part is a piece of the tensors' memory, and nothing is copied. Otherwise
    the inputs are copied part after part, and so is the output back.
    """
    out = by_part(whole.out, axes, parts)
    room = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    rows = rows_of(room, len(parts))
    inputs = {label: rows_of(by_part(x, axes, parts), len(parts)) for label, x in whole.inputs.items()}
    works = [
        Work("", Job("", rows[i].numel(), *values), {label: x[i] for label, x in inputs.items()}, rows[i])
        for i, values in enumerate(parts.values())
    ]
    stats = combine(method, works)
    if room is not out:
        with torch.inference_mode():  # which may write into what was made there, and into anything else
            out.copy_(room)
    if nonfinite == "error":
        refuse_nonfinite([whole], [[sum(of_part) for of_part in zip(*counted(stats), strict=True)]])


def rows_of(tensor: torch.Tensor, n: int) -> Sequence[torch.Tensor]:
    """n parts of equal size, each flat and contiguous: pieces of the tensor's memory if it is contiguous."""
    return tensor.contiguous().view(n, tensor.numel() // n).unbind()
