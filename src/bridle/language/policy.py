"""The language model as a policy: an actor, and a critic beside it or on its trunk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridle.batch import Evaluation, Units
from bridle.core.head import HeadAnswers, HeadSlopes
from bridle.language.adapters import twin
from bridle.language.backbones import computes_compiled, hidden_at
from bridle.language.causal import CausalModel
from bridle.language.models import recompute_layers
from bridle.language.segments import Layout, Segments, layout
from bridle.learn.step import OnePass, Seen, Weighed, plain_vjp

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

    def forward(
        self, input_ids: Int[Tensor, "U L"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """V after the tokens at ``(rows[i], columns[i])`` of right-padded texts, [n] in units of return, float32."""
        return head_values(self.head, hidden_at(self.backbone, input_ids, rows, columns))


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
    return Critic(twin(reward.base_model), head)


class LanguagePolicy(nn.Module, OnePass):
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
        recompute: bool = False,
    ) -> None:
        """``leashed`` says that every evaluation is to hold the exact KL, for a loss that reads it.

        With ``recompute`` a training step keeps each layer's input alone and runs the layer again on the way back.
        """
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self._reference = (reference,)
        self._leashed = leashed
        self.recompute = recompute
        for model in self._backbones() if recompute else ():
            recompute_layers(model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, units: Units) -> Evaluation:
        """Evaluate the actions of ``units``."""
        segments = cast("Segments", units)
        place = layout(segments, self.device)
        with self.computing():
            states = self.actor.states(place.input_ids, place.rows, place.columns)
            logp, entropy = self.actor.logprobs(states.features, place.targets, temperature=self.temperature)
            values = self._values(place, states.hidden)
            exact_kl = self._exact_kl(segments, place, states.features)
        return Evaluation(logp=logp, entropy=entropy, value=values, exact_kl=exact_kl)

    def values(self, segments: Segments) -> tuple[Float[Tensor, " n"], Float[Tensor, " U"]]:
        """V(s_t) of every action, and V of the state after each segment's last one; no vocabulary is projected on."""
        place = layout(segments, self.device)
        rows = torch.cat([place.rows, torch.arange(len(segments), device=self.device)])
        columns = torch.cat([place.columns, place.last])
        with self.computing():
            if isinstance(self.critic, Critic):
                found = self.critic(place.input_ids, rows, columns)
            else:
                found = head_values(self.critic, self.actor.states(place.input_ids, rows, columns).hidden)
        return found[: len(place.rows)], found[len(place.rows) :]

    def differentiate(self, units: Units, slopes: Weighed) -> Seen:
        """Evaluate the actions of ``units`` and take their slopes back to the weights: first the actor, then the critic.

        Each position's logits exist once, and where the critic has its own backbone only one of the two graphs at a time.
        """
        if not self.actor.fused:
            seen, pull_back = plain_vjp(self, units)
            pull_back(slopes(seen, slice(None)))
            return seen
        segments = cast("Segments", units)
        place = layout(segments, self.device)
        own = isinstance(self.critic, Critic)
        with self.computing(), self._recomputing():
            states = self.actor.states(place.input_ids, place.rows, place.columns)
            values = states.hidden.new_zeros(len(place.rows), dtype=torch.float32)
            if not own:
                values = self._values(place, states.hidden)
        seen, hidden_slope, value_slope = self._actor_slopes(segments, place, states.features, values.detach(), slopes)
        _pull_back((states.features, hidden_slope), (values, value_slope))
        if not own:
            return seen
        with self.computing(), self._recomputing():
            values = self._values(place, states.hidden)
        seen = replace(seen, value=values.detach())
        _pull_back((values, slopes(seen, slice(None)).value))
        return seen

    def _actor_slopes(
        self, segments: Segments, place: Layout, features: Tensor, values: Tensor, slopes: Weighed
    ) -> tuple[Seen, Tensor | None, Tensor | None]:
        """Answers to all actions, and the loss's slopes with respect to the actor's features and to the values."""
        found: list[Tensor | None] = []

        def weigh(rows: slice, head: HeadAnswers) -> HeadSlopes:
            seen = Seen(logp=head.logp, entropy=head.entropy, value=values[rows], exact_kl=head.kl)
            given = slopes(seen, rows)
            found.append(given.value)
            return HeadSlopes(logp=given.logp, entropy=given.entropy, kl=given.exact_kl)

        theirs = self._reference_features(segments, place)
        (reference,) = self._reference
        with self.computing():
            answers, slope = self.actor.answers(
                features.detach(),
                place.targets,
                reference=None if theirs is None or reference is None else (reference, theirs),
                temperature=self.temperature,
                weighing=weigh,
            )
        seen = Seen(logp=answers.logp, entropy=answers.entropy, value=values, exact_kl=answers.kl)
        given = [slope for slope in found if slope is not None]
        return seen, slope, torch.cat(given) if given else None

    def _values(self, place: Layout, hidden: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """V from the actor's hidden states, or from the critic's own, which leave those unread."""
        if isinstance(self.critic, Critic):
            return cast("Tensor", self.critic(place.input_ids, place.rows, place.columns))
        return head_values(self.critic, hidden)

    def _exact_kl(
        self, segments: Segments, place: Layout, features: Float[Tensor, "n F"]
    ) -> Float[Tensor, " n"] | None:
        theirs = self._reference_features(segments, place)
        (reference,) = self._reference
        if theirs is None or reference is None:
            return None
        return self.actor.exact_kl(features, reference, theirs, temperature=self.temperature)

    def _reference_features(self, segments: Segments, place: Layout) -> Float[Tensor, "n F"] | None:
        """What the reference's projection reads at each action: kept, or computed where a loss needs it; else None."""
        (reference,) = self._reference
        if reference is None or (segments.ref_features is None and not self._leashed):
            return None
        if segments.ref_features is not None:
            return torch.cat(segments.ref_features)
        with torch.no_grad(), self.computing():
            return reference.states(place.input_ids, place.rows, place.columns).features

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in the run's dtype; the weights stay float32."""
        half = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=half):
            yield

    def computes_compiled(self) -> bool:
        """Whether passes of actor and critic run in compiled code."""
        own = computes_compiled(self.critic.backbone, self.compute_dtype) if isinstance(self.critic, Critic) else True
        return own and self.actor.computes_compiled(self.compute_dtype)

    def _backbones(self) -> list[PreTrainedModel]:
        own = [self.critic.backbone] if isinstance(self.critic, Critic) else []
        return [self.actor.model, *own]

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Let layers be run again on the way back, which transformers does in training mode alone; dropout is 0 there."""
        models = self._backbones() if self.recompute else []
        for model in models:
            model.train()
        try:
            yield
        finally:
            for model in models:
                model.eval()

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


def _pull_back(*pairs: tuple[Tensor, Tensor | None]) -> None:
    """Go on from slopes with respect to some answers to the weights, by autograd."""
    wanted = [(answer, slope) for answer, slope in pairs if slope is not None and answer.requires_grad]
    if wanted:
        torch.autograd.backward([answer for answer, _ in wanted], [slope for _, slope in wanted])


def head_values(head: nn.Linear, hidden: Float[Tensor, "... D"]) -> Float[Tensor, ...]:
    """V in float32, whatever the hidden states were computed in."""
    with torch.autocast(hidden.device.type, enabled=False):
        return cast("Tensor", head(hidden.to(head.weight.dtype))).squeeze(-1).float()


def _width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)
