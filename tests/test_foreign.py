"""Pipeline folders of diffusers: drawn as the stock pipelines draw, written back so that those load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from ldm.interop import read_scheduler, write_scheduler
from ldm.models.palette import Palette, PaletteConfig
from ldm.weights import save_palette
from pipelines.cascade import Cascade, load_cascade
from pipelines.foreign import check_target, export_pipeline, load_pipeline
from pipelines.images import to_uint8
from pipelines.join import join
from pipelines.settings import SamplingConfig
from tests.tiny_text import tiny_clip

PROMPT, NEGATIVE, SEEDS, STEPS, GUIDANCE = "a red cat", "blue dog", [3, 4], 5, 5.0
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, **LEADING}
SCHEDULERS: dict[str, Callable[..., Any]] = {
    "ddim": lambda **more: diffusers.DDIMScheduler(**{**DDIM, **more}),
    "ddim trailing": lambda **more: diffusers.DDIMScheduler(**{**DDIM, "timestep_spacing": "trailing", **more}),
    "euler": lambda **more: diffusers.EulerDiscreteScheduler(**{**BETAS, **LEADING, **more}),
    "dpmpp": lambda **more: diffusers.DPMSolverMultistepScheduler(**{**BETAS, **more}),
    "dpmpp leading": lambda **more: diffusers.DPMSolverMultistepScheduler(**{**BETAS, **LEADING, **more}),
    "unipc": lambda **more: diffusers.UniPCMultistepScheduler(**{**BETAS, **more}),
    "ddpm": lambda **more: diffusers.DDPMScheduler(**{**BETAS, "clip_sample": False, **LEADING, **more}),
}
SD1 = {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 4, "norm_num_groups": 8}
SD2 = {**SD1, "attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True}
X4 = {
    "in_channels": 7, "out_channels": 4, "block_out_channels": (32, 32, 32, 64), "attention_head_dim": 4,
    "norm_num_groups": 8, "num_class_embeds": 1000, "only_cross_attention": (True, True, True, False),
    "use_linear_projection": True, "sample_size": 32,
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
}  # fmt: skip


def vae(levels: int, scale: float) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(16,) * levels, layers_per_block=2, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=scale,
    )  # fmt: skip


def text(folder: Path) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=77)
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def halved(pipeline: Any) -> Any:
    """With weights that float16 holds: what is written in it is then the same network."""
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.load_state_dict({name: value.half().float() for name, value in part.state_dict().items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def stable_diffusion(clip: Path, unet: dict[str, Any], scheduler: Any) -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=16, **unet)
    return halved(diffusers.StableDiffusionPipeline(
        vae=vae(4, 0.18215), unet=network, **text(clip), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ))  # fmt: skip


def upscaler(clip: Path) -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(cross_attention_dim=16, **X4)
    linear = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
    return halved(diffusers.StableDiffusionUpscalePipeline(
        vae=vae(3, 0.08333), unet=network, **text(clip), max_noise_level=350,
        low_res_scheduler=diffusers.DDPMScheduler(**linear),
        scheduler=diffusers.DDIMScheduler(**{**linear, "clip_sample": False, "set_alpha_to_one": False,
                                             "prediction_type": "v_prediction", **LEADING}),
    ))  # fmt: skip


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def theirs(pipeline: Any, seeds: list[int] = SEEDS, **more: Any) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Final latents, and pictures, of a stock pipeline."""
    found = []
    for kind in ("latent", "np"):
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **more}
        found.append(pipeline([PROMPT] * len(seeds), negative_prompt=[NEGATIVE] * len(seeds),
                              generator=generators(seeds), output_type=kind, **options).images)  # fmt: skip
    return found[0], (found[1] * 255).round()


def ours(cascade: Cascade, monkeypatch: pytest.MonkeyPatch, overrides: list[str] | None = None,
         prompt: str = PROMPT, low_res: Tensor | None = None) -> tuple[Tensor, np.ndarray[Any, Any]]:  # fmt: skip
    """Final latents, in the network's units, and pictures."""
    stage, latents = cascade.stages[0], []
    decode = type(stage.codec.module).decode
    monkeypatch.setattr(type(stage.codec.module), "decode", lambda own, raw: (latents.append(raw), decode(own, raw))[1])
    name = stage.config.name
    settings = [f"{name}.steps={STEPS}", f"{name}.guidance={GUIDANCE}", *(overrides or [])]
    drawn = cascade.draw([prompt] * len(SEEDS), SEEDS, cascade.sampling(overrides=settings), low_res=low_res,
                         negative=NEGATIVE)[-1]  # fmt: skip
    monkeypatch.undo()
    return stage.config.normalisation.apply(torch.cat(latents)), to_uint8(drawn).astype(float)


def apart(a: Tensor, b: Tensor) -> float:
    """Relative to the largest."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("shape", "prediction"), [(SD1, "epsilon"), (SD2, "v_prediction")], ids=["sd1", "sd2-v"])
def test_it_draws_as_the_stock_pipeline(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, shape: dict[str, Any], prediction: str
) -> None:
    stock = stable_diffusion(clip, shape, SCHEDULERS[scheduler](prediction_type=prediction))
    stock.save_pretrained(tmp_path / "stock")
    latents, pictures = theirs(stock)
    cascade = load_cascade(tmp_path / "stock")
    assert cascade.notes == ()
    found, drawn = ours(cascade, monkeypatch)
    assert apart(found, latents) < 1e-4
    assert np.abs(drawn - pictures).max() <= 2


def test_it_draws_other_shapes_as_the_stock_pipeline(
    folder: Path, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, pictures = theirs(stock, height=64, width=128)
    found, drawn = ours(load_cascade(folder).sized(128, 64), monkeypatch)
    assert latents.shape[2:] == (8, 16)
    assert apart(found, latents) < 1e-4
    assert np.abs(drawn - pictures).max() <= 2


def test_it_upscales_as_the_stock_pipeline(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = upscaler(clip)
    stock.save_pretrained(tmp_path / "stock")
    small = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents, pictures = theirs(stock, image=small, noise_level=20)
    cascade = load_cascade(tmp_path / "stock")
    found, drawn = ours(cascade, monkeypatch, low_res=small)
    assert apart(found, latents) < 1e-4
    assert np.abs(drawn - pictures).max() <= 2
    assert apart(ours(cascade, monkeypatch, ["sr.level=0.1"], low_res=small)[0], latents) > 1e-3
    out = export_pipeline(cascade, tmp_path / "out")
    again = diffusers.StableDiffusionUpscalePipeline.from_pretrained(out, torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert apart(theirs(again, image=small, noise_level=20)[0], latents) < 1e-5
    assert again.config.max_noise_level == 350


@pytest.fixture(scope="module")
def stock(clip: Path) -> Any:
    return stable_diffusion(clip, SD1, SCHEDULERS["ddim"]())


@pytest.fixture(scope="module")
def folder(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "sd"
    stock.save_pretrained(path)
    return path


def test_each_wrong_setting_shows(folder: Path, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What must agree, changed one at a time, moves the latents ten times beyond the tolerance."""
    latents = theirs(stock)[0]
    cascade = load_pipeline(folder)
    wrong = {"offset": "base.offset=0", "clean": "base.clean=true", "guidance": "base.guidance=5.5",
             "fewer": f"base.steps={STEPS - 2}", "more": f"base.steps={STEPS + 2}"}  # fmt: skip
    for name, override in wrong.items():
        assert apart(ours(cascade, monkeypatch, [override])[0], latents) > 1e-3, name
    assert apart(ours(cascade, monkeypatch, prompt="a blue dog")[0], latents) > 1e-3
    settings = folder / "scheduler/scheduler_config.json"
    told = settings.read_text(encoding="utf-8")
    try:
        settings.write_text(json.dumps(json.loads(told) | {"prediction_type": "v_prediction"}), encoding="utf-8")
        assert apart(ours(load_pipeline(folder), monkeypatch)[0], latents) > 1e-3
    finally:
        settings.write_text(told, encoding="utf-8")


def test_import_and_export_keep_the_pictures(
    folder: Path, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through our own folder and back to one that the stock pipeline loads."""
    latents, pictures = theirs(stock)
    runner = CliRunner()
    for words in (["import", str(folder), str(tmp_path / "ours")],
                  ["export", str(tmp_path / "ours"), str(tmp_path / "back")]):  # fmt: skip
        done = runner.invoke(app, words)
        assert done.exit_code == 0, done.output
    found, drawn = ours(load_cascade(tmp_path / "ours"), monkeypatch)
    assert apart(found, latents) < 1e-4
    assert np.abs(drawn - pictures).max() <= 2
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back", torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is diffusers.DDIMScheduler
    assert apart(theirs(again)[0], latents) < 1e-5
    with pytest.raises(UserError, match="exists; an export is not written over"):
        export_pipeline(load_cascade(tmp_path / "ours"), tmp_path / "back")
    text = load_cascade(tmp_path / "ours").text
    palette = Palette(PaletteConfig(colours=2, widths=(8,)), torch.zeros(2, 3), text.width)
    save_palette(palette, text.digest, tmp_path / "palette")
    join([tmp_path / "ours"], tmp_path / "painted", palette=tmp_path / "palette")
    done = runner.invoke(app, ["export", str(tmp_path / "painted"), str(tmp_path / "bare")])
    assert done.exit_code == 0, done.output
    assert "the palette is left out" in done.output


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_prediction_that_the_network_belies(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    """Of noise alone a network of eps gives back what it gets. One that is not trained gives neither."""
    stock = stable_diffusion(clip, SD1, SCHEDULERS["ddim"](prediction_type=prediction))
    stock.save_pretrained(tmp_path / "stock")
    cascade = load_pipeline(tmp_path / "stock")
    told = check_target(cascade)
    assert told is None if prediction == "v_prediction" else "a trained network of eps gives it back" in str(told)

    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, *_: Any, **__: Any) -> SimpleNamespace:
            return SimpleNamespace(sample=self.scale * x)

    monkeypatch.setattr(cascade.stages[0].denoiser, "net", Echo())
    if prediction == "epsilon":
        assert check_target(cascade) is None
    else:
        with pytest.raises(UserError, match=r"correlation of 1\.00, as a network of eps does, and scheduler/ calls it"):
            check_target(cascade)


def test_autoencoders_of_old_names_load(folder: Path, tmp_path: Path) -> None:
    """As most were released, with attention's matrices called query, key, value and proj_attn."""
    copy = tmp_path / "sd"
    shutil.copytree(folder, copy)
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    old, tensors = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, load_file(file)
    for new, name in old.items():
        for key in [k for k in tensors if f"attentions.0.{new}." in k]:
            tensors[key.replace(new, name)] = tensors.pop(key)
    assert any(".query." in key for key in tensors)
    save_file(tensors, file)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    ours_, theirs_ = (load_pipeline(f).stages[0].codec.module.decode(x) for f in (copy, folder))
    assert torch.equal(ours_, theirs_)


def test_what_is_drawn_otherwise_is_said(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sd"
    shutil.copytree(folder, copy)
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    scheduler.save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index))
    cascade = load_pipeline(copy)
    assert cascade.notes == (
        "scheduler PNDMScheduler: drawn by dpmpp_2m (DPM-Solver++ 2M), on diffusers' leading steps",
        "safety_checker: not used",
    )
    assert cascade.stages[0].config.sampling.offset == 1
    assert torch.isfinite(cascade([PROMPT], [1], cascade.sampling(steps=2))).all()


@pytest.mark.parametrize(
    ("scheduler", "settings", "said"),
    [
        (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "on our own grid karras"),
        (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}, "'sigma_min': not drawn so"),
        (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}, "drawn by dpmpp_2m"),
        (diffusers.EulerDiscreteScheduler, {}, "timestep_spacing 'linspace' is drawn as trailing"),
        (diffusers.EulerAncestralDiscreteScheduler, {}, "EulerAncestralDiscreteScheduler: drawn by dpmpp_2m"),
    ],
)
def test_settings_of_schedulers_that_differ_are_said(scheduler: Any, settings: dict[str, Any], said: str) -> None:
    data = dict(scheduler(**BETAS, **settings).config) | {"_class_name": scheduler.__name__}
    notes = read_scheduler(data, "here").notes
    assert len(notes) == 1
    assert said in notes[0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_come_back_as_they_were(name: str) -> None:
    """Read, written, and read again, by the stock class too."""
    scheduler = SCHEDULERS[name](prediction_type="v_prediction")
    said = read_scheduler({**scheduler.config, "_class_name": type(scheduler).__name__}, "here")
    sampling = vars(SamplingConfig(**said.sampling))
    kind, config = write_scheduler(said.schedule, said.denoiser, sampling)
    again = getattr(diffusers, kind).from_config(config)
    assert type(again) is type(scheduler)
    assert read_scheduler({**again.config, "_class_name": kind}, "here") == said
    for made in (scheduler, again):
        made.set_timesteps(8)
    assert torch.equal(scheduler.timesteps, again.timesteps)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "a 'FluxPipeline' is not read"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type is 'image', which is not"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "text_time needs addition_time_embed_dim and proj"),
        ("unet/config.json", {"in_channels": 9, "class_embed_type": "timestep"}, "for inpainting are not read"),
        ("unet/config.json", {"block_out_channels": [10**9]}, "attention needs one entry|multiples of norm_groups"),
        ("unet/config.json", {"_target_": "os.system", "auto_map": {}}, "auto_map: not of an UNet2DConditionModel"),
        ("unet/config.json", {"cross_attention_dim": 32}, "the text width of unet/ is 32"),
        ("unet/config.json", {"mid_block_type": "os.system"}, "mid_block_type is 'os.system', which is not built"),
        ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean"),
        ("vae/config.json", {"scaling_factor": 0}, "division by zero"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
        ("scheduler/scheduler_config.json", {"steps_offset": -1}, "offset is of the leading grid"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "target eps does not determine x0"),
        ("scheduler/scheduler_config.json", {"clip_sample": True, "clip_sample_range": None}, "clip_sample_range"),
        ("unet/config.json", {"sample_size": [8, 12]}, "sd: "),
    ],
)
def test_what_is_not_built_here_is_refused_by_name(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any], reason: str
) -> None:
    copy = tmp_path / "sd"
    shutil.copytree(folder, copy)
    told = json.loads((copy / file).read_text(encoding="utf-8"))
    (copy / file).write_text(json.dumps(told | change), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        load_pipeline(copy)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sd"
    shutil.copytree(folder, copy)
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="pickled weights can run code"):
        load_pipeline(copy)


def test_what_no_stock_pipeline_holds_is_not_exported(tiny_folder: Path, tmp_path: Path) -> None:
    cascade = load_cascade(tiny_folder)
    twice = replace(cascade, stages=[*cascade.stages, *cascade.stages])
    with pytest.raises(UserError, match="stages: export them one by one, with --stage"):
        export_pipeline(twice, tmp_path / "a")
    with pytest.raises(UserError, match="stock pipelines are told by CLIP"):
        export_pipeline(cascade.only(cascade.stages[0].config.name), tmp_path / "a")
    assert not list(tmp_path.iterdir())
