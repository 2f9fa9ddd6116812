"""A browser that reads slowly gets the newest and grows no queue; one that asks too much is let go."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message
from starlette.websockets import WebSocket

from ganglion.clock import RealClock
from ganglion.serve.dashboard.feed import MAX_BROWSERS, PICTURE_PERIOD_S, Feed
from ganglion.serve.fake import FakeService
from ganglion.serve.hub import Hub
from tests.side_messages import Ears, hello, telemetry


class Browser:
    """The far end of one feed, whose reading the test starts and stops."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.received: list[Message] = []
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self._sent.put_nowait({"type": "websocket.connect"})

    def open(self, feed: Feed) -> "asyncio.Task[None]":
        scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b""}
        return asyncio.create_task(feed.serve(WebSocket(scope, self._sent.get, self._take)))

    def say(self, text: str) -> None:
        self._sent.put_nowait({"type": "websocket.receive", "text": text})

    def leave(self) -> None:
        self._sent.put_nowait({"type": "websocket.disconnect", "code": 1001})

    def states(self) -> list[dict[str, Any]]:
        texts = [json.loads(message["text"]) for message in self.received if message.get("text")]
        return [text for text in texts if text["kind"] == "state"]

    def views(self) -> list[bytes]:
        return [message["bytes"] for message in self.received if message.get("bytes")]

    async def _take(self, message: Message) -> None:
        await self.reads.wait()
        self.received.append(message)


def feed_of(hub: Hub, service: FakeService) -> Feed:
    return Feed(hub=hub, service=service, policy=service.spec, language=None, clock=RealClock())


def stage(play: Callable[[Hub, Feed], Awaitable[None]]) -> None:
    async def run() -> None:
        with FakeService() as service:
            hub = Hub(RealClock())
            await play(hub, feed_of(hub, service))
            assert hub.num_watchers == 0

    asyncio.run(asyncio.wait_for(run(), 30))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def jpeg(number: int) -> bytes:
    return b"\xff\xd8\xff" + number.to_bytes(2, "big") + b"\xff\xd9"


def test_a_slow_browser_gets_the_newest_only() -> None:
    async def play(hub: Hub, feed: Feed) -> None:
        ears = Ears()
        robot = hub.join(hello(), tell=ears.tell, take_over=ears.take_over)
        browser = Browser()
        end = browser.open(feed)
        await until(lambda: len(browser.states()) > 0)
        assert ears.watches[-1].is_watched
        browser.reads.clear()
        for number in range(8):
            hub.receive(robot, {"jpeg": jpeg(number)})
            hub.receive(robot, telemetry(tick=number))
            await asyncio.sleep(PICTURE_PERIOD_S)
        num_before = len(browser.states())
        browser.reads.set()
        await until(lambda: len(browser.views()) > 0)
        assert browser.views() == [(1).to_bytes(4, "big") + jpeg(7)]
        assert len(browser.states()) <= num_before + 2  # the one it was stuck on, and the newest
        assert browser.states()[-1]["arms"][0]["robot"]["telemetry"]["tick"] == 7
        browser.leave()
        await end
        assert not ears.watches[-1].is_watched

    stage(play)


def test_a_browser_gets_hello_then_states_then_answers() -> None:
    async def play(hub: Hub, feed: Feed) -> None:
        browser = Browser()
        end = browser.open(feed)
        await until(lambda: len(browser.states()) > 1)
        first = json.loads(browser.received[1]["text"])
        assert (first["kind"], first["policy"]["name"]) == ("hello", "fake")
        browser.say('{"id": 5, "clear_prompt": {"session_id": "nobody"}}')
        await until(lambda: any('"answer"' in (m.get("text") or "") for m in browser.received))
        browser.leave()
        await end

    stage(play)


def test_an_order_too_large_ends_the_connection_with_1009() -> None:
    async def play(hub: Hub, feed: Feed) -> None:
        browser = Browser()
        end = browser.open(feed)
        browser.say("x" * 20_000)
        await end
        assert browser.received[-1]["type"] == "websocket.close"
        assert browser.received[-1]["code"] == 1009

    stage(play)


def test_browsers_are_bounded() -> None:
    async def play(hub: Hub, feed: Feed) -> None:
        browsers = [Browser() for _ in range(MAX_BROWSERS)]
        ends = [browser.open(feed) for browser in browsers]
        await until(lambda: hub.num_watchers == MAX_BROWSERS)
        late = Browser()
        await late.open(feed)
        assert late.received[-1]["code"] == 1013
        for browser in browsers:
            browser.leave()
        await asyncio.gather(*ends)

    stage(play)
