"""CLIP: its training step, what is frozen, and that open_clip reads what we write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from ldm.config import UserError, load
from ldm.text import TextConfig, load_text_encoder
from ldm.weights import load_clip
from tests.tiny import EMOJI, ROOT
from tests.tiny_text import tiny_bert
from training.clip import ClipTask, clip_step
from training.loader import BatchOrder
from training.run import train
from training.tasks import RunConfig, build_task


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clip")
    text = f"text={{kind: bert, path: {tiny_bert(folder / 'text')}}}"
    return [f"data.path={EMOJI}", f"cache={folder / 'cache'}", text, "clip.max_tokens=12", "loop.trackers=[]"]


@pytest.fixture(scope="module")
def final(shared: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    every = ["save_every_images", "preview_every_images", "log_every_images", "images"]
    more = [f"loop.{name}=320" for name in every]
    return train(ROOT / "configs/tiny/clip.yaml", tmp_path_factory.mktemp("run"), [*shared, *more])


def made(shared: list[str], *more: str) -> ClipTask:
    task = build_task(load(RunConfig, ROOT / "configs/tiny/clip.yaml", [*shared, *more]))
    assert isinstance(task, ClipTask)
    return task


def test_the_loss_is_the_mean_of_both_cross_entropies(shared: list[str]) -> None:
    model = made(shared).module.train().model
    pictures = torch.rand(4, 3, 32, 32) * 2 - 1
    tokens = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0], [2, 8, 9, 3], [2, 6, 3, 0]])
    result = clip_step(model, pictures, tokens)
    own, texts = normalize(model.encode_image(pictures), dim=1), normalize(model.encode_text(tokens), dim=1)
    similar, target = model.logit_scale.exp() * own @ texts.T, torch.arange(4)
    wanted = (cross_entropy(similar, target) + cross_entropy(similar.T, target)) / 2
    torch.testing.assert_close(result.losses[0], wanted)


@pytest.mark.parametrize("layers", [0, 1])
def test_only_what_is_unlocked_is_trained(shared: list[str], layers: int) -> None:
    task = made(shared, f"unlocked_layers={layers}")
    module = task.module.train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(module.prepare(BatchOrder(task.cache, 0, 0, 8, 8)[0])).losses[0].backward()
    optimizer.step()
    changed = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert any(name.startswith("model.visual.trunk.conv_stem") for name in changed)
    assert any(".layer.1." in name for name in changed) == bool(layers)
    assert not any(".layer.0." in name or "embeddings" in name or "running" in name for name in changed)
    assert not any(part.training for part in module.modules() if isinstance(part, nn.BatchNorm2d))
    assert not any(part.training for part in module.model.text.modules()), "dropout of the text tower stays off"


def test_the_picture_tower_starts_from_imagenet(shared: list[str]) -> None:
    from training.features import Features

    trunk, wanted = made(shared).module.model.visual.trunk, Features().network
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name]), name


def test_open_clip_reads_it_and_finds_the_same(final: Path) -> None:
    import open_clip

    ours = load_clip(final)
    theirs = open_clip.create_model(f"local-dir:{final}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{final}")
    pictures, texts = torch.rand(2, 3, 32, 32) * 2 - 1, ["red heart, noto style", "a cat"]
    with torch.no_grad():
        torch.testing.assert_close(normalize(theirs.encode_image(pictures), dim=1), ours.pictures(pictures))
        torch.testing.assert_close(normalize(theirs.encode_text(tokens(texts)), dim=1), ours.texts(texts))
    assert torch.equal(tokens(texts), ours.tokens(texts))


def test_a_moved_folder_still_loads(final: Path, tmp_path: Path) -> None:
    shutil.copytree(final, tmp_path / "moved")
    told = json.loads((tmp_path / "moved/open_clip_config.json").read_text())
    told["model_cfg"]["text_cfg"]["hf_model_name"] = "/gone"
    (tmp_path / "moved/open_clip_config.json").write_text(json.dumps(told))
    texts = ["a cat"]
    assert torch.equal(load_clip(tmp_path / "moved").texts(texts), load_clip(final).texts(texts))


def test_its_text_tower_is_a_text_encoder_of_kind_bert(final: Path) -> None:
    clip, texts = load_clip(final), ["red heart, noto style", "a cat"]
    states, real = load_text_encoder(TextConfig("bert", str(final))).encode(texts)
    assert real is not None
    ids = clip.tokens(texts)
    with torch.no_grad():
        theirs = clip.model.text.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    length = min(states.shape[1], theirs.shape[1])
    assert torch.equal(real[:, :length], (ids != 0)[:, :length])
    torch.testing.assert_close(states[real], theirs[:, :length][real[:, :length]])


def test_a_text_has_the_same_tokens_in_training_and_after(shared: list[str], final: Path) -> None:
    texts = ["red heart, noto style", "a cat face", "", "a cat and a dog and a fire truck and a blue dog face"]
    assert torch.equal(made(shared).module.frozen.tokens(texts), load_clip(final).tokens(texts))


def test_larger_pictures_are_shrunk_and_have_gradients(final: Path) -> None:
    clip = load_clip(final)
    pictures = (torch.rand(2, 3, 96, 96) * 2 - 1).requires_grad_()
    found = clip.pictures(pictures)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    (gradient,) = torch.autograd.grad(found.sum(), pictures)
    assert gradient.abs().sum() > 0


def test_it_starts_from_released_weights(shared: list[str], final: Path) -> None:
    model = made(shared, f"init={final}", "unlocked_layers=2").module.model
    for name, value in load_clip(final).model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    with pytest.raises(UserError, match="a CLIP of another shape"):
        made(shared, f"init={final}", "clip.image_px=64")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("unlocked_layers=3", "the text tower has 2"),
        ("unlocked_layers=-1", "must not be negative"),
        ("loop.accumulation=2", "needs its whole batch at once"),
        ("clip.image_px=96", "multiple of clip.image_px 96"),
        ("clip.image_px=40", "multiple of 32"),
        ("text={kind: clip, path: x}", "text tower is of a BERT type"),
    ],
)
def test_configs_that_cannot_be_are_refused(shared: list[str], wrong: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        made(shared, wrong)


def test_a_damaged_folder_is_refused(final: Path, tmp_path: Path) -> None:
    shutil.copytree(final, tmp_path / "clip")
    told = json.loads((tmp_path / "clip/open_clip_config.json").read_text())
    del told["model_cfg"]["vision_cfg"]
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="not a CLIP of a timm picture tower"):
        load_clip(tmp_path / "clip")
