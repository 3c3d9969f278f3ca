"""Recipe + checkpoints -> Plan: the complete work list, from headers alone. Every refusal lives here.

For each tensor of the merged checkpoint the plan knows which tensors go in, with which parameters, and where the
result is written; what the run then does holds no surprises except the values of the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ggez_merge import __version__
from ggez_merge.align import Renaming
from ggez_merge.carry import (
    carried_config,
    carried_files,
    check_chat_template,
    config_bytes,
    tokenizer_note,
    updated_config,
)
from ggez_merge.check import nearest
from ggez_merge.checkpoint import ITEM_BITS, Checkpoint, ShardFile, open_checkpoint
from ggez_merge.diffusion import in_one_file
from ggez_merge.errors import Problem, Refused
from ggez_merge.layout import DIFFUSERS
from ggez_merge.methods import METHODS
from ggez_merge.methods.method import Method
from ggez_merge.opening import open_model
from ggez_merge.outputs import Output, assemble
from ggez_merge.recipe import ModelReference, Recipe, needed, references
from ggez_merge.shards import Entry, Shard, split
from ggez_merge.stages import Stage, home, home_of, stage_checkpoint
from ggez_merge.write import reserved_bytes


@dataclass(frozen=True)
class Plan:
    """All that a merge will do. `notes` are remarks worth a line that are no reason to refuse.

    `stages` are the merges that are inputs of this one, or of one another, each after those that it needs; `stage` is
    what computes the outputs of one of them.
    """

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
    tokenizer: Checkpoint | None  # the input whose tokenizer files are copied, the layout if None
    files: dict[str, bytes]  # those of them that are written anew
    stages: tuple[Plan, ...]
    stage: Stage | None = None

    @cached_property
    def entries(self) -> list[Entry]:
        return [output.entry for output in self.outputs]

    def merged_entries(self, folder: str) -> list[Entry]:
        """Those of a part of the pipeline that are not just copied."""
        return [o.entry for o in self.outputs if o.action == "merge" and o.entry.name.startswith(f"{folder}.")]

    @property
    def write_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @cached_property
    def read_bytes(self) -> int:
        """Bytes that combining reads; for what a stage computes, those that it reads for that, on average."""
        each = {
            home(str(stage.recipe.name)): stage.read_bytes / max(1, sum(entry.nbytes for entry in stage.entries))
            for stage in self.stages
        }
        read: Counter[Path] = Counter()
        for tensor in (tensor for output in self.outputs for tensor in output.inputs):
            stage = home_of(tensor.file)
            read[stage] += tensor.nbytes if stage in each else tensor.stored_bytes
        return sum(round(nbytes * each.get(folder, 1)) for folder, nbytes in read.items())

    @cached_property
    def weight_files(self) -> list[ShardFile]:
        """Every file that is read, for a stage or for this merge itself, once."""
        checkpoints = [each for plan in (*self.stages, self) for each in plan.checkpoints]
        computed = {home(str(stage.recipe.name)) for stage in self.stages}
        files = {file.path: file for checkpoint in checkpoints for file in checkpoint.files}
        return [file for path, file in files.items() if home_of(path) not in computed]

    @cached_property
    def chunk_bytes(self) -> int:
        """What a worker computes spans of its stages in, beside its slot: a chunk at every stage of the longest way."""
        return max((stage.stage.chunk_bytes + stage.chunk_bytes for stage in self.stages if stage.stage), default=0)

    @property
    def written(self) -> list[Plan]:
        """The stages that have an output of their own."""
        return [stage for stage in self.stages if stage.recipe.output.path is not None]

    def texts(self, code: bool) -> dict[str, Path | bytes]:
        """The small files of the result, each as its content or where that is; custom code only if asked for."""
        texts: dict[str, Path | bytes] = {}
        for name, text in carried_files(self.layout, code, self.tokenizer).items():
            if name in self.files:
                texts[name] = self.files[name]
            elif self.layout.parts:
                entries = self.merged_entries(name.partition("/")[0])
                texts[name] = carried_config(name, text, self.layout, entries)
            elif name != "config.json":
                texts[name] = text
        if self.config is not None and not self.layout.parts:
            texts["config.json"] = config_bytes(updated_config(self.config, self.entries))
        if self.recipe.chat_template not in (None, "auto"):
            texts["chat_template.jinja"] = str(self.recipe.chat_template).encode()
        return texts

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
            "config": [self.config, self.layout.parts],
            "chat_template": self.recipe.chat_template,
            "stages": [stage.fingerprint for stage in self.stages],
            "tokenizer": [
                str(self.tokenizer and self.tokenizer.folder),
                {name: raw.decode() for name, raw in self.files.items()},
            ],
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


def make_plan(recipe: Recipe, out: Path | None = None, written: Collection[str | None] = ()) -> Plan:
    """The plan of a recipe; `out` overrides the recipe's own output folder. Raises Refused with every problem found.

    written: names of stages with an output of their own that are there already: these are read like any checkpoint.
    """
    problems: list[Problem] = []
    opened: dict[ModelReference, Checkpoint | None] = {}
    plans: dict[str | None, Plan] = {}
    for each in needed(recipe, recipe.stages, written):
        reference = ModelReference(str(each.name))
        if each.name in written:
            folder = _output_folder(each, None, problems)
            opened[reference] = replace(open_checkpoint(str(folder)), reference=str(each.output.path))
            continue
        folder = None if each.output.path is None else _output_folder(each, None, problems)
        plan = _plan(each, folder, opened, plans, problems)
        opened[reference] = None
        if plan is not None:
            stage = Stage(reference.path, plan.outputs, each.nonfinite)
            plans[each.name] = replace(plan, stage=stage)
            config = None if plan.config is None else updated_config(plan.config, plan.entries)
            texts = {} if config is None else plan.texts(code=True)
            opened[reference] = stage_checkpoint(stage, plan.shards, config, plan.layout.parts, texts)
    plan = _plan(recipe, _output_folder(recipe, out, problems), opened, plans, problems)
    if plan is not None:
        outputs = [*(one for one in plans.values() if one.recipe.output.path), plan]
        problems.extend(_in_the_way(outputs, [each for each in opened.values() if each and not each.is_stage]))
        problems.extend(_space(outputs))
    if plan is None or problems:
        raise Refused(problems)
    return plan


def _plan(
    recipe: Recipe,
    folder: Path | None,
    opened: dict[ModelReference, Checkpoint | None],
    plans: Mapping[str | None, Plan],
    problems: list[Problem],
) -> Plan | None:
    """The plan of one document, whose stages are in `plans`; None, and problems, if that cannot be told.

    folder: where it is written; a stage that is not written has none. opened: all models so far, to which its own are
    added; None for one that cannot be opened.
    """
    before = len(problems)
    method = METHODS.get(recipe.merge_method)
    if method is None:
        problems.append(_unknown_method(recipe))
    _open_all(recipe, opened, problems)
    own = {reference: opened[reference] for reference, _ in references(recipe)}
    if method is None or len(problems) > before or any(checkpoint is None for checkpoint in own.values()):
        return None
    checkpoints = _shared({reference: checkpoint for reference, checkpoint in own.items() if checkpoint})
    problems.extend(_doubles(recipe, checkpoints))
    assembled = assemble(recipe, method, checkpoints)
    problems.extend(assembled.problems)
    shards = split(
        [output.entry for output in assembled.outputs],
        math.inf if in_one_file(assembled.layout) else recipe.output.shard_size_bytes,
        _stems(assembled.layout),
    )
    if not assembled.outputs and not assembled.problems:
        problems.append(Problem("nothing to merge: the inputs hold no tensors", place=assembled.layout.reference))
    problems.extend(check_chat_template(recipe))
    if len(problems) > before:
        return None
    return Plan(
        recipe=recipe,
        method=method,
        layout=assembled.layout,
        checkpoints=tuple(unique(checkpoints.values())),
        outputs=tuple(assembled.outputs),
        shards=tuple(shards),
        folder=home(str(recipe.name)) if folder is None else folder,
        config=assembled.config,
        given=assembled.given,
        notes=(*_dequantised(checkpoints), *assembled.notes, *tokenizer_note(recipe, assembled.layout, checkpoints)),
        renamings=assembled.renamings,
        tokenizer=assembled.tokenizer,
        files=assembled.files,
        stages=tuple(plans[name] for name in _planned(recipe, plans)),
    )


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


def _dequantised(checkpoints: Mapping[ModelReference, Checkpoint]) -> list[str]:
    return [
        f"{checkpoint.reference}: {note}" for checkpoint in unique(checkpoints.values()) for note in checkpoint.notes
    ]


def _unknown_method(recipe: Recipe) -> Problem:
    return Problem(
        f"there is no merge method {recipe.merge_method!r}",
        place=recipe.place("merge_method"),
        expected="one of " + ", ".join(METHODS),
        remedy=nearest(recipe.merge_method, METHODS),
    )


def _open_all(recipe: Recipe, opened: dict[ModelReference, Checkpoint | None], problems: list[Problem]) -> None:
    search = [recipe.path.parent, Path(".")] if recipe.path else [Path(".")]
    for reference, _ in references(recipe):
        if reference in opened:
            continue
        bases = [ModelReference(reference.path, reference.revision), recipe.base_model]
        if reference.adapter and any(base in opened and opened[base] is None for base in bases if base):
            opened[reference] = None  # nor can it be opened with an adapter
            continue
        known = {there: checkpoint for there, checkpoint in opened.items() if checkpoint}
        try:
            opened[reference] = open_model(reference, search, recipe.base_model, known)
        except Refused as refused:
            opened[reference] = None
            problems.extend(refused.problems)


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


def _planned(recipe: Recipe, plans: Collection[str | None]) -> list[str | None]:
    """The stages that are computed for this document, of those that have plans: the others are read."""
    there = [stage.name for stage in recipe.stages if stage.name not in plans]
    return [stage.name for stage in needed(recipe, recipe.stages, there) if stage.name in plans]


def _in_the_way(plans: Sequence[Plan], inputs: Iterable[Checkpoint]) -> Iterable[Problem]:
    """An output that would replace an input or another output."""
    for number, plan in enumerate(plans):
        folder = plan.folder.resolve()
        homes = {
            f"{checkpoint.reference}: {home}" if home != checkpoint.folder.resolve() else checkpoint.reference: home
            for checkpoint in unique(inputs)
            for home in {checkpoint.folder.resolve(), *(file.path.parent.resolve() for file in checkpoint.files)}
        }
        others = {str(one.folder): one.folder.resolve() for one in plans[number + 1 :]}
        others |= {str(one.folder): where for one in plans[:number] if (where := one.folder.resolve()) != folder}
        for what, places in (("an input", homes), ("another output", others)):
            for name, where in places.items():
                if folder == where or folder in where.parents:
                    yield Problem(
                        f"the output folder is (or holds) {what}",
                        place=str(plan.folder),
                        found=name,
                        remedy="choose another output folder",
                    )


def _doubles(recipe: Recipe, checkpoints: dict[ModelReference, Checkpoint]) -> Iterable[Problem]:
    """The same model twice in one list."""
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


def _space(plans: Sequence[Plan]) -> Iterable[Problem]:
    """Too little space on a disk for all that is to be written there, but for stages that an earlier run may have."""
    disks: dict[int, list[Plan]] = defaultdict(list)
    for plan in plans:
        disks[os.stat(_existing(plan.folder)).st_dev].append(plan)
    for there in disks.values():
        missing = [plan for plan in there if plan.stage is None or not plan.folder.exists()]
        wanted = sum(plan.write_bytes for plan in missing)
        free = free_bytes(there[-1].folder) + sum(reserved_bytes(plan.folder) for plan in there)
        if wanted > free:
            yield Problem(
                "not enough free space for the merged checkpoint",
                place=", ".join(str(plan.folder) for plan in missing),
                expected=f"{wanted:,} bytes",
                found=f"{free:,} bytes free",
                remedy="free some space or write elsewhere with --out",
            )


def _stems(layout: Checkpoint) -> dict[str, str]:
    """What loaders expect the weight files to be called, by folder; only diffusers' models have a name of their own."""
    names = {
        folder: [f.path.name for f in layout.files if f.path.is_relative_to(layout.folder / folder)]
        for folder in layout.parts or ("",)
    }
    return {folder: DIFFUSERS if own[0].startswith(DIFFUSERS) else "model" for folder, own in names.items()}


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds (or will hold) the folder."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
