"""A reference becomes a checkpoint: a model, or a base with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ggez_merge.adapter import Adapter, is_adapter, read_adapter
from ggez_merge.checkpoint import Checkpoint, checkpoint_at, locate
from ggez_merge.errors import Problem, Refused
from ggez_merge.layout import ADAPTER_CONFIG
from ggez_merge.lora import apply
from ggez_merge.reference import ModelReference

HERE = (Path("."),)


def open_model(
    reference: ModelReference,
    search: Sequence[Path] = HERE,
    base: ModelReference | None = None,
    known: Mapping[ModelReference, Checkpoint] = MappingProxyType({}),
) -> Checkpoint:
    """Open what a reference names; headers only, as for `open_checkpoint`.

    The folder of an adapter may stand for itself. Its base is then `base`, the recipe's base_model, or, where there is
    none, what adapter_config.json names, if that is a local path or a hub id that can be opened. `known` are open
    already: what stages of the recipe are called, too. Raises Refused.
    """
    if reference in known:
        return known[reference]
    if reference.adapter is None:
        path, commit = locate(reference.path, reference.revision, search)
        if not is_adapter(path):
            return checkpoint_at(path, reference.path, commit)
        said = reference
    else:
        said = reference.adapter
        path, commit = locate(said.path, said.revision, search)
    if path.is_file():
        raise Refused(Problem("an adapter is named by its folder", str(path), remedy=f"write {path.parent}"))
    adapter = read_adapter(path, f"{said.path}@{commit}" if commit else said.path)
    if reference.adapter is not None and reference.path:
        return apply(open_model(ModelReference(reference.path, reference.revision), search, None, known), adapter)
    if base is not None and base != reference:
        opened = open_model(base, search, None, known)
        if all(file.path.resolve() != adapter.file.path.resolve() for file in opened.files):
            return apply(opened, adapter)  # else the base is this very adapter, spelt in another way
    return apply(_own_base(adapter, search), adapter)


def _own_base(adapter: Adapter, search: Sequence[Path]) -> Checkpoint:
    """The base that the adapter's config names."""
    remedy = f"write BASE+{adapter.reference}, with the base that it was trained on"
    named = adapter.settings.base
    if named is None:
        raise Refused(
            Problem(
                "the adapter does not say what its base is", str(adapter.folder / ADAPTER_CONFIG), None, remedy=remedy
            )
        )
    try:
        path, commit = locate(named, adapter.settings.revision, search)
        if is_adapter(path):
            raise Refused(Problem("it is an adapter itself"))
        return checkpoint_at(path, named, commit)
    except Refused as refused:
        problem = Problem(
            "the base that the adapter names cannot be opened",
            place=str(adapter.folder / ADAPTER_CONFIG),
            expected=f"base_model_name_or_path: {named}",
            found=refused.problems[0].what,
            remedy=remedy,
        )
        raise Refused(problem) from None
