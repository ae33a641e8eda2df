"""What people and their tools get wrong, beside what the tests of pictures, data, sources and weights hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError, load
from ldm.interop import read_scheduler
from ldm.noise import NoiseScheduleConfig
from ldm.text import TextConfig, load_text_encoder
from pipelines.foreign import pipeline_class
from tests.pictures import data_config, encoded, fill, noise_picture, png_bytes, png_chunk, read_bytes, refusal
from tests.tiny import ROOT
from tests.tiny_text import TINY
from training import checkpoint
from training.check import check
from training.data import Reader, read_image, rows
from training.engine import check_precision
from training.tasks import RunConfig


def test_a_jpeg_with_flipped_bits_that_decodes_is_taken(tmp_path: Path) -> None:
    """It cannot be told from a good one, which README says."""
    data = encoded(noise_picture(64, 64), "JPEG", quality=90)
    whole = read_bytes(tmp_path, data)[0]
    taken = []
    for place in range(len(data) // 2, len(data) // 2 + 40):
        flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        taken.append(read_bytes(tmp_path, flipped)[0])
    assert all(pixels.shape == whole.shape for pixels in taken)
    assert any((pixels != whole).any() for pixels in taken)


def test_between_pillows_warning_and_its_error_max_pixels_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it warns above this, and refuses above twice as many
    data = encoded(noise_picture(12, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, notes = read_bytes(tmp_path, data, max_pixels=144)
    assert pixels.shape == (12, 12, 3)
    assert notes == []
    assert refusal(tmp_path, data, max_pixels=143) == "too many pixels (144 > 143)"


def test_a_metadata_bomb_in_international_text(tmp_path: Path) -> None:
    text = png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(80_000_000), 1))
    assert refusal(tmp_path, png_bytes(1, 1, 8, 0, b"\0\0", text)).startswith("damaged (ValueError: ")


def test_damaged_xmp_costs_no_picture(tmp_path: Path) -> None:
    text = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<rdf:RDF no xml")
    assert read_bytes(tmp_path, png_bytes(1, 1, 8, 0, b"\0\x80", text))[0].tolist() == [[[128] * 3]]
    jpeg = encoded(noise_picture(8, 8), "JPEG", xmp=b"\0\xff<broken")
    assert read_bytes(tmp_path, jpeg)[0].shape == (8, 8, 3)


def test_conversions_are_counted_in_the_report(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    for index in range(3):
        (tmp_path / f"g{index}.png").write_bytes(encoded(Image.fromarray(noise_picture(seed=index)[..., 0])))
    reader = Reader(data_config(tmp_path))
    assert len(list(reader)) == 5
    assert reader.report.notes["greyscale"] == 3
    assert check(tmp_path).notes["greyscale"] == 3


def test_the_first_of_two_pictures_in_a_camera_file(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise_picture(8, 8, seed)) for seed in (1, 2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    pixels, notes = read_bytes(tmp_path, data)
    assert notes == ["first frame of several"]
    assert np.abs(pixels.astype(int) - np.array(frames[0])).mean() < np.abs(pixels - np.array(frames[1])).mean()


@pytest.mark.parametrize("shape", [(1, 1), (1, 30_000)])
def test_pictures_that_would_have_to_be_enlarged(tmp_path: Path, shape: tuple[int, int]) -> None:
    fill(tmp_path, 2)
    (tmp_path / "x.png").write_bytes(encoded(noise_picture(*shape)))
    reader = Reader(data_config(tmp_path, max_bad=0.5))
    assert len(list(reader)) == 2
    assert reader.report.bad == [("x.png", f"smaller than target ({shape[1]}x{shape[0]} < 24)")]


def test_a_format_that_is_not_read_here_says_what_to_do(tmp_path: Path) -> None:
    reason = refusal(tmp_path, b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(64))
    assert "image/jxl" in reason


def test_names_as_they_come(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    names = ["A.png", "a.png", "\u202egnp.exe.png", "صورة.png", "x" * 251 + ".png"]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(noise_picture(seed=10 + index)))
    found = {example.key: example.pixels for example in Reader(data_config(tmp_path))}
    assert {"000.png", *names} == set(found)
    assert (found["a.png"] != found["A.png"]).any()


def test_metadata_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    fill(inside, 1)
    (tmp_path / "secret.jsonl").write_text('{"file_name": "000.png", "caption": "secret"}\n')
    (inside / "metadata.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UserError, match=r"metadata\.jsonl: a link that leads outside the folder"):
        rows(data_config(inside))


@pytest.mark.parametrize("name", ["x.parquet", "000.txt", "metadata.jsonl"])
def test_pipes_never_block(tmp_path: Path, name: str) -> None:
    if name != "x.parquet":
        fill(tmp_path, 2)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "000.txt":
        reader = Reader(data_config(tmp_path, max_bad=0.5))
        assert len(list(reader)) == 1
        assert "not a regular file" in reader.report.bad[0][1]
        return
    with pytest.raises(UserError, match=r"not? a? ?regular file"):
        list(Reader(data_config(tmp_path)))


def test_an_empty_folder_is_told_before_any_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/readme.txt").write_text("no pictures")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was read")

    for place in ("training.diffusion.load_codec", "training.diffusion.load_text_encoder"):
        monkeypatch.setattr(place, never)
    with pytest.raises(UserError, match="Accepted layouts") as caught:
        CliRunner().invoke(
            app, ["train", str(ROOT / "configs/tiny/base.yaml"), "--run", str(tmp_path / "run"), "--set",
                  f"data.path={tmp_path / 'set'}", "--set", "data.split=null"], catch_exceptions=False,
        )  # fmt: skip
    assert caught.value.exit_code == 2


def test_a_picture_that_no_line_names_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "001.png", "caption": "one"}))
    assert check(tmp_path).notes["picture without a line in metadata.jsonl, such as 000.png"] == 2


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_what_a_tar_holds_beside_pictures_is_not_decoded(tmp_path: Path) -> None:
    members = {"a.png": encoded(noise_picture()), "a.txt": b"a picture",
               "a.pkl": pickle.dumps(Canary(tmp_path / "sung")),
               "a.pyd": pickle.dumps(Canary(tmp_path / "sung"))}  # fmt: skip
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = list(Reader(data_config(folder)))
    assert [example.captions for example in found] == [("a picture",)]
    assert not (tmp_path / "sung").exists()


@pytest.mark.parametrize("path", ["pipe:touch sung", "set-{000000..999999999}.tar"])
def test_paths_are_paths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Reader(data_config(Path(path)))
    assert list(tmp_path.iterdir()) == []


def test_captions_of_a_table_that_are_no_text(tmp_path: Path) -> None:
    pictures = [{"bytes": encoded(noise_picture(seed=k)), "path": None} for k in range(3)]
    table = pa.table({"image": pictures, "caption": pa.array([float("nan"), 3.5, None], pa.float64())})
    pq.write_table(table, tmp_path / "a.parquet")
    reader = Reader(data_config(tmp_path, max_bad=1, caption_column="caption"))
    assert [example.captions for example in reader] == [("",)]
    assert [reason for _, reason in reader.report.bad] == ["`caption` holds float, not text"] * 2
    (tmp_path / "a.parquet").unlink()
    fill(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text("file_name,caption\n000.png,nan\n001.png,7\n")
    assert [row.captions for row in rows(data_config(tmp_path))] == [("nan",), ("7",)]  # text, as CSV has no other kind


def test_verify_reports_numbers_that_are_not_finite(tmp_path: Path) -> None:
    for images, value in ((8, 1.0), (16, float("nan"))):
        tensors = {"model": {"net.weight": torch.tensor([0.5, value])}}
        folder = checkpoint.path_of(tmp_path, images)
        folder.parent.mkdir(exist_ok=True)
        checkpoint._write(folder, checkpoint.Snapshot(tensors, {"images": images}), {})  # `save` refuses it
    found = CliRunner().invoke(app, ["ckpt", "verify", str(tmp_path)])
    assert found.exit_code == 1
    first, second = found.output.splitlines()
    assert first.endswith("whole")
    assert second.endswith("model.safetensors: net.weight is not finite")


@pytest.mark.parametrize(("name", "value"), [("beta_schedule", ["linear"]), ("prediction_type", {"epsilon": 1}),
                                             ("num_train_timesteps", 10**11)])  # fmt: skip
def test_a_scheduler_that_lies_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=r"scheduler: .*(is not one of|steps must be from 1 to 100000)"):
        read_scheduler({"_class_name": "DDIMScheduler", name: value}, "scheduler")


@pytest.mark.parametrize("kind", [["StableDiffusionPipeline"], {"a": 1}, 7, None])
def test_a_class_that_is_no_name_is_refused(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match="is not read"):
        pipeline_class(tmp_path)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("hidden_size", 12 * 10**8, "it asks for"), ("vocab_size", 10**12, "it asks for"),
    ("num_hidden_layers", 10**9, "more than 1000 layers"), ("hidden_size", -4, "no BertModel can be built"),
])  # fmt: skip
def test_a_text_encoder_that_lies_is_not_allocated(tmp_path: Path, name: str, value: int, reason: str) -> None:
    folder = TINY["bert"](tmp_path / "bert")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, name: value}))
    with pytest.raises(UserError, match=reason):
        load_text_encoder(TextConfig("bert", str(folder)))


def test_settings_that_name_code_are_not_read(tmp_path: Path) -> None:
    folder = TINY["bert"](tmp_path / "bert")
    said = json.loads((folder / "config.json").read_text())
    more = {"trust_remote_code": True, "_target_": "os.system", "auto_map": {"AutoModel": "evil.Model"}}
    before = load_text_encoder(TextConfig("bert", str(folder))).encode(["a cat"])[0]
    (folder / "config.json").write_text(json.dumps({**said, **more}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\nclass Model: pass\n")
    assert torch.equal(load_text_encoder(TextConfig("bert", str(folder))).encode(["a cat"])[0], before)
    assert not (tmp_path / "sung").exists()


def test_a_gpu_that_only_emulates_bfloat16_is_refused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = load(RunConfig, ROOT / "configs/tiny/base.yaml", ["loop.mixed_precision=bf16"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="this GPU has no bfloat16"):
        check_precision(config.loop, torch.device("cuda"))


def test_schedules_have_as_many_steps_as_a_table_may() -> None:
    with pytest.raises(ValueError, match="steps must be from 1 to 100000"):
        NoiseScheduleConfig(steps=10**11)


def test_weights_far_smaller_than_their_network(tmp_path: Path) -> None:
    folder = TINY["bert"](tmp_path / "bert")
    save_file({"embeddings.word_embeddings.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="the weights do not fit"):
        load_text_encoder(TextConfig("bert", str(folder)))


def test_lab_pictures_become_rgb(tmp_path: Path) -> None:
    data = encoded(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF")
    (tmp_path / "lab.tif").write_bytes(data)
    pixels, _ = read_image(tmp_path / "lab.tif")
    assert pixels.min() > 250
