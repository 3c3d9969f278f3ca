"""Checks of plain data from a recipe: what has the wrong shape is noted by line and read as absent."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ggez_merge.errors import Problem
from ggez_merge.untrusted import printable
from ggez_merge.yaml_lines import Document, Where


class Check:
    """One reading of a document. Methods take the place of a value, and the value: None if it is absent.

    What is wrong goes to `problems` and reading goes on, so that all of it is found at once. `path` is the
    recipe's file, beside which relative paths are looked for.
    """

    def __init__(self, document: Document, path: Path | None, problems: list[Problem]) -> None:
        self.document = document
        self.path = path
        self.problems = problems

    def refuse(
        self,
        where: Where,
        what: str,
        expected: str | None = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        shown = None if found is None else printable(found if isinstance(found, str) else repr(found))
        self.problems.append(Problem(printable(what), self.document.place(*where), None, expected, shown, remedy))

    def mapping(
        self,
        where: Where,
        value: Any,
        keys: Sequence[str] | None = None,
        unsupported: Mapping[str, str] | None = None,
        needed: bool = False,
    ) -> dict[str, Any]:
        """A mapping; empty if it is absent or wrong. With `keys` given, others are refused, nulls left out.

        unsupported: keys that are known but refused, and what to do about each. needed: it must have keys.
        """
        if value is None and not needed:
            return {}
        if not isinstance(value, dict) or (needed and not value):
            expected = "a mapping" + (f" with some of {listed(keys)}" if keys else "")
            found = "nothing" if value is None else value
            self.refuse(where, f"{_named(where)} must be a mapping.", expected, found)
            return {}
        if keys is None:
            return value
        for key in value:
            if unsupported and key in unsupported:
                self.refuse((*where, key), f"`{key}` is not supported here", remedy=unsupported[key])
            elif key not in keys:
                remedy = nearest(key, keys)
                if remedy is None and "parameters" in keys:
                    remedy = "if it is a parameter of the merge method, put it under `parameters`"
                self.refuse((*where, key), f"`{key}` is not a key here", f"one of {listed(keys)}", None, remedy)
        return {key: given for key, given in value.items() if key in keys and given is not None}

    def elements(self, where: Where, value: Any) -> list[tuple[Where, Any]]:
        """The elements of a list, each with its place; it must have some, unless it is absent."""
        if isinstance(value, list) and value:
            return [((*where, i), element) for i, element in enumerate(value)]
        if value is not None:
            self.refuse(where, f"{_named(where)} must be a list of at least one element.", found=value)
        return []

    def required(self, where: Where, section: dict[str, Any], key: str) -> bool:
        if key not in section:
            self.refuse(where, f"`{key}` is missing")
        return key in section

    def exactly_one(self, where: Where, section: dict[str, Any], keys: Sequence[str]) -> str | None:
        """Which of `keys` is given: the first, should there be more."""
        given = [key for key in keys if key in section]
        if len(given) != 1:
            here = (*where, given[1]) if given else where
            self.refuse(here, f"exactly one of {listed(keys)} must be given", None, listed(given) or "none of them")
        return given[0] if given else None

    def text(self, where: Where, value: Any) -> str | None:
        if isinstance(value, str) and value:
            return value
        if value is not None:
            remedy = "put it in quotes" if isinstance(value, int | float) else None
            self.refuse(where, f"{_named(where)} must be text.", "text", value, remedy)
        return None

    def choice(self, where: Where, value: Any, choices: Sequence[str], absent: str) -> str:
        if isinstance(value, str) and value in choices:
            return value
        if value is not None:
            remedy = nearest(str(value), choices)
            self.refuse(where, f"{_named(where)} must be one of {listed(choices)}.", None, value, remedy)
        return absent


def listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """ "did you mean `models` or `modules`?", naming the (at most two) words that are near."""
    near = difflib.get_close_matches(word, list(words), n=2)
    return f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else None


def _named(where: Where) -> str:
    return f"`{where[-1]}`" if where and isinstance(where[-1], str) else "an element"
