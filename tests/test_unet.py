"""The U-Net's ways to take in its text, and the config that chooses them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm.config import UserError
from ldm.models.unet import UNetConfig, UNetShape, build_unet
from tests.tiny import UNET

WIDTH = 8


def without_cross_attention(config: UNetConfig) -> nn.Module:
    """A network whose cross-attention puts out 0: the text has no other way in than the embedding of t."""
    torch.manual_seed(0)
    net = build_unet(config, UNetShape(2, WIDTH))
    for name, part in net.named_modules():
        if name.endswith("attn2.to_out.0"):
            assert isinstance(part, nn.Linear)
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    return net


@torch.no_grad()
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_pooled_text_reaches_blocks_past_cross_attention(pooled: bool, adaptive: bool) -> None:
    net = without_cross_attention(replace(UNET, pooled_text=pooled, adaptive_norm=adaptive))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 8, 8, generator=generator).expand(2, -1, -1, -1)
    text = torch.randn(2, 5, WIDTH, generator=generator)
    a, b = net(x, 500, encoder_hidden_states=text).sample
    assert torch.equal(a, b) != pooled


@torch.no_grad()
def test_adaptive_norm_scales_and_shifts() -> None:
    plain, adaptive = (build_unet(replace(UNET, adaptive_norm=a), UNetShape(2, WIDTH)) for a in (False, True))
    (a, b) = (net.down_blocks[0].resnets[0].time_emb_proj.weight for net in (plain, adaptive))
    assert b.shape == (2 * a.shape[0], a.shape[1])


def test_heads_divide_the_width_of_pooled_text() -> None:
    with pytest.raises(UserError, match=r"unet\.pooled_text: heads 2 must divide the text's width 9"):
        build_unet(replace(UNET, pooled_text=True), UNetShape(2, 9))
    build_unet(UNET, UNetShape(2, 9))
