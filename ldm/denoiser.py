"""Denoiser: a network, its noise schedule and what it was trained to predict, behind one contract.

    denoiser(x_t, t, cond) -> Prediction(x0, eps)

B batch, C channels; x_t, x0, eps are (B, C, *grid), t is (B,) float64 in (0, 1]. alpha, sigma and
r = sqrt(alpha^2 + sigma^2) below broadcast against x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.config import Config
from ldm.draws import keyed_generator
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, per_item, posterior_kl, posterior_mean_weights

Target = Literal["eps", "x0", "v", "flow", "mean"]
Weighting = Literal["simple", "min_snr", "soft_min_snr", "edm", "p2", "bound", "learned"]

SIZES = 6  # of a picture as SDXL is told: its height and width, top and left of its crop, height and width asked for
CELL_PX = 8  # pixels a cell of SDXL's autoencoder
_FEATURES = 128
_LOG_SNR_BOUND = 20.0


class Prediction(NamedTuple):
    """x0, eps (B, C, *grid) with x_t = alpha_t x0 + sigma_t eps; `var_mix` in [0, 1] if it is learned."""

    x0: Tensor
    eps: Tensor
    var_mix: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """Each of them through `function`."""
        return Prediction(
            function(self.x0), function(self.eps), None if self.var_mix is None else function(self.var_mix)
        )


Predict = Callable[[Tensor, Tensor], Prediction]  # (x_t, t) with the conditioning bound


@dataclass(frozen=True)
class DenoiserConfig(Config):
    """What the network was trained for.

    target: eps (Ho et al. 2020), x0, v (Salimans & Ho 2022), flow, u = eps - x0 (Lipman et al. 2023), or mean, that of
    q(x_s | x_t, x0) for the step before t (Ho et al. 2020, sec. 3.2). input_scale: "unit" gives the network x_t / r,
    "none" x_t itself. clip_x0: bound on |x0|, for pixels.

    weighting, of the error of the target where it is simple or learned, else of that of x0: min_snr, min(SNR, gamma)
    (Hang et al. 2023, sec. 3.4); soft_min_snr, SNR gamma / (SNR + gamma) (Crowson et al. 2024, sec. 3.2); edm, SNR + 1
    (Karras et al. 2022, sec. 5, for unit-variance data); p2, SNR / (1 + SNR)^p2_gamma (Choi et al. 2022, eq. 8); bound,
    which makes the loss the variational bound's (`NoiseSchedule.bound_weight`); "learned" divides the squared error by
    what it is on average at that noise level, which is learned beside the network (`Uncertainty`).

    variance: "learned" has the network put out as many channels more, of which the variance of a reverse step is made
    (Nichol & Dhariwal 2021, eq. 15); the loss then has bound_share times the bound, its mean held, more (eq. 16).
    """

    target: Target = "v"
    input_scale: Literal["none", "unit"] = "none"
    clip_x0: float | None = None
    weighting: Weighting = "simple"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    variance: Literal["fixed", "learned"] = "fixed"
    bound_share: float = 1e-3

    def __post_init__(self) -> None:
        if self.clip_x0 is not None and self.clip_x0 <= 0:
            raise ValueError(f"clip_x0 must be positive, not {self.clip_x0}")
        if self.min_snr_gamma <= 0 or self.p2_gamma < 0 or self.bound_share <= 0:
            raise ValueError("min_snr_gamma and bound_share must be positive, and p2_gamma not negative")

    def channels(self, channels: int) -> int:
        """Channels that the network puts out for latents of `channels`."""
        return channels * (2 if self.variance == "learned" else 1)


def check_together(schedule: NoiseScheduleConfig, denoiser: DenoiserConfig) -> None:
    """Raise ValueError where a network cannot be trained so on that schedule, saying why and what can."""
    where = f"on a {schedule.kind} schedule" + (" with zero_terminal" if schedule.zero_terminal else "")
    if schedule.ends_in_noise and denoiser.target == "eps":
        raise ValueError(f"denoiser.target eps does not determine x0 at t = 1 {where}: use v, x0 or flow")
    if schedule.ends_in_noise and denoiser.weighting == "bound":
        raise ValueError(f"denoiser.weighting bound {where}: log-SNR is infinite there; use another weighting, or a "
                         "schedule that ends short of pure noise")  # fmt: skip
    for what, is_of_steps in (("target mean", denoiser.target == "mean"),
                              ("variance learned", denoiser.variance == "learned")):  # fmt: skip
        if is_of_steps and not schedule.discrete:
            raise ValueError(f"denoiser.{what} is of steps, which a {schedule.kind} schedule has not: use another")
    if schedule.kind == "edm" and denoiser.input_scale == "none":
        raise ValueError("an edm schedule has noise of up to 80: set denoiser.input_scale to unit")
    if schedule.kind == "learned" and denoiser.weighting != "bound":
        raise ValueError("a learned schedule is moved to make the bound's estimate steady: set denoiser.weighting to "
                         "bound")  # fmt: skip


def to_target(kind: Target, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor,
              mean: tuple[Tensor, Tensor] | None = None) -> Tensor:  # fmt: skip
    """What a network of this kind should put out for x_t = alpha x0 + sigma eps. mean: `posterior_mean_weights`, for
    that kind."""
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        return (alpha * eps - sigma * x0) / torch.sqrt(alpha**2 + sigma**2)
    if kind == "mean":
        of_x, of_x0 = _given(mean)
        return of_x * (alpha * x0 + sigma * eps) + of_x0 * x0
    return eps - x0


def from_output(kind: Target, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor,
                mean: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x0, eps) from the network's output: the inverse of `to_target` at x = x_t.

    v and flow are finite everywhere; eps does not determine x0 at alpha = 0, nor x0 eps at sigma = 0: what
    the division by zero gives is returned.
    """
    if kind == "eps":
        return (x - sigma * out) / alpha, out
    if kind == "v":
        r2 = alpha**2 + sigma**2
        rv = torch.sqrt(r2) * out
        return (alpha * x - sigma * rv) / r2, (sigma * x + alpha * rv) / r2
    if kind == "flow":
        return (x - sigma * out) / (alpha + sigma), (x + alpha * out) / (alpha + sigma)
    if kind == "mean":
        of_x, of_x0 = _given(mean)
        out = (out - of_x * x) / of_x0
    return out, (x - alpha * out) / sigma


def _given(mean: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if mean is None:
        raise ValueError("target mean needs the weights of the posterior's mean")
    return mean


def loss_weight(config: DenoiserConfig, alpha: Tensor, sigma: Tensor, of_x0: Tensor | None = None,
                bound: Tensor | None = None) -> Tensor:  # fmt: skip
    """Weight (B,) of the squared error of the target, for (B,) alpha and sigma.

    of_x0: of the posterior's mean, for target mean; bound: `NoiseSchedule.bound_weight`, for that weighting. Errors of
    eps and x0 are converted by SNR, that of v by (error of v)^2 = (SNR + 1) (error of x0)^2, that of flow by
    ((alpha + sigma) / sigma)^2. Finite wherever the target determines x0.
    """
    a2, s2 = alpha**2, sigma**2
    if config.weighting in ("simple", "learned"):
        return torch.ones_like(alpha)
    if config.weighting == "min_snr":
        on_eps = (config.min_snr_gamma * s2 / a2).clamp(max=1)
    elif config.weighting == "soft_min_snr":
        on_eps = config.min_snr_gamma * s2 / (a2 + config.min_snr_gamma * s2)
    elif config.weighting == "p2":
        on_eps = (s2 / (a2 + s2)) ** config.p2_gamma
    elif config.weighting == "edm":
        on_eps = (a2 + s2) / a2
    elif bound is None:
        raise ValueError("weighting bound needs the schedule's weights of it")
    else:
        on_eps = bound
    # (error of eps / error of the target)^2
    if config.target == "eps":
        return on_eps
    if config.target == "mean" and of_x0 is None:
        raise ValueError("target mean needs the weight of x0 in the posterior's mean")
    # edm's weight of x0 is finite where alpha is 0, and that of eps is not
    on_x0 = (a2 + s2) / s2 if config.weighting == "edm" else on_eps * a2 / s2
    if config.target == "mean":
        return on_x0 / torch.as_tensor(of_x0) ** 2
    return on_x0 * {"x0": torch.ones_like(s2), "v": s2 / (a2 + s2), "flow": s2 / (alpha + sigma) ** 2}[config.target]


class Uncertainty(nn.Module):
    """u(log-SNR), the learned logarithm of the mean squared error at a noise level (Karras et al. 2024, eq. 14-15).

    A linear map of fixed random Fourier features and a constant, 0 at the start. At each t the mean of
    error / exp(u) + u is least at u = log(mean error), whatever the target, and there every noise level weighs the
    same. The one parameter is a vector, which weight decay leaves alone as it does biases; the features are of unit
    norm, so that its gradient does not crowd out the network's where both are clipped together.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = keyed_generator("uncertainty")
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(_FEATURES, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(_FEATURES, generator=generator))
        self.weight = nn.Parameter(torch.zeros(_FEATURES + 1))

    def forward(self, log_snr: Tensor) -> Tensor:
        """(B,) -> (B,) float32; infinite log-SNR counts as 20 of its sign."""
        log_snr = log_snr.to(self.weight).clamp(-_LOG_SNR_BOUND, _LOG_SNR_BOUND)
        # EDM2's input log(sigma / alpha) / 4; products and sums stay in float32 under autocast, matmul would not
        waves = torch.cos(-log_snr[:, None] / 8 * self.frequencies + self.phases) / math.sqrt(_FEATURES)
        return (waves * self.weight[:-1]).sum(1) + self.weight[-1] / math.sqrt(2)


class Denoiser(nn.Module):
    """A diffusers `UNet2DConditionModel` (or one called like it) with its schedule and parameterisation.

    `uncertainty` is trained with the network where the weighting is "learned", and None otherwise; what it learns
    is of no use to inference. `gaps` are logarithms of the shares of log-SNR that the pieces of a learned schedule
    take, which training moves, None for any other. `control` is a ControlNet, what it adds times `control_scale`.
    """

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, config: DenoiserConfig) -> None:
        super().__init__()
        self.net = net
        self.config = config
        self.uncertainty = Uncertainty() if config.weighting == "learned" else None
        self.control: nn.Module | None = None
        self.control_scale = 1.0
        self._given, self.gaps = schedule, None
        if schedule.config.kind == "learned":
            self.gaps = nn.Parameter((-schedule.knots.diff()).log().float())

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule; a learned one as it is now."""
        if self.gaps is None:
            return self._given
        first, last = self._given.knots[0], self._given.knots[-1]
        shares = torch.cat([self.gaps.new_zeros(1), self.gaps.softmax(0).cumsum(0)]).double()
        return NoiseSchedule(self._given.config, first + (last - first) * shares.clamp(max=1))

    def draw_t(self, u: Tensor) -> Tensor:
        """`NoiseSchedule.draw_t`, which of a learned schedule does not change as it is learned."""
        return self._given.draw_t(u)

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """x0 and eps for x_t; x0 is clipped if the config says so, and eps follows it."""
        return self.clip(self.predict(x_t, t, cond), x_t, t)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """As `forward`, before clipping: guidance combines these and clips once."""
        return self._predicted(self._run(x_t, t, cond), x_t, t)

    def clip(self, prediction: Prediction, x_t: Tensor, t: Tensor) -> Prediction:
        """Bound |x0| by `clip_x0` and recompute eps from it; unchanged where the config has none."""
        if self.config.clip_x0 is None:
            return prediction
        alpha, sigma = (per_item(c, x_t) for c in self.schedule.alpha_sigma(t))
        x0 = prediction.x0.clamp(-self.config.clip_x0, self.config.clip_x0)
        return prediction._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)

    def loss(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning, cells: Tensor | None = None) -> Tensor:
        """What training minimises, per item: (B,), float32 (float64 for float64 data).

        The weighted `error`; for the learned weighting error / exp(u) + u, which can be negative; with a learned
        variance, `bound_share` times the step's part of the bound more, in which all cells count alike.
        cells: as `error` has them.
        """
        schedule = self.schedule
        alpha, sigma = schedule.alpha_sigma(t)
        x_t = per_item(alpha, x0) * x0 + per_item(sigma, x0) * eps
        out = self._run(x_t, t, cond)
        error = self._error(out, x0, eps, t, alpha, sigma, cells)
        if self.uncertainty is not None:
            u = self.uncertainty(schedule.log_snr(t))
            loss = error * torch.exp(-u) + u
        else:
            bound = schedule.bound_weight(t) if self.config.weighting == "bound" else None
            mean = self._mean_weights(t)
            weight = loss_weight(self.config, alpha, sigma, None if mean is None else mean[1], bound)
            loss = weight.to(error) * error
            if self.gaps is not None and loss.requires_grad:
                _steady(loss, alpha, sigma, bound)
        if self.config.variance == "learned":
            held = self._predicted(out, x_t, t)
            earlier = (t - 1 / schedule.steps).clamp(min=0)
            kl = posterior_kl(schedule, x_t, x0, held.x0.detach(), t, earlier, held.var_mix)
            loss = loss + self.config.bound_share * schedule.steps * kl
        return loss

    def error(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning, cells: Tensor | None = None) -> Tensor:
        """Mean squared error of the target per item, whatever the weighting: (B,), dtype as `loss`.

        cells: how much each counts in that mean, (B, 1, *grid), of each item more than 0 in all; by default all alike.
        """
        out = self._run(self.schedule.add_noise(x0, eps, t), t, cond)
        return self._error(out, x0, eps, t, *self.schedule.alpha_sigma(t), cells)

    def _error(self, out: Tensor, x0: Tensor, eps: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor,
               cells: Tensor | None) -> Tensor:  # fmt: skip
        alpha, sigma = per_item(alpha, x0), per_item(sigma, x0)
        wanted = to_target(self.config.target, x0, eps, alpha, sigma, self._mean_for(x0, t))
        difference = out[:, : x0.shape[1]] - wanted
        if cells is None:
            return (difference**2).flatten(1).mean(1)
        squares, cells = (difference**2).mean(1).flatten(1), cells.flatten(1)
        return (cells * squares).sum(1) / cells.sum(1)

    def _predicted(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """x0, eps, and what the channels beyond those of x_t say of the variance."""
        alpha, sigma = (per_item(c, x_t) for c in self.schedule.alpha_sigma(t))
        channels = x_t.shape[1]
        found = from_output(self.config.target, out[:, :channels], x_t, alpha, sigma, self._mean_for(x_t, t))
        # in [-1, 1] as a rule, and not held there: so it is in the checkpoints of others (Nichol & Dhariwal 2021)
        return Prediction(*found, (out[:, channels:] + 1) / 2 if self.config.variance == "learned" else None)

    def _mean_weights(self, t: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.target != "mean":
            return None
        return posterior_mean_weights(self.schedule, t, (t - 1 / self.schedule.steps).clamp(min=0))

    def _mean_for(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor] | None:
        found = self._mean_weights(t)
        return None if found is None else (per_item(found[0], x), per_item(found[1], x))

    def _controlled(self, x: Tensor, time: Tensor, text: Tensor | None, pictures: Tensor | None) -> dict[str, Any]:
        """What the ControlNet adds to the network."""
        if pictures is None:
            return {}
        if self.control is None:
            raise ValueError("there is a control picture, and no ControlNet to be told of it")
        down, mid = self.control(x, time, text, pictures.to(x), self.control_scale, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def _with_sizes(self, x: Tensor, text: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
        """The text's tokens, and for a network of Stable Diffusion XL the whole text and the sizes of a picture that
        was not cropped, of CELL_PX a cell."""
        said = getattr(self.net, "config", None)
        if text is None or getattr(said, "addition_embed_type", None) != "text_time":
            return text, {}
        assert said is not None
        pooled = said.projection_class_embeddings_input_dim - SIZES * said.addition_time_embed_dim
        height, width = (CELL_PX * side for side in x.shape[-2:])
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), SIZES)
        return text[:, :-1], {"added_cond_kwargs": {"text_embeds": text[:, -1, :pooled], "time_ids": sizes}}

    def _level_label(self, level: Tensor, like: Tensor) -> Tensor:
        """What the network is told of the noise in small pictures: thousandths, or the place in its table, whose entry
        k is of level (k + 1) / entries."""
        entries = getattr(getattr(self.net, "config", None), "num_class_embeds", None)
        if entries is None:
            return (1000 * level).to(like)
        return (level * entries - 1).round().long().clamp(0, entries - 1).to(like.device)

    def _run(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output for x_t, at least float32 whatever the precision of the network."""
        if self.config.input_scale == "unit":
            alpha, sigma = self.schedule.alpha_sigma(t)
            x = x_t * per_item((alpha**2 + sigma**2).rsqrt(), x_t)
        else:
            x = x_t
        x = torch.cat([x, *(beside.to(x) for beside in (cond.low_res, cond.known) if beside is not None)], 1)
        dtype = next(self.net.parameters()).dtype
        # without self-attention, diffusers' first attention of a block sees the text too, under the other mask
        alone = getattr(getattr(self.net, "config", None), "only_cross_attention", False) is True
        own = cond.text_mask if alone else None
        x, time = x.to(dtype), self.schedule.network_time(t).to(x.device)
        text = None if cond.text is None else cond.text.to(dtype)
        text, added = self._with_sizes(x, text)
        out: Tensor = self.net(
            x,
            time,
            encoder_hidden_states=text,
            encoder_attention_mask=cond.text_mask,
            attention_mask=own,
            class_labels=None if cond.level is None else self._level_label(cond.level, x),
            **self._controlled(x, time, text, cond.control),
            **added,
        ).sample
        return out.to(torch.promote_types(x_t.dtype, torch.float32))


def _steady(loss: Tensor, *through: Tensor | None) -> None:
    """Turn the schedule's gradient, which comes `through` per-item tensors, from that of the bound, which does not
    depend on the schedule between its ends, into that of the variance of its estimate: of loss^2 (Kingma et al. 2021,
    app. I.2), over the mean loss."""
    factor = 2 * loss.detach() / loss.detach().mean()
    for values in through:
        if values is not None and values.requires_grad:
            values.register_hook(lambda gradient: gradient * factor.to(gradient))
