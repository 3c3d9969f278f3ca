"""Every ready recipe merges tiny checkpoints of its architecture, as it is and where its header says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from adapters import pair, write_adapter
from merging import command_line
from models import FAMILIES, llama, randomised, save_tuned

from ggez_merge.components import component
from ggez_merge.errors import Refused
from ggez_merge.plan import Plan, make_plan
from ggez_merge.ready import copy, titles
from ggez_merge.recipe import load_recipe, references

RECIPES = Path(__file__).parents[1] / "recipes"

SDXL = ("sdxl_unet", "sdxl_blocks")


def qwen25_vl_of_28_layers() -> tf.PreTrainedModel:
    config = FAMILIES["qwen2_5_vl"].build().config
    config.text_config.num_hidden_layers = 28
    config.text_config.layer_types = ["full_attention"] * 28
    return tf.Qwen2_5_VLForConditionalGeneration(config)


ARCHITECTURES = {
    "gemma3_27b": FAMILIES["gemma3"].build,
    "siglip2_so400m": FAMILIES["siglip"].build,  # the fixed resolutions of SigLIP 2 are of SigLIP's architecture
    "components": qwen25_vl_of_28_layers,
    "multi_region": FAMILIES["gemma3"].build,
    "chain": FAMILIES["gemma3"].build,
    **dict.fromkeys(("adapter", "linear", "task_arithmetic", "ties", "dare_ties", "slerp", "passthrough"), None),
}


@cache
def model_for(name: str) -> tf.PreTrainedModel:
    return randomised((ARCHITECTURES[name] or (lambda: llama(num_hidden_layers=32)))(), seed=0)


def place(name: str, folder: Path) -> Path:
    """A copy of a recipe, and a tiny checkpoint under each path (or hub id) that it names."""
    recipe = copy(name, folder)
    for seed, reference in enumerate(models_of(name)):
        where = folder / reference
        if name in SDXL:
            from pipelines import sdxl, tuned

            pipeline = tuned(sdxl(), seed)
            (pipeline.unet if where.name == "unet" else pipeline).save_pretrained(where)
        else:
            save_tuned(model_for(name), where, seed=seed, dtype=torch.bfloat16)
    for adapter in adapters_of(name):
        write_adapter(folder / adapter, pair("model.layers.0.self_attn.q_proj", 32, 32))
    return recipe


def models_of(name: str) -> list[str]:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    named = [reference.path for each in (recipe, *recipe.stages) for reference, _ in references(each)]
    return list(dict.fromkeys(path for path in named if path and path not in {stage.name for stage in recipe.stages}))


def adapters_of(name: str) -> list[str]:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    return [reference.adapter.path for reference, _ in references(recipe) if reference.adapter]


def plan_of(name: str, folder: Path) -> Plan:
    return make_plan(load_recipe(place(name, folder)))


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", names())
def test_a_recipe_runs_as_it_is_on_its_architecture(name: str, tmp_path: Path) -> None:
    recipe = place(name, tmp_path)
    dry = command_line(recipe.name, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "do not tell their component" not in dry.stdout
    done = command_line(recipe.name, "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = load_recipe(recipe).output.path
    assert output is not None
    assert command_line("verify", output, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", names())
def test_the_header_says_how_to_get_and_run_it(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert f"#     ggez-merge recipes copy {name}" in lines
    assert any(line.startswith(f"#     ggez-merge {name}.yaml") for line in lines)
    assert max(map(len, lines)) <= 120
    assert len(lines[0]) <= 100
    assert lines[0].endswith(".")


@pytest.mark.parametrize(("name", "ratio"), [("gemma3_27b", 0.10), ("sdxl_unet", 0.25), ("siglip2_so400m", 0.75)])
def test_the_papers_families_have_the_papers_ratios(name: str, ratio: float, tmp_path: Path) -> None:
    plan = plan_of(name, tmp_path)
    assert plan.method.name == "linear"
    assert {output.job.shared["ratio"] for output in plan.outputs if output.job} == {ratio}
    along = [output for output in plan.outputs if output.action != "merge"]
    assert {output.via for output in along} == ({"copied from the base"} if name in SDXL else set())
    assert {component(output.entry.name) for output in along}.isdisjoint({"unet"})


def test_the_example_of_components_reaches_what_its_comments_say(tmp_path: Path) -> None:
    plan = plan_of("components", tmp_path)
    ratios = {output.entry.name: output.job.shared["ratio"] for output in plan.outputs if output.job}
    expected = {
        "model.norm.weight": 0,
        "model.layers.3.input_layernorm.weight": 0,
        "visual.blocks.0.norm1.weight": 0,
        "visual.blocks.0.attn.qkv.weight": 0.05,
        "visual.blocks.1.attn.qkv.weight": 0.4,
        "visual.merger.mlp.0.weight": 0.4,
        "visual.merger.ln_q.weight": 0,
        "model.layers.6.mlp.up_proj.weight": 0.05,
        "model.layers.7.mlp.up_proj.weight": 0.05,
        "model.layers.17.mlp.up_proj.weight": 0.2,
        "model.layers.27.mlp.up_proj.weight": 0.1,
        "model.embed_tokens.weight": 0,
        "lm_head.weight": 0,
    }
    assert {name: ratios[name] for name in expected} == pytest.approx(expected)


def test_the_example_of_blocks_reaches_what_its_comments_say(tmp_path: Path) -> None:
    plan = plan_of("sdxl_blocks", tmp_path)
    ratios = {output.entry.name: output.job.shared["ratio"] for output in plan.outputs if output.job}
    expected = {
        "unet.conv_in.weight": 0.1,
        "unet.down_blocks.0.resnets.0.conv1.weight": 0.2,
        "unet.down_blocks.0.resnets.0.norm1.weight": 0,
        "unet.down_blocks.1.attentions.0.proj_in.weight": 0.2,
        "unet.down_blocks.2.attentions.1.proj_in.weight": 0.4,
        "unet.mid_block.attentions.0.proj_in.weight": 0.5,
        "unet.up_blocks.0.attentions.0.proj_in.weight": 0.4,
        "unet.up_blocks.1.upsamplers.0.conv.weight": 0.2,
        "unet.conv_out.weight": 0.1,
        "unet.add_embedding.linear_1.weight": 0.1,
        "text_encoder_2.text_projection.weight": 0.1,
    }
    assert {name: ratios[name] for name in expected} == pytest.approx(expected)
    assert not any(name.startswith("vae.") for name in ratios)


def test_the_list_has_every_recipe_and_one_line_for_each(tmp_path: Path) -> None:
    listed = command_line("recipes", cwd=tmp_path)
    lines = listed.stdout.splitlines()
    assert (listed.returncode, [line.split()[0] for line in lines]) == (0, names())
    assert [line.split(maxsplit=1)[1] for line in lines] == list(titles().values())
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_the_recipe_under_the_name_wanted(tmp_path: Path) -> None:
    shipped = (RECIPES / "ties.yaml").read_bytes()
    (tmp_path / "folder").mkdir()
    for arguments, path in (
        (["ties"], "ties.yaml"),
        (["ties.yaml", "mine.yaml"], "mine.yaml"),
        (["ties", "folder"], "folder/ties.yaml"),
    ):
        result = command_line("recipes", "copy", *arguments, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (0, f"{path}\n")
        assert (tmp_path / path).read_bytes() == shipped


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "ties.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for name, *to in (["ties"], ["ties", "ties.yaml"], ["ties", "."], ["ties", "link.yaml"]):
        result = command_line("recipes", "copy", name, *to, cwd=tmp_path)
        assert result.returncode == 2
        assert "exists already" in result.stderr
    assert (tmp_path / "ties.yaml").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "ties.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tise",), "did you mean `ties`?"),
        (("../emoji/sea",), "no ready recipe"),
        (("ties", "no/such/folder/x.yaml"), "cannot be written"),
    ],
)
def test_a_mistake_is_refused(arguments: tuple[Any, ...], said: str, tmp_path: Path) -> None:
    name, *to = arguments
    with pytest.raises(Refused) as refused:
        copy(name, *(tmp_path / path for path in to))
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_every_architecture_named_here_is_a_recipe() -> None:
    assert sorted([*ARCHITECTURES, *SDXL]) == names()
