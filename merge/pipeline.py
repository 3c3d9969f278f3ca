"""A diffusers pipeline: a folder with model_index.json, whose sub-folders are models, tokenizers, a scheduler …

The pipeline is one table of tensors, `unet.conv_in.weight` for `conv_in.weight` in the folder `unet`. What a merge is
about is the denoiser, the parts whose names begin with `unet` or `transformer`; the others travel with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ggez_merge.errors import Problem, Refused
from ggez_merge.layout import holds_weights
from ggez_merge.untrusted import printable, read_json_bytes, strict_json

MODEL_INDEX = "model_index.json"
_FOLDER = re.compile(r"[A-Za-z0-9]\w*", re.ASCII)  # without a dot: what comes before the first one is the folder
_WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")


def is_denoiser(folder: str) -> bool:
    """Whether the part of a pipeline in this sub-folder is one that a merge is about."""
    return folder.startswith(("unet", "transformer"))


def read_model_index(root: Path) -> dict[str, Any]:
    """The content of model_index.json; Refused if it is broken, or names a folder that is none of its own."""
    path = root / MODEL_INDEX
    try:
        index = strict_json(read_json_bytes(path))
        if not isinstance(index, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        remedy = "download it again, or save the pipeline again"
        raise Refused(Problem(f"{MODEL_INDEX} cannot be read: {error}", place=str(path), remedy=remedy)) from None
    unfit = [name for name in component_folders(index) if not _FOLDER.fullmatch(name)]
    if unfit:
        expected = "letters, digits and underscores, such as text_encoder_2"
        raise Refused(
            Problem("this is no name for a pipeline's folder", str(path), None, expected, printable(repr(name)))
            for name in unfit
        )
    return index


def component_folders(index: Mapping[str, Any]) -> dict[str, str]:
    """Sub-folder -> class, for every component that is there: `"vae": ["diffusers", "AutoencoderKL"]`."""
    return {
        name: value[1]
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }


def model_folders(index: Mapping[str, Any], files: Iterable[str]) -> list[str]:
    """Those of the folders that are models, by what lies in them; files: paths below the pipeline's own folder."""
    found: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.partition("/")
        found.setdefault(folder, []).append(name)
    return [
        folder
        for folder, kind in component_folders(index).items()
        if holds_weights(found.get(folder, ()))
        or ("config.json" in found.get(folder, ()) and not kind.endswith(_WEIGHTLESS))  # a model that lacks its weights
    ]
