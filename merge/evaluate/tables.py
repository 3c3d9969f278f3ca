"""Rows of plain fields from files: JSON lines, CSV, parquet, webdataset tars, saved Hugging Face datasets, folders.

Each reader gives (fields, folder that paths in them start from). They raise Unreadable, with what is wrong.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ggez_merge.evaluate.fields import head
from ggez_merge.evaluate.picture import SUFFIXES, Picture

Fields = dict[str, Any]
Row = tuple[Fields, Path]


class Unreadable(Exception):
    """What is wrong with a file of data, in one sentence, and what to do about it."""

    def __init__(self, path: Path, what: str, remedy: str | None = None) -> None:
        super().__init__(what)
        self.path, self.what, self.remedy = path, what, remedy


def read_table(path: Path, names: Sequence[str]) -> Iterator[Row]:
    """The rows of a file or a folder. names: the columns that are wanted; other columns of parquet are not read."""
    if path.is_dir():
        yield from _folder(path, names)
        return
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise Unreadable(path, "data of this kind are not known", f"known are {', '.join(_READERS)} and folders")
    try:
        for fields in reader(path, names):
            yield fields, path.parent
    except (OSError, UnicodeDecodeError, csv.Error, tarfile.TarError) as error:
        raise Unreadable(path, f"the data cannot be read: {error}") from None


def _json_lines(path: Path, names: Sequence[str]) -> Iterator[Fields]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _mapping(path, line, f"line {number}")


def _mapping(path: Path, text: str, where: str) -> Fields:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Unreadable(path, f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unreadable(path, f"{where} is not a mapping of columns to values")
    return value


def _json(path: Path, names: Sequence[str]) -> Iterator[Fields]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise Unreadable(path, f"this is not JSON: {error}", "JSON lines have the suffix .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Unreadable(path, "this is not a list of mappings")
    yield from rows


def _csv(path: Path, names: Sequence[str]) -> Iterator[Fields]:
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        for fields in reader:
            if None in fields or None in fields.values():
                raise Unreadable(path, f"line {reader.line_num} has not as many fields as the first line")
            yield fields


def _parquet(path: Path, names: Sequence[str]) -> Iterator[Fields]:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _wanted(file.schema_arrow.names, names)
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                yield from _rows(batch, file.schema_arrow.metadata)
    except pyarrow.ArrowException as error:
        raise Unreadable(path, f"this is not a whole parquet file: {error}") from None


def _arrow(path: Path, names: Sequence[str]) -> Iterator[Fields]:
    """A shard of a saved Hugging Face dataset: an Arrow stream."""
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            columns = _wanted(stream.schema.names, names)
            for batch in stream:
                yield from _rows(batch.select(columns), stream.schema.metadata)
    except pyarrow.ArrowException as error:
        raise Unreadable(path, f"this is not a whole Arrow file: {error}") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise Unreadable(path, "reading this needs pyarrow", "pip install 'ggez-merge[evaluate]'") from None
    return pyarrow


def _wanted(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns that are wanted; all of them if a name fits none, for the message to come."""
    fits = [[column for column in columns if head(column, name)] for name in names]
    return [column for column in columns if any(column in found for found in fits)] if all(fits) else list(columns)


def _rows(batch: Any, metadata: dict[bytes, bytes] | None) -> Iterator[Fields]:
    """Rows of a record batch; where Hugging Face keeps a class as a number, its name."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    classes = {name: kind["names"] for name, kind in features.items() if _is_class_label(kind)}
    for fields in batch.to_pylist():
        for name, labels in classes.items():
            if type(fields.get(name)) is int and 0 <= fields[name] < len(labels):
                fields[name] = labels[fields[name]]
        yield fields


def _is_class_label(kind: Any) -> bool:
    return isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list)


def _tar(path: Path, names: Sequence[str]) -> Iterator[Fields]:
    """A webdataset shard: members that share a name up to its first dot are one row, their endings its columns.

    Keys of a .json member are columns, too; `__key__` is the name; an image is also in the column `image`.
    """
    fields: Fields = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            folder, _, file = member.name.rpartition("/")
            stem, dot, ending = file.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if fields and fields["__key__"] != key:
                yield fields
                fields = {}
            fields.setdefault("__key__", key)
            ending = ending.lower()
            if f".{ending.rpartition('.')[2]}" in SUFFIXES:
                fields[ending] = Picture(path, offset=member.offset_data, size=member.size)
                fields.setdefault("image", fields[ending])
                continue
            opened = archive.extractfile(member)
            raw = opened.read() if opened else b""
            if ending == "json":
                fields |= _mapping(path, raw.decode("utf-8"), member.name)
            else:
                fields[ending] = _text_or_bytes(raw)
    if fields:
        yield fields


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return raw


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Fields]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".tar": _tar,
}
_SHARDS = (".parquet", ".tar", ".jsonl", ".ndjson", ".csv", ".tsv")


def _folder(path: Path, names: Sequence[str]) -> Iterator[Row]:
    """A saved Hugging Face dataset; else the tables in the folder; else its images, their folders being labels."""
    if (path / "state.json").exists():
        yield from _saved(path, names)
        return
    if (path / "dataset_dict.json").exists():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        if len(splits) != 1:
            raise Unreadable(path, f"the dataset has the splits {', '.join(splits)}", "name the folder of one of them")
        yield from _saved(path / splits[0], names)
        return
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in _SHARDS)
    for table in tables:
        yield from read_table(table, names)
    if not tables:
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                name = file.relative_to(path).as_posix()
                yield {"image": name, "file": name, "label": file.parent.name, "name": file.stem}, path


def _saved(path: Path, names: Sequence[str]) -> Iterator[Row]:
    """What `Dataset.save_to_disk` wrote: shards, and perhaps which rows of them, in which order."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / entry["filename"] for entry in state["_data_files"]]
        indices = [path / entry["filename"] for entry in state.get("_indices_files") or []]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreadable(path / "state.json", f"this is not what datasets writes: {error!r}") from None
    rows = (row for file in files for row in read_table(file, names))
    if not indices:
        yield from rows
        return
    every = list(rows)
    for file in indices:
        for fields, _ in read_table(file, ["indices"]):
            yield every[fields["indices"]]
