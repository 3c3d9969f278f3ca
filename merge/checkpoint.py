"""A checkpoint as a read-only table of tensors: where each lies, in which file, as what. Headers only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ggez_merge.errors import Problem, Refused
from ggez_merge.formats import gguf, given_away, stated
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
from ggez_merge.pipeline import MODEL_INDEX, component_folders, is_denoiser, model_folders, read_model_index
from ggez_merge.scaled import Scaled, scaled
from ggez_merge.schemes import nominal_dtype, read_schemes
from ggez_merge.torch_bin import read_bin_header
from ggez_merge.untrusted import printable, read_json_bytes


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of one model, in file order: by shard, then by offset.

    `reference` is what the user wrote; `revision` the commit of a Hugging Face model, None for local files;
    `config` the content of config.json, None when there is none. Quantised weights are in `tensors` as what they stand
    for, and in `held` as the files hold them, which is empty otherwise; `notes` say so, and the config no longer does.
    Where an adapter was applied, `base` is what it was applied to, and `own_tokenizer` the adapter's folder, if it has
    tokenizer files. Of a diffusers pipeline `config` is model_index.json, and `parts` has by sub-folder the config.json
    of each model in it, whose tensors are called `unet.X`. A stage of a recipe, which lies nowhere, has files
    by the names that they would have, and `texts`: its small files, each as its content or where that is.
    """

    reference: str
    folder: Path
    revision: str | None
    files: tuple[ShardFile, ...]
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    held: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    base: Checkpoint | None = None
    own_tokenizer: Path | None = None
    parts: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    texts: Mapping[str, Path | bytes] | None = None

    @property
    def is_stage(self) -> bool:
        """Whether another merge makes it while it is read."""
        return self.texts is not None

    @property
    def label(self) -> str:
        """As the recipe names it, with the commit if it came from Hugging Face."""
        return f"{self.reference}@{self.revision}" if self.revision else self.reference

    @property
    def tokenizer(self) -> Path:
        """The folder that its tokenizer files are in."""
        return self.own_tokenizer or self.folder

    @property
    def stored(self) -> dict[str, Tensor]:
        """The tensors as the files hold them."""
        return self.held or self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without headers, in the dtypes that files hold or, of an adapted weight, its base's."""
        return sum(tensor.numel * ITEM_BITS[tensor.nominal or tensor.dtype] // 8 for tensor in self.stored.values())

    @property
    def parameters(self) -> int:
        """Number of elements in float tensors; integer buffers are not parameters."""
        return sum(tensor.numel for tensor in self.tensors.values() if tensor.dtype in FLOATS | FLOAT8)


def open_checkpoint(reference: str, revision: str | None = None, search: Sequence[Path] = (Path("."),)) -> Checkpoint:
    """Find a checkpoint and validate every header of it; no weight is read.

    `reference` is a folder (a diffusers pipeline's too), a .safetensors or .bin file (relative paths are tried against
    each folder of `search` in turn) or a Hugging Face id, which comes from the cache when it is complete there and is
    downloaded otherwise. A local path wins over an id of the same spelling. Raises Refused with every problem found.
    """
    path, commit = locate(reference, revision, search)
    return checkpoint_at(path, reference, commit)


def checkpoint_at(path: Path, reference: str, commit: str | None = None) -> Checkpoint:
    """The checkpoint of this file or folder."""
    if (path / MODEL_INDEX).is_file():
        return _open_pipeline(reference, path, commit)
    return _open(reference, path, commit)


def _open_pipeline(reference: str, root: Path, commit: str | None) -> Checkpoint:
    """The models in the sub-folders of a diffusers pipeline as one, each tensor after its folder: `unet.X`."""
    index = read_model_index(root)
    missing = [name for name in component_folders(index) if not (root / name).is_dir()]
    problems = [
        Problem(
            f"{MODEL_INDEX} names a folder that is not there",
            place=str(root / name),
            remedy="download the whole pipeline, or give the path of the one of its folders that is meant",
        )
        for name in missing
    ]
    there = [name for name in component_folders(index) if name not in missing]
    files = [f"{name}/{entry.name}" for name in there for entry in _entries(root / name)]
    parts: dict[str, Checkpoint] = {}
    for name in model_folders(index, files):
        try:
            if name in there:
                parts[name] = _open(reference, root / name, commit)
        except Refused as refused:
            problems += refused.problems
    if not problems and not any(is_denoiser(name) for name in parts):
        problems.append(
            Problem(
                "the pipeline has no part to be merged",
                place=str(root),
                expected="a folder whose name begins with unet or transformer",
                found=", ".join(parts) or "no models",
                remedy="give the path of the folder that is meant",
            )
        )
    if problems:
        raise Refused(problems)
    return Checkpoint(
        reference=reference,
        folder=root,
        revision=commit,
        files=tuple(file for part in parts.values() for file in part.files),
        tensors=_under_folders({name: part.tensors for name, part in parts.items()}),
        config=index,
        held=_under_folders({name: part.stored for name, part in parts.items()}),
        notes=tuple(f"{name}: {note}" for name, part in parts.items() for note in part.notes),
        parts={name: part.config for name, part in parts.items()},
    )


def _under_folders(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{name}.{own}": replace(tensor, name=f"{name}.{own}")
        for name, table in tables.items()
        for own, tensor in table.items()
    }


def _open(reference: str, path: Path, commit: str | None) -> Checkpoint:
    """The checkpoint in one folder, or one file."""
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
    quantised = [*stated(config or {})]
    schemes, unknown = read_schemes(quantised, str(folder / "config.json"))
    problems += unknown
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
    held = _join(tables, problems)
    if weight_map is not None:
        problems += _compare(weight_map, tables, folder)
    plain = Scaled(held)
    if not problems:
        plain = scaled(held, schemes if quantised else None, nominal_dtype(config or {}))
    problems += plain.problems
    if not unknown and not plain.problems:
        problems += given_away(plain.tensors, str(path))
    for _, part, key in quantised:
        del part[key]
    if problems:
        raise Refused(problems)
    as_held = held if plain.notes else {}
    return Checkpoint(reference, folder, commit, tuple(shards), plain.tensors, config, as_held, plain.notes)


def locate(reference: str, revision: str | None, search: Sequence[Path]) -> tuple[Path, str | None]:
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
