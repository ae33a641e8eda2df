"""Which text encoder a stage is told by: one, or several as one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ldm.config import Config

_JOINED = ("joint", "clip_pair")


@dataclass(frozen=True)
class TextPart(Config):
    """Which text encoder. `minilm` is the packaged one; open_clip is a folder with open_clip_config.json.
    The others are folders in Hugging Face layout, or text_encoder/ of a diffusers folder beside tokenizer/; bert also a
    CLIP that `ldm train` made, whose text tower it then is.

    width: of its states, where that is to be known without the encoder; another one is refused.
    """

    kind: Literal["minilm", "bert", "clip", "clip_projection", "t5", "open_clip", "joint", "clip_pair"] = "minilm"
    path: str | None = None
    max_tokens: int | None = None  # None = 20, and for clip and open_clip all of the network's positions
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) != (self.kind in ("minilm", "joint", "clip_pair")):
            raise ValueError(f"kind {self.kind} {'needs a' if self.path is None else 'takes no'} path")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError("max_tokens must be at least 2")


@dataclass(frozen=True)
class TextConfig(TextPart):
    """One text encoder, or with kind `joint` several, their states one after the other, or with kind `clip_pair` the
    two of Stable Diffusion XL, side by side. empty_is_zero: of those, whether the null is zeros."""

    parts: tuple[TextPart, ...] = ()
    empty_is_zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.joined != (len(self.parts) > 1) or any(part.kind in _JOINED for part in self.parts):
            raise ValueError("kind joint needs two parts or more, none of them joint; other kinds have no parts")
        if self.joined and (self.max_tokens, self.width) != (None, None):
            raise ValueError(f"with kind {self.kind}, max_tokens and width are said of each part")
        if self.kind == "clip_pair" and [part.kind for part in self.parts] != ["clip", "clip_projection"]:
            raise ValueError("the parts of a clip_pair are of kinds clip and clip_projection")
        if self.empty_is_zero and self.kind != "clip_pair":
            raise ValueError("empty_is_zero is of kind clip_pair")

    @property
    def joined(self) -> bool:
        """Whether it is several."""
        return self.kind in _JOINED

    def placed(self, folder: str) -> TextConfig:
        """The same encoder with its files in a folder as a cascade keeps them: those of part i in folder/i."""
        if not self.joined:
            return self if self.path is None else replace(self, path=folder)
        parts = (p if p.path is None else replace(p, path=f"{folder}/{i}") for i, p in enumerate(self.parts))
        return replace(self, parts=tuple(parts))
