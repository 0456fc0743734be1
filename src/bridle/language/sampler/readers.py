"""How the engine's texts go through a model: by compiled layers over blocks of their own, or by the model itself over slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from bridle.language.causal import CausalModel, States
from bridle.language.decoding import Stack, Texts
from bridle.language.sampler.products import swift_products
from bridle.language.sampler.slots import Prefill, Slots

__all__ = ["CompiledReader", "ModelReader", "Reader"]

_BUCKET = {"cpu": 32, "cuda": 256}
"""Slots grow by this many tokens: attention reads whole slots, so a long one costs every answer, but growing costs too."""


class Reader(Protocol):
    """Texts in slots 0, 1, …, of which those in use come first."""

    device: torch.device
    """Where tokens are expected."""

    def read(
        self,
        tokens: Int[Tensor, " n"],
        lengths: Int[NDArray[np.int64], " n"],
        prompts: Sequence[tuple[int, NDArray[np.int64]]],
    ) -> States:
        """Put ``tokens[i]`` behind the ``lengths[i]`` tokens of slot i, and read each prompt into its slot.

        Return the states of those tokens, then of the last token of each prompt.
        """
        ...

    def share(self, source: int, targets: Sequence[int], length: int) -> None:
        """Let texts begin with the prompt of the one in slot ``source``, its first ``length`` tokens."""
        ...

    def release(self, slots: Sequence[int], lengths: Int[NDArray[np.int64], " n"]) -> NDArray[np.int64]:
        """Let go of some of the n texts in use, of such lengths; return [m] the slots from which those that stay come."""
        ...


class CompiledReader:
    """Through layers that are packed for as long as their weights stay."""

    device = torch.device("cpu")

    def __init__(self, stack: Stack, embed: Callable[[Tensor], Tensor], rows: int) -> None:
        self._stack, self._embed, self._texts, self._rows = stack, embed, Texts(stack, rows), rows

    def read(
        self,
        tokens: Int[Tensor, " n"],
        lengths: Int[NDArray[np.int64], " n"],
        prompts: Sequence[tuple[int, NDArray[np.int64]]],
    ) -> States:
        """See :class:`Reader`."""
        parts = [self._stack.step(self._embed(tokens), self._texts)] if len(tokens) else []
        if prompts:
            ids = torch.from_numpy(np.concatenate([ids for _, ids in prompts]))
            slots, sizes = [slot for slot, _ in prompts], [len(ids) for _, ids in prompts]
            parts.append(self._stack.read(self._embed(ids), self._texts, slots, sizes))
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        return States(hidden=hidden, features=hidden)

    def share(self, source: int, targets: Sequence[int], length: int) -> None:
        """See :class:`Reader`."""
        self._texts.share(source, targets)

    def release(self, slots: Sequence[int], lengths: Int[NDArray[np.int64], " n"]) -> NDArray[np.int64]:
        """Let those that stay close up, so that texts with one prompt stay side by side; see :class:`Reader`."""
        order = np.delete(np.arange(len(lengths)), slots)
        self._texts.order([*order, *slots, *range(len(lengths), self._rows)])
        return order


class ModelReader:
    """Through the model's own forward, or through ``play``: the same for answers under way alone, recorded."""

    def __init__(self, actor: CausalModel, slots: Slots, play: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        self.device = actor.device
        self._actor, self._slots, self._play = actor, slots, play
        self._products = swift_products(actor.model.get_input_embeddings().weight)

    def read(
        self,
        tokens: Int[Tensor, " n"],
        lengths: Int[NDArray[np.int64], " n"],
        prompts: Sequence[tuple[int, NDArray[np.int64]]],
    ) -> States:
        """See :class:`Reader`."""
        used, sizes = len(tokens), np.array([len(ids) for _, ids in prompts], dtype=np.int64)
        self._make_room(max([int(lengths.max(initial=0)) + 1, *sizes]), used)
        positions = torch.from_numpy(lengths.copy()).to(self.device)
        self._slots.plan(positions, self._prefills(prompts))
        if not prompts and self._play is not None:
            hidden = self._play(tokens, positions)
            return States(hidden=hidden, features=hidden)
        if not prompts:
            rows = torch.arange(used, device=self.device)
            with self._products:
                return self._actor.states(tokens[:, None], rows, torch.zeros_like(rows), positions=positions[:, None])
        ids = torch.from_numpy(np.concatenate([ids for _, ids in prompts])).to(self.device)
        places = torch.from_numpy(np.concatenate([np.arange(n) for n in sizes])).to(self.device)
        columns = torch.from_numpy(np.concatenate([np.arange(used), used + sizes.cumsum() - 1])).to(self.device)
        where = {"positions": torch.cat([positions, places])[None]}
        with self._products:
            return self._actor.states(torch.cat([tokens, ids])[None], torch.zeros_like(columns), columns, **where)

    def share(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the prompt; see :class:`Reader`."""
        self._slots.copy([source] * len(targets), targets, length)

    def release(self, slots: Sequence[int], lengths: Int[NDArray[np.int64], " n"]) -> NDArray[np.int64]:
        """Move the last texts into the gaps; see :class:`Reader`."""
        staying, leaving = len(lengths) - len(slots), set(slots)
        gaps = [slot for slot in slots if slot < staying]
        movers = [slot for slot in range(staying, len(lengths)) if slot not in leaving]
        order = np.arange(staying)
        order[gaps] = movers
        if movers:
            self._slots.copy(movers, gaps, int(lengths[movers].max()))
        return order

    def _make_room(self, longest: int, used: int) -> None:
        """Keep slots as long as the longest text needs, and hardly longer."""
        bucket = _BUCKET[self.device.type]
        wanted = -(-longest // bucket) * bucket
        if wanted > self._slots.capacity or wanted <= self._slots.capacity - 2 * bucket:
            self._slots.reserve(wanted, used)

    def _prefills(self, prompts: Sequence[tuple[int, NDArray[np.int64]]]) -> list[Prefill]:
        """Let neighbours of equal length be read together."""
        found: list[tuple[int, list[int]]] = []
        for slot, ids in prompts:
            if not found or found[-1][0] != len(ids):
                found.append((len(ids), []))
            found[-1][1].append(slot)
        return [Prefill(slots=torch.tensor(slots, device=self.device), length=length) for length, slots in found]
