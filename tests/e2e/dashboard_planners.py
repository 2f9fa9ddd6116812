"""Scripted language models for the dashboard's stage: four requests that come forward in the time robots leave."""

from collections import deque

from ganglion.types import (
    LanguageRequestStats,
    LanguageStats,
    LanguageStepRecord,
    LivePage,
    PageId,
    PromptPhase,
    RequestId,
)

MODEL = "qwen3-moe"
LAYOUT = f"{MODEL}.kv"
PLANNER_PAGES = {LAYOUT: 16}  # in a large page
PAGE_TOKENS = 64
PREFILL_TOKENS = 24  # of a turn
TURN_US = 2600.0
NUM_REQUESTS = 4
PROMPTS = (2000, 620, 1400, 90)
CACHED = (640, 576, 0, 64)
ANSWERS = (120, 200, 64, 160)


class ScriptedPlanners:
    """Called by the scripted service between its steps."""

    def __init__(self) -> None:
        self._steps: deque[LanguageStepRecord] = deque(maxlen=400)
        self._num_steps = self._num_new_tokens = self._num_results = 0
        self._next_request = 1
        self._computed: dict[RequestId, int] = {}
        self._made: dict[RequestId, int] = {}

    def turn(self, start_s: float, *, until_s: float) -> None:
        """A prompt comes forward by some tokens, those that answer by one, if there is time for it."""
        if start_s + TURN_US * 1e-6 > until_s:
            return
        self._replace_ended()
        num_prefill = num_decode = 0
        for request_id in list(self._computed):
            num_left = _of(PROMPTS, request_id) - self._computed[request_id]
            if num_left and not num_prefill:
                num_prefill = min(PREFILL_TOKENS, num_left)
                self._computed[request_id] += num_prefill
            elif not num_left:
                self._made[request_id] += 1
                num_decode += 1
        self._num_new_tokens += num_decode
        self._num_steps += 1
        self._steps.append(
            LanguageStepRecord(
                step=self._num_steps,
                model=MODEL,
                start_s=start_s + 0.0001,
                run_us=TURN_US,
                budget_us=10_000,
                num_rows=num_decode + (num_prefill > 0),
                num_prefill_tokens=num_prefill,
                num_decode_tokens=num_decode,
                first_layer=0,
                num_layers=24,
                num_running=NUM_REQUESTS,
                num_waiting=1,
            )
        )

    def _replace_ended(self) -> None:
        for request_id in list(self._computed):
            if self._made[request_id] >= _of(ANSWERS, request_id):
                del self._computed[request_id], self._made[request_id]
                self._num_results += 1
        while len(self._computed) < NUM_REQUESTS:
            request_id = RequestId(self._next_request)
            self._next_request += 1
            self._computed[request_id], self._made[request_id] = _of(CACHED, request_id), 0

    def stats(self) -> LanguageStats:
        """As the service would tell it."""
        waiting = RequestId(self._next_request)
        return LanguageStats(
            requests=(*map(self._request, self._computed), self._request(waiting)),
            num_under_way=len(self._computed) + 1,
            num_running=len(self._computed),
            num_waiting=1,
            num_results=self._num_results,
            num_errors=0,
            num_cancelled=0,
            num_prompt_tokens=sum(PROMPTS),
            num_cached_tokens=sum(CACHED),
            num_new_tokens=self._num_new_tokens,
            num_preemptions=1,
            num_drafted_tokens=0,
            num_held_tokens=0,
            first_token_p50_ms=412.0,
            steps=tuple(self._steps),
            layouts={LAYOUT: MODEL},
        )

    def _request(self, request_id: RequestId) -> LanguageRequestStats:
        num_prompt, num_computed = _of(PROMPTS, request_id), self._computed.get(request_id, 0)
        phase = PromptPhase.DECODE if num_computed == num_prompt else PromptPhase.PREFILL
        return LanguageRequestStats(
            request_id=request_id,
            model=MODEL,
            phase=phase if request_id in self._computed else PromptPhase.WAITING,
            age_s=1.5,
            num_choices=1,
            num_prompt_tokens=num_prompt,
            num_computed_tokens=num_computed,
            num_cached_tokens=min(_of(CACHED, request_id), num_computed),
            num_new_tokens=self._made.get(request_id, 0),
            max_new_tokens=_of(ANSWERS, request_id),
            tokens_per_s=61.5,
            num_pages=-(-num_computed // PAGE_TOKENS),
            num_preemptions=0,
        )

    def pages(
        self, num_used: dict[str, int], num_cached: dict[str, int]
    ) -> tuple[list[LivePage], int]:
        """Its pages, from the pool's first large page on, and how many large ones those are. Counts them, too."""
        owners = ["cached"] * 6
        for request_id, num_computed in self._computed.items():
            owners += [f"request {request_id}"] * (num_computed // PAGE_TOKENS)
        num_used[LAYOUT], num_cached[LAYOUT] = len(owners) - 6, 6
        pages = [
            LivePage(page_id=PageId(at), layout=LAYOUT, kind="kv", owner=owner, num_refs=at > 5)
            for at, owner in enumerate(owners)
        ]
        return pages, -(-len(owners) // PLANNER_PAGES[LAYOUT])


def _of(values: tuple[int, ...], request_id: RequestId) -> int:
    return values[request_id % len(values)]
