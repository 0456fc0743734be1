"""On CUDA, a decoding step is one graph: launched whole, instead of kernel by kernel from Python."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.language.causal import CausalModel
from bridle.language.sampler.slots import Slots

__all__ = ["GraphedStep"]


class GraphedStep:
    """The step ``hidden [n, D] = f(tokens [n], positions [n])`` over ``slots``, captured anew whenever these grow.

    The graph runs over every slot: those not in use read token 0 at position 0, into a place that the next prompt
    overwrites. Weights are read where they lie; a graph lives no longer than a rollout.
    """

    def __init__(self, actor: CausalModel, slots: Slots) -> None:
        self._actor, self._slots = actor, slots
        self._tokens = torch.zeros(slots.count, dtype=torch.int64, device=actor.device)
        self._positions = torch.zeros_like(self._tokens)
        self._capacity = 0
        self._graph = torch.cuda.CUDAGraph()
        self._hidden = torch.zeros(0, device=actor.device)

    def __call__(self, tokens: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Give slots 0 … n−1 their next token."""
        n = len(tokens)
        self._positions.zero_()
        self._tokens[:n], self._positions[:n] = tokens, positions
        if self._capacity != self._slots.capacity:
            self._capture()
        self._graph.replay()
        return self._hidden[:n].clone()

    def _capture(self) -> None:
        torch.clear_autocast_cache()  # casts must lie inside the graph, or it would read weights as they were
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._step()
        torch.cuda.current_stream().wait_stream(aside)
        torch.clear_autocast_cache()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._hidden = self._step()
        torch.clear_autocast_cache()
        self._capacity = self._slots.capacity

    def _step(self) -> Tensor:
        self._slots.plan(self._positions, ())
        rows = torch.arange(self._slots.count, device=self._positions.device)
        places = self._positions[:, None]
        return self._actor.states(self._tokens[:, None], rows, torch.zeros_like(rows), positions=places).hidden
