"""Schemathesis against our own document, with the real engine behind it: what it allows is served, what it forbids refused.

Each case goes over a real socket. No answer may be a 5xx or of a form that the document does not tell, and at the end no
request is under way and no page is held.
"""

import collections
import os

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.e2e.language_stage import NAME, language_stage
from tests.language_folder import VOCAB_SIZE

NUM_QUICK, NUM_SLOW = 24, 450  # cases of one mode of one operation
ANSWER_S = 30.0
MAX_TOKENS = 64
POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
MODES = {"allowed": GenerationMode.POSITIVE, "forbidden": GenerationMode.NEGATIVE}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Rules between two values, of the model or of a grammar, which a schema does not tell: such a case may be refused, but
# for one of these.
BETWEEN = ("tools", "tool_choice", "response_format", "structured_outputs", "text", "n", "prompt", "grammar")  # fmt: skip
CODES = ("context_length_exceeded", "unsupported_parameter", "invalid_value")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    with language_stage(tmp_path_factory.mktemp("models"), max_tokens=MAX_TOKENS) as it:
        yield it


@pytest.fixture(scope="module")
def checks():
    load_all_checks()
    names = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    )
    return CHECKS.get_by_names(names)


def fit(body):
    """The same request for the model that is there: what a schema cannot say of two fields at once is made so."""
    body = body | ({"model": NAME} if body.get("model") is not None else {})
    for name in LENGTHS:
        if body.get(name):
            body[name] = int(body[name]) % 8 + 1
    if body.get("min_tokens"):
        body["min_tokens"] = 1
        body = dict.fromkeys(LENGTHS, 4) | body
    if body.get("top_k"):
        body["top_k"] = min(int(body["top_k"]), VOCAB_SIZE)
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("top_logprobs") is not None and "messages" in body:
        body["logprobs"] = True
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(int(t) % VOCAB_SIZE): v for t, v in body["logit_bias"].items()}
    for item in [*rows(body, "messages"), *rows(body, "input")]:
        for name in ("content", "output"):  # the model sees nothing
            if isinstance(item.get(name), list):
                item[name] = [part for part in item[name] if "image_url" not in part]
        for call in [item, *(each.get("function", {}) for each in rows(item, "tool_calls"))]:
            if "arguments" in call:
                call["arguments"] = "{}"
    if body.get("dimensions"):
        body["dimensions"] = 1
    for name in ("prompt", "input", "tokens", "stop_token_ids"):
        if isinstance(body.get(name), list):
            body[name] = [tokens(item) for item in body[name]]
    return body


def rows(value, name):
    found = value.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def tokens(value):
    if isinstance(value, list):
        return [tokens(item) for item in value]
    return int(value) % VOCAB_SIZE if isinstance(value, int | float) else value


def run(stage, checks, path, mode, num_cases):
    """Statuses of so many cases."""
    operation = schemathesis.openapi.from_url(stage.url + "/openapi.json")[path]["post"]
    statuses = collections.Counter()

    @seed(7)
    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def try_case(case):
        is_allowed = mode is GenerationMode.POSITIVE
        if is_allowed:
            case.body = fit(case.body)
        answer = case.call(session=session, timeout=ANSWER_S)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=checks)
        if is_allowed and answer.status_code != 200:
            error = answer.json()["error"]
            assert error["code"] in CODES, error
            is_long = error["code"] == "context_length_exceeded"
            assert is_long or error["param"].partition(".")[0].partition("[")[0] in BETWEEN, error

    with requests.Session() as session:
        session.trust_env = False
        try_case()
    return statuses


def check(stage, checks, path, mode, num_cases):
    statuses = run(stage, checks, path, MODES[mode], num_cases)
    if "GANGLION_SHOW" in os.environ:
        print(path, mode, dict(statuses))  # noqa: T201
    assert sum(statuses.values()) >= num_cases
    if mode == "allowed":
        assert statuses[200] > 0.25 * num_cases, statuses
    stage.wait_for_rest()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", POSTS)
def test_a_few_hundred_cases(stage, checks, path, mode):
    check(stage, checks, path, mode, NUM_QUICK)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", POSTS)
def test_five_thousand_cases(stage, checks, path, mode):
    check(stage, checks, path, mode, int(os.environ.get("GANGLION_SCHEMA_CASES", NUM_SLOW)))
