"""Int8 pages: what a row loses is bounded by its largest number, and rows do not touch each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ganglion.layout import PageKind, PageLayout
from ganglion.memory.codec.codec import Codec
from ganglion.memory.codec.int8 import SCALE_BYTES, Int8Codec

CODEC = Int8Codec()


def pages(seed: int, magnitude: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 5, 32, generator=generator)
    return (rows * magnitude * torch.tensor([1.0, 1e-3, 0.0, 1e3, 1.0])[:, None]).to(dtype)


@given(seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
def test_no_number_is_further_off_than_the_bound(seed: int, exponent: int) -> None:
    original = pages(seed, 10.0**exponent)
    error = (CODEC.decode(CODEC.encode(original), torch.float32) - original).abs()
    assert bool((error <= CODEC.error_bound(original)[..., None] * (1 + 1e-5)).all())


def test_a_row_of_bfloat16_loses_the_bound_and_its_own_rounding() -> None:
    original = pages(3, 1.0, torch.bfloat16)
    back = CODEC.decode(CODEC.encode(original), torch.bfloat16)
    assert back.dtype is torch.bfloat16
    largest = original.float().abs().amax(-1, keepdim=True)
    error = (back.float() - original.float()).abs()
    assert bool((error <= CODEC.error_bound(original)[..., None] + largest * 2**-8).all())


def test_whole_numbers_up_to_127_survive_when_the_row_has_a_127() -> None:
    row = torch.tensor([[127.0, 3.0, 0.0, 88.0, 126.0]])
    assert torch.equal(CODEC.decode(CODEC.encode(row), torch.float32), row)


def test_rows_are_encoded_alone() -> None:
    together = pages(7, 1.0)
    alone = torch.stack([CODEC.encode(page[None])[0] for page in together])
    assert torch.equal(CODEC.encode(together), alone)


def test_zero_rows_and_rows_too_small_for_a_scale_become_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-44, -1e-44]])
    assert CODEC.decode(CODEC.encode(rows), torch.float32).abs().max() <= 2e-44


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="1 others"):
        CODEC.encode(torch.tensor([[1.0, value]]))


def test_an_encoded_page_is_a_page_of_its_own_layout() -> None:
    layout = PageLayout(
        name="memory", kind=PageKind.FEATURE, shape=(5, 32), dtype="bfloat16", slots=1
    )
    encoded = CODEC.encoded(layout)
    assert encoded.shape == CODEC.encode(pages(0, 1.0))[0].shape == (5, 32 + SCALE_BYTES)
    assert (encoded.name, encoded.dtype) == ("memory@int8", "int8")
    assert encoded.page_bytes < 0.6 * layout.page_bytes
    assert isinstance(CODEC, Codec)
    with pytest.raises(ValueError, match="int32"):
        CODEC.encoded(PageLayout(name="x", kind=PageKind.KV, shape=(1,), dtype="int32", slots=1))
