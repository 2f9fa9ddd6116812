"""Check: any backend against the reference, on seeded inputs of odd and even sizes.

Called by `ganglion doctor` and by tests. Knows no backend by name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ganglion.kernels import reference
from ganglion.kernels.contract import OPS, Attended, Backend

Inputs = tuple[Any, ...]
ATTEND_SIZES = (  # b, token, key, head, dim
    (1, 1, 1, 1, 8),
    (1, 48, 115, 4, 64),
    (2, 5, 7, 3, 16),
    (3, 33, 65, 2, 40),
    (16, 51, 67, 4, 64),
)
PAGED_SIZES = (  # pages in all, slot, layer, head, dim, token, num_keys of each row
    (3, 4, 1, 1, 8, 1, (1,)),
    (40, 4, 4, 4, 64, 48, (67, 67)),
    (23, 3, 2, 2, 16, 5, (1, 7, 19)),
    (9, 5, 3, 1, 40, 3, (25, 3)),
    (9, 4, 2, 2, 16, 3, (0, 8, 1)),
)
LINEAR_SIZES = (  # rows, low, high
    ((1,), 4, 3),
    ((1, 48), 192, 768),
    ((3, 7), 33, 17),
    ((16, 51), 256, 512),
)
HALVE_SIZES = ((1, 3, 5, 7, 4), (2, 32, 40, 40, 64), (3, 5, 9, 8, 7))  # b, c, h, w, high


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One case. `error` is the largest |got - reference| / (1 + |reference|)."""

    op: str
    dtype: str
    shape: str
    error: float
    tolerance: float

    @property
    def is_ok(self) -> bool:
        """Within the contract? NaN is not."""
        return self.error <= self.tolerance


def check(backend: Backend, *, device: str = "cpu", seed: int = 0) -> tuple[CheckRow, ...]:
    """Every op that the backend has, in every dtype of the contract. Raises KeyError for an op without contract."""
    truth = reference.backend()
    rows = []
    for op, function in backend.items():
        for dtype, tolerance in OPS[op].items():
            generator = torch.Generator().manual_seed(seed)
            for inputs in CASES[op](generator, dtype):
                moved = tuple(_moved(value, device) for value in inputs)
                with torch.inference_mode():
                    error = _error(function(*moved), truth[op](*moved))
                rows.append(
                    CheckRow(
                        op=op,
                        dtype=str(dtype).removeprefix("torch."),
                        shape=_shape(inputs),
                        error=error,
                        tolerance=tolerance,
                    )
                )
    return tuple(rows)


def _attend_cases(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Inputs]:
    for rows, num_tokens, num_keys, num_heads, dim in ATTEND_SIZES:
        query = _normal(generator, dtype, rows, num_tokens, num_heads, dim)
        # as in a cache: key and value side by side, so neither is contiguous
        key_value = _normal(generator, dtype, rows, num_keys, 2, num_heads, dim)
        yield (query, *key_value.unbind(2))
        mask = torch.zeros(1, 1, 1, num_keys, dtype=dtype)
        mask[..., num_keys // 2 + 1 :] = -torch.inf
        yield (query, *key_value.unbind(2), mask)


def _merge_cases(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Inputs]:
    for num_parts, rows, num_tokens, num_heads, dim in ((1, 1, 1, 1, 8), (2, 3, 5, 2, 16), (5, 2, 48, 4, 64)):  # fmt: skip
        yield tuple(
            Attended(
                out=_normal(generator, dtype, rows, num_tokens, num_heads, dim),
                lse=_normal(generator, torch.float32, rows, num_tokens, num_heads),
            )
            for _ in range(num_parts)
        )


def _paged_cases(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Inputs]:
    for num_pages, num_slots, num_layers, num_heads, dim, num_tokens, num_keys in PAGED_SIZES:
        pages = _normal(generator, dtype, num_pages, num_slots, num_layers, 2, num_heads, dim)
        query = _normal(generator, dtype, len(num_keys), num_tokens, num_heads, dim)
        span = -(-max(num_keys) // num_slots)
        ids = torch.randint(num_pages, (len(num_keys), span), generator=generator)
        yield query, pages, num_layers - 1, ids, torch.tensor(num_keys)


def _gather_cases(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Inputs]:
    for num_pages, rows, span, dim in ((1, 1, 1, 1), (40, 16, 17, 64), (7, 3, 5, 33)):
        ids = torch.randint(num_pages, (rows, span), generator=generator)
        yield _normal(generator, dtype, num_pages, 3, dim), ids


def _linear_cases(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Inputs]:
    for rows, low, high in LINEAR_SIZES:
        weight = _normal(generator, torch.float32, high, low) * low**-0.5
        x, bias = _normal(generator, dtype, *rows, low), _normal(generator, dtype, high)
        yield x, weight.to(dtype), bias


def _halve_cases(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Inputs]:
    for rows, channels, height, width, high in HALVE_SIZES:
        weight = _normal(generator, torch.float32, high, channels, 3, 3) * (9 * channels) ** -0.5
        x = _normal(generator, dtype, rows, height, width, channels).permute(0, 3, 1, 2)
        yield x, weight.to(dtype), _normal(generator, dtype, high)


CASES: dict[str, Callable[[torch.Generator, torch.dtype], Iterator[Inputs]]] = {
    "attend": _attend_cases,
    "merge": _merge_cases,
    "paged_attend": _paged_cases,
    "gather_pages": _gather_cases,
    "linear": _linear_cases,
    "halve": _halve_cases,
}


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Attended):
        return Attended(out=value.out.to(device), lse=value.lse.to(device))
    return value.to(device) if isinstance(value, Tensor) else value


def _error(got: Tensor | Attended, want: Tensor | Attended) -> float:
    if isinstance(want, Attended):
        assert isinstance(got, Attended), f"expected Attended, got {type(got).__name__}"
        return max(_error(got.out, want.out), _error(got.lse, want.lse))
    assert isinstance(got, Tensor), f"expected a Tensor, got {type(got).__name__}"
    assert got.shape == want.shape, f"expected {list(want.shape)}, got {list(got.shape)}"
    assert got.dtype == want.dtype, f"expected {want.dtype}, got {got.dtype}"
    difference = (got.float() - want.float()).abs() / (1.0 + want.float().abs())
    return difference.where(got != want, 0.0).max().item()  # -inf is -inf


def _shape(inputs: Inputs) -> str:
    tensors = [value.out if isinstance(value, Attended) else value for value in inputs]
    return " ".join(
        "x".join(map(str, value.shape)) for value in tensors if isinstance(value, Tensor)
    )
