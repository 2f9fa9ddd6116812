"""The language engine over pages: equal to the dense model however it is cut, batched, cached or preempted."""

import pytest

from ganglion.engine.language_policy import POLICIES
from tests.cpu.language_toy import Stand, ToyDecoder, dense_greedy

PROMPTS = [[(7 * i + 3 * j) % 38 + 1 for j in range(2 + 3 * i)] for i in range(8)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_greedy_tokens_equal_dense(policy: str, num_rows: int) -> None:
    stand = Stand(max_rows=num_rows, policy=POLICIES[policy])
    for at, prompt in enumerate(PROMPTS):
        stand.submit(at, prompt, max_tokens=12)
    stand.run()
    for at, prompt in enumerate(PROMPTS):
        assert stand.tokens[at, 0] == dense_greedy(ToyDecoder(), prompt, 12)
        assert stand.usage(at).num_completion_tokens == 12
    stand.check_empty()
