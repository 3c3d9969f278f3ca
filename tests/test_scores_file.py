"""Scores files: what they hold, what is wrong with them by line and column, and GG-EZ's Table 1 as shipped."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggez_merge.errors import Failed, Refused
from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.decision import Rule, decide
from ggez_merge.sweep.scores import Benchmark, relative
from ggez_merge.sweep.scores_file import Scored, ScoreTable, dump_scores, load_scores, points, same_split, save_scores

TABLE_1 = Path(__file__).parents[1] / "recipes/ggez_table1.csv"

# As printed: ratio -> GRP, global, regional. Gain and retention, in percent, follow from the printed means.
PRINTED = {
    0: (59.4, 63.5, 56.3, 0.0, 100.0),
    0.05: (64.0, 64.3, 63.7, 13.1, 101.3),
    0.1: (64.1, 64.4, 63.8, 13.3, 101.4),
    0.5: (57.3, 56.7, 57.8, 2.7, 89.3),
    0.7: (56.1, 56.3, 56.0, -0.5, 88.7),
    1: (42.2, 42.1, 42.2, -25.0, 66.3),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "scores.csv"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str) -> dict[str, str]:
    with pytest.raises(Refused) as refused:
        load_scores(write(folder, text))
    return {str(p.place).removeprefix(str(folder) + os.sep): p.what for p in refused.value.problems}


def test_table_1_of_the_paper_to_the_last_digit() -> None:
    table = load_scores(TABLE_1)
    assert table.axes == ("ratio",) and table.splits == [None] and table.missing_endpoints == []
    found = {point.candidate.values["ratio"]: point.summary for point in points(table, alpha=0.43)}
    assert found.keys() == PRINTED.keys()
    for ratio, (grp, g, r, gain, retention) in PRINTED.items():
        summary = found[ratio]
        assert summary.grp is not None and round(summary.grp, 1) == grp
        # 64.35 is printed as 64.3 and 56.25 as 56.3: the paper's means are of scores with more digits than it prints
        assert summary.global_.value == pytest.approx(g, abs=0.05 + 1e-9)
        assert summary.regional.value == pytest.approx(r, abs=0.05 + 1e-9)
        ratios = relative(r, PRINTED[0][2], True), relative(g, PRINTED[0][1], True)
        assert [round(100 * each, 1) for each in ratios if each] == [round(100 + gain, 1), retention]
        # of unrounded means, as far as rounding lets the two agree: 0.1 of 56.3, half a digit above and below
        assert summary.gain_percent == pytest.approx(gain, abs=0.15)
        assert summary.retention_percent == pytest.approx(retention, abs=0.15)
    for alpha in (0.43, 0.4340):
        chosen = decide(points(table, alpha=alpha), Rule()).point.candidate
        assert chosen == Candidate({"ratio": 0.1})
        assert [round(p.summary.grp or 0, 1) for p in points(table, alpha=alpha)] == [
            row[0] for row in PRINTED.values()
        ]


HEADER = "ratio,benchmark,tag,score,scale\n"
FINE = HEADER + "0,a,both,50,100\n0.5,a,both,60,100\n1,a,both,40,100\n"


def test_roles_follow_from_the_ratio(tmp_path: Path) -> None:
    table = load_scores(write(tmp_path, FINE))
    assert [each.candidate for each in table.scored] == [
        Candidate({"ratio": 0.0}, "base"),
        Candidate({"ratio": 0.5}),
        Candidate({"ratio": 1.0}, "regional"),
    ]
    assert [point.summary.gain_abs for point in points(table)] == [0, 10, -10]


def test_roles_by_column(tmp_path: Path) -> None:
    text = "\n".join(
        [
            "role,model,weight,density,benchmark,tag,score",
            "base,,,,a,both,50",
            ",,0.1,0.5,a,both,60",
            "candidate,,1,0.5,a,both,55",
            "regional,./sea,,,a,both,40",
            "regional,./latam,,,a,both,30",
        ]
    )
    table = load_scores(write(tmp_path, text))
    assert [(each.candidate.role, each.candidate.model) for each in table.scored] == [
        ("base", None),
        ("candidate", None),
        ("candidate", None),
        ("regional", "./sea"),
        ("regional", "./latam"),
    ]
    assert table.scored[2].candidate.values == {"weight": 1, "density": 0.5}
    assert table.scored[0].candidate.values == {}


def test_groups_belong_to_their_benchmark(tmp_path: Path) -> None:
    text = (
        FINE.replace("scale\n", "scale,group\n").replace("100\n", "100,\n")
        + "0.5,a,both,70,100,SGP\n0.5,a,both,50,100,IDN\n"
    )
    assert [each.benchmarks[0].groups for each in load_scores(write(tmp_path, text)).scored] == [
        {},
        {"SGP": 70, "IDN": 50},
        {},
    ]
    found = problems_of(tmp_path, text + "0.5,b,both,50,100,IDN\n0.5,a,both,51,100,IDN\n")
    assert found["scores.csv:7"] == "ratio 0.5: b has scores of groups, but none of the whole"
    assert found["scores.csv:8"] == "ratio 0.5: a has two scores"


def test_everything_wrong_is_found_at_once_by_line_and_column(tmp_path: Path) -> None:
    text = HEADER.replace("scale", "scale,n,higher_is_better,role")
    text += "0,a,both,50,100,10,,base\n"
    text += "0.1,a,both,59,100,10,,\n"  # fine
    text += '0.2,a,both,"59,8",100,10,,\n'
    text += "x,a,both,59,100,10,,\n"
    text += "0.3,a,bothe,59,100,10,,\n"
    text += "0.4,a,both,59,100,10.5,,\n"
    text += "0.5,a,both,59,100,10,maybe,\n"
    text += "0.6,a,both,59,100,10,,bass\n"
    text += ",a,both,59,100,10,,\n"
    text += "0.7,a,both,59,1,10,,\n"
    text += "0.8,a,both,59,100\n"
    text += "0.9,,both,59,100,10,,\n"
    text += "0.91,a,both,nan,100,10,,\n"
    text += "0.92,a,global,59,100,10,,\n"
    text += "0.1,a,both,58,100,10,,\n"
    text += "0.93,a,both,58,100,11,,\n0.94,a,both,58,100,,,\n"  # the second is fine
    found = problems_of(tmp_path, text)
    assert found == {
        "scores.csv:4": "`score` is not a number",
        "scores.csv:5": "`ratio` is not a number",
        "scores.csv:6": "`tag` is none that there is",
        "scores.csv:7": "`n` is not a whole number",
        "scores.csv:8": "`higher_is_better` is neither",
        "scores.csv:9": "`role` is none that there is",
        "scores.csv:10": "`ratio` is not a number",
        "scores.csv:11": found["scores.csv:11"],
        "scores.csv:12": "the line has another number of cells than the header",
        "scores.csv:13": "`benchmark` is empty",
        "scores.csv:14": "`score` is not a number",
        "scores.csv:15": "`tag` of a is not what it is at " + str(tmp_path / "scores.csv:2"),
        "scores.csv:16": "ratio 0.1: a has two scores",
        "scores.csv:17": "`n` of a is not what it is at " + str(tmp_path / "scores.csv:2"),
    }
    assert "scale" in found["scores.csv:11"] or "better than perfect" in found["scores.csv:11"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the column `benchmark` is missing"),
        ("ratio,bench_mark,tag,score\n", "did you mean `bench_mark`?"),
        ("ratio;benchmark;tag;score\n0;a;both;1\n", "found:    ratio;benchmark;tag;score"),
        ("ratio,ratio,benchmark,tag,score\n", "`ratio` is there twice"),
        ("ratio,,benchmark,tag,score\n", "a column has no name"),
        ("ratio,benchmark,tag,score\n", "there are no scores"),
        ("ratio,benchmark,tag,score,sclae\n0,a,both,3,many\n", "did you mean `scale`"),
        ("ratio,benchmark,tag,score\n0,a,both,59.8%\n", "100 as the scale"),
        ('ratio,benchmark,tag,score\n0,"a,both,59.8\n', "cannot be read"),
        (FINE + "0.7,b,both,3,100\n", "ratio 0 (base) has no score of b"),
        (FINE + "0.7,b,both,3,100\n", "ratio 0.7 has no score of a"),
    ],
)
def test_what_a_file_must_not_be(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        load_scores(write(tmp_path, text))
    assert said in str(refused.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("ratio,benchmark,tag,score\n0,é,both,1\n".encode("latin-1"))
    for name in ("latin.csv", "none.csv"):
        with pytest.raises(Refused, match="cannot be read"):
            load_scores(tmp_path / name)
    with pytest.raises(Failed, match="cannot be written"):
        save_scores(load_scores(TABLE_1), tmp_path / "no/such/folder.csv")


def test_points_need_a_base_and_one_split(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the base has no scores"):
        points(load_scores(write(tmp_path, FINE.replace("\n0,", "\n0.2,"))))
    missing = load_scores(write(tmp_path, FINE.replace("\n1,", "\n0.9,")))
    assert missing.missing_endpoints == ["regional"]
    text = "ratio,benchmark,tag,score,split\n0,a,both,50,val\n0,a,both,40,test\n1,a,both,60,val\n1,a,both,30,test\n"
    table = load_scores(write(tmp_path, text))
    assert table.splits == ["val", "test"]
    with pytest.raises(Refused, match="several splits"):
        points(table)
    with pytest.raises(Refused, match="did you mean `test`"):
        points(table, "tset")
    assert [point.r for point in points(table, "val")] == [50, 60]
    assert [point.r for point in points(table, "test")] == [40, 30]


def test_one_split_for_selection_and_report_is_warned_of(tmp_path: Path) -> None:
    table = load_scores(TABLE_1)
    assert "the same data" in str(same_split(table, Rule()))
    assert "the split val" in str(same_split(table, Rule(split="val")))
    assert "the split val" in str(same_split(table, Rule(split="val", report="val")))
    assert same_split(table, Rule(split="val", report="test")) is None


numbers = st.floats(-1e6, 1e6).map(lambda value: value + 0.0)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=9).filter(
    lambda name: name.strip() == name
)


@st.composite
def tables(draw: st.DrawFn) -> ScoreTable:
    axes = draw(st.sampled_from([("ratio",), ("weight", "density"), ("components.vision_tower.ratio",)]))
    values = draw(st.lists(st.tuples(*(numbers for _ in axes)), min_size=1, max_size=4, unique=True))
    roles = st.sampled_from(["base", "regional", "candidate"])
    candidates = [
        Candidate(dict(zip(axes, each, strict=True)), draw(roles), draw(st.none() | names)) for each in values
    ]
    if draw(st.booleans()):
        candidates.append(Candidate({}, "regional", draw(st.none() | names)))
    kinds = []
    for name, split in draw(st.lists(st.tuples(names, st.none() | names), min_size=1, max_size=3, unique=True)):
        scale = draw(st.none() | st.floats(0.5, 1000))
        benchmark = Benchmark(
            name,
            draw(st.sampled_from(["regional", "global", "both"])),
            0.0,
            draw(st.none() | st.integers(1, 10**6)),
            draw(st.booleans()),
            draw(st.none() | st.floats(0, 0.4)),
            scale,
            draw(st.sampled_from(["mean", "corpus bleu"])),
            split,
        )
        kinds.append(benchmark)
    scored = []
    for candidate in candidates:
        own = [
            replace(
                kind,
                score=draw(st.floats(0, kind.scale or 100)),
                groups=draw(st.dictionaries(names, st.floats(0, kind.scale or 100), max_size=2)),
            )
            for kind in kinds
        ]
        scored.append(Scored(candidate, tuple(own)))
    return ScoreTable(axes, tuple(scored))


@settings(max_examples=150)
@given(tables())
def test_what_is_written_reads_back_as_the_same(tmp_path_factory: pytest.TempPathFactory, table: ScoreTable) -> None:
    path = tmp_path_factory.getbasetemp() / "sweep.csv"
    save_scores(table, path)
    back = load_scores(path)
    assert back == replace(table, name=str(path))
    assert dump_scores(back) == path.read_text(encoding="utf-8")
    assert not path.with_name("sweep.csv.partial").exists()


def test_the_shipped_file_is_written_as_it_stands() -> None:
    assert dump_scores(load_scores(TABLE_1)) == TABLE_1.read_text()
