"""Distributions over actions, drawn from given noise: categorical, several choices, switches, Gaussian, squashed Gaussian."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "Distribution",
    "MultiCategorical",
    "SquashedGaussian",
]


class Distribution(Protocol):
    """π(· | s) for n states."""

    def draw(self, generator: np.random.Generator) -> Tensor:
        """One action for each state: ``[n]`` or ``[n, A]``."""
        ...

    def mode(self) -> Tensor:
        """The most likely action of each state: ``[n]`` or ``[n, A]``."""
        ...

    def log_prob(self, actions: Tensor) -> Float[Tensor, " n"]:
        """log π(a | s) of one action for each state, nats."""
        ...

    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy of each state's distribution, nats."""
        ...

    def kl(self, other: Self) -> Float[Tensor, " n"]:
        """KL(self ‖ other) of each state, nats; ``other`` is of the same family and allows the same actions."""
        ...

    def detach(self) -> Self:
        """The same distribution as a constant."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Categorical:
    """π(a | s) = softmax(z)_a over the allowed ones of A actions, 0 for the others."""

    logits: Float[Tensor, "*n A"]
    """[*n, A] z, nats up to a constant for each state; −inf forbids an action too."""
    mask: Bool[Tensor, "*n A"] | None = None
    """[*n, A] True where an action is allowed, at least one in each state; None where all are."""
    log_probs: Float[Tensor, "*n A"] = field(init=False, repr=False)
    """[*n, A] log π(a | s), nats; −inf where forbidden."""

    def __post_init__(self) -> None:
        """Normalise once, for all that is asked afterwards."""
        logits = self.logits if self.mask is None else self.logits.masked_fill(~self.mask, -math.inf)
        object.__setattr__(self, "log_probs", logits.log_softmax(-1))

    def draw(self, generator: np.random.Generator) -> Int[Tensor, "*n"]:
        """Draw by the inverse of the cumulative distribution, one uniform number for each state."""
        uniform = torch.from_numpy(generator.random(tuple(self.logits.shape[:-1])))
        return self.at_quantile(uniform.to(self.logits.device))

    def at_quantile(self, uniform: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Return the action whose stretch of [0, 1) holds ``uniform``; one of probability 0 is never returned."""
        cumulative = self.log_probs.detach().exp().cumsum(-1)
        total = cumulative[..., -1:]
        # u·total may round up to total itself
        below = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return (cumulative <= below).sum(-1)

    def mode(self) -> Int[Tensor, "*n"]:
        """Return each state's most likely action, the first of equals."""
        return self.log_probs.argmax(-1)

    def log_prob(self, actions: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """log π(a | s) = z_a − log Σ_b exp z_b over the allowed b, nats; −inf for a forbidden action."""
        return self.log_probs.gather(-1, actions[..., None]).squeeze(-1)

    def entropy(self) -> Float[Tensor, "*n"]:
        """H = −Σ_a π(a | s) log π(a | s) over the allowed a, nats."""
        return -(self.log_probs.exp() * _finite(self.log_probs)).sum(-1)

    def kl(self, other: Categorical) -> Float[Tensor, "*n"]:
        """KL = Σ_a π(a | s) [log π(a | s) − log π'(a | s)] over the allowed a, nats."""
        return (self.log_probs.exp() * (_finite(self.log_probs) - _finite(other.log_probs))).sum(-1)

    def detach(self) -> Categorical:
        """Return the same distribution as a constant."""
        return Categorical(logits=self.log_probs.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiCategorical:
    """K independent choices: π(a | s) = Π_k π_k(a_k | s), choice k among A_k options."""

    logits: Float[Tensor, "n A"]
    """[n, A] with A = Σ_k A_k: each choice's logits after another's, nats."""
    sizes: tuple[int, ...]
    """[K] how many options each choice has."""
    mask: Bool[Tensor, "n A"] | None = None
    """[n, A] True where an option is allowed, at least one in each choice; None where all are."""
    choices: Categorical = field(init=False, repr=False)
    """[n, K] categoricals over max_k A_k options; those that a choice does not have are forbidden."""

    def __post_init__(self) -> None:
        """Lay the choices out as rows of one length."""
        logits = self.logits if self.mask is None else self.logits.masked_fill(~self.mask, -math.inf)
        padded = functional.pad(logits, (0, 1), value=-math.inf)
        index = _padding(self.sizes).to(logits.device)
        rows = padded[:, index.flatten()].view(len(logits), *index.shape)
        object.__setattr__(self, "choices", Categorical(logits=rows))

    def draw(self, generator: np.random.Generator) -> Int[Tensor, "n K"]:
        """Draw each choice by itself, one uniform number each."""
        return self.choices.draw(generator)

    def mode(self) -> Int[Tensor, "n K"]:
        """Return the most likely option of each choice, which together are the most likely action."""
        return self.choices.mode()

    def log_prob(self, actions: Int[Tensor, "n K"]) -> Float[Tensor, " n"]:
        """log π(a | s) = Σ_k log π_k(a_k | s), nats."""
        return self.choices.log_prob(actions).sum(-1)

    def entropy(self) -> Float[Tensor, " n"]:
        """H = Σ_k H(π_k), nats: the choices are independent."""
        return self.choices.entropy().sum(-1)

    def kl(self, other: MultiCategorical) -> Float[Tensor, " n"]:
        """KL = Σ_k KL(π_k ‖ π'_k), nats."""
        return self.choices.kl(other.choices).sum(-1)

    def detach(self) -> MultiCategorical:
        """Return the same distribution as a constant."""
        return MultiCategorical(logits=self.logits.detach(), sizes=self.sizes, mask=self.mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bernoulli:
    """A independent switches: π(a | s) = Π_i σ(z_i)^{a_i} (1 − σ(z_i))^{1 − a_i}."""

    logits: Float[Tensor, "n A"]
    """[n, A] z, log-odds of 1, nats."""

    def draw(self, generator: np.random.Generator) -> Int[Tensor, "n A"]:
        """Draw each switch by itself: 1 where a uniform number is below σ(z)."""
        uniform = torch.from_numpy(generator.random(tuple(self.logits.shape))).to(self.logits.device)
        return (uniform < self.logits.detach().sigmoid()).long()

    def mode(self) -> Int[Tensor, "n A"]:
        """Return 1 where it is likelier than 0."""
        return (self.logits > 0).long()

    def log_prob(self, actions: Int[Tensor, "n A"]) -> Float[Tensor, " n"]:
        """log π(a | s) = Σ_i [a_i z_i − softplus(z_i)], nats, written so that no large numbers cancel."""
        return -functional.softplus(torch.where(actions.bool(), -self.logits, self.logits)).sum(-1)

    def entropy(self) -> Float[Tensor, " n"]:
        """H = Σ_i [softplus(z_i) − σ(z_i) z_i], nats."""
        z = self.logits.abs()  # H is even in z, and here nothing large cancels
        return (functional.softplus(-z) + torch.sigmoid(-z) * z).sum(-1)

    def kl(self, other: Bernoulli) -> Float[Tensor, " n"]:
        """KL = Σ_i [σ(z_i)(z_i − z'_i) − softplus(z_i) + softplus(z'_i)], nats."""
        p, softplus = torch.sigmoid(self.logits), functional.softplus
        return (p * (self.logits - other.logits) - softplus(self.logits) + softplus(other.logits)).sum(-1)

    def detach(self) -> Bernoulli:
        """Return the same distribution as a constant."""
        return Bernoulli(logits=self.logits.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalGaussian:
    """π(a | s) = Π_i N(a_i; μ_i(s), σ_i²) over A coordinates, in the policy's units."""

    mean: Float[Tensor, "n A"]
    """[n, A] μ, in the policy's units of action."""
    log_std: Float[Tensor, "n A"]
    """[n, A] log σ."""

    def draw(self, generator: np.random.Generator) -> Float[Tensor, "n A"]:
        """Draw a = μ + σ ε, one standard normal number for each coordinate."""
        noise = torch.from_numpy(generator.standard_normal(tuple(self.mean.shape)))
        return self.mean + self.log_std.exp() * noise.to(device=self.mean.device, dtype=self.mean.dtype)

    def mode(self) -> Float[Tensor, "n A"]:
        """Return μ."""
        return self.mean

    def log_prob(self, actions: Float[Tensor, "n A"]) -> Float[Tensor, " n"]:
        """log π(a | s) = −Σ_i [½ ((a_i − μ_i)/σ_i)² + log σ_i + ½ log 2π], nats."""
        z = (actions - self.mean) * torch.exp(-self.log_std)
        return -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Float[Tensor, " n"]:
        """H = Σ_i [log σ_i + ½ log 2πe], nats."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: DiagonalGaussian) -> Float[Tensor, " n"]:
        """KL = Σ_i [log σ'_i − log σ_i + (σ_i² + (μ_i − μ'_i)²)/(2σ'_i²) − ½], nats."""
        ratio = self.log_std - other.log_std
        shift = (self.mean - other.mean) * torch.exp(-other.log_std)
        return (0.5 * (torch.exp(2 * ratio) + shift.square() - 1) - ratio).sum(-1)

    def detach(self) -> DiagonalGaussian:
        """Return the same distribution as a constant."""
        return DiagonalGaussian(mean=self.mean.detach(), log_std=self.log_std.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class SquashedGaussian:
    """The action played is tanh(u) with u ~ N(μ(s), σ²), so that it stays inside (−1, 1).

    The policy's own action is u: it is kept from draw to update, so nothing is lost where tanh is flat. Densities are
    those of tanh(u).

    Source: Haarnoja et al. 2018, "Soft Actor-Critic" (arXiv:1801.01290), appendix C, eq. (20), (21).
    """

    gaussian: DiagonalGaussian
    """[n, A] of u."""

    def draw(self, generator: np.random.Generator) -> Float[Tensor, "n A"]:
        """Draw u = μ + σ ε."""
        return self.gaussian.draw(generator)

    def mode(self) -> Float[Tensor, "n A"]:
        """Return u = μ; tanh(μ) is the median of each coordinate played, not the peak of its density."""
        return self.gaussian.mean

    def log_prob(self, actions: Float[Tensor, "n A"]) -> Float[Tensor, " n"]:
        """log π(tanh u | s) = log N(u; μ, σ²) − Σ_i log(1 − tanh² u_i), nats."""
        return self.gaussian.log_prob(actions) - _log_slope(actions).sum(-1)

    def entropy(self) -> Float[Tensor, " n"]:
        """H = H(N) + Σ_i E log(1 − tanh² u_i), nats; the expectation has no closed form.

        It is taken by Gauss–Hermite quadrature with 32 nodes: without noise, differentiable, and right to 1e-6 nats per
        coordinate for σ ≤ 1 and to 0.003 for σ ≤ 3. A sampled −log π would be as cheap, but its gradient given the actions
        kept is zero on average: no bonus at all.
        """
        points, weights = (t.to(self.gaussian.mean) for t in _hermite())
        u = self.gaussian.mean[..., None] + self.gaussian.log_std.exp()[..., None] * points
        return self.gaussian.entropy() + (_log_slope(u) @ weights).sum(-1)

    def kl(self, other: SquashedGaussian) -> Float[Tensor, " n"]:
        """KL of the two Gaussians, nats: an invertible map changes no divergence."""
        return self.gaussian.kl(other.gaussian)

    def detach(self) -> SquashedGaussian:
        """Return the same distribution as a constant."""
        return SquashedGaussian(gaussian=self.gaussian.detach())


def _finite(log_probs: Tensor) -> Tensor:
    """Return the log-probabilities with 0 where they are −inf, for products with a probability of 0."""
    return log_probs.masked_fill(log_probs == -math.inf, 0.0)


def _log_slope(u: Tensor) -> Tensor:
    """log(1 − tanh² u) = 2 (log 2 − u − softplus(−2u)), finite however large u is."""
    return 2 * (math.log(2) - u - functional.softplus(-2 * u))


@lru_cache(maxsize=64)
def _padding(sizes: tuple[int, ...]) -> Int[Tensor, "K most"]:
    """Return where each option's logit stands; past a choice's own ones, one past the last logit."""
    index = torch.full((len(sizes), max(sizes)), sum(sizes))
    at = 0
    for row, size in enumerate(sizes):
        index[row, :size] = torch.arange(at, at + size)
        at += size
    return index


@lru_cache(maxsize=1)
def _hermite() -> tuple[Float[Tensor, " 32"], Float[Tensor, " 32"]]:
    """Return nodes and weights with E f(ε) ≈ Σ_k w_k f(x_k) for standard normal ε."""
    points, weights = np.polynomial.hermite_e.hermegauss(32)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())
