"""A step played from tape is the model's own step, to the last bit, with the weights as they are now."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bridle.language.causal import CausalModel
from bridle.language.sampler.serving import require_servable
from bridle.language.sampler.slots import Slots, serving
from bridle.language.sampler.tape import _PLAIN, PAYS_FROM, Tapes
from bridle.random import generator
from tests.language.tiny import VOCABULARY, tiny_model

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma2", "phi", "olmo2", "cohere", "gpt_neox", "granite")


def played_and_own(
    actor: CausalModel, tapes: Tapes, n: int, windows: tuple[int | None, ...] = (None, None)
) -> tuple[Tensor, Tensor]:
    """Hidden states of three steps in n slots, from tape and from the model, each over slots of its own."""
    tokens = torch.from_numpy(generator(n, "test-tape").integers(3, VOCABULARY, size=(3, n)))
    rows, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    found: list[list[Tensor]] = [[], []]
    for side in (0, 1):
        slots = Slots(windows, n, torch.device("cpu"))
        slots.reserve(32, 0)
        with serving(actor.model, slots), torch.no_grad():
            play: Callable[[Tensor, Tensor], Tensor] | None = tapes.over(slots, PAYS_FROM)
            assert play is not None
            for t in range(3):
                positions = torch.full((n,), t)
                slots.plan(positions, ())
                if side == 0:
                    found[side].append(play(tokens[t], positions))
                else:
                    states = actor.states(tokens[t][:, None], rows, zeros, positions=positions[:, None])
                    found[side].append(states.hidden)
    return torch.stack(found[0]), torch.stack(found[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_from_tape_is_the_models_own(family: str) -> None:
    actor = CausalModel(tiny_model(family))
    tapes = Tapes(actor)
    windows = require_servable(actor, tapes)
    for n in (1, 3, 8):
        played, own = played_and_own(actor, tapes, n, windows)
        assert torch.equal(played, own)


def test_weights_are_read_anew_for_each_rollout() -> None:
    actor = CausalModel(tiny_model())
    tapes = Tapes(actor)
    before, _ = played_and_own(actor, tapes, 2)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.mul_(1.1)
    after, own = played_and_own(actor, tapes, 2)
    assert torch.equal(after, own)
    assert not torch.equal(after, before)


def test_each_compute_dtype_has_a_tape_of_its_own() -> None:
    actor = CausalModel(tiny_model())
    tapes = Tapes(actor)
    single, _ = played_and_own(actor, tapes, 2)
    with torch.autocast("cpu", torch.bfloat16):
        played, own = played_and_own(actor, tapes, 2)
        torch.testing.assert_close(played.float(), own.float(), atol=0.05, rtol=0.05)
    assert not torch.equal(played.float(), single)
    assert torch.equal(played_and_own(actor, tapes, 2)[0], single)


class _Looks(nn.Module):
    """A layer whose path depends on what it sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out if math.isfinite(float(x.sum())) else 2 * out


class _Overwrites(_Looks):
    """A layer that writes over what it was given back."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mul_(2)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [_Looks, _Overwrites])
def test_a_model_that_looks_at_data_or_writes_in_place_is_not_recorded(kind: type[_Looks]) -> None:
    actor = CausalModel(tiny_model())
    layer = actor.model.base_model.layers[0]
    layer.mlp = kind(layer.mlp)
    slots = Slots((None, None), 2, torch.device("cpu"))
    assert Tapes(actor).over(slots, PAYS_FROM) is None
    assert require_servable(actor) == (None, None)  # it is served without a tape


def test_a_tape_is_recorded_once_it_pays() -> None:
    """A short job is served by the model as it is; the steps of all its calls count together."""
    actor = CausalModel(tiny_model())
    tapes, slots = Tapes(actor), Slots((None, None), 2, torch.device("cpu"))
    assert tapes.over(slots, PAYS_FROM // 2) is None
    with serving(actor.model, slots), torch.no_grad():
        assert tapes.over(slots, PAYS_FROM) is not None


def test_a_step_that_cannot_be_recorded_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    actor = CausalModel(tiny_model())
    layer = actor.model.base_model.layers[0]
    layer.mlp = _Looks(layer.mlp)
    tapes, slots = Tapes(actor), Slots((None, None), 2, torch.device("cpu"))
    for _ in range(2):
        assert tapes.over(slots, PAYS_FROM) is None
    (record,) = [record for record in caplog.records if record.name.startswith("bridle")]
    assert "LlamaForCausalLM cannot be recorded" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_tape_that_plays_another_step_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    actor = CausalModel(tiny_model())
    monkeypatch.setitem(_PLAIN, "aten.neg.default", torch.abs)
    assert Tapes(actor).over(Slots((None, None), 2, torch.device("cpu")), PAYS_FROM) is None
    assert "differs by" in caplog.text
