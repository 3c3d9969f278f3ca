"""Values inside a row: columns, dotted names, elements of lists and of lists that are written as text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_STEP = re.compile(r"\.?([^.\[\]]+)|\[([^\[\]]+)\]")


def value_of(fields: Mapping[str, Any], name: str) -> Any:
    """The value that a column name stands for. Raises KeyError if the row has none.

    A column of exactly this name wins; else the longest column that the name begins with, and steps from there:
    "country.id", "answers[0]", and "Subset[1]" or "Subset.1" of the text "('Indonesian', 'Indonesia')".
    """
    if name in fields:
        return fields[name]
    for end in range(len(name) - 1, 0, -1):
        if name[end] in ".[" and name[:end] in fields:
            return _follow(fields[name[:end]], name[end:], name)
    raise KeyError(name)


def _follow(value: Any, rest: str, name: str) -> Any:
    position = 0
    while position < len(rest):
        step = _STEP.match(rest, position)
        if step is None:
            raise KeyError(name)
        position, key = step.end(), step[1] or step[2]
        if isinstance(value, str):
            value = parsed(value)
        try:
            value = value[key] if isinstance(value, Mapping) else value[int(key)] if _is_list(value) else None
        except (KeyError, IndexError, ValueError):
            raise KeyError(name) from None
        if value is None:
            raise KeyError(name)
    return value


def parsed(text: str) -> Any:
    """The list, tuple or mapping that a text writes, in JSON or in Python; the text itself if it writes none."""
    if text.strip()[:1] not in ("(", "[", "{"):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, Mapping) or _is_list(value):
            return value
    return text


def many(value: Any) -> list[Any]:
    """The elements of a list, also of one written as text; else the value alone, and nothing for None or ""."""
    value = parsed(value) if isinstance(value, str) else value
    if _is_list(value):
        return list(value)
    return [] if value is None or value == "" else [value]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def head(column: str, name: str) -> bool:
    """Whether a column is the one that a name may begin with."""
    return name == column or name.startswith((f"{column}.", f"{column}["))
