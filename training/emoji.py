"""Builds the emoji data set: six open designs, rendered from vectors, captioned by Unicode's names and keywords.

    npm packages -> icons + Unicode names -> one Picture per (character, style) -> clusters -> splits -> PNG + rows

A concept is a Unicode character, not an icon's name: designs name the same character differently, so a split by
name would leak. The unit of every split is a cluster of characters that look or mean nearly the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config import UserError
from ldm.progress import progress
from training import emoji_packages as packages
from training.emoji_packages import Source

RENDER_PX = 256
COMBOS_SHARE, CONCEPTS_SHARE, COMBOS_MIN_STYLES = 0.04, 0.01, 4
DUPLICATE_RMS, DUPLICATE_PX = 6.0, 32


STYLES = tuple(source.style for source in packages.SOURCES)
SPLITS = ("train", "combos", "concepts")

_SKIN_TONE = re.compile(r"(^|-)(skin-tone|light|medium|dark)(-|$)")
# One base drawn as man, woman or person is one cluster even where Unicode gave each a character of its own.
_SAME_BASE = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3",
    "1F934": "1FAC5", "1F478": "1FAC5", "1F57A": "1F483", "1F936": "1F385", "1F46C": "1F46B", "1F46D": "1F46B",
}  # fmt: skip


@dataclass
class Picture:
    """One character in one style; `svg` is a square document, the rest becomes its row in metadata.jsonl."""

    style: str
    hexcode: str
    concept: str
    flag: bool
    captions: list[str]
    svg: str
    licence: str
    cluster: str = ""
    split: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.style.replace(' ', '-')}/{self.hexcode.lower()}.png"

    def row(self) -> dict[str, Any]:
        data = asdict(self)
        del data["svg"]
        return {"file_name": self.file_name, **data}


@dataclass
class Built:
    """What `build` made: pictures, pictures per (split, style), icons dropped because no character fits them."""

    folder: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    clusters: int = 0


def _stable_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the texts only."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big") / 2**64


def _key(hexcode: str) -> str:
    """A character's code points without variation selectors, upper case."""
    return "-".join(p for p in hexcode.upper().split("-") if p != "FE0F")


def _slug(label: str) -> str:
    text = label.lower().replace("’", "").replace("'", "").replace("&", " ").replace("ñ", "n")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _svg(icons: dict[str, Any], name: str) -> str | None:
    """The icon as a square SVG document, centred; None where it cannot be drawn."""
    flip = False
    if name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or set(alias) - {"parent", "hFlip"}:
            return None
        name, flip = alias["parent"], alias.get("hFlip", False)
        if name not in icons["icons"]:
            return None
    icon = icons["icons"][name]
    box = {k: icon.get(k, icons.get(k, default)) for k, default in
           {"left": 0, "top": 0, "width": 16, "height": 16}.items()}  # fmt: skip
    side = max(box["width"], box["height"])
    x, y = box["left"] - (side - box["width"]) / 2, box["top"] - (side - box["height"]) / 2
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({2 * box["left"] + box["width"]} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_PX}" height="{RENDER_PX}" viewBox="{x} {y} {side} {side}">{body}</svg>'
    )


def _concept_name(entry: dict[str, Any]) -> str:
    label: str = entry["label"]
    if label.startswith("flag: "):
        return f"flag of {label[6:]}"
    return label.replace(":", ",")


def captions(entry: dict[str, Any], style: str) -> list[str]:
    """The six captions of a picture: five that name the style, one that does not. Fixed, so they can be cached."""
    name = _concept_name(entry)
    tags = [t for t in entry.get("tags", []) if t.lower() not in name.lower()]
    tags.sort(key=lambda tag: _stable_hash("tag", entry["hexcode"], tag))
    first, second = [*tags, name, name][:2]
    article = "an" if name[0].lower() in "aeiou" else "a"
    found = (
        f"{name}, {style} style",
        f"{style} {name}",
        f"{article} {name}, {style} style",
        f"{name}, {first}, {second}, {style} style" if tags else f"{style} style {name}",
        name,
        f"{style} {name}, {first}" if tags else f"{article} {name} in {style} style",
    )
    return list(dict.fromkeys(found))


def _name_table(designs: dict[str, dict[str, Any]], entries: dict[str, Any]) -> dict[str, str]:
    """Icon or label name -> character key, from Unicode's labels and the designs that say their characters."""
    table = {_slug(entry["label"]): key for key, entry in entries.items()}
    for files in designs.values():
        names = {name: _key(char) for char, name in files.get("chars.json", {}).items() if _key(char) in entries}
        for name, key in names.items():
            table.setdefault(name, key)
        for alias, target in files["icons.json"].get("aliases", {}).items():
            if set(target) == {"parent"} and target["parent"] in names:
                table.setdefault(alias, names[target["parent"]])
    return table


def _match(name: str, icons: dict[str, Any], table: dict[str, str]) -> str | None:
    """The character an icon of a design without character codes shows, by its names."""
    aliases = [a for a, t in icons.get("aliases", {}).items() if t == {"parent": name}]
    for candidate in (name, *aliases):
        forms = (candidate, candidate.replace("flag-for-", "flag-"), candidate.removesuffix("-sign"))
        for form in (*forms, candidate.removesuffix("-face"), candidate + "-face"):
            if form in table:
                return table[form]
    return None


def collect(folder: Path, sources: Sequence[Source]) -> tuple[list[Picture], dict[str, list[str]]]:
    """All pictures of all designs, undrawn, and per style the icon names no character was found for."""
    emojibase = packages.read_package(packages.UNICODE, folder)["data.json"]
    entries = {_key(e["hexcode"]): e for e in emojibase if "group" in e and e["group"] != 2}
    designs = {s.style: packages.read_package(s, folder) for s in sources}
    table = _name_table(designs, entries)
    pictures, dropped = [], {}
    for source in sources:
        files = designs[source.style]
        icons = files["icons.json"]
        if files.get("chars.json"):
            found = {_key(char): name for char, name in files["chars.json"].items() if _key(char) in entries}
            plain = [n for n in icons["icons"] if not _SKIN_TONE.search(n) and not icons["icons"][n].get("hidden")]
            dropped[source.style] = sorted(set(plain) - set(found.values()))
        else:
            found = {}
            dropped[source.style] = []
            for name in icons["icons"]:
                key = _match(name, icons, table)
                if key is None or key in found:
                    if not _SKIN_TONE.search(name):
                        dropped[source.style].append(name)
                else:
                    found[key] = name
        for key, name in sorted(found.items()):
            svg = _svg(icons, name)
            if svg is None:
                dropped[source.style].append(name)
                continue
            entry = entries[key]
            pictures.append(
                Picture(source.style, key, _concept_name(entry), entry["group"] == 9,
                        captions(entry, source.style), svg, source.licence)
            )  # fmt: skip
    return pictures, dropped


def _base(hexcode: str) -> str:
    parts = [_SAME_BASE.get(p, p) for p in hexcode.split("-") if p not in ("2640", "2642", "200D")]
    return "-".join(parts)


def assign_clusters(pictures: list[Picture], thumbs: np.ndarray) -> None:
    """Set `cluster`: variants of one base, and near-duplicates inside a style (rms < 6/255 at 32 px), are one.

    thumbs: (N, 32, 32, 3) float32 in [0, 255], in the order of `pictures`.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for picture in pictures:
        a, b = root(picture.hexcode), root(_base(picture.hexcode))
        parent[max(a, b)] = min(a, b)
    flat = thumbs.reshape(len(thumbs), -1)
    for style in STYLES:
        index = np.array([i for i, p in enumerate(pictures) if p.style == style], dtype=int)
        x = flat[index]
        squares = (x**2).sum(1)
        mean_square = (squares[:, None] + squares[None] - 2 * x @ x.T) / x.shape[1]
        for i, j in zip(*np.nonzero(np.triu(mean_square < DUPLICATE_RMS**2, 1)), strict=True):
            a, b = root(pictures[index[i]].hexcode), root(pictures[index[j]].hexcode)
            parent[max(a, b)] = min(a, b)
    for picture in pictures:
        picture.cluster = root(picture.hexcode)


def assign_splits(pictures: list[Picture]) -> None:
    """Set `split` by a stable hash of the cluster: about 1% of clusters are `concepts`; of the others, about 4%
    of the (cluster, style) pairs whose cluster is drawn in at least four designs are `combos`; the rest `train`."""
    styles = defaultdict(set)
    for picture in pictures:
        styles[picture.cluster].add(picture.style)
    for picture in pictures:
        picture.split = _split_of(picture, len(styles[picture.cluster]) >= COMBOS_MIN_STYLES)


def _split_of(picture: Picture, drawn_often: bool = True) -> str:
    if _stable_hash("concepts", picture.cluster) < CONCEPTS_SHARE:
        return "concepts"
    held = drawn_often and _stable_hash("combos", picture.cluster, picture.style) < COMBOS_SHARE
    return "combos" if held else "train"


def _render(job: tuple[str, str]) -> np.ndarray:
    """Draw one SVG on white into a PNG file; return its 32 px area-downsample, float32 in [0, 255]."""
    import resvg_py

    svg, path = job
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))
    image = Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")
    if image.size != (RENDER_PX, RENDER_PX):
        raise ValueError(f"{path}: rendered at {image.size}")
    image.save(path, optimize=False)
    small = image.resize((DUPLICATE_PX, DUPLICATE_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def _render_all(pictures: list[Picture], folder: Path) -> np.ndarray:
    for style in {p.style for p in pictures}:
        (folder / style.replace(" ", "-")).mkdir(exist_ok=True)
    jobs = [(p.svg, str(folder / p.file_name)) for p in pictures]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        thumbs = pool.map(_render, jobs, chunksize=16)
        return np.stack(list(progress(thumbs, "rendering", total=len(jobs))))


def _known(others: list[Picture], pictures: list[Picture]) -> list[Picture]:
    """Those of characters that `pictures` show, in their clusters and in `train`."""
    clusters = {picture.hexcode: picture.cluster for picture in pictures}
    return [replace(p, cluster=clusters[p.hexcode], split="train") for p in others if p.hexcode in clusters]


def held_out_of(style: str, pictures: list[Picture]) -> list[Picture]:
    """The pictures of one design; of a design of MORE_SOURCES some are held out, by the rule of the six."""
    own = [p for p in pictures if p.style == style]
    return own if style in STYLES else [replace(p, split=_split_of(p)) for p in own]


def build(folder: str | Path, tarballs: str | Path | None = None, more: bool = False,
          only: str | None = None) -> Built:  # fmt: skip
    """Write the emoji data set into `folder`: PNG files of 256 px, metadata.jsonl, SOURCES.md, dropped.json.

    tarballs: folder with the npm packages (fetched there when missing; a temporary one when None). more: draw the same
    characters in MORE_SOURCES too, all of them in `train`; nothing else changes. only: keep one design, of either; some
    of it is held out by the same rule.
    Raises UserError when `folder` exists and is not empty, npm is missing, or a tarball has the wrong SHA-256.
    """
    folder = Path(folder)
    known = [s.style for s in (*packages.SOURCES, *packages.MORE_SOURCES)]
    if only is not None and only not in known:
        raise UserError(f"--only {only!a}: no such design; there are {', '.join(known)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; nothing was written. Name a new folder")
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        raise UserError(f"{partial}: left by a build that was cut off or is running; delete it, then run again")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
    try:
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(tarballs) if tarballs else Path(temporary)
            sources = (*packages.SOURCES, *(s for s in packages.MORE_SOURCES if more or s.style == only))
            packages.fetch(sources, source)
            pictures, dropped = collect(source, packages.SOURCES)
            beyond = len(sources) > len(packages.SOURCES)
            others = [p for p in collect(source, sources)[0] if p.style not in STYLES] if beyond else []
            (partial / "SOURCES.md").write_text(packages.attribution(sources, source), encoding="utf-8")
        assign_clusters(pictures, _render_all(pictures, partial))
        assign_splits(pictures)
        if others := _known(others, pictures):
            _render_all(others, partial)
        pictures += others
        if only is not None:
            for style in {p.style for p in pictures} - {only}:
                shutil.rmtree(partial / style.replace(" ", "-"))
            pictures = held_out_of(only, pictures)
        with (partial / "metadata.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(p.row(), ensure_ascii=False) + "\n" for p in pictures)
        (partial / "dropped.json").write_text(json.dumps(dropped, indent=1), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    counts = Counter((p.split, p.style) for p in pictures)
    return Built(folder, counts, dropped, len({p.cluster for p in pictures}))
