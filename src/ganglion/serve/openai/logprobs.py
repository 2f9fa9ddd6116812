"""Logprobs: logarithms of probabilities in the two shapes of OpenAI's interfaces.

Called by `chat`, `completions` and `responses`. Knows how a token is shown as text.
"""

from collections.abc import Sequence
from typing import Any

from ganglion.generation import TokenLogprob
from ganglion.service import TextTokenizer

LOWEST = -9_999.0  # JSON has no minus infinity; OpenAI's own stand-in


class LogprobWriter:
    """Shows the tokens of one model."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """Items of `logprobs.content`."""
        return [
            self._chat_token(item.token_id, item.logprob)
            | {"top_logprobs": [self._chat_token(*pair) for pair in item.top]}
            for item in logprobs
        ]

    def completion(
        self, logprobs: Sequence[TokenLogprob | None], token_ids: Sequence[int], offset: int
    ) -> dict[str, Any]:
        """`logprobs` of a completion; `offset` is where its first token begins in the text."""
        tokens = [self.name(token) for token in token_ids]
        offsets = []
        for token in token_ids:
            offsets.append(offset)
            offset += self.num_characters((token,))
        return {
            "tokens": tokens,
            "token_logprobs": [None if p is None else _finite(p.logprob) for p in logprobs],
            "top_logprobs": [None if p is None else self._top(p) for p in logprobs],
            "text_offset": offsets,
        }

    def num_characters(self, token_ids: Sequence[int]) -> int:
        """How much text the tokens are. A character of several tokens counts as its first byte does."""
        data = b"".join(map(self._tokenizer.token_bytes, token_ids))
        return sum(byte & 0xC0 != 0x80 for byte in data)

    def name(self, token_id: int) -> str:
        """A token as a name of its own: its text, its bytes where they are no text, its id where there are none."""
        data = self._tokenizer.token_bytes(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        pairs = [*item.top, (item.token_id, item.logprob)]
        return {self.name(token): _finite(logprob) for token, logprob in pairs}

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST)
