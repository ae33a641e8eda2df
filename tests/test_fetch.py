"""Models named by a Hub id, and pickled ones opened where that is asked for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from pipelines.cascade import load_cascade
from pipelines.fetch import located, readable, unpickled
from tests.test_foreign import SCHEDULERS, SD1, stable_diffusion
from tests.tiny_text import tiny_clip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sd"
    stable_diffusion(tiny_clip(tmp_path / "clip"), SD1, SCHEDULERS["ddim"]()).save_pretrained(path)
    return path


@pytest.fixture
def pickled(folder: Path) -> Path:
    """The same with the weights as they were written before there were safetensors."""
    for part, old, new in (("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
                           ("vae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
                           ("text_encoder", "model.safetensors", "pytorch_model.bin")):  # fmt: skip
        torch.save(load_file(folder / part / old), folder / part / new)
        (folder / part / old).unlink()
    return folder


def test_an_id_is_fetched_and_a_path_is_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert load_cascade("hf:someone/a-model").digest == load_cascade(folder).digest
    assert [name for name, _, _ in asked] == ["someone/a-model"]
    files = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "model_index.json",
             "tokenizer/merges.txt", "unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors",
             "unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors"]  # fmt: skip
    assert list(filter_repo_objects(files, allow_patterns=asked[0][1], ignore_patterns=asked[0][2])) == files[:4]
    with readable(Path("hf:someone/a-model"), pickles=True):
        pass
    assert "unet/diffusion_pytorch_model.bin" in list(filter_repo_objects(files, allow_patterns=asked[1][1]))
    for path in ("sd", "sd/unet", "nothing", "a/b/c", "../a", "/tmp/nothing", "a//b"):
        located(path)
    with pytest.raises(UserError, match=r"runs/sr-old: no such folder; if it is an id .*, say hf:runs/sr-old"):
        load_cascade("runs/sr-old")
    with pytest.raises(UserError, match="an id of the Hub is hf:owner/name"):
        located("hf:nothing")
    with pytest.raises(UserError, match="nothing: no such folder"), readable(Path("nothing"), pickles=True):
        pass
    assert len(asked) == 2


def test_what_cannot_be_fetched_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **options: Any) -> str:
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match=r"hf:someone/a-model: cannot be fetched: no route to host$"):
        load_cascade("hf:someone/a-model")


def test_pickles_are_opened_when_asked_for(pickled: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["import", str(pickled), str(tmp_path / "no")])
    assert isinstance(refused.exception, UserError)
    assert "ldm import --pickles" in str(refused.exception)
    before = {path: path.read_bytes() for path in pickled.rglob("*") if path.is_file()}
    done = CliRunner().invoke(app, ["import", str(pickled), str(tmp_path / "ours"), "--pickles"])
    assert done.exit_code == 0, done.output
    stage = load_cascade(tmp_path / "ours").stages[0]
    weights = torch.load(pickled / "unet/diffusion_pytorch_model.bin", weights_only=True)
    for name, value in stage.denoiser.net.state_dict().items():
        torch.testing.assert_close(value, weights[name].half().float(), rtol=0, atol=0)
    assert {path: path.read_bytes() for path in pickled.rglob("*") if path.is_file()} == before


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("inside", ["alone", "saved"])
def test_a_pickle_that_would_run_code_runs_none(pickled: Path, tmp_path: Path, inside: str) -> None:
    file, canary = pickled / "unet/diffusion_pytorch_model.bin", Canary(tmp_path / "sang")
    if inside == "alone":
        file.write_bytes(pickle.dumps(canary))
    else:
        torch.save({"conv_in.weight": canary}, file)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin: holds more than tensors, or is damaged"), \
         unpickled(pickled):  # fmt: skip
        pass
    assert not canary.path.exists()
    torch.save([torch.zeros(1)], file)
    with pytest.raises(UserError, match="not a table of tensors by name"), unpickled(pickled):
        pass
