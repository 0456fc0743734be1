"""What a PPO run asks and who judges it: read, encoded and imported before any weights are, so that mistakes come first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bridle.errors import ConfigError, DataError
from bridle.language.collect import PromptTokens
from bridle.language.data import DataSettings
from bridle.language.descriptions import Description, describe_causal_lm
from bridle.language.prompts import DemonstrationMix, load_mix, load_prompts
from bridle.language.roles import check_critic
from bridle.language.scorers import Functions, check_judge, open_functions

if TYPE_CHECKING:
    from bridle.jobs.ppo import PPOConfig

__all__ = ["Asked", "data_of", "open_prompts", "read_asked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked and who judges it: all that can be read before weights are."""

    described: Description
    """The model, by its own account."""
    prompts: list[PromptTokens]
    """What is learnt from."""
    held_out: list[PromptTokens]
    """What is only answered."""
    mix: DemonstrationMix | None
    """Demonstrations beside them."""
    functions: Functions
    """The judges that are functions."""
    longest: int
    """[tokens] the longest prompt with the longest answer."""
    notes: tuple[str, ...]
    """One line each on what was left out."""


def data_of(config: PPOConfig) -> dict[str, DataSettings]:
    """Return what the settings name to be read: setting → where it is."""
    found = {"prompts.path": config.prompts}
    if config.evaluation.path is not None:
        found["evaluation.path"] = replace(
            config.prompts, path=config.evaluation.path, limit=config.evaluation.held_out
        )
    if config.mix.path is not None:
        found["mix.path"] = DataSettings(path=config.mix.path)
    return found


def read_asked(config: PPOConfig) -> Asked:
    """Read the data, what the models' folders say, and the judges' modules; no weights.

    Raises UserError for the first of them that cannot serve.
    """
    described = describe_causal_lm(config.model, grow=config.lora.rank is None)
    prompts, held_out, notes = open_prompts(config, described)
    longest = max(len(prompt.ids) for prompt in (*prompts, *held_out)) + config.sampling.max_new_tokens
    mix = load_mix(config.mix, described)
    check_critic(config.critic, config.reward.model, described.tokenizer)
    check_judge(config.reward, described.tokenizer, longest)
    functions = open_functions(config.reward, config.evaluation.gold)
    functions.require({name for prompt in (*prompts, *held_out) for name in prompt.columns})
    return Asked(
        described=described,
        prompts=prompts,
        held_out=held_out,
        mix=mix,
        functions=functions,
        longest=longest,
        notes=notes,
    )


def open_prompts(
    config: PPOConfig, described: Description
) -> tuple[list[PromptTokens], list[PromptTokens], tuple[str, ...]]:
    """Read the prompts to learn from, the held-out ones, and notes on what was left out."""
    prompts, notes = load_prompts(config.prompts, described, config.sampling.max_new_tokens)
    kept = config.evaluation.held_out
    if config.evaluation.path is not None:
        held_out, more = load_prompts(data_of(config)["evaluation.path"], described, config.sampling.max_new_tokens)
        return prompts, held_out, notes + more
    if len(prompts) <= kept:
        expected = f"fewer than the {len(prompts)} prompts of {config.prompts.path}"
        remedy = "set evaluation.path, or a smaller evaluation.held_out"
        raise ConfigError.of("evaluation.held_out", kept, expected, remedy)
    held_out = prompts[-kept:]
    apart = {tuple(prompt.ids.tolist()) for prompt in held_out}
    training = [prompt for prompt in prompts[:-kept] if tuple(prompt.ids.tolist()) not in apart]
    if not training:
        raise DataError(f"{config.prompts.path}: no prompt is left to learn from that is not also held out; add others")
    same = len(prompts) - kept - len(training)
    if same:
        notes += (f"{config.prompts.path}: {same} prompts are also held out, so they are not learnt from",)
    return training, held_out, notes
