"""The sequences lab: the mixture against integration, and a short training of its Transformer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ldm.config import UserError, load
from ldm.noise import NoiseSchedule, NoiseScheduleConfig
from tests.tiny import ROOT
from training import run
from training.sequences import Mixture, MixtureConfig, SequencesTask
from training.tasks import RunConfig, build_task

CONFIG = ROOT / "configs/labs/sequences.yaml"
SHORT = ["loop.batch=32", "loop.images=19200", "loop.save_every_images=9600",
         "loop.preview_every_images=9600", "loop.log_every_images=3200", "items=512", "mixture.length=16",
         "transformer.width=32", "transformer.layers=2", "optim.warmup_images=500",
         "ema.halflife_images=500"]  # fmt: skip


def test_the_density_is_that_of_torch() -> None:
    mixture = Mixture(MixtureConfig())
    each = Independent(Normal(mixture.means, torch.tensor(0.2, dtype=torch.float64)), 1)
    x = mixture.draw(torch.Generator().manual_seed(0), 50)
    wanted = MixtureSameFamily(Categorical(mixture.shares), each).log_prob(x[:, 0])
    torch.testing.assert_close(mixture.log_prob(x), wanted)
    assert mixture.shares.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_best_denoiser_is_the_score_of_the_noisy_density() -> None:
    """Tweedie: E[x0 | x_t] = (x_t + sigma^2 grad log p_t(x_t)) / alpha."""
    mixture, schedule = Mixture(MixtureConfig(length=8)), NoiseSchedule(NoiseScheduleConfig())
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(3, 1, 8, dtype=torch.float64, generator=generator)
    x = schedule.add_noise(mixture.draw(generator, 3), eps, t).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_weights(x, alpha, sigma).logsumexp(1).sum(), x)
    wanted = (x + (sigma**2).view(-1, 1, 1) * score) / alpha.view(-1, 1, 1)
    torch.testing.assert_close(mixture.denoise(x.detach(), alpha, sigma), wanted.detach())


def test_it_trains_resumes_and_comes_near_the_best(tmp_path: Path) -> None:
    final = run.train(CONFIG, tmp_path / "run", SHORT)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = (next(line for line in order if line["kind"] == "eval") for order in (lines, lines[::-1]))
    assert last["excess_t0.50"] < first["excess_t0.50"] / 2
    assert last["bound_bits_per_dim"] < first["bound_bits_per_dim"] - 1
    assert first["true_bits_per_dim"] == last["true_bits_per_dim"] < last["bound_bits_per_dim"]
    assert last["wrong_share"] < 0.5
    assert {p.name for p in final.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert (tmp_path / "run/samples/000009600.png").is_file()
    assert run.train(CONFIG, tmp_path / "run", SHORT, resume="must") == final


def test_samples_of_the_best_denoiser_have_the_right_shares() -> None:
    """The measure itself: with the closed form in the network's place nothing is left but chance."""
    task = build_task(load(RunConfig, CONFIG, ["items=64", "mixture.length=16"]))
    assert isinstance(task, SequencesTask)
    schedule = task.module.denoiser.schedule

    class Best(torch.nn.Module):
        """v = (alpha x_t - x0) / sigma where alpha^2 + sigma^2 = 1."""

        def forward(self, x: torch.Tensor, time: torch.Tensor, **_: object) -> object:
            alpha, sigma = schedule.alpha_sigma((time.double() + 1) / schedule.steps)
            x0 = task.mixture.denoise(x, alpha, sigma)
            v = (alpha[:, None, None] * x - x0) / sigma[:, None, None]
            return type("Out", (), {"sample": v.float()})

    task.module.denoiser.net = Best()
    task.module.denoiser.net.register_parameter("any", torch.nn.Parameter(torch.zeros(())))
    found = task.evaluate(task.module)
    assert all(found[f"excess_t{t}"] < 1e-5 for t in ("0.10", "0.30", "0.50", "0.70", "0.90"))
    assert found["wrong_share"] < 0.07
    assert 0 < found["bound_bits_per_dim"] - found["true_bits_per_dim"] < 1.5
    assert math.isfinite(found["true_bits_per_dim"])


def test_a_rehearsal_and_shapes_work_and_encoding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["transformer.width=16", "transformer.layers=1", "mixture.length=8"]
    run.train(CONFIG, tmp_path / "run", small, dry_run=True)
    assert "dry run: config, at most 64 items" in capsys.readouterr().out
    assert "sequences of 32" in run.shapes(CONFIG)
    for refused in (run.encode, run.plan):
        with pytest.raises(UserError, match="there is nothing to encode"):
            refused(CONFIG)
    assert list(tmp_path.iterdir()) == []
