"""A policy with a memory: what it does depends on the whole episode so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bridle.batch import Evaluation
from bridle.control.distributions import Distribution
from bridle.control.heads import squashed
from bridle.control.observations import Observations
from bridle.control.policy import ControlPolicy, Sequences

__all__ = ["Pieces", "RecurrentActorCritic"]


class RecurrentActorCritic(ControlPolicy):
    """An encoder, a memory of one layer that reads its features step by step, and actor and critic on what it says.

        h_t, c_t = LSTM(encoder(o_t), h_{t−1}, c_{t−1}), or h_t = GRU(encoder(o_t), h_{t−1})
        π(· | o_1 … o_t) = head(actor(h_t)),  V(o_1 … o_t) = critic(h_t)

    ``encoder`` is given what :class:`ActorCritic` gives its trunk. The state is h and c side by side, [n, 2H] (LSTM), or h,
    [n, H] (GRU); it is 0 where an episode begins. In training the gradient flows through whole episodes, as far as they lie
    in the rollout; the state at the rollout's start is a constant.

    Sources: Hochreiter & Schmidhuber 1997; Cho et al. 2014 (arXiv:1406.1078).
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        memory: nn.LSTM | nn.GRU,
        actor: nn.Module,
        critic: nn.Module,
        head: nn.Module,
    ) -> None:
        """Take any modules; ``memory`` has one layer, one direction and no projection."""
        super().__init__()
        if memory.num_layers != 1 or memory.bidirectional or memory.proj_size:
            raise ValueError("the memory must have one layer, one direction and no projection")
        self.encoder = encoder
        self.memory = memory
        self.actor = actor
        self.critic = critic
        self.head = head

    def initial_state(self, n: int) -> Float[Tensor, "n S"]:
        """Return zeros."""
        width = self.memory.hidden_size * (2 if isinstance(self.memory, nn.LSTM) else 1)
        return next(self.parameters()).new_zeros(n, width)

    def distribution(self, observations: Observations, state: Tensor | None) -> tuple[Distribution, Tensor | None]:
        """π(· | o_1 … o_t) for n episodes, and the state after their o_t."""
        features, state = self._step(observations, state)
        return cast(Distribution, self.head(self.actor(features), observations.mask)), state

    def values(self, observations: Observations, state: Tensor | None) -> Float[Tensor, " n"]:
        """V(o_1 … o_t) for n episodes, in units of return; ``state`` is that before o_t."""
        return cast(Tensor, self.critic(self._step(observations, state)[0]).squeeze(-1))

    def forward(self, units: Sequences) -> Evaluation:
        """Evaluate the actions taken in whole sequences, each episode from its own beginning."""
        features = self._features(units)
        distribution = self._distribution(features, units)
        actions = units.actions[units.mask]
        return Evaluation(
            logp=distribution.log_prob(actions),
            entropy=distribution.entropy(),
            value=self.critic(features).squeeze(-1),
        )

    def unit_distribution(self, units: Sequences) -> Distribution:
        """Return π of every action taken in ``units``."""
        return self._distribution(self._features(units), units)

    def play(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Squash the actions if the head says so."""
        return squashed(self.head, actions)

    def _distribution(self, features: Float[Tensor, "n H"], units: Sequences) -> Distribution:
        allowed = units.observations.mask
        return cast(Distribution, self.head(self.actor(features), None if allowed is None else allowed[units.mask]))

    def _step(self, observations: Observations, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            raise ValueError("a policy with a memory needs its state; start from initial_state(n)")
        features = self.encoder(observations.inputs)
        output, after = self.memory(features[:, None], self._unpacked(state))
        return output[:, 0], self._packed(after)

    def _features(self, units: Sequences) -> Float[Tensor, "n H"]:
        """What the memory says after each action's observation, in the order of the actions."""
        pieces = Pieces.of(units)
        features = self.encoder(units.observations.select(units.mask).inputs)
        state = torch.where(pieces.fresh[:, None], self.initial_state(len(pieces.fresh)), units.state[pieces.unit])
        packed = PackedSequence(features[pieces.order], pieces.batch_sizes)
        output, _ = self.memory(packed, self._unpacked(state))
        said: Tensor = output.data[pieces.place]
        return said

    def _unpacked(self, state: Float[Tensor, "n S"]) -> Tensor | tuple[Tensor, Tensor]:
        """Return the state as PyTorch's modules take it, with a first dimension of one layer."""
        if isinstance(self.memory, nn.GRU):
            return state[None].contiguous()
        hidden, cell = state[None].chunk(2, dim=-1)
        return hidden.contiguous(), cell.contiguous()

    def _packed(self, state: Tensor | tuple[Tensor, Tensor]) -> Float[Tensor, "n S"]:
        return state[0] if isinstance(state, Tensor) else torch.cat([state[0][0], state[1][0]], dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Sequences cut where episodes begin, laid out as PyTorch packs them: the longest piece first, then step by step."""

    unit: Int[Tensor, " P"]
    """[P] the sequence that each piece comes from, longest piece first."""
    fresh: Bool[Tensor, " P"]
    """[P] True where it begins an episode; otherwise it goes on from the sequence's own state."""
    order: Int[Tensor, " n"]
    """[n] which of the n actions stands at each place of the packed layout."""
    place: Int[Tensor, " n"]
    """[n] the place of each action: the inverse of ``order``."""
    batch_sizes: Int[Tensor, " L"]
    """[L] how many pieces are longer than l steps (on the CPU)."""

    @classmethod
    def of(cls, units: Sequences) -> Pieces:
        """Cut ``units``; steps in which nothing was done belong to no piece."""
        mask = units.mask
        first = mask & (mask.cumsum(1) == 1)
        begins, fresh = (first | units.fresh)[mask], units.fresh[mask]
        starts = begins.nonzero()[:, 0]
        n = len(begins)
        lengths = torch.diff(starts, append=starts.new_tensor([n]))
        lengths, by_length = lengths.sort(descending=True, stable=True)
        rank = torch.empty_like(by_length)
        rank[by_length] = torch.arange(len(rank), device=rank.device)
        piece = begins.cumsum(0) - 1
        within = torch.arange(n, device=rank.device) - starts[piece]
        batch_sizes = torch.bincount(within)
        before = batch_sizes.cumsum(0) - batch_sizes
        place = before[within] + rank[piece]
        order = torch.empty_like(place)
        order[place] = torch.arange(n, device=place.device)
        unit = mask.nonzero()[:, 0][starts]
        return cls(
            unit=unit[by_length],
            fresh=fresh[starts][by_length],
            order=order,
            place=place,
            batch_sizes=batch_sizes.cpu(),
        )
