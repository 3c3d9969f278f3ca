"""The methods in Python: on tensors and on state dicts.

    merged = ggez_merge.linear(base, tuned, ratio=0.3)                  # two tensors, or two state dicts
    merged = ggez_merge.ties(base, [a, b], weight=[0.5, 0.5], density=0.2)
    merged = ggez_merge.linear(base, tuned, ratio=ratios, axes="(head d) m -> head")    # a ratio for each head

Formulas, parameters and defaults are those of the recipes' methods, and so are the bytes: merging state dicts gives
what merging their files gives. Tensors have any shape and are contiguous, bfloat16, float16, float32 or float64 in any
mix, on the CPU or on a CUDA device (no float64 there). Other dtypes are not averaged: they have to be the same in all
inputs. Everything wrong with the arguments is raised at once, as `ggez_merge.errors.Refused`, before anything is
written. NaN, infinities and overflows are found on the way, and raised in the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch

from ggez_merge.arguments import parameters
from ggez_merge.axes import carry_out_parts, check_axes, names_of
from ggez_merge.errors import Problem, Refused
from ggez_merge.methods import METHODS
from ggez_merge.methods.method import Job, Method
from ggez_merge.untrusted import some
from ggez_merge.work import FLOATS, Work, carry_out, check_alike, check_equal, check_overlaps

if TYPE_CHECKING:
    import numpy as np

StateDict = Mapping[str, torch.Tensor]
Tensors = TypeVar("Tensors", torch.Tensor, StateDict)
Numbers: TypeAlias = "float | Sequence[Numbers] | np.ndarray[Any, Any] | torch.Tensor"  # an array only with `axes`
PerModel: TypeAlias = Numbers  # a number for all models, or a list of what it is for each
Nonfinite = Literal["error", "allow"]
Buffers = Literal["error", "base"]


def linear(
    base: Tensors | None,
    models: Tensors | Sequence[Tensors],
    *,
    ratio: Numbers | None = None,
    weight: PerModel | None = None,
    normalize: bool = True,
    axes: str | None = None,
    out: Tensors | None = None,
    out_dtype: torch.dtype | None = None,
    nonfinite: Nonfinite = "error",
    buffers: Buffers = "error",
) -> Tensors:
    """Interpolate, or average.

        with `ratio`:  out = (1 - ratio) * base + ratio * model
        with `weight`: out = sum_k w_k x_k / sum_k w_k       (without the division if not `normalize`)

    The first is GG-EZ's merge (arXiv 2604.11490), of one model; the second is a model soup (Wortsman et al. 2022,
    arXiv 2203.05482) and needs no base: None. float32 inside (float64 where a tensor is), rounded once.

    base, models: tensors of one shape, or mappings of the same names to such; a single model, or a list.
    axes: what the arrays among the parameters are about, in the manner of einops. On the left all axes of the tensor,
    on the right those of the arrays: "(head d) m -> head" takes one number for each attention head, "(gate_up f) m ->
    gate_up" two for a fused projection, "expert i o -> expert", "row column -> row", "m (head d) -> head" what they
    say. A parameter is then a number or an array (nested lists, numpy, torch) of exactly those axes, which give them
    their lengths; a parameter of each model is a list with one or the other for each model, or, of a single model, the
    array alone. Each part is merged as a tensor of its own. Where the axes on the right come first on the left, parts
    are pieces of memory and nothing is copied; otherwise all inputs are, and the output. Single tensors only.
    Parts of unequal sizes, as the q, k and v of grouped-query attention, need no axes:

        for part, of_base, of_tuned, r in zip(*(x.split([512, 128, 128]) for x in (out, base, tuned)), ratios):
            ggez_merge.linear(of_base, of_tuned, ratio=r, out=part)

    out: what to write to, of the same names and shapes, sharing no memory with an input; new tensors if None.
    out_dtype: of new tensors; the base's own if None (the first model's where there is no base).
    nonfinite: "allow" lets NaN and infinities through. buffers: "base" takes its integers where others differ.
    Raises Refused, and TypeError where tensors and mappings are mixed.
    """
    shared = {"ratio": ratio, "normalize": normalize}
    return _merge("linear", base, models, shared, {"weight": weight}, axes, out, out_dtype, nonfinite, buffers)


def task_arithmetic(
    base: Tensors,
    models: Tensors | Sequence[Tensors],
    *,
    weight: PerModel,
    lambda_: Numbers = 1.0,
    normalize: bool = False,
    axes: str | None = None,
    out: Tensors | None = None,
    out_dtype: torch.dtype | None = None,
    nonfinite: Nonfinite = "error",
    buffers: Buffers = "error",
) -> Tensors:
    """Add up what each model learned (Ilharco et al. 2023, arXiv 2212.04089).

        out = base + lambda * sum_k w_k (x_k - base)         (divided by sum_k w_k if `normalize`)

    With `axes="expert i o -> expert"`, `weight=[of_a, of_b]` has an array of each model's weights by expert.
    Tensors, mappings, the other arguments and errors as for `linear`.
    """
    shared = {"lambda": lambda_, "normalize": normalize}
    return _merge("task_arithmetic", base, models, shared, {"weight": weight}, axes, out, out_dtype, nonfinite, buffers)


def ties(
    base: Tensors,
    models: Tensors | Sequence[Tensors],
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    lambda_: Numbers = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    scope: Literal["tensor", "global"] = "tensor",
    ties: Literal["index", "all"] = "index",
    vote: Literal["sum", "count"] = "sum",
    axes: str | None = None,
    out: Tensors | None = None,
    out_dtype: torch.dtype | None = None,
    nonfinite: Nonfinite = "error",
    buffers: Buffers = "error",
) -> Tensors:
    """Trim each delta, elect a sign per entry, average what agrees with it (Yadav et al. 2023, arXiv 2306.01708).

        d_k     = x_k - base, of which the density_k entries of largest magnitude are kept
        elected = sign(sum_k w_k d_k)                        (vote "count": sign(sum_k sign(w_k d_k)))
        out     = base + lambda * sum_{k agrees} w_k d_k / sum_{k agrees} |w_k|   (no division if not `normalize`)

    scope: magnitudes are compared within each tensor, or over the whole mapping; with `axes` within each part, or over
    the whole tensor (where densities differ by part, their mean over it is kept). ties: of entries equal to the
    smallest that is kept the first count, or all. rescale: each trimmed delta gets the L1 norm back that it had.
    Tensors, mappings, the other arguments and errors as for `linear`.
    """
    shared = {
        "lambda": lambda_,
        "normalize": normalize,
        "rescale": rescale,
        "scope": scope,
        "ties": ties,
        "vote": vote,
    }
    own = {"weight": weight, "density": density}
    return _merge("ties", base, models, shared, own, axes, out, out_dtype, nonfinite, buffers)


# --- from arguments to work -----------------------------------------------------------------------------------------


def _merge(
    method_name: str,
    base: Tensors | None,
    models: Tensors | Sequence[Tensors],
    shared: Mapping[str, Any],
    per_model: Mapping[str, Any],
    axes: str | None,
    out: Tensors | None,
    out_dtype: torch.dtype | None,
    nonfinite: str,
    buffers: str,
) -> Tensors:
    method = METHODS[method_name]
    listed = list(models) if isinstance(models, (list, tuple)) else [models]
    sides: dict[str, Any] = {"base": base, **{f"models[{k}]": x for k, x in enumerate(listed)}, "out": out}
    sides = {label: side for label, side in sides.items() if side is not None}
    alone = _are_tensors(method_name, sides.values())
    if alone:
        sides = {label: {"": tensor} for label, tensor in sides.items()}
    problems: list[Problem] = []
    given = [key for key, value in (*shared.items(), *per_model.items()) if value is not None]
    if method.uses_base(given) and base is None:
        problems.append(Problem(f"{method_name} needs a base", remedy="pass what the models were tuned from"))
    names = names_of(axes, problems) if axes is not None else []
    if axes is not None and not alone:
        remedy = "merge the tensors that have these axes one by one, and the others without"
        problems.append(Problem("`axes` are those of a single tensor", "axes", found="mappings", remedy=remedy))
    parts = parameters(method, given, shared, per_model, len(listed), names, problems)
    if out_dtype is not None and out_dtype not in FLOATS:
        problems.append(Problem("the output's dtype is no float that can be merged", "out_dtype", found=str(out_dtype)))
    if out_dtype is not None and out is not None:
        problems.append(Problem("`out` has its own dtype", "out_dtype", remedy="pass one of the two"))
    merged: dict[str, torch.Tensor] = {}
    works = []
    for name in _common_names(sides, problems):
        inputs = {label: side[name] for label, side in sides.items()}
        faults = check_alike(name, inputs)
        problems += faults
        if faults:
            continue
        first = next(iter(inputs.values()))
        floats = first.dtype in FLOATS
        dtype = out_dtype if floats and out_dtype is not None else first.dtype
        merged[name] = inputs.pop("out") if out is not None else torch.empty_like(first, dtype=dtype)
        if floats and not method.uses_base(given):
            inputs.pop("base", None)
        if floats and axes is not None and not problems:
            problems += check_axes(first, axes, parts)
        job = Job(name, first.numel(), *next(iter(parts.values()))) if floats else None
        works.append(Work(name, job, inputs, merged[name]))
    refuse(method, works, problems, nonfinite, buffers)
    if axes is not None and works[0].job:
        carry_out_parts(method, works[0], axes, parts, nonfinite)
    else:
        carry_out(method, works, nonfinite)
    made: Any = merged[""] if alone else merged
    answer: Tensors = made if out is None else out
    return answer


def refuse(method: Method, works: Sequence[Work], problems: list[Problem], nonfinite: str, buffers: str) -> None:
    """The last checks, of all tensors together; then Refused for all problems, if there are any."""
    for key, value, choices in (("nonfinite", nonfinite, ("error", "allow")), ("buffers", buffers, ("error", "base"))):
        if value not in choices:
            problems.append(Problem(f"`{key}` must be one of {', '.join(choices)}", found=str(value)))
    problems += check_overlaps(works)
    for work in works:
        if work.job is None and not (buffers == "base" and not work.out.dtype.is_floating_point):
            problems += check_equal(work)
    devices = sorted({str(work.out.device) for work in works if work.job and method.measures_together(work.job)})
    if len(devices) > 1:
        problems.append(Problem("tensors with one threshold must be on one device", found=", ".join(devices)))
    if problems:
        raise Refused(problems)


def _are_tensors(method_name: str, sides: Iterable[Any]) -> bool:
    """True if all are tensors, False if all are mappings."""
    if all(isinstance(side, torch.Tensor) for side in sides):
        return True
    if not all(isinstance(side, Mapping) for side in sides):
        found = ", ".join(type(side).__name__ for side in sides)
        raise TypeError(f"{method_name} takes tensors, or mappings from names to tensors, but not both: found {found}")
    return False


def _common_names(sides: Mapping[str, StateDict], problems: list[Problem]) -> list[str]:
    """The names that all have, in the first one's order; a side that lacks one is a problem."""
    names = list(dict.fromkeys(name for side in sides.values() for name in side))
    missing: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        owner = next(label for label, side in sides.items() if name in side)
        for label, side in sides.items():
            if name not in side:
                missing[label, owner].append(name)
    problems += [lacking(lacks, has, lost) for (lacks, has), lost in missing.items()]
    return [name for name in names if all(name in side for side in sides.values())]


def lacking(lacks: str, has: str, names: list[str]) -> Problem:
    return Problem(
        f"{lacks} lacks {len(names)} tensor{'s' if len(names) > 1 else ''} that {has} has", tensor=some(names)
    )
