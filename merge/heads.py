"""Tied and untied language model heads: what a checkpoint without an lm_head has in its place.

A model whose config ties the two has its embeddings as its head, whether or not its file holds a second copy. As long
as all inputs do so, so does the result. If one has a head of its own, the others' embeddings stand in for theirs, and
the result has a head of its own too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ggez_merge.checkpoint import Checkpoint, Tensor
from ggez_merge.components import component
from ggez_merge.recipe import ModelReference

HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
TIE = "tie_word_embeddings"
_NOT_TOKENS = re.compile(
    r"(^|[._])(position\w*|pos|token_type\w*|wpe|patch\w*|norm|transform|final_logits_bias)([._]|$)", re.IGNORECASE
)


def resolve_heads(
    layout: Checkpoint, checkpoints: Mapping[ModelReference, Checkpoint], config: dict[str, Any] | None
) -> tuple[Checkpoint, dict[ModelReference, Checkpoint], list[str]]:
    """Layout and inputs, all with a head or all without; `config` is changed to say which. And what to tell of it."""
    everyone = [layout, *checkpoints.values()]
    heads = [name for name in dict.fromkeys(n for c in everyone for n in c.tensors) if HEAD.search(name)]
    said = {ties(c.config) for c in everyone}
    if len(heads) != 1 or (all(heads[0] in c.tensors for c in everyone) and not said >= {True, False}):
        return layout, dict(checkpoints), []
    (head,) = heads
    stand_ins = {id(c): _embeddings(c) for c in everyone if head not in c.tensors or ties(c.config)}
    headless = [c.config for c in everyone if head not in c.tensors]
    if not all(stand_ins.values()) or not all(_tied(config) for config in headless):
        return layout, dict(checkpoints), []  # a head that is not there is a missing tensor like any other
    own = [c.reference for c in everyone if id(c) not in stand_ins]

    def resolved(checkpoint: Checkpoint) -> Checkpoint:
        tensors = dict(checkpoint.tensors)
        if not own:
            tensors.pop(head, None)
        elif id(checkpoint) in stand_ins:
            tensors[head] = stand_ins[id(checkpoint)] or tensors[head]
        return replace(checkpoint, tensors=tensors)

    note = f"{head} is left out: every input ties it to its embeddings"
    if own:
        tied = ", ".join(dict.fromkeys(c.reference for c in everyone if id(c) in stand_ins))
        note = f"{own[0]} has a head of its own, so the result has: the embeddings of {tied} stand in for {head}"
        if config is not None:
            untie(config)
    return resolved(layout), {reference: resolved(c) for reference, c in checkpoints.items()}, [note]


def ties(config: Any) -> bool | None:
    """What a config says of it, on top or in the text model's part; None if nothing."""
    if not isinstance(config, dict):
        return None
    said = [config.get(TIE), *(part.get(TIE) for part in config.values() if isinstance(part, dict))]
    return next((value for value in said if isinstance(value, bool)), None)


def _tied(config: Any) -> bool:
    """Whether a model without a head ties it: its config says so or, being one of transformers, leaves the default.

    A text model that was saved without what stands around it (`Qwen2_5_VLTextModel`) has no head to tie.
    """
    said = ties(config)
    if said is not None or not isinstance(config, dict):
        return said is True
    classes = config.get("architectures")
    bare = isinstance(classes, list) and any(isinstance(name, str) and name.endswith("Model") for name in classes)
    return "model_type" in config and not bare


def is_vocabulary(name: str, tensor: Tensor) -> bool:
    """Whether its rows are tokens' rows: input embeddings, the head, the head's bias."""
    if _NOT_TOKENS.search(name):
        return False
    if len(tensor.shape) == 1:
        return component(name) == "lm_head"
    tokens = component(name) in ("embeddings", "lm_head") or name.endswith("token_embedding.weight")
    return len(tensor.shape) == 2 and tokens


def _embeddings(checkpoint: Checkpoint) -> Tensor | None:
    found = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if is_vocabulary(name, tensor) and component(name) == "embeddings" and "per_layer" not in name
    ]
    return found[0] if len(found) == 1 else None


def untie(config: dict[str, Any]) -> None:
    config[TIE] = False
    for part in config.values():
        if isinstance(part, dict) and (part.get(TIE) is not None or "vocab_size" in part):
            part[TIE] = False
