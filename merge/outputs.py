"""Which tensors the merged checkpoint has, and what goes into each of them.

The base (or, without one, the first model) gives the layout: names, their order, the config. Every other input is
brought to its names, and must then have the same tensors with the same shapes; whatever differs is refused, or copied
where the recipe says so.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from ggez_merge.align import Renaming, align
from ggez_merge.checkpoint import FLOATS, ITEM_BITS, SCALED, Checkpoint, Tensor, promoted
from ggez_merge.components import component, layer, rename_layer
from ggez_merge.depth import layer_counts, restate_depth
from ggez_merge.diffusion import blocks, goes_along, part_of
from ggez_merge.errors import Problem
from ggez_merge.heads import resolve_heads
from ggez_merge.methods.method import Job, Method
from ggez_merge.names import grouped
from ggez_merge.recipe import ModelReference, Module, Recipe, Slice
from ggez_merge.resolve import Resolver, gradient_position
from ggez_merge.rows import Rows, align_rows
from ggez_merge.shards import Entry
from ggez_merge.untrusted import printable, some

Action = Literal["merge", "copy", "equal"]
MODULE_ALIASES = {
    "text_decoder": ("language_model", "embeddings", "lm_head"),
    "language_model": ("language_model", "embeddings", "lm_head"),
    "vision_tower": ("vision_tower",),
    "vision_model": ("vision_tower",),
    "vision_encoder": ("vision_tower",),
    "multi_modal_projector": ("projector",),
}  # mergekit's names of the parts of a vision-language model -> our components


@dataclass(frozen=True)
class Output:
    """One tensor of the merged checkpoint.

    action: "merge" combines `base` (if the method uses one) and `models` as `job` says; "copy" takes models[0] as it
    is; "equal" takes models[0] after checking that all of `models` hold the same bytes. `via` says why, for people;
    `owners` whose the models are, where they are merged.
    """

    entry: Entry
    action: Action
    base: Tensor | None
    models: tuple[Tensor, ...]
    job: Job | None
    via: str
    owners: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Everything that is read for it, the base first."""
        return (self.base, *self.models) if self.base else self.models


@dataclass
class Assembled:
    """The outputs in layout order, and everything that was wrong or is worth knowing."""

    layout: Checkpoint
    config: dict[str, Any] | None
    given: frozenset[str] = frozenset()  # names of all parameters that the recipe gives anywhere
    outputs: list[Output] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    renamings: tuple[Renaming, ...] = ()
    tokenizer: Checkpoint | None = None  # the input that its tokenizer files come from
    files: dict[str, bytes] = field(default_factory=dict)  # those of them that are written anew


def assemble(recipe: Recipe, method: Method, checkpoints: Mapping[ModelReference, Checkpoint]) -> Assembled:
    """Every output of a recipe whose checkpoints are open."""
    first = recipe.modules[0].slices[0]
    layout_reference = recipe.base_model or first.base_model or first.sources[0].model
    layout = checkpoints[layout_reference]
    assembled = Assembled(layout, copy.deepcopy(layout.config))
    aligned = align(layout, checkpoints)
    assembled.renamings = aligned.renamings
    assembled.problems.extend(aligned.problems)
    home, inputs, notes = resolve_heads(layout, aligned.checkpoints, assembled.config)
    assembled.notes.extend(notes)
    rows = align_rows(recipe, home, inputs, assembled.config)
    assembled.problems.extend(rows.problems)
    assembled.tokenizer, assembled.files = rows.tokenizer, rows.files
    _Assembler(recipe, method, rows, assembled).run()
    assembled.problems.extend(aligned.unclear)
    return assembled


class _Assembler:
    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        rows: Rows,
        assembled: Assembled,
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.checkpoints = rows.checkpoints
        self.layout = rows.layout
        self.result = assembled
        self.resolver = Resolver(recipe, method, blocks(rows.layout.tensors))
        assembled.given = frozenset(self.resolver.given())
        self.uses_base = method.uses_base(assembled.given)
        self.goes_along = goes_along(rows.layout)
        self.passed: list[str] = []  # tensors that the base alone gives
        self.missing: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(dict)  # (lacks, has) -> name -> own
        self.scaled: dict[tuple[str, str], list[str]] = defaultdict(list)  # (file, dtype) -> names

    def run(self) -> None:
        fault = self.method.check_given(self.result.given)
        if fault:
            self.result.problems.append(
                Problem(f"{self.method.name}: {fault}", place=self.recipe.place("merge_method"))
            )
        for module in self.recipe.modules:
            for piece in module.slices:
                self._check_inputs(piece)
        if self.result.problems:
            return
        for module, names in self._by_module():
            if any(source.layer_range for piece in module.slices for source in piece.sources):
                self._stack(module, names)
            else:
                self._whole(module, names)
        self._explain_missing()
        self._explain_passed()
        self._refuse_scaled()
        self.result.problems.extend(self.resolver.problems())
        self._check_together()
        if self.recipe.base_model and not self.uses_base and self.recipe.base_model not in self._listed():
            self.result.notes.append(
                f"{self.recipe.base_model} gives the layout, config and tokenizer; {self.method.name} "
                "with weights averages the listed models alone"
            )

    def _check_together(self) -> None:
        jobs = [output.job for output in self.result.outputs if output.job is not None]
        together = [job for job in jobs if self.method.measures_together(job)]
        fault = self.method.check_together(together) if not self.result.problems else None
        if fault:
            self.result.problems.append(
                Problem(f"{self.method.name}: {fault}", place=self.recipe.place("merge_method"))
            )

    def _listed(self) -> set[ModelReference]:
        return {s.model for module in self.recipe.modules for piece in module.slices for s in piece.sources}

    # --- who takes part ---------------------------------------------------------------------------------------

    def _base(self, piece: Slice) -> ModelReference | None:
        return (piece.base_model or self.recipe.base_model) if self.uses_base else None

    def _models(self, piece: Slice) -> list[int]:
        """Indices of the sources that are merged: all of them but the base itself."""
        base = self._base(piece)
        if base is None:
            return list(range(len(piece.sources)))
        home = self.checkpoints[base].files
        return [i for i, source in enumerate(piece.sources) if self.checkpoints[source.model].files != home]

    def _check_inputs(self, piece: Slice) -> None:
        place = self.recipe.place(*piece.where) if piece.where else self.recipe.place("models")
        if self.uses_base and self._base(piece) is None:
            self.result.problems.append(
                Problem(
                    f"{self.method.name} needs a base_model",
                    place=self.recipe.place("merge_method"),
                    remedy="add `base_model:`, the model that the others were tuned from",
                )
            )
            return
        least, most = self.method.n_models
        n = len(self._models(piece))
        if n < least or (most is not None and n > most):
            besides = " besides the base" if self.uses_base else ""
            self.result.problems.append(
                Problem(
                    f"{self.method.name} merges {'exactly' if least == most else 'at least'} {least} "
                    f"model{'s' if least > 1 else ''}{besides}",
                    place=place,
                    found=", ".join(str(piece.sources[i].model) for i in self._models(piece)) or "none",
                )
            )

    # --- which names belong to which module ---------------------------------------------------------------------

    def _all_names(self) -> list[str]:
        """The layout's names in its order, then what only other inputs have."""
        inputs = [self.layout, *(self.checkpoints[reference] for reference in self._taking_part())]
        return list(dict.fromkeys(name for checkpoint in inputs for name in checkpoint.tensors))

    def _taking_part(self) -> list[ModelReference]:
        found = []
        for module in self.recipe.modules:
            for piece in module.slices:
                base = self._base(piece)
                found += [base] if base else []
                found += [piece.sources[i].model for i in self._models(piece)]
        return found

    def _by_module(self) -> Iterable[tuple[Module, list[str]]]:
        modules = self.recipe.modules
        if modules[0].name is None:
            yield modules[0], self._all_names()
            return
        taken: dict[str, list[str]] = {str(module.name): [] for module in modules}
        left = []
        for name in self._all_names():
            owner = next(
                (str(m.name) for m in modules if m.name != "default" and _in_module(name, str(m.name))), "default"
            )
            if owner in taken:
                taken[owner].append(name)
            else:
                left.append(name)
        if left:
            self.result.problems.append(
                Problem(
                    "some tensors belong to no module of the recipe",
                    place=self.recipe.place("modules"),
                    tensor=some(left),
                    remedy="add a module named `default` for all that is left",
                )
            )
        for module in modules:
            if not taken[str(module.name)]:
                self.result.problems.append(
                    Problem(
                        f"the module `{module.name}` reaches no tensor",
                        place=self.recipe.place(*module.where),
                        expected=f"one of {', '.join(MODULE_ALIASES)}, `default`, or a prefix or glob of tensor names",
                    )
                )
            yield module, taken[str(module.name)]

    # --- models merged as they stand ------------------------------------------------------------------------------

    def _whole(self, module: Module, names: list[str]) -> None:
        piece = module.slices[0]
        base = self._base(piece)
        parts = [base] if base else []
        parts += [piece.sources[i].model for i in self._models(piece)]
        depth = layer_counts(names)
        for name in names:
            self._place(name, [(part, name) for part in parts], module, piece, gradient_position(name, depth))

    # --- layer ranges stacked ---------------------------------------------------------------------------------------

    def _stack(self, module: Module, names: list[str]) -> None:
        """Layers of the slices one after the other; embeddings as the first slice has them, the rest as the last."""
        depth = layer_counts(name for name in names if name in self.layout.tensors)
        if len(depth) != 1:
            self.result.problems.append(
                Problem(
                    "layer ranges need exactly one stack of layers",
                    place=self.recipe.place(*module.where, "slices"),
                    found=", ".join(f"{prefix} ({count} layers)" for prefix, count in depth.items()) or "none",
                    remedy="give each stack its own entry under `modules:`",
                )
            )
            return
        ((prefix, old_count),) = depth.items()
        if not self._ranges_fit(module, prefix):
            return
        members: dict[int | None, list[str]] = defaultdict(list)
        for name in names:
            where = layer(name)
            members[where[1] if where and where[0] == prefix else None].append(name)
        for name in members[None]:
            piece = module.slices[0 if component(name) == "embeddings" else -1]
            wanted = [(part, name) for part, _ in self._ranged(piece)]
            self._place(name, wanted, module, piece, gradient_position(name, {}))
        order: list[int] = []
        for piece in module.slices:
            parts = self._ranged(piece)
            begin, end = piece.sources[0].layer_range or (0, 0)
            for offset in range(end - begin):
                t = offset / (end - begin - 1) if end - begin > 1 else 1.0
                number = len(order)
                there = (rename_layer(name, number) for _, start in parts for name in members[start + offset])
                for name in dict.fromkeys(there):
                    wanted = [(part, rename_layer(name, start + offset)) for part, start in parts]
                    if any(own in self.checkpoints[part].tensors for part, own in wanted):
                        self._place(name, wanted, module, piece, t)
                order.append(begin + offset)
        if self.result.config is not None:
            config_path = str(self.layout.folder / "config.json")
            self.result.problems.extend(restate_depth(self.result.config, config_path, prefix, old_count, order))

    def _ranged(self, piece: Slice) -> list[tuple[ModelReference, int]]:
        """The inputs of a slice, base first, each with its first layer (the first source's for an unlisted base)."""
        starts = [source.layer_range[0] if source.layer_range else 0 for source in piece.sources]
        base = self._base(piece)
        listed = {source.model: start for source, start in zip(piece.sources, starts, strict=True)}
        parts = [(base, listed.get(base, starts[0]))] if base else []
        return parts + [(piece.sources[i].model, starts[i]) for i in self._models(piece)]

    def _ranges_fit(self, module: Module, prefix: str) -> bool:
        before = len(self.result.problems)
        for piece in module.slices:
            lengths = {s.layer_range[1] - s.layer_range[0] for s in piece.sources if s.layer_range}
            if len(lengths) > 1:
                self.result.problems.append(
                    Problem(
                        "the sources of one slice have layer ranges of different lengths",
                        place=self.recipe.place(*piece.where),
                        found=", ".join(str(list(s.layer_range or ())) for s in piece.sources),
                    )
                )
            for source in piece.sources:
                count = layer_counts(self.checkpoints[source.model].tensors).get(prefix, 0)
                if source.layer_range and source.layer_range[1] > count:
                    self.result.problems.append(
                        Problem(
                            f"{source.model} has {count} layers under {prefix}",
                            place=self.recipe.place(*source.where, "layer_range"),
                            expected=f"a range within [0, {count}]",
                            found=str(list(source.layer_range)),
                        )
                    )
        return len(self.result.problems) == before

    # --- one tensor ---------------------------------------------------------------------------------------------

    def _place(
        self, name: str, wanted: Sequence[tuple[ModelReference, str]], module: Module, piece: Slice, t: float
    ) -> None:
        """One output from the inputs that should have it: merged if all do, else copied or refused.

        wanted: every input that takes part, base first, with the name of the tensor there. What only goes along with
        the denoiser of a diffusion pipeline is the base's, unless the recipe names it.
        """
        if self.goes_along(name) and not self.resolver.named(name) and module.name in (None, "default"):
            self._pass(name)
            return
        tensors = [self.checkpoints[reference].tensors.get(own) for reference, own in wanted]
        found = [tensor for tensor in tensors if tensor is not None]
        scaled = [tensor for tensor in found if tensor.dtype in SCALED]
        for tensor in scaled:
            self.scaled[(str(tensor.file), tensor.dtype)].append(name)
        if scaled:
            return
        witness = self.layout.tensors.get(name)
        stacked = any(source.layer_range for source in piece.sources)
        if len(found) == len(tensors) and (witness is not None or stacked):
            owners = [self.checkpoints[reference].label for reference, _ in wanted]
            self._add(name, found, owners, module, piece, t)
            return
        lacking = {str(r): own for (r, own), tensor in zip(wanted, tensors, strict=True) if tensor is None}
        if witness is None and not stacked:
            lacking.setdefault(self.layout.reference, name)
        origin = found[0] if found else witness
        if origin is None:
            return
        owner = next((str(r) for (r, _), x in zip(wanted, tensors, strict=True) if x is origin), self.layout.reference)
        if self.recipe.missing == "copy" and self._has_room(name):
            self._copy(name, origin, f"copied from {owner}: {', '.join(lacking)} has no such tensor")
        for reference, own in lacking.items():
            self.missing[(reference, owner)][own] = [at.name for at in origin.extents]

    def _pass(self, name: str) -> None:
        """The base's bytes, whatever the recipe's dtype; what the base lacks is left out."""
        tensor = self.layout.tensors.get(name)
        if tensor is not None:
            entry = _entry(name, promoted([tensor]), tensor.shape)
            self.result.outputs.append(Output(entry, "copy", None, (tensor,), None, f"copied from {self._home()}"))
            self.passed.append(name)

    def _add(
        self, name: str, tensors: Sequence[Tensor], owners: Sequence[str], module: Module, piece: Slice, t: float
    ) -> None:
        shapes = Counter(tensor.shape for tensor in tensors)
        if len(shapes) > 1:
            remedy = None
            if component(name) in ("embeddings", "lm_head"):
                remedy = "`tokenizer: {source: base}` merges rows by token"
            elif len({tuple(sorted(shape)) for shape in shapes}) == 1:
                remedy = "one lies on its side: save both with one version of transformers"
            self.result.problems.append(
                Problem(
                    "the inputs disagree on a tensor's shape",
                    tensor=name,
                    expected=f"{list(tensors[0].shape)} as in {tensors[0].file}",
                    found=", ".join(f"{list(x.shape)} in {x.file}" for x in tensors if x.shape != tensors[0].shape),
                    remedy=remedy,
                )
            )
            return
        if all(tensor.dtype in FLOATS for tensor in tensors):
            resolved = self.resolver.resolve(name, tensors[0].numel, module, piece, self._models(piece), t)
            dtype = self.recipe.out_dtype or self.recipe.dtype or promoted(tensors)
            base = tensors[0] if self._base(piece) else None
            models = tuple(tensors[1:] if base else tensors)
            entry = _entry(name, dtype, tensors[0].shape)
            whose = tuple(owners[1:] if base else owners)
            self.result.outputs.append(Output(entry, "merge", base, models, resolved.job, resolved.via, whose))
            return
        if len({tensor.dtype for tensor in tensors}) > 1:
            self.result.problems.append(
                Problem(
                    "the inputs disagree on the dtype of a tensor that cannot be averaged",
                    tensor=name,
                    expected=f"{tensors[0].dtype} as in {tensors[0].file}",
                    found=", ".join(f"{x.dtype} in {x.file}" for x in tensors if x.dtype != tensors[0].dtype),
                )
            )
            return
        if self.recipe.buffers == "base" and not tensors[0].dtype.startswith("F"):
            self._copy(name, tensors[0], "copied from the base: integers are not averaged")
        else:
            entry = _entry(name, tensors[0].dtype, tensors[0].shape)
            self.result.outputs.append(
                Output(entry, "equal", None, tuple(tensors), None, "copied: the same in every input")
            )

    def _copy(self, name: str, tensor: Tensor, via: str) -> None:
        wanted = self.recipe.out_dtype or self.recipe.dtype or promoted([tensor])
        dtype = wanted if tensor.dtype in FLOATS else tensor.dtype
        self.result.outputs.append(Output(_entry(name, dtype, tensor.shape), "copy", None, (tensor,), None, via))

    def _has_room(self, name: str) -> bool:
        """Whether a loader of the result would find a tensor of this name: in a pipeline, only inside its parts."""
        return not self.layout.parts or name.partition(".")[0] in self.layout.parts

    def _explain_missing(self) -> None:
        for (lacks, has), own_names in self.missing.items():
            names, own = list(own_names), [name for several in own_names.values() for name in several]
            if self.recipe.missing == "copy" and all(map(self._has_room, names)):
                self.result.notes.append(
                    f"{len(names)} tensors that {lacks} lacks are copied from {has}: {some(names)}"
                )
                continue
            found = [f"in groups: {printable(grouped(names))}"] if len(names) > 3 else []
            found += [f"in {has}: {some(own) if len(own) < 4 else printable(grouped(own))}"] if own != names else []
            self.result.problems.append(
                Problem(
                    f"{lacks} lacks {len(names)} tensor{'s' if len(names) > 1 else ''} that {has} has",
                    tensor=some(names),
                    found="; ".join(found) or None,
                    remedy="if they are the same model under other names, save both with one version of transformers"
                    + ("; if not, `missing: copy` copies them unmerged" if all(map(self._has_room, names)) else ""),
                )
            )

    def _home(self) -> str:
        return "the base" if self.recipe.base_model else self.layout.reference

    def _explain_passed(self) -> None:
        parts = dict.fromkeys(part_of(self.layout, name) for name in self.passed)
        if parts:
            self.result.notes.append(
                f"{', '.join(parts)}: copied from {self._home()}; a line of `components:` that names one has it merged"
            )

    def _refuse_scaled(self) -> None:
        for (file, dtype), names in self.scaled.items():
            self.result.problems.append(
                Problem(
                    "8-bit floats cannot be merged: without their scales they mean nothing",
                    place=file,
                    tensor=some(names),
                    expected="bfloat16, float16, float32 or float64",
                    found=dtype,
                    remedy="if they were cast without scales, save them as bfloat16 (tensor.to(torch.bfloat16)); "
                    "if their scales lie elsewhere, merge the model that they were made from",
                )
            )


def _entry(name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    numel = 1
    for length in shape:
        numel *= length
    return Entry(name, dtype, shape, numel * ITEM_BITS[dtype] // 8)


def _in_module(name: str, module: str) -> bool:
    if module in MODULE_ALIASES:
        return component(name) in MODULE_ALIASES[module]
    if re.search(r"[*?\[]", module):
        return fnmatchcase(name, module)
    return name == module or name.startswith(module + ".")
