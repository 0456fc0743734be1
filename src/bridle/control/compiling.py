"""Compiles ``small.c``, which :mod:`bridle.control.compiled` then uses: done on installing, where there is a C compiler.

python -m bridle.control.compiling      does it later, or again
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

__all__ = ["compile_small"]

_FLAGS = (
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
)


def compile_small(place: Path, source: Path | None = None) -> str | None:
    """Compile ``source``, small.c beside this file by default, to ``place``; return why not, or None.

    The compiler is the one that CC names, else cc. What is at ``place`` stays until the new one is whole.
    """
    source = source or Path(__file__).with_name("small.c")
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
    except ValueError as error:
        return f"CC={os.environ['CC']!r} cannot be read: {error}"
    if not compiler or shutil.which(compiler[0]) is None:
        return f"there is no C compiler {' '.join(compiler)!r}"
    fresh = place.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = subprocess.run(
            [*compiler, *_FLAGS, f"-DSOURCE={zlib.crc32(source.read_bytes())}", "-o", str(fresh), str(source), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = " ".join(done.stderr.split())[:300] or f"nothing, and left with exit code {done.returncode}"
            return f"{' '.join(compiler)} said: {said}"
        fresh.replace(place)
    except OSError as error:
        return str(error)
    finally:
        fresh.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    target = Path(__file__).with_name("_small.so")
    problem = compile_small(target)
    if problem:
        sys.exit(f"{target.name} was not built: {problem}")
    sys.stdout.write(f"built {target}\n")
