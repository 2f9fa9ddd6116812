"""A stage for tests of OpenAI's interface: the fake model behind a really bound server, and bare HTTP."""

import http.client
import json

from ganglion.serve.app import ServerThread

WAIT_S = 10.0
TOOL = {
    "type": "function",
    "function": {
        "name": "move_arm",
        "description": "Move an arm.",
        "parameters": {
            "type": "object",
            "properties": {
                "arm": {"type": "string", "enum": ["left", "right"]},
                "height_mm": {"type": "integer", "minimum": 10},
            },
            "required": ["arm", "height_mm"],
            "additionalProperties": False,
        },
    },
}
STOP_TOOL = {"type": "function", "function": {"name": "stop"}}


def post(server: ServerThread, path: str, body, **headers):
    """(status, headers, parsed JSON or bytes). `body` that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, data, {"content-type": "application/json"} | names)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.getheader("content-type", "").startswith("application/json")
    return response.status, response.headers, json.loads(content) if is_json else content


def chat(content="hello", **fields):
    return {"model": "echo", "messages": [{"role": "user", "content": content}]} | fields


def events(data: bytes):
    """The JSON of each event of a stream; "[DONE]" stays text."""
    lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
