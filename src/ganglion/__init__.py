"""ganglion: an inference server for embodied AI. See docs/architecture.md for the map of the house."""

__version__ = "0.1.0"
