"""Mistakes of ``docs/BAD_INPUT.md`` in settings, alone or together, and in the command line itself."""

from __future__ import annotations

from collections.abc import Iterator

from tests.cli.mistakes import Mistake
from tests.cli.world import EVALUATE, PPO, REWARD, RUN, SFT, UNJUDGED, train

QUICKSTART = ("quickstart", *RUN)
_OF_SFT: dict[str, tuple[str, ...]] = {
    "an option that is no number": (*PPO, "--steps", "many"),
    "NaN": (*PPO, "--ppo.clip", "nan"),
    "batch of 0": (*SFT, "--batch-size", "0"),
    "context of 1": (*SFT, "--max-tokens", "1"),
    "more tokens than the context": (*SFT, "--max-tokens", "999"),
    "holding everything out": (*SFT, "--evaluation.share", "1"),
    "evaluating every 0 steps": (*SFT, "--evaluation.every", "0"),
    "fewer than no samples": (*SFT, "--evaluation.samples", "-1"),
    "checkpoints every 0 steps": (*SFT, "--run.checkpoint-every", "0"),
    "checkpoints every 0 minutes": (*SFT, "--run.checkpoint-minutes", "0"),
    "the best of an unnamed metric": (*SFT, "--run.keep-best", "-"),
    "fewer than no faults": (*SFT, "--run.fault-limit", "-1"),
    "a fault that is to be passed over": (*SFT, "--run.on-fault", "ignore"),
    "keeping no checkpoint": (*SFT, "--run.keep-checkpoints", "0"),
    "keeping every 0th checkpoint": (*SFT, "--run.keep-every", "0"),
    "too many threads": (*SFT, "--run.threads", "100000"),
    "a negative seed": (*SFT, "--run.seed", "-1"),
    "no path of data": (*SFT, "--data.path", ""),
    "reading no rows": (*SFT, "--data.limit", "0"),
    "a negative learning rate": (*SFT, "--optim.lr", "-1"),
    "a warm-up of −1 steps": (*SFT, "--optim.warmup-steps", "-1"),
    "a last learning rate above the first": (*SFT, "--optim.min-lr-share", "2"),
    "negative weight decay": (*SFT, "--optim.weight-decay", "-1"),
    "a decay of 1": (*SFT, "--optim.beta1", "1"),
    "no eps": (*SFT, "--optim.eps", "0"),
    "a gradient norm of 0": (*SFT, "--optim.max-grad-norm", "0"),
    "an answer of no tokens": (*SFT, "--evaluation.sampling.max-new-tokens", "0"),
    "a temperature of 0": (*SFT, "--evaluation.sampling.temperature", "0"),
    "no rows at once": (*SFT, "--evaluation.sampling.rows", "0"),
    "the likeliest 0 tokens": (*SFT, "--evaluation.sampling.top-k", "0"),
    "all but nothing of the probability": (*SFT, "--evaluation.sampling.top-p", "0"),
    "an empty stop string": (*SFT, "--evaluation.sampling.stop-strings", ""),
    "adapters of rank 0": (*SFT, "--lora.rank", "0"),
    "adapters of α = 0": (*SFT, "--lora.rank", "2", "--lora.alpha", "0"),
    "α without adapters": (*SFT, "--lora.alpha", "8"),
    "layers without adapters": (*SFT, "--lora.targets", "q_proj"),
    "adapters on layers without a name": (*SFT, "--lora.rank", "2", "--lora.targets", ""),
    "an empty model name": (*SFT, "--model.path", ""),
    "half a character as the end token": (*SFT, "--model.eos-token", "\udcff"),
}
_OF_REWARD: dict[str, tuple[str, ...]] = {
    "everything held out (reward)": (*REWARD, "--evaluation.share", "1"),
    "one fold": (*REWARD, "--evaluation.folds", "1"),
    "folds and a file": (*REWARD, "--evaluation.folds", "2", "--evaluation.path", "good.jsonl"),
    "evaluating every 0 steps (reward)": (*REWARD, "--evaluation.every", "0"),
    "no passes": (*REWARD, "--epochs", "0"),
    "centering of rankings": (*REWARD, "--kind", "rankings", "--loss.centering", "1"),
    "negative centering": (*REWARD, "--loss.centering", "-1"),
    "forward passes of 0 tokens": (*REWARD, "--loss.micro-tokens", "0"),
    "more tokens than the context (reward)": (*REWARD, "--max-tokens", "999"),
}
_OF_PPO: dict[str, tuple[str, ...]] = {
    "0 steps": (*PPO, "--steps", "0"),
    "0 held out": (*PPO, "--evaluation.held-out", "0"),
    "more minibatches than answers": (*PPO, "--ppo.minibatches", "3"),
    "a second leash": (*PPO, "--ppo.kl-loss", "k2"),
    "one answer to compare": (*UNJUDGED, "--reward.groups", "judges.py:good"),
    "a horizon within a step": (*PPO, "--kl.target", "1", "--kl.horizon", "1", "--prompts-per-step", "5"),
    "warm-up without end": (*PPO, "--critic.warmup-steps", "2"),
    "cutting the tail in training": (*PPO, "--sampling.top-k", "3"),
    "stop strings in training": (*PPO, "--sampling.stop-strings", "x"),
    "0 passes over a rollout": (*PPO, "--ppo.epochs", "0"),
    "0 tokens at once": (*PPO, "--ppo.micro-batch-tokens", "0"),
    "a clip of 0": (*PPO, "--ppo.clip", "0"),
    "a clip of 1": (*PPO, "--ppo.clip", "1"),
    "an upper clip alone": (*PPO, "--ppo.clip", "None", "--ppo.clip-high", "0.3"),
    "a dual clip of 1": (*PPO, "--ppo.dual-clip", "1"),
    "a negative entropy bonus": (*PPO, "--ppo.entropy-coefficient", "-1"),
    "γ above 1": (*PPO, "--advantage.gamma", "1.5"),
    "returns of 0 steps": (*PPO, "--advantage.n", "0"),
    "a critic's λ above 1": (*PPO, "--advantage.critic-lam", "2"),
    "a critic's λ without GAE": (*PPO, "--advantage.critic-lam", "0.5", "--advantage.estimator", "td"),
    "k3 in the reward": (*PPO, "--kl.where", "reward", "--kl.estimator", "k3"),
    "k1 in the loss": (*PPO, "--kl.estimator", "k1"),
    "a negative leash": (*PPO, "--kl.coefficient", "-1"),
    "a target without a leash": (*PPO, "--kl.where", "none", "--kl.target", "1"),
    "an exact KL of no answer": (*PPO, "--kl.exact-share", "0"),
    "an exact KL of more than all": (*PPO, "--kl.exact-share", "1.5"),
    "recomputing a number": (*PPO, "--recompute", "3"),
    "a horizon of 0": (*PPO, "--kl.horizon", "0"),
    "a negative penalty": (*PPO, "--shaping.missing-eos-penalty", "-1"),
    "a penalty for what is bootstrapped": (
        *(*PPO, "--shaping.missing-eos-penalty", "1"),
        *("--shaping.on-length", "bootstrap"),
    ),
    "scores clipped to 0": (*PPO, "--shaping.clip", "0"),
    "negative critic warm-up": (*PPO, "--critic.warmup-steps", "-1"),
    "a reward model that the critic does not use": (*PPO, "--critic.reward-model", "scores"),
    "a critic from no reward model": (*PPO, "--critic.source", "reward"),
    "a mix without a file": (*PPO, "--mix.coefficient", "1"),
    "an empty mix": (*PPO, "--mix.batch", "0"),
    "nobody judges": UNJUDGED,
    "a weight too many": (*PPO, "--reward.weights", "1", "2"),
    "a weight beyond all scores": (*PPO, "--reward.weights", "1e308"),
    "a judge that is given no time": (*PPO, "--reward.judging.timeout", "0"),
    "a judge that is asked fewer than no times": (*PPO, "--reward.judging.retries", "-1"),
    "a judge that is waited for backwards": (*PPO, "--reward.judging.wait", "-1"),
    "a pad token for no reward model": (*PPO, "--reward.pad-token", "x"),
    "the same judge twice": (*UNJUDGED, "--reward.functions", "judges.py:good", "judges.py:good"),
}
_OF_OTHERS: dict[str, tuple[str, ...]] = {
    "0 demonstrations": (*QUICKSTART, "--scale.demonstrations", "0"),
    "more held out than there are": (*QUICKSTART, "--scale.held-out", "1000000"),
    "0 episodes": (*EVALUATE, "--episodes", "0"),
    "a film of 0 episodes": (*EVALUATE, "--video-episodes", "0"),
    "figures onto a file": (*EVALUATE, "--output", "good.jsonl"),
    "figures into no folder": (*EVALUATE, "--output", "nowhere/figures.json"),
    "a judge is missing": ("evaluate", "model", "--prompts", "good.jsonl"),
    "prompts are missing": ("evaluate", "model", "--functions", "judges.py:good"),
    "nothing to evaluate": ("evaluate", "runs/nowhere"),
    "an agent's checkpoint of a language model": (
        *("evaluate", "model", "--prompts", "good.jsonl", "--functions", "judges.py:good", "--checkpoint", "best"),
    ),
}
_OF_CONTROL: dict[str, tuple[str, ...]] = {
    "0 actions": train("CartPole-v1", "--total-steps", "0"),
    "restarts every −1 updates": train("CartPole-v1", "--restart-every", "-1"),
    "half precision for a small agent": train("CartPole-v1", "--run.dtype", "bfloat16"),
    "more minibatches than actions": train("CartPole-v1", "--ppo.minibatches", "99"),
    "more minibatches than memories": train("CartPole-v1", "--ppo.minibatches", "4", "--network.recurrent", "gru"),
    "TRPO with one trunk": train("CartPole-v1", "--algorithm", "trpo", "--network.shared-trunk", "True"),
    "TRPO with a memory": train(
        *("CartPole-v1", "--algorithm", "trpo", "--network.recurrent", "gru"), "--trpo.critic-minibatches", "1"
    ),
    "rewards clipped to less than nothing": train("CartPole-v1", "--clip-rewards", "-1"),
    "fresh advantages for A2C": train("CartPole-v1", "--algorithm", "a2c", "--recompute-advantages"),
    "a falling clip for TRPO": train("CartPole-v1", "--algorithm", "trpo", "--clip-schedule", "linear"),
    "a leash without a reference": train("CartPole-v1", "--ppo.kl-loss", "k2"),
    "a preset that is not there": train("CartPole-v1", "--preset", "CartPol-v1"),
    "an environment is missing": ("train", *RUN),
    "evaluating every −1 updates": train("CartPole-v1", "--evaluation.every", "-1"),
    "two episodes": train("CartPole-v1", "--evaluation.episodes", "2"),
    "episodes of no actions": train("CartPole-v1", "--evaluation.max-steps", "0"),
    "no environments": train("CartPole-v1", "--world.num-envs", "0"),
    "episodes cut at once": train("CartPole-v1", "--world.max-episode-steps", "0"),
    "making anew what shares one process": train("CartPole-v1", "--world.on-death", "restart"),
    "a limit of no deaths": train("CartPole-v1", "--world.death-limit", "0"),
    "a step that takes no time": train("CartPole-v1", "--world.step-timeout", "0"),
    "an autoreset mode for envpool": train(
        "CartPole-v1", "--world.vectorization", "envpool", "--world.autoreset", "disabled"
    ),
    "a wrapper for envpool": train("CartPole-v1", "--world.vectorization", "envpool", "--world.wrappers", "a:B"),
    "an argument without a value": train("CartPole-v1", "--world.kwargs", "gravity"),
    "a wrapper without a module": train("CartPole-v1", "--world.wrappers", "Nothing"),
    "a screen of 0 pixels": train("CartPole-v1", "--world.atari.size", "0"),
    "a layer of no width": train("CartPole-v1", "--network.hidden", "0"),
    "a memory of no width": train("CartPole-v1", "--network.recurrent-width", "0"),
    "two memories": train("CartPole-v1", "--network.recurrent", "gru", "--network.shared-trunk", "False"),
    "a factory without a module": train("CartPole-v1", "--network.factory", "build"),
    "squashing what has no bounds": train(
        "bad_input_worlds:Unbounded-v0", "--network.squash", "--ppo.minibatches", "1"
    ),
    "a negative weight of values": train("CartPole-v1", "--a2c.value-coefficient", "-1"),
    "A2C with 0 tokens at once": train("CartPole-v1", "--a2c.micro-batch-tokens", "0"),
    "0 conjugate gradients": train("CartPole-v1", "--trpo.cg-iterations", "0"),
    "a trust region of nothing": train("CartPole-v1", "--trpo.max-kl", "0"),
    "negative damping": train("CartPole-v1", "--trpo.cg-damping", "-1"),
    "a line search that grows": train("CartPole-v1", "--trpo.line-search-shrink", "2"),
}


def config_mistakes() -> Iterator[Mistake]:
    """Settings that cannot work, and commands that cannot be meant."""
    for what, arguments in {**_OF_SFT, **_OF_REWARD, **_OF_PPO, **_OF_OTHERS, **_OF_CONTROL}.items():
        yield Mistake(group="Settings", what=what, arguments=arguments)
    yield Mistake(group="The command line", what="no command")
    for what, arguments in {
        "a slip in the command": ("pppo",),
        "what it needs is missing": ("ppo",),
        "a path too many": ("resume", "a", "b"),
        "an option that resume has not": ("resume", "--steps"),
        "the runs of a file": ("runs", "good.jsonl"),
    }.items():
        yield Mistake(group="The command line", what=what, arguments=arguments)


__all__ = ["config_mistakes"]
