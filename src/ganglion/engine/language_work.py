"""Language work: a request as rows of known tokens with a cursor, and the pages that hold what is computed. Pure.

Owned by `engine.language` on the loop's thread. Knows neither tensors nor time.
"""

from dataclasses import dataclass, field

from ganglion.generation import FinishReason, GenerateRequest, TokenLogprob, Usage
from ganglion.memory.prefix import PageKey
from ganglion.types import PageId, RequestId


@dataclass(slots=True, kw_only=True)
class GroupTable:
    """Pages of one row in one group of layers, one reference each.

    Page i of `pages` holds tokens of page number `num_dropped` + i of the row: [0, num_dropped) were out of every
    window. [0, num_keyed) of the row's pages are committed under keys.
    """

    pages: list[PageId] = field(default_factory=list)
    num_dropped: int = 0
    num_keyed: int = 0

    @property
    def num_pages(self) -> int:
        """Pages of the row so far, dropped ones included."""
        return self.num_dropped + len(self.pages)


@dataclass(slots=True, kw_only=True, eq=False)
class LanguageRow:
    """One sequence: `tokens` are known, [0, num_computed) of them stand in the pages.

    Until the prompt is computed a request has one row; then one for each choice.
    """

    work: "LanguageWork"
    choice: int
    tokens: list[int]
    tables: list[GroupTable]  # one per group; empty pages while it waits
    keys: list[list[PageKey]]  # per group: of its full pages, as far as known
    num_computed: int = 0
    is_admitted: bool = False
    finish: FinishReason | None = None

    @property
    def num_left(self) -> int:
        """Known tokens that are to be computed."""
        return len(self.tokens) - self.num_computed

    @property
    def num_drawn(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - len(self.work.request.prompt)


@dataclass(slots=True, kw_only=True, eq=False)
class LanguageWork:
    """One request under way. `arrival` counts requests up: earlier ones go first."""

    request_id: RequestId
    request: GenerateRequest
    arrival: int
    rows: list[LanguageRow] = field(default_factory=list)
    is_forked: bool = False  # the prompt is computed once, its rows are the choices
    num_cached: int | None = None  # tokens found in pages when it was admitted first
    num_emitted: int = 0
    started_s: float | None = None  # when its first batch was made
    num_preemptions: int = 0
    prompt_scores: list[TokenLogprob | None] | None = None  # of [0, computed] of the prompt

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        return Usage(
            num_prompt_tokens=len(self.request.prompt),
            num_cached_tokens=self.num_cached or 0,
            num_completion_tokens=self.num_emitted,
        )

    @property
    def is_done(self) -> bool:
        """Did all its choices end?"""
        return self.is_forked and all(row.finish is not None for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens [start, start + num_tokens) of one row in a batch; the last of them are `draft`, which may turn out wrong."""

    row: LanguageRow
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Past its last known token: cursor of the row once the part is computed, if nothing of the draft holds."""
        return self.start + self.num_tokens - len(self.draft)

    @property
    def positions(self) -> range:
        """Of all its tokens, drafted ones included."""
        return range(self.start, self.start + self.num_tokens)

    @property
    def token_ids(self) -> list[int]:
        """What is computed."""
        return [*self.row.tokens[self.start : self.end], *self.draft]

    @property
    def is_newest(self) -> bool:
        """Does its last known token ask for the next one?"""
        return self.end == len(self.row.tokens)
