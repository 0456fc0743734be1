"""The public API: a name that appears, disappears or changes its arguments changes this file, and so is decided on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import bridle

NAMES = [
    "Batch",
    "BridleError",
    "Evaluation",
    "Policy",
    "Run",
    "TrainingError",
    "Trajectories",
    "Units",
    "UserError",
    "__version__",
    "load_policy",
    "train",
]

SIGNATURES = {
    "core.returns": {
        "td_residuals": "rewards, values, next_values, terminated, *, gamma, mask=None",
        "gae": "rewards, values, next_values, terminated, truncated, *, gamma, lam, mask=None",
        "lambda_returns": "rewards, values, next_values, terminated, truncated, *, gamma, lam, mask=None",
        "n_step_returns": "rewards, next_values, terminated, truncated, *, gamma, n, mask=None",
        "discounted_returns": "rewards, next_values, terminated, truncated, *, gamma, mask=None",
    },
    "core.losses": {
        "importance_ratio": "logp, old_logp",
        "policy_gradient_loss": "logp, advantages",
        "ratio_loss": "logp, old_logp, advantages",
        "clipped_surrogate_loss": "logp, old_logp, advantages, *, clip=0.2, clip_high=None, dual_clip=None",
        "value_loss": "values, returns",
        "clipped_value_loss": "values, old_values, returns, *, clip",
        "sft_loss": "logp",
        "pairwise_loss": "chosen, rejected, *, margin=None, centering=0.0",
        "listwise_loss": "scores, *, mask=None",
    },
    "core.divergence": {
        "kl_k1": "logp, ref_logp",
        "kl_k2": "logp, ref_logp",
        "kl_k3": "logp, ref_logp",
        "exact_kl": "logits, ref_logits",
    },
    "core.logprobs": {
        "logprobs_from_logits": "logits, targets, *, temperature=1.0",
        "entropy_from_logits": "logits, *, temperature=1.0",
    },
    "core.moments": {
        "masked_mean": "x, mask=None, dim=None",
        "masked_var": "x, mask=None, dim=None",
        "whiten": "x, mask=None, *, dim=None, shift=True",
    },
    "core.diagnostics": {
        "clip_fraction": "ratio, advantages, *, clip, clip_high=None, mask=None",
        "effective_sample_size": "ratio, mask=None",
        "explained_variance": "values, returns, mask=None",
        "log_prob_gap": "a, b, mask=None",
        "ratio_extremes": "ratio, mask=None",
    },
    "control": {
        "load_policy": "path, *, build=None, observation_space=None, action_space=None",
        "make_world": "env, settings",
        "evaluate": "world, policy, moments, *, episodes, deterministic, seed, step=0, max_steps=20000",
        "Agent.act": "self, observation, *, mask=None, draws=None",
        "Agent.session": "self, *, draws=None",
    },
    "jobs.control": {
        "run": "config, *, resume=False, force=False, world=None",
        "train": "env, *, preset='auto', resume=False, force=False, **settings",
        "default_config": "env, *, preset='auto', algorithm='ppo', world=None",
    },
    "runs": {
        "Run.create": "path, job, config, *, resolved=None, depends=None",
        "Run.open": "path, *, write=False",
        "Run.record": "self, step, metrics",
        "Run.checkpoint": "self, step",
        "Run.export": "self, name",
        "Run.metrics": "self",
    },
}
"""Arguments of the public functions, without their annotations."""


def arguments(function: object) -> str:
    assert callable(function)
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))[1:-1]


def test_the_names_of_the_package_are_these() -> None:
    assert bridle.__all__ == NAMES
    assert dir(bridle) == sorted(NAMES)
    for name in NAMES:
        assert getattr(bridle, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'PPO'"):
        _ = bridle.PPO  # type: ignore[attr-defined]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SIGNATURES.items() for name in names])
def test_public_functions_take_these_arguments(module: str, name: str) -> None:
    found: object = import_module(f"bridle.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    assert arguments(found) == SIGNATURES[module][name]


def test_every_loss_has_its_gradient() -> None:
    for module in ("core.losses", "core.divergence"):
        names = set(import_module(f"bridle.{module}").__all__)
        losses = {name for name in names if name.endswith(("_loss", "_ratio", "_k1", "_k2", "_k3", "exact_kl"))}
        assert losses
        assert {f"{name}_grad" for name in losses} <= names


def test_a_few_lines_train_an_agent_and_another_process_lets_it_act(tmp_path: Path) -> None:
    program = """
import bridle, gymnasium
agent = bridle.train(
    "CartPole-v1", total_steps=256, ppo={"epochs": 1}, evaluation={"final_episodes": 5},
    run={"dir": "first", "quiet": True, "threads": 1},
)
env = gymnasium.make("CartPole-v1")
print(agent.act(env.reset(seed=1)[0]))
"""
    again = """
import sys, bridle, gymnasium
agent = bridle.load_policy("first/policy")
env = gymnasium.make("CartPole-v1")
observation, done, total = env.reset(seed=1)[0], False, 0.0
print(agent.act(observation))
while not done:
    observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
    total, done = total + reward, terminated or truncated
assert total >= 8, total
assert "transformers" not in sys.modules
"""
    said = [
        subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        for lines in (program, again)
    ]
    assert said[0] == said[1]


def test_the_version_is_the_installed_one() -> None:
    command = [sys.executable, "-c", "from importlib.metadata import version; print(version('bridle'))"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == bridle.__version__
