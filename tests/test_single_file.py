"""Single files: written under the released names, which diffusers' own converters read back, and read by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from pipelines.cascade import load_cascade
from pipelines.fetch import readable
from tests.test_foreign import SCHEDULERS, SD1, SD2, apart, ours, stable_diffusion, theirs
from tests.test_foreign_xl import euler, sdxl
from tests.tiny_text import tiny_clip


def stock(kind: str, tmp_path: Path) -> Any:
    if kind == "xl":
        return sdxl(tmp_path, euler())
    pipeline = stable_diffusion(tiny_clip(tmp_path / "clip"), SD1 if kind == "sd1" else SD2, SCHEDULERS["ddim"]())
    if kind == "sd2":
        pipeline.text_encoder.config.hidden_act = "gelu"
    return pipeline


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_out_and_in_again(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers reads of the file is, tensor by tensor, what was written, and draws the same."""
    stock(kind, tmp_path).save_pretrained(tmp_path / "stock")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "stock", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    runner = CliRunner()
    for words in (["export", str(tmp_path / "stock"), str(tmp_path / "one.safetensors"), "--to", "single"],
                  ["import", str(tmp_path / "one.safetensors"), str(tmp_path / "ours"), "--config",
                   str(tmp_path / "stock")]):  # fmt: skip
        done = runner.invoke(app, words)
        assert done.exit_code == 0, (done.output, done.exception)
    again: Any = type(pipeline).from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "stock"), local_files_only=True,
        torch_dtype=torch.float32, **({} if kind == "xl" else {"safety_checker": None}),
    )  # fmt: skip
    for name in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "xl" else [])):
        before, after = (getattr(p, name).state_dict() for p in (pipeline, again))
        assert before.keys() == after.keys()
        for key, value in before.items():
            torch.testing.assert_close(after[key], value.half().float(), rtol=0, atol=0, msg=f"{name} {key}")
    found, _ = ours(load_cascade(tmp_path / "ours"), monkeypatch)
    assert apart(found, theirs(pipeline)[0]) < 1e-4


def test_marks_of_a_v_network_are_written_and_read(tmp_path: Path) -> None:
    """A file says what the scheduler beside it would not: the folder of its architecture is one of eps."""
    plain = stock("xl", tmp_path)
    plain.save_pretrained(tmp_path / "like")
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    plain.scheduler = type(plain.scheduler).from_config(plain.scheduler.config, **settings)
    plain.save_pretrained(tmp_path / "v")
    for words in (["export", str(tmp_path / "v"), str(tmp_path / "v.safetensors"), "--to", "single"],
                  ["import", str(tmp_path / "v.safetensors"), str(tmp_path / "ours"), "--config",
                   str(tmp_path / "like")]):  # fmt: skip
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (done.output, done.exception)
    assert {"v_pred", "ztsnr"} <= set(load_file(tmp_path / "v.safetensors"))
    config = load_cascade(tmp_path / "ours").stages[0].config
    assert (config.denoiser.target, config.schedule.zero_terminal) == ("v", True)
    assert {"v_pred", "ztsnr"}.isdisjoint(load_file(write_single(tmp_path / "like", tmp_path / "eps.safetensors")))


def write_single(folder: Path, out: Path) -> Path:
    done = CliRunner().invoke(app, ["export", str(folder), str(out), "--to", "single"])
    assert done.exit_code == 0, (done.output, done.exception)
    return out


def test_names_are_those_of_the_release(tmp_path: Path) -> None:
    """Of some tensors that everyone knows."""
    stock("sd1", tmp_path).save_pretrained(tmp_path / "stock")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "stock"), str(tmp_path / "a/one.safetensors"), "--to",
                                    "single"])  # fmt: skip
    assert done.exit_code == 0, done.output
    names = set(load_file(tmp_path / "a/one.safetensors"))
    assert names >= {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight", "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight", "model.diffusion_model.out.2.bias",
        "model.diffusion_model.output_blocks.2.1.conv.weight", "model.diffusion_model.output_blocks.5.2.conv.weight",
        "first_stage_model.decoder.up.3.block.0.norm1.weight", "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.encoder.down.0.downsample.conv.weight", "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    }  # fmt: skip
    assert not any(".resnets." in name or "up_blocks" in name or "down_blocks" in name for name in names)
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "stock"), str(tmp_path / "a/one.safetensors"), "--to",
                                       "single"])  # fmt: skip
    assert "exists; an export is not written over" in str(refused.exception)


def test_what_is_no_single_file_is_refused(tmp_path: Path) -> None:
    stock("sd1", tmp_path).save_pretrained(tmp_path / "stock")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: no single file of the architecture in .*stock"), \
         readable(tmp_path / "other.safetensors", tmp_path / "stock"):  # fmt: skip
        pass
    with pytest.raises(UserError, match="says nothing of its architecture: name a pipeline folder"), \
         readable(tmp_path / "other.safetensors"):  # fmt: skip
        pass
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled weights can run code"), \
         readable(tmp_path / "old.ckpt", tmp_path / "stock"):  # fmt: skip
        pass
