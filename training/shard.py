"""Parameters over processes: the one function that shards, and the collective calls that gather and fill again.

Accelerate leaves its FSDP plugin out on a CPU without a word, so this is PyTorch's `fully_shard`, the same on
GPU and CPU.
"""

from __future__ import annotations

import os
from typing import Any, Literal, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ldm.config import UserError
from training.processes import process_state

Sharding = Literal["none", "full", "hybrid"]
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of diffusers' networks: units of sharding and of compilation."""
    return [m for m in module.modules() if isinstance(m, (ResnetBlock2D, BasicTransformerBlock))]


def mesh(sharding: Sharding) -> DeviceMesh:
    """full: one dimension over all processes. hybrid: copies over machines, shards inside each.

    Raises UserError for a single process, which has nothing to share out.
    """
    state = process_state()
    if state.num_processes == 1:
        raise UserError(f"loop.sharding: {sharding} needs several processes; with one, say loop.sharding=none")
    if sharding == "full":
        return init_device_mesh(state.device.type, (state.num_processes,), mesh_dim_names=("shard",))
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    shape = (state.num_processes // inside, inside)
    return init_device_mesh(state.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(module: nn.Module, over: DeviceMesh, bf16: bool) -> None:
    """Turn the parameters of `module` into DTensors over the mesh (FSDP2), in place.

    bf16 gathers the parameters and computes in bfloat16, and reduces gradients in float32.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in blocks(module):
        fully_shard(block, mesh=over, mp_policy=policy)
    fully_shard(module, mesh=over, mp_policy=policy)


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """The whole state of a module, on the CPU of process 0; empty on the others. Called by all."""
    return cast(dict[str, Tensor], get_model_state_dict(module, options=_FULL))


def fill_weights(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill a module from its whole state, which every process gives."""
    whole = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(module, cast(dict[str, Any], tensors), options=whole)


def gather_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[Any]]:
    """(tensors named KEY.PARAMETER, parameter groups) of an optimizer, as `gather_weights`."""
    state: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_FULL)
    entries: dict[str, dict[str, Tensor]] = state.get("state", {})
    return {f"{key}.{name}": v for name, e in entries.items() for key, v in e.items()}, state.get("param_groups", [])


def fill_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor],
                   groups: list[Any]) -> None:  # fmt: skip
    """Fill an optimizer with what `gather_optimizer` gave."""
    entries: dict[str, dict[str, Tensor]] = {}
    for joined, value in tensors.items():
        key, _, name = joined.partition(".")
        entries.setdefault(name, {})[key] = value
    state: Any = {"state": entries, "param_groups": groups}
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            # fused kernels want the parameter's own memory layout
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                entry[key] = torch.empty_like(parameter).copy_(value)
