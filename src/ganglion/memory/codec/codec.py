"""The Codec seam: a page in fewer bytes and back. Called by whoever keeps pages that are worth less than their bytes.

An encoded page is a page of another layout, so that memory needs no rule of its own for it. A codec knows shapes and
dtypes; it knows neither page ids nor what the numbers mean.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ganglion.layout import PageLayout


@runtime_checkable
class Codec(Protocol):
    """Lossy, row by row: what one row holds does not change what another loses."""

    def encoded(self, layout: PageLayout) -> PageLayout:
        """The layout of encoded pages of `layout`; its name carries the codec's."""
        ...

    def encode(self, pages: Tensor) -> Tensor:
        """Pages [*any, *page shape] to encoded pages [*any, *encoded page shape]."""
        ...

    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        """Encoded pages back to pages of `dtype`."""
        ...

    def error_bound(self, pages: Tensor) -> Tensor:
        """Largest absolute error of every row, [*any, *page shape but its last], before rounding to a narrower dtype."""
        ...
