"""LoRA (Hu et al. 2021): a weight W is trained as W + (alpha / rank) B A, of which only B and A change.

    network -> add_lora -> trained -> save_lora -> FOLDER/pytorch_lora_weights.safetensors -> merge_lora -> network

The file is in the layout of diffusers and peft, so that stock pipelines load it: `unet.MODULE.lora_A.weight` and
`.lora_B.weight`, and with `text_encoder.` those of a text encoder. Its alpha is its rank; another one is folded into B.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.config import Config, UserError
from ldm.weights import check_weights_file, read_header

LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX, TEXT_PREFIX, SECOND_PREFIX = "unet.", "text_encoder.", "text_encoder_2."
_PREFIXES = "|".join(map(re.escape, (PREFIX, TEXT_PREFIX, SECOND_PREFIX)))
_KEY = re.compile(rf"({_PREFIXES})(.+)\.(lora_A|lora_B|lora(?:_linear_layer)?\.(?:down|up))\.weight")
_ADAPTER = "default"
# attentions' projections, as CLIP, BERT and T5 name them
_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value", "q", "k", "v", "o")


@dataclass(frozen=True)
class LoraConfig(Config):
    """rank of the change; alpha: it is scaled by alpha / rank, 1 by default; targets: names of the layers that are
    changed, linear or convolutions, by default those of all attentions. text: change the text encoder's attentions too,
    which then tells every caption anew in each step."""

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise ValueError(f"rank must be from 1 to 1024, not {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be positive, not {self.alpha:g}")
        if not self.targets:
            raise ValueError("targets must name a layer at least")

    @property
    def scale(self) -> float:
        """Of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def add_lora(network: nn.Module, config: LoraConfig) -> None:
    """Give a U-Net of diffusers, or a text encoder of transformers, trainable B and A, which change nothing yet, and
    hold all else. Raises UserError where no layer has such a name."""
    from peft import LoraConfig as Peft  # takes seconds

    targets = config.targets if isinstance(network, ModelMixin) else _TEXT_TARGETS
    alpha: Any = config.scale * config.rank  # a fraction is as good to peft
    wanted = Peft(r=config.rank, lora_alpha=alpha, target_modules=list(targets))
    try:
        network.add_adapter(wanted, adapter_name=_ADAPTER)  # type: ignore[operator]
    except ValueError as error:
        raise UserError(f"lora.targets: {', '.join(targets)}: {error}") from None
    except AttributeError:
        raise UserError("lora.text: this text encoder takes no LoRA; leave it out") from None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def save_lora(networks: Mapping[str, nn.Module], config: LoraConfig, folder: Path) -> None:
    """Write what `add_lora` added to networks, by their prefixes, in float16."""
    tensors = {}
    for prefix, network in networks.items():
        for name, value in network.state_dict().items():
            if ".lora_" in name:
                value = value.detach().cpu() * (config.scale if ".lora_B." in name else 1.0)
                tensors[prefix + name.replace(f".{_ADAPTER}.", ".")] = value.half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / LORA_FILE)


def merge_lora(networks: Mapping[str, nn.Module], path: Path, weight: float) -> str:
    """Add weight B A of a file, or of a folder with one, to networks' weights; returns the file's digest.

    networks: by prefix. Raises UserError, naming the tensor, for a file that is none of a LoRA, or of other networks'.
    """
    file = path / LORA_FILE if path.is_dir() else path
    check_weights_file(file)
    read_header(file)
    scales = {prefix: weight * _recorded_scale(file, prefix) for prefix in networks}
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in load_file(file).items():
        found = _KEY.fullmatch(name)
        if found is None:
            raise UserError(f"{file}: {name!a}: not of a LoRA as diffusers and peft write it, unet.MODULE."
                            "lora_A.weight or .lora.down, and so on: other layouts are not read")  # fmt: skip
        if value.ndim < 2:
            raise UserError(f"{file}: {name!a}: of shape {tuple(value.shape)}, which is no matrix")
        part = "A" if found[3].endswith(("A", "down")) else "B"
        pairs.setdefault((found[1], found[2]), {})[part] = value.float()
    modules = {prefix: dict(network.named_modules()) for prefix, network in networks.items()}
    fitting = []  # all are looked at before any is changed
    for (prefix, name), pair in pairs.items():
        layer = modules.get(prefix, {}).get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise UserError(f"{file}: {prefix}{name}: this network has no such layer")
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{file}: {prefix}{name}: lora_A and lora_B go together")
        a, b = pair["A"], pair["B"]
        whole = (len(b), *a.shape[1:])
        if b.flatten(1).shape[1] != len(a) or whole != tuple(layer.weight.shape):
            raise UserError(f"{file}: {prefix}{name}: shapes {tuple(b.shape)} x {tuple(a.shape)} are not those of its "
                            f"weight {tuple(layer.weight.shape)}")  # fmt: skip
        fitting.append((layer, scales[prefix], a, b))
    with torch.no_grad():
        for layer, scale, a, b in fitting:
            change = (b.flatten(1) @ a.flatten(1)).view(layer.weight.shape)
            layer.weight += scale * change.to(layer.weight)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def text_networks(text: nn.Module) -> dict[str, nn.Module]:
    """The networks of a text encoder, or of a pair of them, by the prefix that they have in a file."""
    parts = list(text) if isinstance(text, nn.ModuleList) else [text]
    return dict(zip((TEXT_PREFIX, SECOND_PREFIX), parts, strict=False))


def _recorded_scale(file: Path, prefix: str) -> float:
    """alpha / rank where diffusers recorded them in the file's header, else 1. Raises UserError for other than one."""
    with safe_open(file, "pt") as opened:
        told = (opened.metadata() or {}).get("lora_adapter_metadata")
    if told is None:
        return 1.0
    try:
        said = {key.removeprefix(prefix): value for key, value in json.loads(told).items() if key.startswith(prefix)}
        if not said:
            return 1.0
        if said.get("rank_pattern") or said.get("alpha_pattern") or said.get("use_rslora") or said.get("use_dora"):
            raise UserError(f"{file}: ranks or alphas of single layers, rsLoRA and DoRA are not read")
        return float(said["lora_alpha"]) / float(said["r"])
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise UserError(f"{file}: lora_adapter_metadata says no lora_alpha and r") from None
