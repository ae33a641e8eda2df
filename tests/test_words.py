"""Textual inversion: words taught to a text encoder, learned, written as stock pipelines read them, and used."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError, load, to_yaml
from ldm.joint_text import JointTextEncoder
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.words import WORDS_FILE, InversionConfig, load_words, save_words
from pipelines.cascade import load_cascade
from tests.test_foreign import SCHEDULERS, SD1, stable_diffusion
from tests.test_presets import SHORT, pictures
from tests.tiny import ROOT
from tests.tiny_text import TINY, tiny_clip
from training.diffusion import DiffusionModule
from training.loader import BatchOrder
from training.presets import tuning
from training.run import train
from training.tasks import RunConfig, build_task

__all__ = ["pictures"]


def rows(count: int, seed: int = 0, width: int = 16) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(TINY))
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> TextEncoder:
    folder = TINY[request.param](tmp_path / request.param)
    return load_text_encoder(TextConfig(kind=request.param, path=str(folder)))


def test_a_known_word_taught_its_own_embedding_changes_nothing(encoder: TextEncoder) -> None:
    """Whatever stands around it: the ids are others, the embeddings the same. T5 has other tokens after a space."""
    captions = ["a red cat", "cat", "", "a dog", "red dog"] + ([] if encoder.config.kind == "t5" else ["Cat, dog"])
    before, mask = encoder.encode(captions)
    for word in ("cat", "red"):
        encoder.learn(word, encoder.lexicon.beginnings(word, len(encoder.lexicon.plain(word))))
    after, again = encoder.encode(captions)
    assert torch.equal(before, after)
    assert (mask is None and again is None) or torch.equal(mask, again)


def test_a_word_is_told_where_it_stands_by_itself(encoder: TextEncoder) -> None:
    captions = ["a zorp", "A Zorp, red", "a zorps", "red zorp-fire", "a cat"]
    before, _ = encoder.encode(captions)
    encoder.learn("zorp", rows(3))
    after, _ = encoder.encode(captions)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True, True, False, True, False]
    encoder.learn("two words", rows(1, 1))
    assert not torch.equal(encoder.encode(["two words"])[0], encoder.encode(["two cats"])[0])
    torch.testing.assert_close(encoder.encode(captions)[0], after, rtol=0, atol=0)
    assert encoder.token_count("zorp " * 200)[0] == encoder.max_tokens


def test_gradients_reach_the_word_alone(encoder: TextEncoder) -> None:
    word = torch.nn.Parameter(rows(2))
    encoder.learn("zorp", word)
    states, _ = encoder.told(["a red zorp", "cat"])
    states.square().sum().backward()
    assert word.grad is not None
    assert bool(word.grad.any(1).all())
    assert all(parameter.grad is None for parameter in encoder.module.parameters())
    assert not encoder.encode(["a red zorp"])[0].requires_grad


def test_rows_of_another_width_are_refused(encoder: TextEncoder) -> None:
    with pytest.raises(UserError, match=r"'zorp': its embeddings have width 8, and this text encoder's 16"):
        encoder.learn("zorp", rows(1, width=8))


def test_several_encoders_learn_no_words(tmp_path: Path) -> None:
    parts = [load_text_encoder(TextConfig(kind="clip", path=str(tiny_clip(tmp_path / "clip"))))] * 2
    joint = JointTextEncoder(TextConfig(kind="joint", parts=(parts[0].config, parts[0].config)), parts)
    with pytest.raises(UserError, match="several text encoders together learn no words"):
        joint.learn("zorp", rows(1))


@pytest.mark.parametrize("count", [1, 3])
def test_stock_pipelines_read_it(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "sd"
    stable_diffusion(tiny_clip(tmp_path / "clip"), SD1, SCHEDULERS["ddim"]()).save_pretrained(folder)
    save_words({"zorp": rows(count)}, tmp_path)
    stock: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.load_textual_inversion(tmp_path / WORDS_FILE)
    encoder = load_cascade(folder).taught([str(tmp_path)]).text
    for prompt in ("a zorp cat", "zorp", "red face, zorp style"):
        expected = stock.encode_prompt(prompt, "cpu", 1, False)[0]
        torch.testing.assert_close(encoder.encode([prompt])[0], expected, rtol=1e-5, atol=1e-5)


def test_their_files_are_read(tmp_path: Path) -> None:
    """One vector without a row of its own, and the key under which the file's name is the word."""
    save_file({"emb_params": rows(2), "zorp": rows(1)[0]}, tmp_path / "my-word.safetensors")
    found, _ = load_words(tmp_path / "my-word.safetensors")
    assert {word: tuple(value.shape) for word, value in found.items()} == {"my-word": (2, 16), "zorp": (1, 16)}


@pytest.mark.parametrize("tensors", [{"a": torch.zeros(2, 2, 2)}, {"a": torch.full((1, 4), torch.nan)}, {},
                                     {" ": torch.zeros(1, 4)}])  # fmt: skip
def test_files_without_words_are_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / WORDS_FILE)
    with pytest.raises(UserError, match=r"no embeddings \(n, width\) of a word|names no word"):
        load_words(tmp_path)


def test_a_preset_learns_a_word_and_a_flag_uses_it(
    pictures: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(pictures), "--preset", "inversion", "--model", str(tiny_folder), *SHORT]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    final = Path(done.output.splitlines()[-1])
    assert sorted(p.name for p in final.iterdir()) == [WORDS_FILE, "training.json"]
    learned = load_file(final / WORDS_FILE)
    cascade = load_cascade(tiny_folder)
    begun = cascade.text.lexicon.beginnings("picture", 2)
    assert list(learned) == ["my pictures"]
    assert learned["my pictures"].shape == begun.shape
    assert bool((learned["my pictures"] != begun).any(1).all())
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert "train " not in again.output
    digest, before = cascade.digest, cascade.text.encode(["cat, my pictures"])[0]
    taught = cascade.taught([str(final)])
    assert taught.digest != digest
    assert not torch.equal(taught.text.encode(["cat, my pictures"])[0], before)
    drawn = CliRunner().invoke(app, ["generate", "a zorp", "--model", str(tiny_folder), "--embedding", f"zorp={final}",
                                     "--n", "1", "--steps", "2"])  # fmt: skip
    assert drawn.exit_code == 0, drawn.output


def test_pictures_without_captions_are_told_by_the_word_alone(
    pictures: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    task = build_task(tuning(pictures, "inversion", tiny_folder, [f"cache={tmp_path}", "dropout=0.5"]))
    module, cache = task.module, task.cache
    assert isinstance(module, DiffusionModule)
    module(module.prepare(BatchOrder(cache, 0, 0, 4, 4)[0])).losses[0].backward()
    assert module.text["word"].grad is not None
    assert bool(module.text["word"].grad.any(1).all())
    told = module.frozen.told
    assert told is not None
    found, alone, null = told(["", "my pictures", None]).text, told(["my pictures"]).text, told([None]).text
    assert torch.equal(found[:1], alone)
    assert torch.equal(found[2:], null)
    assert not torch.equal(alone, null)


def test_a_run_of_a_word_resumes_bit_for_bit(pictures: Path, tiny_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "word.yaml"
    config.write_text(to_yaml(tuning(pictures, "inversion", tiny_folder, [f"cache={tmp_path / 'cache'}"])))
    short = [word for flag, word in pairwise(SHORT) if flag == "--set"]
    short += ["loop.images=64", "loop.save_every_images=32", "loop.preview_every_images=32"]
    whole = train(config, tmp_path / "whole", short)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/final")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-000000000064")
    parts = train(config, tmp_path / "parts", short)
    assert (whole / WORDS_FILE).read_bytes() == (parts / WORDS_FILE).read_bytes()
    record = tmp_path / "parts/cache.json"
    told = json.loads(record.read_text(encoding="utf-8"))
    assert told["text"] == load_cascade(tiny_folder).text.digest
    record.write_text(json.dumps(told | {"text": "another"}), encoding="utf-8")
    with pytest.raises(UserError, match="was trained on other data, codec or text encoder"):
        train(config, tmp_path / "parts", short)


def test_only_the_word_is_trained(tiny_folder: Path, pictures: Path, tmp_path: Path) -> None:
    task = build_task(tuning(pictures, "inversion", tiny_folder, [f"cache={tmp_path}"]))
    assert [name for name, parameter in task.module.named_parameters() if parameter.requires_grad] == ["text.word"]
    with pytest.raises(UserError, match="of a network that has learned: say which with init"):
        load(RunConfig, ROOT / "configs/tiny/base.yaml", ["inversion.word=zorp"])
    with pytest.raises(UserError, match="one at a time"):
        tuning(pictures, "lora", tiny_folder, ["inversion.word=zorp"])
    with pytest.raises(UserError, match=r"'' has no word to begin with"):
        build_task(tuning(pictures, "inversion", tiny_folder, [f"cache={tmp_path}", 'inversion.begin=""']))


def test_captions_get_the_word_where_they_lack_it() -> None:
    config = InversionConfig("my dog")
    assert [config.told(c) for c in ("", "a face", "My Dog, red", "my dogs")] == [
        "my dog", "my dog, a face", "My Dog, red", "my dog, my dogs"]  # fmt: skip
    for wrong in ({"word": " "}, {"word": "a "}, {"word": "a", "vectors": 0}):
        with pytest.raises(ValueError, match="must"):
            InversionConfig(**wrong)
