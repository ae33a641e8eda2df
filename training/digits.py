"""Builds the data set of the digits lab: the handwritten digits that scikit-learn carries, as pictures with captions.

    sklearn.datasets.load_digits -> 8 x 8 values of 0 to 16 -> bytes -> 32 px PNG, each value a square of 4 px -> rows

Read at 8 px, by area, they are the 8 x 8 values again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.config import UserError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ENLARGED = 4
HELD_SHARE = 0.1


def build(folder: str | Path) -> Counter[str]:
    """Write the data set into `folder`, new or empty; returns the number of pictures of each split, train and held.

    Raises UserError where the folder has something in it, or scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install -e '.[labs]'") from None
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; nothing was written. Name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
    found, rows = load_digits(), []
    for number, (values, digit) in enumerate(zip(found.images, found.target, strict=True)):
        grey = np.asarray((values * 255 / 16).round()).astype(np.uint8)
        name = f"{number:04d}.png"
        Image.fromarray(grey.repeat(ENLARGED, 0).repeat(ENLARGED, 1)).save(folder / name)
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        rows.append({"file_name": name, "digit": NAMES[digit], "captions": [NAMES[digit]],
                     "split": "held" if draw < HELD_SHARE else "train"})  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Counter(str(row["split"]) for row in rows)
