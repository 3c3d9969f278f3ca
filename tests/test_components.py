"""Names of real checkpoints, in the hub's layout and in that of transformers 5, fall into the right place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.components import component, layer, rename_layer

NAMES = {
    "vision tower": [
        "visual.patch_embed.proj.weight",  # Qwen2-VL on the hub
        "visual.blocks.3.attn.qkv.weight",
        "model.visual.blocks.3.mlp.fc1.bias",  # Qwen in transformers 5
        "model.visual.pos_embed.weight",  # Qwen3-VL
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",  # LLaVA, Gemma-3, PaliGemma
        "model.vision_tower.embeddings.patch_embedding.weight",
        "vision_tower.transformer.layers.0.attention.q_proj.weight",  # Mistral3
        "model.vision_model.encoder.layers.0.layer_norm1.weight",  # Idefics3, SmolVLM
        "vision_model.encoder.layers.2.attn.qkv.weight",  # InternVL
        "vision_model.head.attention.in_proj_weight",  # SigLIP's pooling
        "vision_model.encoder.stages.0.layers.0.shortcut.normalization.running_mean",  # ResNet
        "visual.transformer.resblocks.0.ln_1.weight",  # OpenCLIP
    ],
    "projector": [
        "visual.merger.mlp.0.weight",
        "model.visual.merger.ln_q.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.mm_input_projection_weight",  # Gemma-3
        "multi_modal_projector.patch_merger.merging_layer.weight",  # Mistral3
        "model.mm_projector.0.weight",  # LLaVA's own code
        "image_newline",  # LLaVA-OneVision
        "model.image_newline",
        "model.connector.modality_projection.proj.weight",
        "mlp1.0.weight",  # InternVL
        "qformer.encoder.layer.0.output.dense.weight",  # BLIP-2
        "query_tokens",
        "model.multi_modal_projector.image_projection.weight",  # Florence-2
    ],
    "projection": [
        "visual_projection.weight",
        "visual_projection.0.weight",
        "text_projection.weight",
        "text_projection",
        "visual.proj",
    ],
    "text encoder": [
        "text_model.encoder.layers.0.self_attn.k_proj.weight",  # CLIP, SigLIP
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.word_embeddings.weight",  # a BERT in a dual encoder
        "text_model.final_layer_norm.bias",
        "text_model.head.weight",
        "transformer.resblocks.0.ln_1.weight",
        "positional_embedding",
    ],
    "logit scale": ["logit_scale", "logit_bias", "model.logit_scale"],
    "embeddings": [
        "model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "model.text_model.embed_tokens.weight",
        "shared.weight",
        "encoder.embed_tokens.weight",
        "transformer.wte.weight",
        "bert.embeddings.word_embeddings.weight",
    ],
    "language model": [
        "model.layers.0.mlp.down_proj.weight",  # Llama, and Qwen2-VL on the hub
        "model.layers.3.mlp.experts.7.w1.weight",
        "model.norm.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.language_model.norm.weight",
        "model.text_model.layers.0.self_attn.q_proj.weight",
        "model.text_model.norm.weight",
        "language_model.model.decoder.layers.0.fc1.weight",  # OPT in BLIP-2
        "transformer.h.0.attn.c_attn.weight",
        "h.0.attn.c_attn.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
    ],
    "lm head": ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight", "output.weight"],
    "encoder": ["encoder.block.3.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"],
    "decoder": ["decoder.block.3.layer.1.EncDecAttention.q.weight", "model.decoder.layers.0.fc1.weight"],
    "audio tower": ["audio_tower.layers.0.fc1.weight"],
    "unet": [
        "down_blocks.0.resnets.0.conv1.weight",
        "model.diffusion_model.input_blocks.1.0.weight",
        "conv_in.weight",
    ],
    "vae": ["decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight", "post_quant_conv.weight"],
    "other": ["", "w", "classifier.weight", "vision", "lm_header.weight", "a.visuals.b", "score.weight"],
}


@pytest.mark.parametrize(("name", "expected"), [(name, key) for key, names in NAMES.items() for name in names])
def test_component(name: str, expected: str) -> None:
    assert component(name) == ("vision tower" if name == "vision" else expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7.mlp.up_proj.weight", ("model.layers", 7)),
        ("model.layers.3.mlp.experts.7.w1.weight", ("model.layers", 3)),
        ("model.language_model.layers.11.self_attn.q_proj.weight", ("model.language_model.layers", 11)),
        ("model.visual.blocks.31.norm1.weight", ("model.visual.blocks", 31)),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", ("encoder.block", 3)),
        (
            "vision_model.encoder.stages.2.layers.0.layer.1.convolution.weight",
            ("vision_model.encoder.stages", 2),
        ),
        ("bert.encoder.layer.4.output.dense.weight", ("bert.encoder.layer", 4)),
        ("transformer.h.5.ln_1.weight", ("transformer.h", 5)),
        ("h.5.ln_1.weight", ("h", 5)),
        ("visual.transformer.resblocks.9.ln_1.weight", ("visual.transformer.resblocks", 9)),
        ("down_blocks.1.attentions.0.transformer_blocks.2.norm1.weight", ("down_blocks", 1)),
        ("single_transformer_blocks.4.norm.weight", ("single_transformer_blocks", 4)),
        ("layers.0", ("layers", 0)),
        ("visual_projection.0.weight", None),
        ("mlp1.1.weight", None),
        ("model.mm_projector.2.bias", None),
        ("visual.merger.mlp.0.weight", None),
        ("model.visual.deepstack_merger_list.1.norm.weight", None),
        ("model.embed_tokens.weight", None),
        ("logit_scale", None),
        ("layers.weight", None),
        ("layers.1st.weight", None),
        ("mesh.3.weight", None),
        ("layers." + "9" * 5000, None),
    ],
)
def test_layer(name: str, expected: tuple[str, int] | None) -> None:
    assert layer(name) == expected


def test_rename_layer() -> None:
    assert rename_layer("model.layers.3.mlp.experts.3.w1.weight", 12) == "model.layers.12.mlp.experts.3.w1.weight"
    assert rename_layer("encoder.block.3.layer.0.w", 0) == "encoder.block.0.layer.0.w"
    with pytest.raises(ValueError, match="lies in no layer"):
        rename_layer("lm_head.weight", 1)


parts = st.sampled_from(["model", "layers", "h", "block", "visual", "merger", "0", "7", "12", "weight", "x_blocks"])


@given(name=st.lists(parts, max_size=8).map(".".join) | st.text(max_size=30), new=st.integers(0, 999))
def test_renaming_changes_the_layer_and_nothing_else(name: str, new: int) -> None:
    place = layer(name)
    if place is None:
        return
    stack, _ = place
    renamed = rename_layer(name, new)
    assert layer(renamed) == (stack, new)
    assert renamed.removeprefix(f"{stack}.{new}") == name[len(stack) + 1 :].lstrip("0123456789")
    assert component(renamed) == component(name)
