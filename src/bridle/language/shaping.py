"""From judged answers to rewards per action: what a score becomes, where the leash to the reference is, what a cut means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.core.divergence import AdaptiveCoefficient, kl_k1
from bridle.core.moments import Moments, whiten
from bridle.errors import ConfigError
from bridle.language.sampler import Stop

__all__ = ["KLSettings", "ShapingSettings", "score_rewards", "token_rewards"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KLSettings:
    """The leash to the reference."""

    where: Literal["loss", "reward", "none"] = "loss"
    """"loss": β KL beside the surrogate; "reward": −β k1 on every action, which the critic has to learn as well; "none": no
    leash."""
    estimator: Literal["k1", "exact", "k2", "k3"] | None = None
    """"k1" in the reward; "exact", "k2" or "k3" in the loss (k1's gradient there is zero on average); None: k1 or exact."""
    coefficient: float = 0.05
    """β at the start, units of reward per nat."""
    target: float | None = None
    """Nats per answer that the coefficient is steered to; None keeps it fixed."""
    horizon: int = 10_000
    """Answers over which a KL twice off its target would change β by about 20 % (Ziegler et al. 2019, §2.2)."""
    exact_share: float = 0.25
    """Share of a step's answers, in (0, 1], whose KL and entropy are measured over the whole vocabulary and whose log-probs are
    held against the sampler's. 1 costs one more forward pass of the actor and three vocabulary products a token."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        if self.where == "reward" and self.estimator not in ("k1", None):
            raise ConfigError.of("kl.estimator", self.estimator, '"k1" with kl.where="reward"', "set kl.where loss")
        if self.where == "loss" and self.estimator == "k1":
            remedy = "its gradient is zero on average; set kl.estimator exact"
            raise ConfigError.of("kl.estimator", "k1", '"exact", "k2" or "k3" with kl.where="loss"', remedy)
        if not (self.coefficient >= 0 and self.coefficient < float("inf")):
            raise ConfigError.of("kl.coefficient", self.coefficient, "a finite number >= 0")
        if self.target is not None and (not self.target > 0 or self.where == "none" or self.coefficient == 0):
            raise ConfigError.of("kl.target", self.target, "a number > 0, a leash, and a starting coefficient > 0")
        if not 0 < self.exact_share <= 1:
            raise ConfigError.of("kl.exact_share", self.exact_share, "a share in (0, 1]")
        if self.horizon < 1:
            raise ConfigError.of("kl.horizon", self.horizon, "a number of answers >= 1")

    @property
    def in_loss(self) -> Literal["none", "exact", "k2", "k3"]:
        """What stands beside the surrogate; nothing where it would be multiplied by zero."""
        if self.where != "loss" or self.estimator == "k1" or self.coefficient == 0:
            return "none"
        return self.estimator or "exact"

    @property
    def reads_samples(self) -> bool:
        """Whether the leash reads the reference's log-probability of every action."""
        return self.where == "reward" or self.in_loss in ("k2", "k3")

    def controller(self) -> AdaptiveCoefficient | None:
        """The adaptive coefficient at its start; None if it is fixed."""
        if self.target is None:
            return None
        return AdaptiveCoefficient(coefficient=self.coefficient, target=self.target, horizon=self.horizon)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapingSettings:
    """What becomes of a score, in this order: missing-EOS penalty, running scale, clip, whitening."""

    on_length: Literal["score", "bootstrap"] = "score"
    """An answer cut by the limit: "score": the limit is the task's horizon, the score counts and nothing follows;
    "bootstrap": no score, no penalty, the critic's value of the state after the last token."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of an answer that the limit has cut, units of reward."""
    scale: bool = False
    """Divide scores by the deviation of all scores so far, this step's included."""
    clip: float | None = None
    """Bound scores to ± this."""
    whiten: bool = False
    """Give this step's scores mean 0 and variance 1."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        if self.missing_eos_penalty < 0:
            raise ConfigError.of("missing_eos_penalty", self.missing_eos_penalty, "a number >= 0, which is taken off")
        if self.missing_eos_penalty and self.on_length == "bootstrap":
            remedy = "a cut answer is either scored (and penalised) or bootstrapped; set on_length score"
            raise ConfigError.of(
                "missing_eos_penalty", self.missing_eos_penalty, '0 with on_length="bootstrap"', remedy
            )
        if self.clip is not None and self.clip <= 0:
            raise ConfigError.of("shaping.clip", self.clip, "a number > 0", "leave it out for no clipping")


def score_rewards(
    scores: Sequence[float], stops: Sequence[Stop], settings: ShapingSettings, moments: Moments
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"], Moments]:
    """Shape one step's scores.

    Returns:
        [B] reward of each whole answer, 0 where it is bootstrapped instead; [B] True where it is bootstrapped; the moments
        of all scores so far.
    """
    cut = torch.tensor([stop is Stop.LENGTH for stop in stops], dtype=torch.bool)
    bootstrapped = cut & torch.tensor(settings.on_length == "bootstrap")
    counted = ~bootstrapped
    shaped = torch.tensor(scores, dtype=torch.float32)
    shaped = torch.where(cut, shaped - settings.missing_eos_penalty, shaped)
    moments = moments.updated(shaped, mask=counted)
    if settings.scale:
        shaped = moments.standardise(shaped, shift=False)
    if settings.clip is not None:
        shaped = shaped.clamp(-settings.clip, settings.clip)
    if settings.whiten:
        shaped = whiten(shaped, mask=counted)
    return torch.where(counted, shaped, 0.0), bootstrapped, moments


def token_rewards(
    score: Float[Tensor, " B"],
    old_logp: Float[Tensor, "B T"],
    ref_logp: Float[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"],
    coefficient: float,
) -> Float[Tensor, "B T"]:
    """r_t = −β log(π_old/π_ref)(a_t) + [t is the answer's last action] · score (Ouyang et al. 2022, eq. 2, per token).

    The last action is the stop token where there is one: the score sits on it, never on padding.
    """
    rewards = torch.zeros_like(old_logp)
    if ref_logp is not None and coefficient:
        leash = kl_k1(old_logp.flatten(), ref_logp.flatten()).view_as(rewards)
        rewards = torch.where(mask, -coefficient * leash, 0.0)
    last = mask.sum(dim=1) - 1
    return rewards.scatter_add(1, last[:, None], score[:, None].to(rewards))
