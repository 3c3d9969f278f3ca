"""Retrieval and zero-shot classification against dense oracles, and the shipped pair's published figures."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_models import TEXTS, save_dual, write_images, write_rows
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ggez_merge.errors import Failed, Refused
from ggez_merge.evaluate import evaluate
from ggez_merge.evaluate.dual import guessed, image_features, ranks, text_features, unit
from ggez_merge.evaluate.kinds import Classification, Retrieval, Vqa
from ggez_merge.evaluate.model import Live, load_model
from ggez_merge.evaluate.source import Source
from ggez_merge.evaluate.tasks import Task, evaluation_of
from ggez_merge.recipe import load_recipe
from ggez_merge.recipes.emoji.evaluate import GLOBAL_LANGUAGES, PICTURE_SIDE, SEA_LANGUAGES

EMOJI = Path(__file__).parents[1] / "recipes/emoji"
NEAR = 0.3  # percentage points; another version of torch may decide a few matches differently


@pytest.fixture(scope="module", params=["clip", "siglip"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return load_model(save_dual(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """12 images; some have several captions, two share one, one has none."""
    folder = tmp_path_factory.mktemp("captions")
    files = write_images(folder / "images", 12)
    rows = [{"file": name, "text": TEXTS[i % 9], "country": "IMT"[i % 3]} for i, name in enumerate(files)]
    rows += [{"file": files[i], "text": f"{i} {TEXTS[9]}", "country": "I"} for i in (0, 0, 4, 11)]
    rows[-1]["text"] = f"11 {TEXTS[0]}"
    rows += [{"file": files[0], "text": None, "country": "I"}]
    return Source((write_rows(folder / "rows.jsonl", rows),), folder / "images", "file", group=("country",))


def retrieval(source: Source, **keys: Any) -> Task:
    return Task("x", "regional", Retrieval(**keys), source)


def pairs_of(source: Source) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in source.paths[0].read_text(encoding="utf-8").splitlines()]
    return [(row["file"], row["text"]) for row in rows if row["text"]]


def one_by_one(live: Live, source: Source, files: Sequence[str], texts: Sequence[str]) -> Any:
    """Cosines of every image with every text, each embedded alone."""
    assert source.images is not None
    with torch.inference_mode():
        pictures = [Image.open(source.images / name).convert("RGB") for name in files]
        images = torch.cat([image_features(live, [picture]) for picture in pictures]).double()
        words = torch.cat([text_features(live, [text]) for text in texts]).double()
        return torch.nn.functional.cosine_similarity(images[:, None], words[None], dim=-1).numpy()


def recall(scores: Any, right: Any, k: int) -> list[float]:
    """By sorting, the wrong ones first among equals."""
    hits = []
    for row, good in zip(scores.round(6), right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], good[j]))
        hits.append(float(any(good[j] for j in order[:k])))
    return hits


def test_recall_is_that_of_a_dense_oracle(live: Live, captions: Source) -> None:
    result = evaluate(retrieval(captions, k=(1, 3, 5)), live)
    pairs = pairs_of(captions)
    files, texts = list(dict.fromkeys(f for f, _ in pairs)), list(dict.fromkeys(t for _, t in pairs))
    scores = one_by_one(live, captions, files, texts)
    right = np.array([[(file, text) in pairs for text in texts] for file in files])
    for k in (1, 3, 5):
        to_text, to_image = recall(scores, right, k), recall(scores.T, right.T, k)
        assert result.details[f"image_to_text R@{k}"] == pytest.approx(100 * np.mean(to_text))
        every = [to_image[texts.index(text)] for _, text in pairs]
        assert result.details[f"text_to_image R@{k}"] == pytest.approx(100 * np.mean(every))
    per_image = [
        50 * recall(scores, right, 1)[i]
        + 50 * np.mean([recall(scores.T, right.T, 1)[texts.index(t)] for f, t in pairs if f == file])
        for i, file in enumerate(files)
    ]
    assert [item.outcome for item in result.items] == pytest.approx(per_image)
    assert result.score == pytest.approx(np.mean(per_image))
    assert result.n == 12
    assert result.details["rows without a caption"] == 1
    assert set(result.groups) == {"country=I", "country=M", "country=T"}
    assert 0 < result.details["image_to_text R@5"] < 100


@pytest.mark.parametrize("kind", ["retrieval", "classification"])
def test_neither_batch_size_nor_order_nor_threads_change_a_score(live: Live, captions: Source, kind: str) -> None:
    classes = Classification("country", (("I", TEXTS[0]), ("M", TEXTS[1]), ("T", TEXTS[2])), ("{}", "photo of {}"))
    task = retrieval(captions, k=(1, 5)) if kind == "retrieval" else Task("x", "global", classes, captions)
    whole = evaluate(task, live, batch_size=64)
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for size in (1, 3, 7):
            assert evaluate(task, live, batch_size=size) == whole
    finally:
        torch.set_num_threads(n)
    lines = captions.paths[0].read_text(encoding="utf-8").splitlines()
    turned = captions.paths[0].with_name("turned.jsonl")
    turned.write_text("\n".join(reversed(lines)), encoding="utf-8")
    again = evaluate(replace(task, source=replace(captions, paths=(turned,))), live)
    assert (again.score, again.groups, again.details) == (whole.score, whole.groups, whole.details)


def test_rows_compete_within_a_pool_only(live: Live, captions: Source, tmp_path: Path) -> None:
    result = evaluate(retrieval(captions, within="country"), live)
    lines = captions.paths[0].read_text(encoding="utf-8").splitlines()
    outcomes: dict[str, float] = {}
    for country in "IMT":
        alone = evaluate(retrieval(replace(captions, where={"country": (country,)})), live)
        outcomes |= {item.id: item.outcome for item in alone.items}
    assert {item.id: item.outcome for item in result.items} == outcomes
    assert len(lines) == 17
    assert result.score > evaluate(retrieval(captions), live).score  # smaller pools are easier


def test_several_columns_of_text_are_pools_of_their_own(live: Live, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images", 5)
    rows = [{"image": name, "en": TEXTS[5 + i], "th": [TEXTS[i], f"{i}"]} for i, name in enumerate(files)]
    source = Source((write_rows(tmp_path / "rows.jsonl", rows),), tmp_path / "images")
    result = evaluate(retrieval(source, text=("en", "th")), live)
    for column in ("en", "th"):
        alone = evaluate(retrieval(source, text=(column,)), live)
        assert result.groups[f"text={column}"] == (alone.score, 5)
    assert result.n == 10
    assert len({item.id for item in result.items}) == 10


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.randoms(use_true_random=False))
def test_ranks_count_wrong_candidates_ties_included(n: int, m: int, rng: random.Random) -> None:
    queries = unit(torch.tensor([[rng.choice([1.0, 0.5]), 1.0, rng.choice([0.0, 1.0])] for _ in range(n)]))
    candidates = unit(torch.tensor([[rng.choice([1.0, 0.5]), 1.0, rng.choice([0.0, 1.0])] for _ in range(m)]))
    right = [rng.sample(range(m), rng.randint(1, m)) for _ in range(n)]
    scores = (queries @ candidates.T).numpy().round(6)
    for i, found in enumerate(ranks(queries, candidates, right)):
        best = max(scores[i][j] for j in right[i])
        assert found == sum(scores[i][j] >= best for j in range(m) if j not in right[i])


def test_a_model_that_tells_nothing_apart_finds_nothing() -> None:
    same = unit(torch.ones(5, 3))
    assert ranks(same, same, [[i] for i in range(5)]) == [4] * 5
    noise = unit(torch.ones(5, 3) + 1e-8 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert ranks(noise, same, [[i] for i in range(5)]) == [4] * 5


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 7))
def test_the_chance_is_that_of_a_random_order(n: int, n_right: int, k: int) -> None:
    n_right = min(n, n_right)
    orders = list(itertools.permutations(range(n)))
    hits = sum(any(j < n_right for j in order[:k]) for order in orders)
    assert guessed(n_right, n, k) == pytest.approx(hits / len(orders))


def test_classes_are_averages_of_their_prompts(live: Live, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images", 9)
    labels = [TEXTS[i % 3] for i in range(9)]
    rows = [
        {"image": name, "label": label, "n": i % 3} for i, (name, label) in enumerate(zip(files, labels, strict=True))
    ]
    source = Source((write_rows(tmp_path / "rows.jsonl", rows),), tmp_path / "images")
    templates = ("{}", "a photo of {}", "ภาพ {}")
    result = evaluate(Task("x", "global", Classification("label", (), templates), source), live)
    names = sorted(set(labels))
    with torch.inference_mode():
        classes = []
        for name in names:
            vectors = [text_features(live, [template.replace("{}", name)]).double()[0] for template in templates]
            mean = sum(vector / vector.norm() for vector in vectors)
            classes.append((mean / mean.norm()).numpy())
        pictures = [Image.open(tmp_path / "images" / name).convert("RGB") for name in files]
        images = [image_features(live, [picture]).double()[0].numpy() for picture in pictures]
    guesses = [names[int(np.argmax([image @ one for one in classes]))] for image in images]
    assert [item.outcome for item in result.items] == [100.0 * (a == b) for a, b in zip(guesses, labels, strict=True)]
    assert result.chance == pytest.approx(100 / 3)
    by_class = [np.mean([g == name for g, b in zip(guesses, labels, strict=True) if b == name]) for name in names]
    assert result.details["mean over classes"] == pytest.approx(100 * np.mean(by_class))
    # The same by the numbers of classes that are listed.
    listed = tuple((name, name) for name in TEXTS[:3])
    by_number = evaluate(Task("x", "global", Classification("n", listed, templates), source), live)
    assert by_number.items == result.items
    with pytest.raises(Refused, match="none of the classes"):
        evaluate(Task("x", "global", Classification("label", listed[:2], templates), source), live)


def test_siglip_texts_are_padded_to_full_length_without_a_mask(tmp_path: Path) -> None:
    siglip = load_model(save_dual(tmp_path, "siglip"))
    ids = siglip.tokenizer(["sea"])["input_ids"][0]
    padded = torch.tensor([ids + [0] * (40 - len(ids))])
    with torch.inference_mode():
        expected = siglip.model.text_model(input_ids=padded).pooler_output
        assert torch.allclose(text_features(siglip, ["sea"]), expected, atol=1e-6)
        assert not torch.allclose(
            siglip.model.text_model(input_ids=torch.tensor([ids])).pooler_output, expected, atol=1e-3
        )


def test_texts_beyond_the_models_length_are_cut(live: Live) -> None:
    with torch.inference_mode():
        long, longer = text_features(live, ["x" * 100]), text_features(live, ["x" * 200])
    assert torch.equal(long, longer)


def test_a_broken_model_fails_and_a_wrong_task_is_refused(captions: Source, tmp_path: Path) -> None:
    clip = load_model(save_dual(tmp_path / "clip", "clip"))
    with torch.no_grad():
        clip.model.visual_projection.weight[0, 0] = math.nan
    with pytest.raises(Failed, match="NaN"):
        evaluate(retrieval(captions), clip)
    with pytest.raises(Refused, match="needs a model that generates text"):
        evaluate(Task("x", "global", Vqa(), captions), clip)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    folder = save_dual(tmp_path / "clip", "clip")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Refused, match="its processor"):
        load_model(folder)
    folder = save_dual(tmp_path / "other", "clip")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="weights are missing"):
        load_model(folder)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(Refused, match="no task is known"):
        load_model(tmp_path / "vit")
    with pytest.raises(Refused, match=r"config\.json"):
        load_model(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The demo's pictures, cut out of their sheet, with their names."""
    folder = tmp_path_factory.mktemp("emoji")
    with Image.open(EMOJI / "images.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    pictures = rearrange(sheet, "(r y) (c x) colour -> (r c) y x colour", y=PICTURE_SIDE, x=PICTURE_SIDE)
    rows = [json.loads(line) for line in (EMOJI / "names.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, picture in zip(rows, pictures, strict=True):
        row["image"] = f"{row['codepoints']}.png"
        Image.fromarray(picture).save(folder / row["image"])
    return Source((write_rows(folder / "names.jsonl", rows),), folder, id="codepoints")


@pytest.mark.parametrize(("name", "world", "region"), [("global", 41.9, 17.4), ("region", 30.5, 32.2)])
def test_the_shipped_pair_scores_what_its_readme_says(name: str, world: float, region: float, gallery: Source) -> None:
    model = load_model(EMOJI / name)
    for languages, expected in ((GLOBAL_LANGUAGES, world), (SEA_LANGUAGES, region)):
        result = evaluate(retrieval(gallery, text=languages), model, batch_size=100)
        assert result.score == pytest.approx(expected, abs=NEAR)
        assert result.n == 500 * len(languages)
        assert result.chance == pytest.approx(0.2, abs=0.02)
        assert set(result.groups) == {f"text={language}" for language in languages}


def test_classification_of_the_shipped_pair_is_retrieval_of_its_distinct_names(gallery: Source) -> None:
    model = load_model(EMOJI / "global")
    to_text = evaluate(retrieval(gallery, text=("en",)), model).details["image_to_text R@1"]
    result = evaluate(Task("x", "global", Classification("en", (), ("{}",)), gallery), model)
    assert result.score == pytest.approx(to_text, abs=1e-9)
    assert result.details["top-5"] > result.score > 30


def test_tasks_of_a_recipe_run_through_one_door(live: Live, captions: Source, tmp_path: Path) -> None:
    shutil.copytree(captions.paths[0].parent, tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
merge_method: linear
base_model: a
models: [{model: b}]
parameters: {ratio: 0.5}
evaluate:
  - {name: sea, tag: regional, task: retrieval, data: data/rows.jsonl, images: data/images, image: file, k: [1, 5]}
  - {name: own, tag: global, command: "python -c 'open(\\"{out}/o.json\\", \\"w\\").write(\\"[7]\\")' {model}",
     read: {file: o.json, metric: "[0]"}, scale: 10}
""".replace("python", sys.executable)
    )
    sea, own = evaluation_of(load_recipe(recipe)).tasks
    assert (
        evaluate(sea, live).details["image_to_text R@5"]
        == evaluate(retrieval(captions, k=(1, 5)), live).details["image_to_text R@5"]
    )
    result = evaluate(own, folder=tmp_path, out=tmp_path / "out")
    assert (result.name, result.tag, result.score, result.percent) == ("own", "global", 7, 70)
