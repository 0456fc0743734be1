"""The key-value cache of the embedded engine: one slot per answer, and attention over the slots.

Models reach it through transformers' ``AttentionInterface``: while a :class:`Slots` is in use, every attention layer hands
its new queries, keys and values to :meth:`Slots.attend`, which keeps keys and values and knows what each token may see.
The model itself gets no cache and no mask. A slot is a row of values ``[slots, heads, capacity, width]`` and of keys laid
across, ``[slots, heads, width, capacity]``, which makes the product with one query up to twice as fast; slots in use
come first, so that every product runs over one contiguous piece of memory.
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Prefill", "Recorder", "Slots", "serving"]

_NAME = "bridle_embedded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """``len(slots)`` prompts of one length that are read in this step, laid end to end."""

    slots: Int[Tensor, " b"]
    """[b] the slot of each prompt."""
    length: int
    """L, tokens of each."""


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
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._positions = torch.zeros(0, dtype=torch.int64, device=device)
        self._prefills: tuple[Prefill, ...] = ()
        self._masks: dict[tuple[int | None, int, torch.dtype], Tensor] = {}
        self._places: dict[int, Tensor] = {}
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def reserve(self, capacity: int, used: int) -> None:
        """Make every slot ``capacity`` tokens long, keeping what the first ``used`` slots hold."""
        kept = min(capacity, self.capacity)
        for layer, old in self._keys.items():
            self._keys[layer] = old.new_zeros(*old.shape[:3], capacity)
            self._keys[layer][:used, ..., :kept] = old[:used, ..., :kept]
        for layer, old in self._values.items():
            self._values[layer] = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            self._values[layer][:used, :, :kept] = old[:used, :, :kept]
        self.capacity = capacity
        self._views.clear()

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy the first ``length`` tokens of slots ``source`` into slots ``target``."""
        read, write = (torch.tensor(slots, device=self._device) for slots in (source, target))
        texts = [keys[..., :length] for keys in self._keys.values()]
        for text in texts + [values[:, :, :length] for values in self._values.values()]:
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
        self._open(layer, key, value)
        n = len(self._positions)
        if query.shape[2] == 1 and not self._prefills:
            return self.decode(query, key, value, layer, scaling, softcap)
        q, k, v = (_by_token(x) for x in (query, key, value))
        old = [x[:n, :, None] for x in (q, k, v)]
        parts = [self.decode(old[0], old[1], old[2], layer, scaling, softcap)[:, 0]] if n else []
        begin = n
        for prefill in self._prefills:
            end = begin + len(prefill.slots) * prefill.length
            parts.append(self._prefill(layer, prefill, q[begin:end], k[begin:end], v[begin:end], scaling, softcap))
            begin = end
        read = parts[0] if len(parts) == 1 else torch.cat(parts)
        return read.view(query.shape[0], query.shape[2], *read.shape[1:])

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
        self._open(layer, key, value)
        n, heads, _, width = key.shape
        keys, values, past, read = self._seen(layer, n * heads)
        keys.index_copy_(0, self._place(heads * width), key.reshape(-1))
        values.index_copy_(0, self._place(heads), value.reshape(n * heads, -1))
        grouped = query.reshape(n * heads, -1, width)
        mask = self._mask(self.windows[layer], heads, query.dtype)
        if softcap is None:
            scores = torch.baddbmm(mask, grouped, past, alpha=scaling)
        else:
            scores = softcap * torch.tanh(torch.bmm(grouped, past) * (scaling / softcap)) + mask
        return torch.bmm(torch.softmax(scores, dim=-1), read).view(n, 1, query.shape[1], -1)

    def _open(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Make a layer's store when its first keys and values show their shape."""
        if layer not in self._keys:
            (heads, width), wide = (key.shape[1], key.shape[3]), value.shape[3]
            self._keys[layer] = key.new_zeros(self.count, heads, width, self.capacity)
            self._values[layer] = value.new_zeros(self.count, heads, self.capacity, wide)

    def _seen(self, layer: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A layer's keys as numbers and values as vectors, to write to; and as [rows, D, C] and [rows, C, E], to read."""
        if (layer, rows) not in self._views:
            keys, values = self._keys[layer], self._values[layer]
            past, read = (held.view(-1, *held.shape[2:])[:rows] for held in (keys, values))
            self._views[layer, rows] = (keys.view(-1), values.view(-1, values.shape[3]), past, read)
        return self._views[layer, rows]

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
        self._keys[layer][..., :length].index_copy_(0, prefill.slots, k.transpose(2, 3))
        self._values[layer][:, :, :length].index_copy_(0, prefill.slots, v)
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
