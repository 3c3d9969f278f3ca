"""A vocabulary: which row of the embeddings each token has, as tokenizer.json says it, read without any library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggez_merge.errors import Problem, Refused
from ggez_merge.untrusted import printable, read_json_bytes, strict_json

LARGEST_ID = 1 << 24
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Vocabulary:
    """ids: token -> row. added: those that are matched as a whole before anything else, as tokenizer.json has them.

    text: what that says, where it lies in no file.
    """

    path: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    text: bytes | None = None

    @property
    def size(self) -> int:
        """One more than the last row that a token has."""
        return max(self.ids.values(), default=-1) + 1


def read_vocabulary(path: Path, text: bytes | None = None) -> Vocabulary:
    """The vocabulary of a tokenizer.json, or of the `text` that would be there; Refused if it is none."""
    try:
        document = strict_json(read_json_bytes(path) if text is None else text)
        ids, added = _model_ids(document), {}
        for entry in document.get("added_tokens") or []:
            added[_text(entry["content"])] = entry
            ids[entry["content"]] = _id(entry["id"])
        if len(set(ids.values())) < len(ids):
            raise ValueError("two tokens have one id")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        what = f"the vocabulary cannot be read: {printable(str(error))}"
        remedy = "save the tokenizer again with transformers, which writes tokenizer.json"
        raise Refused(Problem(what, str(path), remedy=remedy)) from None
    return Vocabulary(path, ids, added, text)


def _model_ids(document: Any) -> dict[str, int]:
    vocab = document["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with their scores, numbered in turn; of equal ones the last counts
        return {_text(piece[0]): number for number, piece in enumerate(vocab)}
    return {_text(token): _id(number) for token, number in vocab.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a token is no text")
    return value


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LARGEST_ID:
        raise ValueError(f"{value!r} is no token id")
    return value


def extended(vocabulary: Vocabulary, tokens: Mapping[str, Mapping[str, Any]]) -> Vocabulary:
    """With more added tokens after the last row, in order; each as another tokenizer.json has it, or as nothing."""
    ids, added = dict(vocabulary.ids), dict(vocabulary.added)
    for token, entry in tokens.items():
        number = len(ids)
        ids[token] = number
        added[token] = {"id": number, "content": token, **{flag: entry.get(flag) is True for flag in FLAGS}}
    return Vocabulary(vocabulary.path, ids, added, vocabulary.text)


def gaps(vocabulary: Vocabulary) -> int:
    """How many rows below the last have no token: the tokenizers library numbers added tokens as if there were none."""
    return vocabulary.size - len(vocabulary.ids)


def tokenizer_json(vocabulary: Vocabulary, new: Sequence[str]) -> bytes:
    """Its tokenizer.json with these of its added tokens appended."""
    document = strict_json(read_json_bytes(vocabulary.path) if vocabulary.text is None else vocabulary.text)
    document["added_tokens"] = [*(document.get("added_tokens") or []), *(vocabulary.added[token] for token in new)]
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
