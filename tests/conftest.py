"""Marks each test by its folder: tests/pure -> pure, tests/cpu -> cpu, ..."""

from pathlib import Path

import pytest

LEVELS = ("pure", "cpu", "gpu", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = next((part for part in Path(item.fspath).parts if part in LEVELS), None)
        if level is not None:
            item.add_marker(level)
