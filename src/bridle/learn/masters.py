"""Float32 masters of parameters that are computed with in bfloat16.

A step of AdamW at a learning rate of 1e-5 moves a weight of size one by about 1e-5, and the next bfloat16 number is 8e-3 away:
rounded after every step, such weights stand still. So the optimiser moves float32 masters θ, and the modules hold the shadow
round(θ), written anew once a step; whoever computes, trainer or sampler, reads that one.

Source: Micikevicius et al. 2018, "Mixed Precision Training", §3.1 (float32 master copy of weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["Masters"]


class Masters:
    """The masters of some parameters, which hold their shadow from here on; without parameters there is nothing to do."""

    def __init__(self, parameters: Iterable[nn.Parameter] = (), dtype: torch.dtype = torch.bfloat16) -> None:
        """Take hold of ``parameters``: those that learn get a float32 master, and all are rounded to ``dtype``.

        Gradients of what learns are summed in float32. The parameters must stay where they are from here on.
        """
        self._masters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for parameter in {id(p): p for p in parameters}.values():
            if parameter.requires_grad:
                master = nn.Parameter(parameter.detach().float())
                self._masters[id(parameter)] = (parameter, master)
            parameter.data = parameter.detach().to(dtype)
            if parameter.requires_grad:
                parameter.grad_dtype = torch.float32

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The master of a parameter; a parameter without one is its own."""
        return self._masters.get(id(parameter), (parameter, parameter))[1]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round every master into its shadow."""
        for parameter, master in self._masters.values():
            parameter.copy_(master)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules hold the masters themselves for a block, to be saved or written to, and their rounding after it."""
        shadows = [(parameter, parameter.data) for parameter, _ in self._masters.values()]
        for parameter, master in self._masters.values():
            parameter.data = master.data
        try:
            yield
        finally:
            for parameter, shadow in shadows:
                shadow.copy_(parameter.data)
                parameter.data = shadow
