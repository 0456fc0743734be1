"""The language model as a policy: an actor, and a critic beside it or on its trunk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridle.batch import Evaluation, Units
from bridle.language.causal import CausalModel
from bridle.language.segments import Layout, Segments, layout

__all__ = ["Critic", "LanguagePolicy", "critic_from_actor", "critic_from_reward_model", "head_values", "value_head"]


def value_head(width: int) -> nn.Linear:
    """A value head that starts at V = 0: [n, D] → [n, 1]."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class Critic(nn.Module):
    """A critic with a backbone of its own: V(s) read off the hidden state of the state's last token."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, input_ids: Int[Tensor, "U L"]) -> Float[Tensor, "U L"]:
        """V after every token, [U, L] in units of return, float32."""
        hidden: Tensor = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return head_values(self.head, hidden)


def critic_from_actor(actor: PreTrainedModel) -> Critic:
    """A critic whose backbone is a copy of the actor's trunk, with a head that starts at 0."""
    backbone = copy.deepcopy(actor.base_model)
    return Critic(backbone, value_head(_width(actor)).to(actor.device))


def critic_from_reward_model(reward: PreTrainedModel) -> Critic:
    """A critic that starts as a copy of a sequence-classification reward model, its score as V."""
    score = cast("nn.Linear", reward.score)
    head = value_head(score.in_features).to(reward.device)
    with torch.no_grad():
        head.weight.copy_(score.weight)
        if score.bias is not None:
            head.bias.copy_(score.bias)
    return Critic(copy.deepcopy(reward.base_model), head)


class LanguagePolicy(nn.Module):
    """Actor and critic as one module: ``policy(segments)`` evaluates every action that the segments hold.

    ``critic`` is a :class:`Critic` (own backbone) or a linear value head on the actor's trunk. The reference is held, not
    owned: it is no submodule and has no gradient.
    """

    def __init__(
        self,
        actor: CausalModel,
        critic: Critic | nn.Linear,
        *,
        temperature: float,
        reference: CausalModel | None,
        compute_dtype: torch.dtype = torch.float32,
        leashed: bool = False,
    ) -> None:
        """``leashed`` says that every evaluation is to hold the exact KL, for a loss that reads it."""
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self._reference = (reference,)
        self._leashed = leashed

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, units: Units, *, last_value: bool = False) -> Evaluation:
        """Evaluate the actions of ``units``; with ``last_value`` also V of the state after each segment's last action."""
        segments = cast("Segments", units)
        place = layout(segments, self.device)
        with self.computing():
            states = self.actor.states(place.input_ids, place.rows, place.columns)
            logp, entropy = self.actor.logprobs(states.features, place.targets, temperature=self.temperature)
            values, last = self._values(place, states.hidden, last_value=last_value)
            exact_kl = self._exact_kl(segments, place, states.features)
        return Evaluation(logp=logp, entropy=entropy, value=values, exact_kl=exact_kl, last_value=last)

    def _values(
        self, place: Layout, hidden: Float[Tensor, "n D"], *, last_value: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " U"] | None]:
        everyone = torch.arange(len(place.last), device=place.last.device)
        if isinstance(self.critic, Critic):
            table = self.critic(place.input_ids)
            return table[place.rows, place.columns], table[everyone, place.last] if last_value else None
        values = head_values(self.critic, hidden)
        if not last_value:
            return values, None
        return values, head_values(self.critic, self.actor.states(place.input_ids, everyone, place.last).hidden)

    def _exact_kl(
        self, segments: Segments, place: Layout, features: Float[Tensor, "n F"]
    ) -> Float[Tensor, " n"] | None:
        (reference,) = self._reference
        if reference is None or (segments.ref_features is None and not self._leashed):
            return None
        if segments.ref_features is not None:
            theirs = torch.cat(segments.ref_features)
        else:
            with torch.no_grad():
                theirs = reference.states(place.input_ids, place.rows, place.columns).features
        return self.actor.exact_kl(features, reference, theirs, temperature=self.temperature)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in the run's dtype; the weights stay float32."""
        half = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=half):
            yield

    @contextmanager
    def frozen_actor(self) -> Iterator[None]:
        """Keep the actor and, if shared, its trunk out of the gradient: the critic's warm-up must not move the policy."""
        before = {p: p.requires_grad for p in self.actor.parameters()}
        for parameter in before:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, wanted in before.items():
                parameter.requires_grad_(wanted)


def head_values(head: nn.Linear, hidden: Float[Tensor, "... D"]) -> Float[Tensor, ...]:
    """V in float32, whatever the hidden states were computed in."""
    with torch.autocast(hidden.device.type, enabled=False):
        return cast("Tensor", head(hidden.to(head.weight.dtype))).squeeze(-1).float()


def _width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)
