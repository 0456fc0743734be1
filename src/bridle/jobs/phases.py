"""The trainings of a reward run, laid out one after the other: one for each fold, and the final one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridle.errors import ConfigError, DataError
from bridle.language.reward_evaluation import folds, held_out
from bridle.language.reward_model import steps_per_epoch

if TYPE_CHECKING:
    from bridle.jobs.reward import RewardConfig

__all__ = ["Phase", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One training from the start: a fold's, or the final one."""

    name: str
    """What the metrics call it."""
    training: tuple[int, ...]
    """Positions of the comparisons that it learns from."""
    held_out: tuple[int, ...]
    """Positions of those that it is tried on."""
    first: int
    """[step] the run's step of its first optimiser step, from 1."""
    steps: int
    """How many optimiser steps it takes."""

    @property
    def last(self) -> int:
        """[step] the run's step of its last optimiser step."""
        return self.first + self.steps - 1


def plan(config: RewardConfig, groups: Sequence[int], apart: Sequence[int]) -> list[Phase]:
    """Lay the trainings out one after the other: each fold's, then the final model's.

    ``groups`` numbers the prompts of the data's comparisons; ``apart`` are the positions of those of a file of their own.
    """
    everything = list(range(len(groups)))
    seed, evaluation = config.run.seed, config.evaluation
    if evaluation.folds is not None and evaluation.folds > len(set(groups)):
        expected = f"at most the {len(set(groups))} prompts of {config.data.path}"
        raise ConfigError.of("evaluation.folds", evaluation.folds, expected)
    if evaluation.folds is not None:
        named = [(f"fold-{k}", *cut) for k, cut in enumerate(folds(groups, evaluation.folds, seed=seed))]
        named.append(("final", everything, []))
    elif apart:
        named = [("final", everything, list(apart))]
    else:
        named = [("final", *held_out(groups, evaluation.share, seed=seed))]
    phases: list[Phase] = []
    for name, training, away in named:
        untried = name == "final" and evaluation.folds is not None
        if not training or (len(away) < 2 and not untried):
            raise DataError(
                f"{config.data.path}: too few prompts ({len(set(groups))}) to train on some and hold others out; "
                + ("lower evaluation.folds" if evaluation.folds else "raise evaluation.share or set evaluation.path")
                + ", or give more"
            )
        phases.append(
            Phase(
                name=name,
                training=tuple(training),
                held_out=tuple(away),
                first=phases[-1].last + 1 if phases else 1,
                steps=config.epochs * steps_per_epoch(len(training), config.batch_size),
            )
        )
    return phases
