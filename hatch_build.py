"""What hatchling does on installing besides copying: compile the small networks, if there is a C compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Builds ``_small.so`` beside its source; without it Bridle works all the same, small agents more slowly."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel that holds the result is for this kind of machine."""
        room = Path(self.root) / "src" / "bridle" / "control"
        spec = importlib.util.spec_from_file_location("compiling", room / "compiling.py")
        compiling = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiling)
        problem = compiling.compile_small(room / "_small.so")
        if problem:
            self.app.display_warning(f"small agents will run without compiled code: {problem}")
            return
        build_data["artifacts"].append("src/bridle/control/_small.so")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
