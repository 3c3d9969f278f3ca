"""Tiny dual encoders as checkpoint folders with tokenizer and image processor, and tasks on noise images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from models import VISION, randomised
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SIDE = 28
TEXTS = (
    "ต้มยำกุ้ง",
    "អង្គរវត្ត",
    "ຕຳໝາກຫຸ່ງ",
    "မုန့်ဟင်းခါး",
    "Phở bò Hà Nội",
    "நாசி லெமாக்",
    "Rendang Padang",
    "a cat on a mat",
    "two dogs",
    "the sea at night",
)


def byte_tokenizer(special: Mapping[str, str] | None = None) -> tf.PreTrainedTokenizerFast:
    """A token for each byte: <pad> 0, <s> 1, </s> 2, then those of `special` by their attributes, then 256 of bytes."""
    named = ["<pad>", "<s>", "</s>", *(special or {}).values()]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*named, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if not special else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(named)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=dict(special or {}),
    )


N_TOKENS = 3 + 256


def save_dual(folder: Path, kind: str, seed: int = 0) -> Path:
    """A CLIP or SigLIP of random weights, with all that stands around it."""
    torch.manual_seed(seed)
    text: dict[str, Any] = {**VISION, "vocab_size": N_TOKENS, "max_position_embeddings": 40}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**VISION, "image_size": SIDE, "patch_size": 14}
    if kind == "clip":
        model: Any = tf.CLIPModel(tf.CLIPConfig(text_config=text | {"eos_token_id": 2}, vision_config=vision))
        image_processor: Any = tf.CLIPImageProcessorPil
        processor: Any = tf.CLIPProcessor
    else:
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))
        image_processor, processor = tf.SiglipImageProcessorPil, tf.SiglipProcessor
    randomised(model, seed).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    images = image_processor(size=size, crop_size=size, do_center_crop=False)
    processor(images, byte_tokenizer()).save_pretrained(folder)
    return folder


def write_images(folder: Path, n: int, seed: int = 0) -> list[str]:
    """n noise images, each of a colour of its own; their names."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = rng.integers(0, 256, 3) * 0.7 + rng.integers(0, 256, (SIDE, SIDE, 3)) * 0.3
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(n)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
