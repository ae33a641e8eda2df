"""The benchmark: counted FLOPs against hand counts, and every section once on the tiny configs."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from training import bench, bench_levers, bench_tools
from training.bench_tools import Setup, Table, counted_flops


def both_ways(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOPs of forward, and of backward down to x."""
    out, forward = counted_flops(lambda: module(x.requires_grad_()))
    return forward, counted_flops(out.sum().backward)[1]


class TestCountedFlops:
    def test_convolution(self) -> None:
        forward = 2 * (2 * 10 * 9) * 8 * (3 * 3 * 5)  # per output value a multiplication and an addition per weight
        conv = nn.Conv2d(3, 8, (3, 5), padding=(1, 2))
        assert both_ways(conv, torch.randn(2, 3, 10, 9)) == (forward, 2 * forward)

    def test_linear(self) -> None:
        assert both_ways(nn.Linear(7, 11), torch.randn(5, 7)) == (2 * 5 * 7 * 11, 2 * 2 * 5 * 7 * 11)

    @pytest.mark.parametrize("masked", [False, True])
    def test_attention_of_torch_on_a_cpu(self, masked: bool) -> None:
        q, k, v = (torch.randn(2, 4, length, 8, requires_grad=True) for length in (16, 20, 20))
        mask = torch.zeros(2, 1, 1, 20) if masked else None
        one = 2 * (2 * 4) * 16 * 20 * 8  # q k^T, and as much for the product with v
        out, forward = counted_flops(lambda: scaled_dot_product_attention(q, k, v, mask))
        assert forward == 2 * one
        # q k^T once more, then the gradients of weights, v, q and k
        assert counted_flops(out.sum().backward)[1] == 5 * one

    def test_attention_layer_of_the_networks(self) -> None:
        layer = Attention(query_dim=16, heads=2, dim_head=8)
        linear = 4 * 2 * (3 * 12) * 16 * 16  # q, k, v and output
        one = 2 * (3 * 2) * 12 * 12 * 8
        assert both_ways(layer, torch.randn(3, 12, 16)) == (linear + 2 * one, 2 * linear + 5 * one)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """The tiny configs on six pictures, the diffusion stages with a tiny text encoder."""
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, source in (("autoencoder", "autoencoder"), ("base", "base_t5"), ("sr", "sr")):
        shutil.copy(f"configs/tiny/{source}.yaml", configs / f"{name}.yaml")
    sr = configs / "sr.yaml"
    sr.write_text(sr.read_text().replace("kind: minilm", "kind: t5\n  path: tests/data/text/t5"))
    small = ("data.limit=6", "loop.batch=4")
    return Setup(str(tmp_path), quick=True, configs=str(configs), init=None, overrides=small)


def test_setup_travels_as_json(setup: Setup) -> None:
    assert Setup.from_json(setup.to_json()) == setup


def test_lines_are_judged_by_their_median(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    assert table.line("a", "s", [3.0, 1.0, 2.0], at_most=2.0) == 2
    table.line("b", "s", [3.0, 1.0, 2.0], at_most=1.9)
    table.line("c", "s", [3.0, 1.0, 2.0], at_least=2.1)
    table.line("d", "s", [3.0, 1.0, 2.0], at_least=1.0, at_most=1.5)
    first, *others = capsys.readouterr().out.splitlines()
    assert "1 to 3" in first
    assert first.endswith("met")
    assert all(line.endswith("MISSED") for line in others)


def test_every_section_runs(setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = []

    def here(setup: Setup, job: str, threads: int, count: int = 1) -> dict[str, list[float]]:
        jobs.append((job, threads, count))
        with redirect_stdout(io.StringIO()) as printed:
            assert bench.main(["--setup", setup.to_json(), "--job", job]) == 0
        found: dict[str, list[float]] = json.loads(printed.getvalue())
        return found

    monkeypatch.setattr(bench_levers, "_in_process", here)
    monkeypatch.setattr(bench_tools, "SIDE", 64)
    monkeypatch.setattr(bench_tools, "CONV", (2, 8, 8, 8))
    for name in bench.SECTIONS:
        bench.SECTIONS[name](setup, Table())
        printed = capsys.readouterr().out
        assert f"\n{name}: " in printed
        lines = printed.splitlines()[3:]
        assert len(lines) > 2
        assert all(float(line[64:74]) > 0 for line in lines), "a name is too long, or nothing was measured"
    assert {job for job, *_ in jobs} == {"steps", "steps-malloc", "denormal", "denormal-kept", "engine"}
    half = max(1, torch.get_num_threads() // 2)
    assert jobs[-2:] == [("engine", 2 * half, 1), ("engine", half, 2)]
