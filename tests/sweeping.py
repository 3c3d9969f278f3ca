"""A small sweep on the shipped pair: 60 concepts, two tasks, whose scores move with the ratio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from ggez_merge.recipes.emoji.evaluate import PICTURE_SIDE

EMOJI = Path(__file__).parents[1] / "recipes/emoji"
N_CONCEPTS = 60


def write_sweep(folder: Path, sweep: str = "{ratio: [0, 0.3, 0.6, 1]}", rest: str = "") -> Path:
    """A recipe in the folder, with the pictures and names that its tasks need."""
    with Image.open(EMOJI / "images.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    pictures = rearrange(sheet, "(r y) (c x) colour -> (r c) y x colour", y=PICTURE_SIDE, x=PICTURE_SIDE)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (EMOJI / "names.jsonl").read_text(encoding="utf-8").splitlines()[:N_CONCEPTS]]
    for row, picture in zip(rows, pictures, strict=False):
        row["image"] = f"{row['codepoints']}.png"
        Image.fromarray(picture).save(folder / "images" / row["image"])
    (folder / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
merge_method: linear
base_model: {EMOJI / "global"}
models: [{{model: {EMOJI / "region"}}}]
parameters: {{ratio: 0.5}}
buffers: base
output: {{path: ./merged}}
sweep: {sweep}
evaluate:
  - {{name: sea, tag: regional, task: retrieval, data: names.jsonl, images: images, id: codepoints, text: [th, vi, id]}}
  - {{name: world, tag: global, task: retrieval, data: names.jsonl, images: images, id: codepoints, text: [en, es]}}
{rest}
"""
    )
    return recipe
