"""Long work shows itself as lines where there is no terminal, and as a bar where there is one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from ldm.progress import progress


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("abc", "reading", every_s=0)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["reading: 1 of 3", "reading: 2 of 3", "reading: 3 of 3"]


def test_a_bar_on_a_terminal() -> None:
    master, slave = pty.openpty()
    code = "from ldm.progress import progress\nfor _ in progress(range(3), 'reading'): pass"
    done = subprocess.run([sys.executable, "-c", code], stderr=slave, stdout=subprocess.PIPE, check=True)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert done.stdout == b""
    assert "reading" in shown
    assert "3/3" in shown
