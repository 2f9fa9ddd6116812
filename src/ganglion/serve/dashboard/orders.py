"""Orders: what an operator asks for on the page, checked, carried out and answered.

Called by `dashboard.feed` for each text message of a browser. Knows the Service seam and the hub only.

Page -> server, JSON: {"id": int, "set_prompt": {"session_id": str, "prompt": str}}
                   or {"id": int, "clear_prompt": {"session_id": str}}
                   or {"id": int, "impair": {"session_id": str, "delay_ms": float, "jitter_ms": float, "loss": float}}
Server -> page:       {"kind": "answer", "id": int, "error": null | {"code", "message", "next_step"}}
"""

import json
import logging
from typing import Any

from ganglion.errors import FieldError, GanglionError
from ganglion.serve.hub import Hub
from ganglion.serve.side import parse_impair
from ganglion.service import Service
from ganglion.spec import PolicySpec
from ganglion.types import OverridePrompt, SessionId
from ganglion.units import KIB

logger = logging.getLogger(__name__)

MAX_ORDER_BYTES = 16 * KIB


def obey(text: str, service: Service, hub: Hub, policy: PolicySpec | None) -> str:
    """Carry out one order; the answer to send. Never raises for what the page may have got wrong.

    `policy`: None where there is none, and so no robots to order anything.
    """
    order_id: int | None = None
    try:
        order = _parse(text)
        order_id = order["id"]
        if policy is None:
            raise FieldError(
                "order",
                expected="none: this server has no robots",
                got=f"keys {sorted(map(str, order))}"[:120],
                next_step="serve a policy too: ganglion serve policy=NAME",
            )
        match order:
            case {"impair": {"session_id": str(session_id), **body}}:
                impair = parse_impair(body)
                hub.impair(SessionId(session_id), impair)
                logger.info("operator: link of session %s is now %s", session_id, impair)
            case _:
                command = _command(order, max_prompt_bytes=policy.max_prompt_bytes)
                service.control(command)
                logger.info(
                    "operator: session %s now follows %r", command.session_id, command.prompt
                )
    except GanglionError as error:
        return _answer(order_id, error_body(error))
    return _answer(order_id, None)


def error_body(error: GanglionError) -> dict[str, str]:
    """An error as browsers and robots are told it."""
    return {"code": error.code, "message": str(error), "next_step": error.advice}


def _parse(text: str) -> dict[str, Any]:
    try:
        order = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError("order", expected="JSON", got=f"{len(text)} other characters") from error
    if not isinstance(order, dict) or type(order.get("id")) is not int:
        raise FieldError("order.id", expected="an integer", got="something else")
    return order


def _command(order: dict[str, Any], *, max_prompt_bytes: int) -> OverridePrompt:
    match order:
        case {"set_prompt": {"session_id": str(session_id), "prompt": str(prompt)}}:
            return OverridePrompt(
                session_id=SessionId(session_id), prompt=_prompt(prompt, max_prompt_bytes)
            )
        case {"clear_prompt": {"session_id": str(session_id)}}:
            return OverridePrompt(session_id=SessionId(session_id), prompt=None)
    raise FieldError(
        "order",
        expected="set_prompt {session_id, prompt}, clear_prompt {session_id} "
        "or impair {session_id, delay_ms, jitter_ms, loss}",
        got=f"keys {sorted(map(str, order))}"[:120],
    )


def _prompt(text: str, max_bytes: int) -> str:
    prompt = text.strip()
    if not prompt:
        raise FieldError(
            "prompt", expected="an instruction", got="nothing", next_step="give it back instead"
        )
    num_bytes = len(prompt.encode("utf-8", "surrogatepass"))
    if num_bytes > max_bytes:
        raise FieldError("prompt", expected=f"at most {max_bytes} bytes", got=f"{num_bytes} bytes")
    if not prompt.isprintable():
        raise FieldError("prompt", expected="printable text", got="control characters")
    return prompt


def _answer(order_id: int | None, error: dict[str, str] | None) -> str:
    return json.dumps({"kind": "answer", "id": order_id, "error": error})
