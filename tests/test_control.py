"""ControlNet: what it is told, that it begins as nothing, a training, and the flag that uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from ldm.cli import app
from ldm.conditioning import Conditioning
from ldm.config import UserError, load
from ldm.control import ControlConfig, control_picture, copied_control
from pipelines.cascade import load_cascade
from pipelines.control import ControlRequest
from pipelines.generate import ModelRequest, generate
from pipelines.images import read_recipe
from tests.test_foreign import SCHEDULERS, SD1, apart, generators, stable_diffusion
from tests.test_presets import SHORT, pictures
from tests.tiny import ROOT
from tests.tiny_text import tiny_clip
from training.control_report import correlation, edges_found
from training.tasks import RunConfig, build_task

__all__ = ["pictures"]


def test_edges_are_those_of_sobel() -> None:
    """Against scipy's, whose kernel is eight times as large; white from half of the range on."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 9, 11, generator=generator) * 2 - 1
    found = control_picture(picture, ControlConfig("edges"))
    grey = picture[0].mean(0).numpy().astype(np.float64)
    slopes = (ndimage.sobel(grey, axis, mode="nearest") / 8 for axis in (0, 1))
    wanted = np.minimum(2 * np.sqrt(sum(slope**2 for slope in slopes)), 1)
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, atol=1e-6)
    assert torch.equal(found[:, 0], found[:, 2])
    step = torch.full((1, 3, 4, 8), -1.0)
    step[..., 4:] = 1
    assert control_picture(step, ControlConfig("edges"))[0, 0, 2].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["colours", "low_res"])
def test_other_kinds_keep_the_means_of_squares(kind: str) -> None:
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = control_picture(picture, ControlConfig(kind, squares=4))  # type: ignore[arg-type]
    assert found.shape == picture.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    means = torch.nn.functional.avg_pool2d((picture + 1) / 2, 4)
    atol = 1e-6 if kind == "colours" else 0.1
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(found, 4), means, atol=atol, rtol=0)


def test_it_begins_as_nothing_and_is_diffusers_own(tmp_path: Path) -> None:
    """Zeros on every way out; with other weights, what the stock ControlNet pipeline draws."""
    stock = stable_diffusion(tiny_clip(tmp_path / "clip"), SD1, SCHEDULERS["ddim"]())
    stock.save_pretrained(tmp_path / "sd")
    cascade = load_cascade(tmp_path / "sd")
    stage = cascade.stages[0]
    control = copied_control(stage.denoiser.net, stage.config.unet, stage.config.shape(8), 8).eval()
    theirs = diffusers.ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(16, 32, 64, 128))
    assert {n: v.shape for n, v in control.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    for name, value in theirs.state_dict().items():
        if "controlnet" not in name:
            assert torch.equal(value, control.state_dict()[name]), name
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5)
    cond = Conditioning(*cascade.text.encode(["a cat", "a dog"]))
    told = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = stage.denoiser(x, t, cond).eps
        stage.denoiser.control = control
        assert torch.equal(stage.denoiser(x, t, cond.join(Conditioning(control=told))).eps, plain)
        for number, parameter in enumerate(control.parameters()):
            if not parameter.any():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.copy_(0.05 * noise)
        moved = stage.denoiser(x, t, cond.join(Conditioning(control=told))).eps
        assert apart(moved, plain) > 1e-3
        stage.denoiser.control_scale = 0.0
        assert torch.equal(stage.denoiser(x, t, cond.join(Conditioning(control=told))).eps, plain)
    stage.denoiser.control_scale = 0.8
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **{name: getattr(stock, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        controlnet=control, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a red cat", told[:1], num_inference_steps=5, guidance_scale=5.0, generator=generators([3]),
                       controlnet_conditioning_scale=0.8, output_type="latent").images  # fmt: skip
    stage.control = told[:1]
    found = []
    decode = stage.codec.module.decode
    stage.codec.module.decode = lambda raw: (found.append(raw), decode(raw))[1]  # type: ignore[method-assign]
    cascade.draw(["a red cat"], [3], cascade.sampling(5, 5.0))
    assert apart(stage.config.normalisation.apply(found[0]), latents) < 1e-4


def test_a_preset_trains_one_and_flags_use_it(
    pictures: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(pictures), "--preset", "control", "--model", str(tiny_folder), *SHORT]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    final = Path(done.output.splitlines()[-1])
    assert sorted(p.name for p in final.iterdir()) == ["control.json", "controlnet", "training.json"]
    assert CliRunner().invoke(app, words).exit_code == 0
    picture = next(pictures.glob("*.png"))
    found = []
    for number, scale in enumerate((0.0, 1.0)):
        asked = ["generate", "a cat", "--model", str(tiny_folder), "--n", "2", "--steps", "2", "--out", str(number)]
        asked += ["--control", str(final), "--control-from", str(picture), "--control-scale", str(scale)]
        drawn = CliRunner().invoke(app, asked)
        assert drawn.exit_code == 0, drawn.output
        with Image.open(f"{number}/0001.png") as made:
            found.append(np.array(made))
    generate(["a cat"], tiny_folder, n=2, steps=2, out="plain")
    with Image.open("plain/0001.png") as made:
        assert np.array_equal(np.array(made), found[0])
    measured = ["eval", "control", str(tiny_folder), str(pictures), "--control", str(final), "--split", "", "--scales",
                "0,1", "--pictures", "4", "--set", "base.steps=2"]  # fmt: skip
    done = CliRunner().invoke(app, measured)
    assert done.exit_code == 0, done.output
    report = json.loads(Path("out/control/report.json").read_text(encoding="utf-8"))
    without, told = (report["measures"][f"scale {scale}"] for scale in (0, 1))
    assert without.keys() == {"correlation", "F1 within 1 px"}
    for name, (value, *_) in without.items():
        gain = told[f"{name}, beyond that of scale 0"]
        assert gain[0] == pytest.approx(told[name][0] - value)
        assert gain[1] <= gain[0] <= gain[2]
    recipes = [read_recipe(Path(folder) / "0001.png") for folder in ("0", "1", "plain")]
    assert len({recipe["model"] for recipe in recipes if recipe}) == 3


def test_measures_of_control_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.rand(4, 3, 6, 6, generator=generator) for _ in range(2))
    wanted = [np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(correlation(a, b).numpy(), wanted, atol=1e-6)
    line = torch.zeros(1, 3, 8, 8)
    line[:, :, 3] = 1
    assert edges_found(line.roll(1, 2), line).item() == pytest.approx(1)
    assert edges_found(line.roll(2, 2), line).item() == 0
    both = torch.maximum(line, line.roll(3, 2))  # half of what was found is wanted, and all of what is wanted found
    assert edges_found(both, line).item() == pytest.approx(2 / 3)


def test_only_the_control_network_is_trained(pictures: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from training.presets import tuning

    task = build_task(tuning(pictures, "control", tiny_folder, [f"cache={tmp_path}"]))
    own = [name for name, parameter in task.module.named_parameters() if parameter.requires_grad]
    assert own
    assert all(name.startswith("denoiser.control.") for name in own)


def test_what_does_not_go_together_is_refused(tiny_folder: Path, pictures: Path, tmp_path: Path) -> None:
    for wrong, reason in ((["control.kind=edges"], "say which with init"),
                          (["control.kind=edges", "init=here", "inpainting=true"], "control is of a base that is not"),
                          (["control.squares=0"], "squares must be from 1")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            load(RunConfig, ROOT / "configs/tiny/base.yaml", wrong)
    alone = CliRunner().invoke(app, ["generate", "a cat", "--control", "here"])
    assert "--control and --control-from go together" in str(alone.exception)
    picture = next(pictures.glob("*.png"))
    for scale in (-1.0, float("nan")):
        wrong_scale = ControlRequest("here", picture, scale)
        with pytest.raises(UserError, match="must be from 0 to 10"):
            generate(["a"], ModelRequest(tiny_folder, control=wrong_scale), out=tmp_path / "o")
    with pytest.raises(UserError, match=r"control\.json: cannot be read"):
        generate(["a"], ModelRequest(tiny_folder, control=ControlRequest(tmp_path, picture)), out=tmp_path / "o")
    shutil.rmtree(tmp_path / "o", ignore_errors=True)
