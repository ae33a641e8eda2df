"""Low-resolution conditioning of super-resolution stages: two functions make it, and no third.

    degrade(high_res) -> low_res                             training only: what a small picture is taken to be
    condition_low_res(low_res, level, eps) -> (B, C, h, w)   training, evaluation and inference: what a network sees

`enlarge` and `local_contrast` say what a residual stage draws: (latent - latent of the enlarged picture) / contrast.

Noise of a level that the network is told covers the difference between the small pictures it was trained on and
those another stage draws (Ho et al. 2021, "Cascaded diffusion models", sec. 4.1; Saharia et al. 2022, sec. 2.3).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad, pixel_unshuffle

from ldm.config import Config
from ldm.noise import NoiseSchedule, NoiseScheduleConfig

Kernel = Literal["area", "bicubic", "nearest"]
NULL_LEVEL = 1.0
CONTRAST_WINDOW_PX = 1.0
_WAVES, _COLOURS_ALIKE = 32, 40.0  # colours nearer than this, of 255, move nearly alike


@dataclass(frozen=True)
class LowResConfig(Config):
    """How a stage is conditioned on a picture of 1 / `scale` its side.

    levels: the schedule of the noise that is added to it, level s in [0, 1] being its t; max_level bounds what the
    network was trained on, and 0 is no noise. residual: the stage draws what the picture, enlarged by bicubic
    interpolation and encoded, lacks of the large one's latent; else that latent itself. contrast_floor: a residual is
    divided by the picture's `local_contrast`, at least this much (of pixels in [-1, 1]), so that what a network gets
    wrong in flat areas, where nothing is lacking, is as small as they are flat; None leaves residuals as they are.
    """

    scale: int
    levels: NoiseScheduleConfig = NoiseScheduleConfig()
    max_level: float = 0.5
    residual: bool = False
    contrast_floor: float | None = None

    def __post_init__(self) -> None:
        if self.contrast_floor is not None and not (self.residual and 0 < self.contrast_floor <= 1):
            raise ValueError(f"contrast_floor, {self.contrast_floor}, is of residual stages, above 0 and at most 1")
        if not 2 <= self.scale <= 16:
            raise ValueError(f"scale must be from 2 to 16, not {self.scale}")
        if not 0 <= self.max_level < NULL_LEVEL:
            raise ValueError(f"max_level must be from 0 to below 1, not {self.max_level}")
        if self.levels.ends_in_noise:
            raise ValueError("levels must be a schedule with alpha above 0, not flow or one with zero_terminal")

    def channels(self, factor: int) -> int:
        """Channels of `condition_low_res` for a codec of `factor` pixels per latent cell."""
        return 3 * (factor // math.gcd(factor, self.scale)) ** 2


def condition_low_res(low_res: Tensor, level: Tensor, eps: Tensor, config: LowResConfig, factor: int) -> Tensor:
    """Small pictures on the latent grid of the large ones, with noise of a level: (B, C, h, w) float32.

    low_res (B, 3, H, W) in [-1, 1]; level (B,) in [0, 1]; eps (B, C, h, w) ~ N(0, I), C = `config.channels(factor)`
    and h = H scale / factor. No pixel is lost: where the grid is coarser than the picture, squares of pixels become
    channels; where it is finer, the picture is enlarged by bicubic interpolation; for a ratio like 3 / 8, both.
    The null is zeros at NULL_LEVEL, which is what any picture looks like there.
    Raises ValueError where the grid does not divide the picture.
    """
    common = math.gcd(factor, config.scale)
    if low_res.shape[-1] * config.scale % factor or low_res.shape[-2] * config.scale % factor:
        raise ValueError(
            f"a picture of {tuple(low_res.shape[-2:])}, {config.scale} times as large, has no grid of {factor} px"
        )
    y = low_res if config.scale == common else enlarge(low_res, config.scale // common)
    y = pixel_unshuffle(y, factor // common)
    alpha, sigma = NoiseSchedule(config.levels).alpha_sigma(level.cpu())
    column = [-1, *[1] * (y.ndim - 1)]
    return alpha.to(y).view(column) * y + sigma.to(y).view(column) * eps


def enlarge(pictures: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation: (B, C, H, W) -> (B, C, H scale, W scale), values as they come."""
    return interpolate(pictures, scale_factor=scale, mode="bicubic", align_corners=False)


def local_contrast(low_res: Tensor, config: LowResConfig, factor: int) -> Tensor:
    """What a residual is measured in, on the latent grid: (B, 3, H, W) -> (B, 1, H scale / factor, W scale / factor).

    sqrt(variance + floor^2), the variance that of the small picture under a Gaussian window of 1 px, the mean of its
    channels; 1 everywhere without a `contrast_floor`.
    """
    grid = [side * config.scale // factor for side in low_res.shape[-2:]]
    if config.contrast_floor is None:
        return low_res.new_ones(len(low_res), 1, *grid)
    variance = (_blur(low_res**2, CONTRAST_WINDOW_PX) - _blur(low_res, CONTRAST_WINDOW_PX) ** 2).clamp(min=0)
    spread = interpolate(variance.mean(1, keepdim=True), size=grid, mode="area")
    return torch.sqrt(spread + config.contrast_floor**2)


@dataclass(frozen=True)
class DegradationConfig(Config):
    """What makes small pictures of large ones: by default the mean over squares, always.

    Beyond it, the parts of the mix of Zhang et al. 2021 ("Designing a practical degradation model"), each drawn per
    picture: one of `kernels` for the reduction, and by their shares a Gaussian blur of `blur_px` (standard deviation
    in pixels of the small picture), Gaussian noise of `noise_std` (of 255) and JPEG compression of `jpeg_quality`;
    ranges are drawn uniformly. The noise is white, or blurred by a Gaussian of `noise_px` pixels to grains of that
    size, as codecs and networks leave them, and brought back to its deviation. Blur comes before or after the
    reduction, noise before or after JPEG, at random. At the end, by the share `colour`, each colour becomes another
    one near it, `colour_std` (of 255) away in each channel: what is flat stays flat, as where a network took a wrong
    colour.
    """

    kernels: tuple[Kernel, ...] = ("area",)
    blur: float = 0.0
    blur_px: tuple[float, float] = (0.2, 1.2)
    noise: float = 0.0
    noise_std: tuple[float, float] = (1.0, 25.0)
    noise_px: tuple[float, float] = (0.0, 0.0)
    jpeg: float = 0.0
    jpeg_quality: tuple[int, int] = (30, 95)
    colour: float = 0.0
    colour_std: tuple[float, float] = (2.0, 24.0)

    def __post_init__(self) -> None:
        if not self.kernels:
            raise ValueError("kernels must name at least one of area, bicubic, nearest")
        if any(not 0 <= share <= 1 for share in (self.blur, self.noise, self.jpeg, self.colour)):
            raise ValueError("blur, noise, jpeg and colour are shares, from 0 to 1")
        for name in ("blur_px", "noise_std", "jpeg_quality", "colour_std"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range of positive numbers, not {low} to {high}")
        if not 0 <= self.noise_px[0] <= self.noise_px[1]:
            low, high = self.noise_px
            raise ValueError(f"noise_px must be a range from 0 upwards, not {low} to {high}")
        if self.jpeg_quality[1] > 100:
            raise ValueError(f"jpeg_quality ends at 100, not {self.jpeg_quality[1]}")

    @property
    def random(self) -> bool:
        """Whether equal pictures can become different ones."""
        return len(self.kernels) > 1 or max(self.blur, self.noise, self.jpeg, self.colour) > 0


def degrade(high_res: Tensor, scale: int, config: DegradationConfig,
            generators: Sequence[torch.Generator] = ()) -> Tensor:  # fmt: skip
    """Small pictures of large ones: uint8 (B, H, W, 3) -> uint8 (B, H / scale, W / scale, 3).

    `generators`, one per picture, are drawn from only if `config.random`. Raises ValueError where `scale` does not
    divide a side.
    """
    if high_res.shape[1] % scale or high_res.shape[2] % scale:
        raise ValueError(f"sides {tuple(high_res.shape[1:3])} are no multiples of {scale}")
    planes = high_res.permute(0, 3, 1, 2).float()
    if not config.random:
        return _pixels(_reduce(planes, scale, config.kernels[0]))
    made = [_degrade_one(p[None], scale, config, g) for p, g in zip(planes, generators, strict=True)]
    return torch.cat(made)


def _degrade_one(planes: Tensor, scale: int, config: DegradationConfig, generator: torch.Generator) -> Tensor:
    u = torch.rand(9, generator=generator, dtype=torch.float64).tolist()  # always as many draws
    kernel = config.kernels[int(u[0] * len(config.kernels))]
    sigma = _between(config.blur_px, u[1])
    first, blurred = u[2] < 0.5, u[3] < config.blur
    planes = _blur(planes, sigma * scale) if blurred and first else planes
    planes = _reduce(planes, scale, kernel)
    planes = _blur(planes, sigma) if blurred and not first else planes
    quality = round(_between(config.jpeg_quality, u[4]))
    compressed, early = u[5] < config.jpeg, u[6] < 0.5
    planes = _jpeg(planes, quality) if compressed and early else planes
    if u[7] < config.noise:
        noise = _grains(torch.randn(planes.shape, generator=generator), config.noise_px, generator)
        planes = planes + _between(config.noise_std, u[8]) * noise
    planes = _jpeg(planes, quality) if compressed and not early else planes
    return _pixels(_recoloured(planes, config, generator) if config.colour else planes)


def _recoloured(planes: Tensor, config: DegradationConfig, generator: torch.Generator) -> Tensor:
    """Colours moved by a random smooth function of the colour: a sum of waves, as in random Fourier features."""
    u = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    directions = torch.randn(3, _WAVES, generator=generator) / _COLOURS_ALIKE
    phases = 2 * math.pi * torch.rand(_WAVES, generator=generator)
    moves = torch.randn(_WAVES, 3, generator=generator) * math.sqrt(2 / _WAVES)
    if u[0] >= config.colour:
        return planes
    waves = torch.cos(planes.movedim(1, -1) @ directions + phases)
    return planes + _between(config.colour_std, u[1]) * (waves @ moves).movedim(-1, 1)


def _grains(noise: Tensor, size_px: tuple[float, float], generator: torch.Generator) -> Tensor:
    if size_px[1] == 0:
        return noise
    size = _between(size_px, float(torch.rand((), generator=generator)))
    blurred = _blur(noise, size) if size else noise
    return blurred / blurred.std()


def _between(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _reduce(planes: Tensor, scale: int, kernel: Kernel) -> Tensor:
    if kernel == "area":
        return avg_pool2d(planes, scale)
    if kernel == "bicubic":
        size = [planes.shape[-2] // scale, planes.shape[-1] // scale]
        return interpolate(planes, size=size, mode="bicubic", antialias=True)
    return planes[..., scale // 2 :: scale, scale // 2 :: scale]


def _blur(planes: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    at = torch.arange(-reach, reach + 1, dtype=torch.float32, device=planes.device)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).repeat(planes.shape[1], 1, 1, 1)
    padded = pad(planes, [reach] * 4, mode="replicate")
    across = conv2d(padded, weights, groups=planes.shape[1])
    return conv2d(across, weights.transpose(2, 3), groups=planes.shape[1])


def _jpeg(planes: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(_pixels(planes)[0].numpy()).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=["JPEG"]) as image:
        found = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return found.view(1, *planes.shape[-2:], 3).permute(0, 3, 1, 2).float()


def _pixels(planes: Tensor) -> Tensor:
    """(B, 3, H, W) around [0, 255] -> (B, H, W, 3) uint8."""
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
