"""What the tensors of diffusion models are called in diffusers' folders and in the authors' own files.

The UNet of Stable Diffusion, its VAE, OpenCLIP's text encoder, and the transformers of SD3 and Flux. Numbers of blocks
are taken from the names themselves, so any size of these architectures is known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

Pair = tuple[str, tuple[str, ...]]
"""A tensor of the original layout, and those of diffusers whose rows it has, one after the other."""


def pairs(diffusers: Collection[str], original: Collection[str], open_clip: bool) -> Iterable[Pair]:
    """Which tensors of one model are which, going by its names in both layouts; some may be in neither table."""
    if open_clip:
        return _open_clip(original, diffusers)
    if any(name.startswith("joint_blocks.") for name in original):
        return _by_table(_SD3, original)
    if any(name.startswith("double_blocks.") for name in original):
        return _by_table(_FLUX, original)
    if any(name.startswith("input_blocks.") for name in original):
        return ((old, (name,)) for name, old in unet(diffusers).items())
    return ((old, (name,)) for name, old in _vae(diffusers).items())


def is_swapped(name: str, names: Collection[str]) -> bool:
    """Whether one layout has shift and scale in it and the other scale and shift: where nothing comes after them."""
    if name.startswith(("norm_out.linear.", "final_layer.adaLN_modulation.1.")):
        return True
    block, ours, _ = name.partition(".norm1_context.linear.")
    other, theirs, _ = name.partition(".context_block.adaLN_modulation.1.")
    if ours:
        return f"{block}.ff_context.net.2.weight" not in names
    return bool(theirs) and f"{other}.context_block.mlp.fc2.weight" not in names


def is_turned(name: str) -> bool:
    """Whether one layout has as rows what the other has as columns."""
    return name in ("text_projection", "text_projection.weight")


# --- UNet ----------------------------------------------------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AROUND = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
}
_UNET_BLOCK = re.compile(
    r"(?P<side>down|mid|up)_blocks?\.((?P<block>\d+)\.)?(?P<kind>resnets|attentions|downsamplers|upsamplers)\."
    r"(?P<number>\d+)\.(?P<rest>.+)"
)


def unet(names: Collection[str]) -> dict[str, str]:
    """Diffusers' name -> the original one, for what both have."""
    depth = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})
    found = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        match = _UNET_BLOCK.fullmatch(name)
        if module in _AROUND:
            found[name] = f"{_AROUND[module]}.{leaf}"
        elif match is not None:
            found[name] = _unet_block(match, depth, names)
    return found


def _unet_block(match: re.Match[str], depth: int, names: Collection[str]) -> str:
    """A block of diffusers has `depth` layers (one more on the way up) and a sampler; here all these are numbered."""
    kind, number, rest = match["kind"], int(match["number"]), match["rest"]
    if kind == "resnets":
        layer, _, leaf = rest.partition(".")
        rest = f"{_RESNET.get(layer, layer)}.{leaf}"
    first = int(match["block"] or 0) * (depth + 1)
    if match["side"] == "mid":
        return f"middle_block.{2 * number + (kind == 'attentions')}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{first + depth + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attends = f"up_blocks.{match['block']}.attentions.{depth}.norm.weight" in names
        return f"output_blocks.{first + depth}.{1 + attends}.{rest}"
    place = f"input_blocks.{first + number + 1}" if match["side"] == "down" else f"output_blocks.{first + number}"
    return f"{place}.{int(kind == 'attentions')}.{rest}"


# --- VAE -----------------------------------------------------------------------------------------------------------

_VAE_WORDS = {
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "conv_norm_out": "norm_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",  # to_q, as diffusers called it before 0.18
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "resnets": "block",
}
_VAE_WORD = re.compile(r"(?<=\.)(" + "|".join(map(re.escape, _VAE_WORDS)) + r")(?=\.)")


def _vae(names: Collection[str]) -> dict[str, str]:
    """Diffusers' name -> the original one. Blocks on the way up are numbered from the other end."""
    top = max((int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks.")), default=0)
    found = {}
    for name in names:
        old = _VAE_WORD.sub(lambda word: _VAE_WORDS[word[1]], name)
        old = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", old)
        found[name] = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda at: f"decoder.up.{top - int(at[1])}", old)
    return found


# --- text encoders ---------------------------------------------------------------------------------------------------

_OPEN_CLIP = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_OPEN_CLIP_AROUND = {
    "text_projection": "text_projection.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    **{f"ln_final.{leaf}": f"final_layer_norm.{leaf}" for leaf in ("weight", "bias")},
}


def _open_clip(original: Collection[str], diffusers: Collection[str]) -> Iterator[Pair]:
    """OpenCLIP's names, query, key and value in one; transformers has `text_model.` before its own or, lately, not."""
    lead = "text_model." if any(name.startswith("text_model.") for name in diffusers) else ""
    for name in original:
        if name in _OPEN_CLIP_AROUND:
            own = _OPEN_CLIP_AROUND[name]
            yield name, (own if is_turned(own) else lead + own,)
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        if match is None:
            continue
        layer, leaf = f"{lead}encoder.layers.{match[1]}", match[3]
        if match[2] == "attn.in_proj":
            yield name, tuple(f"{layer}.self_attn.{x}_proj.{leaf}" for x in "qkv")
        else:
            yield name, (f"{layer}.{_OPEN_CLIP.get(match[2], match[2].replace('attn', 'self_attn'))}.{leaf}",)


# --- transformers --------------------------------------------------------------------------------------------------

Table = Mapping[str, tuple[str, ...]]
"""A layer of the original, or a tensor of it, and diffusers' layers (tensors) in its rows; * is a block's number."""


def _qkv(*names: str) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.*.attn{name}" for name in names)


def _embedder(name: str, layers: tuple[str, str], part: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.{layers[i]}": (f"time_text_embed.{part}_embedder.linear_{i + 1}",) for i in (0, 1)}


_LAST: dict[str, tuple[str, ...]] = {
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_SD3: Table = {
    **_LAST,
    **_embedder("t_embedder", ("mlp.0", "mlp.2"), "timestep"),
    **_embedder("y_embedder", ("mlp.0", "mlp.2"), "text"),
    "pos_embed": ("pos_embed.pos_embed",),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "joint_blocks.*.x_block.attn.qkv": _qkv(".to_q", ".to_k", ".to_v"),
    "joint_blocks.*.x_block.attn.proj": _qkv(".to_out.0"),
    "joint_blocks.*.x_block.attn.ln_q": _qkv(".norm_q"),
    "joint_blocks.*.x_block.attn.ln_k": _qkv(".norm_k"),
    "joint_blocks.*.x_block.attn2.qkv": _qkv("2.to_q", "2.to_k", "2.to_v"),
    "joint_blocks.*.x_block.attn2.proj": _qkv("2.to_out.0"),
    "joint_blocks.*.x_block.attn2.ln_q": _qkv("2.norm_q"),
    "joint_blocks.*.x_block.attn2.ln_k": _qkv("2.norm_k"),
    "joint_blocks.*.x_block.adaLN_modulation.1": ("transformer_blocks.*.norm1.linear",),
    "joint_blocks.*.x_block.mlp.fc1": ("transformer_blocks.*.ff.net.0.proj",),
    "joint_blocks.*.x_block.mlp.fc2": ("transformer_blocks.*.ff.net.2",),
    "joint_blocks.*.context_block.attn.qkv": _qkv(".add_q_proj", ".add_k_proj", ".add_v_proj"),
    "joint_blocks.*.context_block.attn.proj": _qkv(".to_add_out"),
    "joint_blocks.*.context_block.attn.ln_q": _qkv(".norm_added_q"),
    "joint_blocks.*.context_block.attn.ln_k": _qkv(".norm_added_k"),
    "joint_blocks.*.context_block.adaLN_modulation.1": ("transformer_blocks.*.norm1_context.linear",),
    "joint_blocks.*.context_block.mlp.fc1": ("transformer_blocks.*.ff_context.net.0.proj",),
    "joint_blocks.*.context_block.mlp.fc2": ("transformer_blocks.*.ff_context.net.2",),
}
_FLUX: Table = {
    **_LAST,
    **_embedder("time_in", ("in_layer", "out_layer"), "timestep"),
    **_embedder("vector_in", ("in_layer", "out_layer"), "text"),
    **_embedder("guidance_in", ("in_layer", "out_layer"), "guidance"),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "double_blocks.*.img_mod.lin": ("transformer_blocks.*.norm1.linear",),
    "double_blocks.*.txt_mod.lin": ("transformer_blocks.*.norm1_context.linear",),
    "double_blocks.*.img_attn.qkv": _qkv(".to_q", ".to_k", ".to_v"),
    "double_blocks.*.txt_attn.qkv": _qkv(".add_q_proj", ".add_k_proj", ".add_v_proj"),
    "double_blocks.*.img_attn.norm.query_norm.scale": _qkv(".norm_q.weight"),
    "double_blocks.*.img_attn.norm.key_norm.scale": _qkv(".norm_k.weight"),
    "double_blocks.*.txt_attn.norm.query_norm.scale": _qkv(".norm_added_q.weight"),
    "double_blocks.*.txt_attn.norm.key_norm.scale": _qkv(".norm_added_k.weight"),
    "double_blocks.*.img_attn.proj": _qkv(".to_out.0"),
    "double_blocks.*.txt_attn.proj": _qkv(".to_add_out"),
    "double_blocks.*.img_mlp.0": ("transformer_blocks.*.ff.net.0.proj",),
    "double_blocks.*.img_mlp.2": ("transformer_blocks.*.ff.net.2",),
    "double_blocks.*.txt_mlp.0": ("transformer_blocks.*.ff_context.net.0.proj",),
    "double_blocks.*.txt_mlp.2": ("transformer_blocks.*.ff_context.net.2",),
    "single_blocks.*.modulation.lin": ("single_transformer_blocks.*.norm.linear",),
    "single_blocks.*.linear1": (
        *(f"single_transformer_blocks.*.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.*.proj_mlp",
    ),
    "single_blocks.*.linear2": ("single_transformer_blocks.*.proj_out",),
    "single_blocks.*.norm.query_norm.scale": ("single_transformer_blocks.*.attn.norm_q.weight",),
    "single_blocks.*.norm.key_norm.scale": ("single_transformer_blocks.*.attn.norm_k.weight",),
}


def _by_table(table: Table, original: Collection[str]) -> Iterator[Pair]:
    for name in original:
        number = re.search(r"(?<=blocks\.)\d+", name)
        folded = name if number is None else name[: number.start()] + "*" + name[number.end() :]
        layer, _, leaf = folded.rpartition(".")
        rows = table.get(folded) or tuple(f"{row}.{leaf}" for row in table.get(layer, ()))
        if rows:
            yield name, tuple(row.replace("*", number[0] if number else "*") for row in rows)
