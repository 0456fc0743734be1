"""Who would notice that compiled code stands in for PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from bridle.guards import has_followed_slopes, is_observed, is_plain, is_watched

ON_ALL: dict[str, Callable[..., Any]] = {
    "forward": modules.register_module_forward_hook,
    "before forward": modules.register_module_forward_pre_hook,
    "backward": modules.register_module_full_backward_hook,
    "before backward": modules.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("when", ON_ALL)
def test_a_hook_on_all_modules_is_an_observer_while_it_is_there(when: str) -> None:
    assert not is_observed()
    handle = ON_ALL[when](lambda *given: None)
    try:
        assert is_observed()
    finally:
        handle.remove()
    assert not is_observed()


@pytest.mark.parametrize("how", ["traced", "vmap", "grad", "jvp"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_whoever_sees_each_operation_is_an_observer(how: str) -> None:
    seen: list[bool] = []

    def asked(x: Tensor) -> Tensor:
        seen.append(is_observed())
        return x.square()

    x = torch.ones(3)
    if how == "traced":
        torch.jit.trace(asked, (x,), check_trace=False)
    elif how == "vmap":
        torch.func.vmap(asked)(x)
    elif how == "grad":
        torch.func.grad(lambda y: asked(y).sum())(x)
    else:
        with forward_ad.dual_level():
            asked(forward_ad.make_dual(x, torch.ones(3)))
    assert seen
    assert all(seen)
    assert not is_observed()


def test_a_compiler_is_an_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert is_observed()


WATCHING: dict[str, Callable[[Any], Any]] = {
    "forward": lambda module: module.register_forward_hook(lambda *given: None),
    "before forward": lambda module: module.register_forward_pre_hook(lambda *given: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *given: None),
    "before backward": lambda module: module.register_full_backward_pre_hook(lambda *given: None),
    "another function": lambda module: setattr(module, "forward", lambda x: x),
}


@pytest.mark.parametrize("how", WATCHING)
def test_a_module_is_watched_by_its_hooks_and_by_another_function(how: str) -> None:
    module = nn.Linear(2, 2)
    assert not is_watched(module)
    WATCHING[how](module)
    assert is_watched(module)


@pytest.mark.parametrize("how", ["register_hook", "register_post_accumulate_grad_hook"])
def test_the_slopes_of_a_modules_own_parameters_are_followed_by_their_hooks(how: str) -> None:
    module = nn.Linear(2, 2, bias=False)
    outer = nn.Sequential(module)
    assert not has_followed_slopes(module)
    hook = getattr(module.weight, how)(lambda tensor: None)
    assert has_followed_slopes(module)
    assert not has_followed_slopes(outer)
    hook.remove()
    assert not has_followed_slopes(module)


def test_plain_is_float32_of_pytorchs_own_kind_on_the_cpu() -> None:
    class Own(Tensor):
        pass

    x = torch.ones(2)
    assert is_plain(x)
    assert is_plain(nn.Parameter(x))
    for other in (None, x.double(), x.bfloat16(), x.int(), x.to("meta"), x.as_subclass(Own)):
        assert not is_plain(other)
