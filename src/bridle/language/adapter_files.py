"""Folders of low-rank adapters in peft's format: checked before they are read, read without peft, and written.

An adapter changes a linear layer's weight W into W + (α/r) B A, with A [r, in] and B [out, r]; its folder holds A and B of
every layer, what α, r and the base are, and, for a reward model, the head. Nothing of peft runs on a foreign folder.

Source: Hu et al. 2021, "LoRA", §4.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle.errors import ModelError
from bridle.language.folders import tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CONFIG",
    "LARGEST_ALPHA",
    "WEIGHTS",
    "Adapter",
    "LowRank",
    "check_fits",
    "is_adapter",
    "linear_layers",
    "merge_into",
    "read_adapter",
    "sides",
    "write_adapter",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_RANK = 65_536
"""A rank is at most the smaller side of a layer, and no layer is that wide."""
LARGEST_ALPHA = 1e6
"""α beyond it is a slip: the paper's is of the size of r."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Kinds of numbers that an adapter may hold, as safetensors names them."""
_PREFIX = "base_model.model."
_HEAD = f"{_PREFIX}score.weight"
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
}
"""Settings that may only have these values. Others that change what an adapter means must be off."""
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r"),
    *("target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "loftq_config", "ensure_weight_tying"),
}
"""Settings that say nothing which the tensors do not say, or nothing once training is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What is added to one layer's weight: (α/r) B A."""

    a: Float[Tensor, "r in"]
    """[r, in] A, float32."""
    b: Float[Tensor, "out r"]
    """[out, r] B, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What an adapter's folder holds."""

    folder: Path
    """Where it lies."""
    base: str
    """Folder or hub name of the model that it belongs to."""
    revision: str | None
    """Branch, tag or commit of the base, where that is a hub name."""
    rank: int
    """r ≥ 1, the same in all layers."""
    alpha: float
    """α > 0."""
    layers: Mapping[str, LowRank]
    """By the layers' names in the model."""
    head: Float[Tensor, "1 D"] | None
    """[1, D] the head of a reward model; None for a language model."""

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.rank


def is_adapter(folder: Path) -> bool:
    """Whether a folder says that it holds an adapter; raises ModelError where it says that it is a whole model too."""
    if not (folder / CONFIG).is_file():
        return False
    if (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds both config.json and {CONFIG}: a model or an adapter; take one of them away")
    return True


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder.

    Raises ModelError where it is no plain LoRA adapter, its weights are pickled, not whole, no floating-point numbers, not
    finite, or not pairs of one rank.
    """
    config = _config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        what = f"only pickled weights ({pickled[0]}), which are never opened" if pickled else f"no {WEIGHTS}"
        raise ModelError(f"{folder} holds {what}; save the adapter with safetensors")
    shapes = tensor_shapes(folder / WEIGHTS)
    _require_floats(folder / WEIGHTS)
    rank, alpha = _rank(folder, config), _alpha(folder, config)
    names = sorted({_layer(folder, name) for name in shapes if name != _HEAD})
    if not names:
        raise ModelError(f"{folder / WEIGHTS} holds no adapter; take another copy")
    for name in names:
        a, b = (shapes.get(f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB")
        if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise ModelError(
                f"{folder / WEIGHTS}: {name} has A {_shown(a)} and B {_shown(b)}, expected [{rank}, in] and [out, {rank}] "
                f"as {CONFIG} says"
            )
    tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{folder / WEIGHTS}: {name} holds numbers that are not finite; take another copy")
    pairs = {
        name: LowRank(a=tensors[f"{_PREFIX}{name}.lora_A.weight"], b=tensors[f"{_PREFIX}{name}.lora_B.weight"])
        for name in names
    }
    revision = config.get("revision")
    return Adapter(
        folder=folder,
        base=_base(folder, config),
        revision=revision if isinstance(revision, str) else None,
        rank=rank,
        alpha=alpha,
        layers=pairs,
        head=tensors.get(_HEAD),
    )


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {str(error)[:200]}; take another copy") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is {type(config).__name__}, expected a JSON object; take another copy")
    for name, value in config.items():
        allowed = _PLAIN.get(name)
        if value not in allowed if allowed is not None else bool(value) and name not in _HARMLESS:
            expected = "off" if allowed is None else " or ".join(json.dumps(one) for one in allowed)
            raise ModelError(
                f"{path} says {name[:60]}={json.dumps(value)[:60]}, expected {expected}: only plain LoRA adapters are read"
            )
    if "peft_type" not in config:
        raise ModelError(f'{path} lacks "peft_type"; only plain LoRA adapters are read')
    return config


def _require_floats(path: Path) -> None:
    """Refuse tensors of other numbers: PyTorch casts some to float32 without a word, and others not at all."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            kind = file.get_slice(name).get_dtype()
            if kind not in _FLOATS:
                raise ModelError(
                    f"{path}: {name[:120]} holds {kind}, expected {', '.join(_FLOATS)}; save the adapter anew"
                )


def _rank(folder: Path, config: Mapping[str, Any]) -> int:
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_RANK:
        expected = f"a whole number from 1 to {LARGEST_RANK}"
        raise ModelError(f"{folder / CONFIG} says r={json.dumps(rank)[:60]}, expected {expected}")
    return rank


def _alpha(folder: Path, config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= LARGEST_ALPHA:
        raise ModelError(
            f"{folder / CONFIG} says lora_alpha={json.dumps(alpha)[:60]}, expected a number in (0, {LARGEST_ALPHA:g}]"
        )
    return float(alpha)


def _base(folder: Path, config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / CONFIG} names no base; write the model's folder or hub name into base_model_name_or_path"
        )
    return base


def _layer(folder: Path, name: str) -> str:
    """The layer that a tensor belongs to."""
    for end in (".lora_A.weight", ".lora_B.weight"):
        if name.startswith(_PREFIX) and name.endswith(end):
            return name.removeprefix(_PREFIX).removesuffix(end)
    raise ModelError(f"{folder / WEIGHTS} holds {name[:120]!r}, which is no part of a plain LoRA adapter")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that may carry an adapter: linear ones of the backbone, by name; not the head, nor what shares its weight."""
    from transformers.pytorch_utils import Conv1D

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inside = {id(module) for module in model.base_model.modules()}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module) in inside
        and id(module.weight) not in tables
        and module is not head
    }


def merge_into(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add (α/r) B A to the weights of ``model``, in place; raises ModelError where the adapter does not fit it."""
    layers = linear_layers(model)
    check_fits(model, layers, adapter)
    with torch.no_grad():
        for name, pair in adapter.layers.items():
            weight: Tensor = layers[name].weight  # type: ignore[assignment]
            change = adapter.scaling * (pair.b @ pair.a)
            weight.add_((change if isinstance(layers[name], nn.Linear) else change.T).to(weight))


def check_fits(model: PreTrainedModel, layers: Mapping[str, nn.Module], adapter: Adapter) -> None:
    """Refuse an adapter that belongs to another model."""
    for name, pair in adapter.layers.items():
        layer = layers.get(name)
        if layer is None:
            raise ModelError(f"{adapter.folder} adapts {name[:120]!r}, and {adapter.base} has no such linear layer")
        wanted, own = (len(pair.b), pair.a.shape[1]), sides(layer)
        if wanted != own:
            raise ModelError(
                f"{adapter.folder} adapts {name} as {list(wanted)}, and in {adapter.base} it is {list(own)}; "
                "an adapter needs the base that it was trained on"
            )
    if adapter.head is not None and adapter.head.shape != (1, model.config.get_text_config().hidden_size):
        raise ModelError(
            f"{adapter.folder}: score.weight has shape {list(adapter.head.shape)}, which is no reward head"
        )


def sides(layer: nn.Module) -> tuple[int, int]:
    """Numbers out of and into a linear layer."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


def write_adapter(
    folder: Path,
    layers: Mapping[str, LowRank],
    *,
    base: str,
    revision: str | None,
    alpha: float,
    transposed: bool,
    task: Literal["CAUSAL_LM", "SEQ_CLS"],
    head: Float[Tensor, "1 D"] | None = None,
) -> None:
    """Write A and B of each layer, and what they are, as ``peft.PeftModel.from_pretrained`` reads them.

    ``transposed`` says that the base's weights are laid [in, out], as GPT-2's are. A rank comes from A's shape.
    """
    tensors = {} if head is None else {_HEAD: head.detach().cpu().contiguous()}
    for name, pair in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.b.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": len(next(iter(layers.values())).a),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": sorted(layers),  # whole names, so that no other layer of a like name is taken
        "modules_to_save": None if head is None else ["score"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
