"""What can be trained: each run's config, and its networks put together for the loop.

    ldm train CONFIG -> RunConfig -> build_task (data -> encode -> cache, networks) -> loop.train -> RUN/final
"""

from __future__ import annotations

from typing import Annotated, Any

from ldm.config import UserError, tagged
from ldm.text import TextEncoder
from ldm.weights import Codec
from training.autoencoder import AutoencoderRun, AutoencoderTask
from training.classifier import ClassifierRun, ClassifierTask
from training.clip import ClipRun, ClipTask
from training.data import Reader
from training.diffusion import DiffusionRun, DiffusionTask
from training.engine import Task
from training.noisy_classifier import NoisyClassifierRun, NoisyClassifierTask
from training.palette import PaletteRun, PaletteTask
from training.sequences import SequencesRun, SequencesTask

DataRun = AutoencoderRun | ClassifierRun | ClipRun | DiffusionRun | NoisyClassifierRun | PaletteRun
AnyRun = DataRun | SequencesRun
RunConfig = Annotated[AnyRun, tagged()]
_TASKS: dict[type, Any] = {
    AutoencoderRun: AutoencoderTask, ClassifierRun: ClassifierTask, ClipRun: ClipTask, DiffusionRun: DiffusionTask,
    NoisyClassifierRun: NoisyClassifierTask, PaletteRun: PaletteTask,
}  # fmt: skip


def with_data(config: AnyRun) -> DataRun:
    """The config itself. Raises UserError for a kind of run that makes its own data, for which nothing is encoded."""
    if isinstance(config, SequencesRun):
        raise UserError("kind sequences draws its own data: there is nothing to encode")
    return config


def load_parts(config: AnyRun) -> tuple[tuple[Reader, Reader], Codec | None, TextEncoder | None]:
    """Readers of training and held-out items, and the frozen networks that encode them, on this process's device.

    Of a stage whose cache holds pixels the codec is None.
    """
    config = with_data(config)
    # the data first: a wrong folder is told before any network is loaded
    readers = config.validation.readers(config.data, config.shard_items)
    if isinstance(config, NoisyClassifierRun):
        codec = config.load_stage().codec
        return readers, codec if codec.module.config.autoencoder is not None else None, None
    if isinstance(config, PaletteRun):
        return readers, None, config.load_text()
    if not isinstance(config, DiffusionRun):
        return readers, None, None
    codec, text = config.load_frozen()
    return readers, codec if config.caches_latents else None, text


def build_task(config: AnyRun) -> Task:
    """The task of a config: data read, caches written where missing, networks with fresh weights or those of `init`.

    Called by all processes of a launch.
    """
    if isinstance(config, SequencesRun):
        drawn: Any = SequencesTask(config)  # its items are what the loop wants of a cache, in memory
        return drawn  # type: ignore[no-any-return]
    task: Task = _TASKS[type(config)](config, config.validation.readers(config.data, config.shard_items))
    return task
