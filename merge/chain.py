"""Several merges in one recipe file: every document with a `name` is a stage, which others merge under that name.

    name: regions                      # a stage: nothing of it is written, unless it has an `output` of its own
    merge_method: linear
    models: [{model: ./sea, parameters: {weight: 1}}, {model: ./latam, parameters: {weight: 1}}]
    ---
    merge_method: linear               # the document without a name is written; if all have one, the last is
    base_model: ./global
    models: [{model: regions}]
    parameters: {ratio: 0.3}
    output: {path: ./merged}

Documents stand in any order. `--set parameters.ratio=0.4` is about the one that is written,
`--set regions:dtype=float32` about the stage of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ggez_merge.check import nearest
from ggez_merge.errors import Problem
from ggez_merge.yaml_lines import Document, override

NAME = re.compile(r"\w[\w.-]*")
MOST_DOCUMENTS = 64  # a tensor of a stage is computed by calls as deep as the chain is long


@dataclass(frozen=True)
class Use:
    """A model that a document names; there: whether a folder or a file is called so."""

    path: str
    revision: str | None
    there: bool
    place: str


@dataclass(frozen=True)
class Link:
    """One document: its name, what else is called so, and the models that it uses."""

    name: str | None
    place: str
    namesake: str | None
    uses: tuple[Use, ...]


def override_all(documents: Sequence[Document], overrides: Sequence[str], problems: list[Problem]) -> None:
    """Apply `--set` overrides, each to the document that it names, or to the one that is written."""
    names = {name: document for document in documents if isinstance(name := document.data.get("name"), str)}
    last = documents[_written([document.data.get("name") for document in documents])]
    for given in overrides:
        place = f"--set {given}"
        name, colon, rest = given.partition(":")
        if colon and name in names:
            override(names[name], rest, place, problems)
        elif colon and len(documents) > 1 and re.fullmatch(r"[\w-]+", name):
            what = f"no document of the recipe is called {name!r}"
            problems.append(Problem(what, place, expected=", ".join(names), remedy=nearest(name, names)))
        else:
            override(last, given, place, problems)


def _written(names: Sequence[object]) -> int:
    """Which document is written: the (first) one without a name, else the last."""
    return names.index(None) if None in names else len(names) - 1


def ordered(links: Sequence[Link], problems: list[Problem]) -> list[int]:
    """The documents, each after those that it uses, and at the end the one that is written."""
    last = _written([link.name for link in links])
    if len(links) == 1:
        return [last]
    if len(links) > MOST_DOCUMENTS:
        what, expected = "the recipe has too many documents", f"at most {MOST_DOCUMENTS}"
        problems.append(Problem(what, links[0].place, expected=expected, found=str(len(links))))
        return [last]
    numbers: dict[str, int] = {}
    for number, link in enumerate(links):
        if link.name is None and number != last:
            what, remedy = "two documents have no name", "name all but the one that is to be written"
            problems.append(Problem(what, link.place, found=f"also {links[last].place}", remedy=remedy))
        elif link.name in numbers:
            what = f"two documents are called {link.name!r}"
            problems.append(Problem(what, link.place, found=f"first at {links[numbers[link.name]].place}"))
        elif link.name is not None:
            numbers[link.name] = number
    problems += _misnamed(links, numbers, last)
    order: list[int] = []
    waiting = [*range(len(links))]
    while ready := [n for n in waiting if all(numbers.get(use.path, -1) in (-1, *order) for use in links[n].uses)]:
        order += ready
        waiting = [number for number in waiting if number not in ready]
    if waiting:
        problems.append(_circle(links, numbers, waiting))
    return [*(number for number in order if number != last), last]


def _misnamed(links: Sequence[Link], numbers: dict[str, int], last: int) -> Iterable[Problem]:
    """Names that nobody uses, that mean two things, or nothing."""
    used = {use.path for link in links for use in link.uses}
    for name, number in numbers.items():
        link = links[number]
        if link.namesake:
            what, remedy = f"{name!r} is a document, and a folder or a file", "give the document another name"
            yield Problem(what, link.place, found=link.namesake, remedy=remedy)
        if number != last and name not in used:
            remedy = "remove it, or name it as a model; what is written is the document without a name, else the last"
            yield Problem(f"no document uses {name!r}", link.place, remedy=remedy)
    for use in (use for link in links for use in link.uses):
        if use.path in numbers and use.revision:
            what, remedy = f"{use.path!r} is a document of this recipe, and has no revisions", f"write {use.path}"
            yield Problem(what, use.place, found=f"{use.path}@{use.revision}", remedy=remedy)
        elif use.path not in numbers and NAME.fullmatch(use.path) and not use.there:
            what = "neither a document nor a folder is called so"
            yield Problem(what, use.place, found=use.path, remedy=nearest(use.path, numbers))


def _circle(links: Sequence[Link], numbers: dict[str, int], waiting: Sequence[int]) -> Problem:
    """The way from a document over one that it needs, and one that this needs, until they come again."""
    way: dict[int, str] = {}
    at = waiting[0]
    while at not in way:
        use = next(use for use in links[at].uses if numbers.get(use.path) in waiting)
        way[at] = f"{use.path} ({use.place})"
        at = numbers[use.path]
    said = [*way.values()][[*way].index(at) :]
    return Problem(
        "documents need each other", links[at].place, found=f"{links[at].name} uses {', which uses '.join(said)}"
    )
