"""An adapter from a tuned model: what is of low rank comes back, what is not is told, and PEFT loads it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from adapters import merged_by_peft, save_adapter, save_base
from checkpoints import write_checkpoint
from merging import BF16, arrays, carry_out, merged, plan_of
from models import LAYOUTS, llama, read_weights, save_tuned
from typer.testing import CliRunner

from ggez_merge.checkpoint import open_checkpoint
from ggez_merge.cli import app
from ggez_merge.errors import Refused
from ggez_merge.extract_lora import Extracted, extract, truncated_svd

RATIO_1 = "{merge_method: linear, base_model: base, models: [{model: base+sea}], parameters: {ratio: 1}}"


def extracted(folder: Path, rank: int, rest: Any = "error", tuned: str = "tuned") -> Extracted:
    return extract(
        open_checkpoint(str(folder / tuned)), open_checkpoint(str(folder / "base")), rank, folder / "sea", rest
    )


def tuned_by_lora(folder: Path, build: Callable[[], tf.PreTrainedModel], **config: Any) -> type[tf.PreTrainedModel]:
    """`base`, and `tuned`, which is it with an adapter of rank 4 merged."""
    model = build()
    save_base(model, folder / "base", dyadic=False)
    save_adapter(folder / "base", type(model), folder / "lora", dyadic=False, r=4, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = type(model).from_pretrained(folder / "base")
        peft.PeftModel.from_pretrained(base, folder / "lora").merge_and_unload().save_pretrained(folder / "tuned")
    return type(model)


@pytest.mark.parametrize(
    "build, targets",
    [
        (llama, ["q_proj", "down_proj"]),
        (llama, r".*layers\.[02]\.self_attn\.v_proj"),
        (LAYOUTS["qwen2_5_vl"], ["q_proj", "qkv", "up_proj"]),
        (LAYOUTS["gemma3"], r".*language_model.*\.(q|v)_proj"),
        (LAYOUTS["llava"], "all-linear"),
    ],
    ids=["by last words", "by names", "qwen2_5_vl", "gemma3", "llava"],
)
def test_what_is_of_low_rank_comes_back(build: Any, targets: Any, tmp_path: Path) -> None:
    kind = tuned_by_lora(tmp_path, build, target_modules=targets)
    result = extracted(tmp_path, rank=4)
    assert not result.saved and not result.left
    assert result.errors()["all"] < 1e-5
    changed = {
        name
        for name, tensor in read_weights(tmp_path / "tuned").items()
        if not torch.equal(tensor, read_weights(tmp_path / "base")[name])
    }
    assert {part.name for part in result.adapted} == changed
    carry_out(plan_of(tmp_path, RATIO_1))
    ours = kind.from_pretrained(tmp_path / "out").state_dict()
    wanted = kind.from_pretrained(tmp_path / "tuned").state_dict()
    theirs = merged_by_peft(tmp_path / "base", kind, tmp_path / "sea")
    for name, tensor in wanted.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
        assert (theirs[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_peft_finds_every_factor_in_its_place_and_no_module_more(tmp_path: Path) -> None:
    kind = tuned_by_lora(tmp_path, LAYOUTS["llava"], target_modules=r".*vision_tower.*layers\.1.*\.q_proj")
    extracted(tmp_path, rank=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "sea")
    assert not [str(w.message) for w in said if "missing" in str(w.message)]
    held = sum(name.endswith("lora_A.default.weight") for name in model.state_dict())
    assert held == 1
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def full(folder: Path) -> None:
    """A tuned model in which everything has changed, and nothing is of low rank."""
    model = llama(num_hidden_layers=2)
    save_base(model, folder / "base", dyadic=False)
    save_tuned(model, folder / "tuned", seed=3, dtype=torch.float32)


def test_the_error_is_the_best_that_the_rank_allows(tmp_path: Path) -> None:
    full(tmp_path)
    result = extracted(tmp_path, rank=5, rest="leave")
    ours, own = (read_weights(tmp_path / name) for name in ("base", "tuned"))
    squares, left = 0.0, 0.0
    for part in result.adapted:
        delta = (own[part.name] - ours[part.name]).double()
        values = torch.linalg.svdvals(delta).square()
        assert part.squares == pytest.approx(float(values.sum()), rel=1e-5)
        assert float(values[5:].sum()) * (1 - 1e-5) <= (part.left or 0.0) <= float(values[5:].sum()) * 1.02
        squares, left = squares + part.squares, left + (part.left or 0.0)
    assert result.errors()["all"] == pytest.approx((left / squares) ** 0.5)
    assert 0.1 < result.errors()["all"] < 1
    adapter = arrays(tmp_path / "sea")
    a, b = (
        adapter[f"base_model.model.model.layers.0.mlp.up_proj.lora_{of}.weight"].reshape(-1, 5 if of == "B" else 32)
        for of in "AB"
    )
    (part,) = (part for part in result.adapted if part.name == "model.layers.0.mlp.up_proj.weight")
    rest = (own[part.name] - ours[part.name]).double().numpy() - b.astype("f8") @ a.astype("f8")
    assert part.left == pytest.approx(float(np.square(rest).sum()), rel=1e-4)
    assert np.linalg.norm(a, axis=1) == pytest.approx(np.linalg.norm(b, axis=0), rel=1e-4)


def test_what_no_adapter_holds_is_named_and_saved_or_left_as_asked_for(tmp_path: Path) -> None:
    full(tmp_path)
    with pytest.raises(Refused) as refused:
        extracted(tmp_path, rank=64)
    (problem,) = refused.value.problems
    assert (
        "model.embed_tokens.weight" in str(problem) and "model.norm.weight" in str(problem) and "‖Δ‖ = " in str(problem)
    )
    assert not (tmp_path / "sea").exists()

    result = extracted(tmp_path, rank=64, rest="save")  # more than any side has: nothing is lost
    assert len(result.saved) == 6 and not result.left
    carry_out(plan_of(tmp_path, RATIO_1))
    ours, wanted = read_weights(tmp_path / "out"), read_weights(tmp_path / "tuned")
    theirs = merged_by_peft(tmp_path / "base", tf.LlamaForCausalLM, tmp_path / "sea")
    for name, tensor in wanted.items():
        assert (ours[name] - tensor).abs().max() < 1e-6, name
        assert (theirs[name] - tensor).abs().max() < 1e-6, name
    assert all(torch.equal(ours[part.name], wanted[part.name]) for part in result.saved)

    (tmp_path / "sea").rename(tmp_path / "saved")
    result = extracted(tmp_path, rank=64, rest="leave")
    assert len(result.left) == 6 and not result.saved
    carry_out(plan_of(tmp_path, RATIO_1, "left"))
    base = read_weights(tmp_path / "base")
    assert all(torch.equal(read_weights(tmp_path / "left")[part.name], base[part.name]) for part in result.left)


def test_a_bias_of_an_adapted_module_is_saved_with_it(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1, attention_bias=True)
    save_base(model, tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] += 1
        model.model.layers[0].self_attn.q_proj.bias += 1
    model.save_pretrained(tmp_path / "tuned")
    result = extracted(tmp_path, rank=1, rest="save")
    assert [part.name for part in result.saved] == ["model.layers.0.self_attn.q_proj.bias"]
    theirs = merged_by_peft(tmp_path / "base", tf.LlamaForCausalLM, tmp_path / "sea")
    carry_out(plan_of(tmp_path, RATIO_1))
    ours, wanted = read_weights(tmp_path / "out"), read_weights(tmp_path / "tuned")
    for name, tensor in wanted.items():
        assert (ours[name] - tensor).abs().max() < 1e-6, name
        assert (theirs[name] - tensor).abs().max() < 1e-6, name


def test_it_is_the_same_adapter_every_time_and_never_written_over(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("base", "tuned"):
        write_checkpoint(tmp_path / name, {"layers.0.q_proj.weight": random.normal(size=(40, 30)).astype(BF16)})
    extracted(tmp_path, rank=3)
    first = {path.name: path.read_bytes() for path in (tmp_path / "sea").iterdir()}
    assert sorted(first) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(Refused, match="exists already"):
        extracted(tmp_path, rank=3)
    (tmp_path / "sea").rename(tmp_path / "first")
    extracted(tmp_path, rank=3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "sea").iterdir()} == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "first", "sea", "tuned"]
    assert merged(tmp_path, RATIO_1)["layers.0.q_proj.weight"][0] == "BF16"


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (60, 40)])
def test_the_randomised_svd_is_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    rank = min(*shape, 5)
    u, s, v = truncated_svd(matrix, rank, "seed")
    assert torch.allclose(u.T @ u, torch.eye(rank), atol=1e-5) and torch.allclose(v.T @ v, torch.eye(rank), atol=1e-5)
    assert torch.allclose(s, torch.linalg.svdvals(matrix)[:rank], rtol=0.02)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    assert best - 1e-4 <= (matrix - (u * s) @ v.T).norm() <= 1.02 * best + 1e-4


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], str]] = {
    "nothing changed": ({"q.weight": (4, 4)}, {}, "nothing to extract"),
    "another shape": ({"q.weight": (4, 4)}, {"q.weight": (5, 4)}, "another form"),
    "a tensor too few": ({"q.weight": (4, 4), "k.weight": (4, 4)}, {"q.weight": (4, 4)}, "lacks 1 tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    ours, own, said = REFUSED[case]
    for name, shapes in (("base", ours), ("tuned", own or ours)):
        write_checkpoint(tmp_path / name, {key: np.ones(shape, "f4") for key, shape in shapes.items()})
    with pytest.raises(Refused, match=said):
        extracted(tmp_path, rank=2)
    assert not (tmp_path / "sea").exists()


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(tmp_path)
    arguments = ["extract-lora", "tuned", "--base", "base", "--rank", "4", "--out", "sea", "--rest", "leave"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "language_model" in done.stdout and "left as the base has it: model.norm.weight" in done.stdout
    assert json.loads((tmp_path / "sea/adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("harm", ["code beside the weights", "a class that is no model"])
def test_nothing_that_a_config_names_is_run(harm: str, tmp_path: Path) -> None:
    full(tmp_path)
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    if harm == "code beside the weights":
        config |= {"model_type": "unknown", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    else:
        config |= {"architectures": ["BatchEncoding"]}
    path.write_text(json.dumps(config))
    (tmp_path / "base/configuration_own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    command = [sys.executable, "-m", "ggez_merge", "extract-lora", "tuned", "--base", "base", "--rank", "2"]
    command += ["--out", "sea", "--rest", "leave"]
    done = subprocess.run(command, input="y\n" * 9, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists() and "custom code" not in done.stdout + done.stderr
