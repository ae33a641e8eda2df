"""What a run will take: parameters, memory, disk, and the speed of a trial; the memory layout that was quicker."""

from __future__ import annotations

import json
import resource
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ldm.config import UserError
from ldm.weights import write_json
from training.files import write_atomically
from training.loader import Batch, StepModule

if TYPE_CHECKING:
    from training.engine import LoopConfig

CHOSEN = "chosen.json"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TRIAL_STEPS = 3


@dataclass
class Plan:
    """memory_format as chosen; seconds: of forward and backward over one global batch, by format tried."""

    memory_format: str
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    peak_bytes: int = 0
    trained: int | None = None  # of the parameters; None for all

    @property
    def torch_format(self) -> torch.memory_format:
        return FORMATS[self.memory_format]

    def text(self, config: LoopConfig, averages: int, run: Path) -> str:
        """The plan in lines, before work. averages: how many are kept."""
        there = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.exists())
        trained = self.parameters if self.trained is None else self.trained
        kept = kept_bytes(self.parameters, trained, averages)
        saved = 4 * self.parameters + kept
        lines = [
            f"plan: {self.parameters / 1e6:.2f} million parameters, {self.memory_format} memory layout",
            f"  memory: {(self.peak_bytes + kept) / 1e9:.2f} GB, of which {self.peak_bytes / 1e9:.2f} GB are the peak "
            f"of a forward and backward pass, and {kept / 1e9:.2f} GB optimizer and averages",
            f"  disk: {saved / 1e6:.0f} MB a checkpoint, up to {config.keep_checkpoints + 1} of them for a moment "
            f"({shutil.disk_usage(there).free / 1e9:.1f} GB free at {run})",
        ]
        if self.memory_format in self.seconds:
            speed = config.batch / self.seconds[self.memory_format]
            tried = ", ".join(f"{name} {config.batch / s:.1f}" for name, s in self.seconds.items())
            lines.append(
                f"  time: {_duration(config.images / speed)} for {config.images} images at {speed:.1f} images/s "
                f"(trial: {tried}; optimizer, previews and saves come on top)"
            )
        return "\n".join(lines)


def kept_bytes(parameters: int, trained: int, averages: int) -> int:
    """What a run keeps beside its weights from step to step: AdamW's two moments, and averages; all float32."""
    return 8 * trained + 4 * parameters * averages


def check_memory(module: torch.nn.Module, averages: int, config: LoopConfig, device: torch.device) -> None:
    """Raise UserError where gradients, optimizer and averages alone, without activations, are more than the memory
    that is free beside the weights; it is not looked at where processes share them."""
    if config.sharding != "none":
        return
    parameters, trained = counted(module)
    needed = 4 * trained + kept_bytes(parameters, trained, averages)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"training {trained / 1e6:.0f} of {parameters / 1e6:.0f} million parameters takes {needed / 1e9:.1f} GB "
            f"for gradients ({4 * trained / 1e9:.1f}), optimizer ({8 * trained / 1e9:.1f}) and averages "
            f"({4 * parameters * averages / 1e9:.1f}) beside the weights and before any picture, and "
            f"{free / 1e9:.1f} GB are free. Train a part of them (--preset lora), share them over several processes "
            "(loop.sharding=full), or use a machine with more memory"
        )


def counted(module: torch.nn.Module) -> tuple[int, int]:
    """A module's parameters, and those of them that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def choose_format(module: StepModule, batch: Batch, accelerator: Accelerator, config: LoopConfig, run: Path,
                  fresh: bool) -> Plan:  # fmt: skip
    """The plan of a run: measured on a fresh start by passes over one batch that leave no trace; else as recorded.

    Whatever was chosen stands in RUN/chosen.json and is never measured again.
    """
    file = run / CHOSEN
    if not fresh and file.is_file():
        plan = Plan(**json.loads(file.read_text(encoding="utf-8")))
        if config.memory_format != "auto":
            plan.memory_format = config.memory_format
        return plan
    wanted = list(FORMATS) if config.memory_format == "auto" else [config.memory_format]
    seconds = {}
    for name in wanted:
        module.to(memory_format=FORMATS[name])
        share = len(batch) * accelerator.num_processes / config.batch
        seconds[name] = _trial(module, batch, accelerator, config.workers > 0) / share
    module.to(memory_format=torch.contiguous_format)
    best = torch.tensor(min(range(len(wanted)), key=lambda i: seconds[wanted[i]]), device=accelerator.device)
    if accelerator.num_processes > 1:
        best = broadcast(best)
    parameters, trained = counted(module)
    plan = Plan(wanted[int(best)], {k: round(v, 4) for k, v in seconds.items()}, parameters, peak_bytes(), trained)
    if accelerator.is_main_process:
        write_atomically(file, lambda path: write_json(path, asdict(plan)))
    return plan


def _trial(module: StepModule, batch: Batch, accelerator: Accelerator, ahead: bool) -> float:
    """Seconds of one forward and backward pass, and unless it is done ahead the preparation; gradients are thrown
    away."""
    best = float("inf")
    inputs = module.prepare(batch) if ahead else None
    for _ in range(TRIAL_STEPS):
        began = time.perf_counter()
        with accelerator.autocast():
            losses = module(module.prepare(batch) if inputs is None else inputs).losses
        sum(losses[1:], losses[0]).backward()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
        module.zero_grad(set_to_none=True)
    return best


def peak_bytes() -> int:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


