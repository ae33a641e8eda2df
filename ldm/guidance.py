"""Guidance: takes a denoiser, is called like one."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.denoiser import Denoiser, Prediction


class ClassifierFreeGuidance:
    """eps = w eps_cond + (1 - w) eps_null, and so for x0 (Ho & Salimans 2022, eq. 6; w is 1 + theirs).

    `scale` w as in diffusers: 1 is no guidance, and then the network gets B rows. Otherwise it gets one call
    of 2 B rows: B null, then B conditional. `null` holds one item, or one per row. If the denoiser clips, the
    combination is clipped and not its parts.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Conditioning) -> None:
        self.denoiser = denoiser
        self.scale = scale
        self.null = null

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """x_t (B, C, *grid), t (B,) -> guided x0 and eps, which still satisfy x_t = alpha x0 + sigma eps."""
        if self.scale == 1:
            return self.denoiser(x_t, t, cond)
        null = self.null.expand(len(x_t)) if len(self.null) == 1 else self.null
        both = self.denoiser.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat([null, cond]))
        x0_null, x0_cond = both.x0.chunk(2)
        eps_null, eps_cond = both.eps.chunk(2)
        guided = Prediction(
            x0=x0_null + self.scale * (x0_cond - x0_null),
            eps=eps_null + self.scale * (eps_cond - eps_null),
            var_mix=None if both.var_mix is None else both.var_mix.chunk(2)[1],
        )
        return self.denoiser.clip(guided, x_t, t)
