"""How a recipe names a model (a folder, a file or a hub id, perhaps with a revision) and other paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggez_merge.check import Check
from ggez_merge.yaml_lines import Where

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_UNSUPPORTED = {
    "lora": "merge the adapter into its base model first, and name the merged model here",
    "override_architecture": "remove it: tensors are matched by name, whatever the architecture",
}


@dataclass(frozen=True)
class ModelReference:
    """A folder, a file or a hub id, and which revision of it."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def resolve_path(reference: str, recipe_path: Path | None) -> Path | None:
    """The existing file or folder of this name: looked for beside the recipe, then in the working folder."""
    for folder in (recipe_path.parent, Path()) if recipe_path else (Path(),):
        if os.path.exists(folder / reference):  # which, unlike Path.exists, never raises
            return folder / reference
    return None


def read_reference(check: Check, where: Where, value: Any) -> ModelReference | None:
    """A model as "path[@revision]" or, as in mergekit, {model: {path, revision}}.

    What exists under its whole name is taken whole: `@` and `+` may be part of a folder's name.
    """
    if isinstance(value, dict):
        value = check.mapping(where, value, ("model",), _UNSUPPORTED, needed=True).get("model")
        where = (*where, "model")
        if isinstance(value, dict):
            entry = check.mapping(where, value, ("path", "revision"))
            check.required(where, entry, "path")
            path = read_path(check, (*where, "path"), entry.get("path"))
            revision = check.text((*where, "revision"), entry.get("revision"))
            return ModelReference(path, revision) if path else None
    text = read_path(check, where, value)
    if text is None or resolve_path(text, check.path):
        return None if text is None else ModelReference(text)
    path, at, revision = text.rpartition("@") if "@" in text else (text, "", "")
    if "+" in text and not resolve_path(path, check.path):
        what = "no local model has this name, and a LoRA adapter (after the `+`) cannot be applied here"
        check.refuse(where, what, "path[@revision]", text, _UNSUPPORTED["lora"])
    elif not path or (at and not revision):
        check.refuse(where, "this does not name a model", "path[@revision]", text)
    else:
        return ModelReference(path, revision or None)
    return None


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
