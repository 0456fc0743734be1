"""The optimiser: AdamW over named groups, each with its own learning rate, schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridle.errors import ConfigError, NonFiniteStep, RunError
from bridle.learn.masters import Masters
from bridle.learn.reach import SAFE, after_step, reach

__all__ = ["FlatAdam", "Group", "OptimSettings", "Optimiser", "learning_rate"]

_SLOTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSettings:
    """How one group of parameters is moved: AdamW (Loshchilov & Hutter 2019, Algorithm 2)."""

    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: stay, or fall so that ``min_lr_share`` of the peak would be reached after the last step."""
    warmup_steps: int = 0
    """Run steps of linear warm-up from lr / warmup_steps to lr."""
    min_lr_share: float = 0.0
    """Share of the peak that the fall ends at, in [0, 1]."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on parameters of two or more dimensions only."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float | None = 1.0
    """The group's gradient is scaled down to this L2 norm if longer; None leaves it."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ConfigError.of("lr", self.lr, "a finite number >= 0")
        if self.warmup_steps < 0:
            raise ConfigError.of("warmup_steps", self.warmup_steps, "a number of steps >= 0")
        if not 0 <= self.min_lr_share <= 1:
            raise ConfigError.of("min_lr_share", self.min_lr_share, "a share in [0, 1]")
        if self.weight_decay < 0:
            raise ConfigError.of("weight_decay", self.weight_decay, "a number >= 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a decay in [0, 1)")
        if self.eps <= 0:
            raise ConfigError.of("eps", self.eps, "a number > 0")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ConfigError.of("max_grad_norm", self.max_grad_norm, "a norm > 0", "leave it out for no clipping")


def learning_rate(settings: OptimSettings, step: int, total_steps: int) -> float:
    """Learning rate at run step ``step`` (from 0) of ``total_steps``; a function of the step alone."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    span = max(1, total_steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / span)
    left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr * (settings.min_lr_share + (1 - settings.min_lr_share) * left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that are clipped and scheduled together."""

    name: str
    """What the metrics call it: "actor", "critic", "policy"…"""
    parameters: Mapping[str, nn.Parameter]
    """Name → parameter; the names key the saved state."""
    settings: OptimSettings


@dataclass(slots=True, kw_only=True)
class FlatAdam:
    """A flat group as its next steps find it, for who takes them in the optimiser's place; its tensors are the group's own."""

    group: str
    """What the metrics call it."""
    weights: Float[Tensor, " P"]
    """[P] what is moved."""
    gradient: Float[Tensor, " P"]
    """[P] the gradient: 0, before a step and after it."""
    m: Float[Tensor, " P"]
    """[P] first moments."""
    v: Float[Tensor, " P"]
    """[P] second moments."""
    decayed: int
    """How many weights, the first ones, decay."""
    taken: int
    """Steps taken before."""
    lr: float
    """Learning rate of these steps."""
    beta1: float
    """Decay of the first moment."""
    beta2: float
    """Decay of the second moment."""
    eps: float
    """Added to the root of the second moment."""
    weight_decay: float
    """Decoupled weight decay."""
    max_grad_norm: float | None
    """The gradient is scaled down to this L2 norm if longer."""
    untouched: Callable[[], bool]
    """Whether nobody has put a gradient of their own beside these."""
    steps: int = 0
    """Steps taken since; who takes one counts it here."""


class _Separate:
    """A group's parameters as they lie, moved by PyTorch's fused AdamW."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimSettings, masters: Masters) -> None:
        self._settings = settings
        self._held = list(parameters.values())
        parameters = self._parameters = {name: masters.of(p) for name, p in parameters.items()}
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        vectors = [p for p in parameters.values() if p.ndim < 2]
        options: list[dict[str, object]] = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        common = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
        self._adam = torch.optim.AdamW([o for o in options if o["params"]], fused=True, **common)  # type: ignore[arg-type]

    def zero_grad(self) -> None:
        for parameter in (*self._held, *self._parameters.values()):
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        for held, moved in zip(self._held, self._parameters.values(), strict=True):
            moved.grad = held.grad
        grads = self._gradients()
        return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())

    def not_finite(self) -> tuple[str, ...]:
        return _not_finite(self._parameters)

    @torch.no_grad()
    def length(self) -> float:
        return float(torch.nn.utils.get_total_norm(list(self._parameters.values())))

    @torch.no_grad()
    def overflowing(self, lr: float) -> tuple[str, ...]:
        found = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            state = self._adam.state.get(parameter, {})
            nothing = torch.zeros_like(parameter)
            slots = {"value": parameter.detach(), "grad": parameter.grad}
            slots |= {slot: state.get(slot, nothing) for slot in ("exp_avg", "exp_avg_sq")}
            decay = self._settings.weight_decay if parameter.ndim >= 2 else 0.0
            if not _stays_finite(slots, self._settings, lr=lr, decay=decay, step=int(state.get("step", 0)) + 1):
                found.append(name)
        return tuple(found)

    def scale_gradient(self, share: float) -> None:
        torch._foreach_mul_(self._gradients(), share)

    def step(self, lr: float) -> None:
        for options in self._adam.param_groups:
            options["lr"] = lr
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{slot}": value.detach().clone()
            for name, parameter in self._parameters.items()
            for slot, value in self._adam.state.get(parameter, {}).items()
        }

    def restore(self, name: str, slots: Mapping[str, Tensor]) -> None:
        parameter = self._parameters[name]
        self._adam.state[parameter] = {
            slot: value.to(device=parameter.device, dtype=torch.float32 if slot == "step" else parameter.dtype)
            for slot, value in slots.items()
        }

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]


def _stays_finite(slots: Mapping[str, Tensor], s: OptimSettings, *, lr: float, decay: float, step: int) -> bool:
    after = after_step(slots, lr=lr, beta1=s.beta1, beta2=s.beta2, eps=s.eps, decay=decay, step=step)
    return bool(torch.isfinite(after).all())


def _not_finite(parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Name the parameters whose gradients are not finite; none if their norm alone overflowed."""
    gradients = ((name, parameter.grad) for name, parameter in parameters.items())
    return tuple(name for name, grad in gradients if grad is not None and not bool(torch.isfinite(grad).all()))


class _Flat:
    """A group's parameters laid end to end in one buffer and their gradients in another, so that a step is a few calls.

    AdamW of Loshchilov & Hutter 2019, Algorithm 2.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimSettings) -> None:
        self._settings = settings
        own = sorted(parameters.items(), key=lambda item: item[1].ndim < 2)  # what decays comes first
        self._parameters = dict(own)
        first = next(iter(self._parameters.values()))
        if any(p.dtype != first.dtype or p.device != first.device for p in self._parameters.values()):
            raise ValueError("a flat group needs parameters of one dtype on one device")
        count = sum(p.numel() for p in self._parameters.values())
        columns = self._values, self._gradient, self._m, self._v = tuple(first.new_zeros(count) for _ in range(4))
        matrices = sum(p.numel() for p in self._parameters.values() if p.ndim >= 2) if settings.weight_decay else 0
        self._parts = [
            ([[column[stretch]] for column in columns], decay)
            for stretch, decay in ((slice(matrices), settings.weight_decay), (slice(matrices, None), 0.0))
            if columns[0][stretch].numel()
        ]
        self._decayed = matrices
        self.steps = 0
        self._step = torch.zeros((), device=first.device)
        self._owners = list(self._parameters.values())
        self._own: list[Tensor] = []
        self._places: dict[str, slice] = {}
        at = 0
        for name, parameter in self._parameters.items():
            self._places[name] = slice(at, at + parameter.numel())
            view = self._values[self._places[name]].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self._gradient[self._places[name]].view_as(parameter)
            self._own.append(parameter.grad)
            at += parameter.numel()

    def zero_grad(self) -> None:
        self._gradient.zero_()
        if not self._untouched():
            for parameter, gradient in zip(self._owners, self._own, strict=True):
                parameter.grad = gradient

    def gradient_norm(self) -> Tensor:
        if not self._untouched():
            for parameter, gradient in zip(self._owners, self._own, strict=True):
                if parameter.grad is not gradient:
                    gradient.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                    parameter.grad = gradient
        return torch.dot(self._gradient, self._gradient).sqrt_()

    def not_finite(self) -> tuple[str, ...]:
        return _not_finite(self._parameters)

    def _untouched(self) -> bool:
        """Whether nobody has put a gradient of their own beside ours."""
        return all(map(is_, [parameter.grad for parameter in self._owners], self._own))

    @torch.no_grad()
    def length(self) -> float:
        return float(torch.dot(self._values, self._values).sqrt_())

    @torch.no_grad()
    def overflowing(self, lr: float) -> tuple[str, ...]:
        columns = {"value": self._values, "grad": self._gradient, "exp_avg": self._m, "exp_avg_sq": self._v}
        found = []
        for name, parameter in self._parameters.items():
            slots = {slot: column[self._places[name]] for slot, column in columns.items()}
            decay = self._settings.weight_decay if parameter.ndim >= 2 else 0.0
            if not _stays_finite(slots, self._settings, lr=lr, decay=decay, step=self.steps + 1):
                found.append(name)
        return tuple(found)

    def scale_gradient(self, share: float) -> None:
        self._gradient.mul_(share)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        s = self._settings
        self.steps += 1
        self._step.fill_(self.steps)
        for (values, gradient, m, v), decay in self._parts:
            # what torch.optim.AdamW(fused=True) calls; its own preparations would cost several times the work done here
            torch._fused_adamw_(
                values,
                gradient,
                m,
                v,
                [],
                [self._step],
                lr=lr,
                beta1=s.beta1,
                beta2=s.beta2,
                weight_decay=decay,
                eps=s.eps,
                amsgrad=False,
                maximize=False,
            )

    def adam(self, group: Group, lr: float) -> FlatAdam | None:
        if not self._untouched():
            return None
        s = self._settings
        return FlatAdam(
            group=group.name,
            weights=self._values,
            gradient=self._gradient,
            m=self._m,
            v=self._v,
            decayed=self._decayed,
            taken=self.steps,
            lr=lr,
            beta1=s.beta1,
            beta2=s.beta2,
            eps=s.eps,
            weight_decay=s.weight_decay,
            max_grad_norm=s.max_grad_norm,
            untouched=self._untouched,
        )

    def state(self) -> dict[str, Tensor]:
        if not self.steps:
            return {}
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"{name}/step"] = torch.tensor(float(self.steps))
            tensors[f"{name}/exp_avg"] = self._m[self._places[name]].view_as(parameter).clone()
            tensors[f"{name}/exp_avg_sq"] = self._v[self._places[name]].view_as(parameter).clone()
        return tensors

    def restore(self, name: str, slots: Mapping[str, Tensor]) -> None:
        parameter = self._parameters[name]
        self.steps = int(slots["step"])
        self._m[self._places[name]].view_as(parameter).copy_(slots["exp_avg"])
        self._v[self._places[name]].view_as(parameter).copy_(slots["exp_avg_sq"])


class Optimiser:
    """AdamW over groups, stepped once per minibatch, scheduled once per run step.

    The learning rate is set from the run's step by :meth:`schedule`, never counted here, so early stopping inside an
    update cannot move a schedule.
    """

    def __init__(
        self, groups: Sequence[Group], *, total_steps: int, flat: bool = False, masters: Masters | None = None
    ) -> None:
        """Take hold of the groups' parameters.

        Args:
            groups: which parameters move together.
            total_steps: run steps that the schedules span.
            flat: keep each group's parameters in one buffer, which they become views of: many times faster where the
                parameters are few, such as an agent's. They must stay on their device from here on.
            masters: what is moved in the place of parameters that hold a narrower shadow of it.

        Raises:
            ValueError: groups share parameters, or a flat group's parameters lie on several devices or have masters.
        """
        if flat and masters is not None:
            raise ValueError("a flat group keeps its parameters as they are, without masters")
        self._masters = masters or Masters()
        self.groups = tuple(groups)
        self.total_steps = total_steps
        seen: set[int] = set()
        self._moved: dict[str, _Separate | _Flat] = {}
        for group in self.groups:
            own = {name: p for name, p in group.parameters.items() if p.requires_grad}
            if seen & {id(p) for p in own.values()}:
                raise ValueError(f"group {group.name!r} shares parameters with an earlier group")
            seen |= {id(p) for p in own.values()}
            if own:
                self._moved[group.name] = (
                    _Flat(own, group.settings) if flat else _Separate(own, group.settings, self._masters)
                )
        self._largest: dict[str, float] = {}  # bounds of each group's weights, which steps move on
        self.schedule(0)

    def schedule(self, step: int) -> None:
        """Set every group's learning rate for run step ``step`` (from 0)."""
        self.lrs = {g.name: learning_rate(g.settings, step, self.total_steps) for g in self.groups}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for moved in self._moved.values():
            moved.zero_grad()

    def step(self, rows: Tensor | None = None) -> dict[str, float]:
        """Clip each group, move all parameters, forget the gradients; return each group's L2 norm before clipping.

        Raises:
            NonFiniteStep: a gradient is not finite, or a weight would not be; nothing was moved. It names ``rows``.
        """
        norms: dict[str, float] = {}
        for group in self.groups:
            moved = self._moved.get(group.name)
            norm = norms[group.name] = 0.0 if moved is None else float(moved.gradient_norm())
            if not math.isfinite(norm):
                raise self._fault(f"the gradient of {group.name}", rows, () if moved is None else moved.not_finite())
            limit = group.settings.max_grad_norm
            if moved is not None and limit is not None and norm > limit:
                moved.scale_gradient(limit / (norm + 1e-6))
        for group in self.groups:
            if overflowing := self._overflowing(group):
                raise self._fault(f"a weight of {group.name} after its step", rows, overflowing)
        for name, moved in self._moved.items():
            moved.step(self.lrs[name])
        self._masters.refresh()
        self.zero_grad()
        return norms

    def flat_adam(self, steps: int) -> FlatAdam | None:
        """Return what all parameters lie in, if it is one flat group and the next ``steps`` steps cannot leave float32's range.

        Who takes some of them says so by :meth:`moved`.
        """
        moved = self._moved.get(self.groups[0].name) if len(self.groups) == 1 else None
        if not isinstance(moved, _Flat) or not self._bound(self.groups[0], moved, steps) < SAFE:
            return None
        return moved.adam(self.groups[0], self.lrs[self.groups[0].name])

    def moved(self, steps: int) -> None:
        """Count ``steps`` steps that were taken on :meth:`flat_adam`, and forget the gradient of what comes after them."""
        (group,) = self.groups
        moved = self._moved[group.name]
        assert isinstance(moved, _Flat)
        self._largest[group.name] = self._bound(group, moved, steps)
        moved.steps += steps
        moved.zero_grad()

    def _bound(self, group: Group, moved: _Separate | _Flat, steps: int) -> float:
        """Return what no weight of a group can be larger than after ``steps`` steps."""
        largest, lr, s = self._largest.get(group.name), self.lrs[group.name], group.settings
        largest = moved.length() if largest is None else largest  # no weight is larger, and a sum of squares is quicker
        for _ in range(steps):
            largest = largest * (1 + lr * s.weight_decay) + lr * reach(s.beta1, s.beta2)
        return largest

    def _overflowing(self, group: Group) -> tuple[str, ...]:
        """Name the parameters that the step would leave not finite; looked at only where their bound does not serve."""
        moved = self._moved.get(group.name)
        if moved is None:
            return ()
        after = self._largest[group.name] = self._bound(group, moved, 1)
        if after < SAFE:
            return ()
        del self._largest[group.name]
        return moved.overflowing(self.lrs[group.name])

    def _fault(self, what: str, rows: Tensor | None, parameters: tuple[str, ...]) -> NonFiniteStep:
        self.zero_grad()
        return NonFiniteStep(what, () if rows is None else tuple(rows.tolist()), parameters=parameters)

    def state(self) -> dict[str, Tensor]:
        """Return the moments and step counts as flat tensors, keyed ``group/parameter/slot``, ready for safetensors."""
        return {
            f"{group}/{name}": value for group, moved in self._moved.items() for name, value in moved.state().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned.

        Raises:
            RunError: the names or shapes do not fit these groups.
        """
        left = dict(tensors)
        self._largest.clear()  # weights were put back too
        for group in self.groups:
            for name, parameter in group.parameters.items():
                own = {slot: left.pop(f"{group.name}/{name}/{slot}", None) for slot in _SLOTS}
                slots = {slot: value for slot, value in own.items() if value is not None}
                if not slots:
                    continue
                fits = [
                    value is not None and value.shape == (torch.Size([]) if slot == "step" else parameter.shape)
                    for slot, value in own.items()
                ]
                if not all(fits):
                    raise RunError(f"the saved optimiser state of {group.name}/{name} does not fit this model")
                self._moved[group.name].restore(name, slots)
        if left:
            raise RunError(f"the saved optimiser state holds {next(iter(left))!r}, which this model lacks")
