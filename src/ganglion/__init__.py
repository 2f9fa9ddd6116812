"""ganglion: an inference server for embodied AI. See docs/architecture.md for the map of the house."""

import importlib
import os

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`ganglion.Engine`, imported when it is asked for: `import ganglion` alone needs nothing that is installed."""
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # As the command line does: threads that spin take the time of those that they wait for. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return getattr(importlib.import_module("ganglion.cli.notebook"), name)
