from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from bridle.cli.main import main
from bridle.control import Observations, compiled, load_policy
from bridle.control.collect import Collector
from bridle.control.evaluate import EvaluationSettings
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.errors import ConfigError, RunError, SamplerMismatch, WorldError
from bridle.jobs.config import from_dict, to_dict
from bridle.jobs.control import Algorithm, ControlConfig, default_config, kind_of, run, train
from bridle.jobs.learner import Learner, Progress
from bridle.jobs.presets import KINDS, PRESETS, merged
from bridle.jobs.session import RunSettings, open_session
from bridle.jobs.sources import of_world
from bridle.learn.a2c import A2CSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.trpo import TRPOSettings
from bridle.runs import Run
from bridle.runs.files import load_tensors
from tests.control import worlds

worlds.register()


def small(path: Path, **changes: Any) -> ControlConfig:
    run_changes = changes.pop("run", {})
    settings = {
        "total_steps": 8 * 64,
        "n_steps": 16,
        "world": WorldSettings(num_envs=4),
        "network": NetworkSettings(hidden=(8,)),
        "ppo": PPOSettings(epochs=2, minibatches=2),
        "evaluation": EvaluationSettings(every=3, episodes=5, final_episodes=6),
        "restart_every": 2,
        "scale_rewards": False,
        "run": RunSettings(
            **{"dir": path, "checkpoint_every": 1, "keep_checkpoints": 99, "threads": 1, "quiet": True, **run_changes}
        ),
        **changes,
    }
    return ControlConfig(**settings)


def metrics(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in Run.open(path).metrics()]


def forget_after(path: Path, step: int) -> None:
    """Leave a run as a crash after ``step``'s checkpoint would have."""
    for checkpoint in Run.open(path).checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    shutil.rmtree(path / "policy")
    events = [line for line in (path / "events.jsonl").read_text().splitlines() if '"finish"' not in line]
    (path / "events.jsonl").write_text("".join(f"{line}\n" for line in events))


def two_with_a_memory(path: Path) -> ControlConfig:
    return small(
        path,
        algorithm="a2c",
        network=NetworkSettings(hidden=(8,), recurrent="gru"),
        world=WorldSettings(num_envs=2),
        total_steps=8 * 32,
        restart_every=3,
        evaluation=EvaluationSettings(every=0, final_episodes=5),
    )


@pytest.fixture(scope="module")
def gru(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(two_with_a_memory(tmp_path_factory.mktemp("gru") / "whole"))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalise_observations": True, "scale_rewards": True},
        {"env": "Pendulum-v1", "normalise_observations": True},
        {"algorithm": "a2c", "n_steps": 1, "total_steps": 32, "env": "BridleTest/Counter-v0"},
        {"algorithm": "trpo", "env": "Pendulum-v1"},
        {"network": NetworkSettings(hidden=(8,), recurrent="lstm"), "normalise_observations": True},
        {"clip_schedule": "linear", "recompute_advantages": True, "ppo": PPOSettings(epochs=3, whiten="minibatch")},
        {"env": "BridleTest/EndlessImage-v0", "clip_rewards": 1.0, "scale_rewards": True},
        {"env": "Pendulum-v1", "scale_rewards": True, "restart_every": 0},
        {"env": "Acrobot-v1", "world": WorldSettings(num_envs=2, vectorization="async", autoreset="next_step")},
    ],
)
def test_a_resumed_run_goes_on_exactly_as_the_uninterrupted_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = run(small(tmp_path / "whole", **changes))
    assert len(metrics(whole)) >= 8
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    forget_after(cut, 5)  # in the middle of episodes: the environments start anew after every second update
    run(small(cut, **changes), resume=True)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (whole / "best" / "best.json").is_file()
    for name in (
        "policy/policy.safetensors",
        "policy/policy.json",
        "best/policy.safetensors",
        "best/best.json",
        "checkpoints/step-8/statistics.safetensors",
        "checkpoints/step-8/optimiser.safetensors",
        "checkpoints/step-8/episodes.safetensors",
    ):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("after", range(1, 8))
def test_a_memory_of_two_environments_resumes_exactly_wherever_its_checkpoint_laid_it(
    tmp_path: Path, after: int, gru: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(gru, cut)
    forget_after(cut, after)
    run(two_with_a_memory(cut), resume=True)
    assert (cut / "metrics.jsonl").read_bytes() == (gru / "metrics.jsonl").read_bytes()
    assert (cut / "policy/policy.safetensors").read_bytes() == (gru / "policy/policy.safetensors").read_bytes()


def test_an_environment_that_its_seed_does_not_determine_is_named_and_forced(tmp_path: Path) -> None:
    config = small(tmp_path / "run", env="BridleTest/Restless-v0", total_steps=256)
    run(config)
    forget_after(tmp_path / "run", 3)
    with pytest.raises(RunError, match=r"Restless-v0: the same seed and actions lead elsewhere .* --force"):
        run(config, resume=True)
    run(config, resume=True, force=True)
    (event,) = [event for event in Run.open(tmp_path / "run").events() if event["kind"] == "forced"]
    assert str(event["text"]).endswith("its episodes start anew")


def test_an_environment_whose_rewards_alone_differ_is_found_out(tmp_path: Path) -> None:
    """Every checkpoint lies at the end of all episodes: what was earned in those before tells."""
    config = small(tmp_path / "run", env="BridleTest/Generous-v0", total_steps=256, restart_every=0)
    run(config)
    forget_after(tmp_path / "run", 3)
    with pytest.raises(RunError, match=r"Generous-v0: the same seed and actions lead elsewhere"):
        run(config, resume=True)


def test_a_class_of_a_notebook_has_no_source_file_and_is_taken_all_the_same() -> None:
    """Asked for its file, Python raises OSError there: a notebook is a __main__ without one."""
    command = (
        "import gymnasium\n"
        "from gymnasium.envs.classic_control.cartpole import CartPoleEnv\n"
        "from bridle.control.making import WorldSettings\n"
        "from bridle.jobs.sources import of_world\n"
        "class Mine(CartPoleEnv): pass\n"
        "gymnasium.register('Mine-v0', entry_point=Mine)\n"
        "assert of_world('Mine-v0', WorldSettings(), None).files == {}\n"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_vector_environment_that_is_also_judged_in_resumes_exactly(tmp_path: Path) -> None:
    def one(folder: Path, *, resume: bool) -> Path:
        return run(small(folder, total_steps=192), resume=resume, world=SyncVectorEnv([worlds.Counter] * 3))

    whole, cut = one(tmp_path / "whole", resume=False), tmp_path / "cut"
    for after in (2, 3):  # an evaluation comes after the third update, and drops the episodes in progress
        shutil.copytree(whole, cut)
        forget_after(cut, after)
        one(cut, resume=True)
        assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert (cut / "policy/policy.safetensors").read_bytes() == (whole / "policy/policy.safetensors").read_bytes()
        shutil.rmtree(cut)


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path: Path) -> None:
    first, again = (run(small(tmp_path / name)) for name in ("first", "again"))
    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    other = run(small(tmp_path / "other", run={"seed": 1}))
    assert (first / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    path = run(small(tmp_path / "run"))
    rows = metrics(path)
    # CartPole's own vector form resets itself in a step of its own, which counts for nothing
    assert rows[0]["actions"] <= 64
    assert rows[-1]["actions"] >= 512 > rows[-2]["actions"]
    for row in rows:
        assert row["sampler_gap_mean"] <= 1e-5
        assert row["sampler_gap_max"] <= 1e-4
        assert row["ratio_min"] <= 1 <= row["ratio_max"]
    assert "evaluation/sampled/return_mean" in rows[2]
    assert "evaluation/sampled/return_mean" not in rows[3]
    final = rows[-1]
    assert final["final/deterministic/episodes"] == final["final/sampled/episodes"] == 6
    assert final["final/sampled/return_ci95"] > 0
    assert rows[0]["lr/policy"] == 1e-3 > final["lr/policy"] > 0
    agent = load_policy(path / "policy")
    env = gymnasium.make("CartPole-v1")
    assert agent.act(env.reset(seed=0)[0]) in (0, 1)


def test_reward_scaling_leaves_the_metrics_in_the_environments_own_rewards(tmp_path: Path) -> None:
    changes = {"env": "BridleTest/Endless-v0", "total_steps": 64}
    path = run(small(tmp_path / "run", scale_rewards=True, **changes))
    assert {row["episode_return_mean"] for row in metrics(path)} == {4.0}


def test_normalised_observations_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    path = run(small(tmp_path / "run", env="Pendulum-v1", normalise_observations=True))
    agent = load_policy(path / "policy")
    assert agent.moments is not None
    assert float(agent.moments.count) == 512
    saved = load_tensors(path / "checkpoints" / "step-8" / "statistics.safetensors")
    assert torch.equal(saved["observations/mean"], torch.as_tensor(agent.moments.mean))
    assert float(np.hypot(*np.asarray(agent.moments.mean)[:2])) < 1  # of (cos, sin)


def test_ppo_learns_where_to_act_in_a_box(tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        env="BridleTest/Target-v0",
        total_steps=6_000,
        n_steps=32,
        world=WorldSettings(num_envs=8, autoreset="same_step"),
        network=NetworkSettings(hidden=(16,), initial_log_std=-0.5),
        ppo=PPOSettings(epochs=4, minibatches=4),
        optim=OptimSettings(lr=1e-2, schedule="linear"),
        evaluation=EvaluationSettings(every=0, final_episodes=20),
        restart_every=0,
    )
    rows = metrics(run(config))
    # the goals lie ±0.5 from the centre in the policy's units: standing in the centre scores −0.32 … −0.41 per episode
    assert rows[0]["episode_return_mean"] < -0.8
    assert rows[-1]["final/deterministic/return_mean"] > -0.01


def test_trpo_learns_where_to_act_in_a_box_and_stays_in_its_region(tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        env="BridleTest/Target-v0",
        algorithm="trpo",
        total_steps=12_000,
        n_steps=32,
        world=WorldSettings(num_envs=8, autoreset="same_step"),
        network=NetworkSettings(hidden=(16,), initial_log_std=-0.5),
        trpo=TRPOSettings(max_kl=0.05),
        optim=OptimSettings(lr=1e-2, schedule="linear"),
        evaluation=EvaluationSettings(every=0, final_episodes=20),
        restart_every=0,
    )
    rows = metrics(run(config))
    assert rows[0]["episode_return_mean"] < -0.8
    assert rows[-1]["final/deterministic/return_mean"] > -0.01
    assert all(0 <= row["trust_region/kl"] <= 0.05 for row in rows)
    assert rows[0]["trust_region/kl"] > 0.03
    assert "lr/critic" in rows[0]
    assert "lr/policy" not in rows[0]


def test_trpo_refuses_a_policy_of_the_users_own_with_one_trunk(tmp_path: Path) -> None:
    network = NetworkSettings(factory=f"{__name__}:with_one_trunk")
    with pytest.raises(ConfigError, match="the critic depends on the actor's parameters"):
        run(small(tmp_path / "run", algorithm="trpo", network=network))
    assert not (tmp_path / "run").exists()


def test_trpo_refuses_images_on_one_trunk_before_it_starts(tmp_path: Path) -> None:
    config = small(tmp_path / "run", algorithm="trpo", env="BridleTest/EndlessImage-v0")
    with pytest.raises(ConfigError, match=r"network\.shared_trunk=None: expected False"):
        run(config)
    assert not (tmp_path / "run").exists()


def with_one_trunk(observations: Any, actions: Any) -> Any:
    from torch import nn

    from bridle.control import ActorCritic, CategoricalHead

    trunk = nn.Sequential(nn.Linear(observations.width, 8), nn.Tanh())
    return ActorCritic(trunk=trunk, actor=nn.Linear(8, actions.width), critic=nn.Linear(8, 1), head=CategoricalHead())


ESTIMATORS = {
    "td": AdvantageSettings(estimator="td", gamma=0.8),
    "n_step": AdvantageSettings(estimator="n_step", n=3, gamma=0.8),
    "gae": AdvantageSettings(estimator="gae", lam=0.9, gamma=0.8),
    "monte_carlo": AdvantageSettings(estimator="monte_carlo", gamma=0.8),
}


@pytest.mark.parametrize(
    ("estimator", "n_steps"),
    [("td", 1), ("td", 8), ("n_step", 8), ("gae", 8), ("monte_carlo", 8)],  # with n_steps=1 all four are "td"
)
def test_actor_critic_values_the_endless_world(tmp_path: Path, estimator: str, n_steps: int) -> None:
    config = small(
        tmp_path / "run",
        env="BridleTest/Endless-v0",
        algorithm="a2c",
        n_steps=n_steps,
        total_steps=1000 if n_steps == 1 else 4800,
        world=WorldSettings(num_envs=4),
        a2c=A2CSettings(value_coefficient=1.0),
        advantage=ESTIMATORS[estimator],
        optim=OptimSettings(lr=0.05),
        evaluation=EvaluationSettings(every=0, final_episodes=5),
        record_every=1000,
        restart_every=0,
        run={},
    )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_every=1000))
    agent = load_policy(run(config) / "policy")
    value = float(agent.policy.values(Observations(vector=torch.ones(1, 1)), None).detach())
    assert value == pytest.approx(5.0, rel=0.05)


def test_a_policy_that_is_stochastic_outside_its_distribution_ends_the_run(tmp_path: Path) -> None:
    network = NetworkSettings(factory=f"{__name__}:with_dropout")
    with pytest.raises(SamplerMismatch, match="dropout"):
        run(small(tmp_path / "run", network=network))


def with_dropout(observations: Any, actions: Any) -> Any:
    from torch import nn

    from bridle.control import ActorCritic, CategoricalHead

    actor = nn.Sequential(nn.Linear(observations.width, 16), nn.Dropout(0.5), nn.Linear(16, actions.width))
    return ActorCritic(actor=actor, critic=nn.Linear(observations.width, 1), head=CategoricalHead())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_steps": 1, "ppo": PPOSettings(minibatches=2)}, "ppo.minibatches=2"),
        ({"run": {"dtype": "bfloat16"}}, "run.dtype='bfloat16'"),
        ({"ppo": PPOSettings(minibatches=1, kl_loss="k2")}, "ppo.kl_loss='k2'"),
        ({"restart_every": -1}, "restart_every=-1"),
        ({"clip_rewards": 0.0}, "clip_rewards=0.0"),
        ({"recompute_advantages": True, "algorithm": "a2c"}, "recompute_advantages=True"),
        ({"clip_schedule": "linear", "algorithm": "trpo"}, "clip_schedule='linear'"),
        ({"clip_schedule": "linear", "ppo": PPOSettings(clip=None)}, "clip_schedule='linear'"),
        ({"algorithm": "trpo", "network": NetworkSettings(recurrent="gru")}, "network.recurrent='gru'"),
        ({"algorithm": "trpo", "n_steps": 1}, "trpo.critic_minibatches=4"),
        (
            {"ppo": PPOSettings(minibatches=5), "network": NetworkSettings(recurrent="gru")},
            "minibatches=5: .* at most 4",
        ),
        ({"algorithm": "trpo", "network": NetworkSettings(shared_trunk=True)}, "network.shared_trunk=True"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small(tmp_path / "run", **changes)


def test_a_world_that_raises_leaves_no_empty_run(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="battery"):
        run(small(tmp_path / "run", env="BridleTest/Raises-v0"))
    assert not (tmp_path / "run").exists()


def test_the_config_survives_json(tmp_path: Path) -> None:
    config = small(tmp_path / "run", network=NetworkSettings(hidden=(3, 4)))
    assert from_dict(ControlConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_the_best_policy_is_the_last_with_the_highest_evaluation(tmp_path: Path) -> None:
    path = run(
        small(tmp_path / "run", total_steps=256, evaluation=EvaluationSettings(every=1, episodes=5, final_episodes=5))
    )
    found = [
        (row.get("evaluation/deterministic/return_mean", row.get("final/deterministic/return_mean")), row["step"])
        for row in metrics(path)
    ]
    best = json.loads((path / "best" / "best.json").read_text())
    assert (best["return_mean"], best["step"]) == max(found)
    assert load_policy(path / "best").policy is not None


def test_a_resume_puts_the_best_policy_of_its_checkpoint_back(tmp_path: Path) -> None:
    whole = run(small(tmp_path / "run", evaluation=EvaluationSettings(every=2, episodes=5, final_episodes=5)))
    then = (whole / "checkpoints" / "step-4" / "best" / "best.json").read_text()
    assert json.loads(then)["step"] <= 4
    forget_after(whole, 4)
    (whole / "best" / "best.json").write_text('{"of": "a future that is forgotten"}')
    config = from_dict(ControlConfig, Run.open(whole).config)
    learner = learner_of(config)
    sources = of_world(config.env, config.world, None)
    with open_session("control", config, config.run, sources=sources, resume=True) as session:
        learner.restore(session)
        assert (whole / "best" / "best.json").read_text() == then


def learner_of(config: ControlConfig) -> Learner:
    world = make_world(config.env, config.world)
    world.close()
    return Learner(config, build_policy(world.observations, world.actions, config.network, seed=0), world)


def test_the_clip_falls_with_the_actions_taken(tmp_path: Path) -> None:
    ppo = PPOSettings(minibatches=2, clip=0.2, clip_high=0.3)
    learner = learner_of(small(tmp_path, clip_schedule="linear", ppo=ppo))
    seen = []
    for actions in (0, 128, 384):
        learner.progress = Progress(actions=actions)
        settings = learner.ppo_settings()
        seen.append((settings.clip, settings.clip_high))
    assert np.allclose(seen, [(0.2, 0.3), (0.15, 0.225), (0.05, 0.075)])


def test_what_is_learned_from_is_clipped_and_what_is_recorded_is_not(tmp_path: Path) -> None:
    changes = {"env": "BridleTest/Counter-v0", "total_steps": 64, "clip_rewards": 1.0}
    path = run(small(tmp_path / "run", **changes))
    assert max(row["episode_return_mean"] for row in metrics(path)) > 10
    learner = learner_of(small(tmp_path, **changes))
    collector = Collector(make_world("BridleTest/Counter-v0", WorldSettings(num_envs=4)), 8)
    collector.restart(seed=0, step=1)
    learnt = learner.learnt_rewards(collector.collect(learner.policy, None, seed=0, step=1))
    assert learnt is not None
    assert learnt.abs().max() == 1


def test_recomputed_advantages_change_what_follows_the_first_epoch(tmp_path: Path) -> None:
    found = {}
    for epochs in (1, 2):
        for again in (False, True):
            ppo = PPOSettings(epochs=epochs, minibatches=2)
            path = run(small(tmp_path / f"{epochs}{again}", total_steps=64, recompute_advantages=again, ppo=ppo))
            found[epochs, again] = (path / "policy" / "policy.safetensors").read_bytes()
    assert found[1, True] == found[1, False]
    assert found[2, True] != found[2, False]


def test_the_target_kl_ends_an_update_also_where_advantages_are_recomputed(tmp_path: Path) -> None:
    ppo = PPOSettings(epochs=6, minibatches=2, target_kl=1e-4)
    for again in (False, True):
        changes = {"optim": OptimSettings(lr=0.05), "total_steps": 64, "recompute_advantages": again, "ppo": ppo}
        row = metrics(run(small(tmp_path / str(again), **changes)))[0]
        assert row["stopped_by_target_kl"] == 1
        assert row["optimiser_steps"] < 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, *PRESETS])
def test_every_preset_is_a_config(kind: str, name: str | None) -> None:
    changes = merged(KINDS[kind], {} if name is None else PRESETS[name])
    config = from_dict(ControlConfig, merged(to_dict(ControlConfig()), changes))
    actions = config.n_steps * config.world.num_envs
    assert actions % config.ppo.minibatches == 0
    assert actions // config.ppo.minibatches >= 16


@pytest.mark.parametrize("algorithm", ["a2c", "trpo"])
@pytest.mark.parametrize("env", [*PRESETS])
def test_a_row_of_the_table_stops_no_other_algorithm(env: str, algorithm: Algorithm) -> None:
    config = default_config("BridleTest/Target-v0", preset=env, algorithm=algorithm)
    assert (config.algorithm, config.clip_schedule, config.recompute_advantages) == (algorithm, "constant", False)
    assert config.optim == default_config("BridleTest/Target-v0", preset=env).optim


def test_another_algorithm_trains_from_the_settings_of_an_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"total_steps": 64, "n_steps": 8, "evaluation": {"final_episodes": 5}}
    for algorithm in ("a2c", "trpo"):
        made = tmp_path / algorithm
        train("CartPole-v1", algorithm=algorithm, **few, run={"dir": made, "threads": 1})
        assert (" | KL " in capsys.readouterr().err) == (algorithm == "trpo")
        kept = from_dict(ControlConfig, Run.open(made).config)
        assert (kept.algorithm, kept.preset, kept.advantage.gamma) == (algorithm, "CartPole-v1", 0.98)


def test_what_an_environment_starts_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_config("CartPole-v1").advantage.gamma == 0.98
    assert default_config("CartPole-v1").run.dir == Path("runs/CartPole-v1")
    (tmp_path / "runs" / "CartPole-v1").mkdir(parents=True)
    assert default_config("CartPole-v1").run.dir == Path("runs/CartPole-v1-2")
    assert default_config("CartPole-v1", preset="none").advantage == AdvantageSettings()
    assert default_config("BridleTest/Target-v0").preset == "box"
    assert default_config("BridleTest/Target-v0").normalise_observations
    assert default_config("BridleTest/Endless-v0").preset == "vector"
    assert default_config("BridleTest/Endless-v0", preset="Hopper-v5").ppo.minibatches == 32
    assert kind_of("ALE/Pong-v5", WorldSettings()) == "atari"
    dying = WorldSettings(vectorization="async", on_death="restart")
    assert default_config("BridleTest/Endless-v0", world=dying).preset == "vector"
    with pytest.raises(ConfigError, match="did you mean Hopper-v5"):
        default_config("BridleTest/Endless-v0", preset="Hoper-v5")


def test_a_run_says_that_compiled_code_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "library", None)
    few = {"total_steps": 8, "n_steps": 8, "evaluation": {"final_episodes": 5}}
    train("CartPole-v1", preset="none", **few, run={"dir": tmp_path / "run", "threads": 1})
    assert "python -m bridle.native.compiling builds it" in capsys.readouterr().err.splitlines()[1]


def test_flags_win_over_the_preset_and_the_run_keeps_both(tmp_path: Path) -> None:
    few = ["--total-steps", "64", "--evaluation.final-episodes", "5", "--run.quiet", "--run.threads", "1"]
    flags = ["--advantage.lam", "0.7", "--ppo.epochs", "1"]
    assert main(["train", "CartPole-v1", *few, *flags, "--run.dir", str(tmp_path / "run")]) == 0
    kept = Run.open(tmp_path / "run").config
    assert kept["preset"] == "CartPole-v1"
    assert kept["advantage"]["gamma"] == 0.98  # type: ignore[index,call-overload]
    assert kept["advantage"]["lam"] == 0.7  # type: ignore[index,call-overload]
    assert main(["train", "CartPole-v1", *few, *flags, "--preset", "none", "--run.dir", str(tmp_path / "plain")]) == 0
    plain = Run.open(tmp_path / "plain").config
    assert plain["preset"] == "none"
    assert plain["advantage"]["gamma"] == 0.99  # type: ignore[index,call-overload]


@pytest.mark.parametrize("made", [False, True])
def test_a_vector_environment_of_the_users_own_is_trained_on(tmp_path: Path, made: bool) -> None:
    def make() -> SyncVectorEnv:
        return SyncVectorEnv([worlds.Counter] * 3)

    agent = train(
        make if made else make(),
        total_steps=96,
        n_steps=8,
        ppo={"minibatches": 2, "epochs": 1},
        evaluation={"every": 2, "episodes": 5, "final_episodes": 5},
        run={"dir": tmp_path / "run", "quiet": True, "threads": 1},
    )
    assert agent.act(np.array([3.0, 1.0])) in (0, 1)
    kept = Run.open(tmp_path / "run").config
    assert (kept["env"], kept["preset"]) == ("SyncVectorEnv", "none")
    assert kept["world"]["num_envs"] == 3  # type: ignore[index,call-overload]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    few = [
        "--total-steps",
        "256",
        "--n-steps",
        "16",
        "--evaluation.final-episodes",
        "5",
        "--run.quiet",
        "--run.threads",
        "1",
    ]
    assert main(["train", "CartPole-v1", "--run.dir", str(path), *few]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert (path / "policy" / "policy.safetensors").is_file()
    assert main(["train", "CartPoll-v1", "--run.dir", str(tmp_path / "other")]) == 2
    complaint = capsys.readouterr().err.strip()
    assert "did you mean CartPole-v1" in complaint
    assert "\n" not in complaint
    assert not (tmp_path / "other").exists()


def test_learning_at_every_step_lets_episodes_end_by_themselves(tmp_path: Path) -> None:
    """With n_steps=1 an update is one step: restarts and evaluations are counted so that a 200-step episode still ends."""
    settings = ControlConfig(
        env="Pendulum-v1",
        algorithm="a2c",
        n_steps=1,
        total_steps=1000,
        world=WorldSettings(num_envs=2),
        advantage=AdvantageSettings(estimator="td"),
        evaluation=EvaluationSettings(episodes=5, final_episodes=5),
        run=RunSettings(dir=tmp_path / "run", threads=1, quiet=True, checkpoint_every=250),
    )
    assert settings.restart_updates == 6000
    run(settings)
    assert Run.open(tmp_path / "run").metrics()[-1]["episodes"] == 4
