"""`tokenizer:` of a recipe: whose vocabulary the result has, and where the rows of single tokens come from.

    tokenizer:
      source: union                        # or base, or a model of the recipe
      tokens:
        "<|im_end|>": {source: ./tuned}    # or {kind: zero}, or {kind: model_token, model: ./tuned, token: "</s>"}
        "<th>": {source: {kind: model_token, model: ./tuned, token_id: 7}, force: true}
      pad_to_multiple_of: 64

`tokenizer_source: base` is short for `tokenizer: {source: base}`. All of it means what it means in mergekit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ggez_merge.check import Check
from ggez_merge.reference import read_path
from ggez_merge.yaml_lines import Where

KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "force")
KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
LARGEST_MULTIPLE = 1 << 20


@dataclass(frozen=True)
class TokenRow:
    """The row of one token in models that lack it or, with `force`, in all. model None: zeros.

    token: what it is called there, or its number there.
    """

    model: str | None
    token: str | int
    force: bool


@dataclass(frozen=True)
class Tokenizer:
    """source: "base", "union" or a model; tokens: None as a row says that the token is wanted, and no more."""

    source: str
    where: Where
    tokens: dict[str, TokenRow | None] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


def read_tokenizer(check: Check, top: dict[str, Any]) -> Tokenizer | None:
    """What `tokenizer` or `tokenizer_source` says; None if neither is there."""
    if "tokenizer" in top and "tokenizer_source" in top:
        check.exactly_one((), top, ("tokenizer", "tokenizer_source"))
    if "tokenizer" not in top:
        source = read_path(check, ("tokenizer_source",), top.get("tokenizer_source"))
        return Tokenizer(source, ("tokenizer_source",)) if source else None
    where: Where = ("tokenizer",)
    given = check.mapping(where, top["tokenizer"], KEYS, needed=True)
    tokens = {
        str(token): _token(check, (*where, "tokens", token), str(token), value)
        for token, value in check.mapping((*where, "tokens"), given.get("tokens")).items()
    }
    multiple = given.get("pad_to_multiple_of")
    if multiple is not None and not (type(multiple) is int and 0 < multiple <= LARGEST_MULTIPLE):
        expected = f"a whole number from 1 to {LARGEST_MULTIPLE}"
        check.refuse((*where, "pad_to_multiple_of"), "this is no number of rows", expected, multiple)
        multiple = None
    source = read_path(check, (*where, "source"), given.get("source"))
    return Tokenizer(source or "union", where, tokens, multiple)


def _token(check: Check, where: Where, token: str, value: Any) -> TokenRow | None:
    entry = check.mapping(where, value, TOKEN_KEYS)
    force, source = entry.get("force", False), entry.get("source")
    if not isinstance(force, bool):
        check.refuse((*where, "force"), "`force` must be true or false", None, force)
    if source is None:
        return None
    here = (*where, "source")
    if not isinstance(source, dict):
        model = read_path(check, here, source)
        return TokenRow(model, token, force is True) if model else None
    kind = check.choice((*here, "kind"), source.get("kind"), tuple(KINDS), absent="model_token")
    said = check.mapping(here, source, KINDS[kind])
    if kind == "zero":
        return TokenRow(None, token, force is True)
    model = read_path(check, (*here, "model"), said.get("model"))
    named = check.exactly_one(here, said, ("token", "token_id"))
    there = said.get(named) if named else None
    if type(there) is not (int if named == "token_id" else str):
        check.refuse(here, "this does not name a token", "`token` as text, or `token_id` as a number", there)
    elif check.required(here, said, "model") and model and isinstance(there, str | int):
        return TokenRow(model, there, force is True)
    return None
