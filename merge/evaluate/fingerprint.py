"""What a result depends on besides the model, as one short key: equal keys, equal results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from ggez_merge.evaluate.data import Rows, read_rows
from ggez_merge.evaluate.kinds import Command, columns
from ggez_merge.evaluate.tasks import Task

LIBRARIES = ("torch", "transformers", "tokenizers", "pillow", "numpy")  # whose releases may change a score
CHUNK_BYTES = 1 << 20
_ELSEWHERE = ("paths", "images", "folder", "place")  # paths: their content counts, not where they lie


def fingerprint(task: Task, rows: Rows | None = None, *, dtype: str | None = None, device: str | None = None) -> str:
    """The key of a task: 32 hexadecimal digits (XXH3-128).

    It changes with the task's settings, with the bytes of its data files and of every image, with the code of this
    package, with the releases of the libraries that compute and, for models that run here, with dtype and kind of
    device ("cuda:1" is as "cuda"). It does not change with batch size, file dates, the recipe's layout or with where
    the data lie. rows: as `rows_of` gives them, read if not given. Of a command, the files that its
    arguments name count as data, a folder's with all that is in it.
    """
    digest = xxhash.xxh3_128()
    _add(digest, json.dumps(_plain(task), sort_keys=True, ensure_ascii=False))
    _add(digest, code_version())
    if isinstance(task.kind, Command):
        for path in _named(task.kind):
            _add_files(digest, path)
    else:
        for library in LIBRARIES:
            _add(digest, f"{library} {_release(library)}")
        _add(digest, f"{dtype or 'stored'} {(device or 'cpu').partition(':')[0]}")
        assert task.source, "only a command has no source"
        for path in task.source.paths:
            _add_files(digest, path)
        rows = rows or read_rows(task.source, columns(task.kind))
        for row in rows.rows:
            _add(digest, f"{row.id} {row.image_id}")
        for name, _ in rows.broken:
            _add(digest, f"{name} is broken")
    return digest.hexdigest()


def code_version() -> str:
    """The hash of this package's source."""
    digest = xxhash.xxh3_128()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        _add(digest, file.name)
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Settings as plain data, by the names of their fields and types."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        kept = {name: inner for name, inner in fields.items() if name not in _ELSEWHERE}
        return {"is": type(value).__name__, **kept}
    if isinstance(value, tuple):
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {str(key): _plain(element) for key, element in value.items()}
    return value


def _named(command: Command) -> list[Path]:
    """The files and folders that a command's arguments name, themselves or after an equals sign."""
    pieces = [piece for argument in command.arguments for piece in re.split(r"[=,]", argument)]
    names = [piece for piece in pieces if piece and "{" not in piece]
    return [command.folder / name for name in names if os.path.exists(command.folder / name)]


def _add_files(digest: xxhash.xxh3_128, path: Path) -> None:
    """The bytes of a file, or names and bytes of all files below a folder."""
    for file in _below(path):
        _add(digest, file.relative_to(path).as_posix() if file != path else "")
        _add(digest, str(file.stat().st_size))
        with open(file, "rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)


def _below(path: Path) -> Iterable[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _release(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _add(digest: xxhash.xxh3_128, text: str) -> None:
    """A text and its length, so that what stands side by side cannot be taken for something else."""
    raw = text.encode()
    digest.update(len(raw).to_bytes(8, "little") + raw)
