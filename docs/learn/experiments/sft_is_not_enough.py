"""Why supervised fine-tuning is not enough: cross-entropy against a judgement of the whole text, in the kitchen.

    python docs/learn/experiments/sft_is_not_enough.py [--check]

Runs the quickstart's first stages (a small transformer, SFT, a reward model; two minutes on one thread), then lets SFT's
cross-entropy, the reward model and the world's gold score judge right answers in two wordings, and right answers with one
small change that ruins them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from learn_page import BLUE, GREEN, ORANGE, Experiment, Value, panels, run
from torch import Tensor

from bridle.core.losses import sft_loss
from bridle.jobs import quickstart
from bridle.jobs.session import RunSettings
from bridle.language.causal import CausalModel
from bridle.language.data import Encoder, collate
from bridle.language.models import ModelSettings, load_causal_lm, load_reward_model, stop_ids
from bridle.language.reward_model import score_sequences
from bridle.quickstart.gold import gold_score
from bridle.quickstart.kitchen import answer_for, orders, read_order
from bridle.quickstart.rows import prompts
from bridle.quickstart.words import ACT_OF_VERB, VERBS, Act
from bridle.random import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPTS = 240
RUINED = 0.5
"""A ruined answer has at most this gold score; a right one has 1."""
AT_ONCE = 512
OTHER_WAY = {Act.WASH: Act.PEEL, Act.PEEL: Act.WASH}


def small_changes(answer: str) -> list[str]:
    """Return every answer with one slip of the kind that people make, and that the demonstrations hold.

    A "do not" before one verb, "peel" for "wash" or the other way round, or one sentence left out.
    """
    words = answer.split()
    changed = []
    for i, word in enumerate(words):
        if word in ACT_OF_VERB:
            changed.append([*words[:i], "do", "not", *words[i:]])
            if ACT_OF_VERB[word] in OTHER_WAY:
                changed += [[*words[:i], verb, *words[i + 1 :]] for verb in VERBS[OTHER_WAY[ACT_OF_VERB[word]]]]
    ends = [0, *(i + 1 for i, word in enumerate(words) if word == ".")]
    changed += [words[:start] + words[end:] for start, end in pairwise(ends)]
    return [" ".join(version) for version in changed]


def ruined_versions(prompt: str, answer: str) -> list[str]:
    """Return the small changes that ruin a right answer."""
    return [changed for changed in small_changes(answer) if gold_score(prompt, changed) <= RUINED]


class Judges:
    """The SFT model's cross-entropy and the reward model's score of whole answers."""

    def __init__(self, folder: Path) -> None:
        network, tokenizer = load_causal_lm(ModelSettings(path=str(folder / "sft" / "policy")))
        self.model = CausalModel(network)
        self.encoder = Encoder.of(tokenizer, stop_ids(network, tokenizer))
        self.reward, _ = load_reward_model(ModelSettings(path=str(folder / "reward" / "reward")))

    @torch.no_grad()
    def __call__(self, prompt: str, answers: Sequence[str]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return Σ −log π over each answer's tokens and its end, nats, and the reward model's scores."""
        items = [self.encoder.answer(prompt, answer) for answer in answers]
        losses = torch.zeros(len(items))
        for start in range(0, len(items), AT_ONCE):
            tokens = collate(items[start : start + AT_ONCE], 0)
            states = self.model(tokens.input_ids, tokens.rows, tokens.columns)
            logp, _ = self.model.logprobs(states.features, tokens.targets, with_entropy=False)
            losses.index_add_(0, tokens.rows + start, sft_loss(logp))
        return losses, score_sequences(self.reward, [item.ids for item in items])


def judged(folder: Path, count: int) -> dict[str, Value]:
    """Let the models in ``folder`` judge ``count`` held-out prompts."""
    judges = Judges(folder)
    _, unknown = orders(0, PROMPTS)
    found: dict[str, list[float]] = {
        name: []
        for name in (
            "wording",
            "ruined",
            "nearest",
            "ruined_gold",
            "likelier",
            "loss_prefers",
            "reward_prefers",
            "versions",
        )
    }
    example: dict[str, Value] = {}
    for i, row in enumerate(prompts(unknown, count, seed=0, stream="held_out")):
        prompt, rng = row["prompt"], generator(0, "learn.sft", 0, i)
        first, other = (answer_for(read_order(prompt), rng) for _ in range(2))
        versions = ruined_versions(prompt, first)
        losses, scores = judges(prompt, [first, other, *versions])
        drawn, distance = 2 + int(rng.integers(len(versions))), (losses[2:] - losses[0]).abs()
        nearest = 2 + int(distance.argmin())
        found["wording"].append(float(losses[1] - losses[0]))
        found["ruined"].append(float(losses[drawn] - losses[0]))
        found["nearest"].append(float(losses[nearest] - losses[0]))
        found["ruined_gold"].append(gold_score(prompt, versions[drawn - 2]))
        found["loss_prefers"].append(float((losses[1] < losses[2:]).float().mean()))
        found["reward_prefers"].append(float((scores[1] > scores[2:]).float().mean()))
        found["versions"].append(float(len(versions)))
        found["likelier"].append(float((losses[2:] < losses[1]).any()))
        if i == 0:
            shown = {"right": 0, "right, other words": 1, "ruined": nearest}
            texts = {"right": first, "right, other words": other, "ruined": versions[nearest - 2]}
            example = {"prompt": prompt} | {
                name: {
                    "answer": texts[name],
                    "cross_entropy": float(losses[at]),
                    "reward": float(scores[at]),
                    "gold": gold_score(prompt, texts[name]),
                }
                for name, at in shown.items()
            }
    return {name: [round(x, 4) for x in values] for name, values in found.items()} | {
        "summary": summary(found),
        "example": example,
    }


def summary(found: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the medians of |differences of cross-entropy|, in nats, and the means of the rest."""
    sizes = {name: statistics.median(abs(x) for x in found[name]) for name in ("wording", "nearest", "ruined")}
    rest = ("versions", "ruined_gold", "likelier", "loss_prefers", "reward_prefers")
    return sizes | {name: statistics.mean(found[name]) for name in rest}


def measure(folder: Path | None = None, count: int = PROMPTS) -> dict[str, Value]:
    """Train the models unless ``folder`` holds them, and judge."""
    if folder is not None:
        return judged(folder, count)
    with tempfile.TemporaryDirectory() as place:
        settings = RunSettings(dir=Path(place) / "run", threads=1, quiet=True)
        scale = quickstart.ScaleSettings(ppo_steps=2)
        return judged(quickstart.run(quickstart.QuickstartConfig(run=settings, scale=scale)), count)


def draw(figures: Mapping[str, Value]) -> Figure:
    """Left, differences of cross-entropy; right, who prefers right answers to ruined ones."""
    figure, (left, right) = panels(2)
    edges = torch.linspace(-12, 12, 41).tolist()
    kinds = (
        ("wording", "another right wording", BLUE, "-"),
        ("ruined", "ruined, one drawn change", ORANGE, "--"),
        ("nearest", "ruined, nearest change", GREEN, "-."),
    )
    for name, label, colour, style in kinds:
        left.hist(
            torch.tensor(figures[name]).clamp(-12, 12).tolist(), edges, histtype="step", color=colour, linestyle=style,
            linewidth=1.5, label=label,
        )  # fmt: skip
    left.set(xlabel="difference to a right answer (nats, whole answer)", ylabel=f"of {len(figures['wording'])} prompts")
    left.set_title("what cross-entropy sees")
    left.set_ylim(0, left.get_ylim()[1] * 1.3)
    left.legend(fontsize=7.5, frameon=False, loc="upper left")
    shares = {
        "cross-\nentropy": figures["summary"]["loss_prefers"],
        "reward\nmodel": figures["summary"]["reward_prefers"],
        "gold\nscore": 1.0,
    }
    for i, ((name, share), colour) in enumerate(zip(shares.items(), (ORANGE, BLUE, GREEN), strict=True)):
        right.bar(i, 100 * share, 0.6, color=colour, label=name)
        right.text(i, 100 * share, f"{100 * share:.0f} %", ha="center", va="bottom", fontsize=8)
    right.set_xticks(range(3), list(shares))
    right.set(ylabel="% of pairs", ylim=(0, 110), title="prefers the right answer to one ruined")
    right.grid(axis="x", visible=False)
    return figure


def _table(example: Mapping[str, Value]) -> str:
    rows = [
        f"| {name} | {of['answer']} | {of['cross_entropy']:.2f} | {of['reward']:.2f} | {of['gold']:.2f} |"
        for name, of in example.items()
        if name != "prompt"
    ]
    head = ("| | answer | cross-entropy, nats | reward model | gold score |", "| --- | --- | --- | --- | --- |")
    return "\n".join([*head, *rows])


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    found = figures["summary"]
    return (
        f"Over {len(figures['wording'])} held-out prompts, two right wordings of one answer (gold score 1 and 1) differ "
        f"by {found['wording']:.1f} nats in the median. Of the {found['versions']:.0f} small changes that ruin an answer "
        f"the nearest one differs by {found['nearest']:.1f} nats, and one drawn at random by {found['ruined']:.1f}; its "
        f"gold score is {found['ruined_gold']:.2f} on average. For {100 * found['likelier']:.0f} % of the prompts there is "
        "a ruined answer that the model finds likelier than the other right wording. Asked which is better, a right "
        f"answer or the other one ruined, cross-entropy is right in {100 * found['loss_prefers']:.0f} % of the pairs, the "
        f"reward model, which has learnt from rankings of whole answers, in {100 * found['reward_prefers']:.0f} %, and the "
        "gold score always.\n\n"
        f'The first held-out order as an example, "{figures["example"]["prompt"]}"; the ruined answer is the one nearest '
        f"to the right one in cross-entropy:\n\n{_table(figures['example'])}"
    )


EXPERIMENT = Experiment(
    name="sft_is_not_enough", measure=measure, draw=draw, seen=seen, tolerance=0.25, compared="summary"
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
