"""How a base and an adapter are named, which base an adapter without one belongs to, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import pair, write_adapter
from checkpoints import write_checkpoint
from merging import BF16, carry_out, command_line, merged, plan_of, refusals, tensors

from ggez_merge.errors import Refused
from ggez_merge.opening import open_model
from ggez_merge.recipe import parse_recipe
from ggez_merge.reference import ModelReference, parse_reference

Q = "model.layers.0.self_attn.q_proj"
RECIPE = "{merge_method: linear, base_model: base, models: [{model: MODEL}], parameters: {ratio: 1}}"


def models(folder: Path) -> None:
    """Two bases, and two adapters, of which one names its base."""
    for seed, name in enumerate(("base", "other", "with+plus", "with@at")):
        random = np.random.default_rng(seed)
        arrays = {f"{Q}.weight": random.normal(size=(6, 4)).astype(BF16), "norm.weight": np.ones(4, BF16)}
        write_checkpoint(folder / name, arrays, config={"model_type": "llama"})
    write_adapter(folder / "sea", pair(Q, 6, 4))
    write_adapter(folder / "sea+lora", pair(Q, 6, 4))
    write_adapter(folder / "latam", pair(Q, 6, 4, seed=1), base_model_name_or_path="other")


def with_delta(folder: Path, base: str, *seeds: int) -> bytes:
    weight = np.frombuffer(tensors(folder / base)[f"{Q}.weight"][1], BF16).astype("f8").reshape(6, 4)
    for seed in seeds:
        a, b = pair(Q, 6, 4, seed=seed).values()
        weight = weight + b.astype("f8") @ a.astype("f8")
    return weight.astype("f4").astype(BF16).tobytes()


NAMES = {
    "base+sea": ("base", 0),
    "base+./sea": ("base", 0),
    "./base+latam": ("base", 1),
    "with+plus+sea": ("with+plus", 0),
    "base+sea+lora": ("base", 0),
    "with+plus+sea+lora": ("with+plus", 0),
    "with@at+sea": ("with@at", 0),
    "with@at": ("with@at",),
    "with+plus": ("with+plus",),
    "sea": ("base", 0),
    "{adapter: ./sea}": ("base", 0),
    "{adapter: latam}": ("base", 1),
    "{adapter: {path: sea}}": ("base", 0),
    "{model: other, adapter: sea}": ("other", 0),
    "{model: {path: other}, lora: {path: sea}}": ("other", 0),
    "{model: other, lora: sea}": ("other", 0),
    "{model: other}": ("other",),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_name_a_model(name: str, tmp_path: Path) -> None:
    models(tmp_path)
    found = merged(tmp_path, RECIPE.replace("MODEL", name))[f"{Q}.weight"]
    assert found == ("BF16", with_delta(tmp_path, *NAMES[name]))  # type: ignore[arg-type]


def test_adapters_are_stacked_where_the_base_has_one(tmp_path: Path) -> None:
    models(tmp_path)
    recipe = RECIPE.replace("base_model: base", "base_model: base+latam").replace("MODEL", "{adapter: sea}")
    plan = plan_of(tmp_path, recipe)
    assert [checkpoint.reference for checkpoint in plan.checkpoints] == ["base+latam", "base+latam+sea"]
    found = merged(tmp_path, recipe)[f"{Q}.weight"][1]
    both = np.frombuffer(with_delta(tmp_path, "base", 1, 0), BF16).astype("f4")
    assert np.abs(np.frombuffer(found, BF16).astype("f4") - both).max() <= np.abs(both).max() * 2**-8


def test_without_a_base_model_the_adapter_names_its_own(tmp_path: Path) -> None:
    models(tmp_path)
    recipe = "{merge_method: passthrough, models: [{model: {adapter: latam}}]}"
    assert merged(tmp_path, recipe)[f"{Q}.weight"][1] == with_delta(tmp_path, "other", 1)
    (problem,) = refusals(tmp_path, recipe.replace("latam", "sea"))
    assert "does not say what its base is" in problem.what and "BASE+sea" in (problem.remedy or "")
    for named in ("gone", "latam", "../sea"):
        write_adapter(tmp_path / "latam", pair(Q, 6, 4), base_model_name_or_path=named)
        (problem,) = refusals(tmp_path, recipe)
        assert "cannot be opened" in problem.what and "BASE+latam" in (problem.remedy or "")


@pytest.mark.parametrize(
    "name, path, revision, adapter",
    [
        ("a/b", "a/b", None, None),
        ("a/b@v1", "a/b", "v1", None),
        ("a/b+c/d", "a/b", None, ModelReference("c/d")),
        ("a/b@v1+c/d@v2", "a/b", "v1", ModelReference("c/d", "v2")),
        ("gone+./gone", "gone", None, ModelReference("./gone")),
    ],
)
def test_text_that_names_a_model(name: str, path: str, revision: str | None, adapter: ModelReference | None) -> None:
    reference = ModelReference(path, revision, adapter)
    assert parse_reference(name) == reference and str(reference) == name
    recipe = parse_recipe(f"{{merge_method: linear, base_model: {name}, models: [{{model: x/y}}]}}")
    assert recipe.base_model == reference


def test_an_adapter_reads_as_its_own_name() -> None:
    assert str(ModelReference("", None, ModelReference("./sea"))) == "./sea"


def test_a_folder_with_a_model_and_an_adapters_config_is_the_model(tmp_path: Path) -> None:
    models(tmp_path)
    (tmp_path / "base/adapter_config.json").write_text((tmp_path / "sea/adapter_config.json").read_text())
    assert open_model(ModelReference(str(tmp_path / "base"))).base is None
    with pytest.raises(Refused, match="weights are not there"):
        open_model(ModelReference(str(tmp_path / "base"), None, ModelReference(str(tmp_path / "base"))))


def test_the_report_says_whose_each_tensor_is(tmp_path: Path) -> None:
    models(tmp_path)
    recipe = """
merge_method: task_arithmetic
base_model: base
models: [{model: base+sea, parameters: {weight: 0.5}}, {model: {adapter: latam}, parameters: {weight: 0.25}}]
"""
    plan = plan_of(tmp_path, recipe)
    carry_out(plan)
    said = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert [entry["reference"] for entry in said["inputs"]] == ["base", "base+sea", "base+latam"]
    assert [sorted(entry["files"]) for entry in said["inputs"]][1] == [
        "model.safetensors",
        "sea/adapter_model.safetensors",
    ]
    for name in ("norm.weight", f"{Q}.weight"):
        parameters = said["tensors"][name]["parameters"]
        assert parameters["base+sea"] == {"weight": 0.5} and parameters["base+latam"] == {"weight": 0.25}
        assert "from" not in said["tensors"][name]
    assert "| base+sea | model |" in (tmp_path / "out/README.md").read_text()
    assert command_line("verify", "out", cwd=tmp_path).returncode == 0
    assert plan.fingerprint == plan_of(tmp_path, recipe).fingerprint
    config = json.loads((tmp_path / "sea/adapter_config.json").read_text())
    (tmp_path / "sea/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    assert plan.fingerprint != plan_of(tmp_path, recipe).fingerprint


def test_inspect_and_diff_show_the_model_and_not_the_adapter(tmp_path: Path) -> None:
    models(tmp_path)
    shown = json.loads(command_line("inspect", "base+sea", "--json", "--tensors", cwd=tmp_path).stdout)
    assert {tensor["dtype"] for tensor in shown["tensors"]} == {"BF16"} and shown["parameters"] == 28
    assert shown["size"]["n_bytes"] == 56
    found = json.loads(command_line("diff", "base", "latam", "--json", cwd=tmp_path).stdout)
    assert found["b"] == "other+latam"
    found = json.loads(command_line("diff", "base", "base+sea", "--json", cwd=tmp_path).stdout)
    assert [part["changed_elements"] for part in found["components"]] == [24]


def test_tokenizer_files_of_the_adapter_come_with_it(tmp_path: Path) -> None:
    models(tmp_path)
    (tmp_path / "base/tokenizer.json").write_text('{"of": "base"}')
    (tmp_path / "base/generation_config.json").write_text("{}")
    (tmp_path / "sea/tokenizer.json").write_text('{"of": "sea"}')
    carry_out(plan_of(tmp_path, "{merge_method: passthrough, models: [{model: base+sea}]}"))
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"of": "sea"}'
    assert (tmp_path / "out/generation_config.json").exists() and (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out/adapter_config.json").exists()
    plan = plan_of(tmp_path, RECIPE.replace("MODEL", "base+sea"), "next")
    assert any("other tokenizer files" in note for note in plan.notes)
    carry_out(plan)
    assert (tmp_path / "next/tokenizer.json").read_text() == '{"of": "base"}'
    plan = plan_of(tmp_path, RECIPE.replace("MODEL", "base+latam"), "last")
    assert not plan.notes


def test_an_adapter_on_a_merge_that_is_read_and_on_one_that_is_a_stage(tmp_path: Path) -> None:
    models(tmp_path)
    first = "{NAMEmerge_method: linear, base_model: base, models: [{model: other}], parameters: {ratio: 0.5}}"
    second = RECIPE.replace("MODEL", "first+sea").replace("ratio: 1", "ratio: 0.5")
    carry_out(plan_of(tmp_path, first.replace("NAME", ""), "first"))
    carry_out(plan_of(tmp_path, second, "through disk"))
    (tmp_path / "first").rename(tmp_path / "gone")
    carry_out(plan_of(tmp_path, first.replace("NAME", "name: first, ") + "\n---\n" + second, "at once"))
    assert tensors(tmp_path / "at once") == tensors(tmp_path / "through disk")
    report = json.loads((tmp_path / "through disk/merge_report.json").read_text())
    assert report["inputs"][1]["origin"]["unchanged"] is True


def test_an_output_that_would_replace_an_adapter_is_refused(tmp_path: Path) -> None:
    models(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "sea").rename(tmp_path / "out/sea")
    problems = refusals(tmp_path, RECIPE.replace("MODEL", "base+out/sea"))
    assert any("holds) an input" in problem.what and "out/sea" in str(problem.found) for problem in problems)


def test_an_adapter_is_named_by_its_folder(tmp_path: Path) -> None:
    models(tmp_path)
    (problem,) = refusals(tmp_path, RECIPE.replace("MODEL", "base+sea/adapter_model.safetensors"))
    assert "named by its folder" in problem.what and str(problem.remedy).endswith("sea")


def test_an_adapter_beside_model_says_where_it_belongs(tmp_path: Path) -> None:
    models(tmp_path)
    with pytest.raises(Refused, match=r"model: \{adapter"):
        parse_recipe(RECIPE.replace("{model: MODEL}", "{adapter: sea}"), tmp_path / "recipe.yaml")


def test_an_adapter_as_base_and_as_model_is_one_however_it_is_spelt(tmp_path: Path) -> None:
    models(tmp_path)
    text = (
        "{merge_method: linear, base_model: ./latam, models: [{model: latam}, {model: base}], parameters: {weight: 1}}"
    )
    assert [each.reference for each in plan_of(tmp_path, text).checkpoints] == ["other+./latam", "base"]
