"""Where the rows of a task come from: files, the folder of images, which rows count, and how they are grouped."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggez_merge.check import Check
from ggez_merge.evaluate.values import count, number, texts
from ggez_merge.reference import resolve_path
from ggez_merge.yaml_lines import Where

SOURCE_KEYS = ("data", "images", "image", "id", "where", "group", "limit", "max_broken")


@dataclass(frozen=True)
class Source:
    """Rows of data, of those the ones that `where` allows, of those the first `limit`.

    paths: files or folders. images: the folder that the paths of images start from; None: each data file's own.
    image: the column of the image; None: there is none, the task is about text alone. id: the column that names a
    row; None: its number. where: column -> the values, as text, that a row must have. group: columns whose values the
    score is broken down by. max_broken: the share of rows, 0 to 1, whose image may be missing or corrupt.
    place: the line of the recipe, for messages.
    """

    paths: tuple[Path, ...]
    images: Path | None = None
    image: str | None = "image"
    id: str | None = None
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    group: tuple[str, ...] = ()
    limit: int | None = None
    max_broken: float = 0.0
    place: str | None = field(default=None, compare=False)


def read_source(check: Check, where: Where, entry: Mapping[str, Any]) -> Source:
    """The keys of a task that say what its data are. `image: false` is a task without images."""
    image = entry.get("image")
    conditions = check.mapping((*where, "where"), entry.get("where"))
    images = _existing(check, (*where, "images"), entry.get("images"))
    if images and not images[0].is_dir():
        check.refuse((*where, "images"), "`images` must be a folder", None, str(images[0]))
    data = entry.get("data")
    places = check.elements((*where, "data"), data) if isinstance(data, list) else [((*where, "data"), data)]
    return Source(
        paths=tuple(path for here, value in places for path in _existing(check, here, value, patterns=True)),
        images=images[0] if images else None,
        image=None if image is False else check.text((*where, "image"), image) or "image",
        id=check.text((*where, "id"), entry.get("id")),
        where={column: _values(check, (*where, "where", column), value) for column, value in conditions.items()},
        group=texts(check, (*where, "group"), entry.get("group")),
        limit=count(check, (*where, "limit"), entry.get("limit"), 0) or None,
        max_broken=number(check, (*where, "max_broken"), entry.get("max_broken"), 0, 1) or 0.0,
        place=check.document.place(*where),
    )


def _existing(check: Check, where: Where, value: Any, patterns: bool = False) -> list[Path]:
    """The paths that a text names, beside the recipe or in the working folder; one, or those that match a pattern."""
    text = check.text(where, value)
    if text is None:
        return []
    one = resolve_path(text, check.path)
    if one:
        return [one]
    if patterns and glob.has_magic(text):
        for folder in (check.path.parent, Path()) if check.path else (Path(),):
            found = sorted(glob.glob(text, root_dir=folder, recursive=True))
            if found:
                return [folder / name for name in found]
    beside = f" beside {check.path}, nor" if check.path else ""
    check.refuse(
        where,
        f"`{where[-1] if isinstance(where[-1], str) else where[-2]}` names nothing that exists",
        None,
        f"no {text}{beside} in the working folder",
    )
    return []


def _values(check: Check, where: Where, value: Any) -> tuple[str, ...]:
    """The values that a column may have: one, or a list of them."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str | int | float) for one in values):
        check.refuse(where, "a condition is a value or a list of values", None, value)
        return ()
    return tuple(str(one) for one in values)
