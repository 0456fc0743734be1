"""How work is shared out among threads."""

from __future__ import annotations

import threading
from itertools import chain

import pytest
import torch

from bridle.native.sharing import calm, for_each, shares, threads


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 64])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_shares_lie_end_to_end_and_are_alike(count: int, parts: int) -> None:
    found = shares(count, parts)
    assert list(chain.from_iterable(found)) == list(range(count))
    assert len(found) == min(count, parts)
    assert all(found)
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1


def test_seven_in_three_parts_by_hand() -> None:
    assert shares(7, 3) == [range(2), range(2, 4), range(4, 7)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_number_is_called_once(count: int) -> None:
    called: list[int] = []
    for_each(count, called.append)
    assert sorted(called) == list(range(count))


def test_calls_run_at_once_and_a_single_one_where_it_is_asked_for() -> None:
    barrier = threading.Barrier(3, timeout=30)
    for_each(3, lambda number: barrier.wait() and None)  # would break if one waited for another to end
    threads: list[int] = []
    for_each(1, lambda number: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_call_raises_reaches_the_caller(count: int) -> None:
    def call(number: int) -> None:
        if number == count - 1:
            raise ValueError(f"part {number}")

    with pytest.raises(ValueError, match=f"part {count - 1}"):
        for_each(count, call)


def test_in_calm_pytorch_has_one_thread_and_compiled_code_those_it_had() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert threads() == 3
        with calm():
            assert (torch.get_num_threads(), threads()) == (1, 3)
            with calm():
                assert (torch.get_num_threads(), threads()) == (1, 3)
            assert (torch.get_num_threads(), threads()) == (1, 3)
        assert (torch.get_num_threads(), threads()) == (3, 3)
        with pytest.raises(ValueError, match="out"), calm():
            raise ValueError("out")
        assert (torch.get_num_threads(), threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)
