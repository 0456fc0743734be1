"""What is compiled for one processor and for a better one: the same to the bit, where both multiply and add in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from bridle.batch import Batch
from bridle.control import compiled, convolutions
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.perceptrons import Perceptrons
from bridle.control.policy import Transitions
from bridle.control.reading import read
from bridle.control.small import SmallActorCritic
from bridle.control.spaces import action_spec, observation_spec
from bridle.core.head import HeadAnswers, HeadSlopes, VocabularyHead
from bridle.language import layers, vocabulary
from bridle.learn import ppo
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.native.compiling import LEVELS, compile_all, compiled_from
from bridle.native.loading import halved_library_of, levels_here, library_of
from tests.built import HERE, built
from tests.language.layered import CASES, Case, draw, inputs

FUSED = [level for level in HERE if level]
"""Levels with a fused multiplication and addition: without one each product is rounded too."""

pytestmark = pytest.mark.skipif(len(FUSED) < 2, reason="this processor stands for one level with fused products alone")


def test_the_best_that_there_is_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "twice.c"
    source.write_text("int twice(int x) { return 2 * x; }\n")
    assert library_of(source) == compiled_from(source)  # where one would be
    built_for, problem = compile_all(source)
    assert (built_for, problem) == ([compiled_from(source, level) for level in LEVELS], None)
    assert library_of(source) == compiled_from(source, HERE[0])
    compiled_from(source, HERE[0]).unlink()
    assert library_of(source) == compiled_from(source, HERE[1])
    for sees, levels in (("DEFAULT", ("",)), ("AVX2", LEVELS[1:]), ("AVX512", LEVELS)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda sees=sees: sees)
        assert levels_here() == levels
        assert (halved_library_of(source) is None) or sees == "AVX512"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "bmi2": False})
    assert levels_here() == ("",)  # a virtual machine that hides a part of what AVX2's level stands for
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert halved_library_of(source) is None


def test_a_level_that_the_compiler_does_not_know_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built for it before goes: it would be of another source one day."""
    source = tmp_path / "twice.c"
    source.write_text("int twice(int x) { return 2 * x; }\n")
    compile_all(source)
    old = tmp_path / "old-cc"
    old.write_text('#!/bin/sh\nfor one; do [ "$one" = -march=x86-64-v4 ] && exit 1; done\nexec cc "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CC", str(old))
    assert compile_all(source) == ([compiled_from(source, level) for level in LEVELS[1:]], None)
    assert not compiled_from(source, LEVELS[0]).exists()


def alike(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 1 and all(map(torch.equal, first, second)) and all(t.any() for t in first)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_there_and_back(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for level in FUSED:
        monkeypatch.setattr(layers, "library", built("layers.c", layers.load, tmp_path, level))
        shape, (x, cosine, sine), weights = inputs(case)
        given = [None if w is None else w.float().requires_grad_() for w in weights]
        y = layers.decoder_layer(shape, x.float().requires_grad_(), cosine.float(), sine.float(), given)
        (y * draw(*y.shape, seed=5).float()).sum().backward()
        found.append([y.detach(), *(w.grad for w in given if w is not None and w.grad is not None)])
    assert alike(*found)


@pytest.mark.parametrize(("rows", "width", "count"), [(13, 64, 512), (29, 40, 1001), (3, 9, 203)])
def test_a_head_there_and_back(
    rows: int, width: int, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for level in FUSED:
        library = built("vocabulary.c", vocabulary.load, tmp_path, level)
        monkeypatch.setattr(vocabulary, "library", library)
        (hidden, weight), (theirs, other) = (
            [draw(n, w, seed=n + w).float() for n in (rows, count)] for w in (width, 24)
        )
        along, grad = draw(rows, seed=3).float(), torch.zeros_like(weight)

        def weighing(part: slice, _: HeadAnswers, along: Tensor = along) -> HeadSlopes:
            return HeadSlopes(logp=along[part], entropy=0.3 * along[part], kl=along[part].flip(0))

        answers, slope = vocabulary.head_answers(
            hidden,
            VocabularyHead(weight=weight),
            torch.arange(rows) * 7 % count,
            reference=(theirs, VocabularyHead(weight=other)),
            weighing=weighing,
            weight_grad=grad,
        )
        given = (answers.logp, answers.entropy, answers.kl, answers.ref_logp, slope, grad)
        found.append([one for one in given if one is not None])
    assert len(found[0]) == 6
    assert alike(*found)


@pytest.mark.parametrize(
    "activation",
    [nn.SiLU, nn.GELU, lambda: nn.GELU(approximate="tanh"), nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Sigmoid, nn.Tanh],
)
def test_a_network_with_norms_there_and_back(
    activation: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for level in FUSED:
        monkeypatch.setattr(compiled, "library", built("small.c", compiled.load, tmp_path, level))
        torch.manual_seed(0)
        layers = [nn.Linear(7, 33), nn.LayerNorm(33), activation(), nn.Linear(33, 23), activation(), nn.LayerNorm(23)]
        net = nn.Sequential(*layers, nn.Linear(23, 3))
        reading = read(net, torch.zeros(2, 7))
        assert reading is not None
        own, x = Perceptrons([(reading.form, reading.places)]), 3 * torch.randn(205, 7)
        (run,) = own.run(x)
        outputs, frozen = run.outputs[0].clone(), torch.empty(205, 3)
        run.pull_back([torch.randn(3, 205)])
        own.frozen(0, 205).outputs(x, frozen)
        found.append([outputs, frozen, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert alike(*found)


@pytest.mark.parametrize("actions", [spaces.Discrete(5), spaces.Box(-1, 1, (3,))])
@pytest.mark.parametrize("hidden", [(64, 64), (19, 33, 7)])
def test_an_update_of_a_small_agent(
    actions: spaces.Space, hidden: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for level in FUSED:
        monkeypatch.setattr(compiled, "library", built("small.c", compiled.load, tmp_path, level))
        seen = observation_spec(spaces.Box(-1, 1, (11,)), "here")
        policy = build_policy(seen, action_spec(actions, "here"), NetworkSettings(hidden=hidden), seed=1)
        assert isinstance(policy, SmallActorCritic)
        noise = torch.Generator().manual_seed(2)
        observations = Observations(vector=torch.randn(301, 11, generator=noise))
        acted, values = policy.act(observations, None, np.random.default_rng(3)), policy.values(observations, None)
        batch = Batch(
            units=Transitions(observations=observations, actions=acted.actions),
            old_logp=acted.logp,
            old_value=values,
            advantages=torch.randn(301, generator=noise),
            returns=torch.randn(301, generator=noise),
            episode=torch.arange(301) // 7,
        )
        group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=1e-2))
        optimiser = Optimiser([group], total_steps=1, flat=True)
        list(ppo.update(policy, batch, optimiser, PPOSettings(epochs=2, minibatches=3), seed=4, step=0))
        found.append([acted.logp, values, *(p.detach().clone() for p in policy.parameters())])
    assert alike(*found)


def test_images_there_and_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for level in FUSED:
        monkeypatch.setattr(convolutions, "library", built("convolutions.c", convolutions.load, tmp_path, level))
        torch.manual_seed(0)
        first, second = nn.Conv2d(4, 20, 8, 4), nn.Conv2d(20, 33, 3, 1)
        net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        images = torch.randint(256, (5, 4, 44, 40), dtype=torch.uint8)
        served = convolutions.served(net, images)
        assert len(served) == 2
        features = convolutions.convolved(served, images)
        (features * torch.randn(features.shape)).sum().backward()
        found.append([features.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert alike(*found)
