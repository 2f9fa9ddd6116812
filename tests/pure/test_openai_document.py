"""The document at /openapi.json is true: every field that it names is read, and what it allows is taken."""

import pytest
from starlette.routing import Route

from ganglion.errors import GanglionError
from ganglion.serve.fake_language import FakeLanguageService
from ganglion.serve.openai.catalog import Catalog
from ganglion.serve.openai.chat import ChatReader
from ganglion.serve.openai.completions import CompletionReader
from ganglion.serve.openai.embeddings import EmbeddingReader
from ganglion.serve.openai.openapi import SCHEMAS, openapi_body
from ganglion.serve.openai.responses import ResponseReader
from ganglion.serve.openai.routes import openai_routes

READERS = {
    "ChatRequest": ChatReader,
    "CompletionRequest": CompletionReader,
    "EmbeddingRequest": EmbeddingReader,
    "ResponseRequest": ResponseReader,
}
BASE = {
    "ChatRequest": {"messages": [{"role": "user", "content": "x"}]},
    "CompletionRequest": {"prompt": "x"},
    "EmbeddingRequest": {"input": "x"},
    "ResponseRequest": {"input": "x"},
}
TOOL = {"type": "function", "function": {"name": "stop"}}
# Fields that only fit beside others, and values that a schema alone does not tell.
BESIDE = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
}
NUMBERS = {"integer", "number"}
VALUES = {
    "model": "echo",
    "messages": [{"role": "user", "content": "x"}],
    "structured_outputs": {"regex": "a+"},
    "tools": [TOOL],
    "logit_bias": {"65": 1},
    "text": {"format": {"type": "text"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
}


def least(schema):
    """The smallest value that a schema allows."""
    if "$ref" in schema:
        return least(SCHEMAS[schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return least(schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema["type"]
    match kind[0] if isinstance(kind, list) else kind:
        case "string":
            return "x" * schema.get("minLength", 1)
        case "boolean":
            return False
        case "array":
            return [least(schema["items"]) for _ in range(schema.get("minItems", 0))]
        case "object":
            return {name: least(schema["properties"][name]) for name in schema.get("required", ())}
        case _:
            return schema["minimum"]


def types_of(schema):
    kind = schema.get("type", ())
    return [kind] if isinstance(kind, str) else kind


def fields_of(name):
    return [(name, field) for field in SCHEMAS[name]["properties"]]


@pytest.mark.parametrize(
    ("name", "field"), [pair for request in READERS for pair in fields_of(request)]
)
def test_every_field_is_read(name, field):
    reader = READERS[name](Catalog(FakeLanguageService()))
    value = VALUES.get(field, least(SCHEMAS[name]["properties"][field]))
    if name == "ResponseRequest" and field == "tools":
        value = [{"type": "function", "name": "stop"}]
    beside = BESIDE.get(field, {}) if name == "ChatRequest" or field != "top_logprobs" else {}
    prepared = reader.read(BASE[name] | beside | {field: value}, 0)
    assert prepared.unknown == set()
    assert prepared.requests


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (request, field)
        for request in READERS
        for field, schema in SCHEMAS[request]["properties"].items()
        if NUMBERS & set(types_of(schema))
    ],
)
def test_numbers_past_the_limits_are_refused(name, field):
    schema = SCHEMAS[name]["properties"][field]
    reader = READERS[name](Catalog(FakeLanguageService()))
    for value in (schema["minimum"] - 1, schema.get("maximum", 10**9) + 1):
        with pytest.raises(GanglionError):
            reader.read(BASE[name] | {field: value}, 0)


def test_paths_are_those_that_are_served():
    served = {
        route.path.replace(":path", "")
        for route in openai_routes(FakeLanguageService(), policy=None)
        if isinstance(route, Route)
    }
    assert served - {"/openapi.json"} == openapi_body()["paths"].keys()


def test_references_lead_somewhere():
    def references(value):
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from references(item)

    assert {name.rpartition("/")[2] for name in references(openapi_body())} <= SCHEMAS.keys()
