"""Embeddings: `/v1/embeddings`: texts or token ids in, one vector of length 1 for each out.

Called by `routes`. Knows the field names of that interface and the shapes of its answers. vLLM's `pooling` is not a field
there but a setting of its server; here it is one of the request.
"""

import base64
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from ganglion.errors import FieldError
from ganglion.generation import Embedded, GenerateRequest, Pooling, Sampling, Usage
from ganglion.serve.openai.answer import Prepared, sum_usage
from ganglion.serve.openai.catalog import Catalog, Chosen
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.refusal import ApiError
from ganglion.serve.openai.run import Item
from ganglion.serve.openai.sampling import read_tenant, read_token
from ganglion.serve.openai.tokens import encode
from ganglion.types import Float32Array
from ganglion.wire import describe

MAX_INPUTS = 2048  # OpenAI's
NUM_AT_ONCE = 16  # in the engine: others that wait are refused when its queue is full
BASE64, FLOAT = "base64", "float"
NUM_DIGITS = 9  # after the point, of numbers below 1: float32 has no more
ID_PREFIX = "embd-"


class EmbeddingReader:
    """Makes a checked request of a body."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def read(self, body: object, created_s: int) -> Prepared:
        """Raises FieldError, UnsupportedFieldError, ApiError."""
        fields = Fields(body)
        chosen = self._catalog.choose(fields)
        prompts = _read_inputs(fields, chosen)
        encoding = fields.choice("encoding_format", (FLOAT, BASE64)) or FLOAT
        width = chosen.spec.width
        num_dims = fields.integer("dimensions", 1, width) or width
        pooling = Pooling(fields.choice("pooling", tuple(Pooling)) or Pooling.LAST)
        fields.text("user")
        tenant = read_tenant(fields)
        requests = tuple(
            GenerateRequest(
                model=chosen.spec.name,
                prompt=prompt,
                sampling=Sampling(temperature=0.0, max_tokens=1),
                tenant=tenant,
                pooling=pooling,
            )
            for prompt in prompts
        )
        answer = EmbeddingAnswer(
            chosen.spec.name, len(requests), is_base64=encoding == BASE64, num_dims=num_dims
        )
        return Prepared(
            answer_id=ID_PREFIX + secrets.token_hex(16),
            requests=requests,
            answer=answer,
            is_streamed=False,
            unknown=fields.unknown(),
            num_at_once=NUM_AT_ONCE,
        )


class EmbeddingAnswer:
    """A list of vectors, in the order of the inputs. Never streamed."""

    def __init__(self, model: str, num_inputs: int, *, is_base64: bool, num_dims: int) -> None:
        self._model, self._is_base64, self._num_dims = model, is_base64, num_dims
        self._vectors: list[Float32Array | None] = [None] * num_inputs
        self._usages: list[Usage] = []

    def add(self, item: Item) -> list[dict[str, Any]]:
        """Keeps it."""
        source, generated = item
        if isinstance(generated, Usage):
            self._usages.append(generated)
        else:
            assert isinstance(generated, Embedded), "nothing else was asked for"
            self._vectors[source] = generated.vector
        return []

    def close(self) -> list[dict[str, Any]]:
        """None: there is no stream."""
        return []

    def fail(self, error: Mapping[str, Any]) -> list[dict[str, Any]]:
        """None: there is no stream."""
        return []

    def whole(self) -> dict[str, Any]:
        """All vectors, and the tokens of all inputs."""
        usage = sum_usage(self._usages)
        return {
            "object": "list",
            "model": self._model,
            "data": [
                {"object": "embedding", "index": index, "embedding": self._shown(vector)}
                for index, vector in enumerate(self._vectors)
            ],
            "usage": {
                "prompt_tokens": usage.num_prompt_tokens,
                "total_tokens": usage.num_prompt_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            },
        }

    def _shown(self, vector: Float32Array | None) -> str | list[float]:
        assert vector is not None, "an end before its vector"
        unit = to_unit(vector[: self._num_dims])
        if self._is_base64:
            return base64.b64encode(unit.astype("<f4").tobytes()).decode()
        return [round(number, NUM_DIGITS) for number in unit.tolist()]


def to_unit(vector: Float32Array) -> Float32Array:
    """The same direction, length 1. A vector of zeros stays one."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0.0 else (vector / length).astype(np.float32)


def _read_inputs(fields: Fields, chosen: Chosen) -> list[tuple[int, ...]]:
    """`input`: a text, texts, token ids or lists of those."""
    value = fields.raw("input")
    expected = f"a string, token ids, or a list of 1..{MAX_INPUTS} of those, none of them empty"
    if isinstance(value, str):
        inputs: list[Any] = [value]
    elif isinstance(value, list) and value and not isinstance(value[0], str | list):
        inputs = [value]
    elif isinstance(value, list) and 1 <= len(value) <= MAX_INPUTS:
        inputs = value
    else:
        raise fields.wrong("input", expected)
    prompts = []
    for index, one in enumerate(inputs):
        path = "input" if one is value else f"input[{index}]"
        if isinstance(one, str):
            prompt = encode(one, fields, chosen)
        elif isinstance(one, list):
            prompt = tuple(
                read_token(token, f"{path}[{at}]", chosen.spec) for at, token in enumerate(one)
            )
        else:
            raise FieldError(path, expected="a string or a list of token ids", got=describe(one))
        if not prompt:
            raise FieldError(path, expected="at least one token", got="none")
        if len(prompt) > chosen.spec.max_tokens:
            raise ApiError(
                400,
                f"This model's maximum context length is {chosen.spec.max_tokens} tokens, "
                f"{path} has {len(prompt)}",
                code="context_length_exceeded",
                param=path,
                next_step="shorten it",
            )
        prompts.append(prompt)
    return prompts
