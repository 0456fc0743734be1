"""Scorers: what judges whole answers, be it a reward model, a Python function, or a sum of several."""

from bridle.language.scorers.answers import JSON, Answers, Scorer, Scores, WeightedSum
from bridle.language.scorers.asking import JudgingSettings, Mishap
from bridle.language.scorers.functions import FunctionScorer, GroupScorer
from bridle.language.scorers.models import (
    Functions,
    RewardModelScorer,
    RewardSettings,
    build_scorer,
    check_judge,
    open_functions,
)

__all__ = [
    "JSON",
    "Answers",
    "FunctionScorer",
    "Functions",
    "GroupScorer",
    "JudgingSettings",
    "Mishap",
    "RewardModelScorer",
    "RewardSettings",
    "Scorer",
    "Scores",
    "WeightedSum",
    "build_scorer",
    "check_judge",
    "open_functions",
]
