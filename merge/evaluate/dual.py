"""Image-text retrieval and zero-shot classification with a dual encoder: CLIP, SigLIP and their kin.

Similarities are cosines, computed in float64 from the features and rounded to 6 decimals: what lies nearer than the
rounding noise of a float32 encoder is a tie, and a wrong answer that ties with the right one counts as found first. So
neither the batch size nor the order of rows decides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ggez_merge.errors import Failed
from ggez_merge.evaluate.data import Row
from ggez_merge.evaluate.fields import many
from ggez_merge.evaluate.kinds import Classification, Retrieval
from ggez_merge.evaluate.measured import Item, Measured, mean, of_items, percent
from ggez_merge.evaluate.model import SIGLIP, Live
from ggez_merge.evaluate.tasks import Task

DECIMALS = 6
CHUNK = 1024  # queries whose similarities are in memory at once
THREADS = 4  # that decode images
PERCENT = 100.0


def retrieve(task: Task, kind: Retrieval, live: Live, rows: Sequence[Row], batch_size: int) -> Measured:
    """Recall in percent at each k, in pools of the rows that compete.

        item of an image = 100 * (found(image -> texts) + mean over its captions of found(caption -> images)) / 2
        found@k = fewer than k wrong candidates are as near as the nearest right one

    Images are told apart by their bytes, captions by their text: where two images have the same caption, either is
    right. score: the mean over images at the first k. details: both directions at every k (over images, over
    captions). chance: the same for a random order. Rows without a caption are left out, and counted.
    """
    pools, n_empty = _pools(kind, rows)
    if not pools:
        raise task.refused("no row has a caption", f"columns {', '.join(kind.text)}")
    image_of = _embedded(_images(live, batch_size), {str(row.image_id): row for row in rows})
    text_of = _embedded(_texts(live, batch_size), {text: text for pairs in pools.values() for _, text in pairs})
    found: dict[str, list[float]] = defaultdict(list)
    items: list[Item] = []
    chances: list[float] = []
    for (column, _), pairs in pools.items():
        images = {str(row.image_id): i for i, row in enumerate(_first(pairs))}
        captions = {text: j for j, text in enumerate(dict.fromkeys(text for _, text in pairs))}
        of_image: list[list[int]] = [[] for _ in images]
        of_text: list[list[int]] = [[] for _ in captions]
        for i, j in dict.fromkeys((images[str(row.image_id)], captions[text]) for row, text in pairs):
            of_image[i].append(j)
            of_text[j].append(i)
        image_features, text_features = (
            torch.stack([features[key] for key in keys]) for features, keys in ((image_of, images), (text_of, captions))
        )
        to_text = ranks(image_features, text_features, of_image)
        to_image = ranks(text_features, image_features, of_text)
        of_rows: dict[str, list[tuple[Row, int]]] = defaultdict(list)
        for row, text in pairs:
            of_rows[str(row.image_id)].append((row, captions[text]))
        for image_id, own in of_rows.items():
            i = images[image_id]
            for k in kind.k:
                found[f"image_to_text R@{k}"].append(float(to_text[i] < k))
                found[f"text_to_image R@{k}"] += [float(to_image[j] < k) for _, j in own]
            k = kind.k[0]
            back = mean(float(to_image[j] < k) for _, j in own)
            luck = mean(guessed(len(of_text[j]), len(images), k) for _, j in own)
            chances.append((guessed(len(of_image[i]), len(captions), k) + luck) / 2)
            groups = [group for row, _ in own for group in row.groups]
            groups += [f"text={column}"] if len(kind.text) > 1 else []
            name = f"{own[0][0].id}:{column}" if len(kind.text) > 1 else own[0][0].id
            items.append(Item(name, PERCENT * (float(to_text[i] < k) + back) / 2, tuple(dict.fromkeys(groups))))
    details = {name: percent(outcomes) for name, outcomes in found.items()}
    if n_empty:
        details["rows without a caption"] = n_empty
    return of_items(task.name, task.tag, items, chance=percent(chances), scale=PERCENT, details=details)


Pairs = list[tuple[Row, str]]


def _pools(kind: Retrieval, rows: Iterable[Row]) -> tuple[dict[tuple[str, str], Pairs], int]:
    """(column, value of `within`) -> its rows with each of their captions; and how many have none."""
    pools: dict[tuple[str, str], Pairs] = defaultdict(list)
    n_empty = 0
    for row in rows:
        pool = str(row.value(kind.within)) if kind.within else ""
        for column in kind.text:
            captions = [str(text) for text in many(row.value(column))]
            n_empty += not captions
            pools[column, pool] += [(row, text) for text in captions]
    return {key: pairs for key, pairs in pools.items() if pairs}, n_empty


def _first(pairs: Pairs) -> list[Row]:
    """One row of each image, in order."""
    rows: dict[str | None, Row] = {}
    for row, _ in pairs:
        rows.setdefault(row.image_id, row)
    return list(rows.values())


def ranks(queries: Tensor, candidates: Tensor, right: Sequence[Sequence[int]]) -> list[int]:
    """For each query, how many wrong candidates are as similar as its best right one, or more so.

    queries [n, width], candidates [m, width]: unit vectors, float64. right: the numbers of the right candidates.
    """
    found: list[int] = []
    for start in range(0, len(queries), CHUNK):
        similarity = (queries[start : start + CHUNK] @ candidates.T).round(decimals=DECIMALS)
        mask = torch.zeros_like(similarity, dtype=torch.bool)
        for i in range(len(similarity)):
            mask[i, list(right[start + i])] = True
        best = similarity.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        found += ((similarity >= best) & ~mask).sum(1).tolist()
    return found


def guessed(n_right: int, n: int, k: int) -> float:
    """The chance that one of n_right is among the first k of n in random order: 1 - C(n - n_right, k) / C(n, k)."""
    return 1 - math.comb(n - n_right, min(k, n)) / math.comb(n, min(k, n))


def classify(task: Task, kind: Classification, live: Live, rows: Sequence[Row], batch_size: int) -> Measured:
    """Zero-shot accuracy in percent: the right class is nearer to the image than every other one.

        class = unit(mean over templates of unit(text features of the template, filled with the class's name))

    details: the accuracy averaged over classes and, of more than five classes, the share of right ones among the first
    five. Source of the averaging: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", 2021, section 3.1.4.
    """
    names, right = _labelled(task, kind, rows)
    prompts = {template.replace("{}", name) for name in names for template in kind.templates}
    text_of = _embedded(_texts(live, batch_size), {prompt: prompt for prompt in sorted(prompts)})
    classes = torch.stack(
        [unit(sum(text_of[template.replace("{}", name)] for template in kind.templates)) for name in names]
    )
    image_of = _embedded(_images(live, batch_size), {str(row.image_id): row for row in rows})
    images = torch.stack([image_of[str(row.image_id)] for row in rows])
    rank = ranks(images, classes, [[number] for number in right])
    items = [Item(row.id, PERCENT * (found < 1), row.groups) for row, found in zip(rows, rank, strict=True)]
    members: dict[int, list[float]] = defaultdict(list)
    for number, found in zip(right, rank, strict=True):
        members[number].append(float(found < 1))
    details = {"mean over classes": percent(mean(outcomes) for outcomes in members.values())}
    if len(names) > 5:
        details["top-5"] = percent(float(found < 5) for found in rank)
    return of_items(task.name, task.tag, items, chance=PERCENT / len(names), scale=PERCENT, details=details)


def _labelled(task: Task, kind: Classification, rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    """The names of the classes, and the number of each row's class. A label may be a class, or its number from 0."""
    labels = [str(row.value(kind.label)) for row in rows]
    known = dict(kind.classes) or {label: label for label in sorted(set(labels))}
    if len(set(known.values())) < 2:
        raise task.refused("there must be two classes of different names", ", ".join(known.values()))
    numbers = {label: number for number, label in enumerate(known)}
    if not set(labels) <= set(numbers):
        numbers = {str(number): number for number in range(len(known))}
    for row, label in zip(rows, labels, strict=True):
        if label not in numbers:
            remedy = f"`classes` has {len(known)}, such as {', '.join(list(known)[:3])}"
            raise task.refused(f"row {row.id} has a label that is none of the classes", label, remedy)
    return list(known.values()), [numbers[label] for label in labels]


def _embedded(encode: Callable[[Sequence[Any]], Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """The features of each key's value, of equal ones once."""
    return dict(zip(wanted, encode(list(wanted.values())), strict=True))


def _images(live: Live, batch_size: int) -> Callable[[Sequence[Row]], Tensor]:
    def encode(rows: Sequence[Row]) -> Tensor:
        with ThreadPoolExecutor(THREADS) as executor:
            parts = []
            for part in _batches(rows, batch_size):
                pictures = list(executor.map(lambda row: row.picture.open() if row.picture else None, part))
                parts.append(_finite(image_features(live, pictures)))
        return unit(torch.cat(parts))

    return encode


def _texts(live: Live, batch_size: int) -> Callable[[Sequence[str]], Tensor]:
    def encode(texts: Sequence[str]) -> Tensor:
        return unit(torch.cat([_finite(text_features(live, part)) for part in _batches(texts, batch_size)]))

    return encode


def image_features(live: Live, pictures: Sequence[Any]) -> Tensor:
    """The features of decoded images, [n, width], as the model gives them."""
    assert live.image_processor is not None
    inputs = live.to_device(live.image_processor(images=list(pictures), return_tensors="pt"))
    model = live.model
    if model.config.model_type == "vision-text-dual-encoder":
        # Some vision models, such as ResNet, pool to [n, width, 1, 1], which transformers' own method cannot project.
        projected: Tensor = model.visual_projection(model.vision_model(**inputs).pooler_output.flatten(1))
        return projected
    return _pooled(model.get_image_features(**inputs))


def text_features(live: Live, texts: Sequence[str]) -> Tensor:
    """The features of texts, [n, width], as the model gives them. Texts that are too long are cut.

    SigLIP was trained on texts padded to its full length, the padding being read like any token: it gets just that.
    Others get padding up to the longest text, and a mask.
    """
    text_config = live.model.config.get_text_config()
    longest = min(live.tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", math.inf))
    siglip = live.model.config.model_type in SIGLIP
    limit = {"truncation": True, "max_length": int(longest)} if longest < 1_000_000 else {}
    padding = "max_length" if siglip else True
    inputs = live.tokenizer(list(texts), padding=padding, return_tensors="pt", **limit)
    if siglip:
        inputs = {"input_ids": inputs["input_ids"]}
    return _pooled(live.model.get_text_features(**live.to_device(inputs)))


def _pooled(output: Any) -> Tensor:
    """The features, which are in a field of what newer releases of transformers return."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _finite(features: Tensor) -> Tensor:
    if not torch.isfinite(features).all():
        raise Failed("the model's features hold NaN or infinity: the checkpoint is broken, or float16 is too narrow")
    return features


def unit(features: Any) -> Tensor:
    """The vectors along the last axis at length 1, in float64."""
    features = features.double().cpu() if features.device.type == "mps" else features.double()
    return torch.nn.functional.normalize(features, dim=-1)


def _batches(elements: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [elements[start : start + size] for start in range(0, len(elements), size)]
