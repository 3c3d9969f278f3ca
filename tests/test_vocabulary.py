"""Vocabularies that differ: rows by token against a plain numpy merge, loaded by transformers, text round-tripped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from checkpoints import write_checkpoint
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from merging import LITTLE_MEMORY, arrays, merged, plan_of, refusals, tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ggez_merge.checkpoint import open_checkpoint
from ggez_merge.heads import is_vocabulary

TEXTS = [
    "สวัสดีครับ วันนี้อากาศดีมาก ไปกินข้าวกันไหม",
    "សួស្តី តើអ្នកសុខសប្បាយជាទេ ថ្ងៃនេះ",
    "ສະບາຍດີ ເຈົ້າສະບາຍດີບໍ່ ມື້ນີ້",
    "မင်္ဂလာပါ နေကောင်းလား ဒီနေ့",
    "Xin chào, hôm nay trời đẹp quá, đi ăn phở nhé",
    "வணக்கம், நீங்கள் எப்படி இருக்கிறீர்கள்",
]
RATIO = "{merge_method: linear, base_model: base, models: [{model: one}], parameters: {ratio: 0.25}}"
TASK = """
merge_method: task_arithmetic
base_model: base
models: [{model: one, parameters: {weight: 0.5}}, {model: two, parameters: {weight: 0.25}}]
"""
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def shuffled(tokenizer: Tokenizer, seed: int) -> Tokenizer:
    """The same tokens and merges under other numbers."""
    said = json.loads(tokenizer.to_str())
    numbers = list(said["model"]["vocab"].values())
    random.Random(seed).shuffle(numbers)
    said["model"]["vocab"] = dict(zip(said["model"]["vocab"], numbers, strict=True))
    for entry in said["added_tokens"]:
        entry["id"] = said["model"]["vocab"].get(entry["content"], entry["id"])
    return Tokenizer.from_str(json.dumps(said))


def save(
    folder: Path,
    tokenizer: Tokenizer,
    seed: int,
    tied: bool = False,
    padding: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    torch.manual_seed(seed)
    ids = tokenizer.get_vocab()
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(ids) + padding, tie_word_embeddings=tied, bos_token_id=ids["<s>"], eos_token_id=ids["</s>"],
    )  # fmt: skip
    tf.LlamaForCausalLM(config).to(dtype or torch.float32).save_pretrained(folder)
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def vocabulary(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def table(folder: Path, name: str) -> np.ndarray[Any, Any]:
    return arrays(folder)[name].reshape(-1, 16)


def check_loads(folder: Path) -> Any:
    """transformers loads it, with nothing missing or unexpected; its tokenizer gives back every text."""
    model, info = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == vocabulary(folder)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
        assert torch.isfinite(model(input_ids=ids).logits).all()
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0]
    return model


@pytest.fixture
def plain() -> Tokenizer:
    return train()


class TestByToken:
    def test_a_permuted_twin_gives_the_bases_bytes(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        other = shuffled(plain, 3)
        save(tmp_path / "one", other, 0)
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
        order = [plain.token_to_id(token) for token, _ in sorted(other.get_vocab().items(), key=lambda x: x[1])]
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight.data = weight.data[order].clone()
        model.save_pretrained(tmp_path / "one")
        assert tensors(tmp_path / "one") != tensors(tmp_path / "base")
        assert merged(tmp_path, _with(RATIO, "base")) == tensors(tmp_path / "base")
        assert merged(tmp_path, _with(RATIO, "one"), out="as-one") == tensors(tmp_path / "one")
        eos = json.loads((tmp_path / "as-one" / "config.json").read_text())["eos_token_id"]
        assert eos == other.token_to_id("</s>") != plain.token_to_id("</s>")
        check_loads(tmp_path / "as-one")

    @pytest.mark.parametrize("source", ["base", "one", "union"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_added_tokens_and_padding(self, source: str, tied: bool, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0, tied, padding=3)
        other = shuffled(plain, 5)
        other.add_tokens(["สวัสดี", "<|im_end|>"])
        save(tmp_path / "one", other, 1, tied, padding=5)
        merged(tmp_path, _with(RATIO, source))
        out, base, one = (vocabulary(tmp_path / name) for name in ("out", "base", "one"))
        assert out.keys() == {"base": base, "one": one, "union": base | one}[source].keys()
        for name in (EMBED,) if tied else (EMBED, HEAD):
            ours, theirs, found = (table(tmp_path / folder, name) for folder in ("base", "one", "out"))
            for token, row in out.items():
                b = ours[base[token]] if token in base else theirs[one[token]]
                x = theirs[one[token]] if token in one else b
                np.testing.assert_allclose(found[row], 0.75 * b + 0.25 * x, rtol=1e-6, atol=1e-9, err_msg=token)
            for row in set(range(len(found))) - set(out.values()):  # padding: the base's, or zero, but as it stands in
                b = ours[row] if len(base) <= row < len(ours) else np.zeros(16, "f4")  # who has the vocabulary already
                x = theirs[row] if source == "one" else b
                np.testing.assert_allclose(found[row], 0.75 * b + 0.25 * x, rtol=1e-6, atol=1e-9)
        model = check_loads(tmp_path / "out")
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert (HEAD in arrays(tmp_path / "out")) != tied

    def test_a_token_that_two_models_have_and_the_base_lacks(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0, dtype=torch.bfloat16)
        for seed, name in ((1, "one"), (2, "two")):
            other = shuffled(plain, seed)
            other.add_tokens(["ສະບາຍດີ", f"<{name}>"])
            save(tmp_path / name, other, seed, dtype=torch.float32 if name == "two" else torch.bfloat16)
        merged(tmp_path, _with(TASK, "union"))
        for name in (EMBED, HEAD):
            rows = {
                n: table(tmp_path / n, name)[vocabulary(tmp_path / n)["ສະບາຍດີ"]].astype("f8") for n in ("one", "two")
            }
            mean = (rows["one"] + rows["two"]) / 2
            expected = mean + 0.5 * (rows["one"] - mean) + 0.25 * (rows["two"] - mean)
            found = table(tmp_path / "out", name)[vocabulary(tmp_path / "out")["ສະບາຍດີ"]]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            alone = table(tmp_path / "one", name)[vocabulary(tmp_path / "one")["<one>"]].astype("f4")
            found = table(tmp_path / "out", name)[vocabulary(tmp_path / "out")["<one>"]]
            np.testing.assert_array_equal(found, alone)
        check_loads(tmp_path / "out")

    def test_a_union_as_mergekit_makes_it(self, tmp_path: Path, plain: Tokenizer) -> None:
        for seed, name in ((1, "one"), (2, "two")):
            other = shuffled(plain, seed)
            other.add_tokens(["ສະບາຍດີ", f"<{name}>", *(["<both>"] if name == "one" else [])])
            save(tmp_path / name, other, seed, padding=seed)
        plain.add_tokens(["<both>"])  # which the base and one of the models have
        save(tmp_path / "base", plain, 0, padding=3)
        merged(tmp_path, _with(TASK, "union"))
        said = {**yaml.safe_load(_with(TASK, "union")), "base_model": str(tmp_path / "base"), "dtype": "float32"}
        said["models"] = [{**entry, "model": str(tmp_path / entry["model"])} for entry in said["models"]]
        options = MergeOptions(quiet=True, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(said), str(tmp_path / "theirs"), options)
        out, theirs = vocabulary(tmp_path / "out"), vocabulary(tmp_path / "theirs")
        assert out.keys() == theirs.keys()
        for name in (EMBED, HEAD):
            found, expected = table(tmp_path / "out", name), table(tmp_path / "theirs", name)
            for token in out:
                np.testing.assert_allclose(found[out[token]], expected[theirs[token]], rtol=1e-6, atol=1e-8)

    def test_the_same_bytes_for_any_threads_and_memory(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        for seed, name in ((1, "one"), (2, "two")):
            other = shuffled(plain, seed)
            other.add_tokens(["<|x|>"])
            save(tmp_path / name, other, seed, dtype=torch.bfloat16, padding=seed)
        recipe = _with(TASK.replace("task_arithmetic", "ties"), "union")
        once = merged(tmp_path, recipe, threads=1)
        assert merged(tmp_path, recipe, out="again", threads=4, memory_bytes=LITTLE_MEMORY) == once


class TestVisionLanguage:
    @pytest.mark.parametrize("source", ["base", "one", "union"])
    def test_nested_sizes_and_token_ids_follow(self, source: str, tmp_path: Path, plain: Tokenizer) -> None:
        plain.add_tokens(["<image>"])
        other = shuffled(plain, 5)
        other.add_tokens(["<|im_end|>"])
        for seed, (name, tokenizer) in enumerate({"base": plain, "one": other}.items()):
            save(tmp_path / name, tokenizer, seed)  # for the tokenizer's files; the model is another
            self.llava(tmp_path / name, tokenizer, seed)
            for file in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
                (tmp_path / name / file).write_text(json.dumps({"of": name}))
            (tmp_path / name / "chat_template.jinja").write_text("{{ " + name + " }}")
        merged(tmp_path, _with(RATIO, source))
        out = tmp_path / "out"
        model, info = tf.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids = vocabulary(out)
        assert model.config.text_config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(ids)
        assert model.config.image_token_id == ids["<image>"]
        assert model.config.text_config.eos_token_id == ids["</s>"]
        folder = "one" if source == "one" else "base"
        assert (out / "chat_template.jinja").read_text() == "{{ " + folder + " }}"
        for file in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
            assert json.loads((out / file).read_text()) == {"of": "base"}

    def llava(self, folder: Path, tokenizer: Tokenizer, seed: int) -> None:
        torch.manual_seed(seed)
        ids = tokenizer.get_vocab()
        small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        text = tf.LlamaConfig(
            vocab_size=len(ids), num_key_value_heads=2, bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], **small
        )
        vision = tf.CLIPVisionConfig(image_size=8, patch_size=4, **small)
        config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=ids["<image>"])
        tf.LlavaForConditionalGeneration(config).save_pretrained(folder)


class TestTokensAndPadding:
    def policy(self, tokens: str) -> str:
        return RATIO[:-1] + f", tokenizer: {{source: base, tokens: {{{tokens}}}, pad_to_multiple_of: 64}}}}"

    @pytest.fixture
    def pair(self, tmp_path: Path, plain: Tokenizer) -> Path:
        save(tmp_path / "base", plain, 0, padding=2)
        other = shuffled(plain, 5)
        other.add_tokens(["<|im_end|>"])
        save(tmp_path / "one", other, 1)
        return tmp_path

    def test_rows_by_rule(self, pair: Path) -> None:
        merged(
            pair,
            self.policy(
                "'<|im_end|>': {source: one}, '<z>': {source: {kind: zero}}, '<c>': {source: {kind: model_token, "
                "model: one, token: '</s>'}}, '<s>': {source: {model: one, token_id: 7}, force: true}"
            ),
        )
        out, one = vocabulary(pair / "out"), vocabulary(pair / "one")
        found, theirs = table(pair / "out", EMBED), table(pair / "one", EMBED)
        assert found.shape[0] % 64 == 0 and found.shape[0] - len(out) < 64
        np.testing.assert_array_equal(found[out["<|im_end|>"]], theirs[one["<|im_end|>"]])
        np.testing.assert_array_equal(found[out["<z>"]], 0)
        np.testing.assert_array_equal(found[len(out) :], 0)
        np.testing.assert_array_equal(found[out["<c>"]], theirs[one["</s>"]])
        np.testing.assert_array_equal(found[out["<s>"]], theirs[7])
        check_loads(pair / "out")

    @pytest.mark.parametrize(
        ("tokens", "said"),
        [
            ("'<new>': {}", "no model has the token"),
            ("'<new>': {source: three}", "names no model of the recipe"),
            ("'<new>': {source: {kind: model_token, model: one, token: nix}}", "has no token 'nix'"),
            ("'<new>': {source: {kind: model_token, model: one, token_id: 100000}}", "has no token 100000"),
        ],
    )
    def test_rules_that_lead_nowhere(self, tokens: str, said: str, pair: Path) -> None:
        (problem,) = refusals(pair, self.policy(tokens))
        assert said in problem.what


class TestHeads:
    @pytest.mark.parametrize("tied", ["base", "one"])
    def test_one_is_tied_and_one_is_not(self, tied: str, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0, tied=tied == "base")
        save(tmp_path / "one", plain, 1, tied=tied == "one")
        (note,) = plan_of(tmp_path, RATIO).notes
        assert "has a head of its own" in note
        merged(tmp_path, RATIO)
        heads = [table(tmp_path / name, EMBED if name == tied else HEAD) for name in ("base", "one")]
        np.testing.assert_allclose(
            table(tmp_path / "out", HEAD), 0.75 * heads[0] + 0.25 * heads[1], rtol=1e-6, atol=1e-9
        )
        assert not check_loads(tmp_path / "out").config.tie_word_embeddings

    def test_a_head_that_should_be_there_is_missing(self, tmp_path: Path, plain: Tokenizer) -> None:
        for seed, name in enumerate(("base", "one")):
            save(tmp_path / name, plain, seed, tied=name == "one")
        path = tmp_path / "one" / "config.json"
        path.write_text(path.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
        (problem,) = refusals(tmp_path, RATIO)
        assert problem.what == "one lacks 1 tensor that base has" and problem.tensor == HEAD


class TestRefused:
    def test_other_shapes_without_a_policy_name_the_remedy(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        save(tmp_path / "one", plain, 1, padding=4)
        assert {problem.tensor for problem in refusals(tmp_path, RATIO)} == {EMBED, HEAD}
        assert all("tokenizer: {source: base}" in str(problem.remedy) for problem in refusals(tmp_path, RATIO))

    def test_a_union_with_tokens_that_are_no_added_ones(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        said = json.loads(plain.to_str())
        said["model"]["vocab"]["ĠĠ"] = len(said["model"]["vocab"])
        save(tmp_path / "one", Tokenizer.from_str(json.dumps(said)), 1)
        (problem,) = refusals(tmp_path, _with(RATIO, "union"))
        assert "no union" in problem.what and "ĠĠ" in str(problem.found)

    @pytest.mark.parametrize(
        "document",
        [
            "[]", "{", '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"a": 99999999999}}}',
            '{"model": {"vocab": [3]}}', '{"model": {"vocab": {"a": 0, "b": 0}}}', '{"model": {"vocab": 3}}',
            '{"model": {"vocab": {}}, "added_tokens": [{"id": "x", "content": "y"}]}', '{"model": {"vocab": [[]]}}',
            '{"model": {"vocab": {}}, "added_tokens": [3]}', '{"model": {"vocab": {}}, "added_tokens": 3}',
        ],
    )  # fmt: skip
    def test_a_file_that_is_no_tokenizer(self, document: str, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        save(tmp_path / "one", plain, 1)
        (tmp_path / "one" / "tokenizer.json").write_text(document)
        (problem,) = refusals(tmp_path, _with(RATIO, "base"))
        assert problem.what.startswith("the vocabulary cannot be read")

    def test_a_source_without_a_tokenizer_has_the_bases(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        save(tmp_path / "one", plain, 1, padding=4)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "one" / name).unlink()
        merged(tmp_path, _with(RATIO, "one"))
        assert vocabulary(tmp_path / "out") == vocabulary(tmp_path / "base")
        check_loads(tmp_path / "out")

    def test_all_files_of_a_tokenizer_are_the_sources(self, tmp_path: Path, plain: Tokenizer) -> None:
        theirs = ("bpe.codes", "dict.txt", "tekken.json", "sentencepiece.bpe.model", "chat_template.jinja")
        for number, name in enumerate(("base", "one")):
            save(tmp_path / name, plain, number)
            for file in (*theirs, "processor_config.json"):
                (tmp_path / name / file).write_text(name)
        merged(tmp_path, _with(RATIO, "one"))
        assert [(tmp_path / "out" / file).read_text() for file in theirs] == ["one"] * len(theirs)
        assert (tmp_path / "out" / "processor_config.json").read_text() == "base"

    @pytest.mark.parametrize(
        ("name", "shape", "expected"),
        [
            ("language_model.backbone.embeddings.weight", (9, 4), True),
            ("encoder.embeddings.patch_embeddings.projection.weight", (9, 4), False),
            ("cls.predictions.decoder.weight", (9, 4), True),
            ("cls.predictions.bias", (9,), True),
            ("cls.predictions.transform.dense.weight", (4, 4), False),
            ("text_decoder.cls.predictions.transform.dense.bias", (4,), False),
            ("final_logits_bias", (1, 9), False),
        ],
    )
    def test_which_tensors_have_a_row_for_each_token(
        self, name: str, shape: tuple[int, ...], expected: bool, tmp_path: Path
    ) -> None:
        checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "it", {name: np.zeros(shape, np.float32)})))
        assert is_vocabulary(name, checkpoint.tensors[name]) == expected

    def test_a_tokenizer_that_may_be_of_another_model(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        save(tmp_path / "one", shuffled(plain, 1), 1)
        (tmp_path / "one" / "config.json").unlink()
        (problem,) = refusals(tmp_path, _with(RATIO, "one"))
        assert "not clear" in problem.what

    def test_a_tokenizer_larger_than_the_embeddings(self, tmp_path: Path, plain: Tokenizer) -> None:
        save(tmp_path / "base", plain, 0)
        save(tmp_path / "one", plain, 1)
        plain.add_tokens(["<1>"])
        plain.save(str(tmp_path / "one" / "tokenizer.json"))
        found = refusals(tmp_path, _with(RATIO, "base"))
        assert {problem.what for problem in found} == {"the tokenizer has more tokens than this tensor has rows"}


def _with(recipe: str, source: str) -> str:
    tokenizer = f"tokenizer: {{source: {source}}}"
    return f"{recipe[:-1]}, {tokenizer}}}" if recipe.startswith("{") else f"{recipe}{tokenizer}\n"
