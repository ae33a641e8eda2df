"""Codec, moments, statistics of a stage, and the container of what a denoiser is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ldm.conditioning import Conditioning
from ldm.latents import (
    LOG_VARIANCE_RANGE,
    CodecConfig,
    LatentCodec,
    Normalisation,
    kl_to_standard_normal,
    sample_moments,
)
from ldm.models.autoencoder import AutoencoderConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codec_of(unshuffle: int, levels: int) -> LatentCodec:
    torch.manual_seed(0)
    widths = (8,) * levels
    return LatentCodec(CodecConfig(unshuffle, AutoencoderConfig(widths, latent_channels=2, norm_groups=4))).eval()


@pytest.mark.parametrize(("unshuffle", "levels", "factor"), [(1, 1, 1), (1, 3, 4), (2, 2, 4), (4, 2, 8)])
@torch.no_grad()
def test_codec_shapes_follow_the_factor(unshuffle: int, levels: int, factor: int) -> None:
    codec = codec_of(unshuffle, levels)
    assert codec.config.factor == factor
    pixels = torch.rand(2, 3, 16, 24, generator=generator()) * 2 - 1
    moments = codec.encode(pixels)
    assert moments.shape == (2, 2 * codec.config.latent_channels, 16 // factor, 24 // factor)
    raw = sample_moments(moments, torch.zeros(2, 2, 16 // factor, 24 // factor))
    torch.testing.assert_close(raw, moments[:, :2], rtol=0, atol=0)
    assert codec.decode(raw).shape == pixels.shape


@torch.no_grad()
def test_codec_is_the_autoencoder_behind_space_to_depth() -> None:
    codec = codec_of(2, 2)
    pixels = torch.rand(1, 3, 16, 16, generator=generator()) * 2 - 1
    stock = codec.autoencoder.encode(pixel_unshuffle(pixels, 2)).latent_dist
    mean, log_variance = codec.encode(pixels).chunk(2, dim=1)
    torch.testing.assert_close(mean, stock.mode(), rtol=0, atol=0)
    torch.testing.assert_close(log_variance, stock.logvar, rtol=0, atol=0)


@pytest.mark.parametrize("fold", [2, 4])
@torch.no_grad()
def test_folded_latents_are_the_same_numbers_on_a_smaller_grid(fold: int) -> None:
    plain = codec_of(1, 1)
    folded = LatentCodec(replace(plain.config, fold=fold))
    folded.load_state_dict(plain.state_dict())
    assert (folded.config.factor, folded.config.latent_channels) == (fold, 2 * fold**2)
    pixels = torch.rand(2, 3, 16, 24, generator=generator()) * 2 - 1
    for moments, expected in zip(folded.encode(pixels).chunk(2, 1), plain.encode(pixels).chunk(2, 1), strict=True):
        for channel in range(2):
            cells = moments[:, channel * fold**2 : (channel + 1) * fold**2].unflatten(1, (fold, fold))
            together = cells.permute(0, 3, 1, 4, 2).reshape(2, 16, 24)  # (B, h, row in it, w, column in it)
            torch.testing.assert_close(together, expected[:, channel], rtol=0, atol=0)
    raw = folded.encode(pixels).chunk(2, 1)[0]
    torch.testing.assert_close(folded.decode(raw), plain.decode(plain.encode(pixels).chunk(2, 1)[0]), rtol=0, atol=0)


@pytest.mark.parametrize(("fold", "autoencoder"), [(3, AutoencoderConfig()), (2, None)])
def test_a_fold_that_cannot_be_is_refused(fold: int, autoencoder: AutoencoderConfig | None) -> None:
    with pytest.raises(ValueError, match="fold must be 1, 2 or 4, and 1 without an autoencoder"):
        CodecConfig(autoencoder=autoencoder, fold=fold)


@pytest.mark.parametrize("fold", [1, 2])
@torch.no_grad()
def test_fixed_noise_has_means_of_one_length_and_one_deviation(fold: int) -> None:
    free = codec_of(2, 2)
    fixed = LatentCodec(replace(free.config, noise=0.35, fold=fold)).eval()
    fixed.load_state_dict(free.state_dict())
    pixels = torch.rand(2, 3, 16, 24, generator=generator()) * 2 - 1
    mean, log_variance = fixed.encode(pixels).chunk(2, 1)
    torch.testing.assert_close((0.5 * log_variance).exp(), torch.full_like(mean, 0.35))
    cells = pixel_shuffle(mean, fold)
    torch.testing.assert_close(cells.norm(dim=1), torch.full_like(cells[:, 0], 2**0.5), rtol=1e-3, atol=0)
    theirs = free.encode(pixels).chunk(2, 1)[0]
    torch.testing.assert_close(torch.cosine_similarity(cells, theirs), torch.ones_like(cells[:, 0]))


@pytest.mark.parametrize(
    ("noise", "autoencoder"), [(0.0, AutoencoderConfig()), (3.0, AutoencoderConfig()), (0.3, None)]
)
def test_a_noise_that_cannot_be_is_refused(noise: float, autoencoder: AutoencoderConfig | None) -> None:
    with pytest.raises(ValueError, match="noise must be above 0 and at most 2"):
        CodecConfig(autoencoder=autoencoder, noise=noise)


@torch.no_grad()
def test_log_variance_is_bounded() -> None:
    codec = codec_of(1, 1)
    codec.autoencoder.encoder.conv_out.bias[2:] = torch.tensor([1e4, -1e4])
    log_variance = codec.encode(torch.zeros(1, 3, 8, 8))[:, 2:]
    assert (log_variance.min(), log_variance.max()) == LOG_VARIANCE_RANGE


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (1, 1), (9, 9)])
def test_sizes_that_are_no_multiple_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\) must be multiples of 8"):
        codec_of(4, 2).encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("unshuffle", [0, 3, 16, -1])
def test_codec_config_is_checked(unshuffle: int) -> None:
    with pytest.raises(ValueError, match="unshuffle must be 1, 2, 4 or 8"):
        CodecConfig(unshuffle)


def moments_of(mean: list[float], deviation: list[float], cells: int) -> Tensor:
    log_variance = 2 * torch.tensor(deviation).log()
    column = torch.cat([torch.tensor(mean), log_variance]).view(1, -1, 1, 1)
    return column.expand(1, -1, cells, cells)


def test_draws_have_the_mean_and_deviation_of_the_moments() -> None:
    cells = 400  # 160 000 draws a channel
    moments = moments_of([1.0, -3.0], [0.5, 2.0], cells)
    draws = sample_moments(moments, torch.randn(1, 2, cells, cells, generator=generator()))[0].flatten(1)
    deviation = torch.tensor([0.5, 2.0])
    error = deviation / cells
    assert bool(((draws.mean(1) - torch.tensor([1.0, -3.0])).abs() < 4 * error).all())
    assert bool(((draws.std(1) - deviation).abs() < 4 * error).all())


def test_kl_is_that_of_torch() -> None:
    moments = torch.randn(3, 8, 5, 4, generator=generator(), dtype=torch.float64)
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = Normal(mean, torch.exp(log_variance / 2))
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_to_standard_normal(moments), expected)
    assert kl_to_standard_normal(torch.zeros(2, 8, 5, 4)).tolist() == [0.0, 0.0]


def test_normalisation_gives_unit_variance_and_inverts() -> None:
    mean, std = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.25, 4.0, 1.5])
    raw = torch.randn(8, 3, 50, 50, generator=generator()) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    measured = raw.transpose(0, 1).flatten(1)
    normalisation = Normalisation(tuple(measured.mean(1).tolist()), tuple(measured.std(1).tolist()))
    latents = normalisation.apply(raw)
    flat = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalisation.invert(latents), raw, atol=1e-5, rtol=1e-5)
    assert normalisation.apply(raw.double()).dtype == torch.float64


def conditioning(count: int, seed: int = 0, mask: bool = True) -> Conditioning:
    text = torch.randn(count, 4, 5, generator=generator(seed))
    return Conditioning(text, torch.rand(count, 4, generator=generator(seed)) > 0.5 if mask else None)


def equal(a: Conditioning, b: Conditioning) -> bool:
    pairs = ((a.text, b.text), (a.text_mask, b.text_mask))
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("mask", [True, False])
def test_conditioning_is_taken_apart_and_joined(mask: bool) -> None:
    whole = conditioning(5, mask=mask)
    assert len(whole) == 5
    assert (whole.text_mask is None) == (not mask)
    assert equal(Conditioning.cat([whole[:2], whole[2:3], whole[3:]]), whole)
    assert equal(whole[torch.tensor([4, 0, 0])], Conditioning.cat([whole[4:], whole[:1], whole[:1]]))
    assert equal(whole.to("cpu"), whole)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("nulls", [1, 3])
def test_where_chooses_per_item(mask: bool, nulls: int) -> None:
    own, null = conditioning(3, mask=mask), conditioning(nulls, seed=1, mask=mask)
    chosen = own.where(torch.tensor([True, False, True]), null)
    last = null[nulls // 2 : nulls // 2 + 1]
    assert equal(chosen, Conditioning.cat([own[:1], last, own[2:]]))
    assert equal(own.where(torch.tensor([False] * 3), null), null if nulls == 3 else null.expand(3))


def test_expand_repeats_a_single_item() -> None:
    one = conditioning(1)
    assert equal(one.expand(3), Conditioning.cat([one, one, one]))
    with pytest.raises(ValueError, match="only a single item can be expanded, not 2"):
        conditioning(2).expand(3)


def test_conditionings_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="different members"):
        Conditioning.cat([conditioning(1), conditioning(1, mask=False)])
    with pytest.raises(ValueError, match="no batch size"):
        len(Conditioning())
    for one, other in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="different members"):
            conditioning(2, mask=one).where(torch.tensor([True, False]), conditioning(2, mask=other))
