"""The two CLIP text encoders of Stable Diffusion XL as one (Podell et al. 2023, sec. 2.1).

    caption -> states before the last layer of each, side by side (L, D_1 + D_2)
            -> and after them, as one state more, the pooled text of the second, in the first P of its numbers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.config import UserError
from ldm.joint_text import SeveralTextEncoders
from ldm.text import ROWS, TextConfig, TextEncoder


class PairTextEncoder(SeveralTextEncoders):
    """A `TextEncoder` made of two of kind clip, the second with a projection; pooled: the width P of what that gives.

    Raises UserError where the second has no projection, or they keep other numbers of states.
    """

    def __init__(self, config: TextConfig, parts: Sequence[TextEncoder]) -> None:
        first, second = parts
        super().__init__(config, parts, "clip_pair", str(config.empty_is_zero))
        self.pooled = int(getattr(second.module.config, "projection_dim", 0))
        if first.max_tokens != second.max_tokens or first.config.kind != "clip":
            raise UserError("text.parts of a clip_pair: two encoders of kind clip with as many positions, the second "
                            "with a projection")  # fmt: skip
        self.width = first.width + second.width
        if self.pooled > self.width:
            raise UserError(f"text.parts: a pooled text of {self.pooled} does not fit states of {self.width}")
        self.max_tokens = first.max_tokens + 1
        self.uses_mask = False
        self._empty = self.tokens([""])[0]

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, padded by each encoder's own token, the first's and then the second's."""
        found: list[list[int]] = [[] for _ in captions]
        for part in self.parts:
            for row, ids in zip(found, part.tokens(captions), strict=True):
                row += [*ids, *[part.pad_id] * (part.max_tokens - len(ids))]
        return found

    def states(self, tokens: list[list[int]]) -> Tensor:
        """One call of each network: at most ROWS captions -> states (len(tokens), L + 1, D)."""
        rows = [tokens[min(row, len(tokens) - 1)] for row in range(ROWS)]  # rows to spare repeat the last caption
        length, hidden, pooled = self.max_tokens - 1, [], torch.empty(0)
        for number, part in enumerate(self.parts):
            ids = torch.tensor([row[number * length : (number + 1) * length] for row in rows], device=self.device)
            network: Any = part.module
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                out = network(input_ids=ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled = out[0]
        last = pad(pooled[:, None], (0, self.width - self.pooled))
        states = torch.cat([torch.cat(hidden, 2), last], 1)[: len(tokens)]
        if self.config.empty_is_zero:
            states[[ids == self._empty for ids in tokens]] = 0
        return states

    def token_count(self, caption: str) -> tuple[int, int]:
        """Tokens (used, total) of a caption."""
        return self.parts[0].token_count(caption)
