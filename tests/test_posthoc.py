"""Averages made after training: the solver against numerical integrals, the result against its definition."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import integrate, optimize
from torch import nn

from ldm.config import UserError
from training.ema import Ema, EmaConfig, power_exponent
from training.posthoc import coefficients, combine, list_snapshots, profile_products, save_snapshots

BATCH = 8
STEPS = 800


def profile(images: float, power: float, t: np.ndarray) -> np.ndarray:
    gamma = power_exponent(power)
    return np.where(t <= images, (gamma + 1) * t**gamma / images ** (gamma + 1), 0.0)


class Path64:
    """The weights of a real training after every step, in float64, and averages of them by definition."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def note(self, module: nn.Module) -> None:
        self.rows.append(torch.cat([p.detach().flatten() for p in module.parameters()]).double())

    def average(self, power: float, steps: int = STEPS) -> torch.Tensor:
        """The integral of the profile times the path, where the weights of step i hold from step i - 1 to i."""
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        return (edges ** (power_exponent(power) + 1)).diff() @ torch.stack(self.rows[:steps])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path64, Ema]:
    """A small network taught by another, with snapshots of two lengths, 20 times in the run."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net, teacher = (nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4)) for _ in range(2))
    net.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    config = EmaConfig(powers=(0.05, 0.1), snapshot_every_images=STEPS * BATCH // 20)
    ema, path = Ema(net, config), Path64()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        x = torch.randn(BATCH, 8, generator=generator)
        (net(x) - teacher(x).detach()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        net.steps += 1  # type: ignore[operator]
        path.note(net)
        applied = ema.update(net, step * BATCH, BATCH)
        if config.snapshot_due(step * BATCH, applied):
            save_snapshots(run, ema, step * BATCH)
    return run, path, ema


def vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    return torch.cat([tensors[name].double().flatten() for name in names])


def test_products_are_the_integrals_of_the_profiles() -> None:
    kept = [(t, p) for t in (200, 500, 1000) for p in (0.03, 0.1, 0.25)]
    products = profile_products(kept, kept)
    for i, a in enumerate(kept):
        for j, b in enumerate(kept):
            end = min(a[0], b[0])
            expected = integrate.quad(
                lambda t, a=a, b=b: float(profile(*a, t) * profile(*b, t)), 0, end, points=[0.8 * end, 0.95 * end]
            )[0]
            assert products[i, j] == pytest.approx(expected, rel=1e-6)
    assert np.linalg.eigvalsh(products).min() > 0


def test_factors_are_the_least_squares_fit_of_the_sampled_profiles() -> None:
    """Against a constrained minimisation over profiles on a fine grid, which knows no closed form."""
    kept = [(t, p) for t in (250, 500, 750, 1000) for p in (0.05, 0.1)]
    factors, misfit = coefficients(kept, (1000, 0.07))
    t = (np.arange(20_000) + 0.5) / 20
    columns = np.stack([profile(*k, t) for k in kept], axis=1)
    target = profile(1000, 0.07, t)
    # sum to one: the last factor is one less the others
    free = optimize.lsq_linear(columns[:, :-1] - columns[:, -1:], target - columns[:, -1]).x
    np.testing.assert_allclose(factors, [*free, 1 - free.sum()], atol=2e-3)
    off = np.linalg.norm(columns @ factors - target) / np.linalg.norm(target)
    assert misfit == pytest.approx(off, rel=1e-2)


def test_a_kept_average_is_itself() -> None:
    kept = [(t, p) for t in (250, 500, 1000) for p in (0.05, 0.1)]
    factors, misfit = coefficients(kept, (1000, 0.1))
    np.testing.assert_allclose(factors, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert misfit < 1e-6


@pytest.mark.parametrize("length", [0.04, 0.07, 0.15, 0.2])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_other_lengths_are_those_of_the_path(trained: tuple[Path, Path64, Ema], length: float, share: float) -> None:
    run, path, _ = trained
    steps = int(STEPS * share)
    got = vector(combine(run, length, steps * BATCH))
    expected = path.average(length, steps)
    error = float((got - expected).norm() / expected.norm())
    other = float((path.average(0.1, steps) - expected).norm() / expected.norm())
    assert error < 2e-3
    assert error < other / 10


def test_counters_and_names_are_those_of_the_module(trained: tuple[Path, Path64, Ema]) -> None:
    run, _, ema = trained
    got = combine(run, 0.07)
    assert got["steps"] == STEPS
    assert got.keys() == ema.module.state_dict().keys()
    ema.averages["ema-0.1"].load_state_dict(got)


def test_snapshots_hold_the_averages_in_half_precision(trained: tuple[Path, Path64, Ema]) -> None:
    run, path, _ = trained
    found = list_snapshots(run)
    assert list(found) == [(t, p) for t in range(320, 6401, 320) for p in (0.05, 0.1)]
    stored = load_file(found[6400, 0.1])
    assert stored["0.weight"].dtype == torch.float16
    expected = path.average(0.1)
    assert float((vector(stored) - expected).norm() / expected.norm()) < 3e-4


def test_full_disk_is_an_os_error_and_leaves_no_part(
    trained: tuple[Path, Path64, Ema], tmp_path: Path
) -> None:
    """The limit on a file's size stands in for the disk's."""
    _, _, ema = trained
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        with pytest.raises(OSError, match=r"0\.05\.safetensors"):
            save_snapshots(tmp_path, ema, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list((tmp_path / "snapshots").iterdir())


def test_what_does_not_follow_from_the_snapshots_is_refused(trained: tuple[Path, Path64, Ema], tmp_path: Path) -> None:
    run = trained[0]
    with pytest.raises(UserError, match=r"length 0\.01 does not follow from the 40 snapshots.*0\.05, 0\.1"):
        combine(run, 0.01)
    with pytest.raises(UserError, match="no snapshot was taken after 1000 images; the nearest is at 960"):
        combine(run, 0.1, 1000)
    with pytest.raises(UserError, match="between 0 and"):
        combine(run, 0.5)
    with pytest.raises(UserError, match="holds no snapshots"):
        combine(tmp_path, 0.1)


def test_damaged_and_foreign_snapshots_are_named(trained: tuple[Path, Path64, Ema], tmp_path: Path) -> None:
    shutil.copytree(trained[0] / "snapshots", tmp_path / "snapshots")
    path = list_snapshots(tmp_path)[3200, 0.05]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"000000003200-0\.05\.safetensors: not a whole snapshot"):
        combine(tmp_path, 0.07)
    tensors = load_file(list_snapshots(trained[0])[3200, 0.05])
    save_file({**tensors, "0.weight": tensors["0.weight"][1:]}, path)
    with pytest.raises(UserError, match="not a whole snapshot"):
        combine(tmp_path, 0.07)
    save_file({"0.weight": tensors["0.weight"]}, path)
    with pytest.raises(UserError, match="other tensors"):
        combine(tmp_path, 0.07)
    path.write_bytes(whole)
    (tmp_path / "snapshots/000000003200-0.05.safetensors.tmp-01234567").write_bytes(b"")
    assert list_snapshots(tmp_path).keys() == list_snapshots(trained[0]).keys()
    assert combine(tmp_path, 0.07).keys() == tensors.keys()
