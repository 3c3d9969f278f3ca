"""The rows of a task: read, chosen, named and with images that can be decoded, or refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggez_merge.errors import Problem, Refused
from ggez_merge.evaluate.fields import value_of
from ggez_merge.evaluate.picture import Picture, picture_of
from ggez_merge.evaluate.source import Source
from ggez_merge.evaluate.tables import Unreadable, read_table

THREADS = 8  # that decode images, while checking them
_SHOWN = 3  # broken images that a message names


@dataclass(frozen=True)
class Row:
    """One row. groups: its values of the group columns, as "column=value"; image_id: the hash of the image's bytes."""

    id: str
    fields: Mapping[str, Any] = field(repr=False)
    groups: tuple[str, ...] = ()
    picture: Picture | None = None
    image_id: str | None = None

    def value(self, name: str) -> Any:
        """The value of a column, dotted or not (see fields.py). Raises KeyError."""
        return value_of(self.fields, name)


@dataclass(frozen=True)
class Rows:
    """What a task is about. broken: the rows left out for their image, with why: the same ones for every model."""

    rows: tuple[Row, ...]
    broken: tuple[tuple[str, str], ...] = ()


def read_rows(source: Source, columns: Sequence[str]) -> Rows:
    """All rows of a source that count, in order. columns: those that the task needs, besides those of the source.

    Every image is decoded once; rows whose image is missing or corrupt are left out, and refused beyond
    `source.max_broken`. Raises Refused if the data cannot be read or lack a column, and when no row is left.
    """
    needed = [*columns, *source.group, *source.where, *([source.id] if source.id else [])]
    wanted = [*needed, *([source.image] if source.image else [])]
    rows: list[Row] = []
    try:
        for number, (fields, folder) in enumerate(_tables(source, wanted)):
            row = _row(source, number, fields, folder, needed)
            if row and (source.limit is None or len(rows) < source.limit):
                rows.append(row)
    except Unreadable as error:
        raise _refused(source, error.what, str(error.path), remedy=error.remedy) from None
    if not rows:
        found = ", ".join(map(str, source.paths))
        remedy = "check the conditions under `where`" if source.where else None
        raise _refused(source, "no row is left to evaluate", found, remedy=remedy)
    names = [row.id for row in rows]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _refused(source, f"two rows have the same `{source.id}`", twice, remedy="leave `id` out to number them")
    return _checked(source, rows)


def _tables(source: Source, needed: Sequence[str]) -> Iterator[tuple[Mapping[str, Any], Path]]:
    for path in source.paths:
        yield from read_table(path, needed)


def _row(source: Source, number: int, fields: Mapping[str, Any], folder: Path, needed: Sequence[str]) -> Row | None:
    """The row, or None if a condition is not met. Its picture may be a lost one."""
    for column, allowed in source.where.items():
        if str(_value(source, number, fields, column)).casefold() not in {value.casefold() for value in allowed}:
            return None
    for column in needed:
        _value(source, number, fields, column)
    picture = None
    if source.image:
        try:
            picture = picture_of(value_of(fields, source.image), source.images or folder)
        except (KeyError, ValueError):
            picture = Picture()
    return Row(
        id=str(value_of(fields, source.id)) if source.id else str(number),
        fields=fields,
        groups=tuple(f"{column}={value_of(fields, column)}" for column in source.group),
        picture=picture,
    )


def _value(source: Source, number: int, fields: Mapping[str, Any], column: str) -> Any:
    try:
        return value_of(fields, column)
    except KeyError:
        near = difflib.get_close_matches(column, list(fields), n=1)
        remedy = f"did you mean `{near[0]}`?" if near else None
        if column == source.image:
            remedy = "name the column of the image under `image`, or say `image: false`"
        found = f"row {number} has " + ", ".join(f"`{name}`" for name in fields)
        raise _refused(source, f"the data have no column `{column}`", found, remedy=remedy) from None


def _checked(source: Source, rows: Sequence[Row]) -> Rows:
    """The rows with the hashes of their images, without those whose image cannot be had."""
    if source.image is None:
        return Rows(tuple(rows))
    if all(row.picture == Picture() for row in rows):
        _value(source, 0, rows[0].fields, source.image)  # the column itself may be what is missing
    whole: list[Row] = []
    broken: list[tuple[str, str]] = []
    with ThreadPoolExecutor(THREADS) as executor:
        for row, (image_id, fault) in zip(rows, executor.map(_check, rows), strict=True):
            if fault is None:
                whole.append(Row(row.id, row.fields, row.groups, row.picture, image_id))
            else:
                broken.append((row.id, fault))
    if len(broken) > source.max_broken * len(rows):
        shown = "; ".join(f"row {name}: {fault}" for name, fault in broken[:_SHOWN])
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise _refused(
            source,
            "images are missing or corrupt",
            f"{len(broken)} of {len(rows)}: {shown}{more}",
            f"at most {source.max_broken:g} of them",
            f"check `images`, or allow them with `max_broken: {len(broken) / len(rows):.3g}`",
        )
    if not whole:
        raise _refused(source, "no row has an image that can be read", str(len(rows)))
    return Rows(tuple(whole), tuple(broken))


def _check(row: Row) -> tuple[str | None, str | None]:
    """The hash of a row's image, or what is wrong with it."""
    if row.picture is None or row.picture == Picture():
        return None, "no image"
    try:
        return row.picture.check(), None
    except FileNotFoundError:
        return None, f"{row.picture.path} is missing"
    except (OSError, ValueError) as error:
        return None, f"{row.picture.path or 'its bytes'}: {error}"


def _refused(source: Source, what: str, found: str, expected: str | None = None, remedy: str | None = None) -> Refused:
    return Refused(Problem(what, source.place, expected=expected, found=found, remedy=remedy))
