"""TensorBoard and Weights & Biases: copies of the metrics, imported only when asked for. JSONL is the truth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

from bridle.errors import ConfigError
from bridle.runs.files import Json

__all__ = ["Tracker", "TrackerName", "open_trackers", "require_trackers"]

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """Something that wants a copy of the metrics."""

    def log(self, step: int, metrics: Mapping[str, float | int | str | bool | None]) -> None:
        """Take the numbers of one step; what is not a number is left out."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


def _numbers(metrics: Mapping[str, float | int | str | bool | None]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def require_trackers(names: tuple[TrackerName, ...]) -> None:
    """Refuse a tracker whose package is not installed; raises :class:`ConfigError`."""
    modules = {"tensorboard": "torch.utils.tensorboard.writer", "wandb": "wandb"}
    for name in names:
        try:
            import_module(modules[name])
        except ImportError:
            remedy = f"pip install 'bridle[{name}]'"
            raise ConfigError.of("run.trackers", name, "an installed package", remedy) from None


class _TensorBoard:
    def __init__(self, path: Path, after_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=after_step + 1)

    def log(self, step: int, metrics: Mapping[str, float | int | str | bool | None]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, path: Path, job: str, config: Mapping[str, Json]) -> None:
        import wandb

        # the same run again after a resume, and never another one that is called alike elsewhere
        name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project="bridle",
            name=path.name,
            id=f"{path.name}-{name}",
            resume="allow",
            job_type=job,
            dir=str(path),
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float | int | str | bool | None]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(
    names: tuple[TrackerName, ...], path: Path, *, job: str, config: Mapping[str, Json], after_step: int = -1
) -> list[Tracker]:
    """Open the trackers asked for; TensorBoard drops what an earlier part of the run recorded after ``after_step``.

    Raises :class:`ConfigError` where the tracker's package is not installed.
    """
    require_trackers(names)
    return [_TensorBoard(path, after_step) if name == "tensorboard" else _Wandb(path, job, config) for name in names]
