"""Who is who in language PPO: actor, critic and frozen reference, opened, checkpointed and saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.errors import ConfigError, ModelError
from bridle.language.adapters import Adapted, Base, LoraSettings, adapted_reward_model, open_adapted, twin
from bridle.language.causal import CausalModel
from bridle.language.descriptions import describe_reward_model
from bridle.language.models import (
    ModelSettings,
    adapter_of,
    disable_dropout,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
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
from bridle.language.shadow import masters_of
from bridle.learn.masters import Masters
from bridle.learn.optim import Group, OptimSettings

__all__ = ["CriticSettings", "Roles", "check_critic", "open_roles"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """Where the critic comes from, and how long it learns alone."""

    source: Literal["actor", "reward", "trunk"] = "trunk"
    """"trunk": a value head on the actor's trunk (half the memory, one forward); "actor": own backbone, copied from the
    actor; "reward": own backbone and head, copied from a reward model."""
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
    masters: Masters = field(default_factory=Masters)
    """The float32 weights behind those that actor and critic hold in bfloat16; empty in float32."""
    adapted: Adapted | None = None
    """The actor's adapter on the base that all roles share; None where whole weights are trained."""

    @property
    def base(self) -> Base | None:
        """What all roles share, where adapters are trained."""
        return None if self.adapted is None else self.adapted.base

    def groups(self, actor: OptimSettings, critic: OptimSettings) -> tuple[Group, Group]:
        """Return the optimiser's groups: the actor (with the trunk, if shared) and the critic (or its head)."""
        return (
            Group(name="actor", parameters=dict(self.policy.actor.named_parameters()), settings=actor),
            Group(name="critic", parameters=dict(self.policy.critic.named_parameters()), settings=critic),
        )

    def save_policy(self, folder: Path) -> None:
        """Write the actor as a folder that opens with ``AutoModelForCausalLM``; of an adapter, as one that peft opens."""
        if self.adapted is not None:
            self.adapted.save(folder)
            return
        with self.masters.in_place():
            save_model(folder, self.policy.actor.model, self.tokenizer, temperature=self.policy.temperature)

    def save_merged(self, folder: Path) -> None:
        """Write the actor of a run of adapters as a whole model."""
        assert self.adapted is not None
        self.adapted.save_merged(folder, temperature=self.policy.temperature)

    @property
    def opens_with(self) -> str:
        """What opens the folder that :meth:`save_policy` writes."""
        return "opens with AutoModelForCausalLM" if self.adapted is None else "an adapter; opens with peft.PeftModel"

    def restore_policy(self, source: str) -> None:
        """Put the actor's weights back from what :meth:`save_policy` wrote, or from any model of the same shape.

        Raises ModelError for a model of another shape or vocabulary.
        """
        if self.adapted is not None:
            self.adapted.restore(Path(source))
            return
        saved, tokenizer = load_causal_lm(ModelSettings(path=source), device=self.policy.device)
        theirs, own = saved.state_dict(), self.policy.actor.model.state_dict()
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (theirs, own)]
        if shapes[0] != shapes[1] or tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(
                f"{source} has another shape or vocabulary than {self.policy.actor.model.name_or_path}: their answers "
                "cannot be compared token by token; name a --reference of the same family"
            )
        with self.masters.in_place():
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
    lora: LoraSettings | None = None,
    seed: int = 0,
) -> Roles:
    """Open the actor, copy the reference from it, and make the critic; ``judge`` is the reward model that scores, if one.

    With adapters (``lora``, drawn from ``seed``) all roles share one base: the actor is base and adapter, the reference the
    base alone or, where the actor starts from an adapter, that one frozen; a critic of its own has its own adapter and head.
    Where ``compute_dtype`` is bfloat16 layers that do not run compiled in it hold their weights in it, behind which ``masters``
    keep float32; see :func:`bridle.language.shadow.masters_of`. Raises ModelError for a folder that cannot serve.
    """
    adapted = None
    if lora is not None and lora.rank is not None:
        adapted = open_adapted(model, lora, seed=seed, device=device)
        network, tokenizer = adapted.model, adapted.tokenizer
    else:
        network, tokenizer = load_causal_lm(model, device=device)
    disable_dropout(network)
    actor = CausalModel(network.eval())
    if adapted is not None and adapted.fresh:
        disable_dropout(adapted.base.model)
        reference = CausalModel(adapted.base.model.eval())
    else:
        reference = twin(actor).requires_grad_(False)
    policy = LanguagePolicy(
        actor,
        _critic(critic, judge, network, tokenizer)
        if adapted is None
        else _adapted_critic(critic, judge, adapted, seed),
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
    own = [policy.critic.backbone] if isinstance(policy.critic, Critic) else []
    return Roles(
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        sampler=chosen,
        warning=warning,
        masters=masters_of([network.base_model, reference.model.base_model, *own], compute_dtype),
        adapted=adapted,
    )


def check_critic(settings: CriticSettings, judge: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a critic that could not be made, as far as the folder that it starts from says; its weights are not read.

    Raises ConfigError where nothing is named to start from, ModelError for a folder that cannot serve.
    """
    if settings.source == "reward":
        source = _reward_source(settings, judge)
        _require_same_tokens(source, describe_reward_model(ModelSettings(path=source)).tokenizer, tokenizer)


def _critic(
    settings: CriticSettings, judge: str | None, actor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Critic | torch.nn.Linear:
    if settings.source == "actor":
        return critic_from_actor(actor)
    if settings.source == "trunk":
        return value_head(int(actor.config.get_text_config().hidden_size)).to(actor.device)
    source = _reward_source(settings, judge)
    reward, theirs = load_reward_model(ModelSettings(path=source), device=actor.device)
    _require_same_tokens(source, theirs, tokenizer)
    disable_dropout(reward)
    return critic_from_reward_model(reward)


def _adapted_critic(settings: CriticSettings, judge: str | None, actor: Adapted, seed: int) -> Critic | torch.nn.Linear:
    """A critic on the actor's base: with an adapter of its own, or a head on the actor's trunk.

    A reward model to start from that lies on another base, or on none, is held besides, frozen under the critic's adapter.
    """
    width = int(actor.model.config.get_text_config().hidden_size)
    if settings.source == "trunk":
        return value_head(width).to(actor.model.device)
    if settings.source == "actor":
        return Critic(twin(actor.model).base_model, value_head(width).to(actor.model.device))
    where = ModelSettings(path=_reward_source(settings, judge))
    found = adapter_of(where)
    if found is not None and actor.base.is_of(found):
        _require_same_tokens(where.path, load_tokenizer(where), actor.tokenizer)
        reward = adapted_reward_model(actor.base, found)
    else:
        own = LoraSettings(rank=actor.rank if found is None else found.rank)
        opened = open_adapted(where, own, seed=seed, device=actor.model.device, reward=True)
        _require_same_tokens(where.path, opened.tokenizer, actor.tokenizer)
        reward = opened.model
    disable_dropout(reward)
    return critic_from_reward_model(reward)


def _reward_source(settings: CriticSettings, judge: str | None) -> str:
    source = settings.reward_model or judge
    if source is None:
        remedy = "name one with --critic.reward-model FOLDER, or set --critic.source actor"
        raise ConfigError.of("critic.source", "reward", "a reward model to start from", remedy)
    return source


def _require_same_tokens(source: str, theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> None:
    if theirs.get_vocab() != ours.get_vocab():
        raise ModelError(
            f"the reward model {source} has another tokenizer than the policy, so it cannot be the critic's start; "
            "set --critic.source actor (it may still judge)"
        )
