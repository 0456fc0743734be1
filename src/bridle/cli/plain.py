"""Text that anybody may have written, fit for a terminal."""

from __future__ import annotations

import re

__all__ = ["plain"]


def plain(text: str) -> str:
    """Return ``text`` as one line without colours and other control characters; bytes that are no text are spelt out."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    line = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", whole).split())
    return "".join(character for character in line if character.isprintable())
