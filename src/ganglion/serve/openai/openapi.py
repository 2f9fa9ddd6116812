"""OpenAPI: the document at `/openapi.json`: what is taken, within which limits, and what comes back.

Made once by `routes`. Written by hand from the limits that the readers check; a test sends every field that stands here.
"""

from collections.abc import Mapping
from typing import Any

from ganglion import __version__
from ganglion.serve.openai.completions import MAX_PROMPTS
from ganglion.serve.openai.messages import MAX_MESSAGES, ROLES
from ganglion.serve.openai.responses import INCLUDES
from ganglion.serve.openai.sampling import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_SALT_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOKENS,
    SERVICE_TIERS,
)
from ganglion.serve.openai.tools import MAX_TOOLS, MODES

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {"type": "object"}
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _words(*words: str) -> Schema:
    return {"type": "string", "enum": list(words)}


def _list(items: Schema, high: int, low: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
COUNT = _integer(1, MAX_TOKENS)
CONTENT = _either(TEXT, _list(_object(("type", "text"), type=_words("text"), text=TEXT), 256))
STREAM_OPTIONS = _object((), include_usage=FLAG, include_obfuscation=FLAG)
STRUCTURE = _object((), json=_either(ANY, TEXT), regex=TEXT, choice=_list(TEXT, 256), grammar=TEXT)
SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _either(STOP, _list(STOP, MAX_STOPS)),
    "stop_token_ids": TOKEN_IDS | {"maxItems": MAX_STOPS},
    "min_tokens": _integer(0, MAX_TOKENS),
    "ignore_eos": FLAG,
    "structured_outputs": STRUCTURE,
    "cache_salt": {"type": "string", "maxLength": MAX_SALT_LENGTH},
    "stream": FLAG,
    "stream_options": STREAM_OPTIONS,
    "user": TEXT,
    "service_tier": _words(*SERVICE_TIERS),
}
FUNCTION = _object(("name",), name=TEXT, description=TEXT, parameters=ANY, strict=FLAG)
TOOLS = _list(_object(("type", "function"), type=_words("function"), function=FUNCTION), MAX_TOOLS)
FLAT_TOOL = _object(
    ("type", "name"), type=_words("function"), name=TEXT, description=TEXT, parameters=ANY, strict=FLAG
)  # fmt: skip
NAMED = _object(("name",), name=TEXT)
TOOL_CHOICE = _either(
    _words(*MODES),
    _object(("type", "function"), type=_words("function"), function=NAMED),
    _object(("type", "allowed_tools"), type=_words("allowed_tools"), allowed_tools=ANY),
)
FLAT_TOOL_CHOICE = _either(
    _words(*MODES),
    _object(("type", "name"), type=_words("function"), name=TEXT),
    _object(
        ("type", "mode", "tools"), type=_words("allowed_tools"), mode=_words("auto", "required"),
        tools=_list(ANY, MAX_TOOLS, 1),
    ),
)  # fmt: skip
NAMED_SCHEMA = {"name": TEXT, "description": TEXT, "schema": ANY, "strict": FLAG}
KINDS_OF_FORMAT = _words("text", "json_object", "json_schema")
FORMAT = _object(
    ("type",), type=KINDS_OF_FORMAT, json_schema=_object(("name",), **NAMED_SCHEMA)
)  # fmt: skip
CALL = _object(
    ("id", "type", "function"), id=TEXT, type=_words("function"),
    function=_object(("name", "arguments"), name=TEXT, arguments=TEXT),
)  # fmt: skip
USAGE = _object(
    ("prompt_tokens", "completion_tokens", "total_tokens"),
    prompt_tokens={"type": "integer"}, completion_tokens={"type": "integer"}, total_tokens={"type": "integer"},
    prompt_tokens_details=_object((), cached_tokens={"type": "integer"}),
)  # fmt: skip

SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        ("error",),
        error=_object(
            ("message", "type", "param", "code"),
            message=TEXT, type=TEXT, param={"type": ["string", "null"]}, code=TEXT,
        ),
    ),
    "ChatRequest": _object(
        ("messages",),
        model=TEXT,
        messages=_list(_ref("Message"), MAX_MESSAGES, 1),
        max_completion_tokens=COUNT,
        max_tokens=COUNT,
        n=_integer(1, MAX_CHOICES),
        logprobs=FLAG,
        top_logprobs=_integer(0, MAX_LOGPROBS),
        response_format=FORMAT,
        tools=TOOLS,
        tool_choice=TOOL_CHOICE,
        parallel_tool_calls=FLAG,
        **SAMPLING,
    ),
    "Message": _object(
        ("role",), role=_words(*ROLES), content=CONTENT, name=TEXT, tool_call_id=TEXT,
        tool_calls=_list(CALL, 128),
    ),
    "ChatAnswer": _object(
        ("id", "object", "created", "model", "choices"),
        id=TEXT, object=_words("chat.completion"), created={"type": "integer"}, model=TEXT,
        choices={"type": "array", "items": ANY}, usage=USAGE,
    ),
    "CompletionRequest": _object(
        ("prompt",),
        model=TEXT,
        prompt=_either(TEXT, TOKEN_IDS, _list(_either(TEXT, TOKEN_IDS), MAX_PROMPTS, 1)),
        max_tokens=_integer(0, MAX_TOKENS),
        n=_integer(1, MAX_CHOICES),
        best_of=_integer(1, MAX_CHOICES),
        echo=FLAG,
        logprobs=_integer(0, MAX_LOGPROBS),
        **SAMPLING,
    ),
    "CompletionAnswer": _object(
        ("id", "object", "created", "model", "choices"),
        id=TEXT, object=_words("text_completion"), created={"type": "integer"}, model=TEXT,
        choices={"type": "array", "items": ANY}, usage=USAGE,
    ),
    "ResponseRequest": _object(
        ("input",),
        model=TEXT,
        input=_either(TEXT, _list(ANY, MAX_MESSAGES, 1)),
        instructions=TEXT,
        max_output_tokens=COUNT,
        top_logprobs=_integer(0, MAX_LOGPROBS),
        include=_list(_words(*INCLUDES), 16),
        text=_object((), format=_object(("type",), type=KINDS_OF_FORMAT, **NAMED_SCHEMA)),
        tools=_list(FLAT_TOOL, MAX_TOOLS),
        tool_choice=FLAT_TOOL_CHOICE,
        parallel_tool_calls=FLAG,
        metadata=ANY,
        truncation=_words("disabled"),
        **SAMPLING,
    ),
    "ResponseAnswer": _object(
        ("id", "object", "created_at", "model", "status", "output"),
        id=TEXT, object=_words("response"), created_at={"type": "integer"}, model=TEXT,
        status=_words("completed", "incomplete", "failed", "in_progress"),
        output={"type": "array", "items": ANY}, usage=ANY,
    ),
    "TokenizeRequest": _object(
        (), model=TEXT, prompt=TEXT, messages=_list(_ref("Message"), MAX_MESSAGES, 1), tools=TOOLS,
        return_token_strs=FLAG,
    ),
    "TokenizeAnswer": _object(
        ("count", "max_model_len", "tokens"), count={"type": "integer"},
        max_model_len={"type": "integer"}, tokens=TOKEN_IDS, token_strs=_list(TEXT, MAX_TOKENS),
    ),
    "DetokenizeRequest": _object(("tokens",), model=TEXT, tokens=TOKEN_IDS),
    "DetokenizeAnswer": _object(("prompt",), prompt=TEXT),
    "Model": _object(
        ("id", "object", "created", "owned_by", "kind"), id=TEXT, object=_words("model"),
        created={"type": "integer"}, owned_by=TEXT, kind=_words("language", "policy"),
        max_model_len={"type": "integer"},
    ),
    "Models": _object(
        ("object", "data"), object=_words("list"), data={"type": "array", "items": _ref("Model")}
    ),
}  # fmt: skip
REFUSALS = {
    "400": "A field does not fit, or the body is not JSON",
    "401": "No key, or a wrong one",
    "403": "A Host or Origin that this server does not know",
    "404": "No model of this name",
    "405": "Not a POST",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "429": "Too many requests wait: Retry-After says for how long",
    "500": "A defect of the server: the message has an id, the log the rest",
    "503": "No memory just now, or the server is stopping",
}


def openapi_body() -> dict[str, Any]:
    """The document."""
    posts = {
        "/v1/chat/completions": _post("A conversation's next message", "Chat", is_streamed=True),
        "/v1/completions": _post("Continuations of prompts", "Completion", is_streamed=True),
        "/v1/responses": _post("A response, without state", "Response", is_streamed=True),
        "/tokenize": _post("Text or messages to token ids", "Tokenize"),
        "/detokenize": _post("Token ids to text", "Detokenize"),
    }
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    gets = {
        "/v1/models": _get("All models, language and policy", "Models"),
        "/v1/models/{name}": _get("One model", "Model") | {"parameters": [name]},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "ganglion: OpenAI's interface", "version": __version__},
        "paths": posts | gets,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(summary: str, name: str, *, is_streamed: bool = False) -> Schema:
    content: Schema = _json(_ref(f"{name}Answer"))
    if is_streamed:
        content["text/event-stream"] = {"schema": TEXT}
    body = {"required": True, "content": _json(_ref(f"{name}Request"))}
    return {"post": _operation(summary, content) | {"requestBody": body}}


def _get(summary: str, name: str) -> Schema:
    return {"get": _operation(summary, _json(_ref(name)))}


def _operation(summary: str, content: Mapping[str, Any]) -> Schema:
    error = _json(_ref("Error"))
    refusals = {
        status: {"description": text, "content": error} for status, text in REFUSALS.items()
    }
    answer = {"200": {"description": "The answer", "content": dict(content)}}
    return {"summary": summary, "responses": answer | refusals}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
