"""Drawing tokens: what a row of logits becomes under its `Sampling`. Called by engine.language after each forward.

Knows logits, token ids and grammars' matchers; not pages, requests, text or time. Dimension names: row (one choice
each), vocab. What a row draws depends on its logits and its own state alone, never on the rows beside it.
"""

import hashlib
import math
import secrets
import struct
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ganglion.engine.truncation import Truncation, draw_rows
from ganglion.errors import FieldError, GanglionError, InternalError
from ganglion.generation import LanguageSpec, Sampling, TokenLogprob

MIN_TEMPERATURE = 1e-5  # below it the draw is greedy: differences of logits would overflow
MIN_LOGPROB = -9999.0  # stands for the logarithm of zero, as in OpenAI's API
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024


class Matcher(Protocol):
    """Where one choice stands in its grammar (`engine.grammar.GrammarMatcher`)."""

    @property
    def is_done(self) -> bool:
        """The text matches and nothing but the end can follow it."""
        ...

    def fill(self, bits: npt.NDArray[np.int32]) -> None:
        """Set bit i of `bits`, 32 tokens a word, where token i may come next. Raises GanglionError past a limit."""
        ...

    def advance(self, token_id: int) -> None:
        """A token that the mask allowed was drawn."""
        ...

    def fork(self) -> "Matcher":
        """A second one that goes on from this place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One drawn token. `logprob`: of the model's own distribution, where the choice asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


class SamplerState:
    """One choice: its `Sampling`, the tokens so far with their counts, its random numbers and its grammar.

    Made when the choice starts and kept while it is preempted; `Sampler.sample` reads and advances it. The t-th token
    draws from (seed, choice, t), so a choice repeats whatever was computed beside it. Without a seed one is made up.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        prompt_ids: Sequence[int],
        choice: int = 0,
        grammar: Matcher | None = None,
    ) -> None:
        self.sampling, self.choice, self.grammar = sampling, choice, grammar
        self.num_tokens = 0
        self.is_greedy = sampling.temperature < MIN_TEMPERATURE
        self.is_penalised = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        self.bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64)
        self.bias_values = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        # Slot i: a token that penalties touch, and how often it was generated. The prompt's own count 0.
        is_prompt_seen = sampling.repetition_penalty != 1.0
        seen = dict.fromkeys(prompt_ids) if is_prompt_seen else {}
        self._slot_of = dict(zip(seen, range(len(seen)), strict=True))
        self._seen_ids = np.zeros(len(seen) + 64, np.int64)
        self._seen_ids[: len(seen)] = list(seen)
        self._seen_counts = np.zeros(len(seen) + 64, np.float32)

    @property
    def seen(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids of the tokens that penalties touch, each once, and how often each was generated."""
        num_seen = len(self._slot_of)
        return self._seen_ids[:num_seen], self._seen_counts[:num_seen]

    @property
    def is_done(self) -> bool:
        """The grammar is complete: the choice ends as at a stop token, without drawing another."""
        return self.grammar is not None and self.grammar.is_done

    def uniform(self, purpose: int = 0) -> float:
        """A number in [0, 1) for the next token. `purpose`: several independent ones for the same token."""
        key = struct.pack("<qqqq", self._seed, self.choice, self.num_tokens, purpose)
        word = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return (word >> 11) * 2.0**-53

    def sketch(self) -> "SamplerState":
        """A copy that a drafting model draws ahead with: the same random numbers, and no scores to report."""
        copied = copy(self)
        copied.sampling = replace(self.sampling, num_logprobs=None)
        copied.grammar = None if self.grammar is None else self.grammar.fork()
        if self.is_penalised:
            copied._slot_of = dict(self._slot_of)
            copied._seen_ids, copied._seen_counts = self._seen_ids.copy(), self._seen_counts.copy()
        return copied

    def accept(self, token_id: int) -> None:
        """One more token of this choice: drawn by `Sampler.sample`, which calls this, or taken from elsewhere."""
        if self.grammar is not None:
            self.grammar.advance(token_id)
        if self.is_penalised:
            self._count(token_id)
        self.num_tokens += 1

    def _count(self, token_id: int) -> None:
        slot = self._slot_of.setdefault(token_id, len(self._slot_of))
        if slot == len(self._seen_ids):
            self._seen_ids = np.concatenate([self._seen_ids, np.zeros_like(self._seen_ids)])
            self._seen_counts = np.concatenate(
                [self._seen_counts, np.zeros_like(self._seen_counts)]
            )
        self._seen_ids[slot] = token_id
        self._seen_counts[slot] += 1.0


class Sampler:
    """Draws for the rows of one model. Holds nothing of any choice."""

    def __init__(self, spec: LanguageSpec) -> None:
        self._eos_ids = spec.eos_ids

    def sample(
        self, logits: Tensor, states: Sequence[SamplerState]
    ) -> list[Sampled | GanglionError]:
        """The next token of each row of `logits` [row, vocab] float32, accepted into the row's state.

        An error instead of a token ends that row's choice only: logits that are not finite, or a grammar past its
        limits. `logits` is left as it is. Penalties are transformers' (repetition) and OpenAI's (presence, frequency).
        """
        assert logits.ndim == 2, f"logits have shape {tuple(logits.shape)}"
        assert len(logits) == len(states), f"{len(logits)} rows, {len(states)} states"
        if not states:
            return []
        errors: dict[int, GanglionError] = {}
        token_ids = self._draw(self._edited(logits, states, errors), states, errors)
        sampled = self._with_logprobs(logits, states, token_ids)
        for row, state in enumerate(states):
            if row in errors:
                continue
            try:
                state.accept(token_ids[row])
            except GanglionError as error:
                errors[row] = error
        return [errors.get(row, drawn) for row, drawn in enumerate(sampled)]

    def _edited(
        self, logits: Tensor, states: Sequence[SamplerState], errors: dict[int, GanglionError]
    ) -> Tensor:
        """Logits under penalties, biases, the minimum length and grammars, in this order."""
        penalised = [row for row, state in enumerate(states) if state.is_penalised]
        biased = [row for row, state in enumerate(states) if len(state.bias_ids)]
        forbidden = {
            row: ids for row, state in enumerate(states) if (ids := self._forbidden(state))
        }
        bound = [row for row, state in enumerate(states) if state.grammar is not None]
        if not (penalised or biased or forbidden or bound):
            return logits
        logits = logits.clone()
        if penalised:
            _penalise(logits, penalised, [states[row] for row in penalised])
        for row in biased:
            bias_ids = torch.from_numpy(states[row].bias_ids).to(logits.device)
            logits[row, bias_ids] += torch.from_numpy(states[row].bias_values).to(logits.device)
        for row, stops in forbidden.items():
            logits[row, list(stops)] = -torch.inf
        for row in bound:
            try:
                _constrain(logits[row], states[row])
            except GanglionError as error:
                errors[row] = error
        return logits

    def _forbidden(self, state: SamplerState) -> tuple[int, ...]:
        """Tokens that would end the choice before its minimum length. A complete grammar may end it all the same."""
        sampling = state.sampling
        if state.num_tokens >= sampling.min_tokens or state.is_done:
            return ()
        eos_ids = () if sampling.is_eos_ignored else self._eos_ids
        return (*eos_ids, *sampling.stop_token_ids)

    def _draw(
        self, logits: Tensor, states: Sequence[SamplerState], errors: dict[int, GanglionError]
    ) -> list[int]:
        """A token id per row; rows that cannot draw get an error, and 0."""
        peaks = logits.amax(-1)  # NaN where any is
        for row in (~peaks.isfinite()).nonzero()[:, 0].tolist():
            errors.setdefault(row, _unusable(float(peaks[row])))
        drawing = [
            row for row, state in enumerate(states) if not state.is_greedy and row not in errors
        ]
        token_ids = [0] * len(states)
        if len(drawing) < len(states):
            token_ids = _argmax(logits)
        if drawing:
            chosen = [states[row] for row in drawing]
            rows = logits if len(drawing) == len(states) else logits[drawing]
            drawn: list[int] = draw_rows(rows, _rules(chosen, logits)).tolist()
            for row, token_id in zip(drawing, drawn, strict=True):
                token_ids[row] = token_id
        return token_ids

    def _with_logprobs(
        self, logits: Tensor, states: Sequence[SamplerState], token_ids: Sequence[int]
    ) -> list[Sampled]:
        asked = [row for row, state in enumerate(states) if state.sampling.num_logprobs is not None]
        if not asked:
            return [Sampled(token_id=token_id) for token_id in token_ids]
        scores = score_tokens(
            logits if len(asked) == len(states) else logits[asked],
            [token_ids[row] for row in asked],
            [states[row].sampling.num_logprobs or 0 for row in asked],
        )
        by_row = dict(zip(asked, scores, strict=True))
        return [
            Sampled(token_id=token_id, logprob=by_row.get(row))
            for row, token_id in enumerate(token_ids)
        ]


def score_tokens(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """What the model gives one token per row of `logits` [row, vocab] float32, and the `num_top` most likely.

    Also for the tokens of a prompt: row i of their logits scores token i + 1.
    """
    assert len(logits) == len(token_ids) == len(num_top)
    if not token_ids:
        return []
    norms = logits.logsumexp(-1, keepdim=True)
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    own = (logits.gather(-1, ids) - norms)[:, 0].clamp(min=MIN_LOGPROB).tolist()
    most = min(max(num_top), logits.shape[-1])
    values, top_ids = logits.topk(most, dim=-1)
    top = (values - norms).clamp(min=MIN_LOGPROB).tolist()
    rows = zip(token_ids, own, top_ids.tolist(), top, num_top, strict=True)
    return [
        TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            top=tuple(zip(best_ids[:count], best[:count], strict=True)),
        )
        for token_id, logprob, best_ids, best, count in rows
    ]


def check_sampling(sampling: Sampling, spec: LanguageSpec) -> None:
    """Raises FieldError for the first field that no token can be drawn under, or that would cost others too much."""
    for name, low, high in (
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.01, 100.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ):
        _check_range(name, getattr(sampling, name), low, high)
    if sampling.top_p == 0.0:
        raise FieldError(
            "top_p", expected="more than 0", got="0", next_step="set temperature to 0 for greedy"
        )
    _check_range("top_k", sampling.top_k, 0, 2**31 - 1)
    _check_range("max_tokens", sampling.max_tokens, 1, spec.max_tokens)
    _check_range("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    if sampling.seed is not None:
        _check_range("seed", sampling.seed, -(2**63), 2**63 - 1)
    if sampling.num_logprobs is not None:
        _check_range("logprobs", sampling.num_logprobs, 0, MAX_LOGPROBS)
    _check_count("logit_bias", len(sampling.logit_bias), MAX_BIASES)
    _check_count("stop", len(sampling.stop), MAX_STOP_STRINGS)
    _check_count("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKENS)
    for token_id, bias in sampling.logit_bias.items():
        _check_token_id("logit_bias", token_id, spec)
        _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
    for token_id in sampling.stop_token_ids:
        _check_token_id("stop_token_ids", token_id, spec)
    for text in sampling.stop:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise FieldError(
                "stop",
                expected=f"strings of 1 to {MAX_STOP_CHARS} characters",
                got=f"one of {len(text)}",
                next_step="shorten it" if text else "leave the empty string out",
            )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN
        raise FieldError(
            name,
            expected=f"a number from {low:g} to {high:g}"
            if isinstance(low, float)
            else f"an integer from {low} to {high}",
            got=f"{value}",
            next_step=f"choose {name} in that range, or leave it out",
        )


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise FieldError(
            name,
            expected=f"at most {limit} entries",
            got=f"{count}",
            next_step=f"send the {limit} that matter most",
        )


def _check_token_id(name: str, token_id: int, spec: LanguageSpec) -> None:
    if not 0 <= token_id < spec.vocab_size:
        raise FieldError(
            name,
            expected=f"token ids from 0 to {spec.vocab_size - 1} ({spec.name})",
            got=f"{token_id}",
            next_step="look ids up with /tokenize",
        )


def _penalise(logits: Tensor, rows: Sequence[int], states: Sequence[SamplerState]) -> None:
    """In place: every token seen once, all rows in one gather and one scatter."""
    seen = [state.seen for state in states]
    lengths = [len(ids) for ids, _ in seen]
    numbers = np.repeat(
        [
            (row, one.repetition_penalty, one.frequency_penalty, one.presence_penalty)
            for row, one in zip(rows, [state.sampling for state in states], strict=True)
        ],
        lengths,
        axis=0,
    )
    device = logits.device
    row_of = torch.from_numpy(numbers[:, 0].astype(np.int64)).to(device)
    repetition, frequency, presence = torch.from_numpy(numbers[:, 1:]).to(device, torch.float32).T
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in seen])).to(device)
    counts = torch.from_numpy(np.concatenate([counts for _, counts in seen])).to(device)
    values = logits[row_of, ids]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= frequency * counts + presence * (counts > 0)
    logits[row_of, ids] = values


def _constrain(row: Tensor, state: SamplerState) -> None:
    """In place: what the grammar forbids in a row of logits [vocab] becomes -inf."""
    assert state.grammar is not None
    bits = np.zeros(-(-len(row) // 32), np.int32)
    state.grammar.fill(bits)
    allowed = np.unpackbits(bits.view(np.uint8), bitorder="little", count=len(row))
    mask = torch.from_numpy(allowed.view(np.bool_)).to(row.device)
    row.copy_(torch.where(mask, row, -torch.inf))


def _rules(states: Sequence[SamplerState], logits: Tensor) -> Truncation:
    vocab_size, asked = logits.shape[-1], [state.sampling for state in states]
    numbers = torch.tensor(
        [
            (one.temperature, one.top_p, one.min_p, state.uniform())
            for state, one in zip(states, asked, strict=True)
        ],
        dtype=torch.float64,
    ).to(logits.device)
    top_k = [min(one.top_k or vocab_size, vocab_size) for one in asked]
    temperature, top_p, min_p, uniform = numbers.T
    return Truncation(
        temperature=temperature,
        top_k=torch.tensor(top_k, device=logits.device),
        top_p=top_p,
        min_p=min_p,
        uniform=uniform,
    )


def _argmax(logits: Tensor) -> list[int]:
    """The first of the largest per row. NumPy's is ten times faster than torch's on a CPU."""
    if logits.device.type != "cpu":
        return [int(token_id) for token_id in logits.argmax(-1).tolist()]
    return [int(token_id) for token_id in logits.detach().numpy().argmax(-1)]


def _unusable(peak: float) -> GanglionError:
    if math.isinf(peak) and peak < 0:
        return InternalError(
            "no token may come next: the grammar and the minimum length forbid all"
        )
    return InternalError(
        f"the model's largest logit is {peak}", next_step="check the weights, or use a wider dtype"
    )
