"""The dashboard as an operator meets it: headless Chromium against a real server and scripted arms."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install ganglion[dev]")

from playwright.sync_api import Browser, Page, expect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ganglion.clock import RealClock
from ganglion.serve.dashboard.routes import SIDE_PATH
from ganglion.types import OverridePrompt
from ganglion.wire import decode, encode
from tests.e2e.dashboard_camera import CHROMIUM, WHY_ABSENT, chromium
from tests.e2e.dashboard_stage import ScriptedRobot, Stage, session_id
from tests.side_messages import hello, telemetry

needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=WHY_ABSENT)

# Different colours among a canvas's pixels; one for a canvas that is blank.
COUNT_COLOURS = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
PIXELS = "canvas => canvas.toDataURL()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(num_arms=3) as opened:
        yield opened


class Visit:
    """One page, and everything that a console or a foreign request would betray."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1440, "height": 900})
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda said: self._hear(said.type, said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._see(request.url, url))
        self.page.goto(url)

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def _see(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.foreign.append(asked)


@pytest.fixture
def visit(browser: Browser, stage: Stage) -> Iterator[Visit]:
    made = Visit(browser, stage.url)
    expect(made.page.locator(".arm-blank[hidden]")).to_have_count(3, timeout=20_000)
    yield made
    made.page.close()


@needs_chromium
def test_every_arm_is_drawn_without_a_complaint(visit: Visit) -> None:
    page = visit.page
    expect(page.locator(".arm")).to_have_count(3)
    expect(page.locator(".arm-name")).to_have_text(["arm-1", "arm-2", "arm-3"])
    expect(page.locator("#link")).to_have_text("serving")
    expect(page.locator("#policy")).to_contain_text("metaworld-ten")
    for selector in (".arm-view canvas", ".queue", "#pool", "#timeline", "#budget"):
        for canvas in page.locator(selector).all():
            assert canvas.evaluate(COUNT_COLOURS) > 5, selector
    expect(page.locator("#pool-legend")).to_contain_text("kv")
    expect(page.locator("#pool-facts")).to_contain_text("hit rate")
    expect(page.locator("#timeline-facts")).to_contain_text("steps/s")
    expect(page.locator("[data-total=arms]")).to_have_text("3")
    assert visit.complaints == []
    assert visit.foreign == []


@needs_chromium
def test_views_queue_and_timeline_move(visit: Visit) -> None:
    for selector in (".arm-view canvas", ".queue", "#timeline"):
        canvas = visit.page.locator(selector).first
        before = canvas.evaluate(PIXELS)
        visit.page.wait_for_function(
            "([selector, before]) => document.querySelector(selector).toDataURL() !== before",
            arg=[selector, before],
            timeout=10_000,
        )


@needs_chromium
def test_an_edit_reaches_the_service_and_is_acknowledged_and_given_back(
    visit: Visit, stage: Stage
) -> None:
    arm = visit.page.locator(".arm").nth(1)
    text = arm.locator(".order-text")
    expect(text).to_have_value("press the button from above")
    expect(arm.locator(".badge")).to_be_hidden()
    text.fill("close the drawer")
    expect(arm.locator(".order-state")).to_contain_text("Enter applies")
    text.press("Enter")
    expect(arm.locator(".badge")).to_have_text("operator override")
    expect(arm.locator(".order-state")).to_contain_text("followed by the newest chunk")
    assert stage.service.commands == [
        OverridePrompt(session_id=session_id(1), prompt="close the drawer")
    ]
    arm.get_by_role("button", name="Give back").click()
    expect(arm.locator(".badge")).to_be_hidden()
    expect(text).to_have_value("press the button from above")
    assert stage.service.commands[1:] == [OverridePrompt(session_id=session_id(1), prompt=None)]


@needs_chromium
def test_an_edit_is_kept_while_typing_and_dropped_by_escape(visit: Visit, stage: Stage) -> None:
    text = visit.page.locator(".order-text").first
    text.fill("open the dra")
    visit.page.wait_for_timeout(400)  # several states arrive meanwhile
    expect(text).to_have_value("open the dra")
    text.press("Escape")
    expect(text).to_have_value("open the drawer")
    assert stage.service.commands == []


@needs_chromium
def test_a_refused_edit_says_why(visit: Visit, stage: Stage) -> None:
    arm = visit.page.locator(".arm").first
    arm.locator(".order-text").fill("x" * 3000)
    arm.locator(".order-text").press("Enter")
    expect(arm.locator(".order-state")).to_contain_text("at most 2048 bytes")
    assert stage.service.commands == []


@needs_chromium
def test_markup_from_a_robot_is_text(browser: Browser) -> None:
    with Stage(num_arms=0, num_sessions=0) as stage:
        url = f"ws://127.0.0.1:{stage.port}{SIDE_PATH}"
        visit = Visit(browser, stage.url)
        expect(visit.page.locator("#no-arms")).to_be_visible()
        with connect(url, compression=None) as socket:
            evil = "<img src=x onerror=alert(1)>"
            socket.send(encode(hello(robot_id=evil, task=evil, prompt=evil)))
            expect(visit.page.locator(".arm-name")).to_have_text(evil)
            assert visit.page.locator(".arm img").count() == 0
        expect(visit.page.locator(".arm")).to_have_count(0)
        assert visit.complaints == []
        visit.page.close()


@needs_chromium
def test_the_page_survives_the_server(visit: Visit, stage: Stage) -> None:
    page = visit.page
    stage.close_server()
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator("#link")).to_have_text("disconnected")
    stage.open_server()
    expect(page.locator("#notice")).to_be_hidden(timeout=20_000)
    expect(page.locator("#link")).to_have_text("serving")
    expect(page.locator(".arm-blank[hidden]")).to_have_count(3, timeout=20_000)


@needs_chromium
def test_robots_come_and_go(visit: Visit, stage: Stage) -> None:
    stage.robots[2].close()
    expect(visit.page.locator(".arm").nth(2)).to_contain_text("this robot sends no views")
    stage.service.drop_session(2)
    expect(visit.page.locator(".arm")).to_have_count(2)
    stage.robots.append(ScriptedRobot(2, stage.port, stage.service))
    expect(visit.page.locator(".arm")).to_have_count(3)
    expect(visit.page.locator(".order-state").nth(2)).to_contain_text("first observation")


@needs_chromium
def test_robots_render_only_while_somebody_looks(browser: Browser, stage: Stage) -> None:
    robot = stage.robots[0]
    assert (robot.is_watched, robot.num_views) == (False, 0)
    visit = Visit(browser, stage.url)
    expect(visit.page.locator(".arm-blank[hidden]")).to_have_count(3, timeout=20_000)
    assert robot.is_watched
    visit.page.close()
    clock, pause = RealClock(), threading.Event()
    limit_s = clock.now_s() + 10
    while robot.is_watched and clock.now_s() < limit_s:
        pause.wait(0.05)
    assert not robot.is_watched


@needs_chromium
def test_hovering_explains_pages_and_steps(visit: Visit) -> None:
    page = visit.page
    box = page.locator("#pool").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 16, box["y"] + 16)
    expect(page.locator("#tip")).to_contain_text("kv page")
    expect(page.locator("#tip")).to_contain_text("shared")
    box = page.locator("#budget").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 4, box["y"] + 20)
    expect(page.locator("#tip")).to_contain_text("budget")


def test_the_page_forbids_everything_foreign(stage: Stage) -> None:
    with urllib.request.urlopen(stage.url, timeout=10) as reply:
        policy = reply.headers["Content-Security-Policy"]
        tag = reply.headers["ETag"]
        assert b'<script type="module" src="/dashboard/app.js">' in reply.read()
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    again = urllib.request.Request(stage.url, headers={"If-None-Match": tag})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(again, timeout=10)
    assert caught.value.code == 304
    caught.value.close()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("text", 1003),
        (b"\xc1", 1002),
        (encode({"hello": {"robot_id": ""}}), 1008),
        (bytes(400_000), 1009),
    ],
)
def test_a_robot_that_says_nonsense_is_closed_with_the_right_code(
    stage: Stage, message: str | bytes, code: int
) -> None:
    with connect(f"ws://127.0.0.1:{stage.port}{SIDE_PATH}", compression=None) as socket:
        socket.send(message)
        with pytest.raises(ConnectionClosed) as caught:
            list(socket)  # reads until the server closes
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == code


def test_a_bad_message_after_the_hello_is_answered_and_the_connection_lives(stage: Stage) -> None:
    with connect(f"ws://127.0.0.1:{stage.port}{SIDE_PATH}", compression=None) as socket:
        socket.send(encode(hello(robot_id="late", session_id="late")))
        assert decode(socket.recv(timeout=10, decode=False)) == {
            "watch": False,
            "max_view_hz": 10.0,
        }
        socket.send(encode(telemetry(tick=-1)))
        error = decode(socket.recv(timeout=10, decode=False))["error"]
        assert error["code"] == "invalid_field"
        assert "telemetry.tick" in error["message"]
        socket.send(encode(telemetry()))
        socket.send(encode(telemetry(rate_hz="fast")))
        error = decode(socket.recv(timeout=10, decode=False))["error"]
        assert "telemetry.rate_hz" in error["message"]


def test_a_newer_connection_of_a_robot_takes_over(stage: Stage) -> None:
    url = f"ws://127.0.0.1:{stage.port}{SIDE_PATH}"
    with connect(url, compression=None) as old, connect(url, compression=None) as new:
        for socket in (old, new):
            socket.send(encode(hello(robot_id="twice", session_id="twice")))
            assert "watch" in decode(socket.recv(timeout=10, decode=False))
        with pytest.raises(ConnectionClosed) as caught:
            old.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008
