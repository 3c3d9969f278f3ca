"""What the candidates of a sweep are made from: a recipe each, endpoints included, and its plan."""

from __future__ import annotations

from pathlib import Path

import yaml

from ggez_merge.plan import Plan, make_plan
from ggez_merge.recipe import Recipe, parse_recipe
from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.space import candidate_recipe

# What an unmerged model has in common with the candidates beside it: which of its tensors count, and as what.
_KEPT = ("base_model", "dtype", "out_dtype", "missing", "buffers", "nonfinite", "tokenizer", "tokenizer_source")


def recipe_of(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe that makes a candidate; an endpoint without values is passed through in the base's layout."""
    if candidate.values or candidate.role == "candidate":
        return candidate_recipe(recipe, candidate)
    kept = {key: recipe.document.data[key] for key in _KEPT if key in recipe.document.data}
    data = {"merge_method": "passthrough", **kept, "models": [{"model": candidate.model}]}
    return parse_recipe(yaml.safe_dump(data, allow_unicode=True), recipe.path)


def plan_of(recipe: Recipe, candidate: Candidate, folder: Path) -> Plan:
    """The plan of a candidate, as if it were written to `folder`. Raises Refused."""
    return make_plan(recipe_of(recipe, candidate), folder)
