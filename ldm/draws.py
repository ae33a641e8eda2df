"""Keyed randomness: a draw depends on what it is for, never on who draws it or what is drawn beside it."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(*key: str | int) -> torch.Generator:
    """A CPU generator that depends on the key alone, such as (seed, stage, purpose) or (seed, "image", position)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
