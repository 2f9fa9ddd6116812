"""Generation: what is asked of a language model and what comes back, as plain data. No torch, no text tools.

Made by the edge, read by the pipeline and the engine. Token ids everywhere; text stands only where it goes to a user.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ganglion.types import Float32Array, RequestId, UInt8Array


class FinishReason(StrEnum):
    """Why a choice ended: the model or a stop string said so, or it was long enough."""

    STOP = "stop"
    LENGTH = "length"


class Pooling(StrEnum):
    """How the hidden states of a prompt become one vector."""

    MEAN = "mean"
    LAST = "last"  # that of the last token, which saw all others


class GrammarKind(StrEnum):
    """How `Grammar.text` is written."""

    JSON_SCHEMA = "json_schema"  # a JSON Schema, as JSON; "{}" is any object
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the text of a choice must match. `path`: the field that it was read from, for errors; "" where there is none."""

    kind: GrammarKind
    text: str
    path: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn and when a choice ends.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and penalties of 0 (`repetition_penalty`: 1) change nothing.
    `seed` makes a choice repeatable: choice i draws from (seed, i). `num_logprobs`: that many most likely tokens beside
    the drawn one, whose logarithm of probability is always of the model's own distribution; None: none at all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    is_eos_ignored: bool = False
    num_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of a conversation as its file came: PNG, JPEG or WebP. `field` names it in errors.

    `is_coarse`: seen once, as a whole, however large it is (OpenAI's `detail: "low"`).
    """

    data: bytes
    field: str
    is_coarse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptImage:
    """One picture as a model reads it: `pixels` uint8 [tile, height, width, 3].

    `key` stands for what is to be seen: equal keys, equal features. `places`: where in the prompt the features of the
    tiles go, in order, one token each; nothing else of the prompt depends on the picture.
    """

    key: bytes
    pixels: UInt8Array
    places: tuple[range, ...]

    @property
    def first(self) -> int:
        """The first prompt token that the picture fills."""
        return self.places[0].start

    @property
    def end(self) -> int:
        """One after the last that it fills."""
        return self.places[-1].stop


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt, `num_choices` continuations that share its pages.

    `tenant`: prefixes are shared within one only. `num_prompt_logprobs`: as `Sampling.num_logprobs`, for the prompt's
    own tokens after the first. `speculate`: who drafts tokens ahead, which changes none: "off", "ngram" (what stood
    before), or a model of the same tokenizer; None: whoever the server has set. `adapter`: of the model; "" is none.

    `pooling`: nothing is drawn, `sampling` means nothing; the answer is one Embedded, then Usage.

    `pictures`: those for which the prompt has room, in order, as they came; `images`: as the model reads them, made of
    them by who checks the request.
    """

    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    num_choices: int = 1
    tenant: str = ""
    trace_id: str = ""  # what whoever asks calls it, in the trace; changes nothing else
    num_prompt_logprobs: int | None = None
    speculate: str | None = None
    adapter: str = ""
    pooling: Pooling | None = None
    pictures: tuple[Picture, ...] = ()
    images: tuple[PromptImage, ...] = ()

    @property
    def needs_all_tokens(self) -> bool:
        """Is something asked of every token of the prompt, so that none may be taken from pages unseen?"""
        return self.num_prompt_logprobs is not None or self.pooling is Pooling.MEAN


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural logarithm of one token's probability, and the most likely tokens there, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """New tokens of one choice, from the engine."""

    request_id: RequestId
    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # that ended it: it is not among `token_ids`


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScored:
    """Before the first TokenDelta of a request that asked for it: one entry per prompt token, None for the first."""

    request_id: RequestId
    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedded:
    """The prompt as one vector [width]: hidden states behind the last norm, pooled; of any length."""

    request_id: RequestId
    vector: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """New text of one choice, to the user. `text` never holds half a character or a part of a stop string."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None  # the stop string or token that ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The end of a request: tokens of its prompt, how many of them were read from pages, tokens of all choices."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a conversation. `tool_calls`, `tool_call_id`, `name`: as in the chat API.

    `content`: all its text. `parts`: text and pictures in their order, where there are pictures.
    """

    role: str
    content: str
    parts: tuple[str | Picture, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageSpec:
    """One language model: `max_tokens` is prompt and continuation together. `parent`: of an adapter, its model."""

    name: str
    family: str  # "llama", "qwen3_moe", ...
    version: str  # content hash of weights and config
    vocab_size: int
    max_tokens: int
    num_layers: int
    width: int
    eos_ids: tuple[int, ...]
    dtype: str
    parent: str = ""
    has_vision: bool = False  # does it take pictures?
