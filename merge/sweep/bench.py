"""A live model that becomes one candidate after the other: inputs are read once, nothing is written to disk.

The weights of base and tuned models are held in memory, each once, and every candidate is computed into the parameters
of the model that is evaluated. Which bytes of an output lie where in the model is found as for two checkpoints: the
model's own tensors are the layout, and the plan's outputs, each in a file of its own, the input. Whether that is
right, and whether the library has changed weights while it loaded them, is seen by comparing all bytes of the base with
what was loaded. Where it is not so, there is no bench, and candidates go through the disk.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from xxhash import xxh3_128

from ggez_merge.align import counterpart
from ggez_merge.checkpoint import Tensor
from ggez_merge.outputs import Output
from ggez_merge.plan import Plan
from ggez_merge.read import Files
from ggez_merge.work import Work, carry_out

if TYPE_CHECKING:
    from ggez_merge.evaluate.model import Live

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}


class NoBench(Exception):
    """Why candidates cannot be made in this model's memory."""


@dataclass(frozen=True)
class Piece:
    """Elements of an output, from `first` on, and the part of the model's memory that they belong in."""

    first: int
    there: torch.Tensor  # one-dimensional


class Bench:
    """A loaded model, where in it the outputs of plans go, and the inputs of these plans."""

    def __init__(self, live: Live, plan: Plan) -> None:
        """live: the model as transformers loads the plan's base. Raises NoBench."""
        self.live = live
        self._held: dict[str, torch.Tensor] = {}
        _check(plan)
        self._shapes = {output.entry.name: output.entry.shape for output in plan.outputs}
        self._pieces = _pieces(live.model, plan)
        self._compare(plan)

    @property
    def held_bytes(self) -> int:
        """Bytes of inputs in memory."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def write(self, plan: Plan) -> str:
        """Make the model a candidate. Returns the hash of its weights, equal for equal weights.

        Raises NoBench if the candidate has other tensors than the first, Refused for NaN and infinities.
        """
        _check(plan)
        if {output.entry.name: output.entry.shape for output in plan.outputs} != self._shapes:
            raise NoBench("candidates have different tensors")
        outs = [self._out(output) for output in plan.outputs]
        with Files(plan.weight_files) as files:
            works = [self._work(files, output, out) for output, out in zip(plan.outputs, outs, strict=True)]
        carry_out(plan.method, works, plan.recipe.nonfinite)
        digest = xxh3_128()
        for output, out in zip(plan.outputs, outs, strict=True):
            for piece in self._pieces[output.entry.name]:
                if piece.there.data_ptr() != out.data_ptr():
                    piece.there.copy_(out.view(-1)[piece.first : piece.first + piece.there.numel()])
            digest.update(f"{output.entry.name} {output.entry.dtype} {output.entry.shape}".encode())
            digest.update(_bytes(out))
        return digest.hexdigest()

    def _out(self, output: Output) -> torch.Tensor:
        """Where an output is computed: in the model, if it lies there as a whole, in its dtype."""
        pieces, dtype = self._pieces[output.entry.name], TORCH[output.entry.dtype]
        numel = output.models[0].numel
        for piece in pieces:
            if piece.first == 0 and piece.there.numel() == numel and piece.there.dtype == dtype:
                return piece.there
        return torch.empty(numel, dtype=dtype, device=self.live.device)

    def _work(self, files: Files, output: Output, out: torch.Tensor) -> Work:
        models = {str(number): self._read(files, tensor) for number, tensor in enumerate(output.models)}
        base = {"base": self._read(files, output.base)} if output.base else {}
        if output.action == "equal":
            first, *others = models.values()
            if not all(torch.equal(first, other) for other in others):
                raise NoBench(f"{output.entry.name} is not the same in all inputs")
        return Work(output.entry.name, output.job if output.action == "merge" else None, {**base, **models}, out)

    def _read(self, files: Files, tensor: Tensor) -> torch.Tensor:
        """An input, read when it is needed first."""
        key = str([tensor.places, tensor.dtype, tensor.numel])
        if key not in self._held:
            self._held[key] = _load(files, tensor).to(self.live.device)
        return self._held[key]

    def _compare(self, plan: Plan) -> None:
        """Whether the model holds the bytes of the base, cast to its own dtype."""
        with Files(plan.layout.files) as files:
            for output in plan.outputs:
                tensor = plan.layout.tensors.get(output.entry.name)
                if tensor is None:
                    raise NoBench(f"the base has no {output.entry.name}")
                stored = self._read(files, tensor)
                for piece in self._pieces[output.entry.name]:
                    own = stored[piece.first : piece.first + piece.there.numel()].to(piece.there.dtype)
                    if not torch.equal(_integers(own), _integers(piece.there)):
                        raise NoBench(f"{output.entry.name} is not in memory as in the file")


def _check(plan: Plan) -> None:
    if plan.stages:
        raise NoBench("the recipe has stages")
    if plan.files:
        raise NoBench("candidates have a tokenizer of their own")
    strange = next((o.entry for o in plan.outputs if o.entry.dtype not in TORCH), None)
    if strange:
        raise NoBench(f"{strange.name} is in {strange.dtype}")


def _pieces(model: torch.nn.Module, plan: Plan) -> Mapping[str, Sequence[Piece]]:
    """Where in the model each output of the plan belongs; [] for what the model has no place for."""
    outputs = {o.entry.name: _alone(o.entry.name, o.entry.dtype, o.entry.shape) for o in plan.outputs}
    memory = _memory(model, outputs)
    ours = {name: _alone(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in memory.items()}
    blank = replace(plan.layout, files=(), held={}, parts={}, base=None, config=plan.config)
    found = counterpart(replace(blank, tensors=ours), replace(blank, tensors=outputs))
    if found.problems or found.unclear:
        raise NoBench(str((*found.problems, *found.unclear)[0].what))
    pieces: dict[str, list[Piece]] = {name: [] for name in outputs}
    filled: set[int] = set()
    for name, tensor in found.checkpoint.tensors.items():
        if name not in memory:
            continue
        if not memory[name].is_contiguous() or tensor.numel != memory[name].numel():
            raise NoBench(f"{name} lies otherwise in memory than in the file")
        flat, at = memory[name].detach().view(-1), 0
        for part in tensor.extents if tensor.numel else ():
            if part.made is not None:
                raise NoBench(f"{name} is made of what the file holds")
            pieces[part.file.name].append(Piece(part.offset // (part.nbytes // part.numel), flat[at : at + part.numel]))
            at += part.numel
        filled.add(memory[name].data_ptr())
    empty = next((n for n, t in memory.items() if t.numel() and t.data_ptr() not in filled), None)
    if empty is not None:
        raise NoBench(f"the model's {empty} has no counterpart in the checkpoint")
    return pieces


def _memory(model: torch.nn.Module, preferred: Container[str]) -> dict[str, torch.Tensor]:
    """The tensors of the model, tied ones once, under the name that files have for them."""
    found: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.dtype in NAMES and (key not in found or name in preferred):
            found[key] = name, tensor
    return dict(found.values())


def _alone(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor in a file of its own, which has its name."""
    tensor = Tensor(name, dtype, shape, Path(name), 0, 0)
    return replace(tensor, nbytes=tensor.numel * TORCH[dtype].itemsize)


def _load(files: Files, tensor: Tensor) -> torch.Tensor:
    """All elements of an input, flat."""
    raw = np.empty(tensor.nbytes, np.uint8)
    files.read(tensor, 0, raw.data)
    return torch.from_numpy(raw).view(TORCH[tensor.dtype])


def _integers(flat: torch.Tensor) -> torch.Tensor:
    """The bits, for NaN equals nothing."""
    return flat.view(torch.uint8)


def _bytes(flat: torch.Tensor) -> Any:
    return flat.detach().cpu().view(torch.uint8).numpy().data
