"""The methods in Python: on tensors and on state dicts.

    merged = ggez_merge.linear(base, tuned, ratio=0.3)                  # two tensors, or two state dicts
    merged = ggez_merge.ties(base, [a, b], weight=[0.5, 0.5], density=0.2)

Formulas, parameters and defaults are those of the recipes' methods, and so are the bytes: merging state dicts gives
what merging their files gives. Tensors have any shape and are contiguous, bfloat16, float16, float32 or float64 in any
mix, on the CPU or on a CUDA device (no float64 there). Other dtypes are not averaged: they have to be the same in all
inputs. Everything wrong with the arguments is raised at once, as `ggez_merge.errors.Refused`, before anything is
written. NaN, infinities and overflows are found on the way, and raised in the end.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch

from ggez_merge.errors import Problem, Refused
from ggez_merge.methods import METHODS
from ggez_merge.methods.method import Job, Method, Parameter
from ggez_merge.parameters import Scalar
from ggez_merge.resolve import some
from ggez_merge.work import FLOATS, Work, carry_out, check_alike, check_equal, check_overlaps

StateDict = Mapping[str, torch.Tensor]
Tensors = TypeVar("Tensors", torch.Tensor, StateDict)
PerModel = float | Sequence[float]  # one number for all models, or one for each
Nonfinite = Literal["error", "allow"]
Buffers = Literal["error", "base"]


def linear(
    base: Tensors | None,
    models: Tensors | Sequence[Tensors],
    *,
    ratio: float | None = None,
    weight: PerModel | None = None,
    normalize: bool = True,
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
    out: what to write to, of the same names and shapes, sharing no memory with an input; new tensors if None.
    out_dtype: of new tensors; the base's own if None (the first model's where there is no base).
    nonfinite: "allow" lets NaN and infinities through. buffers: "base" takes its integers where others differ.
    Raises Refused, and TypeError where tensors and mappings are mixed.
    """
    shared = {"ratio": ratio, "normalize": normalize}
    return _merge("linear", base, models, shared, {"weight": weight}, out, out_dtype, nonfinite, buffers)


def task_arithmetic(
    base: Tensors,
    models: Tensors | Sequence[Tensors],
    *,
    weight: PerModel,
    lambda_: float = 1.0,
    normalize: bool = False,
    out: Tensors | None = None,
    out_dtype: torch.dtype | None = None,
    nonfinite: Nonfinite = "error",
    buffers: Buffers = "error",
) -> Tensors:
    """Add up what each model learned (Ilharco et al. 2023, arXiv 2212.04089).

        out = base + lambda * sum_k w_k (x_k - base)         (divided by sum_k w_k if `normalize`)

    Tensors, mappings, the other arguments and errors as for `linear`.
    """
    shared = {"lambda": lambda_, "normalize": normalize}
    return _merge("task_arithmetic", base, models, shared, {"weight": weight}, out, out_dtype, nonfinite, buffers)


def ties(
    base: Tensors,
    models: Tensors | Sequence[Tensors],
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    lambda_: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    scope: Literal["tensor", "global"] = "tensor",
    ties: Literal["index", "all"] = "index",
    vote: Literal["sum", "count"] = "sum",
    out: Tensors | None = None,
    out_dtype: torch.dtype | None = None,
    nonfinite: Nonfinite = "error",
    buffers: Buffers = "error",
) -> Tensors:
    """Trim each delta, elect a sign per entry, average what agrees with it (Yadav et al. 2023, arXiv 2306.01708).

        d_k     = x_k - base, of which the density_k entries of largest magnitude are kept
        elected = sign(sum_k w_k d_k)                        (vote "count": sign(sum_k sign(w_k d_k)))
        out     = base + lambda * sum_{k agrees} w_k d_k / sum_{k agrees} |w_k|   (no division if not `normalize`)

    scope: magnitudes are compared within each tensor, or over the whole mapping. ties: of entries equal to the
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
    return _merge("ties", base, models, shared, own, out, out_dtype, nonfinite, buffers)


# --- from arguments to work -----------------------------------------------------------------------------------------


def _merge(
    method_name: str,
    base: Tensors | None,
    models: Tensors | Sequence[Tensors],
    shared: Mapping[str, Any],
    per_model: Mapping[str, Any],
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
    values, own_values = _parameters(method, given, shared, per_model, len(listed), problems)
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
        job = Job(name, first.numel(), values, own_values) if floats else None
        works.append(Work(name, job, inputs, merged[name]))
    finish(method, works, problems, nonfinite, buffers)
    made: Any = merged[""] if alone else merged
    answer: Tensors = made if out is None else out
    return answer


def finish(method: Method, works: Sequence[Work], problems: list[Problem], nonfinite: str, buffers: str) -> None:
    """The last checks, of all tensors together; then either all problems, or the merge."""
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
    carry_out(method, works, nonfinite)


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


# --- parameters -----------------------------------------------------------------------------------------------------


def _parameters(
    method: Method,
    given: Collection[str],
    shared: Mapping[str, Any],
    per_model: Mapping[str, Any],
    n_models: int,
    problems: list[Problem],
) -> tuple[dict[str, Scalar], list[dict[str, Scalar]]]:
    """Every parameter of the method: shared ones, and those of each model."""
    before = len(problems)
    if n_models < method.n_models[0]:
        problems.append(Problem(f"{method.name} merges at least {method.n_models[0]} model", found=f"{n_models}"))
    for key, parameter in (*method.shared.items(), *method.per_model.items()):
        if parameter.required and key not in given:
            problems.append(Problem(f"{method.name} needs `{key}`"))
    values = _defaults(method.shared)
    values |= {k: value_of(method, k, p, shared[k], problems) for k, p in method.shared.items() if k in given}
    own = [_defaults(method.per_model) for _ in range(n_models)]
    for key, parameter in method.per_model.items():
        if key not in given:
            continue
        numbers = _plain(per_model[key])
        numbers = numbers if isinstance(numbers, (list, tuple)) else [numbers] * n_models
        if len(numbers) != n_models:
            what = f"`{key}` must be a number, or one for each of {n_models} models"
            problems.append(Problem(what, found=f"{len(numbers)} numbers"))
        for mine, value in zip(own, numbers, strict=False):
            mine[key] = value_of(method, key, parameter, value, problems)
    if len(problems) == before:
        fault = method.check_given(given) or method.check(Job("", 1, values, own))
        if fault:
            problems.append(Problem(f"{method.name}: {fault}"))
    return values, own


def _defaults(parameters: Mapping[str, Parameter]) -> dict[str, Scalar]:
    return {key: parameter.default for key, parameter in parameters.items() if parameter.default is not None}


def value_of(method: Method, key: str, parameter: Parameter, value: Any, problems: list[Problem]) -> Scalar:
    """The value of a parameter, or one to go on with if it is wrong."""
    plain: Scalar = _plain(value)
    infinite = isinstance(plain, float) and not math.isfinite(plain)
    expected = "a finite number" if infinite else parameter.fault(plain)
    if expected:
        problems.append(Problem(f"`{key}` of {method.name} must be {expected}", found=str(value)))
        return parameter.default if parameter.default is not None else 1.0
    return plain


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value
