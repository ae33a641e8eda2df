"""LoRA: trained, written in the layout of diffusers and peft, merged, and what stock pipelines make of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError, load
from ldm.lora import LORA_FILE, PREFIX, LoraConfig, add_lora, merge_lora, save_lora
from ldm.text import TextConfig, load_text_encoder
from pipelines.cascade import load_cascade
from pipelines.foreign import load_pipeline
from tests.test_foreign import SCHEDULERS, SD1, apart, halved, ours, stable_diffusion, theirs
from tests.test_presets import SHORT, pictures
from tests.tiny import ROOT
from tests.tiny_text import TINY, tiny_clip
from training import loop
from training.run import train
from training.stop import Interrupted
from training.tasks import RunConfig, build_task
from training.tuning import told_by

__all__ = ["pictures"]


def changed(network: Any, config: LoraConfig, folder: Path) -> Path:
    """A file of a LoRA of this network, of random numbers."""
    copy = type(network).from_config(network.config)
    copy.load_state_dict(network.state_dict())
    add_lora(copy, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if ".lora_B." in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.2).half())
            elif ".lora_A." in name:
                parameter.copy_(parameter.half())
    save_lora({PREFIX: copy}, config, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "sd"
    stable_diffusion(tiny_clip(path.parent / "clip"), SD1, SCHEDULERS["ddim"]()).save_pretrained(path)
    return path


def stock(folder: Path) -> Any:
    return halved(diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None))


@pytest.mark.parametrize(
    "config", [LoraConfig(rank=4), LoraConfig(rank=2, alpha=1.0, targets=("to_q", "conv1", "proj_in"))]
)
def test_stock_pipelines_load_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: LoraConfig
) -> None:
    cascade = load_pipeline(folder)
    changed(cascade.stages[0].denoiser.net, config, tmp_path)
    plain, _ = ours(cascade, monkeypatch)
    merged = cascade.merged([f"{tmp_path}:0.7"])
    found, drawn = ours(merged, monkeypatch)
    pipeline = stock(folder)
    pipeline.load_lora_weights(tmp_path)
    latents, pictures_ = theirs(pipeline, cross_attention_kwargs={"scale": 0.7})
    assert apart(found, latents) < 1e-4
    assert abs(drawn - pictures_).max() <= 2
    assert apart(plain, latents) > 1e-3
    assert merged.digest != cascade.digest


def test_theirs_is_read_and_they_stack(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by peft through the stock pipeline; a second one on top, both ways."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig as Peft
    from peft.utils import get_peft_model_state_dict

    for number in (0, 1):
        torch.manual_seed(number)
        pipeline = stock(folder)
        settings = Peft(r=2, lora_alpha=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
        pipeline.unet.add_adapter(settings)
        state = get_peft_model_state_dict(pipeline.unet)
        told: dict[str, Any] = {"unet_lora_layers": state}
        if number:  # as diffusers' own training scripts name them
            told = {"unet_lora_layers": convert_state_dict_to_diffusers(state)}
        diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / str(number), **told)
    pipeline = stock(folder)
    for number in (0, 1):
        pipeline.load_lora_weights(tmp_path / str(number), adapter_name=f"n{number}")
    pipeline.set_adapters(["n0", "n1"], [0.5, 0.8])
    latents, _ = theirs(pipeline)
    cascade = load_pipeline(folder).merged([f"{tmp_path / '0'}:0.5", f"base={tmp_path / '1' / LORA_FILE}:0.8"])
    assert apart(ours(cascade, monkeypatch)[0], latents) < 1e-4


def test_a_preset_trains_and_a_flag_uses_it(
    pictures: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(pictures), "--preset", "lora", "--model", str(tiny_folder), *SHORT, "--set", "lora.rank=2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    final = Path(done.output.splitlines()[-1])
    assert sorted(p.name for p in final.iterdir()) == [LORA_FILE, "training.json"]
    trained = load_file(final / LORA_FILE)
    assert any(bool(value.any()) for name, value in trained.items() if "lora_B" in name)
    before = load_cascade(tiny_folder).stages[0].denoiser.net.state_dict()
    after = load_cascade(tiny_folder).merged([str(final)]).stages[0].denoiser.net.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name.removeprefix("unet.").replace("lora_A.", "") for name in trained if "lora_A" in name}
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    drawn = CliRunner().invoke(app, ["generate", "a cat", "--model", str(tiny_folder), "--lora", f"{final}:0.5",
                                     "--n", "1", "--steps", "2"])  # fmt: skip
    assert drawn.exit_code == 0, drawn.output


def test_only_the_change_is_trained(tiny_folder: Path, pictures: Path, tmp_path: Path) -> None:
    from training.presets import tuning

    task = build_task(tuning(pictures, "lora", tiny_folder, [f"cache={tmp_path}"]))
    own = [name for name, parameter in task.module.named_parameters() if parameter.requires_grad]
    assert own
    assert all(".lora_" in name for name in own)
    with pytest.raises(UserError, match="of a network that has learned: say which with init"):
        load(RunConfig, ROOT / "configs/tiny/base.yaml", ["lora.rank=4"])
    with pytest.raises(UserError, match=r"lora.targets: nothing_like_it: "):
        build_task(tuning(pictures, "lora", tiny_folder, [f"cache={tmp_path}", "lora.targets=[nothing_like_it]"]))


def test_a_recorded_alpha_is_read(folder: Path, tmp_path: Path) -> None:
    net = load_pipeline(folder).stages[0].denoiser.net
    file = changed(net, LoraConfig(rank=2), tmp_path) / LORA_FILE
    name = next(n for n in load_file(file) if "lora_A" in n).removeprefix("unet.").replace("lora_A.", "")
    weight, moved = net.get_parameter(name), []
    for metadata in (None, {"unet.r": 2, "unet.lora_alpha": 1}, {"unet.r": 2, "unet.alpha_pattern": {"a": 1}}):
        save_file(load_file(file), file, None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)})
        before = weight.clone()
        if metadata is not None and "unet.lora_alpha" not in metadata:
            with pytest.raises(UserError, match="are not read"):
                merge_lora({PREFIX: net}, file, 1.0)
            continue
        merge_lora({PREFIX: net}, file, 1.0)
        moved.append(weight - before)
    torch.testing.assert_close(moved[1], moved[0] / 2)


def test_what_does_not_fit_is_refused_by_name(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    net = load_pipeline(folder).stages[0].denoiser.net
    file = changed(net, LoraConfig(rank=2), tmp_path / "lora") / LORA_FILE
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_A" in name)
    cases = {
        "other layouts are not read": {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2)},
        "this network has no such layer": {first.replace("down_blocks", "sideways"): tensors[first]},
        "lora_A and lora_B go together": {first: tensors[first]},
        "which is no matrix": {first: torch.ones(3)},
        "are not those of its weight": {n: torch.ones(3, 3) for n in (first, first.replace("lora_A", "lora_B"))},
    }
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for reason, state in cases.items():
        wrong = tmp_path / "wrong.safetensors"
        save_file({name: value for name, value in tensors.items() if not name.startswith(first[:-15])} | state, wrong)
        with pytest.raises(UserError, match=reason):
            merge_lora({PREFIX: net}, wrong, 1.0)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(UserError, match="no such file"):
        merge_lora({PREFIX: net}, tmp_path / "nothing.safetensors", 1.0)
    shutil.copyfile(file, tmp_path / "lora.bin")
    with pytest.raises(UserError, match="pickled weights can run code"):
        merge_lora({PREFIX: net}, tmp_path / "lora.bin", 1.0)
    cascade = load_cascade(tiny_folder)
    with pytest.raises(UserError, match="no stage is named 'other'"):
        cascade.merged([f"other={file}:1"])
    with pytest.raises(UserError, match="the weight must be a number"):
        cascade.merged([f"{file}:nan"])


def test_a_text_encoders_lora_is_trained_and_stock_pipelines_load_it(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cascade = load_pipeline(folder)
    cascade.save(tmp_path / "own")
    words = ["train", str(pictures), "--preset", "lora", "--model", str(tmp_path / "own"), *SHORT, "--set",
             "lora.rank=2", "--set", "lora.text=true", "--set", "optim.lr=0.05", "--set", "loop.images=48"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    final = Path(done.output.splitlines()[-1]).absolute()
    names = {name.partition(".")[0] for name in load_file(final / LORA_FILE)}
    assert names == {"unet", "text_encoder"}
    plain, _ = ours(load_pipeline(folder), monkeypatch)
    merged = load_pipeline(folder).merged([f"{final}:0.7"])
    found, drawn = ours(merged, monkeypatch)
    pipeline = stock(folder)
    pipeline.load_lora_weights(final)
    latents, pictures_ = theirs(pipeline, cross_attention_kwargs={"scale": 0.7})
    assert apart(found, latents) < 1e-4
    assert abs(drawn - pictures_).max() <= 2
    assert apart(plain, latents) > 1e-3
    text = load_pipeline(folder).text.encode(["a red cat"])[0]
    assert apart(merged.text.encode(["a red cat"])[0], text) > 1e-3  # else the U-Net's alone would do


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_every_kind_of_text_encoder_learns(kind: str, tmp_path: Path) -> None:
    text = load_text_encoder(TextConfig(kind, str(TINY[kind](tmp_path / kind))))
    before = text.encode(["a red cat"])[0]
    told = told_by(parse_run(["lora.text=true", "init=somewhere"]), text)
    assert told is not None
    assert torch.equal(told(["a red cat"]).text, before)
    learned = {name: torch.nn.Parameter(value) for name, value in told.beginning.items()}
    told.learn(learned)
    told(["a red cat"]).text.square().sum().backward()
    assert all(value.grad is not None for value in learned.values())
    assert any(bool(value.grad.any()) for value in learned.values() if value.grad is not None)
    told.learn({name: value + 0.1 for name, value in learned.items()})
    assert apart(told(["a red cat"]).text.detach(), before) > 1e-3
    told.learn(learned)
    assert torch.equal(told(["a red cat"]).text, before)


def parse_run(overrides: list[str]) -> Any:
    return load(RunConfig, ROOT / "configs/tiny/base.yaml", overrides)


def test_an_interrupted_run_with_a_text_encoder_ends_the_same(
    pictures: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [f"cache={tmp_path / 'cache'}", *SHORT[1::2], "lora.rank=2", "lora.text=true", "loop.images=32",
            "loop.memory_format=contiguous"]  # fmt: skip
    straight = train(pictures, tmp_path / "straight", more, preset="lora", model=tiny_folder)
    real, count = loop._step, 0

    def step(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "_step", step)
    with pytest.raises(Interrupted):
        train(pictures, tmp_path / "run", more, preset="lora", model=tiny_folder)
    halved_ = train(pictures, tmp_path / "run", more, preset="lora", model=tiny_folder)
    a, b = (load_file(path / LORA_FILE) for path in (straight, halved_))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_several_text_encoders_and_open_clips_are_refused(tmp_path: Path) -> None:
    text = load_text_encoder(TextConfig("open_clip", str(TINY["open_clip"](tmp_path / "oc"))))
    with pytest.raises(UserError, match="this text encoder takes no LoRA"):
        told_by(parse_run(["lora.text=true", "init=somewhere"]), text)
