"""Page layouts: what one page of each kind holds, in bytes. Written by models, obeyed by memory. Pure.

A *large page* is the unit that kinds compete for; it is cut into small pages of one layout (Jenga, arXiv 2503.18292).
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
}


class PageKind(StrEnum):
    """What the bytes of a page are; decides how the dashboard colours it and which policies see it."""

    KV = "kv"
    FEATURE = "feature"
    STATE = "state"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """One sort of small page: `shape` and `dtype` of its bytes; `slots` rows of it are addressable on their own.

    `name` is unique in a pool ("kv", "feature", "state"; a second model's pages carry its name: "planner.kv").
    """

    name: str
    kind: PageKind
    shape: tuple[int, ...]
    dtype: str
    slots: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(
                f"layout {self.name!r}: dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}"
            )
        if self.slots < 1 or any(dim < 1 for dim in self.shape):
            raise ValueError(
                f"layout {self.name!r}: slots {self.slots} and shape {self.shape} must be positive"
            )

    @property
    def page_bytes(self) -> int:
        """Bytes of one small page."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def num_pages(self, num_slots: int) -> int:
        """Pages that hold `num_slots` rows."""
        return -(-num_slots // self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """All layouts that share one pool, and the size of its large pages."""

    large_page_bytes: int
    layouts: tuple[PageLayout, ...]

    def __post_init__(self) -> None:
        names = [layout.name for layout in self.layouts]
        if len(set(names)) != len(names):
            raise ValueError(f"layout names must be unique, got {names}")
        for layout in self.layouts:
            if layout.page_bytes > self.large_page_bytes:
                raise ValueError(
                    f"layout {layout.name!r}: one page has {layout.page_bytes} bytes, "
                    f"a large page only {self.large_page_bytes}; raise memory.large_page_bytes"
                )

    def pages_per_large(self, name: str) -> int:
        """Small pages of layout `name` in one large page."""
        return self.large_page_bytes // self[name].page_bytes

    def __getitem__(self, name: str) -> PageLayout:
        for layout in self.layouts:
            if layout.name == name:
                return layout
        raise KeyError(f"no layout {name!r}; there are {[layout.name for layout in self.layouts]}")
