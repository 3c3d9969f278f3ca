"""Where a merged checkpoint comes from: its merge_report.json and its model card."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ggez_merge import __version__
from ggez_merge.carry import of_diffusers
from ggez_merge.checkpoint import Checkpoint
from ggez_merge.lineage import has_lineage, origin, tree
from ggez_merge.outputs import Output
from ggez_merge.plan import Plan
from ggez_merge.run import Outcome, Tally
from ggez_merge.summary import applied, groups, renamings
from ggez_merge.units import readable_bytes
from ggez_merge.untrusted import printable

REPORT_FORMAT = 1
METHOD_NAMES = {
    "linear": "linear interpolation",
    "task_arithmetic": "task arithmetic (arXiv 2212.04089)",
    "ties": "TIES (arXiv 2306.01708)",
    "dare_linear": "DARE (arXiv 2311.03099) with task arithmetic",
    "dare_ties": "DARE (arXiv 2311.03099) with TIES election",
    "slerp": "spherical linear interpolation",
    "passthrough": "passthrough",
}


def labels(plan: Plan) -> dict[Path, str]:
    """Weight file -> the model that it belongs to: those of a base with an adapter are the base's and the adapter's."""
    found: dict[Path, str] = {}
    for checkpoint in plan.checkpoints:
        at: Checkpoint | None = checkpoint
        while at is not None:
            own = set(at.files) - set(at.base.files if at.base else ())
            found.update({file.path: at.label for file in own})
            at = at.base
    return found


def role(plan: Plan, checkpoint: Checkpoint) -> str:
    """Whether it is the recipe's base_model ("base") or one of those merged ("model")."""
    return "base" if plan.recipe.base_model is not None and checkpoint is plan.layout else "model"


def report(plan: Plan, outcome: Outcome, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of merge_report.json: what went in, what was done to each tensor, what came out.

    files: name -> {"bytes", "xxh3_128"} of every file of the output but the report and the card. Norms are Euclidean
    (sqrt of the sum of squares, in the inputs' units), `delta_norms` those of model - base for each model.
    """
    names = labels(plan)
    return {
        "format": REPORT_FORMAT,
        "tool": {"ggez-merge": __version__, **_versions()},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "fingerprint": plan.fingerprint,
        "method": plan.method.name,
        "recipe": plan.recipe.text,
        "inputs": [_input(plan, checkpoint, outcome.input_hashes) for checkpoint in plan.checkpoints],
        "stages": [_stage(stage, outcome.input_hashes) for stage in plan.stages],
        "names": renamings(plan),
        "outputs": files,
        "run": {
            "device": outcome.device,
            "threads": outcome.threads,
            "memory_bytes": outcome.memory_bytes,
            "direct_io": outcome.direct,
            "read_bytes": plan.read_bytes,
            "write_bytes": plan.write_bytes,
            "resumed_bytes": outcome.resumed_bytes,
            "seconds": {key: round(value, 3) for key, value in outcome.seconds.items()},
        },
        "notes": list(plan.notes),
        "tensors": {
            output.entry.name: _tensor(output, tally, names)
            for output, tally in zip(plan.outputs, outcome.tallies, strict=True)
        },
    }


def _input(plan: Plan, checkpoint: Checkpoint, hashes: dict[str, str]) -> dict[str, Any]:
    said: dict[str, Any] = {
        "reference": checkpoint.reference,
        "revision": checkpoint.revision,
        "role": role(plan, checkpoint),
        "parameters": checkpoint.parameters,
    }
    if checkpoint.is_stage:
        return {**said, "stage": checkpoint.reference, "files": {}}
    read = [file for file in checkpoint.files if str(file.path) in hashes]  # not those of a stage under an adapter
    files = {file.path: {"bytes": file.size, "xxh3_128": hashes[str(file.path)]} for file in read}
    said["files"] = {_relative(path, checkpoint.folder): entry for path, entry in files.items()}
    earlier = origin(checkpoint, hashes)
    return said if earlier is None else {**said, "origin": earlier}


def _relative(path: Path, folder: Path) -> str:
    """Its name, below the model's folder where it lies there: an adapter's does not."""
    if path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    return f"{path.parent.name}/{path.name}"


def _stage(plan: Plan, hashes: dict[str, str]) -> dict[str, Any]:
    return {
        "name": plan.recipe.name,
        "method": plan.method.name,
        "recipe": plan.recipe.document.text,
        "fingerprint": plan.fingerprint,
        "inputs": [_input(plan, checkpoint, hashes) for checkpoint in plan.checkpoints],
        "names": renamings(plan),
        "groups": [asdict(group) for group in groups(plan)],
        "notes": list(plan.notes),
    }


def _tensor(output: Output, tally: Tally, names: dict[Path, str]) -> dict[str, Any]:
    said: dict[str, Any] = {"action": output.action, "via": output.via}
    if output.job is not None:
        said["parameters"] = applied(output, output.owners)
    if output.base is not None and tally.delta_squares:
        said["delta_norms"] = [_norm(square) for square in tally.delta_squares]
    if any(tensor.name != output.entry.name for tensor in output.inputs):  # another layout, or layers stacked anew
        said["from"] = [f"{names[tensor.file]}: {tensor.name}" for tensor in output.inputs]
    if any(tally.nonfinite):
        said["nonfinite"] = tally.nonfinite
    return said


def _norm(square: float) -> float | None:
    """Six digits of the norm; None for NaN and infinity, which JSON cannot say."""
    return float(f"{math.sqrt(square):.6g}") if math.isfinite(square) else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("numpy", "numba", "torch", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def report_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, name: str, said: dict[str, Any]) -> bytes:
    """README.md of the merged checkpoint; said: its report."""
    # a card is read elsewhere: local paths mean nothing there
    merges = (*plan.stages, plan)
    inputs = [at for each in merges for c in each.checkpoints for at in (c.base, c) if at]
    hub = dict.fromkeys(checkpoint.reference for checkpoint in inputs if checkpoint.revision)
    front = ["---"]
    if plan.config is not None:
        front.append(f"library_name: {'diffusers' if of_diffusers(plan.config) else 'transformers'}")
    front += ["base_model:", *(f"- {reference}" for reference in hub)] if hub else []
    front += [
        "base_model_relation: merge",
        "tags:",
        "- merge",
        "- ggez-merge",
        *dict.fromkeys(f"- {each.method.name}" for each in reversed(merges)),
        "---",
    ]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", plan.recipe.text)), default=0))
    table = [_row(c.label, role(plan, c), f"{c.parameters:,}", readable_bytes(c.nbytes)) for c in plan.checkpoints]
    text = [
        *front,
        "",
        f"# {name}",
        "",
        f"Merged from {len(plan.checkpoints)} checkpoints by {METHOD_NAMES[plan.method.name]} with "
        f"ggez-merge {__version__}.",
        "",
        "| input | role | parameters | size |",
        "|---|---|---|---|",
        *table,
        "",
        *(["## Where it comes from", "", *tree(said, METHOD_NAMES), ""] if has_lineage(said) else []),
        "## What was merged how",
        "",
        *(line for stage in plan.stages for line in _how(stage, f"### The stage {stage.recipe.name}")),
        *_how(plan, "### The whole" if plan.stages else None),
        "## Recipe",
        "",
        f"{fence}yaml",
        plan.recipe.text.rstrip(),
        fence,
        "",
        "Hashes of all inputs and outputs, and what was applied to every tensor, are in `merge_report.json`; "
        "`ggez-merge verify` checks this folder against it.",
        "",
    ]
    return "\n".join(text).encode()


def _how(plan: Plan, heading: str | None) -> list[str]:
    """What was done to which tensors, as a table."""
    rows = [
        _row(printable(group.component), group.via, group.parameters, group.n_tensors, f"{group.n_elements:,}")
        for group in groups(plan)
    ]
    return [
        *([heading, "", f"By {METHOD_NAMES[plan.method.name]}.", ""] if heading else []),
        "| component | reached by | parameters | tensors | elements |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *([f"- {note}" for note in plan.notes] + [""] if plan.notes else []),
    ]


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
