"""`with ganglion.Engine(...) as engine:`: answers, vectors and actions in this process, and the memory back after it."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import ganglion
from ganglion.cli.notebook import Engine
from ganglion.errors import ConfigError, FieldError, GanglionError
from tests.language_folder import continuation, write_llama

PROMPT = "def f(x):\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_texts_messages_vectors_and_streams(folder: Path) -> None:
    ids = continuation(folder, PROMPT, 16)
    expected = bytes(token for token in ids if token < 256).decode(errors="replace")
    options = {"max_tokens": 16, "temperature": 0.0, "is_eos_ignored": True}
    with Engine(chat=str(folder), memory="64MiB", dtype="float32") as engine:
        assert engine.complete(PROMPT, **options) == expected
        assert "".join(engine.stream(PROMPT, **options)) == expected
        assert asyncio.run(engine.complete_async(PROMPT, **options)) == expected
        says = engine.chat("hello", **options)
        assert says == engine.chat([{"role": "user", "content": "hello"}], **options)
        assert says == asyncio.run(engine.chat_async("hello", **options))
        vectors = engine.embed(["one", "two", "one"])
        assert vectors.shape == (3, 64)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
        np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
        early = engine.stream(PROMPT, **(options | {"max_tokens": 900}))
        next(early)
        early.close()  # the rest is cancelled
        with pytest.raises(FieldError, match="one of tiny-llama"):
            engine.complete(PROMPT, model="other")
        with pytest.raises(FieldError, match="role"):
            engine.chat([{"role": "user", "text": "x"}])
        with pytest.raises(AssertionError):
            engine.act({}, np.zeros(1, np.float32), "x")
    with pytest.raises(GanglionError, match="does not run"):
        engine.complete(PROMPT)


def test_actions_of_a_policy() -> None:
    with Engine(policy="metaworld-ten") as engine:
        spec = engine.policy
        images = {v.key: np.zeros((v.height, v.width, 3), np.uint8) for v in spec.views}
        state = np.zeros(spec.state_dim, np.float32)
        chunk = engine.act(images, state, "open the drawer")
        assert chunk.actions.shape == (spec.horizon, spec.action_dim)
        again = asyncio.run(engine.act_async(images, state, "open the drawer"))
        assert again.actions.shape == chunk.actions.shape
        engine.reset()
        with pytest.raises(FieldError, match="state"):
            engine.act(images, state[:1], "x")
        with pytest.raises(FieldError, match="images"):
            engine.act({}, state, "x")
        with pytest.raises(FieldError, match="none in this engine"):
            engine.complete("x")


def test_what_cannot_be_made_is_said() -> None:
    with pytest.raises(FieldError, match="a policy, a chat or both"):
        Engine()
    with pytest.raises(ConfigError, match="memory.budget_bytes"):  # noqa: RUF043
        Engine(chat="tiny-moe", memory="lots")
    with pytest.raises(ConfigError, match="no-such-model"), Engine(chat="no-such-model"):
        pass


MEMORY = """
import sys, threading, ganglion
assert "torch" not in sys.modules, "import ganglion is light"

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def use():
    with ganglion.Engine(chat=sys.argv[1], memory="900MiB") as engine:
        engine.complete("def f(x):" * 50, max_tokens=8, temperature=0.0)
        return rss()

use()  # what is imported and made once stays
before = rss()
for _ in range(2):
    during = use()
after = rss()
print(before, during, after, threading.active_count())
"""


@pytest.mark.slow
def test_memory_is_back_after_each_of_several_engines(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "larger", width=768, num_layers=8)
    weight_bytes = (folder / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)],
        check=True, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    before, during, after, num_threads = map(int, done.stdout.split())
    assert during - before > 0.3 * weight_bytes
    # torch's threads leave some 15 MB behind each time, whatever the model's size
    assert after - before < 0.4 * weight_bytes
    assert num_threads == 1


def test_the_package_says_what_it_has_not() -> None:
    assert ganglion.Engine is Engine  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = ganglion.Motor  # type: ignore[attr-defined]
    assert threading.active_count() >= 1
