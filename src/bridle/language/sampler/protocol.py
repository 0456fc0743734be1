"""What writes the answers: the contract that every sampler keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from bridle.errors import ConfigError

__all__ = ["Sampled", "Sampler", "SamplingSettings", "Stop"]


class Stop(StrEnum):
    """How an answer ended: a fact; what follows for its value is decided when the batch is prepared."""

    EOS = "eos"
    """The policy chose a stop token; it is the answer's last action."""
    LENGTH = "length"
    """The limit on new tokens cut the answer."""
    STRING = "string"
    """The answer's text came to hold a stop string; its last action completed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How answers are drawn: the policy is softmax(z/τ), whole; nothing is cut off its tail in training.

    Outside training ``top_k``, ``top_p`` and ``min_p`` may cut the tail off, in this order.
    """

    max_new_tokens: int = 64
    """Longest answer, tokens, the stop token included."""
    temperature: float = 1.0
    """τ > 0; the log-probs of policy, old policy and reference all use it."""
    rows: int = 256
    """Answers decoded at once; a matter of memory and speed alone."""
    top_k: int | None = None
    """Not in training: draw from the k likeliest tokens (1: greedy text); None: from all."""
    top_p: float | None = None
    """Not in training: draw from the fewest likeliest tokens that hold this share of the probability, in (0, 1]."""
    min_p: float | None = None
    """Not in training: draw from tokens at least this many times as probable as the likeliest, in (0, 1]."""
    stop_strings: tuple[str, ...] = ()
    """Not in training: texts that end an answer."""

    @property
    def warped(self) -> bool:
        """Whether the distribution drawn from is another than softmax(z/τ)."""
        return any(cut is not None for cut in (self.top_k, self.top_p, self.min_p))

    def require_whole(self) -> None:
        """Raise ConfigError where answers would not be drawn from the policy itself, as training needs."""
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self, name) is not None:
                expected = "no cut of the tail in training: the policy is softmax(z/τ), whole"
                raise ConfigError.of(f"sampling.{name}", getattr(self, name), expected, "leave it out")
        if self.stop_strings:
            remedy = "name a token with --model.eos-token"
            raise ConfigError.of("sampling.stop_strings", self.stop_strings, "stop tokens alone in training", remedy)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.max_new_tokens < 1:
            raise ConfigError.of("max_new_tokens", self.max_new_tokens, "a number of tokens >= 1")
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError.of("temperature", self.temperature, "a finite number > 0", "greedy text is no policy")
        if self.rows < 1:
            raise ConfigError.of("rows", self.rows, "a number of answers >= 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError.of("top_k", self.top_k, "a number of tokens >= 1")
        for name in ("top_p", "min_p"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError.of(name, share, "a share in (0, 1]")
        if not all(self.stop_strings):
            raise ConfigError.of("stop_strings", self.stop_strings, "texts of at least one character")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One answer as it was sampled."""

    ids: Int[Tensor, " T"]
    """[T] token ids on the CPU, the stop token included."""
    logp: Float[Tensor, " T"]
    """[T] log-probability of each under the distribution it was drawn from, nats, float32 on the CPU."""
    plain_logp: Float[Tensor, " T"]
    """[T] the same under softmax(z/τ), whole: equal to ``logp`` unless the tail was cut off."""
    values: Float[Tensor, " T"] | None = None
    """[T] V(s_t) before each token, in units of return; None where the critic has a trunk of its own."""
    stop: Stop
    """How it ended."""


class Sampler(Protocol):
    """Draws answers from the present policy, one for each prompt."""

    def __call__(
        self, prompts: Sequence[Int[Tensor, " P"]], uniforms: NDArray[np.float64], settings: SamplingSettings
    ) -> list[Sampled]:
        """Draw one answer per prompt; token t of answer b is the inverse CDF at ``uniforms[b, t]``.

        Args:
            prompts: B token-id vectors on the CPU, each of at least one token.
            uniforms: [B, max_new_tokens] draws in [0, 1), keyed per sample, so that an answer depends on its key and its
                prompt, not on its neighbours.
            settings: limits and temperature.
        """
        ...
