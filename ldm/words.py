"""Textual inversion (Gal et al. 2022): a word of one's own, told to a frozen text encoder as learned embeddings.

    captions with the word -> Lexicon -> frozen encoder -> states
    embeddings learned -> save_words -> FOLDER/learned_embeds.safetensors -> load_words -> Lexicon.learn

The file is in the layout of diffusers, {word: (n, D)}, so that stock pipelines of the same encoder load it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.config import Config, UserError
from ldm.lexicon import pattern
from ldm.weights import check_weights_file, read_header

WORDS_FILE = "learned_embeds.safetensors"
_UNNAMED = "emb_params"  # the key where a file's name is the word


@dataclass(frozen=True)
class InversionConfig(Config):
    """word: what stands for the pictures in captions; a caption without it begins with it. vectors: embeddings
    that it is told as. begin: the words whose embeddings they begin as, one after the other."""

    word: str
    vectors: int = 2
    begin: str = "picture"

    def __post_init__(self) -> None:
        if not self.word.strip() or self.word != self.word.strip():
            raise ValueError("word must not be empty, nor begin or end with a space")
        if not 1 <= self.vectors <= 64:
            raise ValueError(f"vectors must be from 1 to 64, not {self.vectors}")

    def told(self, caption: str) -> str:
        """The caption with the word."""
        if pattern([self.word]).search(caption):
            return caption
        return f"{self.word}, {caption}" if caption.strip() else self.word


def save_words(words: Mapping[str, Tensor], folder: Path) -> None:
    """Write {word: (n, D)}, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({word: rows.detach().float().cpu().contiguous() for word, rows in words.items()}, folder / WORDS_FILE)


def load_words(path: Path) -> tuple[dict[str, Tensor], str]:
    """The words of a file, or of a folder with one, and the file's digest.

    Raises UserError for a file that is not safetensors, or holds anything but embeddings.
    """
    file = path / WORDS_FILE if path.is_dir() else path
    check_weights_file(file)
    read_header(file)
    found = {}
    for name, value in load_file(file).items():
        rows = value.float()[None] if value.ndim == 1 else value.float()
        if rows.ndim != 2 or not len(rows) or not bool(rows.isfinite().all()):
            raise UserError(f"{file}: {name!a}: of shape {tuple(value.shape)}, and no embeddings (n, width) of a word, "
                            "all finite")  # fmt: skip
        found[file.stem if name == _UNNAMED else name] = rows
    if not found or not all(word.strip() for word in found):
        raise UserError(f"{file}: names no word")
    return found, hashlib.sha256(file.read_bytes()).hexdigest()
