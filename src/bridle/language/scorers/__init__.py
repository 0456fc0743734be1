"""Scorers: what judges whole answers, be it a reward model, a Python function, or a sum of several."""

from bridle.language.scorers.answers import JSON, Answers, Scorer, Scores, WeightedSum
from bridle.language.scorers.asking import JudgingSettings, Mishap
from bridle.language.scorers.functions import FunctionScorer, GroupScorer
from bridle.language.scorers.models import RewardModelScorer, RewardSettings, build_scorer, gold_scorers, require_room

__all__ = [
    "JSON",
    "Answers",
    "FunctionScorer",
    "GroupScorer",
    "JudgingSettings",
    "Mishap",
    "RewardModelScorer",
    "RewardSettings",
    "Scorer",
    "Scores",
    "WeightedSum",
    "build_scorer",
    "gold_scorers",
    "require_room",
]
