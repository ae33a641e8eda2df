"""The launch templates: Accelerate reads its files as meant, and the Slurm script signals, resumes and ends as it says.

No cluster here: stand-ins for srun and scontrol start the script's processes and signal them as Slurm does.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from ldm.cli import app

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs/accelerate"
SCRIPT = ROOT / "configs/slurm/train.sbatch"
EXPECTED = {
    "one_gpu": (DistributedType.NO, 1, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 1, 8),
    "multi_node": (DistributedType.MULTI_GPU, 2, 16),
}


def parse(words: list[str]) -> dict[str, object]:
    """The parameters of an `ldm train` command line, given without `ldm`."""
    assert words[0] == "train"
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    return command.make_context("train", words[1:]).params


def test_the_folder_holds_these() -> None:
    assert {p.stem for p in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
class TestAccelerate:
    def test_the_file_leaves_precision_and_sharding_to_the_run(self, name: str) -> None:
        config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
        assert (config.distributed_type, config.num_machines, config.num_processes) == EXPECTED[name]
        assert config.mixed_precision == "no"
        assert not config.use_cpu
        plugins = ("fsdp", "deepspeed", "megatron_lm", "parallelism", "dynamo", "fp8")
        assert not any(getattr(config, f"{plugin}_config") for plugin in plugins)

    def test_the_first_line_is_the_command(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        assert "not yet run on a gpu" in " ".join(line.strip("# ") for line in lines if line[0] == "#").lower()
        words = shlex.split(lines[0].lstrip("# ").replace(" N ", " 1 ").replace("HOST", "10.0.0.1"))
        assert words[:2] == ["accelerate", "launch"]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
        kind, machines, processes = EXPECTED[name]
        assert (args.multi_gpu, args.num_processes) == (kind == DistributedType.MULTI_GPU, processes)
        assert not any((args.use_fsdp, args.use_deepspeed, args.use_megatron_lm, args.cpu))
        assert args.module
        assert args.training_script == "ldm"
        assert str(parse(args.training_script_args)["config"]) == "CONFIG"
        if machines > 1:
            prepare_multi_gpu_env(args)
            assert (args.nnodes, args.nproc_per_node) == (str(machines), str(processes // machines))
            assert (args.rdzv_backend, args.node_rank, args.rdzv_endpoint) == ("static", 1, "10.0.0.1:29500")


SRUN = """\
import os, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % 2),
                                   "SLURM_NTASKS": "4"})
    for n in range(4)
]
if os.environ["DO"] == "signal":
    while len([name for name in os.listdir() if name.startswith("ready-")]) < 4:
        time.sleep(0.01)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
codes = [task.wait(120) for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
LDM = """\
import json, os, sys, time
from pathlib import Path
from training.stop import Stop
rank = os.environ["RANK"]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
Path(f"task-{rank}.json").write_text(json.dumps({"argv": sys.argv[1:], **{name: os.environ[name] for name in names}}))
if os.environ["DO"] != "signal":
    sys.exit(int(os.environ["DO"]) if rank == "2" else 0)
with Stop() as stop:
    Path(f"ready-{rank}").touch()
    deadline = time.monotonic() + 60
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    sys.exit(3 if stop.requested else 1)
"""
SCONTROL = """\
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node-1", "node-2", sep="\\n")
else:
    open("scontrol.log", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


def submit(folder: Path, do: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a job's batch shell: `do` is the exit code of one of its four processes, or "signal"."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("ldm", LDM), ("scontrol", SCONTROL)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "DO": do,
        "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_CPUS_PER_TASK": "5",
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


class TestSlurm:
    def test_bash_reads_it(self) -> None:
        done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    def test_what_it_asks_of_slurm(self) -> None:
        lines = SCRIPT.read_text(encoding="utf-8").splitlines()
        first_command = next(n for n, line in enumerate(lines) if line and line[0] != "#")
        asked = [line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")]
        assert len(asked) == sum("#SBATCH" in line for line in lines)
        assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(asked)
        options = dict(option.lstrip("-").split("=") for option in asked if "=" in option)
        assert options["ntasks-per-node"] == options["gpus-per-node"]

    @pytest.mark.parametrize(("do", "code"), [("0", 0), ("1", 1), ("3", 3), ("signal", 3)])
    def test_only_an_interrupted_run_is_queued_again(self, tmp_path: Path, do: str, code: int) -> None:
        done = submit(tmp_path, do, "my config.yaml", "runs/a b", "--set", "loop.batch=8")
        assert done.returncode == code, done.stderr
        log = tmp_path / "scontrol.log"
        assert (log.read_text() if log.exists() else "") == ("requeue 41234\n" if code == 3 else "")

    def test_every_process_knows_its_place_and_its_command(self, tmp_path: Path) -> None:
        submit(tmp_path, "0", "my config.yaml", "runs/a b", "--set", "loop.batch=8")
        for rank in range(4):
            found = json.loads((tmp_path / f"task-{rank}.json").read_text())
            given = parse(found.pop("argv"))
            assert (str(given["config"]), str(given["run"]), given["resume"]) == ("my config.yaml", "runs/a b", "auto")
            assert given["overrides"] == ["loop.batch=8"]
            assert found == {
                "RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "MASTER_ADDR": "node-1",
                "MASTER_PORT": "21234", "OMP_NUM_THREADS": "5",
            }  # fmt: skip

    def test_it_says_what_is_missing(self, tmp_path: Path) -> None:
        done = submit(tmp_path, "0", "config.yaml")
        assert done.returncode != 0
        assert "usage: sbatch train.sbatch CONFIG RUN_FOLDER" in done.stderr
        assert not list(tmp_path.glob("task-*"))
