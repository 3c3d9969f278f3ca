"""What a tuned model learnt, as a LoRA adapter: for each linear weight the best low-rank matrix near its delta.

    Δ = W_tuned − W_base ≈ B A,    B = U √S, A = √S Vᵀ of the first r singular values of Δ

by a randomised SVD (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1), whose start is drawn from a
seed that is the tensor's name. One weight is in memory at a time. What such an adapter cannot hold, norms, embeddings,
biases and the like, is never passed over in silence: it is saved whole or left out, as asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ggez_merge.align import counterpart
from ggez_merge.checkpoint import FLOATS, Checkpoint, Tensor
from ggez_merge.components import COMPONENTS, component
from ggez_merge.errors import Failed, Problem, Refused
from ggez_merge.heads import HEAD, ties
from ggez_merge.in_memory import in_memory
from ggez_merge.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ggez_merge.names import grouped
from ggez_merge.read import Files
from ggez_merge.shards import Entry, split
from ggez_merge.untrusted import printable

if TYPE_CHECKING:
    import torch
    from rich.console import Console

Rest = Literal["error", "save", "leave"]
SPARE = 8  # directions more than asked for, so that the last of those asked for are right as well
POWERS = 4  # multiplications by Δ Δᵀ: they bring out the large singular values where these fall off slowly
CHUNK = 1 << 22


@dataclass(frozen=True)
class Part:
    """One changed tensor: its delta's squared norm and, where it is adapted, that of what the adapter leaves of it."""

    name: str
    squares: float
    left: float | None = None

    @property
    def component(self) -> str:
        return component(self.name)


@dataclass
class Extracted:
    """What became of every changed tensor. `adapted` came in part, `saved` whole, `left` not at all."""

    folder: Path
    n_bytes: int = 0
    adapted: list[Part] = field(default_factory=list)
    saved: list[Part] = field(default_factory=list)
    left: list[Part] = field(default_factory=list)

    def errors(self) -> dict[str, float]:
        """‖Δ − BA‖ / ‖Δ‖ of the adapted weights of each component, and of all."""
        found: dict[str, list[Part]] = {}
        for part in self.adapted:
            found.setdefault(part.component, []).append(part)
        found["all"] = self.adapted
        return {name: _relative(parts) for name, parts in found.items()}


def extract(
    model: Checkpoint,
    base: Checkpoint,
    rank: int,
    folder: Path,
    rest: Rest = "error",
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Extracted:
    """Write the adapter to `folder`, which appears complete or not at all; `rest`: what to do with what it cannot hold.

    `advance` is told the bytes of the two models that are done with. Raises Refused or Failed.
    """
    if folder.exists():
        remedy = "choose another with --out, or remove it"
        raise Refused(Problem("the output folder exists already", str(folder), remedy=remedy))
    pairs = _pairs(model, base)
    known = in_memory(base)
    names = known.names
    result = Extracted(folder)
    tied = {name for name in pairs if HEAD.search(name) and ties(base.config)}
    linear = known.linear & pairs.keys() - tied
    with Files([*base.files, *model.files]) as files:
        others = _changed(files, {name: pair for name, pair in pairs.items() if name not in linear}, advance)
        if others and rest == "error":
            raise Refused(_cannot_hold(others, model))
        whole = _savable(others, names) if rest == "save" else {}
        result.saved = [part for part in others if part.name in whole]
        result.left = [part for part in others if part.name not in whole]
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        ranks: dict[str, int] = {}
        for name in sorted(linear):
            found = _factors(files, name, *pairs[name], rank)
            advance(sum(tensor.nbytes for tensor in pairs[name]))
            if found is None:
                continue
            part, a, b = found
            module = names[name].removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
            ranks[module] = a.shape[0]
            result.adapted.append(part)
        if not ranks:
            raise Refused(
                Problem("no linear weight differs from the base's: there is nothing to extract", model.reference)
            )
        # a module whose bias is saved has its weight from A and B all the same
        whole = {name: own for name, own in whole.items() if own.removesuffix(".weight") not in ranks}
        for name, own in whole.items():
            module, _, kind = own.rpartition(".")
            tensors[f"{module}.base_layer.{kind}" if module in ranks else own] = _array(files, pairs[name][1])
    config = _config(base, rank, ranks, names, whole)
    result.n_bytes = _write(folder, tensors, config)
    return result


def _pairs(model: Checkpoint, base: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Base's name -> its tensor and the model's, which are the same ones in both; Refused if they are not."""
    found = counterpart(base, model)
    theirs = found.checkpoint.tensors
    problems = list(found.problems)
    for one, other, lacking in (
        (base, model, base.tensors.keys() - theirs.keys()),
        (model, base, theirs.keys() - base.tensors.keys()),
    ):
        if lacking and not all(HEAD.search(name) for name in lacking):
            what = f"{other.reference} lacks {len(lacking)} tensors that {one.reference} has"
            problems.append(Problem(what, tensor=printable(grouped(sorted(lacking)))))
    pairs = {name: (tensor, theirs[name]) for name, tensor in base.tensors.items() if name in theirs}
    for name, (ours, own) in pairs.items():
        floats = {ours.dtype, own.dtype} <= FLOATS
        if ours.shape != own.shape or not (floats or ours.dtype == own.dtype):
            shapes = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (ours, own)]
            problems.append(Problem("a tensor has another form than the base's", None, printable(name), *shapes))
        elif ours.dtype.startswith("F8"):
            problems.append(Problem("8-bit floats have no delta without their scales", str(ours.file), printable(name)))
    if problems:
        raise Refused(problems)
    return pairs


def _changed(files: Files, pairs: Mapping[str, tuple[Tensor, Tensor]], advance: Callable[[int], None]) -> list[Part]:
    found = []
    for name, pair in pairs.items():
        squares = 0.0
        differ = False
        for one, other in _chunks(files, *pair):
            differ = differ or one.tobytes() != other.tobytes()
            squares += float(np.square(other.astype("f8") - one.astype("f8")).sum()) if pair[0].dtype in FLOATS else 0.0
        if squares or (differ and pair[0].dtype not in FLOATS):
            found.append(Part(name, squares))
        advance(sum(tensor.nbytes for tensor in pair))
    return found


def _chunks(files: Files, one: Tensor, other: Tensor) -> Iterator[tuple[Any, Any]]:
    if one.dtype not in FLOATS:
        for at in range(0, one.nbytes, CHUNK):
            views = bytearray(min(CHUNK, one.nbytes - at)), bytearray(min(CHUNK, one.nbytes - at))
            for tensor, view in zip((one, other), views, strict=True):
                files.read(tensor, at, memoryview(view))
            yield np.frombuffer(views[0], "u1"), np.frombuffer(views[1], "u1")
        return
    for at in range(0, one.numel, CHUNK):
        n = min(CHUNK, one.numel - at)
        yield files.elements(one, at, n), files.elements(other, at, n)


def _cannot_hold(others: list[Part], model: Checkpoint) -> Problem:
    return Problem(
        f"{len(others)} changed tensors of {model.reference} are no linear weights, and LoRA cannot hold them",
        tensor=printable(grouped(part.name for part in others)),
        found="; ".join(_said(part) for part in others[:6]) + ("; …" if len(others) > 6 else ""),
        remedy="--rest save keeps them whole (modules_to_save), --rest leave leaves them as the base has them",
    )


def _said(part: Part) -> str:
    return (
        f"{printable(part.name)}: ‖Δ‖ = {math.sqrt(part.squares):.3g}"
        if part.squares
        else f"{printable(part.name)}: differs"
    )


def _savable(others: list[Part], names: Mapping[str, str]) -> dict[str, str]:
    """Those of a module's weight and bias, with the rest of their modules, for PEFT saves these as a whole."""
    parts = [names[part.name].rpartition(".") for part in others if part.name in names]
    modules = {module for module, _, kind in parts if kind in ("weight", "bias")}
    return {name: own for name, own in names.items() if own.rpartition(".")[0] in modules}


# --- low rank ---------------------------------------------------------------------------------------------------------


def _factors(files: Files, name: str, ours: Tensor, own: Tensor, rank: int) -> tuple[Part, Any, Any] | None:
    """The part, A [r, in] and B [out, r] in float32; None if nothing changed."""
    import torch

    delta = torch.from_numpy(_single(files, own))
    delta -= torch.from_numpy(_single(files, ours))
    delta = delta.reshape(ours.shape)
    squares = _squares(delta)
    if not squares:
        return None
    if not math.isfinite(squares):
        raise Refused(Problem("NaN or infinity among the weights", str(own.file), printable(name)))
    u, s, v = truncated_svd(delta, min(rank, *delta.shape), seed=name)
    b, a = u * s.sqrt(), s.sqrt()[:, None] * v.T
    left = sum(_squares(delta[at : at + 256] - b[at : at + 256].double() @ a.double()) for at in range(0, len(b), 256))
    return Part(name, squares, left), a.contiguous().numpy(), b.contiguous().numpy()


def truncated_svd(matrix: torch.Tensor, rank: int, seed: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [m, r], S [r], V [n, r] of the largest singular values of a matrix [m, n], nearly: float32 in and out."""
    import torch

    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=7).digest(), "big")
    )
    n = min(rank + SPARE, *matrix.shape)
    found = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], n, generator=generator)).Q
    for _ in range(POWERS):
        found = torch.linalg.qr(matrix.T @ found).Q
        found = torch.linalg.qr(matrix @ found).Q
    u, s, vh = torch.linalg.svd((found.T @ matrix).double(), full_matrices=False)
    return (found.double() @ u[:, :rank]).float(), s[:rank].float(), vh[:rank].T.float()


def _single(files: Files, tensor: Tensor) -> Any:
    out = np.empty(tensor.numel, np.float32)
    for at in range(0, tensor.numel, CHUNK):
        out[at : at + CHUNK] = files.elements(tensor, at, min(CHUNK, tensor.numel - at))
    return out


def _squares(values: torch.Tensor) -> float:
    return sum(float(values[at : at + 256].double().square().sum()) for at in range(0, len(values), 256))


def _array(files: Files, tensor: Tensor) -> Any:
    return files.elements(tensor, 0, tensor.numel).reshape(tensor.shape)


def _relative(parts: list[Part]) -> float:
    left = math.fsum(part.left or 0.0 for part in parts)
    return math.sqrt(left / math.fsum(part.squares for part in parts))


# --- the folder -------------------------------------------------------------------------------------------------------


def _place(base: Checkpoint) -> str | None:
    """Where PEFT finds the base; of one that is no model's folder, such as a base with an adapter, nowhere."""
    if base.revision and not base.base:
        return base.reference
    return str(base.folder.resolve()) if not base.base and base.config is not None else None


def _config(
    base: Checkpoint, rank: int, ranks: Mapping[str, int], names: Mapping[str, str], whole: Mapping[str, str]
) -> dict[str, Any]:
    smaller = {rf"^{re.escape(module)}": own for module, own in ranks.items() if own < rank}
    saved = list(dict.fromkeys(name.rpartition(".")[0] for name in whole.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": _place(base),
        "revision": base.revision,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "bias": "lora_only" if set(saved) & ranks.keys() else "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": [module for module in saved if module not in ranks] or None,
        "target_modules": _targets(list(ranks), names.values()),
    }


def _targets(modules: list[str], names: Any) -> list[str] | str:
    """What selects exactly these: their last words if no other module has one, else their names."""
    others = {name.rpartition(".")[0] for name in names} - set(modules)
    words = {module.rpartition(".")[2] for module in modules}
    if not any(other.rpartition(".")[2] in words for other in others):
        return sorted(words)
    if not any(other.endswith(f".{module}") for other in others for module in modules):
        return modules
    return "|".join(re.escape(module) for module in modules)  # a text must be all of a name, an element its end


def _write(folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    from ggez_merge.read import NUMPY_DTYPE

    tags = {dtype: tag for tag, dtype in NUMPY_DTYPE.items()}
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    entries = [Entry(name, tags[array.dtype], array.shape, array.nbytes) for name, array in named.items()]
    (shard,) = split(entries, sum(entry.nbytes for entry in entries))
    arrays = list(named.values())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with open(partial / ADAPTER_WEIGHTS[0], "wb") as file:
                file.write(shard.header)
                for index in shard.members:
                    file.write(np.ascontiguousarray(arrays[index]).view(np.uint8).data if arrays[index].size else b"")
            (partial / ADAPTER_CONFIG).write_text(
                json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            partial.chmod(0o755)  # mkdtemp's are for nobody else
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise Failed(f"{folder}: the adapter cannot be written: {error.strerror}") from error
    return shard.size


def show(result: Extracted, console: Console) -> None:
    """Print what became of the changes, by component."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("component", box=box.SIMPLE_HEAD)
    for label in ("weights", "‖Δ‖", "‖Δ − BA‖ / ‖Δ‖"):
        table.add_column(label, justify="right", no_wrap=True)
    errors = result.errors()
    for name in [*(c for c in COMPONENTS if c in errors), "all"]:
        parts = [part for part in result.adapted if name in ("all", part.component)]
        norm = math.sqrt(math.fsum(part.squares for part in parts))
        table.add_row(Text(name), f"{len(parts):,}", f"{norm:.3g}", f"{100 * errors[name]:.3g} %")
    console.print(table)
    for label, parts in (("saved whole", result.saved), ("left as the base has it", result.left)):
        for part in parts:
            console.print(Text(f"{label}: {_said(part)}"), soft_wrap=True)
