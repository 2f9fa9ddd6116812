"""Robots: worlds in, actions out. Clients of the server: they know neither torch nor the engine."""
