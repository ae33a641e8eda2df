"""What can be trained: each run's config, and its networks put together for the loop.

    ldm train CONFIG -> RunConfig -> build_task (data -> encode -> cache, networks) -> loop.train -> RUN/final
"""

from __future__ import annotations

from typing import Annotated

from ldm.config import tagged
from ldm.text import TextEncoder
from ldm.weights import Codec
from training.autoencoder import AutoencoderRun, AutoencoderTask
from training.data import Reader
from training.diffusion import DiffusionRun, DiffusionTask

RunConfig = Annotated[AutoencoderRun | DiffusionRun, tagged()]


def load_parts(config: AutoencoderRun | DiffusionRun) -> tuple[tuple[Reader, Reader], Codec | None, TextEncoder | None]:
    """Readers of training and held-out items, and the frozen networks that encode them, on this process's device.

    Of a stage whose cache holds pixels the codec is None.
    """
    # the data first: a wrong folder is told before any network is loaded
    readers = config.validation.readers(config.data, config.shard_items)
    if isinstance(config, AutoencoderRun):
        return readers, None, None
    codec, text = config.load_frozen()
    return readers, codec if config.caches_latents else None, text


def build_task(config: AutoencoderRun | DiffusionRun) -> AutoencoderTask | DiffusionTask:
    """The task of a config: data read, caches written where missing, networks with fresh weights or those of `init`.

    Called by all processes of a launch.
    """
    readers = config.validation.readers(config.data, config.shard_items)
    return AutoencoderTask(config, readers) if isinstance(config, AutoencoderRun) else DiffusionTask(config, readers)
