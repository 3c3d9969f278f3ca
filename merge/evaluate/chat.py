"""Questions to a generative model: chats with at most one image, as inputs of a batch; likelihoods and answers.

Likelihoods: what the processor makes of the prompts is freed of its padding, the answer's tokens are appended, and the
batch is padded on the right, so that every token has the position it would have alone. Generation pads on the left.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ggez_merge.errors import Failed
from ggez_merge.evaluate.model import Live
from ggez_merge.evaluate.picture import Picture


@dataclass(frozen=True)
class Question:
    """What a user says, the image that goes with it, and the answers whose likelihood is asked for."""

    prompt: str
    picture: Picture | None = None
    answers: tuple[str, ...] = ()


class Likelihood(NamedTuple):
    """log p(answer | image, prompt) in nats, and the answer's length."""

    log_p: float
    n_tokens: int
    n_bytes: int


class _Entry(NamedTuple):
    """One sequence to be run: a prompt and tokens after it. Answers that differ in their last token share it."""

    question: Question
    tokens: tuple[int, ...]


def log_likelihoods(live: Live, questions: Sequence[Question], batch_size: int) -> list[list[Likelihood]]:
    """For every question, the likelihoods of its answers, in order. Answers are tokenised by themselves."""
    answers = [[_tokens(live, answer) for answer in question.answers] for question in questions]
    wanted = dict.fromkeys(
        (i, tokens[:-1]) for i, several in enumerate(answers) for tokens in several
    )  # each once: letters, which have one token each, take one pass for all of them
    found: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for part in batches(list(wanted), batch_size):
        entries = [_Entry(questions[i], tokens) for i, tokens in part]
        nexts = {key: [several for several in answers[key[0]] if several[:-1] == key[1]] for key in part}
        for key, log_p in zip(part, _forward(live, entries), strict=True):
            for tokens in nexts[key]:
                picked = log_p.gather(1, torch.tensor(tokens, device=log_p.device)[:, None])
                found[key[0], tokens] = picked.sum(dtype=torch.float64).cpu()
    return [
        [
            Likelihood(float(found[i, tokens]), len(tokens), len(answer.encode()))
            for tokens, answer in zip(several, question.answers, strict=True)
        ]
        for i, (several, question) in enumerate(zip(answers, questions, strict=True))
    ]


def _tokens(live: Live, answer: str) -> tuple[int, ...]:
    """The tokens of an answer that follows a prompt: of a chat's last turn at once, of plain text after a space."""
    text = answer if _has_template(live) else f" {answer}"
    tokens = tuple(live.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise Failed(f"the tokenizer has no tokens for the answer {answer!r}")
    return tokens


def _forward(live: Live, entries: Sequence[_Entry]) -> list[Tensor]:
    """For each entry, log p [len(tokens) + 1, vocabulary] of what comes after its prompt and after each token."""
    inputs = _inputs(live, [entry.question for entry in entries])
    mask = inputs.pop("attention_mask").bool()
    lengths = [int(n) for n in mask.sum(1)]
    total = max(n + len(entry.tokens) for n, entry in zip(lengths, entries, strict=True))
    appended = {"input_ids": (live.tokenizer.pad_token_id or 0, [entry.tokens for entry in entries])}
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == mask.shape:  # one value a token: ids, and kinds of tokens
            fill, tokens = appended.get(key, (0, [(0,) * len(entry.tokens) for entry in entries]))
            whole = torch.full((len(entries), total), fill, dtype=value.dtype)
            for i, own in enumerate(tokens):
                whole[i, : lengths[i]] = value[i][mask[i]]
                whole[i, lengths[i] : lengths[i] + len(own)] = torch.tensor(own, dtype=value.dtype)
            inputs[key] = whole
    ends = torch.tensor([n + len(entry.tokens) for n, entry in zip(lengths, entries, strict=True)])
    inputs["attention_mask"] = (torch.arange(total)[None] < ends[:, None]).long()
    first = min(lengths) - 1
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(live.model.forward).parameters:  # a whole vocabulary a position is big
        options["logits_to_keep"] = total - first
    logits: Tensor = live.model(**live.to_device(inputs), use_cache=False, **options).logits
    start = total - logits.shape[1]
    rows = []
    for i, entry in enumerate(entries):
        begin = lengths[i] - 1 - start
        log_p = logits[i, begin : begin + len(entry.tokens) + 1].float().log_softmax(-1)
        if torch.isnan(log_p).any():
            raise Failed("the model's logits hold NaN: the checkpoint is broken, or float16 is too narrow")
        rows.append(log_p)
    return rows


def generate(live: Live, questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy answers, without special tokens and outer space."""
    from transformers import GenerationConfig

    own = live.model.generation_config
    pad = live.tokenizer.pad_token_id
    eos = own.eos_token_id if own.eos_token_id is not None else live.tokenizer.eos_token_id
    first = eos[0] if isinstance(eos, list) else eos
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos,
        bos_token_id=own.bos_token_id,
        pad_token_id=pad if pad is not None else first,
    )
    found: list[str] = []
    try:
        # Whatever a config leaves open is taken from the model's, which may sample or punish repetition.
        live.model.generation_config = config
        for part in batches(questions, batch_size):
            inputs = live.to_device(_inputs(live, part, side="left"))
            tokens = live.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            found += [text.strip() for text in live.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    finally:
        live.model.generation_config = own
    return found


def _inputs(live: Live, questions: Sequence[Question], side: str = "right") -> dict[str, Any]:
    """What the model takes for these prompts, padded to the longest, on the CPU."""
    texts = [_chat(live, question) for question in questions]
    bos = live.tokenizer.bos_token
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt", "padding_side": side}
    if bos and all(text.startswith(bos) for text in texts):
        options["add_special_tokens"] = False  # the template has written it already
    if live.tokenizer.pad_token_id is None:
        live.tokenizer.pad_token = live.tokenizer.eos_token
    decoded: dict[Picture, Any] = {}
    for question in questions:
        if question.picture and question.picture not in decoded:
            decoded[question.picture] = question.picture.open()
    pictures = [[decoded[question.picture]] for question in questions if question.picture]
    if live.processor is None:
        return dict(live.tokenizer(texts, **options))
    return dict(live.processor(text=texts, images=pictures or None, **options))


def _chat(live: Live, question: Question) -> str:
    """The prompt as the model's chat template has it; plain, where it has none."""
    if not _has_template(live):
        return question.prompt
    content: Any = question.prompt
    if live.processor is not None:
        content = [{"type": "text", "text": question.prompt}]
        if question.picture:
            content.insert(0, {"type": "image"})
    door = live.processor or live.tokenizer
    text: str = door.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def _has_template(live: Live) -> bool:
    return bool(getattr(live.processor, "chat_template", None) or live.tokenizer.chat_template)


def batches(elements: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [elements[start : start + size] for start in range(0, len(elements), size)]
