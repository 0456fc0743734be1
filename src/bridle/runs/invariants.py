"""What must hold in every healthy run: each invariant has a name, a bound and a plain text of likely causes.

A :class:`Watch` reads the records that go to ``metrics.jsonl`` and nothing else, so watching changes no number of a run,
and a resumed run's watch is what the uninterrupted one's would be once it has read the records that are kept. It says
so once when an invariant is crossed and once when it holds again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Literal

__all__ = ["INVARIANTS", "Crossing", "Invariant", "Watch", "table"]

Job = Literal["ppo", "control", "sft", "reward"]

_KEPT = 50
"""Records of each number that are remembered."""
_CALM = 3
"""Records in a row within the bound after which an invariant holds again, so that a number at its bound is not told of
at every step."""


class Past:
    """The last records of the numbers that are watched, and the first ones of some."""

    def __init__(self, job: str, dtype: str, warmup: int) -> None:
        """Remember a run of ``job``, computed in ``dtype``, whose critic learns alone for ``warmup`` steps."""
        self.control = job == "control"
        self.half = dtype != "float32"
        self.warmup = warmup
        self.step = 0
        self.now: Mapping[str, float] = {}
        self._last: dict[str, deque[float]] = {}
        self._first: dict[str, list[float]] = {}

    def take(self, step: int, numbers: Mapping[str, float]) -> None:
        """Remember one record."""
        self.step, self.now = step, numbers
        for name, value in numbers.items():
            if name not in self._last:
                self._last[name], self._first[name] = deque(maxlen=_KEPT), []
            self._last[name].append(value)
            if len(self._first[name]) < 3:
                self._first[name].append(value)

    def last(self, name: str, count: int) -> list[float] | None:
        """Return the last ``count`` values, this record's included; None where there are fewer or it holds none."""
        if name not in self.now or len(self._last[name]) < count:
            return None
        return list(self._last[name])[-count:]

    def before(self, name: str) -> list[float]:
        """Return up to 49 values before this record's, oldest first."""
        return list(self._last[name])[:-1]

    def first(self, name: str) -> list[float]:
        """Return the first three values at most."""
        return self._first[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariant:
    """One thing that holds in a healthy run."""

    name: str
    """What events call it."""
    jobs: tuple[Job, ...]
    """Where it is watched."""
    reads: tuple[str, ...]
    """The metrics that it looks at; ``grad_norm`` stands for ``grad_norm/GROUP`` too."""
    bound: str
    """When it is crossed, in words."""
    causes: str
    """What is likely to be the matter."""
    measure: Callable[[Past], float | None]
    """How far beyond the bound the run is: crossed above 1; None where this record says nothing of it."""
    shown: Callable[[Past], float]
    """The number that the message shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """An invariant that was crossed, or that holds again."""

    invariant: Invariant
    """Which."""
    step: int
    """[steps] at which record."""
    crossed: bool
    """False if it holds again."""
    value: float
    """The number that was looked at."""

    @property
    def text(self) -> str:
        """One line."""
        i = self.invariant
        if not self.crossed:
            return f"step {self.step}: {i.name} is within its bound again ({self.value:.3g})"
        return f"step {self.step}: {i.name} is out of bounds at {self.value:.3g} ({i.bound}); likely causes: {i.causes}"


class Watch:
    """Follows one run's records."""

    def __init__(self, job: str, *, dtype: str = "float32", warmup: int = 0) -> None:
        """Watch a run of ``job``, computed in ``dtype``, whose critic learns alone for ``warmup`` steps."""
        self._watched = [invariant for invariant in INVARIANTS if job in invariant.jobs]
        self._names = {name for invariant in self._watched for name in invariant.reads}
        self._past = Past(job, dtype, warmup)
        self._crossed: set[str] = set()
        self._calm: dict[str, int] = {}

    def leave_out(self, name: str) -> None:
        """Stop watching one invariant, which makes no sense in this run."""
        self._watched = [invariant for invariant in self._watched if invariant.name != name]

    def see(self, step: int, record: Mapping[str, object]) -> list[Crossing]:
        """Take in one record and return what it crossed, or brought back."""
        numbers = {
            name: float(value)
            for name, value in record.items()
            if isinstance(value, (int, float)) and self._reads(name) and not math.isnan(value)
        }
        if not numbers:
            return []
        self._past.take(step, numbers)
        return [crossing for invariant in self._watched if (crossing := self._look(invariant)) is not None]

    def _reads(self, name: str) -> bool:
        return name in self._names or name.startswith(("grad_norm/", "evaluation/score"))

    def _look(self, invariant: Invariant) -> Crossing | None:
        extent = invariant.measure(self._past)
        if extent is None:
            return None
        name, beyond = invariant.name, extent > 1
        self._calm[name] = 0 if beyond else self._calm.get(name, 0) + 1
        if beyond and name not in self._crossed:
            self._crossed.add(name)
        elif name in self._crossed and self._calm[name] == _CALM:
            self._crossed.remove(name)
        else:
            return None
        value = invariant.shown(self._past)
        return Crossing(invariant=invariant, step=self._past.step, crossed=beyond, value=value)


# What is measured. Each returns value / bound, so that > 1 is crossed.


def _over(value: float | None, bound: float) -> float | None:
    return None if value is None else value / bound


def _mean(past: Past, name: str, count: int) -> float | None:
    values = past.last(name, count)
    return None if values is None else fmean(values)


def _gap(past: Past, name: str, single: float, half: float) -> float | None:
    return _over(past.now.get(name), half if past.half else single)


def _eos_rate(past: Past) -> float | None:
    ends, lengths = past.last("eos_share", 3), past.last("length", 3)
    if ends is None or lengths is None:
        return None
    return sum(ends) / max(sum(lengths), 1e-9)


def _cut_share(past: Past) -> float | None:
    ends = past.last("eos_share", 3)
    return None if ends is None else 1 - fmean(ends)


def _kl_sign(past: Past) -> float | None:
    """Say how far below 0: the exact KL by more than rounding, or the sampled one's mean over five records."""
    exact, sampled = past.now.get("exact_kl"), _mean(past, "sampled_kl", 5)
    found = [-exact / 1e-3] if exact is not None else []
    found += [-sampled / 0.25] if sampled is not None else []
    return max(found) if found else None


def _kl_shown(past: Past) -> float:
    exact, sampled = past.now.get("exact_kl", 0.0), _mean(past, "sampled_kl", 5)
    return exact if sampled is None or -exact / 1e-3 > 1 else sampled


def _typical_explained(past: Past) -> float | None:
    values = past.last("explained_variance", 10)
    return None if values is None else median(values)


def _dead_critic(past: Past) -> float | None:
    explained, norms = past.last("explained_variance", 3), past.last("grad_norm/critic", 3)
    if explained is None and norms is None:
        return None
    constant = explained is not None and max(abs(value) for value in explained) < 1e-4
    unmoved = norms is not None and max(norms) == 0
    return 2.0 if constant or unmoved else 0.0


def _entropy_share(past: Past, name: str) -> float | None:
    """Entropy now (mean of three records) over what it was at the beginning."""
    values = past.last(name, 3)
    if values is None or fmean(past.first(name)) <= 0:
        return None
    return fmean(values) / fmean(past.first(name))


def _collapsed(past: Past) -> float | None:
    if past.control:
        now = _mean(past, "entropy", 3)
        return None if now is None else 0.005 / max(now, 1e-12)
    share = _entropy_share(past, "policy_entropy")
    return None if share is None else 0.05 / max(share, 1e-12)


def _entropy_now(past: Past) -> float:
    return past.now.get("policy_entropy", past.now.get("entropy", math.nan))


def _norms(past: Past) -> Iterator[str]:
    """Name the groups whose gradient counts: not the actor's while the critic learns alone."""
    for name in past.now:
        if name.startswith("grad_norm") and not (name == "grad_norm/actor" and past.step <= past.warmup):
            yield name


def _jump(past: Past) -> float | None:
    """Return the gradient's norm over the median of those before it, at least ten; the largest of all groups."""
    jumps = []
    for name in _norms(past):
        before = [norm for norm in past.before(name) if norm > 0]
        if len(before) >= 10:
            jumps.append(past.now[name] / median(before))
    return max(jumps) if jumps else None


def _spike(past: Past) -> float | None:
    # an agent's critic meets its first terminal states with a hundred times the usual error
    return _over(_jump(past), 1000.0 if past.control else 30.0)


def _no_gradient(past: Past) -> float | None:
    own = [past.last(name, 3) for name in _norms(past) if name != "grad_norm/critic" and past.step > past.warmup + 2]
    values = [norms for norms in own if norms is not None]
    if not values:
        return None
    return 2.0 if any(max(norms) == 0 for norms in values) else 0.0


def _reward_length(past: Past) -> float | None:
    mean = _mean(past, "score_length_correlation", 5)
    return None if mean is None else abs(mean)


def _apart(past: Past) -> float | None:
    """Say how clearly, over the evaluations so far, the judges' score rose while a gold score fell.

    Both differences, from where gold stood highest to now, are divided by their 95 % half-widths as of independent means;
    the smaller one counts, so that above 1 both are clear.
    """
    found = []
    for name in past.now:
        gold = name.startswith("evaluation/score/gold/") and not name.endswith("_ci95")
        golds = past.last(name, 2) if gold else None
        if golds is None or f"{name}_ci95" not in past.now or "evaluation/score_ci95" not in past.now:
            continue
        highs = past.before(name)
        top = highs.index(max(highs))
        found.append(
            min(
                _clear(past, "evaluation/score", top, 1.0),
                _clear(past, name, top, -1.0),
            )
        )
    return max(found) if found else None


def _clear(past: Past, name: str, top: int, sign: float) -> float:
    """Return sign · (now − then) over its half-width."""
    then, width = past.before(name)[top], past.before(f"{name}_ci95")[top]
    half = math.hypot(width, past.now[f"{name}_ci95"])
    return sign * (past.now[name] - then) / max(half, 1e-9)


def _number(past: Past, *, of: Callable[[Past], float | None]) -> float:
    value = of(past)
    return math.nan if value is None else value


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(
        name="first_ratio",
        jobs=("ppo",),
        reads=("first_ratio_gap_mean",),
        bound="mean |log ratio| of the first minibatch above 1e-4 nats, in bfloat16 above 0.05",
        causes="dropout left on, weights that changed between preparing and learning, or a log-prob computed in two ways",
        measure=lambda past: _gap(past, "first_ratio_gap_mean", 1e-4, 0.05),
        shown=lambda past: past.now["first_ratio_gap_mean"],
    ),
    Invariant(
        name="sampler_agreement",
        jobs=("ppo", "control"),
        reads=("sampler_gap_mean",),
        bound="mean |trainer's − sampler's log-probability| above 1e-5 nats, in bfloat16 above 0.1, of an agent above 1e-3",
        causes="a model whose cache changes its logits, another temperature or dtype in sampling, or sampling with old weights",
        measure=lambda past: _gap(past, "sampler_gap_mean", 1e-3 if past.control else 1e-5, 0.1),
        shown=lambda past: past.now["sampler_gap_mean"],
    ),
    Invariant(
        name="eos_rate",
        jobs=("ppo",),
        reads=("eos_share", "length"),
        bound="more than half of all tokens are stop tokens, over three records",
        causes="the judge likes empty answers, the leash is too loose, or a penalty is heavier than any score",
        measure=lambda past: _over(_eos_rate(past), 0.5),
        shown=partial(_number, of=_eos_rate),
    ),
    Invariant(
        name="cut_by_length",
        jobs=("ppo",),
        reads=("eos_share", "length"),
        bound="more than half of the answers reach the length limit, over three records",
        causes="sampling.max_new_tokens is short for the task, the judge likes long answers, or the model never learnt to stop",
        measure=lambda past: _over(_cut_share(past), 0.5),
        shown=partial(_number, of=_cut_share),
    ),
    Invariant(
        name="kl_sign",
        jobs=("ppo",),
        reads=("exact_kl", "sampled_kl"),
        bound="KL to the reference below 0: exact below −0.001, or sampled below −0.25 nats an answer over five records",
        causes="answers not drawn from the policy's own distribution, or policy and reference computed in different ways",
        measure=_kl_sign,
        shown=_kl_shown,
    ),
    Invariant(
        name="explained_variance",
        jobs=("ppo", "control"),
        reads=("explained_variance",),
        bound="median over ten records below −0.5: the critic is worse than a constant",
        causes="the critic's learning rate is too high, returns change faster than it learns, or truncation is mishandled",
        measure=lambda past: None if (value := _typical_explained(past)) is None else -value / 0.5,
        shown=partial(_number, of=_typical_explained),
    ),
    Invariant(
        name="dead_critic",
        jobs=("ppo", "control"),
        reads=("explained_variance", "grad_norm/critic"),
        bound="for three records the critic's values do not vary (explained variance 0) or its gradient is 0",
        causes="a value coefficient or learning rate of 0, units that died, or a critic that was left frozen",
        measure=_dead_critic,
        shown=lambda past: past.now.get("explained_variance", 0.0),
    ),
    Invariant(
        name="entropy_collapse",
        jobs=("ppo", "control"),
        reads=("policy_entropy", "entropy"),
        bound="over three records below 5 % of its first three records; of an agent with discrete actions below 0.005 nats",
        causes="a learning rate too high, an entropy bonus too small, or a reward that one answer satisfies",
        measure=_collapsed,
        shown=_entropy_now,
    ),
    Invariant(
        name="gradient_spike",
        jobs=("ppo", "control", "sft", "reward"),
        reads=("grad_norm",),
        bound="norm above 30 times the median of the 50 records before; of an agent 1000 times",
        causes="a bad row in the data, a reward of another scale, a learning rate too high, or half precision",
        measure=_spike,
        shown=partial(_number, of=_jump),
    ),
    Invariant(
        name="gradient_zero",
        jobs=("ppo", "control", "sft", "reward"),
        reads=("grad_norm",),
        bound="exactly 0 for three records",
        causes="advantages or losses that are all equal, frozen weights, or a clip that cuts every action",
        measure=_no_gradient,
        shown=lambda past: 0.0,
    ),
    Invariant(
        name="reward_length",
        jobs=("ppo",),
        reads=("score_length_correlation",),
        bound="|correlation| of score and length within a step above 0.9, mean of five records",
        causes="the judge counts words: train the reward model on pairs of like length, or take the length out of the score",
        measure=lambda past: _over(_reward_length(past), 0.9),
        shown=lambda past: _mean(past, "score_length_correlation", 5) or 0.0,
    ),
    Invariant(
        name="reward_against_gold",
        jobs=("ppo",),
        reads=(),
        bound="the score rose and a gold score fell over the evaluations, both by more than 1 (shown) half-width of 95 %",
        causes="the policy exploits the judge: tighten the leash, stop earlier, or train the judge on the policy's new answers",
        measure=_apart,
        shown=partial(_number, of=_apart),
    ),
)
"""Every invariant, in the order in which docs/INVARIANTS.md lists them."""


def table() -> str:
    """Lay the invariants out as the Markdown table of docs/INVARIANTS.md."""
    rows = [(i.name, ", ".join(i.jobs), i.bound, i.causes) for i in INVARIANTS]
    lines = ["| name | watched in | crossed when | likely causes |", "| --- | --- | --- | --- |"]
    cells = ((f"`{name}`", *(text.replace("|", "\\|") for text in rest)) for name, *rest in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])
