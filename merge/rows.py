"""Embeddings whose rows are brought to one vocabulary, token by token: no row is moved, each is read where it lies.

The row of a token in an input is
- what `tokens:` says, if that is forced, or if the input lacks the token;
- else the input's own; the base's, if the input lacks the token; the mean of those of the models that have it, if the
  base lacks it too (and then the base's row is that mean as well).
A row without a token (padding) is the base's where it has one there too, else zeros. An input that has the wanted
vocabulary and number of rows is read as it stands. So a token that only one model has gets that model's row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ggez_merge.carry import TOKENIZER_FILES, carried_files, same_tokenizer, tokenizer_file
from ggez_merge.checkpoint import FLOATS, ITEM_BITS, Checkpoint, Elements, ShardFile, Tensor, joined, promoted, span
from ggez_merge.errors import Problem, Refused
from ggez_merge.heads import is_vocabulary
from ggez_merge.recipe import ModelReference, Recipe
from ggez_merge.tokenizer import Tokenizer, TokenRow
from ggez_merge.untrusted import printable, some
from ggez_merge.vocabulary import Vocabulary, extended, gaps, read_vocabulary, tokenizer_json

Files = tuple[ShardFile, ...]  # what tells one input from another
Place = tuple[Files, int]  # a row of an input
Choice = tuple[Place, ...]  # a row: the mean of these
AVERAGED = 1 << 15  # elements at a time: their sums stay small beside a worker's buffers
TOKEN_IDS = re.compile(r"_token_(id|ids|index)$")


@dataclass(frozen=True)
class Mean:
    """The mean of tensors of one shape, which may be of other dtypes: summed in float64, then rounded; 0 of none."""

    sources: tuple[Tensor, ...]

    @property
    def said(self) -> list[Any]:
        return []

    def fill(self, elements: Elements, first: int, out: Any) -> None:
        for at in range(0, len(out), AVERAGED):
            part = out[at : at + AVERAGED]
            total = sum(elements(source, first + at, len(part)).astype("f8") for source in self.sources)
            part[:] = total / max(len(self.sources), 1)


@dataclass
class Rows:
    """Layout and inputs with one vocabulary, the input that its files are from, and those that are written anew."""

    layout: Checkpoint
    checkpoints: dict[ModelReference, Checkpoint]
    tokenizer: Checkpoint
    files: dict[str, bytes] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def align_rows(
    recipe: Recipe,
    layout: Checkpoint,
    checkpoints: Mapping[ModelReference, Checkpoint],
    config: dict[str, Any] | None,
) -> Rows:
    """Follow the recipe's `tokenizer`, if there is one; `config` is changed to the result's rows and token ids."""
    rows = Rows(layout, dict(checkpoints), layout)
    if recipe.tokenizer is None:
        return rows
    try:
        _Aligner(recipe, recipe.tokenizer, rows, config).run()
    except Refused as refused:
        rows.problems.extend(refused.problems)
    return rows


class _Aligner:
    def __init__(self, recipe: Recipe, policy: Tokenizer, rows: Rows, config: dict[str, Any] | None) -> None:
        self.policy = policy
        self.place = recipe.place(*policy.where)
        self.rows = rows
        self.config = config
        self.inputs = {c.files: c for c in (rows.layout, *rows.checkpoints.values())}
        self.named = {str(reference): c.files for reference, c in rows.checkpoints.items()}
        self.base = rows.checkpoints[recipe.base_model].files if recipe.base_model else None

    def run(self) -> None:
        home = self.rows.layout.files
        names = [name for name, tensor in self.rows.layout.tensors.items() if is_vocabulary(name, tensor)]
        source = home if self.policy.source in ("base", "union") else self._model(self.policy.source)
        self.rows.tokenizer = self._home(self.inputs[source])
        if self._nothing_to_do(names):
            return
        vocabularies = {files: self._vocabulary(c) for files, c in self.inputs.items()}
        wanted = self._wanted(vocabularies, source)
        self._check(names, vocabularies)
        counts = {name: self._count(self.inputs[source].tensors[name].shape[0], wanted) for name in names}
        choices = {files: self._choices(files, wanted, vocabularies, max(counts.values())) for files in self.inputs}
        aligned: dict[Files, Checkpoint] = {}
        for files, checkpoint in self.inputs.items():
            tensors = dict(checkpoint.tensors)
            for name, count in counts.items():
                if self._changed(name, files, count, wanted, vocabularies):
                    tensors[name] = self._tensor(name, files, choices[files][:count])
            aligned[files] = replace(checkpoint, tensors=tensors)
        if self.config is not None:
            self._restate_size({self.rows.layout.tensors[n].shape[0]: count for n, count in counts.items()})
            self._restate_ids(self.config, vocabularies[home], wanted)
        self.rows.layout = aligned[home]
        self.rows.checkpoints = {reference: aligned[c.files] for reference, c in self.rows.checkpoints.items()}

    def _refuse(self, what: str, **more: str | None) -> Refused:
        return Refused(Problem(what, place=self.place, **more))

    def _model(self, name: str) -> Files:
        if name not in self.named:
            expected = "base, union, or one of " + ", ".join(self.named)
            raise self._refuse(f"{self.policy.where[0]} names no model of the recipe: {name!r}", expected=expected)
        return self.named[name]

    def _home(self, source: Checkpoint) -> Checkpoint:
        """Whose tokenizer files the source's are: the layout's, if it comes without."""
        if any(name in TOKENIZER_FILES for name in carried_files(source)):
            return source
        if not same_tokenizer(source, self.rows.layout):
            remedy = "put its config.json beside them"
            raise self._refuse(
                f"it is not clear whether {source.reference}'s tokenizer files are its own", remedy=remedy
            )
        return self.rows.layout

    def _nothing_to_do(self, names: Sequence[str]) -> bool:
        """Whether all have one tokenizer and the same numbers of rows, and the recipe asks for no more."""
        if self.policy.tokens or self.policy.pad_to_multiple_of:
            return False
        shapes = {tuple(c.tensors[n].shape if n in c.tensors else () for n in names) for c in self.inputs.values()}
        return len(shapes) == 1 and all(same_tokenizer(c, self.rows.layout) for c in self.inputs.values())

    # --- vocabularies -----------------------------------------------------------------------------------------------

    def _vocabulary(self, checkpoint: Checkpoint) -> Vocabulary:
        """A model that comes without a tokenizer has the layout's."""
        home = self.rows.layout if same_tokenizer(checkpoint, self.rows.layout) else checkpoint
        text = tokenizer_file(home, "tokenizer.json")
        path = home.tokenizer / "tokenizer.json"
        return read_vocabulary(path, text if isinstance(text, bytes) else None)

    def _wanted(self, vocabularies: Mapping[Files, Vocabulary], source: Files) -> Vocabulary:
        """The result's vocabulary; its tokenizer.json is written anew if it has tokens that the source lacks."""
        have = vocabularies[source]
        added = {token: entry for each in reversed([*vocabularies.values()]) for token, entry in each.added.items()}
        others = [each for each in vocabularies.values() if each is not have] if self.policy.source == "union" else []
        new = {token: added.get(token) for each in others for token in each.ids if token not in have.ids}
        unknown = [token for token, entry in new.items() if entry is None and token not in self.policy.tokens]
        if unknown:
            raise self._refuse(
                "the vocabularies have no union: tokens that are not added ones need merges or scores",
                found=f"{len(unknown)} tokens that {have.path} lacks: {printable(some(unknown))}",
                remedy="`tokenizer: {source: base}` or a model; name single tokens under `tokens:` to add them",
            )
        new.update((token, added.get(token)) for token in self.policy.tokens if token not in have.ids)
        if not new:
            return have
        if gaps(have):
            raise self._refuse(
                f"no token can be added to a vocabulary with {gaps(have)} unused numbers", found=str(have.path)
            )
        wanted = extended(have, {token: entry or {} for token, entry in new.items()})
        self.rows.files["tokenizer.json"] = tokenizer_json(wanted, list(new))
        return wanted

    def _check(self, names: Sequence[str], vocabularies: Mapping[Files, Vocabulary]) -> None:
        if not names:
            raise self._refuse("no embeddings are known here, so nothing can be brought to one vocabulary")
        problems = []
        for files, checkpoint in self.inputs.items():
            for name in names:
                tensor, vocabulary = checkpoint.tensors.get(name), vocabularies[files]
                if tensor is None:
                    problems.append(Problem(f"{checkpoint.reference} lacks a tensor of token rows", tensor=name))
                elif tensor.shape[0] < vocabulary.size or not tensor.numel:
                    problems.append(
                        Problem(
                            "the tokenizer has more tokens than this tensor has rows",
                            place=str(tensor.file),
                            tensor=name,
                            expected=f"at least {vocabulary.size} rows for {vocabulary.path}",
                            found=str(list(tensor.shape)),
                            remedy="resize its embeddings, or put the tokenizer that belongs to it beside it",
                        )
                    )
                elif tensor.shape[1:] != self.rows.layout.tensors[name].shape[1:] or tensor.dtype not in FLOATS:
                    problems.append(
                        Problem(
                            "rows of this shape and dtype cannot be merged by token",
                            place=str(tensor.file),
                            tensor=name,
                            expected=f"floats, [rows, {str(list(self.rows.layout.tensors[name].shape[1:]))[1:-1]}]",
                            found=f"{tensor.dtype} {list(tensor.shape)}",
                        )
                    )
        if problems:
            raise Refused(problems)

    def _count(self, rows: int, wanted: Vocabulary) -> int:
        """Rows of the result: the source's or, if those are asked for, the vocabulary's up to the next multiple."""
        multiple = self.policy.pad_to_multiple_of
        return -(-wanted.size // multiple) * multiple if multiple else max(rows, wanted.size)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _choices(
        self, files: Files, wanted: Vocabulary, vocabularies: Mapping[Files, Vocabulary], count: int
    ) -> list[Choice]:
        """For every row of the result, where an input has it."""
        ids = vocabularies[files].ids
        home = self.rows.layout.files
        tokenless = set(range(count)) - set(vocabularies[home].ids.values())
        choices: list[Choice] = [((home, row),) if row in tokenless else () for row in range(count)]
        for token, number in wanted.ids.items():
            rule = self.policy.tokens.get(token)
            if token in ids and not (rule and rule.force):
                choices[number] = ((files, ids[token]),)
            elif rule:
                choices[number] = self._ruled(rule, vocabularies)
            else:
                choices[number] = self._default(token, vocabularies)
        return choices

    def _ruled(self, rule: TokenRow, vocabularies: Mapping[Files, Vocabulary]) -> Choice:
        if rule.model is None:
            return ()
        files = self._model(rule.model)
        ids = vocabularies[files].ids
        row = rule.token if isinstance(rule.token, int) else ids.get(rule.token)
        if row is None or not 0 <= row < vocabularies[files].size:
            raise self._refuse(f"{rule.model} has no token {printable(repr(rule.token))}")
        return ((files, row),)

    def _default(self, token: str, vocabularies: Mapping[Files, Vocabulary]) -> Choice:
        if self.base is not None and token in vocabularies[self.base].ids:
            return ((self.base, vocabularies[self.base].ids[token]),)
        owners = tuple((files, each.ids[token]) for files, each in vocabularies.items() if token in each.ids)
        if not owners:
            remedy = "give it a source under `tokens:`: a model's token, or {kind: zero}"
            raise self._refuse(f"no model has the token {printable(repr(token))}", remedy=remedy)
        return owners

    def _changed(
        self, name: str, files: Files, count: int, wanted: Vocabulary, vocabularies: Mapping[Files, Vocabulary]
    ) -> bool:
        forced = any(rule and rule.force for rule in self.policy.tokens.values())
        same = self.inputs[files].tensors[name].shape[0] == count and vocabularies[files].ids == wanted.ids
        return forced or not same

    def _tensor(self, name: str, files: Files, choices: Sequence[Choice]) -> Tensor:
        """The tensor that an input has under the result's vocabulary."""
        own = self.inputs[files].tensors[name]
        tensors = {files: c.tensors[name] for files, c in self.inputs.items()}
        limited = [tuple(p for p in choice if p[1] < tensors[p[0]].shape[0]) for choice in choices]
        dtype = promoted([own, *(tensors[f] for f in {place[0] for choice in limited for place in choice})])
        width = own.shape[1:]
        parts = []
        for first, n in _runs(limited):
            spans = tuple(_rows(tensors[of], row, n) for of, row in first)
            if len(spans) == 1 and spans[0].dtype == dtype:
                parts.append(spans[0])
            else:
                nbytes = n * (own.numel // own.shape[0]) * ITEM_BITS[dtype] // 8
                mean = replace(own, dtype=dtype, shape=(n, *width), nbytes=nbytes, parts=(), starts=(), nominal=None)
                parts.append(replace(mean, made=Mean(spans)))
        return joined(own, (len(choices), *width), parts)

    # --- config -----------------------------------------------------------------------------------------------------

    def _restate_size(self, counts: Mapping[int, int]) -> None:
        """Every `vocab_size` that is the old number of rows, nested or not, becomes the new one."""
        for old, new in counts.items():
            sections = [part for part in _sections(self.config) if part.get("vocab_size") == old]
            if old != new and not sections:
                raise Refused(
                    Problem(
                        "config.json does not say how many rows the embeddings have",
                        place=str(self.rows.layout.folder / "config.json"),
                        expected=f"vocab_size: {old}",
                    )
                )
            for part in sections:
                part["vocab_size"] = new

    def _restate_ids(self, config: dict[str, Any], old: Vocabulary, new: Vocabulary) -> None:
        """Numbers of tokens (eos_token_id, image_token_index) follow their tokens."""
        if all(new.ids.get(token) == number for token, number in old.ids.items()):
            return
        tokens = {number: token for token, number in old.ids.items()}

        def restated(key: str, value: Any) -> Any:
            if isinstance(value, list):
                return [restated(key, each) for each in value]
            if type(value) is not int or value not in tokens:
                return value
            if tokens[value] not in new.ids:
                raise self._refuse(
                    f"{key} of the base's config is a token that the result does not have",
                    found=printable(repr(tokens[value])),
                    remedy="add it under `tokens:`, or use `source: base`",
                )
            return new.ids[tokens[value]]

        for part in _sections(config):
            part.update({key: restated(key, value) for key, value in part.items() if TOKEN_IDS.search(key)})


def _runs(choices: Sequence[Choice]) -> Iterator[tuple[Choice, int]]:
    """Rows that follow each other wherever they are read, as the first of them and how many."""
    first, n = choices[0], 0
    for choice in choices:
        if n and choice != tuple((files, row + n) for files, row in first):
            yield first, n
            first, n = choice, 0
        n += 1
    yield first, n


def _rows(tensor: Tensor, row: int, n: int) -> Tensor:
    width = tensor.numel // tensor.shape[0]
    return span(tensor, row * width, (n, *tensor.shape[1:]))


def _sections(config: Any) -> Iterator[dict[str, Any]]:
    """A config and all that is nested in it, but what is about pictures and sound."""
    yield config
    for key, part in config.items():
        if isinstance(part, dict) and not re.search("vision|audio|image", key):
            yield from _sections(part)
