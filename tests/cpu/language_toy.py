"""A small real decoder with a dense reference: two or more layers, grouped heads, one group of layers with a window."""

import torch
from torch import Tensor
from torch.nn import functional

from ganglion.clock import SimulatedClock
from ganglion.engine.language import LanguageEngine
from ganglion.engine.language_requests import Ended
from ganglion.generation import GenerateRequest, LanguageSpec, Sampling, TokenDelta, Usage
from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.models.language import KvGroup, KvSpace
from ganglion.plan.cost import MeasuredCost
from ganglion.types import RequestId

WIDTH, HEADS, KV, DIM, VOCAB = 16, 4, 2, 6, 40
WINDOW = 7


def _layout(name: str, num_layers: int, slots: int) -> PageLayout:
    return PageLayout(
        name=name,
        kind=PageKind.KV,
        shape=(num_layers, 2, slots, KV, DIM),
        dtype="float32",
        slots=slots,
    )


class ToyDecoder:
    """Layers 0 and 2 see all, layers 1 and 3 the last WINDOW tokens. Token ids of 39 make it raise."""

    def __init__(
        self, *, slots: tuple[int, int] = (4, 2), name: str = "toy", seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

        self.num_layers = 4
        self.spec = LanguageSpec(
            name=name,
            family="toy",
            version="1",
            vocab_size=VOCAB,
            max_tokens=200,
            num_layers=self.num_layers,
            width=WIDTH,
            eos_ids=(0,),
            dtype="float32",
        )
        self.groups = (
            KvGroup(layout=_layout(f"{name}.kv", 2, slots[0]), layers=(0, 2)),
            KvGroup(layout=_layout(f"{name}.kv-window", 2, slots[1]), layers=(1, 3), window=WINDOW),
        )
        self.table = weight(VOCAB, WIDTH) * 4
        self.place = weight(200, WIDTH) * 4
        self.q = [weight(HEADS * DIM, WIDTH) * 2 for _ in range(4)]
        self.k = [weight(KV * DIM, WIDTH) * 2 for _ in range(4)]
        self.v = [weight(KV * DIM, WIDTH) for _ in range(4)]
        self.o = [weight(WIDTH, HEADS * DIM) for _ in range(4)]
        self.up = [weight(WIDTH, WIDTH) for _ in range(4)]
        self.num_run: list[tuple[int, range]] = []
        self.clock = SimulatedClock()

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.table[token_ids]

    def run(self, hidden: Tensor, positions: Tensor, kv: KvSpace, layers: range) -> Tensor:
        self.num_run.append((len(hidden), layers))
        self.clock.advance((5 + len(hidden)) * len(layers) * 1e-6)
        for layer in layers:
            if layer == 2 and bool((hidden == torch.inf).any()):
                raise RuntimeError("the toy cannot bear this token")
            x = functional.rms_norm(hidden + self.place[positions], (WIDTH,))
            out = kv.attend(
                layer,
                (x @ self.q[layer].T).view(-1, HEADS, DIM),
                (x @ self.k[layer].T).view(-1, KV, DIM),
                (x @ self.v[layer].T).view(-1, KV, DIM),
                scale=DIM**-0.5,
            )
            hidden = hidden + out.flatten(1) @ self.o[layer].T
            hidden = hidden + torch.relu(hidden) @ self.up[layer].T
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, (WIDTH,)) @ self.table.T


class DenseSpace:
    """One sequence, computed whole: the truth."""

    def __init__(self, groups: tuple[KvGroup, ...]) -> None:
        self._windows = {layer: group.window for group in groups for layer in group.layers}

    def attend(self, layer, query, key, value, *, scale, sinks=None, softcap=None):  # type: ignore[no-untyped-def]
        num_tokens, groups = len(query), query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
        far = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None]
        is_hidden = far < 0
        if self._windows[layer] is not None:
            is_hidden |= far >= self._windows[layer]
        return torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(is_hidden, -torch.inf).softmax(-1), values
        )


def dense_logits(model: ToyDecoder, tokens: list[int]) -> Tensor:
    """[token, vocab]."""
    positions = torch.arange(len(tokens))
    hidden = model.embed(torch.tensor(tokens))
    hidden = model.run(hidden, positions, DenseSpace(model.groups), range(model.num_layers))
    return model.logits(hidden)


CONTINUATIONS: dict[tuple[str, tuple[int, ...]], list[int]] = {}


def dense_greedy(model: ToyDecoder, prompt: list[int], num_tokens: int) -> list[int]:
    """The continuation, without regard to eos. Remembered: prompts come again in many tests."""
    known = CONTINUATIONS.setdefault((model.spec.name, tuple(prompt)), [])
    while len(known) < num_tokens:
        known.append(int(dense_logits(model, [*prompt, *known])[-1].argmax()))
    return known[:num_tokens]


class Stand:
    """An engine over a pool of its own, and all that it said."""

    def __init__(
        self,
        *models: ToyDecoder,
        num_large_pages: int = 64,
        max_rows: int = 8,
        large_page_bytes: int = 3072,
        **options: object,
    ) -> None:
        self.models = models or (ToyDecoder(),)
        self.clock = SimulatedClock()
        for model in self.models:
            model.clock = self.clock
        layout = PoolLayout(
            large_page_bytes=large_page_bytes,
            layouts=tuple(group.layout for model in self.models for group in model.groups),
        )
        self.ledger = Ledger(layout, num_large_pages)
        self.arena = Arena(layout, num_large_pages)
        for model in self.models:  # what was there before is no number
            for group in model.groups:
                self.arena.pages(group.layout.name).fill_(torch.nan)
        self.engine = LanguageEngine(
            {model.spec.name: model for model in self.models},
            self.ledger,
            self.arena,
            self.clock,
            max_rows=max_rows,
            cost=MeasuredCost(prior_us=1.0),
            **options,  # type: ignore[arg-type]
        )
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.deltas: list[TokenDelta] = []
        self.others: list[object] = []
        self.outcomes: dict[int, object] = {}

    def submit(
        self,
        request_id: int,
        prompt: list[int],
        max_tokens: int = 8,
        num_choices: int = 1,
        tenant: str = "",
        num_prompt_logprobs: int | None = None,
        model: str = "toy",
        speculate: str | None = None,
        **sampling: object,
    ) -> None:
        values = {"temperature": 0.0, "is_eos_ignored": True, "max_tokens": max_tokens} | sampling
        request = GenerateRequest(
            model=model,
            prompt=tuple(prompt),
            sampling=Sampling(**values),  # type: ignore[arg-type]
            num_choices=num_choices,
            tenant=tenant,
            num_prompt_logprobs=num_prompt_logprobs,
            speculate=speculate,
        )
        self.engine.submit(RequestId(request_id), request)

    def step(self, budget_us: int = 10**9) -> bool:
        did = self.engine.step(budget_us)
        for event in self.engine.drain():
            if isinstance(event, TokenDelta):
                self.deltas.append(event)
                key = (event.request_id, event.choice)
                self.tokens.setdefault(key, []).extend(event.token_ids)
            elif isinstance(event, Ended):
                assert event.request_id not in self.outcomes, "two ends"
                self.outcomes[event.request_id] = event.outcome
            else:
                self.others.append(event)
        return did

    def run(self, budget_us: int = 10**9, most: int = 2000) -> None:
        for _ in range(most):
            if not self.step(budget_us) and not self.engine.has_work:
                break
        else:
            raise AssertionError("the engine does not come to an end")
        self.ledger.check_integrity()

    def usage(self, request_id: int) -> Usage:
        outcome = self.outcomes[request_id]
        assert isinstance(outcome, Usage), outcome
        return outcome

    def check_empty(self) -> None:
        """Nobody holds a page."""
        self.ledger.check_integrity()
        used = self.ledger.stats().num_used_pages
        assert not any(used.values()), used
