"""Rooms used again, and gradients added to by compiled code: nobody gets what another still has, nor other sums."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.core.head import HeadSlopes
from bridle.language import rooms
from bridle.language.backbones import hidden_at
from bridle.language.causal import CausalModel
from bridle.language.rooms import gradient_of, keeping, room, training
from tests.language.layered import quick

IDS = torch.tensor([[5, 7, 0, 9, 7, 3], [2, 2, 8, 0, 1, 4]])
ROWS, COLUMNS = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 5, 0, 4])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rooms of any size are kept here."""
    monkeypatch.setattr(rooms, "_LEAST", 1)
    yield
    assert rooms._kept.blocks == rooms._kept.keepers == 0
    assert not rooms._kept.arrays


def at(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_a_room_is_used_again_when_its_last_view_is_gone() -> None:
    with training():
        first = room(6, 10)
        place, view = at(first), first[2:].T
        assert first.shape == (6, 10)
        assert first.dtype is torch.float32
        del first
        other = room(60)
        assert at(other) != place
        del view
        again = room(5, 11)
        assert at(again) == place
        storage = again.untyped_storage()
        del again
        assert at(room(60)) not in (place, at(other))
        del storage
        assert at(room(60)) == place


def test_rooms_are_kept_between_blocks_of_training_where_that_is_asked_for_and_they_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rooms, "_MOST", 100)
    with keeping():
        for size, kept in ((100, True), (101, False)):
            with training():
                room(size)
            assert bool(rooms._kept.arrays) is kept
            with training():
                pass
            assert bool(rooms._kept.arrays) is kept
        with training():
            held = room(50)
        assert at(room(50)) != at(held)  # outside they are not handed out
        before = at(held)
        with training():
            assert at(room(50)) != before
            del held
            assert at(room(50)) == before
    assert not rooms._kept.arrays


def test_threads_that_ask_at_once_get_rooms_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is held up once it has seen which rooms are free, until the other has too, if that can be."""
    both, count = threading.Barrier(2), rooms._references

    def held_up(arrays: Any) -> list[int]:
        counts = count(arrays)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        return counts

    with training():
        held = [room(60), room(60)]
        del held
        monkeypatch.setattr(rooms, "_references", held_up)
        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(lambda _: room(60), range(2))
        assert at(one) != at(other)
        del one, other


def test_a_pass_forth_alone_makes_no_gradient(compiled: object) -> None:
    _, model = quick("llama")
    with training():
        hidden_at(model.base_model, IDS, ROWS, COLUMNS)
    assert all(weight.grad is None for weight in model.parameters())


def test_what_a_graph_keeps_is_nobody_elses() -> None:
    with training():
        held = room(40).fill_(3.0).requires_grad_()
        squares = held.detach().clone().requires_grad_() * held  # saves both
        place = at(held)
        del held
        assert at(room(40)) != place
        squares.sum().backward()
        del squares
        assert at(room(40)) == place


def test_rooms_much_too_large_are_left_and_too_small_ones_given_up() -> None:
    with training():
        large, small = room(100), room(10)
        place = at(large)
        del large, small
        held = room(49)  # not half of the large one
        assert at(held) != place
        assert sorted(array.size for array in rooms._kept.arrays) == [10, 49]
        more = room(30)
        assert sorted(array.size for array in rooms._kept.arrays) == [30, 49]
        assert at(more) != at(held)


def test_outside_training_nothing_is_kept_nor_added_to() -> None:
    assert len(rooms._kept.arrays) == 0
    assert room(7).shape == (7,)
    assert gradient_of(nn.Parameter(torch.zeros(3))) is None
    with training():
        with training():
            kept = room(20)
        assert len(rooms._kept.arrays) == 1
        kept[0] = 1.0
    assert len(rooms._kept.arrays) == 0
    assert kept[0] == 1.0  # whoever has it keeps it


def test_whose_gradient_is_added_to() -> None:
    own, frozen, followed, late = (nn.Parameter(torch.ones(4)) for _ in range(4))
    frozen.requires_grad_(False)
    followed.register_hook(lambda slope: slope)
    late.register_post_accumulate_grad_hook(lambda weight: None)
    turned = nn.Parameter(torch.ones(3, 4).T)
    wide = nn.Parameter(torch.ones(4, dtype=torch.float64))
    with training():
        found = gradient_of(own)
        assert found is own.grad
        assert found is not None
        assert found.tolist() == [0.0] * 4
        own.grad.fill_(2.0)
        assert gradient_of(own) is own.grad
        assert own.grad.tolist() == [2.0] * 4
        assert all(gradient_of(one) is None for one in (frozen, followed, late, turned, wide, 2 * own))
        assert all(one.grad is None for one in (frozen, followed, late, turned, wide))


def backward(model: Any, times: int = 1) -> dict[str, Tensor | None]:
    """The gradients of a few sums of hidden states, one after another."""
    for turn in range(times):
        hidden = hidden_at(model.base_model, (IDS + turn) % 10, ROWS, COLUMNS)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: weight.grad for name, weight in model.base_model.named_parameters()}


def compare(found: dict[str, Tensor | None], oracle: dict[str, Tensor | None]) -> None:
    assert found.keys() == oracle.keys()
    for name, its in oracle.items():
        mine = found[name]
        assert (mine is None) == (its is None), name
        if mine is not None and its is not None:
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5 * float(its.abs().max()))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_are_those_that_autograd_adds(threads: int) -> None:
    plain, model = quick("llama")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for one in (plain, model):
            one.base_model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        oracle = backward(plain, times=3)
        with training():
            found = backward(model, times=3)
            assert len(rooms._kept.arrays) > 5  # it went that way
            assert all(
                any(at(grad) == array.ctypes.data for array in rooms._kept.arrays)
                for grad in found.values()
                if grad is not None
            )
        compare(found, oracle)
        padding = model.base_model.embed_tokens.padding_idx
        assert padding == 0
        assert not found["embed_tokens.weight"][padding].any()
        assert found["embed_tokens.weight"][7].any()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_and_an_embedding_add_to_the_same_gradient(tied: bool) -> None:
    plain, model = quick("llama", tie_word_embeddings=tied)
    along = torch.tensor([0.5, -1.0, 2.0, 0.25])
    targets = torch.tensor([3, 7, 7, 90])
    for _ in range(2):
        logp = plain(input_ids=IDS, use_cache=False).logits[ROWS, COLUMNS].log_softmax(-1)
        (along * logp[torch.arange(4), targets]).sum().backward()
    causal = CausalModel(model)
    with training():
        for _ in range(2):
            features = causal.states(IDS, ROWS, COLUMNS).features
            _, slope = causal.answers(features.detach(), targets, weighing=lambda rows, _: HeadSlopes(logp=along[rows]))
            features.backward(slope)
    oracle = {name: weight.grad for name, weight in plain.named_parameters()}
    assert ("lm_head.weight" in oracle) != tied
    compare({name: weight.grad for name, weight in model.named_parameters()}, oracle)


@pytest.mark.usefixtures("compiled")
def test_who_follows_a_gradient_is_called_with_all_of_it() -> None:
    _, model = quick("llama")
    own = copy.deepcopy(model)
    oracle = backward(own)
    seen: dict[str, Tensor] = {}
    for name, weight in model.base_model.named_parameters():
        weight.register_hook(lambda slope, name=name: seen.__setitem__(name, slope.clone()))
    with training():
        found = backward(model)
    compare(found, oracle)
    compare(dict(seen), oracle)


@pytest.mark.usefixtures("compiled")
def test_a_graph_that_is_kept_gives_the_same_twice() -> None:
    _, model = quick("llama")
    oracle = {name: None if grad is None else 2 * grad for name, grad in backward(copy.deepcopy(model)).items()}
    with training():
        hidden = hidden_at(model.base_model, IDS, ROWS, COLUMNS)
        total = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
        total.backward(retain_graph=True)
        backward(copy.deepcopy(model))  # which asks for rooms meanwhile
        total.backward()
    compare({name: weight.grad for name, weight in model.base_model.named_parameters()}, oracle)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("changed", ["max_norm", "scale_grad_by_freq"])
def test_an_embedding_with_rules_of_its_own_keeps_them(changed: str) -> None:
    plain, model = quick("llama")
    for one in (plain, model):
        setattr(one.base_model.embed_tokens, changed, 0.5 if changed == "max_norm" else True)
    oracle = backward(plain)
    with training():
        found = backward(model)
    compare(found, oracle)
