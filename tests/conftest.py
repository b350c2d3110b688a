"""Settings of the whole suite."""

import sys
from pathlib import Path

# so that a bare `pytest`, from whatever folder, finds the engine as `python -m pytest` does
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nanopaged  # noqa: E402, F401  first of all: it keeps torch from warning of the absent numpy
