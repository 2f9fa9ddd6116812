"""Kernels: backends against the reference; merged = whole; paged = dense; what is hidden stays hidden."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ganglion.kernels import cpu, reference
from ganglion.kernels.check import CASES, check
from ganglion.kernels.contract import OPS, Attended

BACKENDS = {"reference": reference.backend, "cpu": cpu.backend}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(got: Attended, want: Attended) -> float:
    out = (got.out.float() - want.out.float()).abs().max().item()
    return max(out, (got.lse - want.lse).abs().max().item())


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_keeps_the_contract(name: str) -> None:
    rows = check(BACKENDS[name]())
    assert {(row.op, row.dtype) for row in rows} == {
        (op, str(dtype).removeprefix("torch.")) for op in BACKENDS[name]() for dtype in OPS[op]
    }
    assert [row for row in rows if not row.is_ok] == []


def test_every_op_has_a_truth_and_cases() -> None:
    assert set(OPS) == set(reference.backend()) == set(CASES)
    assert set(cpu.backend()) <= set(OPS)


def test_check_finds_wrong_results_and_nan() -> None:
    def off(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear(x, weight, bias) + 0.1

    def broken(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear(x, weight, bias) * math.nan

    for wrong in (off, broken):
        assert not any(row.is_ok for row in check({"linear": wrong}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_finds_another_shape_or_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="expected"):
        check({"linear": lambda x, weight, bias: x.double()})


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("cuts", [(1,), (7, 8), (3, 50, 114)])
def test_merged_equals_whole(name: str, cuts: tuple[int, ...]) -> None:
    attend = BACKENDS[name]()["attend"]
    query, key_value = normal(0, 2, 13, 3, 24), normal(1, 2, 115, 2, 3, 24)
    ends = (0, *cuts, 115)
    parts = [
        attend(query, *key_value[:, low:high].unbind(2)) for low, high in itertools.pairwise(ends)
    ]
    whole = attend(query, *key_value.unbind(2))
    assert difference(reference.merge(*parts), whole) < OPS["merge"][torch.float32]
    # in any order, and part by part
    turned = reference.merge(parts[-1], reference.merge(*parts[:-1]))
    assert difference(turned, whole) < OPS["merge"][torch.float32]


def test_merge_survives_scores_far_apart() -> None:
    query, key_value = normal(0, 1, 5, 2, 8), normal(1, 1, 9, 2, 2, 8)
    key_value[:, 4:, 0] *= 300.0
    parts = [reference.attend(query, *key_value[:, at].unbind(2)) for at in (slice(4), slice(4, 9))]
    whole = reference.attend(query, *key_value.unbind(2))
    merged = reference.merge(*parts)
    assert torch.isfinite(merged.out).all()
    assert (merged.out - whole.out).abs().max() < 1e-5


def test_merge_ignores_a_part_without_keys() -> None:
    part = reference.attend(normal(0, 1, 5, 2, 8), *normal(1, 1, 9, 2, 2, 8).unbind(2))
    nothing = Attended(out=torch.zeros_like(part.out), lse=torch.full_like(part.lse, -torch.inf))
    assert difference(reference.merge(nothing, part), part) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_keys", "num_slots"), [((67, 67), 4), ((1, 19, 8), 3), ((5,), 8)])
def test_paged_equals_dense(
    name: str, dtype: torch.dtype, num_keys: tuple[int, ...], num_slots: int
) -> None:
    backend, rows, span = BACKENDS[name](), len(num_keys), -(-max(num_keys) // num_slots)
    pages = normal(2, rows * span + 3, num_slots, 3, 2, 2, 16).to(dtype)
    ids = torch.randperm(len(pages), generator=torch.Generator().manual_seed(3))[: rows * span]
    ids = ids.view(rows, span)
    query = normal(4, rows, 7, 2, 16).to(dtype)
    paged = backend["paged_attend"](query, pages, 1, ids, torch.tensor(num_keys))
    for row, num_row_keys in enumerate(num_keys):
        laid_out = torch.cat([pages[page] for page in ids[row].tolist()])[None, :num_row_keys, 1]
        dense = backend["attend"](query[row : row + 1], *laid_out.unbind(2))
        one = Attended(out=paged.out[row : row + 1], lse=paged.lse[row : row + 1])
        assert difference(one, dense) < OPS["paged_attend"][dtype]


@pytest.mark.parametrize("name", BACKENDS)
def test_slots_behind_the_last_key_do_not_matter(name: str) -> None:
    paged_attend = BACKENDS[name]()["paged_attend"]
    pages, query = normal(0, 6, 4, 1, 2, 2, 8), normal(1, 2, 3, 2, 8)
    ids, num_keys = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([9, 2])
    clean = paged_attend(query, pages, 0, ids, num_keys)
    pages[2, 1:], pages[3, 2:], pages[4:] = math.nan, math.nan, math.nan
    assert difference(paged_attend(query, pages, 0, ids, num_keys), clean) == 0.0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_keys", [(0, 9), (0, 0)])
def test_rows_without_keys_merge_to_the_others(name: str, num_keys: tuple[int, ...]) -> None:
    """A worker that holds none of a row's pages still answers for it, and adds nothing."""
    paged_attend = BACKENDS[name]()["paged_attend"]
    pages, query = normal(0, 6, 4, 1, 2, 2, 8), normal(1, 2, 3, 2, 8)
    here = paged_attend(
        query, pages, 0, torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor(num_keys)
    )
    assert here.out[0].abs().max() == 0
    assert torch.all(here.lse[0] == -torch.inf)
    assert torch.isfinite(here.lse[1]).all() == (num_keys[1] > 0)
    elsewhere = reference.attend(query, *normal(2, 2, 5, 2, 2, 8).unbind(2))
    merged = reference.merge(here, elsewhere, here._replace(lse=here.lse - torch.inf))
    assert (merged.out[0] - elsewhere.out[0]).abs().max() < 1e-6
    nothing = reference.merge(here, here)
    assert nothing.out[0].abs().max() == 0
    assert torch.all(nothing.lse[0] == -torch.inf)


@pytest.mark.skipif(bool(cpu.why_not_packed(torch.bfloat16)), reason="no packed bfloat16 here")
def test_linear_onto_equals_linear_and_sum() -> None:
    x, base = (normal(at, 3, 7, 32).bfloat16() for at in range(2))
    weight, bias = (normal(2, 32, 32) / 32**0.5).bfloat16(), normal(3, 32).bfloat16()
    got = cpu.PackedLinear(weight, bias).forward_onto(x, base)
    want = base.float() + reference.linear(x, weight, bias).float()
    error = ((got.float() - want).abs() / (1 + want.abs())).max().item()
    assert error < OPS["linear"][torch.bfloat16]


def test_why_not_packed_names_the_dtype() -> None:
    assert "float32" in cpu.why_not_packed(torch.float32)
