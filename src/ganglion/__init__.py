"""ganglion: an inference server for embodied AI. See docs/architecture.md for the map of the house."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`ganglion.Engine`, imported when it is asked for: `import ganglion` alone needs nothing that is installed."""
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("ganglion.cli.notebook"), name)
