"""Speculative decoding, the part without a forward: what to draft, what of a draft holds, how long a draft pays.

Called by the engine, which runs target and draft models. Pure but for the probabilities handed in: knows token ids and
numbers; not pages, models or requests. Dimension names: draft (one drafted token
each), place (one more than draft), vocab.

Two rules accept drafts. By equality (`num_equal`): the target draws as it would without a draft, under the same random numbers,
and the draft holds as long as it says the same. Tokens then equal those of plain decoding, greedy or seeded. For drafts without probabilities
(an n-gram's) no rule accepts more. By rejection (`accept_by_rejection`): a drafting model's token holds more often, the tokens
follow the target's distribution exactly, but are others than without a draft.
"""

from collections.abc import Sequence
from itertools import takewhile

from jaxtyping import Float
from torch import Tensor


class NgramIndex:
    """Drafts by looking up where the last tokens stood before: prompt lookup (Saxena 2023; PLD), one index per choice.

    A token costs one entry for each length of n-gram from `min_ngram` to `max_ngram`.
    """

    def __init__(self, *, min_ngram: int = 2, max_ngram: int = 4) -> None:
        assert 1 <= min_ngram <= max_ngram, f"n-grams from {min_ngram} to {max_ngram}"
        self._lengths = range(max_ngram, min_ngram - 1, -1)
        self._tokens: list[int] = []
        # n-gram -> where the token after its latest occurrence stands, the one at the very end left out.
        self._next_of: dict[tuple[int, ...], int] = {}

    def extend(self, token_ids: Sequence[int]) -> None:
        """More tokens of the prompt, or that the target has drawn."""
        for token_id in token_ids:
            end = len(self._tokens)
            for length in self._lengths:
                if length <= end:
                    self._next_of[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token_id)

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        """What followed the longest n-gram that ends here when it stood here last; none where it never did.

        Copies on from its own words where it reaches the end, so that a loop is drafted for as long as wanted.
        """
        end = len(self._tokens)
        for length in self._lengths:
            if length > end:
                continue
            start = self._next_of.get(tuple(self._tokens[end - length :]))
            if start is not None:
                period = end - start
                return tuple(self._tokens[start + i % period] for i in range(max_tokens))
        return ()


def num_equal(draft: Sequence[int], drawn: Sequence[int]) -> int:
    """How many tokens of a draft hold, when the target has drawn `drawn` at its places (one more, or stopped early).

    The choice goes on by `drawn[: num_equal + 1]`: the first token that differs is the target's own, and so is the one past a draft that
    holds as a whole.
    """
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft, drawn, strict=False))
    )


def accept_by_rejection(
    target: Float[Tensor, "place vocab"],
    proposal: Float[Tensor, "draft vocab"],
    draft: Sequence[int],
    accept_uniforms: Sequence[float],
    draw_uniform: float,
) -> tuple[int, ...]:
    """The tokens that a choice goes on by: 1 to len(draft) + 1, exactly as if drawn from the target one by one.

    `target`, `proposal`: probabilities at each place, after temperature and truncation. `draft` was drawn from
    `proposal`. `accept_uniforms` [draft], `draw_uniform`: independent numbers in [0, 1). Token x holds with probability
    min(1, target(x) / proposal(x)); the first that does not is drawn anew from what the target has beyond the
    proposal (Leviathan, Kalman and Matias 2023; Chen et al. 2023).
    """
    assert len(draft) == len(proposal) == len(target) - 1 == len(accept_uniforms)
    for place, token_id in enumerate(draft):
        wanted, offered = float(target[place, token_id]), float(proposal[place, token_id])
        assert offered > 0.0, f"token {token_id} cannot have been drawn from the proposal"
        if accept_uniforms[place] * offered >= wanted:
            beyond = (target[place].double() - proposal[place].double()).clamp(min=0.0)
            # Equal but for rounding: nothing beyond, and either is right.
            rest = beyond if bool(beyond.any()) else target[place].double()
            return (*draft[:place], _draw(rest, draw_uniform))
    return (*draft, _draw(target[-1].double(), draw_uniform))


def _draw(weights: Float[Tensor, " vocab"], uniform: float) -> int:
    sums = weights.cumsum(0)
    total = float(sums[-1])
    assert total > 0.0, (
        "the target has nothing beyond the proposal, so that it cannot have rejected"
    )
    index = int((sums <= uniform * total).sum())
    return min(index, int(weights.nonzero()[-1, 0]))  # rounding must not lead past the last


class DraftLength:
    """How many tokens to draft next, from how often drafts held lately and what a forward costs: 0 where none pays.

    A draft of k tokens brings (1 - a^(k + 1)) / (1 - a) tokens where each holds with probability a. `a` is counted with
    forgetting, so that a choice that comes to a part it can copy drafts more, and one that cannot stops. While it
    drafts nothing, it spends `probe_share` of its time on drafts of one token, so that it notices.
    """

    def __init__(
        self, *, max_tokens: int = 8, memory_tokens: float = 32.0, probe_share: float = 0.02
    ) -> None:
        assert max_tokens >= 1
        assert memory_tokens > 1.0
        self._max_tokens, self._probe_share = max_tokens, probe_share
        self._keep = 1.0 - 1.0 / memory_tokens
        self._num_held, self._num_tried = 1.0, 2.0  # before anything is known: one of two holds
        self._idle_us = 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens, each given that those before it held, that held lately."""
        return self._num_held / self._num_tried

    def observe(self, *, num_drafted: int, num_held: int) -> None:
        """One draft was checked. Tokens after the first that did not hold say nothing."""
        assert 0 <= num_held <= num_drafted, f"{num_held} of {num_drafted}"
        for place in range(min(num_held + 1, num_drafted)):
            self._num_tried = self._num_tried * self._keep + 1.0
            self._num_held = self._num_held * self._keep + (1.0 if place < num_held else 0.0)

    def choose(self, verify_us: Sequence[float], draft_us: float = 0.0) -> int:
        """Tokens to draft. `verify_us[k]`: a forward of the target over k + 1 tokens; `draft_us`: one drafted token."""
        assert verify_us, "verify_us[0] is a plain step"
        rates = self._tokens_per_us(verify_us[: self._max_tokens + 1], draft_us)
        best = rates.index(max(rates))
        if best or len(verify_us) == 1:
            self._idle_us = 0.0
            return best
        self._idle_us += verify_us[0]
        if self._idle_us * self._probe_share < verify_us[1] + draft_us - verify_us[0]:
            return 0
        self._idle_us = 0.0
        return 1

    def _tokens_per_us(self, verify_us: Sequence[float], draft_us: float) -> list[float]:
        chance = min(self.acceptance, 0.99)
        return [
            (1.0 - chance ** (num_drafted + 1))
            / (1.0 - chance)
            / (cost_us + num_drafted * draft_us)
            for num_drafted, cost_us in enumerate(verify_us)
        ]
