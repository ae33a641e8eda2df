"""The statistics of a stage's own latents, which make them of unit variance."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch

from ldm.config import parse, to_dict
from ldm.draws import keyed_generator
from ldm.latents import Normalisation
from ldm.weights import read_json, write_json
from training.cache import Cache, Items
from training.encoders import LatentSums
from training.files import write_atomically
from training.processes import process_state
from training.steps import Frozen, raw_latents, small_pictures

STATISTICS_ITEMS = 1024


def with_statistics(frozen: Frozen, codec_digest: str, cache: Items) -> Frozen:
    """With the statistics of the stage's own latents: those of the cache, or where it has none, or for a residual,
    measured as training draws them, on up to STATISTICS_ITEMS items, evenly spread; pixels are left as they are.

    What is measured is kept beside the cache, so that a run that goes on elsewhere has the same. Called by all
    processes.
    """
    residual = frozen.low_res is not None and frozen.low_res.residual
    if frozen.codec.autoencoder is None and not residual:
        return frozen
    if cache.key.codec is not None and not residual:
        return replace(frozen, normalisation=cache.normalisation)
    if not isinstance(cache, Cache):
        return replace(frozen, normalisation=_measured(frozen, cache))
    shape = None if frozen.low_res is None else to_dict(frozen.low_res)
    codec = [codec_digest, to_dict(frozen.codec.config)]
    key = json.dumps([codec, shape, to_dict(frozen.upscaling.degradation)], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    file = cache.folder / f"statistics-{digest}.json"
    with process_state().main_process_first():
        if not file.exists():
            made = to_dict(_measured(frozen, cache))
            write_atomically(file, lambda path: write_json(path, made))
    found: Normalisation = parse(Normalisation, read_json(file), str(file))
    return replace(frozen, normalisation=found)


def _measured(frozen: Frozen, cache: Items) -> Normalisation:
    """Each item with its own draws, one at a time, so that the bits depend on nothing else."""
    count, sums = min(len(cache), STATISTICS_ITEMS), LatentSums()
    for place in range(count):
        index = [place * len(cache) // count]
        generator = keyed_generator("statistics", index[0])
        stored = cache.stored(index)
        small = small_pictures(cache, index, stored, frozen, [generator])
        latent = raw_latents(stored, small, frozen)
        noise = torch.randn(latent.shape, generator=generator) if frozen.codec.autoencoder is not None else None
        sums.add_latents(latent if noise is None else raw_latents(stored, small, frozen, noise))
    found = sums.statistics()
    return Normalisation(mean=tuple(found["mean"]), std=tuple(found["std"]))
