"""The files that travel with the weights: what a loader needs of the base's folder, the config brought up to date."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ggez_merge.checkpoint import FLOATS, Checkpoint
from ggez_merge.errors import Failed, Problem
from ggez_merge.recipe import ModelReference, Recipe
from ggez_merge.shards import Entry

CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
CARRIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
CARRIED_FOLDERS = ("additional_chat_templates",)
LEFT = ("trainer_state.json", "merge_report.json", "adapter_config.json", "training_args.json")
LEFT_SUFFIXES = (".index.json", "_results.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
)
OF_TOKENS = (
    *TOKENIZER_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
VOCABULARY_SUFFIXES = (".model", ".tiktoken", ".spm", ".vocab", ".bpe")
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def carried_files(checkpoint: Checkpoint, code: bool = False, tokenizer: Path | None = None) -> dict[str, Path]:
    """The files to copy, by their names in the output; custom code only if asked for.

    Those that speak of tokens are from the folder `tokenizer`, if it is given; all others are the checkpoint's.
    """
    own = _carried(checkpoint.folder, code)
    if tokenizer is None or tokenizer == checkpoint.folder:
        return own
    theirs = _carried(tokenizer, code)
    return {
        **{name: path for name, path in own.items() if not _of_tokens(name)},
        **{name: path for name, path in theirs.items() if _of_tokens(name)},
    }


def _of_tokens(name: str) -> bool:
    """Whether a file belongs to the tokenizer: it holds tokens, or numbers of tokens."""
    return name in OF_TOKENS or name.endswith(VOCABULARY_SUFFIXES) or name.startswith(CARRIED_FOLDERS)


def _carried(folder: Path, code: bool) -> dict[str, Path]:
    if not (folder / "config.json").exists():
        return {}  # a bare .safetensors file among others: nothing there is known to be its own
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and _travels(path.name, code)]
    for sub in CARRIED_FOLDERS:
        names += [f"{sub}/{path.name}" for path in sorted((folder / sub).glob("*.jinja")) if path.is_file()]
    return {name: folder / name for name in names}


def content(path: Path) -> bytes:
    """All of a small file; Failed if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Failed(f"{path}: cannot be read: {error.strerror}") from error


def _travels(name: str, code: bool) -> bool:
    if name.startswith(".") or name in LEFT or name.endswith(LEFT_SUFFIXES):
        return False
    return name.endswith(CARRIED_SUFFIXES) or name.startswith(CARRIED_STEMS) or (code and name.endswith(".py"))


def updated_config(config: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """The config with `dtype` / `torch_dtype` as the weights now are, wherever it states them."""
    numbers: Counter[str] = Counter()
    for entry in entries:
        if entry.dtype in FLOATS:
            numbers[entry.dtype] += entry.nbytes
    if not numbers:
        return config
    name = TORCH_NAMES[numbers.most_common(1)[0][0]]
    silent = "dtype" not in config and "torch_dtype" not in config
    added = {"torch_dtype": name} if silent and not of_diffusers(config) else {}
    return {**added, **_restated(config, name)}


def of_diffusers(config: dict[str, Any]) -> bool:
    """Whether this config is for diffusers, which knows no dtype in it, and not for transformers."""
    return "_class_name" in config


def _restated(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _restated(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def config_bytes(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def tokenizer_note(recipe: Recipe, layout: Checkpoint, checkpoints: dict[ModelReference, Checkpoint]) -> list[str]:
    """A word where inputs have another tokenizer than the base and the recipe does not say that it knows."""
    if recipe.tokenizer is not None:
        return []
    names = [c.reference for c in checkpoints.values() if not same_tokenizer(c, layout)]
    if not names:
        return []
    return [
        f"{', '.join(dict.fromkeys(names))} has other tokenizer files than {layout.reference}: embeddings are merged "
        "row by row, and the latter's files are carried (`tokenizer: {source: base}` goes by token)"
    ]


def check_chat_template(recipe: Recipe) -> list[Problem]:
    """A chat template is written out as it stands; the names that mergekit has templates for mean nothing here."""
    template = recipe.chat_template
    if template is None or template == "auto" or "{{" in template or "{%" in template:
        return []
    return [
        Problem(
            "this is no chat template",
            place=recipe.place("chat_template"),
            expected="a Jinja template, or `auto` for the base's own",
            found=repr(template),
            remedy="write the template itself here, or leave this out",
        )
    ]


def same_tokenizer(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether it has the other's tokenizer files, or none of its own."""
    theirs = _tokenizer(one.folder)
    return not any(theirs) or theirs == _tokenizer(other.folder)


def _tokenizer(folder: Path) -> list[bytes | None]:
    return [content(folder / name) if (folder / name).is_file() else None for name in TOKENIZER_FILES]
