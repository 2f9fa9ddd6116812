"""`ganglion serve chat=`: the command, the real openai client, robots beside it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from ganglion.client import Client
from tests.e2e.command import Running, ganglion
from tests.language_folder import continuation, write_llama

PROMPT = "def main():\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Running]:
    line = ("serve", f"chat={folder}", "--port", "0", "--dtype", "float32")
    with Running(*line, "--arena-bytes", "64 MiB", until="Ctrl-C stops") as server:
        yield server


@pytest.fixture
def client(alone: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=alone.find(r"OpenAI +(\S+)"), api_key="none", max_retries=0) as it:
        yield it


def test_the_openai_client_streams_what_transformers_says(
    client: openai.OpenAI, folder: Path
) -> None:
    expected = bytes(t for t in continuation(folder, PROMPT, 24) if t < 256).decode(
        errors="replace"
    )
    stream = client.completions.create(
        model="tiny-llama",
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == expected
    assert len(chunks) > 4
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 24)


def test_a_chat_with_two_choices_and_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": "hello"}],
        n=2,
        max_tokens=40,
        temperature=0.7,
        seed=3,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "flag",
                "schema": {
                    "type": "object",
                    "properties": {"is_on": {"type": "boolean"}},
                    "required": ["is_on"],
                    "additionalProperties": False,
                },
            },
        },
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.finish_reason in ("stop", "length")
        assert (choice.message.content or "").lstrip().startswith("{")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user: hello\n\nassistant:")


def test_a_stop_string_ends_a_choice_and_is_not_shown(client: openai.OpenAI, folder: Path) -> None:
    text = bytes(t for t in continuation(folder, PROMPT, 32) if t < 256).decode(errors="replace")
    stop = next(
        part for part in (text[i : i + 2] for i in range(4, len(text))) if "\ufffd" not in part
    )
    answer = client.completions.create(
        model="tiny-llama",
        prompt=PROMPT,
        max_tokens=32,
        temperature=0,
        stop=[stop],
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 32


def test_prefixes_are_shared_and_wrong_requests_are_named(client: openai.OpenAI) -> None:
    ask = lambda: client.completions.create(  # noqa: E731
        model="tiny-llama", prompt="x" * 400, max_tokens=1, temperature=0
    )
    ask()
    usage = ask().usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > 300
    with pytest.raises(openai.NotFoundError, match="tiny-llama"):
        client.completions.create(model="gpt-7", prompt="x")
    with pytest.raises(openai.BadRequestError, match="1024 tokens"):
        client.completions.create(model="tiny-llama", prompt="x" * 2000)
    assert [model.id for model in client.models.list()] == ["tiny-llama"]


def test_robots_and_chat_in_one_server(folder: Path) -> None:
    line = ("serve", "policy=examples/my_policy.py:MyPolicy", f"chat={folder}", "--port", "0")
    with Running(*line, "--arena-bytes", "64 MiB", until="Ctrl-C stops") as server:
        url = server.find(r"OpenAI +(\S+)")
        with (
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as chat,
            Client(server.find(r"robots +(ws\S+)"), robot_id="r") as robot,
        ):
            stream = chat.completions.create(
                model="tiny-llama",
                prompt="x" * 500,
                max_tokens=200,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            observation = {
                "observation.images.corner": np.zeros((80, 80, 3), np.uint8),
                "observation.state": np.zeros(4, np.float32),
            }
            num_chunks = 0
            for num_tokens, _ in enumerate(stream):
                if num_tokens % 20 == 0:
                    result = robot.infer(observation, prompt="stay")
                    assert result.is_deadline_met
                    num_chunks += 1
            assert num_chunks >= 5
            assert {model.id for model in chat.models.list()} >= {"tiny-llama"}


def test_nothing_to_serve_is_said() -> None:
    ended = ganglion("serve", "policy=", timeout_s=60)
    assert ended.returncode == 1
    assert "nothing to serve" in ended.stderr
    ended = ganglion("serve", "chat=no-such-model", timeout_s=60)
    assert ended.returncode == 1
    assert "no-such-model" in ended.stderr
