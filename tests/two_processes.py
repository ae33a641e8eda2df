"""Trains in each of two processes, one job after another; tests/test_processes.py launches it.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/two_processes.py JOBS.json

JOBS.json: a list of {"config", "run", "overrides", "stop_at": step at which process 1 gets SIGTERM, or null,
"machines": 2 to pretend that each process is a machine, "nan_at": step at which process 1 has a loss that is not
a number, or null}. What was seen is written to JOBS-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from training import loop
from training.run import train
from training.stop import Interrupted


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_WORLD_SIZE"] = "1" if job.get("machines") == 2 else "2"
    seen: dict[str, Any] = {"steps": 0}
    step, start = loop._step, loop.start

    def counted(live: Any, *args: Any) -> Any:
        seen["steps"] += 1
        if rank == 1 and seen["steps"] == job.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        hook = None
        if rank == 1 and seen["steps"] == job.get("nan_at"):
            hook = live.bare.register_forward_hook(
                lambda m, a, out: out._replace(losses=[out.losses[0] * float("nan")])
            )
        result = step(live, *args)
        if hook is not None:
            hook.remove()
        return result

    def watched(*args: Any) -> Any:
        live = start(*args)
        seen["kinds"] = sorted({type(p).__name__ for m in (live.bare, *live.ema.averages.values())
                                for p in m.parameters()})  # fmt: skip
        mesh = getattr(next(live.bare.parameters()), "device_mesh", None)
        seen["mesh"] = None if mesh is None else list(mesh.shape)
        return live

    loop._step, loop.start = counted, watched  # type: ignore[assignment]
    try:
        train(job["config"], job["run"], job["overrides"], job.get("resume", "auto"))
        seen["end"] = "done"
    except Interrupted as error:
        seen["end"] = f"interrupted, exit code {error.exit_code}"
    finally:
        loop._step, loop.start = step, start
    return seen


def main() -> None:
    jobs = Path(sys.argv[1])
    results = [run_job(job) for job in json.loads(jobs.read_text())]
    jobs.with_name(f"{jobs.stem}-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
