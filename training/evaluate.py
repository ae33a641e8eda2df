"""How well a cascade follows its prompts: whose training picture does each of its pictures look like most?

    train captions that name a style -> Cascade -> pictures -> codec latents -> nearest training picture
    -> is it of the prompted style, of the prompted concept? The measure never sees the caption.

`python -m training.evaluate MODEL DATA` prints both shares with their 95% intervals.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.draws import keyed_generator
from ldm.latents import Normalisation
from pipelines.cascade import Cascade, load_cascade
from pipelines.images import grid, save_png, to_uint8
from training.cache import Cache
from training.data import DataConfig, Reader
from training.encode import encode
from training.encoders import ENCODE_ROWS, codec_moments


@dataclass(frozen=True)
class Agreement:
    """Of `count` pictures, how many have a nearest training picture of the prompted style, concept, cluster."""

    count: int
    style: int
    concept: int
    cluster: int

    @staticmethod
    def of(cache: Cache, pairs: Sequence[tuple[int, int]]) -> Agreement:
        """From pairs (item that was asked for, item that the picture looks like most)."""
        fields = [(cache.record(asked)["fields"], cache.record(found)["fields"]) for asked, found in pairs]
        hits = {name: sum(a[name] == b[name] for a, b in fields) for name in ("style", "concept", "cluster")}
        return Agreement(len(pairs), **hits)

    def __str__(self) -> str:
        parts = []
        for name in ("style", "concept", "cluster"):
            low, high = wilson(getattr(self, name), self.count)
            parts.append(f"{name} {getattr(self, name)} of {self.count} (95%: {low:.0%} to {high:.0%})")
        return "; ".join(parts)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    share = hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return middle - half, middle + half


def prompt_agreement(cascade: Cascade, cache: Cache, captions: dict[int, str], seed: int = 0,
                     guidance: float | None = None) -> tuple[list[tuple[int, int]], Tensor]:  # fmt: skip
    """Draw one picture per caption and look up its nearest training picture in codec latents.

    cache: the training cache of latents; captions: item index in the cache -> its caption.
    Returns pairs (item asked for, nearest item) and the pictures (N, 3, H, W) in [-1, 1].
    """
    normalisation = cascade.stages[-1].config.normalisation
    known = torch.cat([
        _latents(cache.stored(range(a, min(a + 512, len(cache)))), normalisation) for a in range(0, len(cache), 512)
    ])  # fmt: skip
    indices = list(captions)
    pictures = cascade([captions[i] for i in indices], [seed + k for k in range(len(indices))],
                       cascade.sampling(guidance=guidance))  # fmt: skip
    stored = torch.from_numpy(to_uint8(pictures))
    drawn = torch.cat([
        _latents(codec_moments(cascade.codec.module, stored[a : a + ENCODE_ROWS]), normalisation)
        for a in range(0, len(stored), ENCODE_ROWS)
    ])  # fmt: skip
    nearest = torch.cdist(drawn, known).argmin(1).tolist()
    return list(zip(indices, nearest, strict=True)), pictures


def _latents(moments: Tensor, normalisation: Normalisation) -> Tensor:
    return normalisation.apply(moments.float().chunk(2, dim=1)[0]).flatten(1)


def choose_captions(cache: Cache, texts: dict[int, tuple[str, ...]], count: int, seed: int = 0) -> dict[int, str]:
    """`count` items drawn without replacement, each with one of its captions that name its style."""
    chosen: dict[int, str] = {}
    draws = keyed_generator(seed, "evaluate")
    for index in torch.randperm(len(cache), generator=draws).tolist():
        named = [c for c in texts[index] if cache.record(index)["fields"]["style"] in c]
        if named and len(chosen) < count:
            chosen[index] = named[int(torch.randint(len(named), (), generator=draws))]
    return chosen


def main() -> None:
    """Command line of the prompt-agreement measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a cascade folder")
    parser.add_argument("data", help="the emoji data set it was trained on")
    parser.add_argument("--cache", default="cache", help="where caches are kept")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--grid", type=Path, help="write the pictures as a grid to this PNG")
    options = parser.parse_args()
    cascade = load_cascade(options.model)
    cascade = cascade.only(cascade.stages[0].config.name)  # the base alone decides what is shown
    data = DataConfig(path=options.data, split="train", size_px=cascade.stages[-1].config.resolution_px)
    reader = Reader(data)
    cache = encode(reader, options.cache, cascade.codec)
    texts = {row.key: row.captions for row in reader.rows}
    captions = choose_captions(cache, {i: texts[cache.record(i)["key"]] for i in range(len(cache))}, options.count)
    pairs, pictures = prompt_agreement(cascade, cache, captions, guidance=options.guidance)
    print("all:          ", Agreement.of(cache, pairs))
    drawn = [pair for pair in pairs if not cache.record(pair[0])["fields"]["flag"]]
    print("without flags:", Agreement.of(cache, drawn))
    if options.grid:
        save_png(grid(list(to_uint8(pictures)), columns=10), options.grid)


if __name__ == "__main__":
    main()
