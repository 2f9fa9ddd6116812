"""Drafting: from `chat.speculate` to who drafts for whom. Called by `pipeline.local` when it starts. Knows tokenizers, no engine."""

from collections.abc import Sequence

from ganglion.config import ChatConfig
from ganglion.engine.drafter import NGRAM, OFF, Speculation
from ganglion.errors import ConfigError
from ganglion.pipeline.served import ServedLanguage


def read_speculation(chat: ChatConfig, languages: Sequence[ServedLanguage]) -> Speculation:
    """What the engine is told. Raises ConfigError for a model that is not served or that can draft for none that is."""
    source = chat.speculate
    if source not in (OFF, NGRAM):
        _check_model(source, languages)
    return Speculation(
        source=source, max_tokens=chat.speculate_tokens, is_ahead=chat.speculate_ahead
    )


def _check_model(source: str, languages: Sequence[ServedLanguage]) -> None:
    named = {each.spec.name: each for each in languages}
    drafting = named.pop(source, None)
    if drafting is None:
        raise ConfigError(
            f"chat.speculate: no served model {source!r} among {', '.join(named) or 'none'}",
            next_step=f"write off or ngram, or serve it too: chat={source}",
        )
    if not any(_is_same_tokenizer(drafting, each) for each in named.values()):
        raise ConfigError(
            f"chat.speculate: {source} ({drafting.spec.vocab_size} tokens) has the tokenizer of no other served model "
            f"({', '.join(f'{name}: {each.spec.vocab_size}' for name, each in named.items()) or 'there is none'})",
            next_step="serve a small and a large model of one family, or write ngram",
        )


def _is_same_tokenizer(one: ServedLanguage, other: ServedLanguage) -> bool:
    num_tokens = one.spec.vocab_size
    return num_tokens == other.spec.vocab_size and all(
        one.tokenizer.token_bytes(index) == other.tokenizer.token_bytes(index)
        for index in range(num_tokens)
    )
