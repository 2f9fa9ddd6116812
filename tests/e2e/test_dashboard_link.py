"""An operator disturbs the link of a real robot process in a real browser, and the robot feels it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("gym_pusht")
pytest.importorskip("playwright", reason="playwright is not installed: pip install ganglion[dev]")

from playwright.sync_api import Page, expect

from ganglion.config import ServeConfig
from ganglion.robots.fleet import Fleet, FleetConfig, own_episodes
from ganglion.robots.impairment import Impairment
from ganglion.robots.loop import LoopConfig
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService, fake_spec
from ganglion.spec import ViewSpec
from tests.e2e.dashboard_camera import CHROMIUM, WHY_ABSENT, chromium

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=WHY_ABSENT)

SPEC = replace(
    fake_spec(),
    views=(ViewSpec(key="observation.image", height=96, width=96),),
    state_dim=2,
    action_dim=2,
    action_low=(0.0, 0.0),
    action_high=(512.0, 512.0),
)
DELAY_MS = 600
LIMIT_MS = 30_000  # this machine may be busy


@pytest.fixture(scope="module")
def service() -> Iterator[FakeService]:
    with FakeService(SPEC, infer_s=0.005) as opened:
        yield opened


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as browser:
        yield browser.new_page(viewport={"width": 1440, "height": 900})


def await_latency(page: Page, *, at_least: bool) -> None:
    page.wait_for_function(
        """([limit, isAtLeast]) => {
          const boxes = [...document.querySelectorAll(".arm .gauges div")];
          const text = boxes.find((box) => box.innerText.startsWith("Latency"))?.querySelector("dd").innerText ?? "";
          const value = parseFloat(text.replace(",", ""));
          return isAtLeast ? value >= limit : value < limit;
        }""",
        arg=[DELAY_MS, at_least],
        timeout=LIMIT_MS,
    )


def test_a_robot_feels_the_sliders_and_remembers_them(service: FakeService, page: Page) -> None:
    config = ServeConfig(port=0)
    with ServerThread(service, config=config) as first:
        port, url = first.port, first.url
        fleet = Fleet(
            FleetConfig(
                url=first.ws_url,
                robots=("a",),
                loop=LoopConfig(max_ticks=100_000),
                has_side_channel=True,
                impairment=Impairment(jitter_ms=20.0),
            ),
            own_episodes([["pusht"]], first_seed=0, num_episodes=None),
        )
        fleet.start()
        try:
            page.goto(url)
            arm = page.locator(".arm")
            expect(arm.locator(".arm-link output")).to_have_text(
                ["0 ms", "+20 ms", "0%"], timeout=LIMIT_MS
            )
            await_latency(page, at_least=False)
            arm.get_by_label("Delay").fill(str(DELAY_MS))
            await_latency(page, at_least=True)
            expect(arm.locator(".arm-link")).to_contain_text("disturbed")
            arm.get_by_role("button", name="Mend").click()
            await_latency(page, at_least=False)
            arm.get_by_label("Loss").fill("30")
            expect(arm.locator(".arm-link output").nth(2)).to_have_text("30%")
            page.wait_for_timeout(500)  # until the robot has it
            first.stop()
            with ServerThread(service, config=replace(config, port=port)):
                expect(page.locator("#link")).to_have_text("serving", timeout=LIMIT_MS)
                expect(arm.locator(".arm-link output")).to_have_text(
                    ["0 ms", "+0 ms", "30%"], timeout=LIMIT_MS
                )
        finally:
            fleet.stop()
