"""What a quickstart ends with: SFT against PPO on the same held-out prompts, in a table, a sentence and some answers."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bridle.quickstart.verdict import Difference, Verdict, paired_difference

__all__ = ["Answered", "Outcome", "show"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A policy's answers to the held-out prompts, in their order, and what was measured on them."""

    prompts: tuple[str, ...]
    """[n] what was asked."""
    answers: tuple[str, ...]
    """[n] what was answered."""
    rewards: tuple[float, ...]
    """[n] the reward model's scores."""
    gold: tuple[float, ...]
    """[n] gold scores, in [0, 1]."""
    kl: tuple[float, ...]
    """[n] exact KL to the SFT model, nats per answer."""
    lengths: tuple[int, ...]
    """[n] tokens, the stop token included."""
    entropy: float
    """Mean entropy of the policy, nats per token."""
    eos_share: float
    """Share of the answers that ended by themselves, in [0, 1]."""

    @property
    def measures(self) -> dict[str, tuple[float, ...]]:
        """What was measured on each answer, by name."""
        perfect = tuple(float(gold == 1) for gold in self.gold)
        return {
            "gold": self.gold,
            "perfect": perfect,
            "reward": self.rewards,
            "kl": self.kl,
            "length": tuple(float(length) for length in self.lengths),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """SFT and PPO side by side."""

    sft: Answered
    """Before PPO."""
    ppo: Answered
    """After it."""
    seed: int
    """Keys the bootstrap."""

    def __post_init__(self) -> None:
        """Refuse answers to different prompts: they cannot be paired."""
        if self.sft.prompts != self.ppo.prompts:
            raise ValueError("SFT and PPO answered different prompts; expected the same ones in the same order")

    def difference(self, measure: str) -> Difference:
        """PPO − SFT of one of :attr:`Answered.measures`, paired by prompt."""
        return paired_difference(self.sft.measures[measure], self.ppo.measures[measure], seed=self.seed)

    def sentence(self) -> str:
        """Say what the gold score shows, whichever way it went."""
        found = self.difference("gold")
        said = {
            Verdict.BETTER: "PPO is better than SFT",
            Verdict.NO_DIFFERENCE: "No difference between PPO and SFT is shown",
            Verdict.WORSE: "PPO is worse than SFT",
        }[found.verdict]
        numbers = f"{found.mean:+z.3f} [{found.low:+z.3f}, {found.high:+z.3f}]"
        return f"{said} by the gold score: {numbers} (paired, 95 %, {found.count} held-out prompts)."

    def summary(self) -> dict[str, str | dict[str, float]]:
        """The same as plain values, for a file."""
        result: dict[str, str | dict[str, float]] = {
            "verdict": self.difference("gold").verdict.value,
            "sentence": self.sentence(),
        }
        for name, before in self.sft.measures.items():
            found = self.difference(name)
            result[name] = {
                "sft": _mean(before),
                "ppo": _mean(self.ppo.measures[name]),
                "difference": found.mean,
                "low": found.low,
                "high": found.high,
            }
        result["entropy"] = {"sft": self.sft.entropy, "ppo": self.ppo.entropy}
        result["eos_share"] = {"sft": self.sft.eos_share, "ppo": self.ppo.eos_share}
        return result


def show(console: Console, outcome: Outcome, *, examples: int = 3) -> None:
    """Print the table, the sentence and the first ``examples`` prompts with the answers before and after."""
    console.print(Group(_table(outcome), Text(outcome.sentence(), style="bold"), Text()))
    for i in range(min(examples, len(outcome.sft.prompts))):
        lines = Text(f"» {outcome.sft.prompts[i]}\n", style="bold")
        for name, side in (("SFT", outcome.sft), ("PPO", outcome.ppo)):
            scores = f"gold {side.gold[i]:.2f}, reward {side.rewards[i]:+.2f}"
            lines.append(f"  {name}  {side.answers[i]}", style="not bold").append(
                f"  ({scores})\n", style="not bold dim"
            )
        console.print(lines)


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _table(outcome: Outcome) -> Table:
    table = Table(title=f"SFT against PPO on {len(outcome.sft.prompts)} held-out prompts", title_justify="left")
    for name in ("", "SFT", "PPO", "PPO − SFT [95 %]"):
        table.add_column(name, justify="left" if name == "" else "right")
    names = {
        "gold": "gold score of the world, 0 to 1",
        "perfect": "answers without any fault",
        "reward": "reward model's score",
        "kl": "KL to SFT, nats per answer",
        "length": "length, tokens",
    }
    for measure, name in names.items():
        before, after = _mean(outcome.sft.measures[measure]), _mean(outcome.ppo.measures[measure])
        found = outcome.difference(measure)
        interval = f"{found.mean:+z.3f} [{found.low:+z.3f}, {found.high:+z.3f}]"
        table.add_row(name, f"{before:z.3f}", f"{after:z.3f}", interval)
    table.add_row("entropy, nats per token", f"{outcome.sft.entropy:.3f}", f"{outcome.ppo.entropy:.3f}", "")
    table.add_row("ended by itself", f"{outcome.sft.eos_share:.3f}", f"{outcome.ppo.eos_share:.3f}", "")
    return table
