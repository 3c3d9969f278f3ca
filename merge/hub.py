"""A Hugging Face id becomes a local folder: from the cache when it is there, else downloaded."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from ggez_merge.errors import Problem, Refused
from ggez_merge.layout import ADAPTER_OUTSIDE, ADAPTER_WEIGHTS, choose, holds_adapter, read_index
from ggez_merge.pipeline import MODEL_INDEX, component_folders, model_folders, read_model_index

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
_BESIDE_WEIGHTS = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "*.bpe",
    "*.codes",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
]  # what a loader needs and a merge carries on
_REMEDIES = {
    "GatedRepoError": "accept the model's terms on its page, then log in with `hf auth login`",
    "RepositoryNotFoundError": "check the spelling; a private model needs `hf auth login`",
    "RevisionNotFoundError": "check the revision: a branch, a tag or a full commit hash",
}


def is_hub_id(reference: str) -> bool:
    """Whether `reference` has the form organisation/name."""
    return _ID.fullmatch(reference) is not None and not reference.endswith((".safetensors", ".bin"))


def fetch(hub_id: str, revision: str | None, not_local: str) -> tuple[Path, str]:
    """The snapshot folder of a model and its commit hash.

    A complete snapshot in the cache is used as it is, with no network at all; to follow a branch that has
    moved, run `hf download` first. Otherwise the files that a merge needs are downloaded: the weights that
    `choose` picks (no second copy of the weights) and the small files beside them; of a diffusers pipeline,
    those in the sub-folders that it is made of.
    Raises Refused, with the remedy; `not_local` says where a local path of that name was looked for.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise Refused(
            Problem(
                f"{hub_id} is not a local path, and huggingface_hub is not installed to fetch it",
                found=not_local,
                remedy="pip install huggingface_hub, or give a local folder",
            )
        ) from None
    cached = _cached(hub_id, revision)
    if cached is not None:
        return cached, cached.name
    try:
        folder = _snapshot(hub_id, revision)
        commit = folder.name  # the weights must be of the same commit as the files beside them
        siblings = hub.HfApi().model_info(hub_id, revision=commit).siblings or []
        names = [file.rfilename for file in siblings]
        if (folder / MODEL_INDEX).exists():
            beside = [f"{part}/{pattern}" for part in _pipeline(folder) for pattern in _BESIDE_WEIGHTS]
            hub.snapshot_download(hub_id, revision=commit, allow_patterns=beside)
        wanted = [*map(glob.escape, _weights(folder, names)), "additional_chat_templates/*.jinja"]
        hub.snapshot_download(hub_id, revision=commit, allow_patterns=wanted)
    except Refused:
        raise
    except Exception as error:  # huggingface_hub lets the exceptions of its HTTP library through, whichever that is
        kinds = [kind.__name__ for kind in type(error).__mro__]
        remedy = next((_REMEDIES[kind] for kind in kinds if kind in _REMEDIES), None)
        raise Refused(
            Problem(
                f"{hub_id} is not a local path and cannot be fetched from Hugging Face: {first_line(error)}",
                place=f"{hub_id}@{revision}" if revision else hub_id,
                found=not_local,
                remedy=remedy or "check the network, or `hf download` it where there is one and give that folder",
            )
        ) from error
    return folder, commit


def _snapshot(hub_id: str, revision: str | None, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=_BESIDE_WEIGHTS,
            ignore_patterns=["*/*"],
        )
    )


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The cached snapshot if all weights are in it: huggingface_hub also returns incomplete folders."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(hub_id, revision, local_files_only=True)
        weights = _weights(folder, [path.relative_to(folder).as_posix() for path in folder.rglob("*")])
        parts = _pipeline(folder) if (folder / MODEL_INDEX).exists() else []
    except (LocalEntryNotFoundError, Refused):
        return None
    return folder if all((folder / name).exists() for name in [*weights, *parts]) else None


def _pipeline(folder: Path) -> list[str]:
    """The sub-folders that a diffusers pipeline is made of."""
    return list(component_folders(read_model_index(folder)))


def _weights(folder: Path, names: Iterable[str]) -> list[str]:
    """The paths of the weights that a merge needs among all files of a model; its small files must be in `folder`."""
    names, parts = list(names), [""]
    if holds_adapter(name for name in names if "/" not in name):
        weights = [name for name in ADAPTER_WEIGHTS if name in names][:1]
        return weights + [ADAPTER_OUTSIDE] * (ADAPTER_OUTSIDE in names)
    if (folder / MODEL_INDEX).exists():
        parts = [f"{part}/" for part in model_folders(read_model_index(folder), names)]
    found: list[str] = []
    for part in parts:
        own = [name.removeprefix(part) for name in names if name.startswith(part)]
        layout = choose([name for name in own if "/" not in name], str(folder / part))
        files = set(read_index(folder / part / layout.index).values()) if layout.index else layout.files
        found += [part + file for file in sorted(files)]
    return found


def first_line(error: Exception) -> str:
    """What an error says in its first line that is not empty; else its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
