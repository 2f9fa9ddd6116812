"""Planners on the dashboard: headless Chromium against a real server with scripted language models, with and without robots."""

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install ganglion[dev]")

from playwright.sync_api import Browser, expect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from ganglion.errors import OverloadedError
from ganglion.serve.dashboard.routes import SIDE_PATH
from ganglion.serve.fake_language import FakeLanguageService
from tests.e2e.dashboard_camera import CHROMIUM, WHY_ABSENT, chromium
from tests.e2e.dashboard_planners import LAYOUT, MODEL
from tests.e2e.dashboard_stage import Stage
from tests.e2e.dashboard_visit import COUNT_COLOURS, OVERFLOWS, PIXELS, Visit

needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=WHY_ABSENT)
SIZES = ((1920, 1080), (1440, 900), (1024, 768), (390, 844))

# How far each request's prompt is computed, cached part left out, by the request's name.
SHARES = """() => Object.fromEntries([...document.querySelectorAll(".request")].map((row) =>
  [row.querySelector("b").textContent, Number(row.querySelector(".is-computed").style.getPropertyValue("--share"))]))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def both() -> Iterator[Stage]:
    with Stage(num_arms=2, has_planners=True) as opened:
        yield opened


@pytest.fixture
def alone() -> Iterator[Stage]:
    with Stage(num_arms=0, has_planners=True) as opened:
        yield opened


def language_of(stage: Stage) -> FakeLanguageService:
    assert stage.language is not None
    return stage.language


@needs_chromium
def test_planners_are_shown_beside_robots(browser: Browser, both: Stage) -> None:
    visit = Visit(browser, both.url)
    page = visit.page
    expect(page.locator(".arm-blank[hidden]")).to_have_count(2, timeout=20_000)
    planners = page.locator("#planners")
    expect(planners.locator(".request[data-phase=waiting]")).to_have_count(1)
    expect(planners.locator(".request[data-phase=prefill]").first).to_contain_text(MODEL)
    expect(planners.locator(".request[data-phase=decode]").first).to_contain_text("tok/s")
    expect(planners.locator(".request").filter(has_text="cached").first).to_be_visible()
    expect(planners.locator("[data-part=facts]")).to_contain_text("first token")
    expect(planners.locator(".model")).to_have_text([MODEL])
    expect(page.locator("[data-total=tokens]")).to_have_text(re.compile(r"\d"))
    expect(page.locator("[data-total=requests]")).to_be_hidden()
    expect(page.locator("[data-total=arms]")).to_have_text("2")
    expect(page.locator("#timeline-legend")).to_contain_text("planners: answers")
    expect(page.locator("#timeline-facts")).to_contain_text("planners")
    expect(page.locator("#pool-legend")).to_contain_text(LAYOUT)
    split = page.locator("#split")
    before = split.evaluate(PIXELS)
    page.wait_for_function(
        "before => document.querySelector('#split').toDataURL() !== before", arg=before
    )
    assert split.evaluate(COUNT_COLOURS) > 5
    split.hover()
    expect(page.locator("#tip")).to_contain_text("robots")
    assert visit.complaints == []
    assert visit.foreign == []
    page.close()


@needs_chromium
def test_a_bar_follows_the_prompt_and_a_request_that_ended_stays_a_moment(
    browser: Browser, both: Stage
) -> None:
    page = Visit(browser, both.url).page
    expect(page.locator(".request[data-phase=prefill]").first).to_be_visible()
    before = page.evaluate(f"({SHARES})()")
    assert before
    page.wait_for_function(
        f"before => {{ const now = ({SHARES})(); return Object.keys(now).some((name) => now[name] > before[name]); }}",
        arg=before,
        timeout=10_000,
    )
    expect(page.locator(".request[data-phase=ended]").first).to_be_visible(timeout=15_000)
    page.close()


@needs_chromium
def test_a_visitor_chats_and_the_conversation_goes_on(browser: Browser, alone: Stage) -> None:
    language, visit = language_of(alone), Visit(browser, alone.url)
    chat = visit.page.locator("#chat")
    text, log = chat.get_by_label("Message"), chat.locator(".chat-log li")
    language.say("<b>Hello</b> there")
    text.fill("hi, who are you?")
    text.press("Enter")
    expect(log).to_have_text(["hi, who are you?", "<b>Hello</b> there"])
    expect(chat.locator(".chat-note")).to_contain_text(re.compile(r"first token .* \d+ out"))
    expect(chat.get_by_role("button", name="Send")).to_be_visible()
    text.fill("and now?")
    chat.get_by_role("button", name="Send").click()
    expect(log).to_have_count(4)
    expect(log.nth(3)).to_have_text("and now?")  # this model says what it is told
    told = language.tokenizer(MODEL).decode(language.received[-1].prompt)
    assert "hi, who are you?" in told
    assert "<b>Hello</b> there" in told
    chat.get_by_role("button", name="Clear").click()
    expect(log).to_have_count(0)
    assert visit.complaints == []
    visit.page.close()


@needs_chromium
def test_an_answer_can_be_stopped_and_an_error_is_told(browser: Browser, alone: Stage) -> None:
    language, page = language_of(alone), Visit(browser, alone.url).page
    chat = page.locator("#chat")
    text, log = chat.get_by_label("Message"), chat.locator(".chat-log li")
    text.fill("x" * 200)
    text.press("Enter")
    expect(log.nth(1)).to_contain_text("xxx")
    chat.get_by_role("button", name="Stop").click()
    expect(chat.locator(".chat-note")).to_contain_text("stopped")
    page.wait_for_timeout(200)
    assert len(language.cancelled) == 1
    language.say(OverloadedError("requests", limit=1, retry_after_s=1.0))
    text.fill("once more")
    text.press("Enter")
    expect(chat.locator(".is-error")).to_contain_text("requests")
    expect(chat.get_by_role("button", name="Send")).to_be_visible()
    page.close()


@needs_chromium
def test_a_server_without_robots_shows_none(browser: Browser, alone: Stage) -> None:
    visit = Visit(browser, alone.url)
    page = visit.page
    expect(page.locator("#policy")).to_contain_text(MODEL)
    for selector in ("#no-arms", "#pace", "[data-total=arms]", "[data-total=chunks]"):
        expect(page.locator(selector)).to_be_hidden()
    for total in ("requests", "tokens", "first", "cached"):
        expect(page.locator(f"[data-total={total}]")).to_have_text(re.compile(r"\d"))
    expect(page.locator("#timeline-facts")).to_contain_text("busy")
    expect(page.locator("#timeline-legend")).not_to_contain_text("denoise")
    for canvas in ("#split", "#timeline", "#budget", "#pool"):
        assert page.locator(canvas).evaluate(COUNT_COLOURS) > 3, canvas
    assert visit.complaints == []
    page.close()


@needs_chromium
def test_a_server_without_planners_shows_none(browser: Browser) -> None:
    with Stage(num_arms=1) as stage:
        page = Visit(browser, stage.url).page
        expect(page.locator(".arm")).to_have_count(1)
        expect(page.locator("#planners")).to_be_hidden()
        expect(page.locator("[data-total=tokens]")).to_be_hidden()
        page.close()


@needs_chromium
@pytest.mark.parametrize("num_arms", [0, 4])
def test_nothing_of_planners_runs_over_its_edge(browser: Browser, num_arms: int) -> None:
    with Stage(num_arms=num_arms, has_planners=True) as stage:
        page = browser.new_page(color_scheme="dark")
        page.goto(stage.url)
        expect(page.locator(".request").nth(4)).to_be_visible(timeout=20_000)
        page.locator("#chat").get_by_label("Message").fill("word " * 60)
        page.locator("#chat").get_by_label("Message").press("Enter")
        for width, height in SIZES:
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(250)
            assert page.evaluate(OVERFLOWS) == [], (width, height)
        page.close()


def test_robots_have_no_door_to_a_server_without_a_policy(alone: Stage) -> None:
    for path in (SIDE_PATH, "/"):
        with pytest.raises(InvalidStatus) as caught, connect(f"ws://127.0.0.1:{alone.port}{path}"):
            pass
        assert caught.value.response.status_code == 404
