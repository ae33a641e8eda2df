"""Several text encoders as one: their own states, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.config import UserError
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.text_config import TextPart
from pipelines.cascade import load_cascade
from tests.tiny import tiny_cascade
from tests.tiny_text import TINY
from training.encoders import caption_states

CAPTIONS = ["", "a red heart", "grinning face, noto style, with a very long tail of words that goes on and on " * 3]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextPart]:
    root = tmp_path_factory.mktemp("text")
    return {kind: TextPart(kind, str(TINY[kind](root / kind))) for kind in ("clip", "t5", "bert")}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def joint(parts: dict[str, TextPart]) -> TextEncoder:
    return load_text_encoder(TextConfig("joint", parts=(parts["clip"], parts["t5"])))


def alone(part: TextPart) -> TextEncoder:
    return load_text_encoder(TextConfig(**vars(part)))


def test_states_are_those_of_each(joint: TextEncoder, parts: dict[str, TextPart]) -> None:
    clip, t5 = alone(parts["clip"]), alone(parts["t5"])
    states, mask = joint.encode(CAPTIONS)
    assert mask is not None
    assert states.shape == (3, clip.max_tokens + t5.max_tokens, max(clip.width, t5.width))
    own, _ = clip.encode(CAPTIONS)
    assert torch.equal(states[:, : clip.max_tokens, : clip.width], own)
    assert not states[:, : clip.max_tokens, clip.width :].any()
    own, real = t5.encode(CAPTIONS)
    assert real is not None
    assert torch.equal(states[:, clip.max_tokens :, : t5.width], own)
    assert mask[:, : clip.max_tokens].all()
    assert torch.equal(mask[:, clip.max_tokens :], real)


def test_what_a_cache_keeps_is_what_is_encoded(joint: TextEncoder) -> None:
    states, mask = joint.encode(CAPTIONS)
    assert mask is not None
    for row, kept in enumerate(caption_states(joint, CAPTIONS)):
        assert len(kept) == int(mask[row].sum())
        assert torch.equal(kept, states[row, : len(kept)].half())


def test_encoders_that_keep_all_their_states(parts: dict[str, TextPart]) -> None:
    two = load_text_encoder(TextConfig("joint", parts=(parts["clip"], parts["clip"])))
    states, mask = two.encode(CAPTIONS * 5)
    assert mask is None
    own, _ = alone(parts["clip"]).encode(CAPTIONS * 5)
    assert torch.equal(states, torch.cat([own, own], 1))


def test_digest_length_and_counts(joint: TextEncoder, parts: dict[str, TextPart]) -> None:
    other = load_text_encoder(TextConfig("joint", parts=(parts["clip"], replace(parts["t5"], max_tokens=12))))
    assert other.digest != joint.digest
    assert joint.token_count("a cat")[0] == joint.token_count("a cat")[1]
    used, total = joint.token_count(CAPTIONS[2])
    assert used < total


def test_a_cascade_carries_its_encoders(parts: dict[str, TextPart], tmp_path: Path) -> None:
    config = TextConfig("joint", parts=(parts["clip"], parts["bert"]))
    made = tiny_cascade(config)
    made.save(tmp_path / "cascade")
    loaded = load_cascade(tmp_path / "cascade")
    assert loaded.text.digest == made.text.digest
    assert [part.path for part in loaded.text.config.parts] == [str(tmp_path / f"cascade/text/{i}") for i in (0, 1)]
    assert loaded(["a cat"], [1]).shape == (1, 3, 64, 64)
    with_minilm = tiny_cascade(TextConfig("joint", parts=(parts["clip"], TextPart())))
    with_minilm.save(tmp_path / "minilm")
    assert not (tmp_path / "minilm/text/1").exists()
    assert load_cascade(tmp_path / "minilm").text.digest == with_minilm.text.digest


def test_what_cannot_be_joined_is_refused(parts: dict[str, TextPart]) -> None:
    with pytest.raises(UserError, match="only the last may be of a kind that leaves out padding"):
        load_text_encoder(TextConfig("joint", parts=(parts["t5"], parts["clip"])))
    for wrong in ({"parts": (parts["clip"],)}, {"path": "x"}, {"parts": (TextPart("joint"), parts["clip"])}):
        with pytest.raises(ValueError, match="joint"):
            TextConfig("joint", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other kinds have no parts"):
        TextConfig("minilm", parts=(parts["clip"], parts["t5"]))
    with pytest.raises(UserError, match=r"have width 16, but text\.width says 768"):
        load_text_encoder(TextConfig(**{**vars(parts["clip"]), "width": 768}))
