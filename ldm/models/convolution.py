"""Convolutions whose gradient by their weights is a matrix product for each of the kernel's places.

On CPUs, libraries sum that gradient row by row of the grid, and rows of four cells leave most of a half-precision
matrix unit idle. As products over all cells of a batch it costs what the other passes cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

SMALL_GRID = 4  # cells a side; from 8 on the library's own gradient is no slower


class _SameConvolution(torch.autograd.Function):
    """conv2d of odd kernels, stride 1 and a padding that keeps the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        of_x = None
        if wants_x:
            of_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        of_weight = weight_gradient(x, gradient, weight.shape[2], weight.shape[3]) if wants_weight else None
        return of_x, of_weight, gradient.sum((0, 2, 3)) if wants_bias else None


def weight_gradient(x: Tensor, gradient: Tensor, height: int, width: int) -> Tensor:
    """Gradient by the weights, (O, C, height, width), of a convolution that keeps the grid: x (B, C, H, W), gradient
    by its output (B, O, H, W)."""
    rows, columns = x.shape[2:]
    around = (0, 0, width // 2, width // 2, height // 2, height // 2)
    cells = pad(x.permute(0, 2, 3, 1), around)  # (B, H + height - 1, W + width - 1, C)
    outputs = gradient.permute(1, 0, 2, 3).reshape(gradient.shape[1], -1)  # (O, B H W)
    found = x.new_empty(height, width, len(outputs), x.shape[1])
    for i in range(height):
        for j in range(width):
            torch.mm(outputs, cells[:, i : i + rows, j : j + columns].reshape(-1, x.shape[1]), out=found[i, j])
    return found.permute(2, 3, 0, 1)


class SmallGridConv2d(nn.Conv2d):
    """nn.Conv2d, with the gradient by its weights as products where the grid is small."""

    def forward(self, input: Tensor) -> Tensor:
        if max(input.shape[2:]) > SMALL_GRID:
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        found: Tensor = _SameConvolution.apply(input, weight, bias)
        return found


def products_on_small_grids(module: nn.Module) -> None:
    """Let every convolution in a module that keeps its grid be a `SmallGridConv2d`, its weights as they are."""
    for part in module.modules():
        if type(part) is not nn.Conv2d or part.groups > 1 or part.padding_mode != "zeros":
            continue
        same = all(k % 2 for k in part.kernel_size) and part.padding == tuple(k // 2 for k in part.kernel_size)
        if same and set(part.stride) == set(part.dilation) == {1} and max(part.kernel_size) > 1:
            part.__class__ = SmallGridConv2d
