"""Tensor name -> the part of the model it belongs to, and the layer it lies in, from the name alone.

Names are read as checkpoints hold them, in the old and the new layout of each family (`visual.*` and
`model.visual.*`, `language_model.model.*` and `model.language_model.*`), so no model class has to be known.
"""

from __future__ import annotations

import re


def _part(words: str) -> str:
    """A pattern for any of `words` as a whole part of a dotted name."""
    return rf"(^|\.)({words})(\.|$)"


COMPONENTS = (
    "vision tower",
    "audio tower",
    "projector",
    "embeddings",
    "encoder",
    "decoder",
    "language model",
    "lm head",
    "text encoder",
    "projection",
    "logit scale",
    "unet",
    "vae",
    "other",
)
"""Every component, in the order in which data flows and tables list them."""

# The first pattern that is found names the component, so what lies inside something else comes first: Qwen's
# merger is inside `visual`, Molmo's projector inside the vision backbone, embeddings inside a language model.
_PATTERNS = [
    ("logit scale", r"(^|\.)logit_(scale|bias)$"),
    ("projector", r"(^|\.)visual\.(merger|deepstack_merger_list|merger_list)\."),
    ("projector", _part("multi_modal_projector|multimodal_projector|mm_projector|image_projector")),
    ("projector", _part("connector|aligner|resampler|abstractor|qformer|query_tokens|language_projection")),
    ("projector", _part("embed_vision|embed_audio|img_projection|image_proj_norm|image_newline")),
    ("projector", r"^(model\.)?(mlp1|patch_merger|vision_language_adapter|visual_adapter)\."),
    ("projection", _part("visual_projection|vision_projection|text_projection|image_projection")),
    ("projection", r"^visual\.proj$"),
    ("vision tower", _part("vision_tower|vision_model|vision_encoder|vision_backbone|vision_embed_tokens")),
    ("vision tower", _part("visual|vision|image_encoder|vit|vpm|visual_tokenizer")),
    ("audio tower", _part("audio_tower|audio_model|audio_encoder")),
    ("unet", r"^(model\.diffusion_model|unet|down_blocks|mid_block|up_blocks|time_embedding)\."),
    ("unet", r"^(add_embedding|conv_in|conv_out|conv_norm_out)\."),
    ("vae", r"^(first_stage_model|vae|quant_conv|post_quant_conv)\."),
    ("vae", r"^(encoder|decoder)\.(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out)\."),
    ("text encoder", r"^(conditioner\.embedders|cond_stage_model|text_encoder(_[0-9])?)\."),
    # `text_model` is the text encoder of CLIP and SigLIP, and the language model of Idefics and SmolVLM.
    ("text encoder", r"^(\w+\.)?text_model\.(?!(model\.)?(layers|norm|embed_tokens)\.)"),
    ("text encoder", r"^(text|transformer\.resblocks|token_embedding|ln_final)\.|^positional_embedding$"),
    ("lm head", _part("lm_head|embed_out")),
    ("lm head", r"^((model|language_model)\.)*output\.weight$|^cls\.predictions\."),
    ("embeddings", _part("embed_tokens|embed_tokens_per_layer|embed_in|tok_embeddings|word_embeddings")),
    ("embeddings", r"(^|\.)(wte|wpe|shared)\.weight$|^(\w+\.)?embeddings\."),
    ("encoder", r"^(\w+\.)?encoder\."),
    ("decoder", r"^(\w+\.)?decoder\."),
    ("language model", _part("language_model|text_model|llm|transformer|gpt_neox|backbone")),
    ("language model", r"^(\w+\.)*(layers|h)\.[0-9]+\.|^(\w+\.)?(norm|ln_f|final_layernorm|rotary_emb)\."),
]
_COMPONENTS = [(name, re.compile(pattern)) for name, pattern in _PATTERNS]

# `layers.7`, `h.7`, `stages.7`, `transformer_blocks.7`; a number after anything else counts the parts of
# an nn.Sequential, experts or parallel branches, not depth.
_LAYER = re.compile(
    r"(?:^|(?<=\.))(?P<kind>h|(?:\w+_)?(?:layers?|blocks?|resblocks|stages?))\."
    r"(?P<number>[0-9]{1,6})(?=\.|$)"
)


def component(name: str) -> str:
    """The part of the model that a tensor belongs to, as a user would call it.

    One of COMPONENTS: a projector lies between tower and language model, a projection leads into the joint
    space of a dual encoder, embeddings inside a tower belong to the tower, and in "other" is what the name
    does not tell.
    """
    return next((label for label, pattern in _COMPONENTS if pattern.search(name)), "other")


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
