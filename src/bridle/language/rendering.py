"""Chat templates, rendered within bounds of time and memory: by a process that the system kills where one goes beyond."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from bridle.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "render", "replace_template"]

SECONDS = 5.0
"""Processor time that one rendering may take; a sound one takes less than a thousandth of it."""
LONGEST = 10_000_000
"""[characters] of a rendered dialogue, far beyond every context."""

_sources: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()

_ANOTHER = "give another: --model.chat-template FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A dialogue as a template writes it."""

    text: str
    """the whole of it."""
    spans: tuple[tuple[int, int], ...]
    """[start, end) of what stands between the template's ``{% generation %}`` marks, in characters; empty if not asked for."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    open_turn: bool = False,
    marks: bool = False,
) -> Rendered:
    """Render a dialogue by the tokenizer's chat template, as ``apply_chat_template`` does.

    Args:
        tokenizer: whose template and special tokens.
        messages: ``role`` and ``content`` of each turn.
        open_turn: whether to go on to where the assistant is to speak.
        marks: whether to find what the ``{% generation %}`` marks hold.

    Raises:
        ModelError: the template cannot be read, fails, or takes more time or memory than any sound one.
        DataError: it refuses the messages.
    """
    request = {
        "template": tokenizer.get_chat_template(),
        "messages": list(messages),
        "open_turn": open_turn,
        "marks": marks,
        "tokens": tokenizer.special_tokens_map,
        "seconds": SECONDS,
        "most": LONGEST,
    }
    answer = _worker.ask(request)
    if "text" in answer:
        return Rendered(text=answer["text"], spans=tuple((int(a), int(b)) for a, b in answer["spans"]))
    raise _told(answer, tokenizer)


def replace_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a tokenizer the template in a file, by whose name it goes from now on; raises ModelError."""
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"chat template {path} cannot be read: {error}") from error
    _sources[tokenizer] = str(path)


def _told(answer: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> ModelError | DataError:
    """Say in one line what became of a rendering."""
    kind, reason = answer["kind"], " ".join(str(answer["error"]).split())
    source = _sources.get(tokenizer, tokenizer.name_or_path)
    whose = f"the chat template of {source}" if source else "the chat template"
    if kind == "refused":
        return DataError(f"the chat template refuses the messages: {reason}")
    if kind == "syntax":
        return ModelError(f"{whose} cannot be read, line {answer['line']}: {reason}; {_ANOTHER}")
    what = {
        "failed": f"fails with {reason}",
        "memory": "writes or holds more than any dialogue needs",
        "time": f"does not come to an end ({SECONDS:g} seconds of processor time)",
    }
    return ModelError(f"{whose} {what[kind]}; mend it or {_ANOTHER}")


class _Worker:
    """The process that renders, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for what becomes of it."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                self.stop()
                return {"kind": "failed", "error": "the end of what renders it"}
            answer: dict[str, Any] = json.loads(line)
            return answer

    def stop(self) -> None:
        """End the process; a forked child only forgets its parent's."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            with process:  # closes its pipes: its child reads that nobody asks any longer
                pass

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("renderer.py")), json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            self._owner = os.getpid()
        return self._process


_worker = _Worker()
atexit.register(_worker.stop)
