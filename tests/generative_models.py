"""Tiny models that generate text, as checkpoint folders: a LLaVA, a Gemma 3 with images, and a Llama without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from dual_models import N_TOKENS, SIDE, byte_tokenizer
from models import TEXT, VISION, llama, randomised

SPECIAL = {
    "image_token": "<image>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "user_token": "<user>",
    "model_token": "<model>",
}
TEMPLATE = (
    "<s>{% for message in messages %}<user>{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
VOCABULARY = N_TOKENS + len(SPECIAL)


def save_generative(folder: Path, kind: str, template: bool = True, seed: int = 0) -> Path:
    """A model of random weights whose predictions differ strongly, with all that stands around it."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(SPECIAL)
    image, boi, eoi = (tokenizer.convert_tokens_to_ids(token) for token in [*SPECIAL.values()][:3])
    size = {"height": SIDE, "width": SIDE}
    chat = TEMPLATE.replace("IMAGE", "<boi>" if kind == "gemma3" else "<image>") if template else None
    text = {**TEXT, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512}
    vision = {**VISION, "image_size": SIDE, "patch_size": 14}
    model: Any
    processor: Any
    if kind == "llama":
        tokenizer.chat_template = chat
        model, processor = llama(**text), tokenizer
    elif kind == "llava":
        vision |= {"model_type": "clip_vision_model", "projection_dim": 32}
        text |= {"model_type": "llama", "num_key_value_heads": 2}
        config: Any = tf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-1
        )
        model = tf.LlavaForConditionalGeneration(config)
        images: Any = tf.CLIPImageProcessorPil(size=size, crop_size=size)
        processor = tf.LlavaProcessor(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=chat,
            num_additional_image_tokens=1,
        )  # fmt: skip
    else:
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        text |= {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 256}
        config = tf.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=image,
            boi_token_index=boi,
            eoi_token_index=eoi,
        )
        model = tf.Gemma3ForConditionalGeneration(config)
        images = tf.Gemma3ImageProcessorPil(size=size)
        processor = tf.Gemma3Processor(images, tokenizer, chat_template=chat, image_seq_length=4)
    randomised(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
