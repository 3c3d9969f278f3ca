"""Sweeps end to end on the shipped pair: in memory as through the disk, resumed as uninterrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from merging import COMMAND, command_line
from sweeping import EMOJI, write_sweep

from ggez_merge.errors import Failed, Refused
from ggez_merge.evaluate import evaluate, rows_of
from ggez_merge.evaluate.model import load_model
from ggez_merge.evaluate.tasks import evaluation_of
from ggez_merge.merge import merge
from ggez_merge.progress import Silent
from ggez_merge.recipe import load_recipe
from ggez_merge.sweep.bench import Bench, NoBench
from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.models import plan_of
from ggez_merge.sweep.results import Results
from ggez_merge.sweep.run import RESULTS, run_sweep
from ggez_merge.sweep.space import candidates, read_space

METHODS = {
    "linear": "",
    "per component": "components: {vision_tower: {ratio: 0.2}}",
    "float16": "dtype: float16",
}
OTHER = {
    "ties": ("merge_method: ties\nparameters: {weight: 1, density: 0.5}", "{density: [0.2, 0.9]}"),
    "task arithmetic": ("merge_method: task_arithmetic\nparameters: {weight: 0.5}", "{weight: [0, 0.4, 1.5]}"),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", [*METHODS, *OTHER])
def test_in_place_is_what_a_merge_writes_and_transformers_loads(case: str, recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text() + METHODS.get(case, "")
    if case in OTHER:
        method, sweep = OTHER[case]
        text = text.replace("merge_method: linear", method).replace("parameters: {ratio: 0.5}\n", "")
        text = text.replace("{ratio: [0, 0.3, 0.6, 1]}", sweep)
    recipe.write_text(text)
    loaded = load_recipe(recipe)
    tasks = evaluation_of(loaded).tasks
    rows = {task.name: rows_of(task) for task in tasks}
    every = candidates(read_space(loaded))
    first = plan_of(loaded, every[1], tmp_path / "0")
    bench = Bench(load_model(first.layout.folder), first)
    for number, candidate in enumerate(every):
        plan = plan_of(loaded, candidate, tmp_path / f"candidate {number}")
        bench.write(plan)
        merge(plan, progress=Silent())
        written = load_model(plan.folder)
        theirs = written.model.state_dict()
        for name, ours in bench.live.model.state_dict().items():
            assert torch.equal(ours.view(-1).view(torch.uint8), theirs[name].to(ours.dtype).view(-1).view(torch.uint8))
        if case != "float16":  # there the model in memory computes in float32
            for task in tasks:
                one, other = (evaluate(task, live, rows=rows[task.name]) for live in (bench.live, written))
                assert one == other


def test_inputs_are_held_once_however_many_candidates(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ['sweep.ratio="0:1:0.05"'])
    every = candidates(read_space(loaded))
    plans = [plan_of(loaded, candidate, tmp_path / "out") for candidate in every]
    bench = Bench(load_model(plans[0].layout.folder), plans[0])
    for plan in plans:
        bench.write(plan)
    files = {file.path: file.size for plan in plans for file in plan.weight_files}
    assert len(every) == 21 and len(files) == 2
    assert bench.held_bytes <= sum(files.values())


def test_equal_weights_have_one_hash_and_others_another(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    every = [*candidates(read_space(loaded)), Candidate(role="base", model=str(EMOJI / "global"))]
    every += [Candidate(role="regional", model=str(EMOJI / "region"))]
    plans = [plan_of(loaded, candidate, tmp_path / "out") for candidate in every]
    bench = Bench(load_model(plans[0].layout.folder), plans[0])
    base, *middle, region, again, last = [bench.write(plan) for plan in plans]
    assert base == again and len({base, *middle, region}) == len(middle) + 2
    assert last != base  # the batch counters are its own, for nothing is merged there


def test_a_model_that_is_not_the_file_is_no_bench(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    plan = plan_of(loaded, candidates(read_space(loaded))[1], tmp_path / "out")
    live = load_model(plan.layout.folder)
    with torch.no_grad():
        next(iter(live.model.parameters())).view(-1)[0] += 1
    with pytest.raises(NoBench, match="not in memory as in the file"):
        Bench(live, plan)


def test_through_the_disk_the_scores_are_the_same(tmp_path: Path) -> None:
    chain = write_sweep(tmp_path / "chain", "{ratio: [0.3]}")
    first = f"name: soup\nmerge_method: linear\nbuffers: base\nmodels: [{{model: {EMOJI / 'region'}}}]\n"
    first = first.replace("linear", "passthrough")
    text = chain.read_text().replace(f"models: [{{model: {EMOJI / 'region'}}}]", "models: [{model: soup}]")
    chain.write_text(first + "---" + text)
    told: list[str] = []
    through = run_sweep(load_recipe(chain), tmp_path / "through", told.append)
    assert any("through the disk: the recipe has stages" in line for line in told)
    direct = run_sweep(load_recipe(write_sweep(tmp_path / "direct", "{ratio: [0.3]}")), tmp_path / "in place")
    ours, theirs = ({str(point.candidate): point.summary for point in swept.points} for swept in (direct, through))
    assert ours["ratio 0.3"] == theirs["ratio 0.3"]


def test_what_is_known_is_not_measured_again(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    first = run_sweep(loaded, tmp_path / "sweep")
    assert (first.measured, first.reused) == (8, 0) and len(lines(tmp_path / "sweep")) == 8
    again = run_sweep(loaded, tmp_path / "sweep")
    assert (again.measured, again.reused) == (0, 8) and again.points == first.points
    finer = run_sweep(load_recipe(recipe, ["sweep.ratio=[0, 0.3, 0.45, 0.6, 1]"]), tmp_path / "sweep")
    assert (finer.measured, finer.reused) == (2, 8)
    first_row = (tmp_path / "names.jsonl").read_text().splitlines()[0]
    with (tmp_path / "names.jsonl").open("a") as file:  # other data, other results
        file.write(first_row.replace('"codepoints": "', '"codepoints": "x') + "\n")
    assert run_sweep(loaded, tmp_path / "sweep").measured == 8


def test_equal_weights_are_measured_once(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["sweep.ratio=[0.3]"])
    run_sweep(loaded, tmp_path / "sweep")
    same = load_recipe(recipe, ["sweep={weight: [0.3]}", "merge_method=task_arithmetic", "parameters={weight: 0.3}"])
    swept = run_sweep(same, tmp_path / "sweep")
    assert swept.measured <= 2  # the regional model as it is, whose batch counters are its own


def test_a_line_that_was_cut_off_is_measured_again(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    first = run_sweep(loaded, tmp_path / "sweep")
    path = tmp_path / "sweep" / RESULTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = run_sweep(loaded, tmp_path / "sweep")
    assert again.measured == 1 and again.points == first.points
    path.write_bytes(whole + b'{"plan": 3}\n')
    with pytest.raises(Failed, match=r"jsonl:9: this is not a result"):
        Results(path)


@pytest.mark.parametrize("n_lines", [1, 6])
def test_killed_and_called_again_nothing_is_measured_twice(n_lines: int, recipe: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, "sweep", recipe], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    results = tmp_path / "merged.sweep" / RESULTS
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if results.exists() and results.read_bytes().count(b"\n") >= n_lines:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "merged").exists() or n_lines > 6
    before = lines(tmp_path / "merged.sweep") if results.read_bytes().endswith(b"\n") else []
    done = command_line("sweep", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = lines(tmp_path / "merged.sweep")
    assert after[: len(before)] == before and len(after) == 8
    assert max(Counter((line["plan"], line["task"]) for line in after).values()) == 1
    assert command_line("verify", "merged", cwd=tmp_path).returncode == 0


def test_the_chosen_candidate_is_what_a_merge_of_it_writes(recipe: Path, tmp_path: Path) -> None:
    done = command_line("sweep", recipe, "--set", "select.retention=95", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "chosen by max_regional: ratio 0.3" in done.stdout
    command_line(recipe, "--set", "parameters.ratio=0.3", "--out", "other", cwd=tmp_path)
    assert (tmp_path / "other/model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()
    assert (tmp_path / "merged.sweep/sweep.csv").read_text().startswith("ratio,")
    again = command_line("sweep", recipe, "--set", "select.retention=95", cwd=tmp_path)
    assert again.returncode == 0 and "0 results measured, 8 known" in again.stderr
    other = command_line("sweep", recipe, "--set", "select.retention=90", cwd=tmp_path)
    assert other.returncode == 2 and "--overwrite" in other.stderr
    other = command_line("sweep", recipe, "--set", "select.retention=90", "--overwrite", cwd=tmp_path)
    assert other.returncode == 0 and "ratio 0.6" in other.stdout


@pytest.mark.parametrize(("keep", "written"), [("none", 0), ("pareto", 2), ("all", 2)])
def test_what_is_kept(keep: str, written: int, recipe: Path, tmp_path: Path) -> None:
    done = command_line("sweep", recipe, "--keep", keep, "--set", "select.retention=90", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    others = tmp_path / "merged.sweep/checkpoints"
    found = [tmp_path / "merged"] * (tmp_path / "merged").exists() + sorted(others.glob("*") if others.exists() else ())
    assert len(found) == written
    assert all((folder / "model.safetensors").exists() for folder in found)


def test_where_nothing_satisfies_the_rule_nothing_is_written(recipe: Path, tmp_path: Path) -> None:
    done = command_line("sweep", recipe, "--set", "select.gain=500", cwd=tmp_path)
    assert done.returncode == 3 and "500" in done.stderr
    assert not (tmp_path / "merged").exists() and len(lines(tmp_path / "merged.sweep")) == 8


def test_a_program_of_ones_own_is_given_every_candidate(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(
        "import json, sys\n"
        "from safetensors.numpy import load_file\n"
        "scale = float(abs(load_file(sys.argv[1] + '/model.safetensors')['logit_scale']))\n"
        "json.dump({'s': scale}, open(sys.argv[2] + '/r.json', 'w'))\n"
    )
    command = f"{sys.executable} {tmp_path}/score.py {{model}} {{out}}"
    own = f"{{name: scale, tag: global, command: '{command}', scale: 100, read: {{file: r.json, metric: s}}}}"
    recipe = write_sweep(tmp_path, rest=f"  - {own}")
    swept = run_sweep(load_recipe(recipe), tmp_path / "sweep")
    assert swept.measured == 12 and not (tmp_path / "sweep/candidate").exists()
    values = [next(b.score for b in each.benchmarks if b.name == "scale") for each in swept.table.scored]
    assert len(set(values)) == 4


def test_everything_wrong_is_refused_before_anything_is_measured(recipe: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(Refused):
        run_sweep(load_recipe(recipe), tmp_path / "sweep")
    assert not (tmp_path / "sweep" / RESULTS).exists()
