"""A batch's units in keyed orders, cut into minibatches whose columns are laid out at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.batch import Batch, Units
from bridle.core.moments import whiten
from bridle.errors import ConfigError
from bridle.learn.step import Averaging, Minibatch, action_weights, pieces
from bridle.random import permutation

__all__ = ["Minibatches", "epoch_order", "minibatches"]


class Minibatches:
    """A batch's units split into minibatches, pass after pass; made by :func:`minibatches`."""

    def __init__(
        self,
        units: Units,
        orders: Sequence[Int[Tensor, " U"] | None],
        stretches: Sequence[slice],
        whole: Minibatch,
        lengths: Sequence[int],
    ) -> None:
        """Take the units in each of the ``orders``, whose minibatches are the ``stretches`` of it."""
        self.whole = whole
        """[K] the actions of all minibatches, end to end."""
        self.lengths = lengths
        """how many of them each minibatch holds."""
        self.parts = whole.split(lengths)
        """the actions of each minibatch."""
        self._units, self._orders, self._stretches = units, orders, stretches
        self._pass, self._passed = -1, units

    def __len__(self) -> int:
        """Return how many minibatches there are, those of all passes together."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[Int[Tensor, " M"], Units, Minibatch]]:
        """Yield :meth:`at` each."""
        return map(self.at, range(len(self)))

    def at(self, place: int) -> tuple[Int[Tensor, " M"], Units, Minibatch]:
        """Return which units of the batch the minibatch holds [M], those units, and their actions."""
        number, part = divmod(place, len(self._stretches))
        order, stretch = self._orders[number], self._stretches[part]
        if number != self._pass:  # the units of one pass are laid out at a time
            self._pass, self._passed = number, self._units if order is None else self._units.select(order)
        rows = torch.arange(stretch.start, stretch.stop) if order is None else order[stretch]
        units = self._passed if len(self._stretches) == 1 else self._passed.select(stretch)
        return rows, units, self.parts[place]


def minibatches(
    batch: Batch, count: int, *, orders: Sequence[Int[Tensor, " U"] | None], whiten_here: bool, per: Averaging
) -> Minibatches:
    """Split the units, in each of the ``orders`` in turn, into ``count`` parts whose sizes differ by at most one.

    The actions of all orders are laid out at once. Weights and whitening statistics are those of the part, taken before it
    is cut into micro-batches.

    Raises:
        ConfigError: there are fewer units than parts.
    """
    number = len(batch.units)
    if number < count:
        raise ConfigError.of("minibatches", count, f"at most the number of units in a rollout, {number}")
    stretches = [slice(number * part // count, number * (part + 1) // count) for part in range(count)]
    sizes, whole = batch.units.sizes, torch.arange(number)
    indices = [whole if order is None else order for order in orders]
    if bool((sizes == 1).all()):  # their actions' positions are the units' own
        places, lengths = indices, [stretch.stop - stretch.start for stretch in stretches] * len(indices)
    else:
        places = [batch.actions_of(index) for index in indices]
        lengths = [int(sizes[index[stretch]].sum()) for index in indices for stretch in stretches]
    laid_out = _laid_out(batch, torch.cat(places), lengths, whiten_here=whiten_here, per=per)
    return Minibatches(batch.units, orders, stretches, laid_out, lengths)


def _laid_out(
    batch: Batch, actions: Int[Tensor, " K"], lengths: Sequence[int], *, whiten_here: bool, per: Averaging
) -> Minibatch:
    """Lay a batch's actions out in the order of ``actions``, as minibatches of ``lengths`` actions end to end."""
    place = actions.to(batch.old_logp.device)
    advantages = batch.advantages.index_select(0, place)
    # an action's weight asks for its episode only where episodes weigh alike
    episodes = batch.episode if per == "action" else batch.episode.index_select(0, place)
    return Minibatch(
        actions=actions,
        old_logp=batch.old_logp.index_select(0, place),
        old_value=batch.old_value.index_select(0, place),
        advantages=_whitened(advantages, lengths) if whiten_here else advantages,
        returns=batch.returns.index_select(0, place),
        weights=_weights(episodes, lengths, per),
        ref_logp=None if batch.ref_logp is None else batch.ref_logp.index_select(0, place),
    )


def epoch_order(units: int, *, seed: int, step: int, epoch: int) -> Int[Tensor, " U"]:
    """Return the keyed order in which epoch ``epoch`` of update ``step`` passes over the units."""
    return torch.from_numpy(permutation(units, seed, "minibatches", step, epoch))


def _whitened(column: Float[Tensor, " K"], lengths: Sequence[int]) -> Float[Tensor, " K"]:
    """Whiten each part by itself; those of one length, and there are hardly more than two, in one call."""
    if len(set(lengths)) == 1:
        return whiten(column.view(len(lengths), lengths[0]), dim=1).view(-1)
    white = list(pieces(column, lengths))
    for length in set(lengths):
        alike = [place for place, part in enumerate(white) if len(part) == length]
        rows = whiten(torch.stack([white[place] for place in alike]), dim=1)
        for place, row in zip(alike, rows.unbind(), strict=True):
            white[place] = row
    return torch.cat(white)


def _weights(episodes: Int[Tensor, " K"], lengths: Sequence[int], per: Averaging) -> Float[Tensor, " K"]:
    if per == "action":
        shares = torch.tensor([1.0 / max(length, 1) for length in lengths], device=episodes.device)
        return shares.repeat_interleave(torch.tensor(lengths, device=episodes.device))
    return torch.cat([action_weights(own, per) for own in pieces(episodes, lengths)])
