"""Speculation in the language engine: tokens, ends, usage and pages equal those of plain decoding, whoever drafts."""

import pytest
from torch import Tensor

from ganglion.engine.drafter import Speculation
from ganglion.engine.language_policy import POLICIES
from ganglion.errors import ErrorCode, FieldError, UnsupportedFieldError
from ganglion.types import RequestId
from tests.cpu.language_toy import Stand, ToyDecoder, dense_greedy

PROMPTS = [[(7 * i + 3 * j) % 38 + 1 for j in range(2 + 3 * i)] for i in range(8)]
LONG = [(5 * j * j + 3 * j) % 38 + 1 for j in range(60)]
NO_BUDGET_US, ALL_US = 0, 10**9


class Mistaken(ToyDecoder):
    """Drafts as the target would, but is wrong at some places."""

    def __init__(self, every: int = 3, name: str = "draft") -> None:
        super().__init__(name=name)
        self.every = every

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        is_wrong = (hidden[:, 0] * 1000).long() % self.every == 0
        logits[is_wrong] = logits[is_wrong].roll(1, -1)
        return logits


def stand(source: str, *models: ToyDecoder, **options: object) -> Stand:
    settings = {
        name: options.pop(name)
        for name in ("max_tokens", "is_ahead", "is_paced")
        if name in options
    }
    speculation = Speculation(source=source, **({"is_paced": False} | settings))  # type: ignore[arg-type]
    return Stand(ToyDecoder(), *models, speculation=speculation, **options)


SOURCES = {
    "ngram": ("ngram", ()),
    "same": ("draft", (lambda: ToyDecoder(name="draft"),)),
    "other": ("draft", (lambda: ToyDecoder(name="draft", seed=1),)),
    "mistaken": ("draft", (Mistaken,)),
}


def make(kind: str, **options: object) -> Stand:
    source, makers = SOURCES[kind]
    return stand(source, *[make_() for make_ in makers], **options)


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("budget_us", [NO_BUDGET_US, ALL_US])
@pytest.mark.parametrize("num_rows", [1, 2, 8])
@pytest.mark.parametrize("kind", SOURCES)
def test_tokens_equal_plain_greedy(
    kind: str, num_rows: int, budget_us: int, is_ahead: bool
) -> None:
    if is_ahead and kind == "ngram":
        pytest.skip("there is nothing to do ahead")
    made = make(kind, max_rows=num_rows, is_ahead=is_ahead, is_deterministic=True, max_tokens=5)
    for at, prompt in enumerate(PROMPTS):
        made.submit(at, prompt, max_tokens=64)
    made.run(budget_us, most=20000)
    for at, prompt in enumerate(PROMPTS):
        assert made.tokens[at, 0] == dense_greedy(ToyDecoder(), prompt, 64), at
        assert made.usage(at).num_completion_tokens == 64
    made.check_empty()
    counts = made.engine.draft_counts
    assert counts.num_drafted > 0
    if kind == "same":
        assert counts.num_held > 0.9 * counts.num_drafted
    if kind == "mistaken":
        assert 0.1 < counts.num_held / counts.num_drafted < 0.95
