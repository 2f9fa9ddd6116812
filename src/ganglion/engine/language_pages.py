"""Pages of rows of tokens: match a prefix, grow, share, commit, drop what left every window. Called by `engine.language`.

Ints only. Obeys the ledger; knows neither requests' order nor time, and tensors not at all.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lcm

from ganglion.engine.language_work import GroupTable, LanguageRow
from ganglion.errors import OutOfPagesError
from ganglion.generation import PromptImage
from ganglion.layout import PageLayout
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import CopyOrder, Moves
from ganglion.memory.prefix import PageKey, chain
from ganglion.types import PageId

OWNER = "language"  # of what several requests may hold
RELEASED_TOKENS = 256  # of which all groups' pages go before any group's of earlier ones


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """What paging knows of a group of layers."""

    layout: PageLayout
    window: int | None
    pages_per_large: int

    def first_needed(self, cursor: int) -> int:
        """The first page that the token at `cursor`, or one after it, may ask."""
        if self.window is None:
            return 0
        return max(0, cursor - self.window + 1) // self.layout.slots


@dataclass(slots=True, kw_only=True)
class Growth:
    """What to do with bytes before a batch runs: first the copies in order, then zeros into the fresh pages."""

    copies: list[CopyOrder] = field(default_factory=list)
    fresh: dict[str, list[PageId]] = field(default_factory=dict)  # by layout


class LanguagePages:
    """The pages of all rows of one model.

    Invariants, per row and group: page i holds tokens [i * slots, (i + 1) * slots); [num_dropped, num_keyed) are keyed
    and never written again; every page in a table is one reference.
    """

    def __init__(self, model: str, groups: Sequence[GroupShape], ledger: Ledger) -> None:
        self._model, self._groups, self._ledger = model, tuple(groups), ledger
        # tokens that fill pages of all groups: prefixes are found in such steps
        self.unit = lcm(*[group.layout.slots for group in groups])

    def open_tables(self) -> tuple[list[GroupTable], list[list[PageKey]]]:
        """Tables without a page, and no keys, for a new row."""
        return [GroupTable() for _ in self._groups], [[] for _ in self._groups]

    # --- prefixes ------------------------------------------------------------------------------------------------

    def match(self, row: LanguageRow) -> int:
        """Fill the row's empty tables with what is known of its tokens; returns how many that are.

        The last known token is always computed: its scores are asked for. All groups must have what a row needs that
        goes on from there: those with a window only what is in it.
        """
        num_hit = (len(row.tokens) - 1) // self.unit * self.unit
        self._make_keys(row, num_hit)
        at = 0
        while num_hit and at < len(self._groups):
            num_known = self._num_known(row, at, num_hit)
            # a group that knows less may make earlier ones need other pages
            at = at + 1 if num_known == num_hit else 0
            num_hit = num_known
        for group, table, keys in zip(self._groups, row.tables, row.keys, strict=True):
            first = group.first_needed(num_hit)
            last = num_hit // group.layout.slots
            found = self._ledger.match(group.layout.name, keys[first:last], owner=OWNER)
            assert len(found) == last - first, (group.layout.name, first, last, len(found))
            table.pages, table.num_dropped, table.num_keyed = list(found), first, last
        row.num_computed = num_hit
        return num_hit

    def _num_known(self, row: LanguageRow, at: int, num_tokens: int) -> int:
        """The most tokens, at most `num_tokens`, that this group could go on from."""
        group, keys = self._groups[at], row.keys[at]
        name, slots = group.layout.name, group.layout.slots
        while num_tokens:
            first, last = group.first_needed(num_tokens), num_tokens // slots
            if group.window is None:
                found = self._ledger.match(name, keys[first:last], owner=OWNER)
                self._ledger.release(name, found)
                return len(found) * slots // self.unit * self.unit
            num_found = 0  # from the end, because that is what a window needs
            while num_found < last - first:
                found = self._ledger.match(name, keys[last - num_found - 1 : last - num_found])
                self._ledger.release(name, found)
                if not found:
                    break
                num_found += 1
            if num_found == last - first:
                return num_tokens
            num_tokens = (last - num_found - 1) * slots // self.unit * self.unit
        return 0

    def _make_keys(self, row: LanguageRow, num_tokens: int) -> None:
        """Keys of the row's pages that are full with its first `num_tokens` tokens.

        Each is chained to the one before it, so that it stands for all tokens up to its page's end.
        """
        tenant = row.work.request.tenant
        for group, keys in zip(self._groups, row.keys, strict=True):
            slots = group.layout.slots
            scope = f"{self._model}/{group.layout.name}\0{row.work.request.adapter}"
            for page in range(len(keys), num_tokens // slots):
                first, stop = page * slots, (page + 1) * slots
                content = array("q", row.tokens[first:stop]).tobytes()
                content += image_content(row.work.request.images, first, stop)
                before = keys[-1] if keys else b""
                keys += chain(tenant, scope, (before + content,))

    # --- growing and sharing -------------------------------------------------------------------------------------

    def grow(self, row: LanguageRow, end: int, growth: Growth) -> None:
        """Pages for its tokens [num_computed, end), the first of them its own alone.

        Raises OutOfPagesError, and has then reserved nothing; a copied page stays the row's.
        """
        grown: list[tuple[GroupTable, str, tuple[PageId, ...]]] = []
        try:
            for group, table in zip(self._groups, row.tables, strict=True):
                name = group.layout.name
                self._own_tail(row, group, table, growth)
                num_new = group.layout.num_pages(end) - table.num_pages
                if num_new > 0:
                    pages = self._ledger.reserve(name, num_new, owner=_owner(row))
                    table.pages += pages
                    grown.append((table, name, pages))
        except OutOfPagesError:
            for table, name, pages in grown:
                del table.pages[-len(pages) :]
                self._ledger.release(name, pages)
            raise
        for _, name, pages in grown:
            growth.fresh.setdefault(name, []).extend(pages)

    def _own_tail(
        self, row: LanguageRow, group: GroupShape, table: GroupTable, growth: Growth
    ) -> None:
        """Copy-on-write of the page that the next token goes to."""
        at = row.num_computed // group.layout.slots
        if at >= table.num_pages:
            return
        name = group.layout.name
        own = self._ledger.writable(name, table.pages, at - table.num_dropped, owner=_owner(row))
        if own.copy is not None:
            growth.copies.append(own.copy)
            table.pages = list(own.pages)

    def fork(self, row: LanguageRow) -> tuple[list[GroupTable], list[list[PageKey]]]:
        """Tables and keys of one more row that goes on from the same tokens; it shares all pages."""
        tables = []
        for group, table in zip(self._groups, row.tables, strict=True):
            self._ledger.retain(group.layout.name, table.pages, owner=OWNER)
            tables.append(
                GroupTable(
                    pages=list(table.pages),
                    num_dropped=table.num_dropped,
                    num_keyed=table.num_keyed,
                )
            )
        return tables, [list(keys) for keys in row.keys]

    def settle(self, row: LanguageRow) -> None:
        """Its tokens [0, num_computed) are in the pages: full pages can be found, those out of every window go."""
        self._make_keys(row, row.num_computed)
        for group, table, keys in zip(self._groups, row.tables, row.keys, strict=True):
            name = group.layout.name
            num_full = row.num_computed // group.layout.slots
            if num_full > table.num_keyed:
                here = slice(table.num_keyed - table.num_dropped, num_full - table.num_dropped)
                pages, new_keys = table.pages[here], keys[table.num_keyed : num_full]
                self._ledger.commit(name, pages, new_keys)
                # a batch mate may have made the same
                table.pages[here] = self._ledger.merge(name, pages, new_keys, owner=OWNER)
                table.num_keyed = num_full
            num_gone = min(group.first_needed(row.num_computed), num_full) - table.num_dropped
            if num_gone > 0:
                self._ledger.release(name, table.pages[:num_gone])
                del table.pages[:num_gone]
                table.num_dropped += num_gone

    def release(self, row: LanguageRow) -> None:
        """All its references; what it computed may still be found, but is not its own any more.

        From its end to its start, all groups side by side: a prefix can be gone on from only where every group has it,
        so they are to be evicted together.
        """
        end = max(
            (
                table.num_pages * group.layout.slots
                for group, table in zip(self._groups, row.tables, strict=True)
            ),
            default=0,
        )
        step = self.unit if len(self._groups) > 1 else max(end, 1)
        step *= -(-RELEASED_TOKENS // step)
        for start in range((end - 1) // step * step, -1, -step):
            for group, table in zip(self._groups, row.tables, strict=True):
                first = max(0, start // group.layout.slots - table.num_dropped)
                if table.pages[first:]:
                    self._ledger.release(group.layout.name, table.pages[first:])
                    del table.pages[first:]
        row.tables, _ = self.open_tables()
        row.num_computed = 0

    def trim(self, row: LanguageRow) -> None:
        """Give back the pages past its computed tokens: what was written there turned out wrong."""
        for group, table in zip(self._groups, row.tables, strict=True):
            num_needed = group.layout.num_pages(row.num_computed) - table.num_dropped
            past = table.pages[num_needed:]
            if past:
                del table.pages[num_needed:]
                self._ledger.release(group.layout.name, past)

    def relocate(self, row: LanguageRow, moves: Moves) -> None:
        """The ledger moved pages: the row follows."""
        for group, table in zip(self._groups, row.tables, strict=True):
            if moves.concern(group.layout.name, table.pages):
                table.pages = list(moves.now_at(group.layout.name, table.pages))

    # --- room ----------------------------------------------------------------------------------------------------

    def check_capacity(self, num_tokens: int, *, num_other_larges: int = 0) -> None:
        """Raise OutOfPagesError when a row of so many tokens would not even fit into the empty pool.

        `num_other_larges`: large pages that the row needs besides.
        """
        num_larges, num_all = 0, self._ledger.num_large_pages - num_other_larges
        for group in self._groups:
            num_pages = self._num_pages(group, num_tokens)
            num_larges += -(-num_pages // group.pages_per_large)
            if num_larges > num_all:
                num_free = (num_all - num_larges) * group.pages_per_large + num_pages
                raise OutOfPagesError(
                    kind=group.layout.name, need=num_pages, free=max(0, num_free), evictable=0
                )

    def has_room(self, num_tokens: int, num_others: int) -> bool:
        """Could a row of so many tokens come in, and each of the others have one page more?

        A guess: groups compete for the same large pages, which is not counted.
        """
        return all(
            self._num_pages(group, num_tokens) + num_others
            <= self._ledger.num_free(group.layout.name)
            + self._ledger.num_evictable(group.layout.name)
            for group in self._groups
        )

    def num_larges(self, num_tokens: int) -> int:
        """Large pages that a row of so many tokens takes of an empty pool."""
        return sum(
            -(-self._num_pages(group, num_tokens) // group.pages_per_large)
            for group in self._groups
        )

    @staticmethod
    def _num_pages(group: GroupShape, num_tokens: int) -> int:
        return group.layout.num_pages(num_tokens) - group.first_needed(num_tokens - 1)


def _owner(row: LanguageRow) -> str:
    return f"request {row.work.request_id}"


def image_content(images: Sequence[PromptImage], first: int, stop: int) -> bytes:
    """What of the pictures stands in prompt tokens [first, stop): part of the keys of what is computed from them."""
    content = b""
    for image in images:
        if image.first < stop and first < image.end:
            for place in image.places:
                if place.start < stop and first < place.stop:
                    low = max(place.start, first) - first
                    content += image.key + low.to_bytes(8, "little")
    return content
