"""OpenAPI: the document at `/openapi.json`: what is taken, within which limits, and what comes back.

Made once by `routes`. Written by hand from the limits that the readers check; a test sends every field that stands here.
"""

from collections.abc import Mapping
from typing import Any

from ganglion import __version__
from ganglion.generation import Pooling
from ganglion.serve.openai.completions import MAX_PROMPTS
from ganglion.serve.openai.embeddings import MAX_INPUTS
from ganglion.serve.openai.grammar import MAX_ALTERNATIVES, MAX_GRAMMAR_LENGTH, NAME
from ganglion.serve.openai.messages import (
    DETAILS,
    MAX_CALLS,
    MAX_ID_LENGTH,
    MAX_MESSAGES,
    MAX_PARTS,
    ROLES,
)
from ganglion.serve.openai.responses import INCLUDES, MAX_INCLUDES
from ganglion.serve.openai.sampling import (
    MAX_BIASES,
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
TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS}
TOKEN_IDS: Schema = {"type": "array", "items": TOKEN}
PROMPT_IDS: Schema = TOKEN_IDS | {"minItems": 1}
NAMED_TEXT: Schema = {"type": "string", "minLength": 1}


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


def _asked(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object of a request: what may be left out may be null as well."""
    fields = {
        name: schema if name in required else _nullable(schema)
        for name, schema in properties.items()
    }
    return _object(required, **fields)


def _nullable(schema: Schema) -> Schema:
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "$ref" in schema:
        return _either(schema, {"type": "null"})
    words = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return schema | words | {"type": [schema["type"], "null"]}


def _named(**texts: Schema) -> Schema:
    """An object of exactly these fields among those that only one may be of."""
    return _object(tuple(texts), **texts)


STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
ID = {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}
NAME_TEXT = {"type": "string", "pattern": f"^{NAME.pattern}$"}  # of a function or a schema
COUNT = _integer(1, MAX_TOKENS)
DATA_URL = {"type": "string", "pattern": "^data:image/(png|jpe?g|webp);base64,"}
CONTENT = _either(
    TEXT,
    _list(
        _either(
            _object(("type", "text"), type=_words("text", "input_text", "output_text"), text=TEXT),
            _object(
                ("type", "image_url"),
                type=_words("image_url"),
                image_url=_asked(("url",), url=DATA_URL, detail=_words(*DETAILS)),
            ),
            _asked(
                ("type", "image_url"),
                type=_words("input_image"),
                image_url=DATA_URL,
                detail=_words(*DETAILS),
            ),
        ),
        MAX_PARTS,
    ),
)
STREAM_OPTIONS = _asked((), include_usage=FLAG, include_obfuscation=FLAG)
GRAMMAR = {"type": "string", "minLength": 1, "maxLength": MAX_GRAMMAR_LENGTH}
STRUCTURE = _either(
    _named(json=_either(ANY, TEXT)),
    _named(regex=GRAMMAR),
    _named(choice=_list(NAMED_TEXT, MAX_ALTERNATIVES, 1)),
    _named(grammar=GRAMMAR),
)
SALT = {"type": "string", "maxLength": MAX_SALT_LENGTH}
SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": _nullable(_number(-100, 100)),
        "maxProperties": MAX_BIASES,
    },
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _either(STOP, _list(STOP, MAX_STOPS)),
    "stop_token_ids": TOKEN_IDS | {"maxItems": MAX_STOPS},
    "min_tokens": _integer(0, MAX_TOKENS),
    "ignore_eos": FLAG,
    "structured_outputs": STRUCTURE,
    "cache_salt": SALT,
    "stream": FLAG,
    "stream_options": STREAM_OPTIONS | {"description": "only with `stream: true`"},
    "user": TEXT,
    "service_tier": _words(*SERVICE_TIERS),
}
PARAMETERS = {"type": "object", "properties": {"type": {"enum": ["object", None]}}}
FUNCTION = _asked(("name",), name=NAME_TEXT, description=TEXT, parameters=PARAMETERS, strict=FLAG)
TOOLS = _list(_asked(("type", "function"), type=_words("function"), function=FUNCTION), MAX_TOOLS)
FLAT_TOOL = _asked(
    ("type", "name"), type=_words("function"), name=NAME_TEXT, description=TEXT, parameters=PARAMETERS, strict=FLAG
)  # fmt: skip
NAMED = _object(("name",), name=NAME_TEXT)
NAMED_TOOL = _object(("type", "function"), type=_words("function"), function=NAMED)
NAMED_FLAT_TOOL = _object(("type", "name"), type=_words("function"), name=NAME_TEXT)
ALLOWED = {"type": _words("allowed_tools"), "mode": _words("auto", "required")}
TOOL_CHOICE = _either(
    _words(*MODES),
    NAMED_TOOL,
    _object(
        ("type", "allowed_tools"),
        type=ALLOWED["type"],
        allowed_tools=_object(
            ("mode", "tools"), mode=ALLOWED["mode"], tools=_list(NAMED_TOOL, MAX_TOOLS, 1)
        ),
    ),
)
FLAT_TOOL_CHOICE = _either(
    _words(*MODES),
    NAMED_FLAT_TOOL,
    _object(("type", "mode", "tools"), **ALLOWED, tools=_list(NAMED_FLAT_TOOL, MAX_TOOLS, 1)),
)
NAMED_SCHEMA = {"name": NAME_TEXT, "description": TEXT, "schema": ANY, "strict": FLAG}
FREE_FORMAT = _object(("type",), type=_words("text", "json_object"))
SCHEMA_KIND = _words("json_schema")
FORMAT = _either(
    FREE_FORMAT,
    _object(("type", "json_schema"), type=SCHEMA_KIND, json_schema=_asked(("name",), **NAMED_SCHEMA)),
)  # fmt: skip
FLAT_FORMAT = _either(FREE_FORMAT, _asked(("type", "name"), type=SCHEMA_KIND, **NAMED_SCHEMA))
CALL = _asked(
    ("type", "function"), id={"type": "string", "maxLength": MAX_ID_LENGTH}, type=_words("function"),
    function=_object(("name", "arguments"), name={"type": "string", "maxLength": MAX_ID_LENGTH}, arguments=TEXT),
)  # fmt: skip
SPEAKER = {"name": {"type": "string", "maxLength": MAX_ID_LENGTH}}
ASKING_ROLES = tuple(role for role, plain in ROLES.items() if plain in ("system", "user"))
MESSAGE = _either(
    _asked(("role", "content"), role=_words(*ASKING_ROLES), content=CONTENT, **SPEAKER),
    _asked(
        ("role", "content"), role=_words("assistant"), content=CONTENT,
        tool_calls=_list(CALL, MAX_CALLS), **SPEAKER,
    ),
    _asked(
        ("role", "tool_calls"), role=_words("assistant"), content=CONTENT,
        tool_calls=_list(CALL, MAX_CALLS, 1), **SPEAKER,
    ),
    _asked(("role", "content", "tool_call_id"), role=_words("tool"), content=CONTENT, tool_call_id=ID, **SPEAKER),
)  # fmt: skip
ITEM = _either(
    _asked(("role", "content"), type=_words("message"), role=_words(*ROLES), content=CONTENT),
    _object(
        ("type", "call_id", "name", "arguments"),
        type=_words("function_call"), call_id=ID, name=ID, arguments=TEXT,
    ),
    _object(
        ("type", "call_id", "output"), type=_words("function_call_output"), call_id=ID, output=CONTENT
    ),
    _object(("type",), type=_words("reasoning")),
)  # fmt: skip
EVENT = _object(("data",), data=TEXT, event=TEXT)
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
    "ChatRequest": _asked(
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
    "Message": MESSAGE,
    "ChatAnswer": _object(
        ("id", "object", "created", "model", "choices"),
        id=TEXT, object=_words("chat.completion"), created={"type": "integer"}, model=TEXT,
        choices={"type": "array", "items": ANY}, usage=USAGE,
    ),
    "CompletionRequest": _asked(
        ("prompt",),
        model=TEXT,
        prompt=_either(
            NAMED_TEXT, PROMPT_IDS, _list(_either(NAMED_TEXT, PROMPT_IDS), MAX_PROMPTS, 1)
        ),
        max_tokens=_integer(0, MAX_TOKENS),
        n=_integer(1, MAX_CHOICES),
        echo=FLAG,
        add_special_tokens=FLAG,
        logprobs=_integer(0, MAX_LOGPROBS),
        **SAMPLING,
    ),
    "CompletionAnswer": _object(
        ("id", "object", "created", "model", "choices"),
        id=TEXT, object=_words("text_completion"), created={"type": "integer"}, model=TEXT,
        choices={"type": "array", "items": ANY}, usage=USAGE,
    ),
    "ResponseRequest": _asked(
        ("input",),
        model=TEXT,
        input=_either(TEXT, _list(_ref("Item"), MAX_MESSAGES, 1)),
        instructions=TEXT,
        max_output_tokens=COUNT,
        top_logprobs=_integer(0, MAX_LOGPROBS),
        include=_list(_words(*INCLUDES), MAX_INCLUDES),
        text=_asked((), format=FLAT_FORMAT),
        tools=_list(FLAT_TOOL, MAX_TOOLS),
        tool_choice=FLAT_TOOL_CHOICE,
        parallel_tool_calls=FLAG,
        metadata=ANY,
        truncation=_words("disabled"),
        **SAMPLING,
    ),
    "Item": ITEM,
    "EmbeddingRequest": _asked(
        ("input",),
        model=TEXT,
        input=_either(
            NAMED_TEXT, PROMPT_IDS, _list(_either(NAMED_TEXT, PROMPT_IDS), MAX_INPUTS, 1)
        ),
        encoding_format=_words("float", "base64"),
        dimensions=_integer(1, MAX_TOKENS),
        pooling=_words(*Pooling),
        add_special_tokens=FLAG,
        cache_salt=SALT,
        user=TEXT,
    ),
    "EmbeddingAnswer": _object(
        ("object", "model", "data", "usage"), object=_words("list"), model=TEXT,
        data={"type": "array", "items": ANY}, usage=ANY,
    ),
    "ResponseAnswer": _object(
        ("id", "object", "created_at", "model", "status", "output"),
        id=TEXT, object=_words("response"), created_at={"type": "integer"}, model=TEXT,
        status=_words("completed", "incomplete", "failed", "in_progress"),
        output={"type": "array", "items": ANY}, usage=ANY,
    ),
    "TokenizeRequest": _either(
        _asked(
            ("prompt",), model=TEXT, prompt=TEXT, add_special_tokens=FLAG, return_token_strs=FLAG
        ),
        _asked(
            ("messages",), model=TEXT, messages=_list(_ref("Message"), MAX_MESSAGES, 1), tools=TOOLS,
            return_token_strs=FLAG,
        ),
    ),
    "TokenizeAnswer": _object(
        ("count", "max_model_len", "tokens"), count={"type": "integer"},
        max_model_len={"type": "integer"}, tokens=TOKEN_IDS, token_strs=_list(TEXT, MAX_TOKENS),
    ),
    "TokenizerInfo": _object(
        ("model", "eos_token", "bos_token", "pad_token", "vocab_size", "max_model_len"),
        model=TEXT, eos_token=_nullable(TEXT), bos_token=_nullable(TEXT), pad_token=_nullable(TEXT),
        vocab_size={"type": "integer"}, max_model_len={"type": "integer"},
    ),
    "DetokenizeRequest": _asked(("tokens",), model=TEXT, tokens=TOKEN_IDS),
    "DetokenizeAnswer": _object(("prompt",), prompt=TEXT),
    "Model": _object(
        ("id", "object", "created", "owned_by", "kind"), id=TEXT, object=_words("model"),
        created={"type": "integer"}, owned_by=TEXT, kind=_words("language", "policy"),
        max_model_len={"type": "integer"}, weight_bytes={"type": "integer"},
        state=_words("unloaded", "loading", "loaded"), stay=TEXT, parent=_nullable(TEXT),
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
        "/v1/embeddings": _post("Vectors of texts", "Embedding"),
        "/tokenize": _post("Text or messages to token ids", "Tokenize"),
        "/detokenize": _post("Token ids to text", "Detokenize"),
    }
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    model = {"name": "model", "in": "query", "schema": TEXT}
    gets = {
        "/tokenizer_info": _get("What a tokenizer's user must know", "TokenizerInfo")
        | {"parameters": [model]},
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
        content["text/event-stream"] = {"schema": EVENT}  # of each event
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
