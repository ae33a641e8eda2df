"""Files that others must never see half written, and locks that die with their process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.config import UserError


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    """A name beside `path` for what will be renamed to it; `sweep` removes those a killed process left."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`, whose lock is held."""
    for stale in folder.glob("*.tmp-*"):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name, then rename it: whole or absent, whatever happens."""
    partial = temporary(path)
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def lock(path: Path, wait_note: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`. The kernel frees it when its process ends, however it ends: no stale locks.

    Where another process holds it: wait, saying `wait_note`, or without one raise UserError naming the holder.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"{path}: this file system gives no locks ({error.strerror}); use another") from None
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if wait_note is None:
                raise UserError(
                    f"{path.parent}: another process is writing there ({holder}); wait or stop it"
                ) from None
            print(f"{path.parent}: {wait_note} ({holder})", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()
        yield
