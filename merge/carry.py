"""The files that travel with the weights: what a loader needs of the base's folder, the config brought up to date."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ggez_merge.checkpoint import FLOATS, Checkpoint
from ggez_merge.errors import Failed, Problem
from ggez_merge.outputs import Output
from ggez_merge.recipe import ModelReference, Recipe

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
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def carried_files(checkpoint: Checkpoint, code: bool = False) -> list[str]:
    """Names, relative to the checkpoint's folder, of the files to copy; custom code only if asked for."""
    folder = checkpoint.folder
    if not (folder / "config.json").exists():
        return []  # a bare .safetensors file among others: nothing there is known to be its own
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and _travels(path.name, code)]
    for sub in CARRIED_FOLDERS:
        names += [f"{sub}/{path.name}" for path in sorted((folder / sub).glob("*.jinja")) if path.is_file()]
    return names


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


def updated_config(config: dict[str, Any], outputs: list[Output]) -> dict[str, Any]:
    """The config with `dtype` / `torch_dtype` as the weights now are, wherever it states them."""
    numbers: Counter[str] = Counter()
    for output in outputs:
        if output.entry.dtype in FLOATS:
            numbers[output.entry.dtype] += output.entry.nbytes
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
    if recipe.tokenizer_source is not None:
        return []
    names = [c.reference for c in checkpoints.values() if _differs(c, layout)]
    if not names:
        return []
    return [
        f"{', '.join(dict.fromkeys(names))} has other tokenizer files than {layout.reference}: embeddings are merged "
        "row by row, and the latter's files are carried (`tokenizer_source: base` says that this is meant)"
    ]


def check_tokenizer(recipe: Recipe, layout: Checkpoint, checkpoints: dict[ModelReference, Checkpoint]) -> list[Problem]:
    """`tokenizer_source` can be followed as long as all tokenizers are the same: rows are merged by position."""
    wanted = recipe.tokenizer_source
    if wanted is None or wanted == "base":
        return []
    named = [c for reference, c in checkpoints.items() if wanted == "union" or str(reference) == wanted]
    if not named:
        return [
            Problem(
                f"tokenizer_source names no model of the recipe: {wanted!r}",
                place=recipe.place("tokenizer_source"),
                expected="base, union, or one of " + ", ".join(str(reference) for reference in checkpoints),
            )
        ]
    different = [c.reference for c in named if _differs(c, layout)]
    if not different:
        return []
    return [
        Problem(
            "the tokenizers differ, and embeddings of different vocabularies cannot be merged row by row",
            place=recipe.place("tokenizer_source"),
            expected=f"the tokenizer files of {layout.reference}",
            found=", ".join(different),
            remedy="give every model one tokenizer first, or use `tokenizer_source: base` if only its files matter",
        )
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


def _differs(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether it has a tokenizer, and another than the other."""
    theirs = _tokenizer(one.folder)
    return any(theirs) and theirs != _tokenizer(other.folder)


def _tokenizer(folder: Path) -> list[bytes | None]:
    return [content(folder / name) if (folder / name).is_file() else None for name in TOKENIZER_FILES]
