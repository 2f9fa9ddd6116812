"""Keys of shared pages: equal keys mean equal bytes, and never across a tenant or a model. Pure; called by the engine."""

import hashlib
from collections.abc import Sequence
from typing import NewType

PageKey = NewType("PageKey", bytes)
KEY_BYTES = 16


def page_keys(scope: str, content: bytes, num_pages: int) -> tuple[PageKey, ...]:
    """Keys of `num_pages` pages that are made from `content` as a whole; `scope` names tenant, model and stage."""
    base = _digest(_framed(scope.encode()), content)
    return tuple(PageKey(base + at.to_bytes(4, "little")) for at in range(num_pages))


def chain(tenant: str, model: str, chunks: Sequence[bytes]) -> tuple[PageKey, ...]:
    """Keys of pages that are made one after the other: page i holds chunks[i] and depends on all chunks before it."""
    digest = _digest(_framed(tenant.encode()), _framed(model.encode()))
    keys = []
    for chunk in chunks:
        digest = _digest(digest, chunk)
        keys.append(PageKey(digest))
    return tuple(keys)


def _framed(text: bytes) -> bytes:
    """With its length in front, so that ("ab", "c") and ("a", "bc") differ."""
    return len(text).to_bytes(8, "little") + text


def _digest(head: bytes, tail: bytes) -> bytes:
    return hashlib.blake2b(head + tail, digest_size=KEY_BYTES).digest()
