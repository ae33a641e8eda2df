"""What a run records: metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl, null for what is not finite, and a short line to stdout."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, images: int, values: dict[str, Any]) -> None:
        """Record `values` measured after `images` training images."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "images": images, **values}) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{kind} {images:>9} images  {shown}", flush=True)
