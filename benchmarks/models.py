"""Checkpoints to measure with: a base and tuned copies of it, random weights of a Llama-like shape, bfloat16, sharded.

    ggez-merge bench models FOLDER [--layers 20] [--huge]

writes FOLDER/base, FOLDER/sea and FOLDER/latam: by default 0.97 B parameters each, in shards of about 500 MB.
`--huge` makes one tensor of 2 GiB in each instead.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
SHARD_BYTES = 500_000_000
PIECE = 1 << 24  # elements made at a time, so that memory stays small
Shape = tuple[str, tuple[int, ...]]


def llama_shapes(n_layers: int) -> list[Shape]:
    """Names and shapes of a Llama-like model with grouped-query attention and tied embeddings."""
    shapes: list[Shape] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}"
        shapes += [(f"{prefix}.{norm}_layernorm.weight", (HIDDEN,)) for norm in ("input", "post_attention")]
        shapes += [(f"{prefix}.self_attn.{p}_proj.weight", (HIDDEN, HIDDEN)) for p in "qo"]
        shapes += [(f"{prefix}.self_attn.{p}_proj.weight", (HIDDEN // 4, HIDDEN)) for p in "kv"]
        shapes += [(f"{prefix}.mlp.{p}_proj.weight", (INTERMEDIATE, HIDDEN)) for p in ("gate", "up")]
        shapes += [(f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE))]
    return [*shapes, ("model.norm.weight", (HIDDEN,))]


def make(folder: Path, shapes: Sequence[Shape], model: int) -> None:
    """Write one checkpoint. Model 0 is the base N(0, 0.02²); the others are it plus N(0, 0.001²) of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Shape]] = [[]]
    for name, shape in shapes:
        if shards[-1] and sum(2 * math.prod(s) for _, s in shards[-1]) + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, shape))
    weight_map, base, own = {}, np.random.default_rng(0), np.random.default_rng(model)
    for number, members in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in members:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * math.prod(shape)]}
            at += 2 * math.prod(shape)
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for _, shape in members:
                for start in range(0, math.prod(shape), PIECE):
                    n = min(PIECE, math.prod(shape) - start)
                    weights = 0.02 * base.standard_normal(n, dtype=np.float32)
                    if model:
                        weights += 0.001 * own.standard_normal(n, dtype=np.float32)
                    out.write(weights.astype(ml_dtypes.bfloat16).tobytes())
    total = sum(2 * math.prod(shape) for _, shape in shapes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name, _ in shapes),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_all(folder: Path, n_layers: int, huge: bool) -> int:
    """Write all three; the number of parameters in each."""
    shapes: list[Shape] = [("huge.weight", (1 << 15, 1 << 15))] if huge else llama_shapes(n_layers)
    for model, name in enumerate(("base", "sea", "latam")):
        make(folder / name, shapes, model)
    return sum(math.prod(shape) for _, shape in shapes)
