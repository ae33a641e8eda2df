"""Trainings in children that tests kill, forked from one server that has imported everything and run nothing."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults", "training.run", "ldm.cli"])
INTERRUPTED = 3


def _run(config: str, run: str, overrides: Sequence[str], log: str, before: Callable[..., None] | None,
         given: tuple[Any, ...]) -> None:  # fmt: skip
    """What a child does: `ldm train`, its output in a file, its exit code the command's."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if before is not None:
        before(*given)
    from ldm import cli

    sys.argv = ["ldm", "train", config, "--run", run, *(part for o in overrides for part in ("--set", o))]
    cli.main()


def start_training(config: Path, run: Path, overrides: Sequence[str], before: Callable[..., None] | None = None,
                   given: tuple[Any, ...] = ()) -> Any:  # fmt: skip
    """A started child that trains; `before(*given)`, a function of a module, runs in it first. Output: RUN.log."""
    log = run.with_name(f"{run.name}.log")
    arguments = (str(config), str(run), list(overrides), str(log), before, given)
    child = CONTEXT.Process(target=_run, args=arguments)
    child.start()
    return child


def output(run: Path) -> str:
    """What all children of a run have printed."""
    return run.with_name(f"{run.name}.log").read_text(errors="replace")
