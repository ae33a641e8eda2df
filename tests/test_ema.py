"""Averages of weights against their definitions, what the interval costs, resuming, sharded modules."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import integrate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from training.ema import Ema, EmaConfig, average_name, decay, power_decay, power_exponent

BATCH = 16


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double()


def wandering(module: nn.Module, steps: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Moves the weights at random, a step each time; yields them as one vector."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in module.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator) + 0.05
        yield flat(module)


def test_what_is_not_trained_keeps_its_bits() -> None:
    """-0 averaged with itself would be 0, and the digest of an encoder that a decoder was trained beside another."""
    module = nn.Linear(2, 2)
    nn.init.constant_(module.bias, -0.0)
    module.bias.requires_grad_(False)
    ema = Ema(module, EmaConfig(halflife_images=BATCH, powers=(0.1,)))
    for k, _ in enumerate(wandering(nn.ParameterList([module.weight]), 20)):
        ema.update(module, BATCH * (k + 1), BATCH)
    for average in ema.averages.values():
        assert average.bias.signbit().all()
        assert not torch.equal(average.weight, module.weight)


def training(steps: int) -> Iterator[nn.Module]:
    """A short real training of a tiny U-Net on four latents; yields it after every step."""
    # here, because the processes of the sharded test import this file and need none of it
    from ldm.conditioning import Conditioning
    from ldm.denoiser import DenoiserConfig
    from ldm.models.unet import UNetConfig, UNetShape
    from ldm.noise import NoiseScheduleConfig
    from pipelines.stage import build_denoiser
    from training.optim import OptimConfig, build_optimizer

    unet = UNetConfig(widths=(8, 16), layers_per_block=1, attention=(False, True), heads=2, norm_groups=4)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    denoiser = build_denoiser(unet, NoiseScheduleConfig(), DenoiserConfig(), UNetShape(4, 16))
    latents, text = (torch.randn(4, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16)))
    optimizer = build_optimizer(OptimConfig(lr=2e-3), denoiser.parameters())
    for _ in range(steps):
        t = denoiser.schedule.draw_t(torch.rand(4, generator=generator))
        eps = torch.randn(latents.shape, generator=generator)
        denoiser.loss(latents, eps, t, Conditioning(text)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield denoiser


def test_averages_are_copies_by_name_that_nothing_trains() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    ema = Ema(module, EmaConfig(powers=(0.05, 0.1)))
    assert list(ema.averages) == ["ema", "ema-0.05", "ema-0.1"]
    assert ema.module is ema.averages["ema"]
    for average in ema.averages.values():
        assert not any(m.training for m in average.modules())
        assert not any(p.requires_grad for p in average.parameters())
        assert torch.equal(flat(average), flat(module))
        assert all(a is not b for a, b in zip(average.parameters(), module.parameters(), strict=True))


def test_halflife_average_is_its_definition() -> None:
    """The weights of step i count (1 - d_i) d_(i+1) ... d_n, d the half-life's, shorter in the first images."""
    module = nn.Linear(3, 2)
    first, halflife, steps = flat(module), 300, 150
    ema = Ema(module, EmaConfig(halflife))
    path = []
    for number, weights in enumerate(wandering(module, steps), start=1):
        path.append(weights)
        ema.update(module, number * BATCH, BATCH)
    expected, share = torch.zeros_like(first), 1.0
    for number in range(steps, 0, -1):
        d = 2 ** -(BATCH / min(halflife, 0.05 * number * BATCH))
        expected += share * (1 - d) * path[number - 1]
        share *= d
    torch.testing.assert_close(flat(ema.module), expected + share * first, rtol=1e-5, atol=1e-5)
    assert share < 1e-3


@pytest.mark.parametrize("every", [1, 4])
def test_power_averages_are_their_definition(every: int) -> None:
    """The integral of the profile times the path, whose weights hold from one application to the next."""
    module = nn.Linear(3, 2)
    config = EmaConfig(powers=(0.05, 0.1, 0.2), every_steps=every)
    ema = Ema(module, config)
    path = []
    for number, weights in enumerate(wandering(module, 80), start=1):
        path.append(weights)
        ema.update(module, number * BATCH, BATCH)
    edges = torch.arange(0, 81, every, dtype=torch.float64) / 80
    seen = torch.stack(path[every - 1 :: every])
    for power in config.powers:
        shares = (edges ** (power_exponent(power) + 1)).diff()
        torch.testing.assert_close(flat(ema.averages[average_name(power)]), shares @ seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("power", [0.01, 0.05, 0.1, 0.25])
def test_sigma_rel_is_the_spread_of_the_profile(power: float) -> None:
    gamma = power_exponent(power)

    def moment(n: int) -> float:
        return float(integrate.quad(lambda t: (gamma + 1) * t ** (gamma + n), 0, 1, points=[0.9, 0.99])[0])

    assert math.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(power, rel=1e-6)
    assert gamma > 0


def test_power_decays_of_steps_multiply_to_that_of_all() -> None:
    product = math.prod(power_decay(images, BATCH, 0.1) for images in range(20 * BATCH, 30 * BATCH + 1, BATCH))
    assert product == pytest.approx(power_decay(30 * BATCH, 11 * BATCH, 0.1), rel=1e-12)
    assert power_decay(BATCH, BATCH, 0.1) == 0


def test_interval_keeps_the_share_of_the_past() -> None:
    """Of weights that stay, averages of any interval are the same, in the ramp as well."""
    averages = []
    for every in (1, 2, 8):
        module = nn.Linear(2, 2)
        nn.init.zeros_(module.weight)
        ema = Ema(module, EmaConfig(200, every_steps=every))
        for step in range(33, 41):  # from 32 steps of zeros on
            nn.init.ones_(module.weight)
            ema.update(module, step * BATCH, BATCH)
        averages.append(float(ema.module.weight[0, 0].detach()))  # type: ignore[index, union-attr]
    assert averages[1:] == pytest.approx([averages[0]] * 2, rel=1e-5)
    assert 0.5 < averages[0] < 0.999


def test_applies_every_so_many_steps_and_what_is_left_at_the_end() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, EmaConfig(every_steps=4))
    applied = [ema.update(module, step * BATCH, BATCH, final=step == 11) for step in range(1, 12)]
    assert applied == [0, 0, 0, 64, 0, 0, 0, 64, 0, 0, 48]
    ema = Ema(module, EmaConfig(every_steps=4))
    assert [ema.update(module, step * BATCH, BATCH, final=step == 4) for step in range(1, 5)] == [0, 0, 0, 64]


def test_resumed_averages_are_the_same_bits() -> None:
    config = EmaConfig(500, (0.1,), every_steps=4)
    module = nn.Linear(3, 2)
    straight = Ema(module, config)
    resumed = Ema(module, config)
    for number, _ in enumerate(wandering(module, 30), start=1):
        straight.update(module, number * BATCH, BATCH, final=number == 30)
        resumed.update(module, number * BATCH, BATCH, final=number == 30)
        if number == 14:  # between two applications
            saved = {name: average.state_dict() for name, average in resumed.averages.items()}
            resumed = Ema(nn.Linear(3, 2), config)
            for name, average in resumed.averages.items():
                average.load_state_dict(saved[name])
    for name, average in straight.averages.items():
        assert torch.equal(flat(average), flat(resumed.averages[name]))


@pytest.mark.slow
def test_deviation_of_longer_intervals_in_a_real_training() -> None:
    """Over the distance of the average from the weights: the average's weights are (every - 1) / 2 steps younger
    than those of every step, of a mean age of halflife / ln 2, here 8 / ln 2 steps."""
    steps, halflife = 160, 8
    emas: dict[int, Ema] = {}
    for number, module in enumerate(training(steps), start=1):
        for every in (1, 2, 4, 8):
            if number == 1:
                emas[every] = Ema(module, EmaConfig(halflife * BATCH, every_steps=every))
            emas[every].update(module, number * BATCH, BATCH, final=number == steps)
    reference, weights = flat(emas[1].module), flat(module)
    distance = (reference - weights).norm()
    assert distance > 1e-3 * weights.norm()
    deviations = {every: float((flat(emas[every].module) - reference).norm() / distance) for every in (2, 4, 8)}
    for every, deviation in deviations.items():
        younger = (every - 1) / 2 * math.log(2) / halflife
        assert 0.5 * younger < deviation < 1.3 * younger


def test_buffers_are_copied() -> None:
    module = nn.BatchNorm1d(2)
    ema = Ema(module, EmaConfig(every_steps=2))
    module(torch.randn(8, 2))
    ema.update(module, BATCH, BATCH)
    assert ema.module.num_batches_tracked == 0
    ema.update(module, 2 * BATCH, BATCH)
    assert ema.module.num_batches_tracked == 1
    assert torch.equal(ema.module.running_mean, module.running_mean)  # type: ignore[arg-type]


def test_snapshots_are_due_once_per_interval() -> None:
    config = EmaConfig(powers=(0.1,), every_steps=4, snapshot_every_images=100)
    due = [images for images in range(64, 641, 64) if config.snapshot_due(images, 64)]
    assert due == [128, 256, 320, 448, 512, 640]
    assert not config.snapshot_due(100, 0)
    assert not EmaConfig(powers=(0.1,)).snapshot_due(100, 100)


@pytest.mark.parametrize(
    "bad",
    [
        {"halflife_images": 0},
        {"every_steps": 0},
        {"powers": (0.05, 0.3)},
        {"powers": (0.0,)},
        {"powers": (0.1, 0.1)},
        {"snapshot_every_images": 100},
        {"snapshot_every_images": 0, "powers": (0.1,)},
    ],
)
def test_impossible_configs_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).partition("_")[0]):
        EmaConfig(**bad)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))


def train_sharded(rank: int, store: str, result: str) -> None:
    """Process `rank` of two: a sharded training with an evaluation of the sharded average after every step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    module = network()
    ema = Ema(module, EmaConfig(100, (0.1,), every_steps=2))
    for part in (module, *ema.averages.values()):
        for layer in (part[0], part[2]):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for step in range(1, 6):
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(module, step * BATCH, BATCH, final=step == 5)
        with torch.no_grad():
            ema.averages["ema-0.1"](x)
    held = next(ema.module.parameters())
    assert isinstance(held, DTensor)
    assert held.to_local().numel() < held.numel()
    whole = {
        name: {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in average.state_dict().items()}
        for name, average in ema.averages.items()
    }
    if rank == 0:
        save_file({f"{name}.{k}": v.contiguous() for name, state in whole.items() for k, v in state.items()}, result)
    torch.distributed.barrier()
    # gloo's threads live on after the group is destroyed (sharding holds it), and one that lets go of a tensor
    # while the interpreter goes down aborts the process
    os._exit(0)


def test_shards_average_to_the_same_as_the_whole(tmp_path: Path) -> None:
    store, result = str(tmp_path / "store"), str(tmp_path / "averages.safetensors")
    torch.multiprocessing.spawn(train_sharded, (store, result), nprocs=2)
    module = network()
    ema = Ema(module, EmaConfig(100, (0.1,), every_steps=2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for step in range(1, 6):
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(module, step * BATCH, BATCH, final=step == 5)
    sharded = load_file(result)
    for name, average in ema.averages.items():
        for key, value in average.state_dict().items():
            torch.testing.assert_close(sharded[f"{name}.{key}"], value, rtol=1e-5, atol=1e-6)


def test_decay_reaches_the_halflife() -> None:
    assert decay(10**6, 100, 100) == 0.5
    assert decay(1000, 50, 10**6) == 0.5
