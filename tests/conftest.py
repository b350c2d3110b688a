"""Settings of the whole suite."""

import importlib.util
import os
import sys
from pathlib import Path

# so that a bare `pytest`, from whatever folder, finds the engine as `python -m pytest` does
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Without a GPU the kernels are tested in Triton's interpreter, in this very process: simpler than
# a second one, and a debugger can step into a kernel. It must be on before triton is imported, and
# it needs numpy, which none of the five packages brings along.
if importlib.util.find_spec("triton") and importlib.util.find_spec("numpy"):
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

import nanopaged  # noqa: E402, F401  first of all: it keeps torch from warning of the absent numpy
