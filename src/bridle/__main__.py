"""``python -m bridle``: the command line, where no ``bridle`` lies on the path."""

from __future__ import annotations

import sys

from bridle.cli.main import main

sys.exit(main())
