"""The parts that an observation is made of, and how each is encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bridle.errors import ModelError, WorldError

__all__ = [
    "LEAST_SIDE",
    "MASK_KEY",
    "BoxPart",
    "DiscretePart",
    "ImagePart",
    "Layout",
    "MaskPart",
    "MultiBinaryPart",
    "MultiDiscretePart",
    "Number",
    "Part",
    "Path",
    "at",
    "first_option",
    "fits",
    "named",
    "part_from_json",
    "single",
    "sizes",
]

Path = tuple[str | int, ...]
"""Keys of Dicts and places in Tuples that lead from a whole observation to a part of it; () is the whole."""

Layout = Literal["hw", "chw", "hwc", "fchw", "fhwc"]
"""The axes of an image: height, width, channels, frames."""

MASK_KEY = "action_mask"
"""The key of a Dict observation, and of Gymnasium's info, that tells which actions are allowed."""

LEAST_SIDE = 36
"""Pixels of the smallest side that the Nature CNN can read; a smaller array of uint8 is taken for numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flattened:
    """An array of numbers, flattened."""

    path: Path
    """Where it is found in an observation."""
    shape: tuple[int, ...]
    """Shape of one."""

    @property
    def width(self) -> int:
        """How many numbers of the vector it fills."""
        return math.prod(self.shape)

    def encode(self, raw: NDArray[Any]) -> Float[np.ndarray, "n width"]:
        """Return a batch ``[n, *shape]`` as new numbers; what lies beyond float32's range becomes infinite."""
        numbers = np.asarray(raw)
        if numbers.dtype.char == "f":  # nothing can overflow
            encoded = np.array(numbers, order="C")
        else:
            with np.errstate(over="ignore"):
                encoded = np.array(numbers, dtype=np.float32, order="C")
        return encoded if encoded.ndim == 2 else encoded.reshape(len(encoded), self.width)

    def write(self, raw: NDArray[Any], out: Float[np.ndarray, "n width"]) -> None:
        """Encode a batch ``[n, *shape]`` into ``out``."""
        out[:] = self.encode(raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxPart(_Flattened):
    """A Box of numbers, flattened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiBinaryPart(_Flattened):
    """Bits, as 0 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscretePart:
    """One of n states, one-hot."""

    path: Path
    """Where it is found in an observation."""
    n: int
    """Number of states."""
    start: int
    """The number of the first state."""

    def __post_init__(self) -> None:
        """Refuse a space without states."""
        fits(self.n >= 1, self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one: a scalar."""
        return ()

    @property
    def width(self) -> int:
        """How many numbers of the vector it fills."""
        return self.n

    def write(self, raw: NDArray[Any], out: Float[np.ndarray, "n width"]) -> None:
        """Encode a batch ``[n]`` of state numbers into ``out``."""
        _write_one_hot(np.asarray(raw) - self.start, self.n, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiDiscretePart:
    """Several numbers, each one of its own n, one-hot one after the other."""

    path: Path
    """Where it is found in an observation."""
    nvec: tuple[int, ...]
    """How many values each has, flattened."""
    start: tuple[int, ...]
    """The first value of each, flattened."""
    shape: tuple[int, ...]
    """Shape of one."""

    def __post_init__(self) -> None:
        """Refuse lengths that do not agree."""
        fits(len(self.nvec) == len(self.start) == math.prod(self.shape), self)

    @property
    def width(self) -> int:
        """How many numbers of the vector it fills."""
        return sum(self.nvec)

    def write(self, raw: NDArray[Any], out: Float[np.ndarray, "n width"]) -> None:
        """Encode a batch ``[n, *shape]`` into ``out``."""
        numbers = np.asarray(raw).reshape(len(out), len(self.nvec)) - np.array(self.start)
        begin = 0
        for column, n in zip(numbers.T, self.nvec, strict=True):
            _write_one_hot(column, n, out[:, begin : begin + n])
            begin += n


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An image of uint8, or a stack of frames, which become channels."""

    path: Path
    """Where it is found in an observation."""
    shape: tuple[int, ...]
    """Shape of one, as the world has it."""
    layout: Layout
    """What its axes are."""

    def __post_init__(self) -> None:
        """Refuse a layout of other axes, and an image that is too small."""
        fits(len(self.layout) == len(self.shape) and min(self.size[1:]) >= LEAST_SIDE, self)

    @property
    def size(self) -> tuple[int, int, int]:
        """(C, H, W) as networks see it."""
        axes = dict(zip(self.layout, self.shape, strict=True))
        return axes.get("f", 1) * axes.get("c", 1), axes["h"], axes["w"]

    def encode(self, raw: NDArray[Any]) -> NDArray[np.uint8]:
        """Return a batch ``[n, *shape]`` as [n, C, H, W], in memory of its own."""
        raw = np.asarray(raw)
        if self.layout.endswith("c"):
            raw = np.moveaxis(raw, -1, -3)
        return np.array(raw, dtype=np.uint8, order="C").reshape(len(raw), *self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPart:
    """Which actions are allowed, taken out of the vector."""

    path: Path
    """Where it is found in an observation."""
    shape: tuple[int, ...]
    """(A,)."""


Number = BoxPart | DiscretePart | MultiDiscretePart | MultiBinaryPart
Part = Number | ImagePart | MaskPart


def part_from_json(data: Mapping[str, Any]) -> Part:
    """Read one part of what :func:`spec_to_json` wrote.

    Raises:
        ModelError: it is of an unknown kind.
        KeyError, TypeError, ValueError, OverflowError: it is damaged.
    """
    path = tuple(step if isinstance(step, int) else str(step) for step in data["path"])
    match data["kind"]:
        case "BoxPart":
            return BoxPart(path=path, shape=sizes(data["shape"], least=0))
        case "DiscretePart":
            return DiscretePart(path=path, n=int(data["n"]), start=first_option(data["start"]))
        case "MultiDiscretePart":
            nvec, start = sizes(data["nvec"]), tuple(map(first_option, data["start"]))
            return MultiDiscretePart(path=path, nvec=nvec, start=start, shape=sizes(data["shape"]))
        case "MultiBinaryPart":
            return MultiBinaryPart(path=path, shape=sizes(data["shape"]))
        case "ImagePart":
            layouts: dict[str, Layout] = {"hw": "hw", "chw": "chw", "hwc": "hwc", "fchw": "fchw", "fhwc": "fhwc"}
            return ImagePart(path=path, shape=sizes(data["shape"]), layout=layouts[data["layout"]])
        case "MaskPart":
            return MaskPart(path=path, shape=sizes(data["shape"]))
    raise ModelError(f"the saved policy's observations hold a part of an unknown kind {data['kind']!r}")


def at(raw: Any, path: Path) -> Any:
    """Return what stands at ``path`` of an observation."""
    for step in path:
        raw = raw[step]
    return raw


def single(raw: Any, part: Part) -> NDArray[Any]:
    """Return one observation's part.

    Raises:
        ModelError: it is missing or of another shape.
    """
    try:
        own = np.asarray(at(raw, part.path))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{named(part.path)} is missing or of no even shape; this policy sees it ({error})") from error
    if own.shape != part.shape:
        raise ModelError(f"{named(part.path)} of shape {own.shape}; this policy sees {part.shape}")
    if own.dtype.kind not in "biuf":
        raise ModelError(f"{named(part.path)} of type {own.dtype}; this policy sees numbers")
    return own


def named(path: Path) -> str:
    """Return what messages call the part at ``path``."""
    return "an observation" + "".join(f"[{step!r}]" for step in path)


def fits(right: bool, spec: object) -> None:
    """Refuse the description ``spec`` unless it is ``right``."""
    if not right:
        raise ValueError(f"{spec} does not describe a space")


def sizes(values: Any, least: int = 1) -> tuple[int, ...]:
    """Read sizes of at least ``least``."""
    found = tuple(int(value) for value in values)
    if any(size < least for size in found):
        raise ValueError(f"sizes must be at least {least}: {found}")
    return found


def first_option(value: Any) -> int:
    """Read the world's number of option 0; what is added to it must stay within 64 bits."""
    found = int(value)
    if abs(found) >= 2**62:
        raise ValueError(f"option 0 has the number {found}, beyond 62 bits")
    return found


def _write_one_hot(numbers: NDArray[Any], n: int, out: NDArray[np.float32]) -> None:
    numbers = numbers.astype(np.int64)
    if ((numbers < 0) | (numbers >= n)).any():
        wrong = int(numbers[(numbers < 0) | (numbers >= n)][0])
        raise WorldError(f"an observation outside its space: option {wrong} (counted from 0) of {n}")
    out[np.arange(len(out)), numbers] = 1.0
