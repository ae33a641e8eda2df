"""Gradients by weights as products: those of PyTorch, on small grids and on large ones, whatever the kernel."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.config import parse
from ldm.models.convolution import SmallGridConv2d, products_on_small_grids
from pipelines.cascade import load_cascade
from training import engine
from training.engine import LoopConfig


@pytest.mark.parametrize("kernel", [3, 5, (3, 1)])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 1), (8, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_pytorchs(
    kernel: int | tuple[int, int], grid: tuple[int, int], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, kernel, padding=kernel // 2 if isinstance(kernel, int) else (1, 0)).double()
    ours = copy.deepcopy(plain)
    products_on_small_grids(ours)
    assert type(ours) is SmallGridConv2d
    x = torch.randn(3, 5, *grid, dtype=torch.float64).to(memory_format=layout)
    weights = torch.randn(3, 7, *grid, dtype=torch.float64)
    found = {}
    for conv in (plain, ours):
        own = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = conv(own)
        found[conv] = (out, *torch.autograd.grad((out * weights).sum(), [own, conv.weight, conv.bias]))
    for wanted, given in zip(found[plain], found[ours], strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


def test_under_autocast_they_are_of_its_precision() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 32, 3, padding=1)
    ours = copy.deepcopy(plain)
    products_on_small_grids(ours)
    x = torch.randn(8, 32, 4, 4)
    found = []
    for conv in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x)
        assert out.dtype == torch.bfloat16
        found.append(torch.autograd.grad(out.float().square().sum(), [conv.weight, conv.bias]))
    for wanted, given in zip(*found, strict=True):
        assert given.dtype == torch.float32
        assert float((given - wanted).norm() / wanted.norm()) < 1e-2


def test_others_stay_as_they_are() -> None:
    others = [
        nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv1d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding="same"),
    ]  # fmt: skip
    kinds = [type(each) for each in others]
    products_on_small_grids(nn.ModuleList(others))
    assert [type(each) for each in others] == kinds


@pytest.mark.parametrize(("precision", "expected"), [("no", nn.Conv2d), ("bf16", SmallGridConv2d)])
def test_training_in_half_precision_on_a_cpu_uses_them(tiny_folder: Path, precision: str, expected: type) -> None:
    config = parse(LoopConfig, {"images": 32, "save_every_images": 32, "mixed_precision": precision}, "loop")
    network = load_cascade(tiny_folder).stages[0].denoiser.net
    names = set(network.state_dict())
    engine.adapt(network, config, torch.device("cpu"))
    same = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.stride == (1, 1)]
    assert same
    assert {type(each) for each in same} == {expected}
    assert set(network.state_dict()) == names
