"""The table of presets in docs/CONTROL.md says what the presets say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridle.jobs.config import from_dict, to_dict
from bridle.jobs.control import ControlConfig
from bridle.jobs.presets import KINDS, PRESETS, merged

PAGE = Path(__file__).parents[2] / "docs" / "CONTROL.md"

CHOICES = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3")


def row(name: str) -> str:
    settings = KINDS[name] if name in KINDS else merged(KINDS["vector" if name in CHOICES else "box"], PRESETS[name])
    c = from_dict(ControlConfig, merged(to_dict(ControlConfig()), settings))
    falling = " falling" if c.optim.schedule == "linear" else ""
    clip = f"{c.ppo.clip:g}" + (" falling" if c.clip_schedule == "linear" else "")
    pictures = name in ("image", "atari")
    network = "Nature CNN" if pictures else " · ".join(map(str, c.network.hidden)) + f" {c.network.activation}"
    rewards = ("scaled" if c.scale_rewards else "as they are") + (f", ±{c.clip_rewards:g}" if c.clip_rewards else "")
    cells = [
        f"`{name}`",
        f"{c.total_steps:,}",
        f"{c.world.num_envs} × {c.n_steps}",
        f"{c.ppo.epochs} × {c.ppo.minibatches}",
        f"{c.optim.lr:g}{falling}",
        f"{c.advantage.gamma:g}, {c.advantage.lam:g}",
        clip,
        f"{c.ppo.entropy_coefficient:g}",
        network,
        f"{'yes' if c.normalise_observations else 'no'}; {rewards}",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", [*KINDS, *PRESETS])
def test_the_table_says_what_the_preset_says(name: str) -> None:
    assert row(name) in PAGE.read_text().splitlines()
