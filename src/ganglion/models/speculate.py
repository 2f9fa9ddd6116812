"""Speculative decoding, the part without a forward: what to draft, how often drafts held, how many tokens of one pay.

Called by `engine.drafter`, which runs target and draft models. Pure: knows token ids and measured times; not pages,
models or requests. What of a draft holds is decided by `engine.verify`.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_SHARE = 0.99  # nothing holds for sure
TRIAL_STEPS = (
    8  # that one of two ways is kept for, so that its effects on the next step are its own
)
TRIALS_PER_OTHER = 8  # one block of steps in so many goes the way that was slower
REFRESH_STEPS = 32  # one step in so many is plain, so that it is known what those cost
START_STEPS = 2.0  # plain ones that may be lost before anything is known
OPTIMISM = 0.15  # by which shares may be better than what was seen lately, while the purse is full
PROBES = (2, 4, 8, 1)  # lengths that are tried, in turn, where no draft is known to pay


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

    def __len__(self) -> int:
        return len(self._tokens)

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


class Acceptance:
    """Share of drafted tokens, each given that those before it held, that held lately. Counts with forgetting.

    `prior`: what is taken for true before anything was seen, as if two tokens had said so.
    """

    def __init__(self, *, prior: float = 0.5, memory_tokens: float = 24.0) -> None:
        assert memory_tokens > 1.0
        self._keep = 1.0 - 1.0 / memory_tokens
        self._num_held, self._num_tried = 2.0 * prior, 2.0

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self._num_held / self._num_tried

    def observe(self, *, num_drafted: int, num_held: int) -> None:
        """One draft was checked. Tokens after the first that did not hold say nothing."""
        assert 0 <= num_held <= num_drafted, f"{num_held} of {num_drafted}"
        for place in range(min(num_held + 1, num_drafted)):
            self._num_tried = self._num_tried * self._keep + 1.0
            self._num_held = self._num_held * self._keep + (1.0 if place < num_held else 0.0)


def share_out(
    shares: Sequence[float], limits: Sequence[int], cost_us: Callable[[int], float]
) -> tuple[int, ...]:
    """How many tokens each row drafts, at most `limits`, so that a step makes the most tokens per time.

    A row whose tokens hold with probability a makes 1 + a + ... + a^k tokens of a draft of k. `cost_us(n)`: a step with
    n drafted tokens in all. Tokens are given to rows in the order of what they bring, so that for every n the best
    sharing is among those that are compared.
    """
    lengths = [0] * len(shares)
    gains = [(-min(share, MAX_SHARE), row) for row, share in enumerate(shares) if limits[row]]
    heapq.heapify(gains)
    num_tokens, num_drafted = float(len(shares)), 0
    best, best_rate = tuple(lengths), num_tokens / cost_us(0)
    while gains:
        gain, row = heapq.heappop(gains)
        lengths[row] += 1
        num_drafted, num_tokens = num_drafted + 1, num_tokens - gain
        if num_tokens / cost_us(num_drafted) > best_rate:
            best, best_rate = tuple(lengths), num_tokens / cost_us(num_drafted)
        if lengths[row] < limits[row]:
            heapq.heappush(gains, (gain * min(shares[row], MAX_SHARE), row))
    return best


@dataclass(slots=True)
class _Measured:
    """Steps with about so many drafted tokens: running means."""

    num_drafted: float
    us: float
    count: int = 1


class StepCosts:
    """Microseconds of whole steps, by rows and tokens drafted for all of them: what was measured, linear in between."""

    def __init__(self, *, prior_share: float = 0.1, smoothing: float = 0.15) -> None:
        self._prior_share, self._smoothing = prior_share, smoothing
        self._of_rows: dict[int, dict[int, _Measured]] = {}  # rows -> power of two of drafted

    def observe(self, num_rows: int, num_drafted: int, us: float) -> None:
        """One step. What takes more than three times the mean was disturbed, and counts as three times."""
        of_rows = self._of_rows.setdefault(num_rows, {})
        known = of_rows.get(num_drafted.bit_length())
        if known is None:
            of_rows[num_drafted.bit_length()] = _Measured(num_drafted, us)
            return
        known.count += 1
        # the first of a shape may have warmed something up: the second stands for itself
        weight = max(self._smoothing, 1.0 / (known.count - 1))
        known.num_drafted += weight * (num_drafted - known.num_drafted)
        known.us += weight * (min(us, 3.0 * known.us) - known.us)

    def is_known(self, num_rows: int, num_drafted: int) -> bool:
        """Was a step like that measured, more than once?"""
        known = self._of_rows.get(num_rows, {}).get(num_drafted.bit_length())
        return known is not None and known.count > 1

    def plain_us(self, num_rows: int) -> float | None:
        """A step without drafts; None: not measured yet."""
        known = self._of_rows.get(num_rows, {}).get(0)
        return known.us if known is not None and known.count > 1 else None

    def estimate_us(self, num_rows: int, num_drafted: int) -> float:
        """A step; `plain_us` of it must be known.

        Past what was measured a drafted token costs `prior_share` of a row: little, so that it is tried.
        """
        points = sorted((known.num_drafted, known.us) for known in self._of_rows[num_rows].values())
        prior_us = self._prior_share * points[0][1] / num_rows
        for (low, low_us), (high, high_us) in pairwise(points):
            if num_drafted <= high:
                slope_us = (high_us - low_us) / max(high - low, 1e-9)
                return low_us + slope_us * (num_drafted - low)
        last, last_us = points[-1]
        return last_us + prior_us * max(0.0, num_drafted - last)


class Pace:
    """How many tokens the rows of a batch draft, so that drafting pays, and never costs more than a little.

    A purse in microseconds: what drafting saved against plain steps comes in, what it lost goes out, `probe_share` of
    all time comes in besides. Nothing is drafted while it is empty, so that the loss is bounded whatever the estimates say.
    """

    def __init__(self, *, probe_share: float = 0.01, max_steps: float = 8.0) -> None:
        self.costs = StepCosts()
        self._probe_share, self._max_steps = probe_share, max_steps
        self._purse_us: float | None = None  # None: it is not known yet what a step costs
        self._num_since_plain, self._next_probe = 0, 0

    def choose(self, shares: Sequence[float], limits: Sequence[int]) -> tuple[int, ...]:
        """Tokens to draft, for each row. `shares`: of its tokens that hold; `limits`: as many as it can draft."""
        none = (0,) * len(shares)
        plain_us = self.costs.plain_us(len(shares))
        if plain_us is None or not any(limits) or self._num_since_plain >= REFRESH_STEPS:
            return none
        if self._purse_us is None:
            self._purse_us = plain_us * START_STEPS
        if self._purse_us <= 0.0:
            return none

        def cost_us(num_drafted: int) -> float:
            return self.costs.estimate_us(len(shares), num_drafted)

        lengths = share_out(shares, limits, cost_us)
        if not any(lengths):
            hope = OPTIMISM * self._purse_us / (self._max_steps * plain_us)
            lengths = share_out([share + hope for share in shares], limits, cost_us)
        if not any(lengths):
            return self._probe(shares, limits, plain_us)
        longer = tuple(
            min(2 * length, limit) for length, limit in zip(lengths, limits, strict=True)
        )
        is_new = not self.costs.is_known(len(shares), sum(longer))
        return longer if is_new and self._purse_us >= plain_us else lengths

    def observe(
        self,
        *,
        num_rows: int,
        num_drafted: int,
        num_taken: int,
        spent_us: float,
        is_typical: bool = True,
    ) -> None:
        """One step of `num_rows` made `num_taken` tokens. Not typical: what it cost says nothing about the next."""
        if is_typical or not num_drafted:
            self.costs.observe(num_rows, num_drafted, spent_us)
        plain_us = self.costs.plain_us(num_rows)
        self._num_since_plain = self._num_since_plain + 1 if num_drafted else 0
        if plain_us is None or self._purse_us is None:
            return
        self._purse_us += self._probe_share * spent_us
        if num_drafted:
            self._purse_us += plain_us * num_taken / num_rows - spent_us
        bound_us = self._max_steps * plain_us
        self._purse_us = max(-8 * bound_us, min(bound_us, self._purse_us))

    def _probe(
        self, shares: Sequence[float], limits: Sequence[int], plain_us: float
    ) -> tuple[int, ...]:
        """The row whose draft is likeliest to hold drafts all the same, if the purse bears it."""
        assert self._purse_us is not None
        row = max(range(len(shares)), key=lambda at: shares[at] if limits[at] else -1.0)
        length = min(limits[row], PROBES[self._next_probe % len(PROBES)])
        extra_us = self.costs.estimate_us(len(shares), length) - plain_us
        if self._purse_us < max(extra_us, plain_us / 4):
            return (0,) * len(shares)
        self._next_probe += 1
        return tuple(length if at == row else 0 for at in range(len(shares)))


class Trials:
    """Which of two ways of drafting makes more tokens per time: mostly that one, now and then the other."""

    def __init__(self, *, smoothing: float = 0.3) -> None:
        self._smoothing = smoothing
        self._rates: dict[bool, float] = {}
        self._num_blocks, self._num_steps = 0, 0
        self._num_taken, self._spent_us = 0, 0.0
        self.is_first = True

    def observe(self, *, num_taken: int, spent_us: float) -> None:
        """A step went the way that `is_first` says."""
        self._num_taken, self._spent_us = self._num_taken + num_taken, self._spent_us + spent_us
        self._num_steps += 1
        if self._num_steps < TRIAL_STEPS:
            return
        rate = self._num_taken / max(self._spent_us, 1e-9)
        known = self._rates.get(self.is_first, rate)
        self._rates[self.is_first] = known + self._smoothing * (rate - known)
        self._num_blocks, self._num_steps = self._num_blocks + 1, 0
        self._num_taken, self._spent_us = 0, 0.0
        if len(self._rates) < 2:
            self.is_first = not self.is_first
        else:
            is_first_better = self._rates[True] >= self._rates[False]
            is_other = self._num_blocks % TRIALS_PER_OTHER == 0
            self.is_first = is_first_better != is_other
