"""Adapters in the language engine: each row as alone, pages that come on first use, go by their value, and move."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ganglion.clock import SimulatedClock
from ganglion.engine.drafter import Speculation
from ganglion.engine.language import LanguageEngine
from ganglion.engine.language_policy import POLICIES
from ganglion.engine.language_requests import Ended
from ganglion.errors import CheckpointError, FieldError, OutOfPagesError
from ganglion.generation import GenerateRequest, Sampling, TokenDelta, TokenLogprob, Usage
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.models.decoder import Decoder
from ganglion.models.decoder_load import load_language
from ganglion.models.lora_folder import WEIGHTS
from ganglion.models.lora_load import AdapterSet, read_adapters
from ganglion.plan.cost import MeasuredCost
from ganglion.types import RequestId
from tests.lora_folder import merge, write_adapter

VOCAB, LARGE_BYTES, NUM_NEW = 97, 8192, 12
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = ("", "odd", "few", "odd", "", "one", "big", "few")
PROMPTS = [[(7 * i + 3 * j) % 90 + 3 for j in range(2 + 4 * i)] for i in range(8)]


class House:
    """One model, its adapters by name, and the truth of each."""

    def __init__(self, folder: Path) -> None:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=5,
            num_key_value_heads=1,
            max_position_embeddings=256,
            eos_token_id=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = transformers.LlamaForCausalLM(config)
            for value in model.parameters():
                value.data.normal_(std=1.0 if value.ndim == 1 else value.shape[-1] ** -0.5)
        model.save_pretrained(folder)
        ours = load_language(folder, dtype=torch.float32, name="m", max_page_bytes=LARGE_BYTES)
        assert isinstance(ours, Decoder)
        self.model, self.folder = ours, folder
        spec = ours.decoder_spec
        self.folders = {
            "odd": write_adapter(folder / "odd", spec, rank=5, targets=TARGETS, seed=1, size=0.8),
            "few": write_adapter(folder / "few", spec, rank=2, seed=2, size=1.5),
            "one": write_adapter(
                folder / "one", spec, rank=3, seed=3, size=1.5, is_used=lambda name: ".1." in name
            ),
            "big": write_adapter(folder / "big", spec, rank=11, targets=TARGETS, seed=4, size=0.8),
        }
        self.adapters = self.read(LARGE_BYTES)
        self._greedy: dict[tuple[str, tuple[int, ...]], list[int]] = {}

    def read(self, max_page_bytes: int) -> AdapterSet:
        return read_adapters(
            self.folders,
            self.model.decoder_spec,
            model="m",
            dtype="float32",
            max_page_bytes=max_page_bytes,
        )

    def greedy(self, adapter: str, prompt: Sequence[int], num_tokens: int = NUM_NEW) -> list[int]:
        """What transformers goes on with, the adapter merged into its weights."""
        key = (adapter, tuple(prompt))
        if len(self._greedy.get(key, ())) < num_tokens:
            model = transformers.LlamaForCausalLM.from_pretrained(self.folder).eval()
            if adapter:
                merge(model, self.folders[adapter])
            ids = list(prompt)
            with torch.inference_mode():
                for _ in range(num_tokens):
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            self._greedy[key] = ids[len(prompt) :]
        return self._greedy[key][:num_tokens]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


class Stand:
    """An engine over a pool of its own, and what it said."""

    def __init__(
        self,
        house: House,
        *,
        num_large_pages: int = 64,
        adapters: AdapterSet | None = None,
        max_rows: int = 8,
        **options: object,
    ) -> None:
        found = adapters or house.adapters
        layouts = (*(group.layout for group in house.model.groups), found.layout)
        layout = PoolLayout(large_page_bytes=LARGE_BYTES, layouts=layouts)
        self.ledger, self.arena = Ledger(layout, num_large_pages), Arena(layout, num_large_pages)
        for each in layouts:  # what was there before is no number
            self.arena.pages(each.name).fill_(torch.nan)
        self.engine = LanguageEngine(
            {"m": house.model},
            self.ledger,
            self.arena,
            SimulatedClock(),
            max_rows=max_rows,
            cost=MeasuredCost(prior_us=1.0),
            adapters={"m": found},
            **options,  # type: ignore[arg-type]
        )
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.scores: dict[int, list[TokenLogprob]] = {}
        self.outcomes: dict[int, object] = {}

    def submit(
        self,
        request_id: int,
        adapter: str,
        prompt: Sequence[int],
        *,
        num_choices: int = 1,
        max_tokens: int = NUM_NEW,
        tenant: str = "",
        **sampling: object,
    ) -> None:
        values = {"temperature": 0.0, "is_eos_ignored": True, "max_tokens": max_tokens} | sampling
        request = GenerateRequest(
            model="m",
            prompt=tuple(prompt),
            sampling=Sampling(**values),  # type: ignore[arg-type]
            num_choices=num_choices,
            tenant=tenant,
            adapter=adapter,
        )
        self.engine.submit(RequestId(request_id), request)
        self._listen()

    def step(self, budget_us: int = 10**9) -> bool:
        did = self.engine.step(budget_us)
        self._listen()
        return did

    def run(self, budget_us: int = 10**9) -> None:
        for _ in range(3000):
            if not self.step(budget_us) and not self.engine.has_work:
                self.ledger.check_integrity()
                return
        raise AssertionError("the engine does not come to an end")

    def _listen(self) -> None:
        for event in self.engine.drain():
            if isinstance(event, TokenDelta):
                key = (event.request_id, event.choice)
                self.tokens.setdefault(key, []).extend(event.token_ids)
                self.scores.setdefault(event.request_id, []).extend(event.logprobs)
            elif isinstance(event, Ended):
                assert event.request_id not in self.outcomes, "two ends"
                self.outcomes[event.request_id] = event.outcome

    def usage(self, request_id: int) -> Usage:
        outcome = self.outcomes[request_id]
        assert isinstance(outcome, Usage), outcome
        return outcome

    def move(self) -> int:
        """Bring pages together; returns how many pages of adapters moved."""
        moves = self.ledger.plan_moves(1 << 30, num_spare=self.ledger.num_large_pages)
        if moves is None:
            return 0
        self.arena.copy(moves.copies)
        return len(moves.places.get("m.adapter", ()))

    def check_empty(self) -> None:
        """Nobody holds a page."""
        self.ledger.check_integrity()
        used = self.ledger.stats().num_used_pages
        assert not any(used.values()), used


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pages that were read from files, one entry a call."""
    from ganglion.models.lora_load import LoraAdapter

    counts: list[int] = []
    fill = LoraAdapter.fill

    def counted(self, pages):  # type: ignore[no-untyped-def]
        counts.append(len(pages))
        fill(self, pages)

    monkeypatch.setattr(LoraAdapter, "fill", counted)
    return counts


@pytest.mark.parametrize("budget_us", [0, 10**9])
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_tokens_equal_the_merged_models(
    policy: str, num_rows: int, budget_us: int, house: House
) -> None:
    stand = Stand(house, max_rows=num_rows, policy=POLICIES[policy])
    for at, (name, prompt) in enumerate(zip(NAMES, PROMPTS, strict=True)):
        stand.submit(at, name, prompt)
    stand.run(budget_us)
    for at, (name, prompt) in enumerate(zip(NAMES, PROMPTS, strict=True)):
        assert stand.tokens[at, 0] == house.greedy(name, prompt), (at, name)
    stand.check_empty()


def test_adapters_differ(house: House) -> None:
    """Otherwise the tests here would show nothing."""
    outs = {tuple(house.greedy(name, PROMPTS[2])) for name in ("", "odd", "few", "one", "big")}
    assert len(outs) == 5


def test_sixty_four_tokens_of_one_adapter(house: House) -> None:
    stand = Stand(house)
    stand.submit(0, "big", PROMPTS[1], max_tokens=64)
    stand.run()
    assert stand.tokens[0, 0] == house.greedy("big", PROMPTS[1], 64)


def test_deterministic_scores_are_bit_equal_in_every_way_of_running(house: House) -> None:
    """Alone, in a batch of eight, chunked, layered, sliced, preempted, from cached prefixes."""

    def scores(budget_us: int = 300, **options: object) -> tuple[dict[int, object], Stand]:
        stand = Stand(house, is_deterministic=True, **options)  # type: ignore[arg-type]
        for first in (0, 100):
            for at, (name, prompt) in enumerate(zip(NAMES, PROMPTS, strict=True)):
                stand.submit(first + at, name, prompt, max_tokens=4, num_logprobs=2)
            stand.run(budget_us)
        stand.check_empty()
        return dict(stand.scores), stand

    alone, cold = scores(max_rows=1)
    assert alone == {at: alone[at % 100] for at in alone}
    assert cold.usage(107).num_cached_tokens > 0
    assert scores(policy=POLICIES["layered"], budget_us=0)[0] == alone
    tight, stand = scores(num_large_pages=19)
    assert tight == alone
    assert stand.engine.num_preemptions > 0


def test_prefixes_are_shared_within_an_adapter_only(house: House) -> None:
    stand = Stand(house)
    prompt = PROMPTS[7]
    for at, (name, tenant) in enumerate(
        [("odd", ""), ("odd", ""), ("few", ""), ("", ""), ("odd", "somebody"), ("", "")]
    ):
        stand.submit(at, name, prompt, max_tokens=1, tenant=tenant)
        stand.run()
    cached = [stand.usage(at).num_cached_tokens > 0 for at in range(6)]
    assert cached == [False, True, False, False, False, True]


def test_rows_of_one_batch_wait_for_no_prefix_of_another_adapter(house: House) -> None:
    stand = Stand(house)
    for at, name in enumerate(("odd", "few", "odd")):
        stand.submit(at, name, PROMPTS[7])
    stand.run()
    assert stand.usage(1).num_cached_tokens == 0
    assert stand.usage(2).num_cached_tokens > 0
    assert stand.tokens[2, 0] == house.greedy("odd", PROMPTS[7])


def test_choices_of_one_request_share_the_adapter(house: House) -> None:
    stand = Stand(house)
    stand.submit(0, "odd", PROMPTS[3], num_choices=3)
    stand.run()
    want = house.greedy("odd", PROMPTS[3])
    assert [stand.tokens[0, choice] for choice in range(3)] == [want] * 3
    stand.check_empty()


def test_drafts_are_checked_with_the_row_s_adapter(house: House) -> None:
    stand = Stand(house, speculation=Speculation(source="ngram", max_tokens=4, is_paced=False))
    for at, name in enumerate(("odd", "", "few")):
        stand.submit(at, name, PROMPTS[at + 1], max_tokens=48)
    num_steps = 0
    while stand.engine.has_work:
        stand.step()
        num_steps += 1
    assert num_steps < 48, "nothing was drafted"
    for at, name in enumerate(("odd", "", "few")):
        assert stand.tokens[at, 0] == house.greedy(name, PROMPTS[at + 1], 48), name
    stand.check_empty()


# --- coming and going --------------------------------------------------------------------------------------------


def test_an_adapter_is_read_on_first_use_and_stays_cached(
    house: House, num_read: list[int]
) -> None:
    stand = Stand(house)
    stand.submit(0, "", PROMPTS[2])
    stand.run()
    assert not num_read
    for at in (1, 2, 3):
        stand.submit(at, "odd", PROMPTS[2])
        if at > 1:
            stand.run()
    assert num_read == [house.adapters.adapters["odd"].num_pages]
    stand.check_empty()
    cached = stand.ledger.stats().num_cached_pages[house.adapters.layout.name]
    assert cached == num_read[0]


def test_short_of_memory_the_adapter_used_longest_ago_goes(
    house: House, num_read: list[int]
) -> None:
    """A pool for the largest and little more: every adapter is read in again after the others, and is still right."""
    largest = max(adapter.num_pages for adapter in house.adapters.adapters.values())
    stand = Stand(house, num_large_pages=largest + 2)
    for at, name in enumerate(("big", "odd", "big", "few", "few", "big")):
        stand.submit(at, name, PROMPTS[1], max_tokens=4)
        stand.run()
        assert stand.tokens[at, 0] == house.greedy(name, PROMPTS[1])[:4]
    pages = {name: each.num_pages for name, each in house.adapters.adapters.items()}
    assert sum(num_read) > pages["big"] + pages["odd"] + pages["few"]
    stand.check_empty()


def test_an_adapter_in_use_is_not_evicted(house: House) -> None:
    """Two whose pages do not fit together take turns; nobody loses a page under way."""
    largest = max(adapter.num_pages for adapter in house.adapters.adapters.values())
    stand = Stand(house, num_large_pages=largest + 3)
    for at in range(4):
        stand.submit(at, ("big", "odd")[at % 2], PROMPTS[at], max_tokens=9)
    stand.run()
    for at in range(4):
        want = house.greedy(("big", "odd")[at % 2], PROMPTS[at])[:9]
        assert stand.tokens[at, 0] == want
    stand.check_empty()


def test_reading_is_sliced_and_others_go_on(house: House, num_read: list[int]) -> None:
    stand = Stand(house)
    stand.submit(0, "", PROMPTS[1], max_tokens=40)
    stand.step()
    stand.submit(1, "big", PROMPTS[1])
    num_before = len(stand.tokens[0, 0])
    while (1, 0) not in stand.tokens:
        stand.step(budget_us=17)  # a page at a time
    assert num_read == [1] * house.adapters.adapters["big"].num_pages
    assert len(stand.tokens[0, 0]) > num_before
    stand.run()
    assert stand.tokens[1, 0] == house.greedy("big", PROMPTS[1])


def test_cancelled_while_it_is_read(house: House) -> None:
    stand = Stand(house)
    stand.submit(0, "big", PROMPTS[1])
    stand.step(budget_us=17)
    stand.engine.cancel(RequestId(0))
    stand.check_empty()
    stand.submit(1, "big", PROMPTS[1])
    stand.run()
    assert stand.tokens[1, 0] == house.greedy("big", PROMPTS[1])
    stand.check_empty()


def test_pages_move_under_rows_and_adapters(house: House) -> None:
    stand = Stand(house, num_large_pages=48, adapters=house.read(1536))
    for at in range(6):
        stand.submit(at, NAMES[at + 1], PROMPTS[at])
    num_moved = 0
    for step in range(200):
        stand.step(budget_us=60)
        if step == 9:
            stand.engine.cancel(RequestId(0))
        num_moved += stand.move()
        if not stand.engine.has_work:
            break
    assert num_moved > 3, num_moved
    for at in range(1, 6):
        assert stand.tokens[at, 0] == house.greedy(NAMES[at + 1], PROMPTS[at]), at
    stand.check_empty()


# --- what cannot be ----------------------------------------------------------------------------------------------


def test_unknown_adapters_are_refused_by_name(house: House) -> None:
    stand = Stand(house)
    stand.submit(0, "ood", PROMPTS[0])
    outcome = stand.outcomes[0]
    assert isinstance(outcome, FieldError)
    assert "one of odd, few, one, big, got 'ood'" in str(outcome)


def test_an_adapter_larger_than_the_pool_is_refused_at_once(house: House) -> None:
    stand = Stand(house, num_large_pages=house.adapters.adapters["big"].num_pages)
    stand.submit(0, "big", PROMPTS[0])
    assert isinstance(stand.outcomes[0], OutOfPagesError)
    stand.submit(1, "few", PROMPTS[0])
    stand.run()
    assert stand.tokens[1, 0] == house.greedy("few", PROMPTS[0])


def test_a_bad_file_ends_its_own_requests_only(house: House, tmp_path: Path) -> None:
    spec = house.model.decoder_spec
    folders = {
        "bad": write_adapter(tmp_path / "bad", spec, seed=7),
        "good": house.folders["odd"],
    }
    numbers = load_file(folders["bad"] / WEIGHTS)
    next(iter(numbers.values()))[1, 1] = torch.nan
    save_file(numbers, folders["bad"] / WEIGHTS)
    found = read_adapters(folders, spec, model="m", dtype="float32", max_page_bytes=LARGE_BYTES)
    stand = Stand(house, adapters=found)
    for at, name in enumerate(("good", "bad", "", "bad")):
        stand.submit(at, name, PROMPTS[2])
    stand.run()
    for at in (1, 3):
        assert isinstance(stand.outcomes[at], CheckpointError)
        assert "not finite" in str(stand.outcomes[at])
    assert stand.tokens[0, 0] == house.greedy("odd", PROMPTS[2])
    assert stand.tokens[2, 0] == house.greedy("", PROMPTS[2])
    stand.check_empty()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 7), st.sampled_from(NAMES)),
        st.tuples(st.just("step"), st.sampled_from((0, 17, 60, 10**6)), st.just("")),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just("")),
        st.tuples(st.just("preempt"), st.just(0), st.just("")),
        st.tuples(st.just("move"), st.just(0), st.just("")),
    ),
    max_size=40,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(actions=ACTIONS, num_large_pages=st.sampled_from((16, 24, 64)))
def test_random_operations_end_at_the_baseline(
    actions: list[tuple[str, int, str]], num_large_pages: int, house: House
) -> None:
    stand = Stand(house, num_large_pages=num_large_pages, max_rows=4)
    asked: dict[int, tuple[str, int]] = {}
    for action, number, name in actions:
        if action == "submit":
            asked[len(asked)] = (name, number)
            stand.submit(len(asked) - 1, name, PROMPTS[number], max_tokens=5)
        elif action == "step":
            stand.step(number)
        elif action == "cancel":
            stand.engine.cancel(RequestId(number))
        elif action == "preempt":
            stand.engine.preempt_latest()
        else:
            stand.move()
        stand.ledger.check_integrity()
    stand.run()
    assert set(stand.outcomes) == set(asked)
    for at, (name, number) in asked.items():
        if isinstance(stand.outcomes[at], Usage):
            assert stand.tokens[at, 0] == house.greedy(name, PROMPTS[number])[:5]
    stand.check_empty()
