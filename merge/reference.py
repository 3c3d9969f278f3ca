"""How a recipe names a model (a folder, a file or a hub id, perhaps with a revision or an adapter) and other paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggez_merge.check import Check
from ggez_merge.yaml_lines import Where

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_HUB = re.compile(r"[\w.\-]+/[\w.\-]+(@.+)?")
_UNSUPPORTED = {
    "override_architecture": "remove it: tensors are matched by name, whatever the architecture",
}


@dataclass(frozen=True)
class ModelReference:
    """A folder, a file or a hub id, and which revision of it; with an `adapter`, that base with the adapter.

    An adapter without a `path` belongs to the recipe's base_model or, if there is none, to the base that it names.
    """

    path: str
    revision: str | None = None
    adapter: ModelReference | None = None

    def __str__(self) -> str:
        base = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return "+".join(str(part) for part in (base, self.adapter) if part)


Reader = Callable[[str, "Path | None"], "ModelReference | None"]


def resolve_path(reference: str, recipe_path: Path | None) -> Path | None:
    """The existing file or folder of this name: looked for beside the recipe, then in the working folder."""
    for folder in (recipe_path.parent, Path()) if recipe_path else (Path(),):
        if reference and os.path.exists(folder / reference):  # which, unlike Path.exists, never raises
            return folder / reference
    return None


def read_reference(check: Check, where: Where, value: Any) -> ModelReference | None:
    """A model as "path[@revision][+adapter[@revision]]" or {model: {path, revision}, lora: …}, as in mergekit.

    {adapter: …} is an adapter of the recipe's base_model. What exists under its whole name is taken whole: `@` and `+`
    may be part of a folder's name.
    """
    if not isinstance(value, dict):
        return _read_text(check, where, value, parse_reference)
    keys = ("model", "lora", "adapter")
    entry = check.mapping(where, value, keys, _UNSUPPORTED, needed=True)
    given = [key for key in keys[1:] if key in entry]
    if len(given) == 2:
        check.refuse((*where, "lora"), "`lora` and `adapter` are the same thing", "one of them")
    if not given and not check.required(where, entry, "model"):
        return None
    parts = [_read_part(check, (*where, key), entry[key]) if key in entry else None for key in ("model", *given[:1])]
    if len(parts) == 1:
        return parts[0]
    base, adapter = parts
    if adapter is None or ("model" in entry and base is None):
        return None
    return ModelReference(base.path, base.revision, adapter) if base else ModelReference("", None, adapter)


def _read_part(check: Check, where: Where, value: Any) -> ModelReference | None:
    """A model or an adapter alone: text, or {path, revision}."""
    if not isinstance(value, dict):
        return _read_text(check, where, value, _revised)
    entry = check.mapping(where, value, ("path", "revision"))
    check.required(where, entry, "path")
    path = read_path(check, (*where, "path"), entry.get("path"))
    revision = check.text((*where, "revision"), entry.get("revision"))
    return ModelReference(path, revision) if path else None


def _read_text(check: Check, where: Where, value: Any, read: Reader) -> ModelReference | None:
    text = read_path(check, where, value)
    found = read(text, check.path) if text else None
    if text and found is None:
        check.refuse(where, "this does not name a model", "path[@revision], or base+adapter", text)
    return found


def parse_reference(text: str, recipe_path: Path | None = None) -> ModelReference | None:
    """A model as text; None if it names none.

    It is split at the last `+` that has something that exists, or could be a hub id, on both sides, else at the last.
    """
    splits = [(text[:at], text[at + 1 :]) for at in reversed(range(len(text))) if text[at] == "+"]
    if not splits or resolve_path(text, recipe_path) or resolve_path(text.rpartition("@")[0], recipe_path):
        return _revised(text, recipe_path)
    there = (split for split in splits if all(resolve_path(s, recipe_path) or _HUB.fullmatch(s) for s in split))
    base, adapter = (_revised(part, recipe_path) for part in next(there, splits[0]))
    return ModelReference(base.path, base.revision, adapter) if base and adapter else None


def _revised(text: str, recipe_path: Path | None) -> ModelReference | None:
    if resolve_path(text, recipe_path):
        return ModelReference(text)
    path, at, revision = text.rpartition("@") if "@" in text else (text, "", "")
    return ModelReference(path, revision or None) if path and (revision or not at) else None


def read_path(check: Check, where: Where, value: Any) -> str | None:
    """Text in which $VARIABLE, ${VARIABLE} and a leading ~ are expanded."""
    text = check.text(where, value)
    if text is None:
        return None
    for match in _VARIABLE.finditer(text):
        variable = match[1] or match[2]
        if not os.environ.get(variable):
            check.refuse(
                where,
                f"the environment variable `{variable}` is not set or empty",
                found=text,
                remedy="set it",
            )
            return None
    return os.path.expanduser(_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text))
