"""The units of the text world: token segments, each a prompt and the actions that answered it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Layout", "Segments", "layout", "pad_flat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """U token segments; unit u's actions are the tokens after its prompt, in order."""

    ids: tuple[Int[Tensor, " L"], ...]
    """U vectors of token ids, prompt then actions, exactly as sampled (int64, on the CPU)."""
    prompt_lengths: Int[Tensor, " U"]
    """[U] tokens before the first action, at least 1."""
    lengths: Int[Tensor, " U"]
    """[U] tokens in all."""
    ref_features: tuple[Float[Tensor, "T F"], ...] | None = None
    """U matrices of what the reference's vocabulary projection reads at each action; None unless the loss needs it."""

    @classmethod
    def of(cls, prompts: Sequence[Int[Tensor, " P"]], actions: Sequence[Int[Tensor, " T"]]) -> Segments:
        """Join each prompt with its actions."""
        for name, parts in (("prompt", prompts), ("answer", actions)):
            if any(len(part) == 0 for part in parts):
                raise ValueError(f"a {name} of no token; expected at least one")
        return cls(
            ids=tuple(torch.cat([p, a]) for p, a in zip(prompts, actions, strict=True)),
            prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.int64),
            lengths=torch.tensor([len(p) + len(a) for p, a in zip(prompts, actions, strict=True)], dtype=torch.int64),
        )

    def __len__(self) -> int:
        """Return the number of segments U."""
        return len(self.ids)

    @property
    def sizes(self) -> Int[Tensor, " U"]:
        """[U] actions in each segment."""
        return self.lengths - self.prompt_lengths

    def select(self, index: Int[Tensor, " M"] | slice) -> Self:
        """Return the segments at ``index``, in that order."""
        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        features = None if self.ref_features is None else tuple(self.ref_features[u] for u in chosen)
        return type(self)(
            ids=tuple(self.ids[u] for u in chosen),
            prompt_lengths=self.prompt_lengths[index],
            lengths=self.lengths[index],
            ref_features=features,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Segments as one right-padded matrix, and where in it the actions and their states stand."""

    input_ids: Int[Tensor, "U L"]
    """[U, L] token ids, padded on the right with 0; a causal model never looks there."""
    rows: Int[Tensor, " n"]
    """[n] the row of each action."""
    columns: Int[Tensor, " n"]
    """[n] the column whose hidden state chose the action: the token before it."""
    targets: Int[Tensor, " n"]
    """[n] the actions themselves."""
    last: Int[Tensor, " U"]
    """[U] the column of each segment's last token, the state after its last action."""


def layout(segments: Segments, device: torch.device) -> Layout:
    """Lay segments out for one forward pass on ``device``."""
    lengths = segments.lengths
    longest = int(lengths.max())
    input_ids = torch.zeros(len(segments), longest, dtype=torch.int64)
    for row, ids in enumerate(segments.ids):
        input_ids[row, : len(ids)] = ids
    column = torch.arange(longest)
    acts = (column >= segments.prompt_lengths[:, None]) & (column < lengths[:, None])
    rows, columns = acts.nonzero(as_tuple=True)
    return Layout(
        input_ids=input_ids.to(device),
        rows=rows.to(device),
        columns=(columns - 1).to(device),
        targets=input_ids[rows, columns].to(device),
        last=(lengths - 1).to(device),
    )


def pad_flat(flat: Float[Tensor, " N"], sizes: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Spread flat per-action values over rows: ([B, T] with 0 after each row's end, [B, T] True where an action is)."""
    sizes = sizes.to(flat.device)
    mask = torch.arange(int(sizes.max()), device=flat.device) < sizes[:, None]
    spread = flat.new_zeros(mask.shape)
    spread[mask] = flat
    return spread, mask
