"""What hatchling does on installing besides copying: compile what Bridle holds in C, if there is a C compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Builds libraries beside each source; without them Bridle works all the same, some networks more slowly."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel that holds the result is for this kind of machine."""
        place = Path(self.root) / "src" / "bridle" / "native" / "compiling.py"
        spec = importlib.util.spec_from_file_location("compiling", place)
        compiling = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiling)
        for source in compiling.SOURCES:
            built, problem = compiling.compile_all(source)
            if problem:
                self.app.display_warning(f"{source.name} is not compiled, some networks will be slower: {problem}")
                continue
            build_data["artifacts"] += [str(library.relative_to(self.root)) for library in built]
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
