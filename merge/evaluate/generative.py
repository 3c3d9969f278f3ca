"""Tasks of models that generate text: multiple choice, open questions, the loss of captions.

Likelihoods are rounded to 4 decimals before they are compared, and a wrong choice that ties with the right one wins:
rounding noise, which differs with the batch size, decides nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ggez_merge.evaluate.chat import Likelihood, Question, generate, log_likelihoods
from ggez_merge.evaluate.data import Row
from ggez_merge.evaluate.fields import many
from ggez_merge.evaluate.kinds import CaptionLoss, MultipleChoice, Vqa
from ggez_merge.evaluate.measured import Item, Measured, mean, of_items, percent
from ggez_merge.evaluate.metrics import LETTERS, METRICS, exact_match, parse_choice
from ggez_merge.evaluate.model import Live
from ggez_merge.evaluate.tasks import Task

DECIMALS = 4
PERCENT = 100.0


def answer(
    task: Task, kind: MultipleChoice | Vqa | CaptionLoss, live: Live, rows: Sequence[Row], batch_size: int
) -> Measured:
    """Measure one of these kinds of tasks. Raises Refused if the model sees no images, or a row lacks an answer."""
    if live.processor is None and any(row.picture for row in rows):
        remedy = "say `image: false` to ask it without images"
        raise task.refused("the model reads text only, the task has images", live.model.config.model_type, remedy)
    if isinstance(kind, MultipleChoice):
        return choose(task, kind, live, rows, batch_size)
    if isinstance(kind, Vqa):
        return ask(task, kind, live, rows, batch_size)
    return caption_loss(task, kind, live, rows, batch_size)


def choose(task: Task, kind: MultipleChoice, live: Live, rows: Sequence[Row], batch_size: int) -> Measured:
    """Accuracy in percent on questions with one right choice.

    By log-likelihood: right if log p(answer) / length is larger for the right choice than for every other, the length
    being 1, tokens or UTF-8 bytes. details: the accuracy by each length, where they can differ. By generation: right
    if the greedy answer means the right choice (`parse_choice`). details: the share whose choice cannot be told.
    chance: the mean of 1 / number of choices.
    """
    choices = [_choices(task, kind, row) for row in rows]
    right = [_right(task, kind, row, own) for row, own in zip(rows, choices, strict=True)]
    details: dict[str, float] = {}
    if kind.score_by == "generation":
        questions = [_question(kind.prompt, kind.question, row, own) for row, own in zip(rows, choices, strict=True)]
        texts = generate(live, questions, batch_size, kind.max_new_tokens)
        found = [parse_choice(text, own) for text, own in zip(texts, choices, strict=True)]
        hits = [guess == good for guess, good in zip(found, right, strict=True)]
        details["unanswered"] = percent(float(guess is None) for guess in found)
    else:
        letters = kind.answer_with == "letter"
        questions = [
            _question(kind.prompt, kind.question, row, own, tuple(LETTERS[: len(own)] if letters else own))
            for row, own in zip(rows, choices, strict=True)
        ]
        several = log_likelihoods(live, questions, batch_size)
        by_length = {
            name: [_wins(own, good, name) for own, good in zip(several, right, strict=True)]
            for name in ("none", "tokens", "bytes")
        }
        hits = by_length[kind.normalise]
        if not letters:
            details |= {f"normalised by {name}": percent(map(float, own)) for name, own in by_length.items()}
    items = [Item(row.id, PERCENT * hit, row.groups) for row, hit in zip(rows, hits, strict=True)]
    chance = percent(1 / len(own) for own in choices)
    return of_items(task.name, task.tag, items, chance=chance, scale=PERCENT, details=details)


def _wins(likelihoods: Sequence[Likelihood], right: int, normalise: str) -> bool:
    scores = [round(one.log_p / _length(one, normalise), DECIMALS) for one in likelihoods]
    return all(scores[right] > score for i, score in enumerate(scores) if i != right)


def _length(one: Likelihood, normalise: str) -> int:
    return {"none": 1, "tokens": one.n_tokens, "bytes": one.n_bytes}[normalise]


def _choices(task: Task, kind: MultipleChoice, row: Row) -> list[str]:
    """The choices of a row: the elements of one column, or those of several that are not empty."""
    given = many(row.value(kind.choices[0])) if len(kind.choices) == 1 else [row.value(name) for name in kind.choices]
    choices = [str(choice) for choice in given if choice is not None and str(choice).strip()]
    if not 2 <= len(choices) <= len(LETTERS):
        found = ", ".join(choices) or "none"
        raise task.refused(f"row {row.id} must have two choices or more", found, "check the columns under `choices`")
    return choices


def _right(task: Task, kind: MultipleChoice, row: Row, choices: Sequence[str]) -> int:
    """The number of the right choice, which a row gives as its number from 0, its text, or its letter from A."""
    value = row.value(kind.answer)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == int(value) and 0 <= value < len(choices):
            return int(value)
    else:
        text = str(value).strip()
        same = [i for i, choice in enumerate(choices) if choice.strip() == text]
        same = same or [i for i, choice in enumerate(choices) if exact_match(text, [choice])]
        if len(same) == 1:
            return same[0]
        letter = unicodedata.normalize("NFKC", text).upper().strip("().")
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return LETTERS.index(letter)
        if text.isdecimal() and int(text) < len(choices):
            return int(text)
    expected = f"the answer is a number from 0 to {len(choices) - 1}, a letter or the text of one choice"
    raise task.refused(f"row {row.id} has an answer that is none of its {len(choices)} choices", str(value), expected)


def _question(
    prompt: str, column: str, row: Row, choices: Sequence[str] = (), answers: tuple[str, ...] = ()
) -> Question:
    lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    values = {"question": str(row.value(column)), "choices": lettered}
    text = re.sub(
        r"\{(question|choices)\}", lambda found: values[found[1]], prompt
    )  # braces in values stay as they are
    return Question(text, row.picture, answers)


def ask(task: Task, kind: Vqa, live: Live, rows: Sequence[Row], batch_size: int) -> Measured:
    """The mean in percent of a metric (metrics.py) of greedy answers against the right ones of each row.

    chrF is that of each answer, averaged, so that every row has an outcome; corpus chrF is another number. chance: 0.
    """
    right = [[str(one) for one in many(row.value(kind.answer))] for row in rows]
    for row, several in zip(rows, right, strict=True):
        if not several:
            raise task.refused(f"row {row.id} has no answer", f"column {kind.answer}")
    questions = [_question(kind.prompt, kind.question, row) for row in rows]
    answers = generate(live, questions, batch_size, kind.max_new_tokens)
    metric = METRICS[kind.metric]
    outcomes = [PERCENT * metric(text, several) for text, several in zip(answers, right, strict=True)]
    items = [Item(row.id, outcome, row.groups) for row, outcome in zip(rows, outcomes, strict=True)]
    details = {"empty answers": percent(float(not text) for text in answers)}
    return of_items(task.name, task.tag, items, chance=0.0, scale=PERCENT, details=details)


def caption_loss(task: Task, kind: CaptionLoss, live: Live, rows: Sequence[Row], batch_size: int) -> Measured:
    """Mean over rows of -log p(caption | image, prompt) / tokens, in nats, averaged over a row's captions.

    No scale and no chance. details: the same a UTF-8 byte, which does not depend on the tokenizer.
    """
    captions = [tuple(str(text) for text in many(row.value(kind.text))) for row in rows]
    for row, texts in zip(rows, captions, strict=True):
        if not texts:
            raise task.refused(f"row {row.id} has no caption", f"column {kind.text}")
    questions = [Question(kind.prompt, row.picture, texts) for row, texts in zip(rows, captions, strict=True)]
    several = log_likelihoods(live, questions, batch_size)
    items = [
        Item(row.id, mean(-one.log_p / one.n_tokens for one in own), row.groups)
        for row, own in zip(rows, several, strict=True)
    ]
    per_byte = [-one.log_p / one.n_bytes for own in several for one in own]
    details = {"nats a byte": mean(per_byte)}
    return of_items(task.name, task.tag, items, chance=None, scale=None, higher_is_better=False, details=details)
