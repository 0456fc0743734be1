"""How much memory a PPO run will take, known before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridle.core._vocabulary import rows_per_chunk
from bridle.errors import ConfigError
from bridle.language.policy import Critic, LanguagePolicy

__all__ = ["MemoryEstimate", "available_memory", "estimate_memory", "require_memory", "saved_per_token"]

_PROBE_TOKENS = 16
_BLOCKS = 3
"""[chunk, V] blocks that a head's pass holds; one more with a reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a run holds, part by part. Training and generation take turns, so only the larger of the two counts."""

    weights: int
    """Of all models: actor, critic, reference and judge; what several of them share counts once."""
    shared: int
    """Of those, what more than one of them holds: the base of adapters."""
    gradients: int
    """Of the weights that are trained, float32."""
    optimiser: int
    """AdamW's two moments, and the masters of weights that are held in bfloat16; float32."""
    rollout: int
    """What is kept of a rollout for the loss: what the reference's projection reads, where the leash needs it."""
    training: int
    """Activations of one micro-batch, of actor or critic, whichever has more, and the blocks of logits."""
    generation: int
    """The sampler's keys and values, and its logits."""
    tokens: int
    """Tokens of one micro-batch."""

    @property
    def total(self) -> int:
        """The peak."""
        kept = self.weights + self.gradients + self.optimiser + self.rollout
        return kept + max(self.training, self.generation)

    def sentence(self) -> str:
        """The whole account in one line."""
        shared = f" ({_size(self.shared)} of them one base that the models share)" if self.shared else ""
        own = (
            f"weights {_size(self.weights)}{shared}, gradients {_size(self.gradients)}, optimiser {_size(self.optimiser)}, "
            f"training {_size(self.training)} for {self.tokens:,} tokens at a time, generation {_size(self.generation)}"
        )
        return f"memory: about {_size(self.total)} at most: {own}"


def estimate_memory(
    policy: LanguagePolicy,
    others: Iterable[nn.Module],
    *,
    answers: int,
    minibatches: int,
    longest: int,
    answer_tokens: int,
    rows: int,
    micro_batch_tokens: int | None,
    keeps_features: bool,
) -> MemoryEstimate:
    """Add up what a run will hold beside the interpreter and its imports.

    Args:
        policy: actor and critic, whose activations are measured on a few tokens.
        others: models that only answer: the reference, the judges.
        answers: answers in a rollout.
        minibatches: parts that it is learnt from in.
        longest: tokens of the longest prompt with its answer.
        answer_tokens: tokens of the longest answer.
        rows: answers written at once.
        micro_batch_tokens: tokens in one forward pass; None: a whole minibatch.
        keeps_features: whether the loss reads the reference's hidden states.
    """
    moved = {id(p): p for p in policy.parameters() if p.requires_grad}
    roles = (policy.actor, policy.critic, *others)
    held = {id(p): p for module in roles for p in (*module.parameters(), *module.buffers())}
    owners = Counter(at for module in roles for at in {p.untyped_storage().data_ptr() for p in module.parameters()})
    tokens = -(-answers // minibatches) * longest
    if micro_batch_tokens is not None:
        tokens = max(min(tokens, micro_batch_tokens), longest)
    per_token = saved_per_token(policy.actor.model.base_model, policy.compute_dtype, recomputed=policy.recompute)
    if isinstance(policy.critic, Critic):
        own = saved_per_token(policy.critic.backbone, policy.compute_dtype, recomputed=policy.recompute)
        per_token = max(per_token, own)
    head = policy.actor.model.get_output_embeddings().weight
    chunk = min(rows_per_chunk(None, head.shape[0]), tokens)
    blocks = (_BLOCKS + keeps_features) * chunk * head.shape[0] * 4
    trained = sum(p.numel() for p in moved.values())
    mastered = sum(p.numel() for p in moved.values() if p.dtype != torch.float32)
    return MemoryEstimate(
        weights=_bytes(held.values()),
        shared=_bytes(p for p in held.values() if owners[p.untyped_storage().data_ptr()] > 1),
        gradients=4 * trained,
        optimiser=8 * trained + 4 * mastered,
        rollout=answers * answer_tokens * policy.actor.width * 4 if keeps_features else 0,
        training=per_token * tokens + blocks,
        generation=_generation(policy.actor.model, min(rows, answers), longest),
        tokens=tokens,
    )


def saved_per_token(backbone: Any, dtype: torch.dtype = torch.float32, *, recomputed: bool = False) -> int:
    """Bytes that autograd keeps of each token's forward pass, measured on a few; weights are not counted.

    Tensors that share memory count once. Where layers are ``recomputed`` each keeps its input, and one its activations.
    """
    held: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*backbone.parameters(), *backbone.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=backbone.device)
    half = dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.enable_grad(),
        torch.autocast(ids.device.type, dtype=dtype, enabled=half),
    ):
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    whole: int = sum(held.values()) // _PROBE_TOKENS
    if not recomputed:
        return whole
    layers = int(backbone.config.get_text_config().num_hidden_layers)
    return whole // layers + layers * int(hidden.shape[-1]) * int(hidden.element_size())


def require_memory(estimate: MemoryEstimate, device: torch.device, *, recomputed: bool, on_trunk: bool) -> None:
    """Refuse a run whose peak is more than the machine has left; the weights are there already.

    Layers that are ``recomputed``, and a critic that is ``on_trunk``, are no advice any more.

    Raises:
        ConfigError: in one line, with the account and what would make it smaller.
    """
    left = available_memory(device)
    needed = estimate.total - estimate.weights
    if left is None or needed <= left:
        return
    largest = "ppo.micro_batch_tokens" if estimate.training >= estimate.generation else "sampling.rows"
    more = [advice for advice, taken in (("recompute", recomputed), ("critic.source trunk", on_trunk)) if not taken]
    raise ConfigError(
        f"the run does not fit: {_size(needed)} more are needed and {_size(left)} are left on the {device.type} "
        f"({estimate.sentence()}); {' or '.join([f'lower {largest}', *(f'set {advice}' for advice in more)])}"
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes that a process may still take, of the GPU or of the machine; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    found = [line.split() for line in table.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _generation(model: Any, rows: int, longest: int) -> int:
    """Keys and values of ``rows`` answers, twice while slots grow, three blocks of logits, and packed weights; float32."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    cache = 2 * int(config.num_hidden_layers) * heads * width * longest * 4
    packed = 4 * sum(p.numel() for p in model.parameters()) if model.device.type == "cpu" else 0
    return rows * (2 * cache + 3 * int(model.get_output_embeddings().weight.shape[0]) * 4) + packed


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.0f} kB"
