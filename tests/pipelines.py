"""Tiny diffusers pipelines with random weights, built from configs: nothing is downloaded.

Without diffusers, which has left Python 3.10 behind, the tests that import this are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from models import randomised
from safetensors.numpy import load_file

from ggez_merge.diffusion_names import pairs

pytest.importorskip("diffusers")
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

Arrays = dict[str, np.ndarray[Any, Any]]

CLIP: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=37,
    num_attention_heads=4,
    num_hidden_layers=2,
    vocab_size=600,
    max_position_embeddings=77,
    projection_dim=24,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def unet(**changes: Any) -> UNet2DConditionModel:
    """SDXL's UNet as to its blocks: 9 in, of which the first 4 without attention, and 9 out."""
    config: dict[str, Any] = dict(
        sample_size=8,
        block_out_channels=(16, 24, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        norm_num_groups=8,
        cross_attention_dim=56,  # of both text encoders
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    return randomised(UNet2DConditionModel(**{**config, **changes}), seed=0)


def vae() -> AutoencoderKL:
    config = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=16,
    )
    return randomised(AutoencoderKL(**config), seed=1)


def text_encoder(seed: int, **changes: Any) -> tf.PreTrainedModel:
    """OpenAI's CLIP for the first text encoder, OpenCLIP's kind for the second."""
    kind = tf.CLIPTextModelWithProjection if changes else tf.CLIPTextModel
    return randomised(kind(tf.CLIPTextConfig(**{**CLIP, **changes})), seed=seed)


def tokenizer() -> tf.CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return tf.CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=77)


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(2),
        text_encoder_2=text_encoder(3, hidden_size=24, hidden_act="gelu"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(),
        scheduler=EulerDiscreteScheduler(),
    )


def tuned(pipeline: DiffusionPipeline, seed: int) -> DiffusionPipeline:
    """Every model of the pipeline a little changed, in place."""
    for number, model in enumerate(pipeline.components.values()):
        if isinstance(model, torch.nn.Module):
            randomised(model, seed=100 * seed + number)
    return pipeline


def image(folder: Path) -> Any:
    """What the pipeline in a folder paints, in two steps: [height, width, 3] in 0 to 1."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    done = pipeline("a market", num_inference_steps=2, height=16, width=16, generator=generator, output_type="np")
    return done.images[0]


def table(folder: Path) -> Arrays:
    """The tensors of a pipeline's folder, or of any other, by the names that they have in it."""
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def single_file(pipeline: Path) -> Arrays:
    """The same pipeline in the authors' layout of SDXL."""
    found = {
        **renamed(table(pipeline / "unet"), "model.diffusion_model.", "input_blocks.0.0.weight"),
        **renamed(table(pipeline / "vae"), "first_stage_model.", "encoder.conv_in.weight"),
    }
    found = {n: a[..., None, None] if ".attn_1." in n and a.ndim == 2 else a for n, a in found.items()}
    for name, array in table(pipeline / "text_encoder").items():
        found[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = array
    return {**found, **_open_clip(table(pipeline / "text_encoder_2"), "conditioner.embedders.1.model.")}


def renamed(arrays: Mapping[str, np.ndarray[Any, Any]], prefix: str, sign: str) -> Arrays:
    return {prefix + old: arrays[name] for old, (name,) in pairs(list(arrays), [sign], open_clip=False)}


def _open_clip(arrays: Arrays, prefix: str) -> Arrays:
    """OpenCLIP's names for CLIP's tensors, said here once more: query, key and value fused, the projection turned."""
    found = {}
    for name, array in arrays.items():
        name = name.removeprefix("text_model.").replace("encoder.layers.", "transformer.resblocks.")
        for theirs, ours in (
            ("final_layer_norm", "ln_final"),
            ("layer_norm", "ln_"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
        ):
            name = name.replace(theirs, ours)
        if name == "text_projection.weight":
            found[prefix + "text_projection"] = np.ascontiguousarray(array.T)
        elif ".self_attn." not in name:
            found[prefix + name] = array
        elif ".q_proj." in name:
            leaf = name.rpartition(".")[2]
            rows = [next(a for n, a in arrays.items() if n.endswith(_beside(name, x, leaf))) for x in "qkv"]
            found[prefix + name.replace(f"self_attn.q_proj.{leaf}", f"attn.in_proj_{leaf}")] = np.concatenate(rows)
    return found


def _beside(name: str, letter: str, leaf: str) -> str:
    layer = name.split(".")[2]
    return f"layers.{layer}.self_attn.{letter}_proj.{leaf}"


def sd3(depth: int = 3, hidden: int = 8, dual: int = 2, rows: int = 4) -> Arrays:
    """Stability's own layout of SD3.5: its last block has no way out for the text."""
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, rows, hidden), "x_embedder.proj.weight": (hidden, 4, 2, 2)}
    shapes["x_embedder.proj.bias"] = (hidden,)

    def linear(name: str, out: int, width: int = hidden) -> None:
        shapes.update({f"{name}.weight": (out, width), f"{name}.bias": (out,)})

    for name, width in (("t_embedder.mlp.0", 256), ("y_embedder.mlp.0", 12)):
        linear(name, hidden, width)
        linear(name[:-1] + "2", hidden)
    linear("context_embedder", hidden, 6)
    for i in range(depth):
        for side in ("x_block", "context_block"):
            block, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == depth - 1
            for attn in ("attn", "attn2") if side == "x_block" and i < dual else ("attn",):
                linear(f"{block}.{attn}.qkv", 3 * hidden)
                shapes.update({f"{block}.{attn}.ln_{x}.weight": (hidden // 2,) for x in "qk"})
                if not last:
                    linear(f"{block}.{attn}.proj", hidden)
            linear(f"{block}.adaLN_modulation.1", hidden * (2 if last else 9 if side == "x_block" and i < dual else 6))
            if not last:
                linear(f"{block}.mlp.fc1", 4 * hidden)
                linear(f"{block}.mlp.fc2", hidden, 4 * hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden)
    linear("final_layer.linear", 16)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def flux(width: int = 2, hidden: int = 3072) -> Arrays:
    """Black Forest Labs' own layout of Flux, one block of each kind, narrow but as high as diffusers expects it."""
    random = np.random.default_rng(8)
    names = {f"{x}_in.{layer}_layer": hidden for x in ("time", "vector", "guidance") for layer in ("in", "out")}
    names |= {
        "txt_in": hidden,
        "img_in": hidden,
        "final_layer.linear": 64,
        "final_layer.adaLN_modulation.1": 2 * hidden,
    }
    for x in ("img", "txt"):
        names |= {f"double_blocks.0.{x}_attn.qkv": 3 * hidden, f"double_blocks.0.{x}_attn.proj": hidden}
        names |= {f"double_blocks.0.{x}_mlp.0": 4 * hidden, f"double_blocks.0.{x}_mlp.2": hidden}
        names |= {f"double_blocks.0.{x}_mod.lin": 6 * hidden}
    names |= {"single_blocks.0.linear1": 7 * hidden, "single_blocks.0.linear2": hidden}
    names |= {"single_blocks.0.modulation.lin": 3 * hidden}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, width) for name, rows in names.items()}
    shapes |= {f"{name}.bias": (rows,) for name, rows in names.items()}
    for attn in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        shapes |= {f"{attn}.norm.{x}_norm.scale": (16,) for x in ("query", "key")}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
