"""Authors' own layouts beside transformers': merged where every tensor is accounted for, refused where not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from checkpoints import write_checkpoint
from merging import INTERPOLATE, merged, plan_of, refusals
from models import LAYOUTS, original_internvl, original_llava, randomised, read_weights
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
ORIGINALS: dict[str, Callable[[State], State]] = {
    "internvl": original_internvl,
    "llava": original_llava,
    "llava_onevision": original_llava,
}


def pair(family: str, folder: Path, authors: str) -> tuple[tf.PreTrainedModel, State, State]:
    """Folders base and one, that of `authors` in the authors' layout; the model, and what both hold in memory's."""
    torch.manual_seed(0)
    model = randomised(LAYOUTS[family](), seed=0)
    states = []
    for seed, name in enumerate(("base", "one")):
        state = {key: tensor.clone() for key, tensor in randomised(model, seed=seed).state_dict().items()}
        states.append(state)
        model.save_pretrained(folder / name)
        if name == authors:
            kind = "internvl_chat" if family == "internvl" else "llava_llama"
            (folder / name / "config.json").write_text(json.dumps({"model_type": kind}))
            save_file(ORIGINALS[family](state), folder / name / "model.safetensors", {"format": "pt"})
    return model, states[0], states[1]


@pytest.mark.parametrize("family", ORIGINALS)
@pytest.mark.parametrize("authors", ["base", "one"])
def test_the_authors_layout_merges_with_that_of_transformers(family: str, authors: str, tmp_path: Path) -> None:
    model, before, after = pair(family, tmp_path, authors)
    merged(tmp_path, INTERPOLATE)
    expected = {name: (0.7 * before[name].double() + 0.3 * after[name].double()).float() for name in before}
    if authors == "base":
        found = read_weights(tmp_path / "out")
        wanted = ORIGINALS[family](expected)
        assert found.keys() == wanted.keys()
    else:
        loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert {key: what for key, what in info.items() if what} == {}
        found, wanted = loaded.state_dict(), expected
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_the_plan_says_which_is_which(tmp_path: Path) -> None:
    pair("internvl", tmp_path, "one")
    (renaming,) = plan_of(tmp_path, INTERPOLATE).renamings
    ours = "vision_tower.encoder.layer.*"
    assert {str(rule) for rule in renaming.rules} >= {
        f"vision_model.encoder.layers.*.norm1.* ↔ {ours}.layernorm_before.*: 4 tensors",
        f"vision_model.encoder.layers.*.ls2 ↔ {ours}.lambda_2: 2 tensors",
        f"vision_model.encoder.layers.*.attn.qkv.weight ↔ {ours}.attention.(q_proj, k_proj, v_proj).weight: 6 tensors",
        "mlp1.3.* ↔ multi_modal_projector.linear_2.*: 2 tensors",
    }


@pytest.mark.parametrize("why", ["another name", "two extras"])
def test_a_table_that_leaves_something_open_is_not_followed(why: str, tmp_path: Path) -> None:
    pair("internvl", tmp_path, "one")
    path = tmp_path / "one" / "model.safetensors"
    state = read_weights(tmp_path / "one")
    name = "vision_model.encoder.layers.0.norm1.weight"
    if why == "another name":
        state["vision_model.encoder.layers.0.first_norm.weight"] = state.pop(name)
    if why == "two extras":
        state |= {f"vision_model.encoder.layers.{i}.attn.q_norm.weight": torch.ones(4) for i in range(2)}
    save_file(state, path, {"format": "pt"})
    said = " ".join(str(problem) for problem in refusals(tmp_path, INTERPOLATE))
    assert "one lacks" in said and "in groups: " in said and "save both with one version of transformers" in said


def test_without_transformers_its_tables_are_not_known(tmp_path: Path) -> None:
    """A refusal, not a crash, and never a part of the names."""
    pair("internvl", tmp_path, "one")
    (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
    code = "import sys; sys.modules['transformers'] = None; from ggez_merge.cli import main; main()"
    command = [sys.executable, "-c", code, "recipe.yaml", "--out", "out", "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "one lacks" in result.stderr and "Traceback" not in result.stderr


def test_another_family_with_the_same_sizes_is_refused(tmp_path: Path) -> None:
    """OpenCLIP's text and vision blocks have all of CLIP's shapes; no table of transformers is for them."""
    torch.manual_seed(0)
    state = LAYOUTS["clip"]().state_dict()
    write_checkpoint(tmp_path / "base", {name: tensor.numpy() for name, tensor in state.items()})
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^text_model\.encoder\.layers", "transformer.resblocks", name)
        name = re.sub(r"^vision_model\.encoder\.layers", "visual.transformer.resblocks", name)
        for old, new in (("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
            name = name.replace(old, new)
        renamed[name] = tensor.numpy()
    write_checkpoint(tmp_path / "one", renamed)
    said = " ".join(str(problem) for problem in refusals(tmp_path, INTERPOLATE))
    assert "one lacks" in said and "ln_1" in said
