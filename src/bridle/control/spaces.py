"""Gymnasium's spaces as the policy sees them: observations as vectors and images, actions in units of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from bridle.control.observations import Observations
from bridle.control.parts import (
    LEAST_SIDE,
    MASK_KEY,
    BoxPart,
    DiscretePart,
    ImagePart,
    Layout,
    MaskPart,
    MultiBinaryPart,
    MultiDiscretePart,
    Number,
    Part,
    Path,
    at,
    first_option,
    fits,
    named,
    part_from_json,
    single,
    sizes,
)
from bridle.errors import ModelError, WorldError

__all__ = [
    "ActionSpec",
    "BoxActions",
    "DiscreteActions",
    "MultiBinaryActions",
    "MultiDiscreteActions",
    "ObservationSpec",
    "action_spec",
    "action_spec_from_json",
    "observation_spec",
    "observation_spec_from_json",
    "spec_to_json",
]


@dataclass(frozen=True, kw_only=True)
class ObservationSpec:
    """An observation's parts, in the order in which they are laid side by side.

    Every step asks what follows from them, so it is found once; slots leave no room for that.
    """

    parts: tuple[Part, ...]
    """The leaves of the space: Dicts by key in Gymnasium's order, Tuples by place."""

    @cached_property
    def numbers(self) -> tuple[Number, ...]:
        """The parts that the vector is made of."""
        return tuple(part for part in self.parts if not isinstance(part, ImagePart | MaskPart))

    @cached_property
    def images(self) -> tuple[ImagePart, ...]:
        """The images."""
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @cached_property
    def mask(self) -> MaskPart | None:
        """The action mask, if the observation holds one."""
        return next((part for part in self.parts if isinstance(part, MaskPart)), None)

    @cached_property
    def width(self) -> int:
        """D, the length of the vector."""
        return sum(part.width for part in self.numbers)

    @cached_property
    def _lone(self) -> BoxPart | None:
        """The only part, if it is numbers as they are."""
        only = self.parts[0] if len(self.parts) == 1 else None
        return only if isinstance(only, BoxPart) else None

    @cached_property
    def measured(self) -> Bool[Tensor, " D"]:
        """[D] True where the vector holds a Box's numbers, which normalisation may scale; False for bits and one-hots."""
        kinds = [isinstance(part, BoxPart) for part in self.numbers for _ in range(part.width)]
        return torch.tensor(kinds, dtype=torch.bool)

    def encode(self, raw: Any) -> Observations:
        """Encode a batch as Gymnasium's vector environments give it; the result never shares memory with ``raw``.

        Raises:
            WorldError: a number lies outside its Discrete or MultiDiscrete space.
        """
        lone = self._lone
        if lone is not None:
            return Observations(vector=torch.from_numpy(lone.encode(at(raw, lone.path))))
        return self._encode([at(raw, part.path) for part in self.parts])

    def encode_each(self, raws: list[Any]) -> Observations:
        """Encode single observations, each as its environment gives it.

        Raises:
            ModelError: one is not of the shape that is expected.
            WorldError: as :meth:`encode`.
        """
        return self._encode([np.stack([single(raw, part) for raw in raws]) for part in self.parts])

    def _encode(self, columns: list[Any]) -> Observations:
        vector = np.zeros((len(columns[0]), self.width), dtype=np.float32)
        images, mask, at = [], None, 0
        for part, raw in zip(self.parts, columns, strict=True):
            if isinstance(part, ImagePart):
                images.append(torch.from_numpy(part.encode(raw)))
            elif isinstance(part, MaskPart):
                mask = torch.from_numpy(np.array(raw, dtype=np.bool_))
            else:
                part.write(raw, vector[:, at : at + part.width])
                at += part.width
        return Observations(vector=torch.from_numpy(vector), images=tuple(images), mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscreteActions:
    """One of n actions; the policy numbers them from 0."""

    n: int
    """Number of actions A."""
    start: int
    """The world's number of action 0."""

    def __post_init__(self) -> None:
        """Refuse a space without actions."""
        fits(self.n >= 1, self)

    @property
    def width(self) -> int:
        """How many numbers the actor gives for one state: a logit for each action."""
        return self.n

    @property
    def choices(self) -> tuple[int, ...]:
        """The sizes of the choices that one action makes."""
        return (self.n,)

    def to_world(self, actions: Int[np.ndarray, " n"]) -> NDArray[Any]:
        """Turn the policy's actions into the world's."""
        return actions + self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiDiscreteActions:
    """Several choices at once; the policy numbers the options of each from 0."""

    nvec: tuple[int, ...]
    """How many options each choice has, flattened."""
    start: tuple[int, ...]
    """The world's number of each choice's option 0, flattened."""
    shape: tuple[int, ...]
    """Shape of one action in the world."""
    dtype: str
    """The world's number type, such as "int64"."""

    def __post_init__(self) -> None:
        """Refuse lengths that do not agree."""
        fits(len(self.nvec) == len(self.start) == math.prod(self.shape), self)

    @property
    def width(self) -> int:
        """How many numbers the actor gives for one state: a logit for each option of each choice."""
        return sum(self.nvec)

    @property
    def choices(self) -> tuple[int, ...]:
        """The sizes of the choices that one action makes."""
        return self.nvec

    def to_world(self, actions: Int[np.ndarray, "n K"]) -> NDArray[Any]:
        """Turn the policy's actions into the world's."""
        numbered: NDArray[Any] = (actions + np.array(self.start)).astype(self.dtype)
        return numbered.reshape(len(actions), *self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiBinaryActions:
    """Several switches at once, each 0 or 1."""

    shape: tuple[int, ...]
    """Shape of one action in the world."""
    dtype: str
    """The world's number type, such as "int8"."""

    @property
    def width(self) -> int:
        """How many numbers the actor gives for one state: a logit for each switch."""
        return math.prod(self.shape)

    @property
    def choices(self) -> tuple[int, ...]:
        """Nothing that a mask can forbid."""
        return ()

    def to_world(self, actions: Int[np.ndarray, "n A"]) -> NDArray[Any]:
        """Turn the policy's actions into the world's."""
        return actions.astype(self.dtype).reshape(len(actions), *self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxActions:
    """A vector in a Box; the policy acts in units of half the box's width about its centre, so that ±1 are the bounds.

    A coordinate that is unbounded on either side is left in the world's own units.
    """

    low: tuple[float | None, ...]
    """Lower bounds, flattened, in the world's units; None where unbounded."""
    high: tuple[float | None, ...]
    """Upper bounds, flattened, in the world's units; None where unbounded."""
    shape: tuple[int, ...]
    """Shape of one action in the world."""
    dtype: str
    """The world's number type, such as "float32"."""

    def __post_init__(self) -> None:
        """Refuse lengths that do not agree."""
        fits(len(self.low) == len(self.high) == math.prod(self.shape), self)

    @property
    def width(self) -> int:
        """A, the number of coordinates; the actor gives a mean for each."""
        return len(self.low)

    @property
    def choices(self) -> tuple[int, ...]:
        """Nothing that a mask can forbid."""
        return ()

    @property
    def bounded(self) -> bool:
        """Whether every coordinate is bounded on both sides."""
        return None not in self.low and None not in self.high

    def to_world(self, actions: Float[np.ndarray, "n A"]) -> NDArray[Any]:
        """Scale and clip the policy's actions to the world's box; the policy's own are left as they are."""
        low, high, centre, half = _box(self)
        scaled = (centre + half * actions).astype(self.dtype)
        # clipped after rounding to the world's type, which must not leave its box
        clipped: NDArray[Any] = scaled.clip(low, high)
        return clipped.reshape(len(actions), *self.shape)


@lru_cache(maxsize=16)
def _box(spec: BoxActions) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return (low, high) in the world's type and (centre, half width), 0 and 1 where unbounded."""
    low = np.array([-np.inf if bound is None else bound for bound in spec.low])
    high = np.array([np.inf if bound is None else bound for bound in spec.high])
    bounded = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):  # ∞ − ∞ where unbounded on both sides, replaced
        centre = np.where(bounded, (low + high) / 2, 0.0)
        half = np.where(bounded, (high - low) / 2, 1.0)
    return low.astype(spec.dtype), high.astype(spec.dtype), centre, half


ActionSpec = DiscreteActions | MultiDiscreteActions | MultiBinaryActions | BoxActions


def observation_spec(space: gymnasium.Space[Any], world: str) -> ObservationSpec:
    """Return how ``world`` is observed.

    A Box of uint8 with two to four dimensions and sides of at least 36 pixels is an image; of three dimensions, the
    channels are the first or the last, whichever is shorter (the last of equals); a fourth, before them, counts
    frames. Any other Box is numbers. In a Dict, the key "action_mask" tells which actions are allowed.

    Raises:
        WorldError: the space, or one inside it, is not supported.
    """
    parts = tuple(_parts(space, (), world))
    spec = ObservationSpec(parts=parts)
    if spec.width == 0 and not spec.images:
        raise WorldError(f"{world}: its observations hold nothing to see; give the space at least one number")
    return spec


def _parts(space: gymnasium.Space[Any], path: Path, world: str) -> Iterator[Part]:
    match space:
        case spaces.Dict():
            for key, inner in space.spaces.items():
                yield from _parts(inner, (*path, key), world)
        case spaces.Tuple():
            for place, inner in enumerate(space.spaces):
                yield from _parts(inner, (*path, place), world)
        case spaces.Box() | spaces.MultiBinary() | spaces.MultiDiscrete() if path == (MASK_KEY,):
            yield MaskPart(path=path, shape=tuple(space.shape))
        case spaces.Box():
            layout = _layout(space)
            if layout is None:
                yield BoxPart(path=path, shape=tuple(space.shape))
            else:
                yield ImagePart(path=path, shape=tuple(space.shape), layout=layout)
        case spaces.Discrete():
            yield DiscretePart(path=path, n=int(space.n), start=int(space.start))
        case spaces.MultiDiscrete():
            nvec, start = _whole(space.nvec), _whole(space.start)
            yield MultiDiscretePart(path=path, nvec=nvec, start=start, shape=tuple(space.shape))
        case spaces.MultiBinary():
            yield MultiBinaryPart(path=path, shape=tuple(space.shape))
        case _:
            inside = f" (at {named(path)})" if path else ""
            raise WorldError(
                f"{world}: observations of {_kind(space)}{inside} are not supported; wrap the environment so that they "
                "are Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these"
            )


def _layout(space: spaces.Box) -> Layout | None:
    """Return the axes of an image, None for numbers."""
    shape = space.shape
    if space.dtype != np.uint8 or len(shape) not in (2, 3, 4):
        return None
    first = len(shape) > 2 and shape[-3] < shape[-1]
    layouts: dict[int, Layout] = {2: "hw", 3: "chw" if first else "hwc", 4: "fchw" if first else "fhwc"}
    layout = layouts[len(shape)]
    sides = [size for axis, size in zip(layout, shape, strict=True) if axis in "hw"]
    return layout if min(sides) >= LEAST_SIDE else None


def action_spec(space: gymnasium.Space[Any], world: str) -> ActionSpec:
    """Return how one acts in ``world``.

    Raises:
        WorldError: the space is not supported.
    """
    match space:
        case spaces.Discrete():
            return DiscreteActions(n=int(space.n), start=int(space.start))
        case spaces.MultiDiscrete():
            return MultiDiscreteActions(
                nvec=_whole(space.nvec), start=_whole(space.start), shape=tuple(space.shape), dtype=str(space.dtype)
            )
        case spaces.MultiBinary():
            return MultiBinaryActions(shape=tuple(space.shape), dtype=str(space.dtype))
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            return BoxActions(
                low=_bounds(space.low), high=_bounds(space.high), shape=tuple(space.shape), dtype=str(space.dtype)
            )
        case _:
            raise WorldError(
                f"{world}: actions of {_kind(space)} are not supported; wrap the environment so that they are Discrete, "
                "MultiDiscrete, MultiBinary or a Box of floats"
            )


def spec_to_json(spec: ObservationSpec | ActionSpec) -> dict[str, object]:
    """Return the description as JSON writes it, with its kind."""
    if isinstance(spec, ObservationSpec):
        return {"kind": "Observations", "parts": [{"kind": type(part).__name__, **asdict(part)} for part in spec.parts]}
    return {"kind": type(spec).__name__, **asdict(spec)}


def observation_spec_from_json(data: Mapping[str, Any]) -> ObservationSpec:
    """Read what :func:`spec_to_json` wrote.

    Raises:
        ModelError: it is not the description of observations.
    """
    try:
        if data["kind"] != "Observations":
            raise ModelError(f"the saved policy's observations are of an unknown kind {data['kind']!r}")
        spec = ObservationSpec(parts=tuple(part_from_json(part) for part in data["parts"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the saved policy's observation space is damaged: {error!r}") from error
    if spec.width == 0 and not spec.images:
        raise ModelError("the saved policy's observation space is damaged: it holds nothing to see")
    return spec


def action_spec_from_json(data: Mapping[str, Any]) -> ActionSpec:
    """Read what :func:`spec_to_json` wrote.

    Raises:
        ModelError: it is not the description of actions.
    """
    try:
        match data["kind"]:
            case "DiscreteActions":
                return DiscreteActions(n=int(data["n"]), start=first_option(data["start"]))
            case "MultiDiscreteActions":
                start, dtype = tuple(map(first_option, data["start"])), str(np.dtype(data["dtype"]))
                nvec, shape = sizes(data["nvec"]), sizes(data["shape"])
                return MultiDiscreteActions(nvec=nvec, start=start, shape=shape, dtype=dtype)
            case "MultiBinaryActions":
                return MultiBinaryActions(shape=sizes(data["shape"]), dtype=str(np.dtype(data["dtype"])))
            case "BoxActions":
                low, high = (tuple(None if b is None else float(b) for b in data[side]) for side in ("low", "high"))
                return BoxActions(low=low, high=high, shape=sizes(data["shape"]), dtype=str(np.dtype(data["dtype"])))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"the saved policy's action space is damaged: {error!r}") from error
    raise ModelError(f"the saved policy's actions are of an unknown kind {data['kind']!r}")


def _whole(values: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values.reshape(-1))


def _bounds(values: NDArray[Any]) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values.reshape(-1))


def _kind(space: gymnasium.Space[Any]) -> str:
    if isinstance(space, gymnasium.spaces.Box):
        return f"Box({space.dtype})"
    return type(space).__name__
