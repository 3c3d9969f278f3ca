"""The same rows come out of every kind of file, and what cannot be read is refused by name."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ggez_merge.errors import Refused
from ggez_merge.evaluate.data import Rows, read_rows
from ggez_merge.evaluate.fields import many, value_of
from ggez_merge.evaluate.source import Source

CAPTIONS = ["ต้มยำกุ้ง", "អង្គរវត្ត, ខ្មែរ", 'Phở "bò"', "မုန့်ဟင်းခါး", "நாசி லெமாக்", "ຕຳໝາກຫຸ່ງ\nສອງ"]
SUBSETS = ["('Thai', 'Thailand')", "('Khmer', 'Cambodia')"] * 3


def encoded(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [encoded(i) for i in range(len(CAPTIONS))]


def records(image: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [
        {"image": image(i), "caption": caption, "Subset": subset}
        for i, (caption, subset) in enumerate(zip(CAPTIONS, SUBSETS, strict=True))
    ]


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, raw in enumerate(IMAGES):
        (folder / f"{i}.png").write_bytes(raw)
    return folder


def json_lines(folder: Path) -> Source:
    lines = [json.dumps(row, ensure_ascii=False) for row in records(lambda i: f"{i}.png")]
    (folder / "rows.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    return Source((folder / "rows.jsonl",), write_images(folder / "images"))


def json_list(folder: Path) -> Source:
    write_images(folder / "sub")
    (folder / "rows.json").write_text(json.dumps(records(lambda i: {"path": f"sub/{i}.png", "bytes": None})))
    return Source((folder / "rows.json",))


def comma_separated(folder: Path, suffix: str = ".csv") -> Source:
    write_images(folder)
    with open(folder / f"rows{suffix}", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption", "Subset"], delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records(lambda i: f"{i}.png"))
    return Source((folder / f"rows{suffix}",))


def folder_with_table(folder: Path) -> Source:
    comma_separated(folder, ".tsv")
    return Source((folder,))


def parquet(folder: Path) -> Source:
    for part in (0, 1):
        rows = records(lambda i: {"bytes": IMAGES[i], "path": None})[part::2]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
    return Source((folder / "0.parquet", folder / "1.parquet"))


def parquet_of_bytes(folder: Path) -> Source:
    pq.write_table(pa.Table.from_pylist(records(lambda i: IMAGES[i])), folder / "x.parquet")
    return Source((folder,))


def hugging_face(folder: Path) -> Source:
    rows = records(lambda i: Image.open(io.BytesIO(IMAGES[i])))
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved", num_shards=2)
    return Source((folder / "saved",))


def hugging_face_selected(folder: Path) -> Source:
    rows = records(lambda i: {"bytes": IMAGES[i], "path": None})
    every = datasets.Dataset.from_list([rows[5], *rows[:5]])
    chosen = datasets.DatasetDict({"test": every.select([1, 2, 3, 4, 5, 0])})
    chosen.save_to_disk(folder / "saved")
    return Source((folder / "saved",))


def webdataset(folder: Path) -> Source:
    shards = folder / "a.tar", folder / "b.tar"
    for part, path in enumerate(shards):
        with tarfile.open(path, "w") as archive:
            for i in range(3 * part, 3 * part + 3):
                members = {"jpg": IMAGES[i], "json": json.dumps({"Subset": SUBSETS[i]}).encode()}
                members["caption"] = CAPTIONS[i].encode()
                for ending, raw in members.items():
                    info = tarfile.TarInfo(f"part.{part}/{i:04}.{ending}")
                    info.size = len(raw)
                    archive.addfile(info, io.BytesIO(raw))
    return Source(shards)


KINDS = (
    json_lines,
    json_list,
    comma_separated,
    folder_with_table,
    parquet,
    parquet_of_bytes,
    hugging_face,
    hugging_face_selected,
    webdataset,
)


def read(source: Source, **changes: Any) -> Rows:
    return read_rows(Source(**{**vars(source), **changes}), ["caption"])


def refused(source: Source, columns: list[str] | None = None, **changes: Any) -> str:
    with pytest.raises(Refused) as caught:
        read_rows(Source(**{**vars(source), "place": "recipe.yaml:7", **changes}), columns or ["caption"])
    assert "recipe.yaml:7" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_every_kind_of_file_gives_the_same_rows(write: Callable[[Path], Source], tmp_path: Path) -> None:
    rows = read(write(tmp_path), group=("Subset[1]", "Subset.0")).rows
    order = [0, 2, 4, 1, 3, 5] if write is parquet else range(6)
    assert [row.value("caption") for row in rows] == [CAPTIONS[i] for i in order]
    assert [row.groups[0] for row in rows] == [f"Subset[1]={('Thailand', 'Cambodia')[i % 2]}" for i in order]
    assert [row.groups[1] for row in rows] == [f"Subset.0={('Thai', 'Khmer')[i % 2]}" for i in order]
    assert [row.id for row in rows] == list("012345")
    for row, i in zip(rows, order, strict=True):
        assert row.picture is not None
        pixels = np.asarray(Image.open(io.BytesIO(IMAGES[i])).convert("RGB"))
        assert np.array_equal(np.asarray(row.picture.open()), pixels)
    assert len({row.image_id for row in rows}) == 6


def test_a_folder_of_images_has_its_folders_as_labels(tmp_path: Path) -> None:
    for label in ("rendang", "ผัดไทย"):
        write_images(tmp_path / "food" / label)
    rows = read_rows(Source((tmp_path,), where={"label": ("ผัดไทย",)}), ["label", "name"]).rows
    assert [row.value("file") for row in rows] == [f"food/ผัดไทย/{i}.png" for i in range(6)]
    assert [row.value("name") for row in rows] == list("012345")


def test_classes_that_are_numbers_get_their_names(tmp_path: Path) -> None:
    features = datasets.Features(label=datasets.ClassLabel(names=["cat", "dog"]))
    dataset = datasets.Dataset.from_dict({"label": [1, 0, 1]}, features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "x.parquet")
    for path in (tmp_path / "saved", tmp_path / "x.parquet"):
        rows = read_rows(Source((path,), image=None), ["label"]).rows
        assert [row.value("label") for row in rows] == ["dog", "cat", "dog"]


def test_conditions_choose_rows_and_ids_stay(tmp_path: Path) -> None:
    source = json_lines(tmp_path)
    rows = read(source, where={"Subset[1]": ("cambodia",)}).rows
    assert [row.id for row in rows] == ["1", "3", "5"]
    assert [row.id for row in read(source, where={"Subset[1]": ("Cambodia",)}, limit=2).rows] == ["1", "3"]
    assert "check the conditions" in refused(source, where={"Subset[1]": ("Laos",)})
    assert [row.id for row in read(source, id="caption").rows] == CAPTIONS
    assert "two rows have the same `Subset`" in refused(source, id="Subset")


def test_broken_images_are_counted_and_refused_beyond_a_share(tmp_path: Path) -> None:
    source = json_lines(tmp_path)
    images = tmp_path / "images"
    (images / "1.png").unlink()
    (images / "4.png").write_bytes(IMAGES[4][:60])
    text = refused(source)
    assert "2 of 6" in text and "1.png is missing" in text and "4.png" in text and "max_broken: 0.333" in text
    refused(source, max_broken=0.3)
    rows = read(source, max_broken=0.34)
    assert [row.id for row in rows.rows] == ["0", "2", "3", "5"]
    assert [name for name, _ in rows.broken] == ["1", "4"]
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8-sig").splitlines()
    lost = [line.replace('"image"', '"other"') if CAPTIONS[0] in line else line for line in lines]
    (tmp_path / "lost.jsonl").write_text("\n".join(lost))
    assert read(source, paths=(tmp_path / "lost.jsonl",), max_broken=0.5).broken[0] == ("0", "no image")
    for file in images.iterdir():
        file.write_bytes(b"no image")
    assert "no row has an image" in refused(source, max_broken=1.0)


def test_equal_images_have_one_id(tmp_path: Path) -> None:
    source = json_lines(tmp_path)
    (tmp_path / "images/3.png").write_bytes(IMAGES[0])
    ids = [row.image_id for row in read(source).rows]
    assert ids[3] == ids[0]
    assert len(set(ids)) == 5


def test_without_images_nothing_is_opened(tmp_path: Path) -> None:
    source = json_lines(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    assert [row.picture for row in read(source, image=None).rows] == [None] * 6


UNREADABLE = {
    "not JSON": ("x.jsonl", b'{"caption": 1}\n{"caption"\n', "line 2 is not JSON"),
    "not a mapping": ("x.jsonl", b"[1]\n", "line 1 is not a mapping"),
    "not a list": ("x.json", b"{}", "not a list of mappings"),
    "ragged": ("x.csv", b"caption,b\n1,2\n3\n", "line 3 has not as many fields"),
    "not parquet": ("x.parquet", b"PAR1", "not a whole parquet file"),
    "not a tar": ("x.tar", b"123", "cannot be read"),
    "not UTF-8": ("x.csv", b"caption,b\n\xff,2\n", "cannot be read"),
    "unknown": ("x.xlsx", b"", "data of this kind are not known"),
}


@pytest.mark.parametrize(("name", "raw", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused(name: str, raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    text = refused(Source((tmp_path / name,), image=None))
    assert message in text
    assert name in text


def test_a_cut_parquet_or_saved_dataset_is_refused(tmp_path: Path) -> None:
    source = hugging_face(tmp_path)
    (shard, *_) = sorted((tmp_path / "saved").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:200])
    assert "not a whole Arrow file" in refused(source)


def test_a_lost_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    source = json_lines(tmp_path)
    text = refused(source, ["captoin"])
    assert "`captoin`" in text and "did you mean `caption`?" in text and "`Subset`" in text
    assert "image: false" in refused(source, image="picture")
    assert "`Subset[2]`" in refused(source, group=("Subset[2]",))


def test_several_splits_are_refused(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"caption": ["a"]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    assert "splits test, train" in refused(Source((tmp_path / "saved",), image=None))
    assert len(read_rows(Source((tmp_path / "saved/test",), image=None), ["caption"]).rows) == 1


def test_names_reach_into_values() -> None:
    fields = {"a.b": 1, "a": {"b": 2, "c": {"d": [3, 4]}}, "t": "['x', \"y\"]", "j": '{"k": [5]}', "plain": "(not"}
    assert value_of(fields, "a.b") == 1  # a column of that very name wins
    assert value_of(fields, "a.c.d[1]") == value_of(fields, "a.c.d.1") == 4
    assert value_of(fields, "t[1]") == "y"
    assert value_of(fields, "j.k.0") == 5
    for lost in ("b", "a.x", "a.c.d[2]", "t.x", "plain[0]", "a[", "a.c.", ""):
        with pytest.raises(KeyError):
            value_of(fields, lost)
    assert many("('Indonesian', 'Indonesia')") == ["Indonesian", "Indonesia"]
    assert many("plain (text)") == ["plain (text)"]
    assert many(["a"]) == ["a"]
    assert many(None) == many("") == []
