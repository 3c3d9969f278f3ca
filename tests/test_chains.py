"""Stages of a recipe: a chain gives what its merges give one after the other, and writes nothing of what is between."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import write_checkpoint
from fake_device import Hostile
from mergekit.scripts.multimerge import load_config
from merging import (
    BF16,
    DTYPES,
    LITTLE_MEMORY,
    carry_out,
    command_line,
    contents,
    merged,
    models,
    plan_of,
    refusals,
    scratch,
    sparse,
    tensors,
)

from ggez_merge.errors import Interrupted, Refused
from ggez_merge.lineage import MOST_ENTRIES, MOST_LINES, MOST_TEXT
from ggez_merge.plan import free_bytes
from ggez_merge.progress import Silent
from ggez_merge.recipe import parse_recipe, references
from ggez_merge.run import Outcome, Stop
from ggez_merge.write import REPORT

EMBED = "model.embed_tokens.weight"
SHAPES = {
    EMBED: (37, 5),
    **{f"model.layers.{i}.mlp.up_proj.weight": (41, 5) for i in range(3)},
    **{f"model.layers.{i}.input_layernorm.weight": (5,) for i in range(3)},
    "model.norm.weight": (5,),
    "scalar": (),
    "large": (3, 5, 9001),
}
BUFFER = "model.position_ids"
CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 37, "dtype": "float32"}

BOTH = "base_model: base\nmodels: [{model: A, parameters: {P}}, {model: B, parameters: {P}}]\n"
ONE = "base_model: base\nmodels: [{model: A}]\n"
METHODS = {
    "ratio": "merge_method: linear\nparameters: {ratio: 0.3}\n" + ONE,
    "soup": "merge_method: linear\n" + BOTH.replace("P}", "weight: 0.7}").replace("base_model: base\n", ""),
    "task arithmetic": "merge_method: task_arithmetic\n" + BOTH.replace("P}", "weight: 0.6}"),
    "ties": "merge_method: ties\n" + BOTH.replace("P}", "weight: 0.6, density: 0.5}"),
    "ties over all": "merge_method: ties\nparameters: {scope: global, rescale: true}\n"
    + BOTH.replace("P}", "weight: 0.6, density: 0.5}"),
    "dare": "merge_method: dare_linear\nparameters: {seed: 3}\n" + BOTH.replace("P}", "weight: 0.6, density: 0.5}"),
    "dare ties": "merge_method: dare_ties\n" + BOTH.replace("P}", "weight: 0.6, density: 0.5}"),
    "slerp": "merge_method: slerp\nparameters: {t: 0.4}\n" + ONE,
    "passthrough": "merge_method: passthrough\nmodels: [{model: A, parameters: {scale: 0.7}}]\n",
}


def document(method: str, a: str, b: str = "", name: str | None = None, **more: object) -> str:
    """One merge of A and, where the method takes two, B."""
    text = METHODS[method].replace("model: A", f"model: {a}").replace("model: B", f"model: {b}")
    return (f"name: {name}\n" if name else "") + text + "".join(f"{k}: {json.dumps(v)}\n" for k, v in more.items())


def chain(*documents: str) -> str:
    return "---\n".join(documents)


DEEP = chain(
    document("slerp", "one", name="first", dtype="float16"),
    document("ties", "first", "two", name="second", out_dtype="bfloat16"),
    document("dare ties", "second", "first", name="third"),
    document("task arithmetic", "third", "second"),
)


def family(folder: Path) -> None:
    """Three models far from each other, each with its tensors in other dtypes and other orders, and a buffer."""
    random = np.random.default_rng(1)
    values = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    for number, model in enumerate(("base", "one", "two")):
        arrays: dict[str, np.ndarray[Any, Any]] = {BUFFER: np.arange(9, dtype=np.int64)}
        for position, (name, value) in enumerate(values.items()):
            step = random.integers(-8, 9, size=value.shape) / 8 * (number > 0)
            arrays[name] = np.asarray(value + step, DTYPES[("F32", "BF16", "F16")[(position + number) % 3]])
        order = sorted(arrays, reverse=number == 1)
        write_checkpoint(folder / model, {name: arrays[name] for name in order}, config=CONFIG, shards=1 + number)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trio")
    family(folder)
    return folder


def made(folder: Path) -> dict[str, bytes]:
    """All files of a merge but those that tell how it came about."""
    return {name: raw for name, raw in contents(folder).items() if name != "README.md"}


def linked(folder: Path, to: Path) -> Path:
    """A folder with the same models."""
    for path in folder.iterdir():
        (to / path.name).symlink_to(path)
    return to


def of_chain(folder: Path, recipe: str, **options: Any) -> dict[str, bytes]:
    with scratch() as temporary:
        carry_out(plan_of(folder, recipe, temporary / "out"), **options)
        assert [path.name for path in temporary.iterdir()] == ["out"]
        return made(temporary / "out")


def by_hand(folder: Path, recipe: str, **options: Any) -> dict[str, bytes]:
    """The same merges one after the other, each written to a folder that is called as the stage."""
    with scratch() as temporary:
        linked(folder, temporary)
        for said in yaml.safe_load_all(recipe):
            name = said.pop("name", "out")
            said.pop("output", None)
            carry_out(plan_of(temporary, yaml.safe_dump(said, sort_keys=False), name), **options)
        return made(temporary / "out")


class TestTheSameBytesAsThroughTheDisk:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_as_a_stage_and_on_top_of_one(self, method: str, trio: Path) -> None:
        recipe = chain(document(method, "one", "two", name="stage"), document(method, "stage", "one"))
        assert of_chain(trio, recipe) == by_hand(trio, recipe)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
    def test_a_stage_is_rounded_to_its_dtype(self, dtype: str, trio: Path) -> None:
        recipe = chain(document("ratio", "one", name="stage", dtype=dtype), document("slerp", "stage"))
        assert of_chain(trio, recipe) == by_hand(trio, recipe)

    def test_stages_of_stages(self, trio: Path) -> None:
        assert of_chain(trio, DEEP) == by_hand(trio, DEEP)

    def test_layers_stacked_in_a_stage_and_again_after_it(self, trio: Path) -> None:
        def slices(*parts: tuple[str, int, int]) -> str:
            of = [{"sources": [{"model": model, "layer_range": [a, b]}]} for model, a, b in parts]
            return "merge_method: passthrough\nslices: " + json.dumps(of) + "\n"

        recipe = chain(
            "name: tall\n" + slices(("base", 0, 3), ("one", 1, 3)),
            slices(("tall", 2, 5), ("base", 0, 1)) + "dtype: bfloat16\n",
        )
        found = of_chain(trio, recipe)
        assert found == by_hand(trio, recipe)
        assert json.loads(found["config.json"])["num_hidden_layers"] == 4

    def test_the_layout_may_be_a_stage(self, trio: Path) -> None:
        text = document("ratio", "one").replace("base_model: base", "base_model: stage")
        recipe = chain(document("passthrough", "two", name="stage"), text)
        assert of_chain(trio, recipe) == by_hand(trio, recipe)

    def test_tensors_that_are_copied_or_left_to_the_base(self, tmp_path: Path) -> None:
        plain = {"a": np.ones(3, BF16), BUFFER: np.arange(4)}
        write_checkpoint(tmp_path / "base", plain | {"only": np.full(5, 0.1, np.float32)}, config=CONFIG)
        write_checkpoint(tmp_path / "one", plain | {"a": np.zeros(3, np.float32), BUFFER: np.arange(4) + 1})
        recipe = chain(
            document("ratio", "one", name="stage", missing="copy", buffers="base", dtype="float16"),
            document("ratio", "stage", dtype="float32"),
        )
        found = of_chain(tmp_path, recipe)
        assert found == by_hand(tmp_path, recipe)
        assert b'"only":{"dtype":"F32"' in found["model.safetensors"]

    def test_heads_that_are_tied(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        for name, tied in (("base", True), ("one", False)):
            weights = {EMBED: random.normal(size=(9, 5)).astype(BF16)}
            weights |= {} if tied else {"lm_head.weight": random.normal(size=(9, 5)).astype(BF16)}
            write_checkpoint(tmp_path / name, weights, config=CONFIG | {"tie_word_embeddings": tied})
        recipe = chain(document("ratio", "one", name="stage"), document("slerp", "stage"))
        found = of_chain(tmp_path, recipe)
        assert found == by_hand(tmp_path, recipe)
        assert json.loads(found["config.json"])["tie_word_embeddings"] is False

    @pytest.mark.parametrize("source", ["union", "base", "stage"])
    def test_vocabularies_that_grow_from_stage_to_stage(self, source: str, tmp_path: Path) -> None:
        for seed, (name, tokens) in enumerate({"base": "abc", "one": "cbad", "two": "bacde"}.items()):
            random = np.random.default_rng(seed)
            ids = {token: number for number, token in enumerate(tokens[:3])}
            added = [{"id": 3 + i, "content": token} for i, token in enumerate(tokens[3:])]
            weights = {
                name: random.normal(size=(len(tokens) + 1, 5)).astype(BF16) for name in (EMBED, "lm_head.weight")
            }
            write_checkpoint(tmp_path / name, weights, config=CONFIG | {"vocab_size": len(tokens) + 1})
            said = {"model": {"type": "BPE", "vocab": ids, "merges": []}, "added_tokens": added}
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(said))
        last = document("task arithmetic", "stage", "two", tokenizer={"source": source})
        recipe = chain(document("ratio", "one", name="stage", tokenizer_source="union"), last)
        found = of_chain(tmp_path, recipe)
        assert found == by_hand(tmp_path, recipe)
        assert (b'"e"' in found["tokenizer.json"]) == (source == "union")

    @pytest.mark.parametrize(
        "recipe", [DEEP, chain(document("slerp", "one", name="s"), document("ties over all", "s", "two"))]
    )
    def test_whatever_threads_memory_and_shards(self, recipe: str, trio: Path) -> None:
        whole = of_chain(trio, recipe, threads=1)
        assert of_chain(trio, recipe, threads=3, memory_bytes=3 * LITTLE_MEMORY) == whole
        with scratch() as temporary:
            cut = plan_of(trio, recipe, temporary / "out", ["output.shard_size=1KB"])
            carry_out(cut, memory_bytes=2 * LITTLE_MEMORY)
            assert len(cut.shards) > 3
            carry_out(plan_of(trio, recipe, temporary / "whole"))
            assert tensors(temporary / "out") == tensors(temporary / "whole")

    def test_on_a_device_stages_are_the_processors(self, trio: Path) -> None:
        recipe = chain(document("slerp", "one", name="first"), document("ties", "first", "two"))
        with Hostile(0) as hostile:
            assert of_chain(trio, recipe, device=hostile.device(3), threads=None) == of_chain(trio, recipe)

    def test_the_order_of_documents_does_not_matter(self, trio: Path) -> None:
        first, second, third, last = DEEP.split("---\n")
        whole = of_chain(trio, DEEP)
        assert of_chain(trio, chain(last, third, second, first)) == whole
        assert of_chain(trio, chain(second, first, third, "name: last\n" + last)) == whole

    def test_memory_is_accounted_for(self, trio: Path) -> None:
        plan = plan_of(trio, DEEP)
        chunk = 1 << 16
        assert plan.chunk_bytes > 3 * chunk * 2 * 2
        with pytest.raises(Refused, match="too small") as caught:
            carry_out(plan, threads=1, memory_bytes=plan.chunk_bytes)
        (needed,) = re.findall(r"at least ([\d,]+)", str(caught.value))
        enough = int(needed.replace(",", ""))
        assert enough > plan.chunk_bytes + 3 * chunk * 4
        assert of_chain(trio, DEEP, threads=1, memory_bytes=enough) == of_chain(trio, DEEP)


class StopAt(Silent):
    """Stops a merge once so many bytes are done, counted over everything that it does."""

    def __init__(self, n_bytes: int, stop: Stop) -> None:
        self.left, self.stop = n_bytes, stop

    def advance(self, n_bytes: int) -> None:
        self.left -= n_bytes
        if self.left <= 0:
            self.stop.ask(2)


WRITTEN = chain(
    document("slerp", "one", name="first"),
    document("ties", "first", "two", name="second", output={"path": "second"}),
    document("task arithmetic", "second", "first", output={"path": "out"}),
)


class TestInterrupted:
    @pytest.mark.parametrize("recipe", [DEEP, WRITTEN], ids=["deep", "written"])
    def test_a_chain_is_resumed_to_the_same_bytes(self, recipe: str, trio: Path) -> None:
        whole = of_chain(trio, recipe.replace("output:", "sweep: {x: 1}\nevaluate:"))
        with scratch() as temporary:
            linked(trio, temporary)
            moment, stops = 0, 0
            while True:
                moment += 400_000
                stop = Stop()
                try:
                    little = {"threads": 1, "memory_bytes": LITTLE_MEMORY}
                    carry_out(plan_of(temporary, recipe), StopAt(moment, stop), stop, resume=moment > 400_000, **little)
                except Interrupted:
                    stops += 1
                    continue
                break
            assert stops >= 3
            assert made(temporary / "out") == whole
            assert not list(temporary.glob("*.partial"))

    def test_a_stage_that_has_changed_is_not_resumed(self, trio: Path) -> None:
        with scratch() as temporary:
            linked(trio, temporary)
            stop = Stop()
            with pytest.raises(Interrupted):
                carry_out(plan_of(temporary, DEEP), StopAt(1, stop), stop)
            with pytest.raises(Refused, match="another one"):
                carry_out(plan_of(temporary, DEEP, overrides=["first:parameters.t=0.5"]), resume=True)


class TestStagesThatAreWritten:
    def test_it_is_a_merge_of_its_own_and_changes_nothing(self, trio: Path) -> None:
        plain = WRITTEN.replace('output: {"path": "second"}\n', "")
        with scratch() as temporary, scratch() as other:
            carry_out(plan_of(linked(trio, temporary), WRITTEN))
            assert made(temporary / "out") == of_chain(trio, plain) == by_hand(trio, plain)
            first, second, _ = plain.split("---\n")
            linked(trio, other)
            for name, text in (("first", first), ("second", second)):
                merged(other, text, name)
            assert made(temporary / "second") == made(other / "second")
            for folder in ("second", "out"):
                assert command_line("verify", folder, cwd=temporary).returncode == 0
            report = json.loads((temporary / "out" / REPORT).read_text())
            assert [stage["name"] for stage in report["stages"]] == ["first"]
            (there,) = (entry for entry in report["inputs"] if entry["reference"] == "second")  # read from the disk
            assert there["files"].keys() == {"model.safetensors"} and there["origin"]["unchanged"]
            assert [stage["name"] for stage in there["origin"]["stages"]] == ["first"]
            again = (temporary / "second" / REPORT).read_text()
            carry_out(plan_of(temporary, json.loads(again)["recipe"], "again"))  # what its report says is a recipe
            assert made(temporary / "again") == made(temporary / "second")

    def test_what_is_there_is_taken_up_replaced_or_refused(self, trio: Path) -> None:
        with scratch() as temporary:
            carry_out(plan_of(linked(trio, temporary), WRITTEN))
            with pytest.raises(Refused, match="exists already"):
                carry_out(plan_of(temporary, WRITTEN))
            before = (temporary / "second" / REPORT).stat().st_mtime_ns
            assert carry_out(plan_of(temporary, WRITTEN), resume=True) is None
            assert (temporary / "second" / REPORT).stat().st_mtime_ns == before
            assert carry_out(plan_of(temporary, WRITTEN, overrides=["second:dtype=float32"]), overwrite=True)
            assert {dtype for dtype, _ in tensors(temporary / "second").values()} == {"F32", "I64"}

    def test_everything_in_the_way_is_refused_before_anything_is_merged(self, trio: Path) -> None:
        with scratch() as temporary:
            linked(trio, temporary)
            (temporary / "out").mkdir()
            (temporary / "out" / "mine").touch()
            with pytest.raises(Refused, match="exists already"):
                carry_out(plan_of(temporary, WRITTEN))
            assert not (temporary / "second").exists()

    @pytest.mark.parametrize(("second", "out"), [("out", "out"), ("out/second", "out"), ("one", "out"), (".", "out")])
    def test_outputs_in_the_way_of_each_other(self, second: str, out: str, trio: Path) -> None:
        recipe = WRITTEN.replace('"second"}', f'"{second}"}}')
        assert any("the output folder is (or holds)" in problem.what for problem in refusals(trio, recipe, out=out))

    def test_two_stages_cannot_have_one_folder(self, trio: Path) -> None:
        pair = [document("slerp", "one", name=name, output={"path": "same"}) for name in "ab"]
        (problem,) = refusals(trio, chain(*pair, document("task arithmetic", "a", "b")))
        assert problem.what == "the output folder is (or holds) another output"

    def test_space_is_needed_for_all_of_them(self, tmp_path: Path) -> None:
        free = free_bytes(tmp_path)
        for name in ("base", "one"):
            sparse(tmp_path / name / "model.safetensors", {"a": ("F32", (free // 4 * 6 // 10,))})
        stage = document("slerp", "one", name="stage", output={"path": "stage"})
        (problem,) = refusals(tmp_path, chain(stage, document("ratio", "stage")))
        assert "not enough free space" in problem.what and "stage, " in str(problem.place)
        plan_of(tmp_path, chain(stage.replace("output", "sweep"), document("ratio", "stage")))


def two(first: str, second: str) -> str:
    return f"merge_method: linear\nname: a\n{first}\n---\n\nmerge_method: linear\n{second}\nparameters: {{ratio: 1}}\n"


AVERAGE = "models: [{model: one, parameters: {weight: 1}}]"


class TestRefusals:
    @pytest.mark.parametrize(
        ("recipe", "place", "said"),
        [
            (two(AVERAGE, "base_model: base\nmodels: [{model: b}]"), 8, "neither a document nor a folder"),
            (two(AVERAGE, "base_model: base\nmodels: [{model: one}]"), 2, "no document uses 'a'"),
            (two(AVERAGE, "name: a\nbase_model: base\nmodels: [{model: a}]"), 7, "two documents are called 'a'"),
            (two(AVERAGE, "name: b\nbase_model: a\nmodels: [{model: b}]"), 7, "documents need each other"),
            (two(AVERAGE, "base_model: base\nmodels: [{model: a@main}]"), 8, "has no revisions"),
            (two(AVERAGE, "base_model: base\nmodels: [{model: a}]\nout_dtyp: x"), 9, "did you mean `out_dtype`"),
            (two(AVERAGE, "base_model: base\nmodels: [{model: a}, {model: a}]"), 8, "listed twice"),
            (two(AVERAGE + "\nwieght: 1", "base_model: base\nmodels: [{model: a}]"), 4, "`wieght` is not a key"),
            (two(AVERAGE + "\nout_dtype: x", "base_model: base\nmodels: [{model: a}]"), 4, "must be one of"),
            (
                two(AVERAGE + "\nparameters: {ratio: 1}", "base_model: base\nmodels: [{model: a}]"),
                1,
                "needs a base_model",
            ),
            (two(AVERAGE + "\noutput: {shard_size: 1GB}", "base_model: base\nmodels: [{model: a}]"), 4, "not written"),
            (two(AVERAGE, "base_model: base\nmodels: [{model: a}]").replace("name: a", "name: ../a"), 2, "the name of"),
            (two(AVERAGE, "base_model: base\nmodels: [{model: a}]").replace("name: a\n", ""), 5, "have no name"),
            (
                two(AVERAGE, "base_model: one\nmodels: [{model: base}]").replace("name: a", "name: one"),
                2,
                "and a folder",
            ),
            (
                two(AVERAGE, "base_model: base\nmodels: [{model: a}]").replace("linear\nname", "lerp\nname"),
                1,
                "no merge",
            ),
            (two("models: [{model: a}]", "base_model: base\nmodels: [{model: a}]"), 2, "need each other"),
        ],
    )
    def test_the_line_of_the_right_document(self, recipe: str, place: int, said: str, trio: Path) -> None:
        found = [(str(problem.place).rpartition(":")[2], str(problem)) for problem in refusals(trio, recipe)]
        assert [where for where, text in found if said in text] == [str(place)], found

    def test_a_circle_is_shown(self, trio: Path) -> None:
        ring = [document("ratio", other, name=name) for name, other in zip("abc", "bca", strict=True)]
        (problem,) = refusals(trio, chain(*ring, document("ratio", "a")))
        assert re.sub(r" \(.*?\)", "", str(problem.found)) == "a uses b, which uses c, which uses a"

    def test_all_of_all_documents_at_once(self, trio: Path) -> None:
        broken = document("ratio", "one", name="a").replace("ratio: 0.3", "ratoi: 0.3")
        other = document("slerp", "missing/model", name="b")
        found = refusals(trio, chain(broken, other, document("task arithmetic", "a", "b")))
        said = " ".join(str(problem) for problem in found)
        assert "ratoi" in said and "missing/model" in said

    def test_too_many_documents(self, trio: Path) -> None:
        links = [document("ratio", f"s{i - 1}" if i else "one", name=f"s{i}") for i in range(64)]
        (problem,) = refusals(trio, chain(*links, document("ratio", "s63")))
        assert "too many" in problem.what

    def test_a_chain_as_long_as_may_be(self, tmp_path: Path) -> None:
        models(tmp_path, ("base", "one"), {"a": (3,)})
        links = [document("ratio", f"s{i - 1}" if i else "one", name=f"s{i}") for i in range(63)]
        recipe = chain(*links, document("ratio", "s62"))
        assert of_chain(tmp_path, recipe, memory_bytes=1 << 30) == by_hand(tmp_path, recipe)

    def test_stages_that_use_each_other_twice_are_planned_at_once(self, tmp_path: Path) -> None:
        models(tmp_path, ("base", "one", "two"), {"a": (3,)})
        pairs = [("one", "two"), *((f"x{i}", f"y{i}") for i in range(30))]
        links = [
            document("task arithmetic", *pair, name=f"{side}{i}") for i, pair in enumerate(pairs[:-1]) for side in "xy"
        ]
        plan = plan_of(tmp_path, chain(*links, document("task arithmetic", "x29", "y29")))
        assert len(plan.fingerprint) == 32
        assert plan.read_bytes > 2**30


class TestOverrides:
    def test_each_reaches_its_document(self, trio: Path) -> None:
        recipe = chain(document("slerp", "one", name="st.age"), document("ratio", "st.age"))
        changed = recipe.replace("t: 0.4", "t: 0.9").replace("ratio: 0.3", "ratio: 0.5")
        plan = plan_of(trio, recipe, overrides=["st.age:parameters.t=0.9", "parameters.ratio=0.5"])
        assert plan.fingerprint == plan_of(trio, changed).fingerprint != plan_of(trio, recipe).fingerprint
        assert parse_recipe(plan.recipe.text, trio / "recipe.yaml").stages[0].parameters == {"t": 0.9}

    @pytest.mark.parametrize(
        ("override", "said"),
        [("stgae:dtype=float32", "did you mean `stage`?"), ("stage:dtyp=float32", "did you mean `dtype`")],
    )
    def test_what_reaches_none_is_refused(self, override: str, said: str, trio: Path) -> None:
        recipe = chain(document("slerp", "one", name="stage"), document("ratio", "stage"))
        (problem,) = refusals(trio, recipe, [override])
        assert said in str(problem) and problem.place == f"--set {override}"


class TestBadWeights:
    def spoil(self, folder: Path, value: float, where: Sequence[int] = (3, 70_000)) -> None:
        models(folder, ("base", "one", "two"), {"a": (100_000,), "b": (3,)}, np.dtype("f4"))
        values = np.frombuffer((raw := tensors(folder / "one"))["a"][1], "f4").copy()
        values[list(where)] = value
        write_checkpoint(folder / "one", {"a": values, "b": np.frombuffer(raw["b"][1], "f4")})

    @pytest.mark.parametrize("method", ["ratio", "ties", "slerp"])
    def test_nan_is_found_where_it_comes_in_and_told_once(self, method: str, tmp_path: Path) -> None:
        self.spoil(tmp_path, np.nan)
        recipe = chain(
            document(method, "one", "two", name="first"),
            document("slerp", "first", name="second"),
            document(method, "second", "two"),
        )
        with pytest.raises(Refused) as caught:
            merged(tmp_path, recipe)
        (problem,) = caught.value.problems
        assert (problem.tensor, problem.found) == ("a", "2 of 100,000 elements")
        assert problem.place == str(tmp_path / "one" / "model.safetensors")
        assert "in first" in str(problem.remedy)
        assert not list(tmp_path.glob("out*"))

    def test_a_stage_that_lets_it_through_is_named_by_what_does_not(self, tmp_path: Path) -> None:
        self.spoil(tmp_path, np.nan)
        recipe = chain(document("ratio", "one", name="first", nonfinite="allow"), document("slerp", "first"))
        with pytest.raises(Refused) as caught:
            merged(tmp_path, recipe)
        (problem,) = caught.value.problems
        assert problem.place == "stage first/model.safetensors"
        merged(tmp_path, recipe + "nonfinite: allow\n")

    def test_a_stage_too_large_for_its_dtype(self, tmp_path: Path) -> None:
        self.spoil(tmp_path, 1e6)
        recipe = chain(document("passthrough", "one", name="first", dtype="float16"), document("ratio", "first"))
        with pytest.raises(Refused) as caught:
            merged(tmp_path, recipe)
        (problem,) = caught.value.problems
        assert "too large for F16" in problem.what
        assert (problem.place, problem.found) == ("stage first", "2 elements overflow")

    def test_integers_that_differ_in_a_stage(self, tmp_path: Path) -> None:
        for number, name in enumerate(("base", "one")):
            ids = np.arange(200_000)
            ids[-1] += number
            write_checkpoint(tmp_path / name, {"a": np.ones(2, BF16), "ids": ids})
        recipe = chain(document("ratio", "one", name="first"), document("ratio", "first"))
        with pytest.raises(Refused) as caught:
            merged(tmp_path, recipe)
        (problem,) = caught.value.problems
        assert "cannot be averaged" in problem.what and problem.tensor == "ids"
        assert str(tmp_path / "one") in str(problem.expected)

    def test_a_plan_can_be_carried_out_again(self, tmp_path: Path) -> None:
        self.spoil(tmp_path, np.nan)
        recipe = chain(document("ratio", "one", name="first"), document("ratio", "first"))
        plan = plan_of(tmp_path, recipe)
        for _ in range(2):
            with pytest.raises(Refused):
                carry_out(plan)


class TestWhereItComesFrom:
    def test_the_report_has_all_stages_and_every_file_once(self, trio: Path) -> None:
        with scratch() as temporary:
            plan = plan_of(trio, DEEP, temporary / "out")
            outcome = carry_out(plan)
            assert isinstance(outcome, Outcome)
            report = json.loads((temporary / "out" / REPORT).read_text())
            card = (temporary / "out" / "README.md").read_text()
        files = {str(path) for model in ("base", "one", "two") for path in (trio / model).glob("*.safetensors")}
        assert [str(file.path) for file in plan.weight_files] == list(outcome.input_hashes)
        assert outcome.input_hashes.keys() == files
        assert [stage["name"] for stage in report["stages"]] == ["first", "second", "third"]
        assert [stage["method"] for stage in report["stages"]] == ["slerp", "ties", "dare_ties"]
        assert [[i.get("stage") for i in stage["inputs"]] for stage in report["stages"]] == [
            [None, None],
            [None, "first", None],
            [None, "second", "first"],
        ]
        assert report["recipe"] == DEEP
        assert yaml.safe_load(report["stages"][1]["recipe"]) == next(
            said for said in yaml.safe_load_all(DEEP) if said.get("name") == "second"
        )
        assert "weight 0.6 / 0.6, density 0.5 / 0.5" in {group["parameters"] for group in report["stages"][1]["groups"]}
        assert report["tensors"]["large"]["parameters"]["third"] == {"weight": 0.6}
        digest = outcome.input_hashes[str(trio / "one" / "model-00001-of-00002.safetensors")]
        for said in ("`first`, a stage: spherical", "`third`, a stage: DARE", digest, "- ties", "### The stage second"):
            assert said in card
        assert card.count("`first`, a stage") == 2 and card.count(digest) == 1  # told once, then named

    def test_merges_of_merges_through_the_disk(self, trio: Path) -> None:
        with scratch() as temporary:
            linked(trio, temporary)
            merged(temporary, document("ties", "one", "two"), "first")
            merged(temporary, document("slerp", "first"), "second")
            merged(temporary, chain(document("ratio", "second", name="stage"), document("ratio", "stage")))
            report = json.loads((temporary / "out" / REPORT).read_text())
            card = (temporary / "out" / "README.md").read_text()
            assert command_line("verify", "out", cwd=temporary).returncode == 0
            own = json.loads((temporary / "first" / REPORT).read_text())
        second = report["stages"][0]["inputs"][1]["origin"]
        first = next(entry for entry in second["inputs"] if entry["reference"] == "first")["origin"]
        assert (second["method"], second["unchanged"]) == ("slerp", True)
        assert (first["method"], first["unchanged"], first["fingerprint"]) == ("ties", True, own["fingerprint"])
        assert [entry["files"] for entry in first["inputs"]] == [entry["files"] for entry in own["inputs"]]
        assert "merged before: TIES (arXiv 2306.01708), from" in card
        assert own["inputs"][1]["files"]["model-00001-of-00002.safetensors"]["xxh3_128"] in card

    def test_weights_that_are_no_longer_those(self, tmp_path: Path) -> None:
        models(tmp_path, ("base", "one", "two"), {"a": (9,)})
        merged(tmp_path, document("ratio", "one"), "first")
        write_checkpoint(tmp_path / "first", {"a": np.zeros(9, BF16)})
        merged(tmp_path, document("ratio", "first"))
        report = json.loads((tmp_path / "out" / REPORT).read_text())
        assert report["inputs"][1]["origin"]["unchanged"] is False
        assert "have changed since" in (tmp_path / "out" / "README.md").read_text()

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"method": 1, "outputs": {}, "inputs": [1]}',
            '{"method": 1, "outputs": {"a": 1}, "inputs": []}',
            '{"method": 1, "outputs": {}, "inputs": [{"reference": "x", "files": []}]}',
            '{"method": 1, "outputs": {}, "inputs": [{"reference": "x", "files": {"a": {"bytes": "x"}}}]}',
            '{"method": 1, "outputs": {}, "inputs": {}, "stages": 1}',
            "[" * 100_000,
        ],
    )
    def test_a_report_that_is_none_stops_no_merge(self, text: str, tmp_path: Path) -> None:
        models(tmp_path, ("base", "one"), {"a": (9,)})
        (tmp_path / "one" / REPORT).write_text(text)
        merged(tmp_path, document("ratio", "one"))
        assert "unreadable" in json.loads((tmp_path / "out" / REPORT).read_text())["inputs"][1]["origin"]

    def test_a_report_made_to_hurt_is_unreadable_or_cut(self, tmp_path: Path) -> None:
        models(tmp_path, ("base", "one"), {"a": (9,)})

        def taken(said: str, out: str) -> Any:
            (tmp_path / "one" / REPORT).write_text(said)
            carry_out(plan_of(tmp_path, document("ratio", "one"), out))
            return json.loads((tmp_path / out / REPORT).read_text())["inputs"][1]["origin"]

        nested = [
            {"name": f"s{i}", "method": "m", "inputs": [{"reference": "x", "stage": f"s{i + 1}"}]} for i in range(900)
        ]
        said: dict[str, Any] = {"outputs": {}, "inputs": [{"reference": "x", "stage": "s0"}], "stages": nested}
        taken(json.dumps(said), "nested")
        assert (tmp_path / "nested/README.md").read_text().count("a stage:") <= MOST_LINES
        empty = [{"name": "s", "method": "m", "inputs": []}] * (2 * MOST_ENTRIES)
        found = taken(json.dumps({**said, "stages": empty}), "many")
        assert len(found["stages"]) < MOST_ENTRIES and found["cut"] is True
        endless = json.dumps({**said, "stages": []}).replace('"stage": "s0"', '"files": {"a": {"bytes": 1e999}}')
        assert "unreadable" in taken(endless, "endless")

    def test_what_is_taken_over_stays_small(self, tmp_path: Path) -> None:
        models(tmp_path, ("base", "one"), {"a": (9,)})
        said: dict[str, Any] = {"method": "x" * 10_000, "outputs": {}, "inputs": [], "stages": []}
        for depth in range(100):
            files = {
                f"{i}-{'y' * 1000}": {"bytes": i, "xxh3_128": "z" * 1000} for i in range(5000 if depth == 97 else 9)
            }
            entry = {"reference": f"`{depth}\n# x", "files": files, "origin": said}
            said = {"method": "linear", "outputs": {}, "inputs": [entry, entry] if depth < 3 else [entry]}
        (tmp_path / "one" / REPORT).write_text(json.dumps(said))
        merged(tmp_path, document("ratio", "one"))
        report = (tmp_path / "out" / REPORT).read_text()
        assert report.count('"xxh3_128"') < MOST_ENTRIES + 9 and '"cut": true' in report
        assert len(report) < 3 * MOST_ENTRIES * MOST_TEXT
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("\n") < MOST_LINES + 60 and "\n# x" not in card


class TestTheCommandLine:
    def test_a_dry_run_shows_the_stages_and_writes_nothing(self, trio: Path) -> None:
        with scratch() as temporary:
            (linked(trio, temporary) / "recipe.yaml").write_text(WRITTEN)
            before = sorted(path.name for path in temporary.iterdir())
            said = command_line("recipe.yaml", "--dry-run", cwd=temporary)
            assert said.returncode == 0, said.stderr
            assert "slerp → first (a stage: not written)" in said.stdout
            assert "ties → second → /" in said.stdout.replace("\n", "")
            found = json.loads(command_line("recipe.yaml", "--dry-run", "--json", cwd=temporary).stdout)
            assert [stage["written"] for stage in found["stages"]] == [None, str(temporary / "second")]
            assert [entry["stage"] for entry in found["inputs"]] == [False, True, True]
            assert sorted(path.name for path in temporary.iterdir()) == before

    def test_a_merge_says_what_it_wrote(self, trio: Path) -> None:
        with scratch() as temporary:
            (linked(trio, temporary) / "recipe.yaml").write_text(WRITTEN)
            done = command_line("recipe.yaml", "--set", "first:parameters.t=1", cwd=temporary)
            assert done.returncode == 0, done.stderr
            assert "second: the stage second" in done.stdout
            assert made(temporary / "out") == of_chain(
                trio, WRITTEN.replace("t: 0.4", "t: 1").replace("output:", "sweep:")
            )


def test_mergekit_sees_the_same_stages(trio: Path) -> None:
    _, uses = load_config(DEEP, "elsewhere")
    recipe = parse_recipe(DEEP, trio / "recipe.yaml")
    named = {each.name: {model.path for model, _ in references(each)} for each in (*recipe.stages, recipe)}
    assert uses == {name: models & named.keys() for name, models in named.items()}
    assert uses[None] == {"second", "third"}


def test_a_stage_is_part_of_the_fingerprint(trio: Path) -> None:
    plain = plan_of(trio, DEEP)
    for key in ("first:parameters.t=0.41", "third:parameters={seed: 9}", "first:nonfinite=allow"):
        assert plan_of(trio, DEEP, overrides=[key]).fingerprint != plain.fingerprint
    (one, *_), (file, *files) = plain.stages[0].checkpoints[1:], plain.stages[0].checkpoints[1].files
    touched = replace(one, files=(replace(file, mtime_ns=1), *files))
    stage = replace(plain.stages[0], checkpoints=(plain.stages[0].checkpoints[0], touched))
    assert replace(plain, stages=(stage, *plain.stages[1:])).fingerprint != plain.fingerprint
