"""The processes of a launch: who they are, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import distributed

from ldm.config import UserError

TIMEOUT_S = 1800


def process_state(timeout_s: int = TIMEOUT_S) -> PartialState:
    """This process among those of the launch. The first call of a process decides how long others are waited for.

    Raises UserError where a launcher promised more processes than were joined.
    """
    # without `cpu`, Accelerate runs CPU processes apart from each other
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=timeout_s))
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != promised:
        raise UserError(
            f"the launcher promised {promised} processes, but {state.num_processes} joined: each would train alone. "
            "Start them by `torchrun --nproc_per_node N -m -- ldm train ...`"
        )
    return state


def check_world(wanted: int | None) -> None:
    """Raise UserError where the launch has another number of processes than loop.processes asks for."""
    found = process_state().num_processes
    if wanted is not None and wanted != found:
        raise UserError(
            f"loop.processes asks for {wanted} processes, but this launch has {found}. Start them by "
            f"`torchrun --nproc_per_node {wanted} -m -- ldm train ...` "
            "(`accelerate launch --cpu --num_processes N` starts one, whatever N is)"
        )


@contextmanager
def together() -> Iterator[None]:
    """Work between processes: when one is gone, the others leave with a message, not by a hang or a trace."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        gone = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "gloo")
        lost = isinstance(error, distributed.DistError) or any(word in text for word in gone)
        if process_state().num_processes > 1 and lost:
            raise UserError(
                f"process {process_state().process_index} lost the others ({str(error).splitlines()[0]:.200}). "
                "What ended the first of them stands above or in its own log; the same command resumes from the "
                "newest checkpoint", exit_code=1
            ) from error  # fmt: skip
        raise
