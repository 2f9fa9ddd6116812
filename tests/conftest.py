"""Marks each test by its folder: tests/pure -> pure, tests/cpu -> cpu, ...; and warms up what tests share."""

from pathlib import Path

import pytest
from hypothesis import strategies as st

LEVELS = ("pure", "cpu", "gpu", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = next((part for part in Path(item.fspath).parts if part in LEVELS), None)
        if level is not None:
            item.add_marker(level)


@pytest.fixture(scope="session", autouse=True)
def unicode_table() -> None:
    """Hypothesis makes its table of Unicode in a fresh clone's first run, which takes a second.

    Here, so that no test's health check takes it for slow generation of inputs.
    """
    st.text().validate()
