"""Likelihoods and answers of generative models against one-at-a-time computations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_models import TEXTS, write_images, write_rows
from generative_models import save_generative
from PIL import Image

from ggez_merge.errors import Failed, Refused
from ggez_merge.evaluate import evaluate
from ggez_merge.evaluate.chat import Question, generate, log_likelihoods
from ggez_merge.evaluate.kinds import CaptionLoss, MultipleChoice, Retrieval, Vqa
from ggez_merge.evaluate.metrics import METRICS, parse_choice
from ggez_merge.evaluate.model import Live, load_model
from ggez_merge.evaluate.picture import Picture
from ggez_merge.evaluate.source import Source
from ggez_merge.evaluate.tasks import Task

QUESTIONS = ["นี่คืออะไร?", "តើនេះជាអ្វី?", "Ini apa?", "ဒါဘာလဲ", "Đây là gì vậy bạn?", "இது என்ன?"]
CHOICES = [[TEXTS[i], TEXTS[i + 1], TEXTS[i + 2]][: 2 + i % 2] for i in range(6)]
RIGHT = [0, 1, 0, 2, 1, 1]
OPEN = "{question}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for more."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_generative(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "llava", "gemma3")}


@pytest.fixture(scope="module", params=["llama", "llava", "gemma3"])
def live(request: pytest.FixtureRequest, folders: Mapping[str, Path]) -> Live:
    return load_model(folders[request.param])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("questions")
    files = write_images(folder / "images", 6)
    rows = [
        {
            "image": files[i],
            "question": QUESTIONS[i],
            "choices": CHOICES[i],
            "answer": RIGHT[i],
            "text": TEXTS[i],
            "word": [TEXTS[i], "x"],
            "language": "ab"[i % 2],
        }
        for i in range(6)
    ]
    return Source((write_rows(folder / "rows.jsonl", rows),), folder / "images", group=("language",))


def of(live: Live, source: Source) -> Source:
    """The source as this model can read it."""
    return source if live.processor else replace(source, image=None)


def pictures(live: Live, source: Source) -> list[Picture | None]:
    assert source.images
    return [Picture(source.images / f"{i}.png") if live.processor else None for i in range(6)]


def alone(live: Live, prompt: str, picture: Picture | None, answer: str = "") -> dict[str, Any]:
    """The inputs of one chat, written by hand, with (the bytes of) an answer after it."""
    if live.processor is None:
        text = f"<s><user>{prompt}<model>{answer}"
        return dict(live.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    image = "<boi>" if "gemma3" in live.model.config.model_type else "<image>"
    assert picture is not None and picture.path is not None
    return dict(
        live.processor(
            text=[f"<s><user>{image}{prompt}<model>{answer}"],
            images=[[Image.open(picture.path).convert("RGB")]],
            add_special_tokens=False,
            return_tensors="pt",
        )
    )


def log_p(live: Live, prompt: str, picture: Picture | None, answer: str) -> float:
    inputs = alone(live, prompt, picture, answer)
    with torch.inference_mode():
        scores = live.model(**inputs).logits[0].double().log_softmax(-1)
    ids = inputs["input_ids"][0]
    n = len(answer.encode())  # the tokenizer has a token for each byte
    return sum(float(scores[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))


def greedy(live: Live, prompt: str, picture: Picture | None, n: int) -> str:
    inputs = alone(live, prompt, picture)
    found: list[int] = []
    with torch.inference_mode():
        for _ in range(n):
            token = live.model(**inputs).logits[0, -1].argmax().reshape(1, 1)
            if token == live.tokenizer.eos_token_id:
                break
            found.append(int(token))
            extra = {"input_ids": token, "attention_mask": torch.ones_like(token), "token_type_ids": 0 * token}
            inputs |= {key: torch.cat([inputs[key], extra[key]], 1) for key in extra if key in inputs}
    return str(live.tokenizer.decode(found, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_likelihoods_are_those_of_one_answer_at_a_time(live: Live, source: Source, batch_size: int) -> None:
    answers = [("A", "B", "C"), (TEXTS[0], "A", f"{TEXTS[0]}!"), *[(text,) for text in TEXTS[1:5]]]
    each = list(zip(QUESTIONS, pictures(live, source), answers, strict=True))
    with torch.inference_mode():
        found = log_likelihoods(live, [Question(*one) for one in each], batch_size)
    for (prompt, picture, several), own in zip(each, found, strict=True):
        for answer, likelihood in zip(several, own, strict=True):
            assert likelihood.log_p == pytest.approx(log_p(live, prompt, picture, answer), rel=1e-5)
            assert likelihood.n_tokens == likelihood.n_bytes == len(answer.encode())
    distinct = {round(own[0].log_p / own[0].n_tokens, 3) for own in found}
    assert len(distinct) == 6


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_a_greedy_loop(live: Live, source: Source, batch_size: int) -> None:
    each = list(zip(QUESTIONS, pictures(live, source), strict=True))
    found = generate(live, [Question(*one) for one in each], batch_size, 4)
    assert found == [greedy(live, *one, 4) for one in each]
    assert len(set(found)) > 1


def test_the_checkpoints_own_sampling_is_not_used(live: Live, source: Source) -> None:
    questions = [Question(*one) for one in zip(QUESTIONS, pictures(live, source), strict=True)]
    plain = generate(live, questions, 3, 4)
    own = live.model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 5.0, 3.0
    try:
        assert generate(live, questions, 3, 4) == plain
    finally:
        own.do_sample, own.temperature, own.repetition_penalty = False, 1.0, 1.0


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_the_likeliest_choice_wins(live: Live, source: Source, normalise: str) -> None:
    kind = MultipleChoice(answer_with="text", normalise=normalise, prompt=OPEN)
    result = evaluate(Task("x", "both", kind, of(live, source)), live, batch_size=4)
    lengths = {"none": lambda text: 1, "tokens": lambda text: len(text.encode()), "bytes": lambda t: len(t.encode())}
    outcomes = []
    for i, picture in enumerate(pictures(live, source)):
        scores = [log_p(live, QUESTIONS[i], picture, one) / lengths[normalise](one) for one in CHOICES[i]]
        outcomes.append(100.0 * (scores.index(max(scores)) == RIGHT[i]))
    assert [item.outcome for item in result.items] == outcomes
    assert result.details[f"normalised by {normalise}"] == result.score == pytest.approx(sum(outcomes) / 6)
    assert result.chance == pytest.approx(100 * (3 / 2 + 3 / 3) / 6)
    assert set(result.groups) == {"language=a", "language=b"}


def test_letters_stand_for_choices(live: Live, source: Source) -> None:
    result = evaluate(Task("x", "both", MultipleChoice(), of(live, source)), live)
    for i, (item, picture) in enumerate(zip(result.items, pictures(live, source), strict=True)):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABC", CHOICES[i], strict=False))
        prompt = f"{QUESTIONS[i]}\n{listed}\nAnswer with the letter of the right choice only."
        scores = [log_p(live, prompt, picture, letter) for letter in "ABC"[: len(CHOICES[i])]]
        assert item.outcome == 100.0 * (scores.index(max(scores)) == RIGHT[i])


def test_generated_choices_are_parsed(live: Live, source: Source) -> None:
    kind = MultipleChoice(score_by="generation", prompt="{choices}{question}", max_new_tokens=4)
    result = evaluate(Task("x", "both", kind, of(live, source)), live)
    found = []
    for i, picture in enumerate(pictures(live, source)):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABC", CHOICES[i], strict=False))
        found.append(parse_choice(greedy(live, listed + QUESTIONS[i], picture, 4), CHOICES[i]))
    assert [item.outcome for item in result.items] == [100.0 * (a == b) for a, b in zip(found, RIGHT, strict=True)]
    assert result.details["unanswered"] == pytest.approx(100 * found.count(None) / 6)


@pytest.mark.parametrize("metric", METRICS)
def test_open_answers_are_scored_by_the_metric(live: Live, source: Source, metric: str, tmp_path: Path) -> None:
    answers = [greedy(live, QUESTIONS[i], picture, 5) for i, picture in enumerate(pictures(live, source))]
    rows = [json.loads(line) for line in source.paths[0].read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows):
        row["answer"] = [answers[i] or "?", "other"] if i % 2 else f"{answers[i]}x"
    own = replace(of(live, source), paths=(write_rows(tmp_path / "rows.jsonl", rows),))
    result = evaluate(Task("x", "both", Vqa(metric=metric, max_new_tokens=5), own), live)
    right = [row["answer"] if isinstance(row["answer"], list) else [row["answer"]] for row in rows]
    expected = [100 * METRICS[metric](answer, several) for answer, several in zip(answers, right, strict=True)]
    assert [item.outcome for item in result.items] == pytest.approx(expected)
    assert result.score == pytest.approx(sum(expected) / 6)


def test_caption_loss_is_the_mean_over_tokens(live: Live, source: Source) -> None:
    result = evaluate(Task("x", "none", CaptionLoss("word", "see"), of(live, source)), live)
    expected = []
    for i, picture in enumerate(pictures(live, source)):
        several = [-log_p(live, "see", picture, text) / len(text.encode()) for text in (TEXTS[i], "x")]
        expected.append(sum(several) / 2)
    assert [item.outcome for item in result.items] == pytest.approx(expected, rel=1e-5)
    assert (result.higher_is_better, result.scale, result.chance) == (False, None, None)
    assert result.details["nats a byte"] == pytest.approx(result.score)  # here a token is a byte


KINDS = {
    "letters": MultipleChoice(),
    "texts": MultipleChoice(answer_with="text", prompt=OPEN, normalise="bytes"),
    "generation": MultipleChoice(score_by="generation", max_new_tokens=4),
    "vqa": Vqa(answer="text", metric="chrf", max_new_tokens=4),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_batch_size_changes_no_score(live: Live, source: Source, kind: Any) -> None:
    task = Task("x", "both", kind, of(live, source))
    one, other = [evaluate(task, live, batch_size=size) for size in (1, 4)]
    assert other == one


def test_the_batch_size_changes_a_loss_by_rounding_noise_only(live: Live, source: Source) -> None:
    task = Task("x", "both", CaptionLoss(), of(live, source))
    assert evaluate(task, live, batch_size=1).score == pytest.approx(evaluate(task, live, batch_size=4).score, rel=1e-6)


def test_an_image_changes_the_answer(folders: Mapping[str, Path], source: Source) -> None:
    for kind in ("llava", "gemma3"):
        model = load_model(folders[kind])
        a, b, *_ = pictures(model, source)
        with torch.inference_mode():
            (one,), (other,) = log_likelihoods(model, [Question("x", a, ("A",)), Question("x", b, ("A",))], 2)
        assert abs(one.log_p - other.log_p) > 1e-3


def test_without_a_chat_template_the_prompt_is_plain(tmp_path: Path) -> None:
    model = load_model(save_generative(tmp_path, "llama", template=False))
    with torch.inference_mode():
        ((found,),) = log_likelihoods(model, [Question("Capital of Laos?", None, ("ວຽງຈັນ",))], 1)
        ids = model.tokenizer("Capital of Laos? ວຽງຈັນ", return_tensors="pt")["input_ids"]
        assert ids[0, 0] == model.tokenizer.bos_token_id
        scores = model.model(ids).logits[0].log_softmax(-1)
    n = len(" ວຽງຈັນ".encode())
    expected = sum(float(scores[i - 1, ids[0, i]]) for i in range(ids.shape[1] - n, ids.shape[1]))
    assert found.log_p == pytest.approx(expected, rel=1e-5)


def test_answers_may_be_numbers_letters_or_texts(folders: Mapping[str, Path], source: Source, tmp_path: Path) -> None:
    model = load_model(folders["llama"])
    rows = [json.loads(line) for line in source.paths[0].read_text(encoding="utf-8").splitlines()]
    plain = replace(source, image=None)
    expected = evaluate(Task("x", "both", MultipleChoice(), plain), model).items
    for write in (
        lambda row: "ABC"[row["answer"]],
        lambda row: f"({'abc'[row['answer']]})",
        lambda row: row["choices"][row["answer"]],
        lambda row: str(row["answer"]),
        lambda row: float(row["answer"]),
    ):
        changed = [{**row, "answer": write(row), "choices": str(row["choices"])} for row in rows]
        own = replace(plain, paths=(write_rows(tmp_path / "rows.jsonl", changed),))
        assert evaluate(Task("x", "both", MultipleChoice(), own), model).items == expected
    columns = [{**row, **dict(zip("xyz", [*row["choices"], ""], strict=False))} for row in rows]
    columns = [{"z": "", **row} for row in columns]
    own = replace(plain, paths=(write_rows(tmp_path / "rows.jsonl", columns),))
    assert evaluate(Task("x", "both", MultipleChoice(choices=tuple("xyz")), own), model).items == expected
    for column, value, message in (
        ("answer", 7, "row 2 has an answer that is none of its 2 choices"),
        ("answer", "D", "row 2 has an answer"),
        ("answer", None, "row 2 has an answer"),
        ("choices", ["one"], "row 2 must have two choices"),
    ):
        changed = [{**row, column: value} if i == 2 else row for i, row in enumerate(rows)]
        own = replace(plain, paths=(write_rows(tmp_path / "rows.jsonl", changed),))
        with pytest.raises(Refused, match=re.escape(message)):
            evaluate(Task("x", "both", MultipleChoice(), own), model)


def test_braces_in_a_question_stay(folders: Mapping[str, Path], tmp_path: Path) -> None:
    model = load_model(folders["llama"])
    rows = [{"question": "a {choices} {x}", "choices": ["p {question}", "q"], "answer": 0}]
    source = Source((write_rows(tmp_path / "rows.jsonl", rows),), image=None)
    result = evaluate(Task("x", "both", MultipleChoice(prompt="{question}|{choices}"), source), model)
    scores = [log_p(model, "a {choices} {x}|A. p {question}\nB. q", None, letter) for letter in "AB"]
    assert result.score == 100.0 * (scores[0] > scores[1])


def test_wrong_tasks_and_broken_models_are_told(folders: Mapping[str, Path], source: Source) -> None:
    text_only = load_model(folders["llama"])
    with pytest.raises(Refused, match="reads text only"):
        evaluate(Task("x", "both", Vqa(), source), text_only)
    with pytest.raises(Refused, match="an image and a text encoder"):
        evaluate(Task("x", "both", Retrieval(), source), text_only)
    with torch.no_grad():
        text_only.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(Failed, match="NaN"):
        evaluate(Task("x", "both", MultipleChoice(), replace(source, image=None)), text_only)
