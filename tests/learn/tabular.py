"""The smallest world there is: one state, a few actions, a policy that is a table. Everything can be enumerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from bridle.batch import Batch, Evaluation
from bridle.learn.optim import Group, Optimiser, OptimSettings


@dataclass(frozen=True)
class Draws:
    """Units of one or more actions each."""

    actions: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def sizes(self) -> Tensor:
        return torch.tensor([len(a) for a in self.actions], dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        return self.sizes

    def select(self, index: Tensor | slice) -> Self:
        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return type(self)(tuple(self.actions[i] for i in chosen))


class Table(nn.Module):
    """π = softmax(logits), V one number; knows the reference, so it can say the exact KL."""

    def __init__(self, logits: list[float], value: float = 0.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.reference = self.logits.detach().clone()
        self.calls: list[int] = []

    def forward(self, units: Draws) -> Evaluation:
        self.calls.append(len(units))
        actions = torch.cat(units.actions)
        logp = torch.log_softmax(self.logits, 0)
        n = len(actions)
        kl = (logp.exp() * (logp - torch.log_softmax(self.reference, 0))).sum()
        return Evaluation(
            logp=logp[actions],
            entropy=(-(logp.exp() * logp).sum()).expand(n),
            value=self.value.expand(n),
            exact_kl=kl.expand(n),
        )

    @property
    def probabilities(self) -> Tensor:
        return torch.softmax(self.logits.detach(), 0)


def batch_of(table: Table, units: Draws, advantages: Tensor, returns: Tensor | None = None) -> Batch:
    with torch.no_grad():
        e = table(units)
    table.calls.clear()
    ref = torch.log_softmax(table.reference, 0)[torch.cat(units.actions)]
    return Batch(
        units=units,
        old_logp=e.logp.clone(),
        old_value=e.value.clone(),
        advantages=advantages,
        returns=advantages if returns is None else returns,
        episode=torch.arange(len(units)).repeat_interleave(units.sizes),
        ref_logp=ref,
    )


def optimiser_of(table: Table, lr: float = 0.05, max_grad_norm: float | None = None) -> Optimiser:
    settings = OptimSettings(lr=lr, max_grad_norm=max_grad_norm)
    actor = Group(name="actor", parameters={"logits": table.logits}, settings=settings)
    critic = Group(name="critic", parameters={"value": table.value}, settings=settings)
    return Optimiser([actor, critic], total_steps=1)


def singles(actions: list[int]) -> Draws:
    return Draws(tuple(torch.tensor([a]) for a in actions))
