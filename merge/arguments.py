"""The parameters of a call: what a method is told of a tensor, or of each of its parts, from numbers and arrays."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ggez_merge.errors import Problem
from ggez_merge.methods.method import Job, Method, Parameter
from ggez_merge.parameters import Scalar
from ggez_merge.untrusted import some

Index = tuple[int, ...]  # of a part, along the axes that arrays have; () is the whole
Values = tuple[dict[str, Scalar], list[dict[str, Scalar]]]  # the parameters that all models share, and each model's own
Table = dict[Index, Scalar]  # the values of one parameter; one at () is for every part


def parameters(
    method: Method,
    given: Collection[str],
    shared: Mapping[str, Any],
    per_model: Mapping[str, Any],
    n_models: int,
    axes: Sequence[str],
    problems: list[Problem],
) -> dict[Index, Values]:
    """Every parameter of the method for each part of a tensor, in row-major order.

    axes: the names of the axes that arrays have. Without any there is one part, the whole, and no array.
    """
    before = len(problems)
    if n_models < method.n_models[0]:
        problems.append(Problem(f"{method.name} merges at least {method.n_models[0]} model", found=f"{n_models}"))
    for key, parameter in (*method.shared.items(), *method.per_model.items()):
        if parameter.required and key not in given:
            problems.append(Problem(f"{method.name} needs `{key}`"))
    tables: dict[str, Table] = {}  # by what the user calls it: `lambda`, or `weight[1]`
    labels: dict[str, list[str]] = {}  # of each model's
    for key, parameter in method.shared.items():
        if key in given:
            tables[key] = _table(method, key, parameter, plain(shared[key]), axes, problems)
    for key, parameter in method.per_model.items():
        if key in given:
            of_each = _of_each(key, plain(per_model[key]), n_models, axes, problems)
            labels[key] = [label for label, _ in of_each]
            tables |= {label: _table(method, label, parameter, value, axes, problems) for label, value in of_each}
    shape = _shape(tables, axes, problems) if len(problems) == before else ()

    def values(index: Index) -> Values:
        def at(label: str) -> Scalar:
            return tables[label].get(index, tables[label].get((), 1.0))

        every = _defaults(method.shared) | {key: at(key) for key in method.shared if key in tables}
        own = [{key: at(of[k]) for key, of in labels.items() if k < len(of)} for k in range(n_models)]
        return every, [_defaults(method.per_model) | mine for mine in own]

    parts = {index: values(index) for index in np.ndindex(shape)}
    if len(problems) == before:
        problems += _faults(method, given, parts, axes)
    return parts


def value_of(method: Method, label: str, parameter: Parameter, value: Any, problems: list[Problem]) -> Scalar:
    """The value of a parameter, or one to go on with if it is wrong. label: what the user calls it."""
    number: Scalar = plain(value)
    infinite = isinstance(number, float) and not math.isfinite(number)
    expected = "a finite number" if infinite else parameter.fault(number)
    if expected:
        problems.append(Problem(f"`{label}` of {method.name} must be {expected}", found=str(value)))
        return parameter.default if parameter.default is not None else 1.0
    return number


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's numbers and lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [plain(element) for element in value] if isinstance(value, (list, tuple)) else value


def _of_each(
    key: str, value: Any, n_models: int, axes: Sequence[str], problems: list[Problem]
) -> list[tuple[str, Any]]:
    """What a parameter is for each model, and what the user calls that."""
    if not isinstance(value, list) or (axes and n_models == 1 and len(value) != 1):
        return [(key, value)] * n_models
    if len(value) != n_models:
        what = f"`{key}` must be a number, or one for each of {n_models} models"
        remedy = "pass a list with a number or an array for each model" if axes else None
        problems.append(Problem(what, found=f"{len(value)} {'elements' if axes else 'numbers'}", remedy=remedy))
        return []
    return [(f"{key}[{k}]", element) for k, element in enumerate(value)]


def _table(
    method: Method, label: str, parameter: Parameter, value: Any, axes: Sequence[str], problems: list[Problem]
) -> Table:
    """The values of a parameter: of each part if it is an array, else of all of them."""
    if not (axes and isinstance(value, list) and parameter.kind == "number"):
        return {(): value_of(method, label, parameter, value, problems)}
    cells = np.array(value, dtype=object)  # ragged lists stay lists, which are no numbers
    if cells.ndim != len(axes) or not cells.size:
        problems.append(
            Problem(
                f"`{label}` of {method.name} must be a number, or an array with the axes that `axes` names last",
                expected=f"the axes {', '.join(axes)}",
                found=f"shape {list(cells.shape)}",
                remedy="name an axis for every dimension, or change the array",
            )
        )
    return {
        index: value_of(method, label + "".join(f"[{i}]" for i in index), parameter, cells[index], problems)
        for index in np.ndindex(cells.shape)
    }


def _shape(tables: Mapping[str, Table], axes: Sequence[str], problems: list[Problem]) -> Index:
    """The shape of all arrays."""
    shapes = {label: tuple(n + 1 for n in max(table)) for label, table in tables.items() if () not in table}
    if axes and not shapes:
        what = "`axes` is given, but no parameter is an array"
        expected = f"numbers along the axes {', '.join(axes)}"
        remedy = "leave out `axes`, or pass an array"
        problems.append(Problem(what, place="axes", expected=expected, remedy=remedy))
    first = next(iter(shapes), "")
    for label, shape in shapes.items():
        if shape != shapes[first]:
            what = f"`{label}` and `{first}` disagree on the shape of arrays"
            remedy = "pass arrays of one shape, or numbers"
            problems.append(Problem(what, None, None, str(list(shapes[first])), str(list(shape)), remedy))
    return shapes.get(first, ())


def _faults(
    method: Method, given: Collection[str], parts: Mapping[Index, Values], axes: Sequence[str]
) -> list[Problem]:
    """What the method has against parameters that are right by themselves, and in which parts."""
    places = defaultdict(list)
    for index, (shared, own) in parts.items():
        fault = method.check_given(given) or method.check(Job("", 1, shared, own))
        if fault:
            places[fault].append(" ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True)))
    return [Problem(f"{method.name}: {fault}", place=some(where) or None) for fault, where in places.items()]


def _defaults(parameters: Mapping[str, Parameter]) -> dict[str, Scalar]:
    return {key: parameter.default for key, parameter in parameters.items() if parameter.default is not None}
