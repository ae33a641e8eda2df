"""Every schedule with every parameterisation and weighting: what is valid trains at both ends of t, what is not is
refused when the config is read."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.denoiser import Denoiser, DenoiserConfig, Target, Weighting, check_together, from_output, to_target
from ldm.models.unet import UNetConfig, UNetShape, build_unet
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, per_item, posterior_kl, posterior_mean_weights

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"}, "scaled_linear": {"kind": "scaled_linear"}, "cosine": {"kind": "cosine"},
    "sigmoid": {"kind": "sigmoid"}, "zero_terminal": {"kind": "linear", "zero_terminal": True},
    "flow": {"kind": "flow"}, "shifted": {"kind": "flow", "shift": 3.0}, "edm": {"kind": "edm"},
    "learned": {"kind": "learned"},
}  # fmt: skip
DISCRETE = ("linear", "scaled_linear", "cosine", "sigmoid", "zero_terminal")
NOISY_END = ("zero_terminal", "flow", "shifted")
CELLS = list(itertools.product(SCHEDULES, get_args(Target), get_args(Weighting), ("fixed", "learned")))


def refusal(schedule: str, target: str, weighting: str, variance: str) -> str | None:
    """The table: why a cell is invalid, None for one that is valid."""
    if schedule in NOISY_END and target == "eps":
        return "target eps does not determine x0"
    if schedule in NOISY_END and weighting == "bound":
        return "log-SNR is infinite"
    if schedule not in DISCRETE and (target == "mean" or variance == "learned"):
        return "is of steps"
    if schedule == "learned" and weighting != "bound":
        return "set denoiser.weighting to bound"
    return None


def configs(schedule: str, target: str, weighting: str, variance: str) -> tuple[NoiseScheduleConfig, DenoiserConfig]:
    scale = "unit" if schedule == "edm" else "none"
    denoiser: Any = {"target": target, "weighting": weighting, "variance": variance, "input_scale": scale}
    return NoiseScheduleConfig(**SCHEDULES[schedule]), DenoiserConfig(**denoiser)


@pytest.fixture(scope="module")
def nets() -> dict[str, UNet2DConditionModel]:
    torch.manual_seed(0)
    config = UNetConfig(widths=(4, 4), layers_per_block=1, attention=(False, True), heads=1, norm_groups=2)
    shapes = {"fixed": UNetShape(2, 4), "learned": UNetShape(2, 4, variance=2)}
    return {variance: build_unet(config, shape).double() for variance, shape in shapes.items()}


def test_the_table_has_both_kinds() -> None:
    found = [refusal(*cell) for cell in CELLS]
    assert found.count(None) == 4 * 70 + 48 + 2 * 18 + 28 + 4
    assert len(CELLS) == 630


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_cell_trains_at_both_ends_or_is_refused(schedule: str, nets: dict[str, UNet2DConditionModel]) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    cond = Conditioning(torch.randn(2, 3, 4, dtype=torch.float64, generator=generator))
    for cell in (c for c in CELLS if c[0] == schedule):
        noise, denoiser = configs(*cell)
        why = refusal(*cell)
        if why is not None:
            with pytest.raises(ValueError, match=why):
                check_together(noise, denoiser)
            continue
        check_together(noise, denoiser)
        net = nets[cell[3]]
        net.zero_grad()
        model = Denoiser(net, NoiseSchedule(noise), denoiser)
        ends = model.schedule.draw_t(torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64))
        loss = model.loss(x0, eps, ends, cond)
        loss.sum().backward()
        assert bool(loss.isfinite().all()), cell
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in found), cell
        assert any(bool((g != 0).any()) for g in found), cell


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_parameterisations_of_one_denoiser_give_its_x0(schedule: str) -> None:
    """The exact denoiser of N(0.3, 0.5^2 I), for log-SNRs of the schedule from -15 to 15."""
    noise = NoiseSchedule(NoiseScheduleConfig(**SCHEDULES[schedule]))
    first = torch.tensor([max(noise.first_t, 1e-9), 1.0], dtype=torch.float64)
    high, low = noise.log_snr(first).clamp(-15, 15).tolist()
    t = noise.time_of(torch.linspace(low, high, 61, dtype=torch.float64))
    t = ((t * noise.steps).round() / noise.steps).clamp(min=noise.first_t) if noise.discrete else t
    x = 2 * torch.randn(61, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha, sigma = (per_item(c, x) for c in noise.alpha_sigma(t))
    x0 = 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.3)
    eps = sigma / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.3)
    for target in get_args(Target):
        if refusal(schedule, target, "bound" if schedule == "learned" else "simple", "fixed") is not None:
            continue
        mean = None
        if target == "mean":
            weights = posterior_mean_weights(noise, t, (t - 1 / noise.steps).clamp(min=0))
            mean = per_item(weights[0], x), per_item(weights[1], x)
        out = to_target(target, x0, eps, alpha, sigma, mean)
        got_x0, got_eps = from_output(target, out, x, alpha, sigma, mean)
        torch.testing.assert_close(got_x0, x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(got_eps, eps, rtol=0, atol=1e-5)


class Constant(torch.nn.Module):
    """A network that puts out the same always."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = torch.nn.Parameter(out)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return type("Out", (), {"sample": self.out.expand(len(x), *self.out.shape[1:])})


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_weighting_is_the_bound(schedule: str, target: Target) -> None:
    """T times the KL of each step with the posterior's variance; of the last the square of a Gaussian decoder."""
    noise = NoiseSchedule(NoiseScheduleConfig(kind=schedule, steps=20))  # type: ignore[arg-type]
    t = torch.arange(1, 21, dtype=torch.float64) / 20
    generator = torch.Generator().manual_seed(0)
    x0, eps, out = (torch.randn(20, 3, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    out = out[:1]
    model = Denoiser(Constant(out), noise, DenoiserConfig(target=target, weighting="bound"))
    with torch.no_grad():
        loss = model.loss(x0, eps, t, Conditioning())
        x_t = noise.add_noise(x0, eps, t)
        kl = posterior_kl(noise, x_t, x0, model(x_t, t, Conditioning()).x0, t, (t - 0.05).clamp(min=0))
        perfect = posterior_kl(noise, x_t, x0, x0, t, (t - 0.05).clamp(min=0))
    torch.testing.assert_close(loss, 20 * (kl - perfect), rtol=1e-8, atol=1e-10)
    assert float(perfect[1:].abs().max()) < 1e-12


def test_a_learned_variance_is_that_of_the_step() -> None:
    """The hybrid loss is least, over what the channels of the variance put out, where the KL is; the mean is held."""
    noise = NoiseSchedule(NoiseScheduleConfig(steps=50))
    x0 = torch.zeros(4, 1, 8, 8, dtype=torch.float64)
    eps = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 0.5, dtype=torch.float64)
    config = DenoiserConfig(target="eps", variance="learned", bound_share=1.0)
    net = Constant(torch.zeros(1, 2, 1, 1, dtype=torch.float64).expand(1, 2, 8, 8).clone())
    model = Denoiser(net, noise, config)
    model.loss(x0, eps, t, Conditioning()).sum().backward()
    assert net.out.grad is not None
    plain = Denoiser(Constant(net.out.detach()[:, :1]), noise, DenoiserConfig(target="eps"))
    plain.loss(x0, eps, t, Conditioning()).sum().backward()
    assert torch.equal(net.out.grad[:, :1], plain.net.out.grad)  # type: ignore[arg-type]
    assert bool((net.out.grad[:, 1:] != 0).all())
    x_t = noise.add_noise(x0, eps, t)
    prediction = model(x_t, t, Conditioning())
    assert prediction.var_mix is not None
    assert torch.equal(prediction.var_mix, torch.full_like(x0, 0.5))
    with torch.no_grad():
        kl = posterior_kl(noise, x_t, x0, prediction.x0, t, t - 0.02, 0.5).mean()
        share = model.loss(x0, eps, t, Conditioning()) - model.error(x0, eps, t, Conditioning())
    assert float(share.mean()) == pytest.approx(50 * float(kl))


def test_the_learned_schedule_follows_the_variance_of_the_estimate() -> None:
    """Its gradient is that of the mean of loss^2, written out, and the network's that of the mean loss."""
    noise = NoiseSchedule(NoiseScheduleConfig(kind="learned"))
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(16, 1, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.rand(16, dtype=torch.float64, generator=generator)
    net = Constant(torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=generator))
    model = Denoiser(net, noise, DenoiserConfig(weighting="bound"))
    assert model.gaps is not None
    model.loss(x0, eps, t, Conditioning()).mean().backward()
    got, of_net = model.gaps.grad, net.out.grad
    schedule = model.schedule
    alpha, sigma = (per_item(c, x0) for c in schedule.alpha_sigma(t))
    error = ((net.out - (alpha * eps - sigma * x0)) ** 2).flatten(1).mean(1)
    loss = schedule.bound_weight(t) * (alpha**2).flatten() * error
    (wanted,) = torch.autograd.grad((loss**2).mean() / loss.mean().detach(), model.gaps, retain_graph=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(of_net, torch.autograd.grad(loss.mean(), net.out)[0])
