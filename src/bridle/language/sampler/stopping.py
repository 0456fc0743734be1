"""When an answer ends by itself: at a stop token, or at the token that completes a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from bridle.errors import ConfigError
from bridle.language.sampler.protocol import Stop

__all__ = ["Stopping"]


class Stopping:
    """Watches many answers grow, token by token, and says which have ended and how."""

    def __init__(
        self, stop_ids: Collection[int], texts: Sequence[str], decode: Callable[[list[int]], str] | None
    ) -> None:
        """End answers at ``stop_ids`` and where their text, made of ids by ``decode``, comes to hold one of ``texts``."""
        if texts and decode is None:
            raise ConfigError.of("stop_strings", tuple(texts), "none, for this sampler was given no tokenizer")
        self._ids = frozenset(stop_ids)
        self._texts = tuple(texts)
        self._decode = decode
        self._growing: dict[int, _Text] = {}

    def ended(self, answers: Sequence[int], tokens: Sequence[int]) -> dict[int, Stop]:
        """Append ``tokens[i]`` to answer ``answers[i]``; return those that it ended."""
        found = {b: Stop.EOS for b, token in zip(answers, tokens, strict=True) if token in self._ids}
        if self._decode is None or not self._texts:
            return found
        for b, token in zip(answers, tokens, strict=True):
            text = self._growing.setdefault(b, _Text(self._texts, self._decode))
            if b not in found and text.completed_by(token):
                found[b] = Stop.STRING
        for b in found:
            del self._growing[b]
        return found


class _Text:
    """The end of one answer's text.

    Only a window of tokens is decoded again for each new one; what it holds before the newest token is at least twice as
    long as the longest stop string, so one that tokens cut anywhere is seen.
    """

    def __init__(self, stops: tuple[str, ...], decode: Callable[[list[int]], str]) -> None:
        self._stops = stops
        self._decode = decode
        self._reach = 2 * max(len(stop) for stop in stops)
        self._window: list[int] = []

    def completed_by(self, token: int) -> bool:
        self._window.append(token)
        text = self._decode(self._window)
        if any(stop in text for stop in self._stops):
            return True
        if len(text) > 4 * self._reach:
            later = self._window[len(self._window) // 2 :]
            if len(self._decode(later)) > self._reach:
                self._window = later
        return False
