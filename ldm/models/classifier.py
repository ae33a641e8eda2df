"""Classifier: a residual network (He et al. 2016) with one head per label, for pictures of one small size, which may
count colours too."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, layer_norm

from ldm.config import Config

EMBEDDED_PALETTE, PALETTE_UNITS, PALETTE_DROPOUT = 64, 256, 0.3


@dataclass(frozen=True)
class ClassifierConfig(Config):
    """A ResNet of basic blocks with group normalisation: `widths` and `blocks` of its levels, each half the grid of
    the one before. It sees pictures of `side_px`; its first convolution and pooling leave a quarter of that. palette:
    levels of each colour in histograms whose embedding stands beside the network's features: flat colours tell designs
    apart, and convolutions learn to count them late. by_palette: labels that are told from the histograms alone, by a
    hidden layer of their own: convolutions that know the training pictures by heart leave an embedding little to
    learn, and add nothing."""

    side_px: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 384)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    norm_groups: int = 16
    palette: tuple[int, ...] = ()
    by_palette: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(2 <= levels <= 32 for levels in self.palette):
            raise ValueError(f"palette must be from 2 to 32 levels each, not {self.palette}")
        if self.by_palette and not self.palette:
            raise ValueError("by_palette needs a histogram of colours: set palette")
        if len(self.widths) != 4 or len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError("widths and blocks have four entries each, and no level is without blocks")
        if self.norm_groups < 1 or any(w < 1 or w > 4096 or w % self.norm_groups for w in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of norm_groups {self.norm_groups}, at most 4096")
        if self.widths[0] % (2 * self.norm_groups):
            raise ValueError(f"half of the first width {self.widths[0]} must be a multiple of norm_groups "
                             f"{self.norm_groups}, for the first convolutions")  # fmt: skip
        if self.side_px < 32 or self.side_px % 32:
            raise ValueError(f"side_px must be a multiple of 32, not {self.side_px}")


def check_by_palette(config: ClassifierConfig, labels: Collection[str]) -> None:
    """Raise ValueError where `by_palette` names what is no label."""
    if unknown := set(config.by_palette) - set(labels):
        raise ValueError(f"by_palette names {', '.join(sorted(unknown))}, which is no label")


class Classifier(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> {label: logits (B, classes)}; larger ones are first shrunk by area.

    classes: the names that each label can take, in the order of its logits.
    """

    def __init__(self, config: ClassifierConfig, classes: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        from timm.layers.norm import GroupNorm  # takes seconds
        from timm.models.resnet import BasicBlock, ResNet

        self.config, self.classes = config, classes
        self.trunk: nn.Module = ResNet(
            BasicBlock,  # type: ignore[arg-type]
            config.blocks, num_classes=0, channels=config.widths, stem_width=config.widths[0] // 2,
            stem_type="deep", avg_down=True, norm_layer=partial(GroupNorm, num_groups=config.norm_groups),
        )  # fmt: skip
        colours, width = sum(levels**3 for levels in config.palette), config.widths[-1]
        if colours:
            self.palette = nn.Linear(colours, EMBEDDED_PALETTE, bias=False)
            width += EMBEDDED_PALETTE
        self.by_palette = nn.ModuleDict({
            name: nn.Sequential(nn.Linear(colours, PALETTE_UNITS), nn.GELU(), nn.Dropout(PALETTE_DROPOUT))
            for name in config.by_palette
        })  # fmt: skip
        self.heads = nn.ModuleDict({
            name: nn.Linear(PALETTE_UNITS if name in self.by_palette else width, len(own))
            for name, own in classes.items()
        })  # fmt: skip

    def forward(self, pictures: Tensor, recoloured: Tensor | None = None) -> dict[str, Tensor]:
        """recoloured: the pictures as the convolutions see them, where they are to learn shapes, not colours."""
        pictures = adaptive_avg_pool2d(pictures.clamp(-1, 1), self.config.side_px)
        features = self.trunk(pictures if recoloured is None else recoloured)
        seen = dict.fromkeys(self.classes, features)
        if self.config.palette:
            counted = [colour_histogram(pictures, levels).log1p() for levels in self.config.palette]
            counts = torch.cat([layer_norm(each, each.shape[1:]) for each in counted], 1).to(features)
            seen = dict.fromkeys(self.classes, torch.cat([features, self.palette(counts)], 1))
            seen |= {name: hidden(counts) for name, hidden in self.by_palette.items()}
        return {name: head(seen[name]) for name, head in self.heads.items()}

    @torch.no_grad()
    def keep(self, label: str, places: Sequence[int]) -> None:
        """Forget all classes of a label but those at `places`."""
        head = self.heads[label]
        assert isinstance(head, nn.Linear)
        for name in ("weight", "bias"):
            old = getattr(head, name)
            setattr(head, name, nn.Parameter(old[places], old.requires_grad))
        head.out_features = len(places)
        self.classes = {**self.classes, label: tuple(self.classes[label][k] for k in places)}


@torch.no_grad()
def start_from(classifier: Classifier, released: Classifier) -> None:
    """Give a classifier the weights of another one: all but the heads', and of those the rows of the classes that both
    know; the others stay as they are. The two may see pictures of different sizes.

    Raises ValueError where their networks differ.
    """
    if replace(released.config, side_px=classifier.config.side_px) != classifier.config:
        raise ValueError("another network")
    weights = {name: value for name, value in released.state_dict().items() if not name.startswith("heads.")}
    classifier.load_state_dict(weights, strict=False)
    for label, classes in classifier.classes.items():
        if label not in released.classes:
            continue
        places = {name: k for k, name in enumerate(released.classes[label])}
        common = [(k, places[name]) for k, name in enumerate(classes) if name in places]
        ours, theirs = [k for k, _ in common], [k for _, k in common]
        for new, old in zip(classifier.heads[label].parameters(), released.heads[label].parameters(), strict=True):
            new[ours] = old[theirs]


@torch.no_grad()
def colour_histogram(pictures: Tensor, levels: int) -> Tensor:
    """How many pixels of pictures (B, 3, H, W) in [-1, 1] have each of `levels`^3 colours, (B, levels^3); a pixel
    between them is shared among the eight around it, by trilinear weights."""
    place = (pictures.float().reshape(len(pictures), 3, -1) + 1) / 2 * (levels - 1)  # (B, 3, N), plane by plane
    low = place.floor().clamp(max=levels - 2)
    share = place - low
    counts = place.new_zeros(len(pictures), levels**3)
    steps = place.new_tensor([levels**2, levels, 1])[:, None]
    for corner in itertools.product((0, 1), repeat=3):
        up = place.new_tensor(corner)[:, None]
        weight = torch.where(up > 0, share, 1 - share).prod(1)
        counts.scatter_add_(1, ((low + up) * steps).sum(1).long(), weight)
    return counts
