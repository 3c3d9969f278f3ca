"""The files that travel with the weights: what a loader needs of the base's folder, the config brought up to date."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ggez_merge.adapter import is_adapter
from ggez_merge.checkpoint import FLOATS, Checkpoint
from ggez_merge.errors import Failed, Problem
from ggez_merge.local_paths import is_absolute
from ggez_merge.pipeline import MODEL_INDEX, component_folders, read_model_index
from ggez_merge.recipe import ModelReference, Recipe
from ggez_merge.shards import Entry

CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe", ".codes")
CARRIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
CARRIED_FOLDERS = ("additional_chat_templates",)
LEFT = ("trainer_state.json", "merge_report.json", "adapter_config.json", "training_args.json", "hf_quant_config.json")
LEFT_SUFFIXES = (".index.json", "_results.json")
GENERATION = "generation_config.json"
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
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", GENERATION),
    *("chat_template.jinja", "chat_template.json", "tekken.json", "dict.txt"),
)
VOCABULARY_SUFFIXES = (".model", ".tiktoken", ".spm", ".vocab", ".bpe", ".codes")
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def carried_files(
    checkpoint: Checkpoint, code: bool = False, tokenizer: Checkpoint | None = None
) -> dict[str, Path | bytes]:
    """The files to copy, by their names in the output; custom code only if asked for.

    Those that speak of tokens are those of `tokenizer`, if it is given; all others are the checkpoint's.
    """
    own = _carried(checkpoint, code)
    source = tokenizer or checkpoint
    if source.tokenizer == checkpoint.folder:
        return own
    adapter = source.own_tokenizer  # which says nothing of generation
    theirs = _in_folder(adapter, code) if adapter else _carried(source, code)
    return {
        **{name: path for name, path in own.items() if not _of_tokens(name) or (adapter and name == GENERATION)},
        **{name: path for name, path in theirs.items() if _of_tokens(name)},
    }


def _of_tokens(name: str) -> bool:
    """Whether a file belongs to the tokenizer: it holds tokens, or numbers of tokens."""
    return name in OF_TOKENS or name.endswith(VOCABULARY_SUFFIXES) or name.startswith(CARRIED_FOLDERS)


def _carried(checkpoint: Checkpoint, code: bool) -> dict[str, Path | bytes]:
    if checkpoint.texts is not None:
        return {name: text for name, text in checkpoint.texts.items() if code or not name.endswith(".py")}
    return _in_folder(checkpoint.folder, code)


def _in_folder(folder: Path, code: bool) -> dict[str, Path | bytes]:
    if (folder / MODEL_INDEX).exists():
        subs = [*component_folders(read_model_index(folder))]
        names = [
            *_small_files(folder, code),
            *(f"{sub}/{name}" for sub in subs for name in _small_files(folder / sub, code)),
        ]
        return {name: folder / name for name in names}
    if not (folder / "config.json").exists() and not is_adapter(folder):
        return {}  # a bare .safetensors file among others: nothing there is known to be its own
    names = _small_files(folder, code)
    for sub in CARRIED_FOLDERS:
        names += [f"{sub}/{path.name}" for path in sorted((folder / sub).glob("*.jinja")) if path.is_file()]
    return {name: folder / name for name in names}


def _small_files(folder: Path, code: bool) -> list[str]:
    return [path.name for path in sorted(folder.iterdir()) if path.is_file() and _travels(path.name, code)]


def content(text: Path | bytes) -> bytes:
    """All of a small file; Failed if it cannot be read."""
    try:
        return text.read_bytes() if isinstance(text, Path) else text
    except OSError as error:
        raise Failed(f"{text!s}: cannot be read: {error.strerror}") from error


def _travels(name: str, code: bool) -> bool:
    if name.startswith(".") or name in LEFT or name.endswith(LEFT_SUFFIXES):
        return False
    return name.endswith(CARRIED_SUFFIXES) or name.startswith(CARRIED_STEMS) or (code and name.endswith(".py"))


def carried_config(name: str, text: Path | bytes, layout: Checkpoint, entries: list[Entry]) -> Path | bytes:
    """A config of a pipeline, or of a part of it of which `entries` are merged; as it is, where none are."""
    config = layout.parts.get(name.partition("/")[0]) if name.endswith("/config.json") else None
    updated = updated_config(config or {}, entries)
    return text if config is None or updated == config else config_bytes(updated)


def updated_config(config: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """The config with `dtype` / `torch_dtype` as the weights now are, wherever it states them.

    Without the absolute path that some libraries note: the folder is another's now, and may be published.
    """
    config = {key: value for key, value in config.items() if key != "_name_or_path" or not is_absolute(str(value))}
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
    theirs = _tokenizer(one)
    return not any(theirs) or theirs == _tokenizer(other)


def _tokenizer(checkpoint: Checkpoint) -> list[bytes | None]:
    found = [tokenizer_file(checkpoint, name) for name in TOKENIZER_FILES]
    return [None if text is None else content(text) for text in found]


def tokenizer_file(checkpoint: Checkpoint, name: str) -> Path | bytes | None:
    """The content of one of its tokenizer's files, or where that is; None if it has no such file."""
    if checkpoint.texts is not None:
        return checkpoint.texts.get(name)
    path = checkpoint.tokenizer / name
    return path if path.is_file() else None
