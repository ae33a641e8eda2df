"""The frozen networks at work: pictures -> moments, captions -> states, as a cache keeps them.

Every network call has a fixed shape and runs on one thread, as many calls at once as torch has threads: the bits of
a result depend neither on how many threads there are nor on what else is computed, and small calls are quicker so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.config import UserError
from ldm.draws import keyed_generator
from ldm.latents import LatentCodec, sample_moments
from ldm.low_res import DegradationConfig, degrade
from ldm.text import TextEncoder
from training.cache import CacheKey
from training.data import Example
from training.rows import shown

ENCODE_ROWS = 16
A = TypeVar("A")
B = TypeVar("B")


def in_order(work: Callable[[A], B], items: Iterable[A], threads: int) -> Generator[B, None, None]:
    """`work(item)` of each item, in order, computed by `threads` threads that each have one thread of torch.

    Items are taken as results are asked for, only a few ahead. Close it where it may be left early.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # here too: what handles the results would keep OpenMP threads spinning on the same cores
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the threads' own setting is also that of threads to come


def threads_for(device: torch.device) -> int:
    """How many network calls run at once: an accelerator takes one after the other."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@torch.no_grad()
def codec_moments(codec: LatentCodec, pixels: Tensor) -> Tensor:
    """uint8 pixels (B, H, W, 3), B at most ENCODE_ROWS -> moments (B, 2C, h, w) float32, computed at ENCODE_ROWS."""
    count = len(pixels)
    padded = torch.cat([pixels, pixels[:1].expand(ENCODE_ROWS - count, *pixels.shape[1:])])
    padded = padded.to(codec.device)
    planes = padded.permute(0, 3, 1, 2).contiguous()  # convolutions are a sixth slower on interleaved channels
    return codec.encode(planes.float() / 127.5 - 1)[:count].cpu()


def picture_tensors(examples: Iterable[Example],
                    codec: LatentCodec | None) -> Generator[tuple[list[Example], Tensor], None, None]:  # fmt: skip
    """Pictures in groups, each with what a cache keeps of it: moments (B, 2C, h, w) float16, or without a codec
    pixels (B, H, W, 3) uint8; a group is of one shape. Raises UserError, naming the picture, where the codec gives
    non-finite values."""

    def compute(group: list[Example]) -> tuple[list[Example], Tensor]:
        pixels = torch.from_numpy(np.stack([example.pixels for example in group]))
        return group, pixels if codec is None else codec_moments(codec, pixels).half().contiguous()

    device = torch.device("cpu") if codec is None else codec.device
    with closing(in_order(compute, _groups(examples, ENCODE_ROWS), threads_for(device))) as computed:
        for group, tensor in computed:
            if codec is not None and not bool((finite := tensor.isfinite().flatten(1).all(1)).all()):
                key = shown(group[int((~finite).nonzero()[0])].key)
                raise UserError(f"{key}: the codec gives non-finite latents for it; remove it, or train another codec")
            yield group, tensor


def flat(tensor: Tensor, size_px: int, codec: LatentCodec | None) -> Tensor:
    """What `picture_tensors` gives of pictures of one shape: each end to end, with zeros up to a square's length."""
    length = 3 * size_px**2 if codec is None else tensor.shape[1] * (size_px // codec.config.factor) ** 2
    rows = tensor.flatten(1)
    return pad(rows, (0, length - rows.shape[1])).contiguous()


def small_pictures(examples: Sequence[Example], scale: int) -> Tensor:
    """What a cache keeps of the low-resolution pictures of a group: uint8 (B, S / scale, S / scale, 3), by area."""
    return degrade(torch.from_numpy(np.stack([e.pixels for e in examples])), scale, DegradationConfig())


def opaque_parts(examples: Sequence[Example]) -> Tensor:
    """What is opaque of a group: uint8 (B, S, S), 255 for all; of data whose transparency is a mask."""
    return torch.from_numpy(np.stack([e.opaque for e in examples if e.opaque is not None]))


def beside(examples: Sequence[Example], key: CacheKey) -> list[Tensor]:
    """The tensors of a group after the first of `key.tensors`."""
    small = [small_pictures(examples, key.scale)] if key.scale else []
    return [*small, *([opaque_parts(examples)] if key.masked else [])]


def caption_states(text: TextEncoder, captions: Sequence[str]) -> list[Tensor]:
    """States (n, D) float16 of each caption's n real tokens; n is `max_tokens` where the encoder has no mask.

    Raises UserError, naming the caption, where they are not finite.
    """
    tokens = text.tokens(captions)
    groups = text.groups(tokens)
    found: list[Tensor] = [torch.empty(0)] * len(tokens)

    def compute(group: list[int]) -> Tensor:
        return text.states([tokens[i] for i in group]).half().cpu()

    with closing(in_order(compute, groups, threads_for(text.device))) as computed:
        for group, states in zip(groups, computed, strict=True):
            finite = states.isfinite().flatten(1).all(1)
            for row, index in enumerate(group):
                if not bool(finite[row]):
                    raise UserError(f"the text encoder gives non-finite states for {captions[index]!a:.200}")
                found[index] = states[row, : len(tokens[index])] if text.uses_mask else states[row]
    return found


class LatentSums:
    """Sums over latents, for their mean and standard deviation per channel; the draw of an item has noise keyed by
    its place, so that neither processes nor restarts change them. All in float64."""

    def __init__(self, count: int = 0, total: Sequence[float] = (), squares: Sequence[float] = ()) -> None:
        self.count, self.total, self.squares = count, np.array(total), np.array(squares)

    def add(self, moments: Tensor, block: int, first: int) -> None:
        """Add posterior draws of moments (B, 2C, h, w): items `first`, `first` + 1, ... of a block."""
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        generators = [keyed_generator("statistics", block, first + row) for row in range(len(moments))]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        self.add_latents(sample_moments(moments.float(), noise))

    def add_latents(self, latents: Tensor) -> None:
        """Add raw latents (B, C, h, w)."""
        raw = latents.double().numpy()
        per_channel = raw.size // raw.shape[1]
        # numpy adds in one order whatever the number of threads
        self.merge(LatentSums(per_channel, raw.sum((0, 2, 3)).tolist(), (raw**2).sum((0, 2, 3)).tolist()))

    def merge(self, other: LatentSums) -> None:
        if other.count:
            empty = not self.count
            self.count += other.count
            self.total = other.total if empty else self.total + other.total
            self.squares = other.squares if empty else self.squares + other.squares

    def plain(self) -> dict[str, int | list[float]]:
        """As JSON keeps it without loss."""
        return {"count": self.count, "total": self.total.tolist(), "squares": self.squares.tolist()}

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation per channel. Raises UserError for a channel without variance."""
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        if (std < 1e-6).any():
            raise UserError("a latent channel is constant over the data set: the codec is not trained")
        return {"mean": mean.tolist(), "std": std.tolist()}


def _groups(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Of each shape those of `size` pictures as they fill, and what is left at the end."""
    waiting: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        group = waiting.setdefault(example.pixels.shape, [])
        group.append(example)
        if len(group) == size:
            yield waiting.pop(example.pixels.shape)
    yield from waiting.values()
