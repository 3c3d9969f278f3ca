"""Which files of a folder are the checkpoint: one file, or shards with an index, as Hugging Face has them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ggez_merge.errors import Problem, Refused
from ggez_merge.formats import gguf
from ggez_merge.untrusted import printable, read_json_bytes, some, strict_json

INDEX = ".index.json"
DIFFUSERS = "diffusion_pytorch_model"  # the stem of weight files of diffusers' models
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_OUTSIDE = "non_lora_trainables.bin"  # what trainers of LLaVA's kind save beside an adapter
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NUMBERED = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(safetensors|bin)")
_TORCH = re.compile(r"(diffusion_)?pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")


@dataclass(frozen=True)
class Layout:
    """The weight files of one folder. `index` is the index's file name; without one, `files` says it all."""

    index: str | None
    files: tuple[str, ...]


def holds_adapter(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names holds an adapter and no model."""
    others = set(names) - set(ADAPTER_WEIGHTS)
    return ADAPTER_CONFIG in others and not any(
        name.endswith((".safetensors", ".safetensors.index.json")) or _TORCH.fullmatch(name) for name in others
    )


def choose(names: Iterable[str], place: str) -> Layout:
    """The checkpoint among the file names of one folder; raises Refused when there is none or more than one.

    safetensors come before pytorch_model.bin, and what loaders look for (`model.safetensors.index.json` and
    `model.safetensors`, diffusers' `diffusion_pytorch_model.safetensors`) before any other name, such as that of a copy
    in float16; otherwise the folder must hold exactly one index, one file, or one complete set of numbered shards.
    """
    names = sorted(names)
    suffix, first = ".safetensors", "model"
    candidates = [name for name in names if name.endswith((suffix, suffix + INDEX))]
    if not candidates:  # other .bin files are optimizers', schedulers', training arguments
        suffix, first = ".bin", "pytorch_model"
        candidates = [name for name in names if _TORCH.fullmatch(name)]
    indexes = [name for name in candidates if name.endswith(INDEX)]
    weights = [name for name in candidates if name.endswith(suffix)]
    numbered = {name: match for name in weights if (match := _NUMBERED.fullmatch(name))}
    singles = [name for name in weights if name not in numbered]
    for stem in (first, DIFFUSERS):
        if stem + suffix + INDEX in indexes:
            return Layout(stem + suffix + INDEX, ())
        if stem + suffix in singles and not any(match["base"] == stem for match in numbered.values()):
            return Layout(None, (stem + suffix,))
    if len(indexes) == 1:
        return Layout(indexes[0], ())
    if not indexes and not numbered and len(singles) == 1:
        return Layout(None, (singles[0],))
    sets = {(match["base"], int(match["total"])) for match in numbered.values()}
    if not indexes and not singles and len(sets) == 1:
        base, total = sets.pop()
        full = [f"{base}-{number:05d}-of-{total:05d}{suffix}" for number in range(1, total + 1)]
        if weights == full:
            return Layout(None, tuple(full))
        raise Refused(
            Problem(
                "shards of the checkpoint are missing",
                place=place,
                expected=f"{total} shards {base}-*-of-{total:05d}",
                found=some(weights, 6),
                remedy="download the folder again, including its .index.json",
            )
        )
    if weights or indexes:
        raise Refused(
            Problem(
                "it is not clear which files are the checkpoint",
                place=place,
                expected=f"{first}{suffix}, one index, or one complete set of numbered shards",
                found=some(indexes + weights, 6),
                remedy=f"name the {suffix} file itself, or remove what does not belong",
            )
        )
    raise Refused(_nothing(names, place))


def holds_weights(names: Iterable[str]) -> bool:
    """Whether there is a file among these that `choose` may take."""
    return any(name.endswith(".safetensors") or _TORCH.fullmatch(name) for name in names)


def _nothing(names: list[str], place: str) -> Problem:
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        return gguf(place, some(ggufs, 6))
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return pickled(place, some(pickles, 6))
    remedy = "give the folder that holds the .safetensors files or pytorch_model.bin"
    return Problem("no checkpoint here", place=place, found=some(names, 6) or "nothing", remedy=remedy)


def pickled(place: str, found: str) -> Problem:
    """The refusal of a pickle checkpoint: loading one runs whatever code is in it."""
    return Problem(
        "the weights are pickles, which can run code when they are loaded",
        place=place,
        expected=".safetensors files, or pytorch_model.bin as torch.save writes a state dict",
        found=found,
        remedy="save it anew: transformers' from_pretrained(...).save_pretrained(...) writes safetensors; a .bin that "
        "holds a state dict can be named itself",
    )


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from an index; raises Refused with every unacceptable name."""
    whole = path.name.removesuffix(INDEX)  # what the checkpoint would be called in one file
    suffix = PurePosixPath(whole).suffix
    remedy = "download the index again, or write it anew by saving the model again"
    try:
        index = strict_json(read_json_bytes(path))
    except (OSError, ValueError) as error:
        raise Refused(Problem(f"the index cannot be read: {error}", place=str(path), remedy=remedy)) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(
            Problem(
                "the index has no weight_map",
                place=str(path),
                expected='{"weight_map": {tensor: shard, ...}}',
                remedy=remedy,
            )
        )
    unfit = {
        printable(repr(shard)) if isinstance(shard, str) else "not a string"
        for shard in weight_map.values()
        if not _is_plain(shard, suffix)
    }
    if unfit:
        raise Refused(
            Problem(
                "the index names a shard that is not a plain file name inside its folder",
                place=str(path),
                expected=f"a name such as {whole.removesuffix(suffix)}-00001-of-00002{suffix}",
                found=found,
                remedy=remedy,
            )
            for found in sorted(unfit)
        )
    lone = path.with_name(whole)
    names = ("model.safetensors", "pytorch_model.bin", f"{DIFFUSERS}.safetensors")
    if whole in names and whole not in weight_map.values() and lone.exists():
        raise Refused(
            Problem(
                f"two checkpoints in one folder: {whole}, and an index that does not name it",
                place=str(path.parent),
                remedy="remove the one that is out of date, or name the file itself",
            )
        )
    return weight_map


def _is_plain(shard: object, suffix: str) -> bool:
    """Whether `shard` is a relative name of that kind that cannot leave the folder on any system."""
    if not isinstance(shard, str) or not shard.endswith(suffix) or "\\" in shard or not shard.isprintable():
        return False
    path = PurePosixPath(shard)
    inside = not path.is_absolute() and not PureWindowsPath(shard).drive and ".." not in path.parts
    return inside and str(path) == shard
