"""The files beside the weights: which travel, what becomes of the config, and tokenizers that do not match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from merging import INTERPOLATE, carry_out, merged, models, plan_of, refusals

from ggez_merge.errors import Failed

TRAVEL = {
    "generation_config.json": "{}",
    "tokenizer.json": '{"model": 1}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "preprocessor_config.json": "{}",
    "merges.txt": "a b",
    "spiece.model": "\u0001\u0002",
    "sentencepiece.bpe.model": "\u0001",
    "bpe.codes": "a b 1",  # PhoBERT
    "dict.txt": "a 1",  # BARTpho
    "tekken.json": "{}",  # Mistral
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "qwen.tiktoken": "x",
    "chat_template.jinja": "{{ old }}",
    "LICENSE": "do as you like",
    "NOTICE.md": "nothing",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
STAY = {
    ".gitattributes": "",
    ".hidden.json": "{}",
    "README.md": "the base's own",
    "trainer_state.json": "{}",
    "training_args.json": "{}",
    "adapter_config.json": "{}",
    "eval_results.json": "{}",
    "pytorch_model.bin.index.json": "{}",
    "pytorch_model.bin": "weights",
    "training_args.bin": "x",
    "optimizer.pt": "x",
    "picture.png": "x",
    "additional_chat_templates/notes.md": "x",
    "logs/events.json": "{}",
}
CONFIG = {"model_type": "llava", "torch_dtype": "float32", "text_config": {"dtype": "float32", "layers": 3}, "n": None}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    models(tmp_path, ["base", "one"], {"x": (9,)})
    for name, text in {**TRAVEL, **STAY, "config.json": json.dumps(CONFIG), "modeling.py": "print()"}.items():
        path = tmp_path / "base" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def output(folder: Path, **options: Any) -> dict[str, str]:
    merged(folder, INTERPOLATE, **options)
    out = folder / "out"
    weights = ("model.safetensors", "merge_report.json", "README.md", "config.json")
    return {
        str(path.relative_to(out)): path.read_text()
        for path in out.rglob("*")
        if path.is_file() and path.name not in weights
    }


def test_what_a_loader_needs_travels_and_nothing_else(pair: Path) -> None:
    assert output(pair) == TRAVEL


def test_custom_code_travels_only_if_asked_for(pair: Path) -> None:
    assert output(pair, copy_code=True) == {**TRAVEL, "modeling.py": "print()"}


def test_all_of_it_is_hashed_in_the_report_but_the_report_and_the_card(pair: Path) -> None:
    output(pair)
    report = json.loads((pair / "out" / "merge_report.json").read_text())
    assert {*report["outputs"]} == {*TRAVEL, "config.json", "model.safetensors"}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens but cannot be read")
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_file_that_cannot_be_read_is_named(name: str, pair: Path) -> None:
    (pair / "base" / name).unlink(missing_ok=True)
    (pair / "base" / name).symlink_to("/proc/self/mem")  # opens, and fails at the first byte
    with pytest.raises(Failed, match=f"{name}: cannot be read"):
        output(pair)
    assert not (pair / "out").exists()


def test_the_card_is_ours(pair: Path) -> None:
    output(pair)
    card = (pair / "out" / "README.md").read_text()
    assert "the base's own" not in card
    assert "linear interpolation" in card


def test_files_around_a_bare_weight_file_are_not_its_own(pair: Path) -> None:
    (pair / "base" / "config.json").unlink()
    assert output(pair) == {}
    assert not (pair / "out" / "config.json").exists()


class TestConfig:
    def config(self, pair: Path, *overrides: str) -> dict[str, Any]:
        carry_out(plan_of(pair, INTERPOLATE, overrides=overrides))
        found: dict[str, Any] = json.loads((pair / "out" / "config.json").read_text())
        return found

    def test_dtypes_are_those_of_the_weights_at_every_depth(self, pair: Path) -> None:
        text = {"dtype": "bfloat16", "layers": 3}
        assert self.config(pair) == {**CONFIG, "torch_dtype": "bfloat16", "text_config": text}

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_of_another_output_dtype(self, dtype: str, pair: Path) -> None:
        found = self.config(pair, f"out_dtype={dtype}")
        assert (found["torch_dtype"], found["text_config"]["dtype"]) == (dtype, dtype)

    def test_a_silent_config_is_told(self, pair: Path) -> None:
        (pair / "base" / "config.json").write_text('{"model_type": "llama"}')
        assert self.config(pair) == {"torch_dtype": "bfloat16", "model_type": "llama"}

    def test_a_diffusers_config_has_no_dtype(self, pair: Path) -> None:
        (pair / "base" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        assert self.config(pair) == {"_class_name": "UNet2DConditionModel"}

    def test_names_that_are_not_ascii(self, pair: Path) -> None:
        (pair / "base" / "config.json").write_text('{"_name": "Übersetzer 🌍", "dtype": "bfloat16"}', encoding="utf-8")
        assert self.config(pair)["_name"] == "Übersetzer 🌍"


class TestTokenizers:
    @pytest.mark.parametrize("source", ["union", "one", "base"])
    def test_equal_ones_are_no_obstacle(self, source: str, pair: Path) -> None:
        for name in ("tokenizer.json", "merges.txt", "spiece.model"):
            (pair / "one" / name).write_bytes((pair / "base" / name).read_bytes())
        assert plan_of(pair, INTERPOLATE, overrides=[f"tokenizer_source={source}"])

    @pytest.mark.parametrize("source", ["union", "one", "base"])
    def test_those_that_cannot_be_read_are_refused(self, source: str, pair: Path) -> None:
        (pair / "one" / "tokenizer.json").write_text('{"model": 2}')
        (pair / "one" / "config.json").write_text("{}")
        (problem,) = refusals(pair, INTERPOLATE, [f"tokenizer_source={source}"])
        assert problem.what.startswith("the vocabulary cannot be read")
        assert problem.place == str(pair / "base" / "tokenizer.json")

    def test_different_ones_are_worth_a_note(self, pair: Path) -> None:
        (pair / "one" / "tokenizer.json").write_text('{"model": 2}')
        (note,) = plan_of(pair, INTERPOLATE).notes
        assert note.startswith("one has other tokenizer files than base")

    def test_a_model_that_is_none_of_the_recipes(self, pair: Path) -> None:
        (problem,) = refusals(pair, INTERPOLATE, ["tokenizer_source=two"])
        assert problem.what == "tokenizer_source names no model of the recipe: 'two'"
        assert problem.expected == "base, union, or one of base, one"


class TestChatTemplate:
    def test_replaces_the_bases(self, pair: Path) -> None:
        carry_out(plan_of(pair, INTERPOLATE, overrides=["chat_template='{{ new }}'"]))
        assert (pair / "out" / "chat_template.jinja").read_text() == "{{ new }}"

    def test_auto_is_the_bases(self, pair: Path) -> None:
        carry_out(plan_of(pair, INTERPOLATE, overrides=["chat_template=auto"]))
        assert (pair / "out" / "chat_template.jinja").read_text() == "{{ old }}"

    def test_a_name_is_refused(self, pair: Path) -> None:
        (problem,) = refusals(pair, INTERPOLATE, ["chat_template=chatml"])
        assert "this is no chat template" in problem.what
