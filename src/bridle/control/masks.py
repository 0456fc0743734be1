"""Which actions an environment allows: read from its info or its observation, and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from bridle.control.observations import Observations
from bridle.control.parts import MASK_KEY
from bridle.control.spaces import ActionSpec, ObservationSpec
from bridle.errors import WorldError

__all__ = ["Masks", "allowed"]


class Masks:
    """Puts the action mask beside the observation that it belongs to.

    It stands under the key "action_mask" in a Dict observation, or in the info that comes with every observation: A entries for
    Discrete actions, Σ_k A_k side by side for MultiDiscrete ones, True or 1 where allowed.
    """

    def __init__(self, world: str, observations: ObservationSpec, actions: ActionSpec) -> None:
        """Read the masks of ``world``.

        Raises:
            WorldError: its observations hold a mask that does not fit its actions.
        """
        self._world = world
        self._actions = actions
        self._observed = observations.mask is not None
        self._told = False
        if observations.mask is not None:
            _fit(observations.mask.shape, actions, world)

    def begin(self, observations: Observations, info: dict[str, Any]) -> Observations:
        """Attach the masks that came with a whole reset, which says whether this world has any.

        Raises:
            WorldError: as :meth:`attach`.
        """
        self._told = not self._observed and MASK_KEY in info
        return self.attach(observations, info, idle=np.zeros(len(observations), dtype=np.bool_))

    def attach(self, observations: Observations, info: dict[str, Any], *, idle: Bool[np.ndarray, " B"]) -> Observations:
        """Attach the masks that came with ``observations``; in ``idle`` rows nothing will be chosen, so nothing is read.

        Raises:
            WorldError: a mask is missing, of the wrong shape or kind, or allows nothing.
        """
        if self._observed:
            assert observations.mask is not None
            mask = observations.mask.numpy().copy()
        elif self._told:
            mask = self._from_info(info, idle)
        elif MASK_KEY in info:
            raise WorldError(
                f"{self._world}: its info holds an {MASK_KEY!r} after a step, but not after reset; give both"
            )
        else:
            return observations
        mask[idle] = True
        return observations.with_mask(torch.from_numpy(_possible(mask, self._actions, self._world)))

    def _from_info(self, info: dict[str, Any], idle: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if MASK_KEY not in info:
            if idle.all():
                return np.ones((len(idle), sum(self._actions.choices)), dtype=np.bool_)
            raise WorldError(f"{self._world}: its info lacks the {MASK_KEY!r} that it held after reset")
        told = np.asarray(info[MASK_KEY])
        present = np.asarray(info.get(f"_{MASK_KEY}", np.ones(len(idle), dtype=np.bool_)))
        if not (present | idle).all():
            row = int(np.flatnonzero(~present & ~idle)[0])
            raise WorldError(f"{self._world}: the info of environment {row} lacks the {MASK_KEY!r} that others hold")
        return _bits(told, self._actions, self._world)


def allowed(mask: NDArray[Any], actions: ActionSpec, world: str) -> Bool[Tensor, "n A"]:
    """Return a mask [n, A] that was given for n states.

    Raises:
        WorldError: it is not of the actions' shape, holds anything but True and False, or allows nothing somewhere.
    """
    return torch.from_numpy(_possible(_bits(mask, actions, world), actions, world))


def _bits(mask: NDArray[Any], actions: ActionSpec, world: str) -> NDArray[np.bool_]:
    _fit(mask.shape[1:], actions, world)
    if mask.dtype.kind not in "biuf" or not ((mask == 0) | (mask == 1)).all():
        raise WorldError(f"{world}: an action mask must hold True and False, or 1 and 0, alone")
    return mask.astype(np.bool_)


def _fit(shape: tuple[int, ...], actions: ActionSpec, world: str) -> None:
    if not actions.choices:
        kind = type(actions).__name__.removesuffix("Actions")
        raise WorldError(f"{world}: an action mask serves Discrete and MultiDiscrete actions, not {kind} ones")
    if shape != (sum(actions.choices),):
        raise WorldError(f"{world}: an action mask of shape {shape}; its actions need ({sum(actions.choices)},)")


def _possible(mask: NDArray[np.bool_], actions: ActionSpec, world: str) -> NDArray[np.bool_]:
    starts = np.cumsum((0, *actions.choices[:-1]))
    possible = np.logical_or.reduceat(mask, starts, axis=1)
    if not possible.all():
        row, choice = np.argwhere(~possible)[0]
        which = f" for choice {choice}" if len(actions.choices) > 1 else ""
        raise WorldError(
            f"{world}: the action mask of environment {row} allows nothing{which}; at least one must be allowed"
        )
    return mask
