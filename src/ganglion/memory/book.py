"""Book: what the ledger knows of one layout's pages. Owned by the ledger, changed by it and by `memory.compact`. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ganglion.layout import PageLayout
from ganglion.memory.pool import Slabs
from ganglion.memory.prefix import PageKey
from ganglion.memory.retention.value import Value
from ganglion.types import PageId

PAGE_COST_BYTES = 8192  # the ints of one move take as long as copying so many bytes


@dataclass(slots=True, kw_only=True)
class Book:
    """The lists are indexed by page id and grow with the pool's use. Cached pages are valued by their keys."""

    layout: PageLayout
    slabs: Slabs
    cached: Value
    num_refs: list[int] = field(default_factory=list)  # pins included
    owners: list[str] = field(default_factory=list)
    keys: list[PageKey | None] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)  # number of the reservation; 0: never reserved
    is_valid: bytearray = field(default_factory=bytearray)
    num_pins: dict[PageId, int] = field(default_factory=dict)
    page_of: dict[PageKey, PageId] = field(default_factory=dict)

    @property
    def cost_bytes(self) -> int:
        """What moving or evicting one page takes of a step's budget."""
        return max(self.layout.page_bytes, PAGE_COST_BYTES)

    def grow(self) -> None:
        """Make room for all ids that the pool has handed out; a half more, so that growing stays rare."""
        num_new = self.slabs.num_ids - len(self.num_refs) + len(self.num_refs) // 2
        self.num_refs += [0] * num_new
        self.owners += [""] * num_new
        self.keys += [None] * num_new
        self.epochs += [0] * num_new
        self.is_valid += bytes(num_new)

    def revive(self, page: PageId, owner: str) -> None:
        """cached -> held, still without a reference."""
        key = self.keys[page]
        assert key is not None, f"{self.layout.name} page {page} is neither held nor cached"
        self.cached.drop(key)
        self.slabs.unpark(page)
        self.owners[page] = owner

    def evict(self, page: PageId) -> None:
        """cached -> free: nobody finds it any more."""
        key = self.keys[page]
        assert key is not None, f"{self.layout.name} page {page} is cached without a key"
        self.keys[page] = None
        del self.page_of[key]
        self.cached.drop(key)
        self.slabs.evict(page)

    def cached_in(self, large: int) -> list[PageId]:
        """Cached pages of one large page."""
        num_refs, keys = self.num_refs, self.keys
        pages = self.slabs.pages_of(large)
        return [PageId(at) for at in pages if not num_refs[at] and keys[at] is not None]

    def held_in(self, large: int) -> list[PageId]:
        """Held pages of one large page."""
        num_refs = self.num_refs
        return [PageId(at) for at in self.slabs.pages_of(large) if num_refs[at]]

    def carry(self, sources: Sequence[PageId], targets: Sequence[PageId]) -> None:
        """The targets are the sources from now on: references, owner, key, epoch and place among the cached."""
        for source, target in zip(sources, targets, strict=True):
            assert source not in self.num_pins, f"{self.layout.name} page {source} is pinned"
            self.num_refs[target], self.num_refs[source] = self.num_refs[source], 0
            self.owners[target] = self.owners[source]
            self.epochs[target] = self.epochs[source]
            self.is_valid[target] = self.is_valid[source]
            key = self.keys[target] = self.keys[source]
            if key is not None:
                self.keys[source] = None
                self.page_of[key] = target

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is in exactly one state."""
        name = self.layout.name
        pages = [PageId(page) for page in range(len(self.num_refs))]
        held = {page for page in pages if self.num_refs[page]}
        cached = {page for page in pages if not self.num_refs[page] and self.keys[page] is not None}
        assert len(self.num_refs) >= self.slabs.num_ids, (len(pages), self.slabs.num_ids)
        assert min(self.num_refs, default=0) >= 0, f"{name}: negative references"
        self.slabs.check_integrity(held=held, parked=cached, stuck=self.num_pins.keys())
        by_key = {key: page for page in pages if (key := self.keys[page]) is not None}
        assert by_key == self.page_of, f"{name}: keys and pages disagree"
        assert all(self.is_valid[page] for page in by_key.values()), f"{name}: key, not valid"
        for page, num_pins in self.num_pins.items():
            assert 0 < num_pins <= self.num_refs[page], (name, page, num_pins)
        for key, page in by_key.items():
            if page in cached:
                assert self.cached.worth(key) > 0, f"{name}: cached page {page} has no worth"
