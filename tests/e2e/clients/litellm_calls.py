"""litellm, as proxies and agents use it: `litellm_calls.py URL MODEL`."""

import asyncio
import json
import sys

import litellm
import openai

TOOL = {
    "type": "function",
    "function": {
        "name": "move_arm",
        "parameters": {
            "type": "object",
            "properties": {"arm": {"type": "string", "enum": ["left", "right"]}},
            "required": ["arm"],
            "additionalProperties": False,
        },
    },
}
USER = [{"role": "user", "content": "lift the left arm"}]


def error_of(call, **fields) -> str:
    """The class that litellm makes of a refusal."""
    try:
        call(**fields)
    except openai.APIError as error:  # what all of litellm's errors are
        return type(error).__name__
    return "none"


def main() -> None:
    """Each kind of call once."""
    url, name = sys.argv[1:]
    common = {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0, "timeout": 30}
    ask = {"model": f"openai/{name}", "messages": USER, "seed": 1} | common
    whole = litellm.completion(**ask, max_tokens=8)
    chunks = list(
        litellm.completion(**ask, max_tokens=8, stream=True, stream_options={"include_usage": True})
    )
    called = litellm.completion(
        **ask, max_tokens=400, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    formed = litellm.completion(
        **ask,
        max_tokens=200,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "flag",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"ok": {"type": "boolean"}},
                    "required": ["ok"],
                    "additionalProperties": False,
                },
            },
        },
    )
    text = {"model": f"text-completion-openai/{name}", "prompt": "def main():"} | common
    embedded = litellm.embedding(model=f"openai/{name}", input=["an arm", "a door"], **common)
    told = {
        "vectors": [row["embedding"] for row in embedded.data],
        "num_tokens": whole.usage.completion_tokens,
        "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "content": whole.choices[0].message.content,
        "num_async": asyncio.run(litellm.acompletion(**ask, max_tokens=3)).usage.completion_tokens,
        "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
        "flag": json.loads(formed.choices[0].message.content),
        "text_tokens": litellm.text_completion(**text, max_tokens=4).usage.completion_tokens,
        "too_long": error_of(litellm.completion, **(ask | {"messages": [{"role": "user", "content": "x" * 2_000}]})),
        "unknown": error_of(litellm.completion, **(ask | {"model": "openai/gpt-7"})),
        "wrong": error_of(litellm.completion, **ask, temperature=3),
    }  # fmt: skip
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
