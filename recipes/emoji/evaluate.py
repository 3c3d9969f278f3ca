"""What a merge does to a small image-text model: recall@1 in Southeast Asian and in global languages.

    python -m ggez_merge.recipes.emoji.evaluate GLOBAL MODEL...

500 concepts, each with one picture (in a drawing style that no model was trained on) and one name per
language. For each language the 500 names are matched with the 500 pictures, in both directions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, VisionTextDualEncoderModel
from transformers.utils import logging

GLOBAL_LANGUAGES = ("en", "es", "fr", "de", "pt", "it", "ru", "zh", "ja", "ko", "ar", "hi")
SEA_LANGUAGES = ("id", "ms", "jv", "fil", "vi", "th", "lo", "km", "my", "shn")
PICTURE_SIDE = 32  # pixels; images.png is a grid of pictures in the order of the lines of names.jsonl
BATCH = 256
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Gallery:
    """Pictures (uint8, [concepts, 3, side, side]) and, for each language, their names in the same order."""

    pictures: Tensor
    names: dict[str, list[str]]


@dataclass(frozen=True)
class Score:
    """Mean recall@1 in percent over the languages of a group and both directions."""

    sea_percent: float
    global_percent: float


def load_gallery() -> Gallery:
    """Read the pictures and names that lie beside this file."""
    lines = (HERE / "names.jsonl").read_text(encoding="utf-8").splitlines()
    concepts = [json.loads(line) for line in lines]
    with Image.open(HERE / "images.png") as image:
        grid = np.asarray(image.convert("RGB"))
    pictures = rearrange(grid, "(row y) (column x) colour -> (row column) colour y x", y=PICTURE_SIDE, x=PICTURE_SIDE)
    names = {language: [concept[language] for concept in concepts] for language in GLOBAL_LANGUAGES + SEA_LANGUAGES}
    return Gallery(torch.from_numpy(pictures), names)


def evaluate(folder: Path, gallery: Gallery) -> Score:
    """Score the dual encoder in `folder`, with the tokenizer and the normalisation that lie there.

    Raises ValueError if the weights are not those of the architecture that config.json names, or give NaN.
    """
    model, found = VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
    # Unasked, transformers fills missing weights with random numbers and drops those that it doesn't know.
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[fault]:
            raise ValueError(f"{folder}: {fault.replace('_', ' ')}: {sorted(found[fault])}")
    model.eval()
    # ResNet pools to [batch, channels, 1, 1], the projection wants [batch, channels]. Pooling has no weights.
    model.vision_model.pooler = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, deviation = (torch.tensor(preprocessor[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))

    def encode_pictures(pixels: Tensor) -> Tensor:
        pixels = (pixels * preprocessor["rescale_factor"] - mean) / deviation
        features: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return nn.functional.normalize(features, dim=-1)

    def encode_names(names: list[str]) -> Tensor:
        tokens = tokenizer(names, padding=True, truncation=True, return_tensors="pt")
        encoded = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        features: Tensor = model.text_projection(encoded.pooler_output)
        return nn.functional.normalize(features, dim=-1)

    with torch.inference_mode():
        pictures = torch.cat([encode_pictures(part) for part in torch.split(gallery.pictures, BATCH)])
        recall = {}
        for language, names in gallery.names.items():
            parts = [names[start : start + BATCH] for start in range(0, len(names), BATCH)]
            recall[language] = recall_at_1(pictures @ torch.cat([encode_names(part) for part in parts]).T, names)

    def mean_percent(languages: Sequence[str]) -> float:
        return 100 * sum(recall[language] for language in languages) / len(languages)

    return Score(mean_percent(SEA_LANGUAGES), mean_percent(GLOBAL_LANGUAGES))


def recall_at_1(similarity: Tensor, names: Sequence[str]) -> float:
    """Share of concepts found at the first place, mean of picture -> name and name -> picture.

    `similarity` is [pictures, names], both in the order of `names`. Where two concepts have the same name,
    either is right. A wrong answer as similar as the best right one counts as found first.
    """
    if not torch.isfinite(similarity).all():
        raise ValueError("the similarities hold NaN or infinity: the checkpoint is broken")
    number: dict[str, int] = {}
    identity = torch.tensor([number.setdefault(name, len(number)) for name in names])
    right = identity[:, None] == identity[None, :]
    shares = []
    for scores in (similarity, similarity.T):  # `right` is symmetric
        best_right = scores.masked_fill(~right, -torch.inf).amax(1)
        best_wrong = scores.masked_fill(right, -torch.inf).amax(1)
        shares.append((best_right > best_wrong).double().mean().item())
    return sum(shares) / len(shares)


def table(scores: dict[str, Score]) -> str:
    """One line per model; gain and retention are relative to the first one."""
    base = next(iter(scores.values()))
    width = max(len(name) for name in ("model", *scores))
    lines = [f"{'model':<{width}}  SEA R@1  global R@1  SEA gain  global kept"]
    for name, score in scores.items():
        gain = f"{100 * (score.sea_percent / base.sea_percent - 1):+.1f} %"
        kept = f"{100 * score.global_percent / base.global_percent:.1f} %"
        recall = f"{score.sea_percent:>7.1f}  {score.global_percent:>10.1f}"
        lines.append(f"{name:<{width}}  {recall}  {gain:>8}  {kept:>11}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the folders on the command line."""
    parser = argparse.ArgumentParser(prog="python -m ggez_merge.recipes.emoji.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="a checkpoint; the base first")
    folders: list[Path] = parser.parse_args(arguments).folders
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder}: there is no such folder")
    logging.disable_progress_bar()
    gallery = load_gallery()
    print(table({str(folder): evaluate(folder, gallery) for folder in folders}))


if __name__ == "__main__":
    main()
