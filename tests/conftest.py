"""What every test shares: no network, and one tiny cascade on disk. Torch's threads are left as they are."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # here, because it is read when huggingface_hub is imported


def _local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name in ("localhost", socket.gethostname())


def _only_local(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _local(address[0]):
            pytest.fail(f"a test reached for the network: {address}")
        return original(self, address)

    return guarded


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections and look-ups of names fail the test, but for this machine's own.

    pytest.fail raises no Exception, so that code which goes on without a network is caught as well.
    """
    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _local(host):
            pytest.fail(f"a test looked up {host!r} in the network")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _only_local(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _only_local(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny cascade with a BERT text encoder (masked, as the packaged one). Change only copies."""
    from tests.tiny import save_tiny_cascade

    return save_tiny_cascade(tmp_path_factory.mktemp("tiny"), "bert")


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_folder`, with a CLIP text encoder. The encoder it was made from is gone."""
    from tests.tiny import save_tiny_cascade

    return save_tiny_cascade(tmp_path_factory.mktemp("tiny_clip"), "clip")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that run configs/tiny on the tests' pictures, with a codec trained for a moment."""
    from tests.tiny import EMOJI, ROOT
    from training.run import train

    folder = tmp_path_factory.mktemp("tiny_runs")
    shared = [f"data.path={EMOJI}", f"cache={folder / 'cache'}", "loop.images=160", "loop.log_every_images=80",
              "loop.preview_every_images=160", "loop.save_every_images=160", "loop.trackers=[]"]  # fmt: skip
    train(ROOT / "configs/tiny/autoencoder.yaml", folder / "ae", shared)
    return [*shared, f"codec={folder / 'ae/final'}"]
