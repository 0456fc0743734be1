"""Models and tokenizers, in and out: folders and hub names to live objects, and back to folders anybody can open.

Weights are read from safetensors only and no code from a model folder is ever run. What transformers would merely
warn about and then get wrong (weights that are missing, a vocabulary smaller than its tokenizer) is an error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from bridle.errors import ConfigError, ModelError
from bridle.language.adapter_files import Adapter, is_adapter, merge_into, read_adapter
from bridle.language.folders import check_folder
from bridle.language.kinds import is_classifier, require_decoder, require_language_head, require_one_output
from bridle.language.quickening import quicken
from bridle.language.rendering import replace_template
from bridle.language.special_tokens import check_reward_padding, tokenizer_notes
from bridle.random import torch_rng

if TYPE_CHECKING:  # importing transformers takes seconds: only the functions that need it do
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelSettings",
    "adapter_of",
    "base_of",
    "check_reward_padding",
    "checked_source",
    "context_length",
    "disable_dropout",
    "fitted_rows",
    "load_causal_lm",
    "load_reward_model",
    "load_tokenizer",
    "one_line",
    "put_head",
    "recompute_layers",
    "save_model",
    "stop_ids",
    "stops_of",
    "tokenizer_notes",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_SOURCE = TypeVar("_SOURCE")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which model to open, and how its tokenizer is to be completed."""

    path: str
    """Folder or hub name of the model, in Hugging Face layout with safetensors weights; or folder of a LoRA adapter."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; by default the model's own."""
    pad_token: str | None = None
    """Padding token; it is added, and the embeddings grow by a row, if the tokenizer does not know it."""
    eos_token: str | None = None
    """Token that ends an answer, if not the tokenizer's own (in chats often '<|im_end|>'); added if unknown."""
    chat_template: Path | None = None
    """File with a Jinja chat template, in place of the tokenizer's own."""
    revision: str | None = None
    """Branch, tag or commit, where the path is a hub name."""

    def __post_init__(self) -> None:
        """Refuse empty names."""
        for name in ("path", "tokenizer", "pad_token", "eos_token"):
            if getattr(self, name) == "":
                remedy = "" if name == "path" else f"leave {name} out to keep the model's own"
                raise ConfigError.of(name, "", "a name", remedy)
        for name in ("pad_token", "eos_token"):
            if any("\ud800" <= c <= "\udfff" for c in getattr(self, name) or ""):
                raise ConfigError.of(name, getattr(self, name), "text in UTF-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings for a block: what matters in them is checked by the callers."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    verbosity, bars, of_hub = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    hub.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(of_hub)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def one_line(source: str, what: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises over a folder or a hub name into a ModelError of one line."""
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:  # what a library raises over a foreign folder has no bound
        if isinstance(error, OSError) and _local(source, "model") is None:
            raise ModelError(
                f"{source} is no folder here, and the hub gives no {what} for it: {_reason(error)}"
            ) from error
        raise ModelError(f"{what} {source} cannot be opened: {_reason(error)}; {remedy}") from error


def _ask_hub(name: str, revision: str | None) -> None:
    """Ask the hub once whether there is such a model, unless it is here already or the hub is not to be asked.

    Without a connection transformers would try for each of a dozen files, several times, for the better part of a minute.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return  # transformers says at once what is missing
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            HfApi().model_info(name, revision=revision, timeout=10)
    except Exception as error:  # of the name, the answer or the connection
        raise ModelError(
            f"{name} is no folder here, and the hub gives no model for it: {_reason(error)}; check the name and the connection"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of what a library says, which is the one about this folder."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:300]
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text


def _local(source: str, role: str) -> Path | None:
    """Return the folder that ``source`` names, None if it is a hub name; refuse a path that leads nowhere."""
    try:
        path = Path(source).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, not to be entered, a loop, nobody's home
        raise ModelError(f"{role} {source[:80]} cannot be reached: {getattr(error, 'strerror', error)}") from error
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{role} {source} is a file; give the folder that holds it")
    here = path.parent != Path() and path.parent.is_dir()  # runs/stf is a slip where runs/ exists
    if source.startswith((".", "~", "/")) or source.count("/") > 1 or here:
        raise ModelError(f"{role} {source}: no such folder; check the path, or give a hub name such as 'owner/name'")
    return None


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Open the tokenizer and complete it: pad token, end-of-answer token and chat template as the settings say.

    Raises ModelError where there is no tokenizer or no readable template.
    """
    from transformers import AutoTokenizer

    source = settings.tokenizer or settings.path
    folder = _local(source, "tokenizer")
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{source} holds no tokenizer (no tokenizer.json); name one with --model.tokenizer FOLDER")
    revision = settings.revision if settings.tokenizer is None else None
    if folder is None and settings.tokenizer is not None:
        _ask_hub(source, revision)
    with one_line(source, "tokenizer", "name another with --model.tokenizer FOLDER"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder or source), revision=revision, trust_remote_code=False)
    if settings.pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": settings.pad_token})
    if settings.eos_token is not None:
        tokenizer.add_special_tokens({"eos_token": settings.eos_token})
    if settings.chat_template is not None:
        replace_template(tokenizer, settings.chat_template)
    return tokenizer


def _load(
    auto: type[_SOURCE], settings: ModelSettings, **kwargs: object
) -> tuple[PreTrainedModel, frozenset[str], frozenset[str]]:
    """Open the weights; also return the parameters the checkpoint lacks and the ones the model has no place for."""
    with one_line(settings.path, "model", "check the folder, or take another copy"):
        model, info = auto.from_pretrained(  # type: ignore[attr-defined]
            checked_source(settings),
            revision=settings.revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused here, by name
            **kwargs,
        )
    if model._hf_peft_config_loaded:  # transformers follows an adapter on the hub to its base by itself, unchecked
        raise ModelError(f"{settings.path} is an adapter on the hub; download it, and name its folder")
    if info["mismatched_keys"]:
        name, held, expected = min(info["mismatched_keys"])
        raise ModelError(
            f"model {settings.path} cannot be opened: {name} has shape {list(held)} where config.json says "
            f"{list(expected)}; take weights and config.json from the same model"
        )
    for name, weight in model.named_parameters():
        low, high = torch.aminmax(weight.detach()) if weight.numel() else (weight.new_zeros(()),) * 2
        if name not in info["missing_keys"] and not bool(low.isfinite() & high.isfinite()):
            raise ModelError(f"{settings.path}: {name} holds numbers that are not finite; take another copy")
    from bridle.language.attention import attend_narrowly  # imports transformers: late, as everywhere here
    from bridle.language.backbones import join_layers

    return (
        join_layers(quicken(attend_narrowly(model))),
        frozenset(info["missing_keys"]),
        frozenset(info["unexpected_keys"]),
    )


def checked_source(settings: ModelSettings) -> str:
    """Return the folder or hub name to load from; refuse a folder without configuration or safetensors weights."""
    folder = _local(settings.path, "model")
    if folder is None:
        _ask_hub(settings.path, settings.revision)
        return settings.path
    check_folder(folder)
    from transformers import AutoConfig

    with one_line(settings.path, "model", "mend its config.json, or take another copy"):
        AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    return str(folder)


def adapter_of(settings: ModelSettings) -> Adapter | None:
    """Return the adapter that the settings' folder holds; None where it is a model, or a hub name.

    Raises ModelError as :func:`bridle.language.adapter_files.read_adapter`.
    """
    folder = _local(settings.path, "model")
    return read_adapter(folder) if folder is not None and is_adapter(folder) else None


def base_of(settings: ModelSettings, adapter: Adapter) -> ModelSettings:
    """Return the settings of an adapter's base, with the adapter's own tokenizer where its folder holds one.

    Raises ModelError where the base is no model, or an adapter too.
    """
    base = replace(settings, path=adapter.base, revision=adapter.revision)
    try:
        folder = _local(adapter.base, "base")
    except ModelError as error:
        raise ModelError(f"adapter {settings.path}: {error}; its adapter_config.json names that base") from error
    if folder is not None and is_adapter(folder):
        raise ModelError(f"adapter {settings.path}: its base {adapter.base} is an adapter too; merge that one first")
    own = settings.tokenizer is None and any((adapter.folder / name).is_file() for name in _TOKENIZER_FILES)
    return replace(base, tokenizer=settings.path) if own else base


def load_causal_lm(
    settings: ModelSettings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    grow: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a causal language model and its tokenizer; the model is in evaluation mode, on ``device``, in ``dtype``.

    An adapter's folder gives its base with the adapter added to the weights. Without ``grow`` tokens that the model has no
    rows for are refused, whoever added them.

    Raises ModelError where the folder is not such a model, lacks weights or has others, or where its vocabulary is
    smaller than the tokenizer's.
    """
    from transformers import AutoModelForCausalLM

    adapter = adapter_of(settings)
    if adapter is not None:
        model, tokenizer = load_causal_lm(base_of(settings, adapter), device=device, dtype=dtype, grow=False)
        require_language_head(adapter, settings.path)
        merge_into(model, adapter)
        return model, tokenizer
    checked_source(settings)
    tokenizer = load_tokenizer(settings)
    with torch_rng(0, "model-load"):  # whatever the checkpoint lacks is refused below
        model, missing, unexpected = _load(AutoModelForCausalLM, settings, dtype=dtype)
    require_decoder(model.config, settings.path)
    if missing:
        raise ModelError(f"{settings.path} lacks weights of {type(model).__name__}: {_some(missing)}")
    if unexpected:
        raise ModelError(
            f"{settings.path} holds weights that {type(model).__name__} has no place for: {_some(unexpected)}; "
            "is it a reward model, or another kind of model?"
        )
    _fit_vocabulary(model, tokenizer, settings, grow=grow)
    return model.to(device), tokenizer


def load_reward_model(
    settings: ModelSettings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    grow: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a sequence classifier with one output; from a causal checkpoint its head is new, drawn from ``seed``.

    An adapter's folder gives its base with the adapter added to the weights, and the adapter's head where it has one.

    Raises ModelError as :func:`load_causal_lm`, and where the tokenizer's padding would make the class read the wrong
    token (see :func:`check_reward_padding`).
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    adapter = adapter_of(settings)
    if adapter is not None:
        whole = base_of(settings, adapter)
        model, tokenizer = load_reward_model(whole, seed=seed, device=device, dtype=dtype, grow=False)
        merge_into(model, adapter)
        if adapter.head is not None:
            put_head(model, adapter.head)
        return model, tokenizer
    source = checked_source(settings)
    tokenizer = load_tokenizer(settings)
    check_reward_padding(tokenizer)
    with one_line(settings.path, "model", "check the folder, or take another copy"):
        config = AutoConfig.from_pretrained(source, revision=settings.revision, trust_remote_code=False)
    classifier = is_classifier(config)
    require_one_output(config, settings.path)
    with torch_rng(seed, "reward-head"):
        model, missing, unexpected = _load(
            AutoModelForSequenceClassification, settings, config=_with_one_label(config), dtype=dtype
        )
    backbone = model.base_model_prefix + "."
    lacking = {name for name in missing if classifier or name.startswith(backbone)}
    foreign = {name for name in unexpected if classifier or name.startswith(backbone)}
    if lacking or foreign:
        what = f"lacks {_some(lacking)}" if lacking else f"holds {_some(foreign)} too many"
        raise ModelError(f"{settings.path} does not fit {type(model).__name__}: it {what}")
    _fit_vocabulary(model, tokenizer, settings, grow=grow)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device), tokenizer


@torch.no_grad()
def put_head(model: PreTrainedModel, head: Tensor) -> None:
    """Give a sequence classifier the head of an adapter's folder; it is a reward model then, whatever its base was."""
    model.score.weight.copy_(head)
    model.config.architectures = [type(model).__name__]


def _with_one_label(config: PreTrainedConfig) -> PreTrainedConfig:
    config.num_labels = 1
    return config


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's eos first (the one trained), then any other of the model's.

    Raises ModelError where there is none: no answer would ever end.
    """
    generation = model.generation_config.eos_token_id if model.can_generate() else None
    return stops_of(generation, tokenizer, model.get_input_embeddings().weight.shape[0])


def stops_of(generation: int | list[int] | None, tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[int, ...]:
    """Return the ids that end an answer, of what generation_config.json says and a vocabulary of ``rows`` tokens."""
    listed = [generation] if isinstance(generation, int) else list(generation or ())
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not all(isinstance(token, int) for token in listed):
        raise ModelError(f"generation_config.json says eos_token_id={generation!r}; expected an id or a list of ids")
    # an id beyond the vocabulary is never sampled
    stops = tuple(dict.fromkeys(int(token) for token in own + listed if 0 <= token < rows))
    if not stops:
        raise ModelError("the tokenizer has no eos token, so no answer would ever end; name one with --model.eos-token")
    return stops


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence the model was made for, in tokens; None where its configuration sets no bound."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    return min(found) if found else None


def disable_dropout(model: nn.Module) -> None:
    """Turn off every dropout, as a module or as a rate kept by a module, so that both modes answer the same.

    With dropout on, the ratio of new to old probabilities is not 1 on the first step.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_layers(model: PreTrainedModel) -> None:
    """Let a model in training mode keep each layer's input alone and run the layer again on the way back.

    Raises ModelError for a family that transformers cannot do this for.
    """
    enable = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )  # its older name
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"{type(model).__name__} cannot recompute its layers; leave recompute out") from error


def fitted_rows(rows: int, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, *, grow: bool) -> int:
    """Return how many rows embeddings of ``rows`` must have for the tokens that the settings added.

    Raises ModelError for a tokenizer that is larger than the model otherwise, and without ``grow`` for any more rows.
    """
    asked = {settings.pad_token, settings.eos_token}
    vocabulary = tokenizer.get_vocab()
    largest = max((index for token, index in vocabulary.items() if token not in asked), default=-1)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer knows ids up to {largest} but the model embeds only {rows}: they do not belong together; "
            "name the right one with --model.tokenizer FOLDER"
        )
    needed = max(rows, 1 + max(map(int, vocabulary.values()), default=-1))
    if needed > rows and not grow:
        raise ModelError(
            f"{settings.path} has no row for the token {tokenizer.convert_ids_to_tokens(needed - 1)!r}, and an adapter cannot "
            "hold one; name a token that the model knows, or add it by a run without lora"
        )
    return needed


def _fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, *, grow: bool
) -> None:
    """Grow the embeddings for tokens that the settings added; refuse a tokenizer larger than the model otherwise."""
    rows = model.get_input_embeddings().weight.shape[0]
    needed = fitted_rows(rows, tokenizer, settings, grow=grow)
    if needed > rows:
        with quiet(), torch_rng(0, "model-resize"):
            model.resize_token_embeddings(needed, mean_resizing=False)
        _fill_new_rows(model, rows)


@torch.no_grad()
def _fill_new_rows(model: PreTrainedModel, old: int) -> None:
    """Give new tokens the mean row: their logit is then the mean logit, so by Jensen their probability is ≤ 1/V."""
    head = model.get_output_embeddings()
    tables = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), head) if layer is not None}
    if head is not None and getattr(head, "bias", None) is not None:
        tables[id(head.bias)] = head.bias
    for table in tables.values():
        table[old:] = table[:old].mean(dim=0)


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, temperature: float | None = None
) -> None:
    """Write model and tokenizer so that transformers' Auto classes open ``folder`` with the same outputs.

    ``temperature`` (> 0) is the τ that a policy was trained at; ``generate`` then samples from softmax(z/τ) by default.
    """
    from transformers import GenerationConfig

    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for name, token in tokens.items():
            setattr(config, name, token)
    if model.can_generate():
        stops = list(stop_ids(model, tokenizer))
        sampling = {} if temperature is None else {"do_sample": True, "temperature": temperature, "top_k": 0}
        tokens["eos_token_id"] = stops[0] if len(stops) == 1 else stops
        model.generation_config = GenerationConfig(**tokens, **sampling)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
