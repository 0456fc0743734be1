"""The embedded engine: continuous batching over the trainer's own weights, for any causal LM that transformers' hooks reach.

Answers live in slots of one key-value cache. Each step gives one token to every answer under way and reads the prompts of
new ones, in one forward without padding: linear layers see a list of tokens, attention knows whose they are. An answer
that ends leaves its slot to the next prompt in the following step. A prompt is read once for all its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.errors import NonFiniteLogits
from bridle.language.causal import CausalModel, States
from bridle.language.policy import head_values
from bridle.language.sampler.drawing import LARGEST_UNIFORM, draw
from bridle.language.sampler.graphs import GraphedStep
from bridle.language.sampler.products import projection, swift_products
from bridle.language.sampler.protocol import Sampled, SamplingSettings, Stop
from bridle.language.sampler.slots import Prefill, Slots, serving
from bridle.language.sampler.stopping import Stopping
from bridle.language.sampler.tape import Tapes

__all__ = ["EmbeddedSampler"]

_BUCKET = {"cpu": 32, "cuda": 256}
"""Slots grow by this many tokens: attention reads whole slots, so a long one costs every answer, but growing costs too."""
_PREFILL_TOKENS = 4096
"""Prompt tokens read in one step at most (at least one prompt is): bounds the memory of a step."""


class EmbeddedSampler:
    """Draws answers from ``actor`` (weights are the trainer's own, nothing is copied), stopping at ``stop_ids``."""

    def __init__(
        self,
        actor: CausalModel,
        windows: Sequence[int | None],
        stop_ids: Collection[int],
        *,
        tapes: Tapes | None = None,
        value_head: nn.Linear | None = None,
        decode: Callable[[list[int]], str] | None = None,
        computing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """See :func:`bridle.language.sampler.serving.embedded_sampler`, which finds out whether the engine can serve a model.

        Args:
            actor: the policy's model.
            windows: how many tokens each layer looks back on; None: all.
            stop_ids: tokens that end an answer.
            tapes: recorded steps of ``actor``, if some are known already.
            value_head: the critic, if it is a head on the actor's trunk: answers then hold V(s_t) as well.
            decode: ids → text, which stop strings need.
            computing: sets the compute dtype.
        """
        self._actor = actor
        self._windows = tuple(windows)
        self._tapes = Tapes(actor) if tapes is None else tapes
        self._stops = frozenset(stop_ids)
        self._value_head = value_head
        self._decode = decode
        self._computing = computing

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Int[Tensor, " P"]], uniforms: NDArray[np.float64], settings: SamplingSettings
    ) -> list[Sampled]:
        """Draw one answer per prompt; see :class:`bridle.language.sampler.protocol.Sampler`."""
        rows = min(settings.rows, len(prompts))
        slots, steps = (
            Slots(self._windows, rows, self._actor.device),
            -(-len(prompts) // rows) * settings.max_new_tokens,
        )
        watch = Stopping(self._stops, settings.stop_strings, self._decode)
        work = _Work(self._actor, self._value_head, slots, watch, prompts, uniforms, settings)
        with serving(self._actor.model, slots), self._computing():
            work.play, work.logits = self._step_over(slots, steps), projection(self._actor, steps)
            work.products = swift_products(self._actor.model.get_input_embeddings().weight)
            while work.step():
                pass
        return work.answers()

    def _step_over(self, slots: Slots, steps: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The fastest step for answers under way alone: a graph on CUDA, a tape on the CPU; None: the model as it is."""
        if self._actor.device.type == "cuda" and self._actor.fused:
            return GraphedStep(self._actor, slots)
        return self._tapes.over(slots, steps)


@dataclass(slots=True, kw_only=True)
class _Group:
    """A prompt and its samples that have not begun."""

    ids: NDArray[np.int64]
    """[P] the prompt's tokens."""
    waiting: list[int]
    """Answers to it that have no slot yet, the next one last."""
    read: States | None = None
    """What the model holds at the prompt's last token, once it is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """Answers to one prompt that begin in this step, in adjacent slots."""

    group: _Group
    slots: range
    donor: int | None
    """A slot that begins with this prompt; None: the prompt is read, into the first of ``slots``."""


class _Work:
    """One call's worth of prompts: which are waiting, which answers are under way in which slots, and what was drawn."""

    def __init__(
        self,
        actor: CausalModel,
        value_head: nn.Linear | None,
        slots: Slots,
        watch: Stopping,
        prompts: Sequence[Int[Tensor, " P"]],
        uniforms: NDArray[np.float64],
        settings: SamplingSettings,
    ) -> None:
        self._actor, self._value_head, self._slots, self._watch = actor, value_head, slots, watch
        self._settings = settings
        self.play: Callable[[Tensor, Tensor], Tensor] | None = None
        """A step for answers under way alone, if one was recorded."""
        self.logits: Callable[[Tensor], Tensor] = actor.logits
        """Features → logits [n, V]."""
        self.products: AbstractContextManager[object] = nullcontext()
        """The block that the model runs in."""
        self._uniforms = uniforms.astype(np.float32).clip(max=LARGEST_UNIFORM)
        self._queue = _groups(prompts)
        self._size = min(settings.rows, len(prompts))
        self._answer: list[int] = []
        """Which answer each used slot holds, slot by slot; below, the length of its text so far, and of the answer."""
        self._group: list[_Group] = []
        self._length = np.zeros(0, dtype=np.int64)
        self._written = np.zeros(0, dtype=np.int64)
        self._token = torch.zeros(0, dtype=torch.int64, device=actor.device)
        self._drawn = _Drawn(len(prompts), settings.max_new_tokens)

    def step(self) -> bool:
        """Give every answer under way its next token and let new ones begin; False when none is left."""
        starts = self._admit()
        used = len(self._answer)
        if not used and not starts:
            return False
        states = self._read(starts)
        pick = list(range(used))
        for row, start in enumerate(starts, start=used):
            pick += [row] * len(start.slots)
            self._begin(start)
        self._length[:used] += 1
        self._draw(states, pick if starts else None)
        return True

    def answers(self) -> list[Sampled]:
        """All answers, in the order of the prompts."""
        return self._drawn.answers()

    def _admit(self) -> list[_Start]:
        """Choose who begins: samples whose prompt is in some slot are copied from there, other prompts are read."""
        starts: list[_Start] = []
        used, tokens = len(self._answer), 0
        while self._queue and used < self._size:
            group = self._queue[-1]
            donor = next((slot for slot, held in enumerate(self._group) if held is group), None)
            if donor is None:
                tokens += len(group.ids)
                if tokens > _PREFILL_TOKENS and tokens > len(group.ids):
                    break
            count = min(len(group.waiting), self._size - used)
            starts.append(_Start(group=group, slots=range(used, used + count), donor=donor))
            used += count
            if count < len(group.waiting):
                break
            self._queue.pop()
        return starts

    def _read(self, starts: Sequence[_Start]) -> States:
        """Run the model; return its states for each answer under way, then for each of ``starts``."""
        used, device = len(self._answer), self._actor.device
        fresh = [start for start in starts if start.donor is None]
        self._make_room([len(start.group.ids) for start in starts])
        positions = torch.from_numpy(self._length.copy()).to(device)
        self._slots.plan(positions, _prefills(fresh, device))
        if not fresh and self.play is not None:
            hidden = self.play(self._token, positions)
            states = States(hidden=hidden, features=hidden)
        elif not fresh:
            rows = torch.arange(used, device=device)
            where = {"positions": positions[:, None]}
            with self.products:
                states = self._actor.states(self._token[:, None], rows, torch.zeros_like(rows), **where)
        else:
            ids = torch.from_numpy(np.concatenate([start.group.ids for start in fresh])).to(device)
            lengths = np.array([len(start.group.ids) for start in fresh])
            places = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
            columns = torch.from_numpy(np.concatenate([np.arange(used), used + lengths.cumsum() - 1])).to(device)
            tokens, where = torch.cat([self._token, ids])[None], {"positions": torch.cat([positions, places])[None]}
            with self.products:
                states = self._actor.states(tokens, torch.zeros_like(columns), columns, **where)
            for row, start in enumerate(fresh, start=used):
                start.group.read = _rows(states, slice(row, row + 1))
        if len(fresh) < len(starts):
            at_starts = [start.group.read for start in starts]
            parts = [_rows(states, slice(0, used)), *(state for state in at_starts if state is not None)]
            return States(
                hidden=torch.cat([part.hidden for part in parts]), features=torch.cat([part.features for part in parts])
            )
        return states

    def _make_room(self, prompts: Sequence[int]) -> None:
        """Keep slots as long as the longest text needs, and hardly longer."""
        longest = max([int(self._length.max(initial=0)) + 1, *prompts])
        bucket = _BUCKET[self._actor.device.type]
        wanted = -(-longest // bucket) * bucket
        if wanted > self._slots.capacity or wanted <= self._slots.capacity - 2 * bucket:
            self._slots.reserve(wanted, len(self._answer))

    def _begin(self, start: _Start) -> None:
        """Take slots for answers whose prompt has just been read, or lies in another slot."""
        length, slots = len(start.group.ids), list(start.slots)
        source = slots[0] if start.donor is None else start.donor
        targets = [slot for slot in slots if slot != source]
        if targets:
            self._slots.copy([source] * len(targets), targets, length)
        self._answer += [start.group.waiting.pop() for _ in slots]
        self._group += [start.group] * len(slots)
        self._length = np.concatenate([self._length, np.full(len(slots), length)])
        self._written = np.concatenate([self._written, np.zeros(len(slots), dtype=np.int64)])

    def _draw(self, states: States, pick: list[int] | None) -> None:
        """Draw a token for each slot in use from row ``pick[slot]`` of the states; let go of answers that it ends."""
        device = self._actor.device
        logits = self.logits(states.features)
        values = None if self._value_head is None else head_values(self._value_head, states.hidden)
        if pick is not None and pick != list(range(len(pick))):
            chosen = torch.tensor(pick, device=device)
            logits = logits[chosen]
            values = None if values is None else values[chosen]
        uniform = torch.from_numpy(self._uniforms[self._answer, self._written]).to(device)
        self._token, logp, plain = draw(logits, uniform, self._settings)
        tokens = self._token.tolist()
        self._drawn.add(self._answer, self._written, tokens, (logp, plain, values))
        self._written += 1
        ended = self._watch.ended(self._answer, tokens)
        limit = self._settings.max_new_tokens
        ended |= {
            b: Stop.LENGTH for b, n in zip(self._answer, self._written, strict=True) if n == limit and b not in ended
        }
        if ended:
            self._release([slot for slot, b in enumerate(self._answer) if b in ended])
            self._drawn.stops |= ended

    def _release(self, slots: Sequence[int]) -> None:
        """Let go of ``slots``, and move the last ones into the gaps, so that slots in use come first."""
        staying = len(self._answer) - len(slots)
        leaving = set(slots)
        gaps = [slot for slot in slots if slot < staying]
        movers = [slot for slot in range(staying, len(self._answer)) if slot not in leaving]
        order = np.arange(staying)
        order[gaps] = movers
        if movers:
            self._slots.copy(movers, gaps, int(self._length[movers].max()))
        self._answer = [self._answer[slot] for slot in order]
        self._group = [self._group[slot] for slot in order]
        self._length, self._written = self._length[order], self._written[order]
        self._token = self._token[torch.from_numpy(order).to(self._token.device)]


class _Drawn:
    """What was drawn so far, step by step."""

    def __init__(self, count: int, limit: int) -> None:
        self.stops: dict[int, Stop] = {}
        self._ids = np.zeros((count, limit), dtype=np.int64)
        self._places: list[NDArray[np.int64]] = []
        self._numbers: tuple[list[Tensor], ...] = ([], [], [])

    def add(
        self,
        answers: Sequence[int],
        written: NDArray[np.int64],
        tokens: Sequence[int],
        numbers: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:
        """Note one token of each of ``answers``, its log-probs, and V if there is one."""
        self._ids[answers, written] = tokens
        self._places.append(np.asarray(answers) * self._ids.shape[1] + written)
        for kept, new in zip(self._numbers, numbers, strict=True):
            if new is not None:
                kept.append(new)

    def answers(self) -> list[Sampled]:
        """Put the pieces together."""
        places = torch.from_numpy(np.concatenate(self._places))
        lengths = np.bincount(places.numpy() // self._ids.shape[1])
        tables: list[Tensor | None] = []
        for pieces in self._numbers:
            table = torch.zeros(self._ids.shape)
            if pieces:
                table.view(-1)[places] = torch.cat(pieces).float().cpu()
            tables.append(table if pieces else None)
        logp, plain, values = tables
        assert logp is not None
        assert plain is not None
        if not bool(torch.isfinite(logp).all()):
            raise NonFiniteLogits("the policy's logits are not finite while sampling; its weights have diverged")
        return [
            Sampled(
                ids=torch.from_numpy(self._ids[b, :n].copy()),
                logp=logp[b, :n],
                plain_logp=plain[b, :n],
                values=None if values is None else values[b, :n],
                stop=self.stops[b],
            )
            for b, n in enumerate(lengths)
        ]


def _groups(prompts: Sequence[Int[Tensor, " P"]]) -> list[_Group]:
    """Gather equal prompts, the longest last: it is the first to be taken, and slots need not grow for those after it."""
    found: dict[tuple[int, ...], _Group] = {}
    for b, prompt in enumerate(prompts):
        group = found.setdefault(tuple(prompt.tolist()), _Group(ids=prompt.numpy(), waiting=[]))
        group.waiting.insert(0, b)
    return sorted(found.values(), key=lambda group: len(group.ids))


def _prefills(starts: Sequence[_Start], device: torch.device) -> list[Prefill]:
    """Let neighbours of equal length be read together."""
    found: list[tuple[int, list[int]]] = []
    for start in starts:
        length = len(start.group.ids)
        if not found or found[-1][0] != length:
            found.append((length, []))
        found[-1][1].append(start.slots[0])
    return [Prefill(slots=torch.tensor(slots, device=device), length=length) for length, slots in found]


def _rows(states: States, which: slice) -> States:
    return States(hidden=states.hidden[which], features=states.features[which])
