"""Where the time and the memory of one PPO step go: 64 prompts of 32 tokens, 64 new ones, 4 epochs, four models.

    python bench/training_step.py [260K] [15M] [--dtype bfloat16] [--rounds 3] [--critic trunk] [--parts]

Actor, critic, reference and reward model have a backbone each, unless the critic is a head on the trunk. Prints the
processor seconds of each part, the peak of memory above what the models' weights need, and the share of the machine's
matrix-product rate. One model a process, since the peak is the process's.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from bridle.core.moments import Moments
from bridle.language.attention import attend_narrowly
from bridle.language.backbones import join_layers
from bridle.language.causal import CausalModel
from bridle.language.collect import PromptTokens, collect
from bridle.language.policy import LanguagePolicy, critic_from_actor, value_head
from bridle.language.prepare import prepare
from bridle.language.quickening import quicken
from bridle.language.sampler import SamplingSettings
from bridle.language.sampler.serving import embedded_sampler
from bridle.language.scorers import RewardModelScorer
from bridle.language.shaping import KLSettings, ShapingSettings
from bridle.learn import ppo
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.random import generator, torch_rng

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def actor_of(name: str) -> Any:
    if name == "260K":
        return AutoModelForCausalLM.from_pretrained(DATA / "models" / "stories260K").eval()
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
    )
    with torch_rng(0, "bench-model"):
        return LlamaForCausalLM(config).eval()


def judge_of(actor: Any) -> Any:
    config = copy.deepcopy(actor.config)
    config.num_labels = 1
    with torch_rng(1, "bench-judge"):
        judge = LlamaForSequenceClassification(config)
    judge.model.load_state_dict(actor.base_model.state_dict())
    return judge.eval().requires_grad_(False)


def prompts_of(vocabulary: int, count: int, length: int) -> list[PromptTokens]:
    draws = generator(0, "bench.prompts")
    ids = [torch.from_numpy(draws.integers(3, vocabulary, length)) for _ in range(count)]
    return [PromptTokens(ids=one, text=str(i), columns={}) for i, one in enumerate(ids)]


class Step:
    """One PPO step, part by part."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        network = actor_of(name)
        if not options.plain:
            join_layers(quicken(attend_narrowly(network)))
        actor = CausalModel(network)
        critic: Any = value_head(actor.width) if options.critic == "trunk" else critic_from_actor(network)
        self.reference = copy.deepcopy(actor).requires_grad_(False)
        self.policy = LanguagePolicy(
            actor, critic, temperature=1.0, reference=self.reference, compute_dtype=getattr(torch, options.dtype)
        ).eval()
        judge = judge_of(network)
        self.scorer = RewardModelScorer(judge if options.plain else join_layers(quicken(judge)))
        self.sampler = embedded_sampler(
            actor, (), value_head=critic if options.critic == "trunk" else None, computing=self.policy.computing
        )
        groups = [
            Group(name="actor", parameters=dict(actor.named_parameters()), settings=OptimSettings(lr=1e-5)),
            Group(name="critic", parameters=dict(critic.named_parameters()), settings=OptimSettings(lr=1e-5)),
        ]
        self.optimiser = Optimiser(groups, total_steps=100)
        self.prompts = prompts_of(network.config.vocab_size, options.prompts, 32)
        self.sampling = SamplingSettings(max_new_tokens=options.new)
        self.settings = PPOSettings(epochs=4, minibatches=options.minibatches, micro_batch_tokens=options.budget)
        self.step = 0

    def collect(self) -> list[Any]:
        return collect(
            self.sampler,
            self.scorer,
            lambda ids: "",
            self.prompts,
            self.sampling,
            answers_per_prompt=1,
            seed=0,
            stream="rollout",
            step=self.step,
        )

    def prepare(self, episodes: Sequence[Any]) -> Any:
        return prepare(
            episodes,
            self.policy,
            self.reference,
            Moments.empty(),
            shaping=ShapingSettings(),
            kl=KLSettings(where="reward"),
            kl_coefficient=0.05,
            advantage=AdvantageSettings(gamma=1.0, lam=0.95),
            micro_batch_tokens=self.settings.micro_batch_tokens,
        )

    def update(self, prepared: Any) -> list[Any]:
        return list(ppo.update(self.policy, prepared.batch, self.optimiser, self.settings, seed=0, step=self.step))


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="260K")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--critic", default="own")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--plain", action="store_true", help="layers as PyTorch computes them")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    before = peak()
    step = Step(options.model, options)
    print(f"imports {before:.0f} MiB, models {peak() - before:.0f} MiB more")
    for round_ in range(options.rounds):
        step.step += 1
        episodes, collecting, _ = timed(step.collect)
        if round_ == 0:
            print(f"peak after collect +{peak() - before:.0f} MiB")
        prepared, preparing, _ = timed(partial(step.prepare, episodes))
        if round_ == 0:
            print(f"peak after prepare +{peak() - before:.0f} MiB")
        if options.profile and round_ == options.rounds - 1:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CPU]) as found:
                _, updating, _ = timed(partial(step.update, prepared))
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=28, max_name_column_width=40))
        else:
            _, updating, _ = timed(partial(step.update, prepared))
        print(
            f"collect {collecting:.2f} prepare {preparing:.2f} update {updating:.2f} s, peak +{peak() - before:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
