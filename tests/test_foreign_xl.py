"""Pipeline folders of Stable Diffusion XL: drawn as the stock pipeline draws, through the trainer, and written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from ldm.control import copied_control
from ldm.models.unet import UNetConfig
from ldm.text_config import TextConfig, TextPart
from pipelines.cascade import load_cascade
from pipelines.foreign import export_pipeline, load_pipeline
from tests.test_foreign import BETAS, LEADING, PROMPT, SCHEDULERS, SEEDS, apart, generators, halved, ours, theirs, vae
from tests.test_presets import SHORT, pictures
from tests.tiny_text import tiny_clip

__all__ = ["pictures"]

XL = {
    "block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 8), "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "cross_attention_dim": 40,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 12, "sample_size": 8,
}  # fmt: skip


def sdxl(parent: Path, scheduler: Any) -> Any:
    """Full configs of few channels, of random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = tiny_clip(parent / "clip")
    first = CLIPTextModel.from_pretrained(folder, local_files_only=True)
    settings = {**first.config.to_dict(), "hidden_size": 24, "num_hidden_layers": 3, "projection_dim": 12,
                "hidden_act": "gelu", "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(1)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    tokenizers = [CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=77, **more)
                  for more in ({}, {"pad_token": "!"})]  # fmt: skip
    torch.manual_seed(0)
    pipeline: Any = diffusers.StableDiffusionXLPipeline(
        vae=vae(4, 0.13025), unet=diffusers.UNet2DConditionModel(**XL), text_encoder=first, text_encoder_2=second,
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    second.load_state_dict({name: value.half().float() for name, value in second.state_dict().items()})
    return halved(pipeline)


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(**BETAS, **LEADING)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sdxl(tmp_path_factory.mktemp("xl"), euler())


@pytest.fixture(scope="module")
def folder(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("stock") / "sdxl"
    stock.save_pretrained(path)
    return path


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpmpp", "unipc"])
def test_it_draws_as_the_stock_pipeline(
    stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    monkeypatch.setattr(stock, "scheduler", SCHEDULERS[scheduler]())
    stock.save_pretrained(tmp_path / "stock")
    latents, drawn = theirs(stock)
    cascade = load_cascade(tmp_path / "stock")
    assert cascade.notes == ()
    found, own = ours(cascade, monkeypatch)
    assert apart(found, latents) < 1e-4
    assert np.abs(own - drawn).max() <= 2


def without_negative(stock: Any) -> Tensor:
    return stock([PROMPT] * len(SEEDS), generator=generators(SEEDS), output_type="latent", num_inference_steps=5,
                 guidance_scale=5.0).images  # fmt: skip


@pytest.mark.parametrize("zeros", [True, False])
def test_without_a_negative_prompt_the_null_is_theirs(
    stock: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zeros: bool
) -> None:
    shutil.copytree(folder, tmp_path / "sdxl")
    index = json.loads((tmp_path / "sdxl/model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = zeros
    (tmp_path / "sdxl/model_index.json").write_text(json.dumps(index))
    again: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "sdxl", add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    cascade = load_cascade(tmp_path / "sdxl")
    monkeypatch.setattr("tests.test_foreign.NEGATIVE", "")
    found, _ = ours(cascade, monkeypatch)
    assert apart(found, without_negative(again)) < 1e-4
    assert (apart(found, without_negative(stock)) < 1e-4) == zeros
    empty = cascade.text.encode([""])[0]
    assert bool(empty.any()) != zeros


@pytest.mark.parametrize("override", ["base.steps=7", "base.guidance=4", "base.offset=0"])
def test_each_wrong_setting_shows(folder: Path, stock: Any, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    latents, _ = theirs(stock)
    assert apart(ours(load_pipeline(folder), monkeypatch, [override])[0], latents) > 1e-3


def test_the_whole_text_and_the_sizes_count(folder: Path, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, _ = theirs(stock)
    cascade = load_pipeline(folder)
    states = type(cascade.text).states
    monkeypatch.setattr("ldm.denoiser.CELL_PX", 7)
    assert apart(ours(cascade, monkeypatch)[0], latents) > 1e-3

    def without(own: Any, tokens: Any) -> Tensor:
        found = states(own, tokens)
        found[:, -1] = 0
        return found

    monkeypatch.setattr(type(cascade.text), "states", without)
    assert apart(ours(cascade, monkeypatch)[0], latents) > 1e-3


def test_it_goes_through_the_trainer_and_back(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported, fine-tuned on a folder, exported: the stock pipeline then draws what we draw."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    for words in (["import", str(folder), "mine"],
                  ["train", str(pictures), "--preset", "full", "--model", "mine", "--run", "run", *SHORT],
                  ["export", "run/final", "back"]):  # fmt: skip
        done = runner.invoke(app, words)
        assert done.exit_code == 0, done.output
    before, _ = ours(load_cascade(tmp_path / "mine"), monkeypatch)
    found, drawn = ours(load_cascade(tmp_path / "run/final"), monkeypatch, ["base.sampler=euler"])
    again: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "back", torch_dtype=torch.float32,
                                                                     add_watermarker=False)  # fmt: skip
    again.set_progress_bar_config(disable=True)
    latents, stock_drawn = theirs(again)
    assert apart(found, latents) < 1e-4
    assert np.abs(drawn - stock_drawn).max() <= 2
    assert apart(found, before) > 1e-3


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "sdxl")
    file = tmp_path / "sdxl/unet/config.json"
    file.write_text(file.read_text().replace('"projection_class_embeddings_input_dim": 204',
                                             '"projection_class_embeddings_input_dim": 202'))  # fmt: skip
    with pytest.raises(UserError, match="the pooled text's width of unet/ is 10, that of the part beside it 12"):
        load_pipeline(tmp_path / "sdxl")
    stage = load_pipeline(folder).stages[0]
    with pytest.raises(UserError, match="control: a network that is told of sizes"):
        copied_control(stage.denoiser.net, stage.config.unet, stage.config.shape(8), 8)
    with pytest.raises(UserError, match="several text encoders together learn no words"):
        load_pipeline(folder).text.learn("zorp", torch.zeros(1, 16))
    with pytest.raises(UserError, match="inversion: several text encoders together learn no words"):
        load_pipeline(folder).text.beginnings("cat", 1)
    with pytest.raises(ValueError, match="sizes and pooled go together"):
        UNetConfig(sizes=4)
    with pytest.raises(ValueError, match="of kinds clip and clip_projection"):
        TextConfig(kind="clip_pair", parts=(TextPart("clip", "a"), TextPart("clip", "b")))
    with pytest.raises(ValueError, match="empty_is_zero is of kind clip_pair"):
        TextConfig(empty_is_zero=True)
    with pytest.raises(UserError, match="exists; an export is not written over"):
        export_pipeline(load_pipeline(folder), tmp_path)
