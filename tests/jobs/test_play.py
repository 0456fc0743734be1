"""Evaluating and filming a control run, finished or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gymnasium
import pytest

from bridle.cli.main import main
from bridle.control.evaluate import EvaluationSettings
from bridle.control.making import WorldSettings
from bridle.control.networks import NetworkSettings
from bridle.jobs.control import ControlConfig, run
from bridle.jobs.session import RunSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run
from tests.control import worlds

worlds.register()


def trained(path: Path, env: str) -> Path:
    return run(
        ControlConfig(
            env=env,
            total_steps=128,
            n_steps=8,
            world=WorldSettings(num_envs=4),
            network=NetworkSettings(hidden=(8,)),
            ppo=PPOSettings(epochs=1, minibatches=2),
            evaluation=EvaluationSettings(every=2, episodes=5, final_episodes=5),
            run=RunSettings(dir=path, checkpoint_every=1, keep_checkpoints=3, threads=1, quiet=True),
        )
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    trained(path / "cart", "CartPole-v1")
    trained(path / "blind", "BridleTest/Endless-v0")
    shutil.copytree(path / "cart", path / "unfinished")
    shutil.rmtree(path / "unfinished" / "policy")
    return path


def figures(runs: Path, tmp_path: Path, *options: str) -> dict[str, object]:
    output = tmp_path / "figures.json"
    assert main(["evaluate", *options, "--output", str(output)]) == 0
    found: dict[str, object] = json.loads(output.read_text())
    output.unlink()
    return found


def test_a_policy_is_judged_through_its_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs / "cart" / "policy")]) == 2
    assert "policy is an agent's policy without its run; evaluate the run" in capsys.readouterr().err


def test_any_kept_policy_can_be_judged(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cart = str(runs / "cart")
    kept = [checkpoint.step for checkpoint in Run.open(runs / "cart").checkpoints()]
    expected = {"best": "best", "latest": f"checkpoints/step-{kept[-1]}/policy"}
    expected[str(kept[0])] = f"checkpoints/step-{kept[0]}/policy"
    for which, folder in expected.items():
        found = figures(runs, tmp_path, cart, "--episodes", "6", "--checkpoint", which)
        assert found["policy"] == str(runs / "cart" / folder)
    assert figures(runs, tmp_path, cart, "--episodes", "6")["policy"] == str(runs / "cart" / "policy")
    unfinished = figures(runs, tmp_path, str(runs / "unfinished"), "--episodes", "6")
    assert str(unfinished["policy"]).endswith(f"step-{kept[-1]}/policy")
    assert "95 % interval" in capsys.readouterr().out


def test_the_figures_repeat_and_follow_the_seed(runs: Path, tmp_path: Path) -> None:
    one, again, other = (
        figures(runs, tmp_path, str(runs / "cart"), "--episodes", "6", "--actions", "sampled", "--seed", seed)
        for seed in ("3", "3", "4")
    )
    assert one == again != other
    assert "deterministic" not in one
    assert len(one["sampled"]["returns"]) == 6  # type: ignore[index]


def test_a_film_holds_every_state(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av")
    pytest.importorskip("pygame")
    for place in ("film.mp4", "films"):
        command = ["evaluate", str(runs / "cart"), "--episodes", "5", "--actions", "deterministic"]
        assert main([*command, "--video", str(tmp_path / place), "--video-episodes", "2"]) == 0
        returns = [float(value) for value in capsys.readouterr().out.split("return ")[-1].splitlines()[0].split(",")]
        assert len(returns) == 2
        path = tmp_path / place
        for film, lasts in (
            ((path, sum(returns) + 2),)
            if path.is_file()
            else zip(sorted(path.glob("episode-*.mp4")), [value + 1 for value in returns], strict=True)
        ):
            with av.open(str(film)) as container:
                frames = list(container.decode(video=0))
            assert len(frames) == lasts  # the state at the start, and one after each step
            assert (frames[0].width, frames[0].height) == (600, 400)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["cart", "--checkpoint", "newest"], "checkpoint='newest': expected"),
        (["cart", "--checkpoint", "999"], "keeps no checkpoint of step 999; it keeps"),
        (["cart", "--episodes", "4"], "episodes=4: expected at least 5"),
        (["cart", "--video", "film.avi"], "expected a file ending in .mp4"),
        (["cart", "--video", "cart"], "expected a file or folder that does not exist yet"),
        (["cart", "--video", "nowhere/film.mp4"], "in a folder that exists"),
        (["cart", "--video", "film.mp4", "--video-episodes", "0"], "video_episodes=0"),
        (["blind", "--video", "film.mp4"], "BridleTest/Endless-v0 cannot be filmed: it draws no pictures"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    runs: Path,
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(runs)
    before = sorted(path.name for path in runs.iterdir())
    assert main(["evaluate", "--target", options[0], "--episodes", "5", *options[1:]]) == 2
    complaint = capsys.readouterr().err.strip()
    assert words in complaint
    assert "\n" not in complaint
    assert sorted(path.name for path in runs.iterdir()) == before


def test_an_environment_that_fails_to_draw_leaves_no_film(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")

    def broken(self: object) -> None:
        raise OSError("no display")

    monkeypatch.setattr(gymnasium.envs.classic_control.CartPoleEnv, "render", broken)
    assert main(["evaluate", str(runs / "cart"), "--episodes", "5", "--video", str(tmp_path / "film.mp4")]) == 2
    assert "CartPole-v1: render raised OSError: no display" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_filming_without_its_extra_names_it(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert main(["evaluate", str(runs / "cart"), "--episodes", "5", "--video", str(tmp_path / "film.mp4")]) == 2
    assert "pip install 'bridle[video]'" in capsys.readouterr().err
