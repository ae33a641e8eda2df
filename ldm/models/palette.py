"""Palette: which colour each pixel of a drawn picture is meant to have, of the few hundred that its kind is drawn in.

    pictures, pooled text -> residual blocks of a U-Net -> what is known of each pixel
            -> log p(one of the colours, or none of them) -> the likeliest colour, or the pixel as it is

What a process draws in latents comes out near its colours. A network that regresses the right ones learns the mean of
those that may be meant, which is none of them; a distribution has a mode. So the last step on pixels is a discrete
decoder (Ho et al. 2020, DDPM, sec. 3.3), as p(x_0 | x_1) is there, here told of the text and of all the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, linear, pixel_shuffle, pixel_unshuffle, silu

from ldm.conditioning import Conditioning
from ldm.config import Config

UNSHUFFLE = 2
TOLD = 64  # numbers that the text is told by
PIXELS_AT_ONCE = 1 << 15  # of which all chances are in memory
_NEAR = 20.0  # of 255: how far off a colour is to begin with thought to come out


@dataclass(frozen=True)
class PaletteConfig(Config):
    """A U-Net of one residual block for each of `widths`, each after the first at half the grid, which finds
    `features` numbers of each pixel. colours: how many there are at most; a pixel within `same` (of 255) of one is of
    that colour. keep: a pixel stays as it is where "none of them" is at least so likely."""

    colours: int = 512
    same: float = 4.0
    keep: float = 0.7
    widths: tuple[int, ...] = (48, 64, 96)
    features: int = 32
    norm_groups: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.colours <= 4096:
            raise ValueError(f"colours must be from 2 to 4096, not {self.colours}")
        if not 0 < self.same <= 64:
            raise ValueError(f"same is a distance of colours, above 0 and at most 64 of 255, not {self.same:g}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a probability, above 0 and at most 1, not {self.keep:g}")
        if not self.widths or not 1 <= self.features <= 1024:
            raise ValueError("widths must name a level or more, and features be 1 to 1024")
        if self.norm_groups < 1 or any(w < 1 or w > 4096 or w % self.norm_groups for w in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of norm_groups {self.norm_groups}, at most 4096")

    @property
    def factor(self) -> int:
        """Sides of pictures must be multiples of it."""
        return UNSHUFFLE << (len(self.widths) - 1)


class Palette(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] and what is told of them -> the pictures, put onto the colours.

    colours: (K, 3) of 255; text_width: of the text's states.
    """

    colours: Tensor

    def __init__(self, config: PaletteConfig, colours: Tensor, text_width: int) -> None:
        super().__init__()
        self.config, self.text_width = config, text_width
        self.register_buffer("colours", colours)
        widths, features = config.widths, config.features
        self.text = nn.Linear(text_width, TOLD)
        self.first = nn.Conv2d(3 * UNSHUFFLE**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(self._block(a, b) for a, b in zip((widths[0], *widths), widths, strict=False))
        self.middle = self._block(widths[-1], widths[-1])
        self.up = nn.ModuleList(self._block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.last = nn.Conv2d(widths[0], features * UNSHUFFLE**2, 3, padding=1)
        self.own = nn.Sequential(nn.Conv2d(3, features, 1), nn.SiLU(), nn.Conv2d(features, features, 1))
        self.around = nn.Conv2d(features, features, 3, padding=1)
        self.choices = nn.Linear(features, len(colours) + 1)
        self.log_precision = nn.Parameter(torch.tensor([-math.log(2 * _NEAR**2)]))

    def _block(self, before: int, width: int) -> ResnetBlock2D:
        return ResnetBlock2D(in_channels=before, out_channels=width, temb_channels=TOLD,
                             groups=self.config.norm_groups, groups_out=self.config.norm_groups,
                             time_embedding_norm="scale_shift")  # fmt: skip

    def features_of(self, pictures: Tensor, text: Tensor) -> Tensor:
        """What is known of each pixel, (B, features, H, W); text: (B, text_width), of `pooled`."""
        told = self.text(text)
        x, beside = self.first(pixel_unshuffle(pictures, UNSHUFFLE)), []
        for level, block in enumerate(self.down):
            x = block(avg_pool2d(x, 2) if level else x, told)
            beside.append(x)
        x = self.middle(beside.pop(), told)
        for block in self.up:
            x = block(torch.cat([interpolate(x, scale_factor=2.0), beside.pop()], 1), told)
        found = pixel_shuffle(self.last(silu(x)), UNSHUFFLE) + self.own(pictures)
        known: Tensor = found + self.around(silu(found))
        return known

    def log_probs(self, features: Tensor, pixels: Tensor) -> Tensor:
        """log p of each colour and, last, of none of them, (N, K + 1), for features (N, features) and the colours that
        these pixels have now, (N, 3) of 255: colours far from that begin less likely."""
        with torch.autocast(features.device.type, enabled=False):
            logits = linear(features.float(), self.choices.weight.float(), self.choices.bias.float())
            near = apart(pixels.float(), self.colours.float()) ** 2 * self.log_precision.float().exp()
            return torch.cat([logits[:, :-1] - near, logits[:, -1:]], 1).log_softmax(1)

    @torch.no_grad()
    def forward(self, pictures: Tensor, cond: Conditioning) -> Tensor:
        """The pictures, (B, 3, H, W) in [-1, 1] and clipped to it, with each pixel on the likeliest colour, but those
        kept that are likely of none. Sides must be multiples of `config.factor`."""
        pixels = (pictures.clamp(-1, 1) + 1) * 127.5
        rows = [each.movedim(1, -1).flatten(0, -2) for each in (self.features_of(pictures, pooled(cond)), pixels)]
        parts = []
        for features, own in zip(*(each.split(PIXELS_AT_ONCE) for each in rows), strict=True):
            found = self.log_probs(features, own)
            none, likeliest = found[:, -1].exp(), found[:, :-1].argmax(1)
            parts.append(torch.where((none < self.config.keep)[:, None], self.colours[likeliest], own))
        return torch.cat(parts).view_as(pixels.movedim(1, -1)).movedim(-1, 1) / 127.5 - 1


def pooled(cond: Conditioning) -> Tensor:
    """The mean of the text's states over real tokens, (B, D)."""
    assert cond.text is not None
    if cond.text_mask is None:
        return cond.text.mean(1)
    real = cond.text_mask[..., None].to(cond.text)
    return (cond.text * real).sum(1) / real.sum(1).clamp(min=1)


def apart(pixels: Tensor, colours: Tensor) -> Tensor:
    """Distances of colours (N, 3) and (K, 3), (N, K); not by products of matrices, which GPUs may round to ten bits."""
    return torch.cdist(pixels, colours, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_colour(pixels: Tensor, colours: Tensor, same: float) -> Tensor:
    """The class of pixels (N, 3): the place of the nearest of (K, 3) colours, or K where that is beyond `same`."""
    distance, nearest = apart(pixels, colours).min(1)
    return torch.where(distance <= same, nearest, len(colours))


def common_colours(counts: Tensor, config: PaletteConfig) -> Tensor:
    """The commonest colours, (K, 3) of 255, none of which is within half of `same` of one that is commoner; fewer than
    `colours` where there are no more. counts: of each of 2^24 colours, red first."""
    there = counts.nonzero()[:, 0]
    keys = there[counts[there].argsort(descending=True, stable=True)]
    found = torch.empty(0, 3)
    for key in keys.tolist():
        colour = torch.tensor([[key >> 16, key >> 8 & 255, key & 255]], dtype=torch.float32)
        if not len(found) or float(apart(colour, found).min()) > config.same / 2:
            found = torch.cat([found, colour])
        if len(found) == config.colours:
            break
    return found
