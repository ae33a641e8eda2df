"""`--dry-run --shapes`: every config in the tree fits together, without its data, weights or memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.config import UserError, load
from training.run import shapes
from training.shapes import check_shapes
from training.tasks import RunConfig

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
# a noise-aware classifier's shapes are those of the model it is to guide, which is not here
STAGES = [path for path in CONFIGS if path.parent.name != "accelerate" and "classifier" not in path.stem]


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_every_config_fits_together(path: Path) -> None:
    found = shapes(path, [])
    assert found.startswith(f"shapes fit: {path}")
    assert "EFLOP" in found


def test_a_decoder_alone_fits() -> None:
    more = ["reconstruction.decoder_only=true", "init=somewhere"]
    found = shapes(Path("configs/tiny/autoencoder.yaml"), more)
    assert "shapes fit" in found


def test_work_and_parameters_of_a_known_network() -> None:
    """The shipped base: parameters as in its card, three times the work of a forward pass."""
    found = shapes("configs/emoji/base.yaml", ["codec=pipelines/weights/emoji/codec"])
    assert "18.3 million parameters" in found
    work = found.splitlines()[-1].split()
    assert float(work[6]) == pytest.approx(3 * float(work[1]), rel=0.1)


@pytest.mark.parametrize(
    ("name", "wrong", "reason"),
    [
        ("sr", "upscaling.crop_px=100", "upscaling.crop_px 100 must be a multiple of 64"),
        ("base", "codec=runs/none/final", None),
        ("base", "text.parts=[{kind: clip, path: none}, {kind: t5, path: none}]", "no text encoder there"),
        ("autoencoder", "codec.autoencoder.norm_groups=24", "multiples of norm_groups"),
    ],
)
def test_what_does_not_fit_is_told(name: str, wrong: str, reason: str | None) -> None:
    path = Path(f"configs/gpu/{name}.yaml")
    if reason is None:
        assert "shapes fit" in shapes(path, [wrong])
        return
    with pytest.raises(UserError, match=reason):
        shapes(path, [wrong])


def test_a_codec_that_nothing_makes_is_told(tmp_path: Path) -> None:
    config = load(RunConfig, "configs/gpu/base.yaml")
    with pytest.raises(UserError, match="no codec there, and no"):
        check_shapes(config, tmp_path / "base.yaml")
