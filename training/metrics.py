"""Picture metrics: means over pictures of per-picture values."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SSIM_ROWS = 16  # its filters take many times a picture's memory


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture, over RGB in [0, 1]: (B, 3, H, W) in [-1, 1] twice -> (B,)."""
    mse = (((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2) ** 2).flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-12))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity per picture (Wang et al. 2004, Gaussian window of 11): (B, 3, H, W) in [-1, 1] -> (B,)."""
    left, right = ((x.clamp(-1, 1) + 1) / 2 for x in (a, b))
    pairs = zip(torch.split(left, SSIM_ROWS), torch.split(right, SSIM_ROWS), strict=True)
    found = [structural_similarity_index_measure(x, y, data_range=1.0, reduction="none") for x, y in pairs]
    return torch.cat([torch.as_tensor(part) for part in found])
