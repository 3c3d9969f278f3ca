"""What `--dry-run` answers: everything a merge will do, from headers alone."""

from __future__ import annotations

from typing import Any

from ggez_merge.backend import Device
from ggez_merge.carry import carried_files
from ggez_merge.components import unrecognised
from ggez_merge.plan import Plan, free_bytes
from ggez_merge.provenance import role
from ggez_merge.run import HASH_BUFFER_BYTES, Sizing
from ggez_merge.summary import groups, renamings
from ggez_merge.units import readable_bytes
from ggez_merge.untrusted import printable

PROGRAM_BYTES = 150_000_000  # Python, numpy and the compiled kernels, as measured; buffers come on top


def describe(plan: Plan, device: Device, size: Sizing, copy_code: bool) -> dict[str, Any]:
    """The plan as plain data (bytes and counts as numbers), the content of `--dry-run --json`."""
    unknown = unrecognised(entry.name for entry in plan.entries)
    return {
        "method": plan.method.name,
        "output": str(plan.folder),
        "inputs": _inputs(plan),
        "stages": [
            {
                "name": stage.recipe.name,
                "method": stage.method.name,
                "written": str(stage.folder) if stage.recipe.output.path else None,
                "inputs": _inputs(stage),
                "names": renamings(stage),
                "groups": _groups(stage),
                "notes": list(stage.notes),
            }
            for stage in plan.stages
        ],
        "names": renamings(plan),
        "groups": _groups(plan),
        "copied": [
            {"tensor": output.entry.name, "why": output.via} for output in plan.outputs if output.action != "merge"
        ],
        "dtypes": sorted({output.entry.dtype for output in plan.outputs}),
        "shards": [{"file": shard.name, "bytes": shard.size} for shard in plan.shards],
        "files_carried": list(carried_files(plan.layout, copy_code, plan.tokenizer)),
        "read_bytes": plan.read_bytes,
        "measure_bytes": sum(each.measure_bytes for each in (*plan.stages, plan)),
        "write_bytes": plan.write_bytes,
        "peak_memory_bytes": size.threads * (size.arena_bytes + size.chunk_bytes) + HASH_BUFFER_BYTES + PROGRAM_BYTES,
        "device": {"name": device.name, "why": device.why},
        "threads": size.threads,
        "block_bytes": size.block_bytes,
        "free_bytes": free_bytes(plan.folder),
        "notes": [*plan.notes, *([unknown] if unknown else [])],
    }


def _inputs(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "reference": checkpoint.reference,
            "role": role(plan, checkpoint),
            "stage": checkpoint.is_stage,
            "parameters": checkpoint.parameters,
            "bytes": checkpoint.nbytes,
            "dtypes": sorted({tensor.nominal or tensor.dtype for tensor in checkpoint.stored.values()}),
            "shards": len(checkpoint.files),
        }
        for checkpoint in plan.checkpoints
    ]


def _groups(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "component": group.component,
            "via": group.via,
            "parameters": group.parameters,
            "tensors": group.n_tensors,
            "elements": group.n_elements,
            "bytes": group.n_bytes,
        }
        for group in groups(plan)
    ]


def show(said: dict[str, Any]) -> None:
    """Print `describe`'s answer for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def tables(merge: dict[str, Any]) -> None:
        inputs = Table("", "input", "parameters", "size", "dtype", "shards", box=box.SIMPLE_HEAD)
        for entry in merge["inputs"]:
            inputs.add_row(
                entry["role"],
                Text(entry["reference"]),
                f"{entry['parameters']:,}",
                readable_bytes(entry["bytes"]),
                " ".join(entry["dtypes"]),
                "a stage" if entry["stage"] else str(entry["shards"]),
            )
        console.print(inputs)
        for renaming in merge["names"]:
            console.print(Text(f"names of {renaming['input']} in the base's layout:"), soft_wrap=True)
            for rule in renaming["rules"]:
                console.print(Text(f"    {rule['said']}"), soft_wrap=True)
        table = Table("component", "reached by", "parameters", "tensors", "elements", "size", box=box.SIMPLE_HEAD)
        for group in merge["groups"]:
            table.add_row(
                Text(printable(group["component"])),
                Text(group["via"]),
                Text(group["parameters"]),
                f"{group['tensors']:,}",
                f"{group['elements']:,}",
                readable_bytes(group["bytes"]),
            )
        console.print(table)

    for stage in said["stages"]:
        where = f"→ {stage['written']}" if stage["written"] else "(a stage: not written)"
        console.print(Text.assemble((stage["method"], "bold"), f" → {stage['name']} {where}"))
        tables(stage)
    console.print(Text.assemble((said["method"], "bold"), " → ", said["output"]))
    tables(said)
    shards = said["shards"]
    names = shards[0]["file"] if len(shards) == 1 else f"{shards[0]['file']} … ({len(shards)} shards)"
    measuring = f", after {readable_bytes(said['measure_bytes'])} for measuring" if said["measure_bytes"] else ""
    lines = [
        ("writes", f"{readable_bytes(said['write_bytes'])} as {' '.join(said['dtypes'])}: {names}"),
        ("reads", readable_bytes(said["read_bytes"]) + measuring),
        ("carries", ", ".join(said["files_carried"]) or "no files besides the weights"),
        ("device", f"{said['device']['name']}: {said['device']['why']}"),
        ("memory", f"{readable_bytes(said['peak_memory_bytes'])} at most, {said['threads']} threads"),
        ("free disk", readable_bytes(said["free_bytes"])),
        *(("note", f"{stage['name']}: {note}") for stage in said["stages"] for note in stage["notes"]),
        *(("note", note) for note in said["notes"]),
    ]
    for label, text in lines:
        console.print(Text.assemble((f"{label:>10}  ", "dim"), text))
