"""Diffusion models: whole pipelines, single files, one of each, blocks by name; diffusers itself is the judge."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint, write_file
from hypothesis import given
from hypothesis import strategies as st
from merging import INTERPOLATE, carry_out, command_line, contents, plan_of, refusals
from pipelines import Arrays, flux, image, renamed, sd3, sdxl, single_file, table, text_encoder, tuned, unet
from safetensors.numpy import load_file

from ggez_merge.checkpoint import Tensor, open_checkpoint
from ggez_merge.diff import diff
from ggez_merge.diffusion import Turned, blocks
from ggez_merge.diffusion_names import unet as unet_names
from ggez_merge.errors import Refused
from ggez_merge.merge import merge
from ggez_merge.plan import Plan
from ggez_merge.progress import Silent
from ggez_merge.verify import verify

diffusers = pytest.importorskip("diffusers")
judge = pytest.importorskip("diffusers.loaders.single_file_utils")
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
ALONG = ("vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and one: two pipelines; base.safetensors and one.safetensors: the same in the authors' layout."""
    folder = tmp_path_factory.mktemp("diffusion")
    pipeline = sdxl()
    for name in ("base", "one"):
        if name == "one":
            tuned(pipeline, 1)
        pipeline.save_pretrained(folder / name)
        write_file(folder / f"{name}.safetensors", single_file(folder / name))
    return folder


def recipe(base: str, model: str, ratio: float = 0.3, components: str = "") -> str:
    parameters = f"parameters: {{ratio: {ratio}}}, components: {{{components}}}"
    return f"{{merge_method: linear, base_model: {base}, models: [{{model: {model}}}], {parameters}}}"


def done(folder: Path, text: str, out: Path, **options: Any) -> Plan:
    plan = plan_of(folder, text, out)
    carry_out(plan, **options)
    return plan


def close(found: Arrays, base: Arrays, one: Arrays, ratio: float = 0.3) -> None:
    """Whether what was found is the mean of the two, tensor by tensor."""
    assert found.keys() == base.keys() == one.keys()
    for name, array in found.items():
        assert array.shape == base[name].shape
        np.testing.assert_allclose(array, (1 - ratio) * base[name] + ratio * one[name], rtol=0, atol=1e-6)


def equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(np.asarray(found[name]), np.asarray(array)), name


# --- whole pipelines -----------------------------------------------------------------------------------------------


def test_a_merged_pipeline_paints_and_its_unet_alone_is_merged(made: Path, tmp_path: Path) -> None:
    done(made, INTERPOLATE, tmp_path / "out")
    close(*(table(folder / "unet") for folder in (tmp_path / "out", made / "base", made / "one")))
    for part in ALONG:
        equal(table(tmp_path / "out" / part), table(made / "base" / part))
    before, after = contents(made / "base"), contents(tmp_path / "out")
    assert after.keys() == before.keys() | {"README.md"}
    assert {name for name in before if after[name] != before[name]} <= set(WEIGHTS.values())
    first, second = image(made / "base"), image(tmp_path / "out")
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    assert not np.array_equal(first, second)


def test_the_dry_run_and_the_card_say_what_is_copied(made: Path, tmp_path: Path) -> None:
    note = "text_encoder, text_encoder_2, vae: copied from the base; a line of `components:` that names one"
    plan = done(made, INTERPOLATE, tmp_path / "out")
    assert any(note in said for said in plan.notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert note in card
    assert "library_name: diffusers" in card
    assert "| vae | copied from the base | copied | " in card
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert set(WEIGHTS.values()) <= report["outputs"].keys()
    assert set(WEIGHTS.values()) == report["inputs"][0]["files"].keys()


@pytest.mark.parametrize(
    ("components", "parts"),
    [
        ("vae: {ratio: 0.3}", ["vae"]),
        ("text_encoder: {ratio: 0.3}, text_encoder_2: {ratio: 0.3}", ["text_encoder", "text_encoder_2"]),
        ("'vae.*': {ratio: 0.3}", ["vae"]),
        ("norms: {ratio: 0.3}, '*.bias': {ratio: 0.3}", []),
        ("BASE: {ratio: 0.3}", ["text_encoder", "text_encoder_2"]),
    ],
)
def test_a_part_is_merged_if_the_recipe_names_it(components: str, parts: list[str], made: Path, tmp_path: Path) -> None:
    done(made, recipe("base", "one", components=components), tmp_path / "out")
    for part in WEIGHTS:
        own, base, one = (table(folder / part) for folder in (tmp_path / "out", made / "base", made / "one"))
        close(own, base, one) if part in ["unet", *parts] else equal(own, base)


def test_layers_of_a_text_encoder_can_be_merged_alone(made: Path, tmp_path: Path) -> None:
    done(made, recipe("base", "one", components='"text_encoder.layers.1": {ratio: 1}'), tmp_path / "out")
    own, base, one = (table(folder / "text_encoder") for folder in (tmp_path / "out", made / "base", made / "one"))
    equal(own, {name: (one if ".layers.1." in name else base)[name] for name in base})


def test_what_goes_along_keeps_its_bytes_whatever_the_dtype(made: Path, tmp_path: Path) -> None:
    done(made, INTERPOLATE[:-1] + ", dtype: float16, components: {text_encoder: {ratio: 0.5}}}", tmp_path / "out")
    assert {array.dtype for array in table(tmp_path / "out" / "unet").values()} == {np.dtype(np.float16)}
    for part in ("vae", "text_encoder_2"):
        equal(table(tmp_path / "out" / part), table(made / "base" / part))
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert (tmp_path / "out/text_encoder_2/config.json").read_bytes() == (
        made / "base/text_encoder_2/config.json"
    ).read_bytes()


def test_large_parts_are_sharded_each_for_itself(made: Path, tmp_path: Path) -> None:
    done(made, INTERPOLATE[:-1] + ", output: {shard_size: 700KB}}", tmp_path / "out")
    done(made, INTERPOLATE, tmp_path / "whole")
    assert len(list((tmp_path / "out" / "unet").glob("diffusion_pytorch_model-0000?-of-*.safetensors"))) > 2
    assert (tmp_path / "out" / WEIGHTS["vae"]).exists()
    equal(table(tmp_path / "out" / "unet"), table(tmp_path / "whole" / "unet"))
    assert np.array_equal(image(tmp_path / "out"), image(tmp_path / "whole"))
    assert not verify(tmp_path / "out").problems
    assert len(open_checkpoint(str(tmp_path / "out")).tensors) == len(open_checkpoint(str(made / "base")).tensors)


def test_shards_and_bin_files_are_read_as_well(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(made / "one", tmp_path / "one")
    for file in (tmp_path / "one" / "unet", tmp_path / "one" / "vae"):
        tensors = {name: torch.from_numpy(array) for name, array in table(file).items()}
        (file / "diffusion_pytorch_model.safetensors").unlink()
        if file.name == "vae":
            torch.save(tensors, file / "diffusion_pytorch_model.bin")
        else:
            write_checkpoint(file, {n: t.numpy() for n, t in tensors.items()}, shards=3, base="diffusion_pytorch_model")
    for folder in (made, tmp_path):
        done(folder, recipe("base", "one", components="vae: {ratio: 0.5}"), tmp_path / f"of {folder.name}")
    for part in WEIGHTS:
        equal(*(table(tmp_path / f"of {folder.name}" / part) for folder in (made, tmp_path)))


def test_a_copy_in_float16_beside_the_weights_is_left_alone(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    for part, file in WEIGHTS.items():
        half = {name: array.astype(np.float16) for name, array in table(made / "base" / part).items()}
        write_file((tmp_path / "base" / file).with_suffix(".fp16.safetensors"), half)
    found = open_checkpoint(str(tmp_path / "base"))
    assert {file.path.name.count("fp16") for file in found.files} == {0}
    for file in WEIGHTS.values():
        (tmp_path / "base" / file).unlink()
    found = open_checkpoint(str(tmp_path / "base"))
    assert {tensor.dtype for tensor in found.tensors.values()} == {"F16"}


def test_an_interrupted_merge_resumes_to_the_same_bytes_and_verify_sees_damage(made: Path, tmp_path: Path) -> None:
    done(made, INTERPOLATE, tmp_path / "whole")
    plan = plan_of(made, INTERPOLATE, tmp_path / "out")

    class Killed(Silent):
        seen = 0

        def advance(self, n_bytes: int) -> None:
            self.seen += 1
            if self.seen == 12:
                raise KeyboardInterrupt

    small = {"threads": 1, "memory_bytes": 2 << 20}
    with pytest.raises(KeyboardInterrupt):
        merge(plan, progress=Killed(), **small)
    outcome = merge(plan, resume=True, progress=Silent(), **small)
    assert outcome is not None
    assert outcome.resumed_bytes > 0
    assert contents(tmp_path / "out") == {
        name: raw.replace(b"# whole", b"# out") if name == "README.md" else raw
        for name, raw in contents(tmp_path / "whole").items()
    }
    assert merge(plan, resume=True, progress=Silent()) is None
    assert not verify(tmp_path / "out").problems
    raw = bytearray((tmp_path / "out" / WEIGHTS["vae"]).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "out" / WEIGHTS["vae"]).write_bytes(raw)
    (problem,) = verify(tmp_path / "out").problems
    assert str(problem.place).endswith(WEIGHTS["vae"])
    merge(plan, overwrite=True, progress=Silent())
    assert not verify(tmp_path / "out").problems


def test_a_pipeline_with_other_names_in_a_part_that_goes_along(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "one", tmp_path / "one")
    old = {f"text_model.{name}": array for name, array in table(made / "one" / "text_encoder").items()}
    write_file(tmp_path / "one" / WEIGHTS["text_encoder"], old)  # as transformers saved CLIP before 5.10
    for components in ("", "text_encoder: {ratio: 0.5}"):
        for model in (made / "one", tmp_path / "one"):
            done(made, recipe("base", str(model), components=components), tmp_path / f"out{model == made / 'one'}")
        equal(*(table(tmp_path / f"out{flag}" / "text_encoder") for flag in (True, False)))
        shutil.rmtree(tmp_path / "outTrue")
        shutil.rmtree(tmp_path / "outFalse")


def test_a_part_whose_names_are_unclear_matters_only_if_it_is_merged(tmp_path: Path) -> None:
    for model, names in (("base", ["left.w.weight", "right.w.weight"]), ("one", ["w.weight"])):
        index = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
        write_checkpoint(tmp_path / model / "unet", {"conv_in.weight": np.ones((2, 2), np.float32)})
        write_checkpoint(tmp_path / model / "text_encoder", {name: np.ones((2, 2), np.float32) for name in names})
        (tmp_path / model / "model_index.json").write_text(json.dumps(index))
    done(tmp_path, INTERPOLATE, tmp_path / "out")
    equal(table(tmp_path / "out" / "text_encoder"), table(tmp_path / "base" / "text_encoder"))
    problems = refusals(tmp_path, recipe("base", "one", components="text_encoder: {ratio: 1}"))
    assert "lacks 2 tensors" in problems[0].what


def broken_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def indexed(name: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, name: value}))

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (broken_index, "model_index.json cannot be read"),
        (indexed("../one", ["diffusers", "UNet2DConditionModel"]), "this is no name for a pipeline's folder"),
        (indexed("/tmp", ["diffusers", "UNet2DConditionModel"]), "this is no name for a pipeline's folder"),
        (indexed("a.b", ["diffusers", "UNet2DConditionModel"]), "this is no name for a pipeline's folder"),
        (indexed("image_encoder", ["transformers", "CLIPVisionModel"]), "names a folder that is not there"),
        (lambda folder: (folder / WEIGHTS["vae"]).unlink(), "no checkpoint here"),
        (lambda folder: (folder / WEIGHTS["unet"]).write_bytes(b"12345678"), "not a valid safetensors header"),
        (lambda folder: (folder / WEIGHTS["vae"]).rename(folder / "vae/model.gguf"), "GGUF files cannot be merged"),
    ],
)
def test_a_pipeline_that_is_not_whole_is_refused(change: Any, what: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(Refused, match=re.escape(what)):
        open_checkpoint(str(tmp_path / "base"))


@pytest.mark.parametrize("missing", ["error", "copy"])
def test_what_the_pipeline_has_no_part_for_is_refused_whatever_the_recipe_says(
    missing: str, made: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "llama", {"model.layers.0.weight": np.ones((2, 2), "f4"), "lm_head": np.ones(2, "f4")})
    text = recipe(str(made / "base"), "llama").replace("{merge", f"{{missing: {missing}, merge", 1)
    assert any("that llama has" in problem.what for problem in refusals(tmp_path, text))
    shutil.copytree(made / "one", tmp_path / "two")
    shutil.copytree(tmp_path / "two/unet", tmp_path / "two/unet_2")
    index = json.loads((tmp_path / "two/model_index.json").read_text())
    (tmp_path / "two/model_index.json").write_text(json.dumps({**index, "unet_2": index["unet"]}))
    text = recipe(str(made / "base"), "two").replace("{merge", f"{{missing: {missing}, merge", 1)
    (problem,) = refusals(tmp_path, text)
    assert "unet_2." in str(problem.tensor) and "missing: copy" not in str(problem.remedy)


def test_where_a_config_came_from_is_not_told(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    path = tmp_path / "base/vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "/home/me/vae"}))
    done(tmp_path, recipe("base", str(made / "one")), tmp_path / "out")
    assert not any(b"/home/me" in file.read_bytes() for file in (tmp_path / "out").rglob("*.json"))


def test_a_pipeline_without_a_denoiser_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    indexed("unet", [None, None])(tmp_path / "base")
    with pytest.raises(Refused, match="the pipeline has no part to be merged"):
        open_checkpoint(str(tmp_path / "base"))


def test_inspect_and_diff_know_the_parts(made: Path) -> None:
    said = json.loads(command_line("inspect", "base", "--json", "--tensors", cwd=made).stdout)
    assert {part["component"] for part in said["parts"]} == set(WEIGHTS)
    assert {tensor["file"] for tensor in said["tensors"]} == set(WEIGHTS.values())
    assert said["architecture"] == "StableDiffusionXLPipeline"
    whole = diff(open_checkpoint(str(made / "base")), open_checkpoint(str(made / "one")))
    assert set(whole.components()) == set(WEIGHTS)
    alone = diff(open_checkpoint(str(made / "base" / "unet")), open_checkpoint(str(made / "one.safetensors")))
    assert alone.components()["unet"] == whole.components()["unet"]
    assert not alone.only_a
    assert {name.partition(".")[0] for name in alone.only_b} == {"first_stage_model", "conditioner"}


# --- the two layouts -------------------------------------------------------------------------------------------------


def read_by_diffusers(file: Path, part: str, like: Path) -> dict[str, Any]:
    """What diffusers makes of one part of a single file."""
    arrays = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
    config = json.loads((like / part / "config.json").read_text())
    if part == "unet":
        return dict(judge.convert_ldm_unet_checkpoint(arrays, config))
    if part == "vae":
        return dict(judge.convert_ldm_vae_checkpoint(arrays, config))
    model = text_encoder(0, hidden_size=24, hidden_act="gelu")
    found = judge.convert_open_clip_checkpoint(model, arrays, prefix="conditioner.embedders.1.model.")
    return {name.removeprefix("text_model."): array for name, array in found.items()}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_the_single_file_of_these_tests_is_what_diffusers_reads(part: str, made: Path) -> None:
    expected = {name.removeprefix("text_model."): array for name, array in table(made / "one" / part).items()}
    equal(read_by_diffusers(made / "one.safetensors", part, made / "one"), expected)


@pytest.mark.parametrize("model", ["one", "one.safetensors", "one/unet"])
@pytest.mark.parametrize("base", ["base", "base.safetensors", "base/unet"])
def test_one_of_each_layout(base: str, model: str, made: Path, tmp_path: Path) -> None:
    done(made, recipe(base, model), tmp_path / "out")
    expected = {name: table(made / name / "unet") for name in ("base", "one")}
    if base.endswith("safetensors"):
        file = tmp_path / "out" / "model.safetensors"
        close({n: a.numpy() for n, a in read_by_diffusers(file, "unet", made / "base").items()}, **expected)
        before, after = load_file(made / base), load_file(file)
        assert before.keys() == after.keys()
        along = [name for name in before if not name.startswith("model.diffusion_model.")]
        equal({name: after[name] for name in along}, {name: before[name] for name in along})
    else:
        close(table(tmp_path / "out" / ("unet" if base == "base" else "")), **expected)


def test_a_single_file_stays_one(made: Path, tmp_path: Path) -> None:
    text = recipe("base.safetensors", "one")[:-1] + ", output: {shard_size: 10KB}}"
    done(made, text, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_the_rules_are_told_in_a_line(made: Path) -> None:
    plan = plan_of(made, recipe("base", "one.safetensors"))
    (renaming,) = plan.renamings
    rules = [str(rule) for rule in renaming.rules]
    assert f"model.diffusion_model.* ↔ unet.*: {len(table(made / 'base' / 'unet'))} tensors" in rules


@pytest.mark.parametrize("memory_bytes", [2 << 20, 192 << 20])
def test_vae_and_text_encoders_merge_across_layouts(memory_bytes: int, made: Path, tmp_path: Path) -> None:
    named = "vae: {ratio: 0.5}, text_encoder: {ratio: 0.5}, text_encoder_2: {ratio: 0.5}"
    done(made, recipe("base", "one", components=named), tmp_path / "expected")
    done(made, recipe("base", "one.safetensors", components=named), tmp_path / "out", memory_bytes=memory_bytes)
    for part in WEIGHTS:
        equal(table(tmp_path / "out" / part), table(tmp_path / "expected" / part))
    done(made, recipe("base.safetensors", "one", components=named), tmp_path / "file", memory_bytes=memory_bytes)
    equal(load_file(tmp_path / "file" / "model.safetensors"), single_file(tmp_path / "expected"))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_turned_matrix_is_the_same_wherever_a_span_begins(height: int, width: int, data: st.DataObject) -> None:
    matrix = np.arange(height * width, dtype=np.float32).reshape(height, width)
    source = Tensor("text_projection", "F32", matrix.shape, Path("x"), 0, matrix.nbytes)
    first = data.draw(st.integers(0, matrix.size - 1))
    out = np.empty(data.draw(st.integers(1, matrix.size - first)), np.float32)
    Turned((source,)).fill(lambda tensor, at, n: matrix.ravel()[at : at + n], first, out)
    assert np.array_equal(out, matrix.T.ravel()[first : first + len(out)])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unets_of_other_sizes(depth: int, tmp_path: Path) -> None:
    """As SD 1.5 is built: attention at the top, none at the bottom, convolutions to project with."""
    model = unet(
        layers_per_block=depth,
        block_out_channels=(16, 24, 24, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        transformer_layers_per_block=1,
        attention_head_dim=2,
        use_linear_projection=False,
        addition_embed_type=None,
    )
    model.save_pretrained(tmp_path / "one")
    arrays = table(tmp_path / "one")
    write_file(tmp_path / "base.safetensors", renamed(arrays, "model.diffusion_model.", "input_blocks.0.0.weight"))
    done(tmp_path, recipe("base.safetensors", "one", 1), tmp_path / "out")
    found = {name: torch.from_numpy(a) for name, a in load_file(tmp_path / "out/model.safetensors").items()}
    equal(judge.convert_ldm_unet_checkpoint(found, dict(model.config)), arrays)
    assert max(set(blocks(list(arrays)).values()) - {"M00", "BASE"}) == f"OUT{4 * (depth + 1) - 1:02}"


@pytest.mark.parametrize(
    ("config", "blocks_in_and_out", "upsampling"),
    [
        (dict(cross_attention_dim=768, attention_head_dim=8), 12, ["2.1", "5.2", "8.2"]),  # SD 1.5
        (
            dict(
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            9,  # SDXL
            ["2.2", "5.2"],
        ),
    ],
)
def test_the_names_of_real_unets(config: dict[str, Any], blocks_in_and_out: int, upsampling: list[str]) -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    ours = model.state_dict()
    original = {old: ours[name] for name, old in unet_names(ours).items()}
    convolutions = {
        f"output_blocks.{place}.conv.weight" for place in upsampling
    }  # diffusers would take other names too
    assert {name for name in original if re.fullmatch(r"output_blocks\.\d+\.\d\.conv\.weight", name)} == convolutions
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    found = judge.convert_ldm_unet_checkpoint(prefixed, {"layers_per_block": 2, **model.config})
    assert found.keys() == ours.keys()
    assert all(found[name] is ours[name] for name in ours)
    numbered = {f"{x}{i:02}" for x in ("IN", "OUT") for i in range(blocks_in_and_out)}
    assert set(blocks(list(ours)).values()) - {"BASE"} == {"M00", *numbered}


def both_ways(folder: Path, original: Arrays, expected: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Reads `original` in diffusers' layout, and that back, each as the judge has it."""
    arrays = {name: tensor.numpy() for name, tensor in expected.items()}
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
    write_file(folder / "one.safetensors", {prefix + name: array for name, array in original.items()})
    write_file(folder / "base.safetensors", {prefix + name: np.zeros_like(array) for name, array in original.items()})
    config = {"_class_name": "Transformer2DModel"}
    write_checkpoint(folder / "one", arrays, config=config, base="diffusion_pytorch_model")
    write_checkpoint(folder / "base", zeros, config=config, base="diffusion_pytorch_model")
    done(folder, recipe("base", "one.safetensors", 1), folder / "diffusers")
    equal(table(folder / "diffusers"), arrays)
    done(folder, recipe("base.safetensors", "one", 1), folder / "original")
    equal(table(folder / "original"), {prefix + name: array for name, array in original.items()})


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_sd3(prefix: str, tmp_path: Path) -> None:
    original = sd3()
    expected = judge.convert_sd3_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(array) for name, array in original.items()}
    )
    model = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=2,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    model.load_state_dict(expected)  # so the file of these tests is a whole model
    both_ways(tmp_path, original, expected, prefix)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_flux(prefix: str, tmp_path: Path) -> None:
    original = flux()
    expected = judge.convert_flux_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(array) for name, array in original.items()}
    )
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    assert model.state_dict().keys() == expected.keys()
    both_ways(tmp_path, original, expected, prefix)


def test_layers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    original = sd3()
    expected = judge.convert_sd3_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(array) for name, array in copy.copy(original).items()}
    )
    original["joint_blocks.0.x_block.attn.qkv.weight"] = np.zeros((27, 8), np.float32)
    write_file(tmp_path / "one.safetensors", original)
    write_checkpoint(tmp_path / "base", {name: tensor.numpy() for name, tensor in expected.items()})
    problems = refusals(tmp_path, recipe("base", "one.safetensors"))
    assert [problem.tensor for problem in problems] == [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]


def test_blocks_that_the_base_lacks_are_refused_and_not_dropped(tmp_path: Path) -> None:
    original = sd3()
    expected = judge.convert_sd3_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(array) for name, array in copy.copy(original).items()}
    )
    write_checkpoint(tmp_path / "base", {name: tensor.numpy() for name, tensor in expected.items()})
    deeper = {
        re.sub(r"^joint_blocks\.0\.", "joint_blocks.7.", name): array
        for name, array in original.items()
        if name.startswith("joint_blocks.0.")
    }
    write_file(tmp_path / "one.safetensors", {**original, **deeper})
    (problem,) = refusals(tmp_path, recipe("base", "one.safetensors"))
    assert f"lacks {len(deeper)} tensors" in problem.what and "joint_blocks" in str(problem.found)


# --- blocks by name --------------------------------------------------------------------------------------------------


def number(original: str) -> str:
    """The block of a tensor, from its name in the authors' layout."""
    match = re.search(r"\.(input|output)_blocks\.(\d+)\.", original)
    if match:
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"
    for sign, block in (
        (".middle_block.", "M00"),
        (".time_embed.", "IN00"),
        (".out.", "OUT08"),
        (".label_emb.", "BASE"),
    ):
        if sign in original:
            return block
    return "BASE" if original.startswith("conditioner.") else "none"


def test_blocks_are_the_same_in_both_layouts(made: Path) -> None:
    original = open_checkpoint(str(made / "base.safetensors")).tensors
    found = blocks(original)
    assert {name: found.get(name, "none") for name in original} == {name: number(name) for name in original}
    assert set(found.values()) == {"M00", "BASE", *(f"{x}{i:02}" for x in ("IN", "OUT") for i in range(9))}
    plan = plan_of(made, recipe("base", "one.safetensors"))
    own = blocks(open_checkpoint(str(made / "base")).tensors)
    for output in plan.outputs:
        if output.action == "merge":
            assert own[output.entry.name] == number(output.models[0].name)


@pytest.mark.parametrize("base", ["base", "base.safetensors", "base/unet"])
@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("unet.IN04", ["IN04"]),
        ("unet.IN04-08", [f"IN{i:02}" for i in range(4, 9)]),
        ("unet.M00", ["M00"]),
        ("unet.OUT00-08", [f"OUT{i:02}" for i in range(9)]),
        ("BASE", ["BASE"]),
    ],
)
def test_a_block_by_name(key: str, wanted: list[str], base: str, made: Path) -> None:
    model = base.replace("base", "one")
    plan = plan_of(made, recipe(base, model, components=f'"{key}": {{ratio: 1}}'))
    reached = {output.entry.name for output in plan.outputs if output.via.startswith("components")}
    found = blocks(plan.layout.tensors)
    assert reached
    assert reached == {name for name in plan.layout.tensors if found.get(name) in wanted}


def test_a_gradient_over_blocks_begins_and_ends_with_them(made: Path) -> None:
    plan = plan_of(made, recipe("base", "one", components='"unet.IN00-08": {ratio: [0, 0.8]}'))
    ratios = {output.entry.name: output.job.shared["ratio"] for output in plan.outputs if output.job}
    assert ratios["unet.conv_in.weight"] == 0
    assert ratios["unet.down_blocks.2.resnets.1.conv1.weight"] == pytest.approx(0.8)
    assert ratios["unet.down_blocks.1.resnets.0.conv1.weight"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("unet.IN09", "the UNet has the blocks IN00 to IN08"),
        ("unet.OUT07-11", "the UNet has the blocks OUT00 to OUT08"),
        ("unet.M01", "the UNet has the blocks M00 to M00"),
        ("unet.IN05-04", "ends before it begins"),
        ("unet.IN4", "reaches no tensor"),
        ("IN04", "reaches no tensor"),
    ],
)
def test_a_block_that_is_not_there_is_refused(key: str, what: str, made: Path) -> None:
    (problem,) = refusals(made, recipe("base", "one", components=f'"{key}": {{ratio: 1}}'))
    assert what in problem.what


def test_a_mark_beside_the_blocks_belongs_to_none_of_them() -> None:
    assert blocks({"input_blocks.0.0.weight", "out.2.weight", "v_pred"})["v_pred"] == "BASE"


def test_blocks_of_a_model_that_has_none_are_refused(tmp_path: Path) -> None:
    for name in ("base", "one"):
        write_checkpoint(tmp_path / name, {"model.layers.0.mlp.up_proj.weight": np.zeros((2, 2), np.float32)})
    for key in ("unet.IN04", "BASE"):
        (problem,) = refusals(tmp_path, recipe("base", "one", components=f'"{key}": {{ratio: 1}}'))
        assert "reaches no tensor" in problem.what
