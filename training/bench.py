"""How fast training, encoding and drawing are on this machine, against what the machine can do; `make bench`.

`python -m training.bench` prints every section as a table, each from a process of its own, in about ten minutes on
two cores. --quick: few repeats. --only SECTION: that one. --compile: also torch.compile, which takes minutes.
Other programs on the machine spoil the figures: the calibration before and after shows some of that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial

from training.bench_levers import levers, processes, run_job
from training.bench_sections import drawing, encoding, machine, stage
from training.bench_tools import ROOT, Setup, Speeds, Table
from training.environment import prepare_process

SECTIONS: dict[str, Callable[[Setup, Table], None]] = {
    "machine": machine,
    "autoencoder": partial(stage, name="autoencoder"),
    "base": partial(stage, name="base"),
    "sr": partial(stage, name="sr"),
    "encode": encoding,
    "drawing": drawing,
    "levers": levers,
    "processes": processes,
}


def run_section(setup: Setup, name: str) -> None:
    """Print one section, measured by this process, and how far the machine drifted meanwhile."""
    before = Speeds.measured()
    SECTIONS[name](setup, Table())
    Table().note(before.drift(Speeds.measured()))


def run_all(setup: Setup) -> bool:
    """Print all sections, each from a new process; returns whether none of them failed."""
    began, before = time.monotonic(), Speeds.measured()
    failed = []
    for name in SECTIONS:
        command = [sys.executable, "-m", "training.bench", "--setup", setup.to_json(), "--only", name]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    print(f"\nall of it: {(time.monotonic() - began) / 60:.1f} minutes\n{before.drift(Speeds.measured())}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes")
    # between the processes of one benchmark
    parser.add_argument("--setup", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ldm-bench-", ignore_cleanup_errors=True) as folder:
        setup = Setup.from_json(given.setup) if given.setup else Setup(folder, given.quick, given.compile)
        if given.job:
            run_job(setup, given.job)
            return 0
        prepare_process()
        if given.only is None:
            return 0 if run_all(setup) else 1
        run_section(setup, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
