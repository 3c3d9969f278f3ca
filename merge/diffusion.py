"""Diffusion models in their two layouts, diffusers' folders and the authors' single files, brought to one.

What one layout calls `unet.down_blocks.1.attentions.0.X` is `model.diffusion_model.input_blocks.4.1.X` in the other: a
matter of names, and of a count that the names themselves give (resnets in a block). Transformers keep query, key and
value (and in Flux the first layer of the MLP) on top of each other in one tensor, and have shift before scale where
diffusers has scale before shift: the same rows, read from other places of the file. Only OpenCLIP's text projection has
to be turned, rows into columns, while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from ggez_merge.checkpoint import FLOATS, Checkpoint, Elements, Tensor, joined, span
from ggez_merge.components import component
from ggez_merge.diffusion_names import is_swapped, is_turned, pairs, unet
from ggez_merge.pipeline import is_denoiser

DENOISER = "model.diffusion_model."  # the UNet or transformer, where a single file holds a whole pipeline
Style = Literal["diffusers", "original", "openclip"]

# How the parts of a single file begin, what diffusers calls them, and whether their names are OpenCLIP's.
_ORIGINAL: tuple[tuple[str, str, Style], ...] = (
    ("first_stage_model.", "vae", "original"),
    ("vae.", "vae", "original"),
    ("cond_stage_model.transformer.", "text_encoder", "diffusers"),
    ("cond_stage_model.model.", "text_encoder", "openclip"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "diffusers"),
    ("conditioner.embedders.0.model.", "text_encoder_2", "openclip"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "openclip"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "diffusers"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "diffusers"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "diffusers"),
)
# Where a denoiser alone has names without a prefix: a name that gives it away, its part, its layout.
_ALONE: tuple[tuple[str, str, Style], ...] = (
    ("input_blocks.0.0.weight", "unet", "original"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "transformer", "original"),
    ("double_blocks.0.img_attn.qkv.weight", "transformer", "original"),
    ("down_blocks.0.resnets.0.conv1.weight", "unet", "diffusers"),
    ("transformer_blocks.0.attn.to_q.weight", "transformer", "diffusers"),
)


@dataclass(frozen=True)
class Part:
    """One model of a pipeline: its tensors by the names that are left after `prefix`."""

    prefix: str
    style: Style
    tensors: dict[str, Tensor]


def goes_along(layout: Checkpoint) -> Callable[[str], bool]:
    """Whether a tensor of a whole pipeline lies outside its denoiser: VAE, text encoders, a schedule's numbers."""
    if layout.parts:
        return lambda name: (part := name.partition(".")[0]) in layout.parts and not is_denoiser(part)
    if any(name.startswith(DENOISER) for name in layout.tensors):
        return lambda name: not name.startswith(DENOISER)
    return lambda name: False


def part_of(layout: Checkpoint, name: str) -> str:
    """What the part of a whole pipeline is called that a tensor lies in."""
    return name.partition(".")[0] if layout.parts else component(name)


def in_one_file(layout: Checkpoint) -> bool:
    """Whether the loaders of this layout know no shards."""
    return any(is_denoiser(name) and part.style == "original" for name, part in parts(layout).items())


def parts(checkpoint: Checkpoint) -> dict[str, Part]:
    """The parts of a diffusion model by diffusers' names of them; nothing for any other model."""
    names = checkpoint.tensors
    if checkpoint.parts:
        found: list[tuple[str, str, Style]] = [(f"{folder}.", folder, "diffusers") for folder in checkpoint.parts]
    elif any(name.startswith(DENOISER) for name in names):
        kind = "transformer" if any(f"{DENOISER}{sign}" in names for sign, *_ in _ALONE[1:3]) else "unet"
        found = [(DENOISER, kind, "original"), *_ORIGINAL]
    else:
        found = [("", part, style) for sign, part, style in _ALONE if sign in names][:1]
    split: dict[str, Part] = {}
    for prefix, part, style in found:
        own = {name[len(prefix) :]: tensor for name, tensor in names.items() if name.startswith(prefix)}
        if own:
            split[part] = Part(prefix, style, own)
    if "text_encoder_3" in split and "text_encoder_2" not in split:  # Flux has CLIP and T5 only
        split["text_encoder_2"] = split.pop("text_encoder_3")
    return split


def converted(ours: Part, theirs: Part) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Their tensors under the names and in the shapes that ours have in the other layout, and those that ours lacks.

    Empty tensors, with which single files mark what they were trained to predict, are neither.
    """
    diffusers, original = (ours, theirs) if ours.style == "diffusers" else (theirs, ours)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, rows in pairs(diffusers.tensors, original.tensors, original.style == "openclip"):
        if name not in original.tensors or any(row not in diffusers.tensors for row in rows):
            continue
        used.update(rows if ours is original else (name,))
        if ours is original:
            stacked = _stacked([theirs.tensors[row] for row in rows], ours.tensors[name])
            if stacked is not None:
                found[name] = stacked
        else:
            found.update(zip(rows, _cut(theirs.tensors[name], [ours.tensors[row] for row in rows]), strict=True))
    for name, tensor in found.items():
        if is_swapped(name, ours.tensors):
            found[name] = _halves_swapped(tensor)
        elif is_turned(name):
            found[name] = _turned(tensor)
    return found, {name: tensor for name, tensor in theirs.tensors.items() if name not in used and tensor.numel}


def _stacked(pieces: list[Tensor], like: Tensor) -> Tensor | None:
    """All their rows, one tensor's after the other's; None if they cannot be rows of one tensor."""
    if len(pieces) == 1:
        return _shaped(pieces[0], like)
    if len({(piece.dtype, len(piece.shape), piece.shape[1:]) for piece in pieces}) > 1 or not pieces[0].shape:
        return None
    return joined(pieces[0], (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:]), pieces)


def _cut(whole: Tensor, like: list[Tensor]) -> list[Tensor]:
    """As many rows of it for each as that has; all of it for each, which is then refused, if that does not add up."""
    if len(like) == 1:
        return [_shaped(whole, like[0])]
    fits = whole.numel == sum(piece.numel for piece in like) and all(x.shape[1:] == whole.shape[1:] for x in like)
    if not fits:
        return [whole] * len(like)
    starts = accumulate((piece.numel for piece in like), initial=0)
    return [span(whole, at, piece.shape) for at, piece in zip(starts, like, strict=False)]


def _shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """A linear layer written as a convolution of one pixel, or the other way round, in the shape of ours."""
    same = [n for n in tensor.shape if n != 1] == [n for n in like.shape if n != 1]
    return replace(tensor, shape=like.shape) if same else tensor


def _halves_swapped(tensor: Tensor) -> Tensor:
    if not tensor.shape or tensor.shape[0] % 2:
        return tensor  # what is no two halves has another shape than ours
    shape = (tensor.shape[0] // 2, *tensor.shape[1:])
    return joined(tensor, tensor.shape, [span(tensor, tensor.numel // 2, shape), span(tensor, 0, shape)])


@dataclass(frozen=True)
class Turned:
    """A matrix with its columns as rows: out[i, j] = source[j, i]."""

    sources: tuple[Tensor]

    @property
    def said(self) -> list[Any]:
        return []

    def fill(self, elements: Elements, first: int, out: Any) -> None:
        """Only those columns of the source are read that the span has as rows, whole or in part."""
        (source,) = self.sources
        height, width = source.shape
        left, right = first // height, -(-(first + len(out)) // height)
        columns = np.empty((height, right - left), out.dtype)
        for row in range(height):
            columns[row] = elements(source, row * width + left, right - left)
        out[:] = columns.T.ravel()[first - left * height :][: len(out)]


def _turned(tensor: Tensor) -> Tensor:
    if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        return tensor
    return replace(tensor, shape=tensor.shape[::-1], parts=(), starts=(), made=Turned((tensor,)))


def blocks(names: Collection[str]) -> dict[str, str]:
    """Tensor -> block of the UNet by the names that merges by blocks use: IN00 …, M00, OUT00 …, or BASE.

    As in Merge Block Weighted, `time_embed` counts as IN00 and `out` as the last OUT; BASE are the text encoders and
    the UNet's label embedding. A VAE belongs to no block.
    """
    found = {}
    for prefix in ("unet.", DENOISER, ""):
        own = {name[len(prefix) :] for name in names if name.startswith(prefix)}
        if own & {"conv_in.weight", "input_blocks.0.0.weight"}:
            originals = unet(own) if "conv_in.weight" in own else {name: name for name in own}
            last = max((int(o.split(".")[1]) for o in originals.values() if o.startswith("output_blocks.")), default=0)
            found = {prefix + name: _block(old, last) for name, old in originals.items()}
            break
    encoders = {name: "BASE" for name in names if component(name).startswith("text_encoder")} if found else {}
    return {**found, **encoders}


def _block(original: str, last: int) -> str:
    first, _, rest = original.partition(".")
    numbered = {"input_blocks": "IN", "output_blocks": "OUT"}.get(first)
    if numbered:
        return f"{numbered}{int(rest.partition('.')[0]):02}"
    return {"middle_block": "M00", "time_embed": "IN00", "out": f"OUT{last:02}"}.get(first, "BASE")
