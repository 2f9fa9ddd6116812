"""Visit: one page of the dashboard in a browser, and what tests measure on it."""

from playwright.sync_api import Browser, Page

# Different colours among a canvas's pixels; one for a canvas that is blank.
COUNT_COLOURS = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
# What sticks out of the window, of its card or of its panel; what is cut off on purpose ends in an ellipsis.
OVERFLOWS = """() => {
  const out = [];
  if (document.documentElement.scrollWidth > innerWidth) out.push("page");
  for (const each of document.querySelectorAll(".queue-caption")) if (each.scrollWidth > each.clientWidth) out.push(each.innerText);
  for (const box of document.querySelectorAll(".arm, .arm-link, .arm-lanes, .arm-body, .pace, .panel, .bar")) {
    const outer = box.getBoundingClientRect();
    for (const each of box.querySelectorAll("*")) {
      const inner = each.getBoundingClientRect();
      if (!inner.width || each.closest(".arm-view, .chat-log, .only-read")) continue;
      if (inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1 || inner.left < outer.left - 1) {
        out.push(`${box.className}: ${each.tagName}.${each.className}`);
      }
    }
  }
  return out;
}"""
PIXELS = "canvas => canvas.toDataURL()"


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
