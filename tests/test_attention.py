"""By what networks attend: the same results, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from ldm.config import UserError, parse
from ldm.models import attention
from ldm.models.attention import attend_by
from pipelines.cascade import load_cascade
from pipelines.doctor import doctor
from training import engine
from training.engine import LoopConfig

CPU = torch.device("cpu")


def test_each_kind_draws_the_same(tiny_folder: Path) -> None:
    cascade = load_cascade(tiny_folder)
    drawn = {}
    for kind, processor in (("sdpa", AttnProcessor2_0), ("plain", AttnProcessor)):
        sampling = cascade.sampling(overrides=[f"base.attention={kind}", "base.steps=3"])
        drawn[kind] = cascade.draw(["a red cat"], [3], sampling)[-1]
        found = cascade.stages[0].denoiser.net.attn_processors.values()
        assert found
        assert all(type(each) is processor for each in found)
    torch.testing.assert_close(drawn["sdpa"], drawn["plain"], rtol=0, atol=2 / 255)


def test_xformers_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="xformers: it is not installed; pip install xformers, or use sdpa"):
        attend_by(torch.nn.Module(), "xformers", CPU)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="it needs a CUDA GPU, and this run is on cpu; use sdpa"):
        attend_by(torch.nn.Module(), "xformers", CPU)
    assert "attention     sdpa, plain, not xformers (it needs a CUDA GPU, and this run is on cpu)" in doctor()


@pytest.mark.parametrize(("precision", "kind", "expected"), [
    ("no", "auto", "sdpa"), ("no", "plain", "plain"), ("bf16", "auto", "plain"), ("bf16", "sdpa", "sdpa"),
])  # fmt: skip
def test_training_attends_as_its_config_says(tiny_folder: Path, precision: str, kind: str, expected: str) -> None:
    told = {"images": 32, "save_every_images": 32, "mixed_precision": precision, "attention": kind}
    config = parse(LoopConfig, told, "loop")
    network = load_cascade(tiny_folder).stages[0].denoiser.net
    engine.adapt(network, config, CPU)
    processor = {"sdpa": AttnProcessor2_0, "plain": AttnProcessor}[expected]
    assert all(type(each) is processor for each in network.attn_processors.values())
