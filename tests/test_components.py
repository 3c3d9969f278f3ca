"""Names of real checkpoints, in the hub's layout and in that of transformers 5, fall into the right place."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, LAYOUTS
from safetensors import safe_open

from ggez_merge.components import COMPONENTS, component, is_norm, layer, rename_layer, split, unrecognised

NAMES = {
    "vision_tower": [
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
        "model.video_tower.encoder.layers.0.mlp.fc1.weight",  # Video-LLaVA
        "image_tower.embeddings.class_embedding",
        "model.sam_model.blocks.0.attn.qkv.weight",  # DeepSeek-OCR
        "model.high_res_vision_neck.conv1.weight",  # DeepSeek-VL
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.mlp.fc1.weight",  # Phi-4
        "vision.blocks.0.norm1.weight",  # DeepSeek-VL2's own code
        "vision_model.vision_adapter.mlp.fc1.weight",  # Llama 4
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
        "image_projection",  # Florence-2's own code
        "visual_temporal_embed.pos_idx_to_embed",
        "model.projector.linear_1.weight",  # PaddleOCR-VL, VideoLLaMA 3
        "mlp_AR.linear_1.weight",
        "projector.layers.0.weight",  # DeepSeek-VL2
        "model.view_seperator",
        "model.merger.mlp.0.linear_1.weight",  # MiniCPM-V
        "model.vision_tower.merger.mlp.0.weight",
        "model.vision_projection.patch_merger.merging_layer.weight",  # LightOnOCR
        "model.resampler_model.mlp.weight",  # Ernie 4.5 VL
        "image_to_text_projection.dense.weight",  # Kosmos-2
        "model.embed_tokens_extend.image_embed.img_projection.0.weight",
        "model.embed_tokens_extend.audio_embed.audio_projection.speech.0.weight",
        "model.visual_embeddings_table.weight",  # Ovis 2
        "vte.weight",
        "transformer.vision.linear_proj.gate_proj.weight",  # GLM-4V
        "pre_mm_projector_norm.weight",  # Mistral's own layout
    ],
    "projection": [
        "visual_projection.weight",
        "visual_projection.0.weight",
        "text_projection.weight",
        "text_projection",
        "visual.proj",
        "vision_projection.weight",  # BLIP-2 for retrieval
        "text_proj.weight",  # BLIP
        "vlm.custom_text_proj.weight",  # ColQwen2
        "embedding_proj_layer.weight",  # ColPali
    ],
    "text_encoder": [
        "text_model.encoder.layers.0.self_attn.k_proj.weight",  # CLIP, SigLIP
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.word_embeddings.weight",  # a BERT in a dual encoder
        "text_model.final_layer_norm.bias",
        "text_model.head.weight",
        "transformer.resblocks.0.ln_1.weight",
        "positional_embedding",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",  # SDXL in one file
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",  # SD1.5 in one file
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "logit_scale": ["logit_scale", "logit_bias", "model.logit_scale", "temperature"],
    "embeddings": [
        "model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "model.text_model.embed_tokens.weight",
        "shared.weight",
        "encoder.embed_tokens.weight",
        "transformer.wte.weight",
        "bert.embeddings.word_embeddings.weight",
        "model.transformer.wte.new_embedding",  # Molmo
        "language_model.backbone.embeddings.weight",  # Nemotron VL
        "llm.model.embed_tokens.weight",
    ],
    "language_model": [
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
        "text_model.model.layer_norm.weight",  # Kosmos-2
        "model.gated_cross_attn_layers.0.cross_attn.q_proj.weight",  # Idefics
        "thinker.model.norm.weight",  # Qwen's Omni models
        "language.model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "model.per_layer_model_projection.weight",  # Gemma 3n
        "model.altup_projections.0.weight",
        "model.final_norm.weight",
        "backbone.norm_f.weight",
    ],
    "lm_head": [
        "lm_head.weight",
        "language_model.lm_head.weight",
        "model.lm_head.weight",
        "output.weight",
        "text_model.lm_head.weight",
        "model.transformer.ff_out.weight",
        "text_decoder.cls.predictions.bias",
    ],
    "encoder": [
        "encoder.block.3.layer.0.SelfAttention.q.weight",
        "encoder.final_layer_norm.weight",
        "encoder.embeddings.patch_embeddings.projection.weight",
    ],  # TrOCR, Donut
    "decoder": [
        "decoder.block.3.layer.1.EncDecAttention.q.weight",
        "model.decoder.layers.0.fc1.weight",
        "text_decoder.bert.encoder.layer.0.output.dense.weight",
    ],  # BLIP
    "audio_tower": ["audio_tower.layers.0.fc1.weight", "speech_encoder.encoder.layers.0.ffn1.weight"],
    "unet": [
        "down_blocks.0.resnets.0.conv1.weight",
        "down_blocks.1.attentions.0.transformer_blocks.2.norm1.weight",
        "model.diffusion_model.input_blocks.1.0.weight",
        "unet.conv_in.weight",
        "conv_in.weight",
    ],
    "transformer": [
        "transformer_blocks.0.attn.to_q.weight",  # SD3 and Flux in diffusers' folders
        "single_transformer_blocks.4.norm.linear.weight",
        "transformer.transformer_blocks.0.attn.to_q.weight",
        "pos_embed.proj.weight",
        "transformer.pos_embed.pos_embed",
        "time_text_embed.timestep_embedder.linear_1.weight",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",  # SD3 in one file
        "model.diffusion_model.pos_embed",
        "model.diffusion_model.final_layer.linear.weight",
        "double_blocks.0.img_attn.qkv.weight",  # Flux in one file
        "single_blocks.0.linear1.weight",
        "img_in.weight",
    ],
    "text_encoder_2": [
        "conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight",  # SDXL in one file
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.logit_scale",
        "conditioner.embedders.0.model.ln_final.weight",  # SDXL's refiner
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight",
        "text_encoder_2.text_projection.weight",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "text_encoder_3": ["text_encoders.t5xxl.transformer.shared.weight", "text_encoder_3.shared.weight"],
    "vae": [
        "first_stage_model.decoder.conv_in.weight",
        "vae.encoder.conv_in.weight",
        "decoder.up_blocks.0.resnets.0.conv1.weight",
        "encoder.conv_in.weight",
        "post_quant_conv.weight",
    ],
    "other": [
        "",
        "w",
        "classifier.weight",
        "vision",
        "lm_header.weight",
        "a.visuals.b",
        "score.weight",
        "pos_embed",
        "talker.model.layers.0.mlp.up_proj.weight",
        "gen_vision_model.encoder.conv_in.weight",
        "some_tower.layers.0.weight",
        "model.some_tower.encoder.layers.0.weight",
        "model.dit.layers.0.weight",
    ],
}


@pytest.mark.parametrize(("name", "expected"), [(name, key) for key, names in NAMES.items() for name in names])
def test_component(name: str, expected: str) -> None:
    assert component(name) == ("vision_tower" if name == "vision" else expected)


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


TOWER = {"vision_tower": "vision_tower.", "projector": "multi_modal_projector."}
WRAPPED = {
    "language_model": "language_model.",
    "embeddings": "language_model.model.embed_tokens.",
    "lm_head": "language_model.lm_head.",
}
BARE = {"language_model": "model.", "embeddings": "model.embed_tokens.", "lm_head": "lm_head."}
QWEN = {**BARE, "vision_tower": "visual.", "projector": "visual.merger."}
QWEN3 = {
    "vision_tower": "model.visual.",
    "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "language_model": "model.language_model.",
    "embeddings": "model.language_model.embed_tokens.",
    "lm_head": "lm_head.",
}
IDEFICS = {
    "vision_tower": "model.vision_model.",
    "projector": "model.connector.",
    "language_model": "model.text_model.",
    "embeddings": "model.text_model.embed_tokens.",
    "lm_head": "lm_head.",
}
DUAL = {"vision_tower": "vision_model.", "text_encoder": "text_model.", "logit_scale": "logit_"}
TIED = {part: prefix for part, prefix in (TOWER | WRAPPED).items() if part != "lm_head"}

# Where each component begins in the names that transformers saves; the longest beginning counts.
SPLITS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "qwen2_vl": {**QWEN},
    "qwen2_5_vl": {**QWEN},
    "qwen3_vl": {**QWEN3},
    "qwen3_vl_moe": {**QWEN3},
    "gemma3": {**TIED},
    "llava": {**TOWER, **WRAPPED},
    "llava_onevision": {**WRAPPED, "vision_tower": "vision_tower.", "projector": ("multi_modal_pro", "image_newline")},
    "paligemma": {**TIED},
    "idefics3": {**IDEFICS},
    "smolvlm": {**IDEFICS},
    "mistral3": {**TIED},
    "internvl": {**TIED},
    "siglip": {**DUAL},
    "siglip2": {**DUAL},
    "clip": {**DUAL, "projection": ("text_projection.", "visual_projection.")},
    "blip2": {
        "vision_tower": "vision_model.",
        "projector": ("qformer.", "query_tokens", "language_projection."),
        "language_model": "language_model.",
        "embeddings": "language_model.model.decoder.embed_tokens.",
    },
    "whisper": {"encoder": "model.encoder.", "decoder": "model.decoder.", "embeddings": "model.decoder.embed_tokens."},
    "qwen2_moe": {**BARE},
    "mixtral": {**BARE},
    "llama": {**BARE},
    "mt5": {"encoder": "encoder.", "decoder": "decoder.", "embeddings": "shared."},
}


def names_of(architecture: str, folder: Path) -> list[str]:
    """The tensors that transformers saves for a tiny model."""
    build = LAYOUTS[architecture] if architecture in LAYOUTS else FAMILIES[architecture].build
    build().save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        return list(file.keys())


@pytest.mark.parametrize("architecture", {**LAYOUTS, **FAMILIES})
def test_components_of_an_architecture(architecture: str, tmp_path: Path) -> None:
    expected = {
        prefix: part for part, of in SPLITS[architecture].items() for prefix in ([of] if type(of) is str else of)
    }
    names = names_of(architecture, tmp_path)
    for name in names:
        assert component(name) == expected[max((x for x in expected if name.startswith(x)), key=len)], name
    assert {component(name) for name in names} == set(expected.values())
    assert split(names) == {name: component(name) for name in names}
    assert unrecognised(names) is None


@pytest.mark.parametrize("architecture", {**LAYOUTS, **FAMILIES})
def test_norms_are_what_transformers_builds_as_norms(architecture: str) -> None:
    build = LAYOUTS[architecture] if architecture in LAYOUTS else FAMILIES[architecture].build
    model = build()
    for owner, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=owner, recurse=False):
            assert is_norm(name) == ("norm" in type(module).__name__.lower()), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.input_layernorm.weight", True),
        ("vision_model.pre_layrnorm.bias", True),
        ("visual.merger.ln_q.weight", True),
        ("transformer.resblocks.0.ln_1.weight", True),
        ("bert.embeddings.LayerNorm.gamma", True),
        ("vision_tower.stages.0.bn1.running_var", True),
        ("down_blocks.0.resnets.0.norm1.weight", True),
        ("conv_norm_out.bias", True),
        ("single_transformer_blocks.4.norm.linear.weight", False),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("norm", False),
        ("model.normal.weights", False),
    ],
)
def test_norms_by_name(name: str, expected: bool) -> None:
    assert is_norm(name) == expected


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["trunk.0.w", "trunk.1.w"], ["trunk.*", "trunk.*"]),
        (["net.eyes.0.w", "net.eyes.1.w", "net.mind.w"], ["net.eyes.*", "net.eyes.*", "net.mind.*"]),
        (["score.weight", "lm_head.weight"], ["score.weight", "lm_head"]),
        (["a.b.c"], ["a.b.c"]),
        (["w", "w.x"], ["w", "w.*"]),
        (["0.w", "1.w"], ["0.*", "1.*"]),
        ([f"x{i}.w" for i in range(13)], ["other"] * 13),
        ([], []),
    ],
)
def test_unrecognised_names_are_split_by_how_they_begin(names: list[str], labels: list[str]) -> None:
    assert list(split(names).values()) == labels


words = st.sampled_from(["net", "eyes", "mind", "0", "1", "w", "visual", "lm_head"])


@given(st.sets(st.lists(words, min_size=1, max_size=5).map(".".join), max_size=20))
def test_what_a_split_lists_selects_what_it_lists(names: set[str]) -> None:
    """A label is a component, or a glob that fits its names; `unrecognised` says if there is one of those."""
    labels = split(sorted(names))
    assert labels.keys() == names
    for name, label in labels.items():
        assert label == component(name) if label in COMPONENTS else fnmatchcase(name, label)
    assert (unrecognised(names) is None) == all(component(name) != "other" for name in names)
