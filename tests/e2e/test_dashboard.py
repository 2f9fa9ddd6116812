"""The dashboard as an operator meets it: headless Chromium against a real server and scripted arms."""

import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install ganglion[dev]")

from playwright.sync_api import Browser, expect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ganglion.clock import RealClock
from ganglion.serve.dashboard.routes import SIDE_PATH
from ganglion.types import OverridePrompt
from ganglion.wire import decode, encode
from tests.e2e.dashboard_camera import CHROMIUM, WHY_ABSENT, chromium
from tests.e2e.dashboard_stage import REASON, ScriptedRobot, Stage, session_id
from tests.e2e.dashboard_visit import COUNT_COLOURS, OVERFLOWS, PIXELS, Visit
from tests.side_messages import hello, telemetry

needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=WHY_ABSENT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(num_arms=3) as opened:
        yield opened


@pytest.fixture
def visit(browser: Browser, stage: Stage) -> Iterator[Visit]:
    made = Visit(browser, stage.url)
    expect(made.page.locator(".arm-blank[hidden]")).to_have_count(3, timeout=20_000)
    yield made
    made.page.close()


def await_impair(robot: ScriptedRobot, wish: dict[str, Any]) -> None:
    clock, pause = RealClock(), threading.Event()
    limit_s = clock.now_s() + 10
    while robot.impairs[-1:] != [wish] and clock.now_s() < limit_s:
        pause.wait(0.05)
    assert robot.impairs[-1] == wish


@needs_chromium
def test_every_arm_is_drawn_without_a_complaint(visit: Visit) -> None:
    page = visit.page
    expect(page.locator(".arm")).to_have_count(3)
    expect(page.locator(".arm-name")).to_have_text(["arm-1", "arm-2", "arm-3"])
    expect(page.locator("#link")).to_have_text("serving")
    expect(page.locator("#policy")).to_contain_text("metaworld-ten")
    for selector in (".arm-view canvas", ".queue", ".lanes", "#pool", "#timeline", "#budget"):
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
    for selector in (".arm-view canvas", ".queue", ".lanes", "#timeline"):
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
    page.locator("#pool").hover(position={"x": 16, "y": 16})
    expect(page.locator("#tip")).to_contain_text("kv page")
    expect(page.locator("#tip")).to_contain_text("shared")
    box = page.locator("#budget").bounding_box()
    assert box is not None
    page.locator("#budget").hover(position={"x": box["width"] - 4, "y": 20})
    expect(page.locator("#tip")).to_contain_text("budget")


@needs_chromium
def test_the_degree_and_its_reason_are_shown(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#pace [data-part=degree]")).to_have_text("4")
    expect(page.locator("#pace [data-part=why]")).to_have_text(REASON)
    for chart in ("rate", "latency"):
        bars = page.locator(f"#pace [data-part={chart}] li")
        expect(bars).to_have_count(6)
        expect(page.locator(f"#pace [data-part={chart}] .is-chosen small")).to_have_text("4")
        expect(page.locator(f"#pace [data-part={chart}] .is-barred small")).to_have_text("6")
        high = [bar.evaluate("each => each.querySelector('i').clientHeight") for bar in bars.all()]
        assert high == sorted(high)
        assert high[0] < high[-1]
    expect(page.locator("#pace [data-part=facts]")).to_contain_text("10 flow steps, two views")


@needs_chromium
def test_chunks_of_one_arm_overlap_and_say_what_they_read(visit: Visit) -> None:
    page = visit.page
    arm = page.locator(".arm").nth(1)
    expect(arm.locator(".chip")).to_have_text("prefix")
    expect(arm.locator(".arm-lanes .queue-caption")).to_contain_text(re.compile(r"[34] of 4"))
    expect(arm.locator(".arm-lanes .queue-caption")).to_contain_text(re.compile(r"context v\d+"))
    lanes = arm.locator(".lanes")
    box = lanes.bounding_box()
    assert box is not None
    tip = page.locator("#tip")
    requests = set()
    for row in range(4):  # chunks that are drawn above each other
        for x in range(4, int(box["width"]), 9):
            lanes.hover(position={"x": x, "y": box["height"] * (row + 0.5) / 4})
            if tip.is_visible():
                requests.add(tip.locator("h3").inner_text())
                break
    assert len(requests) == 4
    assert all(each.startswith("Chunk ") and each.endswith("arm-2") for each in requests)
    expect(tip).to_contain_text("context versions read")
    expect(tip).to_contain_text("\u2192")  # it went over to a newer one


@needs_chromium
def test_sliders_disturb_and_mend_the_link_of_one_arm(visit: Visit, stage: Stage) -> None:
    arm, robot = visit.page.locator(".arm").first, stage.robots[0]
    arm.get_by_label("Delay").fill("250")
    arm.get_by_label("Loss").fill("20")
    expect(arm.locator(".arm-link")).to_contain_text("Link \u00b7 disturbed")
    expect(arm.locator(".arm-link output")).to_have_text(["250 ms", "+0 ms", "20%"])
    wish = {"type": "impair", "delay_ms": 250.0, "jitter_ms": 0.0, "loss": 0.2}
    await_impair(robot, wish)
    arm.get_by_role("button", name="Mend").click()
    await_impair(robot, {"type": "impair", "delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0})
    expect(arm.get_by_label("Delay")).to_have_value("0")
    expect(arm.get_by_role("button", name="Mend")).to_be_hidden()
    assert stage.robots[1].impairs == []
    assert visit.complaints == []


@needs_chromium
def test_every_browser_sees_a_disturbed_link(browser: Browser, visit: Visit, stage: Stage) -> None:
    visit.page.locator(".arm").first.get_by_label("Jitter").fill("80")
    other = Visit(browser, stage.url)
    expect(other.page.locator(".arm").first.locator("output").nth(1)).to_have_text("+80 ms")
    other.page.close()


@needs_chromium
def test_the_link_of_an_arm_that_cannot_stays_as_it_is(visit: Visit) -> None:
    link = visit.page.locator(".arm").nth(2).locator(".arm-link")
    expect(link).to_contain_text("fixed")
    for slider in link.locator("input").all():
        expect(slider).to_be_disabled()


@needs_chromium
@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("num_arms", [4, 16])
def test_nothing_runs_over_its_edge(
    browser: Browser, num_arms: int, theme: Literal["dark", "light"]
) -> None:
    with Stage(num_arms=num_arms) as stage:
        page = browser.new_page(color_scheme=theme)
        page.goto(stage.url)
        expect(page.locator(".arm")).to_have_count(num_arms)
        for width, height in ((1920, 1080), (1440, 900), (1024, 768), (390, 844)):
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(250)
            assert page.evaluate(OVERFLOWS) == [], (width, height)
        page.close()


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
