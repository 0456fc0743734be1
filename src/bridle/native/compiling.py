"""Compiles what rooms hold in C: done on installing, where there is a C compiler.

python -m bridle.native.compiling      does it later, or again
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

__all__ = ["BFLOAT16", "LEVELS", "SOURCES", "checksum", "compile_all", "compile_source", "compiled_from"]

_PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = (
    _PACKAGE / "control" / "small.c",
    _PACKAGE / "language" / "layers.c",
    _PACKAGE / "control" / "convolutions.c",
    _PACKAGE / "language" / "vocabulary.c",
    _PACKAGE / "language" / "decoding.c",
)
"""What there is to compile; each is a library of its own."""

LEVELS = ("x86-64-v4", "x86-64-v3", "") if platform.machine() in ("x86_64", "AMD64") else ("",)
"""What processors there are to compile for, the best first: those with AVX-512, those with AVX2 and FMA, and any.

The names are those of the x86-64 psABI. What is loaded is found by :mod:`bridle.native.loading`.
"""

BFLOAT16 = "x86-64-v4-bf16"
"""What can multiply in bfloat16 besides; sources that include ``halves.h`` are compiled to do so for it."""

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


def compiled_from(source: Path, level: str = "") -> Path:
    """Where the library of a source lies: ``_small.so`` beside ``small.c``, and ``_small.x86-64-v3.so`` for one of LEVELS."""
    return source.with_name(f"_{source.stem}.{level}.so" if level else f"_{source.stem}.so")


def checksum(source: Path) -> int:
    """CRC-32 of a source and the headers that it includes by name, in other folders too."""
    return zlib.crc32(_whole(source))


def _whole(source: Path) -> bytes:
    own = source.read_bytes()
    headers = re.findall(rb'^#include "(.+)"$', own, re.MULTILINE)
    return own + b"".join(_whole(source.parent / name.decode()) for name in headers)


def compile_all(source: Path) -> tuple[list[Path], str | None]:
    """Compile ``source`` for each of LEVELS, beside it; return what was built, and why nothing could be.

    One that multiplies in bfloat16 besides, where there are such products. A compiler that does not know a processor leaves
    that one out; the library for any processor is what must be built.
    """
    built, halved = [], len(LEVELS) > 1 and b'#include "halves.h"' in source.read_bytes()
    for level in (BFLOAT16, *LEVELS) if halved else LEVELS:
        place = compiled_from(source, level)
        problem = compile_source(source, place, level)
        if problem is None:
            built.append(place)
        else:
            place.unlink(missing_ok=True)
    return built, problem


def compile_source(source: Path, place: Path, level: str = "") -> str | None:
    """Compile ``source`` to ``place`` for one of LEVELS or BFLOAT16; return why not, or None.

    The compiler is the one that CC names, else cc. What is at ``place`` stays until the new one is whole. The source can
    tell its own checksum: it is given as SOURCE.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
    except ValueError as error:
        return f"CC={os.environ['CC']!r} cannot be read: {error}"
    if not compiler or shutil.which(compiler[0]) is None:
        return f"there is no C compiler {' '.join(compiler)!r}"
    fresh = place.with_suffix(f".{os.getpid()}.tmp")
    flags = list(_FLAGS)
    if level:
        flags += ["-march=x86-64-v4", "-mavx512bf16", "-DHALVES"] if level == BFLOAT16 else [f"-march={level}"]
    try:
        done = subprocess.run(
            [*compiler, *flags, f"-DSOURCE={checksum(source)}", "-o", str(fresh), str(source), "-lm"],
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


def _main() -> None:
    if len(sys.argv) > 1:  # --help, or what it does not take
        what = "Compile what Bridle has in C, each beside its source; CC names the compiler."
        sys.stdout.write(f"usage: python -m bridle.native.compiling\n\n{what}\n")
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
    for source in SOURCES:
        built, problem = compile_all(source)
        if problem:
            sys.exit(f"{source.name} was not compiled: {problem}")
        sys.stdout.writelines(f"built {place}\n" for place in built)


if __name__ == "__main__":
    _main()
