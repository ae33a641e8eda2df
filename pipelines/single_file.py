"""Stable Diffusion in one safetensors file, as its authors released it: read by diffusers' converters, and written.

    FILE + configs of a pipeline folder -> diffusers -> a pipeline folder, for a while -> load_pipeline
    stock components -> their tensors under the released names -> FILE
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.config import UserError
from ldm.weights import check_weights_file, read_header
from pipelines.foreign import XL, pipeline_class

# empty tensors, by whose names trainers of SDXL say how their networks predict
_MARKS: dict[str, dict[str, Any]] = {"v_pred": {"prediction_type": "v_prediction"},
                                     "ztsnr": {"rescale_betas_zero_snr": True}}  # fmt: skip
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "class_embedding": "label_emb",
         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
         "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
         "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
_VAE = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1", "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut"}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
_OPEN_CLIP_WHOLE = {"embeddings.token_embedding.weight": "token_embedding.weight",
                    "embeddings.position_embedding.weight": "positional_embedding",
                    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}  # fmt: skip


@contextmanager
def as_folder(file: Path, like: Path) -> Iterator[Path]:
    """A pipeline folder, there for a while, of a single file; like: a pipeline folder of the same architecture, of
    which configs, tokenizers and the scheduler are taken.

    What the file's marks say of its scheduler stands above the folder's. Raises UserError where the file is none of
    that architecture, or damaged.
    """
    check_weights_file(file)
    marks = _MARKS.keys() & read_header(file).keys()
    made: Any = getattr(diffusers, pipeline_class(like))
    optional = set(made._optional_components) & {"safety_checker", "feature_extractor", "image_encoder"}
    with TemporaryDirectory(prefix="ldm-") as temporary:
        try:
            pipeline = made.from_single_file(str(file), config=str(like), local_files_only=True,
                                             torch_dtype=torch.float32, **dict.fromkeys(optional))  # fmt: skip
        except Exception as error:  # of any kind, by what is missing
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file}: no single file of the architecture in {like}: {told}") from None
        marked = {name: value for mark in marks for name, value in _MARKS[mark].items()}
        if marked:
            pipeline.scheduler.register_to_config(**marked)
        pipeline.save_pretrained(Path(temporary) / file.stem)
        yield Path(temporary) / file.stem


def write(pipeline: Any, out: Path, dtype: torch.dtype) -> Path:
    """Write the networks of a stock pipeline under the names of the release. Raises UserError where `out` exists."""
    if out.exists():
        raise UserError(f"{out}: exists; an export is not written over")
    xl = type(pipeline).__name__ == XL
    parts = {"model.diffusion_model.": unet_names(pipeline.unet.state_dict(), pipeline.unet.config),
             "first_stage_model.": vae_names(pipeline.vae.state_dict())}  # fmt: skip
    first, wide = pipeline.text_encoder.state_dict(), pipeline.unet.config.use_linear_projection
    if xl:
        parts["conditioner.embedders.0.transformer."] = clip_names(first)
        parts["conditioner.embedders.1.model."] = open_clip_names(pipeline.text_encoder_2.state_dict())
    elif wide and pipeline.text_encoder.config.hidden_act == "gelu":  # 2.x, told by OpenCLIP
        parts["cond_stage_model.model."] = open_clip_names(first)
    else:
        parts["cond_stage_model.transformer."] = clip_names(first)
    named = ((prefix + name, value) for prefix, own in parts.items() for name, value in own.items())
    tensors = {name: value.to(dtype).contiguous() for name, value in named}
    said = pipeline.scheduler.config
    for mark, settings in _MARKS.items():
        if xl and all(said.get(name) == value for name, value in settings.items()):
            tensors[mark] = torch.empty(0, dtype=dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def unet_names(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A U-Net's tensors under the names of the release: blocks counted through, from the input to the output."""
    per_level = config.layers_per_block + 1

    def placed(found: re.Match[str]) -> str:
        side, level, kind, number = found[1], int(found[2]), found[3], int(found[4])
        at = level * per_level + number
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * per_level}.0.op"
        if kind == "upsamplers":
            attends = "CrossAttn" in config.up_block_types[level]
            return f"output_blocks.{level * per_level + per_level - 1}.{1 + attends}"
        within = int(kind == "attentions")
        return f"input_blocks.{at + 1}.{within}" if side == "down" else f"output_blocks.{at}.{within}"

    made = {}
    for name, value in state.items():
        new = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)", placed, name).replace(".op.conv.", ".op.")
        new = _replaced(new, _UNET)
        if ".resnets." in name:
            new = _within(new, _RESNET)
        made[new] = value
    return made


def vae_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors under the names of the release, whose decoder counts levels from the finest on and whose
    attention is of convolutions."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))

    def placed(found: re.Match[str]) -> str:
        side, level, kind, number = found[1], int(found[2]), found[3], found[4]
        level = level if side == "down" else levels - 1 - level
        return f"{side}.{level}." + (f"block.{number}" if kind == "resnets" else f"{side}sample")

    made = {}
    for name, value in state.items():
        new = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)", placed, name)
        new = _within(new, _VAE)
        if ".attn_1." in new:
            new = _within(new, _VAE_ATTENTION)
            value = value[:, :, None, None] if value.ndim == 2 else value
        made[new] = value
    return made


def clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors, which keep their names."""
    return {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in state.items()}


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors under OpenCLIP's names: queries, keys and values are one matrix there."""
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            made["text_projection"] = value.T
        elif name in _OPEN_CLIP_WHOLE:
            made[_OPEN_CLIP_WHOLE[name]] = value
        elif (found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)) is not None:
            joined = [state[key] for part in "qkv" for key in state if key.endswith(
                f"encoder.layers.{found[1]}.self_attn.{part}_proj.{found[2]}")]  # fmt: skip
            made[f"transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}"] = torch.cat(joined)
        elif name.startswith("encoder.layers.") and ".k_proj." not in name and ".v_proj." not in name:
            made["transformer.resblocks." + _within(name.removeprefix("encoder.layers."), _OPEN_CLIP)] = value
    return made


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """With the beginning replaced that stands in a table."""
    old = next((key for key in table if name.startswith(f"{key}.")), None)
    return name if old is None else table[old] + name.removeprefix(old)


def _within(name: str, table: Mapping[str, str]) -> str:
    """With the part replaced, after the beginning or a dot, that stands in a table."""
    for old, new in table.items():
        name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name)
    return name
