"""The embedded engine: continuous batching over the trainer's own weights, for any causal LM that transformers' hooks reach.

Answers live in slots of one key-value cache. Each step gives one token to every answer under way and reads the prompts of
new ones, in one forward without padding: linear layers see a list of tokens, attention knows whose they are. An answer
that ends leaves its slot to the next prompt in the following step. A prompt is read once for all its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.errors import NonFiniteLogits
from bridle.language.backbones import packed_stack
from bridle.language.causal import CausalModel, States
from bridle.language.policy import head_values
from bridle.language.sampler.drawing import LARGEST_UNIFORM, Chooser, chooser
from bridle.language.sampler.graphs import GraphedStep
from bridle.language.sampler.protocol import Sampled, SamplingSettings, Stop
from bridle.language.sampler.readers import CompiledReader, ModelReader, Reader
from bridle.language.sampler.slots import Slots, serving
from bridle.language.sampler.stopping import Stopping
from bridle.language.sampler.tape import Tapes
from bridle.native.sharing import calm

__all__ = ["EmbeddedSampler"]

_PREFILL_TOKENS = 4096
"""Prompt tokens read in one step at most (at least one prompt is): bounds the memory of a step."""


class EmbeddedSampler:
    """Draws answers from ``actor``, stopping at ``stop_ids``.

    The weights are the trainer's own; where code is compiled it packs them for each call, one copy while the call lasts.
    """

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
        steps = -(-len(prompts) // rows) * settings.max_new_tokens
        longest = max(map(len, prompts)) + settings.max_new_tokens
        watch = Stopping(self._stops, settings.stop_strings, self._decode)
        with self._computing(), self._reading(rows, steps, longest) as reader:
            choose = chooser(self._actor, settings, steps)
            work = _Work(reader, choose, self._value_head, watch, prompts, uniforms, settings)
            with calm(isinstance(reader, CompiledReader) and not settings.warped):
                while work.step():
                    pass
        return work.answers()

    @contextmanager
    def _reading(self, rows: int, steps: int, longest: int) -> Iterator[Reader]:
        """The fastest way through the model: its layers compiled; a graph on CUDA, a tape on the CPU; the model as it is."""
        actor = self._actor
        packed = packed_stack(actor.model.base_model, longest) if actor.fused and not any(self._windows) else None
        if packed is not None:
            yield CompiledReader(*packed, rows)
            return
        slots = Slots(self._windows, rows, actor.device)
        with serving(actor.model, slots):
            graphed = actor.device.type == "cuda" and actor.fused
            yield ModelReader(actor, slots, GraphedStep(actor, slots) if graphed else self._tapes.over(slots, steps))


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
        reader: Reader,
        choose: Chooser,
        value_head: nn.Linear | None,
        watch: Stopping,
        prompts: Sequence[Int[Tensor, " P"]],
        uniforms: NDArray[np.float64],
        settings: SamplingSettings,
    ) -> None:
        self._reader, self._choose, self._value_head, self._watch = reader, choose, value_head, watch
        self._limit = settings.max_new_tokens
        self._uniforms = uniforms.astype(np.float32).clip(max=LARGEST_UNIFORM)
        self._queue = _groups(prompts)
        self._size = min(settings.rows, len(prompts))
        self._answer = np.zeros(0, dtype=np.int64)
        """Which answer each used slot holds, slot by slot; below, the length of its text so far, and of the answer."""
        self._group: list[_Group] = []
        self._length = np.zeros(0, dtype=np.int64)
        self._written = np.zeros(0, dtype=np.int64)
        self._token = torch.zeros(0, dtype=torch.int64, device=reader.device)
        self._drawn = _Drawn(len(prompts), settings.max_new_tokens)

    def step(self) -> bool:
        """Give every answer under way its next token and let new ones begin; False when none is left."""
        starts = self._admit()
        used = len(self._answer)
        if not used and not starts:
            return False
        states, picks = self._read(starts), np.arange(used)
        for row, start in enumerate(starts, start=used):
            picks = np.concatenate([picks, np.full(len(start.slots), row)])
            self._begin(start)
        self._length[:used] += 1
        self._draw(states, picks)
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
        used, fresh = len(self._answer), [start for start in starts if start.donor is None]
        states = self._reader.read(self._token, self._length, [(start.slots[0], start.group.ids) for start in fresh])
        for row, start in enumerate(fresh, start=used):
            start.group.read = _rows(states, slice(row, row + 1))
        if len(fresh) == len(starts):
            return states
        at_starts = [start.group.read for start in starts]
        parts = [_rows(states, slice(0, used)), *(state for state in at_starts if state is not None)]
        return States(
            hidden=torch.cat([part.hidden for part in parts]), features=torch.cat([part.features for part in parts])
        )

    def _begin(self, start: _Start) -> None:
        """Take slots for answers whose prompt has just been read, or lies in another slot."""
        length, slots = len(start.group.ids), list(start.slots)
        source = slots[0] if start.donor is None else start.donor
        targets = [slot for slot in slots if slot != source]
        if targets:
            self._reader.share(source, targets, length)
        self._answer = np.concatenate([self._answer, [start.group.waiting.pop() for _ in slots]])
        self._group += [start.group] * len(slots)
        self._length = np.concatenate([self._length, np.full(len(slots), length)])
        self._written = np.concatenate([self._written, np.zeros(len(slots), dtype=np.int64)])

    def _draw(self, states: States, picks: NDArray[np.int64]) -> None:
        """Draw a token for each slot in use from row ``picks[slot]`` of the states; let go of answers that it ends."""
        self._token, logp, plain = self._choose(states.features, picks, self._uniforms[self._answer, self._written])
        values = None
        if self._value_head is not None:
            values = head_values(self._value_head, states.hidden)[torch.from_numpy(picks).to(logp.device)]
        answers, tokens = self._answer.tolist(), self._token.tolist()
        self._drawn.add(self._answer, self._written, tokens, (logp, plain, values))
        self._written += 1
        ended = self._watch.ended(answers, tokens)
        for slot in np.nonzero(self._written == self._limit)[0]:
            ended.setdefault(answers[slot], Stop.LENGTH)
        if ended:
            self._release([slot for slot, b in enumerate(answers) if b in ended])
            self._drawn.stops |= ended

    def _release(self, slots: Sequence[int]) -> None:
        """Let go of ``slots``, and close up, so that slots in use come first."""
        order = self._reader.release(slots, self._length)
        self._group = [self._group[slot] for slot in order]
        self._answer, self._length, self._written = (x[order] for x in (self._answer, self._length, self._written))
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
        answers: NDArray[np.int64],
        written: NDArray[np.int64],
        tokens: Sequence[int],
        numbers: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:
        """Note one token of each of ``answers``, its log-probs, and V if there is one."""
        self._ids[answers, written] = tokens
        self._places.append(answers * self._ids.shape[1] + written)
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


def _rows(states: States, which: slice) -> States:
    return States(hidden=states.hidden[which], features=states.features[which])
