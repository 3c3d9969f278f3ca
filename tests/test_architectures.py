"""Real architectures, tiny: merged here, loaded by transformers, compared with the loaded parents, run forward."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from checkpoints import write_checkpoint
from models import FAMILIES, merged, randomised, read_weights, save_tuned
from safetensors.torch import save_file
from xxhash import xxh3_128

from ggez_merge.errors import Refused

RATIO = 0.3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def parents(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a base and two tuned models, in float32 and in bfloat16."""
    return saved_parents(family, tmp_path_factory.getbasetemp())


@cache
def saved_parents(family: str, folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    model = randomised(FAMILIES[family].build(), seed=0)
    made = {}
    for word, dtype in DTYPES.items():
        for seed, name in enumerate(("base", "one", "two")):
            made[f"{word} {name}"] = save_tuned(
                model,
                folder / family / word / name,
                seed=seed,
                noise=0.0 if name == "base" else 0.02,
                dtype=dtype,
            )
    return made


def load(family: str, folder: Path) -> tf.PreTrainedModel:
    """The loaded model, after a look whether every key found its place."""
    model, info = FAMILIES[family].load(folder)
    assert {key: found for key, found in info.items() if found} == {}
    return model


def forward(family: str, model: tf.PreTrainedModel) -> list[torch.Tensor]:
    """Every float tensor among the outputs of one forward pass."""
    with torch.no_grad():
        output = model(**FAMILIES[family].inputs())
    tensors = [value for value in output.values() if isinstance(value, torch.Tensor)]
    return [tensor.float() for tensor in tensors if tensor.is_floating_point()]


def assert_works(family: str, model: tf.PreTrainedModel, parents: list[tf.PreTrainedModel]) -> None:
    """Finite outputs that are none of the parents'."""
    outputs = forward(family, model)
    assert outputs
    for parent in parents:
        others = forward(family, parent)
        assert all(mine.isfinite().all() for mine in outputs)
        assert any(not torch.equal(mine, other) for mine, other in zip(outputs, others, strict=True))


@pytest.mark.parametrize("word", DTYPES)
def test_an_interpolated_model_loads_runs_and_lies_between_its_parents(
    family: str, word: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    base, one = parents[f"{word} base"], parents[f"{word} one"]
    out = merged(tmp_path, merge_method="linear", base_model=base, models=[{"model": one}], parameters={"ratio": RATIO})
    model, old, new = load(family, out), load(family, base), load(family, one)
    assert model.dtype == DTYPES[word]
    assert_works(family, model, [old, new])
    expected, theirs = old.state_dict(), new.state_dict()
    assert model.state_dict().keys() == expected.keys()
    equal = total = 0
    for name, value in model.state_dict().items():
        a, b = expected[name], theirs[name]
        wanted = ((1 - RATIO) * a.double() + RATIO * b.double()).to(value.dtype)
        assert not torch.equal(a, b), f"{name} was not tuned, so merging it shows nothing"
        torch.testing.assert_close(value, wanted, rtol=2**-7 if word == "bf16" else 1e-6, atol=1e-7, msg=name)
        equal += int((value == wanted).sum())
        total += value.numel()
    # float64 rounded once is what we give, but for the few elements near a tie that float32 puts on its other side
    assert equal / total > (0.999 if word == "bf16" else 0.8)


def test_nothing_is_lost_on_the_way(family: str, parents: dict[str, Path], tmp_path: Path) -> None:
    """Names, shapes and dtypes of the file are the base's own, whatever transformers calls them after loading."""
    base, one = parents["bf16 base"], parents["bf16 one"]
    out = merged(tmp_path, merge_method="linear", base_model=base, models=[{"model": one}], parameters={"ratio": RATIO})
    before, after = read_weights(base), read_weights(out)
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("of", ["gemma3", "qwen2_5_vl", "siglip"])
def test_a_ties_merge_of_three_loads_and_runs(
    of: str, scope: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    parents = saved_parents(of, tmp_path_factory.getbasetemp())
    paths = [parents[f"fp32 {name}"] for name in ("base", "one", "two")]
    tuned = [{"model": path, "parameters": {"weight": 1.0, "density": 0.4}} for path in paths[1:]]
    out = merged(tmp_path, merge_method="ties", base_model=paths[0], models=tuned, parameters={"scope": scope})
    model = load(of, out)
    assert_works(of, model, [load(of, path) for path in paths])
    base = load(of, paths[0]).state_dict()
    same = sum(int((value == base[name]).sum()) for name, value in model.state_dict().items())
    share = same / sum(value.numel() for value in base.values())
    # an entry stays as it was if neither of the two independent deltas is among its top 40 %
    assert 0.6**2 - 0.02 < share < 0.6**2 + 0.02


def test_weights_that_are_tied_stay_tied(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    parents = saved_parents("gemma3", tmp_path_factory.getbasetemp())
    out = merged(
        tmp_path,
        merge_method="linear",
        base_model=parents["fp32 base"],
        models=[{"model": parents["fp32 one"]}],
        parameters={"ratio": 0.5},
    )
    assert not any("lm_head" in name for name in read_weights(out))
    model = load("gemma3", out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tensors_that_nothing_leads_to_are_refused_not_left_out(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names with other ends are other tensors, as far as anyone can tell: their weights must not vanish silently."""
    parents = saved_parents("llava", tmp_path_factory.getbasetemp())
    base, other = parents["fp32 base"], tmp_path / "other"
    other.mkdir()
    weights = read_weights(parents["fp32 one"])
    renamed = {n.replace("weight", "kernel") if "language_model" in n else n: t for n, t in weights.items()}
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(Refused) as caught:
        merged(tmp_path, merge_method="linear", base_model=base, models=[{"model": other}], parameters={"ratio": 0.5})
    assert any("lacks" in str(problem) and "language_model" in str(problem) for problem in caught.value.problems)
    assert not (tmp_path / "merged").exists()


# --- what travels with the weights ---------------------------------------------------------------------------------

SIDE_FILES = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"tokenizer_class": "X"}',
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "vocab.txt": "a\nb\n",
    "merges.txt": "#version\n",
    "spiece.model": "binary \x00 content",
    "tokenizer.model": "binary",
    "preprocessor_config.json": '{"image_processor_type": "X"}',
    "processor_config.json": '{"processor_class": "X"}',
    "video_preprocessor_config.json": "{}",
    "image_processor_config.json": "{}",
    "chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}",
    "chat_template.json": '{"chat_template": "old"}',
    "generation_config.json": '{"do_sample": false}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "LICENSE": "terms",
    "NOTICE.txt": "terms",
}
LEFT_BEHIND = {
    "modeling_x.py": "print('no')",
    "trainer_state.json": "{}",
    "optimizer.pt": "no",
    "training_args.bin": "no",
    ".gitattributes": "no",
    "README.md": "the base's own card",
}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def small_llama(folder: Path, **save: Any) -> tuple[Path, Path]:
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    )
    base = save_tuned(model, folder / "base", seed=0, noise=0.0, dtype=torch.float32, **save)
    return base, save_tuned(model, folder / "tuned", seed=1, dtype=torch.float32, **save)


def test_the_files_that_a_loader_needs_travel(tmp_path: Path) -> None:
    base, tuned = small_llama(tmp_path)
    put(base, {**SIDE_FILES, **LEFT_BEHIND})
    put(tuned, {"only_of_the_tuned_model.json": "{}"})
    out = merged(tmp_path, merge_method="linear", base_model=base, models=[{"model": tuned}], parameters={"ratio": 0.5})
    for name, content in SIDE_FILES.items():
        assert (out / name).read_text() == content, name
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert made - SIDE_FILES.keys() == {"config.json", "model.safetensors", "README.md", "merge_report.json"}
    assert "the base's own card" not in (out / "README.md").read_text()


def test_a_real_processor_still_loads(tmp_path: Path) -> None:
    base, tuned = small_llama(tmp_path)
    tf.SiglipImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(base)
    out = merged(tmp_path, merge_method="linear", base_model=base, models=[{"model": tuned}], parameters={"ratio": 0.5})
    loaded = tf.AutoImageProcessor.from_pretrained(out)
    assert list(loaded.image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_the_config_says_the_dtype_that_the_weights_have(
    out_dtype: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On top and in its parts, under the old name and the new."""
    parents = saved_parents("idefics3", tmp_path_factory.getbasetemp())
    base = tmp_path / "base"
    shutil.copytree(parents["fp32 base"], base)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["torch_dtype"] = config["vision_config"]["dtype"] = "float64"
    (base / "config.json").write_text(json.dumps(config))
    out = merged(
        tmp_path,
        merge_method="linear",
        base_model=base,
        models=[{"model": parents["fp32 one"]}],
        parameters={"ratio": 0.5},
        dtype="float32",
        out_dtype=out_dtype,
    )
    config = json.loads((out / "config.json").read_text())
    said = config["dtype"], config["text_config"]["torch_dtype"], config["vision_config"]["dtype"]
    assert said == (out_dtype,) * 3
    wanted = getattr(torch, out_dtype)
    assert {tensor.dtype for tensor in read_weights(out).values()} == {wanted}
    model, _ = FAMILIES["idefics3"].load(out)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


def test_many_shards_with_an_index_load(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    parents = saved_parents("qwen2_5_vl", tmp_path_factory.getbasetemp())
    keys: dict[str, Any] = {
        "merge_method": "linear",
        "base_model": parents["bf16 base"],
        "models": [{"model": parents["bf16 one"]}],
        "parameters": {"ratio": RATIO},
    }
    whole = merged(tmp_path / "whole", **keys)
    cut = merged(tmp_path / "cut", **keys, output={"shard_size": "40KB"})
    files = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    weights = read_weights(cut)
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    assert set(index["weight_map"].values()) == set(files)
    load("qwen2_5_vl", cut)
    assert all(torch.equal(weights[name], tensor) for name, tensor in read_weights(whole).items())


def half_of(tuned: Path) -> dict[str, Any]:
    return {"model": tuned, "parameters": {"weight": 0.5}}


def test_sharded_inputs_give_the_same_model(tmp_path: Path) -> None:
    one = small_llama(tmp_path / "one")
    many = [tmp_path / "many" / path.name for path in one]
    for path, target in zip(one, many, strict=True):
        tf.LlamaForCausalLM.from_pretrained(path).save_pretrained(target, max_shard_size="20KB")
        assert (target / "model.safetensors.index.json").exists()
    outs = [
        read_weights(
            merged(
                base.parent,
                merge_method="linear",
                base_model=base,
                models=[{"model": tuned}],
                parameters={"ratio": 0.5},
            )
        )
        for base, tuned in (one, many)
    ]
    assert outs[0].keys() == outs[1].keys()
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])
    assert not (many[0].parent / "merged" / "model.safetensors.index.json").exists()


def test_a_stack_of_layers_loads_and_its_report_names_the_origins(tmp_path: Path) -> None:
    """Four layers of a vision-language model's text part, cut from two models; the towers come from one each."""
    config = FAMILIES["gemma3"].build().config
    config.text_config.num_hidden_layers = 3
    config.text_config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    model = tf.Gemma3ForConditionalGeneration(config)
    a, b = (save_tuned(model, tmp_path / name, seed=i, dtype=torch.float32) for i, name in enumerate("ab"))
    pieces = [{"sources": [{"model": x, "layer_range": r}]} for x, r in ((a, [0, 2]), (b, [1, 3]))]
    modules = {
        "text_decoder": {"slices": pieces},
        "vision_tower": {"models": [{"model": b}]},
        "multi_modal_projector": {"models": [{"model": a}]},
    }
    out = merged(tmp_path, merge_method="passthrough", base_model=a, modules=modules)
    stacked = load("gemma3", out)
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    assert (stacked.config.text_config.num_hidden_layers, stacked.config.text_config.layer_types) == (4, kinds)
    assert all(tensor.isfinite().all() for tensor in forward("gemma3", stacked))
    report = json.loads((out / "merge_report.json").read_text())["tensors"]
    weights, of_a, of_b = read_weights(out), read_weights(a), read_weights(b)
    stack = "language_model.model.layers.{}.mlp.up_proj.weight"
    for name, old, parent, path in (
        (stack.format(1), stack.format(1), of_a, a),
        (stack.format(2), stack.format(1), of_b, b),
        (stack.format(3), stack.format(2), of_b, b),
        ("language_model.model.norm.weight", "language_model.model.norm.weight", of_b, b),
        ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.weight", of_b, b),
        ("multi_modal_projector.mm_soft_emb_norm.weight",) * 2 + (of_a, a),
    ):
        assert torch.equal(weights[name], parent[old]), name
        assert report[name]["parameters"] == {str(path): {"scale": 1.0}}
        assert report[name].get("from", [f"{path}: {name}"]) == [f"{path}: {old}"]


def test_card_and_report_say_what_was_done(tmp_path: Path) -> None:
    base, tuned = small_llama(tmp_path)
    out = merged(
        tmp_path,
        merge_method="linear",
        base_model=base,
        models=[{"model": tuned}],
        parameters={"ratio": 0.5},
        components={"lm_head.*": {"ratio": 0.25}},
    )
    report = json.loads((out / "merge_report.json").read_text())
    assert report["recipe"] == (tmp_path / "recipe.yaml").read_text()
    assert report["tensors"]["lm_head.weight"]["parameters"]["ratio"] == 0.25
    assert report["tensors"]["model.norm.weight"]["parameters"]["ratio"] == 0.5
    old, new = read_weights(base), read_weights(tuned)
    for name, said in report["tensors"].items():
        norm = (new[name].double() - old[name].double()).norm().item()
        assert said["delta_norms"] == [pytest.approx(norm, rel=1e-5)]
    for name, said in report["outputs"].items():
        content = (out / name).read_bytes()
        assert said == {"bytes": len(content), "xxh3_128": xxh3_128(content).hexdigest()}
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model_relation: merge" in front
    assert "- merge" in front
    assert [said["role"] for said in report["inputs"]] == ["base", "model"]
    assert f"| {base} | base | " in card
    assert "ratio 0.25" in card
    assert "ratio 0.5" in card


def test_a_base_under_another_name_is_still_the_base(tmp_path: Path) -> None:
    """Listed among the models by a link to it, as mergekit's recipes list the base, it has no part in the sum."""
    base, tuned = small_llama(tmp_path)
    (tmp_path / "link").symlink_to(base)
    models = [{"model": tmp_path / "link"}, {"model": tuned, "parameters": {"weight": 1.0}}]
    out = merged(tmp_path, merge_method="task_arithmetic", base_model=base, models=models)
    weights = read_weights(tuned)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(out).items())
    with pytest.raises(Refused, match="besides the base"):
        merged(tmp_path / "alone", merge_method="task_arithmetic", base_model=base, models=models[:1])


def test_a_diffusers_model_keeps_its_names_and_gets_no_key_that_diffusers_does_not_know(tmp_path: Path) -> None:
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "sample_size": 8}
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        arrays = {"conv_in.weight": np.full((2, 3), value, np.float32)}
        write_checkpoint(tmp_path / name, arrays, config=config, base="diffusion_pytorch_model")
    models = [{"model": tmp_path / "tuned"}]
    keys: dict[str, Any] = {"parameters": {"ratio": 0.5}, "out_dtype": "float16"}
    out = merged(tmp_path, merge_method="linear", base_model=tmp_path / "base", models=models, **keys)
    assert json.loads((out / "config.json").read_text()) == config
    assert read_weights(out)["conv_in.weight"].unique().tolist() == [1.5]
    assert (out / "diffusion_pytorch_model.safetensors").exists()
    assert "library_name: diffusers" in (out / "README.md").read_text()


def test_a_chat_template_is_written_out_and_a_mere_name_is_refused(tmp_path: Path) -> None:
    base, tuned = small_llama(tmp_path)
    keys: dict[str, Any] = {"merge_method": "linear", "base_model": base, "models": [{"model": tuned}]}
    keys["parameters"] = {"ratio": 0.5}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    out = merged(tmp_path, **keys, chat_template=template)
    assert (out / "chat_template.jinja").read_text() == template
    with pytest.raises(Refused, match="no chat template"):
        merged(tmp_path / "named", **keys, chat_template="chatml")
