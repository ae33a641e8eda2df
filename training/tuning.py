"""What is trained of a network that otherwise stays as it was released: a LoRA, a ControlNet, or a word.

    DiffusionRun -> tuned -> Tuned: what is trained, how the text is told meanwhile, and what is written of it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.config import UserError
from ldm.control import ControlConfig, ControlFile, copied_control, save_control
from ldm.denoiser import Denoiser
from ldm.lora import PREFIX, LoraConfig, add_lora, save_lora, text_networks
from ldm.models.unet import UNetConfig, UNetShape
from ldm.text import TextEncoder
from ldm.weights import Codec
from ldm.words import InversionConfig, save_words

if TYPE_CHECKING:
    from training.diffusion import DiffusionModule, DiffusionRun

WORD = "word"


class Tuned(Protocol):
    """A change to a released network."""

    def save(self, module: DiffusionModule, folder: Path) -> None:
        """Write the change alone."""


class _Lora:
    def __init__(self, config: LoraConfig, denoiser: Denoiser, text: TextEncoder) -> None:
        self.config, self._text = config, text
        add_lora(denoiser.net, config)

    def save(self, module: DiffusionModule, folder: Path) -> None:
        module.teach()
        texts = text_networks(self._text.module) if self.config.text else {}
        save_lora({PREFIX: module.denoiser.net, **texts}, self.config, folder)


class _Control:
    def __init__(self, config: ControlConfig, denoiser: Denoiser, unet: UNetConfig, shape: UNetShape,
                 codec: Codec) -> None:  # fmt: skip
        self.file = ControlFile(config, codec.latents_digest)
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
        save_words({self.config.word: module.text[WORD]}, folder)


def tuned(config: DiffusionRun, denoiser: Denoiser, shape: UNetShape, codec: Codec, text: TextEncoder) -> Tuned | None:
    """Let a run train what it says alone, by changing the denoiser; None where it trains all of it."""
    if config.lora is not None:
        return _Lora(config.lora, denoiser, text)
    if config.control is not None:
        return _Control(config.control, denoiser, config.unet, shape, codec)
    return None if config.inversion is None else _Word(config.inversion, denoiser)


class Told(ABC):
    """Captions told by the text encoder anew at every use, since part of how it tells them is being learned.

    beginning: what is learned, by name, as it is at first.
    """

    beginning: dict[str, Tensor]

    def __init__(self, text: TextEncoder) -> None:
        self._text = text

    @abstractmethod
    def learn(self, learned: Mapping[str, Tensor]) -> None:
        """Tell captions by these from now on."""

    def caption(self, caption: str) -> str:
        """What is told in a caption's place."""
        return caption

    def __call__(self, captions: Sequence[str | None]) -> Conditioning:
        """Captions, and None as the null; gradients reach what is learned."""
        return Conditioning(*self._text.told(["" if c is None else self.caption(c) for c in captions]))


class _ToldWord(Told):
    """With the embeddings (n, D) of a word."""

    def __init__(self, config: InversionConfig, text: TextEncoder) -> None:
        super().__init__(text)
        self._config = config
        self.beginning = {WORD: text.beginnings(config.begin, config.vectors)}
        self.learn(self.beginning)

    def learn(self, learned: Mapping[str, Tensor]) -> None:
        self._text.learn(self._config.word, learned[WORD])

    def caption(self, caption: str) -> str:
        return self._config.told(caption)


class _ToldLora(Told):
    """With a LoRA of the encoder's attentions."""

    def __init__(self, config: LoraConfig, text: TextEncoder, seed: int) -> None:
        super().__init__(text)
        if isinstance(text.module, nn.ModuleList):
            raise UserError("lora.text: of one text encoder alone, and this model has several; leave it out")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora(text.module, config)
        found = {name: value for name, value in text.module.named_parameters() if value.requires_grad}
        self._layers = {name: text.module.get_submodule(name.removesuffix(".weight")) for name in found}
        self.beginning = {name: value.detach().clone() for name, value in found.items()}

    def learn(self, learned: Mapping[str, Tensor]) -> None:
        for name, layer in self._layers.items():
            layer._parameters["weight"] = cast(nn.Parameter, learned[name])  # whoever trains it holds it


def told_by(config: DiffusionRun, text: TextEncoder) -> Told | None:
    """How captions are told while a run changes that; None where their states never change, and can be cached."""
    if config.inversion is not None:
        return _ToldWord(config.inversion, text)
    return _ToldLora(config.lora, text, config.seed) if config.lora is not None and config.lora.text else None
