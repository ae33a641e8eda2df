"""What a stage says of itself: how it is sampled, and stage.json, everything but the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm.config import Config
from ldm.denoiser import DenoiserConfig, check_together
from ldm.grids import GRIDS, to_first_step
from ldm.guidance import UpdateConfig
from ldm.latents import Normalisation
from ldm.low_res import LowResConfig
from ldm.models.attention import Attention
from ldm.models.unet import UNetConfig, UNetShape, unet_shape
from ldm.noise import NoiseSchedule, NoiseScheduleConfig

MAX_STEPS = 1000
MAX_SIDE_PX = 65_536
MAX_GUIDANCE = 100.0
_MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
BY_SIGMA = ("euler", "heun")
OF_SAMPLERS = {"variance": ("ddpm",), "eta": ("ddim",), "churn": BY_SIGMA}


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How a stage is sampled. guidance is w, 1 for none: of classifier-free guidance against the null of what `guided`
    names, the text, an SR stage's small picture, or both; or of autoguidance against the stage's weaker network.
    update: how it is applied. level: of the noise added to the small picture. attention: by what the network attends
    (`ldm.models.attention`). palette: whether a stage that has one puts what it draws onto its colours.

    grid: what times are evenly spaced in: t, log-SNR, or a power of sigma / alpha; or the steps of diffusers' "leading"
    spacing, `offset` from the first, or of "linspace" (`ldm.grids.GRIDS`); to the schedule's first step unless `clean`.
    variance: of ddpm's steps, from the posterior's (0) to the forward step's (1), where the network learned none; eta:
    of ddim; churn: of euler and heun. rows: pictures per network call, whatever the batch: other shapes give other
    last bits.
    """

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"] = "dpmpp_2m"
    grid: Literal["uniform", "log_snr", "karras", "leading", "linspace"] = "uniform"
    steps: int = 20
    guidance: float = 3.0
    rows: int = 4
    guided: Literal["text", "low_res", "both", "network"] = "text"
    level: float = 0.0
    variance: float = 0.0
    eta: float = 0.0
    churn: float = 0.0
    offset: int = 0
    clean: bool = True
    attention: Attention = "sdpa"
    palette: bool = True
    update: UpdateConfig = UpdateConfig()

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be from 1 to {MAX_STEPS}, not {self.steps}")
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance must be from 0 to {MAX_GUIDANCE:g} (1 is none), not {self.guidance}")
        if not 1 <= self.rows <= 1024:
            raise ValueError(f"rows must be from 1 to 1024, not {self.rows}")
        for name, value in (("level", self.level), ("variance", self.variance), ("eta", self.eta)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {value}")
        if not 0 <= self.churn <= MAX_STEPS:
            raise ValueError(f"churn must be from 0 to {MAX_STEPS}, not {self.churn}")
        for name, own in OF_SAMPLERS.items():
            if getattr(self, name) and self.sampler not in own:
                raise ValueError(f"{name} is of {' and '.join(own)}; {self.sampler} has none")

        if not 0 <= self.offset < 100 or (self.offset and self.grid != "leading"):
            raise ValueError("offset is of the leading grid, a few steps at most")

    def times(self, schedule: NoiseSchedule) -> Tensor:
        """The grid of times. Raises ValueError where the schedule has not the steps for it."""
        more = {}
        if self.grid == "leading":  # multistep solvers leave out the step that would be the last
            more = {"offset": self.offset, "extra": int(self.sampler in _MULTISTEP)}
        grid = GRIDS[self.grid](self.steps, schedule, **more)
        return grid if self.clean else to_first_step(grid, schedule)

    @property
    def options(self) -> dict[str, float]:
        """What its sampler takes beyond all others."""
        return {name: getattr(self, name) for name, own in OF_SAMPLERS.items() if self.sampler in own}


@dataclass(frozen=True)
class StageConfig(Config):
    """stage.json: everything but the weights. The digests say which codec and text encoder it was trained with.

    codec: the folder of its codec in the cascade. low_res: None for a base. inpainting: whether the network is told
    what is known around a hole (`ldm.inpainting.condition_known`). posterior: whether it learned draws of the codec's
    posterior or its means, as training that goes on must. noise: keyed by purpose, or drawn in order as
    diffusers' pipelines draw it (`ldm.draws.Draws`). palette: whether a folder palette/ is part of it.
    """

    name: str
    resolution_px: int
    latent_channels: int
    text_width: int
    unet: UNetConfig
    schedule: NoiseScheduleConfig
    denoiser: DenoiserConfig
    sampling: SamplingConfig
    normalisation: Normalisation
    codec_digest: str
    text_digest: str
    codec: str = "codec"
    low_res: LowResConfig | None = None
    inpainting: bool = False
    posterior: Literal["draw", "mean"] = "draw"
    noise: Literal["keyed", "in_order"] = "keyed"
    palette: bool = False

    def __post_init__(self) -> None:
        if not (self.name.isidentifier() and self.codec.isidentifier()):
            raise ValueError(f"name and codec must be plain folder names, not {self.name!r} and {self.codec!r}")
        check_together(self.schedule, self.denoiser)
        if not 1 <= self.resolution_px <= MAX_SIDE_PX:
            raise ValueError(f"resolution_px must be from 1 to {MAX_SIDE_PX}, not {self.resolution_px}")
        if not len(self.normalisation.mean) == len(self.normalisation.std) == self.latent_channels:
            raise ValueError(f"normalisation needs a mean and a std for each of {self.latent_channels} channels")
        if self.low_res is None:
            if self.sampling.guided in ("low_res", "both") or self.sampling.level:
                raise ValueError("sampling: level, and guided low_res, are of small pictures; this stage takes none")
        elif self.inpainting or self.palette:
            raise ValueError("inpainting and a palette are of a base: a stage that enlarges is told of a small picture")
        elif self.sampling.level > self.low_res.max_level:
            raise ValueError(f"sampling.level {self.sampling.level} is beyond the max_level {self.low_res.max_level} "
                             "that the stage was trained to")  # fmt: skip
        elif self.resolution_px % self.low_res.scale:
            raise ValueError(f"resolution_px {self.resolution_px} is no multiple of the scale {self.low_res.scale}")

    def shape(self, factor: int) -> UNetShape:
        """Of its network, in latents of a codec of `factor` pixels a cell."""
        return unet_shape(self.latent_channels, self.text_width, factor, self.denoiser, self.low_res, self.inpainting)

    @property
    def input_px(self) -> int | None:
        """The side of the small pictures an SR stage was trained on."""
        return None if self.low_res is None else self.resolution_px // self.low_res.scale
