"""States in pages against states that are kept plainly, and what becomes of them when a batch fails."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganglion.engine.kv_rows import KvRow, TableOfRow
from ganglion.engine.kv_space import PagedKv
from ganglion.engine.language_pages import GroupShape, Growth, LanguagePages
from ganglion.engine.language_work import LanguageRow, LanguageWork
from ganglion.generation import GenerateRequest, LanguageSpec, Sampling
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.models.dense_kv import DenseKv
from ganglion.models.language import KvSpace, StateGroup, StateSpan
from ganglion.types import PageId, RequestId
from tests.cpu.language_toy import Stand

WIDTH, VOCAB, SLOTS, BAD = 6, 30, 4, 29


def state_group(name: str, *spans: tuple[int, int, int]) -> StateGroup:
    """`spans`: layer, start, stop; one after the other."""
    made, at = [], 0
    for layer, start, stop in spans:
        made.append(StateSpan(layer=layer, start=start, stop=stop, at=at))
        at += stop - start
    layout = PageLayout(name=name, kind=PageKind.STATE, shape=(at,), dtype="float32", slots=SLOTS)
    return StateGroup(layout=layout, spans=tuple(made))


# layer 0's state lies in both
GROUPS = (state_group("toy.state", (0, 0, 4)), state_group("toy.state.1", (0, 4, 6), (1, 0, 6)))


def step(inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Goes round, so that it never settles: order counts, and nothing can be taken back."""
    outs = []
    for at in range(inputs.shape[1]):
        state = inputs[:, at] - 0.98 * state.roll(1, -1)
        outs.append(state * 2.0)
    return torch.stack(outs, dim=1), state


@given(
    st.lists(
        st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4
    ),  # of each row: tokens of its parts, one a batch
    st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_pages_equal_plain_states(rows: list[list[int]], seed: int) -> None:
    layout = PoolLayout(large_page_bytes=128, layouts=tuple(group.layout for group in GROUPS))
    arena = Arena(layout, 200)
    for group in GROUPS:
        arena.pages(group.layout.name).fill_(torch.nan)
    num_pages = [-(-sum(parts) // SLOTS) for parts in rows]
    firsts = [sum(num_pages[:at]) for at in range(len(rows))]
    generator = torch.Generator().manual_seed(seed)
    dense = [DenseKv(GROUPS, num_rows=1, max_tokens=100) for _ in rows]
    done = [0] * len(rows)
    for turn in range(max(map(len, rows))):
        now = [at for at, parts in enumerate(rows) if turn < len(parts)]
        batch = []
        for at in now:
            num_dropped = max(0, done[at] - 1) // SLOTS  # as paging drops them
            numbers = range(firsts[at] + num_dropped, firsts[at] + num_pages[at])
            tables = tuple(  # layouts share the arena's bytes: the second one's lie behind
                TableOfRow(pages=[PageId(n + first) for n in numbers], num_dropped=num_dropped)
                for first in (0, 400)
            )
            batch.append(KvRow(start=done[at], num_tokens=rows[at][turn], tables=tables))
        inputs = torch.randn(sum(row.num_tokens for row in batch), WIDTH, generator=generator)
        paged = PagedKv(arena, GROUPS, batch)
        for layer in (0, 1):
            out = paged.recur(layer, inputs, step)
            first = 0
            for at, row in zip(now, batch, strict=True):
                if layer == 0:
                    dense[at].extend([row.num_tokens])
                here = inputs[first : first + row.num_tokens]
                want = dense[at].recur(layer, here, step)
                torch.testing.assert_close(out[first : first + row.num_tokens], want)
                first += row.num_tokens
        for at, row in zip(now, batch, strict=True):
            done[at] += row.num_tokens


class Recurrent:
    """Two recurrent layers and no attention. Where token BAD comes, layer 1 raises: layer 0 has gone on then."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.num_layers = 2
        self.groups = GROUPS
        self.table = torch.randn(VOCAB, WIDTH, generator=generator)
        self.spec = LanguageSpec(
            name="toy",
            family="toy",
            version="1",
            vocab_size=VOCAB,
            max_tokens=200,
            num_layers=2,
            width=WIDTH,
            eos_ids=(),
            dtype="float32",
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        hidden = self.table[token_ids].clone()
        hidden[token_ids == BAD] = torch.nan
        return hidden

    def run(self, hidden: Tensor, positions: Tensor, kv: KvSpace, layers: range) -> Tensor:
        for layer in layers:
            if layer == 1 and bool(hidden.isnan().any()):
                raise RuntimeError("the toy cannot bear this token")
            hidden = hidden + kv.recur(layer, hidden, step)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table.T


def logprobs(prompt: list[int], drawn: list[int]) -> list[float]:
    model, tokens = Recurrent(), [*prompt, *drawn]
    kv = DenseKv(GROUPS, num_rows=1, max_tokens=len(tokens))
    kv.extend([len(tokens)])
    hidden = model.embed(torch.tensor(tokens))
    hidden = model.run(hidden, torch.arange(len(tokens)), kv, range(2))
    scores = model.logits(hidden).log_softmax(-1)
    return [float(scores[len(prompt) - 1 + at, token]) for at, token in enumerate(drawn)]


def test_batch_mates_of_a_request_that_fails_do_not_advance_twice() -> None:
    stand = Stand(Recurrent(), large_page_bytes=128)  # type: ignore[arg-type]
    asked = {1: [3, 4, 5, 6, 7, 8], 2: [9, BAD, 3], 3: [9, 10, 3]}
    stand.submit(1, asked[1], max_tokens=12, num_logprobs=0)
    for _ in range(5):  # into the middle of a page
        stand.step()
    stand.submit(2, asked[2], max_tokens=5)
    stand.submit(3, asked[3], max_tokens=12, num_logprobs=0)
    stand.run()
    assert isinstance(stand.outcomes[2], Exception)
    for request_id in (1, 3):
        got = [
            one.logprob
            for delta in stand.deltas
            if delta.request_id == request_id
            for one in delta.logprobs
        ]
        want = logprobs(asked[request_id], stand.tokens[request_id, 0])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    stand.check_empty()


def test_all_groups_of_a_prefix_are_evicted_together() -> None:
    """A prefix that one group has lost is lost: what is left of it in the others is room wasted."""
    shapes = [
        GroupShape(
            layout=PageLayout(
                name=name, kind=PageKind.KV, shape=(4,), dtype="float32", slots=slots
            ),
            window=None,
            pages_per_large=1,
        )
        for name, slots in (("a", 16), ("b", 32))
    ]
    num_tokens = 2048
    num_larges = sum(shape.layout.num_pages(num_tokens) for shape in shapes)
    layout = PoolLayout(large_page_bytes=16, layouts=tuple(shape.layout for shape in shapes))
    ledger = Ledger(layout, num_larges)
    pages = LanguagePages("m", shapes, ledger)
    row = new_row(pages, [at % 50 for at in range(num_tokens + 1)])
    pages.grow(row, num_tokens, Growth())
    row.num_computed = num_tokens
    pages.settle(row)
    pages.release(row)
    ledger.check_integrity()
    ledger.reserve("a", num_larges // 2, owner="other")
    again = new_row(pages, row.tokens)
    assert pages.match(again) >= num_tokens // 2 - 256
    pages.release(again)
    ledger.check_integrity()


def new_row(pages: LanguagePages, tokens: list[int]) -> LanguageRow:
    request = GenerateRequest(model="m", prompt=tuple(tokens), sampling=Sampling())
    work = LanguageWork(request_id=RequestId(1), request=request, arrival=1)
    tables, keys = pages.open_tables()
    return LanguageRow(work=work, choice=0, tokens=list(tokens), tables=tables, keys=keys)
