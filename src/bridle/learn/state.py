"""What of a module changes as it learns, and so has to be kept."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["learnt_state", "load_learnt"]


def learnt_state(module: nn.Module) -> dict[str, Tensor]:
    """What of a module's state may change as it learns: all of it, or all but the frozen weights where there are any."""
    frozen = _frozen(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_learnt(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`learnt_state` returned; raises RuntimeError where names or shapes differ."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    lacking = sorted(set(missing) - _frozen(module))
    if lacking or unexpected:
        raise RuntimeError(f"missing {lacking[:3]}, unexpected {unexpected[:3]}")


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
