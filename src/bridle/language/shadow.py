"""Which weights of a language model are held in bfloat16: rounded once a step, and not anew in every forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from bridle.language.backbones import computes_compiled
from bridle.learn.masters import Masters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["masters_of"]


def masters_of(backbones: Iterable[PreTrainedModel], dtype: torch.dtype) -> Masters:
    """Let the layers of some backbones hold their weights in ``dtype``, and return the float32 masters of those that learn.

    These are the weights that autocast would round in every forward pass, those of linear layers, so a pass gives the same
    numbers to the last bit. Embeddings, norms, the output layer, adapters and value heads stay in float32: they are read in
    float32, or small. Where ``dtype`` is float32 there is nothing to do, nor with a backbone whose layers run compiled in
    ``dtype``: these round what they multiply by themselves.
    """
    from transformers.pytorch_utils import Conv1D

    if dtype == torch.float32:
        return Masters()
    found: list[nn.Parameter] = []
    for backbone in backbones:
        if computes_compiled(backbone, dtype):
            continue
        found += [
            cast("nn.Parameter", module.weight)
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name
        ]
    return Masters(found, dtype)
