"""CUDA graphs without a GPU: what is recorded, what stays as it was, what is refused. Only the recording itself, which
is torch's, has a stand-in that calls the network."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config import UserError, load
from tests.tiny import EMOJI, ROOT
from training.graphs import record
from training.loader import BatchOrder
from training.run import train
from training.tasks import RunConfig, build_task


def task_of(name: str, folder: Path, *more: str) -> Any:
    overrides = [f"data.path={EMOJI}", f"cache={folder}", *more]
    return build_task(load(RunConfig, ROOT / f"configs/tiny/{name}.yaml", overrides))


@pytest.mark.parametrize(("name", "more", "calls"), [
    ("autoencoder", [], 2),
    ("base_t5", ["codec=null", f"text.path={ROOT / 'tests/data/text/t5'}"], 1),
    ("judge", ["classifier.palette=[4]", "recolour=0.2"], 1),
])  # fmt: skip
def test_recorded_networks_give_the_same_losses_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: list[str], calls: int
) -> None:
    task = task_of(name, tmp_path, *more)
    module, order = task.module, BatchOrder(task.cache, 0, 0, 4, 4)
    torch.manual_seed(0)  # of dropout
    module(module.prepare(order[1])).losses[0].backward()
    wanted = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    recorded: list[tuple[Tensor, ...]] = []

    def stand_in(flat: Any, samples: tuple[Tensor, ...], **_: Any) -> Any:
        assert all(getattr(leaf, "grad_fn", None) is None for leaf in flat.leaves), "it holds on to the step it watched"
        recorded.append(samples)
        return flat

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    names = list(module.state_dict())
    record(module, module.prepare(order[0]), nullcontext)
    assert len(recorded) == calls
    assert list(module.state_dict()) == names
    torch.manual_seed(0)
    module(module.prepare(order[1])).losses[0].backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_outside_training_a_network_is_not_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = (task := task_of("autoencoder", tmp_path)).module
    inputs = module.prepare(BatchOrder(task.cache, 0, 0, 4, 4)[0])

    def broken(*_: Any) -> Any:
        raise AssertionError("replayed")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: broken)
    record(module, inputs, nullcontext)
    with pytest.raises(AssertionError, match="replayed"):
        module(inputs)
    module.eval()
    module(inputs)


def test_it_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    overrides = [f"data.path={EMOJI}", f"cache={tmp_path}", "loop.cuda_graphs=true"]
    config = ROOT / "configs/tiny/autoencoder.yaml"
    with pytest.raises(UserError, match=r"set loop\.cuda_graphs=false"):
        train(config, tmp_path / "run", overrides)
    with pytest.raises(UserError, match="cuda_graphs work without accumulation"):
        train(config, tmp_path / "run", [*overrides, "loop.accumulation=2"])
