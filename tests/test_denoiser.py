"""Targets and their inverses, loss weights, the denoiser around a real network, classifier-free guidance."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.training_utils import compute_snr

from ldm.conditioning import Conditioning
from ldm.denoiser import Denoiser, DenoiserConfig, Target, Uncertainty, from_output, loss_weight, to_target
from ldm.guidance import ClassifierFreeGuidance
from ldm.noise import NoiseSchedule, NoiseScheduleConfig
from training.optim import OptimConfig, build_optimizer

TARGETS: tuple[Target, ...] = tuple(t for t in get_args(Target) if t != "mean")  # which tests/test_matrix.py has
SCHEDULES = ("linear", "cosine", "flow")


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """alpha, sigma (N, 1): the two families in use, pairs that belong to none, and alpha = 1 (EDM)."""
    angle = torch.linspace(0, math.pi / 2, 41, dtype=torch.float64)[1:-1]
    t = torch.linspace(0, 1, 41, dtype=torch.float64)[1:-1]
    free = 10 ** (2 * torch.rand(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1)
    alpha = torch.cat([angle.cos(), 1 - t, free[0], torch.ones(40, dtype=torch.float64)])
    sigma = torch.cat([angle.sin(), t, free[1], free[1]])
    return alpha.view(-1, 1), sigma.view(-1, 1)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    ).double()


def make(net: UNet2DConditionModel, kind: str = "cosine", **options: object) -> Denoiser:
    return Denoiser(net, NoiseSchedule(NoiseScheduleConfig(kind=kind)), DenoiserConfig(**options))


def text(count: int, seed: int, masked: bool = False) -> Conditioning:
    mask = torch.tensor([True, True, True, False, False]).expand(count, 5) if masked else None
    return Conditioning(text=gaussian(count, 5, 6, seed=seed), text_mask=mask)


T3 = torch.tensor([0.02, 0.5, 0.97], dtype=torch.float64)


@pytest.mark.parametrize("kind", TARGETS)
def test_round_trip(kind: Target) -> None:
    alpha, sigma = pairs()
    x0, eps = gaussian(len(alpha), 7, seed=1), gaussian(len(alpha), 7, seed=2)
    x = alpha * x0 + sigma * eps
    got_x0, got_eps = from_output(kind, to_target(kind, x0, eps, alpha, sigma), x, alpha, sigma)
    torch.testing.assert_close(got_x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(got_eps, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "alpha", "sigma"),
    [
        ("eps", 1.0, 0.0),
        ("x0", 0.0, 1.0),
        ("v", 1.0, 0.0),
        ("v", 0.0, 1.0),
        ("flow", 1.0, 0.0),
        ("flow", 0.0, 1.0),
    ],
)
def test_round_trip_at_the_ends_where_defined(kind: Target, alpha: float, sigma: float) -> None:
    a, s = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    x0, eps = gaussian(4, 7, seed=1), gaussian(4, 7, seed=2)
    out = to_target(kind, x0, eps, a, s)
    got_x0, got_eps = from_output(kind, out, a * x0 + s * eps, a, s)
    torch.testing.assert_close(got_x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(got_eps, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_parameterisation_of_one_denoiser_gives_its_x0(kind: Target) -> None:
    """The exact denoiser of N(0.3, 0.5^2 I) by conjugacy; x is any point, not made from known x0 and eps."""
    alpha, sigma = pairs()
    x = 2 * gaussian(len(alpha), 7, seed=3)
    x0 = 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.3)
    eps = sigma / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.3)
    got_x0, got_eps = from_output(kind, to_target(kind, x0, eps, alpha, sigma), x, alpha, sigma)
    torch.testing.assert_close(got_x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(got_eps, eps, rtol=0, atol=1e-10)


def test_v_is_the_velocity_of_diffusers() -> None:
    schedule = NoiseSchedule(NoiseScheduleConfig(kind="cosine"))
    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod = schedule.abar
    k = torch.tensor([0, 10, 500, 998, 999])
    x0, eps = gaussian(5, 3, 2, seed=1), gaussian(5, 3, 2, seed=2)
    alpha, sigma = (c.view(-1, 1, 1) for c in schedule.alpha_sigma((k.double() + 1) / 1000))
    expected = scheduler.get_velocity(x0, eps, k)
    torch.testing.assert_close(to_target("v", x0, eps, alpha, sigma), expected, rtol=0, atol=1e-10)


def test_flow_target_is_the_slope_of_the_path() -> None:
    x0, eps = gaussian(2, 3, seed=1), gaussian(2, 3, seed=2)
    t = torch.tensor(0.3, dtype=torch.float64)
    path = [(1 - u) * x0 + u * eps for u in (t - 1e-3, t + 1e-3)]
    slope = (path[1] - path[0]) / 2e-3
    torch.testing.assert_close(to_target("flow", x0, eps, 1 - t, t), slope, rtol=0, atol=1e-10)


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """With diffusers' SNR, as in its training scripts: min(SNR, 5) over SNR for eps, over SNR + 1 for v."""
    schedule = NoiseSchedule(NoiseScheduleConfig(kind="cosine"))
    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod = schedule.abar
    k = torch.arange(1000)
    snr = compute_snr(scheduler, k).double()
    alpha, sigma = schedule.alpha_sigma((k.double() + 1) / 1000)
    for target, over in (("eps", snr), ("x0", torch.ones(1000)), ("v", snr + 1)):
        weight = loss_weight(DenoiserConfig(target=target, weighting="min_snr"), alpha, sigma)
        torch.testing.assert_close(weight, snr.clamp(max=5) / over, rtol=1e-4, atol=0)
    for weighting in ("simple", "learned"):
        assert (loss_weight(DenoiserConfig(weighting=weighting), alpha, sigma) == 1).all()


@pytest.mark.parametrize("kind", TARGETS)
def test_min_snr_weights_are_finite_at_both_ends(kind: Target) -> None:
    ends = torch.tensor([1 - 1e-9, 0.0], dtype=torch.float64)  # t = 0 itself is never drawn
    weight = loss_weight(DenoiserConfig(target=kind, weighting="min_snr"), ends, 1 - ends)
    assert weight.tolist() == pytest.approx({"eps": [0, 1], "x0": [5, 0], "v": [0, 0], "flow": [0, 0]}[kind], abs=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_loss_of_an_exact_conversion_agrees_across_targets(gamma: float) -> None:
    alpha, sigma = pairs()
    x0, eps, guess = (gaussian(len(alpha), 7, seed=i) for i in (1, 2, 3))
    x = alpha * x0 + sigma * eps
    guessed_eps = (x - alpha * guess) / sigma
    expected = (alpha / sigma).square().clamp(max=gamma).squeeze(1) * (guess - x0).square().mean(1)
    for kind in TARGETS:
        error = to_target(kind, guess, guessed_eps, alpha, sigma) - to_target(kind, x0, eps, alpha, sigma)
        config = DenoiserConfig(target=kind, weighting="min_snr", min_snr_gamma=gamma)
        loss = loss_weight(config, alpha.squeeze(1), sigma.squeeze(1)) * error.square().mean(1)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_the_weighted_error_of_what_forward_returns(
    unet: UNet2DConditionModel, kind: str, target: Target
) -> None:
    denoiser = make(unet, kind, target=target, weighting="min_snr", input_scale="unit")
    x0, eps, cond = gaussian(3, 3, 8, 8, seed=1), gaussian(3, 3, 8, 8, seed=2), text(3, 3)
    with torch.no_grad():
        loss = denoiser.loss(x0, eps, T3, cond)
        x_t = denoiser.schedule.add_noise(x0, eps, T3)
        prediction = denoiser(x_t, T3, cond)
    alpha, sigma = denoiser.schedule.alpha_sigma(T3)
    expected = (alpha / sigma).square().clamp(max=5) * (prediction.x0 - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-12)
    rebuilt = alpha.view(-1, 1, 1, 1) * prediction.x0 + sigma.view(-1, 1, 1, 1) * prediction.eps
    torch.testing.assert_close(rebuilt, x_t, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighting", ["simple", "min_snr", "learned"])
@pytest.mark.parametrize("target", TARGETS)
def test_error_is_that_of_the_target_whatever_the_weighting(
    unet: UNet2DConditionModel, target: Target, weighting: str
) -> None:
    denoiser = make(unet, target=target, weighting=weighting)
    x0, eps, cond = gaussian(3, 3, 8, 8, seed=1), gaussian(3, 3, 8, 8, seed=2), text(3, 3)
    with torch.no_grad():
        error = denoiser.error(x0, eps, T3, cond)
        prediction = denoiser(denoiser.schedule.add_noise(x0, eps, T3), T3, cond)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in denoiser.schedule.alpha_sigma(T3))
    difference = {
        "eps": prediction.eps - eps,
        "x0": prediction.x0 - x0,
        "v": alpha * (prediction.eps - eps) - sigma * (prediction.x0 - x0),
        "flow": (prediction.eps - eps) - (prediction.x0 - x0),
    }[target]
    torch.testing.assert_close(error, difference.square().mean((1, 2, 3)), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("weighting", ["simple", "min_snr", "learned"])
@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_float32_per_item_with_gradients(
    unet: UNet2DConditionModel, target: Target, weighting: str
) -> None:
    net = UNet2DConditionModel.from_config(unet.config)
    denoiser = make(net, target=target, weighting=weighting)
    x0, eps = gaussian(3, 3, 8, 8, seed=1).float(), gaussian(3, 3, 8, 8, seed=2).float()
    loss = denoiser.loss(x0, eps, T3, text(3, 3, masked=True))
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    gradients = [p.grad for p in denoiser.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


class Proportional(torch.nn.Module):
    """A network whose output is its input times `factor`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> UNet2DConditionOutput:
        return UNet2DConditionOutput(sample=self.factor * x)


@pytest.mark.parametrize("kind", ["cosine", "flow"])
@pytest.mark.parametrize("target", TARGETS)
def test_learned_weighting_learns_the_log_of_the_mean_error(target: Target, kind: str) -> None:
    """x0 ~ N(0, 0.5^2) and a network that gives 0.7 x_t: the mean error of each target follows by arithmetic."""
    denoiser = Denoiser(
        Proportional(0.7),  # type: ignore[arg-type]
        NoiseSchedule(NoiseScheduleConfig(kind=kind)),
        DenoiserConfig(target=target, weighting="learned"),
    )
    assert denoiser.uncertainty is not None
    optimizer = build_optimizer(OptimConfig(lr=0.02, weight_decay=1.0), denoiser.parameters())
    generator = torch.Generator().manual_seed(0)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 600)
        t = denoiser.schedule.draw_t((torch.arange(256) + torch.rand(256, generator=generator)) / 256)
        x0, eps = 0.5 * torch.randn(256, 8, generator=generator), torch.randn(256, 8, generator=generator)
        denoiser.loss(x0, eps, t, Conditioning()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    t = torch.linspace(0.1, 0.9, 17, dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    # the target is a x0 + b eps
    a, b = {"eps": (0 * t, 1 + 0 * t), "x0": (1 + 0 * t, 0 * t), "v": (-sigma, alpha), "flow": (-1 + 0 * t, 1 + 0 * t)}[
        target
    ]
    r = torch.sqrt(alpha**2 + sigma**2) if target == "v" else 1
    mean = 0.25 * (a / r - 0.7 * alpha) ** 2 + (b / r - 0.7 * sigma) ** 2
    assert mean.max() > 1.5 * mean.min()
    with torch.no_grad():
        u = denoiser.uncertainty(denoiser.schedule.log_snr(t))
    torch.testing.assert_close(u.double(), mean.log(), rtol=0, atol=0.12)


def test_learned_weighting_begins_as_simple_and_gives_the_network_its_gradients(unet: UNet2DConditionModel) -> None:
    x0, eps, cond = gaussian(3, 3, 8, 8, seed=1), gaussian(3, 3, 8, 8, seed=2), text(3, 3)
    grads = []
    for weighting in ("simple", "learned"):
        unet.zero_grad()
        loss = make(unet, weighting=weighting).loss(x0, eps, T3, cond)
        loss.sum().backward()
        grads += [loss.detach(), unet.conv_out.weight.grad.clone()]  # type: ignore[union-attr]
    unet.zero_grad()
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_uncertainty_is_part_of_the_learned_weighting_only(unet: UNet2DConditionModel) -> None:
    before = torch.random.get_rng_state()
    denoiser = make(unet, weighting="learned")
    assert torch.equal(torch.random.get_rng_state(), before)  # the network's weights do not depend on it
    own = dict(denoiser.named_parameters()).keys() - {f"net.{n}" for n, _ in unet.named_parameters()}
    assert own == {"uncertainty.weight"}
    assert make(unet).uncertainty is None
    assert set(make(unet).state_dict()) == {f"net.{n}" for n in unet.state_dict()}


def test_uncertainty_is_finite_smooth_and_not_decayed() -> None:
    uncertainty, other = Uncertainty(), Uncertainty()
    assert all(torch.equal(a, b) for a, b in zip(uncertainty.buffers(), other.buffers(), strict=True))
    ends = torch.tensor([-math.inf, -20.0, 20.0, math.inf], dtype=torch.float64)
    torch.nn.init.ones_(uncertainty.weight)
    at_ends = uncertainty(ends)
    assert at_ends.isfinite().all()
    assert at_ends[0] == at_ends[1]
    assert at_ends[2] == at_ends[3]
    u = uncertainty(torch.tensor([0.0, 3.0]))
    norms = [torch.autograd.grad(value, uncertainty.weight, retain_graph=True)[0].norm() for value in u]
    assert all(0.8 < float(norm) < 1.2 for norm in norms)
    decays = [g["weight_decay"] for g in build_optimizer(OptimConfig(), uncertainty.parameters()).param_groups]
    assert decays == [0.0]


@pytest.mark.parametrize("scale", ["none", "unit"])
def test_the_network_sees_the_scaled_input_and_its_own_time(unet: UNet2DConditionModel, scale: str) -> None:
    denoiser = make(unet, "flow", target="v", input_scale=scale)
    x, cond = gaussian(3, 3, 8, 8, seed=1), text(3, 3)
    r = torch.sqrt((1 - T3) ** 2 + T3**2).view(-1, 1, 1, 1)
    with torch.no_grad():
        v = unet(x / r if scale == "unit" else x, T3 * 1000, encoder_hidden_states=cond.text).sample
        got = denoiser(x, T3, cond)
    a, s = (1 - T3).view(-1, 1, 1, 1), T3.view(-1, 1, 1, 1)
    torch.testing.assert_close(got.x0, (a * x - s * r * v) / r**2, rtol=0, atol=1e-6)


def test_v_on_alpha_one_with_unit_input_is_edm_preconditioning() -> None:
    """Karras et al. 2022, table 1, sigma_data = 1: D = c_skip x + c_out F, up to the sign of F."""
    sigma = torch.tensor([0.01, 0.7, 30.0], dtype=torch.float64).view(-1, 1)
    x, out = gaussian(3, 5, seed=1), gaussian(3, 5, seed=2)
    skip, scale = 1 / (sigma**2 + 1), sigma / torch.sqrt(sigma**2 + 1)
    x0, _ = from_output("v", out, x, torch.ones_like(sigma), sigma)
    torch.testing.assert_close(x0, skip * x - scale * out, rtol=1e-12, atol=1e-12)


def test_clipping_bounds_x0_and_eps_follows(unet: UNet2DConditionModel) -> None:
    x, cond = 3 * gaussian(3, 3, 8, 8, seed=1), text(3, 3)
    with torch.no_grad():
        free = make(unet, target="v")(x, T3, cond)
        clipped = make(unet, target="v", clip_x0=0.5)(x, T3, cond)
    assert free.x0.abs().max() > 0.5
    torch.testing.assert_close(clipped.x0, free.x0.clamp(-0.5, 0.5))
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in NoiseSchedule(NoiseScheduleConfig()).alpha_sigma(T3))
    torch.testing.assert_close(alpha * clipped.x0 + sigma * clipped.eps, x, rtol=0, atol=1e-10)


def test_masked_tokens_do_not_matter(unet: UNet2DConditionModel) -> None:
    x, cond = gaussian(3, 3, 8, 8, seed=1), text(3, 3, masked=True)
    assert cond.text is not None
    other = cond.text.clone()
    other[:, 3:] += 100
    denoiser = make(unet)
    with torch.no_grad():
        same = denoiser(x, T3, Conditioning(other, cond.text_mask)).x0
        torch.testing.assert_close(denoiser(x, T3, cond).x0, same, rtol=0, atol=1e-12)
        assert not torch.allclose(denoiser(x, T3, Conditioning(other)).x0, same, atol=1e-6)


def test_half_precision_networks_give_float32(unet: UNet2DConditionModel) -> None:
    net = UNet2DConditionModel.from_config(unet.config)
    net.load_state_dict(unet.state_dict())
    x, cond = gaussian(3, 3, 8, 8, seed=1), text(3, 3)
    with torch.no_grad():
        exact = make(unet)(x, T3, cond).x0
        got = make(net.bfloat16())(x.float(), T3, cond).x0
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("bad", [{"clip_x0": 0.0}, {"min_snr_gamma": -1.0}])
def test_impossible_configs_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        DenoiserConfig(**bad)


def test_guidance_scale_one_is_the_denoiser(unet: UNet2DConditionModel) -> None:
    denoiser, x, cond = make(unet), gaussian(3, 3, 8, 8, seed=1), text(3, 3)
    calls: list[int] = []
    handle = unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    with torch.no_grad():
        guided = ClassifierFreeGuidance(denoiser, 1.0, text(1, 4))(x, T3, cond)
        plain = denoiser(x, T3, cond)
        ClassifierFreeGuidance(denoiser, 2.0, text(1, 4))(x, T3, cond)
    handle.remove()
    assert torch.equal(guided.x0, plain.x0)
    assert torch.equal(guided.eps, plain.eps)
    assert calls == [3, 3, 6]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("scale", "nulls"), [(0.0, 1), (4.5, 1), (7.0, 3)])
def test_guidance_combines_eps(unet: UNet2DConditionModel, target: Target, scale: float, nulls: int) -> None:
    denoiser, x, cond, null = (
        make(unet, target=target),
        gaussian(3, 3, 8, 8, seed=1),
        text(3, 3),
        text(nulls, 4),
    )
    with torch.no_grad():
        guided = ClassifierFreeGuidance(denoiser, scale, null)(x, T3, cond)
        eps_cond = denoiser(x, T3, cond).eps
        eps_null = denoiser(x, T3, null.expand(3) if nulls == 1 else null).eps
    expected = scale * eps_cond + (1 - scale) * eps_null
    torch.testing.assert_close(guided.eps, expected, rtol=1e-9, atol=1e-9)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in denoiser.schedule.alpha_sigma(T3))
    torch.testing.assert_close(guided.x0, (x - sigma * expected) / alpha, rtol=1e-8, atol=1e-8)


def test_guidance_clips_the_combination_only(unet: UNet2DConditionModel) -> None:
    x, cond, null = 3 * gaussian(3, 3, 8, 8, seed=1), text(3, 3), text(1, 4)
    with torch.no_grad():
        free = ClassifierFreeGuidance(make(unet), 5.0, null)(x, T3, cond)
        clipped = ClassifierFreeGuidance(make(unet, clip_x0=0.5), 5.0, null)(x, T3, cond)
    torch.testing.assert_close(clipped.x0, free.x0.clamp(-0.5, 0.5))
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in NoiseSchedule(NoiseScheduleConfig()).alpha_sigma(T3))
    torch.testing.assert_close(alpha * clipped.x0 + sigma * clipped.eps, x, rtol=0, atol=1e-10)
