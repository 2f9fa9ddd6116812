"""Camera: pictures of a running dashboard, taken with headless Chromium.

python -m tests.e2e.dashboard_camera http://127.0.0.1:8000/ --png docs/images/dashboard.png
python -m tests.e2e.dashboard_camera http://127.0.0.1:8000/ --movie docs/images/dashboard.webp
python -m tests.e2e.dashboard_camera --staged 4 --planners --png /tmp/dashboard.png      (scripted arms and planners)
python -m tests.e2e.dashboard_camera --staged 0 --planners --png /tmp/planners.png       (no robots)
"""

import argparse
import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.dashboard_stage import Stage

logger = logging.getLogger(__name__)

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
WHY_ABSENT = f"{CHROMIUM} is not installed: apt-get install -y chromium"
MAX_MOVIE_BYTES = 3_000_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless, driven by Playwright."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=list(FLAGS)
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def look(url: str, *, width_px: int = 1440, height_px: int = 900, scale: float = 1.0,
         theme: str = "dark") -> Iterator[Page]:  # fmt: skip
    """A page that shows at least one arm's view, or that of a server without arms."""
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": width_px, "height": height_px},
            device_scale_factor=scale,
            color_scheme="light" if theme == "light" else "dark",
        )
        page.goto(url)
        page.wait_for_selector(
            '.arm-blank[hidden], [data-link="open"][data-serves="language"]',
            state="attached",
            timeout=30_000,
        )
        yield page


def shoot(page: Page, path: Path) -> None:
    """One PNG of what is in the window."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path)
    logger.info("%s: %d bytes", path, path.stat().st_size)


def record(page: Page, path: Path, *, num_pictures: int, rate_hz: float, width_px: int) -> None:
    """An animated WebP or GIF of `num_pictures` shots, as small as it must be for a README."""
    pictures = []
    start_s = time.monotonic()
    for at in range(num_pictures):
        page.wait_for_timeout(max(0.0, (start_s + at / rate_hz - time.monotonic()) * 1e3))
        shot = Image.open(io.BytesIO(page.screenshot(type="jpeg", quality=92)))
        height_px = round(shot.height * width_px / shot.width)
        pictures.append(shot.convert("RGB").resize((width_px, height_px), Image.Resampling.LANCZOS))
    real_hz = num_pictures / (time.monotonic() - start_s)
    path.parent.mkdir(parents=True, exist_ok=True)
    period_ms = round(1000 / real_hz)
    for quality in (78, 62, 48, 34):
        if path.suffix == ".gif":
            shown = [each.quantize(min(256, quality * 3)) for each in pictures]
            shown[0].save(path, save_all=True, append_images=shown[1:], duration=period_ms, loop=0)
        else:
            pictures[0].save(
                path, save_all=True, append_images=pictures[1:], duration=period_ms, loop=0,
                quality=quality, method=4,
            )  # fmt: skip
        if path.stat().st_size <= MAX_MOVIE_BYTES:
            break
    logger.info("%s: %d bytes, %.1f pictures/s", path, path.stat().st_size, real_hz)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000/")
    parser.add_argument("--staged", type=int, metavar="ARMS", help="show scripted arms instead")
    parser.add_argument("--planners", action="store_true", help="scripted language models, too")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--movie", type=Path)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--hz", type=float, default=6.0)
    parser.add_argument("--movie-width", type=int, default=960)
    parser.add_argument("--size", default="1440x900")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--theme", choices=("dark", "light"), default="dark")
    parser.add_argument("--wait", type=float, default=4.0, help="seconds before the first picture")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not CHROMIUM.exists():
        parser.error(WHY_ABSENT)
    if args.staged is None:
        _take(args, args.url)
        return
    with Stage(num_arms=args.staged, has_planners=args.planners) as stage:
        _take(args, stage.url)


def _take(args: argparse.Namespace, url: str) -> None:
    width_px, height_px = map(int, args.size.split("x"))
    with look(
        url, width_px=width_px, height_px=height_px, scale=args.scale, theme=args.theme
    ) as page:
        page.wait_for_timeout(args.wait * 1e3)
        if args.png:
            shoot(page, args.png)
        if args.movie:
            record(
                page, args.movie, num_pictures=args.pictures, rate_hz=args.hz,
                width_px=args.movie_width,
            )  # fmt: skip


if __name__ == "__main__":
    main()
