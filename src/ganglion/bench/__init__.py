"""Benchmarks: measured figures with their baselines, written to docs/results. Called by cli."""
