"""Networks recorded as CUDA graphs, forward and backward, and replayed: a GPU waits for Python otherwise, where
networks are small.

    one step, watched -> each network's call: tensors in and out -> torch.cuda.make_graphed_callables -> its forward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from training.loader import StepModule


def record(module: StepModule, inputs: Any, autocast: Any) -> None:
    """Let the `networks` of a module, on its GPU, replay what they do in one step on `inputs`, whose shapes then are
    those of all steps. autocast: makes the context of the step, without a cache of weights.

    Copies of the module must be taken before; outside training the networks work as they did.
    """
    calls: dict[nn.Module, Any] = {}

    def note(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # without its history, which would keep the step alive on a stream that recording may not touch
        calls[network] = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), (args, kwargs))

    hooks = [network.register_forward_pre_hook(note, with_kwargs=True) for network in module.networks]
    with autocast():
        module(inputs)
    for hook in hooks:
        hook.remove()
    for network, given in calls.items():
        with autocast():
            _record_one(network, given)


class _Flat(nn.Module):
    """A network as a function of the tensors of a call, `places` among the leaves of its arguments."""

    def __init__(self, network: nn.Module, leaves: Sequence[Any], spec: Any, places: Sequence[int]) -> None:
        super().__init__()
        self.network, self._call = network, network.forward
        self.leaves, self.spec, self.places = list(leaves), spec, places
        self.out_spec: Any = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        out, self.out_spec = tree_flatten(self._call(*args, **kwargs))
        return tuple(out)


def _record_one(network: nn.Module, given: Any) -> None:
    leaves, spec = tree_flatten(given)
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    flat = _Flat(network, leaves, spec, places)
    samples = tuple(leaves[k].detach().clone().requires_grad_(leaves[k].requires_grad) for k in places)
    eager = network.forward
    graphed: Any = torch.cuda.make_graphed_callables(flat, samples, allow_unused_input=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not network.training:
            return eager(*args, **kwargs)
        now, found = tree_flatten((args, kwargs))
        assert found == spec, "a recorded network is called as it was recorded"
        out: tuple[Tensor, ...] = graphed(*(now[k] for k in places))
        return tree_unflatten(out, flat.out_spec)

    network.forward = forward
