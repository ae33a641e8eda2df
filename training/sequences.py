"""The sequences lab: a mixture of Gaussians over 1-D sequences, of which everything is known in closed form.

    Mixture -> items (B, 1, L) -> Denoiser(SequenceTransformer).loss -> the loop; measured against Mixture.denoise,
    its density, and the shares of its components -> RUN/final/{config.json, model.safetensors}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.config import Config, to_dict
from ldm.denoiser import Denoiser, DenoiserConfig, Predict, Prediction, check_together
from ldm.draws import keyed_generator
from ldm.grids import uniform_grid
from ldm.likelihood import variational_bound
from ldm.models.sequence import SequenceTransformer, SequenceTransformerConfig
from ldm.noise import NoiseSchedule, NoiseScheduleConfig
from ldm.sampling import ddpm
from ldm.weights import write_json
from training.ema import EmaConfig
from training.engine import LoopConfig
from training.loader import Batch, StepModule
from training.optim import OptimConfig
from training.stages import written_whole
from training.steps import StepResult

LEVELS = (10, 30, 50, 70, 90)  # hundredths of t
MEASURED, DRAWN, STEPS = 256, 500, 50


@dataclass(frozen=True)
class MixtureConfig(Config):
    """`components` sine waves of 1, 2, ... periods over `length` positions, with noise of `deviation` on each
    position; component k is drawn with a share in proportion to `components` - k."""

    components: int = 4
    length: int = 32
    deviation: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.components <= 64 or not 2 <= self.length <= 4096 or not 0 < self.deviation <= 10:
            raise ValueError("components must be 1 to 64, length 2 to 4096, and deviation above 0 and at most 10")


class Mixture:
    """sum_k share_k N(mean_k, deviation^2 I) on sequences (B, 1, L), and what follows from it exactly."""

    def __init__(self, config: MixtureConfig) -> None:
        self.config = config
        at = torch.arange(config.length, dtype=torch.float64) / config.length
        periods = torch.arange(1, config.components + 1, dtype=torch.float64)
        self.means = torch.sin(2 * math.pi * periods[:, None] * at)  # (K, L)
        shares = periods.flip(0)
        self.shares = shares / shares.sum()

    def draw(self, generator: torch.Generator, count: int) -> Tensor:
        """(count, 1, L) float64."""
        chosen = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.config.length, dtype=torch.float64, generator=generator)
        return (self.means[chosen] + self.config.deviation * noise)[:, None]

    def log_weights(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log(share_k N(x; alpha mean_k, alpha^2 deviation^2 + sigma^2)), (B, K), of x_t (B, 1, L) and (B,) each."""
        variance = (alpha**2 * self.config.deviation**2 + sigma**2)[:, None]
        squares = ((x.double() - alpha[:, None, None] * self.means) ** 2).sum(2)
        log_p = -(squares / variance + self.config.length * (2 * math.pi * variance).log()) / 2
        return log_p + self.shares.log()

    def log_prob(self, x0: Tensor) -> Tensor:
        """log p(x0), (B,) float64, in nats."""
        one = torch.ones(len(x0), dtype=torch.float64)
        return self.log_weights(x0, one, 0 * one).logsumexp(1)

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t], (B, 1, L) float64: what the best denoiser gives."""
        weights = self.log_weights(x_t, alpha, sigma).softmax(1)
        gain = (alpha * self.config.deviation**2 / (alpha**2 * self.config.deviation**2 + sigma**2))[:, None, None]
        each = self.means + gain * (x_t.double() - alpha[:, None, None] * self.means)  # (B, K, L)
        return (weights[..., None] * each).sum(1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class SequencesRun(Config):
    """`ldm train` of a Transformer on sequences of a mixture of Gaussians. items: how many are drawn to train on."""

    kind: Literal["sequences"] = "sequences"
    mixture: MixtureConfig = MixtureConfig()
    items: int = 8192
    transformer: SequenceTransformerConfig = SequenceTransformerConfig()
    schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    loop: LoopConfig
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        check_together(self.schedule, self.denoiser)
        if not 1 <= self.items <= 10_000_000:
            raise ValueError(f"items must be from 1 to 10 million, not {self.items}")

    def shortened(self, folder: Path, rows: int) -> SequencesRun:
        """For a rehearsal."""
        return replace(self, items=min(self.items, rows))


class Sequences:
    """The items: what the loop wants of a cache, in memory."""

    def __init__(self, config: SequencesRun) -> None:
        drawn = Mixture(config.mixture).draw(keyed_generator(config.seed, "sequences"), config.items)
        self.items = drawn.float()
        self.shapes: Tensor | None = None
        self.manifest: dict[str, Any] = {
            "key": {"mixture": to_dict(config.mixture), "items": config.items, "seed": config.seed}
        }

    def __len__(self) -> int:
        return len(self.items)

    def stored(self, indices: Sequence[int]) -> Tensor:
        """(B, 1, L) float32."""
        return self.items[list(indices)]

    def record(self, index: int) -> dict[str, Any]:
        """What a message names an item by."""
        return {"key": f"sequence {index}", "captions": [], "fields": {}}


class SequencesModule(StepModule):
    """The denoiser with its training step as `forward`."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        x0 = batch.stored()
        eps = batch.normal(tuple(x0.shape[1:])).to(x0)
        u = (torch.tensor(batch.places, dtype=torch.float64) + batch.uniform()) / batch.global_size
        return x0, eps, self.denoiser.draw_t(u)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> StepResult:
        x0, eps, t = inputs
        device = next(self.parameters()).device
        return StepResult([self.denoiser.loss(x0.to(device), eps.to(device), t, Conditioning()).mean()], {})


class SequencesTask:
    """Trains a denoiser of sequences; evaluates it against the mixture itself."""

    def __init__(self, config: SequencesRun) -> None:
        self.cache = Sequences(config)
        self.mixture, self._config = Mixture(config.mixture), config
        torch.manual_seed(config.seed)
        net = SequenceTransformer(config.transformer, config.mixture.length, 1, config.denoiser.channels(1))
        self.module = SequencesModule(Denoiser(net, NoiseSchedule(config.schedule), config.denoiser))

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """excess_t: mean squared distance of x0 from the best one's, over the variance that is left there; bits/dim of
        the bound on STEPS steps and of the mixture itself; wrong_share: half the sum of the differences between the
        components' shares among samples and their own (total variation)."""
        assert isinstance(module, SequencesModule)
        denoiser, schedule = module.denoiser, module.denoiser.schedule
        generator = keyed_generator("sequences", "held out")
        x0 = self.mixture.draw(generator, MEASURED)
        found = {}
        for level in LEVELS:
            t = torch.full((MEASURED,), level / 100, dtype=torch.float64)
            alpha, sigma = schedule.alpha_sigma(t)
            x_t = schedule.add_noise(x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator), t)
            best = self.mixture.denoise(x_t, alpha, sigma)
            own = self._predict(denoiser)(x_t.float(), t).x0.cpu()
            found[f"excess_t{level / 100:.2f}"] = float(((own - best) ** 2).mean() / ((x0 - best) ** 2).mean())
        grid = uniform_grid(min(STEPS, schedule.steps), schedule)
        noise = partial(_normal, generator)
        bound = variational_bound(self._predict(denoiser), x0.float(), grid, noise, schedule=schedule,
                                  decoder="gaussian")  # fmt: skip
        found["bound_bits_per_dim"] = float(bound.total.mean())
        truth = -self.mixture.log_prob(x0).mean() / self._config.mixture.length / math.log(2)
        found["true_bits_per_dim"] = float(truth)
        one = torch.ones(DRAWN, dtype=torch.float64)
        nearest = self.mixture.log_weights(self._drawn(denoiser, DRAWN)[-1], one, 0 * one).argmax(1)
        shares = torch.bincount(nearest, minlength=len(self.mixture.shares)) / DRAWN
        found["wrong_share"] = float((shares - self.mixture.shares).abs().sum() / 2)
        return found

    @staticmethod
    def _predict(denoiser: Denoiser) -> Predict:
        device = next(denoiser.parameters()).device

        def predict(x: Tensor, t: Tensor) -> Prediction:
            found: Prediction = denoiser(x.to(device), t, Conditioning())
            return found.map(Tensor.cpu)

        return predict

    def _drawn(self, denoiser: Denoiser, count: int) -> list[Tensor]:
        """x_t of ancestral sampling, from noise on: (count, 1, L) each."""
        generator = keyed_generator("sequences", "drawn")
        schedule = denoiser.schedule
        grid = uniform_grid(min(STEPS, schedule.steps), schedule)
        start = torch.randn(count, 1, self._config.mixture.length, generator=generator)
        path: list[Tensor] = []

        def seen(x: Tensor, t: Tensor) -> Prediction:
            path.append(x)
            return self._predict(denoiser)(x, t)

        scale = float(schedule.alpha_sigma(grid[:1])[1])
        last = ddpm(seen, scale * start, grid, partial(_normal, generator), schedule=schedule)
        return [*path, last]

    def preview(self, module: nn.Module, path: Path) -> None:
        """The forward process of drawn sequences above, the reverse one below, from t = 1 on the right."""
        from matplotlib.figure import Figure  # takes a second

        assert isinstance(module, SequencesModule)
        with torch.no_grad():
            drawn = self._drawn(module.denoiser, 24)
        schedule, generator = module.denoiser.schedule, keyed_generator("sequences", "preview")
        x0 = self.mixture.draw(generator, 24)
        eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
        figure = Figure(figsize=(15, 5), layout="constrained")
        for column, (above, below) in enumerate(figure.subplots(2, 6, sharey=True).T):
            t = torch.full((24,), column / 5, dtype=torch.float64)
            above.plot(schedule.add_noise(x0, eps, t)[:, 0].T, linewidth=0.6)
            above.set_title(f"t = {column / 5:g}")
            below.plot(drawn[round((1 - column / 5) * (len(drawn) - 1))][:, 0].T, linewidth=0.6)
            if not column:
                above.set_ylabel("forward: x_t of the data")
                below.set_ylabel("reverse: x_t of samples")
        figure.savefig(path, dpi=70)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, SequencesModule)
        tensors = {name: value.detach().cpu().contiguous() for name, value in module.denoiser.net.state_dict().items()}
        parts = ("mixture", "transformer", "schedule", "denoiser")
        shape = {name: to_dict(getattr(self._config, name)) for name in parts}
        with written_whole(folder) as partial_:
            partial_.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial_ / "model.safetensors")
            write_json(partial_ / "config.json", shape)
            write_json(partial_ / "training.json", facts)


def _normal(generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
