"""A merge from plan to finished folder."""

from __future__ import annotations

from typing import Any

from xxhash import xxh3_128

from ggez_merge.backend import Device, choose
from ggez_merge.carry import content
from ggez_merge.errors import Failed, Interrupted, Refused
from ggez_merge.plan import Plan, make_plan
from ggez_merge.provenance import model_card, report, report_bytes
from ggez_merge.run import Outcome, Progress, Sizing, Stop, run, sizing
from ggez_merge.shards import indexes
from ggez_merge.write import REPORT, Staging, check_output, finished_before, stage, tidy

DEFAULT_MEMORY_BYTES = 192 << 20


def device_for(plan: Plan, wanted: str) -> Device:
    """The device for a plan: `auto`, `cpu`, `cuda` (all GPUs) or `cuda:1`. Refused if it is not there."""
    outputs = [output for each in (*plan.stages, plan) for output in each.outputs]
    doubles = any(tensor.dtype == "F64" for output in outputs for tensor in output.inputs)
    doubles = doubles or any(output.entry.dtype == "F64" for output in outputs)
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
    `device` is what `device_for` answers, by default for "auto". Stages with an output of their own are merged before,
    under the same options, and then read from there. Returns None if `resume` finds the very same merge already
    finished. Raises Refused (an output in the way, bad weights), Failed or Interrupted; after the last two the work
    done so far stays beside the output and `resume` takes it up.
    """
    stop = stop or Stop()

    def carry_out(plan: Plan) -> Outcome | None:
        on = device or device_for(plan, "auto")
        if resume and finished_before(plan.folder, plan.fingerprint):
            tidy(plan.folder)
            return None
        size = sizing(plan, threads, memory_bytes, on)
        staging = stage(plan.folder, plan.fingerprint, resume=resume, overwrite=overwrite)
        return _merge(plan, staging, on, size, memory_bytes, copy_code, progress, stop)

    written: list[str | None] = []
    for each in (*plan.written, plan) if plan.written and not resume else ():  # before anything is merged
        check_output(each.folder, resume=resume, overwrite=overwrite)
    for each in plan.written:
        carry_out(make_plan(each.recipe, each.folder, written))
        written.append(each.recipe.name)
    return carry_out(make_plan(plan.recipe, plan.folder, written) if written else plan)


def _merge(
    plan: Plan,
    staging: Staging,
    device: Device,
    size: Sizing,
    memory_bytes: int,
    copy_code: bool,
    progress: Progress,
    stop: Stop,
) -> Outcome:
    try:
        outcome = run(plan, staging, device, size, memory_bytes, progress, stop)
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

    for name, text in plan.texts(copy_code).items():
        put(name, content(text))
    n_elements = [output.models[0].numel for output in plan.outputs]
    for name, index in indexes(plan.shards, plan.entries, n_elements).items():
        put(name, index.encode())
    said = report(plan, outcome, files)
    staging.write_file("README.md", model_card(plan, plan.folder.name, said))
    staging.write_file(REPORT, report_bytes(said))
