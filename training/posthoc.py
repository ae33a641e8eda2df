"""Averages of any length, made after training from kept power averages (Karras et al. 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", section 3.2 and appendix C).

    RUN/snapshots/000000123456-0.05.safetensors    the average of sigma_rel 0.05 after 123456 images

A power average weights the weights of the past by its profile p(t) = (gamma + 1) t^gamma / T^(gamma + 1), t from 0
to T. Snapshots of a few lengths, taken through the run, span other profiles nearly.
"""

from __future__ import annotations

import errno
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.config import UserError
from training.ema import UNIFORM, Ema, average_name, power_exponent
from training.files import write_atomically

NAME = re.compile(r"(\d{12})-([0-9.e-]+)\.safetensors")
Snapshot = tuple[int, float]  # images, sigma_rel
MAX_MISFIT = 0.1
MAX_GAIN = 10.0  # of the rounding of snapshots, which is 0.02% of the weights


def save_snapshots(run: Path, ema: Ema, images: int, main: bool = True) -> None:
    """Keep the power averages as they are after `images` images, in float16.

    Where they are sharded, every process calls this; only the one with `main` writes. Raises OSError where the disk
    does not take them; a snapshot is whole or absent.
    """
    folder = run / "snapshots"
    for power in ema.config.powers:
        tensors = {}
        for name, value in ema.averages[average_name(power)].state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if main:
                kept = torch.float16 if whole.is_floating_point() else whole.dtype
                tensors[name] = whole.to("cpu", kept).contiguous()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{images:012d}-{power:g}.safetensors"
            try:
                write_atomically(path, partial(save_file, tensors))
            except SafetensorError as error:
                raise OSError(errno.EIO, f"{path}: {error}") from None


def list_snapshots(run: Path) -> dict[Snapshot, Path]:
    """The kept averages of a run, in the order of images."""
    found = {}
    for path in sorted((run / "snapshots").glob("*.safetensors")):
        if match := NAME.fullmatch(path.name):
            found[int(match[1]), float(match[2])] = path
    return found


def profile_products(a: list[Snapshot], b: list[Snapshot]) -> NDArray[np.float64]:
    """(len(a), len(b)) integrals over t of p_a(t) p_b(t), in 1 / images (Karras et al. 2024, eq. 151)."""
    t_a, t_b = np.array([t for t, _ in a], float)[:, None], np.array([t for t, _ in b], float)
    g_a, g_b = np.array([power_exponent(p) for _, p in a])[:, None], np.array([power_exponent(p) for _, p in b])
    overlap = np.minimum(t_a, t_b)
    at_end = (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) / overlap
    products: NDArray[np.float64] = at_end * (overlap / t_a) ** (g_a + 1) * (overlap / t_b) ** (g_b + 1)
    return products


def coefficients(kept: list[Snapshot], target: Snapshot) -> tuple[NDArray[np.float64], float]:
    """Factors (len(kept),) that combine the kept profiles to the target's, and how far off the result is.

    Least squares (Karras et al. 2024, algorithm 3) under the constraint that the factors add up to 1, so that weights
    which do not move come out exact. The misfit is the norm of the difference of the profiles over the target's.
    """
    products, wanted = profile_products(kept, kept), profile_products(kept, [target])[:, 0]
    own = float(profile_products([target], [target])[0, 0])
    ones = np.ones(len(kept))
    system = np.block([[products / own, ones[:, None]], [ones, np.zeros(1)]])
    factors = np.linalg.solve(system, [*(wanted / own), 1.0])[:-1]
    square = 1 - 2 * factors @ wanted / own + factors @ products @ factors / own
    return factors, math.sqrt(max(float(square), 0.0))


def _chosen(run: Path, length: float, images: int | None) -> tuple[dict[Snapshot, Path], NDArray[np.float64]]:
    """The snapshots to combine and their factors."""
    if not 0 < length < UNIFORM:
        raise UserError(f"the length of an average, sigma_rel, lies between 0 and {UNIFORM:.4f}, not {length:g}")
    found = list_snapshots(run)
    if not found:
        raise UserError(
            f"{run}: holds no snapshots of averages; train with ema.powers and ema.snapshot_every_images set"
        )
    times = sorted({t for t, _ in found})
    end = times[-1] if images is None else images
    if end not in times:
        near = min(times, key=lambda t: abs(t - end))
        raise UserError(f"{run}: no snapshot was taken after {end} images; the nearest is at {near}")
    kept = {key: path for key, path in found.items() if key[0] <= end}
    factors, misfit = coefficients(list(kept), (end, length))
    gain = float(np.linalg.norm(factors))
    if misfit > MAX_MISFIT or gain > MAX_GAIN:
        lengths = ", ".join(f"{p:g}" for p in sorted({p for _, p in kept}))
        raise UserError(
            f"{run}: an average of length {length:g} does not follow from the {len(kept)} snapshots up to {end} images "
            f"(its profile is off by {misfit:.0%}, their rounding grows by {gain:.1f}); take one nearer to those kept "
            f"({lengths}), or train with other ema.powers or more frequent snapshots"
        )
    return kept, factors


def combine(run: Path, length: float, images: int | None = None) -> dict[str, Tensor]:
    """The state dict of the power average of sigma_rel `length` after `images` images (None: at the last snapshot).

    float32 on the CPU; tensors without gradients, such as counters, as in the last snapshot. One file is open at a
    time. Raises UserError for a run without snapshots, another time than theirs, a length too far from those kept,
    and damaged files.
    """
    kept, factors = _chosen(run, length, images)
    total: dict[str, Tensor] = {}
    for path, factor in zip(kept.values(), factors, strict=True):
        try:
            with safe_open(path, framework="pt") as file:
                if total and total.keys() != set(file.keys()):
                    raise UserError(f"{path}: holds other tensors than the snapshots before it; was it put there?")
                for name in file.keys():  # noqa: SIM118
                    value = file.get_tensor(name)
                    if not value.is_floating_point():
                        total[name] = value
                    elif name in total:
                        total[name].add_(value.float(), alpha=float(factor))
                    else:
                        total[name] = value.float() * float(factor)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{path}: not a whole snapshot ({error}); delete it and combine again") from None
    return total
