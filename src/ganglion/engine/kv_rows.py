"""Rows of one batch as those see them who read and write pages. Pure: made by `engine.language_forward`.

Knows page ids and positions; no tensor, and not who owns a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ganglion.types import PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOfRow:
    """Pages of one group: the first of them holds token `num_dropped` * slots of the row."""

    pages: Sequence[PageId]
    num_dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRow:
    """Tokens [start, start + num_tokens) of one sequence are in the batch; those before them stand in the pages."""

    start: int
    num_tokens: int
    tables: tuple[TableOfRow, ...]  # one per group of the model

    def span(self, window: int | None, slots: int) -> range:
        """Pages, counted from the sequence's first, that its tokens ask."""
        first = 0 if window is None else max(0, self.start - window + 1) // slots
        return range(first, (self.start + self.num_tokens - 1) // slots + 1)
