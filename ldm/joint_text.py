"""Several text encoders as one: their states one after the other, as in Stable Diffusion 3 (Esser et al. 2024, sec. 5).

    caption -> each encoder's states (L_i, D_i) -> zeros up to the widest D -> (L_1 + L_2 + ..., D)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ldm.config import UserError
from ldm.text import ROWS, TextConfig, TextEncoder

_FILLER = -1  # a token of an encoder that keeps all its states, beyond the caption's own


class SeveralTextEncoders(TextEncoder):
    """What encoders made of others, `parts`, have in common; `said` is what decides states beside them."""

    def __init__(self, config: TextConfig, parts: Sequence[TextEncoder], *said: str) -> None:
        self.config = config
        self.parts = list(parts)
        self.files = {f"{i}/{name}": path for i, part in enumerate(parts) if part.config.path is not None
                      for name, path in part.files.items()}  # fmt: skip
        told = [*said, *(part.digest for part in parts)]
        self.digest = hashlib.sha256("\n".join(told).encode()).hexdigest()
        self.device = parts[0].device
        self.module = nn.ModuleList([part.module for part in parts])

    def groups(self, tokens: Sequence[list[int]]) -> list[list[int]]:
        """Indices of all captions in groups of at most ROWS."""
        return [list(range(a, min(a + ROWS, len(tokens)))) for a in range(0, len(tokens), ROWS)]

    def learn(self, word: str, rows: Tensor) -> None:
        """Raises UserError: no word stands in several encoders' tables."""
        raise UserError(f"{word!a}: several text encoders together learn no words; use one alone")

    def beginnings(self, caption: str, count: int) -> Tensor:
        """Raises UserError, as `learn`."""
        raise UserError("inversion: several text encoders together learn no words; use one alone")


class JointTextEncoder(SeveralTextEncoders):
    """A `TextEncoder` made of others. Those that keep all their states come first, so that a caption's real tokens
    stand in one row; at most the last tells its padding apart, and then the whole does.

    Raises UserError for another order.
    """

    def __init__(self, config: TextConfig, parts: Sequence[TextEncoder]) -> None:
        masked = [part.uses_mask for part in parts]
        if any(masked[:-1]):
            kinds = ", ".join(part.config.kind for part in parts)
            raise UserError(f"text.parts are {kinds}: only the last may be of a kind that leaves out padding (minilm, "
                            "bert, t5); put clip and open_clip before it")  # fmt: skip
        super().__init__(config, parts, "joint")
        self.width = max(part.width for part in parts)
        self.max_tokens = sum(part.max_tokens for part in parts)
        self.uses_mask = masked[-1]

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, encoder after encoder: all positions of those that keep all, then the last's."""
        found: list[list[int]] = [[] for _ in captions]
        for part in self.parts:
            for row, ids in zip(found, part.tokens(captions), strict=True):
                row += ids if part.uses_mask else [*ids, *[_FILLER] * (part.max_tokens - len(ids))]
        return found

    def groups(self, tokens: Sequence[list[int]]) -> list[list[int]]:
        """Indices of all captions in groups for `states`, as the last encoder groups them."""
        last = self.parts[-1]
        if not last.uses_mask:
            return super().groups(tokens)
        return last.groups([ids[self.max_tokens - last.max_tokens :] for ids in tokens])

    def states(self, tokens: list[list[int]]) -> Tensor:
        """One call of each network: a group of at most ROWS captions -> states (len(tokens), length, D)."""
        found, start = [], 0
        for part in self.parts:
            own = [ids[start : None if part.uses_mask else start + part.max_tokens] for ids in tokens]
            start += part.max_tokens
            states = part.states([[i for i in ids if i != _FILLER] for ids in own])
            found.append(pad(states, (0, self.width - part.width)))
        return torch.cat(found, 1)

    def token_count(self, caption: str) -> tuple[int, int]:
        """Tokens (used, total) of an encoder that reads all of a caption, or else of the one that reads most."""
        counts = (part.token_count(caption) for part in self.parts)
        return max(counts, key=lambda count: (count[0] == count[1], count[0]))
