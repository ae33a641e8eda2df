"""`ldm doctor`: what this machine can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import get_args

import torch
from torch import nn

from ldm.config import UserError
from ldm.models.attention import Attention, attend_by
from pipelines.cascade import load_cascade
from pipelines.generate import SHIPPED

PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers"),
    *("accelerate", "open_clip_torch", "datasets", "xformers"),
)


def doctor() -> list[str]:
    """One line per fact: versions, devices, precisions, optional parts, and whether the shipped model loads."""
    lines = [f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in PACKAGES:
        lines.append(f"{name:<13} {_version(name)}")
    lines.append(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads; float32")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            half = "bf16 and fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            lines.append(f"gpu {index}         {torch.cuda.get_device_name(index)}, {half}")
    else:
        lines.append("gpu           none found")
    lines.append(f"attention     {', '.join(_attentions())}")
    try:
        cascade = load_cascade(SHIPPED)
        lines.append(f"model         {cascade.digest[:12]}, {cascade.stages[-1].config.resolution_px} px, loads")
    except UserError as error:
        lines.append(f"model         does not load: {error}")
    return lines


def _attentions() -> list[str]:
    """The kinds of attention that run here, and why another does not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for kind in get_args(Attention):
        try:
            attend_by(nn.Module(), kind, device)
            found.append(kind)
        except UserError as error:
            found.append(f"not {kind} ({str(error).partition(': ')[2].partition(';')[0]})")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
