"""What a step's work is worth: floating-point operations that its models need, against what the machine can do.

Useful work is what the models' matrix products need once: padding, logits computed again and activations recomputed cost
time but count for nothing, so the share of the machine's rate is a fair figure.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

__all__ = ["Work", "peak_memory", "product_rate", "resident_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one model's forward pass takes, in floating-point operations; a multiplication with its addition counts as two.

    A token at position t (from 1) of its text takes 2·N + 4·t·A, an action V's projection, 2·V·D, beside it; N numbers
    in the layers' matrices, A = Σ_layers heads × width of a head. A backward pass takes twice as much again.

    Source: Kaplan et al. 2020, §2.1 and Table 1, whose 2·n_layer·n_ctx·d_attn counts one of the two products of attention
    at full context; Chowdhery et al. 2022, appendix B, for attention and for backward.
    """

    matrices: int
    """N, numbers in the layers' matrices; of a mixture of experts all of them, used or not."""
    attention: int
    """A, numbers in the queries of one token, over all layers."""
    projection: int
    """V·D, numbers in the vocabulary projection; 0 for a model that has none."""
    frozen_matrices: int = 0
    """How many of N have no gradient: a backward pass takes 2 a token less for each."""
    frozen_projection: int = 0
    """The same of V·D."""

    @classmethod
    def of(cls, model: Any, *, projection: bool = True) -> Work:
        """Read off a model of transformers; without ``projection`` its backbone alone."""
        backbone = model.base_model
        tables = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
        matrices = [p for p in backbone.parameters() if p.ndim >= 2 and id(p) not in tables]
        config = backbone.config.get_text_config()
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        head = model.get_output_embeddings() if projection else None
        projected = 0 if head is None else head.weight.numel()
        return cls(
            matrices=sum(p.numel() for p in matrices),
            attention=heads * width * int(config.num_hidden_layers),
            projection=projected,
            frozen_matrices=sum(p.numel() for p in matrices if not p.requires_grad),
            frozen_projection=0 if head is None or head.weight.requires_grad else projected,
        )

    def forward(self, lengths: Int[Tensor, " U"], actions: int) -> float:
        """Operations of one forward pass over texts of these lengths that projects ``actions`` positions."""
        tokens = int(lengths.sum())
        pairs = int((lengths * (lengths + 1) // 2).sum())
        return 2.0 * self.matrices * tokens + 4.0 * self.attention * pairs + 2.0 * self.projection * actions

    def training(self, lengths: Int[Tensor, " U"], actions: int) -> float:
        """Operations of a forward and a backward pass."""
        spared = 2.0 * self.frozen_matrices * int(lengths.sum()) + 2.0 * self.frozen_projection * actions
        return 3.0 * self.forward(lengths, actions) - spared


@torch.no_grad()
def product_rate(model: Any, dtype: torch.dtype, *, seconds: float = 0.1, rows: int = 1024) -> float:
    """Floating-point operations per second that this machine makes of the model's largest layer, best of some products.

    A product of [rows, in] with the layer's weight [in, out], repeated for ``seconds`` (at least three times).
    """
    backbone = model.base_model
    tables = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    weights = [p for p in backbone.parameters() if p.ndim == 2 and id(p) not in tables]
    weight = max(weights, key=lambda p: p.numel()).detach().to(dtype)
    x = weight.new_ones(rows, weight.shape[1])
    out = weight.new_empty(rows, weight.shape[0])
    best, began, count = float("inf"), time.perf_counter(), 0
    while count < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(x, weight.t(), out=out)
        if weight.device.type == "cuda":
            torch.cuda.synchronize(weight.device)
        best = min(best, time.perf_counter() - start)
        count += 1
    return 2.0 * rows * int(weight.numel()) / best


def resident_memory() -> int:
    """Bytes of memory that this process holds now; its peak so far where the system does not say."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return _peak_resident()


def peak_memory(device: torch.device, *, above: int) -> int:
    """Bytes held at most so far: allocated on a GPU, or on the CPU resident in this process beyond ``above`` bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return max(0, _peak_resident() - above)


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    held = status.read_text() if status.exists() else ""
    if "VmHWM:" in held:  # what getrusage tells begins, after an exec, with what the process before held
        return 1024 * int(held.partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
