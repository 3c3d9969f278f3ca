"""Tensor name -> the part of the model it belongs to, and the layer it lies in, from the name alone.

Names are read as checkpoints hold them, in the old and the new layout of each family (`visual.*` and
`model.visual.*`, `language_model.model.*` and `model.language_model.*`), so no model class has to be known. Diffusion
models are read as diffusers' folders (`down_blocks.*`, or `unet.*` in a table of the whole pipeline) and as single
files in the authors' layout (`model.diffusion_model.*`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import takewhile
from typing import Literal, get_args


def _part(words: str) -> str:
    """A pattern for any of `words` as a whole part of a dotted name."""
    return rf"(^|\.)({words})(\.|$)"


Component = Literal[
    "vision_tower",
    "audio_tower",
    "projector",
    "embeddings",
    "encoder",
    "decoder",
    "language_model",
    "lm_head",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "projection",
    "logit_scale",
    "unet",
    "transformer",
    "vae",
    "other",
]
COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Every component, in the order in which data flows and tables list them, by the name that recipes use."""

# How names of a diffusion transformer (SD3, Flux) begin: bare in diffusers' folder and in Flux' own files.
_DIT = r"^((model\.diffusion_model|transformer)\.)?"

# The first pattern that is found names the component, so what lies inside something else comes first: Qwen's
# merger is inside `visual`, Molmo's projector inside the vision backbone, embeddings inside a language model.
_PATTERNS: list[tuple[Component, str]] = [
    ("logit_scale", r"(^|\.)logit_(scale|bias)$"),
    ("projector", r"(^|\.)visual\.(merger|deepstack_merger_list|merger_list)\."),
    ("projector", _part("multi_modal_projector|multimodal_projector|mm_projector|image_projector")),
    ("projector", _part("connector|aligner|resampler|abstractor|qformer|query_tokens|language_projection")),
    ("projector", _part("embed_vision|embed_audio|img_projection|image_proj_norm|image_newline")),
    ("projector", r"^(model\.)?(mlp1|patch_merger|vision_language_adapter|visual_adapter)\."),
    ("projection", _part("visual_projection|vision_projection|text_projection|image_projection")),
    ("projection", r"^visual\.proj$"),
    ("vision_tower", _part("vision_tower|vision_model|vision_encoder|vision_backbone|vision_embed_tokens")),
    ("vision_tower", _part("visual|vision|image_encoder|vit|vpm|visual_tokenizer")),
    ("audio_tower", _part("audio_tower|audio_model|audio_encoder")),
    ("transformer", _DIT + r"(transformer_blocks|single_transformer_blocks|(joint|double|single)_blocks)\."),
    ("transformer", _DIT + r"((x|t|y|context)_embedder|time_text_embed|(img|txt|time|vector|guidance)_in)\."),
    ("transformer", _DIT + r"(final_layer|norm_out|proj_out|pos_embed\.proj)\.|^model\.diffusion_model\.pos_embed$"),
    ("unet", r"^(model\.diffusion_model|unet|down_blocks|mid_block|up_blocks|time_embedding)\."),
    ("unet", r"^(add_embedding|conv_in|conv_out|conv_norm_out)\."),
    ("vae", r"^(first_stage_model|vae|quant_conv|post_quant_conv)\."),
    ("vae", r"^(encoder|decoder)\.(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out)\."),
    ("text_encoder_2", r"^(conditioner\.embedders\.1|text_encoder_2|text_encoders\.clip_g)\."),
    ("text_encoder_3", r"^(text_encoder_3|text_encoders\.t5xxl)\."),
    ("text_encoder", r"^(conditioner\.embedders|cond_stage_model|text_encoder|text_encoders)\."),
    # `text_model` is the text encoder of CLIP and SigLIP, and the language model of Idefics and SmolVLM.
    ("text_encoder", r"^(\w+\.)?text_model\.(?!(model\.)?(layers|norm|embed_tokens)\.)"),
    ("text_encoder", r"^(text|transformer\.resblocks|token_embedding|ln_final)\.|^positional_embedding$"),
    ("lm_head", _part("lm_head|embed_out")),
    ("lm_head", r"^((model|language_model)\.)*output\.weight$|^cls\.predictions\."),
    ("embeddings", _part("embed_tokens|embed_tokens_per_layer|embed_in|tok_embeddings|word_embeddings")),
    ("embeddings", r"(^|\.)(wte|wpe|shared)\.weight$|^(\w+\.)?embeddings\."),
    ("encoder", r"^(\w+\.)?encoder\."),
    ("decoder", r"^(\w+\.)?decoder\."),
    ("language_model", _part("language_model|text_model|llm|transformer|gpt_neox|backbone")),
    ("language_model", r"^(\w+\.)*(layers|h)\.[0-9]+\.|^(\w+\.)?(norm|ln_f|final_layernorm|rotary_emb)\."),
]
_COMPONENTS = [(name, re.compile(pattern)) for name, pattern in _PATTERNS]

# `layers.7`, `h.7`, `stages.7`, `transformer_blocks.7`; a number after anything else counts the parts of
# an nn.Sequential, experts or parallel branches, not depth.
_LAYER = re.compile(
    r"(?:^|(?<=\.))(?P<kind>h|(?:\w+_)?(?:layers?|blocks?|resblocks|stages?))\."
    r"(?P<number>[0-9]{1,6})(?=\.|$)"
)


# The layer itself: `norm1.linear` of an adaptive norm is no norm, CLIP's `pre_layrnorm` is one.
_NORM = re.compile(
    r"(?:^|\.)(?:\w*(?:norm|layrnorm)\w*|(?:\w+_)?ln|ln_\w+|bn[0-9]*)"
    r"\.(?:weight|bias|scale|gamma|beta|running_mean|running_var|num_batches_tracked)$",
    re.IGNORECASE,
)
_MOST_GROUPS = 12  # unrecognised names in more groups than these are not worth a line each


def component(name: str) -> Component:
    """The part of the model that a tensor belongs to, by the name that recipes use.

    Every tensor belongs to one: a projector lies between tower and language model, a projection leads into the joint
    space of a dual encoder, embeddings inside a tower belong to the tower, those of the language model and its head
    are components of their own, and in "other" is what the name does not tell.
    """
    return next((label for label, pattern in _COMPONENTS if pattern.search(name)), "other")


def is_norm(name: str) -> bool:
    """Whether a tensor belongs to a normalisation layer, of whatever component, as far as its name tells."""
    return _NORM.search(name) is not None


def split(names: Iterable[str]) -> dict[str, str]:
    """For each name its component, or, where that is "other", a glob of the names that begin alike: "trunk.*".

    Unrecognised names are told apart by the first word in which they differ, unless that makes too many groups.
    Every label can stand in a recipe's `components:`.
    """
    labels: dict[str, str] = {name: component(name) for name in names}
    unknown = {name: name.split(".") for name, label in labels.items() if label == "other"}
    columns = zip(*(words[:-1] for words in unknown.values()), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    globs = {}
    for name, words in unknown.items():
        number = next((at for at, word in enumerate(words) if word.isdecimal()), len(words))
        stem = words[: max(1, min(shared + 1, number))]
        globs[name] = ".".join([*stem, "*"]) if len(stem) < len(words) else name
    if len(set(globs.values())) <= _MOST_GROUPS:
        labels.update(globs)
    return labels


def unrecognised(names: Iterable[str]) -> str | None:
    """A remark for people on the tensors that no component's pattern fits; None if there are none."""
    unknown = [name for name in names if component(name) == "other"]
    if not unknown:
        return None
    labels = list(dict.fromkeys(split(unknown).values()))
    how = "together" if labels == ["other"] else "by how their names begin"
    return (
        f"the names of {len(unknown):,} of the tensors do not tell their component: they are listed {how}; "
        "in a recipe's `components:`, what is listed selects them, or `other` all of them"
    )


def layer(name: str) -> tuple[str, int] | None:
    """Stack and depth of a tensor: ("model.layers", 7) for `model.layers.7.mlp.experts.3.weight`.

    The outermost layer counts (`stages.0.layers.1` is stage 0); None for a tensor outside any stack.
    """
    match = _LAYER.search(name)
    return None if match is None else (name[: match.end("kind")], int(match["number"]))


def rename_layer(name: str, new: int) -> str:
    """`name` moved to layer `new` of the same stack; ValueError for a tensor outside any stack."""
    match = _LAYER.search(name)
    if match is None:
        raise ValueError(f"{name!r} lies in no layer")
    return f"{name[: match.start('number')]}{new}{name[match.end('number') :]}"
