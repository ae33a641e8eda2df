"""By what networks attend: PyTorch's fused attention (sdpa), matrix products (plain), or xformers."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import nn

from ldm.config import UserError

Attention = Literal["sdpa", "plain", "xformers"]
_PROCESSORS = {"sdpa": AttnProcessor2_0, "plain": AttnProcessor, "xformers": XFormersAttnProcessor}


def attend_by(module: nn.Module, kind: Attention, device: torch.device) -> None:
    """Let every network of diffusers in a module attend so. Raises UserError where this machine cannot."""
    if kind == "xformers":
        if importlib.util.find_spec("xformers") is None:
            raise UserError("attention xformers: it is not installed; pip install xformers, or use sdpa")
        if device.type != "cuda":
            raise UserError(f"attention xformers: it needs a CUDA GPU, and this run is on {device.type}; use sdpa")
    for network in module.modules():
        choose: Any = getattr(network, "set_attn_processor", None)
        if choose is not None:
            choose(_PROCESSORS[kind]())
