"""Which kind of model a folder holds, by its own account: a causal language model, or a classifier that scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridle.errors import ModelError
from bridle.language.adapter_files import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["is_classifier", "require_decoder", "require_language_head", "require_one_output"]


def require_decoder(config: PreTrainedConfig, path: str) -> None:
    """Refuse a model that is no causal language model by its own account; raises ModelError."""
    if config.is_encoder_decoder:
        raise ModelError(f"{path} is an encoder-decoder ({config.model_type}); a causal model is needed")
    if is_classifier(config):
        raise ModelError(f"{path} is a reward model or another classifier; a causal language model is needed")


def require_language_head(adapter: Adapter, path: str) -> None:
    """Refuse the adapter of a reward model where a language model's is needed; raises ModelError."""
    if adapter.head is not None:
        raise ModelError(f"{path} is the adapter of a reward model; a language model's is needed")


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether the model is a sequence classifier, as reward models are, by its own account."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def require_one_output(config: PreTrainedConfig, path: str) -> None:
    """Refuse a classifier that gives more than one number; raises ModelError."""
    if is_classifier(config) and config.num_labels != 1:
        raise ModelError(f"{path} is a classifier with {config.num_labels} outputs; a reward model has one")
