"""Int8: symmetric, one float32 scale per row (the last dimension of a page), the scale's bytes behind the row.

Half the bytes of bfloat16 and a fixed share more: 4 bytes a row. The error of a number is at most 1/254 of the largest
of its row (before the result is rounded to its dtype). A row of whole numbers whose largest is 127 keeps them exactly.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from ganglion.layout import PageLayout

SCALE_BYTES = 4
MAX_CODE = 127


class Int8Codec:
    """Rows of floats as int8 codes and a scale."""

    def encoded(self, layout: PageLayout) -> PageLayout:
        """`name@int8`, each row SCALE_BYTES longer. Raises ValueError for layouts that are not rows of floats."""
        if layout.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"layout {layout.name!r}: int8 encodes float32, bfloat16 or float16, got {layout.dtype}"
            )
        *rows, num_columns = layout.shape
        shape = (*rows, num_columns + SCALE_BYTES)
        return replace(layout, name=f"{layout.name}@int8", shape=shape, dtype="int8")

    def encode(self, pages: Float[Tensor, "*row column"]) -> Int8[Tensor, "*row code"]:
        """Nearest codes. Raises ValueError when a number is not finite: it would spoil its whole row in silence."""
        values = pages.float()
        largest = values.abs().amax(-1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError(
                f"int8 encodes finite numbers, got {int((~torch.isfinite(values)).sum())} others"
            )
        scale = largest / MAX_CODE
        # a scale that underflows to zero belongs to a row that is zero for every purpose
        codes = torch.where(scale > 0, values / scale, 0.0).round().clamp(-MAX_CODE, MAX_CODE)
        return torch.cat([codes.to(torch.int8), scale.contiguous().view(torch.int8)], dim=-1)

    def decode(
        self, encoded: Int8[Tensor, "*row code"], dtype: torch.dtype
    ) -> Float[Tensor, "*row column"]:
        codes = encoded[..., :-SCALE_BYTES].float()
        scale = encoded[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        return (codes * scale.view(torch.float32)).to(dtype)

    def error_bound(self, pages: Float[Tensor, "*row column"]) -> Float32[Tensor, "*row"]:
        return pages.float().abs().amax(-1) / (2 * MAX_CODE)
