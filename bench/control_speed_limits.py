"""What the machine allows: the matrix products of a workload alone, and its environments alone.

    python bench/control_speed_limits.py WORKLOAD     prints one line of JSON

The matrix products of one rollout are: acting, a forward of actor and critic for every step of all environments; and
learning, a forward and a backward of both for every minibatch of every epoch. They run into ready buffers by ``torch.mm``
(the Nature CNN's by the convolutions themselves), with no activation, loss or optimiser. The environments step with random
actions. What counts is the fastest of many short stretches, for a limit must not depend on who else uses the machine.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peers.workload import Workload, tell
from torch import Tensor

from bridle.control import WorldSettings, make_world
from bridle.control.making import make_vector

STRETCH, STRETCHES = 0.01, 100


def seconds_of(work: Callable[[], object]) -> float:
    """The least seconds per call of many stretches of at least ``STRETCH`` seconds, one second of them in all."""
    work()
    times: list[float] = []
    begun, stretches = time.perf_counter(), 2 if "--short" in sys.argv else STRETCHES
    while len(times) < 2 or (len(times) < stretches and time.perf_counter() - begun < STRETCH * stretches):
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < STRETCH:
            work()
            calls += 1
        times.append((time.perf_counter() - started) / calls)
    return min(times)


def dense(widths: tuple[int, ...], n: int, *, learn: bool) -> tuple[Callable[[], None], float]:
    """One network's matrix products for n states, and their floating-point operations."""
    work: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, (i, o) in enumerate(itertools.pairwise(widths)):
        x, w, y = torch.randn(n, i), torch.randn(i, o), torch.empty(n, o)
        work.append((x, w, y))
        if learn:
            work.append((x.t(), torch.randn(n, o), torch.empty(i, o)))
            if number:
                work.append((torch.randn(n, o), w.t(), torch.empty(n, i)))

    def products() -> None:
        for a, b, out in work:
            torch.mm(a, b, out=out)

    return products, sum(2.0 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in work)


def nature(actions: int, n: int, *, learn: bool) -> tuple[Callable[[], None], float]:
    """The Nature CNN's convolutions and matrix products for n states of 4×84×84."""
    layers = [(4, 32, 8, 4, 84), (32, 64, 4, 2, 20), (64, 64, 3, 1, 9)]
    ready: list[tuple[Tensor, Tensor, Tensor, int, bool]] = []
    operations = 0.0
    for number, (i, o, kernel, stride, size) in enumerate(layers):
        x, w = torch.randn(n, i, size, size), torch.randn(o, i, kernel, kernel)
        y = torch.nn.functional.conv2d(x, w, stride=stride)
        ready.append((x, w, y, stride, number > 0))
        operations += 2.0 * y.numel() * i * kernel * kernel * (1 + learn * (2 if number else 1))
    ends = [dense((3136, 512), n, learn=learn), dense((512, actions), n, learn=learn), dense((512, 1), n, learn=learn)]

    def products() -> None:
        for x, w, y, stride, inputs in ready:
            torch.nn.functional.conv2d(x, w, stride=stride)
            if learn:
                wanted = [inputs, True, False]
                torch.ops.aten.convolution_backward(
                    y, x, w, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, wanted
                )
        for work, _ in ends:
            work()

    return products, operations + sum(count for _, count in ends)


@torch.no_grad()
def arithmetic(load: Workload, inputs: int, actions: int) -> dict[str, float]:
    def both(n: int, *, learn: bool) -> tuple[float, float]:
        if load.network == "nature":
            work, operations = nature(actions, n, learn=learn)
            return seconds_of(work), operations
        parts = [dense((inputs, 64, 64, outputs), n, learn=learn) for outputs in (actions, 1)]
        return sum(seconds_of(work) for work, _ in parts), sum(operations for _, operations in parts)

    acting, acting_operations = both(load.num_envs, learn=False)
    learning, learning_operations = both(load.minibatch, learn=True)
    steps = load.epochs * load.minibatches
    return {
        "acting_seconds": acting * load.n_steps,
        "learning_seconds": learning * steps,
        "acting_gflops": acting_operations / acting / 1e9,
        "learning_gflops": learning_operations / learning / 1e9,
        "steps_per_second": load.rollout / (acting * load.n_steps + learning * steps),
    }


def environments(load: Workload, vectorization: Any) -> float:
    """Steps per second of the environments alone, through nothing but Gymnasium's vector form."""
    envs, _ = make_vector(load.env, WorldSettings(num_envs=load.num_envs, vectorization=vectorization))
    envs.reset(seed=0)
    envs.action_space.seed(0)
    drawn = itertools.cycle([envs.action_space.sample() for _ in range(64)])
    seconds = seconds_of(lambda: envs.step(next(drawn)))
    envs.close()
    return load.num_envs / seconds


def main() -> None:
    load = Workload.told()
    torch.set_num_threads(load.threads)
    world = make_world(load.env, WorldSettings(num_envs=1))
    inputs, actions = world.observations.width, world.actions.width
    world.close()
    found = arithmetic(load, inputs, actions)
    forms = {name: environments(load, name) for name in ("auto", "sync")}
    for name, rate in forms.items():
        seconds = found["acting_seconds"] + found["learning_seconds"] + load.rollout / rate
        found[f"environments_{name}_steps_per_second"] = rate
        found[f"both_{name}_steps_per_second"] = load.rollout / seconds
    tell(found)


if __name__ == "__main__":
    main()
