"""The candidates of a sweep: which values the recipe's `sweep:` puts where.

    sweep:
      ratio: [0, 0.05, 0.1, 0.25, 0.5, 0.75, 1]         # short for parameters.ratio
      components.vision_tower.ratio: "0:1:0.1"          # from 0 to 1 in steps of 0.1, both ends included
      models.0.parameters.weight: 0.3                   # one value; keys with a dot in quotes, as for --set
      mode: grid                                        # every combination; or zip: the first values, the second ones …
      refine: 3                                         # rounds that halve the distances around the best so far
      limit: 1000                                       # more candidates than this are refused

Numbers are decimal: 0:1:0.1 has 0.3, not 0.30000000000000004. Without any parameter, `ratio` has the values above. The
base and each regional model as it was before merging are always candidates, for the curve says little without its ends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import product
from typing import Any

from ggez_merge.check import Check, listed, nearest
from ggez_merge.errors import Problem, Refused
from ggez_merge.methods import METHODS
from ggez_merge.methods.method import Parameter
from ggez_merge.recipe import Recipe, parse_recipe
from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.scores_file import COLUMNS
from ggez_merge.yaml_lines import keys_of, override

DEFAULT_RATIOS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
DEFAULT_LIMIT = 1000
MOST_ROUNDS = 20
SETTINGS = ("mode", "refine", "limit")

_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)\s*"
_RANGE = re.compile(f"{_NUMBER}:{_NUMBER}:{_NUMBER}")


@dataclass(frozen=True)
class Space:
    """What is swept. axes: values by the path of the parameter. ends: the base, and the unmerged regional models.

    refine: rounds after the first. whole: the axes of whole numbers (seeds), which have no midpoints.
    """

    axes: Mapping[str, tuple[float, ...]]
    ends: tuple[Candidate, ...]
    mode: str = "grid"
    refine: int = 0
    limit: int = DEFAULT_LIMIT
    whole: frozenset[str] = frozenset()


def read_space(recipe: Recipe) -> Space:
    """The recipe's `sweep:`. Raises Refused with everything that is wrong in it."""
    problems: list[Problem] = []
    check = Check(recipe.document, recipe.path, problems)
    given = dict(check.mapping(("sweep",), recipe.document.data.get("sweep")))
    mode = check.choice(("sweep", "mode"), given.get("mode"), ("grid", "zip"), absent="grid")
    rounds = _count(check, "refine", given.get("refine"), 0, MOST_ROUNDS, absent=0)
    limit = _count(check, "limit", given.get("limit"), 1, 10**6, absent=DEFAULT_LIMIT)
    paths = [key for key in given if key not in SETTINGS]
    axes: dict[str, tuple[float, ...]] = {}
    whole: set[str] = set()
    seen: dict[str, str] = {}
    if not paths and not problems:
        problems += _no_default(recipe)
        axes["ratio"] = DEFAULT_RATIOS
    for key in paths:
        parameter = _parameter(check, recipe, key)
        if parameter is None:
            continue
        setting = _setting(key, recipe)
        if setting in seen:
            check.refuse(("sweep", key), f"`{key}` and `{seen[setting]}` are the same parameter")
        seen[setting] = key
        name = setting if key in COLUMNS else key  # a scores file has one column for the axis, another of that name
        axes[name] = _values(check, key, given[key], parameter, limit)
        whole |= {name} if parameter.kind == "integer" else set()
    if not problems:
        problems += _sizes(recipe, axes, mode, limit)
    if recipe.base_model is None or recipe.base_model.path in _stage_names(recipe):
        what, remedy = (
            "a sweep needs a base: gain and retention are measured against it",
            "add `base_model`, a checkpoint",
        )
        problems.append(Problem(what, recipe.place("base_model"), remedy=remedy))
    if problems:
        raise Refused(problems)
    return Space(axes, tuple(_ends(recipe, axes)), mode, rounds, limit, frozenset(whole))


def candidates(space: Space) -> list[Candidate]:
    """The first round: the base, every point of the grid (or of the lists side by side), the regional models."""
    values = zip(*space.axes.values(), strict=True) if space.mode == "zip" else product(*space.axes.values())
    grid = [Candidate(dict(zip(space.axes, point, strict=True))) for point in values]
    taken = [end.values for end in space.ends]
    merged = [candidate for candidate in grid if candidate.values not in taken]
    base = [end for end in space.ends if end.role == "base"]
    return [*base, *merged, *(end for end in space.ends if end.role != "base")]


def refine(space: Space, tried: Sequence[Candidate], best: Candidate) -> list[Candidate]:
    """The next round: halfway from the best to its neighbours on each axis, what was tried before left out.

    Neighbours are the nearest values of that axis among all that were tried; with `zip`, the nearest points along the
    first axis. At most so many that the sweep stays within its limit; none around an endpoint without values.
    """
    if not best.values:
        return []
    known = [candidate.values for candidate in tried if candidate.values]
    found: list[dict[str, float]] = []
    for axis in [*space.axes][: 1 if space.mode == "zip" else None]:
        here = best.values[axis]
        below = max((values for values in known if values[axis] < here), key=lambda v: v[axis], default=None)
        above = min((values for values in known if values[axis] > here), key=lambda v: v[axis], default=None)
        for other in (below, above):
            if other is None or axis in space.whole:
                continue
            moved = [*space.axes] if space.mode == "zip" else [axis]
            found.append({**best.values, **{path: _midpoint(best.values[path], other[path]) for path in moved}})
    new = [values for values in found if values not in known]
    return [Candidate(values) for values in new[: max(space.limit - len(tried), 0)]]


def candidate_recipe(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe that merges a candidate: the sweep's recipe with the candidate's values in their places.

    Raises Refused, as for any recipe. An endpoint without values has none: its model is evaluated as it is.
    """
    overrides = [f"{_setting(path, recipe)}={_text(value)}" for path, value in candidate.values.items()]
    return parse_recipe(recipe.text, recipe.path, overrides)


def _stage_names(recipe: Recipe) -> set[str]:
    return {stage.name for stage in recipe.stages if stage.name}


def _split(path: str, recipe: Recipe) -> tuple[Recipe, str, list[str]]:
    """Of a path: the stage that it is about (or the recipe), the prefix that says so, and the keys there."""
    name, colon, rest = path.partition(":")
    for stage in recipe.stages:
        if colon and stage.name == name:
            return stage, name + colon, keys_of(rest + "=")[0]
    return recipe, "", keys_of(path + "=")[0]


def _setting(path: str, recipe: Recipe) -> str:
    """The path as `--set` takes it: a parameter by its name alone is the recipe's."""
    _, prefix, keys = _split(path, recipe)
    return f"{prefix}parameters.{path[len(prefix) :]}" if len(keys) == 1 else path


def _parameter(check: Check, recipe: Recipe, path: str) -> Parameter | None:
    """The method's parameter at a path, after checks that a candidate can set it there and that it counts."""
    where = ("sweep", path)
    own, _, keys = _split(path, recipe)
    keys = ["parameters", *keys] if len(keys) == 1 else keys
    at = 2  # where the parameter's name is
    if keys[:1] != ["components"]:
        at = keys.index("parameters") + 1 if "parameters" in keys else len(keys)
    if at >= len(keys) or keys[0] not in ("parameters", "components", "models", "slices", "modules"):
        expected = "such as `ratio`, `components.vision_tower.ratio` or `models.0.parameters.weight`"
        check.refuse(where, f"`{path}` is not the path of a parameter", expected, None, nearest(path, SETTINGS))
        return None
    name, method = keys[at], METHODS.get(own.merge_method)
    if method is None:
        check.refuse(("merge_method",), "there is no such merge method", listed(METHODS), own.merge_method)
        return None
    known = {**method.per_model, **method.shared}
    if name not in known:
        numbers = [key for key, parameter in known.items() if parameter.kind in ("number", "integer")]
        remedy = nearest(name, [*numbers, *SETTINGS])
        check.refuse(where, f"{method.name} takes no parameter `{name}`", f"one of {listed(numbers)}", None, remedy)
        return None
    if known[name].kind not in ("number", "integer"):
        check.refuse(
            where, f"`{name}` is not a number, and a sweep varies numbers", remedy="make a recipe for each choice"
        )
        return None
    if name in method.shared and at >= 3 and keys[at - 3] in ("models", "sources"):
        check.refuse(where, f"`{name}` is a parameter of the whole merge, not of one model", remedy=f"sweep `{name}`")
        return None
    covered = [
        name in source.parameters or name in piece.parameters or name in module.parameters
        for module in own.modules
        for piece in module.slices
        for source in piece.sources
    ]
    if keys[0] == "parameters" and covered and all(covered):
        remedy = f"sweep `models.0.parameters.{name}`, or remove the models' own `{name}`"
        check.refuse(where, f"`{path}` has no effect: every model has a `{name}` of its own", remedy=remedy)
        return None
    trial = replace(own.document, data=deepcopy(own.document.data), lines={}, overrides={})
    before = len(check.problems)
    override(trial, ".".join(_quoted(key) for key in keys) + "=0", check.document.place(*where), check.problems)
    return known[name] if len(check.problems) == before else None


def _quoted(key: str) -> str:
    return f"'{key}'" if '"' in key else f'"{key}"'


def _values(check: Check, path: str, given: Any, parameter: Parameter, limit: int) -> tuple[float, ...]:
    """A list of numbers and ranges, or one of them; each value once, in their order."""
    where = ("sweep", path)
    if isinstance(given, list) and not given:
        check.refuse(where, f"`{path}` has no values")
    values: dict[float, None] = {}
    for i, element in enumerate(given if isinstance(given, list) else [given]):
        here = (*where, i) if isinstance(given, list) else where
        if isinstance(element, str) and (match := _RANGE.fullmatch(element)):
            start, stop, step = (Decimal(number) for number in match.groups())
            if step <= 0 or stop < start:
                check.refuse(here, "this range is empty", "start:stop:step with stop >= start, step > 0", element)
                continue
            count = int((stop - start) / step) + 1 if (stop - start) / step < limit else limit + 1
            if count > limit:
                check.refuse(here, "this range has too many values", f"at most {limit}", element)
                continue
            new = [float(start + k * step) for k in range(count)]
        elif isinstance(element, int | float) and not isinstance(element, bool) and math.isfinite(element):
            new = [float(element)]
        else:
            expected = 'numbers, or a range "start:stop:step"'
            check.refuse(here, "this is not a value of a sweep", expected, "nothing" if element is None else element)
            continue
        faulty = [value for value in new if parameter.fault(value)]
        if faulty:
            check.refuse(here, f"`{path}` must be {parameter.fault(faulty[0])}", found=_text(faulty[0]))
        values |= dict.fromkeys(value + 0.0 for value in new)  # -0 is 0
    return tuple(values)


def _count(check: Check, key: str, value: Any, low: int, high: int, absent: int) -> int:
    if type(value) is int and low <= value <= high:
        return value
    if value is not None:
        check.refuse(("sweep", key), f"`{key}` must be a whole number.", f"{low} to {high}", value)
    return absent


def _sizes(recipe: Recipe, axes: Mapping[str, tuple[float, ...]], mode: str, limit: int) -> Iterator[Problem]:
    lengths = {path: len(values) for path, values in axes.items()}
    said = ", ".join(f"{path}: {length}" for path, length in lengths.items())
    if mode == "zip" and len(set(lengths.values())) > 1:
        what = "with `mode: zip` all parameters need equally many values"
        yield Problem(what, recipe.place("sweep", "mode"), found=said, remedy="add values, or use `mode: grid`")
    count = max(lengths.values()) if mode == "zip" else math.prod(lengths.values())
    if count > limit:
        remedy = f"give fewer values, or allow more: `limit: {count}`"
        place, expected = recipe.place("sweep"), f"at most {limit}"
        yield Problem(f"the sweep has {count:,} candidates", place, None, expected, said, remedy)


def _no_default(recipe: Recipe) -> Iterator[Problem]:
    """Why there is no `ratio` to sweep, where the recipe does not say what to sweep."""
    given = {key for module in recipe.modules for piece in module.slices for s in piece.sources for key in s.parameters}
    sources = [source for module in recipe.modules for piece in module.slices for source in piece.sources]
    if recipe.merge_method != "linear" or len(sources) != 1 or "weight" in given | recipe.parameters.keys():
        method = METHODS.get(recipe.merge_method)
        known = {**method.per_model, **method.shared} if method else {}
        numbers = listed(key for key, parameter in known.items() if parameter.kind == "number")
        what, remedy = "the recipe does not say what to sweep", "write, for example, sweep: {weight: [0.1, 0.3, 0.5]}"
        yield Problem(what, recipe.place("sweep"), expected=f"one of {numbers}" if numbers else None, remedy=remedy)


def _ends(recipe: Recipe, axes: Mapping[str, tuple[float, ...]]) -> Iterator[Candidate]:
    """The base and the regional models; as ratio 0 and 1 where one ratio for all tensors is what is swept."""
    stages = _stage_names(recipe)
    base = str(recipe.base_model)
    models = dict.fromkeys(
        str(source.model)
        for each in (recipe, *recipe.stages)
        for module in each.modules
        for piece in module.slices
        for source in piece.sources
        if source.model.path not in stages and str(source.model) != base
    )
    plain = (
        [_setting(path, recipe) for path in axes] == ["parameters.ratio"]
        and len(models) == 1
        and not recipe.stages
        and not any("ratio" in values for values in recipe.components.values())
    )
    ((path, _),) = axes.items() if plain else (("", ()),)
    yield Candidate({path: 0.0} if plain else {}, "base", base)
    for model in models:
        yield Candidate({path: 1.0} if plain else {}, "regional", model)


def _midpoint(one: float, other: float) -> float:
    return float((Decimal(repr(one)) + Decimal(repr(other))) / 2)


def _text(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
