// Language models beside the robots: their requests with how far each is, where each model is, and who had the lanes.

import { element, setFacts, setLegend, setText } from "./dom.js";
import { bytes, count, DASH, fixed, millis, percent } from "./format.js";
import { palette } from "./palette.js";
import { Split } from "./split.js";

const MAX_ROWS = 6;
const GONE_MS = 2500; // an ended request stays so long, or nobody could read a short one
const PHASES = { waiting: "waiting", prefill: "prefill", decode: "decode" };

export const requestOwner = (requestId) => `request ${requestId}`; // as the pool names it

class Row {
  constructor(requestId, onHover) {
    this.requestId = requestId;
    this.goneMs = null;
    this.parts = {
      name: element("b"),
      model: element("span", { class: "request-model" }),
      phase: element("span", { class: "request-phase" }),
      cached: element("i", { class: "is-cached" }),
      computed: element("i", { class: "is-computed" }),
      made: element("i", { class: "is-made" }),
      prompt: element("small"),
      answer: element("small"),
      rate: element("span", { class: "request-rate" }),
    };
    const { name, model, phase, cached, computed, made, prompt, answer, rate } = this.parts;
    this.root = element(
      "li",
      { class: "request" },
      element("div", { class: "request-name" }, name, model, phase),
      element("div", { class: "track is-prompt" }, element("div", {}, cached, computed), prompt),
      element("div", { class: "track is-answer" }, element("div", {}, made), answer),
      rate,
    );
    this.root.addEventListener("pointerenter", () => onHover(requestOwner(requestId)));
    this.root.addEventListener("pointerleave", () => onHover(null));
  }

  show(request) {
    const { name, model, phase, cached, computed, made, prompt, answer, rate } = this.parts;
    this.goneMs = null;
    this.root.dataset.phase = request.phase;
    setText(name, `#${request.request_id}`);
    setText(model, request.model);
    setText(phase, PHASES[request.phase] ?? request.phase);
    const numCached = Math.min(request.num_cached_tokens, request.num_computed_tokens);
    widen(cached, numCached, request.num_prompt_tokens);
    widen(computed, request.num_computed_tokens - numCached, request.num_prompt_tokens);
    widen(made, request.num_new_tokens, request.max_new_tokens);
    const share = numCached ? ` \u00b7 ${percent(numCached, request.num_prompt_tokens)} cached` : "";
    setText(prompt, `${count(request.num_computed_tokens)} / ${count(request.num_prompt_tokens)}${share}`);
    const choices = request.num_choices > 1 ? ` \u00b7 ${request.num_choices} choices` : "";
    setText(answer, `${count(request.num_new_tokens)} / ${count(request.max_new_tokens)}${choices}`);
    setText(rate, request.num_new_tokens ? `${fixed(request.tokens_per_s, request.tokens_per_s < 100 ? 1 : 0)} tok/s` : `${fixed(request.age_s, 1)} s`);
    const gave = request.num_preemptions ? `; gave its pages back ${request.num_preemptions} times` : "";
    this.root.title = `${count(request.num_pages)} pages; ${fixed(request.age_s, 1)} s old${gave}`;
  }

  end(nowMs) {
    if (this.goneMs !== null) return;
    this.goneMs = nowMs;
    this.root.dataset.phase = "ended";
    setText(this.parts.phase, "ended");
  }
}

export class Planners {
  #rows = new Map(); // request -> Row

  constructor(panel, { split, onHover }) {
    this.parts = Object.fromEntries([...panel.querySelectorAll("[data-part]")].map((each) => [each.dataset.part, each]));
    this.split = new Split(split);
    this.onHover = onHover;
    this.hasRobots = false;
  }

  clear() {
    this.#rows.clear();
    this.parts.requests.replaceChildren();
    this.split.clear();
  }

  show(state) {
    this.split.note(state);
    const { language } = state;
    if (!language) return;
    this.#showFacts(language);
    this.#showModels(language.models);
    this.#showRequests(language);
    setLegend(this.parts.legend, [
      ...(this.hasRobots ? [{ colour: palette.denoise, name: "robots" }] : []),
      { colour: palette["plan-prefill"], name: "planners: prompts" },
      { colour: palette["plan-decode"], name: "planners: answers" },
      { colour: palette["plan-cached"], name: "prompt found in pages" },
    ]);
  }

  light(owner) {
    for (const row of this.#rows.values()) row.root.classList.toggle("is-lit", requestOwner(row.requestId) === owner);
  }

  #showFacts(language) {
    setFacts(this.parts.facts, [
      ["running", count(language.num_running)],
      ["waiting", count(language.num_waiting)],
      ["tokens/s", fixed(language.tokens_per_s, language.tokens_per_s < 100 ? 1 : 0)],
      ["first token", language.first_token_p50_ms === null ? DASH : `${millis(language.first_token_p50_ms)} ms`],
      ["cached", percent(language.num_cached_tokens, language.num_prompt_tokens)],
      ["done", count(language.num_results)],
      ...(language.num_drafted_tokens ? [["drafts held", percent(language.num_held_tokens, language.num_drafted_tokens)]] : []),
      ...(language.num_preemptions ? [["gave pages back", count(language.num_preemptions)]] : []),
      ...(language.num_errors ? [["errors", count(language.num_errors)]] : []),
    ]);
  }

  #showModels(models) {
    const list = this.parts.models;
    const key = JSON.stringify(models);
    if (list.dataset.shown === key) return;
    list.dataset.shown = key;
    list.replaceChildren(
      ...models.map(({ name, state, stay, weight_bytes: weightBytes }) =>
        element(
          "li",
          { class: "model", "data-state": state, title: `${state}; ${stay}${weightBytes ? `; ${bytes(weightBytes)} of weights` : ""}` },
          element("i"),
          name,
          ...(state === "loaded" ? [] : [element("small", {}, state)]),
        ),
      ),
    );
  }

  #showRequests(language) {
    const nowMs = performance.now();
    const open = new Set(language.requests.map((request) => request.request_id));
    for (const [requestId, row] of this.#rows) {
      if (open.has(requestId)) continue;
      row.end(nowMs);
      if (nowMs - row.goneMs > GONE_MS) this.#remove(requestId);
    }
    for (const request of language.requests) {
      if (!this.#rows.has(request.request_id)) {
        while (this.#rows.size >= MAX_ROWS && this.#removeEnded());
        if (this.#rows.size >= MAX_ROWS) break;
        const row = new Row(request.request_id, this.onHover);
        this.#rows.set(request.request_id, row);
        this.parts.requests.append(row.root);
      }
      this.#rows.get(request.request_id).show(request);
    }
    const numMore = language.num_under_way - [...this.#rows.values()].filter((row) => row.goneMs === null).length;
    setText(this.parts.more, this.#rows.size ? (numMore > 0 ? `and ${count(numMore)} more` : "") : "no request under way");
  }

  #removeEnded() {
    for (const [requestId, row] of this.#rows) {
      if (row.goneMs === null) continue;
      this.#remove(requestId);
      return true;
    }
    return false;
  }

  #remove(requestId) {
    this.#rows.get(requestId).root.remove();
    this.#rows.delete(requestId);
  }
}

function widen(bar, part, whole) {
  bar.style.setProperty("--share", String(whole ? Math.min(1, part / whole) : 0));
}
