"""langchain's ChatOpenAI, as an agent uses it: `langchain_calls.py URL MODEL`. The model is random; grammars make it write calls."""

import asyncio
import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


@tool
def move_arm(arm: Literal["left", "right"], height_mm: Literal[10, 20]) -> str:
    """Move an arm."""
    return f"{arm} arm at {height_mm} mm"


class Plan(BaseModel):
    """What to do next."""

    target: Literal["door", "drawer"]
    is_safe: bool = Field(description="nobody is near")


async def stream(model: ChatOpenAI) -> int:
    """Pieces of an answer that is read asynchronously."""
    return len([piece async for piece in model.astream("hello", max_tokens=8)])


def main() -> None:
    """Each kind of call once."""
    url, name = sys.argv[1:]
    model = ChatOpenAI(
        model=name, base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30, seed=1, max_tokens=400
    )  # fmt: skip
    messages = [SystemMessage("You move arms."), HumanMessage("lift the left arm")]
    caller = model.bind_tools([move_arm], tool_choice="any", parallel_tool_calls=False)
    asked = caller.invoke(messages)
    call = asked.tool_calls[0]
    done = ToolMessage(move_arm.invoke(call["args"]), tool_call_id=call["id"])
    after = model.bind_tools([move_arm]).invoke([*messages, asked, done], max_tokens=8)
    pieces = list(caller.stream(messages))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    plan = model.with_structured_output(Plan, method="json_schema").invoke(messages)
    called_plan = model.with_structured_output(Plan, method="function_calling").invoke(messages)
    responses = ChatOpenAI(
        model=name, base_url=f"{url}/v1", api_key="none", max_retries=0, use_responses_api=True, max_tokens=8
    )  # fmt: skip
    logged = model.bind(logprobs=True, top_logprobs=2, max_tokens=4).invoke("hello")
    text = OpenAI(model=name, base_url=f"{url}/v1", api_key="none", max_tokens=4, temperature=0)
    # Else it would send ids of OpenAI's own tokenizer.
    embedder = OpenAIEmbeddings(
        model=name, base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    told = {
        "vectors": embedder.embed_documents(["an arm", "a door", "an arm"]),
        "call": call["args"],
        "streamed_call": whole.tool_calls[0]["args"],
        "num_pieces": len(pieces),
        "after_tokens": after.usage_metadata["output_tokens"],
        "plan": plan.model_dump(),
        "called_plan": called_plan.model_dump(),
        "response_tokens": responses.invoke("hello").usage_metadata["output_tokens"],
        "num_response_pieces": len(list(responses.stream("hello"))),
        "num_logprobs": len(logged.response_metadata["logprobs"]["content"]),
        "num_batch": len(model.batch(["a", "b", "c"], max_tokens=2)),
        "num_async_pieces": asyncio.run(stream(model)),
        "text": text.invoke("def main():"),
    }
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
