"""Where compiled code stands in for PyTorch's, and where somebody would notice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

__all__ = ["has_followed_slopes", "is_observed", "is_plain", "is_watched"]


def is_watched(module: nn.Module) -> bool:
    """Whether somebody looks on when a module is called, or has put another function in the place of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def has_followed_slopes(module: nn.Module) -> bool:
    """Whether somebody is called when a gradient of one of a module's own parameters is there, and may make another of it."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in own)


def is_observed() -> bool:
    """Whether somebody looks on at all modules, or at each operation: tracers, compilers, torch.func, forward mode."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is an ordinary one of float32 on the CPU."""
    return (
        tensor is not None
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
    )
