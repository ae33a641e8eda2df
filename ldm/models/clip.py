"""CLIP by open_clip: a picture tower from timm and a BERT-type text tower with one space of unit vectors.

A folder as open_clip writes it: open_clip_config.json, open_clip_model.safetensors, and beside them the tokenizer and
config.json of the text tower, in Hugging Face layout, which open_clip_config.json points at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ldm.config import Config

ROWS = 64


@dataclass(frozen=True)
class ClipConfig(Config):
    """The picture tower sees squares of image_px; the text tower max_tokens tokens. Their space has the width of the
    text tower's states, whose mean over tokens is its answer."""

    image_px: int = 96
    image_model: Literal["tf_efficientnet_lite0"] = "tf_efficientnet_lite0"
    max_tokens: int = 24

    def __post_init__(self) -> None:
        if self.image_px < 32 or self.image_px % 32:
            raise ValueError(f"image_px must be a multiple of 32, not {self.image_px}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, not {self.max_tokens}")


def clip_settings(config: ClipConfig, width: int, text: str) -> dict[str, Any]:
    """open_clip's model_cfg; `width` is that of the text tower, `text` its folder."""
    return {
        "embed_dim": width,
        "custom_text": True,
        "vision_cfg": {"image_size": config.image_px, "timm_model_name": config.image_model,
                       "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"},
        # no projection is null: "none" fails in open_clip's forward
        "text_cfg": {"hf_model_name": text, "hf_tokenizer_name": text, "hf_model_pretrained": False,
                     "hf_proj_type": None, "hf_pooler_type": "mean_pooler", "context_length": config.max_tokens},
    }  # fmt: skip


def clip_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The plain fields of a ClipConfig from open_clip's model_cfg. Raises KeyError and TypeError for another shape."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    return {"image_px": vision["image_size"], "image_model": vision["timm_model_name"],
            "max_tokens": text["context_length"]}  # fmt: skip


def build_clip(config: ClipConfig, text: Path) -> Any:
    """An open_clip CustomTextCLIP with random weights; `text` holds the text tower's config.json."""
    from open_clip.model import CustomTextCLIP  # takes seconds
    from transformers import AutoConfig

    width = AutoConfig.from_pretrained(text, local_files_only=True, trust_remote_code=False).hidden_size
    settings = clip_settings(config, width, str(text))
    return CustomTextCLIP(width, settings["vision_cfg"], settings["text_cfg"])


class Clip(nn.Module):
    """A CLIP at work. Pictures and texts become unit vectors (N, D), whose product is their similarity."""

    def __init__(self, model: Any, config: ClipConfig, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.model, self.config, self.tokens = model, config, tokens

    def pictures(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] -> (N, D), with their gradient."""
        device, side = self.model.logit_scale.device, self.config.image_px
        parts = []
        for part in torch.split(pictures, ROWS):
            part = seen_by_clip(part.to(device), side)
            parts.append(normalize(self.model.encode_image(part), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, D)."""
        device = self.model.logit_scale.device
        parts = [list(texts[a : a + ROWS]) for a in range(0, len(texts), ROWS)]
        return torch.cat([normalize(self.model.encode_text(self.tokens(p).to(device)), dim=-1) for p in parts])


def tokenizer(text: Path, max_tokens: int) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> tokens (B, max_tokens), by the tokenizer in a folder, as open_clip does it."""
    from open_clip.tokenizer import HFTokenizer

    made = HFTokenizer(str(text), context_length=max_tokens, local_files_only=True)
    return lambda texts: made(list(texts))


def seen_by_clip(pictures: Tensor, side_px: int) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1], which is the tower's own range, at its size, by antialiased bicubic."""
    if pictures.shape[-2:] == (side_px, side_px):
        return pictures.clamp(-1, 1)
    return interpolate(pictures, size=(side_px, side_px), mode="bicubic", antialias=True).clamp(-1, 1)
