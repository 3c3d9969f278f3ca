"""Where inputs come from that are merges themselves: stages of the recipe, and folders that ggez-merge wrote before.

A folder's merge_report.json is somebody's word: it is taken as far as it is well formed, and only so much of it.
Whether its weights are still those that it speaks of is seen from their hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ggez_merge.checkpoint import Checkpoint
from ggez_merge.units import readable_bytes
from ggez_merge.untrusted import printable, read_json_bytes, strict_json
from ggez_merge.write import REPORT

MOST_ENTRIES = 2000  # inputs, stages and files of all earlier merges of an input, in a report
MOST_DEPTH = 32
MOST_TEXT = 300
MOST_LINES = 200  # of the tree in a model card


def origin(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> dict[str, Any] | None:
    """What the report in a checkpoint's folder says of its merge; None if there is none. hashes: of files, by path.

    {"method", "version", "fingerprint", "unchanged", "inputs", "stages"}, where inputs have an "origin" in turn;
    "cut": True where there was more of it; {"unreadable": why} if the report is not to be understood.
    """
    path = checkpoint.folder / REPORT
    if checkpoint.is_stage or not path.is_file():
        return None
    try:
        report = strict_json(read_json_bytes(path))
        found = _Taken().merge(report, 0)
        written = {name: entry["xxh3_128"] for name, entry in report["outputs"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        return {"unreadable": printable(str(error))[:MOST_TEXT]}
    ours = [file.path for file in checkpoint.files if file.path.is_relative_to(checkpoint.folder)]  # not an adapter's
    names = {str(path): path.relative_to(checkpoint.folder).as_posix() for path in ours}
    unchanged = all(hashes[path] == written.get(name) for path, name in names.items())
    return {"unchanged": unchanged, **found}


class _Taken:
    """What is taken over from a report, as long as there is room."""

    def __init__(self) -> None:
        self.left = MOST_ENTRIES

    def merge(self, said: Mapping[str, Any], depth: int) -> dict[str, Any]:
        tool = said.get("tool")
        version = tool.get("ggez-merge") if isinstance(tool, dict) else said.get("version")
        taken = {
            "method": _text(said.get("method")),
            "version": _text(version),
            "fingerprint": _text(said.get("fingerprint")),
            "inputs": [entry for each in said["inputs"] if (entry := self.input(each, depth))],
            "stages": [entry for each in said.get("stages", []) if (entry := self.stage(each, depth))],
        }
        return {**taken, "cut": True} if self.left <= 0 or depth >= MOST_DEPTH else taken

    def stage(self, said: Mapping[str, Any], depth: int) -> dict[str, Any] | None:
        self.left -= 1
        if self.left < 0:
            return None
        inputs = [entry for each in said["inputs"] if (entry := self.input(each, depth))]
        return {"name": _text(said["name"]), "method": _text(said["method"]), "inputs": inputs}

    def input(self, said: Mapping[str, Any], depth: int) -> dict[str, Any] | None:
        self.left -= 1
        if self.left < 0:
            return None
        taken: dict[str, Any] = {"reference": _text(said["reference"])}
        taken |= {key: _text(said[key]) for key in ("revision", "role", "stage") if said.get(key) is not None}
        files = {}
        for name, entry in said.get("files", {}).items():
            self.left -= 1
            if self.left >= 0:
                files[_text(name)] = {"bytes": int(entry["bytes"]), "xxh3_128": _text(entry["xxh3_128"])}
        taken["files"] = files
        earlier = said.get("origin")
        if isinstance(earlier, dict) and "inputs" in earlier and depth < MOST_DEPTH:
            taken["origin"] = {"unchanged": earlier.get("unchanged") is True, **self.merge(earlier, depth + 1)}
        return taken


def _text(value: Any) -> str:
    return printable(str(value))[:MOST_TEXT]


def has_lineage(report: Mapping[str, Any]) -> bool:
    """Whether a merge has inputs that are merges themselves."""
    return bool(report["stages"]) or any("origin" in entry for entry in report["inputs"])


def tree(report: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """All that went into a merge, down to files, as a nested list in Markdown; names: how methods are called."""
    lines = list(_branches(report, names, 0, set()))
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"- and {len(lines) - MOST_LINES:,} lines more, in `{REPORT}`"]
    return lines


def _branches(merge: Mapping[str, Any], names: Mapping[str, str], depth: int, told: set[str]) -> Iterator[str]:
    """The inputs of a merge, a stage where it is named first."""
    stages = {stage["name"]: stage for stage in merge.get("stages", [])}

    def of(inputs: list[dict[str, Any]], depth: int) -> Iterator[str]:
        for entry in inputs:
            yield from branch(entry, depth)

    def branch(entry: dict[str, Any], depth: int) -> Iterator[str]:
        indent = "  " * depth
        stage = stages.get(str(entry.get("stage")))
        if stage is not None:
            again = stage["name"] in told
            told.add(stage["name"])
            yield f"{indent}- {_code(stage['name'])}, a stage: {_method(stage, names)}" + (
                " (as above)" if again else ""
            )
            if not again and depth < MOST_LINES:  # the list is cut there, and Python stops soon after
                yield from of(stage["inputs"], depth + 1)
            return
        revision = f" at revision {_code(entry['revision'])}" if entry.get("revision") else ""
        yield f"{indent}- {_code(entry['reference'])}{revision}"
        for name, file in entry["files"].items():
            yield f"{indent}  - {_code(name)}, {readable_bytes(file['bytes'])}, xxh3_128 {_code(file['xxh3_128'])}"
        earlier = entry.get("origin")
        if earlier and "inputs" in earlier:
            changed = "" if earlier["unchanged"] else " (its weights have changed since)"
            yield f"{indent}  - merged before: {_method(earlier, names)}{changed}, from"
            yield from _branches(earlier, names, depth + 2, set())

    yield from of(merge["inputs"], depth)


def _method(merge: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return names.get(str(merge["method"]), _code(merge["method"]))


def _code(text: object) -> str:
    return "`" + str(text).replace("`", "'") + "`"
