"""Every error that Bridle raises on purpose.

BridleError
├── UserError            the caller can mend it: the command line prints one line and leaves with exit code 2
│   ├── ConfigError      a setting, or a combination of settings, that cannot work
│   ├── DataError        a file, a line or a field of the user's data
│   ├── ModelError       a model or tokenizer folder that cannot serve
│   ├── ScorerError      a reward function that raised or returned something other than finite numbers
│   ├── WorldError       a Gymnasium environment that cannot be made or trained on
│   │   └── NonFiniteWorld   one whose reward or observation is not a finite number
│   └── RunError         a run directory that is missing, damaged or in use
└── TrainingError        the run itself went wrong: exit code 1, what was saved stays
    ├── NonFiniteStep    a loss, gradient or ratio that is not finite; the step was not applied
    ├── NonFiniteLogits  a policy whose logits are not finite while it samples
    └── SamplerMismatch  sampler and trainer disagree about log-probabilities by more than the bound
"""

from __future__ import annotations

__all__ = [
    "BridleError",
    "ConfigError",
    "DataError",
    "ModelError",
    "NonFiniteLogits",
    "NonFiniteStep",
    "NonFiniteWorld",
    "RunError",
    "SamplerMismatch",
    "ScorerError",
    "TrainingError",
    "UserError",
    "WorldError",
]


class BridleError(Exception):
    """Base of every error that Bridle raises on purpose; its text is one line."""


class UserError(BridleError, ValueError):
    """Something the caller can mend; the text says what is wrong and how to mend it."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot work."""

    @classmethod
    def of(cls, field: str, value: object, expected: str, remedy: str = "") -> ConfigError:
        """Compose the one line: ``field=value: expected …; remedy``."""
        return cls(f"{field}={value!r}: expected {expected}" + (f"; {remedy}" if remedy else ""))


class DataError(UserError):
    """A file, a line or a field of the user's data."""


class ModelError(UserError):
    """A model or tokenizer folder that cannot serve."""


class ScorerError(UserError):
    """A reward function that raised, or returned something other than one finite number per answer."""


class WorldError(UserError):
    """A Gymnasium environment that cannot be made or trained on."""


class NonFiniteWorld(WorldError):
    """A Gymnasium environment whose reward or observation is not a finite number.

    ``what`` was not finite, ``rows`` says of which environment (counted from 0), and ``given`` is what all of them gave, a
    tensor of one row for each.
    """

    def __init__(self, text: str, what: str, environment: int, given: object) -> None:
        super().__init__(text)
        self.what = f"{what} of environment {environment}"
        self.rows = (environment,)
        self.parameters: tuple[str, ...] = ()
        self.given = given
        self.led_here: object = None
        """what led there, as ``Collector.led_here`` lays it out, where an evaluation met it; a collector keeps that itself."""


class RunError(UserError):
    """A run directory that is missing, damaged or in use."""


class TrainingError(BridleError):
    """The run itself went wrong; what was saved before stays."""


class NonFiniteStep(TrainingError):
    """A loss, gradient or ratio that is not finite; the step was not applied.

    ``what`` was not finite, ``rows`` are the positions in the batch's units that the minibatch held, ``parameters`` the
    names of those whose gradients were not finite, and ``evidence`` is what the step was to be taken on, if whoever
    raised it knows.
    """

    def __init__(self, what: str, rows: tuple[int, ...], *, parameters: tuple[str, ...] = ()) -> None:
        super().__init__(
            f"{what} is not finite; the optimiser step was not applied ({len(rows)} units in the minibatch)"
        )
        self.what = what
        self.rows = rows
        self.parameters = parameters
        self.evidence: object | None = None

    def seen_on(self, rows: tuple[int, ...], evidence: object) -> NonFiniteStep:
        """Return the same, found on the units ``rows``, with what the step was to be taken on."""
        fault = NonFiniteStep(self.what, rows, parameters=self.parameters)
        fault.evidence = evidence
        return fault


class NonFiniteLogits(TrainingError):
    """A policy whose logits are not finite while it samples: its weights have diverged."""


class SamplerMismatch(TrainingError):
    """Sampler and trainer disagree about log-probabilities by more than the bound."""
