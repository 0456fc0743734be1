"""Who is who in language PPO: actor, critic and frozen reference, opened, checkpointed and saved."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.errors import ConfigError, ModelError
from bridle.language.causal import CausalModel
from bridle.language.models import (
    ModelSettings,
    disable_dropout,
    load_causal_lm,
    load_reward_model,
    save_model,
    stop_ids,
)
from bridle.language.policy import (
    Critic,
    LanguagePolicy,
    critic_from_actor,
    critic_from_reward_model,
    value_head,
)
from bridle.language.sampler import Sampler
from bridle.language.sampler.serving import SamplerKind, choose_sampler
from bridle.learn.optim import Group, OptimSettings

__all__ = ["CriticSettings", "Roles", "open_roles"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """Where the critic comes from, and how long it learns alone."""

    source: Literal["actor", "reward", "trunk"] = "actor"
    """"actor": own backbone, copied from the actor; "reward": own backbone and head, copied from a reward model;
    "trunk": a value head on the actor's trunk (half the memory, one forward)."""
    reward_model: str | None = None
    """Folder of the reward model to start from, if source is "reward" and it is not the one that judges."""
    warmup_steps: int = 0
    """Run steps in which only the critic learns."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.warmup_steps < 0:
            raise ConfigError.of("critic.warmup_steps", self.warmup_steps, "a number of steps >= 0")
        if self.reward_model is not None and self.source != "reward":
            raise ConfigError.of("critic.reward_model", self.reward_model, 'critic.source="reward"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The models of one PPO run."""

    policy: LanguagePolicy
    """Actor and critic, in evaluation mode: dropout is off."""
    reference: CausalModel
    """The actor as it was before the first step, without gradients."""
    tokenizer: PreTrainedTokenizerBase
    """The actor's."""
    sampler: Sampler
    """Draws answers with the actor's own weights."""
    warning: str | None
    """Why the plain sampler was taken where the faster one was not refused by name."""

    def groups(self, actor: OptimSettings, critic: OptimSettings) -> tuple[Group, Group]:
        """Return the optimiser's groups: the actor (with the trunk, if shared) and the critic (or its head)."""
        return (
            Group(name="actor", parameters=dict(self.policy.actor.named_parameters()), settings=actor),
            Group(name="critic", parameters=dict(self.policy.critic.named_parameters()), settings=critic),
        )

    def save_policy(self, folder: Path) -> None:
        """Write the actor as a folder that opens with ``AutoModelForCausalLM``."""
        save_model(folder, self.policy.actor.model, self.tokenizer, temperature=self.policy.temperature)

    def restore_policy(self, source: str) -> None:
        """Put the actor's weights back from what :meth:`save_policy` wrote, or from any model of the same shape.

        Raises ModelError for a model of another shape or vocabulary.
        """
        saved, tokenizer = load_causal_lm(ModelSettings(path=source), device=self.policy.device)
        theirs, own = saved.state_dict(), self.policy.actor.model.state_dict()
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (theirs, own)]
        if shapes[0] != shapes[1] or tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(
                f"{source} has another shape or vocabulary than {self.policy.actor.model.name_or_path}: their answers "
                "cannot be compared token by token; name a --reference of the same family"
            )
        self.policy.actor.model.load_state_dict(theirs)


def open_roles(
    model: ModelSettings,
    critic: CriticSettings,
    judge: str | None,
    *,
    temperature: float,
    device: torch.device,
    compute_dtype: torch.dtype,
    leashed: bool = False,
    recompute: bool = False,
    sampler: SamplerKind = "auto",
) -> Roles:
    """Open the actor, copy the reference from it, and make the critic; ``judge`` is the reward model that scores, if one.

    Weights are float32 whatever the compute dtype. Raises ModelError for a folder that cannot serve.
    """
    network, tokenizer = load_causal_lm(model, device=device)
    disable_dropout(network)
    actor = CausalModel(network.eval())
    reference = copy.deepcopy(actor).requires_grad_(False)
    policy = LanguagePolicy(
        actor,
        _critic(critic, judge, network, tokenizer),
        temperature=temperature,
        reference=reference,
        compute_dtype=compute_dtype,
        leashed=leashed,
        recompute=recompute,
    ).eval()
    chosen, warning = choose_sampler(
        sampler,
        actor,
        stop_ids(network, tokenizer),
        value_head=None if isinstance(policy.critic, Critic) else policy.critic,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        computing=policy.computing,
    )
    return Roles(policy=policy, reference=reference, tokenizer=tokenizer, sampler=chosen, warning=warning)


def _critic(
    settings: CriticSettings, judge: str | None, actor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Critic | torch.nn.Linear:
    if settings.source == "actor":
        return critic_from_actor(actor)
    if settings.source == "trunk":
        return value_head(int(actor.config.get_text_config().hidden_size)).to(actor.device)
    source = settings.reward_model or judge
    if source is None:
        remedy = "name one with --critic.reward-model FOLDER, or set --critic.source actor"
        raise ConfigError.of("critic.source", "reward", "a reward model to start from", remedy)
    reward, theirs = load_reward_model(ModelSettings(path=source), device=actor.device)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"the reward model {source} has another tokenizer than the policy, so it cannot be the critic's start; "
            "set --critic.source actor (it may still judge)"
        )
    disable_dropout(reward)
    return critic_from_reward_model(reward)
