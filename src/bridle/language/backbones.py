"""The states of a backbone at chosen positions: all of its layers in one compiled step, where each of them runs compiled.

What a backbone does around its layers is little: embed, turn, one norm at the end. Where a backbone is made of just that, and
answers so in a trial, its layers are one operation to autograd, the last of them is computed where it is asked for alone, and
so is the norm. Everywhere else the backbone runs as it is, which is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridle.guards import is_plain, is_watched
from bridle.language import decoding, layers
from bridle.language.decoding import Stack, StackWeights
from bridle.language.layers import decoder_stack, norm_at
from bridle.language.quickening import FAILURES, TOLERANCE, forward_of, is_quick, quick_parts
from bridle.language.rooms import gradient_of, takes_directly
from bridle.random import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["computes_compiled", "hidden_at", "join_layers", "packed_stack"]

_KNOWN = "_bridle_backbone"
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
_MASKS = ("sliding_window", "attention_chunk_size")
"""Settings by which a long text is seen in part, which a short trial would not tell."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Backbone:
    """A backbone taken apart."""

    config: Any
    embed: Any
    layers: list[Any]
    norm: Any
    turn: Any
    eps: float
    held: list[tuple[dict[str, Any], str, nn.Module, Any]]
    """where each module was found, and what its class ran"""
    own: Any
    """what the backbone's class ran"""


def hidden_at(
    backbone: PreTrainedModel,
    input_ids: Int[Tensor, "B L"],
    rows: Int[Tensor, " n"],
    columns: Int[Tensor, " n"],
    *,
    positions: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "n D"]:
    """Return the last hidden states at ``(rows[i], columns[i])``, where rows are padded on the right.

    ``positions`` says where in its text each token stands, if that is not its column.
    """
    known = backbone.__dict__.get(_KNOWN)
    if known is not None and positions is None and _stands(backbone, known):
        found = _compiled(known, input_ids, rows, columns)
        if found is not None:
            return found
    where = {} if positions is None else {"position_ids": positions}
    found = backbone(input_ids=input_ids, use_cache=False, **where).last_hidden_state
    return cast("Tensor", found[rows, columns])


@torch.no_grad()
def computes_compiled(backbone: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether :func:`hidden_at` runs a backbone, as it is now, in compiled code that computes in ``dtype``."""
    known, first = backbone.__dict__.get(_KNOWN), torch.zeros(1, dtype=torch.int64)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        if known is None or decoding.code() is None or not _stands(backbone, known):
            return False
        return _compiled(known, first[None], first, first) is not None


@torch.no_grad()
def join_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Let the layers of a model that run compiled run in one step where :func:`hidden_at` asks, if they all do; return it."""
    backbone = model.base_model
    known = _taken_apart(backbone)
    if known is not None and _agrees(backbone, known):
        backbone.__dict__[_KNOWN] = known
    return model


def _taken_apart(backbone: PreTrainedModel) -> _Backbone | None:
    children = dict(backbone.named_children())
    config = backbone.config.get_text_config()
    if children.keys() != set(_PARTS):
        return None
    embed, layers, norm, turn = (cast("Any", children[name]) for name in _PARTS)
    eps = getattr(norm, "variance_epsilon", None)
    if type(layers) is not nn.ModuleList or eps is None or not _asks_all(config, len(layers)):
        return None
    if list(norm._parameters) != ["weight"] or not is_plain(getattr(embed, "weight", None)):
        return None
    found = [(backbone._modules, name, children[name]) for name in _PARTS]
    found += [(layers._modules, name, layer) for name, layer in layers.named_children()]
    held = [(owner, name, module, forward_of(module)) for owner, name, module in found]
    parts = {"embed": embed, "layers": list(layers), "norm": norm, "turn": turn}
    return _Backbone(config=config, **parts, eps=eps, held=held, own=forward_of(backbone))


def _asks_all(config: Any, layers: int) -> bool:
    """Whether each text is to be seen in full by so many layers, one or more, and no others."""
    kinds = getattr(config, "layer_types", None) or ()
    return (
        config.num_hidden_layers == layers > 0
        and all(kind == "full_attention" for kind in kinds)
        and all(getattr(config, name, None) is None for name in _MASKS)
    )


def _stands(backbone: PreTrainedModel, known: _Backbone) -> bool:
    """Whether a backbone is what it was, its tokens and layers go through compiled code, and no layer is to be run again.

    On other devices, and in precisions that are not compiled, it is not, which shows here, before a token is embedded.
    """
    if layers.code() is None or not all(is_plain(one) for one in (known.embed.weight, known.norm.weight)):
        return False
    if not all(map(is_quick, known.layers)) or len(backbone.layers) != len(known.layers) or is_watched(backbone):
        return False
    if known.norm.variance_epsilon != known.eps or not _asks_all(known.config, len(known.layers)):
        return False
    if forward_of(backbone) is not known.own or any(
        owner.get(name) is not module or forward_of(module) is not forward or is_watched(module)
        for owner, name, module, forward in known.held
    ):
        return False
    return not (backbone.training and any(layer.gradient_checkpointing for layer in known.layers))


def _compiled(
    known: _Backbone, input_ids: Int[Tensor, "B L"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]
) -> Float[Tensor, "n D"] | None:
    """The states, or None if a layer, or a place, is not served."""
    texts, length = input_ids.shape
    if not (_within(rows, texts) and _within(columns, length)):
        return None
    x, weight = _embedded(known.embed, input_ids), known.norm.weight
    turned = known.turn(x, torch.arange(length, device=x.device)[None])
    parts = [quick_parts(layer, x, turned) for layer in known.layers]
    held = [part for part in parts if part is not None]
    if len(held) < len(parts) or weight.shape != x.shape[2:]:
        return None
    asked = rows.new_zeros(2, texts)
    asked[0] = length
    asked[0].scatter_reduce_(0, rows, columns, "amin")
    asked[1].scatter_reduce_(0, rows, columns + 1, "amax")
    asked[0].clamp_(max=asked[1])
    cosine, sine = turned
    y = decoder_stack([part.shape for part in held], x, cosine, sine, [part.weights for part in held], asked)
    return norm_at(y, rows * length + columns, weight, known.eps)


def _embedded(embed: Any, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    """Embed tokens; in training, where PyTorch would make a gradient of the whole vocabulary, that of these tokens is added."""
    plain = type(embed) is nn.Embedding and embed.max_norm is None and not (embed.sparse or embed.scale_grad_by_freq)
    if not (plain and torch.is_grad_enabled() and takes_directly(embed.weight)):
        return cast("Tensor", embed(input_ids))
    return cast("Tensor", _Embedded.apply(embed.weight, input_ids, embed.padding_idx))  # type: ignore[no-untyped-call]


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, input_ids: Tensor, padding: int | None) -> Tensor:
        ctx.padding = padding
        ctx.save_for_backward(weight, input_ids)
        return nn.functional.embedding(input_ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        weight, input_ids = ctx.saved_tensors
        ids, slopes = input_ids.flatten(), slope.flatten(0, 1)
        if ctx.padding is not None:
            learnt = ids != ctx.padding
            ids, slopes = ids[learnt], slopes[learnt]
        gradient = gradient_of(weight)
        if gradient is None:  # it was there on the way forth
            return torch.zeros_like(weight).index_add_(0, ids, slopes), None, None
        gradient.index_add_(0, ids, slopes)
        return None, None, None


def _within(places: Int[Tensor, " n"], count: int) -> bool:
    """Whether places, one or more, are int64 from 0 to ``count`` − 1. For others PyTorch has rules of its own."""
    if places.dtype is not torch.int64 or len(places) == 0:
        return False
    low, high = places.aminmax()
    return int(low) >= 0 and int(high) < count


def packed_stack(backbone: PreTrainedModel, places: int) -> tuple[Stack, Callable[[Tensor], Tensor]] | None:
    """Return a backbone's layers, packed as they are now for texts of up to ``places`` tokens, and what embeds tokens.

    None where :func:`hidden_at` would run the backbone as it is, or without compiled code.
    """
    known = backbone.__dict__.get(_KNOWN)
    if known is None or decoding.code() is None or not _stands(backbone, known):
        return None
    x, weight = known.embed(torch.zeros(1, 1, dtype=torch.int64)).expand(1, places, -1), known.norm.weight
    cosine, sine = turned = known.turn(x, torch.arange(places)[None])
    parts = [quick_parts(layer, x, turned) for layer in known.layers]
    held = [part for part in parts if part is not None]
    if len(held) < len(parts) or weight.shape != x.shape[2:]:
        return None
    own = StackWeights(
        shapes=[part.shape for part in held],
        weights=[part.weights for part in held],
        norm=weight,
        eps=known.eps,
        cosine=cosine[0],
        sine=sine[0],
    )
    return Stack(own), known.embed


def _agrees(backbone: PreTrainedModel, known: _Backbone) -> bool:
    """Whether a backbone answers drawn tokens as its layers in one step do."""
    draws = generator(0, "backbone-trial")
    rows, columns = torch.ones(2, 12).nonzero(as_tuple=True)
    try:
        ids = torch.from_numpy(draws.integers(0, known.embed.weight.shape[0], size=(2, 12)))
        ours = _compiled(known, ids, rows, columns)
        own = backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    except FAILURES:
        return False
    if ours is None or ours.shape != own.shape:
        return False
    return bool((ours - own).abs().max() <= TOLERANCE * own.abs().max())
