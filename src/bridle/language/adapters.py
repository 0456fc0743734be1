"""Low-rank adapters on one base: models that share every frozen weight and differ by what is small.

Each role is a module of its own (actor, critic, reference, judge), so nothing is ever switched on or off; what they have in
common, the base's weights, exists once. The layers with adapters are peft's.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", §4.1: h = W₀x + (α/r) B A x, with B = 0 at first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bridle.errors import ConfigError, ModelError
from bridle.language.adapter_files import (
    LARGEST_ALPHA,
    Adapter,
    LowRank,
    check_fits,
    linear_layers,
    merge_into,
    read_adapter,
    sides,
    write_adapter,
)
from bridle.language.models import (
    ModelSettings,
    adapter_of,
    base_of,
    load_causal_lm,
    load_reward_model,
    put_head,
    quiet,
    save_model,
)
from bridle.language.quickening import plainly
from bridle.random import torch_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Adapted", "Base", "LoraSettings", "adapted_reward_model", "open_adapted", "twin"]

_ALPHA = 16.0
_NAME = "default"
_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters in place of whole weights; off unless a rank is given."""

    rank: int | None = None
    """≥ 1, r: numbers between A and B; None trains all weights."""
    alpha: float | None = None
    """> 0, α: what is added to a weight is (α/r) B A; 16 if left out."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that are adapted, q_proj for instance; all linear layers but the head if left out."""
    merged: bool = False
    """At the end write RUN/merged too: a whole model, which opens without peft. The base is held twice while it is written."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.rank is not None and self.rank < 1:
            raise ConfigError.of("lora.rank", self.rank, "a whole number >= 1", "leave it out to train all weights")
        if self.alpha is not None and not 0 < self.alpha <= LARGEST_ALPHA:
            raise ConfigError.of("lora.alpha", self.alpha, f"a number in (0, {LARGEST_ALPHA:g}]", "the rank is usual")
        for name, off in (("alpha", None), ("targets", ()), ("merged", False)):
            if self.rank is None and getattr(self, name) != off:
                raise ConfigError.of(f"lora.{name}", getattr(self, name), "a rank beside it", "set lora.rank")
        if not all(self.targets):
            raise ConfigError.of("lora.targets", self.targets, "names of layers", "q_proj, for instance")
        if self.rank is not None and find_spec("peft") is None:
            raise ConfigError.of("lora.rank", self.rank, "peft to be installed", "pip install 'bridle[lora]'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A model whose weights stay as they are, and where it came from."""

    settings: ModelSettings
    """What it was opened with; its tokenizer may be an adapter's."""
    model: PreTrainedModel
    """Without adapters and without gradients."""

    @property
    def transposed(self) -> bool:
        """Whether weights are laid [in, out]."""
        return not all(isinstance(layer, nn.Linear) for layer in linear_layers(self.model).values())

    def is_of(self, adapter: Adapter) -> bool:
        """Whether ``adapter`` belongs to it."""
        return (_whereabouts(self.settings.path), self.settings.revision) == (
            _whereabouts(adapter.base),
            adapter.revision,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A model with an adapter that learns, on a base that does not."""

    base: Base
    """What it shares its weights with."""
    model: PreTrainedModel
    """The base's layers with the adapter beside them."""
    tokenizer: PreTrainedTokenizerBase
    """The adapter's, or the base's."""
    alpha: float
    """α."""
    fresh: bool
    """Whether it starts as the base itself: B = 0."""

    @property
    def rank(self) -> int:
        """r."""
        return len(next(iter(_pairs(self.model).values())).a)

    def save(self, folder: Path) -> None:
        """Write adapter (and reward head) in peft's format, and the tokenizer."""
        head = _score(self.model)
        write_adapter(
            folder,
            _pairs(self.model),
            base=_whereabouts(self.base.settings.path),
            revision=self.base.settings.revision,
            alpha=self.alpha,
            transposed=self.base.transposed,
            task="CAUSAL_LM" if head is None else "SEQ_CLS",
            head=None if head is None else head.weight,
        )
        with quiet():
            self.tokenizer.save_pretrained(folder)

    def save_merged(self, folder: Path, *, temperature: float | None = None) -> None:
        """Write a whole model, the adapter added to its weights."""
        pairs, head = _pairs(self.model), _score(self.model)
        own = Adapter(folder=folder, base="", revision=None, rank=self.rank, alpha=self.alpha, layers=pairs, head=None)
        load = load_causal_lm if head is None else load_reward_model  # anew: in a run of bfloat16 the base is rounded
        whole, _ = load(self.base.settings, device=self.base.model.device)
        merge_into(whole, own)
        if head is not None:
            put_head(whole, head.weight)
        save_model(folder, whole, self.tokenizer, temperature=temperature)

    def restore(self, folder: Path) -> None:
        """Put back what :meth:`save` wrote; raises ModelError where it is an adapter of other layers or another rank."""
        _fill(self.model, read_adapter(folder))


def open_adapted(
    settings: ModelSettings,
    lora: LoraSettings,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    reward: bool = False,
) -> Adapted:
    """Open a model and put an adapter beside its layers; where ``settings`` name an adapter's folder, that one learns on.

    Adapters are float32; A is drawn from ``seed`` as peft draws it (uniform, Kaiming), B is 0. With ``reward`` the model is
    a sequence classifier, whose head learns too.

    Raises:
        ModelError: a folder cannot serve, or an adapter does not fit its base.
        ConfigError: the layers or the rank that ``lora`` names cannot be had.
    """
    assert lora.rank is not None
    found = adapter_of(settings)
    whole = settings if found is None else base_of(settings, found)
    if reward:
        model, tokenizer = load_reward_model(whole, seed=seed, device=device, grow=False)
    else:
        model, tokenizer = load_causal_lm(whole, device=device, grow=False)
        if found is not None and found.head is not None:
            raise ModelError(f"{settings.path} is the adapter of a reward model; a language model's is needed")
    layers = linear_layers(model)
    if found is None:
        names, alpha = _chosen(layers, lora), lora.alpha or _ALPHA
    else:
        check_fits(model, layers, found)
        _check_same(lora, found)
        names, alpha = sorted(found.layers), found.alpha
    base = Base(settings=whole, model=plainly(model).requires_grad_(False))  # layers with adapters do not run compiled
    own = twin(model)
    _inject(own, names, lora.rank, alpha, seed=seed)
    if found is not None:
        _fill(own, found)
    head = _score(own)
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return Adapted(base=base, model=own.eval(), tokenizer=tokenizer, alpha=alpha, fresh=found is None)


def adapted_reward_model(base: Base, adapter: Adapter) -> PreTrainedModel:
    """Make the reward model of an adapter's folder on ``base``, a language model, without a second copy of its weights.

    Raises ModelError where the adapter has no head, or does not fit.
    """
    from transformers import AutoModelForSequenceClassification

    if adapter.head is None:
        raise ModelError(f"{adapter.folder} is not a reward model, its head is missing; train one: bridle reward")
    check_fits(base.model, linear_layers(base.model), adapter)
    config = copy.deepcopy(base.model.config)
    config.num_labels = 1
    with torch.device("meta"), quiet():  # a skeleton: its weights are the base's
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, twin(base.model.base_model))
    head = nn.Linear(adapter.head.shape[1], 1, bias=False, device=base.model.device)
    model.score = head
    _inject(model, sorted(adapter.layers), adapter.rank, adapter.alpha, seed=0)
    _fill(model, adapter)
    model.config.architectures = [type(model).__name__]
    return cast("PreTrainedModel", model.eval())


def twin(module: _M) -> _M:
    """A copy of a module that has weights of its own only where they learn; frozen weights and buffers are the same tensors."""
    shared: list[Tensor] = [p for p in module.parameters() if not p.requires_grad]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*shared, *module.buffers())})


def _whereabouts(source: str) -> str:
    """A folder's whole path, so that it is found from anywhere; a hub name as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


def _chosen(layers: Mapping[str, nn.Module], lora: LoraSettings) -> list[str]:
    """Names of the layers to adapt."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    for target in lora.targets:
        if not any(_is_end(target, name) for name in layers):
            raise ConfigError.of("lora.targets", target, f"a linear layer of the model: {', '.join(ends)}")
    names = [name for name in layers if not lora.targets or any(_is_end(target, name) for target in lora.targets)]
    if not names:
        raise ConfigError.of("lora.rank", lora.rank, "a model with linear layers", "leave lora out")
    assert lora.rank is not None
    for name in names:
        least = min(sides(layers[name]))
        if lora.rank > least:
            raise ConfigError.of("lora.rank", lora.rank, f"at most {least}, the smaller side of {name}")
    return names


def _is_end(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_same(lora: LoraSettings, found: Adapter) -> None:
    """Refuse settings other than those of the adapter that goes on learning."""
    whole = f"the adapter in {found.folder}"
    if lora.rank != found.rank:
        raise ConfigError.of("lora.rank", lora.rank, f"{found.rank}, the rank of {whole}")
    if lora.alpha is not None and lora.alpha != found.alpha:
        raise ConfigError.of("lora.alpha", lora.alpha, f"{found.alpha:g}, α of {whole}", "leave it out")
    asked = {name for name in found.layers if any(_is_end(target, name) for target in lora.targets)}
    if lora.targets and asked != set(found.layers):
        raise ConfigError.of("lora.targets", lora.targets, f"the layers of {whole}", "leave it out")


def _inject(model: PreTrainedModel, names: Sequence[str], rank: int, alpha: float, *, seed: int) -> None:
    """Put peft's layers with a new adapter in the place of ``names``; what is frozen stays the same tensors."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=cast("int", alpha), target_modules=list(names), lora_dropout=0.0)
    with warnings.catch_warnings(), torch_rng(seed, "adapter"):
        warnings.simplefilter("ignore")  # that GPT-2's weights are laid the other way, which peft sees for itself
        inject_adapter_in_model(config, model, _NAME)
    if sorted(_adapted(model)) != sorted(names):
        raise ModelError(f"peft adapted other layers of {type(model).__name__} than it was asked to")


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _pairs(model: nn.Module) -> dict[str, LowRank]:
    return {
        name: LowRank(a=layer.lora_A[_NAME].weight.detach(), b=layer.lora_B[_NAME].weight.detach())
        for name, layer in _adapted(model).items()
    }


@torch.no_grad()
def _fill(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give a model's adapter the numbers of a folder's."""
    own = _pairs(model)
    shapes = [{n: (p.a.shape, p.b.shape) for n, p in pairs.items()} for pairs in (own, adapter.layers)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"{adapter.folder} adapts other layers, or at another rank, than the model it is put into")
    for name, pair in adapter.layers.items():
        own[name].a.copy_(pair.a)
        own[name].b.copy_(pair.b)
    head = _score(model)
    if head is not None and adapter.head is not None:
        head.weight.copy_(adapter.head)


def _score(model: nn.Module) -> nn.Linear | None:
    """The head of a reward model; None of a language model."""
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Linear) else None
