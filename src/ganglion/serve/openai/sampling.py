"""Sampling: how tokens are to be drawn, read from the fields that chat, completions and responses have in common.

Called by the readers of requests. Knows the names of the fields and their limits, nothing of prompts.
"""

from typing import Any, TypeVar

from ganglion.errors import FieldError, UnsupportedFieldError
from ganglion.generation import Grammar, LanguageSpec, Sampling
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.refusal import ApiError
from ganglion.wire import describe

MAX_CHOICES = 16
MAX_STOPS, MAX_STOP_LENGTH = 16, 1_024
MAX_LOGPROBS = 20
MAX_BIASES = 1_024
MAX_TOKENS = 2**31 - 1
MAX_SALT_LENGTH = 256
MIN_TOP_P = 1e-6  # 0 is taken as OpenAI takes it: the most likely token only

# Fields of OpenAI's and vLLM's interfaces that would change the answer if we served them: refused, never ignored.
UNSUPPORTED: dict[str, str] = {
    "use_beam_search": "tokens are drawn, not searched",
    "length_penalty": "it belongs to beam search",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "bad_words": "use logit_bias",
    "truncate_prompt_tokens": "a prompt is never cut",
    "include_stop_str_in_output": "stop strings are left out of the text",
    "guided_json": "use response_format",
    "guided_regex": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
    "logits_processors": "no code of a request is run",
    "kv_transfer_params": "pages stay on this server",
    "priority": "robots come first, then everybody in turn",
}
# Hints that change no token: taken and not used.
HINTS = (
    "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "prediction",
    "stream_options", "skip_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip
SERVICE_TIERS = ("auto", "default")

T = TypeVar("T")


def read_sampling(
    fields: Fields,
    spec: LanguageSpec,
    *,
    max_tokens: int,
    grammar: Grammar | None,
    num_logprobs: int | None,
) -> Sampling:
    """All that says how to draw. `max_tokens` is checked by then: see `room_for`."""
    check_common(fields)
    stop_ids = fields.rows("stop_token_ids", high=MAX_STOPS) or []
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    return Sampling(
        temperature=_or(fields.number("temperature", 0, 2), 1.0),
        top_k=max(0, _or(fields.integer("top_k", -1, spec.vocab_size), 0)),
        top_p=max(MIN_TOP_P, _or(fields.number("top_p", 0, 1), 1.0)),
        min_p=_or(fields.number("min_p", 0, 1), 0.0),
        repetition_penalty=_or(fields.number("repetition_penalty", 0.01, 10), 1.0),
        presence_penalty=_or(fields.number("presence_penalty", -2, 2), 0.0),
        frequency_penalty=_or(fields.number("frequency_penalty", -2, 2), 0.0),
        logit_bias=_read_bias(fields, spec),
        seed=None if seed is None else seed % 2**63,
        max_tokens=max_tokens,
        min_tokens=_or(fields.integer("min_tokens", 0, max_tokens), 0),
        stop=_read_stop(fields),
        stop_token_ids=tuple(
            read_token(token, f"{fields.at('stop_token_ids')}[{index}]", spec)
            for index, token in enumerate(stop_ids)
        ),
        is_eos_ignored=bool(fields.flag("ignore_eos")),
        num_logprobs=num_logprobs,
        grammar=grammar,
    )


def check_common(fields: Fields) -> None:
    """Refuses what no endpoint serves, and marks as known what changes nothing."""
    fields.refuse(UNSUPPORTED)
    for name in HINTS:
        fields.raw(name)
    if fields.raw("skip_special_tokens") is False:
        raise UnsupportedFieldError(
            fields.at("skip_special_tokens"),
            why="special tokens have no text here",
            next_step="leave skip_special_tokens out, or read token ids by /v1/completions with logprobs",
        )
    fields.choice("service_tier", SERVICE_TIERS)


def room_for(
    fields: Fields,
    names: tuple[str, ...],
    spec: LanguageSpec,
    *,
    num_prompt: int,
    param: str,
    low: int = 1,
    default: int | None = None,
) -> int:
    """How many tokens may follow a prompt: the first of `names` that is there, else `default` (None: all that fit).

    Raises ApiError (context_length_exceeded) when prompt and continuation do not fit together.
    """
    asked = next(
        (v for name in names if (v := fields.integer(name, low, MAX_TOKENS)) is not None), default
    )
    room = spec.max_tokens - num_prompt
    if room < 1 or (asked is not None and asked > room):
        wanted = f", {asked} for the answer" if asked is not None else ""
        raise ApiError(
            400,
            f"This model's maximum context length is {spec.max_tokens} tokens, and you asked for "
            f"{num_prompt + (asked or 1)}: {num_prompt} in the prompt{wanted}",
            code="context_length_exceeded",
            param=param,
            next_step=f"ask for at most {room} tokens" if room > 0 else "shorten the prompt",
        )
    return room if asked is None else asked


def read_token(value: object, path: str, spec: LanguageSpec) -> int:
    """One token id of this model. 3.0 is one, as JSON Schema has it."""
    token = int(value) if isinstance(value, float) and value.is_integer() else value
    is_whole = isinstance(token, int) and not isinstance(token, bool)
    if not is_whole or not 0 <= token < spec.vocab_size:  # type: ignore[operator]
        raise FieldError(
            path, expected=f"a token id in 0..{spec.vocab_size - 1}", got=describe(value)
        )
    return token  # type: ignore[return-value]


def read_tenant(fields: Fields) -> str:
    """Whose prefixes are shared: everybody's who holds the server's key, or a part of them by vLLM's `cache_salt`."""
    return fields.text("cache_salt", max_length=MAX_SALT_LENGTH) or ""


def _read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise fields.wrong("stop", f"a string or a list of at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise fields.wrong("stop", f"strings of 1..{MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _read_bias(fields: Fields, spec: LanguageSpec) -> dict[int, float]:
    table = fields.child("logit_bias")
    value: dict[str, Any] = fields.raw("logit_bias") or {}
    if table is None:
        return {}
    if len(value) > MAX_BIASES:
        raise fields.wrong("logit_bias", f"at most {MAX_BIASES} tokens")
    biases = {}
    for name in value:
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else None
        if token is None:
            raise FieldError(
                fields.at("logit_bias"), expected="token ids as names", got=describe(name)
            )
        read_token(token, fields.at("logit_bias"), spec)
        biases[token] = _or(table.number(name, -100, 100), 0.0)
    return biases


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
