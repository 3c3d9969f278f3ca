"""Is a merged checkpoint still what the merge wrote? Every file against its hash in merge_report.json.

The hash is XXH3 (128 bits, as `xxh128sum` prints it): it finds any accident at the speed of memory. Nobody is kept from
changing a file on purpose, nor would another hash do that, with the report lying beside the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from ggez_merge.checkpoint import open_checkpoint
from ggez_merge.errors import Problem, Refused
from ggez_merge.progress import Silent
from ggez_merge.read import Arena, read_exactly
from ggez_merge.write import REPORT

BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: the files that are as written, and what is wrong with the others."""

    intact: tuple[str, ...]
    n_bytes: int
    problems: tuple[Problem, ...]


def verify(folder: Path, progress: Silent | None = None) -> Verdict:
    """Re-read every file of a merged checkpoint. Raises Refused if the folder is no merged checkpoint."""
    outputs = _reported(folder)
    progress = progress or Silent()
    progress.phase("verifying", sum(entry["bytes"] for entry in outputs.values()))
    intact, problems, total = [], [], 0
    (view,) = Arena(BUFFER_BYTES).carve([BUFFER_BYTES])
    for name, expected in sorted(outputs.items()):
        path = folder / name
        if not path.is_file():
            problems.append(Problem("a file is missing", place=str(path)))
        elif path.stat().st_size != expected["bytes"]:
            problems.append(
                Problem(
                    "a file has another size",
                    place=str(path),
                    expected=f"{expected['bytes']:,} bytes",
                    found=f"{path.stat().st_size:,} bytes",
                )
            )
        elif (found := _hash(path, view, progress)) != expected["xxh3_128"]:
            problems.append(
                Problem(
                    "a file has other content",
                    place=str(path),
                    expected=f"xxh3_128 {expected['xxh3_128']}",
                    found=found,
                )
            )
        else:
            intact.append(name)
            total += expected["bytes"]
    if not problems:
        open_checkpoint(str(folder.absolute()))
    return Verdict(tuple(intact), total, tuple(problems))


def _reported(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / REPORT
    try:
        outputs = json.loads(path.read_text(encoding="utf-8"))["outputs"]
        well_formed = isinstance(outputs, dict) and all(
            isinstance(entry["bytes"], int) and isinstance(entry["xxh3_128"], str) and _inside(name)
            for name, entry in outputs.items()
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise Refused(
            Problem(
                "there is no readable merge report here",
                place=str(path),
                remedy="give a folder that ggez-merge wrote; `inspect` shows any checkpoint, `hf upload` uploads one",
            )
        )
    return dict(outputs)


def _inside(name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts


def _hash(path: Path, view: memoryview, progress: Silent) -> str:
    hasher = xxh3_128()
    size = path.stat().st_size
    with open(path, "rb") as file:
        for at in range(0, size, len(view)):
            part = view[: min(len(view), size - at)]
            read_exactly(file.fileno(), part, at, path)
            hasher.update(part)
            progress.advance(len(part))
    return hasher.hexdigest()
