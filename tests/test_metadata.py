"""Layouts that load with nothing said of them, and where captions are found."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.config import UserError
from training.check import check
from training.data import DataConfig, Reader

NAMES, CAPTIONS = ["a.png", "b.png", "c.png"], ["a cat", "a dog", "a red truck"]


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), 40 + 60 * shade, np.uint8)).save(path)
    return path


def pictures(folder: Path) -> None:
    for k, name in enumerate(NAMES):
        picture(folder / name, k)


def read(folder: Path, **more: Any) -> tuple[list[tuple[str, ...]], Reader]:
    reader = Reader(DataConfig(path=str(folder), size_px=16, **more))
    return [example.captions for example in reader], reader


def images_alone(folder: Path) -> None:
    pictures(folder)


def sidecars(folder: Path) -> None:
    pictures(folder)
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def json_lines(folder: Path) -> None:
    pictures(folder)
    lines = [json.dumps({"file_name": n, "prompt": c}) for n, c in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def comma_separated(folder: Path) -> None:
    pictures(folder)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["file_name", "Description", "year"], *zip(NAMES, CAPTIONS, ["1", "", "3"], strict=True)])


def parquet(folder: Path) -> None:
    pictures(folder / "train")
    table = {"file_name": [f"train/{name}" for name in NAMES], "caption": CAPTIONS, "number": [1, 2, 3]}
    pq.write_table(pa.table(table), folder / "metadata.parquet")


def classes(folder: Path) -> None:
    for k, caption in enumerate(CAPTIONS):
        picture(folder / caption.replace(" ", "_") / NAMES[k], k)


def web_dataset(folder: Path) -> None:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for k, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
            told = folder / "told.json"
            told.write_text(json.dumps({"prompt": caption}), encoding="utf-8")
            tar.add(picture(folder / "one.png", k), name)
            tar.add(told, name.replace("png", "json"))
    for left in ("one.png", "told.json"):
        (folder / left).unlink()


def table_of_pictures(folder: Path) -> None:
    rows = [{"bytes": picture(folder / "one.png", k).read_bytes(), "path": None} for k in range(3)]
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 1], "blip_caption": CAPTIONS}), folder / "train.parquet")
    (folder / "one.png").unlink()


def saved(folder: Path) -> None:
    import datasets

    rows = [{"bytes": picture(folder / "one.png", k).read_bytes(), "path": None} for k in range(3)]
    (folder / "one.png").unlink()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": rows, "text": CAPTIONS}, features=features).save_to_disk(str(folder))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (images_alone, "no caption (empty)"), (sidecars, ""), (json_lines, "captions are read from 'prompt'"),
        (comma_separated, "captions are read from 'Description'"), (parquet, ""), (classes, "no caption (folder)"),
        (web_dataset, ""), (table_of_pictures, "captions are read from 'blip_caption'"), (saved, ""),
    ],
)  # fmt: skip
def test_layouts_load_with_nothing_said(tmp_path: Path, layout: Callable[[Path], None], said: str) -> None:
    layout(tmp_path)
    captions, reader = read(tmp_path)
    wanted = [""] * 3 if layout is images_alone else CAPTIONS
    assert sorted(captions) == sorted((caption,) for caption in wanted)
    assert not reader.report.bad
    assert (said in reader.report.notes) if said else not reader.report.notes
    assert said in str(check(tmp_path))


def test_a_column_may_be_named(tmp_path: Path) -> None:
    json_lines(tmp_path)
    path = tmp_path / "metadata.jsonl"
    entries = [json.loads(line) | {"story": f"story {k}"} for k, line in enumerate(path.read_text().splitlines())]
    path.write_text("\n".join(map(json.dumps, entries)))
    assert read(tmp_path, caption_column="story")[0] == [(f"story {k}",) for k in range(3)]
    assert read(tmp_path)[1].rows[0].fields == {"prompt": "a cat", "story": "story 0"}
    with pytest.raises(UserError, match=r"data.caption_column: .* prompt, story; 'tale' is none of text"):
        read(tmp_path, caption_column="tale")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file_name,caption\na.png,x,y\n", "2.*more values than the first line has names"),
        ("file_name,capton\na.png,x\n", "did you mean it by 'capton'"),
        ("name,caption\na.png,x\n", "`file_name` is missing"),
        ('file_name,caption\na.png,"x\n', "'metadata.csv':1: unexpected end of data"),
        ("file_name,caption\nz.png,x\n", "no such file"),
    ],
)
def test_a_wrong_csv_is_told_where_it_is_wrong(tmp_path: Path, text: str, reason: str) -> None:
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        read(tmp_path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"'metadata\.parquet': not readable as Parquet"):
        read(tmp_path)
    (tmp_path / "metadata.csv").write_bytes("file_name,caption\na.png,é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"metadata.csv and metadata.parquet: keep one of them"):
        read(tmp_path)
    (tmp_path / "metadata.parquet").unlink()
    with pytest.raises(UserError, match=r"'metadata\.csv' is not UTF-8"):
        read(tmp_path)


def test_what_is_guessed_is_what_is_read(tmp_path: Path) -> None:
    """One column for all rows: lists too, no other one for a row without, and what it says stays a field."""
    pictures(tmp_path)
    entries = [{"file_name": "a.png", "prompts": ["x", "y"], "label": 3}, {"file_name": "b.png", "label": 4},
               {"file_name": "c.png", "prompts": [], "long_text": "z", "label": 5}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    captions, reader = read(tmp_path)
    assert reader.report.notes["captions are read from 'long_text'"] == 3
    assert captions == [("",), ("",), ("z",)]
    assert [row.fields["label"] for row in reader.rows] == [3, 4, 5]
    captions, _ = read(tmp_path, caption_column="prompts", missing_caption="skip")
    assert captions == [("x", "y")]


def test_a_table_that_pandas_wrote_with_its_index_loads(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text(",file_name,text\n0,a.png,a cat\n1,b.png,\n", encoding="utf-8")
    captions, reader = read(tmp_path)
    assert captions == [("a cat",), ("",)]
    assert not reader.report.bad


def test_folders_are_classes_only_where_nothing_else_says_what_is_shown(tmp_path: Path) -> None:
    classes(tmp_path)
    assert ("a red truck",) in read(tmp_path)[0]
    assert set(read(tmp_path, missing_caption="empty")[0]) == {("",)}
    (tmp_path / "README.txt").write_text("about")
    assert ("a red truck",) in read(tmp_path)[0]
    picture(tmp_path / "top.png")
    assert set(read(tmp_path)[0]) == {("",)}
    (tmp_path / "top.png").unlink()
    (tmp_path / "a_cat/a.txt").write_text("mine")
    assert sorted(read(tmp_path)[0]) == [("",), ("",), ("mine",)]
