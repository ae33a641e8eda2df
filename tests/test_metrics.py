"""Metrics against independent implementations, and the prompt-agreement measure on pictures whose answer is known."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ldm.latents import LatentCodec
from pipelines.cascade import load_cascade
from tests.tiny import CODEC
from training.autoencoder import AutoencoderModule
from training.data import DataConfig, Reader
from training.encode import encode
from training.evaluate import Agreement, choose_captions, prompt_agreement, wilson
from training.features import Features
from training.metrics import psnr, ssim
from training.steps import ReconstructionConfig, autoencoder_step

DATA = Path(__file__).parent / "data/emoji"


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return a, (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)


def test_psnr_is_scikit_images() -> None:
    a, b = pictures()
    wanted = [
        peak_signal_noise_ratio((x.numpy() + 1) / 2, (y.numpy() + 1) / 2, data_range=1.0)
        for x, y in zip(a, b, strict=True)
    ]
    assert psnr(a, b).tolist() == pytest.approx(wanted, abs=1e-3)


def test_ssim_is_scikit_images() -> None:
    a, b = pictures()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    wanted = [
        structural_similarity((x.numpy() + 1) / 2, (y.numpy() + 1) / 2, channel_axis=0, **options)
        for x, y in zip(a, b, strict=True)
    ]
    # the two treat the border differently; inside they are the same
    assert ssim(a, b).tolist() == pytest.approx(wanted, abs=0.02)


def test_wilson_is_scipys() -> None:
    for hits, count in ((0, 10), (7, 10), (70, 100), (100, 100)):
        wanted = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits, count) == pytest.approx((wanted.low, wanted.high), abs=1e-4)


def test_training_pictures_agree_with_their_own_captions(tiny_folder: Path, tmp_path: Path) -> None:
    """A cascade that draws exactly the training pictures scores full marks; one that draws others does not."""
    cascade = load_cascade(tiny_folder)
    reader = Reader(DataConfig(path=str(DATA), split="train", size_px=64))
    cache = encode(reader, tmp_path, cascade.codec, cascade.text)
    captions = choose_captions(cache, {i: row.captions for i, row in enumerate(reader.rows)}, 12)
    assert len(captions) == 12
    for index, caption in captions.items():
        assert cache.record(index)["fields"]["style"] in caption
    pairs, drawn = prompt_agreement(cascade, cache, captions)
    assert drawn.shape == (12, 3, 64, 64)
    assert [asked for asked, _ in pairs] == list(captions)
    known = [torch.from_numpy(e.pixels).permute(2, 0, 1).float() / 127.5 - 1 for e in reader]

    class Replay:
        codec, stages, sampling = cascade.codec, cascade.stages, cascade.sampling

        def __init__(self, shift: int) -> None:
            self.shift = shift

        def __call__(self, prompts: list[str], *_: object) -> torch.Tensor:
            return torch.stack([known[(i + self.shift) % len(known)] for i in captions])

    right = Agreement.of(cache, prompt_agreement(Replay(0), cache, captions)[0])  # type: ignore[arg-type]
    assert (right.style, right.concept, right.cluster) == (12, 12, 12)
    wrong = Agreement.of(cache, prompt_agreement(Replay(1), cache, captions)[0])  # type: ignore[arg-type]
    assert wrong.style == 0


def test_the_perceptual_loss_is_that_distance_and_trains_nothing_of_its_own() -> None:
    features = Features()
    codec = LatentCodec(CODEC)
    config = ReconstructionConfig(crop_px=32, l1=0, l2=0, gradient=0, kl=0, perceptual=0.5)
    pixels, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 4, 4, 4)
    result = autoencoder_step(codec, pixels, noise, config, features)
    result.losses[0].backward()
    decoded = codec.decode(codec.encode(pixels).chunk(2, dim=1)[0])
    torch.testing.assert_close(result.losses[0].detach(), 0.5 * features.distance(decoded, pixels).mean())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.autoencoder.decoder.parameters())
    assert all(p.grad is None for p in features.parameters())
    module = AutoencoderModule(codec, config)
    assert module.state_dict().keys() == AutoencoderModule(codec, ReconstructionConfig()).state_dict().keys()
    assert copy.deepcopy(module).frozen is module.frozen
