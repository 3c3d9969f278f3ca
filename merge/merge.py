"""A merge from plan to finished folder."""

from __future__ import annotations

from typing import Any

from xxhash import xxh3_128

from ggez_merge.backend import Device, choose
from ggez_merge.carry import carried_files, config_bytes, content, updated_config
from ggez_merge.errors import Failed, Interrupted, Refused
from ggez_merge.plan import Plan
from ggez_merge.provenance import model_card, report, report_bytes
from ggez_merge.run import Outcome, Progress, Stop, run, sizing
from ggez_merge.shards import index_json
from ggez_merge.write import REPORT, Staging, finished_before, stage, tidy

DEFAULT_MEMORY_BYTES = 192 << 20


def device_for(plan: Plan, wanted: str) -> Device:
    """The device for a plan: `auto`, `cpu`, `cuda` (all GPUs) or `cuda:1`. Refused if it is not there."""
    doubles = any(tensor.dtype == "F64" for output in plan.outputs for tensor in output.inputs)
    doubles = doubles or any(output.entry.dtype == "F64" for output in plan.outputs)
    return choose(wanted, method=plan.method.name, measures=plan.measure_bytes > 0, doubles=doubles)


def merge(
    plan: Plan,
    *,
    device: Device | None = None,
    threads: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    copy_code: bool = False,
    progress: Progress,
    stop: Stop | None = None,
) -> Outcome | None:
    """Carry out a plan: the output folder appears complete, or not at all.

    memory_bytes bounds all buffers, whatever the size of the tensors; a device is given as much of its own memory.
    `device` is what `device_for` answers, by default for "auto". Returns None if `resume` finds the very same
    merge already finished. Raises Refused (an output in the way, bad weights), Failed or Interrupted; after the
    last two the work done so far stays beside the output and `resume` takes it up.
    """
    if resume and finished_before(plan.folder, plan.fingerprint):
        tidy(plan.folder)
        return None
    device = device or device_for(plan, "auto")
    size = sizing(plan, threads, memory_bytes, device)
    staging = stage(plan.folder, plan.fingerprint, resume=resume, overwrite=overwrite)
    try:
        outcome = run(plan, staging, device, size, memory_bytes, progress, stop or Stop())
        _write_files(plan, outcome, staging, copy_code)
        staging.commit()
    except Refused:
        staging.discard()
        raise
    except (Failed, Interrupted) as error:
        staging.close()
        error.args = (f"{error}\nWhat is done so far is kept in {staging.partial}: continue with --resume.",)
        raise
    except BaseException:
        staging.close()
        raise
    return outcome


def _write_files(plan: Plan, outcome: Outcome, staging: Staging, copy_code: bool) -> None:
    files: dict[str, dict[str, Any]] = {
        shard.name: {"bytes": shard.size, "xxh3_128": outcome.output_hashes[shard.name]} for shard in plan.shards
    }

    def put(name: str, raw: bytes) -> None:
        staging.write_file(name, raw)
        files[name] = {"bytes": len(raw), "xxh3_128": xxh3_128(raw).hexdigest()}

    for name, path in carried_files(plan.layout, copy_code, plan.tokenizer).items():
        if name != "config.json":
            put(name, plan.files[name] if name in plan.files else content(path))
    if plan.config is not None:
        put("config.json", config_bytes(updated_config(plan.config, plan.entries)))
    if plan.recipe.chat_template not in (None, "auto"):
        put("chat_template.jinja", str(plan.recipe.chat_template).encode())
    if len(plan.shards) > 1:
        elements = sum(output.models[0].numel for output in plan.outputs)
        name = plan.shards[0].name.split("-00001-of-")[0] + ".safetensors.index.json"
        put(name, index_json(plan.shards, plan.entries, elements).encode())
    staging.write_file("README.md", model_card(plan, plan.folder.name))
    staging.write_file(REPORT, report_bytes(report(plan, outcome, files)))
