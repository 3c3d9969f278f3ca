"""The shipped pair of models scores what its README says when merged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ggez_merge.recipes.emoji.evaluate import Gallery, Score, evaluate, load_gallery, recall_at_1

RECIPES = Path(__file__).parents[1] / "recipes"
EMOJI = RECIPES / "emoji"
NEAR = 0.3  # percentage points; another version of torch may decide a few of the 10,000 matches differently


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return load_gallery()


def merge(recipe: Path, out: Path, *options: str) -> Path:
    """Run the command line, which must succeed."""
    command = [sys.executable, "-m", "ggez_merge", str(recipe), "--out", str(out), *options]
    result = subprocess.run(command, cwd=out.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def assert_near(score: Score, sea_percent: float, global_percent: float) -> None:
    assert score.sea_percent == pytest.approx(sea_percent, abs=NEAR)
    assert score.global_percent == pytest.approx(global_percent, abs=NEAR)


def test_the_recipe_gains_in_the_region_and_keeps_the_world(gallery: Gallery, tmp_path: Path) -> None:
    base = evaluate(EMOJI / "global", gallery)
    assert_near(base, 17.4, 41.9)
    assert_near(evaluate(EMOJI / "region", gallery), 32.2, 30.5)
    merged = evaluate(merge(EMOJI / "sea.yaml", tmp_path / "merged"), gallery)
    assert_near(merged, 22.3, 41.5)
    assert merged.sea_percent / base.sea_percent - 1 > 0.25
    assert merged.global_percent / base.global_percent > 0.98


def test_ratio_0_is_the_base(gallery: Gallery, tmp_path: Path) -> None:
    merged = merge(EMOJI / "sea.yaml", tmp_path / "merged", "--set", "parameters.ratio=0")
    assert evaluate(merged, gallery) == evaluate(EMOJI / "global", gallery)


def test_evaluation_of_a_half_loaded_model_is_refused(gallery: Gallery, tmp_path: Path) -> None:
    merged = merge(EMOJI / "sea.yaml", tmp_path / "merged")
    save_file({"logit_scale": np.ones((), np.float32)}, merged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing keys"):
        evaluate(merged, gallery)


def test_recall_counts_ties_as_wrong_and_equal_names_as_right() -> None:
    names = ["cat", "dog", "dog"]
    perfect = torch.eye(3)
    assert recall_at_1(perfect, names) == 1
    assert recall_at_1(perfect[[0, 2, 1]], names) == 1  # the other picture named "dog" is as right
    assert recall_at_1(torch.ones(3, 3), names) == 0
    assert recall_at_1(perfect[[1, 0, 2]], names) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="NaN"):
        recall_at_1(perfect * torch.nan, names)


def test_the_gallery_is_500_pictures_and_their_names(gallery: Gallery) -> None:
    assert gallery.pictures.shape == (500, 3, 32, 32)
    assert gallery.pictures.dtype == torch.uint8
    assert len(gallery.names) == 22
    assert all(len(names) == 500 and all(names) for names in gallery.names.values())
