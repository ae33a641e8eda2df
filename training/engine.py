"""The live parts of a run on this process: module, averages, optimizers; started, gathered, saved and restored."""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import AutocastKwargs, broadcast
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ldm.config import Config, UserError
from ldm.models.attention import Attention, attend_by
from ldm.models.convolution import products_on_small_grids
from training import checkpoint
from training.cache import Items
from training.checkpoint import Snapshot
from training.ema import Ema, EmaConfig
from training.graphs import record
from training.loader import BatchOrder, Prepared, StepModule, prepared
from training.log import TrackerName
from training.online import Online
from training.optim import OptimConfig, build_optimizer
from training.plan import Plan, check_memory, choose_format
from training.processes import process_state
from training.shard import (
    Sharding,
    blocks,
    fill_optimizer,
    fill_weights,
    gather_optimizer,
    gather_weights,
    mesh,
    shard,
)

Resume = Literal["auto", "must", "never"]


@dataclass(frozen=True)
class LoopConfig(Config):
    """How long a run is, how often it reports, and on what it runs; all progress is counted in images.

    batch is the global batch of one optimizer step, over all processes and `accumulation` micro-batches. processes:
    the number the launch must have, null for any. sharding: `full` shares parameters, averages and optimizer over
    all processes, `hybrid` over those of each machine. memory_format `auto` measures both layouts once. compile:
    the repeated blocks, by torch.compile. process_timeout_s: how long processes wait for one another. workers: other
    processes that read and draw batches ahead, of each process, which a GPU needs to be kept busy; 0 for none.
    attention: by what the networks attend (`ldm.models.attention`); auto is sdpa, but plain in half precision on a CPU,
    where sdpa's gradient takes a quarter of a small U-Net's step. cuda_graphs: record the networks' passes once and
    replay them, for networks too small to keep a GPU busy.
    """

    images: int
    batch: int = 32
    accumulation: int = 1
    processes: int | None = None
    sharding: Sharding = "none"
    log_every_images: int = 1_000
    preview_every_images: int = 20_000
    save_every_images: int = 20_000
    keep_checkpoints: int = 2
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    process_timeout_s: int = 1800
    workers: int = 0
    attention: Attention | Literal["auto"] = "auto"
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 1_000_000 or self.accumulation < 1 or self.batch % self.accumulation:
            raise ValueError(
                f"batch {self.batch} must be from 1 to 1000000 and a multiple of accumulation {self.accumulation}"
            )
        if self.images < self.batch:
            raise ValueError(f"images {self.images} is less than one batch of {self.batch}")
        for name in ("log_every_images", "preview_every_images", "save_every_images", "process_timeout_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.cuda_graphs and (self.accumulation > 1 or self.compile or self.activation_checkpointing
                                 or self.sharding != "none"):  # fmt: skip
            raise ValueError("cuda_graphs work without accumulation, compile, activation_checkpointing and sharding")
        if not 0 <= self.workers <= 1024:
            raise ValueError(f"workers must be from 0 to 1024, not {self.workers}")
        if self.processes is not None and self.processes < 1:
            raise ValueError("processes must be at least 1, or null for any number")
        if self.save_every_images > self.images:
            raise ValueError(
                f"save_every_images {self.save_every_images} is beyond the end of the run at {self.images} images; "
                f"the run would save only at its end: say save_every_images: {self.images} for that"
            )
        if self.keep_checkpoints < 1:
            raise ValueError("keep_checkpoints must be at least 1: a run without a checkpoint cannot resume")
        if self.sharding != "none" and self.mixed_precision == "fp16":
            raise ValueError("sharding works in bf16 or without mixed precision, not in fp16")


class Task(Protocol):
    """What the loop trains."""

    @property
    def module(self) -> StepModule:
        """The networks, with their training step."""

    @property
    def cache(self) -> Items:
        """The items trained on."""

    def preview(self, module: nn.Module, path: Path) -> None:
        """Write a preview picture made with these weights."""

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Held-out measures of these weights."""

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        """Write these weights as a folder that inference loads, whole or not at all; one that is there goes."""


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bfloat16 (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gpu_has_bf16() -> bool:
    """Whether the GPU computes in bfloat16, and does not only emulate it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def check_precision(config: LoopConfig, device: torch.device) -> None:
    """Refuse half precision where it is tens of times slower than single, or does not exist."""
    if config.mixed_precision == "no":
        return
    if device.type == "cpu" and not (config.mixed_precision == "bf16" and cpu_has_bf16()):
        raise UserError(
            f"loop.mixed_precision: {config.mixed_precision} is refused on this CPU: it has no instructions for it, "
            "and convolutions run tens of times slower than in float32. Set loop.mixed_precision=no"
        )
    if config.mixed_precision == "bf16" and device.type == "cuda" and not gpu_has_bf16():
        raise UserError("loop.mixed_precision: this GPU has no bfloat16; use fp16 or no")


@dataclass
class Live:
    """A run in progress. images: seen so far; reported: images at the last whole report, -1 before the first."""

    config: LoopConfig
    accelerator: Accelerator
    bare: StepModule
    module: nn.Module
    ema: Ema
    optimizers: list[Any]
    plan: Plan
    template: nn.Module | None = None
    images: int = 0
    seconds: float = 0.0
    reported: int = -1
    saved: int = 0
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def sharded(self) -> bool:
        return self.config.sharding != "none"

    def loader(self, cache: Items, seed: int, until: int) -> Generator[Prepared]:
        """This process's micro-batches from the next image to `until`, prepared."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.config.batch // (world * self.config.accumulation)
        wanted = BatchOrder(cache, seed, self.images, size, self.config.batch, world, rank)
        steps = (until - self.images) // self.config.batch * self.config.accumulation
        return prepared(wanted, self.bare, steps, self.config.workers)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; they all learn the same."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.accelerator.device), "sum"))

    def averaged(self) -> nn.Module:
        """The half-life average as a plain module, whole on process 0. Called by all."""
        if self.template is None and not self.sharded:
            return self.ema.module
        whole = gather_weights(self.ema.module)
        if self.template is not None:
            self.template.load_state_dict(whole)
        return self.ema.module if self.template is None else self.template

    def snapshot(self) -> Snapshot:
        """Everything a resumed run needs, whole on process 0. Called by all."""
        tensors = {"model": gather_weights(self.bare)}
        tensors |= {name: gather_weights(average) for name, average in self.ema.averages.items()}
        groups = []
        for number, optimizer in enumerate(self.optimizers):
            tensors[f"optimizer-{number}"], group = gather_optimizer(self.bare, optimizer.optimizer)
            groups.append(group)
        scaler = self.accelerator.scaler
        state = {
            "images": self.images, "seconds": self.seconds, "reported": self.reported, "optimizers": groups,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }  # fmt: skip
        return Snapshot(tensors, state)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, which every process gives whole."""
        fill_weights(self.bare, snapshot.tensors["model"])
        for name, average in self.ema.averages.items():
            fill_weights(average, snapshot.tensors[name])
        for number, optimizer in enumerate(self.optimizers):
            groups = snapshot.state["optimizers"][number]
            fill_optimizer(self.bare, optimizer, snapshot.tensors[f"optimizer-{number}"], groups)
        if self.accelerator.scaler is not None and snapshot.state["scaler"]:
            self.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
        self.images = self.saved = snapshot.images
        self.seconds, self.reported = float(snapshot.state["seconds"]), int(snapshot.state["reported"])


def start(task: Task, config: LoopConfig, optim: OptimConfig, ema: EmaConfig, seed: int, run: Path,
          resume: Resume = "auto") -> Live:  # fmt: skip
    """Put the parts of a run together on this process, from the newest whole checkpoint of `run` or fresh.

    Raises UserError where `resume` does not allow what is there, and where the launch does not fit the config.
    """
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                AutocastKwargs(cache_enabled=not config.cuda_graphs)]  # fmt: skip
    accelerator = Accelerator(
        cpu=process_state().device.type == "cpu", mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation, kwargs_handlers=handlers,
    )  # fmt: skip
    check_precision(config, accelerator.device)
    world = accelerator.num_processes
    if config.batch % (world * config.accumulation):
        raise UserError(
            f"loop.batch {config.batch} is not a multiple of {world} processes x {config.accumulation} accumulation"
        )
    if config.cuda_graphs and (accelerator.device.type != "cuda" or world > 1 or not task.module.networks):
        raise UserError("loop.cuda_graphs: they are of one process on a CUDA GPU, and not of every kind of run; set "
                        "loop.cuda_graphs=false")  # fmt: skip
    if config.workers and (not task.module.ahead or isinstance(task.cache, Online)):
        raise UserError(f"loop.workers {config.workers}: this run encodes pictures as it trains, which only the "
                        "process that trains can do. Set loop.workers=0")  # fmt: skip
    found = _agree_on_checkpoint(run, resume, accelerator)
    over: DeviceMesh | None = mesh(config.sharding) if config.sharding != "none" else None
    module = task.module.to(accelerator.device)
    adapt(module, config, accelerator.device)
    if found is None:  # what has run once fits, and a process does not give back all that it no longer uses
        check_memory(module, 1 + len(ema.powers), config, accelerator.device)
    trial = BatchOrder(task.cache, seed, 0, config.batch // (world * config.accumulation), config.batch)[0]
    plan = choose_format(module, trial, accelerator, config, run, fresh=found is None)
    module = module.to(memory_format=plan.torch_format)
    averages = Ema(module, ema)
    template = copy.deepcopy(averages.module) if over is not None and accelerator.is_main_process else None
    if config.cuda_graphs:
        record(module, module.prepare(trial), accelerator.autocast)
    if over is not None:
        for each in (module, *averages.averages.values()):
            shard(each, over, config.mixed_precision == "bf16")
    prepared = accelerator.prepare(build_optimizer(optim, module.parameters()))
    wrapped = module if over is not None else accelerator.prepare(module)
    live = Live(config, accelerator, module, wrapped, averages, [prepared], plan, template)
    if found is not None:
        live.restore(checkpoint.load(found))
        if live.main:
            print(f"resuming from {found} at {live.images} images", flush=True)
    return live


def adapt(module: nn.Module, config: LoopConfig, device: torch.device) -> None:
    """Let networks attend, keep activations and be compiled as the config says."""
    half_on_cpu = device.type == "cpu" and config.mixed_precision != "no"
    kind = ("plain" if half_on_cpu else "sdpa") if config.attention == "auto" else config.attention
    attend_by(module, kind, device)
    if half_on_cpu:
        products_on_small_grids(module)
    if config.activation_checkpointing:
        for part in module.modules():
            if isinstance(part, ModelMixin):
                part.enable_gradient_checkpointing()
    if config.compile:
        for block in blocks(module):
            block.compile()


def _agree_on_checkpoint(run: Path, resume: Resume, accelerator: Accelerator) -> Path | None:
    """The checkpoint that all processes go on from, as process 0 found it; None to start anew."""
    images = -1
    if accelerator.is_main_process:
        found = checkpoint.newest(run)
        there = any(checkpoint.root(run).glob(checkpoint.STEPS))
        if found is None and (there or resume == "must"):
            raise UserError(
                f"{run}: {'none of its checkpoints is whole' if there else 'holds no checkpoint'}; nothing was changed."
                " `ldm ckpt verify RUN` says more; name another folder with --run to start anew"
            )
        if found is not None and resume == "never":
            raise UserError(f"{run}: holds checkpoints, and --resume never starts anew: name another with --run")
        images = -1 if found is None else int(found.name.removeprefix("step-"))
    if accelerator.num_processes > 1:
        images = int(cast(Tensor, broadcast(torch.tensor(images, device=accelerator.device))).item())
    return None if images < 0 else checkpoint.path_of(run, images)
