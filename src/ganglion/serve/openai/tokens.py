"""Tokens: `/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's shapes.

Called by `routes`. Knows the tokenizers of the catalog.
"""

from typing import Any

from ganglion.errors import UnsupportedFieldError
from ganglion.serve.openai.catalog import Catalog, Chosen
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.messages import pictures_of, read_messages
from ganglion.serve.openai.sampling import read_token
from ganglion.serve.openai.tools import CHAT_SHAPE, read_tools

MAX_TOKEN_IDS = 2**20
UNSUPPORTED = {  # beside messages
    "add_special_tokens": "templates write their own",
    "continue_final_message": "the assistant always begins a message of its own",
    "chat_template": "templates are the model's own",
    "chat_template_kwargs": "templates take messages and tools only",
}


def encode(text: str, fields: Fields, chosen: Chosen) -> tuple[int, ...]:
    """Ids of a prompt; by vLLM's `add_special_tokens: false` without those that the model puts in front."""
    if fields.flag("add_special_tokens") is False:
        return chosen.tokenizer.encode_rendered(text)
    return chosen.tokenizer.encode(text)


class TokenReader:
    """Text to token ids and back."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def tokenize(self, body: object) -> dict[str, Any]:
        """`prompt`, or `messages` with `tools`: `{"count", "max_model_len", "tokens"}`, by wish `token_strs`."""
        fields = Fields(body)
        chosen = self._catalog.choose(fields)
        if fields.raw("messages") is not None:
            fields.refuse(UNSUPPORTED)
            if fields.flag("add_generation_prompt") is False:
                why = "the assistant always speaks next"
                raise UnsupportedFieldError("add_generation_prompt", why=why)
            tools = read_tools(fields, CHAT_SHAPE, chosen.spec.family)
            messages = read_messages(fields)
            pictures_of(messages, chosen.spec)  # refuses those that the model cannot see
            token_ids = chosen.tokenizer.chat(messages, tools=tools.shown)
        else:
            prompt = fields.text("prompt")
            if prompt is None:
                raise fields.wrong("prompt", "a string, or messages instead")
            token_ids = encode(prompt, fields, chosen)
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

    def info(self, name: str | None) -> dict[str, Any]:
        """What a client must know to ask for tokens instead of loading the tokenizer: lm-eval does.

        Raises as `Catalog.choose`.
        """
        chosen = self._catalog.choose(Fields({"model": name}))
        texts = (chosen.tokenizer.decode((token,)) for token in chosen.spec.eos_ids)
        return {
            "model": chosen.spec.name,
            "eos_token": next((text for text in texts if text), None),
            "bos_token": chosen.tokenizer.decode(chosen.tokenizer.encode("")) or None,
            "pad_token": None,
            "vocab_size": chosen.spec.vocab_size,
            "max_model_len": chosen.spec.max_tokens,
        }

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
