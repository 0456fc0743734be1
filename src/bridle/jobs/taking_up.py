"""Whether a run that lies there can be taken up: with the same settings, code and files, from a checkpoint that is whole."""

from __future__ import annotations

from collections.abc import Mapping

from bridle.errors import RunError
from bridle.runs import Checkpoint, Run
from bridle.runs.depends import differences
from bridle.runs.extent import missing
from bridle.runs.files import Json

__all__ = ["changed_records", "changed_settings", "changed_surroundings", "chosen_anew", "may_change", "newest_whole"]

_MAY_CHANGE = {
    "run": (
        *("dir", "trackers", "quiet", "checkpoint_every", "checkpoint_minutes"),
        *("keep_checkpoints", "keep_every", "keep_best"),
        *("on_fault", "fault_limit"),
        *("device", "threads"),  # what they come to is compared, with the rest of the machine
    ),
    "world": ("on_death", "death_limit", "step_timeout"),
}
"""Settings that change no number of a run that goes well, by their groups."""


_NOT_CHOSEN = ("dir", "device", "threads")
"""Of these what a run is opened with: where it lies, and what comes to the same machine."""


def may_change() -> list[str]:
    """List the settings that a resume may be given, as group.name: they change no number of a run that goes well."""
    return [f"{of}.{name}" for of, names in _MAY_CHANGE.items() for name in names if name not in _NOT_CHOSEN]


def chosen_anew(run: Run, asked: Mapping[str, Json]) -> list[str]:
    """List the settings in which a run goes on otherwise than it was begun, though as the same run to the bit."""
    found = []
    for setting in may_change():
        of, _, name = setting.partition(".")
        old, new = run.config.get(of), asked.get(of)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and name in new and old.get(name) != new[name]:
            found.append(f"{setting}={_shown(new[name])} (was {_shown(old.get(name))})")
    return found


def _shown(value: Json) -> str:
    return "none" if value is None or value == [] else str(value)


def newest_whole(run: Run, *, force: bool) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint from which a run goes on (None is the beginning), and name the later ones, which are damaged.

    Raises :class:`RunError` where there are some and none is whole; with ``force`` that is the beginning.
    """
    checkpoint = run.latest_checkpoint()
    start = 0 if checkpoint is None else checkpoint.step
    damaged = [f"step-{other.step}" for other in run.checkpoints() if other.step > start]
    if damaged and checkpoint is None and not force:
        raise RunError(
            f"{run.path}: no checkpoint is whole ({', '.join(damaged)} damaged); "
            f"put one back, or begin again with: bridle resume {run.path} --force"
        )
    return checkpoint, damaged


def changed_records(run: Run, checkpoint: Checkpoint | None, *, force: bool) -> list[str]:
    """Refuse to go on where records are missing that the checkpoint followed on, naming them; with ``force`` return them."""
    found = [] if checkpoint is None else missing(run.path, checkpoint)
    if not force and found:
        raise RunError(f"{'; '.join(found)}; put back what was there, or go on without it: {_forced(run)}")
    return found


def changed_surroundings(run: Run, now: Mapping[str, Json], *, force: bool, so_far: bool = False) -> list[str]:
    """Refuse to go on with other code, files or another machine, naming what differs; with ``force`` return it.

    With ``so_far`` what is not in ``now`` is still to come.
    """
    found = differences(_restricted(run.depends, now) if so_far else run.depends, now)
    if not force and found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RunError(
            f"{found[0]} when {run.path} was started{more}, so it would not go on as the same run to the bit; "
            f"{found[0].remedy}, or {_forced(run)}"
        )
    return [str(difference) for difference in found]


def changed_settings(run: Run, asked: Mapping[str, Json], *, force: bool) -> list[str]:
    """Refuse to go on with other settings, naming the first; with ``force`` return it.

    Also where config.json was edited: what is resolved there must agree with what was asked for.
    """
    kept = (_essential(run.config), _essential(run.resolved))
    changed = next(filter(None, (_first_difference(old, _essential(asked), "") for old in kept)), None)
    if not force and changed is not None:
        raise RunError(
            f"{changed} is not what {run.path} was started with, so it would not go on as the same run to the bit; "
            f"resume with its own settings or start a new run, or {_forced(run)}"
        )
    return [] if changed is None else [f"{changed} is another setting"]


def _restricted(kept: Mapping[str, Json], to: Mapping[str, Json]) -> dict[str, Json]:
    """Return of each part of the stock what the other one has too."""
    parts = ((name, part, to.get(name)) for name, part in kept.items())
    return {
        name: {key: value for key, value in part.items() if key in other}
        for name, part, other in parts
        if isinstance(part, Mapping) and isinstance(other, Mapping)
    }


def _forced(run: Run) -> str:
    return f"`bridle resume {run.path} --force`"


def _essential(config: Mapping[str, Json]) -> Mapping[str, Json]:
    groups = {name: group for name in _MAY_CHANGE if isinstance(group := config.get(name), Mapping)}
    return {
        **config,
        **{
            of: {name: value for name, value in group.items() if name not in _MAY_CHANGE[of]}
            for of, group in groups.items()
        },
    }


def _first_difference(old: Mapping[str, Json], new: Mapping[str, Json], prefix: str) -> str | None:
    for name in [*new, *(key for key in old if key not in new)]:
        left, right = old.get(name), new.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            inner = _first_difference(left, right, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif left != right:
            return f"{prefix}{name}={right!r}"
    return None
