"""The `ldm` command: what it prints, where, and its exit codes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
from PIL import Image

from ldm.cli import app, main
from pipelines import doctor, generate
from pipelines.images import read_recipe

ROOT = Path(__file__).parents[1]
HELP = """
import sys
import typer
from typer.testing import CliRunner
from ldm.cli import app

def verbs(command, path):
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, [*path, name])

found = list(verbs(typer.main.get_command(app), []))
assert ["generate"] in found and ["data", "check"] in found, found
for verb in found:
    result = CliRunner().invoke(app, [*verb, "--help"])
    assert result.exit_code == 0, (verb, result.output)
    assert "Usage" in result.output, (verb, result.output)
heavy = {"torch", "diffusers", "transformers", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Ldm = Callable[..., Ended]


@pytest.fixture
def ldm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ldm:
    """Calls `main` in an empty folder as the shell would."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return Ended(ended.value.code or 0, out, err)

    return call


def _shell(*command: str | bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, timeout=120, check=False)


def _pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for k in range(count):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture {k}")
    return folder


def _state(folder: Path) -> list[tuple[str, int, bytes]]:
    return [(p.name, p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())]


# ---- cold starts ---------------------------------------------------------------------------------


def test_help_of_every_verb_needs_no_torch() -> None:
    ended = _shell("-c", HELP)
    assert ended.returncode == 0, ended.stderr.decode()


def test_python_m_ldm() -> None:
    ended = _shell("-m", "ldm", "--help")
    assert ended.returncode == 0
    assert b"generate" in ended.stdout


def test_generate_from_a_shell(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures of mine"
    prompts = (b"\x1b[31mred\x1b[0m" * 30, b"not UTF-8: \xff", "<x_extra_args> {} 🐱".encode())
    options = ("--model", str(tiny_folder), "--n", "1", "--out", str(out))
    ended = _shell("-m", "ldm", "generate", *prompts, *options)
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode().splitlines()[-1] == str(out / "grid.png")
    assert b"\x1b" not in ended.stdout + ended.stderr
    assert b"tokens are used, the rest is cut off" in ended.stderr
    for k, prompt in enumerate(prompts):
        recipe = read_recipe(out / f"{k:04d}.png")
        assert recipe is not None
        assert os.fsencode(recipe["prompt"]) == prompt


# ---- generate ------------------------------------------------------------------------------------


def test_generate_prints_the_grid_last(ldm: Ldm, tiny_folder: Path) -> None:
    ended = ldm("generate", "a cat", "", "--model", tiny_folder, "--n", 2, "--seed", 7)
    assert ended.code == 0, ended.err
    assert ended.out == f"{Path('out/grid.png')}\n"
    assert "drawn without conditioning" in ended.err
    assert sorted(p.name for p in Path("out").iterdir()) == [*(f"{k:04d}.png" for k in range(4)), "grid.png"]
    again = ldm("generate", "a cat", "--model", tiny_folder, "--n", 1)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert ldm("generate", "a cat", "--model", tiny_folder, "--n", 1, "--overwrite").code == 0


def test_a_random_seed_is_shown_and_recorded(ldm: Ldm, tiny_folder: Path) -> None:
    ended = ldm("generate", "a cat", "--model", tiny_folder, "--n", 2, "--seed", "-1", "--steps", 1)
    recipes = [read_recipe(Path(f"out/000{i}.png")) for i in range(2)]
    assert [r["seed"] for r in recipes if r] == [int(ended.err.split()[1]), int(ended.err.split()[1]) + 1]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--seed", "18446744073709551616"], "from 0 to"),
        (["--seed", "-2"], "-1 for a random one"),
        (["--seed", "1.5"], "valid integer"),
        (["--seed", "abc"], "valid integer"),
        (["--seed", "true"], "valid integer"),
        (["--seed", "\x1b[31m"], "valid integer"),
        (["--steps", "0"], "from 1 to 1000"),
        (["--steps", "-1"], "from 1 to 1000"),
        (["--steps", "10000"], "from 1 to 1000"),
        (["--guidance", "NaN"], "from 0 to 100"),
        (["--guidance", "Inf"], "from 0 to 100"),
        (["--guidance", "-5"], "from 0 to 100"),
        (["--guidance", "1e999"], "from 0 to 100"),
        (["--n", "0"], "from 1 to 10000"),
        (["--n", "1000000000"], "from 1 to 10000"),
        (["--n", "1e9"], "valid integer"),
        (["--sides", "64x64"], "No such option"),
        (["--model", "no/such/folder"], "no such file"),
        (["--model", "\x1b[31m/folder"], "no such file"),
        (["--out", "/dev/null"], "is a file, not a folder"),
        (["--out", "/dev/null/below"], "cannot be written to"),
    ],
)
def test_wrong_use_exits_2_and_does_nothing(ldm: Ldm, options: list[str], hint: str) -> None:
    ended = ldm("generate", "a cat", *options)
    assert ended.code == 2
    assert hint in " ".join(ended.err.replace("│", " ").split())
    assert "Traceback" not in ended.err
    assert "\x1b" not in ended.out + ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize("args", [["generate"], ["nonsense"], ["--nonsense"], ["data", "nope"], ["train"]])
def test_missing_and_unknown_words_exit_2(ldm: Ldm, args: list[str]) -> None:
    assert ldm(*args).code == 2


def test_a_models_own_text_cannot_reach_the_terminal(ldm: Ldm, tmp_path: Path) -> None:
    (tmp_path / "cascade.json").write_text('{"\\u001b[2Jformat": 1}')
    ended = ldm("generate", "a cat", "--model", tmp_path)
    assert ended.code == 2
    assert "\\x1b[2Jformat: unknown key" in ended.err
    assert "\x1b" not in ended.err


# ---- the other verbs -----------------------------------------------------------------------------


def test_data_check_of_a_good_folder(ldm: Ldm, tmp_path: Path) -> None:
    folder = _pictures(tmp_path / "good")
    before = _state(folder)
    ended = ldm("data", "check", folder)
    assert ended.code == 0, ended.err
    assert "3 samples: 3 good, 0 bad" in ended.out
    assert _state(folder) == before


def test_data_check_lists_what_is_bad_and_changes_nothing(ldm: Ldm, tmp_path: Path) -> None:
    folder = _pictures(tmp_path / "bad")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "2.png").write_bytes(b"")
    before = _state(folder)
    ended = ldm("data", "check", folder)
    assert ended.code == 1
    assert "3 samples: 1 good, 2 bad" in ended.out
    bad = [line.split()[1] for line in ended.out.splitlines() if line.startswith("bad ")]
    assert bad == ["0.png:", "2.png:"]
    assert _state(folder) == before
    assert ldm("data", "check", folder, "--size-px", 64).out.count("\nbad ") == 3


def test_data_check_without_pictures_is_wrong_use(ldm: Ldm, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        ended = ldm("data", "check", folder)
        assert ended.code == 2
        assert str(folder) in ended.err


def test_train_and_encode_name_a_missing_config(ldm: Ldm) -> None:
    for verb in ("train", "encode"):
        ended = ldm(verb, "missing.yaml")
        assert ended.code == 2
        assert "missing.yaml: cannot be read" in ended.err
    assert not list(Path().iterdir())


def test_doctor(ldm: Ldm, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "SHIPPED", tiny_folder)
    ended = ldm("doctor")
    assert ended.code == 0
    facts = {line.split()[0]: line for line in ended.out.splitlines()}
    assert {"python", "torch", "diffusers", "cpu", "gpu", "model"} <= facts.keys()
    assert "64 px, loads" in facts["model"]
    monkeypatch.setattr(doctor, "SHIPPED", tmp_path / "nowhere")
    ended = ldm("doctor")
    assert ended.code == 0
    assert "does not load" in ended.out


def test_the_default_model(ldm: Ldm, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setattr(generate, "SHIPPED", tiny_folder)
    assert ldm("generate", "a cat", "--n", 1, "--steps", 1).code == 0


# ---- the tests themselves ------------------------------------------------------------------------


def test_the_network_is_blocked() -> None:
    with socket.socket() as sock, pytest.raises(pytest.fail.Exception):
        sock.connect(("192.0.2.1", 80))
    with pytest.raises(pytest.fail.Exception):
        socket.getaddrinfo("example.invalid", 80)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_train_has_few_flags_and_no_new_one() -> None:
    """What else a run can be told stands in its config."""
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    flags = sorted(name for option in command.params for name in option.opts if name.startswith("--"))
    assert flags == ["--dry-run", "--init", "--model", "--preset", "--resume", "--run", "--set", "--shapes"]
