"""Which parameters apply to which tensor: components, scopes, filters and gradients, and what reached nothing.

The first scope that gives a value wins:
    components > a model's (or slice source's) own > its slice > its module > the recipe's `parameters` > the default.
Within a scope given as a list of filters, the first filter that is part of the tensor's name wins.
Of several lines of `components:`, the first that selects the tensor wins.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ggez_merge.check import nearest
from ggez_merge.components import component, layer
from ggez_merge.errors import Problem
from ggez_merge.methods.method import Job, Method, Parameter
from ggez_merge.parameters import Filtered, Scalar, Value, evaluate, matching
from ggez_merge.recipe import Module, Recipe, Slice
from ggez_merge.selection import read_selection, remedy
from ggez_merge.untrusted import some
from ggez_merge.yaml_lines import Where

# LFM2's final norm is called as if it were that of its embeddings.
_LAST = re.compile(
    r"^(\w+\.){0,2}(conv_out|proj_out|norm_out|final_layer)\.|^(model\.)?(language_model\.)?embedding_norm\."
)


@dataclass(frozen=True)
class Scope:
    """One `parameters` mapping of the recipe, and where it stands; t: where its gradients are read, if not as usual."""

    where: Where
    values: Mapping[str, Value]
    t: float | None = None


@dataclass(frozen=True)
class Resolved:
    """A tensor's job, and the line that shaped it, for people: 'components "*.logit_scale"' or 'parameters'."""

    job: Job
    via: str


class Resolver:
    """Resolves one recipe's parameters, remembering which of its lines were used and what was wrong.

    blocks: of a UNet, by tensor.
    """

    def __init__(self, recipe: Recipe, method: Method, blocks: Mapping[str, str]) -> None:
        self.recipe = recipe
        self.method = method
        self._selections = {key: read_selection(key, blocks) for key in recipe.components}
        self._names: set[str] = set()
        self._used: set[Where] = set()
        self._incomplete: set[str] = set()  # tensors that lack a required parameter
        self._faults: dict[tuple[str, str | None, str | None], list[str]] = defaultdict(list)

    def resolve(self, name: str, n: int, module: Module, piece: Slice, models: Iterable[int], t: float) -> Resolved:
        """The job of one tensor.

        models: indices of the slice's sources that take part (the base among them left out); t: the tensor's place
        in its stack of layers, 0 for the first and 1 for the last, where gradients are read.
        """
        self._names.add(name)
        line, extra = self._component(name)
        above = [
            Scope((*piece.where, "parameters"), piece.parameters),
            Scope((*module.where, "parameters"), module.parameters),
            Scope(("parameters",), self.recipe.parameters),
        ]
        shared = self._values(self.method.shared, [*extra, *above], name, t)
        per_model = []
        for index in models:
            source = piece.sources[index]
            own = Scope((*source.where, "parameters"), source.parameters)
            per_model.append(self._values(self.method.per_model, [*extra, own, *above], name, t))
        job = Job(name, n, shared, per_model)
        fault = None if name in self._incomplete else self.method.check(job)
        if fault:
            self._faults[(f"{self.method.name}: {fault}", None, None)].append(name)
        return Resolved(job, line)

    def named(self, name: str) -> bool:
        """Whether a line of `components:` means this tensor's part of the model."""
        return any(selection.names(name) for selection in self._selections.values())

    def given(self) -> set[str]:
        """The names of all parameters that the recipe gives anywhere."""
        return {key for scope, _ in self._scopes() for key in scope.values}

    def problems(self) -> list[Problem]:
        """Everything wrong with the parameters: unknown names, bad values, lines that reached no tensor."""
        return [*self._unknown(), *self._bad_values(), *self._unused()]

    def _component(self, name: str) -> tuple[str, list[Scope]]:
        for key, selection in self._selections.items():
            if selection.takes(name):
                self._used.add(("components", key))
                scope = Scope(("components", key), self.recipe.components[key], selection.position(name))
                return f'components "{key}"', [scope]
        return "parameters", []

    def _values(
        self, parameters: Mapping[str, Parameter], scopes: Iterable[Scope], name: str, t: float
    ) -> dict[str, Scalar]:
        values: dict[str, Scalar] = {}
        for key, parameter in parameters.items():
            value, place = self._first(key, scopes, name, t)
            if value is None:
                if parameter.required:
                    self._incomplete.add(name)
                    self._faults[
                        (f"a required parameter of {self.method.name} is missing: `{key}`", None, None)
                    ].append(name)
                elif parameter.default is not None:
                    values[key] = parameter.default
                continue
            expected = parameter.fault(value)
            if expected:
                what = f"`{key}` of {self.method.name} must be {expected}"
                self._faults[(what, place, str(value))].append(name)
                value = parameter.default if parameter.default is not None else 1.0
            values[key] = value
        return values

    def _first(self, key: str, scopes: Iterable[Scope], name: str, t: float) -> tuple[Scalar | None, str | None]:
        for scope in scopes:
            if key not in scope.values:
                continue
            index = matching(scope.values[key], name)
            if index is None:
                continue
            self._used.add((*scope.where, key, index))
            at = t if scope.t is None else scope.t
            return evaluate(scope.values[key], name, at), self.recipe.place(*scope.where, key)
        return None, None

    def _scopes(self) -> Iterable[tuple[Scope, bool]]:
        """Every parameters mapping in the recipe; True for one that belongs to a single model."""
        yield Scope(("parameters",), self.recipe.parameters), False
        for key, values in self.recipe.components.items():
            yield Scope(("components", key), values), False
        for module in self.recipe.modules:
            if module.where:
                yield Scope((*module.where, "parameters"), module.parameters), False
            for piece in module.slices:
                if piece.where:
                    yield Scope((*piece.where, "parameters"), piece.parameters), False
                for source in piece.sources:
                    yield Scope((*source.where, "parameters"), source.parameters), True

    def _unknown(self) -> Iterable[Problem]:
        for scope, of_a_model in self._scopes():
            for key in scope.values:
                if key in self.method.per_model or (key in self.method.shared and not of_a_model):
                    continue
                place = self.recipe.place(*scope.where, key)
                if key in self.method.shared:
                    yield Problem(
                        f"`{key}` is a parameter of the whole merge, not of one model",
                        place=place,
                        remedy="move it to the top-level `parameters:`",
                    )
                    continue
                known = [*self.method.per_model, *self.method.shared]
                yield Problem(
                    f"{self.method.name} takes no parameter `{key}`",
                    place=place,
                    expected="one of " + ", ".join(known),
                    remedy=nearest(key, known) or "remove it, or choose the method that takes it",
                )

    def _bad_values(self) -> Iterable[Problem]:
        for (what, place, found), names in self._faults.items():
            yield Problem(what, place=place or self.recipe.place("merge_method"), tensor=some(names), found=found)

    def _unused(self) -> Iterable[Problem]:
        for key, selection in self._selections.items():
            place = self.recipe.place("components", key)
            fault = selection.fault(self._names)
            if fault:
                yield Problem(
                    f'components: "{key}": {fault}',
                    place=place,
                    remedy="name layers as `language_model.layers.0-7`, or by the stack: `unet.down_blocks.0-1`",
                )
            elif ("components", key) not in self._used:
                yield Problem(
                    f'components: "{key}" reaches no tensor', place=place, remedy=remedy(selection, self._names)
                )
        for scope, _ in self._scopes():
            for key, value in scope.values.items():
                for index, entry in enumerate(value if isinstance(value, list) else []):
                    if not isinstance(entry, Filtered) or entry.filter in (None, "*"):
                        continue
                    if (*scope.where, key, index) not in self._used:
                        yield Problem(
                            f"`{key}`: the filter {entry.filter!r} reaches no tensor",
                            place=self.recipe.place(*scope.where, key, index),
                            remedy="filters are parts of tensor names; of several that match, the first wins",
                        )


def gradient_position(name: str, n_layers: Mapping[str, int]) -> float:
    """Where a tensor stands in its stack of layers: i / (L - 1) for layer i of L (1 if L is 1).

    Outside the stack, what comes after it (the lm head, a projection into the joint space and its temperature, a
    pooling head, a final norm, a diffusion model's last convolution) takes the last value, everything else the first. A
    projector stands before the language model, whatever norms it has, and so do the norms of embeddings.
    n_layers: number of layers by the stack's prefix.
    """
    where = layer(name)
    if where is not None and where[0] in n_layers:
        count = n_layers[where[0]]
        return where[1] / (count - 1) if count > 1 else 1.0
    part = component(name)
    if part in ("projector", "embeddings"):
        return 0.0
    if part in ("lm_head", "projection", "logit_scale") or ".head." in name:
        return 1.0
    if _LAST.search(name):
        return 1.0
    around, owner = ["", "", *name.split(".")][-3:-1]
    closes = any(word in owner for word in ("norm", "ln_f", "ln_post"))
    opens = any(word in f"{around}.{owner}" for word in ("embed", "per_layer")) or "pre" in owner
    return 1.0 if closes and not opens else 0.0
