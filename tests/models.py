"""Tiny transformers models with random weights, saved twice: as they are, and after a small seeded change.

Everything is built from configs, so no network and no downloaded weights are needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import yaml
from safetensors.torch import load_file

from ggez_merge.merge import merge
from ggez_merge.plan import Plan, make_plan
from ggez_merge.progress import Silent
from ggez_merge.recipe import load_recipe

IMAGE_TOKEN = 90  # below every vocabulary size used here
TEXT = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=97)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)

Inputs = dict[str, torch.Tensor]


def write_recipe(path: Path, **keys: Any) -> Path:
    """A recipe file of these keys, those that are None left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {key: _plain(value) for key, value in keys.items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def run_recipe(recipe: Path, out: Path) -> Plan:
    """Merge as the command line does, into a folder that does not exist yet."""
    plan = make_plan(load_recipe(recipe), out)
    merge(plan, threads=2, progress=Silent())
    return plan


def merged(folder: Path, **keys: Any) -> Path:
    """The folder `folder/merged` that the recipe with these keys gives."""
    run_recipe(write_recipe(folder / "recipe.yaml", **keys), folder / "merged")
    return folder / "merged"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder by name."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    return weights


def llama(**changes: Any) -> tf.PreTrainedModel:
    """A Llama of prime-sized vocabulary and MLP, every parameter random (norms and biases too)."""
    sizes = {**TEXT, "intermediate_size": 53, "num_hidden_layers": 4, "num_key_value_heads": 2, **changes}
    return randomised(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), seed=0)


def randomised(model: tf.PreTrainedModel, seed: int) -> tf.PreTrainedModel:
    """Spread out parameters that are all zeros or ones after initialisation, so that merging them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def save_tuned(
    model: tf.PreTrainedModel, folder: Path, *, seed: int, noise: float = 0.02, dtype: torch.dtype, **options: Any
) -> Path:
    """Save the model plus seeded noise in `dtype`; the model itself stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    was = model.dtype
    model.to(dtype).save_pretrained(folder, **options)
    model.to(was)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    return folder


@dataclass(frozen=True)
class Family:
    """One architecture: how to build it, the class that loads it, what to feed it."""

    build: Callable[[], tf.PreTrainedModel]
    inputs: Callable[[], Inputs]

    def load(self, folder: Path) -> tuple[tf.PreTrainedModel, dict[str, Any]]:
        """The model that a checkpoint folder holds, and what `from_pretrained` has to say about its keys."""
        model, info = type(self.build()).from_pretrained(folder, output_loading_info=True)
        return model.eval(), info


def _text(*extra: int) -> Inputs:
    ids = torch.tensor([[1, *extra, 5, 6, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def _siglip_vision(**changes: Any) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **VISION, "image_size": 28, "patch_size": 14, **changes}


def _llama_text(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, **changes}


def _gemma_text(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8, **changes}


def _qwen_config(kind: type[Any], **vision: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    if kind not in (tf.Qwen3VLConfig, tf.Qwen3VLMoeConfig):
        del rope["mrope_interleaved"]
    text: dict[str, Any] = {**TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    text["rope_parameters"] = rope
    if kind not in (tf.Qwen3VLConfig, tf.Qwen3VLMoeConfig):
        del text["head_dim"]
    if kind is tf.Qwen3VLMoeConfig:
        text |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return kind(
        text_config=text,
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 14, **vision},
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )


def _qwen25_vl() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    return tf.Qwen2_5_VLForConditionalGeneration(_qwen_config(tf.Qwen2_5_VLConfig, **sizes))


def _qwen2_vl() -> tf.PreTrainedModel:
    return tf.Qwen2VLForConditionalGeneration(_qwen_config(tf.Qwen2VLConfig, embed_dim=32, hidden_size=32))


def _qwen3_vl() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    config = _qwen_config(tf.Qwen3VLConfig, num_position_embeddings=16, **sizes)
    return tf.Qwen3VLForConditionalGeneration(config)


def _qwen_inputs() -> Inputs:
    grid = torch.tensor([[1, 4, 4]])  # 16 patches of 2 x 3 x 14 x 14 values, merged by fours
    inputs = _text(92, *[IMAGE_TOKEN] * 4, 93)
    kinds = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return {**inputs, "pixel_values": _pixels(16, 1176), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def _gemma3() -> tf.PreTrainedModel:
    config = tf.Gemma3Config(
        text_config=_gemma_text("gemma3_text"),
        vision_config=_siglip_vision(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=92,
        eoi_token_index=93,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def _gemma3_inputs() -> Inputs:
    inputs = _text(92, *[IMAGE_TOKEN] * 4, 93)
    kinds = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return {**inputs, "pixel_values": _pixels(1, 3, 28, 28), "token_type_ids": kinds}


def _llava() -> tf.PreTrainedModel:
    vision = {"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14, "projection_dim": 32}
    config = tf.LlavaConfig(
        vision_config=vision, text_config=_llama_text(), image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
    )
    return tf.LlavaForConditionalGeneration(config)


def _image_text_inputs() -> Inputs:
    return {**_text(*[IMAGE_TOKEN] * 4), "pixel_values": _pixels(1, 3, 28, 28)}


def _paligemma() -> tf.PreTrainedModel:
    config = tf.PaliGemmaConfig(
        vision_config=_siglip_vision(projection_dim=32, vision_use_head=False),
        text_config=_gemma_text("gemma"),
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def _idefics3() -> tf.PreTrainedModel:
    config = tf.Idefics3Config(
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        text_config=_llama_text(pad_token_id=0),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    return tf.Idefics3ForConditionalGeneration(config)


def _idefics3_inputs() -> Inputs:
    return {**_text(IMAGE_TOKEN), "pixel_values": _pixels(1, 1, 3, 28, 28)}


def _mistral3() -> tf.PreTrainedModel:
    config = tf.Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION, "image_size": 28, "patch_size": 14},
        text_config={"model_type": "mistral", **TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8},
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return tf.Mistral3ForConditionalGeneration(config)


def _mistral3_inputs() -> Inputs:
    inputs = {**_text(IMAGE_TOKEN, IMAGE_TOKEN), "pixel_values": _pixels(1, 3, 28, 56)}
    return {**inputs, "image_sizes": torch.tensor([[28, 56]])}


def _siglip() -> tf.PreTrainedModel:
    text = {**VISION, "vocab_size": 97, "max_position_embeddings": 16}
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    return tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))


def _clip() -> tf.PreTrainedModel:
    text = {**VISION, "vocab_size": 97, "max_position_embeddings": 16, "eos_token_id": 7}
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def _dual_inputs() -> Inputs:
    return {**_text(), "pixel_values": _pixels(1, 3, 28, 28)}


def _mt5() -> tf.PreTrainedModel:
    config = tf.MT5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.MT5ForConditionalGeneration(config)


def _mt5_inputs() -> Inputs:
    return {**_text(), "decoder_input_ids": torch.tensor([[0, 3, 4]])}


def _qwen2_text(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen2", **TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, **changes}


def _llava_onevision() -> tf.PreTrainedModel:
    config = tf.LlavaOnevisionConfig(
        vision_config=_siglip_vision(vision_use_head=False),
        text_config=_qwen2_text(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=91,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _smolvlm() -> tf.PreTrainedModel:
    config = tf.SmolVLMConfig(
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        text_config=_llama_text(pad_token_id=0),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    return tf.SmolVLMForConditionalGeneration(config)


def _internvl() -> tf.PreTrainedModel:
    vision = {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]}
    config = tf.InternVLConfig(vision_config=vision, text_config=_qwen2_text(), image_token_id=IMAGE_TOKEN)
    return tf.InternVLForConditionalGeneration(config)


def _siglip2() -> tf.PreTrainedModel:
    text = {**VISION, "vocab_size": 97, "max_position_embeddings": 16, "projection_size": 32}
    return tf.Siglip2Model(
        tf.Siglip2Config(text_config=text, vision_config={**VISION, "patch_size": 14, "num_patches": 4})
    )


def _blip2() -> tf.PreTrainedModel:
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.Blip2Config(
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        qformer_config={**VISION, "encoder_hidden_size": 32, "vocab_size": 97},
        text_config={**text, "vocab_size": 97, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )
    return tf.Blip2ForConditionalGeneration(config)


def _whisper() -> tf.PreTrainedModel:
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in _WHISPER_PART.items()}
    config = tf.WhisperConfig(
        vocab_size=97,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sizes,
    )
    return tf.WhisperForConditionalGeneration(config)


_WHISPER_PART = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


def _qwen3_vl_moe() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    config = _qwen_config(tf.Qwen3VLMoeConfig, num_position_embeddings=16, **sizes)
    return tf.Qwen3VLMoeForConditionalGeneration(config)


def _moe(kind: str) -> Callable[[], tf.PreTrainedModel]:
    sizes: dict[str, Any] = {**TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    own: dict[str, dict[str, Any]] = {
        "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        "Mixtral": {"num_local_experts": 3},
    }

    def build() -> tf.PreTrainedModel:
        config = getattr(tf, f"{kind}Config")(**sizes, **own[kind])
        model: tf.PreTrainedModel = getattr(tf, f"{kind}ForCausalLM")(config)
        return model

    return build


LAYOUTS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen25_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "mistral3": _mistral3,
    "internvl": _internvl,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "clip": _clip,
    "blip2": _blip2,
    "whisper": _whisper,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen2_moe": _moe("Qwen2Moe"),
    "mixtral": _moe("Mixtral"),
}
"""Architectures whose checkpoints come in more than one layout of names, or that users merge with such."""


# --- the layouts that checkpoints come in ----------------------------------------------------------------------------

Renamed = tuple[tuple[str, str], ...]  # patterns of names in the memory of transformers 5, and what they become

_APART = ((r"^lm_head", "language_model.lm_head"), (r"^model\.language_model\.", "language_model.model."))
_LLAVA: dict[str, Renamed] = {
    "hub": (*_APART, (r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.", "")),
    "memory of 4.52": ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),),
    "saved by 5": (*_APART, (r"^model\.", "")),  # if the model was not loaded from a checkpoint
}
_MISTRAL3: dict[str, Renamed] = {"hub": _LLAVA["saved by 5"]}
_QWEN_VL: dict[str, Renamed] = {"hub": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))}
_QWEN_MOE: dict[str, Renamed] = {
    "hub": (
        (r"experts\.gate_up_proj$", "experts.*.(gate_proj|up_proj).weight"),
        (r"experts\.down_proj$", "experts.*.(down_proj).weight"),
    )
}
_MIXTRAL: dict[str, Renamed] = {
    "hub": (
        (r"mlp\.experts\.gate_up_proj$", "block_sparse_moe.experts.*.(w1|w3).weight"),
        (r"mlp\.experts\.down_proj$", "block_sparse_moe.experts.*.(w2).weight"),
        (r"\.mlp\.gate", ".block_sparse_moe.gate"),
    )
}
WRITTEN: dict[str, dict[str, Renamed]] = {
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "gemma3": _LLAVA,
    "llava": _LLAVA,
    "llava_onevision": _LLAVA,
    "paligemma": _LLAVA,
    "mistral3": _MISTRAL3,
    "internvl": _MISTRAL3,
    "qwen2_moe": _QWEN_MOE,
    "mixtral": _MIXTRAL,
}
"""What hub and transformers write for an architecture, from its names in memory; nothing else where it is not listed.

transformers 4.4x has the hub's names in memory as well. From 4.52 on, models in memory (and what FSDP, DeepSpeed or a
plain `state_dict` save of them) have others, while `save_pretrained` goes on writing the hub's.
"""


def layout_names(family: str, layout: str, names: Iterable[str]) -> dict[str, str]:
    """Names in memory -> names in that layout; `*` for the number of an expert and (a|b) for what is cut into two."""
    found = {}
    for name in names:
        own = name
        for pattern, words in WRITTEN.get(family, {}).get(layout, ()):
            own = re.sub(pattern, words, own)
        found[name] = own
    return found


def in_layout(family: str, layout: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors as a checkpoint of that layout holds them."""
    made: dict[str, torch.Tensor] = {}
    for name, own in layout_names(family, layout, state).items():
        found = re.fullmatch(r"(.*)\*(.*)\((.*)\)(.*)", own)
        if not found:
            made[own] = state[name].clone()
            continue
        words = found[3].split("|")
        for number, expert in enumerate(state[name]):
            for word, matrix in zip(words, expert.chunk(len(words)), strict=True):
                made[f"{found[1]}{number}{found[2]}{word}{found[4]}"] = matrix.clone()
    return made


# --- layouts that transformers does not write ------------------------------------------------------------------------


def original_internvl(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenGVLab's InternVL from transformers' in memory: q, k and v in one tensor, a vision tower as timm names it."""
    renamed = (
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.multi_modal_projector\.layer_norm", "mlp1.0"),
        (r"^model\.multi_modal_projector\.linear_1", "mlp1.1"),
        (r"^model\.multi_modal_projector\.linear_2", "mlp1.3"),
        (r"^model\.vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
        (r"^model\.vision_tower\.", "vision_model."),
        (r"embeddings\.cls_token", "embeddings.class_embedding"),
        (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
        (r"embeddings\.patch_embeddings\.projection", "embeddings.patch_embedding"),
        (r"lambda_([12])", r"ls\1"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"(vision_model.*)\.attention\.projection_layer", r"\1.attn.proj"),
        (r"(vision_model.*)\.attention\.q_proj", r"\1.attn.qkv"),
    )
    made = {}
    for name, tensor in state.items():
        if name.startswith("model.vision_tower") and re.search(r"\.[kv]_proj\.", name):
            continue
        if name.startswith("model.vision_tower") and ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for pattern, words in renamed:
            name = re.sub(pattern, words, name)
        made[name] = tensor.contiguous()
    return made


def original_llava(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA and LLaVA-OneVision as their authors' code saves them: the language model with the others inside."""
    renamed = (
        (r"^model\.language_model\.", "model."),
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
    )
    made = {}
    for name, tensor in state.items():
        for pattern, words in renamed:
            name = re.sub(pattern, words, name)
        made[name] = tensor.contiguous()
    return made


FAMILIES = {
    "qwen2_vl": Family(_qwen2_vl, _qwen_inputs),
    "qwen2_5_vl": Family(_qwen25_vl, _qwen_inputs),
    "qwen3_vl": Family(_qwen3_vl, _qwen_inputs),
    "gemma3": Family(_gemma3, _gemma3_inputs),
    "llava": Family(_llava, _image_text_inputs),
    "paligemma": Family(_paligemma, _image_text_inputs),
    "idefics3": Family(_idefics3, _idefics3_inputs),
    "mistral3": Family(_mistral3, _mistral3_inputs),
    "siglip": Family(_siglip, _dual_inputs),
    "clip": Family(_clip, _dual_inputs),
    "llama": Family(llama, _text),
    "mt5": Family(_mt5, _mt5_inputs),
}
