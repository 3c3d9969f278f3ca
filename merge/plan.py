"""Recipe + checkpoints -> Plan: the complete work list, from headers alone. Every refusal lives here.

For each tensor of the merged checkpoint the plan knows which tensors go in, with which parameters, and where the
result is written; what the run then does holds no surprises except the values of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ggez_merge import __version__
from ggez_merge.align import Renaming
from ggez_merge.carry import check_chat_template, tokenizer_note
from ggez_merge.check import nearest
from ggez_merge.checkpoint import ITEM_BITS, Checkpoint, open_checkpoint
from ggez_merge.errors import Problem, Refused
from ggez_merge.methods import METHODS
from ggez_merge.methods.method import Method
from ggez_merge.outputs import Output, assemble
from ggez_merge.recipe import ModelReference, Recipe
from ggez_merge.shards import Entry, Shard, split
from ggez_merge.write import reserved_bytes


@dataclass(frozen=True)
class Plan:
    """All that a merge will do. `notes` are remarks worth a line that are no reason to refuse."""

    recipe: Recipe
    method: Method
    layout: Checkpoint
    checkpoints: tuple[Checkpoint, ...]
    outputs: tuple[Output, ...]
    shards: tuple[Shard, ...]
    folder: Path
    config: dict[str, Any] | None
    given: frozenset[str]
    notes: tuple[str, ...]
    renamings: tuple[Renaming, ...]
    tokenizer: Path | None  # the folder that tokenizer files are copied from, the layout's if None
    files: dict[str, bytes]  # those of them that are written anew

    @cached_property
    def entries(self) -> list[Entry]:
        return [output.entry for output in self.outputs]

    @property
    def write_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def read_bytes(self) -> int:
        """Bytes that combining reads."""
        return sum(tensor.nbytes for output in self.outputs for tensor in output.inputs)

    @property
    def measure_bytes(self) -> int:
        """Bytes that measuring reads before, as long as tensors fit the memory budget."""
        if self.method.measure is None:
            return 0
        return sum(tensor.nbytes for output in self.outputs if output.job for tensor in output.inputs)

    @property
    def n_inputs(self) -> int:
        return max((len(output.inputs) for output in self.outputs), default=1)

    @property
    def widening(self) -> float:
        """Bytes of one input for each output byte, at the worst."""
        widths = (
            ITEM_BITS[tensor.dtype] / ITEM_BITS[output.entry.dtype]
            for output in self.outputs
            for tensor in output.inputs
        )
        return max(widths, default=1.0)

    @cached_property
    def fingerprint(self) -> str:
        """What must be the same for an interrupted merge to be resumed: inputs, arithmetic, layout, version."""
        said = {
            "version": __version__,
            "method": self.method.name,
            "nonfinite": self.recipe.nonfinite,
            "config": self.config,
            "chat_template": self.recipe.chat_template,
            "tokenizer": [str(self.tokenizer), {name: raw.decode() for name, raw in self.files.items()}],
            "inputs": [
                [str(file.path), file.size, file.mtime_ns, file.header_hash]
                for checkpoint in self.checkpoints
                for file in checkpoint.files
            ],
            "outputs": [
                [
                    output.entry.name,
                    output.entry.dtype,
                    output.action,
                    [place for tensor in output.inputs for place in tensor.places],
                    [dict(output.job.shared), [dict(model) for model in output.job.models]] if output.job else None,
                ]
                for output in self.outputs
            ],
            "shards": [[shard.name, shard.size] for shard in self.shards],
        }
        return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


def make_plan(recipe: Recipe, out: Path | None = None) -> Plan:
    """The plan of a recipe; `out` overrides the recipe's own output folder. Raises Refused with every problem found."""
    problems: list[Problem] = []
    method = METHODS.get(recipe.merge_method)
    if method is None:
        problems.append(_unknown_method(recipe))
    opened = _open_all(recipe, problems)
    folder = _output_folder(recipe, out, problems)
    if method is None or folder is None or any(checkpoint is None for checkpoint in opened.values()):
        raise Refused(problems)
    checkpoints = _shared({reference: checkpoint for reference, checkpoint in opened.items() if checkpoint})
    problems.extend(_clashes(recipe, checkpoints, folder))
    assembled = assemble(recipe, method, checkpoints)
    problems.extend(assembled.problems)
    shards = split(
        [output.entry for output in assembled.outputs],
        recipe.output.shard_size_bytes,
        _stem(assembled.layout),
    )
    if not assembled.outputs and not problems:
        problems.append(Problem("nothing to merge: the inputs hold no tensors", place=assembled.layout.reference))
    problems.extend(check_chat_template(recipe))
    problems.extend(_space(folder, sum(shard.size for shard in shards)))
    if problems:
        raise Refused(problems)
    return Plan(
        recipe=recipe,
        method=method,
        layout=assembled.layout,
        checkpoints=tuple(unique(checkpoints.values())),
        outputs=tuple(assembled.outputs),
        shards=tuple(shards),
        folder=folder,
        config=assembled.config,
        given=assembled.given,
        notes=(*assembled.notes, *tokenizer_note(recipe, assembled.layout, checkpoints)),
        renamings=assembled.renamings,
        tokenizer=assembled.tokenizer,
        files=assembled.files,
    )


def references(recipe: Recipe) -> list[tuple[ModelReference, tuple[str | int, ...]]]:
    """Every model the recipe names, with the place of its name, in order, base first."""
    found: list[tuple[ModelReference, tuple[str | int, ...]]] = []
    if recipe.base_model:
        found.append((recipe.base_model, ("base_model",)))
    for module in recipe.modules:
        for piece in module.slices:
            if piece.base_model:
                found.append((piece.base_model, (*piece.where, "base_model")))
            found.extend((source.model, (*source.where, "model")) for source in piece.sources)
    return found


def unique(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints without those that are the same files under another name."""
    return list({_files(checkpoint): checkpoint for checkpoint in checkpoints}.values())


def _shared(checkpoints: Mapping[ModelReference, Checkpoint]) -> dict[ModelReference, Checkpoint]:
    """One Checkpoint for all names of the same files (a link, another spelling): then they also compare as equal."""
    first: dict[tuple[Path, ...], Checkpoint] = {}
    return {
        reference: first.setdefault(_files(checkpoint), checkpoint) for reference, checkpoint in checkpoints.items()
    }


def _files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    return tuple(file.path.resolve() for file in checkpoint.files)


def _unknown_method(recipe: Recipe) -> Problem:
    return Problem(
        f"there is no merge method {recipe.merge_method!r}",
        place=recipe.place("merge_method"),
        expected="one of " + ", ".join(METHODS),
        remedy=nearest(recipe.merge_method, METHODS),
    )


def _open_all(recipe: Recipe, problems: list[Problem]) -> dict[ModelReference, Checkpoint | None]:
    search = [recipe.path.parent, Path(".")] if recipe.path else [Path(".")]
    opened: dict[ModelReference, Checkpoint | None] = {}
    for reference, _ in references(recipe):
        if reference in opened:
            continue
        try:
            opened[reference] = open_checkpoint(reference.path, reference.revision, search)
        except Refused as refused:
            opened[reference] = None
            problems.extend(refused.problems)
    return opened


def _output_folder(recipe: Recipe, out: Path | None, problems: list[Problem]) -> Path | None:
    if out is not None:
        return out.absolute()
    if recipe.output.path is not None:
        beside = recipe.path.parent if recipe.path else Path(".")
        return (beside / recipe.output.path).absolute()
    problems.append(
        Problem(
            "the recipe names no output folder",
            place=recipe.place(),
            remedy="add `output: {path: ./merged}` or give `--out DIR`",
        )
    )
    return None


def _clashes(recipe: Recipe, checkpoints: dict[ModelReference, Checkpoint], folder: Path) -> Iterable[Problem]:
    """The same model twice in one list, or an output that would replace an input."""
    for checkpoint in unique(checkpoints.values()):
        home = checkpoint.folder.resolve()
        if home == folder.resolve() or folder.resolve() in home.parents:
            yield Problem(
                "the output folder is (or holds) an input",
                place=str(folder),
                found=checkpoint.reference,
                remedy="choose another output folder",
            )
    for module in recipe.modules:
        for piece in module.slices:
            seen: dict[tuple[object, ...], str] = {}
            for source in piece.sources:
                key = (_files(checkpoints[source.model]), source.layer_range)
                if key in seen:
                    yield Problem(
                        "the same model is listed twice",
                        place=recipe.place(*source.where),
                        found=f"{source.model} and {seen[key]} are the same files",
                        remedy="remove one and give the other the sum of their weights",
                    )
                seen.setdefault(key, str(source.model))


def _space(folder: Path, needed: int) -> Iterable[Problem]:
    free = free_bytes(folder) + reserved_bytes(folder)
    if needed > free:
        yield Problem(
            "not enough free space for the merged checkpoint",
            place=str(folder),
            expected=f"{needed:,} bytes",
            found=f"{free:,} bytes free",
            remedy="free some space or write elsewhere with --out",
        )


def _stem(layout: Checkpoint) -> str:
    """What loaders expect the weight files to be called; only diffusers' models have a name of their own."""
    diffusers = layout.files[0].path.name.startswith("diffusion_pytorch_model")
    return "diffusion_pytorch_model" if diffusers else "model"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds (or will hold) the folder."""
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    return shutil.disk_usage(existing).free
