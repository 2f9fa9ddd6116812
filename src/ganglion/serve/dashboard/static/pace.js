// The chosen degree of pipelining and why: what each degree would bring, what is measured, and the quality rung.

import { element, setFacts, setLegend, setText } from "./dom.js";
import { DASH, fixed, millis } from "./format.js";
import { palette, spanColour } from "./palette.js";

export class Pace {
  constructor(panel) {
    this.panel = panel;
    this.parts = Object.fromEntries([...panel.querySelectorAll("[data-part]")].map((each) => [each.dataset.part, each]));
  }

  show({ pace, rung, totals, arms }) {
    this.panel.hidden = !pace;
    if (!pace) return;
    const { degree, why, rate, latency, facts, legend, unit } = this.parts;
    setText(degree, String(pace.degree));
    setText(unit, pace.degree === 1 ? "chunk of a robot at a time" : "chunks of each robot under way at once");
    setText(why, pace.reason);
    const numSessions = arms.filter((arm) => arm.session?.chunk_hz).length;
    const sum = totals.chunk_hz;
    setFacts(facts, [
      ["measured", `${numSessions ? fixed(sum / numSessions, 1) : DASH} /s \u00b7 ${millis(totals.latency_p50_ms)} ms`],
      ...(rung === null ? [] : [["quality", rung]]),
    ]);
    showBars(rate, pace, { at: 1, digits: 1, limit: Infinity });
    showBars(latency, pace, { at: 2, digits: 0, limit: pace.max_age_ms });
    setLegend(legend, [
      { colour: spanColour("encode"), name: "perceive" },
      { colour: spanColour("denoise"), name: "flow step" },
      { colour: palette.text, shape: "is-diamond", name: "newer view read" },
      { shape: "is-rainbow", colour: palette.soft, name: "context version" },
    ]);
  }
}

// A column for each degree; a forecast beyond `limit` is shown as not allowed, with the limit as a line.
function showBars(chart, pace, { at, digits, limit }) {
  const key = JSON.stringify([pace.degree, pace.forecasts, limit]);
  if (chart.dataset.shown === key) return;
  chart.dataset.shown = key;
  chart.parentElement.hidden = pace.forecasts.length === 0;
  const most = Math.max(...pace.forecasts.map((forecast) => forecast[at]), 1e-9);
  const isLimited = most > limit;
  chart.replaceChildren(
    ...pace.forecasts.map((forecast) => {
      const bar = element("i");
      bar.style.setProperty("--share", String(forecast[at] / most));
      const isTooOld = forecast[2] > pace.max_age_ms;
      const tone = [forecast[0] === pace.degree ? "is-chosen" : "", isTooOld ? "is-barred" : ""].join(" ").trim();
      const title = `degree ${forecast[0]}: ${fixed(forecast[1], 1)} chunks/s a robot, ${fixed(forecast[2], 0)} ms${isTooOld ? `; longer than the bound of ${fixed(pace.max_age_ms, 0)} ms` : ""}`;
      return element(
        "li",
        { class: tone, title },
        element("b", {}, fixed(forecast[at], forecast[at] >= 100 ? 0 : digits)),
        element("span", {}, bar),
        element("small", {}, String(forecast[0])),
      );
    }),
  );
  chart.classList.toggle("is-limited", isLimited);
  chart.style.setProperty("--limit", String(isLimited ? limit / most : 0));
}
