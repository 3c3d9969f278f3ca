"""A model that is a base and an adapter: its weights are computed where they are read, and are nowhere as a whole.

    W' = W + s · B A                                 LoRA, arXiv 2106.09685; s = alpha / r, or alpha / sqrt(r)
    W' = m / ‖W + s · B A‖ · (W + s · B A)           DoRA, arXiv 2402.09353; norms of the rows of W, as wide as an input

in float64, rounded once to float32 (to float64 where W is that). So a merge takes the model with its delta in full:
PEFT's merge_and_unload first rounds W' to the base's dtype, in which a bfloat16 weight keeps three digits and loses
most of a small delta. Any element depends on one row of B and one column of A alone (with DoRA, on a row of W as well),
so tiles may be cut in any way, and memory is a few megabytes for each worker, however large the model is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ggez_merge.adapter import BY_PEFT, Adapter, Factors
from ggez_merge.align import counterpart
from ggez_merge.arithmetic import low_rank
from ggez_merge.carry import TOKENIZER_FILES
from ggez_merge.checkpoint import FLOATS, ITEM_BITS, Checkpoint, Elements, Tensor
from ggez_merge.errors import Problem, Refused
from ggez_merge.heads import HEAD, is_vocabulary, ties, untie
from ggez_merge.names import grouped
from ggez_merge.untrusted import printable

PIECE = 1 << 18  # elements of the base that are adapted at a time
FACTOR = 1 << 17  # elements of A that are held at a time


@dataclass(frozen=True)
class Adapted:
    """A weight with its adapter: rows of `weight`, seen as a matrix, and low-rank rows of theirs.

    `weight` is [out, in] or, of a convolution, [out, in, height, width]; a: [r, in …], b: [out, r …]. If `transposed`
    (embeddings, GPT-2's Conv1D), it is [in, out].
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False
    magnitude: Tensor | None = None

    @property
    def sources(self) -> Sequence[Tensor]:
        return (self.weight, self.a, self.b, *([self.magnitude] if self.magnitude else []))

    @property
    def said(self) -> list[Any]:
        return [self.scale, self.transposed]

    @property
    def width(self) -> int:
        """Columns of the weight as a matrix."""
        return self.weight.numel // self.weight.shape[0]

    def fill(self, elements: Elements, first: int, out: Any) -> None:
        at = 0
        for top, end, begin, stop in _rectangles(first, len(out), self.width):
            n = (end - top) * (stop - begin)
            target = out[at : at + n].reshape(end - top, stop - begin)
            left = self._left(elements, top, end)
            factors = self._factors(elements, top, end, left) if self.magnitude else None
            weight = elements(self.weight, top * self.width + begin, n).reshape(target.shape)
            for some, right in self._right(elements, begin, stop):
                low_rank().low_rank(target[:, some], weight[:, some], left, right, self.scale, factors)
            at += n

    def _left(self, elements: Elements, top: int, end: int) -> Any:
        """What multiplies the low-rank rows, for rows of the weight: float64[rows, r]."""
        rank = self.a.shape[0]
        if self.transposed:
            return np.ascontiguousarray(_matrix(elements, self.a, (0, rank), (top, end)).T)
        return _matrix(elements, self.b, (top, end), (0, rank))

    def _right(self, elements: Elements, begin: int, stop: int) -> Iterator[tuple[slice, Any]]:
        """The low-rank rows, strip by strip, with the columns that each is for: float64[r, columns]."""
        rank = self.a.shape[0]
        step = max(FACTOR // rank, 1)
        for at in range(begin, stop, step):
            to = min(at + step, stop)
            if self.transposed:
                right = np.ascontiguousarray(_matrix(elements, self.b, (at, to), (0, rank)).T)
            else:
                right = _matrix(elements, self.a, (0, rank), (at, to))
            yield slice(at - begin, to - begin), right

    def _factors(self, elements: Elements, top: int, end: int, left: Any) -> Any:
        """m / ‖W + s · B A‖ for these rows, whose squares are summed in the order of the columns: float64[rows]."""
        assert self.magnitude is not None
        squares = np.zeros(end - top)
        weight = elements(self.weight, top * self.width, (end - top) * self.width).reshape(end - top, self.width)
        for some, right in self._right(elements, 0, self.width):
            low_rank().row_squares(squares, weight[:, some], left, right, self.scale)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros has no direction: what comes is refused
            return elements(self.magnitude, top, end - top).astype(np.float64) / np.sqrt(squares)


@dataclass(frozen=True)
class Added:
    """tensor + scale · more, in float64, rounded once: a bias with what PEFT's `lora_bias` adds to it."""

    tensor: Tensor
    more: Tensor
    scale: float

    @property
    def sources(self) -> Sequence[Tensor]:
        return (self.tensor, self.more)

    @property
    def said(self) -> list[Any]:
        return [self.scale]

    def fill(self, elements: Elements, first: int, out: Any) -> None:
        for at in range(0, len(out), PIECE):
            n = min(PIECE, len(out) - at)
            own, more = (elements(each, first + at, n).astype(np.float64) for each in (self.tensor, self.more))
            out[at : at + n] = own + self.scale * more


def apply(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base with the adapter; Refused with every module that has no place there."""
    return _Applier(base, adapter).run()


class _Applier:
    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.tensors = dict(base.tensors)
        self.config = copy.deepcopy(base.config)
        self.problems: list[Problem] = []

    def run(self) -> Checkpoint:
        names = self._names()
        for own, tensor in self.adapter.whole.items():
            self._replace(names.get(own, own), tensor)
        turned = {module: self._turned(names[f"{module}.weight"], of) for module, of in self._placed(names)}
        for module, factors in self._placed(names):
            self._adapt(module, names[f"{module}.weight"], factors, turned)
            bias = names.get(f"{module}.bias", "")
            if factors.bias and bias in self.tensors:
                self._make(bias, Added(self.tensors[bias], factors.bias, self.adapter.settings.scale(module)))
        if self.problems:
            raise Refused(self.problems)
        speaks = any((self.adapter.folder / name).exists() for name in TOKENIZER_FILES)
        return Checkpoint(
            reference=f"{self.base.label}+{self.adapter.reference}",
            folder=self.base.folder,
            revision=None,
            files=(*self.base.files, self.adapter.file),
            tensors=self.tensors,
            config=self.config,
            notes=self.base.notes,
            base=self.base,
            own_tokenizer=self.adapter.folder if speaks else self.base.own_tokenizer,
        )

    def _placed(self, names: Mapping[str, str]) -> list[tuple[str, Factors]]:
        return [(name, of) for name, of in self.adapter.modules.items() if names.get(f"{name}.weight") in self.tensors]

    def _names(self) -> dict[str, str]:
        """Names as the adapter has them -> the base's, found as those of a model are; problems for those without."""
        file = self.adapter.file.path
        wanted = dict(self.adapter.whole)
        for module, factors in self.adapter.modules.items():
            shape = _shape(factors, self.adapter.settings.transposed)
            wanted.setdefault(f"{module}.weight", Tensor(f"{module}.weight", "F32", shape, file, 0, 0))
            if factors.bias:
                bias = Tensor(f"{module}.bias", "F32", factors.bias.shape, file, 0, 0)
                wanted.setdefault(bias.name, bias)
        owners = {id(tensor): own for own, tensor in wanted.items()}
        found = counterpart(self.base, replace(self.base, reference=self.adapter.reference, tensors=wanted))
        self.problems += found.problems
        # one that was cut or put together to fit the base is no longer what the adapter holds
        names = {owners[id(at)]: name for name, at in found.checkpoint.tensors.items() if id(at) in owners}
        lost = [
            own
            for own in wanted
            if names.get(own) not in self.base.tensors and not (own in self.adapter.whole and HEAD.search(own))
        ]
        if lost:
            number = f"{len(lost)} tensor{'s' if len(lost) > 1 else ''}"
            self.problems.append(
                Problem(
                    f"the adapter changes {number} that {self.base.reference} lacks",
                    place=str(file),
                    tensor=printable(grouped(lost)),
                    remedy="name the base that it was trained on. Experts or projections that are one tensor in memory "
                    "may be apart in its file: then save it anew with the transformers that trained the adapter",
                )
            )
        return names

    def _replace(self, name: str, tensor: Tensor) -> None:
        """A tensor of `modules_to_save`, of `bias`, or embeddings that were resized: whole, instead of the base's."""
        old = self.tensors.get(name)
        if old is None and not HEAD.search(name):
            return  # told of already
        resized = old is not None and is_vocabulary(name, old) and old.shape[1:] == tensor.shape[1:]
        if old is not None and old.shape != tensor.shape and not resized:
            self._refuse("the adapter's tensor has another shape than the base's", name, old.shape, tensor.shape)
            return
        if old is not None and resized and self.config is not None:
            _restate_rows(self.config, old.shape[0], tensor.shape[0])
        if HEAD.search(name) and self.config is not None and ties(self.config):
            untie(self.config)
        floats = old is not None and {old.dtype, tensor.dtype} <= FLOATS
        self.tensors[name] = replace(tensor, nominal=old.nominal or old.dtype) if old and floats else tensor

    def _turned(self, name: str, factors: Factors) -> bool | None:
        """Whether the weight is [in, out], by its shape; None if that does not tell."""
        straight, turned = _shape(factors, False), _shape(factors, True)
        shape = self.tensors[name].shape
        if factors.embedding or straight == turned:
            return True if factors.embedding else None
        return {straight: False, turned: True}.get(shape)

    def _adapt(self, module: str, name: str, factors: Factors, turned: Mapping[str, bool | None]) -> None:
        settings = self.adapter.settings
        weight = self.tensors[name]
        transposed = turned[module]
        if transposed is None:
            transposed = settings.transposed
            linear = [each for each, of in self.adapter.modules.items() if not of.embedding]
            if any(turned.get(each) is (not transposed) for each in linear):
                what = "the adapter's config and the shapes of other weights disagree on whether this one is transposed"
                self._refuse(what, name, weight.shape, f"fan_in_fan_out: {settings.transposed}")
                return
        if _shape(factors, transposed) != weight.shape:
            self._refuse("the adapter does not fit the base's tensor", name, weight.shape, _shape(factors, transposed))
        elif weight.dtype not in FLOATS:
            self._refuse("only floats can be adapted", name, ", ".join(sorted(FLOATS)), weight.dtype)
        elif transposed and factors.magnitude:
            self._refuse("DoRA of embeddings and of transposed weights is not supported", name, None, None)
        elif HEAD.search(name) and ties(self.config):
            self._refuse("the adapter changes a head that its base ties to the embeddings", name, None, None)
        else:
            assert factors.a and factors.b
            scale = settings.scale(module)
            self._make(name, Adapted(weight, factors.a, factors.b, scale, transposed, factors.magnitude))

    def _make(self, name: str, made: Adapted | Added) -> None:
        """In float32 at least, so that the merge rounds once; in the end it has the base's dtype all the same."""
        own = self.tensors[name]
        dtype = "F64" if own.dtype == "F64" else "F32"
        self.tensors[name] = replace(
            own,
            dtype=dtype,
            file=self.adapter.file.path,
            offset=0,
            nbytes=own.numel * ITEM_BITS[dtype] // 8,
            parts=(),
            starts=(),
            made=made,
            nominal=own.nominal or own.dtype,
        )

    def _refuse(self, what: str, name: str, expected: Any, found: Any) -> None:
        said = [str(list(value)) if isinstance(value, tuple) else value for value in (expected, found)]
        self.problems.append(Problem(what, str(self.adapter.file.path), printable(name), said[0], said[1], BY_PEFT))


def _shape(factors: Factors, transposed: bool) -> tuple[int, ...]:
    """The shape of the weight that A and B are for."""
    assert factors.a and factors.b
    shape = (factors.b.shape[0], *factors.a.shape[1:])
    return shape[::-1] if len(shape) == 2 and (transposed or factors.embedding) else shape


def _restate_rows(config: dict[str, Any], old: int, new: int) -> None:
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        if part.get("vocab_size") == old:
            part["vocab_size"] = new


def _rectangles(first: int, n: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A span of a row-major matrix as rectangles (first row, end, first column, end) of about PIECE elements."""
    at, end = first, first + n
    while at < end:
        row, column = divmod(at, width)
        if column or end - at < width:
            stop = min(end, (row + 1) * width)
            yield row, row + 1, column, column + stop - at
        else:
            rows = min((end - at) // width, max(PIECE // width, 1))
            stop = at + rows * width
            yield row, row + rows, 0, width
        at = stop


def _matrix(elements: Elements, tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Any:
    """A part of a matrix in float64: read at once where its rows are whole, else row by row."""
    width = tensor.numel // tensor.shape[0]
    (top, end), (begin, stop) = rows, columns
    if end - top == 1 or stop - begin == width:
        found = elements(tensor, top * width + begin, (end - top) * (stop - begin))
    else:
        found = np.concatenate([elements(tensor, row * width + begin, stop - begin) for row in range(top, end)])
    return found.astype(np.float64).reshape(end - top, stop - begin)
