"""``bridle replay FAULT``: rebuild model and batch of a step that was not finite, and say where that begins.

What is looked at, in the order in which a fault spreads: the weights, the units of the batch, each module's output in the
forward pass, the rest of the batch (advantages, returns), the loss, each parameter's gradient in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bridle.errors import NonFiniteStep, NonFiniteWorld, RunError, TrainingError, WorldError
from bridle.jobs.config import from_dict
from bridle.jobs.faults import FORMAT, digests, minibatch_from
from bridle.learn.a2c import A2CObjective
from bridle.learn.ppo import PPOObjective
from bridle.learn.state import load_learnt
from bridle.learn.step import HandDifferentiated, Minibatch, Objective, accumulate, add_loss
from bridle.runs.checkpoints import load_json, load_tensors
from bridle.runs.files import Json, JsonObject

__all__ = ["Case", "find", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A faulty step, ready to be taken again, all but the step itself."""

    model: nn.Module
    """With the weights before the step."""
    units: Mapping[str, Tensor]
    """What the model reads."""
    others: Mapping[str, Tensor]
    """What else the loss is made of."""
    compute: Callable[[], None]
    """Forward and backward pass; may raise :class:`~bridle.errors.NonFiniteStep`."""


def replay(folder: Path) -> list[str]:
    """Take the faulty step kept in ``folder`` again and say, line by line, where it is not finite, what comes first first.

    Raises:
        RunError: the folder is no fault, or is not whole.
        TrainingError: everything is finite here.
    """
    report = _report(folder)
    job = str(report["job"])
    if job not in _CASES:
        raise RunError(f"{folder} is a fault of the job {job!r}, which this bridle cannot replay")
    tensors = load_tensors(folder / "batch.safetensors")
    if report.get("world") is True:
        return [f"step {report['step']} of {job}: {report['what']} was not finite", *_of_world(report, tensors)]
    found = list(find(_CASES[job](folder, report, tensors)))
    head = f"step {report['step']} of {job}: {report['what']} was not finite"
    if not found and str(report["what"]).startswith("a weight of "):
        names = ", ".join(map(str, cast("list[Json]", report["parameters"])))
        found = [
            f"step: all of it is finite, but AdamW would have left float32's range in {names}: lower the learning rate"
        ]
    if not found:
        raise TrainingError(
            f"{head}, and here everything is; another machine, thread count or code may round otherwise"
        )
    return [head, *found]


def _of_world(report: JsonObject, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Say what a world gave, and take the steps that led there again."""
    from bridle.control.collect import Collector
    from bridle.control.making import make_world
    from bridle.jobs.control import ControlConfig

    config = _config(ControlConfig, report)
    yield from (f"world: {name} holds {said}" for name, t in tensors.items() if (said := _wrong(t)) is not None)
    kept = {name.removeprefix("episodes/"): t for name, t in tensors.items() if name.startswith("episodes/")}
    steps, stream = len(kept.get("actions", ())), str(report.get("stream", "environments"))
    try:
        with closing(make_world(config.env, config.world)) as world, np.errstate(over="ignore", invalid="ignore"):
            Collector(world, 1).retake(kept, seed=config.run.seed, stream=stream)
    except NonFiniteWorld as again:
        yield f"world: the {steps} steps since its environments began lead there again: {again}"
    except WorldError as error:
        yield f"world: its steps could not be taken again: {error}"
    else:
        yield f"world: the {steps} steps since its environments began lead to finite numbers this time"


def find(case: Case) -> Iterator[str]:
    """Yield where the step is not finite, in the order in which it spreads."""
    for name, parameter in case.model.named_parameters():
        if (said := _wrong(parameter)) is not None:
            yield f"weights: {name} holds {said}"
    yield from (f"batch: {name} holds {said}" for name, t in case.units.items() if (said := _wrong(t)) is not None)
    forward: list[str] = []
    backward: list[str] = []
    raised: str | None = None
    with _watching(case.model, forward, backward):
        try:
            case.compute()
        except NonFiniteStep as fault:
            raised = fault.what
    yield from forward[:1]
    yield from (f"batch: {name} holds {said}" for name, t in case.others.items() if (said := _wrong(t)) is not None)
    if raised is not None:
        yield f"forward: {raised}"
    named = list(case.model.named_parameters())
    backward += [f"backward: the gradient of {name} holds {said}" for name, p in named if (said := _wrong(p.grad))]
    yield from backward[:1]
    if not backward and raised is None:
        yield from _overflow(named)


def _overflow(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[str]:
    """Say whose gradient is finite and yet too long: the sum of its squares is beyond float32."""
    grads = {name: p.grad for name, p in parameters if p.grad is not None}
    if grads and not math.isfinite(float(torch.stack([grad.square().sum() for grad in grads.values()]).sum())):
        name = max(grads, key=lambda name: float(grads[name].abs().max()))
        largest = float(grads[name].abs().max())
        yield f"backward: the gradient's norm is beyond float32; its largest element, {largest:.3g}, is {name}'s"


def _wrong(tensor: Tensor | None) -> str | None:
    """Count what is not finite, in words; None if there is none."""
    if tensor is None or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    first = int((~torch.isfinite(tensor)).flatten().nonzero()[0])
    return f"{nan} NaN and {infinite} infinities among {tensor.numel()} numbers, first at {first}"


def _watching(model: nn.Module, forward: list[str], backward: list[str]) -> ExitStack:
    """Note which module first gives what is not finite, and which parameter first gets such a gradient."""
    stack = ExitStack()

    def module_hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: Any, keywords: Any, output: object) -> None:
            said = next((s for t in _tensors(output) if (s := _wrong(t)) is not None), None)
            if said is None:
                return
            clean = not any(_wrong(t) for t in _tensors((*arguments, *keywords.values())))
            inputs = "" if clean else ", whose inputs are not finite either"
            forward.append(
                f"forward: the output of {name or 'the model'} ({type(module).__name__}) holds {said}{inputs}"
            )

        return look

    def parameter_hook(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if (said := _wrong(parameter.grad)) is not None:
                backward.append(f"backward: the gradient of {name} holds {said}")

        return look

    for name, module in model.named_modules():
        handle = module.register_forward_hook(module_hook(name), with_kwargs=True)
        stack.callback(handle.remove)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(parameter_hook(name))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
    return stack


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _report(folder: Path) -> JsonObject:
    if not (folder / "report.json").is_file():
        raise RunError(f"{folder} is not a fault (it has no report.json); they lie in RUN/faults/step-N")
    report = load_json(folder / "report.json")
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise RunError(f"{folder / 'report.json'} is not of fault format {FORMAT}; use the bridle that wrote it")
    for name, kind in {"job": str, "step": int, "what": str, "config": dict, "files": dict}.items():
        if not isinstance(report.get(name), kind):
            raise RunError(f"{folder / 'report.json'} lacks {name!r}, or holds something else there; restore it")
    kept = digests(folder)
    for name, digest in cast("JsonObject", report["files"]).items():
        if kept.get(name) != digest:
            raise RunError(f"{folder / name} is not what was kept: missing or altered; a replay needs it as it was")
    return cast("JsonObject", report)


def _config(kind: type[Any], report: JsonObject) -> Any:
    return from_dict(kind, cast("JsonObject", report["config"]))


def _device(name: str) -> torch.device:
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _load(model: nn.Module, folder: Path, device: torch.device) -> None:
    try:
        load_learnt(model, load_tensors(folder / "weights.safetensors", device=str(device)))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise RunError(f"{folder}: the weights do not fit the model that its settings name ({text})") from None


def _objective(value: Json) -> Objective | None:
    if not isinstance(value, Mapping):
        return None
    fields = {name: item for name, item in value.items() if name != "kind"}
    return from_dict(A2CObjective, fields) if value.get("kind") == "a2c" else from_dict(PPOObjective, fields)


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    units = {name.removeprefix("units/"): t for name, t in tensors.items() if name.startswith("units/")}
    return units, {name: t for name, t in tensors.items() if not name.startswith("units/")}


def _update(
    policy: Any, units: Any, minibatch: Minibatch | None, objective: Objective | None, micro: int | None
) -> None:
    """Evaluate the units and, where an update was under way, carry its loss back to the weights."""
    by_hand = isinstance(policy, HandDifferentiated)  # what such a policy does in learning passes no module
    if minibatch is None or objective is None or by_hand:
        with torch.no_grad():
            policy(units)
    if minibatch is not None and objective is not None:
        accumulate(policy, units, minibatch, objective, micro_budget=micro)


def _ppo(folder: Path, report: JsonObject, tensors: dict[str, Tensor]) -> Case:
    from bridle.jobs.ppo import PPOConfig
    from bridle.language.descriptions import describe_causal_lm
    from bridle.language.evidence import segments_from
    from bridle.language.prompts import load_mix
    from bridle.language.roles import open_roles

    config = _config(PPOConfig, report)
    device = _device(config.run.device)
    roles = open_roles(
        config.model,
        config.critic,
        config.reward.model,
        temperature=config.sampling.temperature,
        device=device,
        compute_dtype=getattr(torch, config.run.dtype),
        leashed=config.objective.kl_loss == "exact",
        sampler="reference",
        lora=config.lora,
        seed=config.run.seed,
    )
    policy = roles.policy
    with roles.masters.in_place():
        _load(policy, folder, device)
    units, others = _split(tensors)
    minibatch, objective = minibatch_from(tensors, device), _objective(report.get("objective"))
    alone = isinstance(objective, PPOObjective) and objective.critic_only

    def compute() -> None:
        segments = segments_from(units)
        with policy.frozen_actor() if alone else nullcontext():
            _update(policy, segments, minibatch, objective, config.ppo.micro_batch_tokens)
            mix = (
                None
                if alone or objective is None
                else load_mix(config.mix, describe_causal_lm(config.model, grow=config.lora.rank is None))
            )
            if mix is not None:
                step, taken = cast("int", report["step"]), cast("int", report["taken"])
                extra = mix.of_step(policy, seed=config.run.seed, step=step)(taken, config.ppo.micro_batch_tokens)
                add_loss(extra, torch.arange(len(segments)))

    return Case(model=policy, units=units, others=others, compute=compute)


def _sft(folder: Path, report: JsonObject, tensors: dict[str, Tensor]) -> Case:
    from bridle.jobs.sft import SFTConfig, open_model
    from bridle.language.causal import CausalModel
    from bridle.language.evidence import demonstrations_from
    from bridle.language.likelihood import add_likelihood

    config = _config(SFTConfig, report)
    device, dtype = _device(config.run.device), getattr(torch, config.run.dtype)
    network, _, _ = open_model(config, device)
    model = CausalModel(network)
    _load(model, folder, device)

    def computing() -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def compute() -> None:
        items = demonstrations_from(tensors)
        add_likelihood(model, items, micro_tokens=config.micro_batch_tokens, computing=computing)

    return Case(model=model, units=tensors, others={}, compute=compute)


def _reward(folder: Path, report: JsonObject, tensors: dict[str, Tensor]) -> Case:
    from bridle.jobs.reward import RewardConfig, open_model
    from bridle.language.evidence import comparisons_from
    from bridle.language.reward_model import add_comparisons

    config = _config(RewardConfig, report)
    device, dtype = _device(config.run.device), getattr(torch, config.run.dtype)
    model = open_model(config, device).model
    _load(model, folder, device)

    def compute() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            add_comparisons(model, comparisons_from(tensors), config.loss)

    return Case(model=model, units=tensors, others={}, compute=compute)


def _control(folder: Path, report: JsonObject, tensors: dict[str, Tensor]) -> Case:
    from functools import partial

    from bridle.control.evidence import units_from
    from bridle.control.networks import build_policy
    from bridle.control.saved import load_policy
    from bridle.jobs.control import ControlConfig

    config = _config(ControlConfig, report)
    device = _device(config.run.device)
    own = None if config.network.factory is None else partial(build_policy, settings=config.network, seed=0)
    policy = load_policy(folder / "policy", build=own).policy.to(device)
    units, others = _split(tensors)
    minibatch, objective = minibatch_from(tensors, device), _objective(report.get("objective"))
    micro = config.a2c.micro_batch_tokens if config.algorithm == "a2c" else config.ppo.micro_batch_tokens

    def compute() -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            _update(policy, units_from(units, device), minibatch, objective, micro)

    return Case(model=policy, units=units, others=others, compute=compute)


_CASES: dict[str, Callable[[Path, JsonObject, dict[str, Tensor]], Case]] = {
    "ppo": _ppo,
    "sft": _sft,
    "reward": _reward,
    "control": _control,
}
