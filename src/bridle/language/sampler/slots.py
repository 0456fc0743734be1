"""The key-value cache of the embedded engine: one slot per answer, and attention over the slots.

Models reach it through transformers' ``AttentionInterface``: while a :class:`Slots` is in use, every attention layer hands
its new queries, keys and values to :meth:`Slots.attend`, which keeps keys and values and knows what each token may see.
The model itself gets no cache and no mask. A slot is a row of values ``[slots, heads, capacity, width]`` and of keys laid
across, ``[slots, heads, width, capacity]``, which makes the product with one query up to twice as fast (values of narrow
heads lie across too); slots in use come first, so that every product runs over one contiguous piece of memory. Where a
CPU multiplies bfloat16 numbers slowly they are kept in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from bridle.errors import ModelError
from bridle.language.sampler.products import bfloat16_is_slow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Prefill", "Recorder", "Slots", "serving"]

_NAME = "bridle_embedded"
_NARROW = 16
"""Heads up to this width keep their values across: reading them is then up to twice as fast, and slower for wide heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """``len(slots)`` prompts of one length that are read in this step, laid end to end."""

    slots: Int[Tensor, " b"]
    """[b] the slot of each prompt."""
    length: int
    """L, tokens of each."""


class _Store:
    """A layer's keys or values, across, ``[slots, heads, width, capacity]``, or along, ``[slots, heads, capacity, width]``."""

    def __init__(self, like: Float[Tensor, "n h 1 D"], count: int, capacity: int, *, across: bool) -> None:
        heads, width = like.shape[1], like.shape[3]
        self.across = across
        self.held = like.new_zeros(count, heads, *((width, capacity) if across else (capacity, width)))
        self.lines = heads * width if across else heads
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, capacity: int, used: int) -> None:
        """Make room for ``capacity`` tokens, keeping what the first ``used`` slots hold; the rest must be finite."""
        old, axis = self.held, 3 if self.across else 2
        kept = min(capacity, old.shape[axis])
        shape = list(old.shape)
        shape[axis] = capacity
        self.held = old.new_empty(shape)
        self.held[used:] = 0
        self.held[:used].narrow(axis, kept, capacity - kept).zero_()
        self.held[:used].narrow(axis, 0, kept).copy_(old[:used].narrow(axis, 0, kept))
        self._seen.clear()

    def text(self, length: int) -> Tensor:
        """The first ``length`` tokens of every slot."""
        return self.held[..., :length] if self.across else self.held[:, :, :length]

    def keep(self, slots: Int[Tensor, " b"], x: Float[Tensor, "b h L D"]) -> None:
        """Write whole texts into ``slots``."""
        self.text(x.shape[2]).index_copy_(0, slots, x.transpose(2, 3) if self.across else x)

    def append(self, places: Int[Tensor, " m"], x: Float[Tensor, "n h 1 D"]) -> Tensor:
        """Write one token into each of slots 0 … n−1, at ``places`` of the lines; return what these slots hold, by head."""
        rows = x.shape[0] * x.shape[1]
        if rows not in self._seen:
            lines = self.held.view(-1) if self.across else self.held.view(-1, self.held.shape[3])
            self._seen[rows] = (lines, self.held.view(-1, *self.held.shape[2:])[:rows])
        lines, seen = self._seen[rows]
        lines.index_copy_(0, places, x.reshape(-1) if self.across else x.reshape(rows, -1))
        return seen


class Slots:
    """Keys and values of up to ``count`` answers, and attention over them.

    A step is announced by :meth:`plan`; then the model runs once, its tokens laid out as the plan says: first one token
    for each of slots 0 … n−1, then the prompts.
    """

    def __init__(self, windows: Sequence[int | None], count: int, device: torch.device) -> None:
        """``windows`` holds, for each layer, how many tokens it looks back on; None: all."""
        self.capacity = 0
        self.windows = tuple(windows)
        self.count = count
        self._device = device
        self._wide = bfloat16_is_slow(device)
        self._keys: dict[int, _Store] = {}
        self._values: dict[int, _Store] = {}
        self._positions = torch.zeros(0, dtype=torch.int64, device=device)
        self._prefills: tuple[Prefill, ...] = ()
        self._masks: dict[tuple[int | None, int, torch.dtype], Tensor] = {}
        self._places: dict[int, Tensor] = {}

    def reserve(self, capacity: int, used: int) -> None:
        """Make every slot ``capacity`` tokens long, keeping what the first ``used`` slots hold."""
        for store in (*self._keys.values(), *self._values.values()):
            store.reserve(capacity, used)
        self.capacity = capacity

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy the first ``length`` tokens of slots ``source`` into slots ``target``."""
        read, write = (torch.tensor(slots, device=self._device) for slots in (source, target))
        for store in (*self._keys.values(), *self._values.values()):
            text = store.text(length)
            text.index_copy_(0, write, text.index_select(0, read))

    def plan(self, positions: Int[Tensor, " n"], prefills: Sequence[Prefill]) -> None:
        """Announce a step: slot i appends a token at ``positions[i]``; then ``prefills`` are read."""
        self._positions = positions
        self._prefills = tuple(prefills)
        self._masks.clear()
        self._places.clear()

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "b H l D"],
        key: Float[Tensor, "b h l D"],
        value: Float[Tensor, "b h l E"],
        scaling: float,
        softcap: float | None,
    ) -> Float[Tensor, "b l H E"]:
        """Keep the new keys and values, and return what each new token reads."""
        n = len(self._positions)
        if query.shape[2] == 1 and not self._prefills:
            return self.decode(query, key, value, layer, scaling, softcap)
        kind = value.dtype
        q, k, v = (_by_token(x) for x in self._stored(query, key, value))
        old = [x[:n, :, None] for x in (q, k, v)]
        parts = [self.decode(old[0], old[1], old[2], layer, scaling, softcap)[:, 0]] if n else []
        begin = n
        for prefill in self._prefills:
            end = begin + len(prefill.slots) * prefill.length
            parts.append(self._prefill(layer, prefill, q[begin:end], k[begin:end], v[begin:end], scaling, softcap))
            begin = end
        read = parts[0] if len(parts) == 1 else torch.cat(parts)
        return read.view(query.shape[0], query.shape[2], *read.shape[1:]).to(kind)

    def decode(
        self,
        query: Float[Tensor, "n H 1 D"],
        key: Float[Tensor, "n h 1 D"],
        value: Float[Tensor, "n h 1 E"],
        layer: int,
        scaling: float,
        softcap: float | None,
    ) -> Float[Tensor, "n 1 H E"]:
        """The same for one new token in each of slots 0 … n−1."""
        kind = value.dtype
        query, key, value = self._stored(query, key, value)
        (keys, values), (n, heads, _, width) = self._open(layer, key, value), key.shape
        past, read = keys.append(self._place(keys.lines), key), values.append(self._place(values.lines), value)
        grouped = query.reshape(n * heads, -1, width)
        mask = self._mask(self.windows[layer], heads, query.dtype)
        if softcap is None:
            scores = torch.baddbmm(mask, grouped, past, alpha=scaling)
        else:
            scores = softcap * torch.tanh(torch.bmm(grouped, past) * (scaling / softcap)) + mask
        found = torch.bmm(torch.softmax(scores, dim=-1), read.transpose(1, 2) if values.across else read)
        return found.view(n, 1, query.shape[1], -1).to(kind)

    def _stored(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is computed with: bfloat16 numbers as float32 ones where that is faster."""
        if self._wide and value.dtype is torch.bfloat16:
            return query.float(), key.float(), value.float()
        return query, key, value

    def _open(self, layer: int, key: Tensor, value: Tensor) -> tuple[_Store, _Store]:
        """A layer's stores, made when its first keys and values show their shape."""
        if layer not in self._keys:
            self._keys[layer] = _Store(key, self.count, self.capacity, across=True)
            self._values[layer] = _Store(value, self.count, self.capacity, across=value.shape[3] <= _NARROW)
        return self._keys[layer], self._values[layer]

    def _prefill(
        self,
        layer: int,
        prefill: Prefill,
        q: Float[Tensor, "m H D"],
        k: Float[Tensor, "m h D"],
        v: Float[Tensor, "m h E"],
        scaling: float,
        softcap: float | None,
    ) -> Float[Tensor, "m H E"]:
        length = prefill.length
        q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        keys, values = self._open(layer, k, v)
        keys.keep(prefill.slots, k)
        values.keep(prefill.slots, v)
        window, shared = self.windows[layer], q.shape[1] != k.shape[1]
        if softcap is None and (window is None or window >= length):
            read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shared)
        else:
            read = _windowed(q, k, v, window, scaling, softcap)
        return read.transpose(1, 2).flatten(0, 1)

    def _place(self, rows: int) -> Int[Tensor, " m"]:
        """Where slot i's new token lies in a store whose slots are each ``rows`` rows of C places."""
        if rows not in self._places:
            begin = torch.arange(len(self._positions) * rows, device=self._device) * self.capacity
            self._places[rows] = begin + self._positions.repeat_interleave(rows)
        return self._places[rows]

    def _mask(self, window: int | None, heads: int, dtype: torch.dtype) -> Float[Tensor, "m 1 C"]:
        """0 where slot i's new token sees, −∞ where it does not: what lies behind it, or before its window."""
        name = (window, heads, dtype)
        if name not in self._masks:
            columns = torch.arange(self.capacity, device=self._device)
            hidden = columns > self._positions[:, None]
            if window is not None:
                hidden |= columns <= self._positions[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device).masked_fill_(hidden, -math.inf)
            self._masks[name] = mask.repeat_interleave(heads, dim=0)[:, None]
        return self._masks[name]


def _by_token(x: Float[Tensor, "b h l D"]) -> Float[Tensor, "m h D"]:
    return x.transpose(1, 2).flatten(0, 1)


def _windowed(
    q: Float[Tensor, "b H L D"],
    k: Float[Tensor, "b h L D"],
    v: Float[Tensor, "b h L E"],
    window: int | None,
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "b H L E"]:
    """Plain attention: causal, within ``window`` tokens, with scores capped."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = scaling * (q @ k.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(q.shape[2], device=q.device)
    back = place[:, None] - place
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    return torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v


class Recorder:
    """Stands in for slots while a step is recorded: attention becomes one operation, which has a shape and no kernel."""

    windows: tuple[int | None, ...] | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """Note that attention stands here."""
        return cast("Tensor", torch.ops.bridle.attend(query, key, value, layer, scaling, softcap))


_operations: Any = torch.library.Library("bridle", "DEF")  # type: ignore[no-untyped-call]
_operations.define("attend(Tensor query, Tensor key, Tensor value, int layer, float scaling, float? softcap) -> Tensor")
_operations.impl(
    "attend", lambda q, k, v, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=v.dtype), "Meta"
)

_serving: list[Slots | Recorder] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Hand a layer's attention to the slots in use; transformers calls it under the name that is registered here."""
    if s_aux is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks")
    if attention_mask is not None:
        raise ModelError(f"{type(module).__name__} makes a mask of its own")
    slots, layer = _serving[-1], cast("int", module.layer_idx)
    if sliding_window is not None and slots.windows is not None and sliding_window != slots.windows[layer]:
        raise ModelError(f"{type(module).__name__} has another window than its configuration says")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slots.attend(layer, query, key, value, scale, softcap), None


AttentionInterface.register(_NAME, _attention)


@contextmanager
def serving(model: PreTrainedModel, slots: Slots | Recorder) -> Iterator[None]:
    """Let ``model`` attend over ``slots``, and give its own attention back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    _serving.append(slots)
    try:
        if model.config._attn_implementation != _NAME:
            raise ModelError("its attention cannot be replaced from outside")
        yield
    finally:
        _serving.pop()
        model.set_attn_implementation(before)
