"""The Gymnasium world: spaces, vector environments, networks, collecting, evaluating."""

from bridle.control.collect import Collector, Episode, Rollout, Stop
from bridle.control.distributions import Categorical, DiagonalGaussian, Distribution
from bridle.control.environments import World
from bridle.control.evaluate import EvaluationSettings, Score, evaluate
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import (
    ActorCritic,
    CategoricalHead,
    ControlPolicy,
    GaussianHead,
    NetworkSettings,
    Transitions,
    build_policy,
)
from bridle.control.prepare import prepare
from bridle.control.saved import Agent, load_policy, save_policy
from bridle.control.spaces import ActionSpec, ObservationSpec

__all__ = [
    "ActionSpec",
    "ActorCritic",
    "Agent",
    "Categorical",
    "CategoricalHead",
    "Collector",
    "ControlPolicy",
    "DiagonalGaussian",
    "Distribution",
    "Episode",
    "EvaluationSettings",
    "GaussianHead",
    "NetworkSettings",
    "ObservationSpec",
    "Rollout",
    "Score",
    "Stop",
    "Transitions",
    "World",
    "WorldSettings",
    "build_policy",
    "evaluate",
    "load_policy",
    "make_world",
    "prepare",
    "save_policy",
]
