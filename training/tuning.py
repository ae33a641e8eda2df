"""What is trained of a network that otherwise stays as it was released: a LoRA, a ControlNet, or a word.

    DiffusionRun -> tuned -> Tuned: what is trained, how the text is told meanwhile, and what is written of it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.control import ControlConfig, ControlFile, copied_control, save_control
from ldm.denoiser import Denoiser
from ldm.lora import LoraConfig, add_lora, save_lora
from ldm.models.unet import UNetConfig, UNetShape
from ldm.text import TextEncoder
from ldm.weights import Codec
from ldm.words import InversionConfig, save_words

if TYPE_CHECKING:
    from training.diffusion import DiffusionModule, DiffusionRun


class Tuned(Protocol):
    """A change to a released network."""

    def save(self, module: DiffusionModule, folder: Path) -> None:
        """Write the change alone."""


class _Lora:
    def __init__(self, config: LoraConfig, denoiser: Denoiser) -> None:
        self.config = config
        add_lora(denoiser.net, config)

    def save(self, module: DiffusionModule, folder: Path) -> None:
        save_lora(module.denoiser.net, self.config, folder)


class _Control:
    def __init__(self, config: ControlConfig, denoiser: Denoiser, unet: UNetConfig, shape: UNetShape,
                 codec: Codec) -> None:  # fmt: skip
        self.file = ControlFile(config, codec.digest)
        denoiser.net.requires_grad_(False)
        denoiser.control = copied_control(denoiser.net, unet, shape, codec.module.config.factor)

    def save(self, module: DiffusionModule, folder: Path) -> None:
        assert module.denoiser.control is not None
        save_control(module.denoiser.control, self.file, folder)


class _Word:
    def __init__(self, config: InversionConfig, denoiser: Denoiser) -> None:
        self.config = config
        denoiser.net.requires_grad_(False)

    def save(self, module: DiffusionModule, folder: Path) -> None:
        assert module.word is not None
        save_words({self.config.word: module.word}, folder)


def tuned(config: DiffusionRun, denoiser: Denoiser, shape: UNetShape, codec: Codec) -> Tuned | None:
    """Let a run train what it says alone, by changing the denoiser; None where it trains all of it."""
    if config.lora is not None:
        return _Lora(config.lora, denoiser)
    if config.control is not None:
        return _Control(config.control, denoiser, config.unet, shape, codec)
    return None if config.inversion is None else _Word(config.inversion, denoiser)


class Told:
    """Captions with a word that is being learned, told by the text encoder anew at every use.

    beginning: the word's first embeddings (n, D).
    """

    def __init__(self, config: InversionConfig, text: TextEncoder) -> None:
        self.config, self._text = config, text
        self.beginning = text.beginnings(config.begin, config.vectors)
        self.learn(self.beginning)

    def learn(self, word: Tensor) -> None:
        """Tell the word as these embeddings from now on."""
        self._text.learn(self.config.word, word)

    def __call__(self, captions: Sequence[str | None]) -> Conditioning:
        """Captions, each with the word, and None as the null; gradients reach the word's embeddings."""
        return Conditioning(*self._text.told(["" if c is None else self.config.told(c) for c in captions]))
