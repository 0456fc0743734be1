"""What a run keeps of judges that failed."""

from __future__ import annotations

from bridle.jobs.session import Session
from bridle.language.scorers import Mishap

__all__ = ["tell_mishaps"]


def tell_mishaps(mishaps: list[Mishap], session: Session, step: int) -> dict[str, float]:
    """Keep what went wrong with the judges as events, and count answers left out: ``judge/NAME/dropped``, absent where 0.

    What was only asked again changes no number, so it enters no record. ``mishaps`` is emptied.
    """
    counts: dict[str, float] = {}
    for mishap in mishaps:
        text = f"step {step}: {mishap.text}; {mishap.outcome}: {mishap.answers} answers of judge {mishap.judge}"
        session.run.event("judge", text, step=step, judge=mishap.judge, outcome=mishap.outcome, answers=mishap.answers)
        session.say(text)
        if mishap.outcome == "dropped":
            name = f"judge/{mishap.judge}/dropped"
            counts[name] = counts.get(name, 0.0) + mishap.answers
    mishaps.clear()
    return counts
