"""The Gymnasium world: spaces, vector environments, networks, collecting, evaluating."""

from bridle.control.actor_critic import ActorCritic
from bridle.control.collect import Collector, Episode, Rollout, Stop
from bridle.control.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    SquashedGaussian,
)
from bridle.control.environments import World
from bridle.control.evaluate import EvaluationSettings, Score, evaluate
from bridle.control.heads import BernoulliHead, CategoricalHead, GaussianHead, MultiCategoricalHead
from bridle.control.images import NatureCNN
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.policy import Acted, ControlPolicy, Sequences, Transitions
from bridle.control.prepare import prepare
from bridle.control.recurrent import RecurrentActorCritic
from bridle.control.saved import Agent, Session, load_policy, save_policy
from bridle.control.spaces import ActionSpec, ObservationSpec

__all__ = [
    "Acted",
    "ActionSpec",
    "ActorCritic",
    "Agent",
    "Bernoulli",
    "BernoulliHead",
    "Categorical",
    "CategoricalHead",
    "Collector",
    "ControlPolicy",
    "DiagonalGaussian",
    "Distribution",
    "Episode",
    "EvaluationSettings",
    "GaussianHead",
    "MultiCategorical",
    "MultiCategoricalHead",
    "NatureCNN",
    "NetworkSettings",
    "ObservationSpec",
    "Observations",
    "RecurrentActorCritic",
    "Rollout",
    "Score",
    "Sequences",
    "Session",
    "SquashedGaussian",
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
