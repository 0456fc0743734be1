"""Which layers of a model run compiled: those that are built as a Llama layer is, and answer as the compiled one does.

Such a layer becomes one of a class derived from its own, as FSDP2 does it, so that what transformers does around a layer
stays as it is. What is asked, and of what, is looked at in every call: masks, caches, adapters, half precision, autocast that
is not compiled, dropout, another attention, a GPU or whatever else is not served goes to the layer's ``forward``, the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bridle.guards import is_observed, is_plain, is_watched
from bridle.language import decoding, layers, vocabulary
from bridle.language.layers import Shape, decoder_layer
from bridle.native.sharing import calm
from bridle.random import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "FAILURES",
    "TOLERANCE",
    "calm",
    "forward_of",
    "is_quick",
    "plainly",
    "quick_parts",
    "quicken",
    "speed_notes",
]

_WIDEST = 512
"""Wider layers are left to PyTorch, which is as fast there or faster (docs/LOG.md)."""
TOLERANCE = 1e-4
"""How far a layer's answer to drawn tokens may be from the compiled one's, relative to the largest number it adds."""
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a layer may raise that is asked otherwise than its model asks it."""
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_CAUSAL = ("sdpa", "bridle_narrow")
"""Attention that is told by the absence of a mask that it is causal."""
_KNOWN = "_bridle_parts"
_IGNORED = {"position_embeddings", "position_ids", "use_cache"}


def quicken(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model's layers run compiled where they can, and return it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules() if layers.library is not None else ():
        if isinstance(layer, GradientCheckpointingLayer) and _agrees(layer):
            layer.__class__ = _compiled(type(layer))  # type: ignore[arg-type]
    return model


def plainly(model: PreTrainedModel) -> PreTrainedModel:
    """Let all of a model's layers run as they are, and return it: what must equal another to the bit has to run as it does."""
    for layer in model.modules():
        if isinstance(layer, _Quick):
            layer.__class__ = type(layer).__mro__[2]
    return model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Parts:
    """A layer taken apart."""

    shape: Shape
    head: int
    weights: list[Tensor | None]
    attention: Any
    norms: list[Any]
    traits: tuple[Any, ...]
    """what else the layer was when it was tried"""
    sizes: list[tuple[int, ...] | None]
    """of each weight"""
    places: list[tuple[dict[str, Any], str]]
    """where each weight was found"""
    modules: list[tuple[dict[str, Any], str, nn.Module, Any]]
    """where each module was found, and what its class ran"""
    own: Any
    """what the layer's class ran"""
    dropouts: list[tuple[dict[str, Any], str]]
    """where shares are said that are left out in training"""


def speed_notes(model: nn.Module) -> tuple[str, ...]:
    """Say in a line that a model's layers or head could run compiled and do not, for that is not built; nothing else."""
    built = all(code.library is not None for code in (layers, vocabulary, decoding))
    if built or not any(_parts(layer) is not None for layer in model.modules()):
        return ()
    return ("layers or vocabulary run without compiled code, slower; python -m bridle.native.compiling builds it",)


class _Quick:
    """Marks layers that run compiled where they can."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Take the class from the layer's own: a derived one has no place to be found at."""
        return _made, (type(self).__mro__[2],), self.__dict__


def _made(kind: type[nn.Module]) -> nn.Module:
    derived = _compiled(kind)  # type: ignore[arg-type]
    return derived.__new__(derived)


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """Derive the class of a layer that runs compiled where it is served, and as it is elsewhere."""

    class Compiled(_Quick, kind):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: Tensor, *more: Any, **given: Any) -> Any:
            parts = None if more else _served(self, hidden_states, given)
            if parts is None:
                return super().forward(hidden_states, *more, **given)
            cosine, sine = given["position_embeddings"]
            return decoder_layer(parts.shape, hidden_states, cosine, sine, parts.weights)

    Compiled.__name__, Compiled.__qualname__ = kind.__name__, kind.__qualname__
    return Compiled


def is_quick(layer: nn.Module) -> bool:
    """Whether a layer is of the class that runs compiled where it is served."""
    return isinstance(layer, _Quick)


def forward_of(module: nn.Module) -> Any:
    """Return the function that a module's class runs, of a layer that runs compiled where it is served the one beneath."""
    kind = type(module)
    return kind.__mro__[2].forward if _Quick in kind.__bases__ else kind.forward  # type: ignore[attr-defined]


def quick_parts(layer: nn.Module, x: Tensor, turned: tuple[Tensor, Tensor]) -> _Parts | None:
    """Return the parts of a layer that runs compiled now, on whole texts x; else None."""
    return _served(layer, x, {"position_embeddings": turned}) if isinstance(layer, _Quick) else None


def _served(layer: nn.Module, x: Tensor, given: Mapping[str, Any]) -> _Parts | None:
    """Return the parts of a layer that is asked for what is compiled, in a form that is; else None."""
    if any(value is not None and value is not False and name not in _IGNORED for name, value in given.items()):
        return None
    if given.get("is_causal") is False:  # the one that means something where it is not asked for
        return None
    if not is_plain(x) or x.numel() == 0 or layers.code() is None or is_observed():
        return None
    parts = _parts(layer)
    turned = given.get("position_embeddings")
    if parts is None or turned is None:
        return None
    shapes = ((len(x), x.shape[1], parts.head), (1, x.shape[1], parts.head))
    return parts if all(is_plain(one) and tuple(one.shape) in shapes for one in turned) else None


def _parts(layer: nn.Module) -> _Parts | None:
    """Take a layer apart; None unless it is a Llama layer in all that can be seen, and can run compiled as it is now.

    What was found is kept with the layer. Other weights in the same modules are looked for anew; where a module is another, or
    is another in what its layer was tried with, the layer runs as it is.
    """
    known: _Parts | None = layer.__dict__.get(_KNOWN)
    if known is None:
        known = layer.__dict__[_KNOWN] = _taken_apart(layer)
    if known is None or not _stands(layer, known):
        return None
    if any(owner.get(name) is not weight for (owner, name), weight in zip(known.places, known.weights, strict=True)):
        fresh = _taken_apart(layer)
        if fresh is None:
            return None
        known = layer.__dict__[_KNOWN] = fresh
    attention = known.attention
    if attention.config._attn_implementation not in _CAUSAL:
        return None
    if layer.training and any(owner.get(name) for owner, name in known.dropouts):
        return None
    held = zip(known.weights, known.sizes, strict=True)
    served = all(w is None or (w.dtype is torch.float32 and w.is_cpu and w.shape == size) for w, size in held)
    return known if served else None


def _stands(layer: nn.Module, known: _Parts) -> bool:
    """Whether modules are where they were found and as they were, and nobody looks on."""
    if forward_of(layer) is not known.own or _traits(known.attention, known.norms) != known.traits:
        return False
    return not any(
        owner.get(name) is not module or type(module).forward is not forward or is_watched(module)
        for owner, name, module, forward in known.modules
    )


def _traits(attention: Any, norms: list[Any]) -> tuple[Any, ...]:
    """Width of a head, factor on the scores, whether it is causal, ε of both norms; None for what is missing."""
    own = [getattr(attention, name, None) for name in ("head_dim", "scaling", "is_causal")]
    return (*own, *[getattr(norm, "variance_epsilon", None) for norm in norms])


def _taken_apart(layer: nn.Module) -> _Parts | None:
    children = dict(layer.named_children())
    if children.keys() != {*_LINEARS, *_NORMS}:
        return None
    attention, norms = cast("Any", children["self_attn"]), [cast("Any", children[name]) for name in _NORMS]
    linears, traits = _linears(children), _traits(attention, norms)
    if linears is None or None in traits or any(list(norm._parameters) != ["weight"] for norm in norms):
        return None
    head, scale, causal, *eps = traits
    queries, width = linears[0].weight.shape
    keys, hidden = len(linears[1].weight), len(linears[4].weight)
    if width % 8 or head % 8 or width > _WIDEST or keys % head or queries % keys or scale <= 0 or not causal:
        return None
    sides = [(queries, width), (keys, width), (keys, width), (width, queries), *[(hidden, width)] * 2, (width, hidden)]
    places = [(norm._parameters, "weight") for norm in norms]
    places += [(linear._parameters, name) for linear in linears for name in ("weight", "bias")]
    weights = [owner[name] for owner, name in places]
    sizes = [(width,), (width,), *[size for two in sides for size in (two, two[:1])]]
    if any(
        type(w) not in (Tensor, nn.Parameter) or w.shape != size
        for w, size in zip(weights, sizes, strict=True)
        if w is not None
    ):
        return None
    modules = [(layer._modules, name, module) for name, module in children.items()]
    inner = [*_named(), *[("mlp", name) for name in children["mlp"]._modules if name == "act_fn"]]
    modules += [
        (children[part]._modules, name, cast("nn.Module", children[part]._modules[name])) for part, name in inner
    ]
    return _Parts(
        shape=Shape(heads=queries // head, key_heads=keys // head, first_eps=eps[0], second_eps=eps[1], scale=scale),
        head=head,
        weights=weights,
        attention=attention,
        norms=norms,
        traits=traits,
        sizes=list(sizes),
        places=places,
        modules=[(owner, name, module, type(module).forward) for owner, name, module in modules],
        own=forward_of(layer),
        dropouts=[(vars(one), name) for one in layer.modules() for name in vars(one) if "dropout" in name],
    )


def _named() -> list[tuple[str, str]]:
    return [(part, name) for part, names in _LINEARS.items() for name in names]


def _linears(children: Mapping[str, nn.Module]) -> list[nn.Linear] | None:
    """Return the linear layers of attention and gate, as layers.c orders them; None if there are others, or more."""
    found = [children[part]._modules.get(name) for part, name in _named()]
    more = len(children["self_attn"]._modules) > 4 or children["mlp"]._modules.keys() - {*_LINEARS["mlp"], "act_fn"}
    return None if more or any(type(one) is not nn.Linear for one in found) else cast("list[nn.Linear]", found)


@torch.no_grad()
def _agrees(layer: nn.Module) -> bool:
    """Whether a layer answers drawn tokens as the compiled one does: numbers of size one, and small ones, where ε counts."""
    try:
        parts = _parts(layer)
        if parts is None:
            return False
        draws = generator(0, "layer-trial")
        width = cast("Tensor", parts.weights[0]).shape[0]
        x = torch.from_numpy(draws.standard_normal((2, 5, width))).float() * torch.tensor([1.0, 1e-3]).view(2, 1, 1)
        angles = torch.from_numpy(draws.standard_normal((1, 5, parts.head // 2))).float().repeat(1, 1, 2)
        own = layer(x, attention_mask=None, position_embeddings=(angles.cos(), angles.sin()))
        ours = decoder_layer(parts.shape, x, angles.cos(), angles.sin(), parts.weights)
    except FAILURES:
        return False
    if type(own) is not Tensor or own.shape != ours.shape:
        return False
    wrong, largest = (ours - own).abs().amax((1, 2)), (own - x).abs().amax((1, 2))
    return bool((wrong <= TOLERANCE * largest).all())
