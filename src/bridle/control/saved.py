"""A finished policy as a folder: weights in safetensors, everything else in JSON; it acts on raw observations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bridle.control.masks import allowed
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.policy import ControlPolicy
from bridle.control.scaling import normalise
from bridle.control.spaces import (
    ActionSpec,
    DiscreteActions,
    ObservationSpec,
    action_spec,
    action_spec_from_json,
    observation_spec,
    observation_spec_from_json,
    spec_to_json,
)
from bridle.core.moments import Moments
from bridle.errors import ModelError

__all__ = ["Agent", "Session", "load_policy", "save_policy"]

FORMAT = 2
"""Version of the folder's layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A policy with all it needs to act on what an environment shows."""

    policy: ControlPolicy
    """Actor and critic."""
    observations: ObservationSpec
    """What it was trained to see."""
    actions: ActionSpec
    """What it was trained to do."""
    moments: Moments | None
    """Observation statistics, frozen; None if observations are not normalised."""

    def act(self, observation: Any, *, mask: Any = None, draws: np.random.Generator | None = None) -> Any:
        """Choose an action for one raw observation: the most likely one, or one drawn with ``draws``.

        Args:
            observation: as the environment shows it.
            mask: the allowed actions, as the environment's ``info["action_mask"]`` tells them; None allows all.
            draws: makes the choice random.

        Raises:
            ModelError: the observation is not of the shape that the policy was trained on, or the policy has a memory.
            WorldError: the mask does not fit the actions, or allows nothing.
        """
        if self.policy.initial_state(1) is not None:
            raise ModelError("this policy has a memory; use session = agent.session() and session.act(observation)")
        return self._act(observation, mask, None, draws)[0]

    def session(self, *, draws: np.random.Generator | None = None) -> Session:
        """Begin to act in one environment, with what memory the policy has; with ``draws`` actions are drawn."""
        return Session(self, draws)

    @torch.no_grad()
    def _act(
        self, observation: Any, mask: Any, state: torch.Tensor | None, draws: np.random.Generator | None
    ) -> tuple[Any, torch.Tensor | None]:
        with np.errstate(over="ignore"):  # beyond float32's range is infinite, and refused here
            seen = self.observations.encode_each([observation])
        if not bool(seen.vector.isfinite().all()):
            raise ModelError("the observation is not finite in float32; no policy was trained on such a one")
        if mask is not None:
            seen = seen.with_mask(allowed(np.asarray(mask)[None], self.actions, "the environment"))
        device = next(self.policy.parameters()).device
        acted = self.policy.act(normalise(seen, self.moments).to(device), state, draws)
        chosen: NDArray[Any] = self.actions.to_world(self.policy.play(acted.actions.cpu().numpy()))[0]
        return int(chosen) if isinstance(self.actions, DiscreteActions) else chosen, acted.state


class Session:
    """An agent in one environment: it remembers the episode, if its policy does."""

    def __init__(self, agent: Agent, draws: np.random.Generator | None) -> None:
        """Begin an episode."""
        self._agent = agent
        self._draws = draws
        self.reset()

    def reset(self) -> None:
        """Begin another episode: what was remembered is forgotten."""
        self._state = self._agent.policy.initial_state(1)

    def act(self, observation: Any, *, mask: Any = None) -> Any:
        """Choose an action for the episode's next raw observation.

        Raises:
            ModelError: the observation is not of the shape that the policy was trained on.
            WorldError: the mask does not fit the actions, or allows nothing.
        """
        action, self._state = self._agent._act(observation, mask, self._state, self._draws)
        return action


def save_policy(folder: Path, agent: Agent, settings: NetworkSettings, *, env: str) -> None:
    """Write ``policy.safetensors`` and ``policy.json`` into an existing folder; ``env`` says where it was trained."""
    weights = agent.policy.state_dict()
    tensors = {f"policy/{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    if agent.moments is not None:
        tensors |= {f"moments/{f.name}": getattr(agent.moments, f.name).contiguous() for f in fields(Moments) if f.init}
    save_file(tensors, folder / "policy.safetensors")
    head = {
        "format": FORMAT,
        "env": env,
        "observations": spec_to_json(agent.observations),
        "actions": spec_to_json(agent.actions),
        "network": asdict(settings),
    }
    (folder / "policy.json").write_text(json.dumps(head, indent=2, allow_nan=False) + "\n")


def load_policy(
    path: Path | str,
    *,
    build: Callable[[ObservationSpec, ActionSpec], ControlPolicy] | None = None,
    observation_space: gymnasium.Space[Any] | None = None,
    action_space: gymnasium.Space[Any] | None = None,
) -> Agent:
    """Open what :func:`save_policy` wrote, such as RUN/policy.

    Args:
        path: the folder.
        build: the function that built the policy, where it was the user's own; a file never names code to be run.
        observation_space: of the environment to act in; None skips the check.
        action_space: of the environment to act in; None skips the check.

    Raises:
        ModelError: the folder is missing or damaged, or the policy was trained for other spaces.
    """
    path = Path(path)
    head = _read_head(path / "policy.json")
    observations = observation_spec_from_json(_part(head, "observations"))
    actions = action_spec_from_json(_part(head, "actions"))
    if observation_space is not None:
        _same_spaces(path, observations, observation_spec(observation_space, "this environment"))
    if action_space is not None:
        _same_spaces(path, actions, action_spec(action_space, "this environment"))
    settings = _network(_part(head, "network"))
    if settings.factory is not None and build is None:
        raise ModelError(f"{path} holds a policy built by {settings.factory}; pass that function as build=")
    tensors = _read_tensors(path / "policy.safetensors")
    if build is None:
        _check_widths(path, tensors, (observations.width, actions.width, *settings.hidden, settings.recurrent_width))
    policy = build(observations, actions) if build else build_policy(observations, actions, settings, seed=0)
    weights = {name.removeprefix("policy/"): value for name, value in tensors.items() if name.startswith("policy/")}
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ModelError(
            f"{path}: the weights do not fit the network that policy.json describes ({text[:200]})"
        ) from error
    policy.eval()
    return Agent(
        policy=policy,
        observations=observations,
        actions=actions,
        moments=_moments(tensors, observations.width),
    )


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; give the folder of a saved policy, such as RUN/policy") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ModelError(f"{path} is not a policy of format {FORMAT}; use the bridle that wrote it")
    return head


def _part(head: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = head.get(name)
    if not isinstance(part, dict):
        raise ModelError(f"the saved policy's description lacks {name!r}; it is damaged")
    return part


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; the saved policy is not whole") from None
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error})") from error


def _check_widths(path: Path, tensors: Mapping[str, torch.Tensor], widths: tuple[int, ...]) -> None:
    """Refuse a description of what its weights are far too few for, before memory is asked for it."""
    held = max((tensor.numel() for tensor in tensors.values()), default=0)
    if max(widths) > max(held, NetworkSettings().recurrent_width):
        raise ModelError(
            f"{path}: policy.json describes a width of {max(widths)}, and no weight is that large; it is damaged"
        )


_KINDS: dict[str, tuple[type, ...]] = {
    "activation": (str,),
    "shared_trunk": (bool, NoneType),
    "std": (str,),
    "initial_log_std": (int, float),
    "squash": (bool,),
    "recurrent": (str, NoneType),
    "recurrent_width": (int,),
    "factory": (str, NoneType),
}
"""What each of a network's settings is in policy.json; ``hidden`` is read number by number."""


def _network(data: Mapping[str, Any]) -> NetworkSettings:
    for name, kinds in _KINDS.items():
        if name in data and not isinstance(data[name], kinds):
            raise ModelError(f"the saved policy's network has {name} {str(data[name])[:50]!r}; it is damaged")
    try:
        settings = NetworkSettings(**{**data, "hidden": tuple(int(width) for width in data["hidden"])})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"the saved policy's network is not one that this bridle knows: {error}") from error
    return settings


def _moments(tensors: Mapping[str, torch.Tensor], width: int) -> Moments | None:
    own = {name.removeprefix("moments/"): value for name, value in tensors.items() if name.startswith("moments/")}
    if not own:
        return None
    if own.keys() != {f.name for f in fields(Moments) if f.init} or own["mean"].shape != (width,):
        raise ModelError("the saved policy's observation statistics do not fit its observations; it is damaged")
    return Moments(**own)


def _same_spaces(path: Path, trained: ObservationSpec | ActionSpec, here: ObservationSpec | ActionSpec) -> None:
    if trained != here:
        raise ModelError(f"{path} was trained for {trained}, this environment has {here}; use it where it was trained")
