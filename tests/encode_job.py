"""Encodes tests/data/emoji with the tiny cascade's networks; tests/test_encode_processes.py starts and kills it.

    python tests/encode_job.py CASCADE CACHE SECONDS    (alone, or by torch.distributed.run)

SECONDS are slept in every call of a network, so that there is time to be killed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

from ldm.config import UserError
from pipelines.cascade import Cascade, load_cascade
from training import cache, encoders
from training import encode as writer
from training.cache import Cache
from training.data import DataConfig, Reader
from training.processes import process_state, together
from training.stop import Stop

DATA = Path(__file__).parent / "data/emoji"
SHARD_ITEMS = 20


def encode_all(cascade: Cascade, root: Path) -> Cache:
    """Six shards and five files of captions."""
    reader = Reader(DataConfig(path=str(DATA), size_px=64), shard_items=SHARD_ITEMS)
    with patch.object(cache, "CAPTION_BLOCK", 100), patch.object(writer, "CAPTION_BLOCK", 100):
        return writer.encode(reader, root, cascade.codec, cascade.text)


def main() -> None:
    cascade, pause = load_cascade(sys.argv[1]), float(sys.argv[3])
    moments, states = encoders.codec_moments, cascade.text.states

    def slow_moments(*args: object) -> object:
        time.sleep(pause)
        return moments(*args)  # type: ignore[arg-type]

    def slow_states(*args: object) -> object:
        time.sleep(pause)
        return states(*args)  # type: ignore[arg-type]

    encoders.codec_moments = slow_moments  # type: ignore[assignment]
    cascade.text.states = slow_states  # type: ignore[assignment, method-assign]
    try:
        with Stop() as stop, together(), stop.at_once():
            print(f"process {process_state().process_index} has id {os.getpid()}", flush=True)
            encode_all(cascade, Path(sys.argv[2]))
            print("encoded", flush=True)
    except UserError as error:
        print(error, flush=True)
        os._exit(error.exit_code)  # as a process that is lost does not say goodbye to the others


if __name__ == "__main__":
    main()
