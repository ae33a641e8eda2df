"""The shape of the code: imports point one way, nothing runs what a file says, files and functions stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PACKAGES = ("ldm", "pipelines", "training")
SOURCES = [path for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Read as tensors only: a pinned package has its weights in a pickle, whose digest is checked first; and `ldm import
# --pickles` is asked for.
TENSORS_OF_OTHERS = {
    ("training/features.py", "torch.load(paths[0], map_location='cpu', weights_only=True)"),
    ("pipelines/fetch.py", "torch.load(path, map_location='cpu', weights_only=True)"),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef

ALLOWED = {"ldm": {"ldm"}, "pipelines": {"ldm", "pipelines"}, "training": {"ldm", "training"}}
# The command calls all three; previews and evaluation show what users will get.
EXCEPTIONS = {
    "ldm/cli.py": {"pipelines", "training"},
    "ldm/eval_cli.py": {"pipelines", "training"},
    "ldm/__main__.py": {"pipelines", "training"},
    "training/autoencoder.py": {"pipelines"},
    "training/classifier.py": {"pipelines"},
    "training/clip.py": {"pipelines"},
    "training/codec_report.py": {"pipelines"},
    "training/control_report.py": {"pipelines"},
    "training/diffusion.py": {"pipelines"},
    "training/evaluate.py": {"pipelines"},
    "training/bench_sections.py": {"pipelines"},
    "training/boundary.py": {"pipelines"},
    "training/boundary_tiles.py": {"pipelines"},
    "training/boundary_report.py": {"pipelines"},
    "training/likelihood_report.py": {"pipelines"},
    "training/loss_report.py": {"pipelines"},
    "training/noisy_classifier.py": {"pipelines"},
    "training/palette.py": {"pipelines"},
    "training/picture_report.py": {"pipelines"},
    "training/picture_sweep.py": {"pipelines"},
    "training/presets.py": {"pipelines"},
    "training/process_report.py": {"pipelines"},
    "training/steering_report.py": {"pipelines"},
}
ONLY_IN_FUNCTIONS = ("ldm/cli.py", "ldm/eval_cli.py", "ldm/__main__.py")
RUNS_FILES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "imp")
RUNS_TEXT = (
    *("eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.export.load", "yaml.unsafe_load", "yaml.full_load"),
)


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """Module names of all imports, those inside functions too, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", node.lineno


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_packages_are_found() -> None:
    assert {path.parts[0] for path in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    own = {*PACKAGES, "tests"}
    allowed = ALLOWED[path.parts[0]] | EXCEPTIONS.get(path.as_posix(), set())
    faults = [
        f"{path}:{line}: imports {name}"
        for name, line in imported(TREES[path], path)
        if name.partition(".")[0] in own - allowed
    ]
    assert not faults


@pytest.mark.parametrize("name", ONLY_IN_FUNCTIONS)
def test_the_command_imports_the_others_inside_functions_only(name: str) -> None:
    path = Path(name)
    inside = {
        id(node)
        for function in ast.walk(TREES[path])
        if isinstance(function, Function)
        for node in ast.walk(function)
    }
    outside = [node for node in ast.walk(TREES[path]) if id(node) not in inside]
    names = {found for node in outside for found, _ in imported(ast.Module([node], []), path)
             if isinstance(node, (ast.Import, ast.ImportFrom))}  # fmt: skip
    assert not {found.partition(".")[0] for found in names} & {"pipelines", "training"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    faults = [
        f"{path}:{line}: imports {name}"
        for name, line in imported(TREES[path], path)
        if name.partition(".")[0] in RUNS_FILES
    ]
    for node in (n for n in ast.walk(TREES[path]) if isinstance(n, ast.Call)):
        if (path.as_posix(), ast.unparse(node)) in TENSORS_OF_OTHERS:
            continue
        if dotted(node.func) in RUNS_TEXT:
            faults.append(f"{path}:{node.lineno}: calls {dotted(node.func)}")
        if dotted(node.func) == "yaml.load" and "_Loader" not in ast.unparse(node):
            faults.append(f"{path}:{node.lineno}: yaml.load without our loader")
        for keyword in node.keywords:
            literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and literal is not False:
                faults.append(f"{path}:{node.lineno}: {keyword.arg} is not False")
    assert not faults


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_sizes_and_docstrings(path: Path) -> None:
    assert ast.get_docstring(TREES[path]), f"{path}: no docstring"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{path}: {lines} lines"
    for node in ast.walk(TREES[path]):
        if isinstance(node, Function):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_only_config_knows_pydantic() -> None:
    knows = {path.as_posix() for path in SOURCES for name, _ in imported(TREES[path], path)
             if name.partition(".")[0] == "pydantic"}  # fmt: skip
    assert knows == {"ldm/config.py"}


def strings(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and text of every string in plain data, keys included."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield f"{path}.{key}", str(key)
            yield from strings(value, f"{path}.{key}")
    elif isinstance(data, list):
        for value in data:
            yield from strings(value, path)
    elif isinstance(data, str):
        yield path, data


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("*.yaml")), ids=str)
def test_no_config_names_a_class(path: Path) -> None:
    found = list(strings(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert not [where for where, text in found if re.fullmatch(r"[A-Za-z_]\w*([.:][A-Za-z_]\w*)+", text)]
    assert not [where for where, text in found if text in ("_target_", "_class_name", "class_path", "auto_map")]
