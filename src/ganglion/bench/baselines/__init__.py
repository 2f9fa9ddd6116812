"""Baselines: what a figure is compared with, made to run in the same process or beside it. Called by bench."""
