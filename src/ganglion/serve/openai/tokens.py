"""Tokens: `/tokenize` and `/detokenize`, in vLLM's shapes.

Called by `routes`. Knows the tokenizers of the catalog.
"""

from typing import Any

from ganglion.serve.openai.catalog import Catalog
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.messages import read_messages
from ganglion.serve.openai.sampling import read_token
from ganglion.serve.openai.tools import CHAT_SHAPE, read_tools

MAX_TOKEN_IDS = 2**20


class TokenReader:
    """Text to token ids and back."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def tokenize(self, body: object) -> dict[str, Any]:
        """`prompt`, or `messages` with `tools`: `{"count", "max_model_len", "tokens"}`, by wish `token_strs`."""
        fields = Fields(body)
        chosen = self._catalog.choose(fields)
        if fields.raw("messages") is not None:
            tools = read_tools(fields, CHAT_SHAPE, chosen.spec.family)
            token_ids = chosen.tokenizer.chat(read_messages(fields), tools=tools.shown)
        else:
            prompt = fields.text("prompt")
            if prompt is None:
                raise fields.wrong("prompt", "a string, or messages instead")
            token_ids = chosen.tokenizer.encode(prompt)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": chosen.spec.max_tokens,
            "tokens": list(token_ids),
        }
        if fields.flag("return_token_strs"):
            answer["token_strs"] = [
                chosen.tokenizer.token_bytes(token).decode(errors="replace") for token in token_ids
            ]
        return answer

    def detokenize(self, body: object) -> dict[str, Any]:
        """`tokens`: `{"prompt"}`."""
        fields = Fields(body)
        chosen = self._catalog.choose(fields)
        rows = fields.rows("tokens", high=MAX_TOKEN_IDS)
        if rows is None:
            raise fields.wrong("tokens", "a list of token ids")
        token_ids = [
            read_token(row, f"tokens[{index}]", chosen.spec) for index, row in enumerate(rows)
        ]
        return {"prompt": chosen.tokenizer.decode(token_ids)}
