"""A checkpoint as a read-only table of tensors: where each lies, in which file, as what. Headers only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggez_merge.errors import Problem, Refused
from ggez_merge.formats import gguf, given_away, quantised
from ggez_merge.header import FLOAT8 as FLOAT8
from ggez_merge.header import FLOATS as FLOATS
from ggez_merge.header import ITEM_BITS as ITEM_BITS
from ggez_merge.header import SCALED as SCALED
from ggez_merge.header import Elements as Elements
from ggez_merge.header import Making as Making
from ggez_merge.header import ShardFile as ShardFile
from ggez_merge.header import Tensor as Tensor
from ggez_merge.header import joined as joined
from ggez_merge.header import promoted as promoted
from ggez_merge.header import read_shard_header as read_shard_header
from ggez_merge.header import span as span
from ggez_merge.hub import fetch, is_hub_id
from ggez_merge.layout import PICKLE_SUFFIXES, choose, pickled, read_index
from ggez_merge.torch_bin import read_bin_header
from ggez_merge.untrusted import printable, read_json_bytes


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of one model, in file order: by shard, then by offset.

    `reference` is what the user wrote; `revision` the commit of a Hugging Face model, None for local files;
    `config` the content of config.json, None when there is none.
    """

    reference: str
    folder: Path
    revision: str | None
    files: tuple[ShardFile, ...]
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements in float tensors; integer buffers are not parameters."""
        return sum(tensor.numel for tensor in self.tensors.values() if tensor.dtype in FLOATS | FLOAT8)


def open_checkpoint(reference: str, revision: str | None = None, search: Sequence[Path] = (Path("."),)) -> Checkpoint:
    """Find a checkpoint and validate every header of it; no weight is read.

    `reference` is a folder, a .safetensors or .bin file (relative paths are tried against each folder of `search` in
    turn) or a Hugging Face id, which comes from the cache when it is complete there and is downloaded
    otherwise. A local path wins over an id of the same spelling. Raises Refused with every problem found.
    """
    path, commit = _locate(reference, revision, search)
    problems: list[Problem] = []
    weight_map: dict[str, str] | None = None
    if path.is_dir():
        folder = path
        layout = choose([entry.name for entry in _entries(path)], str(path))
        if layout.index is not None:
            weight_map = read_index(path / layout.index)
        paths = [path / name for name in (sorted(set(weight_map.values())) if weight_map else layout.files)]
    else:
        folder = path.parent
        if path.suffix.lower() == ".gguf":
            raise Refused(gguf(str(path), path.name))
        if path.suffix in PICKLE_SUFFIXES and path.suffix != ".bin":
            raise Refused(pickled(str(path), path.name))
        if path.suffix not in (".safetensors", ".bin"):
            raise Refused(Problem("not a checkpoint", str(path), None, "a folder, a .safetensors or a .bin file"))
        paths = [path]
    config = _read_config(folder / "config.json", problems)
    coded = quantised(config or {}, str(folder / "config.json"))
    problems += coded
    shards: list[ShardFile] = []
    tables: dict[Path, list[Tensor]] = {}
    for shard in paths:
        try:
            if shard.suffix == ".bin":
                tables[shard], file = read_bin_header(shard)
            else:
                tables[shard], _, file = read_shard_header(shard)
            shards.append(file)
        except Refused as refused:
            problems += refused.problems
    tensors = _join(tables, problems)
    if weight_map is not None:
        problems += _compare(weight_map, tables, folder)
    if not coded:
        problems += given_away(tensors, str(path))
    if problems:
        raise Refused(problems)
    return Checkpoint(reference, folder, commit, tuple(shards), tensors, config)


def _locate(reference: str, revision: str | None, search: Sequence[Path]) -> tuple[Path, str | None]:
    """The local file or folder that `reference` means, and the commit if it came from Hugging Face."""
    if not reference or "\0" in reference:
        raise Refused(
            Problem(f"not a path or a Hugging Face id: {reference!r}", remedy="name a folder, a file or an id")
        )
    tried = list(dict.fromkeys(folder / reference for folder in search))
    for path in tried:
        if revision is not None and os.path.exists(f"{path}@{revision}"):
            return Path(f"{path}@{revision}"), None  # a local name may contain an @
        if os.path.exists(path):
            if revision is None:
                return path, None
            raise Refused(
                Problem(
                    f"a revision is given for a local path: {reference}@{revision}",
                    place=str(path),
                    remedy=f"write {reference}, or give the Hugging Face id from another folder",
                )
            )
    looked = "no local file or folder: " + ", ".join(str(path) for path in tried)
    if is_hub_id(reference):
        return fetch(reference, revision, looked)
    raise Refused(
        Problem(
            f"no such checkpoint: {printable(reference)}",
            expected="a folder, a .safetensors or .bin file, or a Hugging Face id",
            found=looked,
            remedy="check the spelling; relative paths start at the recipe, then at the working folder",
        )
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise Refused(Problem(f"the folder cannot be read: {error.strerror}", place=str(folder))) from None


def _read_config(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """config.json, or None; adds a problem when it is broken."""
    try:
        config = json.loads(read_json_bytes(path))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(
            Problem(
                f"config.json cannot be read: {error}",
                place=str(path),
                remedy="download it again, or save the model again",
            )
        )
        return None
    return config


def _join(tables: dict[Path, list[Tensor]], problems: list[Problem]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for table in tables.values():
        for tensor in table:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                problems.append(
                    Problem(
                        "the tensor is in two shards",
                        place=str(tensor.file),
                        tensor=printable(tensor.name),
                        found=f"also in {first.file}",
                        remedy="download the checkpoint again, or remove the stale shard",
                    )
                )
    return tensors


def _compare(weight_map: dict[str, str], tables: dict[Path, list[Tensor]], folder: Path) -> list[Problem]:
    """Where index and shards disagree, one problem per shard; shards that could not be read are left out."""
    problems = []
    for path, table in tables.items():
        shard = path.relative_to(folder).as_posix()
        held = {tensor.name for tensor in table}
        listed = {name for name, file in weight_map.items() if file == shard}
        if listed - held:
            problems.append(
                Problem(
                    "the index lists tensors that the shard does not hold",
                    place=str(path),
                    tensor=_names(listed - held),
                    remedy="download the shard and its index again",
                )
            )
        if held - listed:
            problems.append(
                Problem(
                    "the shard holds tensors that the index does not list there: loaders skip them",
                    place=str(path),
                    tensor=_names(held - listed),
                    remedy="save the model again, or download the shard and its index again",
                )
            )
    return problems


def _names(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return printable(first) + (f" and {len(rest)} more" if rest else "")
