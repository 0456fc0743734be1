"""What a model's folder says before its weights are read: its words, its context, what ends an answer.

With that, every record can be encoded and every mistake in it told while nothing heavy has been opened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bridle.errors import ConfigError, ModelError
from bridle.language.data import Encoder
from bridle.language.kinds import is_classifier, require_decoder, require_language_head, require_one_output
from bridle.language.models import (
    ModelSettings,
    adapter_of,
    base_of,
    check_reward_padding,
    checked_source,
    context_length,
    fitted_rows,
    load_tokenizer,
    one_line,
    stop_ids,
    stops_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Description", "describe_causal_lm", "describe_reward_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A model by its own account; make it with :func:`describe_causal_lm` or :func:`describe_reward_model`."""

    source: str
    """its folder or hub name."""
    config: PreTrainedConfig
    """its config.json."""
    tokenizer: PreTrainedTokenizerBase
    """its tokenizer, completed as the settings say."""
    stops: tuple[int, ...]
    """ids that end an answer, the trained one first."""
    scores: bool
    """whether it is a reward model, with a head of its own."""

    def room(self, asked: int | None, setting: str = "max_tokens") -> int | None:
        """Return the longest sequence to learn from, [tokens]; raises ConfigError for more than the context."""
        if asked is not None and self.context is not None and asked > self.context:
            raise ConfigError.of(setting, asked, f"at most the model's context of {self.context} tokens")
        return asked or self.context

    @property
    def encoder(self) -> Encoder:
        """What turns records into its token ids."""
        return Encoder.of(self.tokenizer, self.stops)

    @property
    def context(self) -> int | None:
        """[tokens] the longest sequence that it was made for; None where it sets no bound."""
        return context_length(self.config)

    def require_like(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that, once open, ends its answers otherwise than its folder said; raises ModelError."""
        stops = stop_ids(model, tokenizer)
        if stops != self.stops:
            raise ModelError(
                f"{self.source} ends its answers with the ids {list(stops)} and its folder says {list(self.stops)}; "
                "write eos_token_id into its generation_config.json"
            )


def describe_causal_lm(settings: ModelSettings, *, grow: bool = True) -> Description:
    """Read what a causal language model's folder says; the weights' headers are looked at, the weights are not.

    Of an adapter's folder that is what its base says, with the adapter's own tokenizer; ``grow`` as in
    :func:`~bridle.language.models.load_causal_lm`. Raises ModelError as that does, as far as it can be told from there.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    adapter = adapter_of(settings)
    if adapter is not None:
        require_language_head(adapter, settings.path)
        return replace(describe_causal_lm(base_of(settings, adapter), grow=False), source=settings.path)
    source, config, tokenizer, rows = _described(settings, grow=grow)
    require_decoder(config, settings.path)
    with one_line(settings.path, "model", "check the folder, or take another copy"):
        try:
            generation = GenerationConfig.from_pretrained(source, revision=settings.revision or "main")
        except OSError:  # it has none of its own: transformers makes one of config.json as it is written
            written, _ = PreTrainedConfig.get_config_dict(source, revision=settings.revision or "main")
            generation = GenerationConfig.from_model_config(written)
    stops = stops_of(generation.eos_token_id, tokenizer, rows)
    return Description(source=settings.path, config=config, tokenizer=tokenizer, stops=stops, scores=False)


def describe_reward_model(settings: ModelSettings, *, grow: bool = True) -> Description:
    """The same of a sequence classifier with one output, or of the causal model that one is made from."""
    adapter = adapter_of(settings)
    if adapter is not None:
        found = describe_reward_model(base_of(settings, adapter), grow=False)
        return replace(found, source=settings.path, scores=found.scores or adapter.head is not None)
    _, config, tokenizer, rows = _described(settings, grow=grow)
    check_reward_padding(tokenizer)
    require_one_output(config, settings.path)
    stops = stops_of(None, tokenizer, rows)
    return Description(
        source=settings.path, config=config, tokenizer=tokenizer, stops=stops, scores=is_classifier(config)
    )


def _described(settings: ModelSettings, *, grow: bool) -> tuple[str, PreTrainedConfig, PreTrainedTokenizerBase, int]:
    from transformers import AutoConfig

    source = checked_source(settings)
    tokenizer = load_tokenizer(settings)
    with one_line(settings.path, "model", "check the folder, or take another copy"):
        config = AutoConfig.from_pretrained(source, revision=settings.revision, trust_remote_code=False)
        rows = int(config.get_text_config().vocab_size)
    return source, config, tokenizer, fitted_rows(rows, tokenizer, settings, grow=grow)
