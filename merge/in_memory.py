"""A checkpoint's names as the model has them in memory, and which of them are linear layers' weights.

transformers and PEFT find modules by those names, which are not always the file's. The model is built without weights
from its config.json; what transformers does not build (custom code, no config) has the file's names, and its linear
layers are told by name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ggez_merge.align import part
from ggez_merge.checkpoint import FLOATS, Checkpoint
from ggez_merge.heads import HEAD, is_vocabulary
from ggez_merge.names import match

_TABLES = re.compile(r"(embed\w*|wte|wpe|shared|relative_attention_bias)$")  # modules that look up rows


@dataclass(frozen=True)
class InMemory:
    """`names`: the file's -> memory's, for all that was found there; `linear` are of the file's."""

    names: Mapping[str, str]
    linear: frozenset[str]


def in_memory(checkpoint: Checkpoint) -> InMemory:
    return _by_transformers(checkpoint) or _by_name(checkpoint)


def _by_transformers(checkpoint: Checkpoint) -> InMemory | None:
    stated = (checkpoint.config or {}).get("architectures")
    if not isinstance(stated, list) or not stated:
        return None
    try:
        import torch
        import transformers

        # Never code that lies beside the weights, nor a class that is not a model's: the file says what is run here.
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
        kind = getattr(transformers, str(stated[0]))
        if not issubclass(kind, transformers.PreTrainedModel):
            return None
        with torch.device("meta"):
            model = kind(config)
    except Exception:  # whatever a config makes transformers stumble over: then nothing is known
        return None
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    found = match(ours, theirs, part)
    if found.ambiguous or found.doubled:
        return None
    names = {own: name for own, name in found.canonical.items() if ours.get(name) == theirs[own]}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return InMemory(names, frozenset(own for own, name in names.items() if name in linear))


def _by_name(checkpoint: Checkpoint) -> InMemory:
    def is_linear(name: str) -> bool:
        tensor = checkpoint.tensors[name]
        matrix = name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATS
        table = _TABLES.search(name.removesuffix(".weight")) or (is_vocabulary(name, tensor) and not HEAD.search(name))
        bias = checkpoint.tensors.get(f"{name.removesuffix('weight')}bias")
        turned = bias is not None and bias.shape != tensor.shape[:1]  # GPT-2 has its weights on their sides
        return matrix and not table and not turned

    names = {name: name for name in checkpoint.tensors}
    return InMemory(names, frozenset(name for name in names if is_linear(name)))
