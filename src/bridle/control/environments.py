"""Vector environments of Gymnasium: whichever way they reset, every step gives the true successor."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from bridle.control.masks import Masks
from bridle.control.observations import Observations
from bridle.control.processes import Gone, Processes, Replacement, close
from bridle.control.spaces import ActionSpec, ObservationSpec, action_spec, observation_spec
from bridle.errors import NonFiniteWorld, WorldError

__all__ = ["World", "WorldStep", "foreign"]

_KILLED = "out of memory, or killed from outside; try fewer environments"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldStep:
    """One step of all B environments."""

    observations: Observations
    """[B, …] what each environment shows now, and what it allows: the one to act on next."""
    successors: Observations
    """[B, …] the true successor of the action, also where the episode ended and the environment was reset; the mask is
    not its own there."""
    rewards: Float[np.ndarray, " B"]
    """[B] float64, in units of reward."""
    terminated: Bool[np.ndarray, " B"]
    """[B] the successor is a terminal state, or a life was lost where that counts as one."""
    truncated: Bool[np.ndarray, " B"]
    """[B] the episode was cut and did not terminate."""
    over: Bool[np.ndarray, " B"]
    """[B] the episode ended and the environment begins another; a lost life may terminate without ending it."""
    acted: Bool[np.ndarray, " B"]
    """[B] False where the environment only reset itself and ignored the action, or died of it: not a transition."""
    lost: Bool[np.ndarray, " B"]
    """[B] the environment died instead of answering and was made anew: its episode was cut with the step before."""


class World:
    """B copies of an environment behind one face for the three autoreset modes (Gymnasium ≥ 1.1)."""

    def __init__(
        self,
        name: str,
        envs: VectorEnv[Any, Any, Any],
        *,
        form: str = "",
        life_loss: bool = False,
        remake: Callable[[], VectorEnv[Any, Any, Any]] | None = None,
    ) -> None:
        """Put ``envs``, called ``name`` in messages, behind this face.

        Args:
            name: what messages call it.
            envs: B environments.
            form: how they run side by side, in words.
            life_loss: a lost life (``info["lives"]`` falls) is a terminal state, though the episode goes on.
            remake: makes ``envs`` again; None where they cannot be, or see to it themselves.

        Raises:
            WorldError: a space is not supported, or the environment does not say its autoreset mode.
        """
        self.name = name
        self.form = form
        self.num_envs = int(envs.num_envs)
        self.observations: ObservationSpec = observation_spec(envs.single_observation_space, name)
        self.actions: ActionSpec = action_spec(envs.single_action_space, name)
        self._envs = envs
        self._remake = remake
        self._used = False
        self._processes = envs if isinstance(envs, Processes) else None
        self._masks = Masks(name, self.observations, self.actions)
        self._life_loss = life_loss
        self._lives = np.zeros(self.num_envs, dtype=np.int64)
        mode = envs.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            remedy = "set it to a gymnasium.vector.AutoresetMode"
            raise WorldError(f"{name}: metadata['autoreset_mode'] is {mode!r}; {remedy}")
        self._mode = mode
        self._copies = _copies(envs)
        self._nobody = np.zeros(self.num_envs, dtype=np.bool_)
        self._everybody = ~self._nobody
        self._nobody.flags.writeable = self._everybody.flags.writeable = False
        self._pending = self._nobody

    def reset(self, seed: int) -> Observations:
        """Start all environments anew from ``seed`` and return what they show.

        Those that were in use are made again first, where they can be: some (BipedalWalker-v3) keep something of their
        past through a reset, and then seed and actions would not determine what follows.

        Raises:
            WorldError: the environment raised, showed something that is not finite, or a mask that does not serve.
        """
        if self._used and self._remake is not None:
            before = self._envs
            with foreign(self.name, "making it again"):
                self._envs = self._remake()
            if self._envs is not before:  # a function of somebody's own may hand out the same ones
                close(before)
            self._copies = _copies(self._envs)
        self._used = True
        with foreign(self.name, "reset"):
            raw, info = self._envs.reset(seed=seed)
        if self._life_loss:
            self._lost_lives(info)
        self._pending = self._nobody
        return self._masks.begin(self._encode(raw), info)

    def step(self, actions: NDArray[Any]) -> WorldStep:
        """Take the policy's ``actions`` ``[B]`` or ``[B, A]`` in every environment.

        Raises:
            WorldError: the environment raised, an observation or reward is not finite, or a mask does not serve.
        """
        world_actions = self.actions.to_world(actions)
        try:  # what `foreign` does, without its calls: every step of every environment comes by here
            raw, rewards, terminated, truncated, info = self._envs.step(world_actions)
        except WorldError:
            raise
        except (Exception, SystemExit) as error:
            raise _Foreign(self.name, "step", world_actions, self._copies).told(error) from error
        terminated, truncated = np.array(terminated, dtype=np.bool_), np.array(truncated, dtype=np.bool_)
        acted, lost = self._everybody, self._nobody
        if self._processes is not None or self._pending is not self._nobody:
            lost = lost if self._processes is None else self._processes.lost.copy()
            acted = ~(self._pending | lost)
            terminated &= acted
            truncated &= acted
        # counting is the cheapest question that NumPy answers, and most steps end nothing
        done = self._nobody
        if np.count_nonzero(terminated) or np.count_nonzero(truncated):
            truncated &= ~terminated
            done = terminated | truncated
        rewards = np.asarray(rewards, dtype=np.float64)
        if not math.isfinite(rewards.dot(rewards)) and not np.isfinite(rewards).all():
            row = int(np.flatnonzero(~np.isfinite(rewards))[0])
            of = f"environment {row}, after action {world_actions[row]},"
            text = f"{self.name}: the reward {rewards[row]} of {of} is not a finite number"
            raise NonFiniteWorld(text, "the reward", row, torch.from_numpy(rewards.copy()))
        shown = self._encode(raw)
        self._pending = self._nobody
        if self._life_loss:
            terminated |= self._lost_lives(info) & acted & ~done
        successors, observations = self._next_episode(done, shown, world_actions, info)
        return WorldStep(
            observations=observations,
            successors=successors,
            rewards=rewards,
            terminated=terminated,
            truncated=truncated,
            over=done,
            acted=acted,
            lost=lost,
        )

    @property
    def replacements(self) -> Sequence[Replacement]:
        """The environments that died and were made anew since :meth:`reset`."""
        return () if self._processes is None else self._processes.replacements

    def expect(self, replacements: Sequence[Replacement]) -> bool:
        """After :meth:`reset`, make environments anew where they were before; False if these cannot be."""
        if self._processes is not None:
            self._processes.expect(replacements)
        return self._processes is not None or not replacements

    def told(self) -> list[str]:
        """Return a line for each environment that was made anew since this was last asked."""
        if self._processes is None:
            return []
        lines, self._processes.told = self._processes.told, []
        return lines

    def close(self) -> None:
        """Release the environments."""
        close(self._envs)

    def _lost_lives(self, info: dict[str, Any]) -> NDArray[np.bool_]:
        if "lives" not in info:
            raise WorldError(f"{self.name}: its info says nothing of lives; switch the loss of a life off")
        before, self._lives = self._lives, np.array(info["lives"], dtype=np.int64)
        return self._lives < before

    def _begin_lives(self, info: dict[str, Any], begun: NDArray[np.bool_]) -> None:
        """Take the lives of the games ``begun`` outside a step that is looked at."""
        if self._life_loss:
            self._lives[begun] = np.asarray(info["lives"], dtype=np.int64)[begun]

    def _next_episode(
        self, done: NDArray[np.bool_], shown: Observations, world_actions: NDArray[Any], info: dict[str, Any]
    ) -> tuple[Observations, Observations]:
        """Return (successors, observations) after a step that showed ``shown`` and ended the episodes ``done``."""
        nobody = self._nobody
        if done is nobody:
            shown = self._masks.attach(shown, info, idle=nobody)
            return shown, shown
        ended = torch.from_numpy(np.flatnonzero(done))
        if self._mode is AutoresetMode.SAME_STEP:
            last = self.observations.encode_each([info["final_obs"][i] for i in ended.tolist()])
            successors = self._finite(shown.with_rows(ended, last))
            return successors, self._masks.attach(shown, info, idle=nobody)
        if self._mode is AutoresetMode.DISABLED:
            with foreign(self.name, "reset"):
                raw, reset_info = self._envs.reset(options={"reset_mask": done.copy()})
            self._begin_lives(reset_info, done)
            begun = self._masks.attach(self._encode(raw), reset_info, idle=~done)
            return shown, self._masks.attach(shown, info, idle=done).with_rows(ended, begun.select(ended))
        if not done.all():
            self._pending = done
            return shown, self._masks.attach(shown, info, idle=done)
        # NEXT_STEP with every environment about to reset: a column without a transition, taken here and now
        with foreign(self.name, "step"):
            raw, *_, info = self._envs.step(world_actions)
        self._begin_lives(info, done)
        return shown, self._masks.attach(self._encode(raw), info, idle=nobody)

    def _encode(self, raw: Any) -> Observations:
        return self._finite(self.observations.encode(raw))

    def _finite(self, encoded: Observations) -> Observations:
        numbers = encoded.vector.numpy()
        flat = numbers.reshape(-1)
        if not math.isfinite(flat.dot(flat)):  # a call instead of two; large numbers make it infinite too
            finite = np.isfinite(numbers).all(axis=1)
            if not finite.all():
                row = int(np.flatnonzero(~finite)[0])
                text = f"{self.name}: environment {row} showed an observation that is not finite in float32"
                raise NonFiniteWorld(text, "an observation", row, encoded.vector.clone())
        return encoded


def _copies(envs: VectorEnv[Any, Any, Any]) -> tuple[object, ...]:
    return tuple(envs.envs) if isinstance(envs, SyncVectorEnv) else ()


def foreign(world: str, doing: str) -> AbstractContextManager[None]:
    """Turn whatever the environment's own code raises into one line, with which environment if that is known."""
    return _Foreign(world, doing, None, ())


class _Foreign:
    """See :func:`foreign`. Where ``copies`` run in this process, the one whose code was running is named."""

    __slots__ = ("_actions", "_copies", "_doing", "_world")

    def __init__(self, world: str, doing: str, actions: NDArray[Any] | None, copies: Sequence[object]) -> None:
        self._world, self._doing, self._actions, self._copies = world, doing, actions, copies

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # foreign code may raise anything, or leave
        if isinstance(error, Exception | SystemExit) and not isinstance(error, WorldError):
            raise self.told(error) from error

    def told(self, error: BaseException) -> WorldError:
        """Put what was raised into one line."""
        head = f"{self._world}: {self._doing}"
        if isinstance(error, Gone):
            which = self._named(error.environment)
            told = f"{head} of {which} {error.how}" if error.raised else f"{head}: the process of {which} {error.how}"
            return WorldError(told + _way_on(error))
        if isinstance(error, EOFError | BrokenPipeError | ConnectionResetError):
            return WorldError(f"{head}: the process of an environment died ({_KILLED})")
        running = {id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)}
        found = next((i for i, copy in enumerate(self._copies) if id(copy) in running), None)
        where = "" if found is None else f" of {self._named(found)}"
        return WorldError(f"{head}{where} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _named(self, environment: int) -> str:
        action = "" if self._actions is None else f", after action {self._actions[environment]},"
        return f"environment {environment}{action}"


def _way_on(gone: Gone) -> str:
    cause = f" ({_KILLED})" if "killed" in gone.how and not gone.raised else ""
    if gone.allowed is None:
        return cause
    if gone.allowed == 0:
        return f"{cause}; --world.on-death restart makes such an environment anew"
    return f"{cause}; {gone.allowed} were made anew before it, as many as world.death_limit allows"
