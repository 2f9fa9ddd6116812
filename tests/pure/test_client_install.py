"""The base install is the client: importing it must not need what only a server has."""

import json
import subprocess
import sys

SERVER_ONLY = (
    "torch",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "safetensors",
    "ganglion.serve",
)


def test_the_client_imports_nothing_of_the_server():
    code = "import json, sys, ganglion.client; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "ganglion.wire" in loaded
    assert not loaded & set(SERVER_ONLY)
