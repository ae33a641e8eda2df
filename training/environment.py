"""The process that trains: what it sets before any work, and what a run folder records of it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

# glibc's malloc.h; the largest values its int parameters take
_MALLOPT = {-1: 2**31 - 1, -3: 2**31 - 1, -2: 2**28}  # trim threshold, mmap threshold, top pad


def prepare_process() -> None:
    """Set what makes training quick on a CPU; to be called before torch computes anything.

    Denormal numbers, which vanishing gradients end in, are flushed: some CPUs compute with them many times slower. The
    threads that torch starts later take this over. glibc keeps freed memory instead of asking the kernel for the same
    again in each step.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in _MALLOPT.items():
            libc.mallopt(parameter, value)


def environment() -> dict[str, Any]:
    """Versions, threads and device: results are bit-equal only where these are equal."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "numpy")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
    }
