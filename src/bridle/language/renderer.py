"""Renders chat templates in a process of its own, one request a line; run as a script, it imports nothing of Bridle.

A template is a program of somebody else's. The sandbox that transformers renders it in keeps it from the machine, but not
from looping or growing without end. Here the kernel does: the process dies of what one request may use.

A request and its answer are JSON: {"template", "messages", "open_turn", "marks", "tokens", "seconds", "most"} and
{"text", "spans"} or {"error", "kind", "line"}. The first argument is Python's search path.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

MEMORY = 1 << 28
"""[bytes] what a rendering may use beside the interpreter."""


def limit_memory() -> None:
    """Let the system refuse memory beyond what is in use now and :data:`MEMORY`; where it cannot say, there is no limit."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def render(request: dict[str, Any]) -> dict[str, Any]:
    """Render one dialogue, as transformers does; what the template raises is told by its kind."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=request["open_turn"],
            return_assistant_tokens_mask=request["marks"],
            **request["tokens"],
        )
    except TemplateSyntaxError as error:
        return {"error": str(error.message), "kind": "syntax", "line": error.lineno}
    except TemplateError as error:
        return {"error": str(error), "kind": "refused"}
    except MemoryError:
        return {"error": "", "kind": "memory"}
    except Exception as error:  # a template's expressions may raise anything
        return {"error": f"{type(error).__name__}: {error}", "kind": "failed"}
    if len(texts[0]) > request["most"]:
        return {"error": "", "kind": "memory"}
    return {"text": texts[0], "spans": spans[0] if spans else []}


def serve() -> None:
    """Answer until nobody asks any longer."""
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # kills: nothing here catches it
        answer = render(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(answer)


def say(answer: dict[str, Any]) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Let a child answer, and another one where a template has killed it: starting anew would take a second of imports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    sys.path[:] = json.loads(sys.argv[1])
    import transformers.utils.chat_template_utils  # noqa: F401  before there is a limit

    limit_memory()
    while (child := os.fork()) != 0:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        kinds = {-signal.SIGPROF: "time", -signal.SIGKILL: "memory"}  # the second is the kernel's way
        say({"error": f"exit code {code} of what renders it", "kind": kinds.get(code, "failed")})
    serve()


if __name__ == "__main__":
    main()
