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

# How names of a language model begin that stands alone or in a wrapper: `model.`, `gpt_neox.`, `thinker.model.`.
_BARE = r"^(?!\w*(tower|encoder|decoder|tokenizer|codec))(\w+\.)?(model\.)*"

# The first pattern that is found names the component, so what lies inside something else comes first: Qwen's
# merger is inside `visual`, Molmo's projector inside the vision backbone, embeddings inside a language model.
_PATTERNS: list[tuple[Component, str]] = [
    ("unet", r"^unet\."),  # the parts of a diffusion pipeline, whatever is inside them
    ("vae", r"^(vae|first_stage_model)\."),
    ("text_encoder_2", r"^(text_encoder_2|conditioner\.embedders\.(1|0\.model)|text_encoders\.clip_g)\."),
    ("text_encoder_3", r"^(text_encoder_3|text_encoders\.t5xxl)\."),
    ("text_encoder", r"^(text_encoder|text_encoders|conditioner\.embedders|cond_stage_model)\."),
    ("other", r"^(talker|token2wav|code2wav|gen_vision_model)\."),  # what Qwen's Omni speaks with, and Janus draws with
    ("logit_scale", r"(^|\.)logit_(scale|bias)$|^temperature$"),
    ("projector", r"(^|\.)(visual|vision_tower|vision_model)\.(merger|deepstack_merger_list|merger_list)\."),
    ("projector", _part("multi_modal_projector|multimodal_projector|mm_projector|image_projector|projector")),
    ("projector", _part("vision_projector|speech_projector|vit_large_projector|pre_mm_projector_norm")),
    ("projector", _part(r"image_to_text_projection|vision\.linear_proj|audio_embed\.audio_projection")),
    ("projector", _part("connector|aligner|resampler|abstractor|qformer|query_tokens|language_projection")),
    ("projector", _part("perceiver_resampler|vision_resampler|resampler_model")),
    ("projector", _part("embed_vision|embed_audio|img_projection|image_proj_norm|image_newline|view_sep[ae]rator")),
    ("projector", _part("image_pos_embed|visual_temporal_embed|visual_embeddings_table|vte")),
    ("projector", r"^(model\.)?(mlp1|mlp_AR|merger|patch_merger|patch_merge_mlp)\."),
    ("projector", r"^(model\.)?(vision_language_adapter|visual_adapter|vision_adapter)\."),
    ("projector", r"^model\.vision_projection\.|^image_projection$"),
    ("projection", _part("visual_projection|vision_projection|text_projection|image_projection")),
    ("projection", r"^visual\.proj$|^(vision|text)_proj\.|(^|\.)(custom_text_proj|embedding_proj_layer)\."),
    ("vision_tower", _part("vision_tower|vision_model|vision_encoder|vision_backbone|vision_embed_tokens")),
    ("vision_tower", _part("visual|vision|image_encoder|vit|vpm|visual_tokenizer|image_embed")),
    ("vision_tower", _part(r"image_tower|video_tower|video_model|sam_model|high_res_vision_\w+")),
    ("audio_tower", _part("audio_tower|audio_model|audio_encoder|audio_embed|speech_encoder")),
    ("transformer", _DIT + r"(transformer_blocks|single_transformer_blocks|(joint|double|single)_blocks)\."),
    ("transformer", _DIT + r"((x|t|y|context)_embedder|time_text_embed|(img|txt|time|vector|guidance)_in)\."),
    ("transformer", _DIT + r"(final_layer|norm_out|proj_out|pos_embed\.proj)\.|^model\.diffusion_model\.pos_embed$"),
    ("transformer", _DIT + r"pos_embed\.pos_embed$"),
    ("unet", r"^(model\.diffusion_model|down_blocks|mid_block|up_blocks|time_embedding)\."),
    ("unet", r"^(add_embedding|conv_in|conv_out|conv_norm_out)\."),
    ("vae", r"^(quant_conv|post_quant_conv)\."),
    ("vae", r"^(encoder|decoder)\.(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out)\."),
    # `text_model` is the text encoder of CLIP and SigLIP, and the language model of Idefics, SmolVLM and Kosmos.
    ("text_encoder", r"^(\w+\.)?text_model\.(?!(model|layers|norm|embed_tokens|lm_head)\.)"),
    ("text_encoder", r"^(text|transformer\.resblocks|token_embedding|ln_final)\.|^positional_embedding$"),
    ("lm_head", _part("lm_head|embed_out")),
    ("lm_head", r"^((model|language_model)\.)*output\.(weight|bias)$|^(text_decoder\.)?cls\.predictions\."),
    ("lm_head", r"(^|\.)transformer\.ff_out\.|^output_projection\.|^final_logits_bias$"),
    ("embeddings", _part("embed_tokens|embed_tokens_per_layer|embed_in|tok_embeddings|word_embeddings")),
    ("embeddings", r"(^|\.)(wte|wpe|shared)\.(weight|embedding|new_embedding)$"),
    ("embeddings", r"^(?!(encoder|decoder)\.)(\w+\.)?embeddings\.|^((model|language_model|backbone)\.)+embeddings\."),
    ("encoder", r"^(\w+\.)?encoder\."),
    ("decoder", r"^(\w+\.)?decoder\.|^text_decoder\."),
    ("language_model", _part("language_model|language|text_model|llm|transformer|gpt_neox|backbone")),
    # Any number of `model.` below one other word, but no tower: what is called otherwise is better told by its name.
    ("language_model", _BARE + r"(layers|h|gated_cross_attn_layers|altup_(unembed_)?projections)\.[0-9]+\."),
    ("language_model", _BARE + r"(norm|ln_f|norm_f|final_norm|final_layer_?norm|layer_norm|embedding_norm)\."),
    ("language_model", _BARE + r"(rotary_emb|per_layer_model_projection|per_layer_projection_norm|hc_head)\."),
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
